"""The naive twin: what nested VMX must do, with no mechanism at all.

`Architecture` is the brute-force specification. It knows no vmcs01, vmcs02, shadow VMCS, dirty bit
or lazy flag: a VMCS is a dict, a VM entry loads L2's state from it, a VM exit stores all of that
state back. Whatever L0 does to be fast, L1, L2 and the target of a migration must not be able to
tell.

`RareState` and `naive_counts` are the other half: the few facts about the mechanism that are
stated as rules or as numbers, so that a test can say when the flag must be set and what a step
must cost.

Nothing here comes from `nvmx_lab.nested`; only the catalogue of fields is shared.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from nvmx_lab import vmcs

IN_VMCS12 = tuple(name for name, entry in vmcs.catalogue().items() if entry.in_vmcs12)
NOT_IN_VMCS12 = tuple(name for name, entry in vmcs.catalogue().items() if not entry.in_vmcs12)
RARE = tuple(name for name in IN_VMCS12 if vmcs.field(name).rare)
EXIT_INFORMATION = tuple(
    name for name in IN_VMCS12 if vmcs.field(name).group == "exit-info(read-only)"
)
ACCESS_RIGHTS = tuple(name for name in IN_VMCS12 if name.endswith("_AR_BYTES"))

# What a VM exit saves unconditionally (SDM volume 3, "Saving Guest State"), as far as vmcs12 has
# it. BNDCFGS is among the rare fields; it is saved where L0 and L1 have MPX, see `Architecture`.
SAVED_AT_EXIT = (
    *(name for name in RARE if name != "GUEST_BNDCFGS"),
    "GUEST_CS_AR_BYTES",
    "GUEST_SS_AR_BYTES",
    "GUEST_CR0",
    "GUEST_CR3",
    "GUEST_CR4",
    "GUEST_RSP",
    "GUEST_RIP",
    "GUEST_RFLAGS",
    "GUEST_INTERRUPTIBILITY_INFO",
    "GUEST_SYSENTER_CS",
    "GUEST_SYSENTER_ESP",
    "GUEST_SYSENTER_EIP",
)

# Control register -> the field with the bits of it that L1 owns.
CONTROL_REGISTERS = {"GUEST_CR0": "CR0_GUEST_HOST_MASK", "GUEST_CR4": "CR4_GUEST_HOST_MASK"}

ACCESS_RIGHTS_MASK = 0x1F0FF
EVENT_VALID = 1 << 31
IA32E_MODE = 1 << 9  # of the VM-entry controls
LOAD_BNDCFGS = 1 << 16

# Basic exit reasons, SDM volume 3, appendix C.
EXIT_REASONS = {
    "EXCEPTION_NMI": 0,
    "EXTERNAL_INTERRUPT": 1,
    "CPUID": 10,
    "HLT": 12,
    "CR_ACCESS": 28,
    "IO_INSTRUCTION": 30,
    "EPT_VIOLATION": 48,
}


class Fail(NamedTuple):
    """VMfailValid with its number, or VMfailInvalid (None)."""

    number: int | None


@dataclass
class Page:
    """One VMCS in guest memory: fields (absent is 0, None is undefined) and launch state."""

    fields: dict[str, int | None] = field(default_factory=dict)
    launched: bool = False


class Architecture:
    """L1's VMCSs and L2's state, everything copied at once and nothing deferred.

    Where the architecture leaves freedom this does what KVM's emulation does: the current VMCS is
    held by the processor and reaches guest memory at VMCLEAR or at VMPTRLD of another; VMXOFF
    forgets it.

    Parameters
    ----------
    strips_access_rights : bool
        Whether VMWRITE drops the reserved bits of access rights, as some CPUs and KVM since 5.3 do.
    saves_also : tuple of str
        State besides `SAVED_AT_EXIT` that a VM entry loads and a VM exit saves: BNDCFGS with MPX,
        the PDPTEs of an L2 with PAE paging, the interrupt status with virtual-interrupt delivery.
    """

    def __init__(
        self, *, strips_access_rights: bool = True, saves_also: tuple[str, ...] = ()
    ) -> None:
        self.strips_access_rights = strips_access_rights
        self.saved = SAVED_AT_EXIT + saves_also
        self.memory: dict[str, Page] = {}
        self.on = False
        self.pointer: str | None = None  # the current VMCS
        self.page = Page()  # its content
        self.in_l2 = False
        self.l2: dict[str, int | None] = {}

    # What L1 does.

    def vmxon(self) -> None:
        self.on, self.pointer = True, None

    def vmxoff(self) -> None:
        self.on, self.pointer = False, None

    def _write_back(self) -> None:
        if self.pointer is not None:
            self.memory[self.pointer] = self.page
        self.pointer = None

    def vmptrld(self, pointer: str) -> None:
        if pointer != self.pointer:
            self._write_back()
            self.pointer, self.page = pointer, copy.deepcopy(self.memory.get(pointer, Page()))

    def vmclear(self, pointer: str) -> None:
        if pointer == self.pointer:
            self._write_back()
        self.memory.setdefault(pointer, Page()).launched = False

    def _fail(self, number: int) -> Fail:
        self.page.fields["VM_INSTRUCTION_ERROR"] = number
        return Fail(number)

    def l1_vmread(self, name: str) -> int | Fail | None:
        if self.pointer is None:
            return Fail(None)
        if name not in IN_VMCS12:
            return self._fail(12)
        return self.page.fields.get(name, 0)

    def l1_vmwrite(self, name: str, value: int) -> Fail | None:
        if self.pointer is None:
            return Fail(None)
        if name not in IN_VMCS12:
            return self._fail(12)
        if self.strips_access_rights and name in ACCESS_RIGHTS:
            value &= ACCESS_RIGHTS_MASK
        self.page.fields[name] = value
        return None

    def vmlaunch(self) -> Fail | None:
        if self.pointer is None:
            return Fail(None)
        if self.page.launched:
            return self._fail(4)
        return self._enter()

    def vmresume(self) -> Fail | None:
        if self.pointer is None:
            return Fail(None)
        if not self.page.launched:
            return self._fail(5)
        return self._enter()

    def _enter(self) -> None:
        self.page.launched = True
        self.in_l2 = True
        self.l2 = {name: self.page.fields.get(name, 0) for name in self.saved}
        if "GUEST_BNDCFGS" in self.l2 and not self._entry_control(LOAD_BNDCFGS):
            self.l2["GUEST_BNDCFGS"] = None  # L2 keeps L1's, and L1's registers are not modelled

    def _entry_control(self, bit: int) -> bool:
        return bool((self.page.fields.get("VM_ENTRY_CONTROLS", 0) or 0) & bit)

    # What L2 does.

    def l2_write(self, name: str, value: int) -> None:
        self.l2[name] = value

    def l2_read(self, name: str) -> int | None:
        return self.l2[name]

    def l0_exit(self, reason: str) -> None:
        pass

    def nested_exit(self, info: dict[str, int]) -> None:
        fields = self.page.fields
        fields.update(self.l2)
        if not self._entry_control(IA32E_MODE):
            fields["VM_ENTRY_CONTROLS"] = None  # the bit follows L2's mode, which is not modelled
        # HLT is the processor's own business: after an entry in it L1 may find either state.
        if fields.get("GUEST_ACTIVITY_STATE", 0) != 0:
            fields["GUEST_ACTIVITY_STATE"] = None
        # Exit information that does not belong to the exit is undefined; a VMfail's number stays.
        for name in EXIT_INFORMATION:
            if name != "VM_INSTRUCTION_ERROR":
                fields[name] = info.get(name)
        event = fields.get("VM_ENTRY_INTR_INFO_FIELD", 0)
        fields["VM_ENTRY_INTR_INFO_FIELD"] = event & ~EVENT_VALID
        self.in_l2 = False

    # What the user of L0 does: a migration moves everything, guest memory included.

    def get_nested_state(self) -> dict[str, object]:
        return copy.deepcopy(vars(self))

    def set_nested_state(self, state: dict[str, object]) -> None:
        vars(self).update(copy.deepcopy(state))


class EnlightenedArchitecture(Architecture):
    """The same for an L1 with an enlightened VMCS: its VMCS is plain memory."""

    def __init__(self, *, saves_also: tuple[str, ...] = ()) -> None:
        super().__init__(strips_access_rights=False, saves_also=saves_also)

    def evmcs_write(self, name: str, value: int) -> None:
        self.page.fields[name] = value

    def evmcs_read(self, name: str) -> int | None:
        return self.page.fields.get(name, 0)


@dataclass
class RareState:
    """When vmcs12's rare fields are stale: the table of triggers, one case per row.

    Parameters
    ----------
    lazy : bool
        Whether rare fields stay in vmcs02 at a nested exit (any policy but eager, and no eVMCS).
    get_pulls : bool
        Whether KVM_GET_NESTED_STATE pulls while L1 runs (fixed in 5.11).
    unpulled : frozenset of str
        Fields whose VMWRITE does not pull: the RW-shadowed ones; before patch 07 with a shadow VMCS
        the RO-shadowed ones too, because it does not even exit; those that vmcs12 lacks, if L0
        looks at that first.
    per_field : bool
        Whether a VMREAD fetches only its own field and so leaves the flag set.
    foresees : bool
        Whether an exit after which L1 will need a rare field (``+pull``) syncs at once.
    resets : bool
        Whether the flag goes with the vmcs02 it speaks of: a mend that no release has.
    """

    lazy: bool
    get_pulls: bool
    unpulled: frozenset[str]
    per_field: bool = False
    foresees: bool = False
    resets: bool = False
    stale: bool = False
    outlived: bool = False  # the flag is set, but the vmcs02 it spoke of is gone

    def pulls(self, operation: str, argument: str, *, current: str | None) -> bool:
        """Return whether L0 pulls for the operation, were the flag set (L1 runs)."""
        if current is None:
            return False
        match operation:
            case "l1_vmread":
                return argument in RARE
            case "l1_vmwrite":
                return argument not in self.unpulled
            case "vmclear":
                return argument == current
            case "vmptrld":
                return argument != current
            case "save":
                return self.get_pulls
        return False

    def step(
        self, operation: str, argument: str, *, current: str | None, was_in_l2: bool, in_l2: bool
    ) -> None:
        """Follow a step; `current` and `was_in_l2` are from before it, `in_l2` from after."""
        match operation:
            case "nested_exit":
                self.stale = self.lazy and not (self.foresees and argument.endswith("+pull"))
            case "save" if was_in_l2:
                self.stale = False  # both readers run, since vmcs02 is loaded
            case "migrate":
                self.stale = self.outlived = False  # a new vCPU
            case "restore":
                # Leaving L2 by force is an exit without a reason: the flag is set, vmcs02 goes.
                self.stale = (self.stale or (was_in_l2 and self.lazy)) and not self.resets
                self.outlived = self.stale
            case "vmxoff":
                self.stale = self.stale and not self.resets
                self.outlived = self.stale
            case "l1_vmread" if self.per_field:
                pass
            case _ if self.pulls(operation, argument, current=current):
                self.stale = False
        if in_l2:
            # vmcs02 was filled from vmcs12 (VMPTRLD or the restore made it dirty): what the flag
            # says is true again.
            self.outlived = False


# Numbers that the descriptions of the mechanism state, one line per statement. x86-64, EPT on.

_RELEASES = ("5.2", "5.2+patch13", "5.3", "5.8", "5.11", "6.1")


def at_least(kvm: str, release: str) -> bool:
    """Return whether `kvm` is `release` or newer."""
    kvm = kvm.removesuffix("+ibpb")
    return _RELEASES.index(kvm) >= _RELEASES.index(release)


def rare_reads(kvm: str, *, mpx: bool) -> int:
    """Return the VMREADs of the rare reader: 36, without BNDCFGS 35 (no MPX, or 6.0 and later)."""
    return 36 if mpx and not at_least(kvm, "6.1") else 35


def naive_counts(kvm: str, what: str, *, mpx: bool = True) -> Counter[str]:
    """Return how many instructions one step executes.

    Those are ``vmread``, ``vmwrite``, ``vmptrld``, ``vmclear``, ``rdmsr`` and ``ibpb``.

    `what` is a part of an operation:

    ``"pull"``
        vmcs02 in, every rare field, vmcs01 in.
    ``"eager exit instead of lazy"``
        Only the reads, since vmcs02 is loaded.
    ``"copy_shadow_to_vmcs12"``, ``"copy_vmcs12_to_shadow"``
        Shadow VMCS in, its fields, VMCLEAR, the VMCS from before in. All features that make fields
        shadowed are taken as present.
    ``"mirror of a RO-shadowed VMWRITE"``
        The same for one field.
    """
    match what:
        case "pull":
            # Until 5.8 each of the two switches is a full load: DEBUGCTL is read, IBPB if in use.
            heavy = 0 if at_least(kvm, "5.8") else 2
            return +Counter(
                vmread=rare_reads(kvm, mpx=mpx),
                vmptrld=2,
                rdmsr=heavy,
                ibpb=heavy if kvm.endswith("+ibpb") else 0,
            )
        case "eager exit instead of lazy":
            return Counter(vmread=rare_reads(kvm, mpx=mpx))
        case "copy_shadow_to_vmcs12":
            fields = 24 if at_least(kvm, "5.3") else 34
            return Counter(vmread=fields, vmptrld=2, vmclear=1)
        case "copy_vmcs12_to_shadow":
            fields = 35 if at_least(kvm, "5.3") else 34
            return Counter(vmwrite=fields, vmptrld=2, vmclear=1)
        case "mirror of a RO-shadowed VMWRITE":
            return Counter(vmwrite=1, vmptrld=2, vmclear=1)
    raise ValueError(what)


# Whole legs as real KVM 6.1 executed them (medians of the logged runs, one CPUID round trip).
EXECUTED_61 = {
    "exit, lazy": Counter(vmread=21, vmwrite=90, vmptrld=3, vmclear=1),
    "exit, eager": Counter(vmread=56, vmwrite=90, vmptrld=3, vmclear=1),
    # Exit leg, L1's RDMSR and its VMRESUME together.
    "round trip, eVMCS": Counter(vmread=72, vmwrite=95, vmptrld=2),
    "VMRESUME, clean": Counter(vmread=31, vmwrite=27, vmptrld=3, vmclear=1),
    "VMRESUME, dirty": Counter(vmread=31, vmwrite=84, vmptrld=3, vmclear=1),
    "VMREAD": Counter(vmread=12, vmwrite=2),
    "VMREAD, pull": Counter(vmread=47, vmwrite=2, vmptrld=2),
    "RDMSR": Counter(vmread=9, vmwrite=1),
}

# VMREADs inside the exit's sync: releases as their descriptions state them, with and without MPX.
EXIT_SYNC_READS = {
    ("5.2", True): 55,
    ("5.2", False): 54,
    ("5.2+patch13", True): 19,
    ("5.2+patch13", False): 19,
    ("5.3", True): 15,
    ("5.3", False): 15,
}
