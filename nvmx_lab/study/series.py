"""The series of 43 patches, patch by patch: what each saves, and what nobody can explain.

The patches that the model has are features of a KVM release, so the way from KVM 5.2 to 5.3 is a
row of releases, each with one feature more. All run over the same exits; each step is priced as a
difference of counts, so the steps add up to the whole in every draw of the prices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tqdm import tqdm

from nvmx_lab import data
from nvmx_lab.costs import prices
from nvmx_lab.costs.prices import FIRST_OF, PRICED_AS, Draws, PriceList
from nvmx_lab.costs.pricing import charged, interval, price
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.config import release
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.study.published import SERIES
from nvmx_lab.study.simulate import EXITS, Float64, P, config_of, simulate
from nvmx_lab.workload import mixes as workload
from nvmx_lab.workload.mixes import Mix

if TYPE_CHECKING:
    import pandas as pd

WHOLE: Final = "L"
"""The claim of ``data/claims.csv`` about the whole series: what it saves on one of the loops."""

_MATTERS: Final = 0.01
_WAYS: Final = ("cycles", "alone_cycles", "last_cycles")
_QUANTILES: Final = ("p05", "p50", "p95")


@dataclass(frozen=True)
class Patch:
    """One row of ``data/series.csv``: a patch, or several that the model has as one feature.

    Attributes
    ----------
    patches : str
        Their numbers, ``"13"`` or ``"31-38"``.
    feature : str
        The feature of a release; empty: the model does not have it.
    subject, effect : str
        What changes, and whether a clean nested round trip ``saves``, ``adds``, neither (``none``)
        or ``not known``.
    claimed_low, claimed_high : float or None
        TSC cycles per nested round trip that its message claims; None: no number.
    claimed_text, left_out : str
        What the message says, and what the patch saves beside what its number is about.
    claims : frozenset of str
        The rows of ``data/claims.csv`` about it.
    source : str
        Where it was read.
    """

    patches: str
    feature: str
    subject: str
    effect: str
    claimed_low: float | None
    claimed_high: float | None
    claimed_text: str
    left_out: str
    claims: frozenset[str]
    source: str


@dataclass(frozen=True, eq=False)
class Waterfall:
    """The way from KVM 5.2 to 5.3 on several loops.

    Attributes
    ----------
    cpu : str
        Price list.
    exits, seed : int
        Size and seed of the streams.
    frame : DataFrame
        Rows of one loop (``mix``) in the order of a waterfall, all cycles per iteration of the
        loop; ``what`` says what a row is:

        - ``step``: one feature of the series switched on, after those before it
        - ``simulated``: all of them
        - ``claimed steps``, ``other steps``: those whose patch has a number, and the rest
        - ``claims``: the sum of the numbers, in claimed_low_cycles and claimed_high_cycles
        - ``measured``: the published difference
        - ``unexplained``: measured minus simulated, negative if the model saves more

        Columns: mix, what, feature, patches, subject; begin_cycles (where the bar starts: the mean
        saving of all steps before); cycles_mean, cycles_p05, cycles_p50, cycles_p95 (saving);
        alone_cycles_p05 ... (of the feature switched on alone in 5.2), last_cycles_p05 ... (of the
        feature switched off alone in 5.3); claimed_low_cycles, claimed_high_cycles, claimed_text,
        left_out; against_claim ("within", "above", "below" the claim, "" without a number);
        own_claims, series_claims (the claims of the patch, and of the series, that prices in the
        step rest on); before_cycles, after_cycles (published), exits_per_iteration, source.
    parts : DataFrame
        What the steps are made of: mix, feature, price, count (fewer per iteration, after what
        prices include is taken off), cycles_mean, share (of the step's gains and losses), basis,
        claims.
    """

    cpu: str
    exits: int
    seed: int
    frame: pd.DataFrame
    parts: pd.DataFrame

    def of(self, mix: str) -> pd.DataFrame:
        """Return the rows of one loop.

        Raises
        ------
        LabError
            If it is not among them.
        """
        return self._of(self.frame, mix)

    def parts_of(self, mix: str) -> pd.DataFrame:
        """Return what the steps of one loop are made of.

        Raises
        ------
        LabError
            If it is not among them.
        """
        return self._of(self.parts, mix)

    def of_all(self, what: str) -> pd.DataFrame:
        """Return one kind of row of every loop, by mix."""
        return self.frame[self.frame["what"] == what].set_index("mix")

    def by_loop(self) -> pd.DataFrame:
        """Return one row per loop: what was measured, what is simulated, what is left.

        Returns
        -------
        DataFrame
            mix, exits_per_iteration, before_cycles, after_cycles, measured_cycles (all published),
            cycles_p05, cycles_p50, cycles_p95 (simulated saving), claimed_low_cycles,
            claimed_high_cycles (sum of the claims), unexplained_cycles_p05 ..., inside (whether the
            measured saving is in the simulated interval); per iteration. A row per loop, in order.
        """
        known = ["exits_per_iteration", "before_cycles", "after_cycles"]
        spread = [f"cycles_{quantile}" for quantile in _QUANTILES]
        simulated, left = self.of_all("simulated"), self.of_all("unexplained")[spread]
        frame = simulated[known].copy()
        frame["measured_cycles"] = frame["before_cycles"] - frame["after_cycles"]
        frame[spread] = simulated[spread]
        claimed = ["claimed_low_cycles", "claimed_high_cycles"]
        frame[claimed] = self.of_all("claims")[claimed]
        frame[[f"unexplained_{name}" for name in spread]] = left
        frame["inside"] = frame["measured_cycles"].between(frame["cycles_p05"], frame["cycles_p95"])
        return frame.reset_index()

    @staticmethod
    def _of(frame: pd.DataFrame, mix: str) -> pd.DataFrame:
        if mix not in set(frame["mix"]):
            raise unknown("loop", mix, frame["mix"].unique())
        return frame[frame["mix"] == mix].reset_index(drop=True)


def patches() -> tuple[Patch, ...]:
    """Return the rows of ``data/series.csv``, in order."""
    return tuple(
        Patch(
            patches=row["patches"],
            feature=row["feature"],
            subject=row["subject"],
            effect=row["effect"],
            claimed_low=_number(row["claimed_low_cycles"]),
            claimed_high=_number(row["claimed_high_cycles"]),
            claimed_text=row["claimed_text"],
            left_out=row["left_out"],
            claims=frozenset(name.strip() for name in row["claims"].split(";") if name.strip()),
            source=row["source"],
        )
        for row in data.read_rows("series.csv")
    )


def modelled() -> tuple[Patch, ...]:
    """Return the patches that the model has, in the order of the series.

    Raises
    ------
    LabError
        If they are not what KVM 5.3 has and 5.2 has not.
    """
    found = tuple(patch for patch in patches() if patch.feature)
    before, after = (release(name).features for name in SERIES)
    if {patch.feature for patch in found} != after - before:
        raise LabError(
            "the features are not those between the releases of the series",
            where="series.csv: feature",
            got=", ".join(patch.feature for patch in found),
            allowed=", ".join(sorted(after - before)),
        )
    return found


def claims_sum() -> tuple[float, float]:
    """Return the sum of all numbers that patches claim, TSC cycles per nested round trip."""
    known = [patch for patch in patches() if patch.claimed_low is not None]
    return sum(p.claimed_low or 0.0 for p in known), sum(p.claimed_high or 0.0 for p in known)


def loops() -> tuple[str, ...]:
    """Return the mixes whose totals before and after the series are published, in that order."""
    # Reading all mixes to ask each of them would take longer than a simulation.
    return tuple(row["test"].replace("_", "-") for row in data.read_rows("published_loops.csv"))


def loop(name: str) -> Mix:
    """Return a mix with published totals.

    Raises
    ------
    LabError
        If the mix is unknown, or no total of it is published.
    """
    mix = workload.load(name)
    if mix.published is None:
        raise LabError(
            "no total of this mix before and after the series is published",
            where="mix",
            got=name,
            allowed=", ".join(loops()),
        )
    return mix


def waterfall(
    mixes: Sequence[str] | None = None,
    *,
    cpu: str = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
    draws: int = prices.DRAWS,
) -> Waterfall:
    """Take the saving of the whole series apart, patch by patch.

    Parameters
    ----------
    mixes : sequence of str, optional
        Mixes with published totals; None: all 13.
    cpu : str
        Price list.
    exits, seed, draws : int
        As in `nvmx_lab.study.compare.compare`.

    Returns
    -------
    Waterfall

    Raises
    ------
    LabError
        If a name is unknown, no total of a mix is published, or a price is missing.
    """
    import pandas as pd

    if isinstance(mixes, str):
        raise LabError("needs a list of mixes", where="mixes", got=mixes, mend=f'["{mixes}"]')
    chosen = [loop(name) for name in (loops() if mixes is None else mixes)]
    if not chosen:
        raise LabError("needs a list with at least one entry", where="mixes", got="none")
    price_list = prices.load(cpu)
    drawn = price_list.draw(draws, seed)
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for mix in tqdm(chosen, unit="loop", disable=None, delay=1):
        counts = _counts(mix, exits, seed)
        rows += _rows(mix, counts, price_list, drawn)  # refuses what has no price
        parts += _parts(mix, counts, price_list, drawn)
    return Waterfall(price_list.id, exits, seed, pd.DataFrame(rows), pd.DataFrame(parts))


@dataclass(frozen=True)
class _Counts:
    """Counts saved per iteration of a loop, float64[features, P]: step by step, alone, last."""

    steps: Float64
    alone: Float64
    last: Float64


def _counts(mix: Mix, exits: int, seed: int) -> _Counts:
    """Run every release on the way over the same exits."""
    first, end = SERIES
    features = [patch.feature for patch in modelled()]
    n = len(features)
    ways = [first] + [f"{first}+{'+'.join(features[: k + 1])}" for k in range(n)]
    alone = [f"{first}+{feature}" for feature in features]
    last = [f"{end}-{feature}" for feature in features]
    simulated = simulate(
        mix.stream(exits, seed), [config_of(mix, kvm) for kvm in (*ways, *alone, *last)]
    )
    assert mix.published is not None  # noqa: S101 - `loop` has looked
    counts = np.array([s.round_trip[:P] for s in simulated]) / simulated[0].exits
    counts *= mix.published.exits_per_iteration
    way = counts[: n + 1]
    return _Counts(
        steps=way[:-1] - way[1:],
        alone=way[0] - counts[n + 1 : 2 * n + 1],
        last=counts[2 * n + 1 :] - way[-1],
    )


def _rows(mix: Mix, counts: _Counts, price_list: PriceList, drawn: Draws) -> list[dict[str, Any]]:
    """Price a loop's counts; return its rows."""
    published = mix.published
    assert published is not None  # noqa: S101 - `loop` has looked
    times = published.exits_per_iteration
    measured = published.before_cycles - published.after_cycles
    features = modelled()
    has_number = np.array([patch.claimed_low is not None for patch in features])
    saved = price(counts.steps, drawn).values  # float64[features, draws]
    whole = price(counts.steps.sum(axis=0), drawn).values
    others = {
        way: interval(price(of_way, drawn))
        for way, of_way in zip(_WAYS[1:], (counts.alone, counts.last), strict=True)
    }
    common = {
        "mix": mix.name,
        "before_cycles": published.before_cycles,
        "after_cycles": published.after_cycles,
        "exits_per_iteration": times,
        "source": published.source,
    }
    used = [_claims_used(row, price_list, drawn) for row in counts.steps]
    of_series = frozenset[str]().union(*(patch.claims for patch in patches()))
    rows: list[dict[str, Any]] = []
    begin = 0.0
    for k, patch in enumerate(features):
        spread = _spread(saved[k])
        low, high = (
            None if claimed is None else claimed * times
            for claimed in (patch.claimed_low, patch.claimed_high)
        )
        rows.append(
            {
                **common,
                "what": "step",
                "feature": patch.feature,
                "patches": patch.patches,
                "subject": patch.subject,
                "begin_cycles": begin,
                **spread,
                **{
                    f"{way}_{quantile}": float(values[k])
                    for way, quantiles in others.items()
                    for quantile, values in zip(_QUANTILES, quantiles, strict=True)
                },
                "claimed_low_cycles": low,
                "claimed_high_cycles": high,
                "claimed_text": patch.claimed_text,
                "left_out": patch.left_out,
                "against_claim": _against(spread, low, high),
                "own_claims": " ".join(sorted(patch.claims & used[k])),
                "series_claims": " ".join(sorted(of_series & used[k])),
            }
        )
        begin += spread["cycles_mean"]
    low, high = (times * bound for bound in claims_sum())
    totals: dict[str, dict[str, Any]] = {
        "claimed steps": {
            **_spread(saved[has_number].sum(axis=0)),
            "claimed_low_cycles": low,
            "claimed_high_cycles": high,
        },
        "other steps": _spread(saved[~has_number].sum(axis=0)),
        "simulated": _spread(whole),
        "claims": {"claimed_low_cycles": low, "claimed_high_cycles": high},
        "measured": _spread(np.array([measured])),
        "unexplained": {**_spread(measured - whole), "begin_cycles": float(whole.mean())},
    }
    rows += [
        {**common, "what": what, "begin_cycles": 0.0, **values} for what, values in totals.items()
    ]
    words = ("feature", "patches", "subject", "claimed_text", "left_out", "against_claim")
    for row in rows:
        for name in (*words, "own_claims", "series_claims"):
            row.setdefault(name, "")
    return rows


def _parts(mix: Mix, counts: _Counts, price_list: PriceList, drawn: Draws) -> list[dict[str, Any]]:
    """Return what each step is made of, by price."""
    rows = []
    for patch, step in zip(modelled(), counts.steps, strict=True):
        amounts = _by_price(step, drawn)
        whole = sum(abs(cycles) for _, cycles in amounts.values())
        for name, (count, cycles) in amounts.items():
            known = price_list.parameters[name]
            rows.append(
                {
                    "mix": mix.name,
                    "feature": patch.feature,
                    "price": name,
                    "count": count,
                    "cycles_mean": cycles,
                    "share": abs(cycles) / whole,
                    "basis": known.basis,
                    "claims": " ".join(sorted(_claims_of(name, price_list))),
                }
            )
    return rows


def _by_price(step: Float64, drawn: Draws) -> Mapping[str, tuple[float, float]]:
    """Return how many of each price a difference is charged for, and the mean cycles of them."""
    bill = charged(step, drawn)
    # A price that is unknown has been refused where it is charged.
    means = np.nan_to_num(drawn.cycles.mean(axis=0), nan=0.0)
    amounts: dict[str, tuple[float, float]] = {}
    for primitive, count, mean in zip(PRIMITIVES, bill, means, strict=True):
        if count != 0:
            name = PRICED_AS[primitive]
            before = amounts.get(name, (0.0, 0.0))
            amounts[name] = (before[0] + float(count), before[1] + float(count * mean))
    return amounts


def _claims_used(step: Float64, price_list: PriceList, drawn: Draws) -> frozenset[str]:
    """Return the claims that a step rests on: of prices with at least 1 % of its cycles."""
    amounts = _by_price(step, drawn)
    whole = sum(abs(cycles) for _, cycles in amounts.values())
    used = [name for name, (_, cycles) in amounts.items() if abs(cycles) >= _MATTERS * whole > 0]
    return frozenset[str]().union(*(_claims_of(name, price_list) for name in used))


def _claims_of(name: str, price_list: PriceList) -> frozenset[str]:
    """Return the claims that a price rests on; a fraction rests on those of its `first` too."""
    known = price_list.parameters[name]
    found = frozenset(known.claims)
    if known.is_fraction:
        found |= frozenset(price_list.parameters[FIRST_OF[name]].claims)
    return found


def _spread(values: Float64) -> dict[str, float]:
    """Return the mean and the quantiles of draws."""
    quantiles = dict(zip(_QUANTILES, map(float, interval(values)), strict=True))
    return {
        "cycles_mean": float(values.mean()),
        **{f"cycles_{quantile}": value for quantile, value in quantiles.items()},
    }


def _against(saving: Mapping[str, float], low: float | None, high: float | None) -> str:
    """Return on which side of a claim a simulated interval lies."""
    if low is None or high is None:
        return ""
    if saving["cycles_p05"] > high:
        return "above"
    return "below" if saving["cycles_p95"] < low else "within"


def _number(text: str) -> float | None:
    return float(text) if text else None
