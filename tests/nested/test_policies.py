"""A new sync policy cannot be wrong silently: subtly wrong ones are caught, right ones pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nvmx_lab import vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested import flows
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.explorer import explore
from nvmx_lab.nested.model import MAJOR_CONTROLS, Nvmx, Trace
from nvmx_lab.nested.policies import (
    RARE_GROUPS,
    SYNC_POLICIES,
    TRACKED_REASONS,
    ByReason,
    Oracle,
    PerField,
    Predictor,
    SyncPolicy,
    rare_group,
    register,
)
from nvmx_lab.nested.replay import replay

BASE = "6.1+flag-reset+smm-shadow-sync"  # on which the explorer finds nothing
NAME = "under-test"
USED_MOST = "GUEST_GS_BASE"
SHOWS = (USED_MOST, "GUEST_PENDING_DBG_EXCEPTIONS")  # fields that show every mistake here
USER_SPACE = ("SMI", "RSM", "SET_NESTED_STATE", "MIGRATE", "GET_NESTED_STATE")

GROUPS = ("_SELECTOR", "_LIMIT", "_AR_BYTES", "_BASE", "")


def group(name: str) -> str:
    """Return the group of a rare field by how its name ends; the last group takes the rest."""
    return next(ending for ending in GROUPS if name.endswith(ending))


def pull_only(l0: Nvmx, names: list[str]) -> None:
    """Pull some rare fields; the flag stays as it is."""
    l0._switch_vmcs("vmcs02", "pull.switch")
    for name in names:
        l0.vmcs12[name] = l0._vmread(name, "sync_vmcs02_to_vmcs12_rare")
    l0._switch_vmcs("vmcs01", "pull.switch")


def needs_sync(l0: Nvmx) -> bool:
    return l0.control.need_sync_vmcs02_to_vmcs12_rare


# -- subtly wrong ------------------------------------------------------------------------------


class FetchedForever(PerField):
    """Per field, and the field used most is fetched once, not again after the next exit."""

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if name != USED_MOST or not l0.control.policy_memory:
            super().before_vmread(l0, name)
        if name == USED_MOST:
            l0.remember("fetched")


class OneGroupClearsTheFlag(SyncPolicy):
    """Pulls the group of the field that L1 reads, and then believes to have all of them."""

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if vmcs.is_rare(name) and needs_sync(l0):
            pull_only(l0, [other for other in l0.rare if group(other) == group(name)])
            l0._set(need_sync_vmcs02_to_vmcs12_rare=False)


class GivesUp(SyncPolicy):
    """Adaptive: after two exits in a row without a pull the fields are taken to be unused."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        idle = l0.control.policy_memory or 0
        l0.remember(min(idle + 1, 2))
        return True

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if l0.control.policy_memory != 2:
            super().before_vmread(l0, name)
        if vmcs.is_rare(name):
            l0.remember(0)


class WrongAfterHlt(SyncPolicy):
    """Means to read at once after an HLT, where L1 looks at everything, and turns it around."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        l0.remember("read at once" if reason == "HLT" else None)
        return reason == "HLT"

    def before_release(self, l0: Nvmx) -> None:
        if l0.control.policy_memory is None:
            super().before_release(l0)


class PullsForRareWritesOnly(SyncPolicy):
    """A write to another field dirties vmcs12 too: the entry then takes stale rare fields."""

    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        if vmcs.is_rare(name):
            l0.copy_vmcs02_to_vmcs12_rare()


class ForgetsRelease(SyncPolicy):
    """L1 wrote to the VMCS, so it was pulled, so the release need not; but L2 ran since then."""

    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        super().before_vmwrite(l0, name)
        if not l0.is_shadow_field_rw(name):
            l0.remember("written")

    def before_release(self, l0: Nvmx) -> None:
        if l0.control.policy_memory != "written":
            super().before_release(l0)
        l0.remember(None)


class ForgetsMigration(SyncPolicy):
    """What was 5.3's bug: nobody thinks of KVM_GET_NESTED_STATE."""

    def before_get_nested_state(self, l0: Nvmx) -> None:
        pass


class PullsAfterTheOtherHalf(SyncPolicy):
    """Every second read pulls; the one between is served as it is."""

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if vmcs.is_rare(name):
            if l0.control.policy_memory:
                l0.copy_vmcs02_to_vmcs12_rare()
            l0.remember(not l0.control.policy_memory)


WRONG: tuple[type[SyncPolicy], ...] = (
    FetchedForever,
    OneGroupClearsTheFlag,
    GivesUp,
    WrongAfterHlt,
    PullsForRareWritesOnly,
    ForgetsRelease,
    ForgetsMigration,
    PullsAfterTheOtherHalf,
)


# -- right -------------------------------------------------------------------------------------


class Adaptive(SyncPolicy):
    """Reads at the exit where L1 needed the fields after one of the last two exits."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        recent = l0.control.policy_memory or 0
        l0.remember(max(recent - 1, 0))
        return recent == 0

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        super().before_vmread(l0, name)
        if vmcs.is_rare(name):
            l0.remember(2)


class EagerAfter(SyncPolicy):
    """Predicted by exit reason."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        return reason not in ("HLT", "EPT_MISCONFIG", "IO_INSTRUCTION")


class FetchedOnce(FetchedForever):
    """The same, done right: an exit makes what was fetched old."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        l0.remember(None)
        return True

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        super().before_vmread(l0, name)
        if not needs_sync(l0):
            l0.remember(None)


RIGHT: tuple[type[SyncPolicy], ...] = (Adaptive, EagerAfter, FetchedOnce)


# -- what the explorer says --------------------------------------------------------------------


@contextmanager
def registered(policy: type[SyncPolicy], name: str = NAME) -> Iterator[str]:
    register(name)(policy)
    try:
        yield name
    finally:
        del SYNC_POLICIES[name]


@pytest.mark.parametrize("policy", WRONG, ids=lambda policy: policy.__name__)
def test_a_subtly_wrong_policy_is_caught(policy: type[SyncPolicy]) -> None:
    with registered(policy) as name:
        # Without SMM and restored states, for speed: these are wrong in the simplest cases.
        exploration = explore(
            Config.of(BASE, name), without=("SMI", "RSM", "SET_NESTED_STATE"), fields=SHOWS
        )
        assert exploration.complete
        assert "stale" in {finding.wrong for finding in exploration.findings}
        for finding in exploration.findings:
            assert all(map(vmcs.is_rare, finding.fields))
            played = replay(finding.config, finding.steps, finding.field)
            assert played.failed
            assert len(played.moments) == len(finding.steps)


class Counts(SyncPolicy):
    """Counts the exits, for ever."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        l0.remember((l0.control.policy_memory or 0) + 1)
        return True


def test_a_policy_whose_memory_has_no_bound_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "MOST_PLACES", 1000)  # the same error, sooner
    with registered(Counts) as name, pytest.raises(LabError, match="control states") as error:
        explore(Config.of(BASE, name), fields=SHOWS)
    assert f"'{name}'" in str(error.value)
    assert "Control.policy_memory" in str(error.value)


@pytest.mark.parametrize("policy", RIGHT, ids=lambda policy: policy.__name__)
def test_a_policy_that_is_right_passes(policy: type[SyncPolicy]) -> None:
    with registered(policy) as name:
        exploration = explore(Config.of(BASE, name), fields=SHOWS)
    assert exploration.complete
    assert exploration.findings == ()


def test_a_name_is_taken_once_and_a_policy_of_a_user_is_a_policy_like_any_other() -> None:
    with registered(Adaptive) as name:
        assert Config.of("5.3", name).sync == name
        with pytest.raises(LabError, match="of this name already"):
            register(name)(Oracle)
        register(name)(Adaptive)  # a notebook's cell that runs twice
    with pytest.raises(LabError, match="sync policy"):
        Config.of("5.3", NAME)


# -- wrong in what the explorer may overlook ---------------------------------------------------


class OneFieldForgotten(SyncPolicy):
    """Every rare field is pulled at a VMREAD but one that is like all the others."""

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if name != "GUEST_FS_BASE":
            super().before_vmread(l0, name)


class HostStateDoesNotPull(SyncPolicy):
    """The write of HOST_RSP is frequent and concerns no rare field, but it dirties vmcs12."""

    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        if name != "HOST_RSP":
            super().before_vmwrite(l0, name)


class ControlsDoNotPull(SyncPolicy):
    """The same for the control fields that the explorer compiles apart."""

    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        if name not in MAJOR_CONTROLS:
            super().before_vmwrite(l0, name)


class WrongAfterCrAccess(SyncPolicy):
    """Goes wrong after one exit reason only."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        l0.remember(reason == "CR_ACCESS")
        return True

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if not l0.control.policy_memory:
            super().before_vmread(l0, name)


class ForgetsToSwitchBack(SyncPolicy):
    """Leaves vmcs02 loaded while L1 runs."""

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if vmcs.is_rare(name) and needs_sync(l0) and l0.control.loaded == "vmcs01":
            l0._switch_vmcs("vmcs02", "pull.switch")
            l0.sync_vmcs02_to_vmcs12_rare()


class KeepsToItself(SyncPolicy):
    """Keeps its memory in an attribute, which the control state does not have."""

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        self.last = reason
        return True

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        if getattr(self, "last", "") != "IO_INSTRUCTION":
            super().before_vmread(l0, name)


@pytest.mark.parametrize(
    "policy",
    [
        OneFieldForgotten,
        HostStateDoesNotPull,
        ControlsDoNotPull,
        WrongAfterCrAccess,
        ForgetsToSwitchBack,
    ],
)
def test_a_policy_that_is_wrong_for_one_field_or_reason_is_caught(
    policy: type[SyncPolicy],
) -> None:
    with registered(policy) as name:
        fields = (*SHOWS, "HOST_RSP")
        assert explore(Config.of(BASE, name), without=USER_SPACE, fields=fields).findings


def test_a_policy_that_keeps_its_memory_to_itself_is_refused() -> None:
    with registered(KeepsToItself) as name, pytest.raises(LabError, match="attributes of its own"):
        explore(Config.of(BASE, name), without=USER_SPACE, fields=SHOWS)


# -- policies of the package -------------------------------------------------------------------


def in_l1(sync: str, reason: str = "CPUID") -> Nvmx:
    """Return L0 after an exit."""
    l0 = Nvmx(Config.of(BASE, sync))
    l0.start()
    l0.nested_exit(reason)
    l0.trace = Trace()
    return l0


def test_the_groups_share_out_the_rare_fields() -> None:
    of_groups = [name for group in RARE_GROUPS for name in rare_group(group)]
    assert sorted(of_groups) == sorted(vmcs.rare())
    assert {len(rare_group(ending)) for ending in ("_SELECTOR", "_AR_BYTES")} <= {6, 7, 8}
    assert "GUEST_GDTR_LIMIT" in rare_group("_LIMIT")
    assert "GUEST_IDTR_BASE" in rare_group("_BASE")


def test_a_group_is_fetched_once_and_the_flag_goes_with_the_last() -> None:
    l0 = in_l1("group-wise")
    read = 0
    for number, ending in enumerate(RARE_GROUPS):
        assert needs_sync(l0)
        names = sorted(rare_group(ending).intersection(l0.rare))
        read += len(names)
        for name in names[:2]:
            l0.l1_vmread(name)
        assert (l0.trace.pulls, l0.trace.rare_vmreads) == (number + 1, read)
    assert not needs_sync(l0)
    assert read == len(l0.rare)
    l0.vmresume()
    l0.nested_exit("HLT")
    l0.trace = Trace()
    l0.l1_vmread("GUEST_GS_BASE")
    l0.l1_vmwrite("HOST_RSP", 1)
    l0.l1_vmwrite("HOST_RSP", 2)
    assert (l0.trace.pulls, l0.trace.rare_vmreads) == (2, len(l0.rare)), "the rest, not all again"


def guesses(sync: str, exits: list[tuple[str, bool]]) -> list[bool]:
    """Return at which exits a policy copies; each is a reason, and whether L1 needs a field."""
    l0 = Nvmx(Config.of(BASE, sync))
    l0.start()
    copied = []
    for reason, needed in exits:
        l0.nested_exit(reason)
        copied.append(not needs_sync(l0))
        if needed:
            l0.l1_vmread("GUEST_GS_BASE")
            l0.l1_vmread("GUEST_GS_BASE")  # twice is no more than once
        l0.vmresume()
    return copied


def test_adaptive_needs_two_exits_to_learn_and_two_to_forget() -> None:
    exits = [("HLT", x) for x in (True, True, True, True, False, True, False, False, False)]
    assert guesses("adaptive", exits) == [False, False, *[True] * 6, False]


def test_by_reason_learns_of_each_reason_alone() -> None:
    exits = [("HLT", True), ("CPUID", False)] * 4
    assert guesses("by-reason", exits) == [False] * 4 + [True, False] * 2
    assert guesses("adaptive", exits) == [False] * 8, "half of all exits is not enough"


def test_by_reason_keeps_the_reasons_that_need_most_whatever_came_first() -> None:
    learned = ByReason.first
    policy = ByReason()
    for round_ in range(60):
        for reason in ("RARELY", *["OFTEN"] * 9, *["NOW AND THEN"] * 4)[round_ % 3 :]:
            learned = policy.learn(learned, reason, needed=True)
            assert len(learned) <= TRACKED_REASONS
            assert all(1 <= count <= 3 for _, count in learned)
    assert policy.expect(learned, "OFTEN") or policy.expect(learned, "NOW AND THEN")
    for _ in range(3):
        learned = policy.learn(learned, "OFTEN", needed=False)
    assert not policy.expect(learned, "OFTEN")


def test_an_exit_that_l0_forces_is_not_guessed_at_and_teaches_nothing() -> None:
    l0 = Nvmx(Config.of(BASE, "adaptive"))
    l0.start()
    for _ in range(3):
        l0.nested_exit("HLT")
        l0.l1_vmread("GUEST_GS_BASE")
        l0.vmresume()
    before = l0.control.policy_memory
    l0.smi()
    assert needs_sync(l0)
    l0.rsm()
    assert l0.control.policy_memory == before


class Undecided(Predictor):
    """Says neither yes nor no."""

    def expect(self, learned: object, reason: str) -> bool:
        return None  # type: ignore[return-value]

    def learn(self, learned: object, reason: str, *, needed: bool) -> None:
        return None


class KeepsForItself(Predictor):
    """Keeps what it learns in an attribute."""

    def expect(self, learned: object, reason: str) -> bool:
        return False

    def learn(self, learned: object, reason: str, *, needed: bool) -> None:
        self.last = needed


def test_a_predictor_that_is_none_is_refused() -> None:
    for policy, what in ((Undecided, "True or False"), (KeepsForItself, "attributes of its own")):
        with registered(policy) as name, pytest.raises(LabError, match=what):
            guesses(name, [("HLT", True)])
    with pytest.raises(LabError, match="hook"):

        @register("never-registered")
        class Touches(Predictor):
            def before_vmread(self, l0: Nvmx, name: str) -> None:
                pass

    assert "never-registered" not in SYNC_POLICIES
