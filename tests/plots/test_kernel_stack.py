"""Figures about kernel-stack randomization: they draw the frame, and the alt text says it."""

from __future__ import annotations

import pandas as pd
import pytest

from nvmx_lab.errors import LabError
from nvmx_lab.plots import pulls_by_cause, saving_with_and_without, savings_of_fixes


def _spread(name, middle):
    return {f"{name}_p05": middle - 10.0, f"{name}_p50": middle, f"{name}_p95": middle + 20.0}


LOGGED = pd.DataFrame(
    {
        "l2": ["boot"] * 3 + ["micro"],
        "randomization": ["on"] * 3 + ["off"],
        "kind": ["pio", "cpuid", "mmio", "pio"],
        "exits": [100, 300, 50, 40],
        "pulls": [90, 0, 30, 4],
        "host_rsp": [80, 0, 30, 0],
        "other": [10, 0, 0, 4],
    }
)
SAVED = pd.DataFrame(
    [
        {"mix": mix, "write": write, "cpu": cpu, **_spread("saving", middle)}
        for mix in ("one", "two")
        for cpu in ("new", "old")
        for write, middle in ((True, -300.0), (False, 200.0))
    ]
)
GAINS = pd.DataFrame(
    [
        {"mix": "one", "cpu": "new", "fix": fix, "closed_p50": share, **_spread("lazy", gain)}
        for fix, share, gain in (("a", 0.5, 50.0), ("b", 0.9, 90.0), ("none", 1.0, 100.0))
    ]
)


def test_pulls_are_drawn_by_cause_and_kinds_that_never_pull_are_left_out():
    figure, alt = pulls_by_cause(LOGGED)
    boot, micro = figure.axes
    assert [label.get_text() for label in boot.get_yticklabels()] == ["mmio", "pio"]
    assert [round(bar.get_width()) for bar in boot.patches] == [60, 80, 0, 10]
    assert [round(bar.get_width()) for bar in micro.patches] == [0, 10]
    assert "boot, randomization on: 24.4 % of the exits pull because of HOST_RSP, 2.2 %" in alt
    assert "micro, randomization off: of 40 exits 4 pull, 0 because of HOST_RSP." in alt
    with pytest.raises(LabError, match="nothing to draw"):
        pulls_by_cause(LOGGED.assign(pulls=0))


def test_savings_are_drawn_where_both_have_a_price():
    unpriced = (SAVED["cpu"] == "old") & SAVED["write"]
    frame = SAVED.copy()
    frame.loc[unpriced, ["saving_p05", "saving_p50", "saving_p95"]] = None
    figure, alt = saving_with_and_without(frame)
    assert len(figure.axes) == 2
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["new"]
    points = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() in "ov"]
    assert sorted(points) == [-300.0, 200.0]
    assert "without the write 200 to 200, with it −300 to −300 cycles" in alt
    assert "old" not in alt
    with pytest.raises(LabError, match="no row has a price"):
        saving_with_and_without(frame[unpriced])


def test_a_wrong_fix_is_marked_and_not_praised():
    figure, alt = savings_of_fixes(GAINS, {"b"})
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["a", "b (wrong)", "none"]
    crosses = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [90.0]
    assert "a: 50 % of what the write costs is saved" in alt
    assert "b (wrong) 90 (90 % interval 80 to 110)" in alt
    assert "b: 90 %" in savings_of_fixes(GAINS)[1]
    with pytest.raises(LabError, match="one price list"):
        savings_of_fixes(pd.concat([GAINS, GAINS.assign(cpu="old")]))
