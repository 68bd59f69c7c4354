"""The engine against the same loops in C, on one core, on streams as a comparison draws them.

Goals: at least 1.0 of the C loop's speed (gcc -O3), at most 0.8 ns per operation and automaton.
Times are the fastest of the rounds: noise only ever adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from nvmx_lab.engine import run as engine
from tests.benchmarks import c_loop, contestant

MIXES = ("cpuid", "linux-boot-kstack")
EXITS = 1 << 21
ROUNDS = 15


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> c_loop.Loops:
    """Return the C loops, freshly compiled."""
    if c_loop.compiler() is None:
        pytest.skip("gcc is needed to compare with C (on Debian: apt-get install gcc)")
    return c_loop.build(tmp_path_factory.mktemp("c"))


def timed(function: Callable[[], object], times: list[float]) -> None:
    begin = time.perf_counter()
    function()
    times.append(time.perf_counter() - begin)


@pytest.mark.parametrize("automata", [1, 2, 4])
@pytest.mark.parametrize("mix", MIXES)
def test_against_c(benchmark, scoreboard, in_c, mix, automata):
    given = contestant.problem(mix, EXITS, automata)
    rows = [item.next_row for item in given.lifted]

    def words_in_c():
        visits = [np.zeros(table.size, np.int64) for table in rows]
        for table, counted in zip(rows, visits, strict=True):
            row = 0
            for chunk in given.drawn.chunks:
                row = in_c.words(chunk, table, counted, row)
        return visits

    for ours, theirs in zip(given.run(draw=False), words_in_c(), strict=True):
        np.testing.assert_array_equal(ours.ravel(), theirs)

    c_times: list[float] = []
    drawing: list[float] = []

    def before_each_round():
        # So that all meet the same weather.
        timed(words_in_c, c_times)
        timed(lambda: given.run(draw=True), drawing)

    benchmark.pedantic(
        given.run, kwargs={"draw": False}, setup=before_each_round, rounds=ROUNDS, warmup_rounds=1
    )
    ours, steps = benchmark.stats.stats.min, given.operations * automata
    ratio = min(c_times) / ours
    nanoseconds = {
        "engine": ours / steps * 1e9,
        "with_drawing": min(drawing) / steps * 1e9,
        "same_loop_in_c": min(c_times) / steps * 1e9,
    }
    benchmark.extra_info.update(nanoseconds, ratio_to_c=ratio)
    what = "ns/operation and automaton"
    who = f"{mix}, {automata} automat{'on' if automata == 1 else 'a'}"
    scoreboard.record(f"{who}: engine", nanoseconds["engine"], what, at_most=0.8)
    scoreboard.record("  drawing included", nanoseconds["with_drawing"], what, at_most=0.8)
    scoreboard.record("  the same loop in C", nanoseconds["same_loop_in_c"], what)
    scoreboard.record("  speed as a multiple of C's", ratio, "", at_least=1.0)


@pytest.mark.parametrize("mix", MIXES)
def test_against_c_operation_by_operation(benchmark, scoreboard, in_c, mix):
    """What walking words instead of operations gains."""
    given = contestant.problem(mix, EXITS >> 3, 1)
    codes, (table,) = given.codes(), given.operation_rows()

    def operations_in_c():
        visits = np.zeros(table.size, np.int64)
        in_c.operations(codes, table, visits, 0)
        return visits

    (seen,) = given.run(draw=False)
    words = given.stream.words
    pairs = engine.pair_visits(given.automata[0], given.lifted[0], seen, words.offsets, words.codes)
    np.testing.assert_array_equal(pairs.ravel(), operations_in_c())

    plain: list[float] = []
    benchmark.pedantic(
        given.run,
        kwargs={"draw": False},
        setup=lambda: timed(operations_in_c, plain),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    scoreboard.record(
        f"{mix}: C, operation by operation", min(plain) / codes.size * 1e9, "ns/operation"
    )
    scoreboard.record(
        "  the engine's speed as a multiple", min(plain) / benchmark.stats.stats.min, ""
    )


def test_stream_bytes_against_copy_bandwidth(benchmark, scoreboard):
    given = contestant.problem(MIXES[0], EXITS, 1)
    given.run(draw=False)
    times: list[float] = []
    for _ in range(5):
        timed(lambda: given.run(draw=False), times)
    stream_bytes = sum(chunk.nbytes for chunk in given.drawn.chunks)

    source = np.ones(1 << 27, np.uint8)
    target = np.empty_like(source)
    benchmark.pedantic(np.copyto, args=(target, source), rounds=ROUNDS, warmup_rounds=2)
    copying = 2 * source.nbytes / benchmark.stats.stats.min
    reading = stream_bytes / min(times)
    scoreboard.record("stream, bytes per operation", stream_bytes / given.operations, "B")
    scoreboard.record("stream, read at", reading / 1e9, "GB/s")
    scoreboard.record("  as a share of copy bandwidth", 100 * reading / copying, "%")
