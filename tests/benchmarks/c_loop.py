"""`loop.c`, compiled on the spot and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

SOURCE = Path(__file__).with_name("loop.c")
FLAGS = ("-O3", "-march=native", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")

Walk = Callable[[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.int64], int], int]
"""``walk(letters, next_row, visits, row) -> row``"""


class Loops(NamedTuple):
    """The loops of `loop.c`."""

    words: Walk
    operations: Walk


def compiler() -> str | None:
    """Return gcc's path, or None if there is none."""
    return shutil.which("gcc")


def build(folder: Path) -> Loops:
    """Compile the loops into `folder`."""
    gcc = compiler()
    if gcc is None:
        raise RuntimeError("gcc is not on the PATH")
    file = folder / "loop.so"
    subprocess.run([gcc, *FLAGS, "-o", str(file), str(SOURCE)], check=True)
    library = ctypes.CDLL(str(file))
    return Loops(
        _declared(library.walk_words, np.int32), _declared(library.walk_operations, np.uint16)
    )


def _declared(function: Any, letter: type[np.generic]) -> Walk:
    def array(dtype: type[np.generic]) -> type:
        return np.ctypeslib.ndpointer(dtype=dtype, ndim=1, flags="C_CONTIGUOUS")

    function.argtypes = [
        *(ctypes.c_size_t, array(letter), array(np.int32), array(np.int64), ctypes.c_int32)
    ]
    function.restype = ctypes.c_int32

    def walk(
        letters: npt.NDArray[Any],
        next_row: npt.NDArray[np.int32],
        visits: npt.NDArray[np.int64],
        row: int,
    ) -> int:
        return int(function(letters.size, letters, next_row, visits, row))

    return walk
