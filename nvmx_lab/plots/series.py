"""Figures of the series of patches: one loop patch by patch, and all loops."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    Plot,
    blank,
    entitle,
    legend,
    number,
    require,
    thousands,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPREAD: Final = ("cycles_p05", "cycles_p50", "cycles_p95")
_CLAIMED: Final = ("claimed_low_cycles", "claimed_high_cycles")
_TOTALS: Final = {
    "simulated": "All of them, simulated",
    "claims": "All numbers that patches claim",
    "measured": "Measured",
    "unexplained": "Not explained by the model",
}
_LETTERS: Final = 46  # of a label's line
_THICK: Final = 0.56


def waterfall(frame: pd.DataFrame) -> Plot:
    """Draw what each patch of the series saves on one loop, down to what was measured.

    Parameters
    ----------
    frame : DataFrame
        Rows of one loop, as `nvmx_lab.study.series.Waterfall.of` returns: mix, what, patches,
        subject, begin_cycles, cycles_mean, cycles_p05, cycles_p50, cycles_p95, claimed_low_cycles,
        claimed_high_cycles, own_claims, before_cycles, after_cycles.

    Returns
    -------
    Plot
        Bars are means, which add up; each interval is that of its own row.

    Raises
    ------
    LabError
        If a column is missing, or the rows are not of one loop.
    """
    columns = ("mix", "what", "patches", "subject", "begin_cycles", "cycles_mean", *_SPREAD)
    more = (*_CLAIMED, "own_claims", "before_cycles", "after_cycles")
    require(frame, (*columns, *more), "waterfall")
    drawn = frame[frame["what"].isin(["step", *_TOTALS])].reset_index(drop=True)
    if drawn["mix"].nunique() != 1 or set(_TOTALS) - set(drawn["what"]):
        raise LabError(
            "a waterfall shows one loop, with its totals",
            where="mix and what",
            got=", ".join(map(str, drawn["mix"].unique())) or "none",
        )
    figure, (axes,) = blank(2.4 + 0.5 * len(drawn))
    first = drawn.to_dict("records")[0]
    before, after = float(first["before_cycles"]), float(first["after_cycles"])
    for place, row in drawn.iterrows():
        _bar(axes, row, float(place))  # type: ignore[arg-type]
        _claimed(axes, row, float(place))  # type: ignore[arg-type]
    ends = drawn["begin_cycles"] + drawn["cycles_mean"]
    steps = (drawn["what"] == "step").sum()
    for place in range(steps):  # from the end of a bar down to the next
        axes.plot([ends[place]] * 2, [place, place + 1], color=GREY, linewidth=0.8, zorder=1)
    axes.axhline(steps - 0.5, color=GREY, linewidth=0.8)
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.axvline(before - after, color=BLACK, linewidth=1, linestyle=":")
    axes.set_yticks(range(len(drawn)), [_label(row) for _, row in drawn.iterrows()], fontsize=9)
    axes.set_ylim(len(drawn) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    thousands(axes.xaxis)
    axes.set_xlabel("saved, TSC cycles per iteration (bar: mean; line: 5 to 95 % of price draws)")

    def rest(saved: Any) -> Any:
        """Return what is left of the loop after a saving, and the other way round."""
        return before - saved

    left = axes.secondary_xaxis("top", functions=(rest, rest))
    thousands(left.xaxis)
    left.set_xlabel(
        f"left of the {number(before)} cycles measured before the series; {number(after)} after it"
    )
    _legend_of_waterfall(figure)
    finding = _finding(drawn)
    entitle(figure, finding)
    return Plot(figure, _alt(drawn, finding))


def series_loops(frame: pd.DataFrame) -> Plot:
    """Draw what the whole series saves on each loop: simulated, claimed and measured.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.series.Waterfall.by_loop` returns: mix, measured_cycles, cycles_p05,
        cycles_p50, cycles_p95, claimed_low_cycles, claimed_high_cycles, inside.

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        If a column is missing or there is no row.
    """
    require(frame, ("mix", "measured_cycles", *_SPREAD, *_CLAIMED, "inside"), "series_loops")
    rows = frame.reset_index(drop=True)
    figure, (axes,) = blank(1.7 + 0.34 * len(rows))
    for place, row in rows.iterrows():
        at = float(place)  # type: ignore[arg-type]
        inside = bool(row["inside"])
        axes.plot(
            [row["cycles_p05"], row["cycles_p95"]],
            [at, at],
            color=SKY,
            linewidth=6,
            solid_capstyle="butt",
        )
        axes.plot([row["cycles_p50"]], [at], "o", color=BLUE, markeredgecolor="white")
        axes.plot([row[name] for name in _CLAIMED], [at + 0.28] * 2, color=ORANGE, linewidth=3)
        axes.plot(
            [row["measured_cycles"]],
            [at],
            "P" if inside else "x",
            color=BLACK if inside else VERMILLION,
            markersize=9,
            markeredgewidth=1 if inside else 2,
        )
    axes.set_yticks(range(len(rows)), rows["mix"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(left=min(0.0, rows["cycles_p05"].min()))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    thousands(axes.xaxis)
    axes.set_xlabel("saving of the whole series, TSC cycles per iteration of the loop")
    _legend_of_loops(figure)
    inside_of = int(rows["inside"].sum())
    below = int((rows["measured_cycles"] < rows["cycles_p05"]).sum())
    finding = f"The measured saving is in the simulated interval on {inside_of} of {_loops(rows)}"
    if below:
        finding += f", below it on {below}"
    if len(rows) - inside_of - below:
        finding += f", above it on {len(rows) - inside_of - below}"
    entitle(figure, finding)
    said = "; ".join(
        f"{row['mix']}: simulated {number(row['cycles_p50'])} "
        f"({number(row['cycles_p05'])} to {number(row['cycles_p95'])}), "
        f"measured {number(row['measured_cycles'])}"
        for _, row in rows.iterrows()
    )
    alt = f"Intervals of the simulated saving per loop with the measured one. {finding}. {said}."
    return Plot(figure, alt)


def _bar(axes: Axes, row: pd.Series, place: float) -> None:
    """Draw the bar of a row, and its interval if it has one."""
    if row["what"] == "claims":
        return
    begin = row["begin_cycles"]
    style: dict[str, Any] = {"color": SKY if row["own_claims"] else BLUE}
    if row["what"] == "measured":
        style = {"color": BLACK}
    elif row["what"] == "unexplained":
        style = {"facecolor": "white", "edgecolor": VERMILLION, "hatch": "////"}
    axes.barh(place, row["cycles_mean"], left=begin, height=_THICK, zorder=2, **style)
    if row["cycles_p05"] != row["cycles_p95"]:
        axes.plot(
            [begin + row["cycles_p05"], begin + row["cycles_p95"]],
            [place, place],
            color="#444444",
            linewidth=1.2,
            zorder=3,
            marker="|",
        )


def _claimed(axes: Axes, row: pd.Series, place: float) -> None:
    """Draw what a patch claims, from where its bar begins."""
    low, high = (row[name] for name in _CLAIMED)
    if not low >= 0:  # NaN: no number
        return
    ends = [row["begin_cycles"] + low, row["begin_cycles"] + high]
    below = place if row["what"] == "claims" else place + 0.4
    axes.plot(ends, [below] * 2, color=ORANGE, linewidth=2.5, marker="D", markersize=6, zorder=4)


def _label(row: pd.Series) -> str:
    if row["what"] != "step":
        return _TOTALS[row["what"]]
    return textwrap.fill(f"{row['patches']}: {row['subject']}", _LETTERS)


def _finding(drawn: pd.DataFrame) -> str:
    rows = {row["what"]: row for row in drawn.to_dict("records")}
    total, measured = rows["simulated"], rows["measured"]
    return (
        f"{total['mix']}: the series saves {number(measured['cycles_p50'])} cycles as measured, "
        f"{number(total['cycles_p05'])} to {number(total['cycles_p95'])} as simulated"
    )


def _alt(drawn: pd.DataFrame, finding: str) -> str:
    parts = []
    for _, row in drawn.iterrows():
        name = f"patch {row['patches']}" if row["what"] == "step" else _TOTALS[row["what"]].lower()
        said = []
        if row["what"] not in ("claims", "measured"):
            spread = ", ".join(number(row[q]) for q in ("cycles_p05", "cycles_p95"))
            said.append(f"{number(row['cycles_mean'])} (interval {spread.replace(', ', ' to ')})")
        elif row["what"] == "measured":
            said.append(number(row["cycles_mean"]))
        if row[_CLAIMED[0]] >= 0:
            ends = dict.fromkeys(number(row[column]) for column in _CLAIMED)
            said.append(f"claimed {' to '.join(ends)}")
        parts.append(f"{name}: {', '.join(said)}")
    return f"Waterfall of savings in cycles per iteration. {finding}. {'; '.join(parts)}."


def _loops(rows: pd.DataFrame) -> str:
    return "one loop" if len(rows) == 1 else f"{len(rows)} loops"


def _legend_of_waterfall(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=BLUE, label="simulated"),
        Patch(color=SKY, label="simulated, with a price that rests on the patch's own claim"),
        Line2D([], [], color=ORANGE, marker="D", linewidth=2.5, label="claimed (published)"),
        Patch(color=BLACK, label="measured (published)"),
        Patch(
            facecolor="white",
            edgecolor=VERMILLION,
            hatch="////",
            label="not explained: measured minus simulated",
        ),
    ]
    legend(figure, 3, handles=handles)


def _legend_of_loops(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    def mark(color: str, marker: str, label: str) -> Line2D:
        return Line2D([], [], color=color, marker=marker, linestyle="", label=label)

    handles = [
        Line2D([], [], color=SKY, linewidth=6, label="simulated, 5 to 95 % of the price draws"),
        mark(BLUE, "o", "simulated, median"),
        Line2D([], [], color=ORANGE, linewidth=3, label="sum of the claims (published)"),
        mark(BLACK, "P", "measured, inside"),
        mark(VERMILLION, "x", "measured, outside"),
    ]
    legend(figure, 3, handles=handles)
