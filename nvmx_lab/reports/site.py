"""The front page: what all the reports say together, and the way to each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nvmx_lab import files
from nvmx_lab.errors import LabError
from nvmx_lab.notebook_parameters import AcrossWorkloadMixes
from nvmx_lab.reports import html
from nvmx_lab.reports.fragment import BADGES
from nvmx_lab.reports.summary import Row, Sign, by_saving, headline

# Files of the site's own; a page of another's making is never written over.
_OWN: Final = ("index.html", "run.json", "summary.csv", "summary.parquet")
_MARK: Final = '<meta name="generator" content="nvmx-lab">'

# The report that sets simulated totals beside published ones.
_TESTED: Final = f"{AcrossWorkloadMixes.notebook}.html"
_STYLE: Final[Mapping[Sign, str]] = {
    "gain": "gain",
    "loss": "loss",
    "unclear": "none",
    "none": "none",
    "unknown": "none",
}


@dataclass(frozen=True)
class Link:
    """A report on the front page besides those in the table: where it is and what it asks."""

    href: str
    title: str
    seconds: float


def write(
    out: Path,
    *,
    rows: Sequence[Row],
    pages: Mapping[str, str],
    links: Sequence[Link],
    failures: Sequence[str],
    before: str,
    after: str,
    provenance: Mapping[str, str],
) -> None:
    """Write ``index.html``.

    Parameters
    ----------
    out : Path
        The folder of reports.
    rows : sequence of Row
        One per mix, in any order: the page has the largest saving on the round trip first.
    pages : mapping of str to str
        File of each mix's report, by the mix.
    links : sequence of Link
        The reports about all the mixes.
    failures : sequence of str
        What could not be made, one sentence each.
    before, after : str
        The two KVM releases compared.
    provenance : mapping of str to str
        What the foot of the page lists.
    """
    low, high, ticks = _axis(rows)
    page = (
        html.environment()
        .get_template("index.html.j2")
        .render(
            window_title="nvmx_lab \u2013 what the patch saves",
            title="What syncing rare guest fields only when needed saves",
            sentences=headline(rows),
            rows=[_shown(row, pages[row.mix], low, high) for row in by_saving(rows)],
            ticks=[(tick, _place(tick, low, high)) for tick in ticks],
            zero=_place(0.0, low, high),
            links=links,
            tested=next((link.href for link in links if link.href == _TESTED), ""),
            failures=failures,
            before=before,
            after=after,
            provenance=provenance,
        )
    )
    files.write_text(out / "index.html", page)


def withdraw(out: Path) -> None:
    """Remove the front page and the summary: they speak of reports about to change.

    Raises
    ------
    LabError
        If ``index.html`` is not one of ours, or something cannot be removed.
    """
    index = out / "index.html"
    try:
        if index.exists() and _MARK not in index.read_text(encoding="utf-8", errors="replace"):
            raise LabError(
                "there is a page here that is not a report's",
                where=index,
                mend="name an empty folder, or one with reports",
            )
        for name in _OWN:
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise LabError(f"cannot be replaced: {error.strerror}", where=out) from None


def _shown(row: Row, page: str, low: float, high: float) -> dict[str, Any]:
    return {
        "mix": row.mix,
        "title": row.title,
        "page": page,
        "basis": row.basis,
        "badge": row.basis if row.basis in BADGES else "",
        "source": row.source,
        "pulls": f"{100 * row.pulls_share:.1f} %",
        "reads": f"{row.rare_vmreads_saved_per_exit:.1f}".replace("-", "\N{MINUS SIGN}"),
        "exit_leg": _cycles(row.exit_leg),
        "round_trip": _cycles(row.round_trip),
        "range": _places(row.round_trip, low, high),
        "style": _STYLE[row.sign],
        "verdict": row.verdict,
    }


def _cycles(interval: tuple[float, float, float] | None) -> tuple[str, str] | None:
    """Return the median, and the interval's ends, as text."""
    if interval is None:
        return None
    low, middle, high = (
        f"{value:,.0f}".replace("-0", "0") if abs(value) < 0.5 else f"{value:,.0f}"
        for value in interval
    )
    minus = "\N{MINUS SIGN}"
    return middle.replace("-", minus), f"{low} to {high}".replace("-", minus)


def _axis(rows: Iterable[Row]) -> tuple[float, float, list[int]]:
    """Return an axis that holds zero and every interval of a round trip, and round ticks on it."""
    ends = [0.0, *(end for row in rows if row.round_trip for end in row.round_trip)]
    low, high = min(ends), max(ends)
    span = max(high - low, 1.0)
    step = next(
        size * 10**power
        for power in range(12)
        for size in (1, 2, 5)
        if span / (size * 10**power) <= 4
    )
    low, high = low - 0.06 * span, high + 0.06 * span
    ticks = [step * i for i in range(int(low // step), int(high // step) + 1)]
    return low, high, [tick for tick in ticks if low <= tick <= high]


def _place(value: float, low: float, high: float) -> float:
    """Return where a value is on the axis, of 240 units."""
    return round(240 * (value - low) / (high - low), 1)


def _places(
    interval: tuple[float, float, float] | None, low: float, high: float
) -> tuple[float, float, float] | None:
    if interval is None:
        return None
    left, middle, right = (_place(value, low, high) for value in interval)
    return left, middle, right
