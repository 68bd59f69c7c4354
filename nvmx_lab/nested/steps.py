"""Steps: everything that can happen to L0 from outside, for the model and the architecture alike.

Richer than the operations of a stream (`nvmx_lab.nested.ops`): L2 changes its state, entries fail,
user space migrates, two VMCS regions have names. A step is a word and an argument, ``VMREAD
GUEST_GS_BASE``; a sequence of them is what a counterexample consists of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from nvmx_lab import data, vmcs
from nvmx_lab.errors import unknown
from nvmx_lab.nested.architecture import Architecture, Fail, Standing, role
from nvmx_lab.nested.model import EXIT_INFO, VM_FAIL_FIELD, NestedState, Nvmx, VmFail

POINTERS: Final = ("A", "B")
ENTRY_FAILURE: Final = ("VM_EXIT_REASON", "EXIT_QUALIFICATION")
"""Exit information that the exit of a failed entry writes."""

ENTRIES: Final = ("", "fails:controls", "fails:guest-state", "fails:msr-load", "halted")
SHAPES: Final = ("off", "on", "L1", "L2")
FORESEEN: Final = ("CPUID", "HLT")
USUAL_REASONS: Final = ("CPUID", "HLT", "IO_INSTRUCTION", "EPT_MISCONFIG", "EXTERNAL_INTERRUPT")
AT_EXIT, AT_ENTRY = "at exit", "at entry"
"""When the CPU takes a field without an instruction of L1 or L2: see `takes`."""

FIELD: Final = "field"
REASON: Final = "exit reason"

ARGUMENTS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "VMXON": (),
        "VMXOFF": (),
        "VMPTRLD": POINTERS,
        "VMCLEAR": POINTERS,
        "VMREAD": (FIELD,),
        "VMWRITE": (FIELD,),
        "EVMCS_READ": (FIELD,),
        "EVMCS_WRITE": (FIELD,),
        "VMLAUNCH": ENTRIES,
        "VMRESUME": ENTRIES,
        "L2_READ": (FIELD,),
        "L2_WRITE": (FIELD,),
        "EXIT": (REASON, *(f"{reason}+pull" for reason in FORESEEN), "CPUID+signal"),
        "RUN": (),
        "L0_EXIT": ("EPT_VIOLATION",),
        "L1_EXIT": ("RDMSR",),
        "SMI": (),
        "RSM": (),
        "GET_NESTED_STATE": (),
        "SET_NESTED_STATE": SHAPES,
        "MIGRATE": (),
    }
)
"""Word -> what its argument may be; `FIELD` and `REASON` stand for any VMCS field or exit reason.

``EXIT HLT+pull`` tells a policy that knows the future that L1 will need a rare field. After
``EXIT CPUID+signal`` L0 is in its user space before it enters L1, which ``RUN`` does.
``SET_NESTED_STATE L1`` restores a state in which L1 runs and A is its current VMCS, ``L2`` one in
which L2 runs, ``on`` one without a current VMCS, ``off`` one without VMX; what it restores differs
from all that was there. ``MIGRATE`` takes the state and goes on in a new vCPU.
"""


class Step(NamedTuple):
    """One step; ``str()`` and `parse` are inverse."""

    word: str
    arg: str = ""

    def __str__(self) -> str:
        return f"{self.word} {self.arg}".rstrip()


def parse(text: str) -> Step:
    """Read a step from its text.

    Raises
    ------
    LabError
        If the word or its argument is unknown.
    """
    where = f"step {text!r}"
    word, _, arg = text.strip().partition(" ")
    arg = arg.strip()
    if word not in ARGUMENTS:
        raise unknown("step", word, ARGUMENTS, where=where)
    allowed = _arguments(word, exit_reasons())
    if allowed == (FIELD,):
        return Step(word, vmcs.field(arg).name)
    if arg not in (allowed or ("",)):
        raise unknown(f"argument of {word}", arg, allowed or ("(none)",), where=where)
    return Step(word, arg)


def steps(fields: Collection[str], reasons: Sequence[str]) -> tuple[Step, ...]:
    """Return every step there is: those with a field or an exit reason for each of these."""
    return tuple(
        Step(word, arg)
        for word, arguments in ARGUMENTS.items()
        for arg in (fields if arguments == (FIELD,) else _arguments(word, reasons) or ("",))
    )


@functools.cache
def exit_reasons() -> tuple[str, ...]:
    """Return every basic exit reason, those that one knows first."""
    rows = data.read_rows(data.path("exit_reasons.csv"))
    return tuple(dict.fromkeys((*USUAL_REASONS, *(row["name"] for row in rows))))


def _arguments(word: str, reasons: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments of a word, exit reasons named."""
    return tuple(each for arg in ARGUMENTS[word] for each in (reasons if arg == REASON else (arg,)))


def possible(step: Step, standing: Standing, l0: Nvmx) -> bool:
    """Return whether the step can happen: who runs, and what an L1 with this machine does."""
    word, arg = step
    config, halted = l0.config, l0.control.halted
    match word:
        case "GET_NESTED_STATE" | "MIGRATE":
            return not halted  # where the registers of an L2 are that never ran is not modelled
        case "SET_NESTED_STATE":  # into a vCPU in use: into a new one is MIGRATE
            return standing.vmxon
        case "RSM":
            return standing.smm
        case "RUN":
            return standing.interrupted
        case "EXIT":
            return standing.in_l2 and (not halted or arg.startswith("EXTERNAL_INTERRUPT"))
        case "L2_READ" | "L2_WRITE" | "L0_EXIT" | "SMI":
            return standing.in_l2 and not halted
    if standing.in_l2 or standing.smm or standing.interrupted:
        return False
    match word:
        case "L1_EXIT":
            return True
        case "VMXON":
            return not standing.vmxon
        case "EVMCS_READ" | "EVMCS_WRITE":
            return config.evmcs and standing.current is not None and in_evmcs(arg)
        case "VMPTRLD" if config.evmcs:  # one enlightened VMCS, made current once
            return standing.vmxon and standing.current is None and arg == "A"
        case "VMXOFF" | "VMCLEAR" | "VMREAD" | "VMWRITE" if config.evmcs:
            return False
        case "VMLAUNCH" | "VMRESUME":
            wrong = standing.page_launched == (word == "VMLAUNCH")
            if config.evmcs and (standing.current is None or wrong):
                return False  # what the wrong one does to an enlightened VMCS is not described
    return standing.vmxon


def in_evmcs(name: str) -> bool:
    """Return whether the enlightened VMCS has the field."""
    return bool(vmcs.field(name).evmcs_clean_group)


Fresh = Callable[[str, str], int]
"""Gives a value never used before, for a field and the VMCS that it is written to."""


def apply_to_model(step: Step, l0: Nvmx, fresh: Fresh) -> tuple[Nvmx, object]:
    """Let L0 take the step.

    Returns
    -------
    Nvmx
        L0 afterwards: another one after a migration.
    object
        What L1 or L2 sees: a value, a `VmFail`, or None.

    Raises
    ------
    Violation
        If L0 does what no KVM may do.
    """
    word, arg = step
    owner = l0.current_vmptr or "A"
    seen: object = None
    match word:
        case "VMXON":
            seen = l0.vmxon()
        case "VMXOFF":
            seen = l0.vmxoff()
        case "VMPTRLD":
            seen = l0.vmptrld(arg)
        case "VMCLEAR":
            seen = l0.vmclear(arg)
        case "VMREAD":
            seen = l0.l1_vmread(arg)
        case "VMWRITE":
            seen = l0.l1_vmwrite(arg, fresh(arg, owner))
        case "EVMCS_READ":
            seen = l0.evmcs_read(arg)
        case "EVMCS_WRITE":
            l0.evmcs_write(arg, fresh(arg, owner))
        case "VMLAUNCH" | "VMRESUME":
            way, _, check = arg.partition(":")
            l0.entry_failure = {name: fresh(name, owner) for name in ENTRY_FAILURE}
            seen = l0.nested_vmx_run(launch=word == "VMLAUNCH", fails=check, halted=way == "halted")
        case "L2_READ":
            seen = l0.l2_read(arg)
        case "L2_WRITE":
            l0.l2_write(arg, fresh(arg, owner))
        case "EXIT":
            l0.nested_exit(arg, {name: fresh(name, owner) for name in exit_information()})
        case "RUN":
            l0.run()
        case "L0_EXIT":
            l0.l0_exit(arg)
        case "L1_EXIT":
            l0.l1_exit(arg)
        case "SMI":
            l0.smi()
        case "RSM":
            l0.rsm()
        case "GET_NESTED_STATE":
            l0.get_nested_state()
        case "SET_NESTED_STATE":
            runs = arg in ("L1", "L2")
            l0.set_nested_state(
                NestedState(
                    vmxon=arg != "off",
                    guest_mode=arg == "L2",
                    vmptr="A" if runs else None,
                    vmcs12={name: fresh(name, "A") for name in in_vmcs12()} if runs else {},
                    launched=runs,
                    memory=l0.memory,
                    smram=l0.smram,
                )
            )
        case "MIGRATE":
            state = l0.get_nested_state()
            source, l0 = l0, type(l0)(l0.config)
            l0.vmcs01 = source.vmcs01  # by other system calls
            l0.set_nested_state(state)
            if source.control.guest_mode:
                for name in vmcs.carried_by_user_space():
                    if role(name, l0.config) == "saved":
                        l0.l2_write(name, source.vmcs02.get(name, 0))
    return l0, seen


@functools.cache
def in_vmcs12() -> tuple[str, ...]:
    """Return the fields that L1 can use at all."""
    return tuple(entry.name for entry in vmcs.catalogue().values() if entry.in_vmcs12)


@functools.cache
def exit_information() -> tuple[str, ...]:
    """Return the fields that the CPU writes at an exit of L2."""
    return tuple(
        name
        for name in in_vmcs12()
        if vmcs.field(name).group == EXIT_INFO and name != VM_FAIL_FIELD
    )


@dataclass(frozen=True)
class Tracked:
    """The field that the architecture is asked about.

    Attributes
    ----------
    name : str
        The field.
    entry_failure : bool
        Whether the exit of a failed entry writes it.
    """

    name: str
    entry_failure: bool


def apply_to_architecture(
    step: Step, truth: Architecture, tracked: Tracked, fresh: Fresh
) -> object:
    """Let the architecture take the step; return what L1 or L2 sees, as `apply_to_model`.

    None if the step is about another field.
    """
    word, arg = step
    name = tracked.name
    owner = truth.standing.current or "A"
    seen: object = None
    match word:
        case "VMXON":
            truth.vmxon()
        case "VMXOFF":
            truth.vmxoff()
        case "VMPTRLD":
            truth.vmptrld(arg)
        case "VMCLEAR":
            truth.vmclear(arg)
        case "VMREAD" | "EVMCS_READ":
            seen = truth.vmread() if arg == name else truth.other_field(arg in in_vmcs12())
        case "VMWRITE" | "EVMCS_WRITE":
            if arg == name:
                seen = truth.vmwrite(fresh(name, owner))
            else:
                seen = truth.other_field(arg in in_vmcs12())
        case "VMLAUNCH" | "VMRESUME":
            seen = truth.enter(
                launch=word == "VMLAUNCH",
                fails=arg.partition(":")[2],
                exits=tracked.entry_failure,
                info=fresh(name, owner),
            )
        case "L2_READ":
            seen = truth.l2_read() if arg == name else None
        case "L2_WRITE":
            if arg == name:
                truth.l2_write(fresh(name, owner))
        case "EXIT":
            truth.exit(fresh(name, owner), interrupted=arg.endswith("+signal"))
        case "RUN" | "MIGRATE":
            truth.run()
        case "SMI":
            truth.smi()
        case "RSM":
            truth.rsm()
        case "SET_NESTED_STATE":
            truth.forget_active()
            truth.standing = Standing(
                vmxon=arg != "off",
                current="A" if arg in ("L1", "L2") else None,
                page_launched=arg in ("L1", "L2"),
                launched=truth.standing.launched,
                active=frozenset({"A"}) if arg in ("L1", "L2") else frozenset(),
            )
            if truth.standing.current:
                truth.cells["page"] = fresh(name, "A")
            if arg == "L2":
                truth.load()
    return seen


def takes(step: Step, before: Standing, after: Standing) -> str:
    """Return which fields the CPU takes from the VMCS in this step.

    Parameters
    ----------
    step : Step
        A step that L0 did not refuse.
    before, after : Standing
        Where L1 stands before and after it.

    Returns
    -------
    str
        `AT_EXIT`: the host state, with which L1 goes on after an exit or an entry that fails late.
        `AT_ENTRY`: the controls under which L2 runs. Empty: nothing.
    """
    entry = step.word in ("VMLAUNCH", "VMRESUME")
    if step.word == "EXIT":
        return AT_EXIT
    if entry and after.in_l2 and not before.in_l2:
        return "" if step.arg == "halted" else AT_ENTRY
    late = step.arg.startswith("fails:") and step.arg != "fails:controls"
    return AT_EXIT if entry and late and after.current is not None else ""


def said(answer: object) -> str:
    """Say what an instruction of L1 answers."""
    if isinstance(answer, VmFail | Fail):
        return "VMfailInvalid" if answer.number is None else f"VMfailValid({answer.number})"
    return "VMsucceed"


def same(got: object, want: object) -> bool:
    """Return whether what L0 answered is what the architecture says, failures included."""
    if isinstance(got, VmFail) or isinstance(want, Fail):
        return isinstance(got, VmFail) and isinstance(want, Fail) and got.number == want.number
    return got is want or got == want
