"""Checking the executed runs: Parquet layouts, values, and sums that must agree between files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from nvmx_lab.tables.fault import Fault
from nvmx_lab.tables.rules import Flag, Names, OneOf, Text
from nvmx_lab.tables.tomlfile import Section

RUN: Final = Section(
    keys={
        "kvm": Text(pattern=r"\d+\.\d+", form='a kernel release, "6.1"'),
        "sync": OneOf(words=("eager", "lazy")),
        "shadow_vmcs": Flag(),
        "evmcs": Flag(),
        "mpx": Flag(),
        "l1": Text(),
        "l2": Text(),
    }
)
"""``RUN.toml``."""

_COUNTS = ("vmread", "vmwrite", "vmptrld", "vmclear", "rdmsr", "wrmsr")
LAYOUTS: Final[Mapping[str, Mapping[str, str]]] = {
    "exits": {
        "run": "text",
        "exit": "integer",
        "phase": "text",
        "l2_exit_reason": "text",
        "instructions": "integer",
        "l1_exits": "integer",
        **{f"l0_{name}": "integer" for name in (*_COUNTS, "rare_vmread")},
    },
    "l1_ops": {
        "run": "text",
        "exit": "integer",
        "seq": "integer",
        "op": "text",
        "field": "integer",
        "trapped": "flag",
        "field_name": "text",
    },
    "l0_ops": {
        "run": "text",
        "exit": "integer",
        "seq": "integer",
        "l1_exit_handler": "text",
        "op": "text",
        "field": "integer",
        "function": "text",
        "field_name": "text",
    },
    "segments": {
        "run": "text",
        "exit": "integer",
        "seq": "integer",
        "level": "text",
        "handler": "text",
        "field": "integer",
        "field_name": "text",
        "instructions": "integer",
        **{name: "integer" for name in (*_COUNTS, "rare_vmread")},
    },
}
"""Columns and types of ``RUN.<kind>.parquet``, by kind."""

L0_OPS: Final = ("INVEPT", "INVVPID", "RDMSR", "VMCLEAR", "VMPTRLD", "VMREAD", "VMWRITE", "WRMSR")
"""Instructions that ``RUN.l0_ops.parquet`` logs."""

_Frame = Any  # a pyarrow.Table; the library has no type information


def check(files: Mapping[str, Path], fields: Mapping[int, str], names: Names) -> Iterator[Fault]:
    """Yield every fault of the Parquet files of executed runs.

    Parameters
    ----------
    files : mapping of str to Path
        The files by their name below the data folder, ``"executed/RUN.exits.parquet"``.
    fields : mapping of int to str
        Field names by encoding; empty if the catalogue could not be read.
    names : mapping
        Declared names; ``"exit reason"`` is used.
    """
    runs: dict[str, dict[str, tuple[str, Path]]] = {}
    for file, path in files.items():
        run, _, kind = path.name.removesuffix(".parquet").rpartition(".")
        if not run or kind not in LAYOUTS:
            allowed = ", ".join(f"RUN.{known}.parquet" for known in LAYOUTS)
            yield Fault(file, None, "", "not the name of a run's file", path.name, allowed)
        else:
            runs.setdefault(run, {})[kind] = file, path
    for run, kinds in runs.items():
        folder = next(iter(kinds.values()))[0].rpartition("/")[0]
        for kind in ("exits", "l1_ops"):
            if kind not in kinds:
                yield Fault(f"{folder}/{run}.{kind}.parquet", None, "", "file missing")
        tables: dict[str, _Frame] = {}
        for kind, (file, path) in kinds.items():
            table, faults = _read(file, path, LAYOUTS[kind])
            yield from faults
            if table is not None:
                yield from _check_values(file, kind, run, table, fields, names)
                tables[kind] = table
        yield from _check_sums(kinds, tables)


def _read(file: str, path: Path, layout: Mapping[str, str]) -> tuple[_Frame | None, list[Fault]]:
    """Read a file; a table is returned only if every column is there with its type."""
    import pyarrow as pa  # slow to import, and only this check needs it
    import pyarrow.parquet as pq

    try:
        # One thread: the check is short, and workers of a batch are many.
        table = pq.read_table(path, use_threads=False, partitioning=None)
    except (pa.ArrowException, OSError, ValueError) as error:
        return None, [Fault(file, None, "", "malformed Parquet", str(error).partition("\n")[0])]
    faults = [
        Fault(file, None, column, "unknown column", allowed=", ".join(layout))
        for column in table.column_names
        if column not in layout
    ]
    if len(set(table.column_names)) < len(table.column_names):
        return None, [*faults, Fault(file, None, "", "a column appears twice")]
    usable = True
    for column, kind in layout.items():
        if column not in table.column_names:
            faults.append(Fault(file, None, column, "column missing"))
            usable = False
            continue
        stored = table.schema.field(column).type
        if not _is_kind(stored, kind):
            faults.append(Fault(file, None, column, "of another type", str(stored), kind))
            usable = False
        elif table[column].null_count:
            first = table[column].is_null().index(True).as_py() + 1
            faults.append(Fault(file, first, column, "no value"))
            usable = False
    return (table if usable else None), faults


def _is_kind(stored: Any, kind: str) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(stored):
        stored = stored.value_type
    return bool(
        {
            "integer": pa.types.is_integer(stored),
            "text": pa.types.is_string(stored) or pa.types.is_large_string(stored),
            "flag": pa.types.is_boolean(stored),
        }[kind]
    )


def _check_values(
    file: str, kind: str, run: str, table: _Frame, fields: Mapping[int, str], names: Names
) -> Iterator[Fault]:
    yield from _not_among(file, table, "run", [run])
    yield from _order(file, kind, table)
    for column, stored in LAYOUTS[kind].items():
        if stored == "integer" and column != "field":
            yield from _below_zero(file, table, column)
    reasons = names.get("exit reason")
    if kind == "exits" and reasons is not None:
        yield from _not_among(file, table, "l2_exit_reason", reasons)
    if kind == "l1_ops" and reasons is not None:
        yield from _not_among(file, table, "op", reasons)
    if kind == "l0_ops":
        yield from _not_among(file, table, "op", L0_OPS)
        if reasons is not None:
            handlers = [reason.lower() for reason in reasons]
            yield from _not_among(file, table, "l1_exit_handler", [*handlers, "exit"])
    if kind == "segments":
        yield from _not_among(file, table, "level", ["L0", "L1"])
        if reasons is not None:
            yield from _not_among(file, table, "handler", [*reasons, "exit", ""])
    if kind != "exits" and fields:
        yield from _check_fields(file, table, fields)


def _order(file: str, kind: str, table: _Frame) -> Iterator[Fault]:
    """Check that exits count from 0 without a gap; elsewhere, that (exit, seq) increases."""
    import numpy as np

    exits = table["exit"].to_numpy().astype(np.int64)
    if kind == "exits":
        wrong = np.flatnonzero(exits != np.arange(len(exits)))
        if len(wrong):
            row = int(wrong[0])
            yield Fault(
                file, row + 1, "exit", "exits do not count from 0", str(exits[row]), str(row)
            )
        return
    step = np.diff(exits)
    wrong = np.flatnonzero(step < 0)
    if len(wrong):
        row = int(wrong[0]) + 1
        yield Fault(file, row + 1, "exit", "less than in the row before", str(exits[row]))
    seq = table["seq"].to_numpy().astype(np.int64)
    wrong = np.flatnonzero((step == 0) & (np.diff(seq) <= 0))
    if len(wrong):
        row = int(wrong[0]) + 1
        yield Fault(file, row + 1, "seq", "not more than in the row before", str(seq[row]))


def _below_zero(file: str, table: _Frame, column: str) -> Iterator[Fault]:
    import pyarrow.compute as pc

    if table.num_rows and pc.min(table[column]).as_py() < 0:
        row = pc.index(pc.less(table[column], 0), True).as_py()
        yield Fault(file, row + 1, column, "less than zero", str(table[column][row]))


def _not_among(
    file: str, table: _Frame, column: str, allowed: Sequence[str] | frozenset[str]
) -> Iterator[Fault]:
    """Yield one fault for each unknown word of a column, at its first row."""
    import pyarrow.compute as pc

    known = set(allowed)
    for word in pc.unique(table[column]).to_pylist():
        if word not in known:
            # A dictionary column compares only after decoding.
            row = pc.index(table[column].cast("string"), word).as_py()
            listed = ", ".join(sorted(known)) if len(known) < 12 else f"one of {len(known)} names"
            yield Fault(file, row + 1, column, "unknown value", str(word), listed)


def _check_fields(file: str, table: _Frame, fields: Mapping[int, str]) -> Iterator[Fault]:
    """Check that encodings are in the catalogue, under the logged name; -1 stands for no field.

    A name may be empty: the logs leave some fields unnamed.
    """
    pairs = table.select(["field", "field_name"]).group_by(["field", "field_name"]).aggregate([])
    for encoding, name in zip(
        pairs["field"].to_pylist(), pairs["field_name"].to_pylist(), strict=True
    ):
        if encoding == -1 and name == "":
            continue
        if encoding not in fields:
            column, allowed = "field", "an encoding of vmcs_fields.csv, or -1 with an empty name"
        elif name not in ("", fields[encoding]):
            column, allowed = "field_name", fields[encoding]
        else:
            continue
        import pyarrow.compute as pc

        same = pc.and_(
            pc.equal(table["field"], encoding), pc.equal(table["field_name"].cast("string"), name)
        )
        row = pc.index(same, True).as_py()
        yield Fault(file, row + 1, column, "unknown field", f"{encoding:#06x} {name}", allowed)


def _check_sums(
    kinds: Mapping[str, tuple[str, Path]], tables: Mapping[str, _Frame]
) -> Iterator[Fault]:
    """Per exit, stretches and single instructions of L0 must add up to the exit's totals."""
    import numpy as np
    import pyarrow.compute as pc

    if "exits" not in tables:
        return
    exits = tables["exits"]
    n = exits.num_rows
    for kind, table in tables.items():
        file = kinds[kind][0]
        index = table["exit"].to_numpy().astype(np.int64)
        if len(index) and not 0 <= index.min() <= index.max() < n:
            row = int(np.flatnonzero((index < 0) | (index >= n))[0])
            allowed = f"0 to {n - 1}, an exit of {kinds['exits'][0]}"
            yield Fault(file, row + 1, "exit", "unknown exit", str(index[row]), allowed)
            continue
        sums: dict[str, Any] = {}
        if kind == "segments":
            at_l0 = pc.equal(table["level"], "L0").to_numpy()
            sums["instructions"] = np.bincount(index, table["instructions"].to_numpy(), n)
            for name in (*_COUNTS, "rare_vmread"):
                sums[f"l0_{name}"] = np.bincount(index, table[name].to_numpy() * at_l0, n)
        elif kind == "l0_ops":
            for name in _COUNTS:
                executed = pc.equal(table["op"], name.upper()).to_numpy()
                sums[f"l0_{name}"] = np.bincount(index[executed], minlength=n)
        for column, total in sums.items():
            wrong = np.flatnonzero(total != exits[column].to_numpy())
            if len(wrong):
                row = int(wrong[0])
                what = f"differs from the sum over {file} (in {len(wrong)} exits)"
                got, allowed = str(exits[column][row]), f"{total[row]:.0f}"
                yield Fault(kinds["exits"][0], row + 1, column, what, got, allowed)
