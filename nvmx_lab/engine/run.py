"""Run streams through automata: the thin layer over `nvmx_lab.engine.kernels`.

The unit of the loop is the word (one round trip), not the operation: an automaton is lifted to
words first, by following every word from every state that L0 can be in at the end of a word. What
an automaton does within a word is a sum known beforehand, so the loop only counts how often it met
each (state, word); operations and instructions follow by a matrix product, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nvmx_lab.engine.compiled import kernel

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

_PARTS = 4
"""Parts that the kernel walks side by side: lines of its `visits`."""


class WordStream(Protocol):
    """What the engine needs of a stream (`nvmx_lab.workload.streams.Stream`)."""

    @property
    def exits(self) -> int:
        """Number of words in the sequence."""

    def sequence(self, chunk: int = ...) -> Iterator[Int32]:
        """Yield the word ids."""


class Tables(Protocol):
    """What the engine needs of an automaton (`nvmx_lab.nested.automaton.Automaton`)."""

    @property
    def next_state(self) -> Int32:
        """Next state, int32[S, A]."""

    @property
    def count_id(self) -> Int32:
        """Row of `counts` of each pair, int32[S, A]."""

    @property
    def counts(self) -> Float64:
        """Distinct count vectors, float64[T, C]."""


@dataclass(frozen=True)
class Lifted:
    """An automaton over words.

    Attributes
    ----------
    boundary : int32[B]
        Automaton states in which a word can start.
    next_of_word : int32[B, W]
        Index into `boundary` after each word.
    """

    boundary: Int32
    next_of_word: Int32

    @property
    def next_row(self) -> Int32:
        """`next_of_word` laid out flat, each state as the row where it starts: int32[B * W]."""
        return (self.next_of_word * np.int32(self.next_of_word.shape[1])).ravel()

    @property
    def settled(self) -> Int32:
        """The row after each word that leads to one state from everywhere, else -1: int32[W]."""
        rows = self.next_of_word * np.int32(self.next_of_word.shape[1])
        same = (rows == rows[0]).all(axis=0)
        return np.where(same, rows[0], np.int32(-1))


def lift(automaton: Tables, offsets: Int64, codes: npt.NDArray[np.uint16]) -> Lifted:
    """Follow every word from every boundary state that can be reached.

    Parameters
    ----------
    automaton : Automaton
        Must have visited all words (`Automaton.visit_words`).
    offsets, codes : int64[W + 1], uint16[N]
        The dictionary of words.

    Raises
    ------
    ValueError
        If the automaton has not visited a word from a state where it can start.
    """
    table = automaton.next_state
    starts, stops = offsets[:-1], offsets[1:]
    length = int(np.max(stops - starts))
    boundary: list[int] = []
    rows: list[Int64] = []
    found = [0]
    while found:  # all starts found by the last round, and all words, at once
        boundary += found
        state = np.repeat(np.array(found, np.int64)[:, None], starts.size, axis=1)
        for step in range(length):  # one operation further each time
            live = np.flatnonzero(starts + step < stops)
            after = table[state[:, live], codes[starts[live] + step]]
            if np.min(after) < 0:  # the kernels do not look: a wrong index there reads anywhere
                raise ValueError("the automaton has not visited all words: visit_words first")
            state[:, live] = after
        rows.append(state)
        known = set(boundary)
        found = [each for each in np.unique(state).tolist() if each not in known]
    renumber = np.full(table.shape[0], -1, np.int32)
    renumber[boundary] = np.arange(len(boundary))
    return Lifted(np.array(boundary, np.int32), renumber[np.concatenate(rows)])


def visits(
    stream: WordStream,
    lifted: Sequence[Lifted],
    progress: Callable[[int], object] | None = None,
) -> list[Int64]:
    """Return how often each automaton met each (boundary state, word).

    Parameters
    ----------
    stream : Stream
        Read once, in chunks; memory does not grow with its length.
    lifted : sequence of Lifted
        The automata; all see the same words.
    progress : callable, optional
        Called with the number of words done after each chunk.

    Returns
    -------
    list of int64[B, W]
    """
    walk = kernel("run_words")
    tables = [(item.next_row, item.settled) for item in lifted]
    seen = [np.zeros((_PARTS, item.next_of_word.size), np.int64) for item in lifted]
    rows = [0] * len(lifted)
    for ids in stream.sequence():
        for k, (next_row, settled) in enumerate(tables):
            rows[k] = walk(next_row, settled, ids, rows[k], seen[k])
        if progress is not None:
            progress(ids.size)
    return [
        parts.sum(axis=0).reshape(item.next_of_word.shape)
        for parts, item in zip(seen, lifted, strict=True)
    ]


def pair_visits(
    automaton: Tables,
    lifted: Lifted,
    word_visits: Int64,
    offsets: Int64,
    codes: npt.NDArray[np.uint16],
) -> Int64:
    """Return how often the automaton met each (state, operation), int64[S, A]."""
    table = automaton.next_state
    out = np.zeros(table.shape, np.int64)
    for b, w in np.argwhere(word_visits):
        state, times = lifted.boundary[b], word_visits[b, w]
        for code in codes[offsets[w] : offsets[w + 1]]:
            out[state, code] += times
            state = table[state, code]
    return out


def counts_of_word(
    automaton: Tables, lifted: Lifted, offsets: Int64, codes: npt.NDArray[np.uint16]
) -> Float64:
    """Return the counts of each (boundary state, word), float64[B, W, C]."""
    table, ids, vectors = automaton.next_state, automaton.count_id, automaton.counts
    starts, stops = offsets[:-1], offsets[1:]
    out = np.zeros((lifted.boundary.size, starts.size, vectors.shape[1]))
    for b, start in enumerate(lifted.boundary):
        state = np.full(starts.size, start, np.int64)
        for step in range(int(np.max(stops - starts))):
            at = starts + step
            live = np.flatnonzero(at < stops)
            code = codes[at[live]]
            out[b, live] += vectors[ids[state[live], code]]
            state[live] = table[state[live], code]
    return out


def counts_per_exit(stream: WordStream, lifted: Lifted, word_counts: Float64) -> Float64:
    """Return the counts of every exit, float64[exits, C]; memory grows with the stream."""
    follow = kernel("states_before")
    out = []
    state = 0
    for ids in stream.sequence():
        before = np.empty(ids.size, np.int64)
        state = follow(lifted.next_of_word, ids, state, before)
        out.append(word_counts[before, ids])
    return np.concatenate(out)
