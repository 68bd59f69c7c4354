"""Policies side by side: the gap, the share of it, who is best; the example of a user."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

import nvmx_lab as nx
from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import price
from nvmx_lab.errors import LabError
from nvmx_lab.nested.policies import SYNC_POLICIES
from nvmx_lab.study import policy_gap, policy_narrative
from nvmx_lab.study.policy_gap import (
    ALWAYS,
    AT_ONCE,
    NEVER,
    NO_GAP_CYCLES,
    NOW_AND_THEN,
    OFTEN,
    POLICIES,
    PolicyGaps,
)
from nvmx_lab.study.simulate import P, config_of, simulate
from nvmx_lab.workload import mixes

MIXES = ("cpuid", "pio-user-kstack", "thread-churn", "xen-emulation", "kvm-evmcs")
RUN = "kvm61_lazy_shadow_nokstack"
DRAWS = 2_000


@pytest.fixture(scope="module")
def gaps() -> PolicyGaps:
    return policy_gap.policy_gaps(mixes=MIXES, runs=[RUN], exits=20_000, draws=DRAWS)


@pytest.fixture(scope="module")
def frame(gaps: PolicyGaps) -> pd.DataFrame:
    return gaps.to_frame()


def of(frame: pd.DataFrame, workload: str, policy: str) -> pd.Series:
    (row,) = (r for _, r in frame.iterrows() if (r["workload"], r["policy"]) == (workload, policy))
    return row


def test_every_workload_has_every_policy_and_lazy_is_the_line_of_zero(frame: pd.DataFrame) -> None:
    assert len(frame) == len(POLICIES) * (len(MIXES) + 1)
    lazy, oracle = (frame[frame["policy"] == name] for name in ("lazy", "oracle"))
    for q in ("p05", "p50", "p95"):
        assert (lazy[f"over_lazy_cycles_{q}"] == 0).all()
        assert (oracle[f"over_oracle_cycles_{q}"] == 0).all()
    closed = oracle["closed_p50"].dropna()
    np.testing.assert_allclose(closed.astype(float), 1)
    assert (lazy["closed_p50"].dropna() == 0).all()
    whole = frame[~frame["policy"].isin(policy_narrative.PARTIAL)]
    assert (whole["over_oracle_cycles_p05"] >= -1e-9).all(), "all or nothing: the oracle is least"


def test_groups_are_by_how_often_lazy_pulls(frame: pd.DataFrame) -> None:
    group = frame.drop_duplicates("workload").set_index("workload")["group"].to_dict()
    assert group == {
        "cpuid": NEVER,
        "pio-user-kstack": ALWAYS,
        "thread-churn": NOW_AND_THEN,
        "xen-emulation": OFTEN,
        "kvm-evmcs": AT_ONCE,
        RUN: NOW_AND_THEN,
    }


def test_no_share_is_given_where_there_is_no_gap(frame: pd.DataFrame) -> None:
    narrow = frame["gap_cycles_p50"] < NO_GAP_CYCLES
    assert set(frame.loc[narrow, "workload"]) == {"cpuid", "kvm-evmcs"}
    for q in ("p05", "p50", "p95"):
        assert (frame[f"closed_{q}"].isna() == narrow).all()


def test_shares_and_cycles_are_those_of_a_naive_computation(frame: pd.DataFrame) -> None:
    mix = mixes.load("xen-emulation")
    simulated = simulate(mix.stream(20_000, 1), [config_of(mix, "6.1", s) for s in POLICIES])
    drawn = prices.load(prices.DEFAULT).draw(DRAWS, 1)
    cycles = {s.config.sync: price(s.round_trip[:P] / 20_000, drawn).values for s in simulated}
    for policy in POLICIES:
        row = of(frame, "xen-emulation", policy)
        share = (cycles["lazy"] - cycles[policy]) / (cycles["lazy"] - cycles["oracle"])
        for q, point in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            over = np.quantile(cycles[policy] - cycles["lazy"], point)
            assert row[f"over_lazy_cycles_{q}"] == pytest.approx(over, abs=1e-6)
            assert row[f"closed_{q}"] == pytest.approx(np.quantile(share, point), abs=1e-6)


@pytest.mark.parametrize("policy", ["eager", "adaptive", "group-wise"])
def test_cycles_are_those_of_compare(frame: pd.DataFrame, policy: str) -> None:
    saving = nx.compare(
        "thread-churn", kvm=["6.1"], sync=[policy, "lazy"], exits=20_000, draws=DRAWS
    ).saving["round_trip_cycles"]
    row = of(frame, "thread-churn", policy)
    for q in ("p05", "p50", "p95"):
        assert row[f"over_lazy_cycles_{q}"] == pytest.approx(saving[q], abs=1e-6)


def test_the_best_is_the_lowest_of_those_that_do_not_know_the_future(frame: pd.DataFrame) -> None:
    for _, some in frame.groupby("workload"):
        able = some[some["policy"] != "oracle"]
        least = able["over_lazy_cycles_p50"].min()
        best = able["over_lazy_cycles_p50"] <= least + 0.5
        assert set(able.loc[best, "policy"]) == set(some.loc[some["best"], "policy"])


def test_overall_every_workload_weighs_the_same(gaps: PolicyGaps, frame: pd.DataFrame) -> None:
    overall = gaps.overall()
    row = of(overall[overall["group"] == "all"].assign(workload=overall["kind"]), "mix", "eager")
    drawn = prices.load(prices.DEFAULT).draw(DRAWS, 1)
    over, gap = np.zeros(DRAWS), np.zeros(DRAWS)
    for one in gaps.workloads:
        if one.kind == "mix":
            eager, lazy, oracle = (
                one.counts[POLICIES.index(n)] for n in ("eager", "lazy", "oracle")
            )
            over += price(eager - lazy, drawn).values / len(MIXES)
            gap += price(lazy - oracle, drawn).values / len(MIXES)
    assert row["over_lazy_cycles_p50"] == pytest.approx(np.median(over))
    assert row["closed_p50"] == pytest.approx(np.median(-over / gap))
    assert row["workloads"] == len(MIXES)


def test_learning_from_history_approaches_the_better_of_eager_and_lazy(
    frame: pd.DataFrame,
) -> None:
    for workload in ("cpuid", "pio-user-kstack", "thread-churn", RUN):
        better = min(of(frame, workload, "eager")["over_lazy_cycles_p50"], 0)
        assert of(frame, workload, "adaptive")["over_lazy_cycles_p50"] < better + 5
    # Where the reason tells, a counter for each reason beats one for all.
    by_reason, adaptive = (
        of(frame, "xen-emulation", name)["over_lazy_cycles_p50"]
        for name in ("by-reason", "adaptive")
    )
    assert by_reason < 2 * adaptive < 0


def test_only_guessing_has_the_assumed_cost(gaps: PolicyGaps, frame: pd.DataFrame) -> None:
    cost = frame.groupby("policy")["prediction_cycles_p50"].max()
    assert set(cost[cost > 0].index) == {"adaptive", "by-reason"}
    cpi = prices.load(prices.DEFAULT).parameters["cpi"]
    low, high = (policy_gap.PREDICTION_INSTRUCTIONS * end for end in (cpi.p05, cpi.p95))
    assert low < cost["adaptive"] < high
    assert "vmptrld" in gaps.assumed_prices()
    assert "vmread_first" not in gaps.assumed_prices()


def test_bad_names_are_refused() -> None:
    with pytest.raises(LabError, match="did you mean 'adaptive'"):
        policy_gap.policy_gaps(policies=["adaptiv"], mixes=["cpuid"], runs=[])
    with pytest.raises(LabError, match="nothing to simulate"):
        policy_gap.policy_gaps(mixes=[], runs=[])
    with pytest.raises(LabError, match="KVM release"):
        policy_gap.policy_gaps("6.2", mixes=["cpuid"], runs=[])


# -- the narrative -----------------------------------------------------------------------------


def test_the_answer_says_what_the_numbers_say(gaps: PolicyGaps, frame: pd.DataFrame) -> None:
    overall = gaps.overall()
    said = policy_narrative.answer(gaps, frame, overall)
    rows = overall[(overall["kind"] == "mix") & (overall["group"] == "all")]
    able = rows[~rows["policy"].isin(["lazy", "oracle"])]
    best = able.sort_values("over_lazy_cycles_p50").iloc[0]
    assert f"`{best['policy']}` takes {-best['over_lazy_cycles_p50']:.0f}" in said
    assert "Nobody has tried" in said
    assert "draws its exits one by one" in said


def test_no_better_policy_is_claimed_where_there_is_none() -> None:
    gaps = policy_gap.policy_gaps(mixes=["cpuid", "kvm-evmcs"], runs=[], exits=500, draws=300)
    said = policy_narrative.answer(gaps, gaps.to_frame(), gaps.overall())
    assert "**No better policy than lazy was found.**" in said
    assert "There is a better policy" not in said
    alone = policy_gap.policy_gaps(
        policies=["eager"], mixes=["pio-user-kstack"], runs=[], exits=500, draws=300
    )
    said = policy_narrative.answer(alone, alone.to_frame(), alone.overall())
    assert "`eager` takes" in said
    assert "No policy here guesses" in said


# -- the example of a user ---------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path) -> Iterator[ModuleType]:
    """Return the example as a user's own file, imported."""
    before = dict(SYNC_POLICIES)
    source = Path(policy_gap.__file__).with_name("example_policy.py").read_text(encoding="utf-8")
    file = tmp_path / "mine.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    SYNC_POLICIES.clear()
    SYNC_POLICIES.update(before)


def test_a_policy_of_a_user_is_under_25_lines_right_and_priced(mine: ModuleType) -> None:
    source = inspect.getsource(mine)
    assert len(source.splitlines()) < 25
    assert source.strip() in policy_narrative.source_of(mine)
    exploration = policy_gap.checked("6.1", "last-exit")
    assert exploration.complete
    assert exploration.ok
    assert "Nobody sees a wrong value" in policy_narrative.of_check(exploration)
    gaps = policy_gap.policy_gaps(
        policies=["last-exit"], mixes=["pio-user-kstack"], runs=[], exits=2_000, draws=300
    )
    row = of(gaps.to_frame(), "pio-user-kstack", "last-exit")
    assert 0.9 < row["closed_p50"] < 1
    # 2 % of the exits do not need the fields: each makes the next guess wrong too.
    assert row["pulls_share"] == pytest.approx(0.02, abs=0.01)


def test_a_check_on_a_release_with_faults_is_of_the_policy_alone() -> None:
    for kvm in ("5.3", "6.1", "6.1-migration-sync"):
        assert policy_gap.checked(kvm, "per-field").ok
