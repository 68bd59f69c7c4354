"""How many boots: analytic power against simulation, and against twins made another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from nvmx_lab import data
from nvmx_lab.errors import LabError
from nvmx_lab.study import measuring, power, power_narrative

DESIGNS = [None, 0.0, 0.5, 0.9]


def naive_power(saving, sd, runs, correlation):
    """Integrate the t test's rejection probability over what the sample variance may be."""
    if correlation is None:
        freedom, error = 2 * runs - 2, sd * math.sqrt(2 / runs)
    else:
        freedom, error = runs - 1, sd * math.sqrt(2 * (1 - correlation) / runs)
    limit, shift = stats.t.ppf(0.975, freedom), saving / error

    def rejected(u):
        s = math.sqrt(stats.chi2.ppf(u, freedom) / freedom)
        return stats.norm.sf(limit * s - shift) + stats.norm.cdf(-limit * s - shift)

    return integrate.quad(rejected, 0, 1, limit=200)[0]


@pytest.mark.parametrize("correlation", DESIGNS)
@pytest.mark.parametrize(("saving", "sd", "runs"), [(200, 140, 12), (200, 644, 40), (50, 140, 2)])
def test_power_is_that_of_a_naive_twin_and_of_simulation(saving, sd, runs, correlation):
    found = power.power(saving, sd, runs, correlation)
    assert found == pytest.approx(naive_power(saving, sd, runs, correlation), abs=2e-3)
    trials = 10_000
    drawn = power.simulated_power(saving, sd, runs, correlation, trials=trials)
    assert abs(drawn - found) < 4 * math.sqrt(found * (1 - found) / trials) + 1 / trials


def test_without_a_difference_the_test_rejects_as_often_as_it_says():
    for correlation in DESIGNS:
        rate = power.simulated_power(0.0, 1.0, 5, correlation, trials=10_000)
        assert abs(rate - power.ALPHA) < 4 * math.sqrt(0.05 * 0.95 / 10_000)


@settings(max_examples=20)
@given(
    saving=st.floats(1, 1e4),
    sd=st.floats(1, 1e3),
    wanted=st.floats(0.5, 0.99),
    correlation=st.sampled_from(DESIGNS),
)
def test_runs_needed_are_enough_and_no_run_too_many(saving, sd, wanted, correlation):
    runs = power.runs_needed(saving, sd, wanted, correlation)
    assert power.power(saving, sd, runs, correlation) >= wanted
    if runs > 2:
        assert power.power(saving, sd, runs - 1, correlation) < wanted
        # And the other way round: what so many runs detect is at most the saving.
        assert power.detectable(runs, sd, wanted, correlation) <= saving * (1 + 1e-6)
        assert power.detectable(runs - 1, sd, wanted, correlation) >= saving * (1 - 1e-6)


@settings(max_examples=30)
@given(effect=st.floats(0.01, 1e6), runs=st.integers(2, 200), correlation=st.sampled_from(DESIGNS))
def test_power_is_a_probability_even_for_huge_effects(effect, runs, correlation):
    found = power.power(effect, 1.0, runs, correlation)
    assert 0 <= found <= 1 + 1e-12
    assert power.power(2 * effect, 1.0, runs, correlation) >= found - 2e-3


def test_the_textbook_number():
    # Cohen's table: effect 0.5, two-sided 5 %, power 0.8 takes 64 in each group.
    assert power.runs_needed(0.5, 1.0, 0.8) == 64
    assert power.runs_needed(0.5, 1.0, 0.8, 0.5) == 34  # one-sample t test, effect 0.5


def test_two_levels_agree_with_simulated_boots():
    rng = np.random.default_rng(1)
    noise = power.Noise.of_run(10.0, 0.3)
    assert math.hypot(noise.between, noise.within) == pytest.approx(10)
    boots = noise.between * rng.standard_normal((20_000, 1))
    means = (boots + noise.within * rng.standard_normal((20_000, 25))).mean(axis=1)
    assert means.std() == pytest.approx(noise.of_boot(25), rel=0.02)
    assert noise.of_boot(10**9) == pytest.approx(noise.between)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_false_alarms_agree_with_simulation(share):
    rng = np.random.default_rng(2)
    noise, repeats, trials = power.Noise.of_run(1.0, share), 20, 10_000
    sides = [
        noise.between * rng.standard_normal((trials, 1))
        + noise.within * rng.standard_normal((trials, repeats))
        for _ in range(2)
    ]
    rejected = stats.ttest_ind(*sides, axis=1).pvalue < power.ALPHA
    found = power.false_alarm(share, repeats)
    assert abs(rejected.mean() - found) < 4 * math.sqrt(found * (1 - found) / trials)
    assert (share > 0) or found == pytest.approx(power.ALPHA)


def test_tables_rest_on_the_published_numbers():
    published = {
        row["condition"]: float(row["run_to_run_percent"])
        for row in data.read_rows("repeatability.csv")
    }
    assert published == {"pinned": 1.0, "unpinned": 4.6}  # typed again from the source
    needed = power.needed(14_000, 200, 0.9)
    assert dict(zip(needed["condition"], needed["sd_cycles"], strict=True)) == pytest.approx(
        {"pinned": 140.0, "unpinned": 644.0}
    )
    assert (needed["power"] >= 0.9).all()
    assert (needed["power_simulated"] - needed["power"]).abs().max() < 0.01
    runs = needed.set_index(["condition", "design", "correlation"])["runs"].sort_index()
    # The normal approximation, 2 (z_a + z_b)^2 / d^2, is one or two runs short.
    rough = 2 * (stats.norm.ppf(0.975) + stats.norm.ppf(0.9)) ** 2 / (200 / 644) ** 2
    assert rough < runs["unpinned", "unpaired"].iloc[0] < rough + 3
    assert runs["unpinned", "paired", 0.5] == pytest.approx(rough / 2, abs=3)
    split = power.boots(14_000, 200, 0.9)
    one = split[split["repeats"] == 1]
    assert set(one["boots"]) == {12, 219}
    assert (split["boots"] <= split.groupby("condition")["boots"].transform("max")).all()
    # So many runs that drawing them would take minutes: no number, and no error.
    many = power.needed(14_000, 0.5, 0.9)
    assert many["power_simulated"].isna().all()
    assert "too many" in str(power_narrative.needed(many))


def test_another_seed_moves_the_simulated_power_little():
    one, other = (power.needed(14_000, 200, 0.9, seed=seed) for seed in (1, 2))
    assert list(one["runs"]) == list(other["runs"])
    assert ((one["power_simulated"] / other["power_simulated"] - 1).abs() < 0.02).all()
    assert power.simulated_power(1, 1, 5) == power.simulated_power(1, 1, 5)


def test_the_open_question_is_that_of_the_claims():
    asked = power.open_question()
    assert asked["in_run_cycles"] == pytest.approx(200 / 35)
    assert (asked["alone_low"], asked["alone_high"], asked["claims"]) == (15, 30, 3)
    micro = power.microbenchmark(0.9)
    assert set(micro["loop_cycles"]) == {200.0, power.bare_run("skylake-2015-blind", 35)}
    full = power.needed(14_000, 200, 0.9)
    assert micro["runs"].max() < full["runs"].min()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: power.needed(100, 200, 0.9), "the saving exceeds the loop"),
        (lambda: power.curves(100, math.nan, 0.9), "saving_cycles: not above 0"),
        (lambda: power.boots(math.inf, 1, 0.9), "loop_cycles: not above 0"),
        (lambda: power.power(1, 1, 1), "too few runs"),
        (lambda: power.power(1, 1, 5, 1.0), "not a correlation"),
        (lambda: power.runs_needed(1, 1, 1.0), "not a power"),
        (lambda: power.runs_needed(1e-9, 1, 0.9), "hopeless"),
        (lambda: power.Noise.of_run(1, 1.5), "not a share"),
        (lambda: power.Noise(1, 1).of_boot(0), "no repeats"),
        (lambda: power.false_alarm(0.5, 1), "too few repeats"),
    ],
)
def test_nonsense_is_refused(call, said):
    with pytest.raises(LabError, match=said):
        call()


def test_the_example_is_recovered_and_marked_as_simulated():
    frame = measuring.recovered()
    assert set(frame["basis"]) == {"simulated"}
    assert frame["known_cycles"].notna().all()
    assert (frame["error_percent"].abs() < 2).all()
    assert f"Of {len(frame)} known prices" in power_narrative.of_recovered(frame)


@pytest.mark.parametrize(("loop", "saving"), [(14_000, 200), (500, 400), (14_000, 1)])
def test_the_answer_follows_the_numbers(loop, saving):
    needed = power.needed(loop, saving, 0.9)
    said = power_narrative.answer(needed, power.false_alarms(), power.microbenchmark(0.9))
    unpaired = needed[needed["design"] == "unpaired"].set_index("condition")["runs"]
    for condition, runs in unpaired.items():
        assert f"{condition.capitalize()}: {runs:,} boots of each kernel" in said
    verdicts = {200: "Yes, with care.", 400: "Yes, easily.", 1: "No, not by timing"}
    assert said.startswith(f"**{verdicts[saving]}")
