"""The engine is the model, only faster: visits and counts over whole streams."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab.engine import run
from nvmx_lab.nested.automaton import Automaton
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.ops import parse
from nvmx_lab.workload import mixes, streams
from nvmx_lab.workload.streams import Stream
from tests.engine import naive
from tests.nested import words


def lifted(config: Config, stream: Stream) -> tuple[Automaton, run.Lifted]:
    automaton = Automaton(config, stream.alphabet)
    automaton.visit_words([stream.words[w].tolist() for w in range(len(stream.words))])
    return automaton, run.lift(automaton, stream.words.offsets, stream.words.codes)


def counts_of_run(automaton: Automaton, item: run.Lifted, stream: Stream, seen) -> dict:
    """Return operation -> counts, from the visits of a run."""
    pairs = run.pair_visits(automaton, item, seen, stream.words.offsets, stream.words.codes)
    out = {}
    for code, operation in enumerate(stream.alphabet):
        states = np.flatnonzero(pairs[:, code])
        if states.size:
            vectors = automaton.counts[automaton.count_id[states, code]]
            out[operation] = pairs[states, code] @ vectors
    return out


@dataclass
class Chunked:
    """A stream that is read in chunks of a given size."""

    stream: Stream
    chunk: int

    @property
    def exits(self) -> int:
        return self.stream.exits

    def sequence(self, chunk: int = 0):
        return self.stream.sequence(self.chunk)


@settings(max_examples=40)
@given(
    st.lists(words.configs(), min_size=1, max_size=3),
    words.dictionaries(),
    st.data(),
    st.integers(1, 50),
)
def test_several_automata_over_one_stream_are_models_stepped(configs, dictionary, data, chunk):
    trips = data.draw(st.lists(st.sampled_from(dictionary), min_size=1, max_size=40))
    stream = streams.from_round_trips(trips, source="drawn by the test")
    compiled = [lifted(config, stream) for config in configs]
    done: list[int] = []
    seen = run.visits(Chunked(stream, chunk), [item for _, item in compiled], done.append)
    assert sum(done) == len(trips)
    for config, (automaton, item), visits in zip(configs, compiled, seen, strict=True):
        assert visits.sum() == len(trips)
        got = counts_of_run(automaton, item, stream, visits)
        expected = naive.counts_by_operation(config, stream.operations())
        assert got.keys() == expected.keys()
        for operation, counts in expected.items():
            np.testing.assert_array_equal(got[operation], counts, err_msg=str(operation))
        table = run.counts_of_word(automaton, item, stream.words.offsets, stream.words.codes)
        np.testing.assert_array_equal(
            run.counts_per_exit(Chunked(stream, chunk), item, table),
            naive.counts_per_exit(config, trips),
        )


@pytest.mark.parametrize(
    "mix", ["cpuid", "linux-boot-kstack", "virtualbox-boot", "hyper-v-evmcs", "xen-boot"]
)
def test_mixes(mix):
    chosen = mixes.load(mix)
    stream = chosen.stream(150, seed=3)
    host = chosen.host
    for kvm in ("5.2", "5.3", "6.1"):
        config = Config.of(kvm, shadow_vmcs=host.shadow_vmcs, evmcs=host.evmcs, mpx=host.mpx)
        automaton, item = lifted(config, stream)
        (seen,) = run.visits(stream, [item])
        got = counts_of_run(automaton, item, stream, seen)
        expected = naive.counts_by_operation(config, stream.operations())
        assert got.keys() == expected.keys()
        for operation, counts in expected.items():
            np.testing.assert_allclose(got[operation], counts, rtol=1e-12, err_msg=str(operation))


def test_pair_visits_are_the_operations_of_the_stream():
    stream = mixes.load("linux-boot-nokstack").stream(2_000, seed=5)
    automaton, item = lifted(Config.of("5.3"), stream)
    (seen,) = run.visits(stream, [item])
    pairs = run.pair_visits(automaton, item, seen, stream.words.offsets, stream.words.codes)
    met = Counter(stream.operations())
    assert {op: int(pairs[:, i].sum()) for i, op in enumerate(stream.alphabet)} == {
        op: met.get(op, 0) for op in stream.alphabet
    }


def test_an_automaton_that_did_not_visit_the_words_is_refused():
    stream = streams.from_round_trips([tuple(map(parse, ("EXIT CPUID", "VMRESUME")))], source="x")
    automaton = Automaton(Config.of("5.3"), stream.alphabet)
    with pytest.raises(ValueError, match="visit_words"):
        run.lift(automaton, stream.words.offsets, stream.words.codes)


def test_boundary_states_are_those_where_a_word_can_start():
    trips = [tuple(map(parse, t.split("; "))) for t in ("EXIT CPUID; VMRESUME",)]
    stream = streams.from_round_trips(trips * 3, source="x")
    _, item = lifted(Config.of("5.3"), stream)
    assert item.boundary.tolist()[0] == 0
    assert (item.next_of_word >= 0).all()
    assert item.next_of_word.max() < len(item.boundary)
