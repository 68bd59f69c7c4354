"""The model: what L0's nested VMX does, in plain Python, values and all.

Method names are KVM's (nested.c, vmx.c). A method executes VMX instructions through `Nvmx._vmread`
and its like, which move values between the VMCSs and append to `Nvmx.trace`; everything else about
the cost is derived from that trace. Which fields a part of KVM touches is in
``data/l0_paths.csv``; when the part runs is here.

What decides L0's behaviour besides the values is `Control`; the automaton is compiled by visiting
all of its reachable values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from nvmx_lab import vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import LOGGED_RELEASE, Config, base_features
from nvmx_lab.nested.ops import Kind, Operation
from nvmx_lab.nested.paths import Access, Row, lengths, paths
from nvmx_lab.nested.policies import SYNC_POLICIES

MAJOR_CONTROLS = frozenset(
    {
        "PIN_BASED_VM_EXEC_CONTROL",
        "CPU_BASED_VM_EXEC_CONTROL",
        "SECONDARY_VM_EXEC_CONTROL",
        "VM_ENTRY_CONTROLS",
        "VM_EXIT_CONTROLS",
    }
)
"""The five control fields whose VMWRITE makes the CPU repeat all checks at the next VM-entry."""

TO_USER_SPACE = frozenset({"IO_INSTRUCTION", "EPT_MISCONFIG"})
"""L1 exits that L0 completes in its user space (L1's devices are emulated there)."""

NO_SKIP = frozenset(
    {"EXTERNAL_INTERRUPT", "EPT_VIOLATION", "EPT_MISCONFIG", "DR_ACCESS", "IO_INSTRUCTION"}
)
"""L1 exits after which L0 skips no instruction, or whose path already holds the skip."""

CONSUMES_RARE = frozenset({"VM_ENTRY_CONTROLS"})
"""Fields whose VMWRITE makes an entry check read a rare field: load-BNDCFGS and GUEST_BNDCFGS."""

EXIT_INFO = "exit-info(read-only)"
VM_FAIL_FIELD = "VM_INSTRUCTION_ERROR"
SYSENTER = ("GUEST_SYSENTER_CS", "GUEST_SYSENTER_ESP", "GUEST_SYSENTER_EIP")
INTR_INFO_VALID = 1 << 31
AR_BYTES_MASK = 0x1F0FF
WIDTH_MASK = {"16": 0xFFFF, "32": 0xFFFFFFFF, "64": (1 << 64) - 1, "natural": (1 << 64) - 1}

Vmcs = dict[str, int]


class VmFail(NamedTuple):
    """A failed VMX instruction of L1: the SDM's error number, None for VMfailInvalid."""

    number: int | None


class Control(NamedTuple):
    """The control state: all that decides which instructions L0 executes, besides the operation.

    Attributes
    ----------
    vmxon, guest_mode, has_vmcs12, launched : bool
        L1 is in VMX operation; L2 runs; L1 has a current VMCS; that VMCS is launched.
    loaded : str
        The VMCS that is loaded on L0's CPU, ``"vmcs01"`` or ``"vmcs02"``.
    need_sync_vmcs02_to_vmcs12_rare, dirty_vmcs12, need_vmcs12_to_shadow_sync : bool
        As in ``struct nested_vmx``.
    written : frozenset of str
        Major control fields that L1 changed since the last nested entry.
    evmcs_groups : frozenset of str
        Clean-field groups of the enlightened VMCS that L1 changed since the last nested entry.
    controls_written : frozenset of str
        VMCSs of which L0 wrote a major control since they were last entered.
    host_rsp_stale : frozenset of str
        VMCSs whose HOST_RSP differs from L0's stack.
    legacy, efer_differs, xapic : bool
        L2 is outside IA-32e mode; L2's EFER is not the host's; L2 uses the APIC-access page.
    dr_unlocked : bool
        L1's debug registers were handed to it: L0 takes them back at the next exit.
    smm, halted, interrupted : bool
        An SMI took the vCPU out of L2; L2 was entered halted and has not run since; after a nested
        exit L0 returned to its user space before it entered L1.
    policy_memory : hashable
        What the sync policy remembers, None at first.
    """

    vmxon: bool = False
    guest_mode: bool = False
    has_vmcs12: bool = False
    launched: bool = False
    loaded: str = "vmcs01"
    need_sync_vmcs02_to_vmcs12_rare: bool = False
    dirty_vmcs12: bool = False
    need_vmcs12_to_shadow_sync: bool = False
    written: frozenset[str] = frozenset()
    evmcs_groups: frozenset[str] = frozenset()
    controls_written: frozenset[str] = frozenset()
    host_rsp_stale: frozenset[str] = frozenset()
    legacy: bool = False
    efer_differs: bool = True
    xapic: bool = True
    dr_unlocked: bool = False
    smm: bool = False
    halted: bool = False
    interrupted: bool = False
    policy_memory: Hashable = None


@dataclass
class Trace:
    """What one operation cost: instructions in order, and the events that are no instruction."""

    accesses: list[Access] = field(default_factory=list)
    transitions: int = 0
    control_checks: int = 0
    field_lookups: int = 0
    pulls: int = 0
    rare_vmreads: int = 0
    l1_vmreads: int = 0
    l1_vmwrites: int = 0
    instructions: float = 0.0


class Violation(AssertionError):
    """L0 did what no KVM may do, whatever the values: the kernel's own warning would fire.

    Parameters
    ----------
    rule : str
        ``"warning"`` (WARN_ON_ONCE of copy_vmcs02_to_vmcs12_rare) or ``"not loaded"`` (an
        instruction meant for a VMCS that is not the loaded one).
    what : str
        The sentence about it.
    """

    def __init__(self, rule: str, what: str) -> None:
        self.rule = rule
        super().__init__(what)


class NestedState(NamedTuple):
    """What a migration carries: KVM_GET_NESTED_STATE, and the guest's memory that matters here."""

    vmxon: bool
    guest_mode: bool
    vmptr: str | None
    vmcs12: Vmcs
    launched: bool
    memory: dict[str, tuple[Vmcs, bool]]
    smm: bool = False
    smram: Vmcs = {}  # noqa: RUF012 - a named tuple's default; never written to


DYNAMIC = frozenset(
    {"legacy", "efer_differs", "xapic", "slow", "dirty_guest_grp1", "dirty_guest_grp2"}
)
"""Condition tokens that depend on the control state; ``changed:FIELD`` does too."""

CONFIG_TOKENS = frozenset(
    {"shadow_vmcs", "evmcs", "mpx", "apicv", "pml", "vid", "pae", "tpr_shadow", "load_pat"}
)
"""Condition tokens that are options of `Config`; every other token is a feature of the release."""


def _static_token(config: Config, token: str) -> bool:
    if token in CONFIG_TOKENS:
        return bool(getattr(config, token))
    return token in config.kvm.features


@functools.cache
def _resolved_paths(config: Config) -> Mapping[str, tuple[Row, ...]]:
    """Return the paths of one L0: rows that never run dropped, conditions that always hold too."""
    resolved: dict[str, tuple[Row, ...]] = {}
    logged = base_features(LOGGED_RELEASE)
    for path, rows in paths().items():
        kept = []
        for row in rows:
            dynamic = []
            # The lengths are of the release that was logged: what it does not execute comes on top.
            not_in_logs = row.accesses[0].op in ("VMREAD", "VMWRITE") and any(
                token.removeprefix("!") in logged and token.startswith("!")
                for token in row.condition
            )
            for token in row.condition:
                name = token.removeprefix("!")
                if name in DYNAMIC or name.startswith("changed:"):
                    dynamic.append(token)
                elif _static_token(config, name) == token.startswith("!"):
                    break
            else:
                kept.append(row._replace(condition=tuple(dynamic), not_in_logs=not_in_logs))
        resolved[path] = tuple(kept)
    return resolved


class Nvmx:
    """L0's nested VMX for one L1 vCPU.

    Parameters
    ----------
    config : Config
        Release, policy and machine.

    Attributes
    ----------
    control : Control
        The control state.
    vmcs01, vmcs02, vmcs12, shadow, evmcs, smram : dict of str to int
        The VMCSs, the shadow and the enlightened VMCS, the registers in SMRAM: value by field.
    memory : dict
        The VMCS regions in L1's memory: (fields, launched) by pointer.
    rare, shadow_rw, shadow_ro, exit_info, tracked : sequence or set of str
        Fields that the rare reader reads; that the shadow VMCS has; that an exit hands to L1; that
        L0 keeps up to date when it emulates L2's write of them.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.control = Control(
            legacy=config.legacy, efer_differs=not config.efer_host, xapic=not config.x2apic
        )
        self.trace = Trace()
        self.vmcs01: Vmcs = {}
        self.vmcs02: Vmcs = {}
        self.vmcs12: Vmcs = {}  # cached_vmcs12
        self.shadow: Vmcs = {}
        self.evmcs: Vmcs = {}
        self.memory: dict[str, tuple[Vmcs, bool]] = {}  # vmptr -> (vmcs12, launched)
        self.smram: Vmcs = {}
        self.entry_failure: Vmcs = {}  # exit information of an entry that fails late
        self.host_state: Vmcs = {}  # HOST_ fields, as the last exit to L1 loaded them
        self.current_vmptr: str | None = None
        absent = {
            f.name
            for f in vmcs.catalogue().values()
            if f.requires in ("apicv", "pml", "preemption_timer")
            and not getattr(config, f.requires)
        }
        order = vmcs.catalogue()
        rw, ro = config.kvm.shadow_rw, config.kvm.shadow_ro
        self._shadow_rw_of_kvm = rw
        self.shadow_rw = tuple(n for n in order if n in rw - absent)
        self.shadow_ro = tuple(n for n in order if n in ro - absent)
        self.exit_info = tuple(
            f.name for f in order.values() if f.group == EXIT_INFO and f.name != VM_FAIL_FIELD
        )
        # Kept up to date when L0 emulates L2's write, so nested exit need not read them.
        self.tracked = {
            *(SYSENTER if "no-sysenter-read" in config.kvm.features else ()),
            *(("GUEST_BNDCFGS",) if "no-bndcfgs-read" in config.kvm.features else ()),
        }
        self.policy = SYNC_POLICIES[config.sync]()
        self.resolved_paths = _resolved_paths(config)
        self.rare = vmcs.rare(mpx=config.mpx and "no-bndcfgs-read" not in config.kvm.features)

    # -- control state -------------------------------------------------------------------------

    def _set(self, **changes: object) -> None:
        self.control = self.control._replace(**changes)  # type: ignore[arg-type]

    def remember(self, memory: Hashable) -> None:
        """Keep what the sync policy wants to know later; part of the control state.

        Raises
        ------
        LabError
            If it cannot be hashed.
        """
        try:
            hash(memory)
        except TypeError:
            kind = type(memory).__name__
            raise LabError(
                "a sync policy remembers something that can change",
                where=f"sync policy {self.config.sync!r}",
                got=kind,
                allowed="numbers, texts, tuples, frozensets",
            ) from None
        self._set(policy_memory=memory)

    def has(self, feature: str) -> bool:
        """Return whether L0's release has the feature."""
        return feature in self.config.kvm.features

    def holds(self, condition: Iterable[str]) -> bool:
        """Return whether every token of a condition of a path table holds now."""
        return all(
            not self._token(token[1:]) if token.startswith("!") else self._token(token)
            for token in condition
        )

    def _token(self, token: str) -> bool:
        state = self.control
        match token:
            case "legacy" | "efer_differs" | "xapic":
                return bool(getattr(state, token))
            case "slow":  # prepare_vmcs02's slow parts always run for an enlightened VMCS
                return state.dirty_vmcs12 or self.config.evmcs
            case "dirty_guest_grp1" | "dirty_guest_grp2":
                group = token.removeprefix("dirty_").upper()
                return state.dirty_vmcs12 or group in state.evmcs_groups
            case _ if token.startswith("changed:"):
                return token.removeprefix("changed:") in state.written
        return _static_token(self.config, token)

    # -- instructions --------------------------------------------------------------------------

    def _loaded_vmcs(self) -> Vmcs:
        return self.vmcs02 if self.control.loaded == "vmcs02" else self.vmcs01

    def _emit(self, op: str, name: str, function: str) -> None:
        self.trace.accesses.append(Access(op, name, function))

    def _vmread(self, name: str, function: str) -> int:
        self._emit("VMREAD", name, function)
        return self._loaded_vmcs().get(name, 0)

    def _vmwrite(self, name: str, value: int, function: str) -> None:
        self._emit("VMWRITE", name, function)
        self._loaded_vmcs()[name] = value
        if name in MAJOR_CONTROLS:
            loaded = self.control.loaded
            self._set(controls_written=self.control.controls_written | {loaded})

    def _run(self, path: str, left_out: Collection[str] = ()) -> None:
        """Execute a straight path of ``data/l0_paths.csv``, but for accesses of these fields."""
        for row in self.resolved_paths[path]:
            if not self.holds(row.condition):
                continue
            if row.not_in_logs:
                self._stretch("single_access", len(row.accesses))
            for access in row.accesses:
                if access.field in left_out:
                    continue
                if access.op == "VMREAD":
                    value = self._vmread(access.field, access.function)
                    if row.copies_vmcs12:
                        self.vmcs12[access.field] = value
                elif access.op == "VMWRITE":
                    source = self.vmcs12 if row.copies_vmcs12 else self._loaded_vmcs()
                    self._vmwrite(access.field, source.get(access.field, 0), access.function)
                else:
                    self.trace.accesses.append(access)

    def _stretch(self, name: str, times: int = 1) -> None:
        """Add the retired instructions of a stretch of ``data/l0_lengths.csv``."""
        table = lengths()
        general = (name, name.partition("+")[0], name.partition(".")[0])
        for row in next(table[key] for key in general if key in table):
            if self.holds(row.condition):
                self.trace.instructions += times * row.instructions
                return

    def _switch_vmcs(self, target: str, path: str) -> None:
        self._set(loaded=target)
        self._run(path)

    # -- the patch: rare fields ----------------------------------------------------------------

    def sync_vmcs02_to_vmcs12_rare(self) -> None:
        """Read every rare field of vmcs02 into vmcs12; vmcs02 must be loaded."""
        loaded = self.control.loaded
        if loaded != "vmcs02":
            raise Violation("not loaded", f"sync_vmcs02_to_vmcs12_rare: {loaded} is loaded")
        for name in self.rare:
            self.vmcs12[name] = self._vmread(name, "sync_vmcs02_to_vmcs12_rare")
        self.trace.rare_vmreads += len(self.rare)
        self._stretch("rare_field", len(self.rare))
        self._set(need_sync_vmcs02_to_vmcs12_rare=False)

    def copy_vmcs02_to_vmcs12_rare(self) -> None:
        """Pull: switch to vmcs02, read the rare fields, switch back; nothing if already done."""
        if not self.control.need_sync_vmcs02_to_vmcs12_rare:
            return
        loaded = self.control.loaded
        if loaded != "vmcs01":
            raise Violation("warning", f"copy_vmcs02_to_vmcs12_rare warns: {loaded} is loaded")
        self._switch_vmcs("vmcs02", "pull.switch")
        self.sync_vmcs02_to_vmcs12_rare()
        self._switch_vmcs("vmcs01", "pull.switch")
        self.trace.pulls += 1
        self._stretch("pull")

    def copy_some_rare_fields(self, names: Collection[str], *, last: bool = False) -> None:
        """Fetch only these rare fields; the flag stays, unless they are the `last` ones missing."""
        wanted = [name for name in self.rare if name in names]
        if not self.control.need_sync_vmcs02_to_vmcs12_rare or not wanted:
            return
        self._switch_vmcs("vmcs02", "pull.switch")
        for name in wanted:
            self.vmcs12[name] = self._vmread(name, "sync_vmcs02_to_vmcs12_rare")
        self.trace.rare_vmreads += len(wanted)
        self._switch_vmcs("vmcs01", "pull.switch")
        self.trace.pulls += 1
        self._stretch("rare_field", len(wanted))
        self._stretch("pull")
        self._set(need_sync_vmcs02_to_vmcs12_rare=not last)

    def rare_fields_stay(self, reason: str, *, foreseen: bool) -> bool:
        """Return whether the rare fields stay in vmcs02 at this exit.

        Never with an enlightened VMCS: L1 reads that without an exit.
        """
        if self.config.evmcs:
            return False
        stay: object = self.policy.at_exit(self, reason, foreseen=foreseen)
        if isinstance(stay, bool):
            return stay
        where = f"sync policy {self.config.sync!r}"
        raise LabError("at_exit must return True or False", where=where, got=stay)

    def sync_vmcs02_to_vmcs12(self, reason: str = "", *, foreseen: bool = False) -> None:
        """Copy L2's state at a nested exit: eager fields always, rare ones by the sync policy."""
        stay = self.rare_fields_stay(reason, foreseen=foreseen)
        if not stay:
            # Before the patch the rare reads stand among the eager ones: same line, same cost.
            self.sync_vmcs02_to_vmcs12_rare()
        self._run("sync_vmcs02_to_vmcs12")
        self._set(need_sync_vmcs02_to_vmcs12_rare=stay)

    # -- shadow VMCS ---------------------------------------------------------------------------

    def copy_shadow_to_vmcs12(self) -> None:
        """Read what L1 wrote to the shadow VMCS without an exit."""
        self._shadow_copy(
            "copy_shadow_to_vmcs12",
            self.shadow_rw if self.has("patch07") else self.shadow_rw + self.shadow_ro,
            self._read_shadow_field,
        )

    def copy_vmcs12_to_shadow(self) -> None:
        """Write vmcs12 to the shadow VMCS for exit-less accesses by L1."""
        names = self.shadow_rw + self.shadow_ro
        self._shadow_copy("nested_sync_vmcs12_to_shadow", names, self._write_shadow_field)
        self._set(need_vmcs12_to_shadow_sync=False)

    def _read_shadow_field(self, name: str) -> None:
        self._emit("VMREAD", name, "copy_shadow_to_vmcs12")
        self.vmcs12[name] = self.shadow.get(name, 0)

    def _write_shadow_field(self, name: str) -> None:
        self._emit("VMWRITE", name, "nested_sync_vmcs12_to_shadow")
        self.shadow[name] = self.vmcs12.get(name, 0)

    def _shadow_copy(
        self, function: str, names: Sequence[str], copy_field: Callable[[str], None]
    ) -> None:
        self._copy_with_shadow_loaded(function, names, copy_field)
        self._stretch("shadow_field", len(names))
        if not self.has("patch09"):
            self.trace.field_lookups += len(names)

    def _copy_with_shadow_loaded(
        self, function: str, names: Sequence[str], copy_field: Callable[[str], None]
    ) -> None:
        self._emit("VMPTRLD", "", function)
        for name in names:
            copy_field(name)
        self._emit("VMCLEAR", "", function)
        self._emit("VMPTRLD", "", function)

    # -- nested exit ---------------------------------------------------------------------------

    def nested_exit(self, reason: str, info: Mapping[str, int] | None = None) -> None:
        """L2 exits, L0 reflects the exit to L1, L1 runs: the exit leg.

        Parameters
        ----------
        reason : str
            Basic exit reason; ``+pull`` behind it tells the oracle that L1 will need a rare field,
            ``+signal`` that L0 returns to user space before it enters L1: see `run`.
        info : mapping of str to int, optional
            Exit-information fields as the CPU writes them to vmcs02.
        """
        self._require(self.control.guest_mode, "L2 does not run")
        reason, _, extra = reason.partition("+")
        self.vmcs02.update(info or {})
        if self.control.halted:
            self._set(halted=False)  # L2 never ran: no VM-exit of the CPU, only the reflection
        else:
            self._vm_exit()
            self._run("vmx_vcpu_run.exit")
        path = f"reflect.{reason}"
        self._run(path if path in paths() else "reflect")
        self.nested_vmx_vmexit(reason, foreseen=extra == "pull")
        if extra == "signal":
            self._set(interrupted=True)
        else:
            self.run()
        self._stretch(f"exit.{reason}")
        if self.control.legacy:
            self._stretch("exit_legacy")

    def run(self) -> None:
        """Enter L1 after a nested exit; KVM_RUN does if a signal came first."""
        self._set(interrupted=False)
        self.vmx_vcpu_run("vmx_vcpu_run.enter", "vmx_vcpu_run.regs")

    def nested_vmx_vmexit(self, reason: str, *, foreseen: bool = False) -> None:
        """Leave L2: copy its state to vmcs12, switch to vmcs01, load L1's host state.

        No `reason` (KVM's exit reason -1): L0 forces the exit and L1 is told nothing.
        """
        self._set(guest_mode=False)
        self.sync_vmcs02_to_vmcs12(reason, foreseen=foreseen)
        if reason:
            self._run("prepare_vmcs12")
            for name in self.exit_info:  # handed down by the reflecting handler: no further VMREAD
                self.vmcs12[name] = self.vmcs02.get(name, 0)
            event = self.vmcs12.get("VM_ENTRY_INTR_INFO_FIELD", 0)
            self.vmcs12["VM_ENTRY_INTR_INFO_FIELD"] = event & ~INTR_INFO_VALID
            self._set(launched=True)
        self._switch_vmcs("vmcs01", "vmx_switch_vmcs")
        self._run("nested_vmx_vmexit")
        self._load_vmcs12_host_state(tell=bool(reason) or self.has("smm-shadow-sync"))

    def _load_vmcs12_host_state(self, *, tell: bool) -> None:
        """Load L1's host state; `tell`: the shadow VMCS must follow vmcs12 before L1 runs."""
        if tell and (self.config.shadow_vmcs or self.config.evmcs):
            self._set(need_vmcs12_to_shadow_sync=True)
        self.host_state = {name: self.vmcs12.get(name, 0) for name in vmcs.host_state()}
        self._run("load_vmcs12_host_state")

    def vmx_vcpu_run(self, enter: str, registers: str | None) -> None:
        """Enter the loaded VMCS: sync the shadow VMCS, flush dirty registers, VM-entry."""
        loaded = self.control.loaded
        if (loaded == "vmcs02") != self.control.guest_mode:
            runs = "L2" if self.control.guest_mode else "L1"
            raise Violation("not loaded", f"vmx_vcpu_run enters {runs}: {loaded} is loaded")
        if not self.control.guest_mode and self.control.need_vmcs12_to_shadow_sync:
            if self.config.evmcs:
                self.evmcs = dict(self.vmcs12)  # copy_vmcs12_to_enlightened: plain stores
                self._set(need_vmcs12_to_shadow_sync=False)
            elif self.config.shadow_vmcs and self.control.has_vmcs12:
                self.copy_vmcs12_to_shadow()
        self._run(enter)
        if registers is not None:
            self._run(registers)
        if loaded in self.control.host_rsp_stale:
            self._run("vmx_update_host_rsp")
            self._stretch("single_access")
            self._set(host_rsp_stale=self.control.host_rsp_stale - {loaded})
        if loaded in self.control.controls_written:
            self.trace.control_checks += 1
            self._set(controls_written=self.control.controls_written - {loaded})

    def _vm_exit(self) -> None:
        self.trace.transitions += (
            1  # the pair: this VM-exit and the VM-entry that ends the operation
        )

    def _require(self, condition: bool, what: str) -> None:
        if not condition:
            raise LabError(what, where="operation on the nested VMX model")

    # -- L1 exits that L0 handles --------------------------------------------------------------

    def _l1_exit(self, handler: Callable[[], object], stretch: str, *, skip: bool = True) -> None:
        """One exit of L1: common entry path, its handler, skip the instruction, enter L1 again."""
        self._require(not self.control.guest_mode, "L1 does not run")
        self._vm_exit()
        self._run("vmx_vcpu_run.exit")
        if self.control.dr_unlocked:
            self._set(dr_unlocked=False)
            self._run("vmx_sync_dirty_debug_regs")
        self._run("vmx_handle_exit")
        handler()
        if skip:
            self._run("skip")
        self._stretch(stretch)

    def l1_exit(self, reason: str) -> None:
        """Handle an exit of L1 that has nothing to do with nesting (RDMSR, EPT violation, ...).

        VMRESUME and VMLAUNCH here are entries that failed before they reached L2.

        ``+irq`` behind the reason: L0 delivers a virtual interrupt to L1 on the way back;
        ``+eoi``: the WRMSR is an end of interrupt that updates the virtual ISR.
        """
        bare, _, extra = reason.partition("+")
        if bare in ("VMRESUME", "VMLAUNCH"):
            self.nested_vmx_run(launch=bare == "VMLAUNCH", fails="controls")
            return

        def handle() -> None:
            named = [f"l1_exit.{reason}", f"l1_exit.{bare}", "l1_exit"]
            self._run(next(path for path in named if path in paths()))
            if bare == "DR_ACCESS":
                self._set(dr_unlocked=True)
            if bare in TO_USER_SPACE and self.has("host-kstack"):
                self._set(host_rsp_stale=frozenset({"vmcs01", "vmcs02"}))

        self._l1_exit(handle, f"l1_exit.{reason}", skip=bare not in NO_SKIP)
        silent = bare in ("EXTERNAL_INTERRUPT", "EPT_VIOLATION", "DR_ACCESS")
        if extra == "irq":
            self._run("vmx_set_rvi")
        self.vmx_vcpu_run("vmx_vcpu_run.enter", None if silent else "vmx_vcpu_run.rip")

    def _vmx_instruction(
        self, handler: Callable[[], VmFail | None], path: str, stretch: str
    ) -> VmFail | None:
        """Handle an exit of L1 for a VMX instruction: decode, do it, report success or failure."""
        result: list[VmFail | None] = []

        def handle() -> None:
            self._run(path)
            result.append(self._report(handler()))
            self._run("set_rflags" if path == "nested_vmx_get_vmptr" else "nested_vmx_succeed")

        self._l1_exit(handle, stretch)
        self.vmx_vcpu_run("vmx_vcpu_run.enter", "vmx_vcpu_run.rip")
        return result[0]

    def _report(self, failure: VmFail | None) -> VmFail | None:
        """Note the number of a VMfailValid in vmcs12."""
        if failure is not None and failure.number is not None:
            self.vmcs12[VM_FAIL_FIELD] = failure.number
            if self.config.evmcs and self.has("evmcs-fail-sync"):
                self._set(need_vmcs12_to_shadow_sync=True)
        return failure

    # -- VMREAD and VMWRITE by L1 --------------------------------------------------------------

    def traps(self, name: str, *, write: bool) -> bool:
        """Return whether an access by L1 to the field exits to L0."""
        if not (self.config.shadow_vmcs and self.control.has_vmcs12):
            return True
        if name in self.shadow_rw:
            return False
        # Before patch 07 the VMWRITE bitmap equalled the VMREAD bitmap.
        return not (name in self.shadow_ro and (not write or not self.has("patch07")))

    def l1_vmread(self, name: str) -> int | VmFail:
        """L1 executes VMREAD; return what it sees."""
        vmcs.field(name)
        if not self.traps(name, write=False):
            self.trace.l1_vmreads += 1
            return self.shadow.get(name, 0)
        seen: list[int] = []

        def handle() -> VmFail | None:
            value = self.handle_vmread(name)
            if isinstance(value, VmFail):
                return value
            seen.append(value)
            return None

        failure = self._vmx_instruction(handle, "handle_vmread", "l1_exit.VMREAD")
        return failure if failure is not None else seen[0]

    def handle_vmread(self, name: str) -> int | VmFail:
        """L0 emulates VMREAD; a rare field is pulled first."""
        if not self.control.has_vmcs12:
            return VmFail(None)
        if not vmcs.field(name).in_vmcs12:
            return VmFail(12)
        self.policy.before_vmread(self, name)
        return self.vmcs12.get(name, 0)

    def is_shadow_field_rw(self, name: str) -> bool:
        """Return KVM's test of that name; the machine's missing features do not matter to it."""
        return name in self._shadow_rw_of_kvm

    def l1_vmwrite(self, name: str, value: int) -> VmFail | None:
        """L1 executes VMWRITE."""
        value &= WIDTH_MASK[vmcs.field(name).width]
        if not self.traps(name, write=True):
            self.trace.l1_vmwrites += 1
            self.shadow[name] = value
            self._note_control_write(name)
            return None
        return self._vmx_instruction(
            lambda: self.handle_vmwrite(name, value), "handle_vmwrite", "l1_exit.VMWRITE"
        )

    def handle_vmwrite(self, name: str, value: int) -> VmFail | None:
        """L0 emulates VMWRITE; whatever dirties vmcs12 pulls first."""
        if not self.control.has_vmcs12:
            return VmFail(None)
        rw_shadowed = self.is_shadow_field_rw(name)
        known = vmcs.field(name).in_vmcs12
        if self.has("validate-first") and not known:
            return VmFail(12)
        if self.vmwrite_may_pull(name):
            self.policy.before_vmwrite(self, name)
        if not known:
            return VmFail(12)
        if self.has("patch08") and name.startswith("GUEST_") and name.endswith("_AR_BYTES"):
            value &= AR_BYTES_MASK
        self.vmcs12[name] = value
        self._note_control_write(name)
        if not rw_shadowed:
            if self.config.shadow_vmcs and name in self.shadow_ro:
                self._copy_with_shadow_loaded(
                    "handle_vmwrite", (name,), self._write_shadow_field_of_vmwrite
                )
            # L1's host state never reaches vmcs02: an exit loads it from vmcs12.
            if not (self.has("clean-host-writes") and name in vmcs.host_state()):
                self._set(dirty_vmcs12=True)
        return None

    def vmwrite_may_pull(self, name: str) -> bool:
        """Return whether a trapped VMWRITE asks the sync policy; every release of KVM does."""
        if self.has("no-pull-host-writes") and name in vmcs.host_state():
            return False
        if self.has("no-pull-unchecked-writes"):
            return vmcs.is_rare(name) or name in CONSUMES_RARE
        return True

    def _write_shadow_field_of_vmwrite(self, name: str) -> None:
        self._emit("VMWRITE", name, "handle_vmwrite")
        self.shadow[name] = self.vmcs12[name]

    def _note_control_write(self, name: str) -> None:
        if name in MAJOR_CONTROLS:
            self._set(written=self.control.written | {name})

    def evmcs_write(self, name: str, value: int) -> None:
        """L1 stores to its enlightened VMCS: no exit; the clean-field group becomes dirty."""
        self._require(self.config.evmcs, "L1 has no enlightened VMCS")
        self.evmcs[name] = value & WIDTH_MASK[vmcs.field(name).width]
        self._set(evmcs_groups=self.control.evmcs_groups | {vmcs.field(name).evmcs_clean_group})
        self._note_control_write(name)

    def evmcs_read(self, name: str) -> int:
        """L1 loads from its enlightened VMCS."""
        self._require(self.config.evmcs, "L1 has no enlightened VMCS")
        return self.evmcs.get(name, 0)

    # -- current VMCS --------------------------------------------------------------------------

    def vmxon(self) -> VmFail | None:
        """L1 executes VMXON."""
        return self._vmx_instruction(
            self.enter_vmx_operation, "nested_vmx_get_vmptr", "l1_exit.VMXON"
        )

    def enter_vmx_operation(self) -> VmFail | None:
        """Allocate vmcs02 and the shadow VMCS; each is VMCLEARed before its first use."""
        if self.control.vmxon:
            return VmFail(15)
        self._clear_vmcs02_and_shadow("enter_vmx_operation")
        self.vmcs02 = {}
        self._set(vmxon=True)
        return None

    def _clear_vmcs02_and_shadow(self, function: str) -> None:
        for _ in range(1 + self.config.shadow_vmcs):
            self._emit("VMCLEAR", "", function)

    def vmxoff(self) -> VmFail | None:
        """L1 executes VMXOFF: free_nested, vmcs12 is dropped, not written back."""
        return self._vmx_instruction(self.free_nested, "handle_vmoff", "l1_exit.VMXOFF")

    def free_nested(self) -> None:
        """Free vmcs02 and forget the current VMCS; no release of KVM resets the patch's flag."""
        if self.control.vmxon:
            self._run("vmx_disable_shadow_vmcs")
            self._clear_vmcs02_and_shadow("free_nested")
        self.vmcs02, self.vmcs12, self.shadow, self.evmcs = {}, {}, {}, {}
        self.current_vmptr = None
        self._set(
            vmxon=False,
            has_vmcs12=False,
            launched=False,
            need_vmcs12_to_shadow_sync=False,
            written=frozenset(),
            evmcs_groups=frozenset(),
            smm=False,
            halted=False,
            interrupted=False,
        )
        if self.has("flag-reset"):
            self._set(need_sync_vmcs02_to_vmcs12_rare=False)

    def nested_release_vmcs12(self) -> None:
        """Write the current VMCS back to L1's memory; pulls first."""
        if self.current_vmptr is None:
            return
        self.policy.before_release(self)
        if self.config.shadow_vmcs:
            self.copy_shadow_to_vmcs12()
            self._run("vmx_disable_shadow_vmcs")
        self.memory[self.current_vmptr] = (dict(self.vmcs12), self.control.launched)
        self.current_vmptr = None
        self._set(has_vmcs12=False, need_vmcs12_to_shadow_sync=False)

    def vmclear(self, vmptr: str) -> VmFail | None:
        """L1 executes VMCLEAR."""

        def handle() -> None:
            if vmptr == self.current_vmptr and not self.config.evmcs:
                self.nested_release_vmcs12()
            fields, _ = self.memory.get(vmptr, ({}, False))
            self.memory[vmptr] = (fields, False)

        return self._vmx_instruction(handle, "nested_vmx_get_vmptr", "l1_exit.VMCLEAR")

    def vmptrld(self, vmptr: str) -> VmFail | None:
        """L1 executes VMPTRLD; the same VMCS again changes nothing."""

        def handle() -> None:
            if vmptr == self.current_vmptr:
                return
            self.nested_release_vmcs12()
            fields, launched = self.memory.get(vmptr, ({}, False))
            self.vmcs12 = dict(fields)
            self.set_current_vmptr(vmptr, launched=launched)

        return self._vmx_instruction(handle, "nested_vmx_get_vmptr", "l1_exit.VMPTRLD")

    def set_current_vmptr(self, vmptr: str, *, launched: bool) -> None:
        """Make a VMCS current: everything of it is new to vmcs02 and to the shadow VMCS."""
        self.current_vmptr = vmptr
        self._run("set_current_vmptr")
        if self.config.evmcs:
            self.evmcs = dict(self.vmcs12)
        self._set(
            has_vmcs12=True,
            launched=launched,
            dirty_vmcs12=True,
            need_vmcs12_to_shadow_sync=self.config.shadow_vmcs,
        )

    # -- nested entry --------------------------------------------------------------------------

    def vmlaunch(self) -> VmFail | None:
        """L1 executes VMLAUNCH."""
        return self.nested_vmx_run(launch=True)

    def vmresume(self) -> VmFail | None:
        """L1 executes VMRESUME."""
        return self.nested_vmx_run(launch=False)

    def nested_vmx_run(
        self, *, launch: bool, fails: str = "", halted: bool = False
    ) -> VmFail | None:
        """Emulate VMLAUNCH or VMRESUME up to the VM-entry of L2.

        Parameters
        ----------
        launch : bool
            VMLAUNCH, else VMRESUME.
        fails : str
            Which check vmcs12 does not pass: ``"controls"`` (control and host-state fields:
            VMfail), ``"guest-state"`` or ``"msr-load"`` (L1 sees an exit of a failed entry).
        halted : bool
            L1 enters L2 in the HLT activity state: L2 does not run before something wakes it.
        """
        failure: list[VmFail | None] = [None]

        def handle() -> None:
            self._run("nested_vmx_run")
            if not self.control.has_vmcs12:
                failure[0] = VmFail(None)
                return
            if self.config.evmcs:
                self.vmcs12.update(self.evmcs)  # copy_enlightened_to_vmcs12
            elif self.config.shadow_vmcs:
                self.copy_shadow_to_vmcs12()
            if launch == self.control.launched:
                failure[0] = VmFail(4 if launch else 5)
                return
            if fails == "controls":
                failure[0] = VmFail(7)
                return
            self.nested_vmx_enter_non_root_mode(fails)

        self._l1_exit(handle, "l1_exit.VMRESUME", skip=False)
        if self._report(failure[0]) is not None:
            self._run("nested_vmx_succeed")
            self._run("skip")
        if not self.control.guest_mode:
            self.vmx_vcpu_run("vmx_vcpu_run.enter", "vmx_vcpu_run.rip")
        elif halted:
            self._set(halted=True)
        else:
            self._run_l2()
        return failure[0]

    def nested_vmx_enter_non_root_mode(self, fails: str = "") -> None:
        """Switch to vmcs02 and bring it up to date from vmcs12; `fails` as in `nested_vmx_run`."""
        if not self.config.evmcs:  # as at the exit
            self.policy.at_entry(self)
        self._run("nested_vmx_enter")
        self._set(guest_mode=True)
        self._switch_vmcs("vmcs02", "vmx_switch_vmcs")
        if self.has("pull-at-dirty-entry") and self._dirty_and_unpulled():
            self.sync_vmcs02_to_vmcs12_rare()
        self.prepare_vmcs02(whole=fails != "guest-state")
        if fails:
            self._fail_entry()

    def _fail_entry(self) -> None:
        """Unwind (vmentry_fail_vmexit): nothing of L2 was run, so nothing of it is copied."""
        self._set(guest_mode=False)
        self._switch_vmcs("vmcs01", "vmx_switch_vmcs")
        for name in ("VM_EXIT_REASON", "EXIT_QUALIFICATION"):
            self.vmcs12[name] = self.entry_failure.get(name, 0)
        self._load_vmcs12_host_state(tell=True)

    def prepare_vmcs02(self, *, whole: bool = True) -> None:
        """Write vmcs02: a clean vmcs12 needs a few fields, a dirty one nearly all.

        Not `whole`: only what is written before the checks of the guest state.
        """
        self._stretch("entry.dirty" if self.control.dirty_vmcs12 else "entry.clean")
        self._run("prepare_vmcs02_early")
        self._run("nested_get_vmcs12_pages")
        if whole:
            self.prepare_vmcs02_rare()
            self._run("prepare_vmcs02")
            for name in ("GUEST_RSP", "GUEST_RIP"):  # in the register cache until L2 is entered
                self.vmcs02[name] = self.vmcs12.get(name, 0)
            self._set(dirty_vmcs12=False, evmcs_groups=frozenset())
        self._set(written=frozenset())

    def prepare_vmcs02_rare(self) -> None:
        """Write what only a dirty vmcs12 changes."""
        left_out: Sequence[str] = ()
        if self.has("skip-rare-at-entry") and self._dirty_and_unpulled():
            left_out = self.rare
            self._stretch("single_access", -len(left_out))
        self._run("prepare_vmcs02_rare", left_out)

    def _dirty_and_unpulled(self) -> bool:
        return self.control.dirty_vmcs12 and self.control.need_sync_vmcs02_to_vmcs12_rare

    def _run_l2(self) -> None:
        """Enter L2 for the first time since its VM-entry was emulated."""
        self._run("vmx_load_mmu_pgd")
        self.vmx_vcpu_run("vmx_vcpu_run.nested_enter", "vmx_vcpu_run.regs.nested")

    # -- L2 ------------------------------------------------------------------------------------

    def l2_write(self, name: str, value: int) -> None:
        """L2 changes a field of its own state."""
        self._require_l2()
        value &= WIDTH_MASK[vmcs.field(name).width]
        self.vmcs02[name] = value
        if name in self.tracked:
            self.vmcs12[name] = value

    def l2_read(self, name: str) -> int:
        """Return what L2 has in a field of its state."""
        self._require_l2()
        return self.vmcs02.get(name, 0)

    def l0_exit(self, reason: str) -> None:
        """L2 exits, L0 handles it, L2 goes on: L1 sees nothing."""
        self._require_l2()
        self._vm_exit()
        self._run("vmx_vcpu_run.exit")
        self._run("l0_exit")
        self.vmx_vcpu_run("vmx_vcpu_run.enter", None)
        self._stretch(f"l0_exit.{reason}")

    def _require_l2(self) -> None:
        self._require(self.control.guest_mode and not self.control.halted, "L2 does not run")

    # -- system management ---------------------------------------------------------------------

    def smi(self) -> None:
        """SMI: leave L2 without telling L1; its registers go to SMRAM (enter_smm)."""
        self._require(self.control.guest_mode, "L2 does not run")
        if not self.control.halted:
            self._vm_exit()
            self._run("vmx_vcpu_run.exit")
        self.smram = {name: self.vmcs02.get(name, 0) for name in vmcs.saved_in_smram()}
        self.nested_vmx_vmexit("")
        self._set(smm=True, halted=False)
        self.vmx_vcpu_run("vmx_vcpu_run.enter", None)

    def rsm(self) -> None:
        """RSM: return to L2, an entry from vmcs12 without the shadow VMCS, then SMRAM."""
        self._require(self.control.smm, "no SMI took the vCPU out of L2")
        self._set(smm=False)
        self._vm_exit()
        self._run("vmx_vcpu_run.exit")
        self.nested_vmx_enter_non_root_mode()
        self._run_l2()
        self.vmcs02.update((name, self.smram.get(name, 0)) for name in vmcs.saved_in_smram())

    # -- migration -----------------------------------------------------------------------------

    def get_nested_state(self) -> NestedState:
        """KVM_GET_NESTED_STATE: what a migration target gets."""
        if self.control.guest_mode:
            self.sync_vmcs02_to_vmcs12()
            if self.control.need_sync_vmcs02_to_vmcs12_rare:
                self.sync_vmcs02_to_vmcs12_rare()
        elif self.control.has_vmcs12:
            self.policy.before_get_nested_state(self)
            if not self.control.need_vmcs12_to_shadow_sync:
                if self.config.evmcs:
                    self.vmcs12.update(self.evmcs)
                elif self.config.shadow_vmcs:
                    self.copy_shadow_to_vmcs12()
        return NestedState(
            self.control.vmxon,
            self.control.guest_mode,
            self.current_vmptr,
            dict(self.vmcs12),
            self.control.launched,
            {ptr: (dict(fields), launched) for ptr, (fields, launched) in self.memory.items()},
            self.control.smm,
            dict(self.smram),
        )

    def set_nested_state(self, state: NestedState) -> None:
        """KVM_SET_NESTED_STATE: leave what was, restore what `state` says."""
        if self.control.guest_mode:
            self.nested_vmx_vmexit("")  # vmx_leave_nested
        self.free_nested()
        self.memory = {
            p: (dict(fields), launched) for p, (fields, launched) in state.memory.items()
        }
        self.smram = dict(state.smram)
        if not state.vmxon:
            return
        self.enter_vmx_operation()
        if state.vmptr is None:
            return
        self.vmcs12 = dict(state.vmcs12)
        self.set_current_vmptr(state.vmptr, launched=state.launched)
        if state.guest_mode:
            self.nested_vmx_enter_non_root_mode()
            self._run_l2()
        else:
            self._set(smm=state.smm)
            self.vmx_vcpu_run("vmx_vcpu_run.enter", None)

    # -- streams -------------------------------------------------------------------------------

    def apply(self, operation: Operation) -> None:
        """Execute one operation of a stream; values do not matter, each VMWRITE is a change."""
        kind, arg = operation
        match kind:
            case Kind.EXIT:
                self.nested_exit(arg)
            case Kind.L0_EXIT:
                self.l0_exit(arg)
            case Kind.L1_EXIT:
                self.l1_exit(arg)
            case Kind.VMREAD:
                self.l1_vmread(arg)
            case Kind.VMWRITE if self.config.evmcs:
                self.evmcs_write(arg, 0)
            case Kind.VMWRITE:
                self.l1_vmwrite(arg, 0)
            case Kind.VMLAUNCH | Kind.VMRESUME:
                # A stream records entries that succeeded: VMLAUNCH where L1 had to launch.
                self._set(launched=kind is Kind.VMRESUME)
                self.nested_vmx_run(launch=kind is Kind.VMLAUNCH)
            case Kind.VMPTRLD:
                self.vmptrld(self.current_vmptr or "A" if arg == "same" else self._other_vmptr())
            case Kind.VMCLEAR:
                current = self.current_vmptr
                self.vmclear(current if arg == "current" and current else self._other_vmptr())
            case Kind.VMXON:
                self.vmxon()
            case Kind.VMXOFF:
                self.vmxoff()
            case Kind.GET_NESTED_STATE:
                self.get_nested_state()
            case Kind.SET_NESTED_STATE:
                self.set_nested_state(self.get_nested_state())
            case Kind.L2_MODE:
                self.l2_mode(arg)

    def _other_vmptr(self) -> str:
        return "B" if self.current_vmptr == "A" else "A"

    def l2_mode(self, mode: str) -> None:
        """L2's environment changed; costs nothing by itself.

        ``long`` and ``legacy`` set its mode, ``efer-host`` makes its EFER the host's, ``x2apic``
        and ``xapic`` set how it reaches its APIC.
        """
        match mode:
            case "long" | "legacy":
                self._set(legacy=mode == "legacy")
            case "efer-host":
                self._set(efer_differs=False)
            case "x2apic" | "xapic":
                self._set(xapic=mode == "xapic")
            case _:
                raise LabError("unknown mode of L2", got=mode)

    def start(self) -> None:
        """Bring L1 to where every stream starts: L2 runs, its VMCS clean and launched."""
        self.vmxon()
        self.vmptrld("A")
        self.nested_vmx_run(launch=True)
        self._set(launched=True, dirty_vmcs12=False)
        self.trace = Trace()
