"""Mutants: the model with one mistake each, to show that the explorer can fail.

A mistake is one that somebody changing KVM could make. A mutant either is caught, or says why it
cannot be seen; both teach what the mechanism rests on. All are judged on `BASE`, on which the
explorer finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from nvmx_lab import vmcs
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.flows import EVMCS_GROUPS
from nvmx_lab.nested.model import SYSENTER, NestedState, Nvmx, VmFail
from nvmx_lab.nested.paths import Access, Row
from nvmx_lab.nested.policies import SyncPolicy

BASE: Final = "6.1+flag-reset+smm-shadow-sync"
"""The release on which mutants are judged: the newest, with the mends that none has."""

RIGHTS: Final = ("GUEST_CS_AR_BYTES", "GUEST_SS_AR_BYTES")
PDPTRS: Final = tuple(f"GUEST_PDPTR{n}" for n in range(4))


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes
    ----------
    name : str
        What to call it on the command line.
    meaning : str
        What is changed, in KVM's terms.
    source : str
        Who made the mistake, or where it is listed; ``"own"`` if neither.
    nvmx : type of Nvmx
        The model with the mistake.
    options : mapping of str to bool
        Options of `Config` under which it shows best.
    kvm : str
        The release that it changes.
    harmless : str
        Why nobody outside can see it; empty if the explorer must catch it.
    """

    name: str
    meaning: str
    source: str
    nvmx: type[Nvmx]
    options: Mapping[str, bool]
    kvm: str = BASE
    harmless: str = ""

    @property
    def config(self) -> Config:
        """The L0 on which it is judged."""
        return Config.of(self.kvm, None, **self.options)


_CATALOGUE: dict[str, Mutant] = {}
MUTANTS: Final[Mapping[str, Mutant]] = MappingProxyType(_CATALOGUE)
"""Every mutant by name."""


def mutant(name: str) -> Mutant:
    """Return a mutant by name.

    Raises
    ------
    LabError
        If there is none, with a suggestion if a name is near.
    """
    if name not in MUTANTS:
        raise unknown("mutant", name, MUTANTS)
    return MUTANTS[name]


def _listed(letter: str, history: str = "") -> str:
    return f"the list of bug classes, ({letter})" + (f"; {history}" if history else "")


def _add(
    name: str,
    meaning: str,
    nvmx: type[Nvmx],
    *,
    source: str = "own",
    harmless: str = "",
    **options: bool,
) -> None:
    if name in _CATALOGUE:
        raise LabError("there is a mutant of this name already", got=name)
    _CATALOGUE[name] = Mutant(
        name, meaning, source, nvmx, MappingProxyType(options), harmless=harmless
    )


def _mistake(
    name: str, meaning: str, *, source: str = "own", harmless: str = "", **options: bool
) -> Callable[[type[Any]], type[Any]]:
    """Return a decorator that adds a wrong model, or the model with a wrong policy."""

    def decorate(wrong: type[Any]) -> type[Any]:
        nvmx = _with_policy(wrong) if issubclass(wrong, SyncPolicy) else wrong
        _add(name, meaning, nvmx, source=source, harmless=harmless, **options)
        return wrong

    return decorate


def _with_policy(policy: type[SyncPolicy]) -> type[Nvmx]:
    class WithPolicy(Nvmx):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.policy = policy()

    return WithPolicy


def _without(inner: str, within: str) -> type[Nvmx]:
    """Return the model in which one method does nothing while another runs."""
    outer = getattr(Nvmx, within)

    def run_without(self: Nvmx, *args: object, **kwargs: object) -> object:
        setattr(self, inner, lambda *args, **kwargs: None)
        try:
            return outer(self, *args, **kwargs)
        finally:
            delattr(self, inner)

    return type("Without", (Nvmx,), {within: run_without})


def _drop(l0: Nvmx, path: str, names: Collection[str]) -> None:
    """Take fields out of a path of KVM."""
    kept = tuple(
        row._replace(accesses=tuple(a for a in row.accesses if a.field not in names))
        for row in l0.resolved_paths[path]
    )
    l0.resolved_paths = {**l0.resolved_paths, path: kept}


# -- the list of bug classes -------------------------------------------------------------------


@_mistake("no-pull-in-vmwrite", "handle_vmwrite does not pull", source=_listed("a"))
class _NoPullInVmwrite(SyncPolicy):
    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        pass


@_mistake(
    "pull-for-rare-vmwrites-only",
    "handle_vmwrite pulls only if the field written is rare",
    source=_listed("b"),
)
class _PullForRareVmwritesOnly(SyncPolicy):
    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        if vmcs.is_rare(name):
            l0.copy_vmcs02_to_vmcs12_rare()


@_mistake(
    "write-before-pull",
    "handle_vmwrite writes vmcs12 first and pulls afterwards",
    source=_listed("c"),
)
class _WriteBeforePull(_with_policy(_NoPullInVmwrite)):  # type: ignore[misc]
    def handle_vmwrite(self, name: str, value: int) -> VmFail | None:
        failure: VmFail | None = super().handle_vmwrite(name, value)
        if failure is None and not self.is_shadow_field_rw(name):
            self.copy_vmcs02_to_vmcs12_rare()
        return failure


@_mistake("no-pull-in-release", "nested_release_vmcs12 does not pull", source=_listed("d"))
class _NoPullInRelease(SyncPolicy):
    def before_release(self, l0: Nvmx) -> None:
        pass


@_mistake(
    "no-pull-in-get-nested-state",
    "vmx_get_nested_state does not pull while L1 runs",
    source=_listed("e", "KVM 5.3 to 5.10, fixed by d51e1d3f6b42"),
)
class _NoPullInGetNestedState(SyncPolicy):
    def before_get_nested_state(self, l0: Nvmx) -> None:
        pass


@_mistake(
    "flag-outlives-vmcs02",
    "free_nested does not reset need_sync_vmcs02_to_vmcs12_rare",
    source=_listed("f", "every lazy KVM release"),
)
class _FlagOutlivesVmcs02(Nvmx):
    def free_nested(self) -> None:
        flag = self.control.need_sync_vmcs02_to_vmcs12_rare
        super().free_nested()
        self._set(need_sync_vmcs02_to_vmcs12_rare=flag)


@_mistake(
    "lazy-with-evmcs",
    "sync_vmcs02_to_vmcs12 leaves rare fields in vmcs02 although L1 uses an enlightened VMCS",
    source=_listed("g"),
    evmcs=True,
)
class _LazyWithEvmcs(Nvmx):
    def rare_fields_stay(self, reason: str, *, foreseen: bool) -> bool:
        return self.policy.at_exit(self, reason, foreseen=foreseen)


@_mistake(
    "rare-field-rw-shadowed",
    "SHADOW_FIELD_RW(GUEST_GS_BASE): a rare field joins the RW-shadowed ones",
    source=_listed("h"),
)
class _RareFieldRwShadowed(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.shadow_rw = (*self.shadow_rw, "GUEST_GS_BASE")
        self._shadow_rw_of_kvm |= {"GUEST_GS_BASE"}


@_mistake(
    "rare-field-ro-shadowed",
    "SHADOW_FIELD_RO(GUEST_GS_BASE): a rare field joins the RO-shadowed ones",
    source=_listed("h"),
)
class _RareFieldRoShadowed(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.shadow_ro = (*self.shadow_ro, "GUEST_GS_BASE")


@_mistake(
    "flag-cleared-before-pull",
    "copy_vmcs02_to_vmcs12_rare clears the flag before it looks at it",
    source=_listed("i"),
)
class _FlagClearedBeforePull(Nvmx):
    def copy_vmcs02_to_vmcs12_rare(self) -> None:
        self._set(need_sync_vmcs02_to_vmcs12_rare=False)
        super().copy_vmcs02_to_vmcs12_rare()


@_mistake(
    "flag-cleared-before-reads",
    "sync_vmcs02_to_vmcs12_rare clears the flag as its first step, not as its last",
    source=_listed("i"),
    harmless="only order: nothing looks at the flag between the reads of one reader",
)
class _FlagClearedBeforeReads(Nvmx):
    def sync_vmcs02_to_vmcs12_rare(self) -> None:
        self._set(need_sync_vmcs02_to_vmcs12_rare=False)
        super().sync_vmcs02_to_vmcs12_rare()


@_mistake(
    "flag-never-cleared",
    "sync_vmcs02_to_vmcs12_rare leaves the flag as it was",
    source=_listed("i"),
)
class _FlagNeverCleared(Nvmx):
    def sync_vmcs02_to_vmcs12_rare(self) -> None:
        flag = self.control.need_sync_vmcs02_to_vmcs12_rare
        super().sync_vmcs02_to_vmcs12_rare()
        self._set(need_sync_vmcs02_to_vmcs12_rare=flag)


@_mistake(
    "pull-without-switch",
    "copy_vmcs02_to_vmcs12_rare runs the rare reader while vmcs01 is loaded",
    source=_listed("j"),
)
class _PullWithoutSwitch(Nvmx):
    def copy_vmcs02_to_vmcs12_rare(self) -> None:
        if self.control.need_sync_vmcs02_to_vmcs12_rare:
            self.sync_vmcs02_to_vmcs12_rare()


@_mistake(
    "cs-and-ss-rights-rare",
    "GUEST_CS_AR_BYTES and GUEST_SS_AR_BYTES move to the rare fields; both are RO-shadowed",
    source=_listed("k"),
)
class _CsAndSsRightsRare(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rare = (*self.rare, *RIGHTS)
        _drop(self, "sync_vmcs02_to_vmcs12", RIGHTS)


@_mistake(
    "intr-status-under-tpr-shadow",
    "sync_vmcs02_to_vmcs12 reads GUEST_INTR_STATUS if L1 uses a TPR shadow, not VID",
    source=_listed("l"),
)
class _IntrStatusUnderTprShadow(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        path = "sync_vmcs02_to_vmcs12"
        _drop(self, path, ["GUEST_INTR_STATUS"])
        if config.tpr_shadow:
            row = Row((Access("VMREAD", "GUEST_INTR_STATUS", path),), True, ())
            self.resolved_paths = {
                **self.resolved_paths,
                path: (*self.resolved_paths[path], row),
            }


@_mistake(
    "pdptrs-by-mode-of-l1",
    "sync_vmcs02_to_vmcs12 reads the PDPTRs if L1, not L2, uses PAE paging: here L1 never does",
    source=_listed("m"),
    pae=True,
)
class _PdptrsByModeOfL1(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _drop(self, "sync_vmcs02_to_vmcs12", PDPTRS)


# -- what is rare, and who asks ----------------------------------------------------------------


@_mistake(
    "rare-reader-forgets-a-field",
    "sync_vmcs02_to_vmcs12_rare does not read GUEST_IDTR_LIMIT",
)
class _RareReaderForgetsAField(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.rare = tuple(name for name in self.rare if name != "GUEST_IDTR_LIMIT")


@_mistake(
    "pull-for-bases-only",
    "is_vmcs12_ext_field knows only the bases: handle_vmread pulls for no other rare field",
)
class _PullForBasesOnly(SyncPolicy):
    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if vmcs.is_rare(name) and name.endswith("_BASE"):
            l0.copy_vmcs02_to_vmcs12_rare()


@_mistake(
    "vmread-forgets-a-field",
    "is_vmcs12_ext_field lacks GUEST_GS_BASE: handle_vmread does not pull for it",
)
class _VmreadForgetsAField(SyncPolicy):
    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if name != "GUEST_GS_BASE":
            super().before_vmread(l0, name)


@_mistake(
    "pull-at-every-vmread",
    "handle_vmread pulls whatever the field",
    harmless="only slower: to pull early is to pull, L2 cannot change its state meanwhile",
)
class _PullAtEveryVmread(SyncPolicy):
    def before_vmread(self, l0: Nvmx, name: str) -> None:
        l0.copy_vmcs02_to_vmcs12_rare()


@_mistake(
    "one-field-clears-the-flag",
    "handle_vmread fetches only the field that L1 reads, and clears the flag",
)
class _OneFieldClearsTheFlag(SyncPolicy):
    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if vmcs.is_rare(name):
            l0.copy_some_rare_fields((name,))
            l0._set(need_sync_vmcs02_to_vmcs12_rare=False)


@_mistake(
    "vmclear-of-another-pulls",
    "handle_vmclear pulls although the VMCS is not the current one",
    harmless="only slower: the current VMCS gets early what it would get later",
)
class _VmclearOfAnotherPulls(Nvmx):
    def vmclear(self, vmptr: str) -> VmFail | None:
        self.copy_vmcs02_to_vmcs12_rare()
        return super().vmclear(vmptr)


# -- how it is pulled --------------------------------------------------------------------------


@_mistake("pull-reads-vmcs01", "copy_vmcs02_to_vmcs12_rare takes the values of vmcs01")
class _PullReadsVmcs01(Nvmx):
    def copy_vmcs02_to_vmcs12_rare(self) -> None:
        if self.control.need_sync_vmcs02_to_vmcs12_rare:
            self.vmcs12.update((name, self.vmcs01.get(name, 0)) for name in self.rare)
            self._set(need_sync_vmcs02_to_vmcs12_rare=False)


@_mistake(
    "pull-does-not-switch-back",
    "copy_vmcs02_to_vmcs12_rare leaves vmcs02 loaded",
)
class _PullDoesNotSwitchBack(Nvmx):
    def copy_vmcs02_to_vmcs12_rare(self) -> None:
        pulls = self.control.need_sync_vmcs02_to_vmcs12_rare
        super().copy_vmcs02_to_vmcs12_rare()
        if pulls:
            self._switch_vmcs("vmcs02", "pull.switch")


@_mistake(
    "pull-dirties-vmcs12",
    "copy_vmcs02_to_vmcs12_rare sets dirty_vmcs12",
    harmless="only slower: the next entry writes back to vmcs02 what was just read there",
)
class _PullDirtiesVmcs12(Nvmx):
    def copy_vmcs02_to_vmcs12_rare(self) -> None:
        pulls = self.control.need_sync_vmcs02_to_vmcs12_rare
        super().copy_vmcs02_to_vmcs12_rare()
        if pulls:
            self._set(dirty_vmcs12=True)


@_mistake(
    "no-pull-of-a-dirty-vmcs12",
    "copy_vmcs02_to_vmcs12_rare returns early if dirty_vmcs12 is set",
    harmless="an invariant: whatever dirties vmcs12 has pulled before, so there is nothing to pull",
)
class _NoPullOfADirtyVmcs12(Nvmx):
    def copy_vmcs02_to_vmcs12_rare(self) -> None:
        if not self.control.dirty_vmcs12:
            super().copy_vmcs02_to_vmcs12_rare()


# -- the flag ----------------------------------------------------------------------------------


@_mistake(
    "flag-set-with-evmcs",
    "sync_vmcs02_to_vmcs12 sets the flag for an enlightened VMCS too, after the rare reader ran",
    harmless="only slower: what a pull reads again has not changed since the rare reader ran",
    evmcs=True,
)
class _FlagSetWithEvmcs(Nvmx):
    def sync_vmcs02_to_vmcs12(self, reason: str = "", *, foreseen: bool = False) -> None:
        super().sync_vmcs02_to_vmcs12(reason, foreseen=foreseen)
        self._set(need_sync_vmcs02_to_vmcs12_rare=True)


@_mistake(
    "flag-cleared-at-vmresume",
    "nested_vmx_run clears the flag before it knows whether the entry succeeds",
)
class _FlagClearedAtVmresume(Nvmx):
    def nested_vmx_enter_non_root_mode(self, fails: str = "") -> None:
        self._set(need_sync_vmcs02_to_vmcs12_rare=False)
        super().nested_vmx_enter_non_root_mode(fails)


@_mistake(
    "flag-cleared-when-l2-runs",
    "nested_vmx_run clears the flag once the entry has succeeded",
    harmless="nobody looks at the flag while L2 runs, and each nested exit sets it again",
)
class _FlagClearedWhenL2Runs(Nvmx):
    def nested_vmx_enter_non_root_mode(self, fails: str = "") -> None:
        super().nested_vmx_enter_non_root_mode(fails)
        if self.control.guest_mode:
            self._set(need_sync_vmcs02_to_vmcs12_rare=False)


@_mistake(
    "flag-not-set-at-smi",
    "sync_vmcs02_to_vmcs12 sets the flag only where L1 is told of the exit",
)
class _FlagNotSetAtSmi(Nvmx):
    def smi(self) -> None:
        super().smi()
        self._set(need_sync_vmcs02_to_vmcs12_rare=False)


# -- dirty vmcs12 ------------------------------------------------------------------------------


@_mistake("vmwrite-leaves-clean", "handle_vmwrite does not set dirty_vmcs12")
class _VmwriteLeavesClean(Nvmx):
    def handle_vmwrite(self, name: str, value: int) -> VmFail | None:
        dirty = self.control.dirty_vmcs12
        failure = super().handle_vmwrite(name, value)
        self._set(dirty_vmcs12=dirty)
        return failure


@_mistake(
    "only-rare-vmwrites-dirty",
    "handle_vmwrite sets dirty_vmcs12 only if the field written is rare",
)
class _OnlyRareVmwritesDirty(Nvmx):
    def handle_vmwrite(self, name: str, value: int) -> VmFail | None:
        dirty = self.control.dirty_vmcs12
        failure = super().handle_vmwrite(name, value)
        if not vmcs.is_rare(name):
            self._set(dirty_vmcs12=dirty)
        return failure


@_mistake(
    "only-guest-writes-dirty",
    "handle_vmwrite sets dirty_vmcs12 only for guest state: clean-host-writes, gone too far",
)
class _OnlyGuestWritesDirty(Nvmx):
    def handle_vmwrite(self, name: str, value: int) -> VmFail | None:
        dirty = self.control.dirty_vmcs12
        failure = super().handle_vmwrite(name, value)
        if vmcs.field(name).group != "guest":
            self._set(dirty_vmcs12=dirty)
        return failure


@_mistake(
    "host-writes-leave-clean",
    "handle_vmwrite does not set dirty_vmcs12 for a HOST_ field: clean-host-writes",
    harmless="an improvement: host state never reaches vmcs02, an exit loads it from vmcs12",
)
class _HostWritesLeaveClean(Nvmx):
    def handle_vmwrite(self, name: str, value: int) -> VmFail | None:
        dirty = self.control.dirty_vmcs12
        failure = super().handle_vmwrite(name, value)
        if name in vmcs.host_state():
            self._set(dirty_vmcs12=dirty)
        return failure


@_mistake(
    "host-state-from-memory",
    "load_vmcs12_host_state reads the VMCS region in L1's memory, not the cached vmcs12",
)
class _HostStateFromMemory(Nvmx):
    def _load_vmcs12_host_state(self, *, tell: bool) -> None:
        super()._load_vmcs12_host_state(tell=tell)
        region, _ = self.memory.get(self.current_vmptr or "", ({}, False))
        self.host_state = {name: region.get(name, 0) for name in self.host_state}


@_mistake("vmptrld-leaves-clean", "set_current_vmptr does not set dirty_vmcs12")
class _VmptrldLeavesClean(Nvmx):
    def set_current_vmptr(self, vmptr: str, *, launched: bool) -> None:
        dirty = self.control.dirty_vmcs12
        super().set_current_vmptr(vmptr, launched=launched)
        self._set(dirty_vmcs12=dirty)


@_mistake(
    "every-entry-dirty",
    "prepare_vmcs02 always writes the rare fields: right before the patch, and wrong since",
)
class _EveryEntryDirty(Nvmx):
    def prepare_vmcs02(self, *, whole: bool = True) -> None:
        self._set(dirty_vmcs12=True)
        super().prepare_vmcs02(whole=whole)


@_mistake("entry-writes-nothing", "nested_vmx_enter_non_root_mode does not call prepare_vmcs02")
class _EntryWritesNothing(Nvmx):
    def prepare_vmcs02(self, *, whole: bool = True) -> None:
        pass


# -- eager fields ------------------------------------------------------------------------------


@_mistake(
    "sysenter-not-tracked",
    "sync_vmcs02_to_vmcs12 does not read the SYSENTER fields, and vmx_set_msr does not keep them",
)
class _SysenterNotTracked(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.tracked -= set(SYSENTER)


@_mistake(
    "eager-reader-forgets-a-field",
    "sync_vmcs02_to_vmcs12 does not read GUEST_INTERRUPTIBILITY_INFO",
)
class _EagerReaderForgetsAField(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _drop(self, "sync_vmcs02_to_vmcs12", ["GUEST_INTERRUPTIBILITY_INFO"])


@_mistake(
    "cr3-written-when-l2-runs",
    "prepare_vmcs02 leaves vmcs02.GUEST_CR3 to vmx_load_mmu_pgd, which a halted L2 does not reach",
    source="KVM 5.3, fixed by 04f11ef45810",
)
class _Cr3WrittenWhenL2Runs(Nvmx):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _drop(self, "prepare_vmcs02", ["GUEST_CR3"])


@_mistake(
    "late-failure-syncs",
    "an entry that fails late leaves L2 as a nested exit does: vmcs02 is copied to vmcs12",
)
class _LateFailureSyncs(Nvmx):
    def _fail_entry(self) -> None:
        self.sync_vmcs02_to_vmcs12("INVALID_STATE")
        super()._fail_entry()


@_mistake("launch-state-lost", "prepare_vmcs12 does not set launch_state")
class _LaunchStateLost(Nvmx):
    def nested_vmx_vmexit(self, reason: str, *, foreseen: bool = False) -> None:
        super().nested_vmx_vmexit(reason, foreseen=foreseen)
        self._set(launched=False)


_add(
    "smi-does-not-sync",
    "nested_vmx_vmexit with exit reason -1 does not call sync_vmcs02_to_vmcs12",
    _without("sync_vmcs02_to_vmcs12", within="smi"),
)
_add(
    "no-rare-reads-of-running-l2",
    "vmx_get_nested_state does not read the rare fields of an L2 that runs",
    _without("sync_vmcs02_to_vmcs12_rare", within="get_nested_state"),
)


# -- shadow VMCS -------------------------------------------------------------------------------

_add(
    "shadow-not-read-at-entry",
    "nested_vmx_run does not call copy_shadow_to_vmcs12",
    _without("copy_shadow_to_vmcs12", within="nested_vmx_run"),
)
_add(
    "shadow-not-read-at-release",
    "nested_release_vmcs12 does not call copy_shadow_to_vmcs12",
    _without("copy_shadow_to_vmcs12", within="nested_release_vmcs12"),
)
_add(
    "shadow-not-read-for-user-space",
    "vmx_get_nested_state does not call copy_shadow_to_vmcs12",
    _without("copy_shadow_to_vmcs12", within="get_nested_state"),
)
_add(
    "ro-shadowed-vmwrite-not-mirrored",
    "handle_vmwrite does not write a RO-shadowed field to the shadow VMCS",
    _without("_copy_with_shadow_loaded", within="handle_vmwrite"),
)


@_mistake(
    "shadow-not-written-after-exit",
    "nested_vmx_vmexit does not set need_vmcs12_to_shadow_sync",
)
class _ShadowNotWrittenAfterExit(Nvmx):
    def _load_vmcs12_host_state(self, *, tell: bool) -> None:
        super()._load_vmcs12_host_state(tell=False)


@_mistake(
    "shadow-not-written-after-failed-entry",
    "nested_vmx_enter_non_root_mode does not set need_vmcs12_to_shadow_sync if it fails late",
)
class _ShadowNotWrittenAfterFailedEntry(Nvmx):
    def _fail_entry(self) -> None:
        super()._fail_entry()
        self._set(need_vmcs12_to_shadow_sync=False)


@_mistake(
    "shadow-not-written-after-vmptrld",
    "set_current_vmptr does not set need_vmcs12_to_shadow_sync",
)
class _ShadowNotWrittenAfterVmptrld(Nvmx):
    def set_current_vmptr(self, vmptr: str, *, launched: bool) -> None:
        super().set_current_vmptr(vmptr, launched=launched)
        self._set(need_vmcs12_to_shadow_sync=False)


@_mistake(
    "shadow-ro-fields-read-back",
    "copy_shadow_to_vmcs12 reads the RO-shadowed fields too, as before patch 07",
    harmless="only slower: L1 cannot write them there, so they are what vmcs12 holds",
)
class _ShadowRoFieldsReadBack(Nvmx):
    def copy_shadow_to_vmcs12(self) -> None:
        super().copy_shadow_to_vmcs12()
        for name in self.shadow_ro:
            self._read_shadow_field(name)


@_mistake(
    "user-space-gets-old-shadow",
    "vmx_get_nested_state calls copy_shadow_to_vmcs12 even if need_vmcs12_to_shadow_sync is set",
)
class _UserSpaceGetsOldShadow(Nvmx):
    def get_nested_state(self) -> NestedState:
        self._set(need_vmcs12_to_shadow_sync=False)
        return super().get_nested_state()


# -- enlightened VMCS --------------------------------------------------------------------------


@_mistake(
    "evmcs-changes-ignored",
    "prepare_vmcs02 writes segments and other rare state only if dirty_vmcs12 is set, "
    "whatever hv_clean_fields says",
    evmcs=True,
)
class _EvmcsChangesIgnored(Nvmx):
    def prepare_vmcs02(self, *, whole: bool = True) -> None:
        self._set(evmcs_groups=frozenset())
        super().prepare_vmcs02(whole=whole)


@_mistake(
    "evmcs-clean-fields-ignored",
    "prepare_vmcs02 writes every group, whatever hv_clean_fields says",
    harmless="only slower: vmcs12 is current, so a clean group has what vmcs02 has",
    evmcs=True,
)
class _EvmcsCleanFieldsIgnored(Nvmx):
    def prepare_vmcs02(self, *, whole: bool = True) -> None:
        self._set(evmcs_groups=EVMCS_GROUPS)
        super().prepare_vmcs02(whole=whole)
