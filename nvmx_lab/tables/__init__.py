"""Checking the data folder: every fault of every table, with file, row and column.

>>> from nvmx_lab import tables
>>> print(tables.report(tables.check()))
data tables: no fault
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from nvmx_lab import data
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.tables import csvfile, runs, schema, tomlfile, whole
from nvmx_lab.tables.csvfile import Row, Table
from nvmx_lab.tables.fault import Fault, in_order, report
from nvmx_lab.tables.rules import Names, suggestion
from nvmx_lab.tables.tomlfile import Document, Section

__all__ = ["Fault", "check", "report"]

# L1's software is priced like L0's, by cycles per instruction; see nvmx_lab.costs.prices.
_PRICED = frozenset(PRIMITIVES) - {"l0_instructions", "l1_instructions", "l1_vmread", "l1_vmwrite"}
_NOT_TABLES = ("README.md", "protocol/README.md")
_FOLDERS = ("calibration", "cpus", "executed", "l1_handlers", "mixes")  # none of them may be empty
_T = TypeVar("_T")


def check(root: Path | None = None) -> list[Fault]:
    """Check every file of a data folder.

    Parameters
    ----------
    root : Path, optional
        The folder; by default that of the package.

    Returns
    -------
    list of Fault
        Every fault found, by file, row and column; nothing if all is well. A file that cannot be
        read is a fault, and so is one that no rule covers.

    Raises
    ------
    LabError
        If there is no data folder at all.
    """
    base = data.root() if root is None else root
    files = {
        path.relative_to(base).as_posix(): path
        for path in sorted(base.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    return in_order(_check(files))


def _check(files: Mapping[str, Path]) -> Iterator[Fault]:
    for folder in _FOLDERS:
        if not any(name.startswith(f"{folder}/") for name in files):
            yield Fault(f"{folder}/", None, "", "folder missing or empty")
    tables: dict[str, tuple[Table, list[Row], list[str]]] = {}
    documents: dict[str, tuple[Section, Document]] = {}
    parquet: dict[str, Path] = {}
    for file in (*schema.CSV, *schema.TOML):
        if file not in files:
            yield Fault(file, None, "", "file missing")
    for file, path in files.items():
        layouts = _of(file, schema.CSV_PATTERNS)
        layouts = (schema.CSV[file],) if file in schema.CSV else layouts
        section = schema.TOML.get(file) or _of(file, schema.TOML_PATTERNS)
        if layouts is not None:
            rows, header, faults = csvfile.read(path, file)
            yield from faults
            if header:
                table = max(layouts, key=lambda layout: len(set(header) & set(layout.columns)))
                tables[file] = table, rows, header
        elif section is not None:
            document, faults = tomlfile.read(path, file)
            yield from faults
            if document is not None:
                documents[file] = section, document
        elif fnmatchcase(file, "executed/*.parquet"):
            parquet[file] = path
        elif file not in _NOT_TABLES:
            yield Fault(file, None, "", "no rule covers this file", allowed="a known table")
    names = _names(files, tables, documents)
    for file, (table, rows, header) in tables.items():
        yield from csvfile.check(file, table, header, rows, names)
    for file, (section, document) in documents.items():
        yield from tomlfile.check(file, section, document, names)
    yield from _check_ids(documents)
    yield from _check_mixes(documents, names)
    yield from _check_executed(parquet, documents, tables, names)


def _names(
    files: Mapping[str, Path],
    tables: Mapping[str, tuple[Table, list[Row], list[str]]],
    documents: Mapping[str, tuple[Section, Document]],
) -> Names:
    """Collect the names that tables declare; a kind whose table could not be read is left out."""
    names: dict[str, frozenset[str]] = {
        "price": _PRICED | {"cpi"},
        "cpu": _stems(files, "cpus/*.toml"),
        "L1": _stems(files, "l1_handlers/*.csv"),
        "run": _stems(files, "executed/*.toml"),
    }
    for kind, file, column in (
        ("field", "vmcs_fields.csv", "name"),
        ("exit reason", "exit_reasons.csv", "name"),
        ("claim", "claims.csv", "id"),
    ):
        if file in tables:
            names[kind] = frozenset(row[column] for row in tables[file][1])
    if "l1_conditions.toml" in documents:
        names["L1 condition"] = frozenset(documents["l1_conditions.toml"][1].content)
    if "l0_releases.toml" in documents:
        content = documents["l0_releases.toml"][1].content
        for kind, key in (("feature", "features"), ("KVM release", "releases")):
            declared = content.get(key)
            if isinstance(declared, dict):
                names[kind] = frozenset(declared)
        if "l0_conditions.csv" in tables and "feature" in names:
            conditions = {row["name"] for row in tables["l0_conditions.csv"][1]}
            names["L0 condition"] = names["feature"] | conditions
    for file, (_, rows, _) in tables.items():
        if fnmatchcase(file, "l1_handlers/*.csv"):
            # Whatever its rows say (that has its own fault), a file is of the L1 of its name.
            for row in rows:
                kind = whole.handlers_of(Path(file).stem, row["variant"])
                names[kind] = names.get(kind, frozenset()) | {row["handler"]}
    return names


def _check_ids(documents: Mapping[str, tuple[Section, Document]]) -> Iterator[Fault]:
    """Check that a price list's ``id`` and a mix's ``name`` are the file's."""
    for file, (_, document) in documents.items():
        folder, stem = file.partition("/")[0], Path(file).stem
        key = {"cpus": "id", "mixes": "name"}.get(folder, "")
        got = document.content.get(key, stem)
        if got != stem:
            yield Fault(file, document.line([key]), key, "not the file's name", str(got), stem)


def _check_mixes(
    documents: Mapping[str, tuple[Section, Document]], names: Names
) -> Iterator[Fault]:
    """Check that the handlers of a mix are those of its L1 and variant."""
    for file, (_, document) in documents.items():
        l1, exits = document.content.get("l1"), document.content.get("exits")
        if not fnmatchcase(file, "mixes/*.toml") or not isinstance(exits, dict):
            continue
        if l1 not in names["L1"]:
            continue  # has its own fault
        variant = document.content.get("variant", "")
        declared = names.get(whole.handlers_of(str(l1), str(variant)))
        if declared is None:
            line = document.line(["variant"])
            yield Fault(file, line, "variant", f"unknown variant of {l1}", str(variant))
            continue
        for name in exits:
            for part in name.split(" + "):
                if part not in declared:
                    allowed = f"one of {len(declared)} of {l1}" + suggestion(part, declared)
                    line = document.line(["exits", name])
                    yield Fault(file, line, f"exits.{name}", "unknown handler", part, allowed)
        if not exits or not any(_positive(weight) for weight in exits.values()):
            yield Fault(file, document.line(["exits"]), "exits", "no weight above 0")


def _positive(weight: object) -> bool:
    return isinstance(weight, int | float) and weight > 0


def _check_executed(
    parquet: Mapping[str, Path],
    documents: Mapping[str, tuple[Section, Document]],
    tables: Mapping[str, tuple[Table, list[Row], list[str]]],
    names: Names,
) -> Iterator[Fault]:
    """Check the executed runs, and that each has its TOML file and each TOML file its run."""
    fields: dict[int, str] = {}
    for row in tables["vmcs_fields.csv"][1] if "vmcs_fields.csv" in tables else ():
        try:
            fields[int(row["encoding"], 16)] = row["name"]
        except ValueError:
            continue  # has its own fault
    yield from runs.check(parquet, fields, names)
    logged = {Path(file).name.partition(".")[0] for file in parquet}
    described = names.get("run", frozenset())
    for run in sorted(logged - described):
        yield Fault(f"executed/{run}.toml", None, "", "file missing")
    for run in sorted(described - logged):
        yield Fault(f"executed/{run}.exits.parquet", None, "", "file missing")


def _stems(files: Mapping[str, Path], pattern: str) -> frozenset[str]:
    return frozenset(Path(file).stem for file in files if fnmatchcase(file, pattern))


def _of(file: str, patterns: Mapping[str, _T]) -> _T | None:
    return next((patterns[pattern] for pattern in patterns if fnmatchcase(file, pattern)), None)
