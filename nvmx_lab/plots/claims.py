"""Figures of calibration: prices before and after, and every claim beside its prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
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
    span,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Fit -> colour, marker, and what it is called.
_FITS: Final = {
    "prior": (GREY, "s", "before any claim"),
    "blind": (BLUE, "o", "without the patch's claim"),
    "with-claim": (ORANGE, "D", "with it"),
    "one-constant": (VERMILLION, "v", "with one constant per VMREAD"),
}
_ROLES: Final = {
    "target": "the patch",
    "fit": "fitted",
    "check": "held out",
    "hold-out": "held out",
}
_STEP = 0.22


def prices(frame: pd.DataFrame) -> Plot:
    """Draw each price before and after each fit.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.how_sure.calibrated_prices` makes: fit, parameter, cycles_p05,
        cycles_p50, cycles_p95.

    Returns
    -------
    Plot
        One row per price, one interval per fit, on a logarithmic axis.

    Raises
    ------
    LabError
        If a column is missing or there is no row.
    """
    columns = ("fit", "parameter", "cycles_p05", "cycles_p50", "cycles_p95")
    require(frame, columns, "prices")
    names = list(dict.fromkeys(frame["parameter"]))
    figure, (axes,) = blank(1.6 + 0.62 * len(names))
    fits = [fit for fit in _FITS if fit in set(frame["fit"])]
    for _, row in frame.iterrows():
        place = names.index(row["parameter"]) + _STEP * (fits.index(row["fit"]) - 1.5)
        _interval(axes, place, row["cycles_p05"], row["cycles_p50"], row["cycles_p95"], row["fit"])
    _rows(axes, names)
    axes.set_xscale("log")
    axes.set_xlabel("price, TSC cycles; cpi: TSC cycles per instruction (median, 90 % interval)")
    _explain(figure, axes, fits)
    of_next = frame[frame["parameter"] == "vmread_next"].set_index("fit")["cycles_p50"]
    said = [f"{of_next[fit]:.1f} {_FITS[fit][2]}" for fit in fits if fit in of_next.index]
    entitle(figure, f"A VMREAD right behind another, in cycles: {', '.join(said)}")
    lines = [
        f"{row['parameter']}, {_FITS[row['fit']][2]}: {row['cycles_p50']:.3g} "
        f"({row['cycles_p05']:.3g} to {row['cycles_p95']:.3g})"
        for _, row in frame.iterrows()
    ]
    return Plot(figure, "Prices with 90 % intervals, by fit. " + "; ".join(lines) + ".")


def against_claims(frame: pd.DataFrame) -> Plot:
    """Draw what each fit predicts for each claim, as a multiple of what the claim states.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.how_sure.against_claims` makes; claims without a prediction are left out.

    Returns
    -------
    Plot
        One row per claim: the patch, fitted claims, held-out claims. Filled marks: inside.

    Raises
    ------
    LabError
        If a column is missing, or no claim has a prediction.
    """
    columns = (
        *("fit", "claim", "description", "role", "used", "stated_cycles", "sd_cycles"),
        *("cycles_p05", "cycles_p50", "cycles_p95", "verdict"),
    )
    require(frame, columns, "against_claims")
    shown = frame[frame["verdict"] != "no prediction"]
    require(shown, columns, "against_claims")
    order = {"target": 0, "fit": 1, "check": 2, "hold-out": 2}
    one = shown.drop_duplicates("claim")
    one = one.assign(order=one["role"].map(order)).sort_values(["order", "claim"], kind="stable")
    claims = list(one["claim"])
    figure, (axes,) = blank(1.7 + 0.5 * len(claims))
    fits = [fit for fit in _FITS if fit in set(shown["fit"])]
    axes.axvline(1, color=BLACK, linewidth=1)
    for _, row in one.iterrows():
        if row["sd_cycles"] > 0:  # the claim's own error, as an interval of the same kind
            half = 1.645 * row["sd_cycles"] / row["stated_cycles"]
            axes.plot(
                [max(1 - half, 0.05), 1 + half],
                [claims.index(row["claim"])] * 2,
                color="#CFCFCF",
                linewidth=15,
                solid_capstyle="butt",
                zorder=1,
            )
    for _, row in shown.iterrows():
        place = claims.index(row["claim"]) + _STEP * (fits.index(row["fit"]) - 1)
        low, middle, high = (row[f"cycles_{q}"] / row["stated_cycles"] for q in _QUANTILES)
        filled = row["verdict"] != "outside"
        _interval(axes, place, low, middle, high, row["fit"], filled=filled)
    labels = [
        f"{row['claim']}  {row['description']}  ({row['stated_cycles']:,.5g})"
        for _, row in one.iterrows()
    ]
    _rows(axes, labels)
    for label, (_, row) in zip(axes.get_yticklabels(), one.iterrows(), strict=True):
        label.set_fontsize(8.5)
        label.set_fontweight("bold" if row["role"] == "target" else "normal")
    _groups(axes, list(one["role"]))
    axes.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "predicted cycles as a multiple of the claim's (median, 90 % interval)\n"
        "grey: the claim's own error, assumed; open marks: outside"
    )
    _explain(figure, axes, fits)
    entitle(figure, _finding(shown, fits))
    lines = [
        f"claim {row['claim']} ({row['description']}), stated {number(row['stated_cycles'])}: "
        f"{_FITS[row['fit']][2]} {span(row, 'cycles')}, {row['verdict']}"
        for _, row in shown.iterrows()
    ]
    return Plot(figure, "Claims against predictions, TSC cycles. " + "; ".join(lines) + ".")


_QUANTILES: Final = ("p05", "p50", "p95")


def _finding(shown: pd.DataFrame, fits: list[str]) -> str:
    """Say how many of the claims that test a fit lie outside its prediction."""
    parts = []
    for fit in fits:
        unused = shown[(shown["fit"] == fit) & ~shown["used"] & (shown["verdict"] != "prior alone")]
        outside = int((unused["verdict"] == "outside").sum())
        parts.append(f"{outside} of {len(unused)} {_FITS[fit][2]}")
    return f"Claims held out that lie outside what the fit predicts: {listed(parts)}"


def _interval(
    axes: Axes,
    place: float,
    low: float,
    middle: float,
    high: float,
    fit: str,
    *,
    filled: bool = True,
) -> None:
    colour, marker, _ = _FITS[fit]
    axes.plot([low, high], [place, place], color=colour, linewidth=1.8, zorder=2)
    face = colour if filled else "white"
    axes.plot(middle, place, marker, color=colour, markerfacecolor=face, markersize=5.5, zorder=3)


def _rows(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    for place in range(0, len(labels), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#F7F7F7", zorder=0, linewidth=0)


def _groups(axes: Axes, roles: list[str]) -> None:
    """Separate the roles, and name each at the right."""
    names = [_ROLES[role] for role in roles]
    for start in [0, *(i for i in range(1, len(names)) if names[i] != names[i - 1])]:
        if start:
            axes.axhline(start - 0.5, color=GREY, linewidth=0.8)
        axes.annotate(
            names[start],
            (1, start),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=GREY,
        )


def _explain(figure: object, axes: Axes, fits: list[str]) -> None:
    """Put a legend of the fits below the figure."""
    handles = [
        axes.plot([np.nan], [np.nan], marker, color=colour, label=name)[0]
        for colour, marker, name in (_FITS[fit] for fit in fits)
    ]
    legend(figure, len(fits), handles=handles)  # type: ignore[arg-type]
