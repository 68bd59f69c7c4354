"""Streams: sizes, reproducibility, frequencies, interning."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab.errors import LabError
from nvmx_lab.nested.ops import Kind, Operation, parse
from nvmx_lab.workload.streams import MAX_EXITS, Stream, Word, check_word, drawn, from_round_trips

EXIT, RESUME = parse("EXIT CPUID"), parse("VMRESUME")
MIDDLE = [parse(text) for text in ("VMREAD GUEST_RIP", "VMWRITE HOST_RSP", "L1_EXIT RDMSR")]

middles = st.lists(st.sampled_from(MIDDLE), max_size=4)
trips = st.builds(
    lambda middle, reason: (Operation(Kind.EXIT, reason), *middle, RESUME),
    middles,
    st.sampled_from(["CPUID", "HLT"]),
)


def of_weights(weights: list[float], exits: int, seed: int = 1, task: str = "") -> Stream:
    total = sum(weights)
    words = [
        Word((EXIT, *[MIDDLE[0]] * length, RESUME), weight / total, "w", float(length))
        for length, weight in enumerate(weights)
    ]
    return drawn(words, exits, seed, task=task)


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=40),
    exits=st.integers(1, 200_000),
    chunk=st.integers(1, 100_000).filter(lambda c: c > 200),
)
@settings(max_examples=25, deadline=None)
def test_the_chunk_size_only_decides_where_the_sequence_is_cut(weights, exits, chunk):
    stream = of_weights(weights, exits)
    chunks = list(stream.sequence(chunk))
    assert [c.size for c in chunks[:-1]] == [chunk] * (len(chunks) - 1)
    assert sum(c.size for c in chunks) == exits
    assert all(c.dtype == np.int32 for c in chunks)
    assert np.array_equal(np.concatenate(chunks), stream.ids())


@given(
    weights=st.lists(st.floats(1e-6, 1), min_size=1, max_size=300), seed=st.integers(0, 2**64 - 1)
)
@settings(max_examples=25, deadline=None)
def test_frequencies_match_probabilities(weights, seed):
    exits = 400_000
    stream = of_weights(weights, exits, seed)
    ids = stream.ids()
    assert ids.min() >= 0
    assert ids.max() < len(stream.words)
    counts = np.bincount(ids, minlength=len(weights))
    expected = stream.probability * exits
    # Six standard deviations plus a few counts: about 1e-8 per word for what is Poisson-like.
    assert np.all(np.abs(counts - expected) <= 6 * np.sqrt(expected) + 8)


def alias_probability(stream: Stream) -> np.ndarray:
    """What the alias table gives each word, summed over all 2**32 draws without drawing."""
    from nvmx_lab.workload.streams import _alias_table

    threshold, choice, shift = _alias_table(stream.probability)
    width = 1 << int(shift)
    low = threshold.astype(np.int64) - np.arange(threshold.size, dtype=np.int64) * width
    assert np.all((low >= 0) & (low <= width))
    mass = np.zeros(choice.max() + 1)
    np.add.at(mass, choice[0::2], low / 2**32)
    np.add.at(mass, choice[1::2], (width - low) / 2**32)
    return mass


@given(weights=st.lists(st.floats(1e-9, 1), min_size=1, max_size=200))
@settings(deadline=None)
def test_the_alias_table_is_exact_to_what_10_to_the_10_draws_can_show(weights):
    stream = of_weights(weights, 1)
    mass = alias_probability(stream)
    assert np.all(mass[len(weights) :] == 0)
    assert np.allclose(mass[: len(weights)], stream.probability, rtol=0, atol=300 / 2**32)


def test_neighbours_are_independent():
    ids = of_weights([1, 1, 1, 1], 1_000_000).ids()
    pairs = np.bincount(ids[:-1] * 4 + ids[1:], minlength=16)
    assert np.all(np.abs(pairs - 62_500) < 6 * 250)


def test_a_seed_reproduces_and_another_differs():
    one, same, other, task = (
        of_weights([1, 2, 3], 1000, seed, task).ids()
        for seed, task in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, task)


def test_a_longer_stream_starts_as_the_shorter_one():
    assert np.array_equal(
        of_weights([1, 2, 3], 70_000).ids()[:777], of_weights([1, 2, 3], 777).ids()
    )


def test_the_ids_of_a_seed_are_fixed():
    """Golden: a change of block size, generator or table changes every published number."""
    assert of_weights([1, 2, 3], 16, 1, "golden").ids().tolist() == GOLDEN


def test_a_long_stream_is_not_held_in_memory():
    first = next(of_weights([1, 1], MAX_EXITS).sequence(1000))
    assert first.size == 1000


@pytest.mark.parametrize("exits", [0, -1, MAX_EXITS + 1, 1.5, True, "10", None])
def test_bad_sizes_are_refused(exits):
    with pytest.raises(LabError, match="exits must be a whole number"):
        of_weights([1.0], exits)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(LabError, match="seed must be a whole number"):
        of_weights([1.0], 10, seed)


@pytest.mark.parametrize("chunk", [0, -3, 2**29])
def test_bad_chunks_are_refused_at_once(chunk):
    with pytest.raises(LabError, match="chunk"):
        of_weights([1.0], 10).sequence(chunk)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_bad_probabilities_are_refused(probability):
    with pytest.raises(LabError, match="probability"):
        drawn([Word((EXIT, RESUME), probability)], 1, 1)


def test_probabilities_that_do_not_sum_to_one_are_refused():
    with pytest.raises(LabError, match="do not sum to 1"):
        drawn([Word((EXIT, RESUME), 0.5)], 1, 1)
    with pytest.raises(LabError, match="do not sum to 1"):
        drawn([], 1, 1)


def test_identical_words_merge_and_impossible_ones_go():
    word = (EXIT, RESUME)
    stream = drawn(
        [
            Word(word, 0.25, "a", 10.0),
            Word(word, 0.25, "a", 30.0),
            Word(word, 0.5, "b"),
            Word((EXIT, MIDDLE[0], RESUME), 0.0, "c"),
        ],
        5,
        1,
    )
    assert stream.words.labels == ("a", "b")
    assert stream.probability.tolist() == [0.5, 0.5]
    assert stream.words.l1_instructions[0] == 20.0
    assert np.isnan(stream.words.l1_instructions[1])
    assert set(stream.alphabet) == {EXIT, RESUME}


@given(st.lists(trips, min_size=1, max_size=60))
def test_a_log_comes_back_as_it_was(log):
    stream = from_round_trips(log, source="test")
    assert stream.exits == len(log)
    assert list(stream.operations()) == list(itertools.chain(*log))
    assert len(stream.words) == len(set(log))
    assert len(set(stream.alphabet)) == len(stream.alphabet)
    assert np.isclose(stream.probability.sum(), 1)
    assert np.all(np.isnan(stream.words.l1_instructions))
    for word, label in enumerate(stream.words.labels):
        assert stream.word(word)[0].arg == label
    frame = stream.frame()
    assert frame["operations"].map(len).min() > 0
    assert stream.operations_per_exit == pytest.approx(sum(map(len, log)) / len(log))


def test_instructions_of_a_word_are_the_mean_over_what_is_known():
    word = (EXIT, RESUME)
    stream = from_round_trips(
        [word, word, word], source="t", l1_instructions=[10, float("nan"), 20], labels=["x"] * 3
    )
    assert stream.words.l1_instructions.tolist() == [15.0]
    with pytest.raises(LabError, match="one for each round trip"):
        from_round_trips([word], source="t", labels=[])


def test_only_the_last_round_trip_may_be_cut_short():
    whole, cut = (EXIT, RESUME), (EXIT, MIDDLE[0])
    assert from_round_trips([whole, cut], source="t").exits == 2
    with pytest.raises(LabError, match="exit 0: a round trip ends"):
        from_round_trips([cut, whole], source="t")
    with pytest.raises(LabError, match="no round trip"):
        from_round_trips([], source="t")
    with pytest.raises(LabError, match="unknown basis"):
        from_round_trips([whole], source="t", basis="dreamt")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    ["", "VMRESUME", "EXIT CPUID", "EXIT CPUID;EXIT HLT;VMRESUME", "EXIT CPUID;VMRESUME;VMXOFF"],
)
def test_what_is_no_round_trip_is_refused(text):
    with pytest.raises(LabError, match="round trip"):
        check_word([parse(part) for part in text.split(";") if part])


@pytest.mark.parametrize(
    "text",
    ["EXIT CPUID;VMLAUNCH", "EXIT CPUID;VMRESUME;L0_EXIT EPT_VIOLATION", "EXIT HLT;VMRESUME"],
)
def test_round_trips_are_accepted(text):
    check_word([parse(part) for part in text.split(";")])


def test_a_streams_arrays_cannot_be_changed():
    stream = of_weights([1, 1], 10)
    with pytest.raises(ValueError, match="read-only"):
        stream.words.codes[0] = 1
    assert stream.words.codes.dtype == np.uint16
    assert stream.words.offsets.dtype == np.int64
    assert repr(stream) == "Stream('words, seed 1', drawn: 10 exits, 2 words, 3 operations)"


GOLDEN = [2, 0, 1, 0, 2, 0, 1, 2, 2, 2, 0, 0, 1, 2, 2, 1]
