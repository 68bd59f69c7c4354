"""A replay in plain sentences: who did what, where the true value was, who saw what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from textwrap import wrap
from typing import Final

from nvmx_lab import vmcs
from nvmx_lab.nested.architecture import role
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import VmFail
from nvmx_lab.nested.replay import OTHER_FIELD, START, Moment, Replay
from nvmx_lab.nested.search import FOREIGN, L1S, OTHER, STALE, UNINITIALISED
from nvmx_lab.nested.steps import POINTERS, said

FLAG: Final = "need_sync_vmcs02_to_vmcs12_rare"
_WIDE: Final = 96
_CELLS: Final[Mapping[str, str]] = {
    "vmcs12": "vmcs12",
    "vmcs02": "vmcs02",
    "shadow": "the shadow VMCS",
    "evmcs": "the enlightened VMCS",
    "A": "A in L1's memory",
    "B": "B in L1's memory",
    "smram": "SMRAM",
}
_KINDS: Final[Mapping[str, str]] = {
    STALE: "a stale",
    UNINITIALISED: "an uninitialised",
    OTHER: "another VMCS's",
    L1S: "its own",
    FOREIGN: "another field's",
}
_VERDICTS: Final[Mapping[str, str]] = {
    STALE: "The value is stale.",
    UNINITIALISED: "The value is uninitialised.",
    OTHER: "The value is another VMCS's.",
    L1S: "The value is L1's own, not L2's.",
    FOREIGN: "The value is another field's.",
}


def story(replay: Replay) -> str:
    """Tell a replay: one numbered paragraph for each step, then what was wrong and where it arose.

    Only what concerns the followed field is told.
    """
    paragraphs = [headline(replay) + "."]
    before: Moment | None = None
    for number, moment in enumerate(replay.moments, 1):
        paragraphs.append(f"{number}. {_Telling(replay, before, moment).text()}")
        before = moment
    paragraphs += [_verdict(replay), *_cause(replay), "Replayed on the model, not on a kernel."]
    return "\n".join(
        line
        for paragraph in paragraphs
        for line in wrap(paragraph, _WIDE, subsequent_indent="   ", break_on_hyphens=False)
    )


def headline(replay: Replay) -> str:
    """Say what a replay shows, in one line without a full stop."""
    l0 = f"KVM {replay.config.kvm.name} ({', '.join([replay.config.sync, *_options(replay)])})"
    if replay.mutant:
        l0 += f", mutant {replay.mutant}"
    if not replay.failed:
        return f"{l0}: nothing wrong with {replay.field}"
    last = replay.moments[-1]
    if last.fault:
        return f"{l0}: {last.fault}"
    if replay.wrong not in _KINDS:
        return f"{l0}: {replay.wrong}"
    what = f"{_KINDS[replay.wrong]} {replay.field}"
    if replay.wrong == L1S and last.step.word == "L2_READ":
        what = f"L1's {replay.field}"
    return f"{l0}: {_observes(last)} {what}{_on_the_target(replay)}"


def value_name(replay: Replay, value: int | None) -> str:
    """Name a value of the followed field by where it came from."""
    if value is None:
        return "an undefined value"
    if value == 0:
        return "a value that nobody wrote"
    if value == OTHER_FIELD:
        return "a value of another field"
    for cell in POINTERS:
        if value == START[cell]:
            return f"what {cell} held before step 1"
    if value == START["vmcs01"]:
        return "L1's own value"
    if value not in replay.origins:
        return f"error number {value}"
    number = replay.origins[value].step
    kinds = {
        "L2_WRITE": "L2's value",
        "VMWRITE": "L1's value",
        "EVMCS_WRITE": "L1's value",
        "SET_NESTED_STATE": "the restored value",
    }
    kind = kinds.get(replay.moments[number].step.word, "the exit information")
    return f"{kind} of step {number + 1}"


def _options(replay: Replay) -> list[str]:
    """Name the options that differ from the defaults."""
    config = replay.config
    usual = Config.of(config.kvm.name, config.sync, evmcs=config.evmcs)
    named = ["enlightened VMCS"] if config.evmcs else []
    for option in fields(Config):
        value = getattr(config, option.name)
        if isinstance(value, bool) and value != getattr(usual, option.name):
            named.append(f"{'' if value else 'no '}{option.name}")
    return named


def _observes(moment: Moment) -> str:
    """Say who meets the value, and how."""
    ways = {"L2_READ": "L2 sees", "EXIT": "L1 goes on with"}
    if moment.step.arg.startswith("fails:"):
        return ways["EXIT"]
    return ways.get(moment.step.word, "L2 runs under" if moment.standing.in_l2 else "L1 sees")


def _on_the_target(replay: Replay) -> str:
    migrated = any(moment.step.word == "MIGRATE" for moment in replay.moments)
    return " on the migration target" if migrated else ""


class _Telling:
    """One step in words: what was done, then what it did to the followed field."""

    def __init__(self, replay: Replay, before: Moment | None, moment: Moment) -> None:
        self.replay, self.moment = replay, moment
        self.field = replay.field
        self.was = START if before is None else before.l0
        self.control = None if before is None else before.control
        self.current = None if before is None else before.standing.current
        self.halted = before is not None and before.control.halted
        self.rare = vmcs.is_rare(self.field) or bool(replay.moments[-1].fault)
        flag = self.control is not None and self.control.need_sync_vmcs02_to_vmcs12_rare
        self.flag_was = flag and self.rare
        self.flag = moment.control.need_sync_vmcs02_to_vmcs12_rare and self.rare
        last = replay.moments[-1]
        self.shown = {value for value in (last.seen, last.expected) if isinstance(value, int)}

    def text(self) -> str:
        # One sentence: names of KVM must not stand where a capital letter would.
        told = "; ".join([self._done(), *self._sync(), *self._changes()])
        return f"{told[0].upper()}{told[1:]}."

    def _named(self, value: int | None) -> str:
        return value_name(self.replay, value)

    def _silent(self) -> bool:
        """Whether L1 accessed the shadow VMCS, and L0 saw nothing."""
        return bool(self.moment.trace.l1_vmreads + self.moment.trace.l1_vmwrites)

    # -- what was done -------------------------------------------------------------------------

    def _done(self) -> str:
        word, arg = self.moment.step
        if self.moment.fault:  # the step was not completed
            reason = arg.partition("+")[0]
            known = {"EXIT": f"L2 exits ({reason})", "SMI": "an SMI takes the vCPU out of L2"}
            return known.get(word, f"L0 begins {self.moment.step}")
        if isinstance(self.moment.seen, VmFail):
            return f"L1 executes {self.moment.step}: {said(self.moment.seen)}"
        match word:
            case "L2_WRITE":
                return f"L2 changes {arg}"
            case "L2_READ":
                return f"L2 reads {arg} from vmcs02"
            case "EVMCS_READ" | "EVMCS_WRITE":
                verb = "loads" if word == "EVMCS_READ" else "stores"
                return f"L1 {verb} {arg} in its enlightened VMCS, without an exit"
            case "VMREAD" | "VMWRITE":
                how = " in the shadow VMCS, without an exit" if self._silent() else ""
                return f"L1 executes {word} {arg}{how}"
            case "VMLAUNCH" | "VMRESUME":
                return self._entry()
            case "EXIT":
                reason = arg.partition("+")[0]
                if self.halted:
                    return f"{reason} wakes the vCPU; L0 reflects it to L1 before L2 ran at all"
                if arg.endswith("+signal"):
                    return f"L2 exits ({reason}); a signal takes L0 to user space before L1 runs"
                return f"L2 exits ({reason}) and L0 reflects the exit to L1"
            case "L0_EXIT":
                return f"L2 exits ({arg}), L0 handles it, L2 goes on"
            case "L1_EXIT":
                return f"L1 exits ({arg}), L0 handles it, L1 goes on"
            case "SMI":
                return "an SMI takes the vCPU out of L2; L0 saves L2's state as at an exit"
            case "RSM":
                return "RSM: L0 enters L2 again from vmcs12"
        return self._management()

    def _management(self) -> str:
        word, arg = self.moment.step
        match word:
            case "VMXON":
                return "L1 executes VMXON, L0 allocates a cleared vmcs02"
            case "VMXOFF":
                return "L1 executes VMXOFF: free_nested() frees vmcs02 and drops vmcs12"
            case "VMPTRLD" if arg == self.current:
                return f"L1 executes VMPTRLD {arg}, which is current already"
            case "VMPTRLD" | "VMCLEAR" if self.current and (
                word == "VMPTRLD" or arg == self.current
            ):
                return (
                    f"L1 executes {self.moment.step}: nested_release_vmcs12() writes vmcs12 back "
                    f"to {self.current}"
                )
            case "RUN":
                return "user space calls KVM_RUN: L0 enters L1"
            case "GET_NESTED_STATE":
                return "user space takes the state (KVM_GET_NESTED_STATE)"
            case "SET_NESTED_STATE":
                shapes = {
                    "off": "without VMX",
                    "on": "without a current VMCS",
                    "L1": "in which L1 runs and A is current",
                    "L2": "in which L2 runs from A",
                }
                return f"user space restores a state {shapes[arg]} (KVM_SET_NESTED_STATE)"
            case "MIGRATE":
                return (
                    "user space migrates the vCPU: KVM_GET_NESTED_STATE here, "
                    "KVM_SET_NESTED_STATE on the target"
                )
        return f"L1 executes {self.moment.step}"

    def _entry(self) -> str:
        word, arg = self.moment.step
        if arg == "halted":
            return f"L1 executes {word} with L2 in the HLT activity state: L2 does not run yet"
        check = arg.partition(":")[2]
        if check:
            return f"L1 executes {word}; the entry fails late ({check}): L1 sees an exit"
        return f"L1 executes {word}, L2 runs"

    # -- what the mechanism did ----------------------------------------------------------------

    def _sync(self) -> list[str]:
        trace, word = self.moment.trace, self.moment.step.word
        if self.moment.fault:
            return [f"{FLAG} is set"] if self.flag_was else []
        if trace.pulls and self.rare:
            count = trace.rare_vmreads
            what = "the one field" if count == 1 else f"{count} rare fields"
            return [f"{FLAG} is set, so L0 loads vmcs02, reads {what} into vmcs12, loads vmcs01"]
        if word in ("EXIT", "SMI"):
            return self._left_behind()
        if word in ("VMXON", "VMXOFF", "SET_NESTED_STATE"):
            return self._outlived()
        if self.flag_was and self._consumes():
            return [f"{FLAG} is set, but nothing is pulled"]
        if word == "VMREAD" and self.moment.wrong and self.rare and not self._silent():
            return [f"{FLAG} is clear, so nothing is pulled"]
        if word in ("GET_NESTED_STATE", "MIGRATE"):
            return self._saved()
        return self._not_written()

    def _outlived(self) -> list[str]:
        """Say that the flag outlives its vmcs02."""
        if not self.flag:
            return self._not_written()
        if self.moment.step.word == "VMXOFF":
            return [f"it does not reset {FLAG}"]
        if self.flag_was:
            return [f"{FLAG} is still set, although this vmcs02 is a new one"]
        return [f"leaving L2 for it set {FLAG}, and free_nested() does not reset it"]

    def _consumes(self) -> bool:
        """Whether L0 hands out, keeps or dirties vmcs12 while L1 runs."""
        word, arg = self.moment.step
        match word:
            case "VMREAD" | "VMWRITE":
                return not self._silent()
            case "VMPTRLD":
                return self.current not in (None, arg)
            case "VMCLEAR":
                return self.current == arg
        return word in ("GET_NESTED_STATE", "MIGRATE") and self.current is not None

    def _left_behind(self) -> list[str]:
        """Say what an exit did not copy."""
        if not self.flag:
            return []
        left = f"sync_vmcs02_to_vmcs12() leaves the rare fields in vmcs02 and sets {FLAG}"
        vmcs02, vmcs12 = (self.moment.l0[cell] for cell in ("vmcs02", "vmcs12"))
        return [left if vmcs02 == vmcs12 else f"{left}; vmcs12 still has {self._named(vmcs12)}"]

    def _saved(self) -> list[str]:
        """Say where KVM_GET_NESTED_STATE gets vmcs12 from."""
        control = self.control
        if control is None or not control.has_vmcs12:
            return []
        if control.guest_mode:
            return ["L2 runs, so it copies from vmcs02 (sync_vmcs02_to_vmcs12())"]
        copier = "copy_enlightened" if self.replay.config.evmcs else "copy_shadow"
        read = self.was["evmcs" if self.replay.config.evmcs else "shadow"]
        if control.need_vmcs12_to_shadow_sync or read in (0, self.was["vmcs12"]):
            return []
        return [f"need_vmcs12_to_shadow_sync is clear, so {copier}_to_vmcs12() overwrites vmcs12"]

    def _not_written(self) -> list[str]:
        """Say what an entry did not write."""
        cells = self.moment.l0
        entered = self.moment.standing.in_l2 and self.moment.step.word in (
            "VMLAUNCH",
            "VMRESUME",
            "RSM",
            "SET_NESTED_STATE",
            "MIGRATE",
        )
        saved = role(self.field, self.replay.config) == "saved"
        true = self.replay.true(self.moment)
        if not entered or not saved or true is None or cells["vmcs02"] == true:
            return []
        if cells["vmcs12"] == true:
            return [f"vmcs02.{self.field} is not written: {self._named(cells['vmcs02'])}"]
        return []

    def _changes(self) -> list[str]:
        """Say which cells have another value now."""
        word = self.moment.step.word
        having: dict[int, list[str]] = defaultdict(list)
        for cell, name in _CELLS.items():
            value = self.moment.l0[cell]
            if value != self.was[cell] and self._matters(value):
                having[value].append(name)
        if word == "MIGRATE":
            return self._arrived()
        return [
            f"{self._by(names)}{_and(names)} now {'has' if len(names) == 1 else 'have'} "
            f"{self._named(value)}"
            for value, names in having.items()
        ]

    def _by(self, names: list[str]) -> str:
        """Name the function of KVM that wrote these cells, where the step does not say it."""
        word = self.moment.step.word
        entry = word in ("VMLAUNCH", "VMRESUME", "RSM")
        if entry and "vmcs02" in names:
            return "prepare_vmcs02(): "
        if entry and "vmcs12" in names and "the shadow VMCS" not in names and self._copied():
            return "copy_shadow_to_vmcs12(): "
        if word in ("EXIT", "SMI") and "vmcs12" in names:
            return "sync_vmcs02_to_vmcs12(): "
        return ""

    def _copied(self) -> bool:
        accesses = self.moment.trace.accesses
        return any(access.function == "copy_shadow_to_vmcs12" for access in accesses)

    def _arrived(self) -> list[str]:
        """Say what a migration carried over."""
        cells = self.moment.l0
        if cells["vmcs02"] == cells["vmcs12"]:
            return [f"there vmcs12 and vmcs02 have {self._named(cells['vmcs12'])}"]
        return [f"there vmcs02 is new and vmcs12 has {self._named(cells['vmcs12'])}"]

    def _matters(self, value: int) -> bool:
        """Whether a value is part of the story: all that a step wrote, and what is seen."""
        return value in self.replay.origins or value in self.shown


def _and(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _verdict(replay: Replay) -> str:
    if not replay.failed:
        return "Nothing wrong was seen: this L0 behaves as eager copying would."
    last = replay.moments[-1]
    where = _on_the_target(replay)
    if last.fault:
        return f"Wrong{where}, whatever the values: {last.fault}."
    if replay.wrong not in _VERDICTS:
        return f"Wrong{where}: {replay.wrong}."
    seen, expected = (value_name(replay, _number(v)) for v in (last.seen, last.expected))
    who, _, does = _observes(last).partition(" ")
    should = {"sees": "see", "goes on with": "go on with", "runs under": "run under"}[does]
    said_so = f"{who} {does} {seen}; it should {should} {expected}"
    return f"Wrong{where}: {said_so}. {_VERDICTS[replay.wrong]}"


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _cause(replay: Replay) -> list[str]:
    """Say after which step no cell that L0 may still use had the true value."""
    last = replay.moments[-1] if replay.moments else None
    if last is None or replay.wrong not in _VERDICTS:
        return []
    rare = vmcs.is_rare(replay.field)
    holding = [_holders(moment, last.expected, rare=rare) for moment in replay.moments]
    if not holding[-1]:
        number = len(holding)
        while number > 1 and not holding[number - 2]:
            number -= 1
        return [
            f"Where the true value was lost: step {number} ({replay.moments[number - 1].step}). "
            "After it, no place that L0 may take the field from has it."
        ]
    read = _read_cell(last)
    number = len(holding)
    while number > 1 and replay.moments[number - 2].l0[read] == last.seen:
        number -= 1
    return [
        f"Where the true value was lost: it was not, {_and(holding[-1])} still has it. But "
        f"{_CELLS[read]} has had the wrong one since step {number} "
        f"({replay.moments[number - 1].step}), and nothing replaced it."
    ]


def _holders(moment: Moment, value: object, *, rare: bool) -> list[str]:
    """Return the cells that hold a value and that L0 may still take it from."""
    control = moment.control
    idle = {moment.standing.current}  # memory, while the VMCS is current
    if not moment.standing.smm:
        idle.add("smram")
    if not (control.guest_mode or (rare and control.need_sync_vmcs02_to_vmcs12_rare)):
        idle.add("vmcs02")
    return [name for cell, name in _CELLS.items() if moment.l0[cell] == value and cell not in idle]


def _read_cell(moment: Moment) -> str:
    if moment.step.word == "EVMCS_READ":
        return "evmcs"
    if moment.standing.in_l2:  # L2 reads, or an entry took it
        return "vmcs02"
    return "shadow" if moment.trace.l1_vmreads else "vmcs12"
