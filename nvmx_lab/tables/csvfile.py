"""Reading and checking one CSV table: every fault, with line and column."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nvmx_lab.tables.fault import Fault
from nvmx_lab.tables.rules import Names, Problem, Rule, number


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: the line it starts on, and its cells by column."""

    line: int
    cells: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        """Return a cell; empty if the table lacks the column (which has its own fault)."""
        return self.cells.get(column, "")

    def number(self, column: str) -> float | None:
        """Return a cell as a finite number, None if it is none (which has its own fault)."""
        value = number(self[column])
        return value if isinstance(value, float) and math.isfinite(value) else None


WholeTable = Callable[[str, Sequence[Row], Names], Iterable[Fault]]
"""A check of a whole table: (file, rows, declared names) -> faults."""


@dataclass(frozen=True)
class Table:
    """What a CSV table must look like.

    Attributes
    ----------
    columns : mapping of str to Rule
        Every column, in any order; no other is allowed.
    key : tuple of str
        Columns that together name a row once; empty if rows may repeat.
    ascending : tuple of tuple of str
        Groups of columns whose numbers must not decrease from left to right, blanks aside.
    also : tuple of callable
        Checks of the whole table.
    """

    columns: Mapping[str, Rule]
    key: tuple[str, ...]
    ascending: tuple[tuple[str, ...], ...] = ()
    also: tuple[WholeTable, ...] = field(default=())


def read(path: Path, file: str) -> tuple[list[Row], list[str], list[Fault]]:
    """Return the rows and header of a CSV file, and what is wrong with its form.

    Bytes that are no UTF-8 stay in their cell as lone surrogates, for the rules to find.
    """
    try:
        text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    except OSError as error:
        return [], [], [Fault(file, None, "", "cannot be read", str(error.strerror or error))]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    faults: list[Fault] = []
    header: list[str] = []
    try:
        header = next(reader, [])
        if not header:
            return [], [], [Fault(file, 1, "", "no header")]
        while True:
            line = reader.line_num + 1  # where the row starts: a quoted cell may span lines
            values = next(reader, None)
            if values is None:
                break
            if not values:
                faults.append(Fault(file, line, header[0], "blank line"))
            elif len(values) != len(header):
                # The first column without a cell, or the last one that has one too many.
                at = header[min(len(values), len(header) - 1)]
                what = "the row has another length than the header"
                got, allowed = f"{len(values)} cells", f"{len(header)} cells"
                faults.append(Fault(file, line, at, what, got, allowed))
            else:
                rows.append(Row(line, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        column = header[0] if header else ""
        faults.append(Fault(file, reader.line_num, column, f"malformed CSV: {error}"))
    return rows, header, faults


def check(
    file: str, table: Table, header: Sequence[str], rows: Sequence[Row], names: Names
) -> Iterator[Fault]:
    """Yield every fault of a table that has been read."""
    yield from _check_header(file, table, header)
    judged: dict[tuple[str, str], Problem | None] = {}  # most cells say what others say
    for row in rows:
        for column, rule in table.columns.items():
            if column not in row.cells:
                continue
            cell = column, row[column]
            if cell not in judged:
                judged[cell] = rule.problem_in_cell(row[column], names)
            found = judged[cell]
            if found is not None:
                got = row[column].encode("utf-8", "backslashreplace").decode()
                yield Fault(file, row.line, column, found.what, got, found.allowed)
        for group in table.ascending:
            yield from _check_ascending(file, row, group)
    yield from _check_key(file, table.key, rows)
    if not rows:
        yield Fault(file, 1, "", "no rows")
    # A check of the whole table says nothing useful where a column of it is missing.
    if set(table.columns) <= set(header):
        for whole in table.also:
            yield from whole(file, rows, names)


def _check_header(file: str, table: Table, header: Sequence[str]) -> Iterator[Fault]:
    for column in table.columns:
        if column not in header:
            yield Fault(file, 1, column, "column missing")
    for position, column in enumerate(header):
        shown = column.encode("utf-8", "backslashreplace").decode()
        if column in header[:position]:
            yield Fault(file, 1, shown, "column twice")
        elif column not in table.columns:
            yield Fault(file, 1, shown, "unknown column", allowed=", ".join(table.columns))


def _check_ascending(file: str, row: Row, group: Sequence[str]) -> Iterator[Fault]:
    last: tuple[str, float] | None = None
    for column in group:
        value = row.number(column)
        if value is None:
            continue
        if last is not None and value < last[1]:
            yield Fault(
                file, row.line, column, f"less than {last[0]}", row[column], f">= {last[1]:g}"
            )
        last = column, value


def _check_key(file: str, key: Sequence[str], rows: Sequence[Row]) -> Iterator[Fault]:
    first: dict[tuple[str, ...], int] = {}
    if not key:
        return
    for row in rows:
        if not all(column in row.cells for column in key):
            return
        value = tuple(row[column] for column in key)
        if value in first:
            shown = ", ".join(value)
            yield Fault(file, row.line, ", ".join(key), f"row again (line {first[value]})", shown)
        else:
            first[value] = row.line
