"""The model against its naive twin: whatever L0 defers, nobody outside may see it."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests import naive

from nvmx_lab import vmcs
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace, VmFail

LOOKS = 24  # fields that are read after each step; every eighth step reads all
POINTERS = ("A", "B", "C")
LAZY_POLICIES = ("lazy", "per-field", "oracle")

# Values for fields whose bits switch on features that the twin does not have; every other field
# takes any value of its width.
CONTROLS = {
    "PIN_BASED_VM_EXEC_CONTROL": (0x16, 0x1E),
    "CPU_BASED_VM_EXEC_CONTROL": (0x0401E172, 0x0401E1F2),  # no secondary controls
    "SECONDARY_VM_EXEC_CONTROL": (0, 1 << 6),
    "VM_ENTRY_CONTROLS": (
        naive.IA32E_MODE,
        naive.IA32E_MODE | naive.LOAD_BNDCFGS,
        naive.IA32E_MODE | naive.LOAD_BNDCFGS | 3,
    ),
    "VM_EXIT_CONTROLS": (0x200, 0x8200),  # nothing saved but what always is
    "GUEST_ACTIVITY_STATE": (0, 1),
    "VM_ENTRY_MSR_LOAD_COUNT": (0,),
    "VM_EXIT_MSR_LOAD_COUNT": (0,),
    "VM_EXIT_MSR_STORE_COUNT": (0,),
}

# Exit information that belongs to an exit of this reason; the rest is undefined after it.
INFORMATION = {
    "EXCEPTION_NMI": (
        "EXIT_QUALIFICATION",
        "VM_EXIT_INTR_INFO",
        "VM_EXIT_INTR_ERROR_CODE",
        "VM_EXIT_INSTRUCTION_LEN",
    ),
    "EXTERNAL_INTERRUPT": ("EXIT_QUALIFICATION",),
    "CPUID": ("EXIT_QUALIFICATION", "VM_EXIT_INSTRUCTION_LEN"),
    "HLT": ("EXIT_QUALIFICATION", "VM_EXIT_INSTRUCTION_LEN"),
    "CR_ACCESS": ("EXIT_QUALIFICATION", "VM_EXIT_INSTRUCTION_LEN"),
    "IO_INSTRUCTION": (
        "EXIT_QUALIFICATION",
        "VM_EXIT_INSTRUCTION_LEN",
        "VMX_INSTRUCTION_INFO",
        "GUEST_LINEAR_ADDRESS",
    ),
    "EPT_VIOLATION": ("EXIT_QUALIFICATION", "GUEST_PHYSICAL_ADDRESS", "GUEST_LINEAR_ADDRESS"),
}
PAGE_FAULT = 0x80000B0E  # valid, hardware exception with error code, vector 14

Step = tuple[str, str]  # operation, argument (empty if none)


class Difference(AssertionError):
    """The model and its twin do not agree."""


def configurations() -> list[Config]:
    """Every release with its own policy and every policy, each in each environment."""
    found = []
    for kvm in ("5.2", "5.2+patch13", "5.3", "5.8", "5.11", "6.1"):
        for sync in (None, "eager", *LAZY_POLICIES):
            for mpx in (True, False):
                found.append(Config.of(kvm, sync, shadow_vmcs=True, mpx=mpx))
                found.append(Config.of(kvm, sync, shadow_vmcs=False, mpx=mpx))
                found.append(Config.of(kvm, sync, evmcs=True, mpx=mpx))
    return found


class Pair:
    """The model and its twin, driven through the same steps and compared after each.

    Values are not drawn: every write gets one that was never used before, so that a stale one
    shows.
    """

    def __init__(self, config: Config, nvmx: type[Nvmx] = Nvmx) -> None:
        self.config, self.nvmx = config, nvmx
        self.model = nvmx(config)
        features = config.kvm.features
        self.twin: naive.Architecture
        if config.evmcs:
            self.twin = naive.EnlightenedArchitecture(saves_bndcfgs=config.mpx)
        else:
            self.twin = naive.Architecture(
                strips_access_rights="patch08" in features, saves_bndcfgs=config.mpx
            )
        version = config.kvm.shadow_version
        unpulled = vmcs.shadow_rw(version)
        if config.shadow_vmcs and "patch07" not in features:
            unpulled |= vmcs.shadow_ro(version)
        self.rare = naive.RareState(
            lazy=config.sync != "eager" and not config.evmcs,
            get_pulls="migration-sync" in features,
            unpulled=unpulled,
            per_field=config.sync == "per-field",
        )
        self.saved_state: tuple[object, dict[str, object]] | None = None
        self.writes = 0

    # Values and fields.

    def fields(self) -> tuple[str, ...]:
        """Return what L1 can touch: with an enlightened VMCS only what that has."""
        if self.config.evmcs:
            return tuple(n for n in naive.IN_VMCS12 if vmcs.field(n).evmcs_clean_group)
        return naive.IN_VMCS12 + naive.NOT_IN_VMCS12[:2]

    def value(self, name: str, *, by_l2: bool = False) -> int:
        """Return a new value that the field can hold."""
        self.writes += 1
        if name in CONTROLS:
            return CONTROLS[name][self.writes % len(CONTROLS[name])]
        bits = {"16": 16, "32": 32}.get(vmcs.field(name).width, 64)
        value = self.writes * 0x9E3779B97F4A7C15 >> (64 - bits) & (1 << bits) - 1
        if by_l2 and name in naive.ACCESS_RIGHTS:
            value &= naive.ACCESS_RIGHTS_MASK  # a processor has no other rights
        if by_l2 and name in naive.CONTROL_REGISTERS:
            owned = self.twin.page.fields.get(naive.CONTROL_REGISTERS[name], 0)
            value = (self.twin.l2[name] & owned) | (value & ~owned)  # else L2 exits to L1 instead
        if self.config.evmcs and name == "VM_ENTRY_INTR_INFO_FIELD":
            value &= ~naive.EVENT_VALID  # who clears it in the page is not described
        return value

    def l2_fields(self) -> tuple[str, ...]:
        """Return the state that L2 can change."""
        return tuple(name for name, value in self.twin.l2.items() if value is not None)

    # Which steps make sense, and which run into a bug that KVM really has.

    def allowed(self, step: Step) -> bool:
        operation, argument = step
        twin = self.twin
        if operation in ("l2_write", "nested_exit", "l0_exit"):
            return twin.in_l2 and (operation != "l2_write" or argument in self.l2_fields())
        if operation == "restore":
            return self.saved_state is not None
        if operation in ("migrate", "save"):
            # Bug 9.1: before 5.11 the state of an L1 that runs is taken without pulling.
            lost = self.rare.stale and not self.rare.outlived and not self.rare.get_pulls
            if not twin.in_l2 and twin.pointer is not None and lost:
                return False
            return twin.in_l2 or not self.spoils("get_nested_state")
        if twin.in_l2:
            return False
        if operation == "vmxon":
            return not twin.on
        if not twin.on:
            return False
        if self.config.evmcs:
            # One enlightened VMCS, no instruction on it; VMLAUNCH and VMRESUME as a hypervisor uses
            # them, because what the wrong one does is not described.
            match operation:
                case "vmptrld":
                    return twin.pointer is None
                case "evmcs_write":
                    return twin.pointer is not None and argument in self.fields()
                case "vmlaunch" | "vmresume":
                    wanted = "vmresume" if twin.page.launched else "vmlaunch"
                    return twin.pointer is not None and operation == wanted
            return False
        if operation == "evmcs_write":
            return False
        return not self.spoils(operation, argument)

    def spoils(self, operation: str, argument: str = "") -> bool:
        """Return whether the step pulls from a vmcs02 that is gone: bug 9.9, in every lazy release."""
        return self.rare.outlived and self.rare.pulls(
            operation, argument, current=self.twin.pointer
        )

    # Steps.

    def apply(self, step: Step) -> None:
        operation, argument = step
        twin, model, rare = self.twin, self.model, self.rare
        if operation in ("l1_vmwrite", "evmcs_write", "l2_write"):
            value = self.value(argument, by_l2=operation == "l2_write")
            results = [getattr(x, operation)(argument, value) for x in (twin, model)]
        elif operation == "nested_exit":
            info = {name: self.value(name) for name in INFORMATION[argument]}
            info["VM_EXIT_REASON"] = naive.EXIT_REASONS[argument]
            if argument == "EXCEPTION_NMI":
                info["VM_EXIT_INTR_INFO"] = PAGE_FAULT
            results = [x.nested_exit(argument, info) for x in (twin, model)]
        elif operation == "save":
            self.saved_state = (model.get_nested_state(), twin.get_nested_state())
            results = []
        elif operation == "restore":
            assert self.saved_state is not None
            model.set_nested_state(self.saved_state[0])
            rare.freed(in_l2=twin.in_l2)
            twin.set_nested_state(self.saved_state[1])
            results = []
        elif operation == "migrate":
            self.model = self.nvmx(self.config)
            self.model.set_nested_state(model.get_nested_state())
            results = []
        else:
            arguments = (argument,) if argument else ()
            results = [getattr(x, operation)(*arguments) for x in (twin, model)]
        if results:
            self.same(f"{operation} {argument}", *results)
        self.model.trace = Trace()  # costs are not compared here, and a copy need not carry them
        self.track(step)

    def track(self, step: Step) -> None:
        """Keep `RareState` up to date; it only decides what `allowed` excludes."""
        operation, argument = step
        rare, twin = self.rare, self.twin
        if operation == "nested_exit":
            rare.nested_exit()
        elif operation == "vmxoff":
            rare.freed()
        elif operation == "migrate":
            rare.pulled()  # a new vCPU has no flag
        elif operation == "save" and twin.in_l2:
            rare.pulled()
        elif operation == "save":
            if rare.pulls("get_nested_state", current=twin.pointer):
                rare.pulled()
        elif argument not in naive.NOT_IN_VMCS12 and rare.pulls(
            operation, argument, current=self.before
        ):
            if not (operation == "l1_vmread" and rare.per_field):
                rare.pulled()
        if twin.in_l2:
            rare.entered()
        self.before = twin.pointer

    before: str | None = None  # the current VMCS before the step

    # Comparison.

    def same(self, what: str, want: object, got: object) -> None:
        if isinstance(got, VmFail):
            got = naive.Fail(got.number)
        if want is None and isinstance(got, int):
            return  # undefined
        if want != got:
            raise Difference(f"{what}: the architecture says {want!r}, the model {got!r}")

    def compare(self, first: int = 0, count: int = 1000) -> None:
        """Compare what can be seen now, on copies: to look is to pull.

        Parameters
        ----------
        first, count : int
            Where to start in the list of L1's fields, and how many to look at: a trapping VMREAD is
            slow to simulate. The first rare one decides what is pulled.
        """
        twin, model = copy.deepcopy((self.twin, self.model))
        if twin.in_l2:
            for name in self.l2_fields():
                self.same(f"L2's {name}", twin.l2_read(name), model.l2_read(name))
            for side in (twin, model):
                side.nested_exit("CPUID", {"VM_EXIT_REASON": 10, "EXIT_QUALIFICATION": 7})
        if twin.pointer is None and self.config.evmcs:
            return
        if not twin.on:
            return
        read = "evmcs_read" if self.config.evmcs else "l1_vmread"
        names = self.fields()
        turned = names[first % len(names) :] + names[: first % len(names)]
        for name in turned[:count]:
            if not (name in naive.RARE and self.rare.outlived):
                self.same(f"{read} {name}", getattr(twin, read)(name), getattr(model, read)(name))


def run(config: Config, steps: list[Step], nvmx: type[Nvmx] = Nvmx) -> Pair:
    """Run the steps that are allowed, comparing after each."""
    pair = Pair(config, nvmx)
    for number, step in enumerate(steps):
        if pair.allowed(step):
            try:
                pair.apply(step)
                pair.compare(first=number * 37, count=LOOKS if number % 8 else 1000)
            except Difference as difference:
                done = "; ".join(" ".join(s).strip() for s in steps[: number + 1])
                raise Difference(f"{difference} [{config}: {done}]") from None
    return pair


# Steps at random. One table for hypothesis and for the seeded walks.

FIELD_CLASSES = (
    naive.RARE,
    tuple(sorted(vmcs.shadow_rw("5.3"))),
    tuple(sorted(vmcs.shadow_ro("5.3"))),
    ("GUEST_CS_AR_BYTES", "GUEST_SS_AR_BYTES", "VM_ENTRY_CONTROLS", "GUEST_SYSENTER_ESP"),
    naive.IN_VMCS12 + naive.NOT_IN_VMCS12,
)
OPERATIONS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    ("l1_vmread", FIELD_CLASSES),
    ("l1_vmwrite", FIELD_CLASSES),
    ("evmcs_write", FIELD_CLASSES[:3]),
    ("l2_write", (naive.RARE, naive.SAVED_AT_EXIT)),
    ("l2_write", (naive.RARE, naive.SAVED_AT_EXIT)),
    ("vmlaunch", ()),
    ("vmresume", ()),
    ("vmresume", ()),
    ("nested_exit", (tuple(INFORMATION),)),
    ("nested_exit", (tuple(INFORMATION),)),
    ("l0_exit", (("EXTERNAL_INTERRUPT",),)),
    ("vmptrld", (POINTERS,)),
    ("vmclear", (POINTERS,)),
    ("vmxon", ()),
    ("vmxoff", ()),
    ("migrate", ()),
    ("save", ()),
    ("restore", ()),
)


def walk(seed: int, length: int) -> list[Step]:
    """Return the same steps for the same seed."""
    rng = random.Random(seed)
    steps: list[Step] = [("vmxon", ""), ("vmptrld", "A"), ("vmlaunch", "")]
    for _ in range(length):
        operation, classes = rng.choice(OPERATIONS)
        steps.append((operation, rng.choice(rng.choice(classes)) if classes else ""))
    return steps
