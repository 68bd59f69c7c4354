"""A fault of a data file, and the list of them as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a data file.

    Attributes
    ----------
    file : str
        Path below the data folder, with forward slashes.
    row : int or None
        Line in a text file, counted from 1 and with the header; record in a Parquet file, counted
        from 1; None if the fault is of the file or of a whole column.
    column : str
        Column or key, ``"a.b"`` for key ``b`` of table ``a``; empty if the fault is of the file.
    what : str
        What is wrong.
    got : str
        What was found.
    allowed : str
        What would have been accepted.
    """

    file: str
    row: int | None
    column: str
    what: str
    got: str = ""
    allowed: str = ""

    def __str__(self) -> str:
        place = self.file if self.row is None else f"{self.file}:{self.row}"
        column = f": {self.column}" if self.column else ""
        got = f"; got {_short(self.got)!r}" if self.got else ""
        allowed = f"; allowed: {self.allowed}" if self.allowed else ""
        return f"{place}{column}: {self.what}{got}{allowed}"


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """Return the faults by file, row and column, each once."""
    return sorted(set(faults), key=lambda f: (f.file, f.row or 0, f.column, f.what, f.got))


def report(faults: Sequence[Fault]) -> str:
    """Return the faults as text: one line each, and a last line that counts them."""
    if not faults:
        return "data tables: no fault"
    files = len({fault.file for fault in faults})
    count = f"{len(faults)} fault{'s' * (len(faults) != 1)} in {files} file{'s' * (files != 1)}"
    return "\n".join([*(str(fault) for fault in faults), f"data tables: {count}"])


def _short(text: str, most: int = 120) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
