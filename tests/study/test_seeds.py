"""Another seed: no median moves by more than 2 % or a cycle, and no verdict does."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nvmx_lab.notebook_parameters import BetterPolicies, KernelStackRandomization
from nvmx_lab.study import break_even, compare, kernel_stack, policy_gap, series

SEEDS = (1, 2, 3)
CPUS = ["skylake-2015", "skylake-2015-blind", "haswell-2013", "icelake-2021", "nehalem-2009"]
CYCLES, SHARE = 1.0, 0.005
"""What a median near zero may move by: the last digit that pages show."""


PULLS_AT_SOME = (
    *("cpuid", "linux-boot-nokstack", "xen-boot", "thread-churn", "kvm-5-2-l1-timer", "overcommit"),
    *("linux-boot-kstack", "xen-emulation", "16bit-firmware", "virtualbox-desktop"),
)
"""The other mixes pull after hardly any exit, or after nearly all: less is left to the draw."""


def compared(seed):
    return pd.DataFrame([compare.compare(mix, seed=seed).summary() for mix in PULLS_AT_SOME])


def series_of(seed):
    return series.waterfall(["cpuid", "inl-from-pmtimer"], seed=seed).frame


def break_even_rates(seed):
    return break_even.rates(["5.2+patch13", "5.3", "6.1"], cpu=CPUS, seed=seed)


def stack_saved(seed):
    runs = kernel_stack.run(exits=KernelStackRandomization().exits, seed=seed)
    return pd.concat(
        [
            kernel_stack.savings(runs, cpus=CPUS, seed=seed),
            kernel_stack.write_costs(runs, cpus=CPUS, seed=seed),
            kernel_stack.fixes(runs, cpus=CPUS, seed=seed),
        ]
    )


def policies(seed):
    hard = ("linux-boot-kstack", "xen-boot", "overcommit", "thread-churn", "cpuid")
    gaps = policy_gap.policy_gaps(mixes=hard, runs=(), exits=BetterPolicies().exits, seed=seed)
    return pd.concat([gaps.to_frame(), gaps.overall()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "frame",
    [compared, series_of, break_even_rates, stack_saved, policies],
    ids=lambda f: f.__name__,
)
def test_another_seed_moves_nothing_that_is_reported(frame):
    one, *others = [frame(seed) for seed in SEEDS]
    medians = [column for column in one if column.endswith("_p50")]
    assert medians
    for other in others:
        for column in medians:
            before, after = (np.array(f[column], np.float64) for f in (one, other))
            share = column.startswith(("closed", "share")) or "rate" in column
            floor = SHARE if share else CYCLES
            allowed = np.maximum(0.02 * np.abs(before), floor)
            moved = one[(np.abs(after - before) > allowed) | (np.isnan(before) != np.isnan(after))]
            assert moved.empty, (column, moved, after[moved.index])
        for verdict in {"verdict", "best"} & set(one):
            assert (one[verdict].fillna("") == other[verdict].fillna("")).all(), verdict
