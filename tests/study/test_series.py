"""The series patch by patch: steps against single comparisons, sums, and what texts claim."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import nvmx_lab as nx
from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import release
from nvmx_lab.study import published, series
from nvmx_lab.study import series_narrative as narrative
from nvmx_lab.workload import mixes

ONE, TWO = "cpuid", "self-ipi-sti-hlt"  # loops of one and of two exits an iteration
EXITS, DRAWS, SEED = 2_000, 4_000, 3
QUANTILES = ("p05", "p50", "p95")

# Typed once more from the messages of the series: feature -> cycles per nested round trip.
CLAIMED = {
    "patch07": (100, 100),
    "patch08": (55, 55),
    "patch09": (100, 2 * 100),
    "patch13": (200, 200),
    "patch20": (1000, 1000),
}


@pytest.fixture(scope="module")
def result():
    return series.waterfall([ONE, TWO], exits=EXITS, seed=SEED, draws=DRAWS)


def saving(mix, before, after, cpu="skylake-2015"):
    """Return the round trip's saving between two releases, on its own: the naive twin."""
    found = nx.compare(mix, kvm=[before, after], cpu=cpu, exits=EXITS, seed=SEED, draws=DRAWS)
    return [found.saving["round_trip_cycles"][q] for q in QUANTILES]


def quantiles(row, name="cycles"):
    return [row[f"{name}_{q}"] for q in QUANTILES]


def test_claims_are_as_published_and_add_up():
    found = {
        p.feature: (p.claimed_low, p.claimed_high)
        for p in series.patches()
        if p.claimed_low is not None
    }
    assert found == CLAIMED
    assert series.claims_sum() == (1455, 1555)
    numbers = {r["id"]: r["claimed_cycles"] for r in data.read_rows("claims.csv")}
    for patch in series.patches():
        whole = sum(float(numbers[name]) for name in patch.claims if numbers[name])
        assert whole == (patch.claimed_high or 0)


def test_the_features_are_those_between_the_releases(monkeypatch):
    assert [p.feature for p in series.modelled()] == [
        *("patch07", "patch08", "patch09", "patch13", "patch20", "patch21", "patch30"),
        *("patch37", "patch42", "patch43"),
    ]
    fewer = series.patches()[:-1]
    monkeypatch.setattr(series, "patches", lambda: fewer)
    with pytest.raises(LabError, match="features are not those"):
        series.modelled()


def test_a_feature_of_the_shadow_fields_is_switched_alone():
    rights = {"GUEST_CS_AR_BYTES", "GUEST_SS_AR_BYTES"}
    pin = {"PIN_BASED_VM_EXEC_CONTROL"}
    for base in ("5.2", "5.3"):
        sign = "+" if base == "5.2" else "-"
        before = release(base)
        eight, forty_three = (release(f"{base}{sign}patch{n}") for n in ("08", "43"))
        assert before.shadow_rw ^ eight.shadow_rw == before.shadow_ro ^ eight.shadow_ro == rights
        assert before.shadow_rw ^ forty_three.shadow_rw == pin
        assert before.shadow_ro == forty_three.shadow_ro
    assert release("5.3").shadow_rw == vmcs.shadow_rw("5.3")
    assert release("5.2").shadow_ro == vmcs.shadow_ro("5.2")


@pytest.mark.parametrize(("mix", "times"), [(ONE, 1), (TWO, 2)])
def test_steps_are_what_single_comparisons_give(result, mix, times):
    steps = result.of(mix).query("what == 'step'")
    names = list(steps["feature"])
    for k in (1, 3, len(names) - 1):
        row, before = steps.iloc[k], "".join(f"+{name}" for name in names[:k])
        name = names[k]
        for pair, column in (
            ((f"5.2{before}", f"5.2{before}+{name}"), "cycles"),
            (("5.2", f"5.2+{name}"), "alone_cycles"),
            ((f"5.3-{name}", "5.3"), "last_cycles"),
        ):
            alone = [times * value for value in saving(mix, *pair)]
            assert quantiles(row, column) == pytest.approx(alone, abs=1e-6), (name, column)
    # the first has nothing before it, the last nothing after it
    assert quantiles(steps.iloc[0]) == pytest.approx(quantiles(steps.iloc[0], "alone_cycles"))
    assert quantiles(steps.iloc[-1]) == pytest.approx(quantiles(steps.iloc[-1], "last_cycles"))


@pytest.mark.parametrize("mix", [ONE, TWO])
def test_the_parts_add_up(result, mix):
    rows = result.of(mix).set_index("what")
    steps = rows.loc["step"]
    total, left = rows.loc["simulated"], rows.loc["unexplained"]
    assert steps["cycles_mean"].sum() == pytest.approx(total["cycles_mean"])
    groups = rows.loc[["claimed steps", "other steps"], "cycles_mean"]
    assert groups.sum() == pytest.approx(total["cycles_mean"])
    ends = (steps["begin_cycles"] + steps["cycles_mean"]).to_numpy()
    assert ends[:-1] == pytest.approx(steps["begin_cycles"].to_numpy()[1:])
    assert ends[-1] == pytest.approx(left["begin_cycles"])
    measured = total["before_cycles"] - total["after_cycles"]
    assert left["begin_cycles"] + left["cycles_mean"] == pytest.approx(measured)
    assert [measured - v for v in quantiles(total)[::-1]] == pytest.approx(quantiles(left))
    of_feature = result.parts_of(mix).groupby("feature")
    means = steps.set_index("feature")["cycles_mean"]
    assert of_feature["cycles_mean"].sum()[means.index].to_numpy() == pytest.approx(
        means.to_numpy()
    )
    assert of_feature["share"].sum().to_numpy() == pytest.approx(1)


def test_the_whole_is_that_of_the_published_totals(result):
    loops = result.by_loop().set_index("mix")
    totals = published.against_published([ONE, TWO], exits=EXITS, seed=SEED, draws=DRAWS)
    for row in totals[totals["what"] == "saving"].to_dict("records"):
        own = loops.loc[row["mix"]]
        assert quantiles(own) == pytest.approx(quantiles(row), abs=1e-6)
        assert own["measured_cycles"] == row["published_cycles"]
        assert own["inside"] == row["inside"]
    known = [name for name in mixes.names() if mixes.load(name).published is not None]
    assert sorted(series.loops()) == known
    assert list(loops["claimed_low_cycles"]) == [1455, 2 * 1455]


def test_a_step_is_held_against_its_claim(result):
    for row in result.frame.query("what == 'step'").to_dict("records"):
        times = row["exits_per_iteration"]
        if row["feature"] not in CLAIMED:
            assert row["against_claim"] == ""
            assert np.isnan(row["claimed_low_cycles"])
            continue
        low, high = (times * bound for bound in CLAIMED[row["feature"]])
        assert (row["claimed_low_cycles"], row["claimed_high_cycles"]) == (low, high)
        overlap = low <= row["cycles_p95"] and row["cycles_p05"] <= high
        assert (row["against_claim"] == "within") == overlap
        if not overlap:
            assert row["against_claim"] == ("above" if row["cycles_p50"] > high else "below")


def test_circular_steps_are_those_whose_prices_rest_on_their_claim(result):
    def own(found):
        steps = found.of(ONE).query("what == 'step'").set_index("feature")
        return steps["own_claims"], steps["series_claims"]

    fitted, of_series = own(result)
    assert fitted["patch13"] == "A"
    assert fitted["patch20"] == "I"
    assert fitted["patch07"] == ""
    assert "A" in of_series["patch07"].split()  # the price of its VMREADs
    blind = series.waterfall([ONE], cpu="skylake-2015-blind", exits=300, draws=500)
    assert own(blind)[0]["patch13"] == ""
    assert "A" not in own(blind)[1]["patch07"].split()
    assert "In 9, 13, 20 and 42 prices rest" in narrative.of_claims(result, ONE)
    assert " 13, 20" not in narrative.of_claims(blind, ONE).rpartition("In ")[2]


def test_what_it_cannot_do_is_one_clear_error(result):
    with pytest.raises(LabError, match=r"no total of this mix.*allowed: cpuid"):
        series.waterfall(["pio-user-kstack"], exits=300)
    with pytest.raises(LabError, match="did you mean 'cpuid'"):
        series.waterfall(["cpuidd"], exits=300)
    for nothing in ("cpuid", []):
        with pytest.raises(LabError, match="needs a list"):
            series.waterfall(nothing, exits=300)
    with pytest.raises(LabError, match=r"price is unknown.*host_state_switch"):
        series.waterfall([ONE], cpu="netburst-2005", exits=300)
    with pytest.raises(LabError, match="unknown loop"):
        result.of("vmcall")


# ---- texts --------------------------------------------------------------------------------------


def moved(result, measured):
    """Return the result with another measured saving of the first loop."""
    frame = result.frame.copy()
    one = frame["mix"] == ONE
    frame.loc[one, "after_cycles"] = frame.loc[one, "before_cycles"] - measured
    names = [f"cycles_{q}" for q in ("mean", *QUANTILES)]
    frame.loc[one & (frame["what"] == "measured"), names] = measured
    total = frame[one & (frame["what"] == "simulated")].iloc[0]
    left = [measured - total[f"cycles_{q}"] for q in ("mean", "p95", "p50", "p05")]
    frame.loc[one & (frame["what"] == "unexplained"), names] = left
    return dataclasses.replace(result, frame=frame)


def plain(text):
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("measured", "said", "loops"),
    [
        (1744.0, "**The model saves more than was measured**", "below it on 2 and above it on 0"),
        (2500.0, "lies inside the interval", "inside the simulated interval on 1, below it on 1"),
        (9000.0, "**The model explains less than was measured**", "and above it on 1"),
    ],
)
def test_the_answer_says_on_which_side_the_measured_saving_is(result, measured, said, loops):
    text = plain(narrative.answer(moved(result, measured), ONE))
    assert said in text
    assert loops in text
    assert ("does not bridge the gap" in text) == (measured != 2500.0)
    assert "there it saves too much" in text if measured == 1744.0 else "too much" not in text
    assert ("there it saves too little" in text) == (measured == 9000.0)


def test_the_answer_leaves_no_room_where_the_claims_reach_what_was_measured(result):
    assert "The claims alone reach what was measured" in narrative.answer(moved(result, 900.0), ONE)


def test_texts_say_the_numbers_of_the_frame(result):
    rows = result.of(ONE)
    step = rows[rows["feature"] == "patch07"].iloc[0]
    middle = f"{step['cycles_p50']:,.0f}"
    assert step["against_claim"] == "above"
    assert f"**7**: simulated {middle} (90 % interval" in narrative.of_claims(result, ONE)
    assert f"7 ({middle} simulated, 100 claimed)" in narrative.answer(result, ONE)
    table = narrative.steps(result, ONE)
    assert list(table.index[-4:]) == ["all, simulated", "all claims", "measured", "not explained"]
    assert plain(table.loc["7", "saves, in series order"]).startswith(f"{middle} (")
    assert plain(table.loc["all claims", "claim"]) == "1,455 to 1,555"
    assert "**1,455 to 1,555 cycles**" in plain(narrative.of_sum(ONE))
    assert "leaves 189 to 289 cycles" in plain(narrative.of_sum(ONE))
    assert "**2,910 to 3,110 cycles**" in plain(narrative.of_sum(TWO))
    assert "31-38 and 42 need each other" in narrative.of_order(result, ONE)
    assert "nan" not in narrative.steps(result, ONE).to_string().lower()


def test_what_is_not_in_the_model_is_named_once():
    text = narrative.not_modelled()
    for patch in series.patches():
        numbers = f" {patch.patches} ({patch.subject})"
        assert (numbers in text) == (not patch.feature and patch.effect != "none"), patch
    assert "10, 11, 12, 14" in text
