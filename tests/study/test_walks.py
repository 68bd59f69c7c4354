"""A predictor beside L0, word by word, is the predictor in L0: every count of it."""

from __future__ import annotations

import numpy as np
import pytest

from nvmx_lab.errors import LabError
from nvmx_lab.nested.automaton import count
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace
from nvmx_lab.nested.policies import SYNC_POLICIES, Predictor, register
from nvmx_lab.nested.primitives import COUNTERS
from nvmx_lab.study import walks
from nvmx_lab.study.simulate import config_of, simulate
from nvmx_lab.workload import executed, mixes
from nvmx_lab.workload.streams import Stream

PREDICTORS = [name for name, policy in SYNC_POLICIES.items() if issubclass(policy, Predictor)]


def naive(config: Config, stream: Stream) -> tuple[np.ndarray, int]:
    """Run the policy itself in L0, operation after operation: all counts, exits that pull."""
    l0 = Nvmx(config)
    l0.start()
    total, pulling = np.zeros(len(COUNTERS)), 0
    for ids in stream.sequence():
        for word in ids.tolist():
            pulls = 0
            for operation in stream.word(word):
                l0.trace = Trace()
                l0.apply(operation)
                total += count(l0.trace)
                pulls += l0.trace.pulls
            pulling += pulls > 0
    return total, pulling


@pytest.mark.parametrize("sync", PREDICTORS)
@pytest.mark.parametrize("workload", ["16bit-firmware", "virtualbox-desktop", "two-l2-one-cpu"])
def test_a_mix(workload: str, sync: str) -> None:
    mix = mixes.load(workload)
    stream = mix.stream(1500, 3)
    check(stream, [config_of(mix, kvm, name) for kvm in ("5.3", "6.1") for name in (sync, "lazy")])


@pytest.mark.parametrize("sync", PREDICTORS)
def test_an_executed_run(sync: str) -> None:
    run = executed.load("kvm61_lazy_shadow_nokstack")
    check(run.stream, [run.config.with_sync(name) for name in (sync, "oracle", "eager")])


def check(stream: Stream, configs: list[Config]) -> None:
    for simulated in simulate(stream, configs, allow_unknown=True):
        if simulated.config.sync not in PREDICTORS:
            continue
        want, pulling = naive(simulated.config, stream)
        want[COUNTERS.index("l1_instructions")] = simulated.l1_instructions
        np.testing.assert_array_equal(simulated.round_trip, want)
        assert simulated.exits_that_pull == pulling
        assert simulated.expected_pulls_share == pulling / stream.exits
        assert 0 < pulling < stream.exits


def test_an_enlightened_vmcs_leaves_nothing_to_guess() -> None:
    mix = mixes.load("kvm-evmcs")
    configs = [config_of(mix, "6.1", sync) for sync in ("eager", "adaptive")]
    eager, adaptive = simulate(mix.stream(500, 1), configs)
    np.testing.assert_array_equal(eager.round_trip, adaptive.round_trip)


class Counts(Predictor):
    """Counts the exits, for ever."""

    first = 0

    def expect(self, learned: int, reason: str) -> bool:
        return False

    def learn(self, learned: int, reason: str, *, needed: bool) -> int:
        return learned + 1


def test_a_predictor_that_learns_without_a_bound_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(walks, "MOST_STATES", 200)
    register("counts-for-ever")(Counts)
    try:
        mix = mixes.load("cpuid")
        with pytest.raises(LabError, match="control states"):
            simulate(mix.stream(100, 1), [config_of(mix, "6.1", "counts-for-ever")])
    finally:
        del SYNC_POLICIES["counts-for-ever"]
