"""The figure of detectable savings draws the frame's numbers and says them."""

from __future__ import annotations

import pandas as pd
import pytest

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import png
from nvmx_lab.plots.power import detectable


def frame(saving=200.0):
    rows = [
        {
            "condition": condition,
            "run_to_run_percent": percent,
            "design": "paired" if correlation == correlation else "unpaired",
            "correlation": correlation,
            "runs": runs,
            "detectable_cycles": 1000 * percent / runs * (1 - 0.5 * (correlation == 0.9)),
            "loop_cycles": 14_000.0,
            "saving_cycles": saving,
            "power": 0.9,
            "runs_needed": needed,
        }
        for condition, percent, needed in (("pinned", 1.0, 12), ("unpinned", 4.6, 1219))
        for correlation in (float("nan"), 0.0, 0.9)
        for runs in (3, 30, 300)
    ]
    return pd.DataFrame(rows, index=[7] * len(rows))


def test_lines_and_bands_are_the_frames():
    table = frame()
    plot = detectable(table)
    (axes,) = plot.figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    for (condition, percent), rows in table.groupby(["condition", "run_to_run_percent"]):
        line = lines[f"{condition} ({percent:g} % run to run), not paired"]
        unpaired = rows[rows["design"] == "unpaired"]
        assert list(line.get_xdata()) == list(unpaired["runs"])
        assert list(line.get_ydata()) == list(unpaired["detectable_cycles"])
    for band, condition in zip(axes.collections, ("pinned", "unpinned"), strict=True):
        assert "correlation 0 to 0.9 (assumed)" in band.get_label()
        paired = table[(table["condition"] == condition) & (table["design"] == "paired")]
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(paired["detectable_cycles"].min())
        assert heights.max() == pytest.approx(paired["detectable_cycles"].max())
    assert "cycles" in axes.get_ylabel()
    assert "boots" in axes.get_xlabel()
    title = "Seeing 200 of 14,000 cycles takes 12 boots per kernel pinned and 1,219 unpinned"
    assert plot.figure.get_suptitle() == title
    assert title in plot.alt
    assert "333 cycles with 3 boots and 3.3 cycles with 300 boots" in plot.alt
    assert png(plot.figure).startswith(b"\x89PNG")


def test_few_cycles_keep_their_digits():
    assert "Seeing 0.5 of" in detectable(frame(saving=0.5)).figure.get_suptitle()


def test_a_frame_without_columns_or_rows_is_refused():
    with pytest.raises(LabError, match="runs_needed"):
        detectable(frame().drop(columns="runs_needed"))
    with pytest.raises(LabError, match="no rows"):
        detectable(frame().iloc[:0])
