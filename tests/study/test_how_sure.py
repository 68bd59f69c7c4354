"""Claims against fits: verdicts by hand, and texts that say what the numbers say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nvmx_lab import plots
from nvmx_lab.costs import calibration
from nvmx_lab.costs.claims import claims
from nvmx_lab.costs.prices import PRICED_AS
from nvmx_lab.errors import LabError
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.study import how_sure
from nvmx_lab.study import how_sure_narrative as narrative


@pytest.fixture(scope="module")
def fits():
    return how_sure.fits(seed=1, steps=150)


@pytest.fixture(scope="module")
def judged(fits):
    return how_sure.against_claims(fits)


@pytest.fixture(scope="module")
def priced(fits):
    return how_sure.calibrated_prices(fits)


INDICES = pd.DataFrame({"input": ["vmread_next", "cpi"], "total": [0.9, 0.05]})


def test_every_claim_is_held_against_every_fit(judged):
    assert len(judged) == len(claims()) * len(calibration.FITS)
    assert not judged.duplicated(["fit", "claim"]).any()
    used = judged[judged["used"]]
    assert set(used["role"]) <= {"fit", "target"}
    assert set(judged[(judged["fit"] == "blind") & (judged["claim"] == "A")]["used"]) == {False}
    nothing = judged[judged["verdict"] == "no prediction"]
    assert set(nothing["claim"]) == {"J", "M", "P"}
    assert nothing["note"].str.len().gt(0).all()


def test_verdicts_follow_from_the_interval(judged):
    told = judged[judged["verdict"].isin(narrative.TESTED)]
    low = told["low_cycles"] <= told["stated_cycles"]
    inside = (low | told["at_least"]) & (told["stated_cycles"] <= told["high_cycles"])
    assert (inside == told["verdict"].str.startswith("inside")).all()
    assert (told["cycles_p05"] <= told["cycles_p50"]).all()
    with_error = told[told["sd_cycles"] > 0]
    wider = with_error["high_cycles"] - with_error["low_cycles"]
    assert (wider > with_error["cycles_p95"] - with_error["cycles_p05"]).all()


def test_a_claim_on_prices_that_no_claim_is_about_tests_no_fit(judged):
    alone = judged[judged["verdict"] == "prior alone"]
    assert set(alone["claim"]) == {"D2", "K"}
    for _, some in alone.groupby("claim"):  # each fit says the same of it
        assert np.ptp(some["cycles_p50"]) < 0.01 * some["cycles_p50"].min()


def test_what_a_dearer_or_cheaper_next_would_mend(fits, judged):
    """By hand: all counts of the claim at drawn prices, VMREADs behind another left out."""
    rows = judged[judged["fit"] == "with-claim"].set_index("claim")
    posterior = fits["with-claim"].posterior
    drawn = posterior.sample(20_000, 4)
    for name in ("L", "Q", "O"):
        counts = dict(zip(PRIMITIVES, claims()[name].counts, strict=True))
        software = counts.pop("l0_instructions", 0) + counts.pop("l1_instructions", 0)
        if claims()[name].basis == "simulated":
            software -= sum(
                n * posterior.parameters[PRICED_AS[p]].includes_instructions
                for p, n in counts.items()
                if n
            )
        nexts = counts.pop("vmread_next")
        total = software * drawn["cpi"]
        total += sum(n * drawn[PRICED_AS[p]] for p, n in counts.items() if n)
        included = posterior.parameters["vmread_next"].includes_instructions * drawn["cpi"]
        total += nexts * np.minimum(included, drawn["vmread_next"])
        low, middle, high = np.quantile(total, (0.05, 0.5, 0.95))
        assert rows.loc[name, "free_cycles_p50"] == pytest.approx(middle, rel=0.02)
        assert rows.loc[name, "free_cycles_p05"] == pytest.approx(low, rel=0.05)
        assert rows.loc[name, "free_cycles_p95"] == pytest.approx(high, rel=0.05)
    assert rows.loc[["L", "O", "O2", "Q"], "mended_by_next"].tolist() == [False, True, True, False]
    assert rows.loc["F", "mended_by_next"] is None


def test_the_interval_is_that_of_a_naive_draw(fits, judged):
    """The prediction of claim E is the price of one VMREAD; its interval has the error too."""
    row = judged[(judged["fit"] == "blind") & (judged["claim"] == "E")].iloc[0]
    posterior = fits["blind"].posterior
    first = posterior.samples[:, posterior.sampled.index("vmread_first")]
    rng = np.random.default_rng(5)
    seen = rng.choice(first, 50_000) + 7 * rng.standard_normal(50_000)
    low, high = np.quantile(seen, (0.05, 0.95))
    assert (row["low_cycles"], row["high_cycles"]) == pytest.approx((low, high), rel=0.06)


def test_what_the_kit_has_to_show(judged, priced):
    """The findings that the README and the notebook speak of; whoever changes them looks again."""
    by = judged.set_index(["fit", "claim"])["verdict"]
    assert by["blind", "A"] != "outside"
    assert by["with-claim", "O"] == by["with-claim", "L"] == by["with-claim", "Q"] == "outside"
    assert {by["one-constant", claim] for claim in "EFGH"} == {"outside"}
    price = priced.set_index(["fit", "parameter"])["cycles_p50"]
    assert price["with-claim", "vmread_next"] < price["blind", "vmread_next"]
    assert price["blind", "vmread_next"] < price["blind", "vmread_first"]
    per_vmread = {name: claims()[name].cycles / n for name, n in (("A", 35), ("O", 256))}
    assert price["blind", "vmread_next"] > per_vmread["A"]  # notebook 09 says so
    assert 2.5 < per_vmread["O"] / per_vmread["A"] < 3.5  # notebook 04: about three times


def test_the_saving_with_the_posterior_is_the_prediction_of_the_claim(fits, judged):
    saving = how_sure.savings(fits, exits=2_000).set_index("prices")
    row = judged[(judged["fit"] == "blind") & (judged["claim"] == "A")].iloc[0]
    assert saving.loc["fit: blind", "exit_leg_cycles_p50"] == pytest.approx(
        row["cycles_p50"], rel=0.02
    )
    assert list(saving["rests_on_the_claim"]) == [False, True, True, True, False]
    for fit in fits:  # one rule, wherever the claim is held against a fit
        row = judged[(judged["fit"] == fit) & (judged["claim"] == "A")].iloc[0]
        assert saving.loc[f"fit: {fit}", "meets_the_claim"] == (row["verdict"] != "outside")
    missing = saving.assign(meets_the_claim=False).reset_index()
    assert "misses it" in narrative.savings(missing).iloc[1, 1]


def test_nothing_to_hold_against_is_refused():
    with pytest.raises(LabError, match="nothing"):
        how_sure.against_claims({})


def test_the_texts_say_what_the_frames_say(fits, judged, priced):
    said = narrative.answer(fits, judged, priced, INDICES)
    row = judged[(judged["fit"] == "blind") & (judged["claim"] == "A")].iloc[0]
    assert f"{row['cycles_p50']:,.0f}" in said
    tested = judged[
        (judged["fit"] == "with-claim") & ~judged["used"] & judged["verdict"].isin(narrative.TESTED)
    ]
    outside = list(tested[tested["verdict"] == "outside"]["claim"])
    assert f"Of {len(tested)} claims held out" in said
    assert f"{len(outside)} contradict** ({', '.join(outside[:-1])} and {outside[-1]})" in said
    assert all(f"{claim} is predicted" in said for claim in outside)
    assert "has not converged" in said  # 150 steps are few
    assert "`vmread_next`" in said
    assert "D2 and K say nothing of it" in said
    assert "what L and Q contradict is something else" in said
    bare = how_sure.bare_next(fits["with-claim"].posterior)
    assert f"More than {np.quantile(bare, 0.95):.0f} would contradict the claim" in said
    assert "**O**" in narrative.of_contradictions(judged)
    assert "fails" in narrative.of_one_constant(judged)
    same = judged.assign(fit=judged["fit"].replace("one-constant", "x"))
    twins = pd.concat([same, judged[judged["fit"] == "with-claim"].assign(fit="one-constant")])
    assert "does no worse" in narrative.of_one_constant(twins)
    held = narrative.held_out(judged, "blind")
    assert set(held.index) == set(judged[(judged["fit"] == "blind") & ~judged["used"]]["claim"])
    assert "at least 600" in held.loc["D2", "stated"]
    table = narrative.price_table(priced)
    assert "A B" in set(table["claims about it"])
    assert set(narrative.convergence(fits)["converged"]) == {"no"}
    assert "nothing here predicts J, M and P" in narrative.of_claims()
    assert "200" in narrative.about()


def test_figures_draw_the_frames(judged, priced):
    drawn = plots.prices(priced)
    (axes,) = drawn.figure.axes
    assert len([line for line in axes.lines if len(line.get_xdata()) == 2]) == len(priced)
    against = plots.against_claims(judged)
    told = judged[judged["verdict"] != "no prediction"]
    (axes,) = against.figure.axes
    labels = [label.get_text().split()[0] for label in axes.get_yticklabels()]
    assert sorted(labels) == sorted(set(told["claim"]))
    assert labels[0] == "A"
    middle = {
        round(float(x), 6)
        for line in axes.lines
        for x in line.get_xdata()
        if line.get_marker() not in ("None", None, "")
    }
    assert {round(float(v), 6) for v in told["times_stated"]} <= middle
    outside = told[(told["fit"] == "with-claim") & ~told["used"] & (told["verdict"] == "outside")]
    title = against.figure.get_suptitle().replace("\n", " ")
    assert f"{len(outside)} of 10 with it" in title
    assert all(f"claim {claim} (" in against.alt for claim in labels)
    with pytest.raises(LabError):
        plots.prices(priced.drop(columns="fit"))
    with pytest.raises(LabError):
        plots.against_claims(judged[judged["verdict"] == "no prediction"])
