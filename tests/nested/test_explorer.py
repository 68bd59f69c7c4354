"""The explorer finds what is known of each release, and nothing where nothing is wrong."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from nvmx_lab import vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import Config, features, releases
from nvmx_lab.nested.diagram import diagram
from nvmx_lab.nested.explorer import ENVIRONMENTS, Exploration, Finding, explore
from nvmx_lab.nested.mutants import mutant
from nvmx_lab.nested.policies import SYNC_POLICIES, Predictor
from nvmx_lab.nested.replay import Replay, replay
from nvmx_lab.nested.steps import Step, exit_reasons, parse, steps
from nvmx_lab.nested.story import story
from tests.nested.explored import explored

pytestmark = pytest.mark.xdist_group("explorer")

MENDED = "6.1+flag-reset+smm-shadow-sync"
RELEASES = tuple(release.name for release in releases())
LAZY = ("5.2+patch13", *(name for name in RELEASES if name != "5.2"))
OWN = (*RELEASES, "5.2+patch13")
UNINITIALISED, STALE, OTHER = "uninitialised", "stale", "another VMCS's"

LARGE = "group-wise"  # its memory takes the whole search minutes; it was run, and finds nothing
SEARCHED = tuple(
    name for name, policy in SYNC_POLICIES.items() if name != LARGE and policy.__base__ != Predictor
)

USER_SPACE = ("SET_NESTED_STATE", "MIGRATE", "GET_NESTED_STATE", "SMI")
"""Without these only L1 and L2 act."""


def found(exploration: Exploration) -> dict[tuple[str, str], Finding]:
    """Return the findings by what is wrong and with which field."""
    return {(f.wrong, name): f for f in exploration.findings for name in f.fields}


def rare(exploration: Exploration, wrong: str) -> set[str]:
    """Return the rare fields that go wrong in one way."""
    return {name for kind, name in found(exploration) if kind == wrong and vmcs.is_rare(name)}


def words(finding: Finding) -> list[str]:
    return [step.word for step in finding.steps]


# -- nothing where nothing is wrong ------------------------------------------------------------


@pytest.mark.parametrize("sync", SEARCHED)
def test_every_policy_is_right_on_a_release_with_all_mends(sync: str) -> None:
    exploration = explored(MENDED, sync)
    assert exploration.complete
    assert exploration.ok
    assert exploration.findings == ()
    assert exploration.states > 10_000
    assert exploration.transitions > exploration.states
    assert 0 < exploration.places < exploration.states
    assert exploration.classes >= 30


@pytest.mark.parametrize("sync", SEARCHED)
@pytest.mark.parametrize("kvm", OWN)
def test_every_release_is_right_with_every_policy_once_it_has_all_mends(
    kvm: str, sync: str
) -> None:
    has = Config.of(kvm).kvm.features
    mends = [name for name, f in features().items() if "mends" in f and name not in has]
    config = Config.of("+".join([kvm, *mends]), sync)
    shown = ("GUEST_GS_BASE", "GUEST_PENDING_DBG_EXCEPTIONS", "GUEST_CR3")
    exploration = explore(config, fields=shown, each_field=False)
    assert exploration.complete
    assert exploration.ok


def test_a_policy_with_a_large_memory_is_right_as_far_as_time_allows() -> None:
    exploration = explore(
        Config.of(MENDED, LARGE),
        fields=("GUEST_GS_BASE", "GUEST_PENDING_DBG_EXCEPTIONS"),
        each_field=False,
        without=("SMI", "RSM", "SET_NESTED_STATE", "VMXOFF", "L0_EXIT", "L1_EXIT", "RUN"),
    )
    assert exploration.complete
    assert exploration.ok
    assert exploration.classes == 5, "each group of rare fields is a class of its own"


@pytest.mark.parametrize("kvm", [MENDED, "5.3"])
def test_whatever_a_predictor_guesses_was_searched(kvm: str) -> None:
    """An exit goes either way, as for the oracle, of which nobody asks that it foresees."""
    shown = {"fields": ("GUEST_GS_BASE",), "each_field": False}
    oracle = explore(Config.of(kvm, "oracle"), **shown)
    for name, policy in SYNC_POLICIES.items():
        if issubclass(policy, Predictor):
            exploration = explore(Config.of(kvm, name), **shown)
            for what in ("states", "transitions", "places", "ok"):
                assert getattr(exploration, what) == getattr(oracle, what)
            for finding in exploration.findings:  # the real predictor fails in it too
                assert replay(finding.config, finding.steps, finding.field).failed


@pytest.mark.parametrize("environment", ["no shadow VMCS", "enlightened VMCS"])
def test_the_mends_are_enough_on_other_machines_too(environment: str) -> None:
    exploration = explored(MENDED, **ENVIRONMENTS[environment])
    assert exploration.complete
    assert exploration.ok


@pytest.mark.parametrize("kvm", ["5.2", "6.1"])
def test_eager_copying_never_shows_a_wrong_rare_field(kvm: str) -> None:
    exploration = explored(kvm, "eager")
    assert exploration.complete
    assert not [name for _, name in found(exploration) if vmcs.is_rare(name)]


# -- what each release is known to do wrong ----------------------------------------------------


@pytest.mark.parametrize("kvm", OWN)
def test_every_release_is_explored_to_the_end(kvm: str) -> None:
    assert explored(kvm).complete


@pytest.mark.parametrize("kvm", OWN)
def test_a_migration_carries_stale_rare_fields_from_the_patch_until_5_11(kvm: str) -> None:
    all_rare = set(vmcs.rare(mpx=True))
    assert rare(explored(kvm), STALE) == (
        all_rare if kvm in ("5.2+patch13", "5.3", "5.8") else set()
    )


@pytest.mark.parametrize("kvm", ["5.2+patch13", "5.3", "5.8"])
def test_the_shortest_way_to_the_migration_bug_ends_after_the_migration(kvm: str) -> None:
    finding = found(explored(kvm))[STALE, "GUEST_GS_BASE"]
    assert "MIGRATE" in words(finding)
    assert finding.steps[-2:] == (Step("MIGRATE"), Step("VMREAD", finding.field))


@pytest.mark.parametrize("kvm", OWN)
def test_the_flag_outlives_vmcs02_in_every_lazy_release(kvm: str) -> None:
    config = Config.of(kvm)
    read = {n for n in vmcs.rare(mpx=True) if kvm != "6.1" or n != "GUEST_BNDCFGS"}
    assert rare(explored(kvm), UNINITIALISED) == (read if config.sync == "lazy" else set())


def test_a_flag_that_is_reset_does_not_outlive_vmcs02() -> None:
    assert explored("6.1+flag-reset").ok


def test_l1_alone_needs_eleven_steps_to_see_that_the_flag_outlives_vmcs02() -> None:
    exploration = explored("5.11", without=USER_SPACE)
    assert exploration.complete
    kinds = {finding.wrong for finding in exploration.findings}
    assert kinds == {UNINITIALISED}
    finding = found(exploration)[UNINITIALISED, "GUEST_GS_BASE"]
    assert len(finding.steps) == 11
    assert words(finding).count("VMCLEAR") == 1, "else what the region holds is undefined"
    assert words(finding).count("VMXOFF") == 1
    assert words(finding).index("VMXOFF") > words(finding).index("EXIT")
    assert finding.steps[-1] == Step("VMREAD", finding.field)


@pytest.mark.parametrize("kvm", OWN)
def test_an_entry_into_hlt_leaves_an_old_cr3_before_5_8(kvm: str) -> None:
    exploration = explored(kvm)
    wrong = {kind for kind, name in found(exploration) if name == "GUEST_CR3"}
    if kvm in ("5.2", "5.2+patch13", "5.3"):
        assert wrong == {UNINITIALISED, STALE, OTHER}
        for kind in wrong:
            assert (
                Step("VMRESUME", "halted")
                in (steps_ := found(exploration)[kind, "GUEST_CR3"].steps)
                or Step("VMLAUNCH", "halted") in steps_
            )
    else:
        assert not wrong


@pytest.mark.parametrize("kvm", ["5.3", "6.1"])
def test_state_taken_in_smm_is_what_the_enlightened_vmcs_held_before(kvm: str) -> None:
    exploration = explored(kvm, evmcs=True)
    for name in ("GUEST_SYSENTER_ESP", "GUEST_PENDING_DBG_EXCEPTIONS"):
        finding = found(exploration)[STALE, name]
        assert "SMI" in words(finding)
        assert {"GET_NESTED_STATE", "MIGRATE"} & set(words(finding))
    mended = explored(f"{kvm}+smm-shadow-sync", evmcs=True)
    assert not any("SMI" in words(finding) for finding in mended.findings)


def test_state_taken_in_smm_is_what_the_shadow_vmcs_held_before() -> None:
    """Of what L1 reads in the shadow VMCS, RSM restores all but the interrupt status otherwise."""
    exploration = explored("6.1", vid=True)
    assert {name for wrong, name in found(exploration) if wrong == STALE} == {"GUEST_INTR_STATUS"}
    assert explored("6.1+flag-reset+smm-shadow-sync", vid=True).ok


@pytest.mark.parametrize("kvm", ["5.3", "5.11", "6.1"])
def test_the_number_of_a_vmfail_does_not_reach_the_enlightened_vmcs_before_6_1(kvm: str) -> None:
    exploration = explored(kvm, evmcs=True)
    assert exploration.complete
    finding = found(exploration).get((STALE, "VM_INSTRUCTION_ERROR"))
    assert (finding is None) == (kvm == "6.1")
    if finding is not None:
        assert finding.steps[-1] == Step("EVMCS_READ", "VM_INSTRUCTION_ERROR")
    # Only state taken in SMM spoils rare fields.
    for (_, name), other in found(exploration).items():
        assert not vmcs.is_rare(name) or "SMI" in words(other)


def test_nothing_else_is_known_to_be_wrong_with_any_release() -> None:
    others = {
        (kvm, wrong, name)
        for kvm in OWN
        for wrong, name in found(explored(kvm))
        if not vmcs.is_rare(name) and name != "GUEST_CR3"
    }
    assert not others


# -- what a finding is -------------------------------------------------------------------------


def replayed(finding: Finding, sequence: Collection[Step], field: str = "") -> Replay | None:
    """Replay steps of a finding; None if one of them cannot happen where it stands."""
    try:
        return replay(finding.config, tuple(sequence), field or finding.field)
    except LabError:
        return None


def all_findings() -> list[Finding]:
    return [finding for kvm in OWN for finding in explored(kvm).findings]


def test_every_counterexample_fails_on_the_whole_model_at_its_last_step_and_not_before() -> None:
    assert len(all_findings()) > 20
    for finding in all_findings():
        whole = replayed(finding, finding.steps)
        assert whole is not None
        assert whole.failed
        assert len(whole.moments) == len(finding.steps)
        assert not any(moment.wrong for moment in whole.moments[:-1])


def test_no_step_of_a_counterexample_can_be_left_out() -> None:
    for finding in all_findings():
        for left_out in range(len(finding.steps)):
            rest = finding.steps[:left_out] + finding.steps[left_out + 1 :]
            shorter = replayed(finding, rest)
            assert shorter is None or not shorter.failed, (finding, left_out)


def test_the_fields_of_a_class_fail_alike() -> None:
    for finding in all_findings():
        for name in finding.fields:
            sequence = [
                Step(word, name if arg == finding.field else arg) for word, arg in finding.steps
            ]
            played = replayed(finding, sequence, name)
            assert played is not None
            assert played.wrong == finding.wrong
            assert len(played.moments) == len(sequence)


def test_there_is_no_shorter_way_than_the_shortest() -> None:
    lengths = {
        (finding.wrong, finding.field): len(finding.steps) for finding in explored("5.2").findings
    }
    for depth in sorted({length - 1 for length in lengths.values()}):
        cut = explored("5.2", depth=depth)
        assert not cut.complete
        assert {(finding.wrong, finding.field) for finding in cut.findings} == {
            key for key, length in lengths.items() if length <= depth
        }
        assert cut.depth <= depth


@pytest.mark.parametrize("word", ["L0_EXIT", "L1_EXIT"])
def test_an_exit_that_l0_handles_moves_no_value(word: str) -> None:
    for name in ("GUEST_GS_BASE", "GUEST_RIP", "HOST_RIP", "VM_EXIT_REASON"):
        begin = "VMXON; VMPTRLD A; VMLAUNCH; EXIT CPUID; VMWRITE HOST_RSP; VMWRITE {0}; VMRESUME"
        begin = begin.format(name) + ("; EXIT HLT" if word == "L1_EXIT" else "")
        arg = {"L0_EXIT": "EPT_VIOLATION", "L1_EXIT": "RDMSR"}[word]
        sequence = [*map(parse, begin.split(";")), Step(word, arg)]
        before, after = replay(Config.of("5.3"), sequence, name).moments[-2:]
        assert (before.l0, before.truth) == (after.l0, after.truth)


def test_a_finding_says_steps_that_there_are() -> None:
    there_are = set(steps(tuple(vmcs.catalogue()), exit_reasons()))
    for finding in all_findings():
        assert set(finding.steps) <= there_are


def test_findings_come_shortest_first_and_one_of_each_kind_and_class() -> None:
    for kvm in OWN:
        findings = explored(kvm).findings
        lengths = [len(finding.steps) for finding in findings]
        assert lengths == sorted(lengths)
        keys = [(f.wrong, name) for f in findings for name in f.fields]
        assert len(keys) == len(set(keys))
        assert all(finding.field in finding.fields for finding in findings)


def test_progress_is_told_class_by_class() -> None:
    told: list[int] = []
    exploration = explore(Config.of("6.1", evmcs=True), advance=told.append)
    assert len(told) == exploration.classes
    assert sum(told) == exploration.transitions


# -- what the CPU takes from the VMCS without being asked --------------------------------------


@pytest.mark.parametrize(
    ("mutation", "field", "ends"),
    [
        ("host-state-from-memory", "HOST_RIP", ("EXIT", "VMLAUNCH", "VMRESUME")),
        ("only-guest-writes-dirty", "CR4_GUEST_HOST_MASK", ("VMLAUNCH", "VMRESUME")),
    ],
)
def test_host_state_at_exit_and_controls_at_entry_are_seen(
    mutation: str, field: str, ends: tuple[str, ...]
) -> None:
    """No VMREAD shows these: the last step is the exit or the entry itself."""
    wrong = mutant(mutation)
    found_ = explore(wrong.config, wrong.nvmx, fields=(field,), each_field=False).findings
    assert {finding.wrong for finding in found_} <= {STALE, UNINITIALISED, OTHER}
    assert found_
    assert all(finding.steps[-1].word in ends for finding in found_)
    field = found_[0].field  # one of its class
    played = replay(wrong.config, found_[0].steps, field, wrong.nvmx)
    assert played.failed
    assert played.wrong == found_[0].wrong
    how = "L1 goes on with" if mutation == "host-state-from-memory" else "L2 runs under"
    assert how in " ".join(story(played).split())
    assert field in diagram(played)


@pytest.mark.slow
def test_all_right_ideas_together_are_right() -> None:
    """Every field, and every step about each: some of these changes ask for a field by name."""
    ideas = "shadow-host-rsp clean-host-writes no-pull-host-writes no-pull-unchecked-writes"
    kvm = "+".join([MENDED, *ideas.split(), "skip-rare-at-entry"])
    exploration = explore(Config.of(kvm), without=("SMI", "RSM"))
    assert exploration.complete
    assert exploration.ok
