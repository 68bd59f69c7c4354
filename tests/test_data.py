"""The data folder: finding files and reading tables as text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nvmx_lab import data
from nvmx_lab.errors import LabError


def test_path_finds_files_and_folders() -> None:
    assert data.path("vmcs_fields.csv").is_file()
    assert data.path("executed", "kvm61_lazy_shadow.toml").is_file()
    assert data.path("executed").is_dir()


def test_a_missing_file_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(LabError, match=r"unknown data file.*did you mean 'vmcs_fields\.csv'"):
        data.path("vmcs_field.csv")
    with pytest.raises(LabError, match="unknown data file"):
        data.path("no_such_folder", "x.csv")


@pytest.mark.parametrize("parts", [("..", "pyproject.toml"), ("/etc/passwd",)])
def test_a_path_stays_in_the_folder(parts: tuple[str, ...]) -> None:
    with pytest.raises(LabError, match="not below the data folder"):
        data.path(*parts)


def test_a_wheels_own_copy_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "nvmx_lab"
    (package / "_data").mkdir(parents=True)
    (tmp_path / "site-packages" / "data").mkdir()  # of some other package
    monkeypatch.setattr(data, "_PACKAGE", package)
    assert data.root() == package / "_data"


def test_no_folder_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_PACKAGE", tmp_path / "nvmx_lab")
    with pytest.raises(LabError, match="data folder is missing"):
        data.root()


def test_nothing_is_guessed_about_cells(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_text('name,value\nNA,1e5\n,"0x10, in hex"\n', encoding="utf-8")
    assert data.read_rows(file) == [
        {"name": "NA", "value": "1e5"},
        {"name": "", "value": "0x10, in hex"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header"),
        (b"a,b\n1\n", r"x\.csv:2: the row has another length.*got 1; allowed: 2 cells"),
        (b"a,b\n1,2,3\n", r"x\.csv:2: the row has another length.*got 3"),
        (b"a,a\n1,2\n", r"x\.csv:1: a column appears twice; got 'a'"),
        (b'a,b\n"1,2\n', "malformed CSV"),
        (b'a,b\n"1"x,2\n', "malformed CSV"),
        (b"a,b\n\xff,2\n", "not UTF-8 at byte 4"),
    ],
)
def test_a_malformed_table_is_one_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(content)
    with pytest.raises(LabError, match=message):
        data.read_rows(file)


def test_an_unreadable_table_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="cannot be read"):
        data.read_rows(tmp_path)  # a folder


def test_importing_data_and_fields_loads_nothing_heavy() -> None:
    code = (
        "import sys; from nvmx_lab import data, vmcs; vmcs.catalogue();"
        "print(sorted({'numpy', 'pandas', 'pyarrow', 'numba', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.stdout.strip() == "[]"
