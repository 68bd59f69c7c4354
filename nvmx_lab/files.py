"""Files that are whole or absent: written beside their place, then renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvmx_lab.errors import LabError


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, so that a reader sees the old file or all of the new one."""
    write_with(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, with the keys in the given order and no NaN."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file beside `path`, then rename it to `path`.

    Raises
    ------
    LabError
        If the folder cannot be written, or the disk is full; `path` is then as it was.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        os.close(handle)
        beside = Path(name)
        try:
            write(beside)
            beside.chmod(0o644 & ~_umask())  # mkstemp makes files that only their owner reads
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise LabError(f"cannot be written: {error.strerror or error}", where=path) from error


def _umask() -> int:
    # The only portable way to read it is to set it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
