"""Mutants: the explorer finds each mistake that can be seen, and none where nothing is wrong."""

from __future__ import annotations

import re

import pytest

from nvmx_lab.errors import LabError
from nvmx_lab.nested.explorer import explore
from nvmx_lab.nested.model import Nvmx
from nvmx_lab.nested.mutants import BASE, MUTANTS, Mutant, mutant
from nvmx_lab.nested.replay import replay

CAUGHT = [m.name for m in MUTANTS.values() if not m.harmless]
HARMLESS = [m.name for m in MUTANTS.values() if m.harmless]

# One field of each class in which a mistake of the catalogue shows: the rest is only slower.
FIELDS = (
    *("GUEST_GS_BASE", "GUEST_IDTR_LIMIT", "GUEST_PENDING_DBG_EXCEPTIONS"),  # rare
    *("GUEST_CR3", "GUEST_SYSENTER_CS", "GUEST_INTERRUPTIBILITY_INFO", "GUEST_PDPTR0"),  # eager
    *("GUEST_INTR_STATUS", "GUEST_CS_AR_BYTES", "VM_EXIT_REASON"),  # shadowed
    "CR4_GUEST_HOST_MASK",  # written to vmcs02 if vmcs12 is dirty
    "HOST_RIP",  # loaded by an exit
)
# Steps that make the search longer, and the mutants that cannot be seen without them.
RARELY_NEEDED = ("SET_NESTED_STATE", "VMXOFF", "SMI", "RSM")
NEEDED = {"flag-outlives-vmcs02", "flag-not-set-at-smi", "smi-does-not-sync"}
ONE_FIELD = {"rare-reader-forgets-a-field", "vmread-forgets-a-field"}
"""Mistakes about one field of many: only the steps about each of them show which."""


@pytest.mark.parametrize("name", CAUGHT)
def test_a_mistake_is_found_and_its_counterexample_replays_on_the_mutant_alone(name: str) -> None:
    wrong = mutant(name)
    without = () if name in NEEDED else RARELY_NEEDED
    each = name in ONE_FIELD
    found = explore(
        wrong.config, wrong.nvmx, fields=FIELDS, without=without, each_field=each
    ).findings
    assert found
    shortest = found[0]
    assert replay(wrong.config, shortest.steps, shortest.field, wrong.nvmx).failed
    assert not replay(wrong.config, shortest.steps, shortest.field).failed


@pytest.mark.parametrize("name", HARMLESS)
def test_a_mutant_with_a_reason_cannot_be_told_from_the_model(name: str) -> None:
    harmless = mutant(name)
    exploration = explore(harmless.config, harmless.nvmx, fields=FIELDS)
    assert exploration.complete
    assert not exploration.findings


def test_the_catalogue_has_every_bug_class_of_the_list_and_more() -> None:
    listed = [re.findall(r"bug classes, \((\w)\)", m.source) for m in MUTANTS.values()]
    assert sorted({letter for letters in listed for letter in letters}) == list("abcdefghijklm")
    assert len([letters for letters in listed if not letters]) >= 12
    assert len(HARMLESS) >= 3


@pytest.mark.parametrize("known", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_says_what_it_is(known: Mutant) -> None:
    assert known is mutant(known.name)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", known.name)
    assert known.meaning and known.source
    assert issubclass(known.nvmx, Nvmx) and known.nvmx is not Nvmx
    assert known.config.kvm.name == known.kvm == BASE
    for text in (known.meaning, known.source, known.harmless):
        assert not text.endswith(".")


def test_no_two_mutants_are_one() -> None:
    assert len({m.nvmx for m in MUTANTS.values()}) == len(MUTANTS)
    assert len({m.meaning for m in MUTANTS.values()}) == len(MUTANTS)


def test_an_unknown_mutant_is_refused_with_a_suggestion() -> None:
    with pytest.raises(LabError, match="did you mean 'no-pull-in-vmwrite'"):
        mutant("no-pull-in-vmwrites")
