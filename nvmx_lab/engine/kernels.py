"""The engine's loops: the only code that numba compiles, bare functions on arrays.

Nothing enters but arguments: a cached kernel would keep the old value of a global. Here they are
plain Python, and slow; `nvmx_lab.engine.compiled` compiles them on first use.
"""

from __future__ import annotations

import numpy as np


def run_words(next_row, settled, ids, row, visits):  # type: ignore[no-untyped-def]
    """Run one automaton over word ids.

    A word's successor needs the state before it, so a plain loop waits for one load after the
    other. Most words lead to the same state from everywhere; behind such a word the state is known
    without walking there. So the ids are cut into four parts that are walked side by side.

    Parameters
    ----------
    next_row : int32[B * W]
        Row after each (boundary state, word): number of the state times W.
    settled : int32[W]
        The row after the word if it is the same from every state, else -1.
    ids : int32[n]
        Word ids.
    row : int
        Row before the first word.
    visits : int64[4, B * W]
        How often each (boundary state, word) was met, one line for each part; added to.

    Returns
    -------
    int
        Row after the last word.
    """
    # Unsigned throughout: numba tests signed indices for wrapping round, which halves the speed.
    size = ids.size
    part = size // 4
    starts = np.empty(4, np.int64)
    starts[0] = row
    for k in range(1, 4):
        known = -1
        at = k * part
        while known < 0 and at > (k - 1) * part:
            at -= 1
            known = settled[ids[at]]
        if known < 0:
            part = 0  # nothing to start from: walk all of it in one piece
            break
        for j in range(at + 1, k * part):
            known = next_row[known + ids[j]]
        starts[k] = known
    r0 = np.uint64(row)
    if part > 0:
        r1, r2, r3 = np.uint64(starts[1]), np.uint64(starts[2]), np.uint64(starts[3])
        i0, i1, i2, i3 = ids[:part], ids[part:], ids[2 * part :], ids[3 * part :]
        v0, v1, v2, v3 = visits[0], visits[1], visits[2], visits[3]
        for j in range(np.uint64(part)):
            i = np.uint64(j)
            h0, h1 = r0 + np.uint64(i0[i]), r1 + np.uint64(i1[i])
            h2, h3 = r2 + np.uint64(i2[i]), r3 + np.uint64(i3[i])
            v0[h0] += 1  # a line each: the same counter twice in a row would wait for itself
            v1[h1] += 1
            v2[h2] += 1
            v3[h3] += 1
            r0, r1 = np.uint64(next_row[h0]), np.uint64(next_row[h1])
            r2, r3 = np.uint64(next_row[h2]), np.uint64(next_row[h3])
        r0 = r3
    for j in range(4 * part, size):
        here = r0 + np.uint64(ids[j])
        visits[0, here] += 1
        r0 = np.uint64(next_row[here])
    return np.int64(r0)


def states_before(next_of_word, ids, state, out):  # type: ignore[no-untyped-def]
    """Write the boundary state before each word to `out`; return the last state."""
    for i in range(ids.size):
        out[i] = state
        state = next_of_word[state, ids[i]]
    return state
