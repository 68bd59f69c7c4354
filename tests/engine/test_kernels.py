"""The loops against naive twins: compiled or plain Python, as numba is set to (test_modes.py)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvmx_lab.engine.compiled import kernel
from nvmx_lab.engine.run import Lifted
from tests.engine import naive


@st.composite
def machines(draw: st.DrawFn) -> list[list[int]]:
    """Next state of each (state, word): up to four states, some words leading to one from all."""
    states, words = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    rows = [[draw(st.integers(0, states - 1)) for _ in range(words)] for _ in range(states)]
    for word in range(words):
        if draw(st.booleans()):
            for row in rows:
                row[word] = rows[0][word]
    return rows


def walk(machine: list[list[int]], ids: list[int], chunk: int) -> tuple[np.ndarray, int]:
    table = np.array(machine, np.int32)
    lifted = Lifted(np.arange(len(machine), dtype=np.int32), table)
    visits = np.zeros((4, table.size), np.int64)
    row = 0
    for start in range(0, len(ids), chunk):
        part = np.array(ids[start : start + chunk], np.int32)
        row = kernel("run_words")(lifted.next_row, lifted.settled, part, row, visits)
    return visits.sum(axis=0).reshape(table.shape), row // table.shape[1]


@settings(max_examples=150)
@given(machines(), st.lists(st.integers(0, 4), max_size=60), st.integers(1, 61))
@example([[1, 0], [0, 1]], [0, 1, 1, 0, 0, 1, 0, 0, 1], 9)  # no word settles the state
@example([[1, 1], [1, 1]], [0, 1, 1, 0, 0, 1, 0, 0, 1], 9)  # every word does
@example([[1, 0, 0], [0, 1, 0]], [2, 0, 1, 0, 0, 1, 0, 2, 1, 0, 0, 0, 0, 2, 0, 0], 16)  # some do
def test_run_words(machine, ids, chunk):
    ids = [word % len(machine[0]) for word in ids]
    got, last = walk(machine, ids, chunk)
    met, expected_last = naive.word_visits(machine, ids)
    assert last == expected_last
    assert {(s, w): n for (s, w), n in np.ndenumerate(got) if n} == dict(met)


@pytest.mark.parametrize("settling", [0.0, 0.05, 0.3, 1.0])
def test_run_words_over_long_streams(settling):
    """Long enough that every part has words before it that do not settle the state."""
    rng = np.random.default_rng([int(settling * 100), 5])
    for states, words in ((2, 3), (3, 8), (5, 40)):
        machine = rng.integers(states, size=(states, words))
        settled = rng.random(words) < settling
        machine[:, settled] = machine[0, settled]
        ids = rng.integers(words, size=1_500).tolist()
        for chunk in (1, 7, 64, 1_000, 1_500):
            got, last = walk(machine.tolist(), ids, chunk)
            met, expected_last = naive.word_visits(machine.tolist(), ids)
            assert last == expected_last
            assert {(s, w): n for (s, w), n in np.ndenumerate(got) if n} == dict(met)


@settings(max_examples=50)
@given(machines(), st.lists(st.integers(0, 4), max_size=30))
def test_states_before(machine, ids):
    ids = [word % len(machine[0]) for word in ids]
    out = np.full(len(ids), -1, np.int64)
    last = kernel("states_before")(np.array(machine, np.int32), np.array(ids, np.int32), 0, out)
    state, expected = 0, []
    for word in ids:
        expected.append(state)
        state = machine[state][word]
    assert (out.tolist(), last) == (expected, state)


def test_visits_add_up():
    """A kernel adds to what is there: a stream is read in chunks."""
    machine = [[0, 1], [1, 0]]
    table = Lifted(np.arange(2, dtype=np.int32), np.array(machine, np.int32))
    visits = np.full((4, 4), 7, np.int64)
    ids = np.zeros(5, np.int32)
    kernel("run_words")(table.next_row, table.settled, ids, 0, visits)
    assert visits.sum() == 4 * 4 * 7 + 5


def test_a_wrong_index_is_found_when_bounds_are_checked():
    """Says that the run with NUMBA_BOUNDSCHECK=1 checks anything at all."""
    import numba

    if not numba.config.BOUNDSCHECK:
        pytest.skip("bounds are not checked in this run")
    table = Lifted(np.arange(1, dtype=np.int32), np.zeros((1, 2), np.int32))
    with pytest.raises(IndexError):
        kernel("run_words")(
            table.next_row, table.settled, np.array([9], np.int32), 0, np.zeros((4, 2), np.int64)
        )
