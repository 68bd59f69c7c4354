"""`loop.c`, compiled on the spot and called through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

SOURCE = Path(__file__).with_name("loop.c")
FLAGS = ("-O3", "-march=native", "-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")

Walk = Callable[[npt.NDArray[np.uint16], npt.NDArray[np.int32], npt.NDArray[np.int64]], int]


def compiler() -> str | None:
    """Return gcc's path, or None if there is none."""
    return shutil.which("gcc")


def build(folder: Path) -> Walk:
    """Compile the loop into `folder` and return it as ``walk(codes, next_row, visits) -> row``."""
    gcc = compiler()
    if gcc is None:
        raise RuntimeError("gcc is not on the PATH")
    library = folder / "loop.so"
    subprocess.run([gcc, *FLAGS, "-o", str(library), str(SOURCE)], check=True)
    function = ctypes.CDLL(str(library)).walk

    def array(dtype: type[np.generic]) -> type:
        return np.ctypeslib.ndpointer(dtype=dtype, ndim=1, flags="C_CONTIGUOUS")

    function.argtypes = [
        ctypes.c_size_t,
        array(np.uint16),
        array(np.int32),
        array(np.int64),
        ctypes.c_int32,
    ]
    function.restype = ctypes.c_int32

    def walk(
        codes: npt.NDArray[np.uint16],
        next_row: npt.NDArray[np.int32],
        visits: npt.NDArray[np.int64],
    ) -> int:
        return int(function(codes.size, codes, next_row, visits, 0))

    return walk
