"""Naive twins of the engine: one step at a time, dictionaries and lists, no array tricks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from nvmx_lab.nested.automaton import count
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace
from nvmx_lab.nested.ops import Operation


def word_visits(
    next_of_word: Sequence[Sequence[int]], ids: Iterable[int], state: int = 0
) -> tuple[Counter[tuple[int, int]], int]:
    """Return how often each (state, word) was met, and the last state."""
    met: Counter[tuple[int, int]] = Counter()
    for word in ids:
        met[state, word] += 1
        state = next_of_word[state][word]
    return met, state


def counts_by_operation(
    config: Config, operations: Iterable[Operation]
) -> dict[Operation, npt.NDArray[np.float64]]:
    """Return the counts of each operation, summed, by stepping the model."""
    model = Nvmx(config)
    model.start()
    summed: dict[Operation, npt.NDArray[np.float64]] = {}
    for operation in operations:
        model.trace = Trace()
        model.apply(operation)
        summed[operation] = summed.get(operation, 0) + count(model.trace)
    return summed


def counts_per_exit(
    config: Config, round_trips: Iterable[Sequence[Operation]]
) -> npt.NDArray[np.float64]:
    """Return the counts of each round trip, by stepping the model."""
    model = Nvmx(config)
    model.start()
    rows = []
    for trip in round_trips:
        row = 0
        for operation in trip:
            model.trace = Trace()
            model.apply(operation)
            row = row + count(model.trace)
        rows.append(row)
    return np.array(rows)
