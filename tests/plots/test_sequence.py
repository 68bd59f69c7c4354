"""The sequence diagram: drawn is what the frame says, nothing lies on anything else."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from matplotlib.patches import Rectangle

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import png
from nvmx_lab.plots.sequence import sequence, svg


def row(step, actor, target, label, vmcs02, vmcs12, flag=False, wrong=False, **more):
    return {
        "step": step,
        "actor": actor,
        "target": target,
        "label": label,
        "vmcs02": vmcs02,
        "vmcs12": vmcs12,
        **more,
        "flag": flag,
        "dirty": False,
        "wrong": wrong,
        "field": "GUEST_GS_BASE",
        "finding": "KVM 5.3 (lazy): L1 sees a stale GUEST_GS_BASE on the migration target",
    }


FRAME = pd.DataFrame(
    [
        row(1, "L2", "L2", "L2_WRITE GUEST_GS_BASE", "true", "undefined"),
        row(2, "L2", "L0", "EXIT CPUID", "true", "stale", flag=True),
        row(2, "L0", "L1", "reflected to L1", "true", "stale", flag=True),
        row(3, "user space", "L0", "MIGRATE", "empty", "stale"),
        row(4, "L1", "L0", "VMREAD GUEST_GS_BASE", "empty", "stale"),
        row(4, "L0", "L1", "L1 sees what A held before step 1", "empty", "stale", wrong=True),
    ],
    index=[5, 5, 5, 2, 2, 1],  # a plot must not lean on the index
)
LONG = "L2_WRITE GUEST_INTERRUPTIBILITY_INFO that goes on until it must be broken into lines"
CROWDED = pd.DataFrame(
    [
        row(
            *(n, "L1", "L0", LONG, "true", "stale"),
            flag=True,
            wrong=n == 30,
            **dict.fromkeys(("shadow", "A", "B", "SMRAM"), "empty"),
        )
        for n in range(1, 31)
    ]
)


def texts(plot):
    (axes,) = plot.figure.axes
    return {text.get_text(): text for text in axes.texts if text.get_text()}


def boxes(plot):
    """Return (face colour, hatch) of the boxes of the cells, those of the legend left out."""
    (axes,) = plot.figure.axes
    square = [p for p in axes.patches if isinstance(p, Rectangle) and p.get_width() < 1]
    return [(patch.get_facecolor(), patch.get_hatch()) for patch in square][:-3]


def test_the_title_is_the_finding_and_the_alternative_text_tells_the_steps():
    plot = sequence(FRAME)
    assert " ".join(plot.figure.get_suptitle().split()) == FRAME["finding"].iloc[0]
    assert "3. MIGRATE; 4. VMREAD GUEST_GS_BASE, L1 sees what A held before step 1" in plot.alt
    assert "GUEST_GS_BASE at the end: vmcs02 empty and vmcs12 stale" in plot.alt


def test_every_row_has_its_label_and_every_step_its_states():
    plot = sequence(FRAME)
    assert set(FRAME["label"]) <= texts(plot).keys()
    assert {"1", "2", "3", "4", "vmcs02", "vmcs12", "user space", "set"} <= texts(plot).keys()
    # one box for each step and cell, none where nobody asks
    assert len(boxes(plot)) == 7


def test_states_differ_in_more_than_colour():
    plot = sequence(FRAME)
    hatched = [hatch for _, hatch in boxes(plot) if hatch]
    assert len(hatched) == 3  # vmcs12 is stale after steps 2, 3 and 4
    marks = [t for t in plot.figure.axes[0].texts if t.get_text() == "\N{CHECK MARK}"]
    assert len(marks) == 2 + 1  # and the legend's


def test_what_is_wrong_stands_out():
    plot = sequence(FRAME)
    label = texts(plot)["L1 sees what A held before step 1"]
    assert label.get_fontweight() == "bold"
    assert texts(plot)["VMREAD GUEST_GS_BASE"].get_fontweight() != "bold"


@pytest.mark.parametrize("frame", [FRAME, CROWDED], ids=["short", "crowded"])
def test_no_text_lies_on_another_or_leaves_the_figure(frame):
    plot = sequence(frame)
    plot.figure.draw_without_rendering()
    written = [text for text in plot.figure.axes[0].texts if text.get_text().strip()]
    extents = [text.get_window_extent() for text in written]
    for box in extents:
        assert 0 <= box.x0 < box.x1 <= plot.figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= plot.figure.bbox.y1
    for one, other in itertools.combinations(extents, 2):
        assert not one.overlaps(other)


def test_the_same_frame_gives_the_same_bytes():
    long = FRAME.assign(finding="KVM 5.3 (lazy): L2 sees an uninitialised GUEST_CR3 on the target")
    first, second = sequence(long), sequence(long)
    assert png(first.figure) == png(second.figure)
    # whatever was drawn before
    assert svg(first) == svg(sequence(long))


def test_the_svg_says_what_it_shows_and_names_no_outside_file():
    plot = sequence(FRAME)
    drawing = svg(plot).decode()
    root = ElementTree.fromstring(drawing)  # noqa: S314 - our own
    assert root.find("{http://www.w3.org/2000/svg}title").text == plot.alt
    assert not re.search(r'href="(?!#)', drawing)


def test_a_frame_that_lacks_something_is_refused():
    with pytest.raises(LabError, match="finding"):
        sequence(FRAME.drop(columns="finding"))
    with pytest.raises(LabError, match="no rows"):
        sequence(FRAME.iloc[:0])
