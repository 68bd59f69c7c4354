"""The engine with the JIT off and with bounds checks, and the folder of compiled code.

Each runs in a process of its own: numba reads its settings when it is imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from nvmx_lab.engine import compiled

TESTS = ("tests/engine/test_kernels.py", "tests/engine/test_run.py")

RUN_KERNEL = """
import sys
import numpy as np
from nvmx_lab.engine.compiled import cache_folder, kernel
walk = kernel("run_words")
visits = np.zeros((4, 2), np.int64)
walk(np.zeros(2, np.int32), np.zeros(2, np.int32), np.array([0, 1, 1], np.int32), 0, visits)
assert visits.sum(axis=0).tolist() == [1, 2]
stats = getattr(walk, "stats", None)
print(cache_folder(), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def run(
    arguments: list[str], folder: Path, cache: Path | str, **settings: str
) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("NUMBA_", "XDG_CACHE", "PYTEST_"))
    }
    environment |= {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(folder), "CI": "1", **settings}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"NUMBA_DISABLE_JIT": "1"}, {"NUMBA_BOUNDSCHECK": "1"}])
def test_the_engine_tests_pass(mode, project, tmp_path):
    done = run(
        [
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-k",
            "not mixes",
            *TESTS,
        ],
        project,
        tmp_path / "cache",
        **mode,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = "1 skipped" in done.stdout  # the test that bounds are checked
    assert skipped == ("NUMBA_BOUNDSCHECK" not in mode), done.stdout


def folder_and_hits(done: subprocess.CompletedProcess[str]) -> tuple[str, int, int]:
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    folder, hits, misses = done.stdout.splitlines()[0].split()
    return folder, int(hits), int(misses)


@pytest.fixture
def copy_of_package(project, tmp_path) -> Path:
    """Return a folder with a copy of the package's code."""
    shutil.copytree(
        project / "nvmx_lab",
        tmp_path / "copy" / "nvmx_lab",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return tmp_path / "copy"


def test_an_edited_kernel_uses_another_folder(copy_of_package, tmp_path):
    cache = tmp_path / "cache"
    first = folder_and_hits(run(["-B", "-c", RUN_KERNEL], copy_of_package, cache))
    again = folder_and_hits(run(["-B", "-c", RUN_KERNEL], copy_of_package, cache))
    assert first[1:] == (0, 1)
    assert again == (first[0], 1, 0), "the second process finds the first one's code"

    source = copy_of_package / "nvmx_lab" / "engine" / "kernels.py"
    stamp, text = source.stat(), source.read_text()
    # Same size, same time: what fools a cache that looks at those (Python's own too: hence -B).
    changed = text.replace("visits[0, here] += 1", "visits[0, here] += 2")
    assert changed != text
    source.write_text(changed)
    os.utime(source, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    done = run(["-B", "-c", RUN_KERNEL.replace("[1, 2]", "[2, 4]")], copy_of_package, cache)
    folder, hits, misses = folder_and_hits(done)
    assert folder != first[0]
    assert hits + misses == 1


def test_a_cache_that_cannot_be_written_is_done_without(project, tmp_path):
    file = tmp_path / "file"
    file.write_text("a file where the folder should be")
    done = run(["-c", RUN_KERNEL], project, file)
    assert folder_and_hits(done)[0] == "None"


@pytest.fixture
def nothing_set(monkeypatch, tmp_path):
    """Set nothing that says where code is kept but a home folder."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_folders_in_order(nothing_set, monkeypatch, tmp_path):
    key = compiled.cache_folder().name
    assert compiled.cache_folder() == tmp_path / ".cache" / "nvmx_lab" / key
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compiled.cache_folder() == tmp_path / ".cache" / "nvmx_lab" / key
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert compiled.cache_folder() == tmp_path / "xdg" / "nvmx_lab" / key
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    assert compiled.cache_folder() == tmp_path / "numba" / "nvmx_lab" / key


def test_no_home_folder(nothing_set, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null/none")
    assert compiled.cache_folder() is None


def test_bounds_checked_code_has_a_folder_of_its_own(nothing_set, monkeypatch):
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", None)
    plain = compiled.cache_folder()
    monkeypatch.setattr(numba.config, "BOUNDSCHECK", 1)
    assert compiled.cache_folder() != plain


def test_the_user_s_own_numba_code_is_left_alone(nothing_set, monkeypatch, tmp_path):
    mine = str(tmp_path / "mine")
    monkeypatch.setattr(numba.config, "CACHE_DIR", mine)
    function = compiled.kernel.__wrapped__("states_before")
    assert mine == numba.config.CACHE_DIR
    assert Path(function._cache.cache_path).parent == compiled.cache_folder()
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setenv("HOME", "/dev/null/none")
    compiled.kernel.__wrapped__("states_before")
    assert numba.config.CACHE_DIR == ""
