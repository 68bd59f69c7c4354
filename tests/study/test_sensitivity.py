"""Sensitivity: Sobol indices against theory and brute force, the function against the pricing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr

import nvmx_lab as nx
from nvmx_lab.costs import prices
from nvmx_lab.costs.posterior import Posterior
from nvmx_lab.costs.pricing import price
from nvmx_lab.errors import LabError
from nvmx_lab.study.compare import QUANTILES
from nvmx_lab.study.sensitivity import (
    PULL_RATE,
    pull_rates,
    sensitivity,
    sobol_indices,
    tornado,
    uncertain,
    uncertain_conditions,
)
from nvmx_lab.study.simulate import P, config_of, reader_and_pull_counts, simulate, simulate_mix
from nvmx_lab.workload import mixes

PATCH = ("5.2", "5.2+patch13")
INDICES = ("first", "total")


def test_of_a_linear_function_they_are_the_shares_of_the_variance():
    weights = np.array([3.0, -2.0, 1.0, 0.0])
    found = sobol_indices(lambda unit: unit @ weights + 7, 4, seed=3, samples=2_048)
    shares = weights**2 / (weights**2).sum()
    for index in INDICES:
        np.testing.assert_allclose(found[index], shares, atol=0.01)
        assert (found[f"{index}_low"] <= shares + 0.01).all()
        assert (found[f"{index}_high"] >= shares - 0.01).all()


def test_of_a_product_part_of_the_variance_is_of_both():
    """x * y on 1 + 2u: each alone 1/(2 + c), together the rest, c = variance over squared mean."""
    found = sobol_indices(
        lambda unit: (1 + 2 * unit[:, 0]) * (1 + 2 * unit[:, 1]), 2, seed=3, samples=4_096
    )
    c = (1 / 3) / 4
    np.testing.assert_allclose(found["first"], 1 / (2 + c), atol=0.01)
    np.testing.assert_allclose(found["total"], (1 + c) / (2 + c), atol=0.01)


@pytest.mark.parametrize("mix", ["cpuid", "thread-churn"])
def test_brute_force_finds_the_same(mix):
    """First: variance of the means of thin slices. Total: what redrawing one input changes."""
    function = uncertain(mix, PATCH, exits=2_000)
    rng = np.random.default_rng(5)
    unit = rng.random((100_000, len(function.inputs)))
    values = function.saving(unit)
    frame = sensitivity(mix, PATCH, exits=2_000, samples=4_096).set_index("input")
    for k, name in enumerate(function.inputs):
        slices = values[np.argsort(unit[:, k])].reshape(100, -1).mean(axis=1)
        first = slices.var() / values.var()
        redrawn = unit.copy()
        redrawn[:, k] = rng.random(len(unit))
        total = ((values - function.saving(redrawn)) ** 2).mean() / 2 / values.var()
        assert frame.loc[name, "first"] == pytest.approx(first, abs=0.02), name
        assert frame.loc[name, "total"] == pytest.approx(total, abs=0.02), name


@pytest.mark.parametrize(
    ("mix", "kvm"),
    [
        ("pio-user-kstack", PATCH),
        ("thread-churn", PATCH),
        ("cpuid", ("5.2", "5.3")),
        ("linux-boot-kstack", ("5.3", "5.8")),
    ],
)
@pytest.mark.parametrize("cpu", ["skylake-2015", "skylake-2015-blind"])
def test_the_function_is_the_pricing_at_the_mix_s_rate(mix, kvm, cpu):
    n, seed = 400, 9
    function = uncertain(mix, kvm, cpu=cpu, exits=1_000)
    price_list = prices.load(cpu)
    normal = price_list.normals(n, seed)
    unit = np.column_stack(
        [np.full(n, 0.5) if name == PULL_RATE else ndtr(normal[name]) for name in function.inputs]
    )
    _, (before, after) = simulate_mix(mix, kvm, [None, None], exits=1_000, seed=1)
    saved = (before.round_trip - after.round_trip) / after.exits
    # By hand: from the drawn pull rate to the expected one.
    change = after.exits_that_pull / after.exits - function.rates[1]
    for side, sign in ((before, -1), (after, 1)):
        if side.config.sync == "lazy":
            saved = saved + sign * change * reader_and_pull_counts(side.config)[1]
    expected = price(saved[:P], price_list.draw(n, seed)).values
    np.testing.assert_allclose(function.saving(unit), expected, rtol=1e-6, atol=1e-5)
    stated = nx.compare(mix, kvm=kvm, cpu=cpu, exits=1_000).saving["round_trip_cycles"]["p50"]
    per_pull = abs(
        np.median(
            price(reader_and_pull_counts(after.config)[1][:P], price_list.draw(n, seed)).values
        )
    )
    assert np.median(expected) == pytest.approx(stated, abs=abs(change) * per_pull, rel=0.15)


def test_pull_rates_are_those_of_the_conditions_at_their_ends():
    mix = mixes.load("thread-churn")
    config = config_of(mix, "5.3")
    low, middle, high = pull_rates(mix, config)
    at_low, at_high = uncertain_conditions(mix)
    assert (at_low["host_cr3_changed"], at_high["host_cr3_changed"]) == (0.01, 0.2)
    # Decided by configuration: kernel-stack randomization is off, and not half on.
    assert "host_rsp_changed" not in at_low
    raw = mix.model_dump()
    for expected, ends in ((low, at_low), (middle, {}), (high, at_high)):
        conditions = raw["conditions"] | {name: {"p": p} for name, p in ends.items()}
        made = mixes.Mix.model_validate(raw | {"conditions": conditions})
        (lazy,) = simulate(made.stream(20_000, 4), [config.with_sync("lazy")])
        assert lazy.exits_that_pull / 20_000 == pytest.approx(expected, abs=0.01)
    assert 0.005 < low < middle < high < 0.3
    fixed = pull_rates(mixes.load("pio-user-kstack"), config)
    assert fixed[0] == fixed[1] == fixed[2]
    assert PULL_RATE not in uncertain("pio-user-kstack", PATCH, exits=500).inputs


def test_the_rate_lies_evenly_on_either_side():
    function = uncertain("thread-churn", PATCH, exits=500)
    unit = np.full((5, len(function.inputs)), 0.5)
    unit[:, function.inputs.index(PULL_RATE)] = (0, 0.25, 0.5, 0.75, 1)
    _, rate = function.at(unit)
    low, middle, high = function.rates
    np.testing.assert_allclose(rate, [low, (low + middle) / 2, middle, (middle + high) / 2, high])


@pytest.mark.parametrize("end", ["p05", "p95"])
@pytest.mark.parametrize("name", ["vmptrld", "rdmsr", "cpi"])
def test_an_end_of_the_tornado_is_the_median_of_a_list_with_that_price(tmp_path, name, end):
    known = prices.load(prices.DEFAULT).parameters[name]
    amount, unit = getattr(known, end), known.unit
    file = tmp_path / "moved.toml"
    file.write_text(
        f'id = "moved"\nbase = "{prices.DEFAULT}"\nname = "n"\ngeneration = "g"\nyears = "y"\n'
        f'note = "t"\n[{name}]\np05 = {amount}\np50 = {amount}\np95 = {amount}\n'
        f'unit = "{unit}"\nbasis = "assumed"\nsource = "a test"\n'
    )
    frame = tornado("xen-emulation", exits=500).set_index("input")
    moved = tornado("xen-emulation", cpu=file, exits=500)
    assert frame.loc[name, end] == pytest.approx(amount)
    assert frame.loc[name, f"saving_at_{end}_cycles"] == pytest.approx(
        moved["saving_at_p50_cycles"].iloc[0]
    )


def test_tornado_is_sorted_and_a_first_takes_its_next_along():
    frame = tornado("cpuid", exits=500)
    assert frame["swing_cycles"].is_monotonic_decreasing
    assert frame["saving_at_p50_cycles"].nunique() == 1
    by_input = frame.set_index("input")
    # No VMREAD of this difference starts a run but those of rare pulls: the reader follows others.
    assert by_input.loc["vmread_first", "swing_cycles"] > 50
    assert by_input.loc["vmread_first", "label"] == "vmread_first with its part in vmread_next"
    assert by_input.loc["vmread_next", "label"] == "vmread_next given vmread_first"
    assert by_input.loc[PULL_RATE, ["p05", "p50", "p95"]].is_monotonic_increasing


def test_another_seed_moves_no_index():
    one, other = (sensitivity("thread-churn", seed=seed).set_index("input") for seed in (1, 2))
    assert list(one.index) == list(other.index)
    for index in INDICES:
        np.testing.assert_allclose(one[index], other[index], atol=0.02)
    for quantile in QUANTILES[1:]:
        ends = [frame[f"saving_cycles_{quantile}"].iloc[0] for frame in (one, other)]
        assert ends[0] == pytest.approx(ends[1], rel=0.02)
    assert sensitivity("cpuid", samples=64).equals(sensitivity("cpuid", samples=64))


def test_nothing_to_say_of_no_difference_and_clear_errors(tmp_path, monkeypatch):
    for frame in (sensitivity("kvm-evmcs", exits=200), tornado("kvm-evmcs", exits=200)):
        assert frame.empty
        assert {"input", "mix", "cpu"} <= set(frame.columns)
    with pytest.raises(LabError, match="power of 2"):
        sensitivity("cpuid", samples=1_000)
    with pytest.raises(LabError, match="vmptrld"):
        sensitivity("pio-user-kstack", cpu="netburst-2005", exits=200)
    shipped = prices.load(prices.DEFAULT)
    fields = {name: getattr(shipped, name) for name in shipped.__dataclass_fields__}
    posterior = Posterior(**fields, sampled=("cpi",), samples=np.ones((10, 1)))
    monkeypatch.setattr(prices, "load", lambda _: posterior)
    with pytest.raises(LabError, match="not a posterior"):
        sensitivity("cpuid", cpu=tmp_path / "posterior.parquet")


def test_a_function_that_does_not_vary_has_no_indices():
    found = sobol_indices(lambda unit: np.full(len(unit), 3.0), 2, seed=1, samples=64)
    assert not any(found[index].any() for index in INDICES)
    assert list(found["quantiles"]) == [3.0, 3.0, 3.0]
