"""The data folder: where its files are, and the plainest way to read a table.

Everything the kit knows but did not compute is a file there; ``data/README.md`` says where each
came from.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from nvmx_lab.errors import LabError, unknown

_PACKAGE = Path(__file__).resolve().parent


def root() -> Path:
    """Return the data folder: ``_data`` inside an installed wheel, ``data`` beside a checkout.

    Raises
    ------
    LabError
        If there is neither.
    """
    # A wheel's own copy first: whatever lies beside site-packages is not ours.
    for folder in (_PACKAGE / "_data", _PACKAGE.parent / "data"):
        if folder.is_dir():
            return folder
    raise LabError(
        "the data folder is missing",
        where=_PACKAGE.parent / "data",
        mend="install nvmx_lab again, or restore data/ in the checkout",
    )


def path(*parts: str) -> Path:
    """Return the path of a data file or folder that exists.

    Parameters
    ----------
    *parts : str
        Names below the data folder, ``path("executed", "kvm61_lazy_shadow.toml")``.

    Raises
    ------
    LabError
        If it does not exist, with a suggestion if one is near; or if it lies outside the folder.
    """
    base = root()
    target = base.joinpath(*parts)
    if not target.resolve().is_relative_to(base.resolve()):
        raise LabError("not below the data folder", where=target, got="/".join(parts))
    if not target.exists():
        siblings = [p.name for p in target.parent.iterdir()] if target.parent.is_dir() else []
        raise unknown("data file", target.name, siblings, where=target.parent)
    return target


def read_rows(file: Path | str) -> list[dict[str, str]]:
    """Read a CSV table as one dict of strings per row, with the standard library only.

    Parameters
    ----------
    file : Path or str
        A path, or the name of a file in the data folder.

    Raises
    ------
    LabError
        If the file cannot be read or is no UTF-8, or a row has another length than the header.
    """
    target = path(file) if isinstance(file, str) else file
    text = _read_text(target)
    # strict: a stray quote is an error, not a guess.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        header = next(reader, None)
        if not header:
            raise LabError("the table has no header", where=target)
        if len(set(header)) < len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise LabError("a column appears twice", where=f"{target}:1", got=", ".join(twice))
        for cells in reader:
            if not cells:  # a blank line
                continue
            if len(cells) != len(header):
                raise LabError(
                    "the row has another length than the header",
                    where=f"{target}:{reader.line_num}",
                    got=len(cells),
                    allowed=f"{len(header)} cells",
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise LabError(f"malformed CSV: {error}", where=f"{target}:{reader.line_num}") from error
    return rows


def _read_text(target: Path) -> str:
    try:
        return target.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LabError(f"not UTF-8 at byte {error.start}", where=target) from error
    except OSError as error:
        raise LabError(f"cannot be read: {error.strerror or error}", where=target) from error
