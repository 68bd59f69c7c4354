"""The breakdown takes a round trip apart and loses nothing."""

from __future__ import annotations

import numpy as np
import pytest

from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import price
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.study import breakdown as module
from nvmx_lab.study.breakdown import LEGS, breakdown, counts_by_step, leg_of
from nvmx_lab.study.compare import compare
from nvmx_lab.study.simulate import P, simulate_mix

MIXES = ("cpuid", "linux-boot-kstack", "virtualbox-desktop", "kvm-evmcs", "xen-boot")
EXITS = 2_000
PAIR = ("5.2", "5.2+patch13")


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kvm", ["5.2", "5.2+patch13", "6.1"])
def test_steps_add_up_to_the_round_trip(mix, kvm):
    _, (simulated,) = simulate_mix(mix, [kvm], [None], exits=EXITS, seed=2)
    by_step = counts_by_step(simulated)
    total = np.sum(list(by_step.values()), axis=0)
    for name, got, expected in zip(PRIMITIVES, total, simulated.round_trip[:P], strict=True):
        assert got == pytest.approx(expected, rel=1e-12), name
    leg = sum(counts for (where, _), counts in by_step.items() if where == "L2 exit to L1")
    # The exit leg of a comparison is the same operations.
    np.testing.assert_allclose(leg, simulated.exit_leg[:P], rtol=1e-12)


@pytest.mark.parametrize("mix", MIXES)
def test_priced_steps_add_up_draw_by_draw(mix):
    _, (simulated,) = simulate_mix(mix, ["5.2+patch13"], [None], exits=EXITS, seed=2)
    drawn = prices.load(prices.DEFAULT).draw(200, 5)
    expected = price(simulated.round_trip[:P], drawn).values
    by_step = counts_by_step(simulated)
    total = np.zeros(200)
    for leg in LEGS:
        in_leg = {step: c for (where, step), c in by_step.items() if where == leg and c.any()}
        for cycles, _ in module._priced_steps(in_leg, drawn).values():
            total += cycles
    np.testing.assert_allclose(total, expected, rtol=1e-10)


@pytest.mark.parametrize("mix", MIXES)
def test_every_step_costs_something(mix):
    """A price may include software beside its instruction: never more than there is."""
    frame = breakdown(mix, exits=EXITS, draws=200)
    assert (frame["cycles_p05"] >= 0).all(), frame[frame["cycles_p05"] < 0].to_string()
    assert (frame["cycles_p05"] <= frame["cycles_p50"]).all()
    assert (frame["cycles_p50"] <= frame["cycles_p95"]).all()
    assert set(frame["leg"]) <= set(LEGS)


def test_columns_and_order():
    frame = breakdown("linux-boot-kstack", kvm=PAIR, exits=EXITS, draws=50)
    assert list(frame.columns) == [
        *("kvm", "sync", "leg", "step", "instructions"),
        *("cycles_p05", "cycles_p50", "cycles_p95"),
    ]
    assert not frame.duplicated(["kvm", "sync", "leg", "step"]).any()
    for _, side in frame.groupby("kvm"):
        assert side["leg"].map(LEGS.index).is_monotonic_increasing


def test_the_patch_changes_the_rare_fields_and_the_pulls_only():
    frame = breakdown("linux-boot-kstack", kvm=PAIR, exits=EXITS, draws=50)
    wide = frame.pivot_table(
        index=["leg", "step"], columns="kvm", values="instructions", fill_value=0
    )
    changed = wide[wide[PAIR[0]] != wide[PAIR[1]]]
    assert set(changed.index.get_level_values("step")) == {"rare fields", "switch of VMCS"}
    saved = changed.xs("L2 exit to L1", level="leg").loc["rare fields"]
    assert (saved[PAIR[0]], saved[PAIR[1]]) == (35, 0)


def test_rare_fields_of_each_exit_are_those_of_the_comparison():
    frame = breakdown("linux-boot-kstack", kvm=PAIR, exits=EXITS, draws=50)
    rare = frame[frame["step"] == "rare fields"].groupby("kvm")["instructions"].sum()
    for side in compare("linux-boot-kstack", kvm=PAIR, exits=EXITS, draws=50).results:
        assert rare[side.kvm] == pytest.approx(side.rare_vmreads_per_exit)


def test_every_operation_of_a_stream_has_a_leg():
    _, (simulated,) = simulate_mix("xen-boot", ["5.3"], [None], exits=EXITS, seed=2)
    assert {leg_of(operation) for operation in simulated.automaton.alphabet} <= set(LEGS)


def test_without_the_rare_fields_the_eager_ones_start_the_straight_line():
    """Notebook 03 says so: one VMREAD of the eager fields is a first one then, not a next one."""
    _, both = simulate_mix("cpuid", PAIR, [None, None], exits=EXITS, seed=2)
    eager, lazy = (counts_by_step(each)["L2 exit to L1", "eager fields"] for each in both)
    moved = dict(zip(PRIMITIVES, (lazy - eager)[: len(PRIMITIVES)] / EXITS, strict=True))
    assert moved["vmread_first"] == 1
    assert moved["vmread_next"] == -1
