"""What ``08_better_policies`` shows beside figures: tables and sentences made from results."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nvmx_lab.nested.explorer import Exploration
from nvmx_lab.nested.policies import SYNC_POLICIES, Predictor
from nvmx_lab.study.compare import NO_DIFFERENCE_CYCLES
from nvmx_lab.study.narrative import badge
from nvmx_lab.study.policy_gap import (
    ALWAYS,
    BASELINE,
    BOUND,
    GROUPS,
    MIXES,
    NO_GAP_CYCLES,
    PREDICTION_INSTRUCTIONS,
    RUNS,
    PolicyGaps,
)

if TYPE_CHECKING:
    import pandas as pd

_SPACE = "\N{NO-BREAK SPACE}"
_ALL = "all"
_PLURAL = {MIXES: "mixes", RUNS: "executed runs"}
PARTIAL = ("per-field", "group-wise")
"""Policies that fetch a part of the rare fields."""


def policies(names: Iterable[str]) -> pd.DataFrame:
    """Return what each policy does, and what it remembers between two exits.

    Returns
    -------
    DataFrame
        Index policy; columns meaning, "guesses" (yes or no), "tried on a kernel".
    """
    import pandas as pd

    tried = {"eager": "KVM until 5.2", "lazy": "KVM since 5.3"}
    frame = pd.DataFrame(
        {
            "policy": name,
            "meaning": SYNC_POLICIES[name].meaning,
            "learns": "yes" if issubclass(SYNC_POLICIES[name], Predictor) else "no",
            "in a kernel": tried.get(name, "never"),
        }
        for name in names
    )
    return frame.set_index("policy")


def sorted_by_group(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of workloads: mixes first, then by how often lazy pulls, most first."""
    order = {group: place for place, group in enumerate(GROUPS)}
    kinds = {MIXES: 0, RUNS: 1}
    return (
        frame.assign(_kind=frame["kind"].map(kinds), _group=frame["group"].map(order))
        .sort_values(["_kind", "_group"], kind="stable")
        .drop(columns=["_kind", "_group"])
    )


def all_or_nothing(overall: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of policies that copy all rare fields or none, where anything is pulled."""
    # An enlightened VMCS has nothing to choose; lazy is the line of zero.
    pulled = overall["gap_cycles_p95"] > 0
    return overall[pulled & ~overall["policy"].isin([*PARTIAL, BASELINE])]


def totals(overall: pd.DataFrame) -> pd.DataFrame:
    """Return what each policy costs over lazy and how much of the gap it closes, for a table.

    Parameters
    ----------
    overall : DataFrame
        Of `nvmx_lab.study.policy_gap.PolicyGaps.overall`.

    Returns
    -------
    DataFrame
        Index policy; for mixes and executed runs: cycles over lazy (median and 90 % interval),
        share of the gap closed, and cycles with the assumed cost of guessing (median).
    """
    import pandas as pd

    shown: dict[str, Any] = {}
    for kind, some in overall[overall["group"] == _ALL].groupby("kind", sort=False):
        rows = some.set_index("policy")
        word = f"{rows['workloads'].iloc[0]} {_PLURAL[str(kind)]}"
        shown[f"{word}: cycles over lazy"] = [
            _interval(row, "over_lazy_cycles") for row in _rows(rows)
        ]
        shown[f"{word}: gap closed"] = [_closed(row) for row in _rows(rows)]
        with_guess = rows["over_lazy_cycles_p50"] + rows["prediction_cycles_p50"]
        shown[f"{word}: guessing included"] = [_number(value) for value in with_guess]
        index = rows.index
    return pd.DataFrame(shown, index=index)


def best_by_group(frame: pd.DataFrame) -> pd.DataFrame:
    """Return which policies are best where, worded for a table.

    Parameters
    ----------
    frame : DataFrame
        Of `nvmx_lab.study.policy_gap.PolicyGaps.to_frame`.

    Returns
    -------
    DataFrame
        Index (kind, lazy pulls); workloads, gap (range of medians, cycles), and for each policy but
        the oracle on how many workloads it is best, or as good as the best.
    """
    import pandas as pd

    rows = []
    for (kind, group), some in sorted_by_group(frame).groupby(["kind", "group"], sort=False):
        gaps = some.loc[some["policy"] == BASELINE, "gap_cycles_p50"]
        best = some[some["policy"] != BOUND].groupby("policy", sort=False)["best"].sum()
        rows.append(
            {
                "": str(kind),
                "lazy pulls": str(group),
                "workloads": len(gaps),
                "gap, cycles": _range(gaps),
                **{f"{name} best": int(count) for name, count in best.items()},
            }
        )
    return pd.DataFrame(rows).set_index(["", "lazy pulls"])


def order(frame: pd.DataFrame) -> pd.DataFrame:
    """Return mixes beside the executed runs whose exits they draw: the same exits, other order.

    Returns
    -------
    DataFrame
        Index run; order ("drawn", "as executed"), gap (median, cycles), and the share of it that
        each policy closes.
    """
    import pandas as pd

    rows = []
    for run, drawn in frame[frame["drawn_from"] != ""].groupby("drawn_from", sort=False):
        own = frame[(frame["workload"] == run) & (frame["kind"] == RUNS)]
        for how, some in (("drawn one by one", drawn), ("as executed", own)):
            if len(some) and some["closed_p50"].notna().all():
                first = {"run": run, "order": how, "gap, cycles": _gap(some)}
                shares = {row["policy"]: _closed(row) for row in _rows(some)}
                rows.append(first | {k: v for k, v in shares.items() if k not in (BASELINE, BOUND)})
    return pd.DataFrame(rows).set_index("run") if rows else pd.DataFrame(columns=["order"])


def source_of(module: ModuleType) -> str:
    """Return a module's text as Markdown, with the number of its lines."""
    text = inspect.getsource(module).strip()
    return f"{len(text.splitlines())} lines:\n\n```python\n{text}\n```"


def of_check(exploration: Exploration) -> str:
    """Return what the explorer found of a policy, as Markdown."""
    policy = exploration.config.sync
    reach = "every reachable state" if exploration.complete else "a part of the reachable states"
    text = (
        f"{badge('simulated')} `{policy}`: {reach} visited, {exploration.states:,} states and "
        f"{exploration.transitions:,} transitions, with fields of three kinds. "
    )
    if not exploration.ok:
        return text + f"**It is wrong** in {len(exploration.findings)} ways."
    text += "**Nobody sees a wrong value.**"
    if issubclass(SYNC_POLICIES[policy], Predictor):
        text += (
            " A predictor can do nothing but choose at an exit, so the search lets each exit go "
            "either way: this holds for every predictor."
        )
    return text


def priced(frame: pd.DataFrame) -> pd.DataFrame:
    """Return workloads under policies, worded for a table: cycles over lazy.

    Returns
    -------
    DataFrame
        Index workload; "exits that pull with lazy", and for each policy cycles over lazy (median
        and 90 % interval).
    """
    import pandas as pd

    rows = []
    for name, some in frame.groupby("workload", sort=False):
        first: dict[str, Any] = {"workload": name}
        first["exits that pull with lazy"] = _share(float(some["lazy_pulls_share"].iloc[0]))
        cells = {row["policy"]: _interval(row, "over_lazy_cycles") for row in _rows(some)}
        rows.append(first | {name: cells[name] for name in cells if name != BASELINE})
    return pd.DataFrame(rows).set_index("workload")


def answer(gaps: PolicyGaps, frame: pd.DataFrame, overall: pd.DataFrame) -> str:
    """Return the answer to "is there a better policy than lazy?", as Markdown.

    Parameters
    ----------
    gaps : PolicyGaps
        What was simulated.
    frame, overall : DataFrame
        Of its `to_frame` and `overall`.
    """
    kinds = list(dict.fromkeys(overall["kind"]))
    without = frame[frame["policy"] == BASELINE]
    none = int(without["closed_p50"].isna().sum())
    lines = [
        f"{_headline(overall[overall['group'] == _ALL])} {badge('simulated')} On {none} of "
        f"{len(without)} workloads lazy is within {NO_GAP_CYCLES:.0f} cycles of the oracle: "
        "nothing to gain there, and a guess costs what it costs.",
        "",
    ]
    said = [text for kind in kinds for text in _where_it_matters(overall, kind)]
    own = frame[~frame["policy"].isin([BASELINE, BOUND])]
    wide = own[own["closed_p50"].notna()]
    said += [*_of_adaptive(frame), *_of_parts(wide)]
    lines += [f"- {badge('simulated')} {text}" for text in said]
    lines += [f"- {text}" for text in _of_order(frame)]
    lines.append(f"- {badge('assumed')} {_of_guessing(frame, overall)}")
    assumed = gaps.assumed_prices()
    if assumed:
        names = _listed(f"`{name}`" for name in assumed)
        lines.append(
            f"- {badge('assumed')} What a pull costs rests on prices that nobody has published: "
            f"{names}. {_of_draws(overall)}"
        )
    lines += [
        "",
        f"{badge('simulated')} Counts by the model, cycles by the prices of {gaps.cpu}. Each "
        "workload weighs the same, which those of no real host do. **Nobody has tried any of these "
        "policies but eager and lazy on a kernel.**",
    ]
    return "\n".join(lines)


def _headline(rows: pd.DataFrame) -> str:
    said = []
    names = []
    for kind, some in rows.groupby("kind", sort=False):
        able = some[~some["policy"].isin([BASELINE, BOUND])]
        best = able.sort_values("over_lazy_cycles_p50", kind="stable").iloc[0]
        if best["over_lazy_cycles_p95"] >= 0:
            said.append(f"over all {_PLURAL[str(kind)]} no policy is clearly better than lazy")
            continue
        names.append(best["policy"])
        share = "" if best["closed_p50"] is None else f", {_closed(best)} of the gap to the oracle"
        said.append(
            f"over all {some['workloads'].iloc[0]} {_PLURAL[str(kind)]} `{best['policy']}` takes "
            f"{_less(best)} cycles per exit less than lazy{share}"
        )
    verdict = "**There is a better policy than lazy in the model.**"
    if not names:
        verdict = "**No better policy than lazy was found.**"
    return f"{verdict} With equal weights, {'; '.join(said)}."


def _where_it_matters(overall: pd.DataFrame, kind: str) -> list[str]:
    rows = overall[(overall["kind"] == kind) & (overall["group"] == ALWAYS)]
    if rows.empty:
        return []
    able = rows[~rows["policy"].isin([BASELINE, BOUND])]
    good = able[able["over_lazy_cycles_p95"] < 0].sort_values("over_lazy_cycles_p50")
    if good.empty:
        return []
    count = rows["workloads"].iloc[0]
    said = _listed(f"`{row['policy']}` {_less(row)} ({_closed(row)})" for row in _rows(good))
    return [
        f"Where L1 needs rare fields {ALWAYS} ({count} {_PLURAL[kind]}), cycles per exit less than "
        f"lazy, and share of the gap closed: {said}."
    ]


def _of_adaptive(frame: pd.DataFrame) -> list[str]:
    """Say how near adaptive comes to the better of eager and lazy."""
    table = frame.pivot_table(
        index="workload", columns="policy", values="over_lazy_cycles_p50", sort=False
    )
    if not {"adaptive", "eager"} <= set(table):
        return []
    excess = table["adaptive"] - table["eager"].clip(upper=0)
    worst = excess.idxmax()
    near = int((excess <= 10).sum())
    text = (
        f"`adaptive` costs at most 10 cycles more than the better of eager and lazy on {near} of "
        f"{len(excess)} workloads"
    )
    if excess.max() > 10:
        text += f"; the most is {_number(excess.max())}, on `{worst}`"
    better = int((table["adaptive"] < table["eager"].clip(upper=0) - 10).sum())
    if better:
        text += f". On {better} it beats both by more than that"
    return [f"{text} (medians)."]


def _of_parts(wide: pd.DataFrame) -> list[str]:
    said = []
    for name in PARTIAL:
        some = wide[wide["policy"] == name]
        if some.empty:
            continue
        worse = int((some["over_lazy_cycles_p50"] > NO_DIFFERENCE_CYCLES).sum())
        better = int((some["over_lazy_cycles_p50"] < -NO_DIFFERENCE_CYCLES).sum())
        said.append(f"`{name}` is worse than lazy on {worse} and better on {better}")
    if not said:
        return []
    count = wide["workload"].nunique()
    return [
        f"Of {count} workloads with a gap, {_listed(said)} (medians). A fetch switches VMCS twice "
        "whatever it reads, so it pays only where L1 needs one part and nothing else."
    ]


def _of_order(frame: pd.DataFrame) -> list[str]:
    """Say what the real order of the exits gives a policy that learns."""
    said = []
    for run, drawn in frame[frame["drawn_from"] != ""].groupby("drawn_from", sort=False):
        own = frame[(frame["workload"] == run) & (frame["kind"] == RUNS)].set_index("policy")
        before = drawn.set_index("policy")
        for name in ("adaptive", "by-reason"):
            if name in own.index and name in before.index:
                pair = before.loc[name], own.loc[name]
                if all(row["gap_cycles_p50"] >= NO_GAP_CYCLES for row in pair):
                    shares = " and ".join(_closed(row) for row in pair)
                    said.append(f"`{name}` {shares} of the gap on `{run}`")
    text = "A mix draws its exits one by one, so nothing there comes in bursts."
    if said:
        text += f" Drawn, and in the order that was executed, close: {_listed(said)}."
    return [
        f"{badge('simulated')} {text} A micro-guest that repeats each kind of exit is easier to "
        "guess than a workload; a Linux that boots is the better test."
    ]


def _of_draws(overall: pd.DataFrame) -> str:
    """Say how far the share that is closed moves with the prices."""
    rows = overall[(overall["group"] == _ALL) & overall["closed_p50"].notna()]
    said = [
        f"`{row['policy']}` {_number(100 * row['closed_p05'])} to "
        f"{_number(100 * row['closed_p95'])}{_SPACE}% over all {_PLURAL[row['kind']]}"
        for row in _rows(rows)
        if row["prediction_cycles_p50"] > 0
    ]
    if not said:
        return "No share of a gap is given."
    return (
        f"Over the price draws (90{_SPACE}%) these shares of the gap are closed: {_listed(said)}."
    )


def _of_guessing(frame: pd.DataFrame, overall: pd.DataFrame) -> str:
    """Say what the assumed instructions of a guess change."""
    guess = frame[frame["prediction_cycles_p50"] > 0]
    if guess.empty:
        return "No policy here guesses."
    cycles = float(guess["prediction_cycles_p50"].iloc[0])
    said, most = [], 0.0
    for name, some in guess.groupby("policy", sort=False):
        net = some["over_lazy_cycles_p50"] + cycles
        most = max(most, float(net.max()))
        said.append(f"`{name}` is better than lazy on {int((net < 0).sum())} of {len(net)}")
    whole = overall[(overall["group"] == _ALL) & (overall["prediction_cycles_p50"] > 0)]
    sums = [
        f"`{row['policy']}` {_number(row['over_lazy_cycles_p50'] + cycles)} over all "
        f"{_PLURAL[row['kind']]}"
        for row in _rows(whole)
    ]
    return (
        f"What a guess itself costs is in none of these numbers. With {PREDICTION_INSTRUCTIONS} "
        f"instructions per round trip, about {_number(cycles)} cycles, {_listed(said)} workloads, "
        f"and on the others costs at most {_number(most)} cycles. Cycles over lazy are then "
        f"{_listed(sums)}."
    )


def _less(row: Any) -> str:
    low, middle, high = (_number(-row[f"over_lazy_cycles_{q}"]) for q in ("p95", "p50", "p05"))
    return f"{middle} (90{_SPACE}% interval {low} to {high})"


def _gap(some: pd.DataFrame) -> str:
    return _number(float(some["gap_cycles_p50"].iloc[0]))


def _closed(row: Any) -> str:
    middle = row["closed_p50"]
    if middle is None or middle != middle:  # NaN is not itself
        return "no gap"
    return f"{_number(100 * middle)}{_SPACE}%"


def _interval(row: Any, name: str) -> str:
    low, middle, high = (_number(row[f"{name}_{q}"]) for q in ("p05", "p50", "p95"))
    return f"{middle} ({low} to {high})".replace(" ", _SPACE)


def _number(value: float) -> str:
    text = f"{value:,.0f}"
    return "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")


def _share(value: float) -> str:
    return f"{100 * value:.1f}{_SPACE}%"


def _range(values: pd.Series) -> str:
    low, high = _number(values.min()), _number(values.max())
    return low if low == high else f"{low} to {high}".replace(" ", _SPACE)


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.reset_index().to_dict("records")]


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
