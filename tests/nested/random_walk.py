"""A random walk over the whole model with concrete values, next to what the architecture says.

The explorer follows one field with symbols and decides by itself what can happen. The walk does
none of that: every field at once, real values of the field's width, the truth from `tests.naive`,
its own idea of what can happen, and it looks only as L1 and L2 can: by VMREAD, by a load from the
enlightened VMCS, by a read of L2. What it sees, the explorer must know.

    python -m tests.nested.random_walk --steps 5000000
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from nvmx_lab import vmcs
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.explorer import ENVIRONMENTS, Exploration, explore
from nvmx_lab.nested.model import NestedState, Nvmx, Trace, Violation, VmFail
from nvmx_lab.nested.policies import SYNC_POLICIES
from tests import naive

RELEASES = ("5.2", "5.2+patch13", "5.3", "5.8", "5.11", "6.1")
MENDED = "6.1+flag-reset+smm-shadow-sync"
MENDS = "+cr3-always+smm-shadow-sync+evmcs-fail-sync"
OLD_MENDED = (
    f"5.2{MENDS}",
    f"5.2+patch13{MENDS}+flag-reset+migration-sync",
    f"5.3{MENDS}+flag-reset+migration-sync",
)
"""Old releases with every mend that the explorer finds them to need."""


# What an SMI saves in SMRAM (kvm_smm_state, 64 bit), typed anew.
SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
IN_SMRAM = (
    *(f"GUEST_{name}" for name in ("RIP", "RSP", "RFLAGS", "CR0", "CR3", "CR4")),
    *(f"GUEST_{s}_{part}" for s in SEGMENTS for part in ("SELECTOR", "LIMIT", "AR_BYTES", "BASE")),
    *(f"GUEST_{table}_{part}" for table in ("GDTR", "IDTR") for part in ("LIMIT", "BASE")),
)
ENTRY_FAILURE = ("VM_EXIT_REASON", "EXIT_QUALIFICATION")
WRITTEN_AT_EXIT = tuple(n for n in naive.EXIT_INFORMATION if n != "VM_INSTRUCTION_ERROR")
LOADS_BNDCFGS = naive.IA32E_MODE | naive.LOAD_BNDCFGS
# Controls whose bits switch on what `naive` does not have, or what makes BNDCFGS undefined.
FIXED_BITS = {"VM_ENTRY_CONTROLS": LOADS_BNDCFGS}

REASONS = ("CPUID", "HLT", "IO_INSTRUCTION", "CR_ACCESS", "EPT_VIOLATION", "EXTERNAL_INTERRUPT")
OWNERS = ("", "A", "B", "L1")
LAST_ERROR = 28  # the SDM's VM-instruction errors
EPISODE = 300  # steps with the same few fields, so that what was written is soon read
FOCUS = 2  # rare fields, fields that L2 can change, fields of any kind: so many of each
FORGET_TRACE = 64


UNKNOWN_AFTER_RSM = {"GUEST_BNDCFGS", "GUEST_INTERRUPTIBILITY_INFO"}
CARRIED = {
    *IN_SMRAM,
    *UNKNOWN_AFTER_RSM,
    *("GUEST_SYSENTER_CS", "GUEST_SYSENTER_ESP", "GUEST_SYSENTER_EIP"),
}
"""State of L2 that other system calls carry when a vCPU migrates."""


class Walked(Nvmx):
    """The model without its accounts: they play no part here, and take time."""

    def _emit(self, op: str, name: str, function: str) -> None:
        pass

    def _stretch(self, name: str, times: int = 1) -> None:
        pass


class Truth(naive.Architecture):
    """`naive.Architecture` with SMM, entries that fail late and restored states.

    L1's VMCS regions hold what nobody knows at first. `halted`: L2 was entered in HLT and waits.
    """

    def __init__(self, *, strips_access_rights: bool, saves_also: tuple[str, ...]) -> None:
        super().__init__(strips_access_rights=strips_access_rights, saves_also=saves_also)
        unknown = dict.fromkeys(naive.IN_VMCS12)
        self.memory = {pointer: naive.Page(dict(unknown)) for pointer in "AB"}
        self.in_smm = self.halted = False
        self.active: set[str] = set()  # VMCSs that were loaded and not cleared since
        self.smram: dict[str, int | None] = {}

    def vmptrld(self, pointer: str) -> None:  # as in naive, but cheaper than a deep copy
        if pointer != self.pointer:
            self._write_back()
            self.active.add(pointer)
            page = self.memory[pointer]
            self.pointer, self.page = pointer, naive.Page(dict(page.fields), page.launched)

    def vmclear(self, pointer: str) -> None:
        super().vmclear(pointer)
        self.active.discard(pointer)

    def vmxoff(self) -> None:
        for pointer in self.active:  # software should have cleared them: now they are undefined
            unknown: dict[str, int | None] = dict.fromkeys(naive.IN_VMCS12)
            self.memory[pointer] = naive.Page(unknown, self.memory[pointer].launched)
        self.active = set()
        super().vmxoff()

    def enter(self, *, launch: bool, how: str, failure: dict[str, int]) -> naive.Fail | None:
        """VMLAUNCH or VMRESUME; `how` is empty, "halted", or the check that fails."""
        if self.pointer is None:
            return naive.Fail(None)
        if launch == self.page.launched:
            return self._fail(4 if launch else 5)
        if how == "controls":
            return self._fail(7)
        if how in ("guest-state", "msr-load"):
            self.page.fields.update(failure)
            return None
        self.halted = how == "halted"
        self._enter()
        return None

    def nested_exit(self, info: dict[str, int]) -> None:
        fields = self.page.fields
        self._save()
        fields.update(info)
        event = fields["VM_ENTRY_INTR_INFO_FIELD"]
        if event is not None:
            fields["VM_ENTRY_INTR_INFO_FIELD"] = event & ~naive.EVENT_VALID

    def _save(self) -> None:
        self.page.fields.update(self.l2)
        if not self._entry_control(naive.IA32E_MODE):
            self.page.fields["VM_ENTRY_CONTROLS"] = None
        if self.page.fields["GUEST_ACTIVITY_STATE"] != 0:
            self.page.fields["GUEST_ACTIVITY_STATE"] = None
        self.in_l2 = self.halted = False

    def smi(self) -> None:
        self.smram = {name: self.l2[name] for name in IN_SMRAM}
        self._save()
        self.in_smm = True

    def rsm(self) -> None:
        self.in_smm = False
        self._enter()
        self.l2.update(self.smram)
        # Neither SMRAM nor this entry restores these; who does is not modelled.
        self.l2.update(dict.fromkeys(UNKNOWN_AFTER_RSM & self.l2.keys()))

    def restore(self, shape: str, fields: dict[str, int]) -> None:
        """KVM_SET_NESTED_STATE of a state that was not there before."""
        self.vmxoff()
        self.on = shape != "off"
        self.in_l2 = self.in_smm = self.halted = False
        self.pointer = None
        if shape in ("L1", "L2"):
            self.pointer, self.page = "A", naive.Page(dict(fields), launched=True)
            self.active.add("A")
        if shape == "L2":
            self._enter()


@dataclass(frozen=True)
class Wrong:
    """A failure that the walk saw: `kind` in the explorer's words, or the sentence of a fault."""

    kind: str
    field: str


@dataclass
class Walk:
    """One L0 and the truth, driven at random.

    Attributes
    ----------
    steps, compared : int
        Steps taken, and answers that were compared with the truth.
    wrong : Counter of Wrong
        What went wrong how often; after each the walk starts anew.
    example : dict of Wrong to list of str
        The shortest way there that was met, if steps are recorded.
    """

    config: Config
    seed: int = 0
    nvmx: type[Nvmx] = Walked
    record: bool = False
    steps: int = 0
    compared: int = 0
    seconds: float = 0.0
    wrong: Counter[Wrong] = field(default_factory=Counter)
    example: dict[Wrong, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        # Not the text of the configuration: a set's order differs from run to run.
        on = sorted(config.kvm.features) + [n for n, v in vars(config).items() if v is True]
        self.random = random.Random(f"{self.seed} {config.kvm.name} {config.sync} {on}")
        self.saves_also = (
            *(("GUEST_BNDCFGS",) if config.mpx else ()),
            *(("GUEST_INTR_STATUS",) if config.vid else ()),
            *((f"GUEST_PDPTR{n}" for n in range(4)) if config.pae else ()),
        )
        self.reads, self.writes = self._accesses()
        self.values = 0
        self._start()

    def _accesses(self) -> tuple[str, str]:
        return ("EVMCS_READ", "EVMCS_WRITE") if self.config.evmcs else ("VMREAD", "VMWRITE")

    def _start(self) -> None:
        strips = "patch08" in self.config.kvm.features and not self.config.evmcs
        self.truth = Truth(strips_access_rights=strips, saves_also=self.saves_also)
        self.model = self._vcpu()
        self.last: list[str] = []

    def _vcpu(self) -> Nvmx:
        """Return a new vCPU; vmcs01 holds L1's own state, recognizable."""
        model = self.nvmx(self.config)
        model.vmcs01 = {name: self.value(name, "L1") for name in naive.IN_VMCS12}
        return model

    # -- values --------------------------------------------------------------------------------

    def value(self, name: str, owner: str | None = None) -> int:
        """Return a value that the field did not have before (as far as its width allows).

        Its two lowest bits say whose it is, and so it is never zero: that is what nobody wrote.
        """
        self.values += 1
        if name == "GUEST_ACTIVITY_STATE":
            return self.values & 1
        bits = {"16": 16, "32": 32}.get(vmcs.field(name).width, 64)
        value = self.values * 0x9E3779B97F4A7C15 >> (64 - bits) & (1 << bits) - 1
        if name in naive.ACCESS_RIGHTS and self.values % 4:
            value &= naive.ACCESS_RIGHTS_MASK
        if self.config.evmcs and name == "VM_ENTRY_INTR_INFO_FIELD":
            value &= ~naive.EVENT_VALID  # who clears it in the page is not described
        whose = OWNERS.index(owner or self.truth.pointer or "A")
        return value & ~3 | whose | FIXED_BITS.get(name, 0)

    def _of_l2(self, name: str) -> int:
        value = self.value(name)
        # A processor has no other rights.
        return value & naive.ACCESS_RIGHTS_MASK if name in naive.ACCESS_RIGHTS else value

    @staticmethod
    def _kind(name: str, got: int, want: int) -> str:
        if got == 0:
            return "uninitialised"
        if name == "VM_INSTRUCTION_ERROR" and min(got, want) <= LAST_ERROR:
            return "stale"  # the number of a VMfail is nobody's
        if OWNERS[got & 3] == "L1":
            return "L1's own"
        return "stale" if want == 0 or got & 3 == want & 3 else "another VMCS's"

    # -- what can happen -----------------------------------------------------------------------

    def _choose_fields(self) -> None:
        names = naive.IN_VMCS12
        if self.config.evmcs:
            names = tuple(name for name in names if vmcs.field(name).evmcs_clean_group)
        pick = self.random.choice
        kinds = (naive.RARE, self.truth.saved, names)
        self.focus = [pick(kind) for kind in kinds for _ in range(FOCUS)]
        self.of_l2 = [name for name in self.focus if name in self.truth.saved]
        self.focus = [name for name in self.focus if name in names] or [names[0]]

    def _step(self) -> tuple[str, str]:
        """Draw what happens next from what the architecture allows."""
        truth, draw = self.truth, self.random.random
        outside = draw()
        if outside < 0.03:
            if outside < 0.004 and truth.on:
                return "SET_NESTED_STATE", self.random.choice(("L1", "L1", "L2", "L2", "on", "off"))
            return ("MIGRATE", "") if outside < 0.016 else ("GET_NESTED_STATE", "")
        if truth.in_smm:
            return "RSM", ""
        if truth.in_l2:
            return self._step_of_l2(draw())
        if not truth.on:
            return ("VMXON", "") if draw() < 0.9 else ("L1_EXIT", "RDMSR")
        return self._step_of_l1(draw())

    def _step_of_l2(self, at: float) -> tuple[str, str]:
        if self.truth.halted:
            if at < 0.1:
                return "SMI", ""
            return "EXIT", "EXTERNAL_INTERRUPT" + ("+pull" if at < 0.5 else "")
        if at < 0.3:
            return "L2_WRITE", self.random.choice(self.of_l2)
        if at < 0.5:
            return "L2_READ", self.random.choice(self.of_l2)
        if at < 0.55:
            return "SMI", ""
        if at < 0.6:
            return "L0_EXIT", "EPT_VIOLATION"
        return "EXIT", self.random.choice(REASONS) + ("+pull" if at < 0.75 else "")

    def _step_of_l1(self, at: float) -> tuple[str, str]:
        truth, evmcs = self.truth, self.config.evmcs
        if truth.pointer is None:
            if evmcs:
                return ("VMPTRLD", "A") if at < 0.9 else ("L1_EXIT", "RDMSR")
            if at < 0.6:
                return "VMPTRLD", "A" if at < 0.3 else "B"
        elif at < 0.25:
            return self._entry()
        elif at < 0.55:
            return self.reads, self.random.choice(self.focus)
        elif at < 0.82:
            return self.writes, self.random.choice(self.focus)
        if evmcs or at > 0.98:
            return "L1_EXIT", "RDMSR"
        if at < 0.9:
            return "VMPTRLD", "A" if self.random.random() < 0.5 else "B"
        if at < 0.93:
            return "VMCLEAR", "A" if self.random.random() < 0.5 else "B"
        if at < 0.94:
            return "VMXOFF", ""
        return (self.reads if at < 0.96 else self.writes), naive.NOT_IN_VMCS12[0]

    def _entry(self) -> tuple[str, str]:
        right = ("VMRESUME", "VMLAUNCH") if self.truth.page.launched else ("VMLAUNCH", "VMRESUME")
        at = self.random.random()
        if at < 0.04 and not self.config.evmcs:
            return right[1], ""
        if at < 0.24:
            return right[0], ("fails:controls", "fails:guest-state", "fails:msr-load", "halted")[
                int((at - 0.04) * 20)
            ]
        return right[0], ""

    # -- one step ------------------------------------------------------------------------------

    def _apply(self, word: str, arg: str) -> tuple[object, object]:
        """Return what L1 or L2 sees, and what it should."""
        truth, model = self.truth, self.model
        want: object = None
        got: object = None
        match word:
            case "VMREAD":
                want, got = truth.l1_vmread(arg), model.l1_vmread(arg)
            case "EVMCS_READ":
                want, got = truth.page.fields[arg], model.evmcs_read(arg)
            case "L2_READ":
                want, got = truth.l2_read(arg), model.l2_read(arg)
            case "VMWRITE":
                value = self.value(arg)
                want, got = truth.l1_vmwrite(arg, value), model.l1_vmwrite(arg, value)
            case "EVMCS_WRITE":
                value = self.value(arg)
                truth.page.fields[arg] = value
                model.evmcs_write(arg, value)
            case "L2_WRITE":
                value = self._of_l2(arg)
                truth.l2_write(arg, value)
                model.l2_write(arg, value)
            case "VMLAUNCH" | "VMRESUME":
                want, got = self._enter(launch=word == "VMLAUNCH", how=arg.removeprefix("fails:"))
            case "EXIT":
                info = {name: self.value(name) for name in WRITTEN_AT_EXIT}
                truth.nested_exit(info)
                model.nested_exit(arg, info)
            case "L0_EXIT":
                model.l0_exit(arg)
            case "L1_EXIT":
                model.l1_exit(arg)
            case "GET_NESTED_STATE":
                model.get_nested_state()
            case "MIGRATE":
                state = model.get_nested_state()
                source, self.model = model, self._vcpu()
                self.model.set_nested_state(state)
                if truth.in_l2 and not truth.halted:
                    for name in CARRIED & truth.l2.keys():
                        self.model.l2_write(name, source.l2_read(name))
                truth.halted = False  # that L2 waits is not part of the state
            case "SET_NESTED_STATE":
                self._restore(arg)
            case "SMI" | "RSM":
                getattr(truth, word.lower())()
                getattr(model, word.lower())()
            case _:  # VMXON, VMXOFF, VMPTRLD, VMCLEAR
                arguments = (arg,) if arg else ()
                want = getattr(truth, word.lower())(*arguments)
                got = getattr(model, word.lower())(*arguments)
        return got, want

    def _enter(self, *, launch: bool, how: str) -> tuple[object, object]:
        failure = {name: self.value(name) for name in ENTRY_FAILURE}
        want = self.truth.enter(launch=launch, how=how, failure=failure)
        self.model.entry_failure = failure
        halted = how == "halted"
        return self.model.nested_vmx_run(
            launch=launch, fails="" if halted else how, halted=halted
        ), want

    def _restore(self, shape: str) -> None:
        runs = shape in ("L1", "L2")
        fields = {name: self.value(name, "A") for name in naive.IN_VMCS12} if runs else {}
        self.truth.restore(shape, fields)
        model = self.model
        model.set_nested_state(
            NestedState(
                vmxon=shape != "off",
                guest_mode=shape == "L2",
                vmptr="A" if runs else None,
                vmcs12=fields,
                launched=runs,
                memory=model.memory,
                smram=model.smram,
            )
        )

    def _fault(self, word: str, arg: str) -> Wrong | None:
        try:
            got, want = self._apply(word, arg)
        except Violation as violation:
            return Wrong(str(violation), "")
        if isinstance(got, VmFail) or isinstance(want, naive.Fail):
            self.compared += 1
            if isinstance(got, VmFail) and isinstance(want, naive.Fail) and got == want:
                return None
            return Wrong(f"{word} {arg} answers {got}, it should answer {want}", "")
        if want is None:
            return None  # undefined, or nothing to see
        self.compared += 1
        if got == want:
            return None
        assert isinstance(got, int)
        assert isinstance(want, int)
        return Wrong(self._kind(arg, got, want), arg)

    # -- the walk ------------------------------------------------------------------------------

    def go(self, steps: int) -> None:
        """Take so many steps."""
        began = time.perf_counter()
        for at in range(steps):
            if at % EPISODE == 0:
                self._choose_fields()
            if at % FORGET_TRACE == 0:
                self.model.trace = Trace()
            word, arg = self._step()
            if self.record:
                self.last.append(f"{word} {arg}".rstrip())
            wrong = self._fault(word, arg)
            if wrong is not None:
                self.wrong[wrong] += 1
                if self.record and len(self.last) < len(self.example.get(wrong, [""] * 10_000)):
                    self.example[wrong] = self.last
                self._start()
        self.steps += steps
        self.seconds += time.perf_counter() - began


def configs() -> Iterator[tuple[str, str, Config]]:
    """Return (release, environment, L0): 6.1 mended with every policy, the others with theirs."""
    for release in (*RELEASES, *OLD_MENDED, MENDED):
        own = Config.of(release).sync
        for environment, options in ENVIRONMENTS.items():
            for sync in SYNC_POLICIES if release == MENDED else (own,):
                yield release, environment, Config.of(release, sync, **options)


def known(exploration: Exploration) -> frozenset[Wrong]:
    """Return the failures that the explorer found."""
    return frozenset(
        Wrong(finding.wrong, name) for finding in exploration.findings for name in finding.fields
    )


def table(walks: Collection[tuple[str, str, Walk]]) -> str:
    """Return steps, comparisons, failures by kind and seconds for each release."""
    rows: dict[str, list[Walk]] = defaultdict(list)
    for release, _, walk in walks:
        rows[release].append(walk)
    kinds = sorted({wrong.kind for _, _, walk in walks for wrong in walk.wrong})
    lines = [["release", "walks", "steps", "compared", *kinds, "fields", "seconds"]]
    for release, members in rows.items():
        total: Counter[str] = Counter()
        for walk in members:
            for wrong, times in walk.wrong.items():
                total[wrong.kind] += times
        lines.append(
            [
                release,
                str(len(members)),
                f"{sum(walk.steps for walk in members):,}",
                f"{sum(walk.compared for walk in members):,}",
                *(f"{total[kind]:,}" for kind in kinds),
                str(len({wrong.field for walk in members for wrong in walk.wrong})),
                f"{sum(walk.seconds for walk in members):.1f}",
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def walk_all(
    steps: int, seed: int, advance: Callable[[int], object]
) -> list[tuple[str, str, Walk]]:
    """Spread `steps` over every L0 of `configs`."""
    todo = list(configs())
    walks = []
    for release, environment, config in todo:
        walk = Walk(config, seed, record=True)
        walk.go(steps // len(todo))
        advance(walk.steps)
        walks.append((release, environment, walk))
    return walks


def main() -> None:
    """Walk, and print a table."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description="random walk with concrete values")
    parser.add_argument("--steps", type=int, default=1_000_000, help="in total (default 1000000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--explore", action="store_true", help="ask the explorer for all of it")
    parser.add_argument("--examples", action="store_true", help="print the shortest of each kind")
    options = parser.parse_args()
    with tqdm(total=options.steps, unit="step", unit_scale=True) as bar:
        walks = walk_all(options.steps, options.seed, bar.update)
    print(table(walks))
    if options.examples:
        for release, environment, walk in walks:
            for wrong, steps in walk.example.items():
                print(f"{release}, {environment}: {wrong.kind} {wrong.field}: {'; '.join(steps)}")
    if options.explore:
        for release, environment, walk in walks:
            for wrong in sorted(walk.wrong.keys() - known(explore(walk.config)), key=str):
                print(f"{release}, {environment}: the explorer does not know {wrong}")


if __name__ == "__main__":
    main()
