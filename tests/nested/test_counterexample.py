"""Counterexamples: files that survive a round trip or are refused, stories that tell the facts."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab.errors import LabError
from nvmx_lab.nested import counterexample as files
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.counterexample import Counterexample, load
from nvmx_lab.nested.diagram import diagram, rows
from nvmx_lab.nested.explorer import ENVIRONMENTS, Finding
from nvmx_lab.nested.model import Nvmx, VmFail
from nvmx_lab.nested.replay import replay
from nvmx_lab.nested.steps import parse, steps
from nvmx_lab.nested.story import story


def sequence(*texts):
    return tuple(parse(text) for text in texts)


MIGRATION = sequence(
    "VMXON",
    "VMPTRLD A",
    "VMLAUNCH",
    "L2_WRITE GUEST_GS_BASE",
    "EXIT CPUID",
    "MIGRATE",
    "VMREAD GUEST_GS_BASE",
)
OUTLIVES = sequence(
    "VMXON",
    "VMPTRLD A",
    "VMWRITE GUEST_GS_BASE",
    "VMCLEAR A",
    "VMPTRLD B",
    "VMLAUNCH",
    "EXIT CPUID",
    "VMXOFF",
    "VMXON",
    "VMPTRLD A",
    "VMREAD GUEST_GS_BASE",
)
HALTED = sequence(
    "VMXON",
    "SET_NESTED_STATE L2",
    "EXIT CPUID",
    "VMPTRLD B",
    "VMWRITE GUEST_CR3",
    "VMLAUNCH halted",
    "EXIT EXTERNAL_INTERRUPT",
    "VMREAD GUEST_CR3",
)
IN_SMM = sequence(
    "VMXON",
    "VMPTRLD A",
    "VMLAUNCH",
    "L2_WRITE GUEST_INTR_STATUS",
    "SMI",
    "GET_NESTED_STATE",
    "RSM",
    "L2_READ GUEST_INTR_STATUS",
)


def migration():
    return replay(Config.of("5.3"), MIGRATION, "GUEST_GS_BASE")


def outlives():
    return replay(Config.of("6.1"), OUTLIVES, "GUEST_GS_BASE")


def halted():
    return replay(Config.of("5.3"), HALTED, "GUEST_CR3")


def in_smm():
    return replay(Config.of("6.1", vid=True), IN_SMM, "GUEST_INTR_STATUS")


def vmfail():
    steps = sequence("VMXON", "VMPTRLD A", "VMLAUNCH fails:controls")
    evmcs = Config.of("5.3", evmcs=True)
    return replay(evmcs, (*steps, parse("EVMCS_READ VM_INSTRUCTION_ERROR")), "VM_INSTRUCTION_ERROR")


class Refuses(Nvmx):
    """Answers every VMREAD with VMfail."""

    def handle_vmread(self, name):
        return VmFail(12)


class Warns(Nvmx):
    """Pulls at every exit, when vmcs02 is still loaded."""

    def sync_vmcs02_to_vmcs12(self, reason="", *, foreseen=False):
        super().sync_vmcs02_to_vmcs12(reason, foreseen=foreseen)
        self.copy_vmcs02_to_vmcs12_rare()


class FromVmcs01(Nvmx):
    """Pulls from whatever is loaded."""

    def copy_vmcs02_to_vmcs12_rare(self):
        for name in self.rare:
            self.vmcs12[name] = self._vmread(name, "wrong")


def refused():
    return replay(Config.of("5.3"), (*MIGRATION[:5], MIGRATION[6]), "GUEST_GS_BASE", Refuses)


def warned():
    return replay(Config.of("5.3"), MIGRATION, "GUEST_GS_BASE", Warns)


ALL = [migration, outlives, halted, in_smm, vmfail, refused, warned]
one_line = " ".join


def said(replayed):
    """Return the story on one line."""
    return one_line(story(replayed).split())


def paragraph(replayed, number):
    """Return what the story says of a step, on one line."""
    return re.search(rf" {number}\. (.*?\.)(?= \d+\. | Wrong| Nothing|$)", said(replayed))[1]


# -- files -----------------------------------------------------------------------------------------

OF_THESE = steps(("GUEST_GS_BASE", "HOST_RSP"), ("CPUID", "HLT"))
STEPS = st.lists(st.sampled_from(OF_THESE), min_size=1, max_size=30)
L0S = st.sampled_from(
    [
        Config.of(kvm, sync, **options)
        for kvm in ("5.2", "5.3+ibpb", "6.1")
        for sync in (None, "per-field")
        for options in ENVIRONMENTS.values()
    ]
)


@given(L0S, STEPS, st.sampled_from(["stale", "VMREAD answers VMsucceed", "another VMCS's", ""]))
def test_a_saved_counterexample_is_loaded_as_it_was(tmp_path_factory, config, taken, wrong):
    path = tmp_path_factory.mktemp("file") / "found.json"
    found = Finding(config, "GUEST_GS_BASE", ("GUEST_GS_BASE",), wrong, tuple(taken))
    made = Counterexample.of(found)
    made.save(path)
    assert load(path) == made
    assert load(path).config == config


def test_the_file_is_readable_and_the_folder_holds_nothing_else(tmp_path):
    path = tmp_path / "found.json"
    made = Counterexample("5.3", "lazy", (("mpx", False),), "", "GUEST_GS_BASE", "stale", MIGRATION)
    made.save(path)
    document = json.loads(path.read_text())
    assert document["format"] == "nvmx-lab counterexample"
    assert document["version"] == 1
    assert document["options"] == {"mpx": False}
    assert document["steps"][3] == "L2_WRITE GUEST_GS_BASE"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(LabError, match="cannot be written"):
        made.save(tmp_path / "no folder" / "found.json")


def test_only_options_that_differ_from_the_defaults_are_kept():
    found = Finding(Config.of("5.3"), "GUEST_GS_BASE", ("GUEST_GS_BASE",), "stale", MIGRATION)
    assert Counterexample.of(found).options == ()
    old = Finding(Config.of("5.3", mpx=False, pae=True), "HOST_RSP", (), "stale", MIGRATION)
    assert Counterexample.of(old).options == (("mpx", False), ("pae", True))


GOOD = {
    "format": "nvmx-lab counterexample",
    "version": 1,
    "kvm": "5.3",
    "sync": "lazy",
    "options": {"mpx": False},
    "mutant": "",
    "field": "GUEST_GS_BASE",
    "wrong": "stale",
    "steps": [str(step) for step in MIGRATION],
}
BAD = [
    ({"steps": ["VMXON", "VMREED GUEST_GS_BASE"]}, r"steps\[1\].*'VMREED.*did you mean 'VMREAD'"),
    ({"steps": ["VMREAD GUEST_GS_BAES"]}, r"steps\[0\].*did you mean 'GUEST_GS_BASE'"),
    ({"steps": ["VMPTRLD C"]}, r"steps\[0\].*allowed: A, B"),
    ({"steps": [["VMXON"]]}, r"steps\[0\]: not a text; got 'a list'"),
    ({"steps": ["V" * 501]}, r"steps\[0\]: not a short text"),
    ({"steps": []}, r"steps: no steps.*got 0; allowed: 1 to 10000"),
    ({"steps": ["VMXON"] * 10_001}, r"steps: no steps, or too many; got 10001"),
    ({"steps": "VMXON"}, r"steps: not a list; got 'a text'"),
    ({"kvm": "5.33"}, r"kvm: unknown KVM release; got '5.33'"),
    ({"kvm": 5.3}, r"kvm: not a text; got 'a number'"),
    ({"sync": "lasy"}, r"sync: unknown sync policy.*did you mean 'lazy'"),
    ({"options": {"mpy": True}}, r"options: unknown option of L0.*did you mean 'mpx'"),
    ({"options": {"kvm": True}}, r"options: unknown option of L0; got 'kvm'"),
    ({"options": {"mpx": 0}}, r"options: mpx: not a truth value; got 'a number'"),
    ({"options": None}, r"options: not an object; got 'null'"),
    ({"field": "GUEST_GS_BAES"}, r"field: unknown VMCS field.*did you mean 'GUEST_GS_BASE'"),
    ({"wrong": "a\u001b[31mb"}, r"wrong: not a short text"),
    ({"wrong": "a" * 501}, r"wrong: not a short text"),
    ({"format": "another"}, r"format: not this format; got 'another'"),
    ({"version": 2}, r"version: not this format; got 2; allowed: 1"),
    ({"version": True}, r"version: not this format; got True"),
    ({"stepps": []}, r"unknown key; got 'stepps'.*did you mean 'steps'"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[m for _, m in BAD])
def test_a_wrong_file_is_refused_with_its_place(tmp_path, change, message):
    path = tmp_path / "found.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(LabError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_the_file_that_the_others_are_made_from_is_right(tmp_path):
    path = tmp_path / "found.json"
    path.write_text(json.dumps(GOOD))
    assert load(path).replay().failed


@pytest.mark.parametrize("key", files.KEYS)
def test_a_missing_key_is_named(tmp_path, key):
    path = tmp_path / "found.json"
    path.write_text(json.dumps({k: v for k, v in GOOD.items() if k != key}))
    with pytest.raises(LabError, match=f"a key is missing; got '{key}'"):
        load(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "malformed JSON"),
        (b'{\n "kvm": }', r"found.json:2:9: malformed JSON"),
        (b'{"kvm": "5.3", "kvm": "6.1"}', "a key appears twice"),
        (b'{"kvm": "\xff"}', "not UTF-8 at byte 9"),
        (b"[" * 100_000, "malformed JSON"),
        (b"1" * 10_000, "malformed JSON"),
        (b"[1]", "no counterexample; got 'a list'"),
        (b" " * ((1 << 20) + 1), "the file is too large"),
    ],
    ids=["empty", "comma", "twice", "bytes", "deep", "huge number", "list", "large"],
)
def test_what_is_no_json_object_is_refused(tmp_path, raw, message):
    path = tmp_path / "found.json"
    path.write_bytes(raw)
    with pytest.raises(LabError, match=message):
        load(path)


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(LabError, match="no such file"):
            load(path)


def test_a_mutant_is_looked_up_by_name_and_named_in_the_story(tmp_path, monkeypatch):
    def mutant(name):
        if name != "refuses":
            raise LabError("unknown mutant", got=name)
        return types.SimpleNamespace(nvmx=Refuses)

    module = types.ModuleType("nvmx_lab.nested.mutants")
    module.mutant = mutant
    monkeypatch.setitem(sys.modules, module.__name__, module)
    path = tmp_path / "found.json"
    path.write_text(json.dumps({**GOOD, "mutant": "refuses"}))
    replayed = load(path).replay()
    assert replayed.mutant == "refuses"
    assert (
        replayed.wrong == "VMREAD GUEST_GS_BASE answers VMfailValid(12), it should answer VMsucceed"
    )
    assert story(replayed).startswith("KVM 5.3 (lazy, no mpx), mutant refuses: VMREAD")
    path.write_text(json.dumps({**GOOD, "mutant": "refusse"}))
    with pytest.raises(LabError, match="mutant: unknown mutant; got 'refusse'"):
        load(path)


def test_a_mutant_of_the_catalogue_is_found(tmp_path):
    path = tmp_path / "found.json"
    taken = [*GOOD["steps"][:5], "VMWRITE GUEST_GS_BASE", "VMREAD GUEST_GS_BASE"]
    path.write_text(json.dumps({**GOOD, "mutant": "write-before-pull", "steps": taken}))
    replayed = load(path).replay()
    assert "L1 sees L2's value of step 4; it should see L1's value of step 6" in said(replayed)
    path.write_text(json.dumps({**GOOD, "mutant": "write-before-pul"}))
    with pytest.raises(LabError, match=r"unknown mutant.*did you mean 'write-before-pull'"):
        load(path)


# -- replays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "wrong"),
    [
        (migration, "stale"),
        (outlives, "uninitialised"),
        (halted, "another VMCS's"),
        (in_smm, "stale"),
        (vmfail, "stale"),
        (warned, "copy_vmcs02_to_vmcs12_rare warns: vmcs02 is loaded"),
    ],
)
def test_a_replay_says_what_is_wrong_in_the_explorers_words(made, wrong):
    assert made().wrong == wrong


def test_l1s_own_value_is_told_from_a_cleared_vmcs():
    taken = (*MIGRATION[:5], MIGRATION[6])
    replayed = replay(Config.of("5.3"), taken, "GUEST_GS_BASE", FromVmcs01)
    assert replayed.wrong == "L1's own"
    assert "L1 sees L1's own value; it should see L2's value of step 4" in said(replayed)


def test_a_mended_release_is_not_accused():
    replayed = replay(Config.of("5.11"), MIGRATION, "GUEST_GS_BASE")
    assert not replayed.failed
    assert replayed.wrong == ""
    assert "nothing wrong with GUEST_GS_BASE" in said(replayed)
    assert "Nothing wrong was seen" in said(replayed)
    assert "Where the true value was lost" not in said(replayed)
    assert "L0 loads vmcs02, reads 36 rare fields" in paragraph(replayed, 6)
    assert not any(row["wrong"] for row in rows(replayed))


def test_many_entries_and_exits_are_no_writes_of_the_field():
    round_trip = [parse("EXIT CPUID"), parse("VMRESUME")]
    replayed = replay(Config.of("5.3"), [*MIGRATION[:4], *round_trip * 300], "GUEST_GS_BASE")
    assert not replayed.failed
    assert len(replayed.origins) == 1


def test_a_step_that_cannot_happen_is_refused():
    with pytest.raises(LabError, match="step 2: this step cannot happen here; got 'RSM'"):
        replay(Config.of("5.3"), sequence("VMXON", "RSM"), "GUEST_GS_BASE")
    entered = (*MIGRATION[:3], parse("L2_WRITE HOST_RSP"))
    with pytest.raises(LabError, match="step 4: the field is no state of L2"):
        replay(Config.of("5.3"), entered, "HOST_RSP")


# -- stories ---------------------------------------------------------------------------------------


def test_the_migration_bug_is_told():
    assert story(migration()) == GOLDEN


GOLDEN = """\
KVM 5.3 (lazy): L1 sees a stale GUEST_GS_BASE on the migration target.
1. L1 executes VMXON, L0 allocates a cleared vmcs02.
2. L1 executes VMPTRLD A; vmcs12 now has what A held before step 1.
3. L1 executes VMLAUNCH, L2 runs; prepare_vmcs02(): vmcs02 now has what A held before step 1.
4. L2 changes GUEST_GS_BASE; vmcs02 now has L2's value of step 4.
5. L2 exits (CPUID) and L0 reflects the exit to L1; sync_vmcs02_to_vmcs12() leaves the rare
   fields in vmcs02 and sets need_sync_vmcs02_to_vmcs12_rare; vmcs12 still has what A held
   before step 1.
6. User space migrates the vCPU: KVM_GET_NESTED_STATE here, KVM_SET_NESTED_STATE on the target;
   need_sync_vmcs02_to_vmcs12_rare is set, but nothing is pulled; there vmcs02 is new and vmcs12
   has what A held before step 1.
7. L1 executes VMREAD GUEST_GS_BASE; need_sync_vmcs02_to_vmcs12_rare is clear, so nothing is
   pulled.
Wrong on the migration target: L1 sees what A held before step 1; it should see L2's value of
   step 4. The value is stale.
Where the true value was lost: step 6 (MIGRATE). After it, no place that L0 may take the field
   from has it.
Replayed on the model, not on a kernel."""


def test_the_flag_that_outlives_vmcs02_is_told():
    replayed = outlives()
    assert "sets need_sync_vmcs02_to_vmcs12_rare" in paragraph(replayed, 7)
    assert "free_nested() frees vmcs02" in paragraph(replayed, 8)
    assert "it does not reset need_sync_vmcs02_to_vmcs12_rare" in paragraph(replayed, 8)
    assert "still set, although this vmcs02 is a new one" in paragraph(replayed, 9)
    assert "vmcs12 now has L1's value of step 3" in paragraph(replayed, 10)
    assert "pulled" not in paragraph(replayed, 10)  # nothing to release
    assert "L0 loads vmcs02, reads 35 rare fields into vmcs12" in paragraph(replayed, 11)
    assert "sees a value that nobody wrote; it should see L1's value of step 3" in said(replayed)
    assert "uninitialised" in said(replayed)
    assert "lost: step 11 (VMREAD GUEST_GS_BASE)" in said(replayed)
    assert "migration" not in said(replayed)


def test_an_entry_into_hlt_is_told():
    replayed = halted()
    assert "HLT activity state: L2 does not run yet" in paragraph(replayed, 6)
    assert "vmcs02.GUEST_CR3 is not written: the restored value of step 2" in paragraph(replayed, 6)
    assert "before L2 ran at all; sync_vmcs02_to_vmcs12()" in paragraph(replayed, 7)
    assert "lost: step 7 (EXIT EXTERNAL_INTERRUPT)" in said(replayed)
    # the field is not rare: what is deferred plays no part
    assert "need_sync" not in said(replayed)


def test_what_the_shadow_vmcs_overwrites_is_told():
    replayed = in_smm()
    assert "copy_shadow_to_vmcs12() overwrites vmcs12" in paragraph(replayed, 6)
    assert "lost: step 6 (GET_NESTED_STATE)" in said(replayed)


def test_a_true_value_that_is_not_lost_is_said_to_be_there():
    replayed = vmfail()
    assert "it should see error number 7" in said(replayed)
    assert "it was not, vmcs12 still has it" in said(replayed)
    assert "the enlightened VMCS has had the wrong one since step 2 (VMPTRLD A)" in said(replayed)


def test_a_wrong_answer_is_told_without_values():
    replayed = refused()
    assert "VMREAD GUEST_GS_BASE: VMfailValid(12)" in paragraph(replayed, 6)
    assert "answers VMfailValid(12), it should answer VMsucceed." in said(replayed)
    assert "Where the true value was lost" not in said(replayed)
    assert [row["label"] for row in rows(replayed)][-1] == "VMfailValid(12)"


def test_the_kernels_warning_is_told_and_drawn_where_it_fires():
    replayed = warned()
    assert len(replayed.moments) == 5
    assert paragraph(replayed, 5) == "L2 exits (CPUID)."
    assert "Wrong, whatever the values: copy_vmcs02_to_vmcs12_rare warns" in said(replayed)
    last = rows(replayed)[-1]
    assert (last["actor"], last["target"], last["wrong"]) == ("L0", "L0", True)
    assert last["label"] == "copy_vmcs02_to_vmcs12_rare warns: vmcs02 is loaded"


def test_the_machine_is_named_where_it_is_no_ordinary_one():
    assert story(vmfail()).startswith("KVM 5.3 (lazy, enlightened VMCS): L1 sees a stale VM_INSTR")
    old = replay(Config.of("5.3", mpx=False, pae=True), MIGRATION, "GUEST_GS_BASE")
    assert story(old).startswith("KVM 5.3 (lazy, no mpx, pae): L1 sees a stale GUEST_GS_BASE")


@given(L0S, st.lists(st.sampled_from(steps(("GUEST_GS_BASE",), ("CPUID", "HLT"))), max_size=25))
@settings(max_examples=40, deadline=None)
def test_whatever_can_happen_can_be_told(config, candidates):
    taken = [parse("VMXON"), parse("VMPTRLD A"), parse("VMLAUNCH")]
    for step in candidates:
        try:
            replayed = replay(config, [*taken, step], "GUEST_GS_BASE")
        except LabError:  # it cannot happen here
            continue
        taken.append(step)
        if replayed.failed:
            break
    replayed = replay(config, taken, "GUEST_GS_BASE")
    assert story(replayed).count("\n") >= len(taken)
    assert [row["step"] for row in rows(replayed)][-1] == len(taken)
    assert max(len(line) for line in diagram(replayed).splitlines()) <= 110
    assert ("\nwrong" in diagram(replayed)) == replayed.failed


@pytest.mark.parametrize("made", ALL)
def test_a_story_has_a_paragraph_for_each_step_and_narrow_lines(made):
    replayed = made()
    numbers = re.findall(r"^(\d+)\. ", story(replayed), re.MULTILINE)
    assert numbers == [str(n + 1) for n in range(len(replayed.moments))]
    assert max(len(line) for line in story(replayed).splitlines()) <= 96
    # no name of KVM is spelled with a capital letter
    assert not re.search(r"\b(Vmcs|Need_|Sync_|Copy_|Prepare_)", story(replayed))


# -- diagrams --------------------------------------------------------------------------------------


def states(replayed, step):
    last = [row for row in rows(replayed) if row["step"] == step][-1]
    return {key: last[key] for key in ("vmcs02", "vmcs12", "flag", "dirty")}


def test_rows_say_where_the_true_value_is():
    replayed = migration()
    before = {"vmcs02": "true", "vmcs12": "stale", "flag": True, "dirty": False}
    assert states(replayed, 5) == before
    after = {"vmcs02": "empty", "vmcs12": "stale", "flag": False, "dirty": True}
    assert states(replayed, 6) == after
    assert states(replayed, 2)["vmcs12"] == "undefined"  # whatever L1's memory held


def test_rows_are_tidy_and_one_is_wrong():
    for made in ALL:
        table = rows(made())
        assert len({tuple(row) for row in table}) == 1
        assert [row["wrong"] for row in table].count(True) == 1
        assert table[-1]["wrong"]
        assert {row["actor"] for row in table} <= {"user space", "L2", "L1", "L0"}


def test_cells_that_cannot_matter_have_no_column():
    assert not {"shadow", "evmcs", "A", "B", "SMRAM"} & rows(migration())[0].keys()
    assert {"shadow", "A"} <= rows(halted())[0].keys()
    assert "evmcs" in rows(vmfail())[0]


def test_a_pull_is_an_event_of_l0_between_the_question_and_the_answer():
    last = [row for row in rows(outlives()) if row["step"] == 11]
    assert [(row["actor"], row["target"]) for row in last] == [
        ("L1", "L0"),
        ("L0", "L0"),
        ("L0", "L1"),
    ]
    assert last[1]["label"].startswith("pull: 35 fields")


@pytest.mark.parametrize("made", ALL)
def test_a_diagram_fits_and_marks_the_end(made):
    replayed = made()
    lines = diagram(replayed).splitlines()
    assert max(len(line) for line in lines) <= 110
    assert [line.startswith("wrong") for line in lines].count(True) == 1
    numbers = [int(n[1]) for n in (re.match(r" +(\d+) ", line) for line in lines) if n]
    assert numbers == list(range(1, len(replayed.moments) + 1))


def test_a_diagram_draws_arrows_between_the_lanes():
    lines = diagram(migration()).splitlines()
    (exits,) = [line for line in lines if "EXIT CPUID" in line]
    assert exits[:26].split() == ["5", "│", "│────────>│"]
    (migrates,) = [line for line in lines if "MIGRATE" in line]
    assert "│─────────────>│" in migrates
    (reflected,) = [line for line in lines if "reflected" in line]
    assert reflected.split()[-4:] == ["true", "stale", "set", "-"]
