"""Sobol points: against scipy's, and what scrambling must keep."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import qmc

from nvmx_lab.costs import sobol
from nvmx_lab.costs.prices import PARAMETERS


class Nothing:
    """A generator that scrambles nothing."""

    def integers(self, high, size):
        return np.zeros(size, np.int64)


def plain(n):
    return np.column_stack([sobol.coordinate(d, n, Nothing()) for d in range(sobol.DIMENSIONS)])


def test_there_is_a_dimension_for_each_price():
    assert len(PARAMETERS) <= sobol.DIMENSIONS


def test_unscrambled_they_are_scipy_s():
    n = 1 << 12
    theirs = qmc.Sobol(sobol.DIMENSIONS, scramble=False).random(n)
    order = np.arange(n) ^ np.arange(n) >> 1  # scipy's points come in the order of the Gray code
    assert (np.floor(plain(n) * n)[order] == np.floor(theirs * n)).all()
    assert abs(plain(n)[order] - theirs).max() <= 2.0**-32


@given(st.integers(0, sobol.DIMENSIONS - 1), st.integers(0, 14), st.integers(0, 2**32))
def test_one_number_is_in_each_slice(dimension, k, seed):
    points = sobol.coordinate(dimension, 1 << k, np.random.default_rng(seed))
    assert sorted(np.floor(points * (1 << k))) == list(range(1 << k))


@given(st.data(), st.integers(0, 2**32))
def test_scrambling_keeps_how_even_two_dimensions_are_together(data, seed):
    """A box of area 2**-12 that holds one of the first 4,096 plain points holds one scrambled."""
    one, other = data.draw(st.permutations(range(sobol.DIMENSIONS)))[:2]
    k = data.draw(st.integers(0, 12))

    def boxes(points):
        cells = np.floor(points[:, one] * 2**k) * 2 ** (12 - k) + np.floor(
            points[:, other] * 2 ** (12 - k)
        )
        return np.unique_counts(cells).counts

    rngs = [np.random.default_rng([seed, d]) for d in range(sobol.DIMENSIONS)]
    scrambled = np.column_stack([sobol.coordinate(d, 1 << 12, rng) for d, rng in enumerate(rngs)])
    assert sorted(boxes(scrambled)) == sorted(boxes(plain(1 << 12)))


@given(st.integers(1, 3_000), st.integers(1, 3_000), st.integers(0, 2**32))
def test_more_points_begin_with_the_same(n, more, seed):
    first, longer = (sobol.coordinate(7, m, np.random.default_rng(seed)) for m in (n, n + more))
    assert first.size == n and (longer[:n] == first).all()
    assert longer.min() > 0 and longer.max() < 1


@pytest.mark.parametrize("dimension", [0, 7, 14])
def test_each_number_alone_is_uniform_over_seeds(dimension):
    third = [sobol.coordinate(dimension, 3, np.random.default_rng(s))[2] for s in range(2_000)]
    counts = np.histogram(third, 10, (0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared, 9 degrees, 0.1 %
