"""Many notebooks, a few at a time, each finished or absent.

A report is three files: ``NAME.ipynb`` (executed), ``NAME.html`` and ``NAME.json``. The last one
holds the hashes of the other two and is put in its place after them, so a report is finished
exactly when it is there and agrees. Its id is a hash of all that the report depends on; when the
batch is run again, a finished report with the same id is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

from nvmx_lab import files, notebook_parameters
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.reports import html, inputs, worker
from nvmx_lab.reports.result import Record

MAX_JOBS: Final = 256
_FORMAT: Final = 1  # of the JSON beside each report
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9_]|[.+-](?=[a-z0-9])|-(?=-[a-z0-9])){0,150}")
_TAKEN: Final = ("index", "run", "summary")  # names of the site's own files
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Task:
    """One report to be made: a notebook and its parameters.

    Attributes
    ----------
    name : str
        Name of the report, and of its files without their suffixes.
    notebook : str
        Name of the notebook, without ``.ipynb``.
    parameters : mapping
        JSON values, checked, defaults filled in.
    id : str
        16 hexadecimal digits: the hash of the notebook's cells, the parameters, and what else the
        report depends on.
    source : str
        The notebook as it was when the hash was taken.
    """

    name: str
    notebook: str
    parameters: Mapping[str, Any]
    id: str
    source: str = field(repr=False)


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes
    ----------
    task : Task
        What was asked for.
    seconds : float
        How long the notebook took when it ran.
    results : dict of str to list of dict
        What the notebook published.
    files : dict of str to str
        SHA-256 of each file of the report, by the file's name.
    """

    task: Task
    seconds: float
    results: dict[str, list[Record]]
    files: dict[str, str]


@dataclass(frozen=True)
class Failure:
    """A report that could not be made: why, in one sentence, and the details."""

    task: Task
    reason: str
    details: str = ""

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.task.parameters.items())
        return f"{self.task.notebook} ({given}): {self.reason}"


@dataclass(frozen=True)
class Held:
    """A folder for reports that no other batch writes to, and a place in it for unfinished ones."""

    out: Path
    unfinished: Path


@dataclass(frozen=True)
class Outcome:
    """What became of a batch, in the order of its tasks."""

    reports: tuple[Report, ...]
    failures: tuple[Failure, ...]


def plan(
    notebook: Path,
    parameters: Mapping[str, Any],
    *,
    name: str | None = None,
    fingerprint: str | None = None,
) -> Task:
    """Return the task of running a notebook with parameters.

    Parameters
    ----------
    notebook : Path
        The notebook. One of this package's is held to its parameter class; of any other the
        parameters must be assigned in its ``parameters`` cell.
    parameters : mapping
        Names and values.
    name : str, optional
        Name of the report; the notebook's own if not given.
    fingerprint : str, optional
        Hash of code, data and versions; `nvmx_lab.reports.inputs.fingerprint` if not given.

    Raises
    ------
    LabError
        If the notebook cannot be read, a parameter is unknown or bad, or the name would not be
        a plain file name.
    """
    stem = notebook.stem
    declared = notebook_parameters.declared_parameters(notebook)
    if stem in notebook_parameters.NOTEBOOKS:
        notebook_parameters.check_notebook(notebook)
        checked = notebook_parameters.check(stem, parameters)
    else:
        for given in parameters:
            if given not in declared:
                raise unknown("parameter", given, declared, where=notebook)
        checked = {**declared, **parameters}
    name = stem if name is None else name
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise LabError(
            "a report cannot have this name",
            got=name,
            allowed=f"lower-case letters, digits, '-', '_', '+' and '.'; not {', '.join(_TAKEN)}",
        )
    source = notebook.read_text(encoding="utf-8")
    identity = inputs.digest(
        _cells_only(source),
        json.dumps(checked, sort_keys=True),
        inputs.fingerprint() if fingerprint is None else fingerprint,
    )
    return Task(name, stem, checked, identity[:16], source)


def finished(out: Path, task: Task) -> Report | None:
    """Return the report of a task if `out` holds it, whole and made from the same inputs."""
    try:
        record = json.loads((out / f"{task.name}.json").read_bytes())
        if (record["format"], record["id"]) != (_FORMAT, task.id):
            return None
        for name in (f"{task.name}.ipynb", f"{task.name}.html"):
            if files.sha256(out / name) != record["files"][name]:
                return None
        return Report(task, float(record["seconds"]), record["results"], record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run(tasks: Sequence[Task], held: Held, *, jobs: int | None = None) -> Outcome:
    """Make the reports that are not finished yet, several at a time.

    A report that fails does not stop the others. Ctrl-C, or the death of this process by anything,
    ends all workers and their kernels; what is finished by then stays finished.

    Parameters
    ----------
    tasks : sequence of Task
        What to make; no two with the same name.
    held : Held
        The folder for reports, from `hold`.
    jobs : int, optional
        Worker processes; as many as there are cores if not given.

    Returns
    -------
    Outcome
        The reports, those finished before included, and the failures.

    Raises
    ------
    LabError
        If `jobs` is absurd or two tasks have one name; before any notebook is run.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise LabError("two reports have the same name", got=", ".join(twice))
    count = workers(jobs)
    ended: dict[str, Report | Failure] = {}
    for task in tasks:
        report = finished(held.out, task)
        if report is not None:
            ended[task.name] = report
    waiting = [task for task in tasks if task.name not in ended]
    pages = frozenset(task.name for task in tasks if task.name == task.notebook)
    with _progress(total=len(tasks), before=len(ended)) as progress:
        for task, end in _run_all(waiting, min(count, len(waiting)), held.unfinished, pages):
            ended[task.name] = _settle(task, end, held.unfinished / task.name, held.out)
            progress.update()
    ends = [ended[name] for name in names]
    return Outcome(
        tuple(end for end in ends if isinstance(end, Report)),
        tuple(end for end in ends if isinstance(end, Failure)),
    )


def workers(jobs: int | None) -> int:
    """Return how many worker processes to use: as many as there are cores if not given.

    Raises
    ------
    LabError
        If the number is absurd.
    """
    if jobs is None:
        available = getattr(os, "sched_getaffinity", None)  # not on macOS
        return len(available(0)) if available else os.cpu_count() or 1
    if not 1 <= jobs <= MAX_JOBS:
        raise LabError("an absurd number of jobs", got=jobs, allowed=f"1 to {MAX_JOBS}")
    return jobs


@contextlib.contextmanager
def hold(out: Path) -> Iterator[Held]:
    """Have a folder for reports to ourselves; made if need be, cleared of a killed run's rests.

    Raises
    ------
    LabError
        If it cannot be written, or another batch is writing there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritable(out, error) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabError(
                "another run is writing reports here", where=out, mend="wait for it to end"
            ) from None
        except OSError as error:  # some network file systems have no locks
            raise LabError(f"cannot be locked: {error.strerror}", where=out) from None
        try:
            # The lock is ours, so nobody is at work in what a killed run has left.
            for left in out.glob(f"{_UNFINISHED}*"):
                shutil.rmtree(left, ignore_errors=True)
            for left in out.glob(".writing-*"):
                left.unlink(missing_ok=True)
            unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=out)).resolve()
        except OSError as error:
            raise _unwritable(out, error) from None
        try:
            yield Held(out, unfinished)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    finally:
        os.close(handle)  # and with it the lock


def _run_all(
    tasks: Sequence[Task], lanes: int, unfinished: Path, pages: frozenset[str]
) -> Iterator[tuple[Task, worker.Done | worker.Failed]]:
    """Run tasks in spawned processes and yield how each ended, in the order in which they end."""
    versions = inputs.versions()
    waiting = list(reversed(tasks))
    running: dict[Future[worker.Done | worker.Failed], tuple[Task, _Lane]] = {}
    with _lanes(lanes) as free:
        while waiting or running:
            while waiting and free:
                task, lane = waiting.pop(), free.pop()
                folder = unfinished / task.name
                folder.mkdir()
                page = html.Page(
                    name=task.name,
                    parameters=task.parameters,
                    provenance={
                        "Notebook": f"{task.notebook}.ipynb",
                        "Report id": task.id,
                        "Versions": ", ".join(f"{k} {v}" for k, v in versions.items()),
                    },
                    pages=pages,
                )
                job = worker.Job(task.name, task.source, dict(task.parameters), str(folder), page)
                running[lane.submit(job)] = (task, lane)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task, lane = running.pop(future)
                free.append(lane)
                try:
                    end = future.result()
                except BrokenProcessPool:
                    lane.renew()
                    end = worker.Failed("its process was killed, or ran out of memory", "")
                yield task, end


class _Lane:
    """One worker process. A pool of one each: if it dies, only its own report dies with it."""

    def __init__(self, lifeline: Connection, sockets: Path) -> None:
        self._lifeline, self._sockets = lifeline, sockets
        self._pool = self._made()

    def _made(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=worker.initialise,
            initargs=(self._lifeline, str(self._sockets)),
        )

    def submit(self, job: worker.Job) -> Future[worker.Done | worker.Failed]:
        # The process starts here. It inherits the mask: no Ctrl-C before it is ready for one.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(worker.run, job)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def renew(self) -> None:
        self._pool.shutdown(wait=False)
        self._pool = self._made()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _lanes(count: int) -> Iterator[list[_Lane]]:
    sockets = Path(tempfile.mkdtemp(prefix="nvmx-", dir=_short_temporary_folder()))
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
    lanes = [_Lane(reader, sockets) for _ in range(count)]
    try:
        yield list(lanes)
    except BaseException:
        writer.close()  # ends every worker now, whatever it is doing
        raise
    finally:
        for lane in lanes:
            lane.close()
        writer.close()
        reader.close()
        shutil.rmtree(sockets, ignore_errors=True)


def _settle(
    task: Task, end: worker.Done | worker.Failed, folder: Path, out: Path
) -> Report | Failure:
    """Put a report's files in their places, the one that says it is finished last."""
    try:
        if isinstance(end, worker.Failed):
            return Failure(task, end.reason, end.details)
        marker = out / f"{task.name}.json"
        names = (f"{task.name}.ipynb", f"{task.name}.html")
        hashes = {name: files.sha256(folder / name) for name in names}
        try:
            marker.unlink(missing_ok=True)
            for name in names:
                (folder / name).replace(out / name)
        except OSError as error:
            return Failure(task, f"{out} cannot be written: {error.strerror}")
        files.write_json(
            marker,
            {
                "format": _FORMAT,
                "id": task.id,
                "name": task.name,
                "notebook": task.notebook,
                "parameters": dict(task.parameters),
                "seconds": end.seconds,
                "files": hashes,
                "results": end.results,
            },
        )
        return Report(task, end.seconds, end.results, hashes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _progress(*, total: int, before: int) -> Any:
    from tqdm import tqdm

    # disable=None: a bar on a terminal, nothing in a log. The size is given, because tqdm draws
    # nothing on a terminal that does not say how large it is.
    size = shutil.get_terminal_size()
    return tqdm(
        total=total,
        initial=before,
        desc="reports",
        unit="report",
        disable=None,
        ncols=size.columns,
        nrows=size.lines,
    )


def _short_temporary_folder() -> str:
    folder = tempfile.gettempdir()
    # The path of a Unix socket has 103 characters on macOS and 107 on Linux.
    return folder if len(folder) <= 60 else "/tmp"  # noqa: S108 - mkdtemp makes a private one in it


def _cells_only(source: str) -> str:
    """Return what of a notebook is its content: neither outputs nor the editor's metadata."""
    cells = [
        [cell["cell_type"], cell["source"], sorted(cell.get("metadata", {}).get("tags", []))]
        for cell in json.loads(source)["cells"]
    ]
    return json.dumps([[kind, "".join(text), tags] for kind, text, tags in cells])


def _unwritable(out: Path, error: OSError) -> LabError:
    return LabError(
        f"reports cannot be written here: {error.strerror}",
        where=out,
        mend="name a folder that you may write to",
    )
