"""The engine against the same loop in C, on one core.

Goals: at least 1.0 of the C loop's speed (gcc -O3), at most 0.8 ns per operation and automaton.
Times are the fastest of the rounds: noise only ever adds.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.benchmarks import c_loop, contestant

OPERATIONS = 1 << 24
ROUNDS = 15


@pytest.fixture(scope="module")
def walk_in_c(tmp_path_factory: pytest.TempPathFactory) -> c_loop.Walk:
    """Return the C loop, freshly compiled."""
    if c_loop.compiler() is None:
        pytest.skip("gcc is needed to compare with C (on Debian: apt-get install gcc)")
    return c_loop.build(tmp_path_factory.mktemp("c"))


@pytest.mark.parametrize("automata", [1, 2, 4])
def test_against_c(benchmark, scoreboard, walk_in_c, automata):
    given = contestant.problem(OPERATIONS, automata)
    run = contestant.prepare(given)
    in_c = []

    def walk_all_in_c():
        # Runs before each round of the engine, so that both meet the same weather.
        begin = time.perf_counter()
        visits = [np.zeros(table.size, np.int64) for table in given.next_rows]
        for table, counted in zip(given.next_rows, visits, strict=True):
            walk_in_c(given.codes, table, counted)
        in_c.append(time.perf_counter() - begin)
        return visits

    for ours, theirs in zip(run(), walk_all_in_c(), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    def before_each_round():
        walk_all_in_c()

    benchmark.pedantic(run, setup=before_each_round, rounds=ROUNDS, warmup_rounds=1)

    ours, theirs = benchmark.stats.stats.min, min(in_c)
    steps = OPERATIONS * automata
    benchmark.extra_info.update(ns_per_operation=ours / steps * 1e9, ratio_to_c=theirs / ours)
    who = f"{contestant.NAME}, {automata} automata" if automata > 1 else contestant.NAME
    scoreboard.record(f"{who}: time", ours / steps * 1e9, "ns/operation", at_most=0.8)
    scoreboard.record("  the same loop in C", theirs / steps * 1e9, "ns/operation")
    scoreboard.record("  speed as a multiple of C's", theirs / ours, "", at_least=1.0)


def test_stream_bytes_against_copy_bandwidth(benchmark, scoreboard):
    given = contestant.problem(OPERATIONS, 1)
    run = contestant.prepare(given)
    run()
    begin = time.perf_counter()
    run()
    reading = given.codes.nbytes / (time.perf_counter() - begin)

    source = np.ones(1 << 27, np.uint8)
    target = np.empty_like(source)
    benchmark.pedantic(np.copyto, args=(target, source), rounds=ROUNDS, warmup_rounds=2)
    copying = 2 * source.nbytes / benchmark.stats.stats.min
    scoreboard.record("stream, bytes per operation", given.codes.itemsize, "B")
    scoreboard.record("stream, read at", reading / 1e9, "GB/s")
    scoreboard.record("  as a share of copy bandwidth", 100 * reading / copying, "%")
