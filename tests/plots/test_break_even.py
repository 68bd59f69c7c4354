"""Figures of break-even and sensitivity: what is drawn is what the frames say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nvmx_lab import plots
from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import share


def quantiles(name, low, middle, high):
    return {f"{name}_p05": low, f"{name}_p50": middle, f"{name}_p95": high}


CURVES = pd.DataFrame(
    [
        {"cpu": cpu, "switch_cycles": x, **quantiles("break_even_rate", r / 2, r, r * 1.3)}
        for cpu, scale in (("mine", 1.0), ("other", 2.0), ("bare", 3.0))
        for x, r in ((20.0, 0.25 * scale), (2000.0, 0.03 * scale), (20_000.0, 0.004 * scale))
    ]
)
HOST = {"cpu": "mine", "ibpb": False, "unpriced": ""}
RATES = pd.DataFrame(
    [
        {
            **HOST,
            **quantiles("switch_cycles", 90, 330, 700),
            **quantiles("break_even_rate", 0.08, 0.2, 0.41),
        },
        {
            **HOST,
            "ibpb": True,
            **quantiles("switch_cycles", 5000, 9000, 11_000),
            **quantiles("break_even_rate", 0.005, 0.013, 0.04),
        },
        {**HOST, "cpu": "bare", "unpriced": "vmptrld", **quantiles("switch_cycles", *[np.nan] * 3)},
        {**HOST, "cpu": "bare", "ibpb": True, "unpriced": "vmptrld, ibpb"},
    ],
    index=[4, 4, 1, 0],
)


def point(name, rate, verdict, ibpb=False, evmcs=False, key="mix"):
    slope = 20_000 if ibpb else 1000
    middle = 0.0 if evmcs else 200 - slope * rate
    return {
        key: name,
        "ibpb": ibpb,
        "evmcs": evmcs,
        "pulls_share": rate,
        "verdict": verdict,
        "difference_cycles": 1.25,
        "break_even_rate_p50": 0.013 if ibpb else 0.2,
        **quantiles("round_trip_saving_cycles", middle - 90, middle, middle + 300),
    }


PLACED = pd.DataFrame(
    [
        point("puller", 0.9, "costs"),
        point("between", 0.3, "unclear"),
        point("rarely", 0.0005, "saves"),
        point("enlightened", 0.0, "no difference", evmcs=True),
        point("puller", 0.9, "costs", ibpb=True),
        point("rarely", 0.0005, "saves", ibpb=True),
    ]
)
EXECUTED = pd.DataFrame(
    [
        point(run, rate, verdict, ibpb=ibpb, key="run")
        for ibpb in (False, True)
        for run, rate, verdict in (("booted", 0.44, "costs"), ("micro", 0.1, "unclear"))
    ]
)
LINE = pd.DataFrame(
    [
        {"ibpb": ibpb, "pulls_share": rate, **quantiles("round_trip_saving_cycles", *ends)}
        for ibpb, rate, ends in (
            (False, 0.0, (110, 200, 500)),
            (False, 1.0, (-1100, -800, -500)),
            (True, 0.0, (110, 200, 500)),
            (True, 1.0, (-21_000, -19_800, -10_000)),
        )
    ]
)


def title(plot):
    return " ".join(plot.figure.get_suptitle().split())


def marks(axes):
    return {
        (float(x), round(float(y), 6))
        for line in axes.lines
        if line.get_linestyle() == "None"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }


def check_shows_itself(plot):
    data, about = plot._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG")
    assert about["image/png"]["alt"] == plot.alt
    assert plot.alt.endswith(".")
    assert "nan" not in plot.alt.lower()
    assert title(plot) in plot.alt


def test_rates_over_the_cost_of_a_switch():
    before = CURVES.copy(deep=True), RATES.copy(deep=True)
    plot = plots.break_even_rates(CURVES, RATES, cpu="mine", placed=PLACED, executed=EXECUTED)
    pd.testing.assert_frame_equal(CURVES, before[0])
    pd.testing.assert_frame_equal(RATES, before[1])
    check_shows_itself(plot)
    axes = plot.figure.axes[0]
    drawn = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) == 3}
    assert set(drawn) == {"mine", "other", "bare (no price of vmptrld)"}
    np.testing.assert_allclose(drawn["other"].get_ydata(), [50, 6, 0.8])
    # Hosts at their own cost; those without a price have no place.
    assert {(330.0, 20.0), (9000.0, 1.3)} <= marks(axes)
    (band,) = axes.collections[:1]
    ends = band.get_paths()[0].vertices[:, 1]
    assert (ends.min(), ends.max()) == (pytest.approx(0.2), pytest.approx(32.5))
    levels = {y for _, y in marks(axes) if _ == 1.0}
    assert levels == {90.0, 30.0}  # per cent; what never pulls has no place on the axis
    named = " ".join(label.get_text() for label in plot.figure.axes[1].get_yticklabels())
    assert "44.0 % booted" in named
    assert "10.0 % micro" in named
    assert "after 20.0 % of the exits, and after 1.3 % where" in title(plot)
    assert "2 of 4 mixes pull after 0.1 % or more" in plot.alt
    assert "cycles" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        (RATES[~RATES["ibpb"]], "20.0 % of the exits; an IBPB has no price there"),
        (pd.concat([RATES[:1], RATES[:1].assign(ibpb=True)]), "with IBPB or without"),
        (RATES[RATES["cpu"] == "bare"].assign(cpu="mine"), "no price of a whole pull"),
    ],
)
def test_the_title_says_what_there_is(rates, said):
    plot = plots.break_even_rates(CURVES, rates.reset_index(drop=True), cpu="mine")
    assert said in title(plot)
    assert title(plot) in plot.alt


@pytest.mark.parametrize(
    ("ibpb", "said", "mixes"),
    [
        (False, "2 of 3 mixes and 1 of 2 executed runs are beyond break-even, a", (90, 30, 0.05)),
        (True, "1 of 2 mixes and 2 of 2 executed runs are beyond break-even with IBPB", (90, 0.05)),
    ],
)
def test_saving_over_rate(ibpb, said, mixes):
    plot = plots.saving_over_rate(LINE, PLACED, EXECUTED, ibpb=ibpb)
    if not ibpb:
        check_shows_itself(plot)
    axes = plot.figure.axes[0]
    slope = 20_000 if ibpb else 1000
    for rate in (*(m / 100 for m in mixes), 0.44, 0.1):
        assert (100 * rate, round(200 - slope * rate, 6)) in marks(axes)
    assert (0.0, 0.0) not in marks(axes), "an enlightened VMCS is not on the line"
    (line,) = (one for one in axes.lines if "formula" in one.get_label())
    assert list(line.get_ydata()) == [200, -19_800 if ibpb else -800]
    assert said in title(plot)
    assert "to within 1.2 cycles" in plot.alt
    assert "booted pulls after 44.0 %" in plot.alt
    labels = {text.get_text() for text in axes.texts}
    assert {"booted", "micro", "puller"} <= labels


def test_refuses_frames_that_say_nothing():
    with pytest.raises(LabError, match="no curve of this price list"):
        plots.break_even_rates(CURVES, RATES, cpu="unknown")
    with pytest.raises(LabError, match="no rows"):
        plots.saving_over_rate(LINE[~LINE["ibpb"]], PLACED, EXECUTED, ibpb=True)
    with pytest.raises(LabError, match="lacks columns"):
        plots.saving_over_rate(LINE, PLACED.drop(columns="verdict"), EXECUTED)


# -- sensitivity --------------------

OF = {"mix": "cpuid", "kvm_before": "5.2", "kvm_after": "5.2+patch13", "cpu": "mine"}


def moved(label, low, high, ends, unit="TSC cycles", middle=100.0):
    return {
        "label": label,
        "basis": "assumed",
        "unit": unit,
        "p05": low,
        "p95": high,
        "saving_at_p05_cycles": ends[0],
        "saving_at_p50_cycles": middle,
        "saving_at_p95_cycles": ends[1],
        "swing_cycles": abs(ends[1] - ends[0]),
        **OF,
    }


TORNADO = pd.DataFrame(
    [
        moved("cpi", 0.5, 1.5, (110.0, 95.0)),
        moved("vmread_next", 3.0, 17.0, (20.0, 520.0)),
        moved("pull rate", 0.01, 0.3, (180.0, -40.0), unit="share of exits"),
    ],
    index=[2, 2, 2],
)


def test_tornado_draws_each_end_from_the_median():
    plot = plots.tornado(TORNADO)
    check_shows_itself(plot)
    axes = plot.figure.axes[0]
    ends = [
        (round(bar.get_y() + bar.get_height() / 2), bar.get_x(), bar.get_x() + bar.get_width())
        for bar in axes.patches
    ]
    assert ends == [
        *((0, 100, 20), (0, 100, 520), (1, 100, 180), (1, 100, -40), (2, 100, 110), (2, 100, 95)),
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        *("vmread_next (assumed)", "pull rate (assumed)", "cpi (assumed)"),
    ]
    assert {"3", "17", "1.0 %", "30.0 %", "0.5", "1.5"} == {t.get_text() for t in axes.texts}
    assert "from 20 to 520 cycles of saving: vmread_next" in title(plot)
    assert "pull rate alone turns it into a loss or back" in title(plot)
    steady = plots.tornado(TORNADO[TORNADO["label"] != "pull rate"])
    assert "no input alone changes its sign" in title(steady)


def index(label, first, total):
    near = {"first": first, "total": total}
    ends = {f"{k}_{e}": v + d for k, v in near.items() for e, d in (("low", -0.02), ("high", 0.02))}
    return {"label": label, "basis": "published", **near, **ends, **OF}


SOBOL = pd.DataFrame([index("cpi", -0.001, 0.05), index("vmread_next", 0.7, 0.8)])


def test_sobol_draws_both_indices():
    plot = plots.sobol(SOBOL)
    assert title(plot) in plot.alt
    axes = plot.figure.axes[0]
    widths = [round(float(bar.get_width()), 6) for bar in axes.patches]
    assert widths == [70.0, 80.0, -0.1, 5.0]
    assert f"{share(0.7)} of the variance" in title(plot)
    assert "cpi (published): alone 0 %" in plot.alt


@pytest.mark.parametrize(("draw", "frame"), [(plots.tornado, TORNADO), (plots.sobol, SOBOL)])
def test_one_comparison_at_a_time(draw, frame):
    with pytest.raises(LabError, match="several comparisons"):
        draw(pd.concat([frame, frame.assign(mix="vmcall")]))
    with pytest.raises(LabError, match="no rows"):
        draw(frame[:0])
