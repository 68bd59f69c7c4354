"""Pricing against a naive loop, and the totals it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from nvmx_lab.costs import prices, pricing
from nvmx_lab.errors import LabError
from nvmx_lab.nested.primitives import PRIMITIVES

NAMES = list(PRIMITIVES)
DRAWS = prices.load().draw(64, seed=5)

count_rows = hnp.arrays(
    np.int64,
    hnp.array_shapes(min_dims=0, max_dims=2, max_side=3).map(lambda shape: (*shape, len(NAMES))),
    elements=st.integers(-10_000, 10_000),
)


def vector(**counts: float) -> NDArray[np.float64]:
    """A count vector from names."""
    result = np.zeros(len(NAMES))
    for name, count in counts.items():
        result[NAMES.index(name)] = count
    return result


def naive(counts: dict[str, float], drawn: dict[str, float], inside: dict[str, float]) -> float:
    """Add up one total by hand: software inside an access's price is not paid twice."""
    total = 0.0
    for name, count in counts.items():
        total += count * drawn[name]
        software = "l1_instructions" if name.startswith("l1_") else "l0_instructions"
        total -= count * inside[name] * drawn[software]
    return total


@given(count_rows)
@settings(max_examples=60)
def test_price_agrees_with_adding_up_by_hand(counts: NDArray[np.int64]) -> None:
    cycles = pricing.price(counts, DRAWS).values
    assert cycles.shape == (*counts.shape[:-1], 64)
    inside = dict(zip(NAMES, DRAWS.includes_instructions, strict=True))
    rows, results = counts.reshape(-1, len(NAMES)), cycles.reshape(-1, 64)
    for row, result in zip(rows, results, strict=True):
        by_name = dict(zip(NAMES, map(float, row), strict=True))
        for k in (0, 63):
            drawn = dict(zip(NAMES, DRAWS.cycles[k], strict=True))
            assert result[k] == pytest.approx(naive(by_name, drawn, inside), rel=1e-9, abs=1e-5)


@given(count_rows, st.integers(2, 9))
@settings(max_examples=30)
def test_pricing_is_linear(counts: NDArray[np.int64], times: int) -> None:
    once, many = pricing.price(counts, DRAWS).values, pricing.price(counts * times, DRAWS).values
    assert many == pytest.approx(times * once, rel=1e-9, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_more_of_anything_with_its_software_costs_more(name: str) -> None:
    software = "l1_instructions" if name.startswith("l1_") else "l0_instructions"
    more = vector(**{name: 1.0})
    more[NAMES.index(software)] += DRAWS.includes_instructions[NAMES.index(name)]
    assert (pricing.price(more, DRAWS).values > 0).all()


def test_counts_are_not_changed() -> None:
    counts = vector(vmread_first=1, l0_instructions=10)
    before = counts.copy()
    pricing.price(counts, DRAWS)
    assert (counts == before).all()


def test_interval_is_ordered_and_over_the_draws() -> None:
    cycles = pricing.price(np.stack([vector(vmptrld=1), vector(vmptrld=2)]), DRAWS)
    found = cycles.interval()
    assert (np.array(found) == np.array(pricing.interval(cycles.values))).all()
    assert found.p05.shape == (2,)
    assert (found.p05 < found.p50).all() and (found.p50 < found.p95).all()
    assert found.p50[1] == pytest.approx(2 * found.p50[0])


# --- the numbers that the product turns on


def five_fifty_ninety_five(counts: Any, cpu: str) -> list[float]:
    return [float(q) for q in pricing.price(counts, prices.load(cpu).draw(100_000)).interval()]


# What executed KVM no longer does when no pull is needed: 181 instructions, 35 of them VMREADs.
SKIPPED = vector(vmread_first=1, vmread_next=34, l0_instructions=181 - 35)
# What it does in addition when one is: 151 instructions, 2 of them VMPTRLDs.
PULL = vector(vmptrld=2, l0_instructions=151 - 2)


def test_the_saving_is_the_claim_with_it_and_above_without() -> None:
    with_claim = five_fifty_ninety_five(SKIPPED, "skylake-2015")
    without = five_fifty_ninety_five(SKIPPED, "skylake-2015-blind")
    assert with_claim == pytest.approx([121, 228, 605], rel=0.02)
    assert without == pytest.approx([132, 442, 844], rel=0.03)
    assert with_claim[0] < 200 < with_claim[2] and without[0] < 200 < without[2]


def test_software_beside_the_vmreads_is_charged_once() -> None:
    # 147 = 35 * 4.2: nothing of the software is left over to charge, whatever the cpi.
    skipped = vector(vmread_first=1, vmread_next=34, l0_instructions=147)
    draws = prices.load().draw(1000)
    reads = draws.cycles[:, NAMES.index("vmread_first")]
    reads = reads + 34 * draws.cycles[:, NAMES.index("vmread_next")]
    assert pricing.price(skipped, draws).values == pytest.approx(reads)


def test_a_pull_costs_about_twice_the_saving() -> None:
    assert five_fifty_ninety_five(vector(vmptrld=2), "skylake-2015") == pytest.approx(
        [120, 300, 800], rel=0.02
    )
    assert five_fifty_ninety_five(PULL, "skylake-2015") == pytest.approx([240, 441, 942], rel=0.02)


def test_an_ibpb_dwarfs_the_saving() -> None:
    low, _, _ = five_fifty_ninety_five(vector(ibpb=2), "skylake-2015")
    assert low > 10 * five_fifty_ninety_five(SKIPPED, "skylake-2015")[2]


# --- no total without a price


def test_an_unknown_price_gives_no_total() -> None:
    draws = prices.load("netburst-2005").draw(10)
    counts = vector(vmread_first=3, vmptrld=2, ibpb=1)
    with pytest.raises(LabError, match=r"netburst-2005.*vmptrld, ibpb") as caught:
        pricing.price(counts, draws)
    assert "invept" not in str(caught.value)  # it does not occur


def test_unless_asked_for_and_then_it_says_what_is_missing() -> None:
    draws = prices.load("netburst-2005").draw(10)
    counts = vector(vmread_first=3, vmptrld=2, ibpb=1)
    cycles = pricing.price(counts, draws, allow_unknown=True)
    assert cycles.left_out == pricing.unpriced(counts, draws) == ("vmptrld", "ibpb")
    assert (cycles.values == pricing.price(vector(vmread_first=3), draws).values).all()


def test_what_is_the_same_on_both_sides_needs_no_price() -> None:
    draws = prices.load("netburst-2005").draw(10)
    before, after = vector(vmread_first=3, vmptrld=2), vector(vmread_first=1, vmptrld=2)
    cycles = pricing.price(before - after, draws)
    assert cycles.left_out == () and np.isfinite(cycles.values).all()


@pytest.mark.parametrize(
    "counts",
    [1.0, [1.0, 2.0], np.ones((len(NAMES), 3)), vector(vmptrld=np.nan), vector(ibpb=np.inf)],
)
def test_bad_counts_are_refused(counts: Any) -> None:
    with pytest.raises(LabError, match="counts"):
        pricing.price(counts, DRAWS)
