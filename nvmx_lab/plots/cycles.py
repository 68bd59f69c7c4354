"""Figures of whole round trips: step by step, and against published totals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
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
    span,
    thousands,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

HIGHLIGHTED: Final = ("rare fields", "switch of VMCS")
"""The steps that a lazy sync changes: fewer reads of the first for more of the second."""

_SMALLEST_CYCLES = 10.0
_COLUMNS = ("kvm", "sync", "leg", "step", "cycles_p05", "cycles_p50", "cycles_p95")


def breakdown(frame: pd.DataFrame) -> Plot:
    """Draw the steps of a round trip, before against after.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.breakdown.breakdown` makes: one row per L0, leg and step, the legs in
        order; kvm, sync, leg, step, cycles_p05, cycles_p50, cycles_p95.

    Returns
    -------
    Plot
        Steps that are below 10 cycles under either L0 are left out, and the figure says how many.

    Raises
    ------
    LabError
        If a column is missing, or the frame is not of two L0s.
    """
    require(frame, _COLUMNS, "breakdown")
    names = [f"KVM {kvm} ({sync})" for kvm, sync in frame[["kvm", "sync"]].drop_duplicates().values]
    if len(names) != 2:
        raise LabError(
            "a breakdown shows two L0s", where="kvm and sync", got=len(names), allowed="2"
        )
    of_side = [f"KVM {kvm} ({sync})" for kvm, sync in zip(frame["kvm"], frame["sync"], strict=True)]
    # One line per step, both L0s beside each other; a step that one lacks is zero there.
    steps = (
        frame.assign(side=of_side)
        .pivot(index=["leg", "step"], columns="side", values=list(_COLUMNS[4:]))
        .fillna(0.0)
    )
    middles = steps["cycles_p50"]
    tallest = middles[names[0]].combine(middles[names[1]], max)
    drawn = middles[tallest >= _SMALLEST_CYCLES]
    left_out = len(middles) - len(drawn)
    figure, (axes,) = blank(1.7 + 0.36 * len(drawn) + 0.42 * drawn.index.unique("leg").size)
    ticks: list[tuple[float, str, bool]] = []
    place = 0.0
    for leg in frame["leg"].unique():
        if leg not in drawn.index.unique("leg"):
            continue
        axes.text(
            0,
            place,
            f" {leg}",
            fontweight="bold",
            va="center",
            ha="left",
            transform=axes.get_yaxis_transform(),
        )
        place += 0.8
        of_leg = tallest[drawn.index].loc[leg].sort_values(ascending=False, kind="stable")
        for step in of_leg.index:
            special = step in HIGHLIGHTED
            for k, name in enumerate(names):
                middle = steps.loc[(leg, step), ("cycles_p50", name)]
                low = steps.loc[(leg, step), ("cycles_p05", name)]
                high = steps.loc[(leg, step), ("cycles_p95", name)]
                axes.barh(
                    place + (k - 0.5) * 0.36,
                    middle,
                    height=0.34,
                    color=((SKY, BLUE), (ORANGE, VERMILLION))[special][k],
                    xerr=[[middle - low], [high - middle]],
                    error_kw={"ecolor": "#444444", "elinewidth": 0.9, "capsize": 0},
                )
            ticks.append((place, step, special))
            place += 1
        place += 0.25
    axes.set_yticks([at for at, _, _ in ticks], [step for _, step, _ in ticks])
    for label, (_, _, special) in zip(axes.get_yticklabels(), ticks, strict=True):
        if special:
            label.set_color("#A64800")
            label.set_fontweight("bold")
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xlim(left=0)
    thousands(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    few = "one step" if left_out == 1 else f"{left_out} steps"
    note = f"; {few} below {_SMALLEST_CYCLES:.0f} cycles not drawn" if left_out else ""
    axes.set_xlabel(f"TSC cycles per nested exit (median, 5 to 95 % of the price draws{note})")
    _legend_of_steps(figure, names)
    finding = _finding_of_steps(frame, names, of_side)
    entitle(figure, finding)
    largest = steps.loc[tallest.nlargest(3).index]
    alt = (
        f"Bars of the cycles of each step of a round trip under {listed(names)}. {finding}. "
        f"Largest: {listed(_said_step(steps, leg, step, names) for leg, step in largest.index)}."
    )
    for leg, step in steps.index:
        if step in HIGHLIGHTED and (leg, step) not in largest.index and (leg, step) in drawn.index:
            alt += f" {_said_step(steps, leg, step, names)}."
    return Plot(figure, alt)


def published_totals(frame: pd.DataFrame) -> Plot:
    """Draw simulated totals of loops against the published ones.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.published.against_published` makes; only the rows that are totals
        (``what`` is "before" or "after") are drawn: mix, what, kvm, cycles_p05, cycles_p50,
        cycles_p95, published_cycles, inside.

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        If a column is missing or there is no total.
    """
    columns = ("mix", "what", "kvm", "published_cycles", "inside", *_COLUMNS[4:])
    require(frame, columns, "published_totals")
    totals = frame[frame["what"] != "saving"].reset_index(drop=True)
    require(totals, columns, "published_totals")
    figure, (axes,) = blank(1.6 + 0.3 * len(totals) + 0.1 * totals["mix"].nunique())
    places = []
    place, last = 0.0, None
    for _, row in totals.iterrows():
        place += 0.35 if last not in (None, row["mix"]) else 0
        last = row["mix"]
        after = row["what"] == "after"
        axes.plot(
            [row["cycles_p05"], row["cycles_p95"]],
            [place, place],
            linewidth=5,
            alpha=0.55,
            color=BLUE if after else SKY,
            solid_capstyle="butt",
        )
        axes.plot(
            [row["cycles_p50"]],
            [place],
            "s" if after else "o",
            color=BLUE if after else SKY,
            markeredgecolor="white",
        )
        axes.plot(
            [row["published_cycles"]],
            [place],
            "x" if not row["inside"] else "P",
            markersize=9,
            color=VERMILLION if not row["inside"] else BLACK,
            markeredgewidth=2 - bool(row["inside"]),
        )
        places.append(place)
        place += 1
    axes.set_yticks(places, [f"{row['mix']}, KVM {row['kvm']}" for _, row in totals.iterrows()])
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xlim(left=0)
    thousands(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("TSC cycles per iteration of the loop (simulated: median, 5 to 95 %)")
    _legend_of_totals(figure)
    inside, whole = int(totals["inside"].sum()), len(totals)
    count = f"All {whole}" if inside == whole else f"{inside} of {whole}"
    finding = f"{count} published totals lie inside the simulated 90 % interval"
    if inside == 0:
        finding = f"None of the {whole} published totals lies inside the simulated 90 % interval"
    entitle(figure, finding)
    said = [
        f"{row['mix']} under KVM {row['kvm']}: simulated {span(row, 'cycles')}, published "
        f"{number(row['published_cycles'])}"
        for _, row in (totals if whole <= 4 else totals[~totals["inside"].astype(bool)]).iterrows()
    ]
    alt = (
        f"Intervals of simulated cycles per iteration with published totals as crosses. {finding}."
    )
    if said:
        head = "" if whole <= 4 else " Outside:"
        alt += f"{head} {'; '.join(said)}."
    return Plot(figure, alt)


def _finding_of_steps(frame: pd.DataFrame, names: list[str], of_side: list[str]) -> str:
    """Say what the highlighted steps cost under either L0."""
    # The only sums here: of medians, for a title that says "about".
    special = frame.assign(side=of_side)[frame["step"].isin(HIGHLIGHTED).array]
    sums = [special[special["side"] == name].groupby("step")["cycles_p50"].sum() for name in names]
    parts = []
    for step in HIGHLIGHTED:
        before, after = (
            number(float(total.reindex([step], fill_value=0.0).iloc[0])) for total in sums
        )
        parts.append(f"{step} about {before} cycles before, {after} after")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}"


def _said_step(steps: pd.DataFrame, leg: str, step: str, names: list[str]) -> str:
    middles = steps["cycles_p50"]
    values = [number(float(middles[name][leg, step])) for name in names]
    return f"{step} ({leg}) {values[0]} before and {values[1]} after"


def _legend_of_steps(figure: Figure, names: list[str]) -> None:
    from matplotlib.patches import Patch

    pairs = [
        (name, colours)
        for name, colours in zip(names, ((SKY, ORANGE), (BLUE, VERMILLION)), strict=True)
    ]
    handles = [
        Patch(color=colour, label=f"{name}{what}")
        for name, colours in pairs
        for colour, what in zip(colours, ("", ": steps that the sync changes"), strict=True)
    ]
    legend(figure, 2, handles=handles)


def _legend_of_totals(figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=SKY, marker="o", linewidth=5, alpha=0.8, label="simulated, before"),
        Line2D([], [], color=BLUE, marker="s", linewidth=5, alpha=0.8, label="simulated, after"),
        Line2D([], [], color=BLACK, marker="P", linestyle="", label="published, inside"),
        Line2D([], [], color=VERMILLION, marker="x", linestyle="", label="published, outside"),
    ]
    legend(figure, 4, handles=handles)
