"""Figures of sensitivity: what each uncertain input does to the saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    SKY,
    Plot,
    blank,
    entitle,
    legend,
    listed,
    number,
    require,
    share,
    thousands,
    whole_cycles,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WHICH: Final = ("mix", "kvm_before", "kvm_after", "cpu")
_ENDS: Final = tuple(f"saving_at_{q}_cycles" for q in ("p05", "p50", "p95"))
_INDICES: Final = tuple(f"{i}{end}" for i in ("first", "total") for end in ("", "_low", "_high"))
_SHARE: Final = "share of exits"
_INDEX_NAMES: Final = {
    "first": "alone: gone if it were known",
    "total": "with the others: left if all others were known",
}
_LISTED = 4


def tornado(frame: pd.DataFrame) -> Plot:
    """Draw the saving with each input at its ends, the others at their medians.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.sensitivity.tornado` makes, of one comparison: label, basis, unit, p05,
        p95, saving_at_p05_cycles, saving_at_p50_cycles, saving_at_p95_cycles, swing_cycles, mix,
        kvm_before, kvm_after, cpu.

    Returns
    -------
    Plot
        The widest on top.

    Raises
    ------
    LabError
        If a column is missing, there is no row, or there are several comparisons.
    """
    columns = ("label", "basis", "unit", "p05", "p95", "swing_cycles", *_ENDS, *_WHICH)
    require(frame, columns, "tornado")
    _one_comparison(frame)
    ordered = frame.sort_values("swing_cycles", ascending=False, kind="stable")
    figure, (axes,) = blank(1.9 + 0.42 * len(ordered))
    middle = float(ordered[_ENDS[1]].iloc[0])
    for place, (_, row) in enumerate(ordered.iterrows()):
        for end, colour in ((0, SKY), (2, ORANGE)):
            saving = row[_ENDS[end]]
            axes.barh(place, saving - middle, left=middle, height=0.62, color=colour)
            leftwards = saving < middle or (saving == middle and end == 0)
            axes.annotate(
                _value(row, "p05" if end == 0 else "p95"),
                (saving, place),
                xytext=(-4 if leftwards else 4, 0),
                textcoords="offset points",
                ha="right" if leftwards else "left",
                va="center",
                fontsize=8,
                color="#444444",
            )
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.axvline(middle, color=GREY, linewidth=1, linestyle="--")
    _names(axes, ordered)
    axes.margins(x=0.12)
    thousands(axes.xaxis)
    whole_cycles(axes.xaxis)
    axes.set_xlabel(
        "round-trip saving per nested exit, TSC cycles; at the bars, the input at that end"
    )
    _legend_of_ends(figure, middle)
    widest = ordered.iloc[0]
    finding = (
        f"Widest, from {number(widest[_ENDS[0]])} to {number(widest[_ENDS[2]])} cycles of saving: "
        f"{widest['label']}"
    )
    turning = _turning(ordered)
    if turning:
        verb = "turns" if len(turning) == 1 else "turn"
        finding += f"; {listed(turning)} alone {verb} it into a loss or back"
    else:
        finding += "; no input alone changes its sign"
    entitle(figure, finding)
    said = [
        f"{row['label']} ({row['basis']}) from {_value(row, 'p05')} to {_value(row, 'p95')}: "
        f"{number(row[_ENDS[0]])} to {number(row[_ENDS[2]])} cycles."
        for _, row in ordered.head(_LISTED).iterrows()
    ]
    alt = (
        f"Bars of what each of {_inputs(len(ordered))} does to the saving of {_what(widest)}, "
        f"{number(middle)} cycles with all at their medians. {finding}. {' '.join(said)}"
    )
    return Plot(figure, alt)


def sobol(frame: pd.DataFrame) -> Plot:
    """Draw the Sobol indices of the saving.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.sensitivity.sensitivity` makes, of one comparison: label, basis, first,
        first_low, first_high, total, total_low, total_high, mix, kvm_before, kvm_after, cpu.

    Returns
    -------
    Plot
        The largest total index on top.

    Raises
    ------
    LabError
        If a column is missing, there is no row, or there are several comparisons.
    """
    require(frame, ("label", "basis", *_INDICES, *_WHICH), "sobol")
    _one_comparison(frame)
    ordered = frame.sort_values("total", ascending=False, kind="stable")
    figure, (axes,) = blank(1.9 + 0.5 * len(ordered))
    for place, (_, row) in enumerate(ordered.iterrows()):
        for k, (index, colour) in enumerate((("first", BLUE), ("total", SKY))):
            low, high = row[f"{index}_low"], row[f"{index}_high"]
            axes.barh(
                place + (k - 0.5) * 0.36,
                100 * row[index],
                height=0.34,
                color=colour,
                xerr=[[100 * (row[index] - low)], [100 * (high - row[index])]],
                error_kw={"ecolor": "#444444", "elinewidth": 0.9, "capsize": 2},
                label=_INDEX_NAMES[index] if place == 0 else None,
            )
    _names(axes, ordered)
    axes.set_xlim(0, max(105.0, 100 * float(ordered["total_high"].max())))
    axes.set_xlabel("share of the variance of the round-trip saving, % (90 % confidence)")
    legend(figure, 2)
    largest = ordered.iloc[0]
    finding = (
        f"{share(max(0.0, float(largest['first'])))} of the variance of the saving comes from one "
        f"input alone: {largest['label']}"
    )
    entitle(figure, finding)
    said = [
        f"{row['label']} ({row['basis']}): alone {share(max(0.0, float(row['first'])))}, with all "
        f"others {share(max(0.0, float(row['total'])))}."
        for _, row in ordered.head(_LISTED).iterrows()
    ]
    alt = (
        f"Bars of the Sobol indices of {_inputs(len(ordered))} of the saving of {_what(largest)}. "
        f"{finding}. {' '.join(said)}"
    )
    return Plot(figure, alt)


def _one_comparison(frame: pd.DataFrame) -> None:
    found = frame[list(_WHICH)].drop_duplicates()
    if len(found) > 1:
        raise LabError(
            "several comparisons", where="frame", got=len(found), mend="draw one at a time"
        )


def _names(axes: Axes, ordered: pd.DataFrame) -> None:
    names = [f"{row['label']} ({row['basis']})" for _, row in ordered.iterrows()]
    axes.set_yticks(range(len(ordered)), names)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def _legend_of_ends(figure: Figure, middle: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(color=SKY, label="input at its 5 %"),
        Patch(color=ORANGE, label="input at its 95 %"),
        Line2D([], [], color=GREY, linestyle="--", label=f"all at their medians: {number(middle)}"),
    ]
    legend(figure, 3, handles=handles)


def _turning(ordered: pd.DataFrame) -> list[str]:
    """Return the inputs that alone take the saving to the other side of zero."""
    low, high = ordered[[_ENDS[0], _ENDS[2]]].min(axis=1), ordered[[_ENDS[0], _ENDS[2]]].max(axis=1)
    return list(ordered.loc[(low < 0) & (high > 0), "label"])


def _value(row: pd.Series, quantile: str) -> str:
    value = float(row[quantile])
    return share(value) if row["unit"] == _SHARE else f"{value:,.3g}"


def _what(row: pd.Series) -> str:
    return f"KVM {row['kvm_after']} over {row['kvm_before']} on {row['mix']} by {row['cpu']}"


def _inputs(count: int) -> str:
    return "one input" if count == 1 else f"{count} inputs"
