"""Sensitivity: which price, or the pull rate, moves the answer.

The saving is linear in the counts, and L0's pulls enter them as a rate::

    saving = counts at the mix's rate * prices + (rate - the mix's rate) * (pulls saved) * prices

Its inputs are independent, as Sobol indices want them: the standard normal numbers from which
`PriceList.at` makes prices, and the place of the pull rate in its range. Prices themselves are not:
a `next` is correlated with its `first`. What both share counts as the input of the `first`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nvmx_lab.costs import prices
from nvmx_lab.costs.posterior import Posterior
from nvmx_lab.costs.prices import FIRST_OF, PRICED_AS, FloatArray, PriceList
from nvmx_lab.costs.pricing import charged, price
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.study.compare import QUANTILES, pairs_of
from nvmx_lab.study.simulate import (
    EXITS,
    P,
    config_of,
    reader_and_pull_counts,
    simulate,
    simulate_mix,
)
from nvmx_lab.workload import handlers
from nvmx_lab.workload.mixes import Mix

if TYPE_CHECKING:
    import pandas as pd

SAMPLES: Final = 8_192
"""Base points of the sample: an index then moves by less than 0.02 between seeds (tested)."""

PULL_RATE: Final = "pull rate"
_ENDS: Final = (0.05, 0.5, 0.95)
_CONFIDENCE: Final = 0.9
_RESAMPLES: Final = 100
_TASK: Final = 0x50B01  # beside the seed: other draws of the kit have other tasks


@dataclass(frozen=True)
class Uncertain:
    """A difference of two L0s as a function of its uncertain inputs.

    Attributes
    ----------
    mix, kvm_before, kvm_after : str
        What is compared.
    price_list : PriceList
        Where prices come from.
    inputs : tuple of str
        Parameters of the price list that matter, then `PULL_RATE` if it is uncertain.
    fixed, per_pull : mapping of str to float
        By parameter, how many of each price the saving per exit holds without any pull, and by how
        many more for a pull after every exit.
    rates : tuple of float
        Pull rate with all uncertain conditions at their low ends, as the mix has it, and at their
        high ends; in order.
    """

    mix: str
    kvm_before: str
    kvm_after: str
    price_list: PriceList
    inputs: tuple[str, ...]
    fixed: Mapping[str, float] = field(repr=False)
    per_pull: Mapping[str, float] = field(repr=False)
    rates: tuple[float, float, float]

    def saving(self, unit: FloatArray) -> FloatArray:
        """Return the saving per exit, TSC cycles, float64[n].

        Parameters
        ----------
        unit : float64[n, len(inputs)]
            Probabilities in 0 to 1: 0.5 is each input's median.
        """
        drawn, rate = self.at(unit)
        total = np.zeros(len(unit))
        for name, values in drawn.items():
            amount = self.fixed.get(name, 0.0) + rate * self.per_pull.get(name, 0.0)
            total += amount * values
        return total

    def at(self, unit: FloatArray) -> tuple[dict[str, FloatArray], FloatArray]:
        """Return prices by parameter and the pull rate at probabilities; float64[n] each."""
        from scipy.special import ndtri

        # The ends themselves are infinitely far out.
        normal = ndtri(np.clip(unit, 1e-12, 1 - 1e-12))
        still = np.zeros(len(unit))
        columns = {name: normal[:, k] for k, name in enumerate(self.inputs)}
        drawn = self.price_list.at(
            {name: columns.get(name, still) for name in self.price_list.parameters}
        )
        rate = np.full(len(unit), self.rates[1])
        if PULL_RATE in self.inputs:
            rate = _within(self.rates, unit[:, self.inputs.index(PULL_RATE)])
        return drawn, rate


def uncertain(
    mix: str | Path | Mix = "cpuid",
    kvm: Sequence[str] = ("5.2", "5.2+patch13"),
    *,
    cpu: str | Path = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
) -> Uncertain:
    """Return the saving on the round trip as a function of prices and the pull rate.

    The pull rate is that of the mix, with a range from its *uncertain* conditions: those whose
    probability is neither 0 nor 1 (those are decided by configuration or code), at their low ends
    and at their high ends, as ``data/l1_conditions.toml`` or the mix gives them. Half of its
    probability lies evenly below the mix's own rate, half above: assumed. A mix without such
    conditions (one from a log) has a rate without a range, which then is no input.

    Parameters
    ----------
    mix : str, Path or Mix
        The workload.
    kvm : sequence of str
        Two releases, each with its own sync.
    cpu : str or Path
        Price list; no posterior, whose prices depend on one another.
    exits, seed : int
        Nested exits to simulate, and the seed of their stream.

    Raises
    ------
    LabError
        If a name is unknown, a price is missing, or the price list is a posterior.
    """
    price_list = prices.load(cpu)
    if isinstance(price_list, Posterior):
        raise LabError(
            "Sobol indices need independent prices",
            where="cpu",
            got=price_list.id,
            mend="name a price list, not a posterior",
        )
    pairs = pairs_of(kvm, None)
    loaded, simulated = simulate_mix(
        mix, [k for k, _ in pairs], [s for _, s in pairs], exits=exits, seed=seed
    )
    before, after = simulated
    drawn_rate = max(side.counter("pulls") for side in simulated) / after.exits
    per_pull = _pull(before.config) - _pull(after.config)
    counts = (before.round_trip - after.round_trip)[:P] / after.exits - drawn_rate * per_pull
    fixed, each = (_by_parameter(c, price_list) for c in (counts, per_pull))
    rates = pull_rates(loaded, after.config)
    priced = {name for name in price_list.parameters if fixed.get(name) or each.get(name)}
    shared = {FIRST_OF[name] for name in priced if name in FIRST_OF} & set(price_list.parameters)
    inputs = [name for name in price_list.parameters if name in priced | shared]
    if per_pull.any() and rates[0] < rates[2]:
        inputs.append(PULL_RATE)
    return Uncertain(
        mix=loaded.name,
        kvm_before=before.config.kvm.name,
        kvm_after=after.config.kvm.name,
        price_list=price_list,
        inputs=tuple(inputs),
        fixed=fixed,
        per_pull=each,
        rates=rates,
    )


def sensitivity(
    mix: str | Path | Mix = "cpuid",
    kvm: Sequence[str] = ("5.2", "5.2+patch13"),
    *,
    cpu: str | Path = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
    samples: int = SAMPLES,
) -> pd.DataFrame:
    """Return the Sobol indices of the saving on the round trip.

    The first-order index is the share of the saving's variance that would go if this input alone
    were known; the total index is the share that would stay if all others were.

    Parameters
    ----------
    mix, kvm, cpu, exits
        As in `uncertain`.
    seed : int
        Seed of the stream and of the sample.
    samples : int
        Base points, a power of 2; the saving is computed for each at (inputs + 2) points.

    Returns
    -------
    DataFrame
        One row per input, the largest total index first: input, label (the input's honest name: a
        `next` is correlated with its `first`), meaning, basis ("published",
        "calibrated", "assumed"), unit, p05, p50, p95 (of the input, the others at their medians),
        first, first_low, first_high, total, total_low, total_high (indices with 90 % confidence
        intervals by bootstrap), mix, kvm_before, kvm_after, cpu, and saving_cycles_p05, _p50,
        _p95, the same in every row. No row if nothing differs.

    Raises
    ------
    LabError
        As `uncertain`, or if `samples` is no power of 2.
    """
    import pandas as pd

    if samples < 2 or samples & (samples - 1):
        raise LabError("not a power of 2", where="samples", got=samples, allowed="256, 512, ...")
    function = uncertain(mix, kvm, cpu=cpu, exits=exits, seed=seed)
    found = sobol_indices(function.saving, len(function.inputs), seed=seed, samples=samples)
    rows = [
        {
            **_about(function, name),
            **{column: float(found[column][k]) for column in _INDICES},
            "mix": function.mix,
            "kvm_before": function.kvm_before,
            "kvm_after": function.kvm_after,
            "cpu": function.price_list.id,
            **{f"saving_cycles_{q}": found["quantiles"][i] for i, q in enumerate(QUANTILES)},
        }
        for k, name in enumerate(function.inputs)
    ]
    columns = [*_ABOUT, *_INDICES, "mix", "kvm_before", "kvm_after", "cpu"]
    columns += [f"saving_cycles_{q}" for q in QUANTILES]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("total", ascending=False, kind="stable", ignore_index=True)


_ABOUT: Final = ("input", "label", "meaning", "basis", "unit", "p05", "p50", "p95")
_INDICES: Final = ("first", "first_low", "first_high", "total", "total_low", "total_high")


def sobol_indices(
    function: Any, inputs: int, *, seed: int, samples: int = SAMPLES
) -> dict[str, FloatArray]:
    """Return the Sobol indices of a function on the unit cube.

    Parameters
    ----------
    function : callable
        float64[n, inputs] in 0 to 1 -> float64[n].
    inputs : int
        Number of independent inputs.
    seed : int
        Seed of the scrambled Sobol sequence and of the bootstrap.
    samples : int
        Base points, a power of 2.

    Returns
    -------
    dict of str to float64[inputs]
        first, first_low, first_high, total, total_low, total_high; and quantiles, float64[3], of
        the function (p05, p50, p95).
    """
    from SALib.analyze import sobol as analyze
    from SALib.sample import sobol as sample

    if not inputs:
        return {name: np.zeros(0) for name in (*_INDICES, "quantiles")}
    drawn, resampled = (
        int(n) for n in np.random.SeedSequence([seed, _TASK]).generate_state(2, np.uint32)
    )
    names = [str(k) for k in range(inputs)]
    problem = {"num_vars": inputs, "names": names, "bounds": [[0.0, 1.0]] * inputs}
    points = sample.sample(problem, samples, calc_second_order=False, seed=drawn)
    values = function(points)
    if values.std() <= 1e-12 * max(1.0, float(np.abs(values).max())):
        still = {name: np.zeros(inputs) for name in _INDICES}
        return still | {"quantiles": np.quantile(values, _ENDS)}
    found = analyze.analyze(
        problem,
        values,
        calc_second_order=False,
        num_resamples=_RESAMPLES,
        conf_level=_CONFIDENCE,
        seed=resampled,
    )
    result = {"quantiles": np.quantile(values, _ENDS)}
    for name, index in (("first", "S1"), ("total", "ST")):
        middle = np.asarray(found[index], dtype=float)
        width = np.asarray(found[f"{index}_conf"], dtype=float)
        result |= {name: middle, f"{name}_low": middle - width, f"{name}_high": middle + width}
    return result


def tornado(
    mix: str | Path | Mix = "cpuid",
    kvm: Sequence[str] = ("5.2", "5.2+patch13"),
    *,
    cpu: str | Path = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
) -> pd.DataFrame:
    """Return the saving with each input at its 5 % and at its 95 %, the others at their medians.

    Parameters
    ----------
    mix, kvm, cpu, exits, seed
        As in `uncertain`. A `first` at an end takes its `next` along as far as they are correlated.

    Returns
    -------
    DataFrame
        One row per input, the widest first: input, label, meaning, basis, unit, p05, p50, p95 (of
        the input), saving_at_p05_cycles, saving_at_p50_cycles (all inputs at their medians, the
        same in every row), saving_at_p95_cycles, swing_cycles (the distance of the ends), mix,
        kvm_before, kvm_after, cpu. No row if nothing differs.

    Raises
    ------
    LabError
        As `uncertain`.
    """
    import pandas as pd

    function = uncertain(mix, kvm, cpu=cpu, exits=exits, seed=seed)
    rows = []
    for name in function.inputs:
        low, middle, high = (float(v) for v in function.saving(_one_at_a_time(function, name)))
        rows.append(
            {
                **_about(function, name),
                "saving_at_p05_cycles": low,
                "saving_at_p50_cycles": middle,
                "saving_at_p95_cycles": high,
                "swing_cycles": abs(high - low),
                "mix": function.mix,
                "kvm_before": function.kvm_before,
                "kvm_after": function.kvm_after,
                "cpu": function.price_list.id,
            }
        )
    ends = [f"saving_at_{q}_cycles" for q in QUANTILES]
    columns = [*_ABOUT, *ends, "swing_cycles", "mix", "kvm_before", "kvm_after", "cpu"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.sort_values("swing_cycles", ascending=False, kind="stable", ignore_index=True)


def pull_rates(mix: Mix, config: Config) -> tuple[float, float, float]:
    """Return the pull rate of a mix with its uncertain conditions low, as given, and high.

    Parameters
    ----------
    mix : Mix
        The workload.
    config : Config
        L0, for what traps; its sync is taken as lazy.

    Returns
    -------
    tuple of float
        Expected shares of the exits, in order: the middle one is the mix's own.
    """
    low, high = uncertain_conditions(mix)

    def rate(probabilities: Mapping[str, float]) -> float:
        changed = {name: {"p": p} for name, p in probabilities.items()}
        given = {name: one.model_dump() for name, one in mix.conditions.items()}
        varied = Mix.model_validate(mix.model_dump() | {"conditions": given | changed})
        lazy = config_of(varied, config.kvm.name, "lazy")
        return simulate(varied.stream(1, 0), [lazy])[0].expected_pulls_share

    rates = (rate(low), rate({}), rate(high))
    return min(rates), rates[1], max(rates)


def uncertain_conditions(mix: Mix) -> tuple[dict[str, float], dict[str, float]]:
    """Return the low and the high end of each condition of a mix whose probability is uncertain.

    A probability of 0 or 1 is decided by configuration or by the code: another mix, not another
    guess about this one.
    """
    table = handlers.load(mix.l1, mix.variant)
    used = {
        condition
        for name in mix.exits
        for part in handlers.split_name(name)
        for condition in table[part].conditions()
    }
    low, high = {}, {}
    for name in sorted(used):
        known, given = handlers.conditions()[name], mix.conditions.get(name)
        p, ends = known.probability, (known.low, known.high)
        if given is not None:
            p = given.p
            ends = (p if given.low is None else given.low, p if given.high is None else given.high)
        if 0 < p < 1 and ends[0] < ends[1]:
            low[name], high[name] = ends
    return low, high


def _pull(config: Config) -> FloatArray:
    """Return the counts of a pull, none where the release's own sync is eager; float64[P]."""
    return reader_and_pull_counts(config)[1][:P] * (config.sync == "lazy")


def _by_parameter(counts: FloatArray, price_list: PriceList) -> dict[str, float]:
    """Return how many of each price counts are charged."""
    drawn = price_list.draw(1, 0)
    price(counts, drawn)  # refuses what has no price
    amounts: dict[str, float] = {}
    for primitive, amount in zip(PRIMITIVES, charged(counts, drawn), strict=True):
        parameter = PRICED_AS[primitive]
        amounts[parameter] = amounts.get(parameter, 0.0) + float(amount)
    # Means of counts are not exact: what is left of a rounding error is no input.
    return {name: amount for name, amount in amounts.items() if abs(amount) > 1e-9}


def _within(rates: tuple[float, float, float], unit: FloatArray) -> FloatArray:
    """Return pull rates in their range: even on either side of the middle."""
    low, middle, high = rates
    return np.interp(unit, (0.0, 0.5, 1.0), (low, middle, high))


def _one_at_a_time(function: Uncertain, name: str) -> FloatArray:
    unit = np.full((len(_ENDS), len(function.inputs)), 0.5)
    unit[:, function.inputs.index(name)] = _ENDS
    return unit


def _about(function: Uncertain, name: str) -> dict[str, Any]:
    """Return what an input is, and its quantiles with the others at their medians."""
    drawn, rate = function.at(_one_at_a_time(function, name))
    known = function.price_list.parameters
    if name == PULL_RATE:
        meaning = "share of the exits after which L0 pulls, by the ranges of L1's conditions"
        basis, unit, values = "assumed", "share of exits", rate
    else:
        meaning, basis, values = prices.PARAMETERS[name], known[name].basis, drawn[name]
        unit = known[name].unit if name == "cpi" else "TSC cycles"  # a fraction has become cycles
    label = name
    for following, first in FIRST_OF.items():
        if {following, first} <= set(function.inputs):
            if name == first:
                label = f"{first} with its part in {following}"
            elif name == following:
                label = f"{following} given {first}"
    return {
        "input": name,
        "label": label,
        "meaning": meaning,
        "basis": basis,
        "unit": unit,
        **dict(zip(QUANTILES, (float(v) for v in values), strict=True)),
    }
