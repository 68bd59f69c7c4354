"""What all plots share: a figure with its alternative text, the palette, how numbers are said."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from nvmx_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLACK, GREY = "#000000", "#6B6B6B"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION = "#0072B2", "#D55E00"
"""Of Okabe and Ito's palette, which the colour-blind can tell apart, and a grey."""

VERDICTS: Final[Mapping[str, tuple[str, str]]] = {
    "saves": (BLUE, "o"),
    "costs": (VERMILLION, "v"),
    "unclear": (ORANGE, "D"),
    "no difference": (GREY, "s"),
}
"""Verdict -> colour and marker: the shape says it too."""

WIDTH: Final = 9.6
"""Inches. At the 96 pixels that a browser gives an inch, as wide as a report's page."""

_SHARPNESS = (
    2  # pixels of the bitmap for one of the page, for screens with fine pixels and for zoom
)
_PIXELS = 96
_MARGIN: Final = 0.008  # of the width, left of a title
_FILLED: Final = 0.93  # of the width, by a title's lines: drawn on pixels, they are up to 5 % wider
_TITLE: Final[Any] = {"fontsize": 13, "fontweight": "bold"}
_NARROWEST: Final = 10.0  # cycles
_STYLE: Final[Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "savefig.facecolor": "white",
}


class Plot(NamedTuple):
    """A figure and what it says in words; shows itself in Jupyter and in a report.

    Attributes
    ----------
    figure : matplotlib.figure.Figure
        The figure; no part of pyplot, so nothing keeps it open.
    alt : str
        Alternative text, made from the data that is drawn.
    """

    figure: Figure
    alt: str

    def _repr_mimebundle_(
        self, include: object = None, exclude: object = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the figure as PNG, and the metadata that carries its alternative text."""
        del include, exclude
        width, height = (round(inches * _PIXELS) for inches in self.figure.get_size_inches())
        about = {"alt": self.alt, "width": width, "height": height}
        return {"image/png": png(self.figure), "text/plain": self.alt}, {"image/png": about}


def show(figure: Figure, alt: str) -> None:
    """Show a figure with its alternative text.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        What to show.
    alt : str
        What it says, for who cannot see it.

    Raises
    ------
    LabError
        If the alternative text is empty.
    """
    from IPython.display import display

    if not alt.strip():
        raise LabError("a figure without alternative text", where="alt", got=alt)
    display(Plot(figure, alt))  # type: ignore[no-untyped-call]


def png(figure: Figure) -> bytes:
    """Return a figure as PNG: the same bytes for the same figure."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=_SHARPNESS * _PIXELS, metadata={"Software": None})
    return buffer.getvalue()


def blank(height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of the common width and style, and its axes from left to right."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08)  # type: ignore[union-attr, call-arg]
        axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def entitle(figure: Figure, finding: str) -> None:
    """Put the finding above the figure, at its left edge, broken into lines that fit."""
    lines = "\n".join(_lines(finding, _FILLED * 72 * figure.get_size_inches()[0]))
    figure.suptitle(lines, x=_MARGIN, ha="left", **_TITLE)


def _lines(text: str, points: float) -> list[str]:
    """Break a title into lines no wider than so many points: digits are wider than letters."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(size=_TITLE["fontsize"], weight=_TITLE["fontweight"])
    first, *words = text.split()
    lines = [first]
    for word in words:
        longer = f"{lines[-1]} {word}"
        if TextPath((0, 0), longer, prop=font).get_extents().width <= points:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def legend(figure: Figure, columns: int, **options: Any) -> None:
    """Put a legend below the figure, in fewer columns where so many would not fit."""
    width = figure.get_size_inches()[0] * figure.dpi
    for count in range(columns, 0, -1):
        made = figure.legend(loc="outside lower left", ncols=count, frameon=False, **options)
        if count == 1 or made.get_window_extent().width <= width:
            return
        made.remove()


def whole_cycles(axis: Axis, ticks: int = 8) -> None:
    """Put at most so many ticks at whole cycles, on an axis wide enough to tell them apart.

    Where everything is zero, every tick would read "0" otherwise.
    """
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], integer=True))
    low, high = axis.get_view_interval()
    if abs(high - low) < _NARROWEST:
        middle = (low + high) / 2
        ends = (middle - _NARROWEST, middle + _NARROWEST)
        axis.axes.set(**{f"{axis.axis_name}lim": ends})  # type: ignore[attr-defined]


def require(frame: pd.DataFrame, columns: Iterable[str], where: str) -> None:
    """Raise LabError for a frame without rows, or without one of the columns."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise LabError(
            "the frame lacks columns that the figure needs", where=where, got=", ".join(missing)
        )
    if frame.empty:
        raise LabError("the frame has no rows to draw", where=where)


def thousands(axis: Axis) -> None:
    """Write the numbers at an axis as the text does."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def number(value: float) -> str:
    """Say a number of cycles: thousands apart, a real minus sign, never "-0"."""
    text = f"{value:,.0f}"
    return "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")


def span(row: Mapping[str, Any] | pd.Series, name: str) -> str:
    """Say a median with its 90 % interval."""
    low, middle, high = (number(row[f"{name}_{q}"]) for q in ("p05", "p50", "p95"))
    return f"{middle} (90 % interval {low} to {high})"


def share(value: float) -> str:
    """Say a share in per cent, with as many digits as tell it from nothing and from all."""
    if value in (0, 1):
        return f"{value:.0%}".replace("%", " %")
    digits = 1 if 0.001 <= value < 0.999 else 2
    return f"{100 * value:.{digits}f} %"


def listed(parts: Iterable[str]) -> str:
    """Join with commas, and "and" before the last."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
