"""Calibration: recovers what it is given, and agrees with another way to find the posterior."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest

from nvmx_lab.costs import calibration, claims, prices
from nvmx_lab.errors import LabError
from nvmx_lab.nested.primitives import PRIMITIVES

BLIND = calibration.fitted_claims("blind")


def simulated(seed, chosen=BLIND):
    """Return true prices drawn from the prior, and the claims that they would have led to."""
    believed = calibration.prior()
    truth = {name: float(v[0]) for name, v in believed.sample(1, seed).items()}
    cycles = calibration.weights(chosen, believed) @ np.array(list(truth.values()))
    noise = np.random.default_rng(seed).standard_normal(len(chosen))
    stated = cycles + noise * [c.sd for c in chosen]
    return truth, [replace(c, cycles=float(s)) for c, s in zip(chosen, stated, strict=True)]


@pytest.mark.slow
def test_known_prices_are_recovered_as_often_as_an_interval_promises():
    """Coverage of the 90 % intervals over repeated draws, as the prior has it."""
    inside = []
    for seed in range(40):
        truth, stated = simulated(seed)
        posterior = calibration.calibrate("blind", claims=stated, seed=seed, steps=120).posterior
        for column, name in enumerate(posterior.sampled):
            low, high = np.quantile(posterior.samples[:, column], (0.05, 0.95))
            inside.append(low <= truth[name] <= high)
    assert 0.85 <= np.mean(inside) <= 0.95


def test_the_sampler_agrees_with_importance_sampling():
    """The same posterior without emcee: prior draws, weighed by the likelihood."""
    found = calibration.calibrate("with-claim", steps=500)
    believed = calibration.prior()
    drawn = believed.sample(400_000, 7)
    chosen = calibration.fitted_claims("with-claim")
    predicted = calibration.weights(chosen, believed) @ np.array(list(drawn.values()))
    weight = np.ones(400_000)
    for row, claim in zip(predicted, chosen, strict=True):
        weight *= np.exp(-(((row - claim.cycles) / claim.sd) ** 2) / 2)
    for name in found.posterior.sampled:
        order = np.argsort(drawn[name])
        share = np.cumsum(weight[order]) / weight.sum()
        want = [drawn[name][order][np.searchsorted(share, q)] for q in (0.05, 0.5, 0.95)]
        price = found.posterior.parameters[name]
        assert [price.p05, price.p50, price.p95] == pytest.approx(want, rel=0.05), name


def test_another_seed_moves_no_median_by_more_than_two_per_cent():
    one, other = (calibration.calibrate("with-claim", seed=seed, steps=1_200) for seed in (1, 2))
    assert one.convergence.ok
    for name in one.posterior.sampled:
        medians = [c.posterior.parameters[name].p50 for c in (one, other)]
        assert medians[0] == pytest.approx(medians[1], rel=0.02), name


def test_a_short_chain_says_that_it_is_short():
    assert not calibration.calibrate("blind", steps=100).convergence.ok


def test_no_claim_leaves_the_prior_as_it_was():
    far = [replace(claim, sd=1e9) for claim in BLIND]
    found = calibration.calibrate("blind", claims=far, steps=400)
    drawn = found.prior.sample(20_000, 3)
    for name in found.posterior.sampled:
        before = np.quantile(drawn[name], 0.5)
        assert found.posterior.parameters[name].p50 == pytest.approx(before, rel=0.05), name


def test_one_constant_makes_first_and_next_the_same():
    posterior = calibration.calibrate("one-constant", steps=100).posterior
    drawn = posterior.sample(100, 1)
    assert (drawn["vmread_first"] == drawn["vmread_next"]).all()
    assert (drawn["vmwrite_first"] == drawn["vmwrite_next"]).all()


def test_the_prior_rests_on_no_claim_that_is_fitted_or_held_out():
    tested = {c.id for c in claims.claims().values() if c.cycles == c.cycles}
    assert not tested & set(calibration.prior().claims)


def test_weights_are_what_pricing_charges():
    """A claim's prediction is the price of its counts, by the other way to price them."""
    from nvmx_lab.costs.pricing import price

    believed = calibration.prior()
    for claim in claims.claims().values():
        if claim.basis != "simulated":
            continue
        (mine,) = calibration.predict([claim], believed, 50, 4)
        assert mine == pytest.approx(price(claim.counts, believed.draw(50, 4)).values), claim.id


def test_typed_counts_cost_their_price():
    believed = calibration.prior()
    (mine,) = calibration.predict([claims.claim("F")], believed, 50, 4)
    assert mine == pytest.approx(believed.sample(50, 4)["vmread_first"])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("A", {"vmread_next": 36}),
        ("B", {"vmread_next": 2, "field_lookup": 2}),
        ("C1", {"field_lookup": 23}),
        ("C2", {"field_lookup": 34}),
        ("D", {"vmwrite_first": 2}),
        ("E", {"vmread_first": 1}),
        ("I", {"host_state_switch": 2}),
        ("K", {"ibpb": 2}),
        ("Q", {"vmread_next": 9, "field_lookup": 9}),
        ("O", {"vmread_first": 1, "vmread_next": 255}),
    ],
)
def test_counts_are_those_that_the_claim_names(name, want):
    """Typed anew from the claims' texts, but for the software around."""
    counts = dict(zip(PRIMITIVES, claims.claim(name).counts, strict=True))
    assert {k: v for k, v in counts.items() if v and k != "l0_instructions"} == want


def test_counts_of_a_claim_lie_in_the_range_that_it_gives():
    from nvmx_lab import data

    for row in data.read_rows("claims.csv"):
        counts = claims.claim(row["id"]).counts
        if counts is None:
            continue
        by = dict(zip(PRIMITIVES, counts, strict=True))
        for kind in ("vmread", "vmwrite"):
            low, high = row[f"{kind}_low"], row[f"{kind}_high"] or row[f"{kind}_low"]
            if low and row["id"] != "L":  # L: "40 and more"
                assert float(low) <= by[f"{kind}_first"] + by[f"{kind}_next"] <= float(high), row


@pytest.mark.parametrize(
    ("change", "what"),
    [({"counts": None, "basis": ""}, "predicts"), ({"sd": float("nan")}, "an error")],
)
def test_a_claim_that_cannot_be_fitted_is_refused(change, what):
    with pytest.raises(LabError, match=what):
        calibration.calibrate("blind", claims=[replace(BLIND[0], **change)], steps=100)


def test_absurd_arguments_are_refused():
    with pytest.raises(LabError, match="did you mean 'blind'"):
        calibration.calibrate("blid")
    with pytest.raises(LabError, match="seed"):
        calibration.calibrate(seed=-1)
    with pytest.raises(LabError, match="steps"):
        calibration.calibrate(steps=3)
    with pytest.raises(LabError, match="claim"):
        claims.claim("Z")
    believed = calibration.prior()
    without = {n: p for n, p in believed.parameters.items() if n != "field_lookup"}
    with pytest.raises(LabError, match="field_lookup"):
        calibration.weights(BLIND, replace(believed, parameters=MappingProxyType(without)))


@pytest.fixture(scope="module")
def posterior(tmp_path_factory):
    found = calibration.calibrate("with-claim", steps=200)
    path = tmp_path_factory.mktemp("posterior") / "posterior.parquet"
    calibration.save(found, path, seed=1)
    return found.posterior, path


def test_a_posterior_can_be_read_back_and_draws_the_same(posterior):
    made, path = posterior
    read = prices.load(path)
    assert (read.id, read.digest, read.parameters) == (made.id, made.digest, made.parameters)
    assert np.array_equal(read.draw(500, 3).cycles, made.draw(500, 3).cycles)
    assert set(read.about["inputs"]) >= {"claims.csv", "calibration/prior.toml"}
    assert set(read.about["claims"]) == {c.id for c in calibration.fitted_claims("with-claim")}


def test_a_posterior_keeps_what_the_claims_say_of_sums():
    """Claim B is about a sum: where the VMREADs cost more, the instructions cost less."""
    drawn = calibration.calibrate("blind", steps=200).posterior.sample(10_000, 1)
    assert np.corrcoef(drawn["vmread_next"], drawn["cpi"])[0, 1] < -0.2


def test_a_posterior_prices_a_comparison(posterior):
    import nvmx_lab as nx

    saving = nx.compare("cpuid", cpu=posterior[1], exits=500).saving["exit_leg_cycles"]
    assert saving["p05"] < 200 < saving["p95"]


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_what_is_no_posterior_is_refused(tmp_path, content):
    import pandas as pd

    path = tmp_path / "x.parquet"
    if content is None:
        pd.DataFrame({"vmread_first": [1.0]}).to_parquet(path)
    else:
        path.write_bytes(content)
    with pytest.raises(LabError, match=r"x\.parquet"):
        prices.load(path)
    with pytest.raises(LabError, match="no such file"):
        prices.load(tmp_path / "none.parquet")


def test_a_lower_bound_is_met_by_whatever_lies_above_it():
    predicted = np.array([[0.0, 50.0, 100.0, 1e4]])
    stated, sd = np.array([100.0]), np.array([10.0])
    bound = calibration.log_likelihood(predicted, stated, sd, np.array([True]))
    about = calibration.log_likelihood(predicted, stated, sd, np.array([False]))
    assert (np.diff(bound) > 0).all()
    assert bound[2:] == pytest.approx([np.log(0.5), 0.0])
    assert about == pytest.approx([-50.0, -12.5, 0.0, -0.5 * 990.0**2])
