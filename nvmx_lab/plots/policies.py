"""Figures of sync policies: how much of the gap between lazy and oracle each closes, and cycles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    Plot,
    blank,
    entitle,
    legend,
    listed,
    number,
    require,
    share,
    span,
    thousands,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LOOKS: Final = ((GREEN, "o"), (ORANGE, "D"), (BLUE, "s"), (VERMILLION, "v"), (SKY, "^"))
_WORST: Final = -1.0  # shades end here: what is worse is as dark, and its number is written
_SIDES: Final = ("closed_p05", "closed_p50", "closed_p95")


def gap_closed(frame: pd.DataFrame) -> Plot:
    """Draw which share of the gap between lazy and oracle each policy closes, by workload.

    Parameters
    ----------
    frame : DataFrame
        Rows of `nvmx_lab.study.policy_gap.PolicyGaps.to_frame`, those of lazy and oracle left out
        or not: workload, kind, group, lazy_pulls_share, policy, closed_p50 (None: no gap).

    Returns
    -------
    Plot
        A shaded table, workloads with a gap only, as they come.

    Raises
    ------
    LabError
        If a column is missing, or no workload has a gap.
    """
    from matplotlib.colors import LinearSegmentedColormap

    needed = ("workload", "kind", "group", "lazy_pulls_share", "policy", *_SIDES)
    require(frame, needed, "gap_closed")
    wide = frame[frame["closed_p50"].notna() & ~frame["policy"].isin(["lazy", "oracle"])]
    require(wide, needed, "gap_closed: workloads with a gap")
    table = wide.pivot_table(index="workload", columns="policy", values="closed_p50", sort=False)
    table = table[list(dict.fromkeys(wide["policy"]))].astype(float)
    about = wide.drop_duplicates("workload").set_index("workload")
    figure, (axes,) = blank(1.9 + 0.25 * len(table))
    colours = LinearSegmentedColormap.from_list("closed", [VERMILLION, "#FFFFFF", BLUE])
    axes.imshow(table.clip(_WORST, 1), cmap=colours, vmin=_WORST, vmax=1, aspect="auto")
    for y, (_, row) in enumerate(table.iterrows()):
        for x, value in enumerate(row):
            dark = abs(max(value, _WORST)) > 0.6
            text = number(100 * value) + " %"
            axes.text(x, y, text, ha="center", va="center", color="white" if dark else BLACK)
    axes.set_xticks(range(table.shape[1]), list(table.columns))
    axes.xaxis.tick_top()
    names = [f"{name} ({about.loc[name, 'kind']})" for name in table.index]
    axes.set_yticks(range(len(table)), names)
    axes.set_xlabel("median share of the gap between lazy (0 %) and oracle (100 %) that is closed")
    groups = [about.loc[name, "group"] for name in table.index]
    for y in range(1, len(groups)):
        if groups[y] != groups[y - 1]:
            axes.axhline(y - 0.5, color=BLACK, linewidth=1.2)
    pulls = axes.secondary_yaxis("right")
    rates = [share(about.loc[name, "lazy_pulls_share"]) for name in table.index]
    pulls.set_yticks(range(len(table)), rates)
    pulls.set_ylabel("exits that pull with lazy")
    for each in (axes, pulls):
        each.tick_params(length=0)
        each.grid(visible=False)
        each.spines[:].set_visible(False)
    entitle(figure, _finding_of_shares(table))
    return Plot(figure, _alt_of_shares(table, wide))


def _finding_of_shares(table: pd.DataFrame) -> str:
    best = (table >= 0.5).sum().sort_values(ascending=False, kind="stable")
    count, many = int(best.iloc[0]), len(table)
    names = listed(map(str, best.index[best == best.iloc[0]]))
    worse = [str(name) for name in table if table[name].median() < -0.05]
    text = f"{names[0].upper()}{names[1:]} closes at least half of the gap on {count} of {many}"
    if sum(best == best.iloc[0]) > 1:
        text = text.replace(" closes", " close", 1)
    text += " workloads with a gap"
    if worse:
        text += f"; {listed(worse)} {'is' if len(worse) == 1 else 'are'} worse than lazy on most"
    return text


def _alt_of_shares(table: pd.DataFrame, wide: pd.DataFrame) -> str:
    text = f"Shaded table: {len(table)} workloads by {table.shape[1]} policies. "
    text += f"{_finding_of_shares(table)}."
    for policy in table:
        ends = table[policy].sort_values()
        text += (
            f" {policy}: from {number(100 * ends.iloc[0])} % ({ends.index[0]}) to "
            f"{number(100 * ends.iloc[-1])} % ({ends.index[-1]})."
        )
    return text


def policy_costs(frame: pd.DataFrame) -> Plot:
    """Draw what policies cost over lazy, group by group of workloads.

    Parameters
    ----------
    frame : DataFrame
        Rows of `nvmx_lab.study.policy_gap.PolicyGaps.overall` for at most five policies: kind,
        group, workloads, policy, over_lazy_cycles_p05, _p50, _p95.

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        If a column is missing or there is no row.
    """
    name = "over_lazy_cycles"
    needed = [f"{name}_{q}" for q in ("p05", "p50", "p95")]
    require(frame, ("kind", "group", "workloads", "policy", *needed), "policy_costs")
    policies = list(dict.fromkeys(frame["policy"]))
    rows = frame.groupby(["kind", "group"], sort=False)
    figure, (axes,) = blank(1.8 + 0.62 * len(rows))
    axes.axvline(0, color=BLACK, linewidth=1)
    labels = []
    for place, (key, some) in enumerate(rows):
        kind, group = map(str, key)
        count = int(some["workloads"].iloc[0])
        plural = "" if count == 1 else ("es" if kind == "mix" else "s")
        pulls = "" if group == "all" else f"lazy pulls {group.replace(' (', chr(10) + '(')}, "
        labels.append(f"{pulls or 'all '}{count} {kind}{plural}")
        for _, row in some.iterrows():
            k = policies.index(row["policy"])
            at = place + (k - (len(policies) - 1) / 2) * 0.17
            _interval(axes, row, name, at, *_LOOKS[k % len(_LOOKS)], place == 0)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    for place in range(0, len(labels), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#F5F5F5", zorder=0, linewidth=0)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    thousands(axes.xaxis)
    axes.set_xlabel(
        "cycles per nested exit more (+) or less (\N{MINUS SIGN}) than lazy: median and 90 % "
        "interval, TSC cycles"
    )
    legend(figure, len(policies))
    entitle(figure, _finding_of_costs(frame))
    return Plot(figure, _alt_of_costs(frame))


def _interval(
    axes: Axes, row: pd.Series, name: str, at: float, colour: str, marker: str, first: Any
) -> None:
    low, middle, high = (float(row[f"{name}_{q}"]) for q in ("p05", "p50", "p95"))
    axes.plot([low, high], [at, at], color=colour, linewidth=2.5, alpha=0.55)
    label = row["policy"] if first else None
    axes.plot(middle, at, marker, color=colour, markeredgecolor=GREY, ms=6, label=label, ls="")


def _finding_of_costs(frame: pd.DataFrame) -> str:
    parts = []
    for kind, some in frame[frame["group"] == "all"].groupby("kind", sort=False):
        own = some[~some["policy"].isin(["lazy", "oracle"])]
        best = own.sort_values("over_lazy_cycles_p50", kind="stable").iloc[0]
        middle = best["over_lazy_cycles_p50"]
        word = "less" if middle <= 0 else "more"
        plural = "mixes" if kind == "mix" else f"{kind}s"
        parts.append(
            f"{number(abs(middle))} cycles per exit {word} with {best['policy']} over all {plural}"
        )
    text = f"Against lazy: {listed(parts)}" if parts else "Cycles per nested exit against lazy"
    return f"{text}, equally weighted" if parts else text


def _alt_of_costs(frame: pd.DataFrame) -> str:
    text = f"Intervals of cycles per nested exit over lazy. {_finding_of_costs(frame)}."
    for (kind, group), some in frame.groupby(["kind", "group"], sort=False):
        said = [f"{row['policy']} {span(row, 'over_lazy_cycles')}" for _, row in some.iterrows()]
        text += f" {kind}, {group}: {'; '.join(said)}."
    return text
