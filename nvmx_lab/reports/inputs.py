"""What a report depends on besides its parameters: code, data and versions, as hashes."""

from __future__ import annotations

import hashlib
import platform
import sys
from importlib import metadata
from pathlib import Path

import nvmx_lab
from nvmx_lab import data, files
from nvmx_lab.errors import LabError

# Of what else is installed, these decide the numbers and how they look.
_DECIDING = ("numpy", "numba", "pandas", "pyarrow", "matplotlib", "papermill", "nbconvert")
_CODE = {".py", ".j2", ".css"}


def notebooks_folder() -> Path:
    """Return the folder of notebooks: in an installed wheel its copy, else the checkout's.

    Raises
    ------
    LabError
        If there is neither.
    """
    package = Path(nvmx_lab.__file__).resolve().parent
    for folder in (package / "_notebooks", package.parent / "notebooks"):
        if folder.is_dir():
            return folder
    raise LabError(
        "the folder of notebooks is missing",
        where=package.parent / "notebooks",
        mend="install nvmx_lab again, or restore notebooks/ in the checkout",
    )


def data_hashes() -> dict[str, str]:
    """Return the SHA-256 of every file in the data folder, by its path there."""
    return _hashes(data.root())


def code_hash() -> str:
    """Return one SHA-256 over the package's own source files."""
    package = Path(nvmx_lab.__file__).resolve().parent
    return digest(*(f"{k} {v}" for k, v in _hashes(package, suffixes=_CODE).items()))


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package, and of what decides its numbers."""
    return {
        "python": platform.python_version(),
        "nvmx_lab": package_version(),
        **{name: metadata.version(name) for name in _DECIDING},
    }


def package_version() -> str:
    """Return this package's version; a checkout that is not installed has none."""
    try:
        return metadata.version("nvmx-lab")
    except metadata.PackageNotFoundError:
        return "not installed"


def fingerprint() -> str:
    """Return one SHA-256 over data, code and versions: when it changes, reports run again."""
    return digest(
        code_hash(),
        *(f"{name} {value}" for name, value in data_hashes().items()),
        *(f"{name} {value}" for name, value in versions().items()),
    )


def digest(*parts: str) -> str:
    """Return the SHA-256 of texts, each followed by a NUL so that their borders count."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() + b"\0")
    return total.hexdigest()


def platform_name() -> str:
    """Return processor architecture and operating system, without this machine's own name."""
    return f"{platform.system()} {platform.release()} {platform.machine()}, {sys.byteorder}-endian"


def _hashes(folder: Path, *, suffixes: set[str] | None = None) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # Copies of data and notebooks in a wheel, caches and editors' droppings are no code.
        if any(step.startswith((".", "_data", "_notebooks", "__pycache__")) for step in name.parts):
            continue
        if path.is_file() and (suffixes is None or path.suffix in suffixes):
            found[name.as_posix()] = files.sha256(path)
    return found
