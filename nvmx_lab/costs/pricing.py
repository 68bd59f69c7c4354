"""Pricing: counts times prices, with intervals, and no total where a price is unknown.

Price a difference as ``price(counts_a - counts_b, draws)``: both sides then meet the same drawn
prices, and what is equal on both sides needs no price at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nvmx_lab.costs.prices import Draws, FloatArray
from nvmx_lab.errors import LabError
from nvmx_lab.nested.primitives import PRIMITIVES

_NAMES = tuple(PRIMITIVES)
_L0, _L1 = _NAMES.index("l0_instructions"), _NAMES.index("l1_instructions")
_OF_L1 = np.array([name.startswith("l1_") for name in _NAMES])


class Interval(NamedTuple):
    """Median and 90 % interval over the drawn prices; each float64[...] as the counts were."""

    p05: FloatArray
    p50: FloatArray
    p95: FloatArray


@dataclass(frozen=True)
class Cycles:
    """Priced counts.

    Attributes
    ----------
    values : float64[..., n]
        TSC cycles, one per drawn price list.
    left_out : tuple of str
        Primitives that occur but have no price: the values are without them.
    """

    values: FloatArray = field(repr=False)
    left_out: tuple[str, ...] = ()

    def interval(self) -> Interval:
        """Return the median and the 90 % interval over the draws."""
        return interval(self.values)


def charged(counts: ArrayLike, draws: Draws) -> FloatArray:
    """Return the counts that prices are multiplied with.

    They are `counts` but for the software: published prices of VMREAD and VMWRITE were inferred
    from code that was removed whole, so they include the moves and branches beside the instruction
    (`Price.includes_instructions`). Those are in l0_instructions (or l1_instructions) as well and
    are taken off there, so that they are charged once.

    Parameters
    ----------
    counts : array_like[..., P]
        In `PRIMITIVES` order; may be a difference, so negative, and a mean, so fractional.

    Returns
    -------
    float64[..., P]

    Raises
    ------
    LabError
        If the last axis is not P long or a count is not finite.
    """
    result = np.array(counts, dtype=np.float64)
    if result.ndim == 0 or result.shape[-1] != len(_NAMES):
        raise LabError(
            "counts of another shape",
            where="counts",
            got=result.shape,
            allowed=f"(..., {len(_NAMES)}), in the order of PRIMITIVES",
        )
    if not np.isfinite(result).all():
        raise LabError("counts must be finite", where="counts")
    inside = draws.includes_instructions
    # Summed before either column changes; the two columns include nothing themselves.
    of_l0 = result @ np.where(_OF_L1, 0.0, inside)
    of_l1 = result @ np.where(_OF_L1, inside, 0.0)
    result[..., _L0] -= of_l0
    result[..., _L1] -= of_l1
    return result


def unpriced(counts: ArrayLike, draws: Draws) -> tuple[str, ...]:
    """Return the primitives that occur in the counts and have no price."""
    return _missing(charged(counts, draws), draws)


def _missing(bill: FloatArray, draws: Draws) -> tuple[str, ...]:
    occurs = (bill != 0).reshape(-1, len(_NAMES)).any(axis=0)
    return tuple(name for name in draws.unknown if occurs[_NAMES.index(name)])


def price(counts: ArrayLike, draws: Draws, *, allow_unknown: bool = False) -> Cycles:
    """Price counts: a matrix product.

    Parameters
    ----------
    counts : array_like[..., P]
        How often each primitive happens, in `PRIMITIVES` order; or a difference of two such.
    draws : Draws
        Drawn prices, n of them. The result holds n numbers per row of counts: 0.8 MB for 100,000.
    allow_unknown : bool
        Leave out what has no price instead of refusing; the result says what.

    Returns
    -------
    Cycles

    Raises
    ------
    LabError
        If a primitive that occurs has no price, or the counts have another shape.
    """
    bill = charged(counts, draws)
    missing = _missing(bill, draws)
    if missing and not allow_unknown:
        raise LabError(
            "no total: a price is unknown",
            where=f"cpu {draws.cpu}",
            got=", ".join(missing),
            mend="choose another cpu, give the price in a TOML file of your own or name a `base` "
            "there that has it (nvmx-lab cpus import --base), "
            "or ask for the total without it",
        )
    # An unknown price of something that never happens is no obstacle, but 0 * NaN is NaN.
    known = np.nan_to_num(draws.cycles, nan=0.0) if draws.unknown else draws.cycles
    return Cycles(bill @ known.T, missing)


def interval(cycles: Cycles | FloatArray) -> Interval:
    """Return the median and the 90 % interval over the last axis."""
    values = cycles.values if isinstance(cycles, Cycles) else cycles
    p05, p50, p95 = np.quantile(values, (0.05, 0.5, 0.95), axis=-1)
    return Interval(p05, p50, p95)
