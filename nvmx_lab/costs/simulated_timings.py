"""Timings made by a program from known prices: what tries the import, and the protocol's example.

They are measurements of nothing. Their rows say ``simulated``, and so does every price of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import numpy as np

from nvmx_lab.costs.prices import FloatArray
from nvmx_lab.errors import unknown
from nvmx_lab.tables.schema import MEASUREMENTS

KNOWN: Final[Mapping[str, float]] = MappingProxyType(
    {
        "vmread_first": 41.0,
        "vmread_next": 11.0,
        "vmwrite_first": 47.0,
        "vmwrite_next": 13.0,
        "vmptrld": 210.0,
        "vmclear": 330.0,
        "transition": 1010.0,
        "vmptrld-cold": 690.0,
        "after_switch": 90.0,
    }
)
"""Known prices of the example, TSC cycles: on purpose those of no price list."""

SIZES: Final = (1, 2, 4, 8, 16, 35, 64)
"""The n of the protocol for VMREAD and VMWRITE."""

FEW: Final = (1, 2, 4)
"""The n of all others."""

OVERHEAD: Final = 62.0
_TSC_HZ: Final = 2_100_000_000
_BETWEEN, _WITHIN, _CELL = 0.01, 0.02, 0.001  # relative standard deviations


def timings(
    known: Mapping[str, float] = KNOWN,
    *,
    boots: int = 12,
    seed: int = 1,
    core_per_tsc: float = 1.0,
    clock: str = "TSC",
) -> str:
    """Return simulated timings as CSV text.

    Boots differ by 1 % (standard deviation), repetitions in a boot by about 2 %, the median of a
    stretch by 0.1 %; cycles are whole.

    Parameters
    ----------
    known : mapping of str to float
        Prices in TSC cycles, by the names of `KNOWN`; what is left out is not timed.
    boots, seed : int
        How many boots, and the seed.
    core_per_tsc : float
        The core's frequency by that of the TSC.
    clock : {"TSC", "core"}
        What counts the cycles.

    Raises
    ------
    LabError
        For a name that is not in `KNOWN`.
    """
    for name in known:
        if name not in KNOWN:
            raise unknown("known price", name, KNOWN)
    rng = np.random.default_rng(np.random.SeedSequence([seed, boots]))
    scale = core_per_tsc if clock == "core" else 1.0
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(MEASUREMENTS.columns)
    for boot in range(1, boots + 1):
        factor = 1 + _BETWEEN * rng.standard_normal()
        for primitive, sizes, cycles in _stretches(known):
            for n, net in zip(sizes, cycles, strict=True):
                middle = OVERHEAD + net * factor * (1 + _CELL * rng.standard_normal())
                spread = (middle * (1 - _WITHIN), middle, middle * (1 + 3 * _WITHIN))
                writer.writerow(
                    [
                        *("SIMULATED (no processor)", "none", _TSC_HZ),
                        *(round(_TSC_HZ * core_per_tsc), clock, "simulated", primitive, n, boot),
                        *(1000, *(max(round(scale * value), 1) for value in spread)),
                    ]
                )
    return text.getvalue()


def _stretches(known: Mapping[str, float]) -> list[tuple[str, Sequence[int], FloatArray]]:
    """Return what is timed: primitive, n, and the true TSC cycles without the overhead."""
    found: list[tuple[str, Sequence[int], FloatArray]] = [("overhead", (0,), np.zeros(1))]
    many, few = np.array(SIZES, dtype=np.float64), np.array(FEW, dtype=np.float64)
    for name in ("vmread", "vmwrite"):
        if f"{name}_first" in known:
            cycles = known[f"{name}_first"] + known[f"{name}_next"] * (many - 1)
            found += [(name, SIZES, cycles), (f"{name}-same-field", SIZES, cycles)]
    for name in ("vmptrld", "transition"):
        if name in known:
            found.append((name, FEW, known[name] * few))
    if "vmptrld-cold" in known:
        found.append(("vmptrld-cold", (1,), np.array([known["vmptrld-cold"]])))
    if {"vmclear", "vmptrld"} <= set(known):
        found.append(("vmclear-vmptrld", FEW, (known["vmclear"] + known["vmptrld"]) * few))
    if {"vmptrld", "transition", "after_switch"} <= set(known):
        both = known["vmptrld"] + known["transition"] + known["after_switch"]
        found.append(("vmptrld-transition", FEW, both * few))
    return found
