"""Scrambled Sobol sequences: numbers that fill the unit cube more evenly than independent ones.

`scipy.stats.qmc` has them (a test holds these against it), but takes about a second to import, and
every `nvmx-lab compare` would pay for that.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

_BITS: Final = 32

_DIRECTIONS: Final = (
    (0, ()),
    (0, (1,)),
    (1, (1, 3)),
    (1, (1, 3, 1)),
    (2, (1, 1, 1)),
    (1, (1, 1, 3, 3)),
    (4, (1, 3, 5, 13)),
    (2, (1, 1, 5, 5, 17)),
    (4, (1, 1, 5, 5, 5)),
    (7, (1, 1, 7, 11, 19)),
    (11, (1, 1, 5, 1, 1)),
    (13, (1, 1, 1, 3, 11)),
    (14, (1, 3, 5, 5, 31)),
    (1, (1, 3, 3, 9, 7, 49)),
    (13, (1, 1, 1, 15, 21, 21)),
)
"""A primitive polynomial (its inner coefficients, as bits) and initial direction numbers for each
dimension: S. Joe and F. Y. Kuo, Constructing Sobol sequences with better two-dimensional
projections, SIAM J. Sci. Comput. 30 (2008), their table new-joe-kuo-6."""

DIMENSIONS: Final = len(_DIRECTIONS)


def coordinate(dimension: int, n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return one dimension of the first points of a scrambled sequence.

    Scrambled by a random matrix and a random shift (J. Matousek, On the L2-discrepancy for anchored
    boxes, J. Complexity 14 (1998)): each number alone is uniform, and of any 2**k numbers from the
    start one lies in each of 2**k equal slices.

    Parameters
    ----------
    dimension : int
        From 0, below `DIMENSIONS`.
    n : int
        How many points, up to 2**32.
    rng : Generator
        What scrambles this dimension.

    Returns
    -------
    float64[n]
        Above 0 and below 1.
    """
    rows = [int(row) >> bit << bit | 1 << bit for bit, row in enumerate(_random(rng, _BITS))]
    points = _random(rng, 1)
    for direction in directions(dimension):
        if points.size >= n:
            break
        parities = ((row & direction).bit_count() & 1 for row in rows)
        scrambled = sum(parity << bit for bit, parity in enumerate(parities))
        points = np.concatenate([points, points ^ scrambled])
    return np.asarray((points[:n] + 0.5) / 2.0**_BITS, np.float64)


def directions(dimension: int) -> list[int]:
    """Return the direction numbers of a dimension, before scrambling, of 32 bits each."""
    polynomial, initial = _DIRECTIONS[dimension]
    degree = len(initial)
    if degree == 0:
        return [1 << bit for bit in reversed(range(_BITS))]
    odd = list(initial)
    for k in range(degree, _BITS):
        following = odd[k - degree] ^ odd[k - degree] << degree
        for back in range(1, degree):
            if polynomial >> (degree - 1 - back) & 1:
                following ^= odd[k - back] << back
        odd.append(following)
    return [number << (_BITS - 1 - k) for k, number in enumerate(odd)]


def _random(rng: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
    return rng.integers(1 << _BITS, size=n)
