"""The check of the data folder: it passes on ours, and sees every kind of fault."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nvmx_lab import data, tables
from nvmx_lab.tables import csvfile, runs, schema
from nvmx_lab.tables.rules import Flag, Known, Number, OneOf, Rule
from nvmx_lab.tables.tomlfile import read as read_toml

RUN = "kvm61_lazy_xen_l1"
HANDLERS, LOGS = "l1_handlers/kvm-5.3.csv", "l1_handlers/kvm-6.1.csv"
CSV = dict(zip((HANDLERS, LOGS), schema.CSV_PATTERNS["l1_handlers/*.csv"], strict=True))
CSV |= schema.CSV

IN_KERNEL = ("cpuid", "rdmsr", "vmcall", "wbinvd", "xsetbv")
# Rows that the small copy keeps of the long tables: hundreds of checks are made of it.
KEEP = {
    HANDLERS: lambda row: row["handler"] in ("cpuid", "pio_user", "get_sregs"),
    LOGS: lambda row: row["variant"] == "nokstack" and row["handler"] in IN_KERNEL,
    "l1_instructions.csv": lambda row: (
        (row["l1"], row["variant"]) == ("kvm-6.1", "nokstack") and row["handler"] in IN_KERNEL
    ),
    "exit_mixes.csv": lambda row: (
        row["id"] in ("win10-rtc-storm", "win10-hpet", "game-hyperv-off", "includeos-dns")
    ),
    "hw_round_trips.csv": lambda row: row["microarchitecture"] in ("Airmont", "Merom", "Skylake"),
    "l0_paths.csv": lambda row: row["path"].startswith(("reflect", "pull", "vmx_")),
    "l0_lengths.csv": lambda row: row["run"] in ("", RUN),
    "protocol/example-simulated.csv": lambda row: row["boot"] == "1",
    **{
        name: lambda row: int(row["seq"]) < 4
        for name in schema.CSV
        if name.endswith("_field_access.csv")
    },
}
EXITS = 60  # of the executed run

slow_folder = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small copy of the data folder: each kind of file, long tables cut short."""
    copy = tmp_path_factory.mktemp("data") / "data"

    def skip(where: str, names: list[str]) -> set[str]:
        keep = {
            "executed": lambda n: n.startswith((f"{RUN}.", "l1_")),
            "l1_handlers": lambda n: f"l1_handlers/{n}" in (HANDLERS, LOGS),
            "mixes": lambda n: n == "cpuid.toml",
            "cpus": lambda n: n.startswith("skylake"),
        }.get(Path(where).name, lambda n: True)
        return {name for name in names if not keep(name)}

    shutil.copytree(data.root(), copy, ignore=skip)
    for name, keep in KEEP.items():
        rows = [row for row in data.read_rows(copy / name) if keep(row)]
        assert len(rows) > 3
        (copy / name).write_bytes(as_csv([list(rows[0]), *(list(r.values()) for r in rows)]))
    for kind in ("exits", "l1_ops", "segments"):
        file = copy / f"executed/{RUN}.{kind}.parquet"
        table = pq.read_table(file)
        pq.write_table(table.filter(pc.less(table["exit"], EXITS)), file)
    return copy


def lines_of(folder: Path, name: str) -> list[int]:
    """Return the line of each row of a table."""
    return [row.line for row in csvfile.read(folder / name, name)[0]]


@contextlib.contextmanager
def changed(file: Path, content: bytes | None) -> Iterator[None]:
    """Give a file other content, or none, for a while."""
    before = file.read_bytes()
    try:
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        yield
    finally:
        file.write_bytes(before)


def faults_with(folder: Path, name: str, content: bytes | None) -> list[tables.Fault]:
    with changed(folder / name, content):
        return tables.check(folder)


def cells_of(folder: Path, name: str) -> list[list[str]]:
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def as_csv(cells: list[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue().encode("utf-8", "surrogateescape")


def at(faults: list[tables.Fault], name: str, row: int | None, column: str) -> list[tables.Fault]:
    return [f for f in faults if (f.file, f.row, f.column) == (name, row, column)]


def test_our_data_has_no_fault() -> None:
    faults = tables.check()
    assert faults == [], tables.report(faults)


def test_the_small_copy_has_no_fault(folder: Path) -> None:
    assert tables.check(folder) == []


def test_the_report_names_file_row_and_column() -> None:
    fault = tables.Fault("a/b.csv", 7, "rare", "not a flag", "yes", "true, false")
    assert str(fault) == "a/b.csv:7: rare: not a flag; got 'yes'; allowed: true, false"
    assert tables.report([]) == "data tables: no fault"
    assert tables.report([fault, fault]).endswith("data tables: 2 faults in 1 file")
    assert "b.csv: missing" in tables.report([tables.Fault("b.csv", None, "", "missing")])


# ---- CSV: every table, every column, some row ---------------------------------------------------


@pytest.mark.parametrize("name", sorted(CSV))
def test_each_column_is_needed(folder: Path, name: str) -> None:
    cells = cells_of(folder, name)
    for index, column in enumerate(cells[0]):
        without = [row[:index] + row[index + 1 :] for row in cells]
        faults = faults_with(folder, name, as_csv(without))
        assert [f.what for f in at(faults, name, 1, column)] == ["column missing"]


def bad_values(rule: Rule) -> list[str]:
    """Return cells that a rule must refuse."""
    bad = [] if rule.blank else [""]
    if isinstance(rule, Number):
        bad += ["nan", "inf", "-1e400", "1_0", "ten", " 1", "0x1F", "--1"]
        bad += ["1.5"] if rule.whole else []
        bad += [str(rule.high + 1)] if rule.high < 1e300 else []
        bad += [str(rule.low - 1)] if rule.low > -1e300 else []
    elif isinstance(rule, Flag):
        bad += ["True", "1", "yes"]
    elif isinstance(rule, OneOf | Known):
        bad += ["no-such-word"]
    return [*bad, "\udcff", "a\x00b", " padded"]


@pytest.mark.parametrize("name", sorted(CSV))
@slow_folder
@given(draw=st.data())
def test_a_bad_cell_is_found_where_it_is(folder: Path, name: str, draw: st.DataObject) -> None:
    cells = cells_of(folder, name)
    row = draw.draw(st.integers(0, len(cells) - 2), label="row")
    column = draw.draw(st.sampled_from(sorted(CSV[name].columns)), label="column")
    bad = draw.draw(st.sampled_from(bad_values(CSV[name].columns[column])), label="bad")
    cells[row + 1][cells[0].index(column)] = bad
    line = lines_of(folder, name)[row]
    faults = faults_with(folder, name, as_csv(cells))
    assert at(faults, name, line, column), tables.report(faults)


@pytest.mark.parametrize("name", sorted(name for name in CSV if CSV[name].key))
@slow_folder
@given(draw=st.data())
def test_a_row_twice_is_found(folder: Path, name: str, draw: st.DataObject) -> None:
    cells = cells_of(folder, name)
    row = draw.draw(st.integers(1, len(cells) - 1), label="row")
    faults = faults_with(folder, name, as_csv([*cells, cells[row]]))
    last = len(as_csv(cells).splitlines()) + 1
    found = at(faults, name, last, ", ".join(CSV[name].key))
    assert [f.what for f in found] == [f"row again (line {lines_of(folder, name)[row - 1]})"]


@pytest.mark.parametrize("name", sorted(CSV))
def test_rows_of_another_length_are_all_found(folder: Path, name: str) -> None:
    cells = cells_of(folder, name)
    cells[1] = cells[1][:-1]
    cells[-1] = [*cells[-1], "more"]
    faults = faults_with(folder, name, as_csv(cells))
    column = cells[0][-1]
    for row in (0, -1):
        found = at(faults, name, lines_of(folder, name)[row], column)
        assert "the row has another length than the header" in [f.what for f in found]


@pytest.mark.parametrize("name", sorted(CSV))
@pytest.mark.parametrize("end", [0, 1, 40, -1])
def test_a_truncated_table_is_a_fault(folder: Path, name: str, end: int) -> None:
    content = (folder / name).read_bytes()
    # The last line loses its last column.
    cut = content[: content.rstrip().rindex(b",")] if end == -1 else content[:end]
    assert any(f.file == name for f in faults_with(folder, name, cut))


def test_two_faults_are_both_found(folder: Path) -> None:
    cells = cells_of(folder, "published_loops.csv")
    cells[1][1], cells[5][2] = "x", "y"
    faults = faults_with(folder, "published_loops.csv", as_csv(cells))
    assert [(f.row, f.column) for f in faults] == [(2, "before_cycles"), (6, "after_cycles")]


def test_a_quoted_cell_over_lines_does_not_move_the_rows_after_it(folder: Path) -> None:
    cells = cells_of(folder, "exit_reasons.csv")
    cells[1][3] = "one\ntwo\nthree"
    cells[2][1] = "x"
    faults = faults_with(folder, "exit_reasons.csv", as_csv(cells))
    assert [(f.row, f.column) for f in faults] == [(5, "number")]


def test_malformed_csv_is_a_fault(folder: Path) -> None:
    content = (folder / "claims.csv").read_bytes() + b'"open'
    faults = faults_with(folder, "claims.csv", content)
    assert any("malformed CSV" in f.what and f.row and f.column == "id" for f in faults)


# ---- CSV: what rows and tables must mean --------------------------------------------------------


def set_cell(folder: Path, name: str, key: str, column: str, value: str) -> list[tables.Fault]:
    """Change a cell of the first row whose first column is `key`; return the file's faults."""
    cells = cells_of(folder, name)
    row = next(i for i, row in enumerate(cells) if row[0] == key)
    cells[row][cells[0].index(column)] = value
    return [f for f in faults_with(folder, name, as_csv(cells)) if f.file == name]


@pytest.mark.parametrize(
    ("field", "column", "value", "what"),
    [
        ("GUEST_CS_BASE", "shadow_v53", "ro", "rare field is shadowed"),
        ("GUEST_CS_BASE", "shadow_v52", "rw", "rare field is shadowed"),
        ("GUEST_CS_AR_BYTES", "shadow_v53", "none", "number of ro members"),
        ("GUEST_CS_BASE", "rare", "false", "one of 10 bases"),
        ("GUEST_CS_AR_BYTES", "rare", "true", "not among the 36 fields of the patch"),
        ("GUEST_CS_BASE", "rare_order", "27", "value again"),
        ("GUEST_BNDCFGS", "rare_order", "", "disagrees with rare"),
        ("GUEST_CS_BASE", "name", "GUEST_CS_BASIS", "catalogue lacks fields of the rare class"),
        ("GUEST_CS_BASE", "encoding", "0x680a", "value again"),
        ("GUEST_CS_BASE", "encoding", "0x4828", "disagrees with encoding"),
        ("GUEST_CS_BASE", "width", "64", "disagrees with encoding"),
        ("GUEST_CS_BASE", "group", "host", "disagrees with encoding"),
        ("GUEST_CS_BASE", "in_vmcs12", "false", "disagrees with the columns"),
        ("GUEST_CS_BASE", "l1_vmread_triggers_rare_sync", "false", "disagrees with the columns"),
        ("GUEST_RIP", "l1_vmwrite_traps_v53", "true", "disagrees with the columns"),
        ("GUEST_CS_BASE", "synced_at_exit_after", "true", "disagrees with the columns"),
        ("EPTP_INDEX", "shadow_v53", "rw", "shadowed field is not in vmcs12"),
    ],
)
def test_the_field_sets_are_checked(
    folder: Path, field: str, column: str, value: str, what: str
) -> None:
    found = set_cell(folder, "vmcs_fields.csv", field, column, value)
    assert any(
        what in f.what and f.column in (column, "rare_order", "name", "width") for f in found
    )


@pytest.mark.parametrize(
    ("name", "key", "column", "value", "what"),
    [
        ("claims.csv", "G", "claimed_low_cycles", "18", "less than claimed_low_cycles"),
        ("claims.csv", "A", "vmread_high", "34", "less than vmread_low"),
        ("claims.csv", "A", "claimed_cycles", "", "disagrees with bound"),
        ("claims.csv", "A", "unit", "ns", "unknown value"),
        ("hw_round_trips.csv", "Airmont", "median_cycles", "1", "less than min_cycles"),
        ("exit_mixes.csv", "win10-rtc-storm", "fraction", "0.5", "not the share"),
        ("exit_mixes.csv", "game-hyperv-off", "fraction", "0.9", "add up to more than 1"),
        ("exit_mixes.csv", "win10-hpet", "workload", "other", "differs from line"),
        ("l0_paths.csv", "reflect", "fields", "GUEST_RIP GUEST_RPI", "unknown field 'GUEST_RPI'"),
        ("l0_paths.csv", "reflect", "fields", "*0", "unknown field"),
        ("l0_paths.csv", "reflect", "fields", "", "with VMREAD"),
        ("l0_paths.csv", "reflect", "condition", "!no-such", "unknown L0 condition '!no-such'"),
        ("l0_paths.csv", "reflect", "condition", "changed", "a field behind a colon"),
        ("l0_paths.csv", "reflect", "condition", "mpx changed:X", "unknown field 'changed:X'"),
        (HANDLERS, "kvm-5.3", "arg", "", "EXIT needs an argument"),
        (HANDLERS, "kvm-5.3", "arg", "CPUDI", "unknown exit reason"),
        (HANDLERS, "kvm-5.3", "op", "VMREAD", "unknown field"),
        (HANDLERS, "kvm-5.3", "op", "VMRESUME", "VMRESUME has no argument"),
        (HANDLERS, "kvm-5.3", "seq", "7", "does not count on"),
        (HANDLERS, "kvm-5.3", "l1", "kvm-5.4", "not the file's name"),
        ("l1_instructions.csv", "kvm-6.1", "handler", "no_such", "unknown handler"),
    ],
)
def test_what_rows_mean_is_checked(
    folder: Path, name: str, key: str, column: str, value: str, what: str
) -> None:
    found = set_cell(folder, name, key, column, value)
    assert any(what in f.what for f in found), tables.report(found)


def test_an_unknown_name_comes_with_a_suggestion(folder: Path) -> None:
    found = set_cell(folder, "vmcs_field_use.csv", "Hyper-V", "field", "GUEST_RIPP")
    assert "did you mean 'GUEST_RIP'" in found[0].allowed


def test_an_unreadable_catalogue_does_not_drown_the_report(folder: Path) -> None:
    faults = faults_with(folder, "vmcs_fields.csv", b"")
    assert [(f.file, f.row, f.what) for f in faults] == [("vmcs_fields.csv", 1, "no header")]


# ---- TOML ---------------------------------------------------------------------------------------


CPU = "cpus/skylake-2015.toml"


@pytest.mark.parametrize(
    ("name", "old", "new", "column", "what"),
    [
        (CPU, "p50 = 23", "p50 = 230", "vmread_first.p95", ""),
        (CPU, "p05 = 16", "p05 = 24", "vmread_first.p50", ""),
        (CPU, "p50 = 23", "p50 = nan", "vmread_first.p50", "not finite"),
        (CPU, "p50 = 23", "p50 = '23'", "vmread_first.p50", "not a number"),
        (CPU, "p50 = 23", "p50 = true", "vmread_first.p50", "not a number"),
        (CPU, "p50 = 23", "p50 = -23", "vmread_first.p50", "out of range"),
        (CPU, "p50 = 23", "p51 = 23", "vmread_first.p51", "unknown key"),
        (CPU, "p50 = 23", "p50 = ", "p50", "malformed TOML"),
        (CPU, "p50 = 23", "p50 = '\udcff'", "p50", "not UTF-8"),
        (CPU, "[vmread_first]", "[vmread_frist]", "vmread_frist", "unknown price"),
        (CPU, 'unit = "TSC cycles"', 'unit = "ns"', "vmread_first.unit", "unknown value"),
        (CPU, 'basis = "calibrated"', 'basis = "felt"', "vmread_first.basis", "unknown value"),
        (CPU, '"C1"', '"Z9"', "vmread_first.claims", "unknown claim: 'Z9'"),
        (CPU, 'id = "skylake-2015"', 'id = "skylake"', "id", "not the file's name"),
        ("cpus/skylake-2015-blind.toml", 'base = "skylake-2015"', 'base = "x"', "base", "unknown"),
        ("calibration/prior.toml", "p05 = 14", "p05 = 94", "vmread_first.p50", "less than p05"),
        (
            "l0_releases.toml",
            'extends = "5.3"',
            'extends = "5.4"',
            "releases.5.8.extends",
            "unknown",
        ),
        ("l0_releases.toml", '["patch07"', '["patch7"', "releases.5.3.features", "unknown feature"),
        (
            "l1_conditions.toml",
            "probability = 0.1\n",
            "probability = 2\n",
            "rvi_changed.probability",
            "out of range",
        ),
        (
            "l1_conditions.toml",
            'requires = "apicv_in_l1"',
            'requires = "apic"',
            "rvi_changed.requires",
            "unknown L1 condition",
        ),
        (f"executed/{RUN}.toml", 'sync = "lazy"', 'sync = "late"', "sync", "unknown value"),
        (f"executed/{RUN}.toml", "evmcs = false", "evmcs = 0", "evmcs", "not a flag"),
        (f"executed/{RUN}.toml", 'l1 = "Xen 4.17"', 'l1 = ""', "l1", "empty"),
    ],
)
def test_a_bad_toml_value_is_found_where_it_is(
    folder: Path, name: str, old: str, new: str, column: str, what: str
) -> None:
    text = (folder / name).read_text(encoding="utf-8")
    assert old in text
    changed_text = text.replace(old, new, 1)
    content = changed_text.encode("utf-8", "surrogateescape")
    faults = [f for f in faults_with(folder, name, content) if f.file == name]
    found = [f for f in faults if f.column == column and what in f.what]
    assert found, tables.report(faults)
    line = text[: text.index(old)].count("\n") + 1
    assert found[0].row in (line, line + 1)  # p05 above p50 is a fault of p50, a line on


@pytest.mark.parametrize("name", [CPU, f"executed/{RUN}.toml", "l0_releases.toml"])
def test_each_line_of_a_toml_file_is_needed(folder: Path, name: str) -> None:
    text = (folder / name).read_text(encoding="utf-8")
    optional = ("claims", "includes_instructions", "extends", "no-", "[", "patch", "#", "ibpb")
    skipped = ("light-pull", "migration-sync", "tsc-multiplier", "cr3-always", "host-kstack")
    skipped = (*skipped, "validate-first")
    kept = 0
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines[:60]):
        if not re.match(r"[a-z]\w* = ", line) or line.startswith((*optional, *skipped)):
            continue
        if '"""' in line:
            continue
        key = line.partition(" = ")[0]
        without = "".join(lines[:index] + lines[index + 1 :]).encode()
        faults = faults_with(folder, name, without)
        assert any(
            f.file == name and f.what == "key missing" and f.column.endswith(key) and f.row
            for f in faults
        )
        kept += 1
    assert kept > 4


def test_lines_of_toml_keys(tmp_path: Path) -> None:
    text = (
        "# a comment\n"
        "a = 1\n"
        'text = """\n'
        "[not.a.table]\n"
        "b = 2\n"
        '"""\n'
        "list = [\n"
        '  "x",\n'
        "]\n"
        "[t]\n"
        "c = 3\n"
        '[t."5.3"]\n'
        "d.e = 4\n"
        "[[item]]\n"
        "f = 5\n"
        "[[item]]\n"
        "f = 6\n"
        "[item.inner]\n"
        "g = 7\n"
    )
    assert tomllib.loads(text)["item"][1]["inner"]["g"] == 7
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    document, faults = read_toml(tmp_path / "x.toml", "x.toml")
    assert faults == []
    assert document is not None
    where = {
        ("a",): 2,
        ("text",): 3,
        ("list",): 7,
        ("t",): 10,
        ("t", "c"): 11,
        ("t", "5.3"): 12,
        ("t", "5.3", "d", "e"): 13,
        ("item", "0", "f"): 15,
        ("item", "1", "f"): 17,
        ("item", "1", "inner", "g"): 19,
        ("item", "1", "inner", "absent"): 18,
        ("absent",): 1,
    }
    assert {path: document.line(path) for path in where} == where


# ---- executed runs ------------------------------------------------------------------------------


def parquet(table: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def with_value(table: Any, column: str, row: int, value: object) -> Any:
    """Return the table with one value changed."""
    index = table.column_names.index(column)
    values = table[column].to_pylist()
    values[row] = value
    stored = table.schema.field(column).type
    stored = stored.value_type if pa.types.is_dictionary(stored) else stored
    stored = pa.int64() if pa.types.is_unsigned_integer(stored) else stored
    return table.set_column(index, column, pa.array(values, stored))


@pytest.mark.parametrize("kind", ["exits", "l1_ops", "segments"])
def test_each_column_of_a_run_is_needed_with_its_type(folder: Path, kind: str) -> None:
    name = f"executed/{RUN}.{kind}.parquet"
    table = pq.read_table(folder / name)
    for column, stored in runs.LAYOUTS[kind].items():
        faults = faults_with(folder, name, parquet(table.drop_columns([column])))
        assert [f.what for f in at(faults, name, None, column)] == ["column missing"]
        other = pa.float64() if stored != "text" else pa.binary()
        index = table.column_names.index(column)
        nulls = pa.nulls(table.num_rows, other)
        faults = faults_with(folder, name, parquet(table.set_column(index, column, nulls)))
        assert [f.what for f in at(faults, name, None, column)] == ["of another type"]
    faults = faults_with(folder, name, parquet(table.append_column("more", table["exit"])))
    assert [f.what for f in at(faults, name, None, "more")] == ["unknown column"]


@pytest.mark.parametrize(
    ("kind", "column", "value", "what"),
    [
        ("exits", "run", "other", "unknown value"),
        ("exits", "exit", 9, "exits do not count from 0"),
        ("exits", "l2_exit_reason", "CPUDI", "unknown value"),
        ("exits", "l0_vmread", 1, "differs from the sum over"),
        ("exits", "l0_rare_vmread", 36, "differs from the sum over"),
        ("exits", "instructions", -1, "less than zero"),
        ("exits", "phase", None, "no value"),
        ("l1_ops", "op", "CPUDI", "unknown value"),
        ("l1_ops", "field", 0x7FFE, "unknown field"),
        ("l1_ops", "field_name", "GUEST_RPI", "unknown field"),
        ("l1_ops", "exit", 100_000, "unknown exit"),
        ("l1_ops", "seq", 0, "not more than in the row before"),
        ("segments", "level", "L2", "unknown value"),
        ("segments", "handler", "CPUDI", "unknown value"),
    ],
)
def test_a_bad_value_of_a_run_is_found_where_it_is(
    folder: Path, kind: str, column: str, value: object, what: str
) -> None:
    name = f"executed/{RUN}.{kind}.parquet"
    table = with_value(pq.read_table(folder / name), column, 3, value)
    found = at(faults_with(folder, name, parquet(table)), name, 4, column)
    assert any(what in f.what for f in found), found


def test_l0_operations_must_add_up(folder: Path) -> None:
    """A log of L0's operations that fits the run is good; one operation less is not."""
    name = f"executed/{RUN}.l0_ops.parquet"
    exits = pq.read_table(folder / f"executed/{RUN}.exits.parquet").to_pylist()
    ops = ("vmread", "vmwrite", "vmptrld", "vmclear", "rdmsr", "wrmsr")
    rows = [
        {"exit": row["exit"], "op": op.upper()}
        for row in exits
        for op in ops
        for _ in range(row[f"l0_{op}"])
    ]
    n = len(rows)
    table = pa.table(
        {
            "run": pa.array([RUN] * n),
            "exit": pa.array([row["exit"] for row in rows]),
            "seq": pa.array(range(n)),
            "l1_exit_handler": pa.array(["exit"] * n),
            "op": pa.array([row["op"] for row in rows]),
            "field": pa.array([-1] * n),
            "function": pa.array(["core"] * n),
            "field_name": pa.array([""] * n),
        }
    )
    file = folder / name
    try:
        file.write_bytes(parquet(table))
        assert tables.check(folder) == []
        file.write_bytes(parquet(table.slice(1)))
        found = tables.check(folder)
        assert [(f.file, f.row, f.column) for f in found] == [
            (f"executed/{RUN}.exits.parquet", 1, "l0_vmread")
        ]
        file.write_bytes(parquet(with_value(table, "op", 0, "VMXON")))
        assert at(tables.check(folder), name, 1, "op")
    finally:
        file.unlink()


def test_sums_of_every_column_are_checked(folder: Path) -> None:
    name = f"executed/{RUN}.segments.parquet"
    table = pq.read_table(folder / name)
    first_at_l0 = pc.index(table["level"].cast("string"), "L0").as_py()
    for column in ("instructions", "vmwrite", "vmptrld", "vmclear", "rdmsr", "wrmsr"):
        more = table[column][first_at_l0].as_py() + 1
        faults = faults_with(folder, name, parquet(with_value(table, column, first_at_l0, more)))
        prefix = "" if column == "instructions" else "l0_"
        assert at(faults, f"executed/{RUN}.exits.parquet", 1, prefix + column)


@pytest.mark.parametrize("kind", ["exits", "l1_ops", "segments"])
@pytest.mark.parametrize("size", [0, 3, 100, -1, -200])
def test_a_truncated_parquet_file_is_a_fault(folder: Path, kind: str, size: int) -> None:
    name = f"executed/{RUN}.{kind}.parquet"
    content = (folder / name).read_bytes()[:size]
    faults = faults_with(folder, name, content)
    assert [(f.file, f.row, f.what) for f in faults] == [(name, None, "malformed Parquet")]


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [*schema.CSV, *schema.TOML, *(f"executed/{RUN}.{e}" for e in ("toml", "exits.parquet"))],
)
def test_a_missing_file_is_a_fault(folder: Path, name: str) -> None:
    faults = faults_with(folder, name, None)
    assert "file missing" in [f.what for f in faults if f.file == name]


@pytest.mark.parametrize("name", ["new.csv", "cpus/new.txt", "executed/x.other.parquet"])
def test_a_file_without_a_rule_is_a_fault(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    try:
        assert name in {f.file for f in tables.check(folder)}
    finally:
        (folder / name).unlink()


def test_an_unreadable_file_is_a_fault(folder: Path) -> None:
    (folder / "cpus" / "broken.toml").symlink_to(folder / "cpus" / "broken.toml")
    try:
        # A link to itself is not a file; what matters is that nothing is raised.
        assert isinstance(tables.check(folder), list)
    finally:
        (folder / "cpus" / "broken.toml").unlink()


@slow_folder
@given(draw=st.data())
def test_no_damage_raises(folder: Path, draw: st.DataObject) -> None:
    """Bytes changed anywhere in any file give faults or nothing, never an exception."""
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    name = draw.draw(st.sampled_from([f for f in files if f != "README.md"]), label="file")
    content = bytearray((folder / name).read_bytes())
    for _ in range(draw.draw(st.integers(1, 5), label="changes")):
        place = draw.draw(st.integers(0, len(content) - 1), label="place")
        content[place : place + 1] = draw.draw(st.binary(max_size=3), label="bytes")
    for fault in faults_with(folder, name, bytes(content)):
        assert str(fault).startswith(fault.file)


# ---- sourced numbers, typed here once more from their source -----------------------------------

LOOPS = {
    "cpuid": (14886, 13142),
    "vmcall": (14918, 13189),
    "inl_from_pmtimer": (47277, 45536),
    "inl_from_qemu": (46747, 44826),
    "inl_from_kernel": (15218, 13518),
    "outl_to_kernel": (15184, 13436),
    "self_ipi_sti_nop": (16458, 14858),
    "self_ipi_sti_hlt": (31876, 28348),
    "self_ipi_tpr": (16603, 15003),
    "self_ipi_tpr_sti_nop": (16509, 15048),
    "self_ipi_tpr_sti_hlt": (32027, 28386),
    "x2apic_self_ipi_sti_hlt": (16386, 14788),
    "x2apic_self_ipi_tpr_sti_hlt": (16479, 14881),
}
CLAIMS = {
    "A": ("target", "about", 200),
    "B": ("fit", "about", 55),
    "C1": ("fit", "about", 100),
    "C2": ("fit", "about", 100),
    "D": ("fit", "about", 55),
    "D2": ("check", "at least", 600),
    "E": ("fit", "about", 30),
    "F": ("hold-out", "about", 20),
    "G": ("hold-out", "about", 17.5),
    "H": ("hold-out", "about", 14159 - 13869),
    "H2": ("hold-out", "about", 15290 - 14951),
    "H3": ("hold-out", "about", 748),
    "I": ("fit", "about", 1000),
    "J": ("fit", "no number", None),
    "K": ("hold-out", "about", 33488 - 14898),
    "L": ("hold-out", "about", 14886 - 13142),
    "M": ("hold-out", "about", 4000),
    "N": ("hold-out", "about", 50),
    "O": ("hold-out", "about", round(2037 * 2.112)),
    "O2": ("hold-out", "about", round(3970 * 2.112)),
    "P": ("hold-out", "about", 18890 - 8304),
    "Q": ("hold-out", "about", 100),
}


def test_published_loops_are_as_published() -> None:
    rows = data.read_rows("published_loops.csv")
    found = {r["test"]: (int(r["before_cycles"]), int(r["after_cycles"])) for r in rows}
    assert found == LOOPS


def test_claims_are_as_published() -> None:
    rows = data.read_rows("claims.csv")
    found = {
        r["id"]: (
            r["role"],
            r["bound"],
            float(r["claimed_cycles"]) if r["claimed_cycles"] else None,
        )
        for r in rows
    }
    assert found == CLAIMS
    by_id = {r["id"]: r for r in rows}
    assert (by_id["A"]["vmread_low"], by_id["A"]["vmread_high"]) == ("35", "36")
    assert (by_id["H"]["vmwrite_low"], by_id["H"]["vmwrite_high"]) == ("31", "62")


def test_sizes_of_the_sourced_tables() -> None:
    sizes = {
        "vmcs_fields.csv": 171,
        "hw_round_trips.csv": 53,
        "exit_mixes.csv": 134,
        "vmcs_field_use.csv": 30,
    }
    assert {name: len(data.read_rows(name)) for name in sizes} == sizes
