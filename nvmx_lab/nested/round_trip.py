"""A round trip in the steady state: what one L0 executes for a given sequence of operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nvmx_lab.nested.automaton import count
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace
from nvmx_lab.nested.ops import parse
from nvmx_lab.nested.primitives import COUNTERS


def round_trip(
    config: Config, operations: Sequence[str] = (), entry: str = "VMRESUME"
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Run one round trip of a CPUID exit twice and count the second.

    Parameters
    ----------
    config : Config
        The L0.
    operations : sequence of str
        What L1 does between the exit and its entry: ``"VMREAD GUEST_GS_BASE"``.
    entry : str
        ``"VMRESUME"`` or ``"VMLAUNCH"``.

    Returns
    -------
    leg, trip : float64[C]
        Counts of the exit leg and of the whole round trip, in `COUNTERS` order.

    Raises
    ------
    LabError
        If an operation is malformed or impossible.
    """
    l0 = Nvmx(config)
    l0.start()
    word = [parse(text) for text in ("EXIT CPUID", *operations, entry)]
    counts = np.zeros((len(word), len(COUNTERS)))
    for _ in range(2):  # the second finds the state that the first leaves
        for place, operation in enumerate(word):
            l0.trace = Trace()
            l0.apply(operation)
            counts[place] = count(l0.trace)
    return counts[0], counts.sum(axis=0)
