"""The automaton is the model: same control states, same counts, operation by operation."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvmx_lab.errors import LabError
from nvmx_lab.nested.automaton import UNREACHED, Automaton, count, steps
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Control, Nvmx, Trace
from nvmx_lab.nested.ops import Operation, parse
from nvmx_lab.nested.paths import Access
from nvmx_lab.nested.primitives import COUNTERS
from tests.nested import words


def compiled(config: Config, dictionary: Iterable[tuple[Operation, ...]]) -> Automaton:
    dictionary = list(dictionary)
    alphabet = list(dict.fromkeys(operation for word in dictionary for operation in word))
    automaton = Automaton(config, alphabet)
    automaton.visit_words([[alphabet.index(operation) for operation in w] for w in dictionary])
    return automaton


def without_launched(control: Control) -> Control:
    """The launch state lives in L1's memory, which an automaton does not have.

    A stream's VMLAUNCH and VMRESUME set it themselves, and nothing else looks at it.
    """
    return control._replace(launched=True)


@settings(max_examples=120)
@given(words.configs(), words.dictionaries(), st.data())
def test_walking_the_automaton_is_stepping_the_model(config, dictionary, data):
    automaton = compiled(config, dictionary)
    following, count_id, vectors = automaton.next_state, automaton.count_id, automaton.counts
    model = Nvmx(config)
    model.start()
    state = 0
    assert automaton.states[0] == model.control
    for word in data.draw(st.lists(st.sampled_from(dictionary), max_size=6)):
        for operation in word:
            model.trace = Trace()
            model.apply(operation)
            code = automaton.alphabet.index(operation)
            expected = dict(zip(COUNTERS, count(model.trace), strict=True))
            got = dict(zip(COUNTERS, vectors[count_id[state, code]], strict=True))
            assert got == expected, operation
            state = following[state, code]
            assert state != UNREACHED
            assert without_launched(automaton.states[state]) == without_launched(model.control)


def trips(*texts: str) -> list[tuple[Operation, ...]]:
    return [tuple(map(parse, text.split("; "))) for text in texts]


SWITCHES = trips(
    "EXIT CPUID; VMPTRLD other; VMRESUME",
    "EXIT CPUID; VMCLEAR current; VMPTRLD other; VMRESUME",
    "EXIT CPUID; VMCLEAR other; SET_NESTED_STATE; VMPTRLD other; VMLAUNCH",
)


@settings(max_examples=25)
@given(words.configs(), words.dictionaries())
@example(Config.of("5.3"), SWITCHES)
@example(Config.of("6.1"), SWITCHES[::-1])
@example(Config.of("6.1", "adaptive"), SWITCHES)
@example(Config.of("6.1", "by-reason"), SWITCHES)
def test_a_pair_gives_the_same_whatever_was_visited_before(config, dictionary):
    """The model keeps values (VMCSs in L1's memory): none may leak from pair to pair."""
    automaton = compiled(config, dictionary)
    for state, code in np.argwhere(automaton.next_state != UNREACHED).tolist():
        control, trace = automaton.trace(state, code)
        assert control == automaton.states[automaton.next_state[state, code]]
        np.testing.assert_array_equal(
            count(trace), automaton.counts[automaton.count_id[state, code]]
        )


def test_only_what_words_reach_is_visited():
    automaton = compiled(Config.of("5.3"), trips("EXIT CPUID; VMREAD GUEST_CS_BASE; VMRESUME"))
    # L2 runs; after the exit; after the pull. The VMRESUME leads back to the first.
    assert len(automaton.states) == 3
    assert (automaton.next_state != UNREACHED).sum() == 3
    assert (automaton.count_id != UNREACHED).sum() == 3


def test_an_empty_alphabet_is_refused():
    with pytest.raises(LabError, match="at least one operation"):
        Automaton(Config.of("5.3"), ())


def test_steps_tell_first_from_next():
    """The "next" price is for straight-line code only: same instruction, same function."""
    trace = Trace(
        [
            Access("VMREAD", "GUEST_RIP", "f"),
            Access("VMREAD", "GUEST_RSP", "f"),
            Access("VMREAD", "GUEST_CS_BASE", "f_rare"),  # a part of f
            Access("VMREAD", "GUEST_CR3", "g"),
            Access("VMWRITE", "GUEST_CR3", "g"),
            Access("VMPTRLD", "", "g"),
            Access("VMWRITE", "GUEST_CR3", "g"),
            Access("VMWRITE", "GUEST_CR4", "g"),
        ]
    )
    assert [primitive for primitive, _ in steps(trace)] == [
        *("vmread_first", "vmread_next", "vmread_next", "vmread_first"),
        *("vmwrite_first", "vmptrld", "vmwrite_first", "vmwrite_next"),
    ]


def test_software_is_what_is_left_of_the_retired_instructions():
    trace = Trace([Access("VMREAD", "GUEST_RIP", "f"), Access("IBPB", "", "f")], instructions=100.0)
    counts = dict(zip(COUNTERS, count(trace), strict=True))
    # An IBPB is a WRMSR whose instructions the executed runs (mitigations off) do not hold.
    assert counts["l0_instructions"] == 99
    assert counts["retired"] == 100
