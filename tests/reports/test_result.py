"""What a notebook publishes arrives as it was, or is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nvmx_lab.errors import LabError
from nvmx_lab.reports import result

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def shown(*payloads):
    outputs = [
        {"output_type": "display_data", "data": {result.MIME_TYPE: payload}} for payload in payloads
    ]
    return {"cells": [{"cell_type": "markdown", "source": ""}, {"outputs": outputs}]}


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=3))
def test_json_values_arrive_unchanged(records):
    assert result.as_records(records) == records
    notebook = json.loads(json.dumps(shown({"name": "x", "records": records})))
    assert result.published(notebook) == {"x": records}


def test_frames_and_numpy_become_plain():
    frame = pd.DataFrame({"n": np.array([1, 2]), "x": [0.5, np.nan], "s": ["a", None]})
    assert result.as_records(frame) == [
        {"n": 1, "x": 0.5, "s": "a"},
        {"n": 2, "x": None, "s": None},
    ]
    assert result.as_records({"b": np.bool_(True), "v": [np.float32(0.5)], "na": pd.NA}) == [
        {"b": True, "v": [0.5], "na": None}
    ]


@pytest.mark.parametrize("value", [np.inf, -np.inf, object(), b"x", {1, 2}, np.arange(3)])
def test_what_has_no_json_form_is_refused(value):
    with pytest.raises(LabError, match="row 0: x"):
        result.as_records({"x": value})


def test_two_results_of_one_name_are_refused():
    with pytest.raises(LabError, match="twice"):
        result.published(shown({"name": "x", "records": []}, {"name": "x", "records": []}))


@pytest.mark.parametrize("payload", [{}, {"name": "x"}, {"name": "x", "records": [5]}, "x", 5])
def test_malformed_result_is_refused(payload):
    with pytest.raises(LabError, match="malformed"):
        result.published(shown(payload))
