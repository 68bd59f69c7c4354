"""The engine as the benchmarks see it. This file is the one place that knows its interface.

`problem` makes a stream and automata; `Problem.run` is what is timed, with and without drawing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nvmx_lab.engine import run as engine
from nvmx_lab.nested.automaton import Automaton
from nvmx_lab.study.simulate import config_of
from nvmx_lab.workload import mixes
from nvmx_lab.workload.streams import Stream

RELEASES = ("5.2+patch13", "5.2", "5.3", "6.1")


@dataclass
class Drawn:
    """A stream that was drawn beforehand: what the loops cost without drawing."""

    chunks: list[npt.NDArray[np.int32]]

    @property
    def exits(self) -> int:
        """Words in the sequence."""
        return sum(chunk.size for chunk in self.chunks)

    def sequence(self, chunk: int = 0) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the chunks as they were drawn."""
        yield from self.chunks


@dataclass
class Problem:
    """A stream and the automata that walk it.

    Attributes
    ----------
    stream : Stream
        As a comparison draws it.
    drawn : Drawn
        The same words, in memory.
    automata, lifted : list
        One per release.
    """

    stream: Stream
    drawn: Drawn
    automata: list[Automaton]
    lifted: list[engine.Lifted]

    @property
    def operations(self) -> int:
        """Operations in the stream."""
        words = np.bincount(self.stream.ids(), minlength=len(self.stream.words))
        return int(words @ self.stream.words.lengths)

    def run(self, *, draw: bool) -> list[npt.NDArray[np.int64]]:
        """Count the visits of each automaton."""
        return engine.visits(self.stream if draw else self.drawn, self.lifted)

    def codes(self) -> npt.NDArray[np.uint16]:
        """Return the stream operation by operation, uint16[operations]."""
        words = self.stream.words
        return np.concatenate([words[word] for word in self.stream.ids()])

    def operation_rows(self) -> list[npt.NDArray[np.int32]]:
        """Return for each automaton the next row of each (state, operation), flat."""
        width = np.int32(len(self.stream.alphabet))
        return [np.maximum(a.next_state, 0).ravel() * width for a in self.automata]


def problem(mix: str, exits: int, automata: int) -> Problem:
    """Draw a mix and compile L0s for it."""
    chosen = mixes.load(mix)
    stream = chosen.stream(exits, 1)
    compiled = [Automaton(config_of(chosen, kvm), stream.alphabet) for kvm in RELEASES[:automata]]
    for automaton in compiled:
        automaton.visit_words([stream.words[w].tolist() for w in range(len(stream.words))])
    words = stream.words
    return Problem(
        stream,
        Drawn([chunk.copy() for chunk in stream.sequence()]),
        compiled,
        [engine.lift(automaton, words.offsets, words.codes) for automaton in compiled],
    )
