"""The engine as the benchmarks see it. This file is the one place that knows its interface.

`problem` makes a stream and automata; `prepare` gets everything ready that is not to be timed and
returns the run that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

NAME = "stand-in for the engine (the plain loop in numba)"

ALPHABET, STATES, WORDS, LETTERS = 128, 16, 64, (12, 80)


class Problem(NamedTuple):
    """A stream and the automata that walk it, all from state 0."""

    codes: npt.NDArray[np.uint16]
    """The stream: letters, uint16[n]."""
    next_rows: list[npt.NDArray[np.int32]]
    """For each automaton, int32[states * alphabet]: the next state's number times the alphabet."""


def problem(operations: int, automata: int) -> Problem:
    """Draw round trips (words) up to `operations` letters; few states, as in the model."""
    rng = np.random.default_rng(np.random.SeedSequence([13, automata]))
    words = [
        rng.integers(ALPHABET, size=rng.integers(*LETTERS), dtype=np.uint16) for _ in range(WORDS)
    ]
    drawn = rng.integers(WORDS, size=operations // LETTERS[0] + 1)
    codes = np.concatenate([words[i] for i in drawn])[:operations]
    next_rows = [
        (rng.integers(STATES, size=STATES * ALPHABET) * ALPHABET).astype(np.int32)
        for _ in range(automata)
    ]
    return Problem(codes, next_rows)


def prepare(given: Problem) -> Callable[[], list[npt.NDArray[np.int64]]]:
    """Return a run: it gives, for each automaton, how often each (state, letter) was taken."""

    def run() -> list[npt.NDArray[np.int64]]:
        visits = [np.zeros(table.size, np.int64) for table in given.next_rows]
        for table, counted in zip(given.next_rows, visits, strict=True):
            _walk(given.codes, table, counted)
        return visits

    return run


@numba.njit
def _walk(codes, next_row, visits):
    row = np.uint64(0)  # unsigned: a signed index would be tested for wrapping round
    for code in codes:
        here = row + np.uint64(code)
        visits[here] += 1
        row = np.uint64(next_row[here])
