"""Kernels for unattended notebooks: this interpreter, one thread, sockets in the file system."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

import nvmx_lab

# Reports run side by side, one per core: a kernel with threads of its own only disturbs the others.
_ONE_THREAD: Final = {
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}

_numbers = itertools.count()
_running: set[int] = set()
_folder = Path()


def prepare_process(folder: Path) -> None:
    """Make this process one that only starts kernels.

    Parameters
    ----------
    folder : Path
        Where sockets and connection files go. A socket's path may not exceed about 100 characters,
        so this is short.
    """
    global _folder
    _folder = folder
    # Set here rather than in the kernel's specification, where '$' in a path would be substituted.
    os.environ.update(_ONE_THREAD)
    os.environ["PYTHONPATH"] = _python_path()
    # The user's start-up files and history are none of a report's business.
    os.environ["IPYTHONDIR"] = str(folder / "ipython")
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    os.environ.pop("JUPYTER_DEFAULT_PROVISIONER_NAME", None)


class ThisInterpreter(KernelSpecManager):
    """The one kernel there is: whatever interpreter runs this, whatever is installed elsewhere.

    A kernelspec named python3 often points to another environment, without this package.
    """

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        """Return the specification of a kernel in this interpreter, under any name."""
        launcher = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        # Quiet: a kernel that is shut down is interrupted first, and would report that as an error.
        return KernelSpec(
            argv=[*launcher, "--log-level=CRITICAL"],
            name=kernel_name,
            display_name="Python 3",
            language="python",
            interrupt_mode="signal",
        )


class InterpreterKernelManager(AsyncKernelManager):
    """Start kernels in this interpreter, with sockets in the folder given to `prepare_process`.

    TCP ports are picked first and bound later; two kernels that start together can pick the
    same one. A socket in a folder of our own has no such race.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            transport="ipc",
            connection_file=str(_folder / f"{os.getpid()}.{next(_numbers)}.json"),
            kernel_spec_manager=ThisInterpreter(),
            **kwargs,
        )
        self._process_id: int | None = None

    async def start_kernel(self, **kwargs: Any) -> None:  # type: ignore[override]
        """Start the kernel and remember its process, for `kill_all`."""
        await super().start_kernel(**kwargs)
        self._process_id = getattr(self.provisioner, "pid", None)
        if self._process_id is not None:
            _running.add(self._process_id)

    async def cleanup_resources(self, restart: bool = False) -> None:  # type: ignore[override]
        """Forget the kernel's process, which has ended: its number may soon be another's."""
        if self._process_id is not None:
            _running.discard(self._process_id)
        await super().cleanup_resources(restart=restart)


def kill_all() -> None:
    """Kill the kernels of this process and what they started, at once."""
    for process_id in list(_running):
        with contextlib.suppress(OSError):
            os.killpg(process_id, signal.SIGKILL)  # a kernel leads a session of its own


def _python_path() -> str:
    """Return PYTHONPATH with the package's parent first, unless it is installed."""
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    parent = Path(nvmx_lab.__file__).resolve().parent.parent
    if parent.name not in ("site-packages", "dist-packages"):  # a checkout
        given = [str(parent), *(entry for entry in given if entry != str(parent))]
    return os.pathsep.join(str(Path(entry).resolve()) for entry in given)
