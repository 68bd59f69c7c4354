"""Figures: what is drawn is what the frame says, and the alternative text says it too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from nvmx_lab import plots
from nvmx_lab.errors import LabError
from nvmx_lab.plots import figure as shared

ROOT = Path(__file__).resolve().parents[2]


def saving(mix, middle, pulls, verdict, even=0.24, leg=209.0):
    return {
        "mix": mix,
        "pulls_share": pulls,
        "verdict": verdict,
        "break_even_pull_rate_p50": even,
        **{f"exit_leg_saving_cycles_{q}": leg + d for q, d in SPREAD.items()},
        **{f"round_trip_saving_cycles_{q}": middle + d for q, d in SPREAD.items()},
    }


SPREAD = {"p05": -100.0, "p50": 0.0, "p95": 390.0}
SAVINGS = pd.DataFrame(
    [
        saving("loser", -679.0, 0.98, "costs"),
        saving("winner", 1209.0, 0.001, "saves"),
        saving("enlightened", 0.0, 0.0, "no difference", even=None, leg=0.0),
        saving("between", -20.0, 0.3, "unclear"),
    ],
    index=[7, 7, 2, 9],  # a plot must not lean on the index
)


def side(kvm, sync, leg, trip):
    return {
        "kvm": kvm,
        "sync": sync,
        **{f"exit_leg_cycles_{q}": leg + d for q, d in SPREAD.items()},
        **{f"round_trip_cycles_{q}": trip + d for q, d in SPREAD.items()},
    }


SIDES = pd.DataFrame(
    [
        side("5.2", "eager", 8191, 20775),
        side("5.3", "lazy", 7920, 21506),
        side("saving", "", 209, -731),
    ]
)

STEPS = pd.DataFrame(
    [
        (kvm, sync, leg, step, middle - 1, middle, middle + 5)
        for kvm, sync, leg, step, middle in [
            ("5.2", "eager", "L2 exit to L1", "rare fields", 232.0),
            ("5.2", "eager", "L2 exit to L1", "software of L0", 4022.0),
            ("5.2", "eager", "VMWRITE by L1", "tiny", 3.0),
            ("5.2", "eager", "VMRESUME to L2", "switch of VMCS", 811.0),
            ("5.3", "lazy", "L2 exit to L1", "software of L0", 4024.0),
            ("5.3", "lazy", "VMWRITE by L1", "rare fields", 31.0),
            ("5.3", "lazy", "VMRESUME to L2", "switch of VMCS", 815.0),
        ]
    ],
    columns=["kvm", "sync", "leg", "step", "cycles_p05", "cycles_p50", "cycles_p95"],
    index=[3] * 7,
)

TOTALS = pd.DataFrame(
    [
        ("cpuid", "before", "5.2", 14993.0, 20775.0, 30030.0, 14886.0, False),
        ("cpuid", "after", "5.3", 12702.0, 18420.0, 27735.0, 13142.0, True),
        ("cpuid", "saving", "5.2 minus 5.3", 1657.0, 2281.0, 3176.0, 1744.0, True),
    ],
    columns=[
        *("mix", "what", "kvm", "cycles_p05", "cycles_p50", "cycles_p95"),
        *("published_cycles", "inside"),
    ],
)

ALL = [
    (plots.saving_intervals, SAVINGS),
    (plots.pull_rate, SAVINGS),
    (plots.comparison, SIDES),
    (plots.breakdown, STEPS),
    (plots.published_totals, TOTALS),
]


def title(plot):
    return " ".join(plot.figure.get_suptitle().split())


def marks(axes):
    """Return (x, y) of everything drawn as a single mark."""
    return {
        (float(line.get_xdata()[0]), round(float(line.get_ydata()[0]), 6))
        for line in axes.lines
        if len(line.get_xdata()) == 1
    }


def spans(axes):
    """Return the ends of every horizontal interval."""
    return {
        tuple(map(float, line.get_xdata()))
        for line in axes.lines
        if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1]
    }


@pytest.mark.parametrize(("draw", "frame"), ALL)
def test_shows_itself_with_alternative_text_and_changes_nothing(draw, frame):
    before = frame.copy(deep=True)
    plot = draw(frame)
    pd.testing.assert_frame_equal(frame, before)
    data, about = plot._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert about["image/png"]["alt"] == plot.alt == data["text/plain"]
    assert about["image/png"]["width"] == round(96 * shared.WIDTH)
    assert plot.alt.endswith(".")
    assert "nan" not in plot.alt.lower()
    assert title(plot).lower()[:20] in plot.alt.lower()


@pytest.mark.parametrize(("draw", "frame"), ALL)
def test_every_axis_has_a_label_with_its_unit(draw, frame):
    for axes in draw(frame).figure.axes:
        if axes.xaxis.get_visible() and axes.get_xlabel():
            assert any(unit in axes.get_xlabel() for unit in ("cycles", "%"))
    assert any(axes.get_xlabel() for axes in draw(frame).figure.axes)


@pytest.mark.parametrize(("draw", "frame"), ALL)
def test_a_missing_column_is_named(draw, frame):
    for column in ("mix", "kvm", "cycles_p50", "round_trip_saving_cycles_p95"):
        if column in frame:
            with pytest.raises(LabError, match=column):
                draw(frame.drop(columns=column))
    with pytest.raises(LabError):
        draw(frame.iloc[:0])


@pytest.mark.parametrize(("draw", "frame"), ALL)
def test_the_same_frame_gives_the_same_bytes(draw, frame):
    assert shared.png(draw(frame).figure) == shared.png(draw(frame).figure)


LONG_MIX = "x2apic-self-ipi-tpr-sti-hlt"
LONG_KVM = ("5.2+patch07+patch08+patch09", "5.3+ibpb+migration-sync+light-pull")


def lengthened(frame):
    """Return a frame with the longest names and values of its kind."""
    frame = frame.copy()
    if "mix" in frame:
        frame["mix"] = [f"{LONG_MIX[: -len(mix)]}{mix}" for mix in frame["mix"]]
    if "kvm" in frame:
        first = frame["kvm"].iloc[0]
        frame["kvm"] = [kvm if "s" in kvm else LONG_KVM[int(kvm != first)] for kvm in frame["kvm"]]
    cycles = [name for name in frame if "cycles" in name]
    return frame.assign(**{name: frame[name] * 222.2 for name in cycles})


@pytest.mark.parametrize(("draw", "frame"), ALL)
def test_no_text_sticks_out_of_the_figure(draw, frame):
    for given_ in (frame, lengthened(frame)):
        figure = draw(given_).figure
        figure.draw_without_rendering()  # lays out
        drawn = figure.get_tightbbox()  # inches
        width, height = figure.get_size_inches()
        assert min(drawn.x0, drawn.y0) > -0.01
        assert drawn.x1 < width + 0.01
        assert drawn.y1 < height + 0.01


@given(st.lists(st.text("0123456789,W; abi", min_size=1, max_size=30), min_size=1, max_size=12))
@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_a_title_keeps_its_words_and_fits(words):
    finding = " ".join(" ".join(words).split())
    if not finding:
        return
    figure, _ = shared.blank(3)
    shared.entitle(figure, finding)
    assert " ".join(figure.get_suptitle().split()) == finding
    assert Text.get_window_extent(figure._suptitle, dpi=100).x1 <= figure.bbox.x1


def test_nothing_saved_still_has_an_axis_of_different_numbers():
    nothing = SAVINGS.iloc[[2]].assign(
        **{name: 0.0 for name in SAVINGS if name.endswith(("p05", "p95"))}
    )
    same = SIDES.assign(**{n: [*SIDES[n].iloc[:2], 0.0] for n in SIDES.columns[2:]})
    for plot, axis in (
        (plots.saving_intervals(nothing), lambda figure: figure.axes[0].xaxis),
        (plots.pull_rate(nothing), lambda figure: figure.axes[0].yaxis),
        (plots.comparison(same), lambda figure: figure.axes[1].xaxis),
    ):
        plot.figure.draw_without_rendering()
        places = axis(plot.figure).get_majorticklocs()
        assert all(place == round(place) for place in places)
        labels = [label.get_text() for label in axis(plot.figure).get_ticklabels()]
        assert len(set(labels)) == len(labels) > 2
        assert "0" in labels


def test_savings_are_sorted_and_drawn_as_given():
    plot = plots.saving_intervals(SAVINGS)
    axes = plot.figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["winner", "enlightened", "between", "loser"]
    # the first row is at the top
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert {x for x, _ in marks(axes)} == {209.0, 0.0, 1209.0, -20.0, -679.0}
    assert (1109.0, 1599.0) in spans(axes)
    assert (-779.0, -289.0) in spans(axes)
    pulls = [label.get_text() for label in plot.figure.axes[1].get_yticklabels()]
    assert pulls == ["0.1 %", "0 %", "30.0 %", "98.0 %"]


def test_savings_are_said():
    plot = plots.saving_intervals(SAVINGS)
    assert title(plot).startswith(
        "1 of 4 mixes saves on the round trip, 1 loses, 1 is unclear and 1 shows no difference"
    )
    assert "from 1,209 to −679 cycles" in title(plot)
    assert "loser (costs; pulls after 98.0 % of the exits)" in plot.alt
    assert "round trip −679 (90 % interval −779 to −289) cycles" in plot.alt


def test_a_long_list_says_its_ends():
    many = pd.DataFrame([saving(f"mix-{i}", float(100 + i), 0.0, "saves") for i in range(55)])
    plot = plots.saving_intervals(many)
    assert title(plot).startswith("All 55 mixes save on the round trip")
    assert "mix-54 (saves" in plot.alt
    assert "mix-0 (saves" in plot.alt
    assert "mix-20 " not in plot.alt
    # a row keeps the height of a line of text
    assert plot.figure.get_size_inches()[1] / 55 > 0.2


def test_one_mix_is_said_in_the_singular():
    plot = plots.saving_intervals(SAVINGS.iloc[:1])
    assert title(plot) == "The mix loses on the round trip"
    assert "the one mix loses above" in title(plots.pull_rate(SAVINGS.iloc[:1])).lower()


def test_two_rows_of_a_mix_are_refused():
    twice = pd.concat([SAVINGS, SAVINGS.iloc[:1]])
    for draw in (plots.saving_intervals, plots.pull_rate):
        with pytest.raises(LabError, match="loser"):
            draw(twice)


def test_pull_rate_draws_every_mix_and_its_rate():
    plot = plots.pull_rate(SAVINGS)
    axes = plot.figure.axes[0]
    drawn = {
        (round(float(x), 6), float(y))
        for line in axes.lines
        if line.get_linestyle() == "None"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    assert drawn >= {(98.0, -679.0), (0.1, 1209.0), (0.0, 0.0), (30.0, -20.0)}
    assert "The one mix saves below the break-even pull rate and both mixes lose above it" in (
        title(plot)
    )
    assert "The break-even rate is 24 %" in plot.alt
    unpriced = SAVINGS.assign(break_even_pull_rate_p50=None)
    assert title(plots.pull_rate(unpriced)).startswith("A pull has no price here")
    # what has no break-even rate is neither above nor below one
    assert "Nothing is ever pulled" in title(plots.pull_rate(SAVINGS.iloc[[2]]))


def test_pull_rate_says_when_mixes_do_not_follow_it():
    odd = pd.DataFrame(
        [
            saving("a", 5.0, 0.5, "saves"),
            saving("b", -5.0, 0.6, "costs"),
            saving("c", -5.0, 0.1, "costs"),
        ]
    )
    assert title(plots.pull_rate(odd)).startswith(
        "The one mix does not save below the break-even pull rate and 1 of 2 mixes lose above it"
    )


def test_comparison_draws_both_sides_and_the_paired_saving():
    plot = plots.comparison(SIDES)
    total, difference = plot.figure.axes
    assert {x for x, _ in marks(total)} == {8191.0, 7920.0, 20775.0, 21506.0}
    assert {x for x, _ in marks(difference)} == {209.0, -731.0}
    assert (109.0, 599.0) in spans(difference)
    assert title(plot) == (
        "KVM 5.3 against 5.2: 209 cycles saved on the exit leg, 731 cycles lost on the round trip"
    )
    assert "round trip −731 (90 % interval −831 to −341) cycles" in plot.alt


def test_comparison_wants_two_sides():
    with pytest.raises(LabError, match="two L0s"):
        plots.comparison(SIDES.iloc[:1])
    with pytest.raises(LabError, match="two L0s"):
        plots.comparison(SIDES.iloc[:2])


def test_breakdown_draws_steps_in_the_order_of_the_legs():
    plot = plots.breakdown(STEPS)
    (axes,) = plot.figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["software of L0", "rare fields", "rare fields", "switch of VMCS"]
    bold = [label.get_fontweight() == "bold" for label in axes.get_yticklabels()]
    assert bold == [False, True, True, True]
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [4022.0, 4024.0, 232.0, 0.0, 0.0, 31.0, 811.0, 815.0]
    heads = [text.get_text().strip() for text in axes.texts]
    assert heads == ["L2 exit to L1", "VMWRITE by L1", "VMRESUME to L2"]
    assert "one step below 10 cycles not drawn" in axes.get_xlabel()


def test_breakdown_says_what_the_sync_changes():
    plot = plots.breakdown(STEPS)
    assert title(plot) == (
        "Rare fields about 232 cycles before, 31 after; "
        "switch of VMCS about 811 cycles before, 815 after"
    )
    assert "software of L0 (L2 exit to L1) 4,022 before and 4,024 after" in plot.alt
    with pytest.raises(LabError, match="two L0s"):
        plots.breakdown(STEPS[STEPS["kvm"] == "5.2"])


def test_published_totals_leave_the_difference_out():
    plot = plots.published_totals(TOTALS)
    (axes,) = plot.figure.axes
    assert {x for x, _ in marks(axes)} == {20775.0, 18420.0, 14886.0, 13142.0}
    assert title(plot) == "1 of 2 published totals lie inside the simulated 90 % interval"
    assert "cpuid under KVM 5.2: simulated 20,775 (90 % interval 14,993 to 30,030)" in plot.alt
    assert "published 14,886" in plot.alt
    outside = TOTALS.assign(inside=False)
    assert title(plots.published_totals(outside)).startswith("None of the 2")


@given(st.floats(-1e6, 1e6))
def test_numbers_are_said_with_a_minus_sign_and_never_minus_zero(value):
    text = shared.number(value)
    assert "-" not in text
    assert float(text.replace(",", "").replace("−", "-")) == pytest.approx(value, abs=0.5)
    assert text not in ("−0",)


@given(st.floats(0, 1))
@settings(max_examples=300)
def test_a_share_is_told_from_nothing_and_from_all(value):
    text = shared.share(value)
    assert text.endswith(" %")
    assert float(text[:-2]) == pytest.approx(100 * value, abs=0.0501)
    assert (text == "100 %") == (value == 1)


def test_labels_do_not_lie_on_each_other():
    rng = np.random.default_rng(1)
    close = pd.DataFrame(
        [
            saving(f"mix-number-{i}", 200.0 - 900 * pulls, pulls, "unclear")
            for i, pulls in enumerate(np.sort(rng.uniform(0.05, 0.95, 14)))
        ]
    )
    plot = plots.pull_rate(close)
    plot.figure.draw_without_rendering()  # lays out
    boxes = [
        Text.get_window_extent(text)  # an annotation's own has its arrow in it
        for text in plot.figure.axes[0].texts
        if text.get_text().startswith("mix-")
    ]
    assert len(boxes) == 14
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_show_needs_an_alternative_text():
    figure, _ = shared.blank(2)
    with pytest.raises(LabError, match="alternative text"):
        plots.show(figure, "  ")


def test_plots_import_nothing_that_computes_and_matplotlib_only_when_drawing():
    for file in (ROOT / "nvmx_lab" / "plots").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nvmx_lab"):
                assert node.module.startswith(("nvmx_lab.plots", "nvmx_lab.errors")), file
    code = "import sys, nvmx_lab.plots; print('matplotlib' in sys.modules, 'pandas' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert said.stdout.split() == ["False", "False"]
