"""Figures of sync policies: what is drawn is the frame's, and what is said too."""

from __future__ import annotations

import pandas as pd
import pytest

from nvmx_lab.errors import LabError
from nvmx_lab.plots import gap_closed, policy_costs

SHARES = {("a", "eager"): 0.2, ("a", "by-guess"): 0.9, ("b", "eager"): -8.0, ("b", "by-guess"): 0.6}


def shares(values=SHARES):
    rows = []
    for (workload, policy), value in values.items():
        row = {"workload": workload, "kind": "mix", "group": "often", "lazy_pulls_share": 0.44}
        rows.append(
            row | {"policy": policy, **{f"closed_{q}": value for q in ("p05", "p50", "p95")}}
        )
    for workload, closed in (("a", 0.0), ("none", None)):
        row = {"workload": workload, "kind": "mix", "group": "never", "lazy_pulls_share": 0.0}
        none = {f"closed_{q}": closed for q in ("p05", "p50", "p95")}
        rows.append(row | {"policy": "lazy" if closed == 0 else "eager", **none})
    return pd.DataFrame(rows)


def test_every_share_is_written_and_workloads_without_a_gap_are_not():
    plot = gap_closed(shares())
    axes = plot.figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["20 %", "90 %", "−800 %", "60 %"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (mix)", "b (mix)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["eager", "by-guess"]
    title = plot.figure.get_suptitle().replace("\n", " ")
    assert title.startswith("By-guess closes at least half of the gap on 2 of 2 workloads")
    assert "eager is worse than lazy" in title
    assert "eager: from −800 % (b) to 20 % (a)" in plot.alt


def test_nobody_is_praised_alone_when_two_are_as_good():
    plot = gap_closed(shares({("a", "x"): 0.9, ("a", "y"): 0.8}))
    assert "X and y close at least half" in plot.figure.get_suptitle().replace("\n", " ")


def test_without_any_gap_there_is_nothing_to_draw():
    frame = shares()
    with pytest.raises(LabError, match="workloads with a gap"):
        gap_closed(frame[frame["workload"] == "none"])
    with pytest.raises(LabError, match="closed_p50"):
        gap_closed(frame.drop(columns="closed_p50"))


def costs(middle=-50.0):
    rows = []
    for group, count in (("all", 3), ("often (20 to 80 %)", 2)):
        for policy, value in (("eager", 100.0), ("by-guess", middle), ("oracle", -80.0)):
            row = {"kind": "mix", "group": group, "workloads": count, "policy": policy}
            spread = zip(("p05", "p50", "p95"), (-10, 0, 20), strict=True)
            rows.append(row | {f"over_lazy_cycles_{q}": value + d for q, d in spread})
    return pd.DataFrame(rows)


def test_intervals_and_the_best_that_is_no_oracle():
    plot = policy_costs(costs())
    (axes,) = plot.figure.axes
    lines = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert (-60.0, -30.0) in lines
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["all 3 mixes", "lazy pulls often\n(20 to 80 %), 2 mixes"]
    title = plot.figure.get_suptitle().replace("\n", " ")
    assert (
        title
        == "Against lazy: 50 cycles per exit less with by-guess over all mixes, equally weighted"
    )
    assert "eager 100 (90 % interval 90 to 120)" in plot.alt


def test_a_loss_is_called_one():
    title = policy_costs(costs(middle=30.0)).figure.get_suptitle().replace("\n", " ")
    assert "30 cycles per exit more with by-guess" in title
