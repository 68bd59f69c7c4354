"""Figures of savings: one mix, all mixes, and how they depend on pulls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    SKY,
    VERDICTS,
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
    from matplotlib.figure import Figure

_LEGS: Final = ("exit_leg", "round_trip")
_LEG_NAMES: Final = {"exit_leg": "exit leg", "round_trip": "round trip"}
_QUANTILES: Final = ("p05", "p50", "p95")
_SAVINGS: Final = tuple(f"{leg}_saving_cycles_{q}" for leg in _LEGS for q in _QUANTILES)
# Verdict -> what several mixes do, and what one does.
_SAID: Final = {
    "saves": ("save", "saves"),
    "costs": ("lose", "loses"),
    "unclear": ("are unclear", "is unclear"),
    "no difference": ("show no difference", "shows no difference"),
}
_LISTED_IN_FULL = 6
_LETTER: Final = 1.0  # width of a small letter, in per cent of the axis from 0 to 100


def saving_intervals(frame: pd.DataFrame) -> Plot:
    """Draw what each mix saves, on the exit leg and on the round trip.

    Parameters
    ----------
    frame : DataFrame
        One row per mix, as `nvmx_lab.study.sweep.sweep` makes: mix, pulls_share, verdict,
        exit_leg_saving_cycles_p05 ... round_trip_saving_cycles_p95, kvm_before, kvm_after.

    Returns
    -------
    Plot
        Mixes from the largest saving on the round trip to the largest loss.

    Raises
    ------
    LabError
        If a column is missing, there is no row, or a mix has several.
    """
    require(frame, ("mix", "pulls_share", "verdict", *_SAVINGS), "saving_intervals")
    _one_row_per_mix(frame)
    ordered = frame.sort_values(
        ["round_trip_saving_cycles_p50", "mix"], ascending=[False, True], kind="stable"
    ).reset_index(drop=True)
    figure, (axes,) = blank(1.9 + 0.235 * len(ordered))
    axes.axvline(0, color=BLACK, linewidth=1)
    for place, (_, row) in enumerate(ordered.iterrows()):
        # The two legs side by side within the row: where nothing is pulled they are the same.
        _interval(
            axes,
            row,
            "exit_leg_saving_cycles",
            place - 0.2,
            color=SKY,
            marker="|",
            width=1.5,
        )
        colour, marker = VERDICTS[row["verdict"]]
        _interval(axes, row, "round_trip_saving_cycles", place + 0.15, color=colour, marker=marker)
    thousands(axes.xaxis)
    whole_cycles(axes.xaxis)
    rows = range(len(ordered))
    axes.set_yticks(rows, ordered["mix"])
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    for place in rows[::2]:
        axes.axhspan(place - 0.5, place + 0.5, color="#F5F5F5", zorder=0, linewidth=0)
    axes.set_xlabel("saving per nested exit, TSC cycles (median, 5 to 95 % of the price draws)")
    pulls = axes.twinx()
    pulls.set_ylim(axes.get_ylim())
    pulls.set_yticks(rows, [share(value) for value in ordered["pulls_share"]])
    pulls.tick_params(axis="y", length=0)
    pulls.grid(visible=False)
    for side in ("left", "right", "top", "bottom"):
        pulls.spines[side].set_visible(False)
    axes.annotate(
        "exits\nthat pull",
        (1, 1),
        xycoords="axes fraction",
        xytext=(5, 4),
        textcoords="offset points",
        va="bottom",
        fontsize=9,
    )
    _legend_of_savings(figure, set(ordered["verdict"]))
    finding = _tally(ordered)
    if len(ordered) > 1:
        finding += f": from {_extremes(ordered)} cycles per exit"
    entitle(figure, finding)
    return Plot(figure, _alt_of_savings(ordered))


def comparison(frame: pd.DataFrame) -> Plot:
    """Draw the two L0s of one mix: what an exit costs before and after, and the saving.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.study.compare.Comparison.to_frame` makes: a row per L0 and one whose ``kvm`` is
        "saving"; kvm, sync, exit_leg_cycles_p05 ... round_trip_cycles_p95.

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        If a column is missing, or there are not two L0s and their saving.
    """
    needed = [f"{leg}_cycles_{q}" for leg in _LEGS for q in _QUANTILES]
    require(frame, ("kvm", "sync", *needed), "comparison")
    saving = frame[frame["kvm"] == "saving"]
    sides = frame[frame["kvm"] != "saving"].reset_index(drop=True)
    if len(sides) != 2 or len(saving) != 1:
        raise LabError(
            "a comparison is of two L0s",
            where="kvm",
            got=", ".join(map(str, frame["kvm"])),
            allowed="two L0s and their saving",
        )
    names = [f"KVM {row['kvm']} ({row['sync']})" for _, row in sides.iterrows()]
    figure, (total, difference) = blank(3.6, 2, width_ratios=[3, 2], sharey=True)
    colours = ((SKY, "o"), (BLUE, "s"))
    for leg_place, leg in enumerate(_LEGS):
        for k, (_, row) in enumerate(sides.iterrows()):
            colour, marker = colours[k]
            _interval(
                total,
                row,
                f"{leg}_cycles",
                leg_place + (k - 0.5) * 0.34,
                color=colour,
                marker=marker,
                width=5,
                label=names[k] if leg_place == 0 else None,
            )
            total.annotate(
                number(row[f"{leg}_cycles_p50"]),
                (row[f"{leg}_cycles_p50"], leg_place + (k - 0.5) * 0.34),
                xytext=(0, -7 if k else 6),
                textcoords="offset points",
                ha="center",
                va="top" if k else "bottom",
                fontsize=9,
            )
        row = saving.iloc[0]
        colour = VERMILLION if row[f"{leg}_cycles_p50"] < 0 else GREEN
        _interval(difference, row, f"{leg}_cycles", leg_place, color=colour, marker="D", width=5)
        difference.annotate(
            number(row[f"{leg}_cycles_p50"]),
            (row[f"{leg}_cycles_p50"], leg_place),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # the line of zero
        )
    total.set_yticks(range(len(_LEGS)), [_LEG_NAMES[leg] for leg in _LEGS])
    total.set_ylim(len(_LEGS) - 0.4, -0.6)
    total.set_xlim(left=0)
    thousands(total.xaxis)
    thousands(difference.xaxis)
    whole_cycles(difference.xaxis, ticks=4)
    total.set_xlabel("TSC cycles per nested exit")
    total.set_title("Cost: its uncertainty is mostly common to both", fontsize=10, loc="left")
    difference.axvline(0, color=BLACK, linewidth=1)
    difference.set_xlabel("TSC cycles per nested exit")
    difference.set_title("Saving: first minus second, paired", fontsize=10, loc="left")
    for axes in (total, difference):
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    legend(figure, 2)
    row = saving.iloc[0]
    leg, trip = (_gained(row[f"{name}_cycles_p50"]) for name in _LEGS)
    parts = f"{leg} on the exit leg, {trip} on the round trip"
    if leg == trip:
        parts = f"{leg}, on the exit leg as on the round trip"
    finding = f"KVM {sides['kvm'][1]} against {sides['kvm'][0]}: {parts}"
    entitle(figure, finding)
    said = [
        f"{name}: exit leg {span(side, 'exit_leg_cycles')} cycles, "
        f"round trip {span(side, 'round_trip_cycles')} cycles."
        for name, (_, side) in zip(names, sides.iterrows(), strict=True)
    ]
    alt = " ".join(
        [
            f"Intervals of what a nested exit costs under two L0s, and of the saving. {finding}.",
            *said,
            f"Saving: exit leg {span(row, 'exit_leg_cycles')} cycles, "
            f"round trip {span(row, 'round_trip_cycles')} cycles.",
        ]
    )
    return Plot(figure, alt)


def pull_rate(frame: pd.DataFrame) -> Plot:
    """Draw the saving on the round trip against the share of exits that pull, a mark per mix.

    Parameters
    ----------
    frame : DataFrame
        As `saving_intervals` takes, and break_even_pull_rate_p50 (missing where nothing is ever
        pulled).

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        As `saving_intervals`.
    """
    columns = ("mix", "pulls_share", "verdict", "break_even_pull_rate_p50", *_SAVINGS)
    require(frame, columns, "pull_rate")
    _one_row_per_mix(frame)
    figure, (axes,) = blank(5.6)
    axes.axhline(0, color=BLACK, linewidth=1)
    even = frame["break_even_pull_rate_p50"].dropna().astype(float)
    if len(even):
        axes.axvspan(100 * even.min(), 100 * even.max(), color=GREEN, linewidth=2, zorder=1)
        axes.annotate(
            f" break-even: {_range(even.min(), even.max())} of the exits",
            (100 * even.max(), 0.02),
            xycoords=("data", "axes fraction"),
            color="#00664B",
        )
    for verdict, (colour, marker) in VERDICTS.items():
        some = frame[frame["verdict"] == verdict]
        if some.empty:
            continue
        middle = some["round_trip_saving_cycles_p50"]
        low = middle - some["round_trip_saving_cycles_p05"]
        high = some["round_trip_saving_cycles_p95"] - middle
        axes.errorbar(
            100 * some["pulls_share"],
            middle,
            yerr=[low, high],
            fmt="none",
            ecolor=colour,
            elinewidth=1,
            alpha=0.35,
            zorder=2,
        )
        axes.plot(
            100 * some["pulls_share"],
            middle,
            marker,
            color=colour,
            markersize=7,
            markeredgecolor="white",
            label=f"{verdict} ({len(some)})",
            zorder=3,
        )
    axes.set_xlim(-3, 103)
    thousands(axes.yaxis)
    whole_cycles(axes.yaxis)
    axes.set_xlabel("nested exits after which L0 pulls the rare fields, %")
    axes.set_ylabel("round-trip saving per nested exit,\nTSC cycles (5 to 95 %)")
    axes.legend(title="verdict (mixes)", loc="upper right", bbox_to_anchor=(1, 0.99), frameon=False)
    label_between(axes, frame, float(even.max()) if len(even) else None)
    finding = _finding_of_pulls(frame)
    entitle(figure, finding)
    most, least = _ends(frame, "pulls_share")
    alt = (
        f"Scatter plot of {_mixes(len(frame))}: saving on the round trip against the share of "
        f"exits that pull. {finding}. {most['mix']} pulls after {share(most['pulls_share'])} of "
        f"its exits and saves {span(most, 'round_trip_saving_cycles')} cycles; "
        f"{least['mix']} pulls after "
        f"{share(least['pulls_share'])} and saves {span(least, 'round_trip_saving_cycles')}."
    )
    if len(even):
        alt += f" The break-even rate is {_range(even.min(), even.max())}."
    return Plot(figure, alt)


def _interval(
    axes: Axes,
    row: pd.Series,
    name: str,
    place: float,
    *,
    color: str,
    marker: str,
    width: float = 3,
    label: str | None = None,
) -> None:
    """Draw one interval as a line, its median as a mark."""
    low, middle, high = (float(row[f"{name}_{q}"]) for q in _QUANTILES)
    axes.plot(
        [low, high],
        [place, place],
        color=color,
        linewidth=width,
        alpha=0.55,
        solid_capstyle="butt",
    )
    axes.plot(
        [middle],
        [place],
        marker,
        color=color,
        markersize=6,
        markeredgecolor=color if marker == "|" else "white",
        label=label,
    )


def _legend_of_savings(figure: Figure, verdicts: set[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=SKY, marker="|", linewidth=1.5, label="exit leg")]
    for verdict, (colour, marker) in VERDICTS.items():
        if verdict in verdicts:
            label = f"round trip: {verdict}"
            handles.append(Line2D([], [], color=colour, marker=marker, linewidth=3, label=label))
    legend(figure, len(handles), handles=handles)


def _one_row_per_mix(frame: pd.DataFrame) -> None:
    twice = sorted(set(frame["mix"][frame["mix"].duplicated()]))
    if twice:
        raise LabError(
            "a mix has several rows", where="mix", got=", ".join(twice), mend="draw one price list"
        )


def _tally(frame: pd.DataFrame) -> str:
    """Say how many mixes have each verdict on the round trip."""
    counts = frame["verdict"].value_counts()
    parts = [
        (int(counts[verdict]), said[int(counts[verdict] == 1)])
        for verdict, said in _SAID.items()
        if verdict in counts
    ]
    (count, said), *rest = parts
    if not rest:
        subject = "The mix" if len(frame) == 1 else f"All {len(frame)} mixes"
        return f"{subject} {said} on the round trip"
    head = f"{count} of {len(frame)} mixes {said} on the round trip"
    return f"{head}, {listed(f'{some} {verb}' for some, verb in rest)}"


def _extremes(frame: pd.DataFrame) -> str:
    middles = frame["round_trip_saving_cycles_p50"]
    return f"{number(middles.max())} to {number(middles.min())}"


def _alt_of_savings(ordered: pd.DataFrame) -> str:
    """Say all rows of a short list, and of a long one how many, the first and the last."""
    text = (
        f"Intervals of the saving per nested exit, {_mixes(len(ordered))}, "
        f"sorted by the round trip. {_tally(ordered)}."
    )
    shown = ordered if len(ordered) <= _LISTED_IN_FULL else ordered.iloc[[0, -1]]
    for _, row in shown.iterrows():
        text += (
            f" {row['mix']} ({row['verdict']}; pulls after {share(row['pulls_share'])} of the "
            f"exits): round trip {span(row, 'round_trip_saving_cycles')} cycles, "
            f"exit leg {span(row, 'exit_leg_saving_cycles')}."
        )
    if len(shown) < len(ordered):
        text += " These are the first and the last; a table has them all."
    return text


def _finding_of_pulls(frame: pd.DataFrame) -> str:
    """Say whether the mixes on either side of their break-even rate do as it predicts."""
    rate = frame["break_even_pull_rate_p50"].astype(float)
    saving = frame["round_trip_saving_cycles_p50"]
    below, above = frame["pulls_share"] < rate, frame["pulls_share"] > rate
    parts = []
    if below.any():
        kept = int((saving[below] > 0).sum())
        parts.append(f"{_of(kept, int(below.sum()), 'save')} below the break-even pull rate")
    if above.any():
        lost = int((saving[above] < 0).sum())
        parts.append(f"{_of(lost, int(above.sum()), 'lose')} above it")
    if not parts and frame["pulls_share"].any():
        return "A pull has no price here, so there is no break-even rate"
    if not parts:
        return "Nothing is ever pulled, so nothing is saved or lost"
    if not below.any():
        parts = [parts[0].replace("above it", "above the break-even pull rate")]
    text = listed(parts)
    return f"{text[0].upper()}{text[1:]} (medians)"


def _of(some: int, whole: int, verb: str) -> str:
    """Say how many of some mixes do what the verb says."""
    if whole == 1:
        return f"the one mix {verb}s" if some else f"the one mix does not {verb}"
    if some == whole:
        return f"{'both' if whole == 2 else f'all {whole}'} mixes {verb}"
    return f"{some} of {whole} mixes {verb}"


def label_between(axes: Axes, frame: pd.DataFrame, even: float | None) -> None:
    """Name the mixes that stand apart: those neither at the left edge nor at the right one.

    The axes span the figure, from 0 to 100 %; `frame` is as `pull_rate` takes.

    A name that would lie on another makes way, up on the left and down on the right: as the marks
    descend from left to right, no line to a mark then crosses another.
    """
    apart = frame[frame["pulls_share"].between(0.03, 0.985)].sort_values("pulls_share")
    left, right = apart[apart["pulls_share"] <= 0.7], apart[apart["pulls_share"] > 0.7]
    low, high = axes.get_ylim()
    line = (high - low) / 23
    taken: list[tuple[float, float, float]] = []  # left end, right end, height
    for _, row in [*left.iloc[::-1].iterrows(), *right.iterrows()]:
        x, y = 100 * row["pulls_share"], row["round_trip_saving_cycles_p50"]
        width = _LETTER * len(row["mix"])
        leftwards = row["pulls_share"] > 0.7  # there is room on that side
        start = x - 2 if leftwards else x + 2
        if even is not None and 100 * even - 20 < x < 100 * even:
            start = 100 * even + 2  # not across the line of the break-even rate
        ends = (start - width, start) if leftwards else (start, start + width)
        at = y
        while any(abs(at - h) < line and ends[0] < b and a < ends[1] for a, b, h in taken):
            at += -line if leftwards else line
        taken.append((*ends, at))
        axes.annotate(
            row["mix"],
            (x, y),
            xytext=(start, at),
            ha="right" if leftwards else "left",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 0.3},
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linewidth": 0.6,
                "shrinkA": 0,
                "shrinkB": 4,
                "relpos": (1 if leftwards else 0, 0.5),
            },
        )


def _ends(frame: pd.DataFrame, column: str) -> tuple[Any, Any]:
    ordered = frame.sort_values([column, "mix"])
    return ordered.iloc[-1], ordered.iloc[0]


def _range(low: float, high: float) -> str:
    a, b = f"{100 * low:.0f}", f"{100 * high:.0f}"
    return f"{a} %" if a == b else f"{a} to {b} %"


def _mixes(count: int) -> str:
    return "one mix" if count == 1 else f"{count} mixes"


def _gained(middle: float) -> str:
    """Say a saving or a loss of cycles."""
    text = number(abs(middle))
    if text == "0":
        return "nothing saved"
    return f"{text} cycles {'saved' if middle > 0 else 'lost'}"
