"""Whole processes as a user starts them, and the memory that a long run takes.

Goals: ``--help`` under 0.5 s; the first ``compare`` with no compiled code on disk under 8 s, a
later one under 2 s; 10^9 operations in under 500 MB. Times are medians: a user waits for those.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = ["compare", "--mix", "pio-user-kstack", "--kvm", "5.2", "--kvm", "5.3"]
LONG_EXITS = 75_000_000  # a round trip of this mix is 14 operations: 10^9 of them


@pytest.fixture(scope="module")
def command() -> str:
    """Return the installed command's path."""
    path = Path(sys.executable).with_name("nvmx-lab")
    if not path.exists():
        pytest.skip("nvmx-lab is not installed beside this Python (make setup)")
    return str(path)


def fresh_caches(folder: Path) -> dict[str, str]:
    """Return an environment whose caches are empty and in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = {"NUMBA_CACHE_DIR": str(folder / "numba"), "XDG_CACHE_HOME": str(folder / "cache")}
    return {**os.environ, **own}


def start(arguments: list[str], environment: dict[str, str]) -> None:
    subprocess.run(arguments, env=environment, check=True, stdout=subprocess.DEVNULL)


def test_help(benchmark, scoreboard, command, tmp_path):
    environment = fresh_caches(tmp_path / "caches")
    benchmark.pedantic(start, args=([command, "--help"], environment), rounds=9, warmup_rounds=1)
    scoreboard.record("nvmx-lab --help", benchmark.stats.stats.median, "s", at_most=0.5)


def test_compare_cold(benchmark, scoreboard, command, tmp_path):
    def nothing_compiled():
        return ([command, *COMPARE], fresh_caches(tmp_path / "caches")), {}

    benchmark.pedantic(start, setup=nothing_compiled, rounds=3)
    scoreboard.record("nvmx-lab compare, cold", benchmark.stats.stats.median, "s", at_most=8.0)


def test_compare_warm(benchmark, scoreboard, command, tmp_path):
    environment = fresh_caches(tmp_path / "caches")
    benchmark.pedantic(start, args=([command, *COMPARE], environment), rounds=5, warmup_rounds=1)
    scoreboard.record("nvmx-lab compare, warm", benchmark.stats.stats.median, "s", at_most=2.0)


def test_memory_of_a_long_run(benchmark, scoreboard, command, tmp_path):
    environment = fresh_caches(tmp_path / "caches")
    arguments = [command, *COMPARE, "--exits", str(LONG_EXITS)]
    peaks = []

    def watched():
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss * 1024)  # Linux counts in KiB

    benchmark.pedantic(watched, rounds=1)
    seconds = benchmark.stats.stats.min
    scoreboard.record(f"compare --exits {LONG_EXITS}: memory", peaks[0] / 1e6, "MB", at_most=500.0)
    scoreboard.record("  time, with two automata", seconds, "s")
