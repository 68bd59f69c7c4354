"""What the lazy sync saves at an exit and what a pull costs: the two sides of break-even."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from nvmx_lab.costs.prices import Draws, FloatArray
from nvmx_lab.costs.pricing import price, unpriced
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.study.simulate import P, reader_and_pull_counts

_NAMES: Final = tuple(PRIMITIVES)
_VMPTRLD, _SOFTWARE = _NAMES.index("vmptrld"), _NAMES.index("l0_instructions")
_VMREADS: Final = (_NAMES.index("vmread_first"), _NAMES.index("vmread_next"))


@dataclass(frozen=True)
class Weighed:
    """A skipped reader against a pull, for each drawn price list.

    Attributes
    ----------
    reader, pull, reads : float64[n]
        TSC cycles: what an eager L0 spends on the rare fields at each exit; a whole pull; the part
        of a pull that reads.
    switches : float
        Switches of VMCS in a pull.
    """

    reader: FloatArray = field(repr=False)
    pull: FloatArray = field(repr=False)
    reads: FloatArray = field(repr=False)
    switches: float

    @property
    def switch(self) -> FloatArray:
        """One switch of VMCS, float64[n]: what a pull does besides reading, by its switches."""
        return (self.pull - self.reads) / self.switches

    def saving(self, rate: float) -> FloatArray:
        """Return the saving per exit where a share `rate` of the exits pulls, float64[n]."""
        return self.reader - rate * self.pull

    @property
    def break_even_rate(self) -> FloatArray:
        """The share of exits with a pull at which nothing is saved, float64[n], at most 1."""
        return np.minimum(self.reader / self.pull, 1.0)

    def break_even_rate_at(self, switch_cycles: FloatArray) -> FloatArray:
        """Return the break-even rate if a switch had another cost, float64[k, n].

        Parameters
        ----------
        switch_cycles : float64[k]
            TSC cycles of one switch.
        """
        whole = self.reads + self.switches * np.asarray(switch_cycles)[:, np.newaxis]
        return np.minimum(self.reader / whole, 1.0)

    def bearable_switch(self, rate: float) -> FloatArray:
        """Return the cost of a switch at which this rate breaks even, float64[n].

        Negative where even a switch for nothing would not pay; the rate must be above 0.
        """
        return (self.reader / rate - self.reads) / self.switches


def unpriced_in(config: Config, drawn: Draws) -> tuple[str, ...]:
    """Return what a reader or a pull consists of that has no price."""
    reader, pull = reader_and_pull_counts(config)
    return unpriced(np.array([reader[:P], pull[:P]]), drawn)


def weigh(config: Config, drawn: Draws) -> Weighed:
    """Price the reader that the lazy sync skips, and a pull.

    Parameters
    ----------
    config : Config
        L0; its sync is of no matter.
    drawn : Draws
        Drawn prices.

    Raises
    ------
    LabError
        If nothing is ever pulled (enlightened VMCS), or a price is missing.
    """
    reader, pull = (counts[:P] for counts in reader_and_pull_counts(config))
    if not pull.any():
        raise LabError("nothing is ever pulled", where="L0", got="an enlightened VMCS")
    cycles = price(np.array([reader, pull, _reads(pull, drawn)]), drawn).values
    return Weighed(cycles[0], cycles[1], cycles[2], float(pull[_VMPTRLD]))


def curve_weighed(config: Config, drawn: Draws) -> Weighed:
    """Return `weigh` with switches for nothing: all that a curve over their cost needs a price of.

    Raises
    ------
    LabError
        As `weigh`, but a price that only a switch needs may be missing.
    """
    reader, pull = (counts[:P] for counts in reader_and_pull_counts(config))
    if not pull.any():
        raise LabError("nothing is ever pulled", where="L0", got="an enlightened VMCS")
    cycles = price(np.array([reader, _reads(pull, drawn)]), drawn).values
    return Weighed(cycles[0], cycles[1], cycles[1], float(pull[_VMPTRLD]))


def break_even(config: Config, drawn: Draws) -> tuple[float, float, float] | None:
    """Return the share of exits with a pull at which a lazy sync saves nothing: p05, p50, p95.

    None where nothing is ever pulled (enlightened VMCS), or a pull has no price.
    """
    _, pull = reader_and_pull_counts(config)
    if not pull.any() or unpriced_in(config, drawn):
        return None
    low, middle, high = np.quantile(weigh(config, drawn).break_even_rate, (0.05, 0.5, 0.95))
    return float(low), float(middle), float(high)


def _reads(pull: FloatArray, drawn: Draws) -> FloatArray:
    """Return the VMREADs of a pull with the instructions that their price includes."""
    reads = np.zeros(P)
    for column in _VMREADS:
        reads[column] = pull[column]
        reads[_SOFTWARE] += pull[column] * drawn.includes_instructions[column]
    return reads
