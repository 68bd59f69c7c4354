"""Could you measure it: how many runs show a small saving in a long loop, and how few a small loop.

A *run* is one boot of a kernel in which the loop is timed, once or repeatedly. What differs between
boots (where memory lies, how warm the machine is, which firmware state it woke up in) is the same
in all repeats of a boot, so repeats do not average it away: boots must be repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nvmx_lab import data
from nvmx_lab.costs import prices
from nvmx_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd

ALPHA: Final = 0.05
"""Two-sided level of the tests."""

CORRELATIONS: Final = (0.0, 0.5, 0.9)
"""Assumed correlations of the two runs of a pair: nobody published one, so a range."""

SHARES_BETWEEN: Final = (0.1, 0.5, 0.9)
"""Assumed shares of a run's variance that lie between boots: nobody published one, so a range."""

REPEATS: Final = (1, 10, 100, 1000)
"""Repeats within a boot that the tables show."""

TRIALS: Final = 20_000
"""Simulated studies per design: the simulated power is then good to 0.3 % (standard deviation)."""

_MOST_RUNS: Final = 10**9
_MOST_DRAWS: Final = 40_000_000  # of one simulated design: a few seconds
_LEAST_TRIALS: Final = 5_000
_LARGEST_EFFECT: Final = 1e3
_ROWS: Final = 500  # of a curve's trials drawn at once


@dataclass(frozen=True)
class Noise:
    """How a boot's mean varies: two levels.

    Attributes
    ----------
    between, within : float
        Standard deviations in cycles: between boots, and between repeats within a boot.
    """

    between: float
    within: float

    @classmethod
    def of_run(cls, sd: float, share_between: float) -> Noise:
        """Split the standard deviation of single runs; `share_between` of its variance is boots."""
        if not 0 <= share_between <= 1:
            raise LabError(
                "not a share", where="share_between", got=share_between, allowed="0 to 1"
            )
        return cls(sd * math.sqrt(share_between), sd * math.sqrt(1 - share_between))

    def of_boot(self, repeats: int = 1) -> float:
        """Return the standard deviation of a boot's mean over so many repeats."""
        if repeats < 1:
            raise LabError("no repeats", where="repeats", got=repeats, allowed="at least 1")
        return math.hypot(self.between, self.within / math.sqrt(repeats))


def repeatability() -> pd.DataFrame:
    """Return the published run-to-run repeatabilities.

    Returns
    -------
    DataFrame
        Index condition; run_to_run_percent, bound, meaning, source, text.
    """
    import pandas as pd

    frame = pd.DataFrame(data.read_rows("repeatability.csv")).set_index("condition")
    frame["run_to_run_percent"] = frame["run_to_run_percent"].astype(float)
    return frame


def power(saving: float, sd: float, runs: int, correlation: float | None = None) -> float:
    """Return the probability of seeing a saving.

    Parameters
    ----------
    saving, sd : float
        Cycles; `sd` is the standard deviation of single runs.
    runs : int
        Per kernel.
    correlation : float, optional
        Of the two runs of a pair; without it the kernels' runs are not paired.

    Returns
    -------
    float
        Of a two-sided t test at `ALPHA`: of two samples, or of the pairs' differences.

    Raises
    ------
    LabError
        For a number that makes no sense.
    """
    _check(saving=saving, sd=sd)
    if runs < 2:
        raise LabError("too few runs for a t test", where="runs", got=runs, allowed="at least 2")
    return _power(_effect(saving, sd, correlation), runs, correlation is not None)


def runs_needed(saving: float, sd: float, power: float, correlation: float | None = None) -> int:
    """Return the fewest runs per kernel that show a saving with a probability.

    Parameters
    ----------
    saving, sd, correlation
        As in `power`.
    power : float
        Above `ALPHA` and below 1.

    Raises
    ------
    LabError
        For a number that makes no sense, or if a billion runs are too few.
    """
    _check(saving=saving, sd=sd)
    if not ALPHA < power < 1:
        raise LabError("not a power", where="power", got=power, allowed=f"above {ALPHA}, below 1")
    effect, paired = _effect(saving, sd, correlation), correlation is not None
    few, enough = 1, 2  # one run is too few for any test
    while _power(effect, enough, paired) < power:
        if enough == _MOST_RUNS:
            raise LabError("hopeless: more than a billion runs", where="saving", got=saving)
        few, enough = enough, min(2 * enough, _MOST_RUNS)
    while enough - few > 1:
        middle = (few + enough) // 2
        if _power(effect, middle, paired) < power:
            few = middle
        else:
            enough = middle
    return enough


def detectable(runs: int, sd: float, power: float, correlation: float | None = None) -> float:
    """Return the smallest saving in cycles that so many runs per kernel show."""
    from scipy.optimize import brentq

    _check(sd=sd)
    paired = correlation is not None
    root = brentq(
        lambda effect: _power(effect, runs, paired) - power, 1e-9, _LARGEST_EFFECT, xtol=1e-10
    )
    return float(root) * sd * _shrink(correlation)


def simulated_power(
    saving: float,
    sd: float,
    runs: int,
    correlation: float | None = None,
    *,
    trials: int = TRIALS,
    seed: int = 1,
) -> float:
    """Return the share of simulated studies whose t test sees the saving.

    Nothing of `power` is used: runs are drawn from normal distributions, and each study is tested.

    Parameters
    ----------
    saving, sd, runs, correlation
        As in `power`.
    trials, seed : int
        Studies to draw, and their seed.
    """
    from scipy import stats

    paired = correlation is not None
    rng = np.random.default_rng(np.random.SeedSequence([seed, runs, int(paired)]))
    limit = stats.t.ppf(1 - ALPHA / 2, runs - 1 if paired else 2 * runs - 2)
    seen = 0
    at_once = max(1, min(trials, _ROWS * 1000 // runs))
    for start in range(0, trials, at_once):
        shape = (min(at_once, trials - start), runs)
        before = rng.standard_normal(shape)
        after = rng.standard_normal(shape)
        if correlation is not None:
            after = correlation * before + math.sqrt(1 - correlation**2) * after
            differences = saving + sd * (before - after)
            error = differences.std(axis=1, ddof=1) / math.sqrt(runs)
            t = differences.mean(axis=1) / error
        else:
            error = sd * np.sqrt((before.var(axis=1, ddof=1) + after.var(axis=1, ddof=1)) / runs)
            t = (saving + sd * (before.mean(axis=1) - after.mean(axis=1))) / error
        seen += int((np.abs(t) > limit).sum())
    return seen / trials


def false_alarm(share_between: float, repeats: int) -> float:
    """Return how often one boot of each kernel shows a difference where there is none.

    Parameters
    ----------
    share_between : float
        Share of a run's variance between boots.
    repeats : int
        Repeats in either boot, which the t test takes for independent runs.

    Returns
    -------
    float
        Rejection rate of a test that is meant to reject in `ALPHA` of the cases. Exact: what is
        tested is a t variable times sqrt(1 + repeats * between**2 / within**2).
    """
    from scipy import stats

    noise = Noise.of_run(1.0, share_between)
    if repeats < 2:
        raise LabError("too few repeats", where="repeats", got=repeats, allowed="at least 2")
    if noise.within == 0:
        return 1.0
    freedom = 2 * repeats - 2
    larger = math.sqrt(1 + repeats * (noise.between / noise.within) ** 2)
    return float(2 * stats.t.sf(stats.t.ppf(1 - ALPHA / 2, freedom) / larger, freedom))


def needed(loop: float, saving: float, power: float, *, seed: int = 1) -> pd.DataFrame:
    """Return the runs that a saving in a loop takes, by condition and design.

    Parameters
    ----------
    loop, saving : float
        Cycles; the saving at most the loop.
    power : float
        Probability of seeing it.
    seed : int
        Of the simulation that checks the power.

    Returns
    -------
    DataFrame
        condition, run_to_run_percent, sd_cycles, design ("unpaired", "paired"), correlation (NaN
        for unpaired), runs (per kernel), power (of so many runs), power_simulated (NaN where so
        many runs are too many to draw).

    Raises
    ------
    LabError
        If the saving exceeds the loop, or a number makes no sense.
    """
    import pandas as pd

    _check_loop(loop, saving)
    rows: list[dict[str, Any]] = []
    for condition, design, correlation, percent, sd in _designs(loop):
        runs = runs_needed(saving, sd, power, correlation)
        trials = min(TRIALS, _MOST_DRAWS // (2 * runs))
        rows.append(
            {
                "condition": condition,
                "run_to_run_percent": percent,
                "sd_cycles": sd,
                "design": design,
                "correlation": math.nan if correlation is None else correlation,
                "runs": runs,
                "power": _power(_effect(saving, sd, correlation), runs, correlation is not None),
                "power_simulated": simulated_power(
                    saving, sd, runs, correlation, trials=trials, seed=seed
                )
                if trials >= _LEAST_TRIALS
                else math.nan,
            }
        )
    return pd.DataFrame(rows)


def curves(loop: float, saving: float, power: float, *, points: int = 25) -> pd.DataFrame:
    """Return the smallest saving that so many runs per kernel show, by condition and design.

    Returns
    -------
    DataFrame
        condition, run_to_run_percent, design, correlation, runs, detectable_cycles; loop_cycles,
        saving_cycles, power as given; runs_needed for them. Runs go from 3 to beyond the most that
        the saving takes.
    """
    import pandas as pd

    _check_loop(loop, saving)
    designs = tuple(_designs(loop))
    enough = [runs_needed(saving, sd, power, correlation) for _, _, correlation, _, sd in designs]
    grid = np.unique(np.geomspace(3, max(4 * max(enough), 100), points).round().astype(int))
    return pd.DataFrame(
        {
            "condition": condition,
            "run_to_run_percent": percent,
            "design": design,
            "correlation": math.nan if correlation is None else correlation,
            "runs": int(runs),
            "detectable_cycles": detectable(int(runs), sd, power, correlation),
            "loop_cycles": loop,
            "saving_cycles": saving,
            "power": power,
            "runs_needed": most,
        }
        for (condition, design, correlation, percent, sd), most in zip(designs, enough, strict=True)
        for runs in grid
    )


def boots(loop: float, saving: float, power: float) -> pd.DataFrame:
    """Return the boots per kernel that a saving takes, by how much of the noise is between boots.

    A boot's mean over its repeats is one observation; boots are not paired.

    Returns
    -------
    DataFrame
        condition, share_between, repeats (per boot), boots (per kernel).
    """
    import pandas as pd

    _check_loop(loop, saving)
    return pd.DataFrame(
        {
            "condition": condition,
            "share_between": share,
            "repeats": repeats,
            "boots": runs_needed(saving, Noise.of_run(sd, share).of_boot(repeats), power),
        }
        for condition, design, _, _, sd in _designs(loop)
        if design == "unpaired"
        for share in SHARES_BETWEEN
        for repeats in REPEATS
    )


def false_alarms() -> pd.DataFrame:
    """Return `false_alarm` over the assumed shares: share_between, repeats, rate."""
    import pandas as pd

    return pd.DataFrame(
        {"share_between": share, "repeats": repeats, "rate": false_alarm(share, repeats)}
        for share in SHARES_BETWEEN
        for repeats in REPEATS
        if repeats > 1
    )


def open_question() -> dict[str, float]:
    """Return what the published claims say of a VMREAD in a run, and of one alone.

    Returns
    -------
    dict of str to float
        vmreads (that the patch skips, without MPX), in_run_cycles (claim A, for each), alone_low
        and alone_high (cycles of one, over the claims about exactly one VMREAD), claims (how many).
    """
    rows = data.read_rows("claims.csv")
    (patch,) = (row for row in rows if row["role"] == "target")
    single = [row for row in rows if row["vmread_low"] == row["vmread_high"] == "1"]
    single = [row for row in single if row["claimed_cycles"] and row["vmwrite_high"] == "0"]
    vmreads = float(patch["vmread_low"])
    return {
        "vmreads": vmreads,
        "in_run_cycles": float(patch["claimed_cycles"]) / vmreads,
        "alone_low": min(float(r["claimed_low_cycles"] or r["claimed_cycles"]) for r in single),
        "alone_high": max(float(r["claimed_high_cycles"] or r["claimed_cycles"]) for r in single),
        "claims": float(len(single)),
    }


def microbenchmark(power: float) -> pd.DataFrame:
    """Return the runs that the same question takes where the VMREADs are all of the loop.

    Returns
    -------
    DataFrame
        condition, question, loop_cycles (the longer of the two loops that are compared; the noise
        is its share), difference_cycles, runs (per loop, unpaired).
    """
    import pandas as pd

    asked = open_question()
    vmreads = asked["vmreads"]
    in_run = vmreads * asked["in_run_cycles"]
    low, high = sorted(bare_run(cpu, round(vmreads)) for cpu in (prices.DEFAULT, prices.BLIND))
    questions = {
        f"{vmreads:.0f} VMREADs as claim A says, or nothing": (in_run, in_run),
        f"{vmreads:.0f} VMREADs and nothing beside them, by the prices of {prices.DEFAULT} or of "
        f"{prices.BLIND}": (high, high - low),
    }
    return pd.DataFrame(
        {
            "condition": condition,
            "question": question,
            "loop_cycles": loop,
            "difference_cycles": difference,
            "runs": runs_needed(difference, sd, power),
        }
        for question, (loop, difference) in questions.items()
        for condition, design, _, _, sd in _designs(loop)
        if design == "unpaired"
    )


def bare_run(cpu: str, vmreads: int) -> float:
    """Return what back-to-back VMREADs take with nothing beside them, by a price list.

    Parameters
    ----------
    cpu : str
        Price list.
    vmreads : int
        How many.

    Returns
    -------
    float
        TSC cycles, median over the draws; the instructions that prices include are taken off.
    """
    price_list = prices.load(cpu)
    drawn = price_list.sample(prices.DRAWS, seed=0)
    first, following = (price_list.bare(f"vmread_{which}", drawn) for which in ("first", "next"))
    return float(np.median(first + (vmreads - 1) * following))


def _designs(loop: float) -> list[tuple[str, str, float | None, float, float]]:
    """Return condition, design, correlation, run-to-run per cent and standard deviation."""
    return [
        (
            str(condition),
            "unpaired" if corr is None else "paired",
            corr,
            percent,
            loop * percent / 100,
        )
        for condition, percent in repeatability()["run_to_run_percent"].items()
        for corr in (None, *CORRELATIONS)
    ]


def _check(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise LabError("not above 0", where=name, got=value, allowed="a number of cycles")


def _check_loop(loop: float, saving: float) -> None:
    _check(loop_cycles=loop, saving_cycles=saving)
    if saving > loop:
        raise LabError(
            "the saving exceeds the loop", where="saving_cycles", got=saving, allowed=f"to {loop:g}"
        )


def _shrink(correlation: float | None) -> float:
    """Return the standard deviation that a t test divides by, for runs of standard deviation 1."""
    if correlation is None:
        return 1.0  # of two samples: the test itself knows that there are two
    if not -1 <= correlation < 1:
        raise LabError(
            "not a correlation of a pair", where="correlation", got=correlation, allowed="-1 to 1"
        )
    return math.sqrt(2 * (1 - correlation))


def _effect(saving: float, sd: float, correlation: float | None) -> float:
    return min(saving / (sd * _shrink(correlation)), _LARGEST_EFFECT)


@cache
def _power(effect: float, runs: int, paired: bool) -> float:
    """Return the power of the t test; statsmodels where its noncentral t does not break down."""
    from scipy import stats
    from statsmodels.stats.power import TTestIndPower, TTestPower

    test = TTestPower() if paired else TTestIndPower()
    value = float(test.power(effect, runs, ALPHA, alternative="two-sided"))
    if not math.isfinite(value):  # a large effect with very few runs
        freedom = runs - 1 if paired else 2 * runs - 2
        limit = float(stats.t.ppf(1 - ALPHA / 2, freedom))
        shift = effect * math.sqrt(runs if paired else runs / 2)
        # |T| > limit, for Z + shift over a chi: integrate over the chi.
        chi = np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom) / freedom)
        value = float(np.mean(stats.norm.sf(limit * chi - shift)))
    return value
