"""The model against executed KVM, and against runs made from it."""

from __future__ import annotations

import pandas as pd
import pytest

from nvmx_lab import data
from nvmx_lab.errors import LabError
from nvmx_lab.study.validate import (
    COMPARED,
    MUST_AGREE,
    RunValidation,
    as_frame,
    as_table,
    validate,
)
from nvmx_lab.workload import executed
from tests.study import golden, runs

pytestmark = pytest.mark.xdist_group("validate")  # the first fixture takes many seconds

RUNS = (
    *("kvm61_eager_shadow", "kvm61_lazy_evmcs", "kvm61_lazy_linux_l2", "kvm61_lazy_shadow"),
    *("kvm61_lazy_shadow_16_32bit", "kvm61_lazy_shadow_nokstack", "kvm61_lazy_two_l2_vcpus"),
    "kvm61_lazy_xen_l1",
)
TABLES = ("exits", "l1_ops")
LARGE = ("kvm61_lazy_linux_l2", "kvm61_lazy_xen_l1")  # whole systems: a lower bar


@pytest.fixture(scope="module")
def results() -> dict[str, RunValidation]:
    return {result.run: result for result in validate()}


def test_all_runs_are_there(results):
    assert tuple(results) == RUNS


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", MUST_AGREE)
def test_pulls_and_switches_agree_at_every_exit(results, run, name):
    assert results[run].agreement[name].exact_share == 1.0
    assert results[run].agreement[name].ratio == 1.0


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["vmread", "vmwrite"])
def test_accesses_agree_at_nearly_every_exit(results, run, name):
    agreement = results[run].agreement[name]
    assert agreement.exact_share >= (0.90 if run in LARGE else 0.99)
    assert agreement.ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("run", RUNS)
def test_instructions_agree_in_total(results, run):
    assert results[run].agreement["instructions"].ratio == pytest.approx(1, abs=0.05)


def test_what_is_compared_is_what_the_log_says(results):
    """Totals typed anew from the logs, read without the package's loader."""
    for run in RUNS:
        exits = runs.read(run, "exits")
        for name in ("vmread", "vmwrite", "vmptrld", "vmclear"):
            assert results[run].agreement[name].logged == exits[f"l0_{name}"].sum()
        segments = runs.read(run, "segments")
        in_leg = segments["handler"].astype(str) == "exit"
        pulls = (segments["level"].astype(str) == "L0") & ~in_leg & (segments["rare_vmread"] > 0)
        assert results[run].agreement["pulls"].logged == pulls.sum()
        assert results[run].exits == len(exits)


def test_the_share_left_out_is_small_where_l2_does_not_idle(results):
    """Idle waits and page faults are no path of KVM; a micro-guest has next to none."""
    for run in set(RUNS) - set(LARGE):
        assert results[run].instructions_not_compared < 0.01
    for run in LARGE:
        assert 0 < results[run].instructions_not_compared < 0.8


def test_the_model_counts_the_golden_numbers(results):
    lines = golden.seen("executed runs, model", golden.runs(list(results.values())))
    assert not lines, "python -m tests.study.golden --update, if meant:\n" + "\n".join(lines[:40])


# -- runs that nobody has seen --------------------


@pytest.mark.parametrize(
    "run",
    [
        *("kvm61_eager_shadow", "kvm61_lazy_shadow", "kvm61_lazy_shadow_16_32bit"),
        *("kvm61_lazy_linux_l2", "kvm61_lazy_xen_l1"),
    ],
)
def test_a_run_without_shadow_vmcs(tmp_path, results, run):
    exits, ops = runs.without_shadow_vmcs(run)
    sync = "eager" if "eager" in run else "lazy"
    (got,) = validate(runs.write(tmp_path, exits, ops, shadow_vmcs=False, sync=sync))
    assert got.ok
    for name in ("vmread", "vmwrite"):
        # What the model misses (interrupts on the way) it misses with and without a shadow VMCS.
        assert got.agreement[name].exact_share == results[run].agreement[name].exact_share
        assert got.agreement[name].ratio == pytest.approx(1, abs=0.01)


def test_a_log_that_ends_before_the_last_entry_loses_that_exit_only(tmp_path, results):
    run = "kvm61_lazy_shadow"
    ops = runs.read(run, "l1_ops")
    last = ops["exit"].max()
    cut = ops[~((ops["exit"] == last) & (ops["op"] == "VMRESUME"))]
    (got,) = validate(runs.write(tmp_path, runs.read(run, "exits"), cut))
    assert got.ok
    assert got.exits == results[run].exits - 1


@pytest.mark.parametrize("run", ["kvm61_lazy_linux_l2", "kvm61_lazy_xen_l1"])
@pytest.mark.parametrize("phase", ["boot", None])
def test_the_names_of_phases_do_not_matter_with_a_shadow_vmcs(tmp_path, results, run, phase):
    exits = runs.read(run, "exits")
    exits = exits.drop(columns="phase") if phase is None else exits.assign(phase=phase)
    (got,) = validate(runs.write(tmp_path, exits, runs.read(run, "l1_ops")))
    for name in (*MUST_AGREE, "vmread", "vmwrite"):
        assert got.agreement[name] == results[run].agreement[name]


@pytest.mark.parametrize(
    ("run", "start"), [("kvm61_lazy_linux_l2", 3000), ("kvm61_lazy_xen_l1", 2000)]
)
def test_a_log_that_starts_late_finds_its_state(tmp_path, run, start):
    """By then L2 shares the host's EFER and has its APIC in x2APIC mode; no write says so."""
    exits, ops = (table[table["exit"] >= start] for table in (runs.read(run, t) for t in TABLES))
    (got,) = validate(runs.write(tmp_path, exits, ops))
    assert got.ok
    assert set(got.initial_state) == {"efer_host", "x2apic"}
    for name in ("vmread", "vmwrite"):
        assert got.agreement[name].exact_share >= 0.9
        assert got.agreement[name].ratio == pytest.approx(1, abs=0.01)


def test_an_entry_that_failed_costs_its_copy_of_the_shadow_vmcs(tmp_path):
    run = "kvm61_lazy_shadow_nokstack"
    exits, ops = (table[table["exit"] < 60] for table in (runs.read(run, t) for t in TABLES))
    ops = ops.assign(op=ops["op"].astype(str), seq=2 * ops["seq"])
    entry = ops[(ops["exit"] == 40) & (ops["op"] == "VMRESUME")]
    (plain,) = validate(runs.write(tmp_path / "plain", exits, ops))
    twice = pd.concat([ops, entry.assign(seq=entry["seq"] - 1)])
    (got,) = validate(runs.write(tmp_path / "failed", exits, twice))
    more = {n: got.agreement[n].model - plain.agreement[n].model for n in (*MUST_AGREE, "vmread")}
    # 24 fields, and around them: why, what, whether L1 may, RFLAGS and the skipped instruction.
    assert more == {"pulls": 0, "vmptrld": 2, "vmclear": 1, "vmread": 24 + 10}


def test_a_run_without_segments_and_l0_ops(tmp_path, results):
    run = "kvm61_lazy_shadow"
    folder = runs.write(tmp_path, runs.read(run, "exits"), runs.read(run, "l1_ops"))
    assert sorted(p.name for p in folder.iterdir()) == [
        *("made.exits.parquet", "made.l1_ops.parquet", "made.toml")
    ]
    (got,) = validate(folder)
    assert got.ok
    for name in set(COMPARED) - {"instructions"}:
        assert got.agreement[name] == results[run].agreement[name]
    assert got.agreement["instructions"].logged is None
    assert got.agreement["instructions"].exact_share is None
    assert got.instructions_not_compared is None
    assert "-" in as_table([got])


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        ("kvm61_lazy_shadow", {"sync": "eager"}),
        ("kvm61_eager_shadow", {"sync": "lazy"}),
        ("kvm61_lazy_shadow", {"sync": "per-field"}),
        ("kvm61_lazy_shadow", {"shadow_vmcs": False}),
        ("kvm61_lazy_shadow", {"evmcs": True, "shadow_vmcs": False}),
        ("kvm61_lazy_evmcs", {}),
    ],
)
@pytest.mark.parametrize("with_segments", [True, False])
def test_a_wrong_configuration_is_found_out(tmp_path, run, wrong, with_segments):
    settings = {"sync": "eager" if run == "kvm61_eager_shadow" else "lazy", **wrong}
    segments = runs.read(run, "segments") if with_segments else None
    folder = runs.write(
        tmp_path, runs.read(run, "exits"), runs.read(run, "l1_ops"), segments, **settings
    )
    (got,) = validate(folder)
    assert not got.ok


def test_a_wrong_cpu_shows_in_the_vmreads(tmp_path):
    """An older L0 with MPX reads 36 rare fields: one more at each pull than was logged."""
    run = "kvm61_lazy_shadow"
    folder = runs.write(
        tmp_path, runs.read(run, "exits"), runs.read(run, "l1_ops"), kvm="5.11", mpx=True
    )
    (got,) = validate(folder)
    assert got.agreement["vmread"].exact_share < 0.9


def one_exit(**changes: object) -> pd.DataFrame:
    exits = runs.read("kvm61_lazy_shadow", "exits").head(3)
    return exits.assign(**changes) if changes else exits


def test_a_single_exit_is_enough(tmp_path):
    exits = one_exit().head(1)
    ops = runs.read("kvm61_lazy_shadow", "l1_ops")
    (got,) = validate(runs.write(tmp_path, exits, ops[ops["exit"] == 0]))
    assert got.exits == 1


# -- bad input --------------------


@pytest.fixture
def good(tmp_path):
    ops = runs.read("kvm61_lazy_shadow", "l1_ops")
    return runs.write(tmp_path / "runs", one_exit(), ops[ops["exit"] < 3])


def damage(path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-200])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\x00\xff not what it says")


@pytest.mark.parametrize("how", ["cut short", "empty", "something else"])
@pytest.mark.parametrize("table", ["exits", "l1_ops", "segments"])
def test_a_damaged_table(good, table, how):
    runs.read("kvm61_lazy_shadow", "segments").to_parquet(good / "made.segments.parquet")
    damage(good / f"made.{table}.parquet", how)
    with pytest.raises(LabError, match=rf"made\.{table}\.parquet"):
        validate(good)


@pytest.mark.parametrize("file", ["made.toml", "made.l1_ops.parquet"])
def test_a_missing_file(good, file):
    damage(good / file, "missing")
    with pytest.raises(LabError, match=file.replace(".", r"\.")):
        validate(good)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kvm = ", "malformed TOML"),
        ("\udcff", "malformed TOML"),
        ("kvm = 6.1", "needs kvm"),
        ("kvm = '6.1'", "needs sync"),
        ("kvm = '6.1'\nsync = 'lazy'\nshadow_vmcs = 'yes'", "needs shadow_vmcs"),
        ("kvm = '6.2'\nsync = 'lazy'\nshadow_vmcs = true\nevmcs = false\nmpx = false", "6.2"),
        ("kvm = '6.1'\nsync = 'lasy'\nshadow_vmcs = true\nevmcs = false\nmpx = false", "lazy"),
    ],
)
def test_bad_settings(good, text, says):
    (good / "made.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(LabError, match=says):
        validate(good)


@pytest.mark.parametrize("table", ["exits", "l1_ops"])
def test_a_missing_column(good, table):
    file = good / f"made.{table}.parquet"
    frame = pd.read_parquet(file)
    gone = {"exits": "l0_vmptrld", "l1_ops": "field"}[table]
    frame.drop(columns=gone).to_parquet(file)
    with pytest.raises(LabError, match=gone):
        validate(good)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("exits", "l0_vmread", "many"),
        ("exits", "l0_vmread", None),
        ("exits", "l2_exit_reason", None),
        ("exits", "exit", 0),  # three exits with one number
        ("exits", "exit", "first"),
        ("l1_ops", "field", 0x7777),
        ("l1_ops", "field", "GUEST_RIP"),
        ("l1_ops", "op", "VMRAED"),
        ("l1_ops", "op", None),
        ("l1_ops", "exit", 99),
        ("l1_ops", "seq", "first"),
    ],
)
def test_values_that_cannot_be(good, table, column, value):
    file = good / f"made.{table}.parquet"
    frame = pd.read_parquet(file)
    frame[column] = value
    frame.to_parquet(file)
    with pytest.raises(LabError, match="made"):
        validate(good)


def test_no_exits(good):
    file = good / "made.exits.parquet"
    pd.read_parquet(file).head(0).to_parquet(file)
    with pytest.raises(LabError, match=r"made.*no exit in the log"):
        validate(good)


def test_a_directory_without_runs(tmp_path):
    with pytest.raises(LabError, match="no executed run"):
        validate(tmp_path)
    with pytest.raises(LabError, match="no such directory"):
        validate(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="no such directory"):
        validate(tmp_path / "file")


def test_names(good):
    assert [r.run for r in validate(good, ["made"])] == ["made"]
    with pytest.raises(LabError, match="did you mean 'made'"):
        validate(good, ["mode"])
    with pytest.raises(LabError, match="no run"):
        validate(good, [])


# -- as a table --------------------


def test_frame_and_json_hold_the_same(results):
    frame = as_frame(list(results.values())).set_index("run")
    for run, result in results.items():
        stated = result.to_dict()
        assert stated["run"] == run
        assert stated["exits"] == frame.loc[run, "exits"]
        assert stated["ok"] is True
        for name in COMPARED:
            assert stated[name]["exact_share"] == frame.loc[run, f"{name}_exact_share"]
            assert stated[name]["ratio"] == frame.loc[run, f"{name}_ratio"]


def test_loaded_runs_are_streams():
    run = executed.load("kvm61_lazy_evmcs")
    assert run.stream.basis == "executed"
    assert run.stream.exits == len(run.logged) == 5919
    assert run.config.evmcs and not run.config.shadow_vmcs
    assert executed.run_names() == RUNS
    assert executed.run_names(data.path("executed")) == RUNS
