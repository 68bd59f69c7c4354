"""Straight paths of L0: the VMX and MSR instructions that a named part of KVM executes, in order.

The mechanism (which part runs when) is in `nvmx_lab.nested.model`; what a part executes is in
``data/l0_paths.csv``, and how many instructions a stretch of L0 retires in ``data/l0_lengths.csv``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError

INSTRUCTIONS = (
    *("VMREAD", "VMWRITE", "VMPTRLD", "VMCLEAR", "RDMSR", "WRMSR", "INVEPT"),
    *("IBPB", "HOST_STATE_SWITCH"),
)
"""What a row of the table may execute; the last two are costs of a switch, not one instruction."""


class Access(NamedTuple):
    """One instruction that L0 executed: what, on which field (empty if none), in which function."""

    op: str
    field: str
    function: str


class Row(NamedTuple):
    """One row of ``l0_paths.csv``: the accesses, whether they copy vmcs12, and their condition.

    `not_in_logs`: KVM as it was logged does not execute them, so its lengths are without them.
    """

    accesses: tuple[Access, ...]
    copies_vmcs12: bool
    condition: tuple[str, ...]
    not_in_logs: bool = False


class Length(NamedTuple):
    """One row of ``l0_lengths.csv``: retired instructions of a stretch under a condition."""

    condition: tuple[str, ...]
    instructions: float


@functools.cache
def paths() -> Mapping[str, tuple[Row, ...]]:
    """Return the rows of every path, in order.

    Raises
    ------
    LabError
        If a row names an unknown instruction or field.
    """
    table: dict[str, list[Row]] = {}
    file = data.path("l0_paths.csv")
    for line, row in enumerate(data.read_rows(file), start=2):
        if row["op"] not in INSTRUCTIONS:
            raise LabError("unknown instruction", where=f"{file}:{line}", got=row["op"])
        names: list[str] = []
        for name in row["fields"].split():
            # "*5": five accesses whose fields the log of that run does not name.
            names += [""] * int(name[1:]) if name.startswith("*") else [vmcs.field(name).name]
        accesses = tuple(Access(row["op"], name, row["function"]) for name in names or [""])
        table.setdefault(row["path"], []).append(
            Row(accesses, row["copy"] == "vmcs12", tuple(row["condition"].split()))
        )
    return {path: tuple(rows) for path, rows in table.items()}


@functools.cache
def lengths() -> Mapping[str, tuple[Length, ...]]:
    """Return the lengths of every stretch; the first row whose condition holds counts."""
    table: dict[str, list[Length]] = {}
    for row in data.read_rows(data.path("l0_lengths.csv")):
        table.setdefault(row["stretch"], []).append(
            Length(tuple(row["condition"].split()), float(row["instructions"]))
        )
    return {stretch: tuple(rows) for stretch, rows in table.items()}
