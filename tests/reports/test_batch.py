"""Batches: every report is finished or absent, whatever happens to the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from nvmx_lab import files
from nvmx_lab.errors import LabError
from nvmx_lab.reports import batch

pytestmark = pytest.mark.xdist_group("batch")  # the first fixture takes many seconds

TITLE = ("markdown", "# A question\n\nAn answer.")
N = ("code", "n = 1", "parameters")
PUBLISH = (
    "code",
    "import os, sys\nfrom nvmx_lab.reports.result import publish\n"
    "publish({'n': n, 'executable': sys.executable, 'folder': os.getcwd(), "
    "'threads': os.environ['NUMBA_NUM_THREADS']}, name='seen')",
)


def run(tasks, out, **more):
    with batch.hold(out) as held:
        return batch.run(tasks, held, **more)


def snapshot(out):
    return {path.name: (path.stat().st_ino, files.sha256(path)) for path in out.iterdir()}


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory):
    from .conftest import notebook

    folder = tmp_path_factory.mktemp("notebooks")
    made = {
        "good": [TITLE, N, PUBLISH],
        "failing": [
            TITLE,
            N,
            ("code", "1 + 1"),
            ("code", "raise ValueError('no\\nmore')"),
            PUBLISH,
        ],
        "dying": [TITLE, N, ("code", "import os; os._exit(7)")],
        "murderous": [
            TITLE,
            N,
            ("code", "import os, signal; os.kill(os.getppid(), signal.SIGKILL)"),
        ],
        "bare": [
            TITLE,
            N,
            (
                "code",
                "from IPython.display import display\n"
                "display({'image/png': 'iVBORw0KGgo=', 'text/plain': 'figure'}, raw=True)",
            ),
        ],
        "infinite": [
            TITLE,
            N,
            ("code", "from nvmx_lab.reports.result import publish\npublish({'x': float('inf')})"),
        ],
    }
    return {name: notebook(folder / f"{name}.ipynb", *cells) for name, cells in made.items()}


@pytest.fixture(scope="module")
def outcome(notebooks, tmp_path_factory):
    out = tmp_path_factory.mktemp("deep") / "not" / "there yet"
    tasks = [batch.plan(notebooks["good"], {"n": n}, name=f"good--{n}") for n in (1, 2)]
    tasks += [batch.plan(path, {}) for name, path in notebooks.items() if name != "good"]
    return out, tasks, run(tasks, out, jobs=2)


def test_reports_come_in_the_order_of_their_tasks(outcome):
    _, tasks, made = outcome
    assert [report.task for report in made.reports] == tasks[:2]
    assert [failure.task for failure in made.failures] == tasks[2:]


def test_report_has_its_parameters_and_this_interpreter(outcome):
    out, _, made = outcome
    for n, report in enumerate(made.reports, start=1):
        (seen,) = report.results["seen"]
        assert seen["n"] == n
        assert seen["executable"] == sys.executable
        assert seen["threads"] == "1"
        assert not Path(seen["folder"]).exists()
        assert report.seconds > 0
        executed = nbformat.read(out / f"good--{n}.ipynb", as_version=4)
        nbformat.validate(executed)
        assert str(out) not in executed.metadata["papermill"].values()


def test_nothing_else_is_written(outcome):
    out, _, _ = outcome
    expected = {f"good--{n}.{suffix}" for n in (1, 2) for suffix in ("html", "ipynb", "json")}
    assert {path.name for path in out.iterdir()} == expected


def test_page_is_accessible(outcome, page_of):
    out, _, _ = outcome
    page_of((out / "good--1.html").read_text("utf-8"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("failing", "failing (n=1): cell 4 of 5 failed: ValueError: no more"),
        ("dying", "dying (n=1): DeadKernelError: Kernel died"),
        ("murderous", "murderous (n=1): its process was killed, or ran out of memory"),
        ("bare", "bare (n=1): cell 3: a figure without alternative text"),
        ("infinite", "infinite (n=1): cell 3 of 3 failed: LabError: row 0: x: an infinite number"),
    ],
)
def test_failure_says_which_notebook_parameters_cell_and_error(outcome, name, reason):
    _, _, made = outcome
    (failure,) = (failure for failure in made.failures if failure.task.notebook == name)
    assert str(failure).startswith(reason)
    assert "\n" not in str(failure)


def test_finished_reports_are_not_run_again(outcome):
    out, tasks, made = outcome
    before = snapshot(out)
    again = run(tasks[:2], out)
    assert again.reports == made.reports
    assert snapshot(out) == before


def test_a_report_that_was_tampered_with_is_not_finished(outcome):
    out, tasks, _ = outcome
    page = out / "good--1.html"
    whole = page.read_bytes()
    try:
        for change in (whole[:-1], b"", whole + b" "):
            page.write_bytes(change)
            assert batch.finished(out, tasks[0]) is None
    finally:
        page.write_bytes(whole)
    assert batch.finished(out, tasks[0]) is not None
    assert batch.finished(out, tasks[2]) is None


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 1', '{"format": 1, "id": 3}'])
def test_a_damaged_marker_is_not_finished(notebooks, tmp_path, text):
    task = batch.plan(notebooks["good"], {}, fingerprint="")
    (tmp_path / "good.json").write_text(text)
    assert batch.finished(tmp_path, task) is None


def test_id_depends_on_all_that_the_report_does(notebooks, tmp_path, make_notebook):
    def identity(path, n=1, fingerprint="f"):
        return batch.plan(path, {"n": n}, fingerprint=fingerprint).id

    same = identity(notebooks["good"])
    assert len(same) == 16
    assert identity(notebooks["good"], n=2) != same
    assert identity(notebooks["good"], fingerprint="g") != same
    changed = make_notebook(tmp_path / "good.ipynb", TITLE, N, (PUBLISH[0], PUBLISH[1] + "\n1"))
    assert identity(changed) != same
    # outputs and the editor's metadata are not content
    content = json.loads(notebooks["good"].read_text())
    content["metadata"]["kernelspec"] = {"name": "elsewhere", "display_name": "x"}
    content["cells"][2]["execution_count"] = 5
    content["cells"][2]["source"] = content["cells"][2]["source"].splitlines(True)
    touched = tmp_path / "touched.ipynb"
    touched.write_text(json.dumps(content))
    assert identity(touched) == same


def test_unknown_parameter_has_a_suggestion(notebooks):
    with pytest.raises(LabError, match=r"unknown parameter.*did you mean 'n'"):
        batch.plan(notebooks["good"], {"nn": 3})


@pytest.mark.parametrize(
    "name", ["", "..", "../x", "a/b", "a\0", "a.", ".a", "A", "index", "run", "summary", "x" * 200]
)
def test_name_that_is_no_plain_file_name_is_refused(notebooks, name):
    with pytest.raises(LabError, match="cannot have this name"):
        batch.plan(notebooks["good"], {}, name=name, fingerprint="")


def test_two_reports_of_one_name_are_refused(notebooks, tmp_path):
    task = batch.plan(notebooks["good"], {}, fingerprint="")
    with pytest.raises(LabError, match="same name"):
        run([task, task], tmp_path)


@pytest.mark.parametrize("jobs", [0, -1, 10**6])
def test_absurd_jobs_are_refused(notebooks, tmp_path, jobs):
    with pytest.raises(LabError, match="absurd"):
        run([batch.plan(notebooks["good"], {}, fingerprint="")], tmp_path, jobs=jobs)


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(LabError, match="cannot be written"), batch.hold(out):
            raise AssertionError("unreachable")


def test_two_batches_cannot_write_to_one_folder(tmp_path):
    with (
        batch.hold(tmp_path),
        pytest.raises(LabError, match="another run"),
        batch.hold(tmp_path),
    ):
        raise AssertionError("unreachable")
    with batch.hold(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


DRIVER = """
import signal

# Ctrl-C must mean something even where the tests were started with it ignored (nohup, some CI).
signal.signal(signal.SIGINT, signal.default_int_handler)

import sys
from pathlib import Path
from nvmx_lab.reports import batch
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    tasks = [batch.plan(folder / f"{name}.ipynb", {"folder": str(folder)}, fingerprint="")
             for name in ("first", "second")]
    with batch.hold(folder / "out") as held:
        outcome = batch.run(tasks, held, jobs=1)
    print(*map(str, outcome.failures))
"""


def alive(process_id):
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("with_what", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_batch_leaves_no_process_and_goes_on(tmp_path, make_notebook, project, with_what):
    folder = ("code", 'folder = ""', "parameters")
    gate = (
        "import os, pathlib, time\n"
        "here = pathlib.Path(folder)\n"
        "(here / 'writing').write_text(str(os.getpid()))\n"
        "(here / 'writing').rename(here / 'running')\n"
        "while not (here / 'open').exists(): time.sleep(0.02)"
    )
    make_notebook(tmp_path / "first.ipynb", TITLE, folder)
    make_notebook(tmp_path / "second.ipynb", TITLE, folder, ("code", gate))
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    out = tmp_path / "out"
    # A process group of its own, as a terminal's Ctrl-C would reach it.
    command = [sys.executable, str(driver), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / "running").exists() or process.poll() is not None)
        assert process.poll() is None
        kernel = int((tmp_path / "running").read_text())
        assert alive(kernel)
        before = {
            p.name: s for p in out.glob("first.*") for s in [(p.stat().st_ino, files.sha256(p))]
        }
        assert sorted(before) == ["first.html", "first.ipynb", "first.json"]
        if with_what == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, with_what)
        assert process.wait(20) != 0
        wait_for(lambda: not alive(kernel), 10)
        assert not list(out.glob("second*"))
        if with_what == signal.SIGINT:
            assert not list(out.glob(".*"))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    (tmp_path / "open").touch()
    again = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert (again.stdout, again.stderr) == ("\n", "")  # no failures, and no bar in a log
    after = snapshot(out)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == sorted([*before, "second.html", "second.ipynb", "second.json"])
