"""The summary of all reports: one row per mix, checked, and said in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nvmx_lab import files
from nvmx_lab.errors import LabError
from nvmx_lab.reports.result import Record

if TYPE_CHECKING:
    import pandas as pd

Sign = Literal["gain", "loss", "unclear", "none", "unknown"]

Finite = Annotated[float, Field(allow_inf_nan=False)]

NOTHING_CYCLES: Final = 0.5
"""An interval wholly within this many cycles of zero is no saving and no loss."""


class Row(BaseModel):
    """What the summary says of one mix; a notebook may publish further columns.

    Attributes
    ----------
    mix, title : str
        Name and short title of the mix.
    basis : str
        Where the mix's weights come from: "published", "executed", "assumed", ...
    source : str
        The source itself.
    pulls_share : float
        Share of the nested exits after which L0 pulls the rare fields, 0 to 1.
    rare_vmreads_saved_per_exit : float
        VMREADs of rare fields per exit, before minus after.
    exit_leg_saving_cycles_p05, exit_leg_saving_cycles_p50, exit_leg_saving_cycles_p95 : float
        Saving on the exit leg: median and 90 % interval over the price list's draws; None where
        a price is unknown.
    round_trip_saving_cycles_p05, round_trip_saving_cycles_p50, round_trip_saving_cycles_p95
        The same for the round trip.
    verdict : str
        The study's verdict.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    mix: str
    title: str
    basis: str
    source: str
    pulls_share: Annotated[float, Field(ge=0, le=1)]
    rare_vmreads_saved_per_exit: Finite
    exit_leg_saving_cycles_p05: Finite | None
    exit_leg_saving_cycles_p50: Finite | None
    exit_leg_saving_cycles_p95: Finite | None
    round_trip_saving_cycles_p05: Finite | None
    round_trip_saving_cycles_p50: Finite | None
    round_trip_saving_cycles_p95: Finite | None
    verdict: str

    @model_validator(mode="after")
    def _ordered(self) -> Row:
        for interval in (self.exit_leg, self.round_trip):
            if interval is not None and not interval[0] <= interval[1] <= interval[2]:
                raise ValueError(f"the ends of an interval are out of order: {interval}")
        return self

    @property
    def exit_leg(self) -> tuple[float, float, float] | None:
        """Saving on the exit leg, in cycles: low end, median, high end; None if unknown."""
        return _interval(
            self.exit_leg_saving_cycles_p05,
            self.exit_leg_saving_cycles_p50,
            self.exit_leg_saving_cycles_p95,
        )

    @property
    def round_trip(self) -> tuple[float, float, float] | None:
        """Saving on the round trip, in cycles: low end, median, high end; None if unknown."""
        return _interval(
            self.round_trip_saving_cycles_p05,
            self.round_trip_saving_cycles_p50,
            self.round_trip_saving_cycles_p95,
        )

    @property
    def sign(self) -> Sign:
        """What the round trip's interval says: the exit leg alone would hide the pulls."""
        return sign_of(self.round_trip)


def sign_of(interval: tuple[float, float, float] | None) -> Sign:
    """Say whether an interval of savings lies above zero, below, around it, or at it."""
    if interval is None:
        return "unknown"
    low, _, high = interval
    if low >= -NOTHING_CYCLES and high <= NOTHING_CYCLES:
        return "none"
    if low > 0:
        return "gain"
    return "loss" if high < 0 else "unclear"


def rows(records: Iterable[Record]) -> list[Row]:
    """Check the records that the notebooks published.

    Raises
    ------
    LabError
        If a column is missing or a value cannot be: names the mix and the column.
    """
    checked = []
    for record in records:
        where = f"summary of {record.get('mix', 'a mix without a name')}"
        try:
            checked.append(Row.model_validate(record))
        except ValidationError as error:
            first = error.errors()[0]
            place = f"{where}: {first['loc'][0]}" if first["loc"] else where
            got = None if first["type"] == "missing" else first["input"]
            if isinstance(got, dict):  # the whole record says nothing that `msg` does not
                got = None
            raise LabError(first["msg"], where=place, got=got) from None
    return checked


def frame(checked: Sequence[Row]) -> pd.DataFrame:
    """Return the rows as a frame, the columns of `Row` first."""
    import pandas as pd

    first = list(Row.model_fields)
    table = pd.DataFrame([row.model_dump() for row in checked])
    if table.empty:
        return pd.DataFrame(columns=first)
    return table[[*first, *(name for name in table.columns if name not in first)]]


def write(table: pd.DataFrame, out: Path) -> None:
    """Write ``summary.parquet`` and ``summary.csv``."""
    files.write_with(out / "summary.parquet", lambda path: table.to_parquet(path, index=False))
    files.write_with(
        out / "summary.csv", lambda path: table.to_csv(path, index=False, lineterminator="\n")
    )


def headline(checked: Sequence[Row]) -> list[str]:
    """Return what the rows say together, one sentence each."""
    if not checked:
        return ["No mix has been run yet."]
    said = [
        f"Of {_count(len(checked), 'workload mix')}, {_verdicts(checked)} "
        "(90 % interval of the round trip, L2 exit to L2 re-entry)."
    ]
    steady = [row for row in checked if row.pulls_share == 0 and sign_of(row.exit_leg) == "gain"]
    if steady:
        middles = [row.exit_leg[1] for row in steady if row.exit_leg]
        lows = [row.exit_leg[0] for row in steady if row.exit_leg]
        highs = [row.exit_leg[2] for row in steady if row.exit_leg]
        reads = [row.rare_vmreads_saved_per_exit for row in steady]
        said.append(
            f"Where L1 never makes L0 pull ({_count(len(steady), 'mix')}), an exit needs "
            f"{_span(reads, '.4g')} VMREADs fewer, and the exit leg is shorter by "
            f"{_span(middles, ',.0f')} cycles in the median "
            f"(intervals from {_signed(min(lows))} to {_signed(max(highs))})."
        )
    said += _largest_loss(checked)
    untouched = [row for row in checked if row.sign == "none"]
    if untouched:
        titles = _listed([row.title for row in untouched])
        said.append(f"The patch changes nothing for {titles}.")
    return said


def _largest_loss(checked: Sequence[Row]) -> list[str]:
    """Say which mix loses most, or which do if a reader could not tell their losses apart."""
    losses = {
        row.mix: _signed(-row.round_trip[1])
        for row in checked
        if row.sign == "loss" and row.round_trip
    }
    if not losses:
        return []
    worst = min((row for row in checked if row.mix in losses), key=_by_round_trip)
    loss = losses[worst.mix]
    tied = [row for row in checked if losses.get(row.mix) == loss]
    pulls = f"a pull after {_span([100 * row.pulls_share for row in tied], '.0f')} %"
    if len(tied) == 1:
        return [
            f"The largest loss is {worst.title}: {loss} cycles per round trip, with {pulls} of its "
            "exits."
        ]
    # More than two titles would be a list, and the table has them.
    which = _listed([row.title for row in tied]) if len(tied) == 2 else f"{len(tied)} mixes"
    return [
        f"The largest loss, {loss} cycles per round trip, is that of {which}, with {pulls} of "
        "their exits."
    ]


def by_saving(checked: Iterable[Row]) -> list[Row]:
    """Return the rows from the largest saving on the round trip to the largest loss.

    Rows whose round trip has no price come last.
    """
    rows = list(checked)
    priced = [row for row in rows if row.round_trip]
    return [
        *sorted(priced, key=lambda row: (-_by_round_trip(row), row.mix)),
        *(row for row in rows if not row.round_trip),
    ]


def _by_round_trip(row: Row) -> float:
    return row.round_trip[1] if row.round_trip else 0.0


def _listed(parts: Sequence[str]) -> str:
    """Join with commas, and "and" before the last."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _verdicts(checked: Sequence[Row]) -> str:
    phrases = {
        "gain": ("saves", "save"),
        "loss": ("loses", "lose"),
        "unclear": ("may go either way", "may go either way"),
        "none": ("sees no change", "see no change"),
        "unknown": ("has no price", "have no price"),
    }
    parts = []
    for sign, (one, many) in phrases.items():
        count = sum(row.sign == sign for row in checked)
        if count:
            parts.append(f"{count} {one if count == 1 else many}")
    return _listed(parts)


def _interval(
    low: float | None, middle: float | None, high: float | None
) -> tuple[float, float, float] | None:
    if low is None or middle is None or high is None:
        return None
    return (low, middle, high)


def _count(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("x") else f"{thing}s"
    return f"{number} {thing if number == 1 else plural}"


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _signed(value: float) -> str:
    return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
