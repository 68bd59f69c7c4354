"""The figures of the series draw and say what their frames hold."""

from __future__ import annotations

import pandas as pd
import pytest
from matplotlib.colors import to_hex

from nvmx_lab import plots
from nvmx_lab.errors import LabError
from nvmx_lab.plots import figure as shared

NAN = float("nan")


def row(what, begin, mean, low, high, claimed=(NAN, NAN), patches="", own=""):
    return {
        "mix": "cpuid",
        "what": what,
        "patches": patches,
        "subject": "what it changes, in words that need more than one line" if patches else "",
        "begin_cycles": begin,
        "cycles_mean": mean,
        "cycles_p05": low,
        "cycles_p50": mean,
        "cycles_p95": high,
        "claimed_low_cycles": claimed[0],
        "claimed_high_cycles": claimed[1],
        "own_claims": own,
        "before_cycles": 1000.0,
        "after_cycles": 700.0,
    }


STEPS = pd.DataFrame(
    [
        row("step", 0.0, 250.0, 100.0, 400.0, (90.0, 120.0), "9"),
        row("step", 250.0, 200.0, 50.0, 350.0, (200.0, 200.0), "13", own="A"),
        row("step", 450.0, -50.0, -70.0, -30.0, patches="43"),
        row("claimed steps", 0.0, 450.0, 200.0, 700.0),
        row("simulated", 0.0, 400.0, 330.0, 500.0),
        row("claims", 0.0, NAN, NAN, NAN, (290.0, 320.0)),
        row("measured", 0.0, 300.0, 300.0, 300.0),
        row("unexplained", 400.0, -100.0, -200.0, -30.0),
    ],
    index=[4] * 8,  # a plot must not lean on the index
)
LOOPS = pd.DataFrame(
    [
        ("cpuid", 1744.0, 1910.0, 2535.0, 3429.0, 1455.0, 1555.0, False),
        ("inl", 1921.0, 1902.0, 2524.0, 3415.0, 1455.0, 1555.0, True),
        ("hlt", 9000.0, 3813.0, 5060.0, 6848.0, 2910.0, 3110.0, False),
    ],
    columns=[
        *("mix", "measured_cycles", "cycles_p05", "cycles_p50", "cycles_p95"),
        *("claimed_low_cycles", "claimed_high_cycles", "inside"),
    ],
)
BOTH = [(plots.waterfall, STEPS), (plots.series_loops, LOOPS)]


def lines(axes):
    return {tuple(map(float, line.get_xdata())) for line in axes.lines}


def title(plot):
    return " ".join(plot.figure.get_suptitle().split())


def test_waterfall_draws_each_row_of_the_frame():
    plot = plots.waterfall(STEPS)
    axes = plot.figure.axes[0]
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 250), (250, 200), (450, -50), (0, 400), (0, 300), (400, -100)]
    spans = {(100.0, 400.0), (300.0, 600.0), (380.0, 420.0), (330.0, 500.0), (200.0, 370.0)}
    claims = {(90.0, 120.0), (450.0, 450.0), (290.0, 320.0)}
    assert lines(axes) >= spans | claims
    colours = [to_hex(bar.get_facecolor()).upper() for bar in axes.patches]
    assert colours[:2] == [shared.BLUE, shared.SKY]  # the second rests on its own claim
    assert axes.patches[-1].get_hatch()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[1].startswith("13: what it changes")
    assert names[-1] == "Not explained by the model"
    assert "1,000 cycles measured before" in axes.child_axes[0].get_xlabel()


def test_waterfall_says_it():
    plot = plots.waterfall(STEPS)
    assert title(plot) == "cpuid: the series saves 300 cycles as measured, 330 to 500 as simulated"
    assert "patch 9: 250 (interval 100 to 400), claimed 90 to 120" in plot.alt
    assert "patch 13: 200 (interval 50 to 350), claimed 200;" in plot.alt
    assert "not explained by the model: −100 (interval −200 to −30)" in plot.alt


def test_loops_draw_and_say_each_loop():
    plot = plots.series_loops(LOOPS)
    (axes,) = plot.figure.axes
    ends = {(r.cycles_p05, r.cycles_p95) for r in LOOPS.itertuples()}
    points = {(r.cycles_p50,) for r in LOOPS.itertuples()}
    measured = {(r.measured_cycles,) for r in LOOPS.itertuples()}
    assert lines(axes) == ends | points | measured | {(1455.0, 1555.0), (2910.0, 3110.0)}
    assert title(plot) == (
        "The measured saving is in the simulated interval on 1 of 3 loops, "
        "below it on 1, above it on 1"
    )
    assert "hlt: simulated 5,060 (3,813 to 6,848), measured 9,000" in plot.alt


@pytest.mark.parametrize(("draw", "frame"), BOTH)
def test_figures_are_sound(draw, frame):
    before = frame.copy(deep=True)
    plot = draw(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert plot.alt.endswith(".")
    assert "nan" not in plot.alt.lower()
    assert "cycles" in plot.figure.axes[0].get_xlabel()
    for column in ("mix", "cycles_p50", "claimed_low_cycles"):
        with pytest.raises(LabError, match=column):
            draw(frame.drop(columns=column))
    with pytest.raises(LabError):
        draw(frame.iloc[:0])
    cycles = {name: frame[name] * 99.9 for name in frame if "cycles" in name}
    longest = draw(frame.assign(mix="x2apic-self-ipi-tpr-sti-hlt", **cycles))
    for figure in (plot.figure, longest.figure):
        figure.draw_without_rendering()
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert min(box.x0, box.y0) > -0.01
        assert box.x1 < width + 0.01
        assert box.y1 < height + 0.01


def test_a_waterfall_is_of_one_loop_with_its_totals():
    other = STEPS.assign(mix=["vmcall", *STEPS["mix"].iloc[1:]])
    for frame in (other, STEPS[STEPS["what"] != "measured"]):
        with pytest.raises(LabError, match="one loop"):
            plots.waterfall(frame)
