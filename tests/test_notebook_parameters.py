"""Parameters of notebooks: what is refused, and that a notebook agrees with its class."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmx_lab import notebook_parameters as parameters
from nvmx_lab.errors import LabError

ONE = "01_reproduce_the_saving"
ALL = "02_across_workload_mixes"
CELL = (
    'kvm_before = "5.2"\nkvm_after = "5.2+patch13"\ncpu = "skylake-2015"\n'
    "exits = 1_000_000\nseed = 1"
)


def write(path, source, *, tags=("parameters",), copies=1):
    cell = {
        "cell_type": "code",
        "metadata": {"tags": list(tags)},
        "source": source.splitlines(True),
    }
    path.write_text(json.dumps({"cells": [cell] * copies, "metadata": {}, "nbformat": 4}))
    return path


def test_defaults_are_filled_in():
    assert parameters.check(ONE, {"mix": "cpuid"}) == {
        "mix": "cpuid",
        "kvm_before": "5.2",
        "kvm_after": "5.2+patch13",
        "cpu": "skylake-2015",
        "exits": 1_000_000,
        "seed": 1,
    }


def test_numpy_and_tuples_become_what_json_knows():
    checked = parameters.check(
        ALL, {"exits": np.int64(5), "seed": np.array(7), "mixes": ("a", "b")}
    )
    assert json.loads(json.dumps(checked)) == checked
    assert (checked["exits"], checked["seed"], checked["mixes"]) == (5, 7, ["a", "b"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exits", 0),
        ("exits", -1),
        ("exits", 10**9 + 1),
        ("exits", True),
        ("exits", 1_000_000.0),
        ("exits", "20000"),
        ("exits", None),
        ("exits", np.float64(3)),
        ("seed", -1),
        ("seed", 2**63),
        ("mix", ""),
        ("mix", "../etc/passwd"),
        ("mix", "a/b"),
        ("mix", "a..b"),
        ("mix", "-a"),
        ("mix", "a\n"),
        ("mix", "A"),
        ("mix", "a" * 81),
        ("mix", ["cpuid"]),
        ("kvm_before", "latest"),
        ("kvm_after", 5.2),
        ("cpu", "sky lake"),
    ],
)
def test_bad_value_names_the_parameter_and_what_is_allowed(name, value):
    with pytest.raises(LabError, match=f"{ONE}: {name}: .*allowed: ") as caught:
        parameters.check(ONE, {"mix": "cpuid", name: value})
    assert "Traceback" not in str(caught.value)


@given(st.integers(1, 10**9), st.integers(0, 2**63 - 1))
def test_every_size_within_bounds_is_taken(exits, seed):
    checked = parameters.check(ONE, {"mix": "cpuid", "exits": exits, "seed": seed})
    assert (checked["exits"], checked["seed"]) == (exits, seed)


@given(st.text(max_size=20))
def test_a_mix_name_that_is_taken_is_a_plain_file_name(text):
    try:
        parameters.check(ONE, {"mix": text})
    except LabError:
        return
    assert text.isascii()
    assert set(text).isdisjoint("/\\ \n\0")
    assert ".." not in text
    assert text[0].isalnum()


def test_unknown_parameter_has_a_suggestion():
    with pytest.raises(LabError, match="did you mean 'exits'"):
        parameters.check(ONE, {"mix": "cpuid", "exit": 5})
    with pytest.raises(LabError, match="unknown parameter"):
        parameters.check(ONE, {"mix": "cpuid", "notebook": "x"})


def test_unknown_notebook_has_a_suggestion():
    with pytest.raises(LabError, match=f"did you mean '{ONE}'"):
        parameters.check("reproduce_the_saving", {})


def test_missing_parameter_is_named():
    with pytest.raises(LabError, match="mix: the parameter is missing"):
        parameters.check(ONE, {})


def test_place_in_a_list_is_named():
    with pytest.raises(LabError, match=r"mixes\[1\]"):
        parameters.check(ALL, {"mixes": ["cpuid", "../x"]})


def test_notebook_that_agrees(tmp_path):
    parameters.check_notebook(write(tmp_path / f"{ONE}.ipynb", f'mix = "cpuid"\n{CELL}'))
    annotated = f"# which\nmixes: list[str] = []  # all\n{CELL}"
    parameters.check_notebook(write(tmp_path / f"{ALL}.ipynb", annotated))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (CELL, "does not assign 'mix'"),
        (f'mix = "cpuid"\n{CELL}\nexit = 3', "did you mean 'exits'"),
        (
            f'mix = "cpuid"\n{CELL.replace("1_000_000", "1_000_001")}',
            "the default of 'exits' differs",
        ),
        (
            f'mix = "cpuid"\n{CELL.replace("1_000_000", "1_000_000.0")}',
            "the default of 'exits' differs",
        ),
        (
            f'mix = "cpuid"\n{CELL.replace("seed = 1", "seed = True")}',
            "the default of 'seed' differs",
        ),
        (f'mix = "../x"\n{CELL}', "mix: the parameter cannot be this"),
        (f'mix = "a"\nmix = "b"\n{CELL}', "assigned twice"),
        (f"mix = str(1)\n{CELL}", "no literal"),
        (f"import os\nmix = 'a'\n{CELL}", "only assignments"),
        (f"mix = other = 'a'\n{CELL}", "only assignments"),
        (f"mix: str\n{CELL}", "only assignments"),
        ("mix = (", "not Python"),
    ],
)
def test_notebook_that_differs(tmp_path, source, message):
    with pytest.raises(LabError, match=message):
        parameters.check_notebook(write(tmp_path / f"{ONE}.ipynb", source))


@pytest.mark.parametrize(("tags", "copies"), [((), 1), (("parameters",), 2)])
def test_notebook_has_one_parameters_cell(tmp_path, tags, copies):
    path = write(tmp_path / f"{ONE}.ipynb", f'mix = "a"\n{CELL}', tags=tags, copies=copies)
    with pytest.raises(LabError, match="exactly one code cell"):
        parameters.check_notebook(path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"cells": 5}', '{"cells": [5]}', '{"cells": [{}]}']
)
def test_no_notebook(tmp_path, text):
    path = tmp_path / f"{ONE}.ipynb"
    path.write_text(text)
    with pytest.raises(LabError, match="not a notebook"):
        parameters.check_notebook(path)
    with pytest.raises(LabError, match="cannot be read"):
        parameters.check_notebook(tmp_path / "absent" / f"{ONE}.ipynb")
