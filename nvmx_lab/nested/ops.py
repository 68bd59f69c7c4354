"""Operations: what the outside does to L0's nested VMX, one word each.

An operation is a kind and, for some kinds, an argument: ``VMREAD GUEST_CS_BASE``, ``EXIT CPUID``.
A stream (`nvmx_lab.workload.streams`) is a sequence of them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from nvmx_lab.errors import LabError, unknown


class Kind(StrEnum):
    """Kinds of operation. The comment says what the argument is."""

    EXIT = "EXIT"  # basic exit reason of an L2 exit that L0 reflects to L1
    L0_EXIT = "L0_EXIT"  # basic exit reason of an L2 exit that L0 handles itself
    L1_EXIT = "L1_EXIT"  # basic exit reason of an L1 exit that L0 handles for L1
    VMREAD = "VMREAD"  # field
    VMWRITE = "VMWRITE"  # field; in a stream every VMWRITE changes the value
    VMLAUNCH = "VMLAUNCH"
    VMRESUME = "VMRESUME"
    VMPTRLD = "VMPTRLD"  # "same" or "other" (than the current VMCS)
    VMCLEAR = "VMCLEAR"  # "current" or "other"
    VMXON = "VMXON"
    VMXOFF = "VMXOFF"
    GET_NESTED_STATE = "GET_NESTED_STATE"
    SET_NESTED_STATE = "SET_NESTED_STATE"
    L2_MODE = "L2_MODE"  # "long", "legacy", "efer-host", "xapic" or "x2apic": see Nvmx.l2_mode


WITH_ARGUMENT = frozenset(
    {Kind.EXIT, Kind.L0_EXIT, Kind.L1_EXIT, Kind.VMREAD, Kind.VMWRITE, Kind.VMPTRLD}
    | {Kind.VMCLEAR, Kind.L2_MODE}
)


class Operation(NamedTuple):
    """One operation; ``str()`` and `parse` are inverse."""

    kind: Kind
    arg: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.arg}" if self.arg else str(self.kind)


def parse(text: str) -> Operation:
    """Read an operation from its text, ``"VMREAD GUEST_RIP"``.

    Raises
    ------
    LabError
        If the kind is unknown, or an argument is missing or too many.
    """
    word, _, arg = text.strip().partition(" ")
    try:
        kind = Kind(word)
    except ValueError:
        raise unknown(
            "operation", word, [str(k) for k in Kind], where=f"operation {text!r}"
        ) from None
    arg = arg.strip()
    if bool(arg) != (kind in WITH_ARGUMENT) or " " in arg:
        need = "one argument" if kind in WITH_ARGUMENT else "no argument"
        raise LabError(f"{kind} takes {need}", where=f"operation {text!r}", got=arg or "nothing")
    return Operation(kind, arg)
