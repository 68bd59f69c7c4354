"""The README's numbers are today's."""

import re
from pathlib import Path

import pandas as pd

from nvmx_lab.costs.calibration import calibrate
from nvmx_lab.study.how_sure import against_claims, calibrated_prices
from nvmx_lab.study.how_sure_narrative import answer
from nvmx_lab.study.published import against_published
from nvmx_lab.study.validate import validate
from nvmx_lab.workload import mixes

INDICES = pd.DataFrame({"input": ["vmread_next"], "total": [1.0]})
README = " ".join((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split())


def test_how_many_published_totals_lie_inside():
    frame = against_published(mixes.names(), exits=2_000)
    totals = frame[frame["what"] != "saving"]
    inside, of = map(int, re.search(r"(\d+) of the (\d+) lie", README).groups())
    assert (totals["inside"].sum(), len(totals)) == (inside, of)
    ratio = totals["cycles_p50"] / totals["published_cycles"]
    low, high = map(float, re.search(r"medians are ([\d.]+) to ([\d.]+) times", README).groups())
    to_user_space = totals["mix"].isin(["inl-from-qemu", "inl-from-pmtimer"])
    assert round(ratio[~to_user_space].min(), 1) == low
    assert round(ratio[~to_user_space].max(), 1) == high
    assert "half of what the two loops that go to QEMU take" in README
    assert (round(ratio[to_user_space], 1) == 0.5).all()


def test_how_far_the_executed_runs_agree():
    runs = validate()
    assert "agree at every exit" in README
    assert all(run.ok for run in runs)
    assert "VMREAD and VMWRITE at 99 % of the exits of the micro-guest runs and at 95 %" in README
    for run in runs:
        least = 0.95 if run.run.endswith(("linux_l2", "xen_l1")) else 0.99
        assert min(run.agreement[name].exact_share for name in ("vmread", "vmwrite")) >= least
        assert abs(run.agreement["instructions"].ratio - 1) < 0.02
    assert "agree within 2 % in total" in README


def test_what_the_claims_and_the_series_say():
    frame = against_published("cpuid")
    saving = frame[frame["what"] == "saving"].iloc[0]
    ends = (saving[f"cycles_{q}"] for q in ("p50", "p05", "p95"))
    low_to_high = "{:,.0f} ({:,.0f} to {:,.0f})".format(*ends)
    assert f"{saving['published_cycles']:,.0f} cycles measured, {low_to_high} simulated" in README
    assert not saving["inside"]
    calibrated = {fit: calibrate(fit, steps=200) for fit in ("blind", "with-claim")}
    claims = against_claims(calibrated)
    target = claims[(claims["fit"] == "blind") & (claims["claim"] == "A")].iloc[0]
    assert 1.5 < target["times_stated"] < 2.5  # "about twice as much"
    said = answer(calibrated, claims, calibrated_prices(calibrated), INDICES)
    held = re.search(r"Of (\d+ claims held out .* contradict)\*\*", said).group(1)
    assert held in README
    assert "of those 0 of 4 agree" in said  # "all that have a VMREAD behind another in them"
    of_fit = claims[claims["fit"] == "with-claim"]
    assert "and two of them whatever that VMREAD takes" in README
    assert (of_fit["mended_by_next"] == False).sum() == 2  # noqa: E712
