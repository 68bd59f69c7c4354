"""The engine's loops: the only numba code, bare functions on arrays.

Nothing enters but arguments: a cached kernel would keep the old value of a global. Compiled on the
first call, not on import.
"""

from __future__ import annotations

import numba


@numba.njit(cache=True, nogil=True)
def run_words(next_of_word, ids, state, visits):  # type: ignore[no-untyped-def]
    """Run one automaton over word ids.

    Parameters
    ----------
    next_of_word : int32[B, W]
        The boundary state after each word.
    ids : int32[n]
        Word ids.
    state : int
        Boundary state before the first word.
    visits : int64[B, W]
        How often each (boundary state, word) was met; added to.

    Returns
    -------
    int
        Boundary state after the last word.
    """
    for word in ids:
        visits[state, word] += 1
        state = next_of_word[state, word]
    return state


@numba.njit(cache=True, nogil=True)
def states_before(next_of_word, ids, state, out):  # type: ignore[no-untyped-def]
    """Write the boundary state before each word; return the last state."""
    for i in range(ids.size):
        out[i] = state
        state = next_of_word[state, ids[i]]
    return state
