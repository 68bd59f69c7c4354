"""What a worker process does: run one notebook, turn it into a page, leave both in a folder.

Nothing here renames anything into its final place: see `nvmx_lab.reports.batch`.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nvmx_lab.errors import LabError
from nvmx_lab.reports import html, kernel, result


@dataclass(frozen=True)
class Job:
    """One notebook to run.

    Attributes
    ----------
    name : str
        Name of the report, and of its files without their suffixes.
    source : str
        The notebook as it was when its hash was taken.
    parameters : dict
        JSON values, checked.
    folder : str
        An empty folder for the two files.
    page : Page
        What the page says besides the notebook.
    """

    name: str
    source: str
    parameters: dict[str, Any]
    folder: str
    page: html.Page


@dataclass(frozen=True)
class Done:
    """A notebook that ran: seconds it took, and what it published."""

    seconds: float
    results: dict[str, list[result.Record]]


@dataclass(frozen=True)
class Failed:
    """A notebook that did not: one sentence, and the details for who looks for the cause."""

    reason: str
    details: str


def initialise(lifeline: Connection, folder: str) -> None:
    """Prepare this process.

    Parameters
    ----------
    lifeline : Connection
        The reading end of a pipe that carries nothing. Its writing end is open in the batch's
        process alone: when that process closes it, or dies of anything, this one ends, and its
        kernel with it.
    folder : str
        Where kernels' sockets go.
    """
    # Ctrl-C reaches the whole group of processes; the batch decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    kernel.prepare_process(Path(folder))
    threading.Thread(target=_end_with, args=(lifeline, folder), daemon=True).start()


def _end_with(lifeline: Connection, folder: str) -> None:
    lifeline.poll(None)  # returns at the end of file: nothing is ever sent
    kernel.kill_all()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)  # the main thread may be deep in a wait; there is nothing left to tidy


def run(job: Job) -> Done | Failed:
    """Run a notebook and write ``NAME.ipynb`` and ``NAME.html`` into the job's folder."""
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    started = time.perf_counter()
    folder = Path(job.folder)
    # The notebook's own working directory: what it leaves there is nobody's.
    working = folder / "working"
    working.mkdir()
    try:
        notebook = nbformat.reads(job.source, as_version=4)
        notebook = papermill.execute_notebook(
            notebook,
            None,  # papermill saves with a plain open after each cell; here it saves nothing
            parameters=job.parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=120,
            kernel_manager_class=kernel.InterpreterKernelManager,
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(working)}},
        )
        results = result.published(notebook)
        page = html.render(notebook, job.page)
        seconds = round(time.perf_counter() - started, 3)
        _tidy(notebook, job)
        (folder / f"{job.name}.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
        (folder / f"{job.name}.html").write_text(page, encoding="utf-8")
    except PapermillExecutionError as error:
        return Failed(_cell_error(error, job), "\n".join(map(str, error.traceback)))
    except LabError as error:
        return Failed(str(error), "")
    except Exception as error:  # whatever it is, the other reports go on
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Failed(reason, traceback.format_exc())
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return Done(seconds, results)


def _tidy(notebook: Any, job: Job) -> None:
    """Take out of the executed notebook what belongs to this machine."""
    about: Mapping[str, Any] = notebook.metadata.get("papermill", {})
    notebook.metadata["papermill"] = {
        key: value for key, value in about.items() if key not in ("input_path", "output_path")
    }
    notebook.metadata["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    notebook.metadata["title"] = job.name


def _cell_error(error: Any, job: Job) -> str:
    """Say which cell failed, counted as in the notebook that the user has."""
    import nbformat

    cells = nbformat.reads(job.source, as_version=4).cells
    declaring = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", ())]
    # papermill has put a cell of its own after the parameters cell.
    index = int(error.cell_index)
    if job.parameters and declaring and index > declaring[0]:
        index -= 1
    message = " ".join(f"{error.ename}: {error.evalue}".split())
    return f"cell {index + 1} of {len(cells)} failed: {message}"
