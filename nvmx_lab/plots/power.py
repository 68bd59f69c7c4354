"""The figure of what can be measured: the smallest saving that so many runs show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    Plot,
    blank,
    entitle,
    legend,
    listed,
    number,
    require,
    thousands,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_COLUMNS: Final = (
    *("condition", "run_to_run_percent", "design", "correlation", "runs", "detectable_cycles"),
    *("loop_cycles", "saving_cycles", "power", "runs_needed"),
)
# Line style and hatch tell the conditions apart without their colour.
_STYLES: Final = (
    (BLUE, "-", ""),
    (VERMILLION, "--", "////"),
    (GREEN, "-.", "...."),
    (ORANGE, ":", "xxxx"),
)


def detectable(frame: pd.DataFrame) -> Plot:
    """Draw the smallest saving that a number of runs per kernel shows.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.power.curves` makes: condition, run_to_run_percent, design ("unpaired",
        "paired"), correlation, runs, detectable_cycles, loop_cycles, saving_cycles, power,
        runs_needed.

    Returns
    -------
    Plot
        Unpaired designs as lines, paired ones as bands from the lowest to the highest correlation.

    Raises
    ------
    LabError
        If a column is missing or there is no row.
    """
    from matplotlib.ticker import FuncFormatter

    require(frame, _COLUMNS, "detectable")
    figure, (axes,) = blank(4.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    of_condition = dict(list(frame.groupby("condition", sort=False)))
    for (condition, rows), style in zip(of_condition.items(), _STYLES, strict=False):
        _draw(axes, str(condition), rows, style)
    saving = float(frame["saving_cycles"].iloc[0])
    axes.axhline(saving, color=BLACK, linewidth=1.2)
    axes.annotate(
        f"{_cycles(saving)} cycles",
        (float(frame["runs"].max()), saving),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
    )
    thousands(axes.xaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _cycles(value)))
    axes.grid(which="minor", visible=False)
    probability = float(frame["power"].iloc[0])
    axes.set_xlabel("boots per kernel, one run each")
    axes.set_ylabel(f"smallest saving seen with\nprobability {probability:g}, TSC cycles")
    legend(figure, 2)
    loop = _cycles(float(frame["loop_cycles"].iloc[0]))
    enough = {
        str(name): number(rows.loc[rows["design"] == "unpaired", "runs_needed"].iloc[0])
        for name, rows in of_condition.items()
    }
    finding = f"Seeing {_cycles(saving)} of {loop} cycles takes " + listed(
        f"{runs} boots per kernel {name}" if name == next(iter(enough)) else f"{runs} {name}"
        for name, runs in enough.items()
    )
    entitle(figure, finding)
    alt = (
        f"Falling lines on logarithmic axes: the smallest saving that a number of boots per kernel "
        f"shows with probability {probability:g}. {finding}."
    )
    for name, rows in of_condition.items():
        unpaired = rows[rows["design"] == "unpaired"]
        ends = unpaired[unpaired["runs"].isin((unpaired["runs"].min(), unpaired["runs"].max()))]
        said = (
            f"{_cycles(row['detectable_cycles'])} cycles with {number(row['runs'])} boots"
            for _, row in ends.iterrows()
        )
        alt += f" {str(name).capitalize()}, not paired: {listed(said)}."
    return Plot(figure, alt)


def _draw(axes: Axes, condition: str, rows: pd.DataFrame, style: tuple[str, str, str]) -> None:
    colour, line, hatch = style
    percent = float(rows["run_to_run_percent"].iloc[0])
    label = f"{condition} ({percent:g} % run to run)"
    unpaired = rows[rows["design"] == "unpaired"]
    axes.plot(
        unpaired["runs"],
        unpaired["detectable_cycles"],
        color=colour,
        linestyle=line,
        linewidth=2,
        label=f"{label}, not paired",
    )
    paired = rows[rows["design"] == "paired"]
    if paired.empty:
        return
    low, high = paired["correlation"].min(), paired["correlation"].max()
    most, least = (paired[paired["correlation"] == end] for end in (low, high))
    axes.fill_between(
        most["runs"].to_numpy(),
        least["detectable_cycles"].to_numpy(),
        most["detectable_cycles"].to_numpy(),
        facecolor=colour,
        edgecolor=GREY,
        hatch=hatch,
        alpha=0.25,
        linewidth=0,
        label=f"{condition}, paired: correlation {low:g} to {high:g} (assumed)",
    )


def _cycles(value: float) -> str:
    """Say cycles, with digits after the point where there are few."""
    return number(value) if value >= 10 else f"{value:.2g}"
