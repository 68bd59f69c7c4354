"""The sequence diagram of a counterexample: who acts on whom, and where the true value is."""

from __future__ import annotations

import io
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final

from nvmx_lab.plots.figure import (
    BLACK,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    WIDTH,
    Plot,
    blank,
    entitle,
    listed,
    require,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LANES: Final = ("user space", "L2", "L1", "L0")
_CELLS: Final = ("vmcs02", "vmcs12", "shadow", "evmcs", "A", "B", "SMRAM")
_BITS: Final = ("flag", "dirty")
_COLUMNS: Final = (
    *("step", "actor", "target", "label", "flag", "dirty", "wrong"),
    *("field", "finding"),
)
# State -> face, hatch, edge, mark: told apart without the colour.
_STATES: Final[dict[str, tuple[str, str, str, str]]] = {
    "true": (GREEN, "", GREEN, "\N{CHECK MARK}"),
    "stale": ("#FBE3B5", "////", ORANGE, ""),
    "empty": ("white", "", GREY, ""),
}
_MEANINGS: Final = {
    "true": "holds the true value",
    "stale": "holds another value",
    "empty": "nothing written since it was cleared",
}

# The axis counts inches, so that nothing depends on how long the sequence is.
_ROW: Final = 0.27
_GAP: Final = 0.09  # between steps
_NUMBER: Final = 0.22  # right end of the step's number
_TEXT: Final = 0.34
_LETTERS: Final = 38  # of a line of text
_LANE_AT: Final = dict(zip(_LANES, (3.5, 4.1, 4.67, 5.24), strict=True))
_STATES_FROM: Final = 5.68
_STATES_TO: Final = 9.34
_BOX: Final = 0.17
_HEAD: Final = 0.34
_FOOT: Final = 0.62
_SMALL: Final = 8.5
_HEADS: Final = 8.0  # eight of them fit


def sequence(frame: pd.DataFrame) -> Plot:
    """Draw a counterexample: arrows between the lanes, and each cell's state after each step.

    Parameters
    ----------
    frame : DataFrame
        As `nvmx_lab.nested.diagram.rows` makes: one row per arrow, in order; step, actor, target,
        label, flag, dirty, wrong, field, finding, and a column for each cell that matters.

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        If a column is missing or there is no row.
    """
    require(frame, _COLUMNS, "sequence")
    table = frame.reset_index(drop=True)
    texts = [wrap(label, _LETTERS) for label in table["label"]]
    places = _places(table, texts)
    bottom = places[-1] + _ROW * (len(texts[-1]) - 0.3)
    figure, (axes,) = blank(bottom + _HEAD + _FOOT + 0.55)
    axes.set_axis_off()
    axes.set(xlim=(0, WIDTH - 0.1), ylim=(bottom + _FOOT, -_HEAD))
    cells = [name for name in _CELLS if name in table.columns]
    columns = _columns([*cells, *_BITS])
    _heads(axes, columns, bottom)
    last_of_step = table["step"].ne(table["step"].shift(-1))
    first_of_step = table["step"].ne(table["step"].shift())
    for index, row in enumerate(table.to_dict("records")):
        at, lines, wrong = places[index], texts[index], bool(row["wrong"])
        colour = VERMILLION if wrong else BLACK
        if wrong:
            height = _ROW * (1 + 0.8 * (len(lines) - 1))
            axes.axhspan(at - _ROW / 2, at - _ROW / 2 + height, color="#FBE9DF", zorder=0)
        if first_of_step[index]:
            if index:
                line = at - (_ROW + _GAP) / 2
                axes.axhline(line, color="#E4E4E4", linewidth=0.6, zorder=0)
            axes.text(_NUMBER, at, f"{row['step']}", ha="right", va="center", color=GREY)
        weight: Any = {"fontweight": "bold"} if wrong else {}
        for number, text in enumerate(lines):
            axes.text(
                *(_TEXT, at + number * _ROW * 0.8, text),
                va="center",
                color=colour,
                fontsize=9,
                **weight,
            )
        _arrow(axes, _LANE_AT[row["actor"]], _LANE_AT[row["target"]], at, colour, wrong=wrong)
        for name, x in columns.items() if last_of_step[index] else ():
            _state(axes, x, at, row[name])
    _legend(axes, bottom, memory="A" in cells or "B" in cells)
    for written in axes.texts:  # all within the axes: the layout need not look for room
        written.set_in_layout(False)
    finding = str(table["finding"].iloc[-1])
    entitle(figure, finding)
    # Laid out once: a second layout may differ in the last digit, and with it the file's bytes.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return Plot(figure, _alt(table, cells, finding))


def svg(plot: Plot) -> bytes:
    """Return a plot as SVG: the same bytes for the same figure, with its alternative text."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    # Names inside the file are made of this salt, and not of a random number.
    with mpl.rc_context({"svg.hashsalt": "nvmx-lab", "savefig.facecolor": "white"}):
        about = {"Date": None, "Creator": None, "Title": plot.alt}
        plot.figure.savefig(buffer, format="svg", metadata=about)
    return buffer.getvalue()


def _places(table: pd.DataFrame, texts: Sequence[Sequence[str]]) -> list[float]:
    """Return how far down each row is."""
    places: list[float] = []
    at, step = _ROW / 2, table["step"].iloc[0]
    for number, text in zip(table["step"], texts, strict=True):
        at += _GAP if number != step else 0.0
        places.append(at)
        at, step = at + _ROW * (1 + 0.8 * (len(text) - 1)), number
    return places


def _columns(names: Sequence[str]) -> dict[str, float]:
    apart = min(0.62, (_STATES_TO - _STATES_FROM) / (len(names) - 1))
    return {name: _STATES_FROM + apart * number for number, name in enumerate(names)}


def _heads(axes: Axes, columns: dict[str, float], bottom: float) -> None:
    style: Any = {"ha": "center", "va": "center", "fontweight": "bold", "fontsize": _SMALL}
    for lane, x in _LANE_AT.items():
        axes.text(x, -_HEAD / 2, lane, **style)
        axes.plot([x, x], [0, bottom], color=GREY, linewidth=0.8, zorder=1)
    for name, x in columns.items():
        axes.text(x, -_HEAD / 2, name, **{**style, "fontsize": _HEADS})


def _arrow(axes: Axes, start: float, end: float, at: float, colour: str, *, wrong: bool) -> None:
    if start == end:
        axes.plot([start], [at], "D" if wrong else "o", color=colour, markersize=6, zorder=3)
        return
    axes.annotate(
        "",
        (end, at),
        (start, at),
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "linewidth": 1.6 if wrong else 1.1,
            "shrinkA": 0,
            "shrinkB": 0,
        },
        zorder=3,
    )


def _state(axes: Axes, x: float, at: float, state: object) -> None:
    """Draw what a cell holds, or whether a bit is set; nothing where nobody asks."""
    if isinstance(state, str):
        _box(axes, x, at, state)
    elif state:
        axes.text(x, at, "set", ha="center", va="center", fontsize=_SMALL)


def _box(axes: Axes, x: float, at: float, state: str) -> None:
    from matplotlib.patches import Rectangle

    if state not in _STATES:
        axes.plot([x - 0.03, x + 0.03], [at, at], color=GREY, linewidth=0.8)
        return
    face, hatch, edge, mark = _STATES[state]
    corner = (x - _BOX / 2, at - _BOX / 2)
    axes.add_patch(
        Rectangle(corner, _BOX, _BOX, facecolor=face, hatch=hatch, edgecolor=edge, zorder=2)
    )
    if mark:
        axes.text(
            *(x, at, mark),
            ha="center",
            va="center",
            color="white",
            fontsize=9,
            fontfamily="DejaVu Sans",
        )


def _legend(axes: Axes, bottom: float, *, memory: bool) -> None:
    at, x = bottom + 0.24, _TEXT
    for state, meaning in _MEANINGS.items():
        _box(axes, x, at, state)
        axes.text(x + 0.15, at, meaning, va="center", fontsize=_SMALL)
        x += 0.45 + 0.066 * len(meaning)
    axes.plot([x - 0.03, x + 0.03], [at, at], color=GREY, linewidth=0.8)
    axes.text(x + 0.15, at, "not looked at before it is overwritten", va="center", fontsize=_SMALL)
    axes.text(
        *(_TEXT - _BOX / 2, at + 0.24),
        "States after each step. flag: need_sync_vmcs02_to_vmcs12_rare; dirty: dirty_vmcs12."
        + " A, B: VMCS regions in L1's memory." * memory,
        va="center",
        fontsize=_SMALL,
        color="#444444",
    )


def _alt(table: pd.DataFrame, cells: Sequence[str], finding: str) -> str:
    """Say the sequence, and what the cells hold at its end."""
    steps = table.groupby("step")["label"].agg(", ".join)
    told = "; ".join(f"{number}. {text}" for number, text in steps.items())
    last = table.iloc[-1]
    ends = listed(f"{cell} {last[cell]}" for cell in cells)
    return (
        f"Sequence diagram with the lanes {listed(_LANES)}. {finding}. Steps: {told}. "
        f"{last['field']} at the end: {ends}."
    )
