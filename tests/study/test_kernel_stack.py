"""Kernel-stack randomization: counts against the logs and the mechanism, prices against compare."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from nvmx_lab import data
from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import price
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx
from nvmx_lab.nested.ops import Kind
from nvmx_lab.nested.primitives import COUNTERS
from nvmx_lab.nested.replay import replay
from nvmx_lab.nested.round_trip import round_trip
from nvmx_lab.study import kernel_stack as study
from nvmx_lab.study import kernel_stack_narrative as narrative
from nvmx_lab.study.compare import compare
from nvmx_lab.study.simulate import P
from nvmx_lab.workload import mixes

EXITS = 400
CPUS = ["skylake-2015", "netburst-2005"]


@pytest.fixture(scope="module")
def runs():
    return study.run("6.1", exits=EXITS, seed=3)


@pytest.fixture(scope="module")
def logged():
    return study.executed()


@pytest.fixture(scope="module")
def judged():
    return study.judge(
        "6.1", ["unpulled writes + pull at entry", "unpulled writes"], fields=("GUEST_GS_BASE",)
    )


# -- executed ----------------------------------------------------------------------------------


def test_executed_pulls_agree_with_the_totals_of_each_exit(logged):
    """The causes come from the stretches, these counts from the exits: two files of a log."""
    for run, some in logged.groupby("run"):
        exits = pd.read_parquet(data.path("executed") / f"{run}.exits.parquet")
        assert some["exits"].sum() == len(exits)
        assert some["pulls"].sum() == (exits["l0_rare_vmread"] > 0).sum()
        assert (some["pulls"] == some["host_rsp"] + some["other"]).all()


def test_the_first_access_that_needs_a_pull_is_its_cause(logged):
    """An independent way: by the rules of the sync, from what L1 did and not from what L0 read."""
    lazy = Nvmx(Config.of("6.1", mpx=False))
    rare = set(lazy.rare)
    for run in study.RUNS:
        ops = pd.read_parquet(data.path("executed") / f"{run}.l1_ops.parquet")
        ops = ops[ops["trapped"] & ops["op"].isin(["VMREAD", "VMWRITE"])].sort_values("seq")
        needs = (ops["op"] == "VMWRITE") | ops["field_name"].isin(rare)
        first = ops[needs].drop_duplicates("exit")
        found = Counter(
            f"{op} {name}" for op, name in zip(first["op"], first["field_name"], strict=True)
        )
        some = logged[logged["run"] == run]
        assert found["VMWRITE HOST_RSP"] == some["host_rsp"].sum()
        assert found.total() - found["VMWRITE HOST_RSP"] == some["other"].sum()


def test_the_finding(logged):
    totals = study.executed_totals(logged).set_index("run")
    boot = totals.loc["kvm61_lazy_linux_l2"]
    assert boot["pulls_share"] == pytest.approx(0.442, abs=5e-4)
    assert boot["other_share"] < 0.0105
    quiet = totals.loc["kvm61_lazy_shadow_nokstack"]
    assert quiet["host_rsp"] == 0
    assert quiet["randomization"] == "off"
    said = narrative.of_executed(logged)
    assert "44.2" in said
    assert "1.04 %" in said
    assert "all of them never pull without it" in said


# -- the mechanism, by hand --------------------------------------------------------------------

TRAPPED = {"exits": 1, "vmreads": 12, "vmwrites": 2, "vmptrlds": 0}
"""A trapped VMWRITE: EXIT_REASON and IDT_VECTORING, PML index, qualification and instruction info,
SS and CS rights, RFLAGS, length, RIP, interruptibility, interrupt status; RFLAGS and RIP."""
RARE, DIRTY = 35, 57  # fields of the rare reader of 6.1; VMWRITEs more at a dirty entry


def test_counts_of_each_fix_are_those_of_its_mechanism():
    by_hand = {
        "as it is": {**TRAPPED, "vmreads": 12 + RARE, "vmwrites": 2 + DIRTY, "vmptrlds": 2},
        # one field more in each copy between the shadow VMCS and vmcs12, and no exit
        "shadow HOST_RSP": {"exits": 0, "vmreads": 1, "vmwrites": 1, "vmptrlds": 0},
        "clean host writes": {**TRAPPED, "vmreads": 12 + RARE, "vmptrlds": 2},
        "clean and unpulled host writes": TRAPPED,
        "unpulled host writes": {**TRAPPED, "vmwrites": 2 + DIRTY},
        "unpulled writes": {**TRAPPED, "vmwrites": 2 + DIRTY},
        # vmcs02 is loaded at the entry: no switch
        "unpulled writes + pull at entry": {
            **TRAPPED,
            "vmreads": 12 + RARE,
            "vmwrites": 2 + DIRTY,
        },
        "unpulled writes + skip at entry": {**TRAPPED, "vmwrites": 2 + DIRTY - RARE},
    }
    frame = study.mechanism("6.1").set_index("fix")
    assert list(frame.index) == list(by_hand)
    for name, counts in by_hand.items():
        assert frame.loc[name, list(counts)].to_dict() == counts, name
    assert (frame.loc["as it is", "instructions"] >= frame["instructions"]).all()


@pytest.mark.parametrize("kvm", ["5.2", "5.3", "6.1"])
@pytest.mark.parametrize("fix", study.FIXES, ids=lambda fix: fix.name)
def test_a_fix_costs_nothing_where_l1_does_not_write(kvm, fix):
    plain, fixed = (
        round_trip(Config.of(study.with_features(kvm, features), "lazy"))[1]
        for features in ((), fix.features)
    )
    more = dict(zip(COUNTERS, fixed - plain, strict=True))
    one = 1.0 if fix.features == ("shadow-host-rsp",) else 0.0
    assert more["vmread_next"] == more["vmwrite_next"] == one
    assert not any(more[name] for name in ("vmread_first", "vmptrld", "transition", "pulls"))


def test_a_dirty_entry_still_writes_what_is_not_rare():
    l0 = Nvmx(Config.of("6.1+flag-reset+no-pull-unchecked-writes+skip-rare-at-entry"))
    l0.start()
    l0.nested_exit("CPUID")
    l0.l1_vmwrite("CR4_GUEST_HOST_MASK", 5)
    l0.l1_vmwrite("GUEST_CS_AR_BYTES", 0x9B)
    assert l0.control.need_sync_vmcs02_to_vmcs12_rare
    l0.vmcs02["GUEST_GS_BASE"] = 7  # as if L2 had left it
    l0.vmresume()
    assert (l0.vmcs02["CR4_GUEST_HOST_MASK"], l0.vmcs02["GUEST_CS_AR_BYTES"]) == (5, 0x9B)
    assert l0.vmcs02["GUEST_GS_BASE"] == 7
    assert not l0.control.dirty_vmcs12


# -- simulated and priced ----------------------------------------------------------------------


def test_the_stream_without_the_write_is_the_same_otherwise(runs):
    mix = mixes.load("pio-user-kstack")
    stream = mix.stream(EXITS, 3)
    quiet = study.without(stream, study.HOST_RSP_WRITE)
    expected = [op for op in stream.operations() if op != study.HOST_RSP_WRITE]
    assert list(quiet.operations()) == expected
    removed = sum(op == study.HOST_RSP_WRITE for op in stream.operations())
    (run,) = [each for each in runs if each.mix.name == mix.name]
    assert run.writes == removed > 0.9 * EXITS
    assert run.lazy_without.exits_that_pull == 0


def test_the_parts_of_the_write_are_what_the_mechanism_says(runs):
    """A mix's writes, taken apart by operation, against the single round trip by hand."""
    quiet, alone, clean, unpulled = (
        round_trip(Config.of(f"6.1{features}", "lazy", mpx=False), operations)[1][:P]
        for features, operations in (
            ("", ()),
            ("", ["VMWRITE HOST_RSP"]),
            ("+clean-host-writes", ["VMWRITE HOST_RSP"]),
            ("+clean-host-writes+no-pull-host-writes", ["VMWRITE HOST_RSP"]),
        )
    )
    for run in runs:
        parts = study.parts_of_write(run)
        scaled = {name: parts[name] * EXITS for name in parts}
        per_write = scaled["trapped exit"] / run.writes
        np.testing.assert_allclose(per_write, unpulled - quiet, atol=2)  # retired are rounded
        entries = {op.kind for op in run.lazy.by_operation} & {Kind.VMRESUME, Kind.VMLAUNCH}
        assert entries == {Kind.VMRESUME}
        dirty = scaled["dirty entry"] / run.writes
        if run.mix.name != "linux-boot-kstack":  # there other writes dirty vmcs12 too
            np.testing.assert_allclose(dirty, alone - clean, atol=2)
            np.testing.assert_allclose(scaled["pull"] / run.writes, clean - unpulled, atol=2)
        total = sum(parts[name] for name in study.WRITE_PARTS[:-1])
        np.testing.assert_allclose(total, parts["all"], atol=1e-9)


def test_savings_are_those_of_compare(runs):
    frame = study.savings(runs, cpus=CPUS, seed=3).set_index(["mix", "write", "cpu"])
    for mix in study.MIXES:
        other = compare(mix, kvm=["6.1"], sync=["eager", "lazy"], exits=EXITS, seed=3)
        own = frame.loc[(mix, True, "skylake-2015")]
        for quantile, cycles in other.saving["round_trip_cycles"].items():
            assert own[f"saving_{quantile}"] == pytest.approx(cycles, rel=1e-9)
        assert own["pulls_share"] == other.results[1].pulls_share
        assert own["verdict"] == other.verdict
        assert frame.loc[(mix, True, "netburst-2005"), "verdict"] == "no price"
        assert frame.loc[(mix, False, "skylake-2015"), "saving_p05"] > own["saving_p95"] * 0.3


def test_fixes_lie_between_nothing_and_no_write_at_all(runs):
    frame = study.fixes(runs, cpus=["skylake-2015"], seed=3)
    drawn = prices.load("skylake-2015").draw(prices.DRAWS, 3)
    for run in runs:
        some = frame[frame["mix"] == run.mix.name].set_index("fix")
        assert some.loc[study.WITHOUT, ["closed_p05", "closed_p95"]].tolist() == [1.0, 1.0]
        assert (some["lazy_p05"] > 0).all()
        assert some["closed_p95"].max() == 1.0
        assert some.drop(study.WITHOUT)["closed_p50"].idxmax() == "shadow HOST_RSP"
        name = "clean and unpulled host writes"
        gap = run.lazy.round_trip[:P] - run.fixes[name].round_trip[:P]
        direct = np.median(price(gap / EXITS, drawn).values)
        assert some.loc[name, "lazy_p50"] == pytest.approx(direct, rel=1e-9)
        # Against eager: what the release saves, and what the fix saves over that.
        saving = run.eager.round_trip[:P] - run.lazy.round_trip[:P]
        both = np.median(price((saving + gap) / EXITS, drawn).values)
        assert some.loc[name, "eager_p50"] == pytest.approx(both, rel=1e-9)


def test_another_seed_moves_no_median_by_more_than_2_percent():
    one, two = (
        study.fixes(
            study.run("6.1", mixes=["pio-user-kstack"], exits=20_000, seed=seed),
            cpus=["skylake-2015"],
            seed=seed,
        ).set_index("fix")
        for seed in (1, 2)
    )
    np.testing.assert_allclose(one["lazy_p50"], two["lazy_p50"], rtol=0.02)
    np.testing.assert_allclose(one["closed_p50"], two["closed_p50"], rtol=0.02)


def test_a_mix_without_the_write_is_refused():
    with pytest.raises(LabError, match="never writes HOST_RSP"):
        study.run("6.1", mixes=["cpuid"], exits=10)
    with pytest.raises(LabError, match="did you mean 'shadow HOST_RSP'"):
        study.fix("shadow HOST_RIP")


def test_features_that_a_release_has_are_not_added_again():
    assert study.with_features("6.1+shadow-host-rsp", ("shadow-host-rsp",)) == "6.1+shadow-host-rsp"
    assert study.with_features("6.1", ("flag-reset",)) == "6.1+flag-reset"


# -- is it right? ------------------------------------------------------------------------------


def test_judgements_of_a_right_and_a_wrong_fix(judged):
    by_name = {each.fix.name: each for each in judged}
    right, wrong = by_name["unpulled writes + pull at entry"], by_name["unpulled writes"]
    assert right.holds and right.exploration.complete and right.replay is None
    assert not wrong.holds
    assert wrong.replay is not None and wrong.replay.failed
    assert study.wrong(judged) == {"unpulled writes"}
    rows = {row["fix"]: row for row in study.records(judged)}
    assert rows["unpulled writes"]["steps"].endswith("VMREAD GUEST_GS_BASE")
    table = narrative.judgements(judged)
    assert list(table["correct?"]) == ["holds", "fails in 7 steps"]
    assert "it cannot be left out" in narrative.of_rules(judged)
    assert "leaves the rare fields alone" not in narrative.of_rules(judged)
    assert right.needs_flag_reset
    assert "unpulled writes + pull at entry needs the mend" in narrative.of_rules(judged)
    assert "L1 sees a stale GUEST_GS_BASE" in " ".join(narrative.stories(judged).split())


def test_the_answer_recommends_no_fix_that_fails(runs, logged, judged):
    cpus = ["skylake-2015"]
    gains = study.fixes(runs, cpus=cpus)
    saved, costs = study.savings(runs, cpus=cpus), study.write_costs(runs, cpus=cpus)
    said = narrative.answer(logged, saved, costs, judged, gains).replace("\N{NO-BREAK SPACE}", " ")
    assert "Of the 1 correct fixes" not in said
    assert "The only correct fix, **unpulled writes + pull at entry**" in said
    assert "Wrong, each with a counterexample above: unpulled writes." in said
    unpriced = study.fixes(runs, cpus=["netburst-2005"])
    old = {"cpus": ["netburst-2005"]}
    said = narrative.answer(
        logged, study.savings(runs, **old), study.write_costs(runs, **old), judged, unpriced
    )
    assert "lacks a price" in said
    assert "nan" not in said
    with pytest.raises(LabError, match="one price list"):
        narrative.answer(logged, saved, costs, judged, pd.concat([gains, unpriced]))


def test_only_what_trusts_the_flag_at_an_entry_needs_it_reset():
    def fails(kvm, features):
        config = Config.of(study.with_features(kvm, features), "lazy")
        return replay(config, study.SECOND_STATE, "GUEST_GS_BASE").failed

    assert not fails("6.1", ())
    needing = {fix.name for fix in study.FIXES if fails("6.1", fix.features)}
    assert needing == {"unpulled writes + pull at entry", "unpulled writes + skip at entry"}
    assert not any(fails("6.1+flag-reset", fix.features) for fix in study.FIXES)
