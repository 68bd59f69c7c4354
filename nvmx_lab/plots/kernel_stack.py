"""Figures about kernel-stack randomization in L1: who pulls, what it costs, what mends it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
    GREY,
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
    whole_cycles,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_Q: Final = ("p05", "p50", "p95")
_AXIS: Final = "saved per round trip, TSC cycles (median, 5 to 95 % of the price draws)"


def pulls_by_cause(frame: pd.DataFrame) -> Plot:
    """Draw, for each kind of exit of executed runs, the share after which L0 pulled, and why.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.kernel_stack.executed` makes: l2, randomization, kind, exits, pulls,
        host_rsp, other. Kinds that never pull are left out of the drawing.

    Returns
    -------
    Plot
        One panel per L2 and setting.

    Raises
    ------
    LabError
        If a column is missing or nothing ever pulled.
    """
    columns = ("l2", "randomization", "kind", "exits", "pulls", "host_rsp", "other")
    require(frame, columns, "pulls_by_cause")
    if not frame["pulls"].any():
        raise LabError("no exit pulled: nothing to draw", where="pulls_by_cause")
    panels = [
        (l2, state, some)
        for (l2, state), some in frame.groupby(["l2", "randomization"], sort=False)
    ]
    kinds = {
        str(l2): sorted(set(some.loc[some["pulls"] > 0, "kind"]))
        for l2, some in frame.groupby("l2")
    }
    tallest = max(map(len, kinds.values()))
    figure, axes = blank(2.1 + 0.3 * tallest, len(panels), sharex=True)
    for axis, (l2, state, some) in zip(axes, panels, strict=True):
        shown = some.set_index("kind").reindex(kinds[str(l2)])
        host = shown["host_rsp"] / shown["exits"] * 100
        other = shown["other"] / shown["exits"] * 100
        places = range(len(shown))
        axis.barh(places, host, color=VERMILLION, height=0.7, label="VMWRITE of HOST_RSP")
        axis.barh(places, other, left=host, color=SKY, height=0.7, label="any other access")
        axis.set_yticks(places, shown.index, fontsize=8)
        axis.set_ylim(tallest - 0.4, -0.6)
        axis.set_xlim(0, 100)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"{l2},\nrandomization {state}", fontsize=10, loc="left")
    handles, labels = axes[0].get_legend_handles_labels()
    legend(figure, 2, handles=handles, labels=labels)
    l2, state, largest = max(panels, key=lambda panel: panel[2]["exits"].sum())
    finding = (
        f"{l2}, randomization {state}: {share(_ratio(largest, 'host_rsp'))} of the exits pull "
        f"because of HOST_RSP, {share(_ratio(largest, 'other'))} for any other reason"
    )
    _label(axes, "exits after which L0 pulled, %")
    entitle(figure, finding)
    said = [
        f"{l2}, randomization {state}: of {some['exits'].sum():,} exits {some['pulls'].sum():,} "
        f"pull, {some['host_rsp'].sum():,} because of HOST_RSP."
        for l2, state, some in panels
    ]
    return Plot(figure, " ".join(["Bars by kind of exit.", f"{finding}.", *said]))


def _ratio(frame: pd.DataFrame, name: str) -> float:
    return float(frame[name].sum() / frame["exits"].sum())


def saving_with_and_without(frame: pd.DataFrame) -> Plot:
    """Draw what the patch saves by price list, with L1's HOST_RSP writes and without them.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.kernel_stack.savings` makes: mix, write, cpu, saving_p05, saving_p50,
        saving_p95. Price lists that cannot price all rows of a mix are left out there.

    Returns
    -------
    Plot
        One panel per mix.

    Raises
    ------
    LabError
        If a column is missing or no row has a price.
    """
    require(frame, ("mix", "write", "cpu", *(f"saving_{q}" for q in _Q)), "saving_with_and_without")
    priced = frame.dropna(subset=["saving_p50"])
    if priced.empty:
        raise LabError("no row has a price", where="saving_with_and_without")
    both = priced.groupby("cpu")["write"].transform("nunique") == 2
    priced = priced[both] if both.any() else priced
    mixes, cpus = list(dict.fromkeys(priced["mix"])), list(dict.fromkeys(priced["cpu"]))
    figure, axes = blank(1.9 + 0.42 * len(cpus), len(mixes), sharey=True)
    ways = (
        (False, "without the write", BLUE, "o", -0.16),
        (True, "with it", VERMILLION, "v", 0.16),
    )
    for axis, mix in zip(axes, mixes, strict=True):
        axis.axvline(0, color=BLACK, linewidth=1)
        for write, label, colour, marker, shift in ways:
            some = priced[(priced["mix"] == mix) & (priced["write"] == write)].set_index("cpu")
            _intervals(axis, some.reindex(cpus), "saving", shift, colour, marker, label)
        _dress(axis, cpus, mix)
    handles, labels = axes[0].get_legend_handles_labels()
    legend(figure, 2, handles=handles, labels=labels)
    with_write, quiet = (priced[priced["write"] == w]["saving_p50"] for w in (True, False))
    parts = [
        f"{words} {number(some.min())} to {number(some.max())}"
        for words, some in (("without the write", quiet), ("with it", with_write))
        if len(some)
    ]
    finding = f"What the patch saves per round trip: {', '.join(parts)} cycles"
    _label(axes, _AXIS)
    entitle(figure, finding)
    said = [
        f"{row['mix']}, {row['cpu']}, {'with' if row['write'] else 'without'} the write: "
        f"{span(row, 'saving')} cycles."
        for _, row in priced.iterrows()
    ]
    return Plot(figure, " ".join(["Intervals by price list and mix.", f"{finding}.", *said]))


def savings_of_fixes(frame: pd.DataFrame, wrong: frozenset[str] | set[str] = frozenset()) -> Plot:
    """Draw what each change of L0 saves against the lazy sync as it is.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.kernel_stack.fixes` makes, for one price list: mix, cpu, fix, lazy_p05,
        lazy_p50, lazy_p95, closed_p50. The last fix is the bound: no write at all.
    wrong : set of str
        Fixes that are not correct: drawn in grey, hollow.

    Returns
    -------
    Plot
        One panel per mix.

    Raises
    ------
    LabError
        If a column is missing, there are several price lists, or none has the prices.
    """
    require(
        frame, ("mix", "cpu", "fix", "closed_p50", *(f"lazy_{q}" for q in _Q)), "savings_of_fixes"
    )
    if frame["cpu"].nunique() != 1:
        raise LabError("the figure is for one price list", where="cpu", got=list(frame["cpu"]))
    if frame["lazy_p50"].isna().all():
        raise LabError("no row has a price", where="savings_of_fixes")
    names, mixes = list(dict.fromkeys(frame["fix"])), list(dict.fromkeys(frame["mix"]))
    figure, axes = blank(1.9 + 0.36 * len(names), len(mixes), sharey=True)
    for axis, mix in zip(axes, mixes, strict=True):
        some = frame[frame["mix"] == mix].set_index("fix").reindex(names)
        axis.axvline(0, color=BLACK, linewidth=1)
        for names_of, colour, marker, label in (
            ([n for n in names if n in wrong], GREY, "x", "wrong"),
            ([n for n in names if n not in wrong], BLUE, "o", "correct"),
        ):
            shown = some.loc[names_of].reindex(names)
            _intervals(axis, shown, "lazy", 0, colour, marker, label)
        bound = some["lazy_p50"].iloc[-1]
        axis.axvline(bound, color=VERMILLION, linewidth=1, linestyle="--", label="no write at all")
        _dress(axis, [f"{n} (wrong)" if n in wrong else n for n in names], mix)
    handles, labels = axes[0].get_legend_handles_labels()
    legend(figure, 3, handles=handles, labels=labels)
    right = frame[~frame["fix"].isin([*wrong, names[-1]])].dropna(subset=["closed_p50"])
    finding = "No correct fix has a price"
    if len(right):
        best = right.groupby("fix")["closed_p50"].max().idxmax()
        closed = right.loc[right["fix"] == best, "closed_p50"]
        ends = list(dict.fromkeys(f"{100 * v:.0f}" for v in (closed.min(), closed.max())))
        finding = f"{best}: {' to '.join(ends)} % of what the write costs is saved"
    _label(axes, _AXIS)
    entitle(figure, f"{finding} (prices of {frame['cpu'].iloc[0]})")
    said = [
        f"{mix}: "
        + listed(
            f"{row['fix']}{' (wrong)' if row['fix'] in wrong else ''} {span(row, 'lazy')}"
            for _, row in some.dropna(subset=["lazy_p50"]).iterrows()
        )
        + " cycles saved."
        for mix, some in frame.groupby("mix", sort=False)
    ]
    return Plot(figure, " ".join(["Intervals by fix and mix.", f"{finding}.", *said]))


def _intervals(
    axis: Axes,
    rows: pd.DataFrame,
    name: str,
    shift: float,
    colour: str,
    marker: str,
    label: str,
) -> None:
    """Draw medians with their intervals, one row below the other."""
    for place, (_, row) in enumerate(rows.iterrows()):
        low, middle, high = (row[f"{name}_{q}"] for q in _Q)
        if middle != middle:
            continue
        axis.plot([low, high], [place + shift] * 2, color=colour, linewidth=2)
        known = axis.get_legend_handles_labels()[1]
        axis.plot(
            middle,
            place + shift,
            marker=marker,
            color=colour,
            linestyle="none",
            label=None if label in known else label,
        )


def _label(axes: list[Axes], text: str) -> None:
    """Label the horizontal axis that all panels share, below the one in the middle."""
    axes[len(axes) // 2].set_xlabel(text)


def _dress(axis: Axes, rows: list[str], mix: str) -> None:
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.tick_params(axis="y", length=0)
    axis.set_title(mix, fontsize=10, loc="left")
    thousands(axis.xaxis)
    whole_cycles(axis.xaxis, ticks=4)
