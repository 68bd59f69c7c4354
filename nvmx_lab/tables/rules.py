"""Rules for one value: the cell of a CSV table or the value of a TOML key.

A rule reads text into a value (`Rule.read`) and judges a value (`Rule.problem`), so that the same
rule serves CSV, where everything is text, and TOML, where values have types.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

Names = Mapping[str, frozenset[str]]
"""Names that other tables declare, by kind. A kind that could not be read is absent."""

_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")

# Where bytes were no UTF-8, `surrogateescape` left a lone surrogate.
_NOT_UTF8 = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class Problem(NamedTuple):
    """What is wrong with a value, and what would have been accepted."""

    what: str
    allowed: str = ""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The base: `blank` says whether a CSV cell may be empty."""

    blank: bool = False

    def read(self, text: str) -> object:
        """Return the value that a CSV cell stands for; the text itself if it cannot be read."""
        return text

    def problem(self, value: object, names: Names) -> Problem | None:
        """Return what is wrong with a value, None if nothing."""
        raise NotImplementedError

    def problem_in_cell(self, cell: str, names: Names) -> Problem | None:
        """Return what is wrong with a CSV cell, None if nothing."""
        if not cell:
            return None if self.blank else Problem("empty", "a value")
        if _NOT_UTF8.search(cell):
            return Problem("not UTF-8")
        if cell != cell.strip() or _CONTROL.search(cell):
            return Problem("space around the value, or a control character in it")
        return self.problem(self.read(cell), names)


@dataclass(frozen=True, kw_only=True)
class Text(Rule):
    """Any text, or text of one form; `form` names the pattern for people."""

    pattern: str | None = None
    form: str = "text"

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge the value."""
        if not isinstance(value, str):
            return Problem("not text", self.form)
        if not value.strip() and not self.blank:
            return Problem("empty", self.form)
        if value and self.pattern is not None and not re.fullmatch(self.pattern, value):
            return Problem("of another form", self.form)
        return None


@dataclass(frozen=True, kw_only=True)
class Number(Rule):
    """A finite number in a closed interval."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False

    def read(self, text: str) -> object:
        """Return a float, the text if it is no plain decimal number."""
        return number(text)

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge the value."""
        kind = "a whole number" if self.whole else "a finite number"
        allowed = kind + self._interval()
        if isinstance(value, bool) or not isinstance(value, int | float):
            return Problem("not a number", allowed)
        if isinstance(value, float) and not math.isfinite(value):
            return Problem("not finite", allowed)
        if self.whole and value != int(value):
            return Problem("not whole", allowed)
        if not self.low <= value <= self.high:
            return Problem("out of range", allowed)
        return None

    def _interval(self) -> str:
        parts = [f"at least {self.low:g}"] if self.low > -math.inf else []
        parts += [f"at most {self.high:g}"] if self.high < math.inf else []
        return f", {' and '.join(parts)}" if parts else ""


@dataclass(frozen=True, kw_only=True)
class Flag(Rule):
    """True or false."""

    def read(self, text: str) -> object:
        """Return a bool, the text if it is neither."""
        return {"true": True, "false": False}.get(text, text)

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge the value."""
        return None if isinstance(value, bool) else Problem("not a flag", "true, false")


@dataclass(frozen=True, kw_only=True)
class OneOf(Rule):
    """One of a few words."""

    words: tuple[str, ...]

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge the value."""
        if value in self.words:
            return None
        return Problem("unknown value", ", ".join(self.words) + suggestion(value, self.words))


@dataclass(frozen=True, kw_only=True)
class Known(Rule):
    """A name that another table declares.

    Not judged if that table could not be read: it has its own fault. `alternatives` are names that
    are good without a declaration; `before` cuts the value at a character first.
    """

    kind: str
    alternatives: tuple[str, ...] = ()
    before: str | None = None

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge the value."""
        if not isinstance(value, str):
            return Problem("not text", f"the name of a {self.kind}")
        name = value if self.before is None else value.partition(self.before)[0]
        declared = names.get(self.kind)
        if declared is None or name in declared or name in self.alternatives:
            return None
        allowed = f"one of {len(declared)} declared" + suggestion(name, declared)
        return Problem(f"unknown {self.kind}", allowed)


@dataclass(frozen=True, kw_only=True)
class ListOf(Rule):
    """A TOML array whose items follow one rule; in CSV, words between semicolons."""

    item: Rule

    def read(self, text: str) -> object:
        """Return the items."""
        return [self.item.read(word.strip()) for word in text.split(";")]

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge every item; the first bad one is reported."""
        if not isinstance(value, list):
            return Problem("not a list")
        for item in value:
            found = self.item.problem(item, names)
            if found is not None:
                return Problem(f"{found.what}: {item!r}", found.allowed)
        return None


def number(text: str) -> float | str:
    """Return the number that a plain decimal text stands for, the text itself if it is none.

    Stricter than `float`: no ``nan``, no ``1_000``, no space around. May be infinite (``1e400``).
    """
    return float(text) if _DECIMAL.fullmatch(text) else text


def suggestion(value: object, words: Iterable[str]) -> str:
    """Return a nearby word as a hint, empty if none is near."""
    near = difflib.get_close_matches(str(value), sorted(words), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
