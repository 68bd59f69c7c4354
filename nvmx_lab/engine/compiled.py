"""The kernels, compiled on first use, and where their machine code is kept.

Numba keeps machine code on disk and knows a stale one by the source file's time and size (in later
versions by its content). Here the folder's name is a hash of the text of `nvmx_lab.engine.kernels`,
so an edited file never meets the code of another, whatever the clock says. Numba writes its files
under another name and renames them: worker processes may share the folder.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

_LOCK = threading.Lock()


def cache_folder() -> Path | None:
    """Return the folder for this version of the kernels, made if need be.

    In ``NUMBA_CACHE_DIR`` if that is set, else in ``XDG_CACHE_HOME`` or ``~/.cache``.

    Returns
    -------
    Path or None
        None where nothing can be written: the kernels are then compiled in every process, which
        takes about a second.
    """
    import numba

    from nvmx_lab.engine import kernels

    config = cast(Any, numba.config)  # its settings are not declared
    text = Path(kernels.__file__).read_bytes()
    # Code compiled with bounds checks must not be taken for code without.
    key = hashlib.sha256(text + f"bounds checks: {config.BOUNDSCHECK}".encode()).hexdigest()[:16]
    try:
        folder = _base(config.CACHE_DIR) / f"kernels-{key}"
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return None
    return folder


def _base(numba_folder: str) -> Path:
    if numba_folder:
        return Path(numba_folder).absolute() / "nvmx_lab"
    given = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored: XDG Base Directory Specification.
    return (Path(given) if Path(given).is_absolute() else Path.home() / ".cache") / "nvmx_lab"


@functools.cache
def kernel(name: str) -> Callable[..., Any]:
    """Return a function of `nvmx_lab.engine.kernels`, compiled.

    Parameters
    ----------
    name : str
        Its name.
    """
    import numba

    from nvmx_lab.engine import kernels

    folder, config = cache_folder(), cast(Any, numba.config)
    with _LOCK:
        # Numba reads the folder when it decorates, not later: no other code of the user's is moved.
        before, config.CACHE_DIR = config.CACHE_DIR, str(folder or "")
        try:
            compiled: Callable[..., Any] = numba.njit(cache=folder is not None, nogil=True)(
                getattr(kernels, name)
            )
        finally:
            config.CACHE_DIR = before
    return compiled
