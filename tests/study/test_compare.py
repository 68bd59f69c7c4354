"""Comparisons: what must hold whatever the numbers are, and what the mechanism says they are."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab import data
from nvmx_lab.cli import cli
from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import price
from nvmx_lab.errors import LabError
from nvmx_lab.nested.ops import parse
from nvmx_lab.nested.policies import SYNC_POLICIES
from nvmx_lab.nested.primitives import COUNTERS, PRIMITIVES
from nvmx_lab.notebook_parameters import BreakEven, ReproduceTheSaving, TheSeries
from nvmx_lab.study.compare import QUANTILES, compare, pairs_of, verdict
from nvmx_lab.study.simulate import EXITS, P, config_of, simulate, simulate_mix
from nvmx_lab.study.sweep import sweep
from nvmx_lab.workload import mixes, streams

SMALL = {"exits": 2_000, "draws": 300}
BEFORE, AFTER = "5.2", "5.2+patch13"
LEGS = ("exit_leg_cycles", "round_trip_cycles")

MIXES = st.sampled_from(("cpuid", "pio-user-kstack", "linux-boot-kstack", "virtualbox-desktop"))
SIDES = st.tuples(
    st.sampled_from(("5.2", "5.2+patch13", "5.3", "5.8", "6.1")),
    st.sampled_from((None, *SYNC_POLICIES)),
)


def pull_free() -> list[str]:
    """Return the mixes of which no round trip pulls and L1 has no enlightened VMCS."""
    return ["hyper-v-noevmcs", "kernel-exits", "pio-user-nokstack", "mmio-user-nokstack"]


# -- whatever the numbers --------------------


@settings(max_examples=15)
@given(MIXES, SIDES, SIDES, st.integers(0, 2**32))
def test_swapping_the_sides_negates_the_saving(mix, one, other, seed):
    def saving(first, second):
        return compare(
            mix, kvm=[first[0], second[0]], sync=[first[1], second[1]], seed=seed, **SMALL
        )

    there, back = saving(one, other), saving(other, one)
    assert there.results == back.results[::-1]
    for leg in LEGS:
        p05, p50, p95 = (there.saving[leg][q] for q in QUANTILES)
        assert [back.saving[leg][q] for q in QUANTILES] == pytest.approx([-p95, -p50, -p05])
    for counted in ("rare_vmreads_per_exit", "vmreads_per_exit"):
        assert back.saving[counted] == -there.saving[counted]


@settings(max_examples=10)
@given(MIXES, SIDES, st.integers(0, 2**32))
def test_identical_sides_save_nothing_at_all(mix, side, seed):
    result = compare(mix, kvm=[side[0]] * 2, sync=side[1], seed=seed, **SMALL)
    for leg in LEGS:
        assert set(result.saving[leg].values()) == {0.0}
    assert result.verdict == "no difference"
    assert result.results[0] == result.results[1]


def test_a_seed_reproduces_everything_and_another_does_not():
    one, again, other = (compare("linux-boot-kstack", seed=s, **SMALL) for s in (7, 7, 8))
    assert one.to_json() == again.to_json()
    assert one.results != other.results


@settings(max_examples=8)
@given(MIXES, SIDES, st.integers(0, 100))
def test_quantiles_are_in_order_and_counts_are_whole(mix, side, seed):
    result = compare(mix, kvm=[BEFORE, side[0]], sync=[None, side[1]], seed=seed, **SMALL)
    for cycles in (
        *(getattr(s, leg) for s in result.results for leg in LEGS),
        *map(result.saving.get, LEGS),
    ):
        assert cycles["p05"] <= cycles["p50"] <= cycles["p95"]
    for s in result.results:
        for leg in ("p05", "p50", "p95"):
            assert 0 < s.exit_leg_cycles[leg] < s.round_trip_cycles[leg]
        for name in set(COUNTERS) - {"l0_instructions", "l1_instructions", "retired"}:
            assert s.counts[name] == int(s.counts[name]) >= 0
        assert s.counts["vmread"] == s.counts["vmread_first"] + s.counts["vmread_next"]
        assert s.counts["rare_vmread"] <= s.counts["vmread"]
        assert 0 <= s.pulls_share <= 1


def test_the_saving_is_paired():
    """Sides that differ little have a narrow saving, however wide their own intervals are."""
    result = compare("hyper-v-noevmcs", **SMALL)
    own = result.results[0].round_trip_cycles
    assert result.saving["round_trip_cycles"]["p95"] < (own["p95"] - own["p05"]) / 2


# -- what the mechanism says --------------------


@pytest.mark.parametrize("mix", pull_free())
def test_where_nothing_pulls_the_saving_is_the_rare_vmreads_alone(mix):
    rare = 36 if mixes.load(mix).host.mpx else 35
    before, after = compare(mix, kvm=[BEFORE, AFTER], **SMALL).results
    assert after.pulls == 0
    fewer = {
        name: (before.counts[name] - after.counts[name]) / SMALL["exits"] for name in PRIMITIVES
    }
    software = fewer.pop("l0_instructions")
    # All of them follow another VMREAD: next ones.
    assert fewer == {name: rare if name == "vmread_next" else 0 for name in fewer}
    # 181 instructions for the reader (executed), its VMREADs included.
    assert 0 < software <= 181 - 35 + 6
    result = compare(mix, kvm=[BEFORE, AFTER], **SMALL)
    assert result.saving["exit_leg_cycles"] == pytest.approx(result.saving["round_trip_cycles"])
    assert result.verdict == "saves"
    assert "never pulls" in result.explanation


@pytest.mark.parametrize("mix", pull_free())
def test_about_two_hundred_cycles(mix):
    saving = compare(mix, exits=2_000).saving["round_trip_cycles"]
    assert saving["p05"] < 200 < saving["p95"]
    assert 150 < saving["p50"] < 300


@pytest.mark.parametrize("mix", [m for m in mixes.names() if mixes.load(m).host.evmcs])
@pytest.mark.parametrize("sync", [None, ["eager", "lazy"], ["eager", "per-field"]])
def test_an_enlightened_vmcs_gains_nothing_exactly(mix, sync):
    result = compare(mix, kvm=[BEFORE, AFTER], sync=sync, **SMALL)
    before, after = result.results
    assert before.counts == after.counts
    assert result.verdict == "no difference"
    assert result.break_even_pull_rate is None
    assert "enlightened" in result.explanation


@pytest.mark.parametrize(
    "mix", ["virtualbox-boot", "virtualbox-cpuid", "virtualbox-desktop", "pio-user-kstack"]
)
def test_mixes_that_pull_cost(mix):
    result = compare(mix, kvm=[BEFORE, AFTER], exits=2_000)
    after = result.results[1]
    assert after.pulls_share > result.break_even_pull_rate["p95"]
    assert result.verdict == "costs"
    assert "above the break-even rate" in result.explanation
    assert result.saving["exit_leg_cycles"]["p05"] > 0, "the exit leg alone always gains"


@pytest.mark.parametrize("mix", ["linux-boot-kstack", "overcommit", "pio-user-kstack"])
def test_pulls_are_counted_once_per_exit_that_pulls(mix):
    after = compare(mix, kvm=[BEFORE, AFTER], **SMALL).results[1]
    assert after.pulls == round(after.pulls_share * SMALL["exits"])
    rare = 36 if mixes.load(mix).host.mpx else 35
    assert after.counts["rare_vmread"] == rare * after.pulls


@pytest.mark.parametrize("mix", ["linux-boot-kstack", "virtualbox-desktop", "cpuid"])
def test_the_oracle_is_a_lower_bound(mix):
    for policy in ("eager", "lazy", "per-field"):
        saving = compare(mix, kvm="5.3", sync=[policy, "oracle"], **SMALL).saving
        assert saving["round_trip_cycles"]["p05"] >= -1e-9, policy


def test_break_even_is_where_a_simulated_sweep_of_pull_rates_crosses_zero():
    """A VMREAD of a rare field in a share of the round trips of a mix that never pulls."""
    base = mixes.load("pio-user-nokstack")
    configs = [config_of(base, BEFORE), config_of(base, AFTER)]
    drawn = prices.load(prices.DEFAULT).draw(2_000, 1)
    rates, savings = [], []
    for share in (0.0, 0.25, 0.5, 1.0):
        mixed = []
        for word in base.words():
            first, *rest = word.operations
            pulling = (first, parse("VMREAD GUEST_GS_BASE"), *rest)
            mixed += [
                streams.Word(word.operations, word.probability * (1 - share), "", 100.0),
                streams.Word(pulling, word.probability * share, "pulling", 100.0),
            ]
        stream = streams.drawn(mixed, 20_000, 1)
        before, after = simulate(stream, configs)
        cycles = price((before.round_trip - after.round_trip)[:P] / stream.exits, drawn)
        rates.append(after.exits_that_pull / stream.exits)
        savings.append(float(np.median(cycles.values)))
    # Linear in the rate for each draw, so nearly for the medians.
    slope, intercept = np.polyfit(rates, savings, 1)
    stated = compare("pio-user-nokstack", kvm=[BEFORE, AFTER], exits=2_000).break_even_pull_rate
    assert -intercept / slope == pytest.approx(stated["p50"], rel=0.05)
    assert stated["p05"] < stated["p50"] < stated["p95"]


def test_more_pulls_save_less():
    frame = sweep(["cpuid", "xen-boot", "linux-boot-kstack", "pio-user-kstack"], **SMALL)
    by_pulls = frame.sort_values("pulls_share")
    assert by_pulls["round_trip_saving_cycles_p50"].is_monotonic_decreasing


def test_dirty_entries_cost_both_sides_the_same():
    """A VMWRITE dirties vmcs12 before the patch as after it: only the switches are new."""
    for mix in ("pio-user-kstack", "mov-cr4"):
        before, after = compare(mix, kvm=[BEFORE, AFTER], **SMALL).results
        assert before.counts["vmwrite"] == after.counts["vmwrite"]
        assert after.counts["vmptrld"] - before.counts["vmptrld"] == 2 * after.pulls
        assert after.counts["rdmsr"] - before.counts["rdmsr"] == 2 * after.pulls


def test_an_ibpb_makes_pulls_dearer():
    plain = compare("linux-boot-kstack", kvm=["5.3-patch13", "5.3"], **SMALL)
    ibpb = compare("linux-boot-kstack", kvm=["5.3-patch13+ibpb", "5.3+ibpb"], **SMALL)
    assert ibpb.break_even_pull_rate["p50"] < plain.break_even_pull_rate["p50"] / 2
    assert (
        ibpb.results[1].counts["ibpb"] - ibpb.results[0].counts["ibpb"] == 2 * ibpb.results[1].pulls
    )


# -- prices --------------------


def test_a_changed_price_changes_a_cached_result(tmp_path):
    """The kernels are compiled and kept; prices must not be in them."""
    text = data.path("cpus", f"{prices.DEFAULT}.toml").read_text()
    text = text.replace(f'id = "{prices.DEFAULT}"', 'id = "mine"')
    one = compare("cpuid", kvm=[BEFORE, AFTER], **SMALL)
    file = tmp_path / "mine.toml"
    file.write_text(text)
    same = compare("cpuid", kvm=[BEFORE, AFTER], cpu=file, **SMALL)
    assert same.saving == one.saving
    file.write_text(made_dearer(made_dearer(text, "vmread_first", 3), "vmread_next", 3))
    dearer = compare("cpuid", kvm=[BEFORE, AFTER], cpu=file, **SMALL)
    for quantile, cycles in one.saving["exit_leg_cycles"].items():
        assert dearer.saving["exit_leg_cycles"][quantile] > 1.5 * cycles
    assert [s.counts for s in dearer.results] == [s.counts for s in one.results]


def made_dearer(text: str, parameter: str, times: float) -> str:
    """Return a price list's text with one price multiplied."""
    out, inside = [], False
    for line in text.splitlines():
        if line.startswith("["):
            inside = line.strip().removeprefix("[").removesuffix("]").endswith(parameter)
        key, _, value = line.partition(" = ")
        if inside and key in ("p05", "p50", "p95"):
            line = f"{key} = {float(value) * times}"
        out.append(line)
    assert out != text.splitlines(), f"{parameter} not found"
    return "\n".join(out) + "\n"


def test_the_same_counts_for_every_price_list():
    frames = [
        compare("cpuid", cpu=cpu, allow_unknown=True, **SMALL)
        for cpu in ("skylake-2015", "haswell-2013")
    ]
    assert [s.counts for s in frames[0].results] == [s.counts for s in frames[1].results]


# -- shapes --------------------


def test_json_has_the_layout_that_scripts_rely_on():
    result = json.loads(compare("cpuid", kvm=["5.2", "5.3"], seed=4, **SMALL).to_json())
    assert {"mix", "cpu", "exits", "seed", "results", "saving"} <= result.keys()
    assert (result["mix"], result["exits"], result["seed"]) == ("cpuid", 2_000, 4)
    for side, kvm, sync in zip(result["results"], ("5.2", "5.3"), ("eager", "lazy"), strict=True):
        assert (side["kvm"], side["sync"]) == (kvm, sync)
        assert {"vmread", "vmwrite", "vmptrld", "vmclear"} <= side["counts"].keys()
        assert isinstance(side["pulls"], int)
        assert isinstance(side["rare_vmreads_per_exit"], float)
        for leg in LEGS:
            assert set(side[leg]) == {"p05", "p50", "p95"}
    for leg in LEGS:
        assert set(result["saving"][leg]) == {"p05", "p50", "p95"}


def test_frame_and_texts():
    result = compare("cpuid", **SMALL)
    frame = result.to_frame()
    assert list(frame["kvm"]) == [BEFORE, AFTER, "saving"]
    assert frame["round_trip_cycles_p50"].iloc[2] == result.saving["round_trip_cycles"]["p50"]
    assert result.verdict in str(result)
    assert "<table" in result._repr_html_()


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((10, 20, 30), "saves"),
        ((-30, -20, -10), "costs"),
        ((-1, 5, 9), "unclear"),
        ((0, 5, 9), "unclear"),
        ((0, 0, 0), "no difference"),
        ((-0.4, 0, 0.4), "no difference"),
    ],
)
def test_verdict(interval, expected):
    assert verdict(dict(zip(QUANTILES, interval, strict=True))) == expected


@pytest.mark.parametrize(
    ("kvm", "sync", "expected"),
    [
        (("a", "b"), None, [("a", None), ("b", None)]),
        ("a", ("x", "y"), [("a", "x"), ("a", "y")]),
        (["a"], ["x", None], [("a", "x"), ("a", None)]),
        (("a", "b"), "x", [("a", "x"), ("b", "x")]),
        (("a", "b"), ("x", "y"), [("a", "x"), ("b", "y")]),
    ],
)
def test_pairs(kvm, sync, expected):
    assert pairs_of(kvm, sync) == expected


@pytest.mark.parametrize(
    ("kvm", "sync"),
    [("5.2", None), ((), None), (("5.2",) * 3, None), (("5.2", "5.3"), ("lazy",) * 3)],
)
def test_not_two_sides(kvm, sync):
    with pytest.raises(LabError, match="two sides"):
        compare("cpuid", kvm=kvm, sync=sync, **SMALL)


# -- sweep --------------------


def test_a_sweep_is_the_comparisons_that_it_is_made_of():
    pairs, cpus = [("5.2", "5.2+patch13"), ("5.2", "5.3")], ["skylake-2015", "icelake-2021"]
    names = ["cpuid", "virtualbox-boot"]
    frame = sweep(names, kvm=pairs, cpu=cpus, seed=3, allow_unknown=True, **SMALL)
    assert len(frame) == 8
    for row in frame.to_dict("records"):
        one = compare(
            row["mix"],
            kvm=[row["kvm_before"], row["kvm_after"]],
            cpu=row["cpu"],
            seed=3,
            allow_unknown=True,
            **SMALL,
        ).summary()
        stated = {key: row[key] for key in one}
        pd.testing.assert_series_equal(pd.Series(stated), pd.Series(one))


def test_every_mix_can_be_compared():
    frame = sweep(mixes.names(), exits=200, draws=50)
    assert list(frame["mix"]) == list(mixes.names())
    assert len(frame) >= 14
    assert set(frame["verdict"]) <= {"saves", "costs", "no difference", "unclear"}
    assert frame["why"].str.len().min() > 20
    assert frame["rare_vmreads_saved_per_exit"].between(0, 36).all()


@pytest.mark.parametrize("bad", [{"mixes": []}, {"mixes": "cpuid"}, {"kvm": []}, {"cpu": []}])
def test_a_sweep_needs_lists(bad):
    with pytest.raises(LabError, match="at least one"):
        sweep(**{"mixes": ["cpuid"], **SMALL, **bad})


# -- bad input --------------------


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"mix": "cpuidd"}, "did you mean 'cpuid'"),
        ({"mix": ""}, "unknown mix"),
        ({"mix": "/no/such/file.toml"}, "file.toml"),
        ({"kvm": ["5.2", "5.33"]}, "did you mean '5.3'"),
        ({"kvm": ["5.2", "5.2+patch31"]}, "did you mean 'patch"),
        ({"kvm": ["5.2", "5.2+"]}, "feature"),
        ({"kvm": ["5.2", "5.3+patch13"]}, "already has"),
        ({"kvm": ["5.2", ""]}, "KVM release"),
        ({"sync": "lasy"}, "did you mean 'lazy'"),
        ({"sync": ["eager", "oracel"]}, "did you mean 'oracle'"),
        ({"cpu": "skylake-2051"}, "did you mean 'skylake-2015'"),
        ({"cpu": "/no/such/cpu.toml"}, "cpu.toml"),
        ({"exits": 0}, "exits"),
        ({"exits": -1}, "exits"),
        ({"exits": 10**12}, "exits"),
        ({"exits": 1.5}, "exits"),
        ({"exits": "many"}, "exits"),
        ({"exits": True}, "exits"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"seed": None}, "seed"),
        ({"draws": 0}, "draws"),
        ({"draws": -5}, "draws"),
        ({"draws": 10**9}, "draws"),
    ],
)
def test_bad_input_is_refused(given_, says):
    arguments = {"mix": "cpuid", **SMALL, **given_}
    with pytest.raises(LabError, match=says):
        compare(**arguments)


def test_simulation_needs_somebody():
    with pytest.raises(LabError, match="nothing to simulate"):
        simulate_mix("cpuid", [], [], exits=10, seed=1)


def test_the_command_line_and_the_notebooks_draw_as_many_exits():
    (option,) = [each for each in cli.commands["compare"].params if each.name == "exits"]
    assert option.default == EXITS
    for notebook in (ReproduceTheSaving(mix="cpuid"), TheSeries(), BreakEven()):
        assert notebook.exits == EXITS
