"""Published cycle claims, each with the instruction counts that it is about.

Where the model has the mechanism, the counts are those of a model run; only where it has not are
they typed in ``data/claims.csv``. A claim's error is assumed: none of them publishes one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from nvmx_lab import data
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.automaton import count
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.nested.round_trip import round_trip

FloatArray = npt.NDArray[np.float64]
Role = Literal["target", "fit", "check", "hold-out"]
Bound = Literal["about", "at least", "no number"]

PARTS: Final = (
    *("exit leg", "round trip", "copy_shadow_to_vmcs12", "copy_vmcs12_to_shadow"),
    "dirty entry",
)
"""What of L0's work a claim is about."""

TARGET: Final = "A"
"""The patch itself."""

_P = len(PRIMITIVES)
_NAMES = tuple(PRIMITIVES)


@dataclass(frozen=True)
class Claim:
    """A published number of cycles.

    Attributes
    ----------
    id, description, detail, per : str
        What is claimed, and per what.
    role : {"target", "fit", "check", "hold-out"}
        What it is used for; see ``data/README.md``.
    bound : {"about", "at least", "no number"}
        How the number is meant.
    cycles : float
        TSC cycles; NaN without a number.
    sd : float
        Assumed standard deviation of the number, TSC cycles; NaN if none is assumed.
    counts : float64[P] or None
        How often each primitive happens, in `PRIMITIVES` order; None where nothing predicts it.
    basis : {"simulated", "assumed", ""}
        Where the counts are from: a model run, or typed.
    note : str
        What the counts are, or why there are none.
    microarchitecture, source : str
        On what, and who said so.
    year : int
    """

    id: str
    description: str
    detail: str
    per: str
    role: Role
    bound: Bound
    cycles: float
    sd: float
    counts: FloatArray | None = field(repr=False)
    basis: Literal["simulated", "assumed", ""]
    note: str = field(repr=False)
    microarchitecture: str = field(repr=False)
    year: int = field(repr=False)
    source: str = field(repr=False)


@functools.cache
def claims() -> dict[str, Claim]:
    """Return every claim by its id, in the order of the table."""
    return {row["id"]: _claim(row) for row in data.read_rows("claims.csv")}


def claim(name: str) -> Claim:
    """Return one claim.

    Raises
    ------
    LabError
        If there is none of this id.
    """
    known = claims()
    if name not in known:
        raise unknown("claim", name, known)
    return known[name]


def _claim(row: dict[str, str]) -> Claim:
    counts = _counts(row)
    return Claim(
        id=row["id"],
        description=row["description"],
        detail=row["detail"],
        per=row["per"],
        role=row["role"],  # type: ignore[arg-type] # one of them, or the check of tables says so
        bound=row["bound"],  # type: ignore[arg-type]
        cycles=float(row["claimed_cycles"] or "nan"),
        sd=float(row["observation_sd_cycles"] or "nan"),
        counts=counts,
        basis="" if counts is None else "simulated" if row["model_part"] else "assumed",
        note=row["counts_note"],
        microarchitecture=row["microarchitecture"],
        year=int(row["year"]),
        source=f"{row['source']}, {row['source_ref']}".rstrip(", "),
    )


def _counts(row: dict[str, str]) -> FloatArray | None:
    """Return the counts of a claim: of the model run, or as typed; None if it has neither."""
    part, where = row["model_part"], f"claims.csv: {row['id']}"
    if part == "dirty entry":
        return _dirty_entry(row["model_before"])
    if part:
        operations = tuple(filter(None, row["model_operations"].split("; ")))
        before, after = (_of(row[f"model_{end}"], part, operations) for end in ("before", "after"))
        return before - after
    if not row["counts"]:
        return None
    counts = np.zeros(_P)
    for word in row["counts"].split():
        name, _, number = word.partition("=")
        if name not in PRIMITIVES:
            raise unknown("primitive", name, PRIMITIVES, where=where)
        counts[_NAMES.index(name)] = float(number)
    return counts


def _of(kvm: str, part: str, operations: tuple[str, ...]) -> FloatArray:
    """Return the counts of a part of L0's work, float64[P]."""
    config = Config.of(kvm)
    if part in ("exit leg", "round trip"):
        leg, trip = round_trip(config, operations)
        return (leg if part == "exit leg" else trip)[:_P]
    l0 = Nvmx(config)
    l0.start()
    l0.nested_exit("CPUID")
    l0.trace = Trace()
    match part:
        case "copy_shadow_to_vmcs12":
            l0.copy_shadow_to_vmcs12()
        case "copy_vmcs12_to_shadow":
            l0.copy_vmcs12_to_shadow()
        case _:
            raise LabError("not a part of L0's work", got=part, allowed=", ".join(PARTS))
    return count(l0.trace)[:_P]


def _dirty_entry(kvm: str) -> FloatArray:
    """Return what a nested entry with a dirty vmcs12 executes more than one with a clean."""
    trips = []
    for dirty in (True, False):
        l0 = Nvmx(Config.of(kvm))
        l0.start()
        l0.nested_exit("CPUID")
        l0.control = l0.control._replace(dirty_vmcs12=dirty)
        l0.trace = Trace()
        l0.vmresume()
        trips.append(count(l0.trace)[:_P])
    difference: FloatArray = trips[0] - trips[1]
    return difference
