"""Sync policies side by side: how much of what the oracle saves over lazy copying each saves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import interval, price
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.config import Config, features, release
from nvmx_lab.nested.explorer import Exploration, explore
from nvmx_lab.nested.policies import SYNC_POLICIES, Predictor
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.study.compare import NO_DIFFERENCE_CYCLES, QUANTILES
from nvmx_lab.study.simulate import EXITS, P, Simulated, config_of, simulate
from nvmx_lab.workload import executed
from nvmx_lab.workload import mixes as workload

if TYPE_CHECKING:
    import pandas as pd

Float64 = npt.NDArray[np.float64]

POLICIES: Final = ("eager", "lazy", "per-field", "group-wise", "adaptive", "by-reason", "oracle")
BASELINE: Final = "lazy"
BOUND: Final = "oracle"

PREDICTION_INSTRUCTIONS: Final = 20
"""Assumed: what L0 retires more at each round trip to look a counter up, and to count."""

NO_GAP_CYCLES: Final = 10.0
"""A gap below this has no share to close: a twentieth of what the patch's author measured."""

MIXES: Final = "mix"
RUNS: Final = "executed run"
NEVER, NOW_AND_THEN, OFTEN, ALWAYS, AT_ONCE = (
    "after hardly any exit (below 2 %)",
    "now and then (2 to 20 %)",
    "often (20 to 80 %)",
    "after nearly every exit (80 % and more)",
    "never: all is copied at once",
)
GROUPS: Final = (ALWAYS, OFTEN, NOW_AND_THEN, NEVER, AT_ONCE)
"""Workloads by how often a lazy L0 pulls; an enlightened VMCS never waits for a pull."""

_SHOWN: Final = ("GUEST_GS_BASE", "GUEST_PENDING_DBG_EXCEPTIONS", "HOST_RSP")
PRIMITIVE_OF_CPI: Final = "l0_instructions"
_L0_INSTRUCTIONS: Final = list(PRIMITIVES).index(PRIMITIVE_OF_CPI)


@dataclass(frozen=True, eq=False)
class Workload:
    """One workload under every policy.

    Attributes
    ----------
    name, kind, basis : str
        A mix or a run; `MIXES` or `RUNS`; where the weights or the order come from.
    exits : int
        Reflected nested exits.
    pulls_share : dict of str to float
        Share of the exits that pull, by policy.
    rare_vmreads : dict of str to float
        VMREADs of rare fields per exit, by policy.
    counts : float64[policies, P]
        Round trip, mean per exit.
    group : str
        One of `GROUPS`.
    drawn_from : str
        The executed run whose exits a mix draws, if it draws all of one.
    """

    name: str
    kind: str
    basis: str
    exits: int
    pulls_share: dict[str, float]
    rare_vmreads: dict[str, float]
    counts: Float64 = field(repr=False)
    group: str = NEVER
    drawn_from: str = ""


@dataclass(frozen=True, eq=False)
class PolicyGaps:
    """Workloads under policies, and a price list.

    Attributes
    ----------
    kvm, cpu : str
        L0's release; name of the price list.
    policies : tuple of str
        `BASELINE` and `BOUND` among them.
    workloads : tuple of Workload
        Mixes first, then executed runs.
    """

    kvm: str
    cpu: str
    policies: tuple[str, ...]
    workloads: tuple[Workload, ...]
    _drawn: prices.Draws = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per workload and policy.

        Returns
        -------
        DataFrame
            workload, kind, basis, group, exits, drawn_from, lazy_pulls_share; policy, pulls_share,
            rare_vmreads_per_exit; cycles per nested exit, paired over the price draws, as
            ``_p05``, ``_p50``, ``_p95``: ``over_lazy_cycles`` and ``over_oracle_cycles`` (the
            policy minus that), ``gap_cycles`` (lazy minus oracle); ``closed`` (share of the gap
            that the policy closes: 0 as lazy, 1 as the oracle, below 0 worse than lazy; None where
            the median gap is below `NO_GAP_CYCLES`); best (whether no policy but the oracle has a
            lower median, by more than half a cycle); prediction_cycles_p50 (assumed, not in the
            others).
        """
        import pandas as pd

        rows = []
        for one in self.workloads:
            priced = self._priced(one.counts)
            lowest = min(
                row["over_lazy_cycles_p50"] for name, row in priced.items() if name != BOUND
            )
            for policy, row in priced.items():
                best = row["over_lazy_cycles_p50"] <= lowest + NO_DIFFERENCE_CYCLES
                rows.append(
                    {
                        "workload": one.name,
                        "kind": one.kind,
                        "basis": one.basis,
                        "group": one.group,
                        "exits": one.exits,
                        "drawn_from": one.drawn_from,
                        "lazy_pulls_share": one.pulls_share[BASELINE],
                        "policy": policy,
                        "pulls_share": one.pulls_share[policy],
                        "rare_vmreads_per_exit": one.rare_vmreads[policy],
                        **row,
                        "best": bool(policy != BOUND and best),
                    }
                )
        return pd.DataFrame(rows)

    def overall(self) -> pd.DataFrame:
        """Return one row per kind, group ("all" too) and policy: each workload weighs the same.

        The share that is closed is of the sum of the gaps, so a small gap weighs little.

        Returns
        -------
        DataFrame
            kind, group, workloads (how many), policy, and the priced columns of `to_frame`.
        """
        import pandas as pd

        rows = []
        for kind in dict.fromkeys(one.kind for one in self.workloads):
            of_kind = [one for one in self.workloads if one.kind == kind]
            for group in ("all", *GROUPS):
                some = [one for one in of_kind if group in ("all", one.group)]
                if not some:
                    continue
                mean = np.mean([one.counts for one in some], axis=0)
                for policy, row in self._priced(mean).items():
                    head = {"kind": kind, "group": group, "workloads": len(some)}
                    rows.append({**head, "policy": policy, **row})
        return pd.DataFrame(rows)

    def assumed_prices(self) -> tuple[str, ...]:
        """Return the prices without a published basis of what lazy does and the oracle does not."""
        lazy, oracle = (self.policies.index(name) for name in (BASELINE, BOUND))
        more = sum(abs(one.counts[lazy] - one.counts[oracle]) for one in self.workloads)
        occurs = {name for name, count in zip(PRIMITIVES, more, strict=True) if count > 0}
        needed = {"cpi" if name == PRIMITIVE_OF_CPI else name for name in occurs}
        known = prices.load(self.cpu).parameters
        return tuple(n for n in known if n in needed and known[n].basis == "assumed")

    def _priced(self, counts: Float64) -> dict[str, dict[str, Any]]:
        """Price what every policy costs over lazy and over the oracle; counts[policies, P]."""
        lazy, oracle = (counts[self.policies.index(name)] for name in (BASELINE, BOUND))
        over_lazy = price(counts - lazy, self._drawn).values
        over_oracle = price(counts - oracle, self._drawn).values
        gap = over_oracle[self.policies.index(BASELINE)]
        prediction = np.zeros(P)
        prediction[_L0_INSTRUCTIONS] = PREDICTION_INSTRUCTIONS
        assumed = float(interval(price(prediction, self._drawn)).p50)
        wide = float(np.median(gap)) >= NO_GAP_CYCLES
        closed = 0.0 - over_lazy / gap if wide else None  # 0.0: nothing is "-0"
        out = {}
        for k, policy in enumerate(self.policies):
            guesses = issubclass(SYNC_POLICIES[policy], Predictor)
            out[policy] = {
                **_quantiles("over_lazy_cycles", over_lazy[k]),
                **_quantiles("over_oracle_cycles", over_oracle[k]),
                **_quantiles("gap_cycles", gap),
                **_quantiles("closed", None if closed is None else closed[k]),
                "prediction_cycles_p50": assumed if guesses else 0.0,
            }
        return out


def policy_gaps(
    kvm: str = "6.1",
    *,
    policies: Sequence[str] = POLICIES,
    mixes: Sequence[str] | None = None,
    runs: Sequence[str] | None = None,
    cpu: str | Path = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
    draws: int = prices.DRAWS,
) -> PolicyGaps:
    """Run every policy over mixes and executed runs, on one release.

    A mix draws its exits one by one, so nothing comes in bursts there; an executed run keeps the
    order in which L2 exited, and L1's operations as they were.

    Parameters
    ----------
    kvm : str
        L0's release. For an executed run too: what L1 did is taken to be the same.
    policies : sequence of str
        Names; lazy and oracle are added if they are missing.
    mixes, runs : sequence of str, optional
        Names; all if not given.
    cpu, exits, seed, draws
        As in `nvmx_lab.study.compare.compare`.

    Raises
    ------
    LabError
        If a name is unknown, or a price is missing.
    """
    for name in policies:
        if name not in SYNC_POLICIES:
            raise unknown("sync policy", name, SYNC_POLICIES)
    chosen = tuple(dict.fromkeys((*policies, BASELINE, BOUND)))
    of_mixes = workload.names() if mixes is None else mixes
    of_runs = executed.run_names() if runs is None else runs
    if not of_mixes and not of_runs:
        raise LabError("nothing to simulate", where="mixes and runs", got="none")
    release(kvm)
    price_list = prices.load(cpu)
    done = []
    tasks = [*((MIXES, name) for name in of_mixes), *((RUNS, name) for name in of_runs)]
    for kind, name in tqdm(tasks, unit="workload", disable=None, delay=1):
        simulate_one = _of_mix if kind == MIXES else _of_run
        done.append(simulate_one(name, kvm, chosen, exits, seed))
    return PolicyGaps(kvm, price_list.id, chosen, tuple(done), price_list.draw(draws, seed))


def checked(kvm: str, policy: str) -> Exploration:
    """Explore a policy quickly: one kind of machine, a field of each kind of rare fields.

    On the release with every mend, so that no fault of KVM's own comes first. `nvmx_lab.check` does
    all fields and machines; for a policy with a large memory that takes minutes.

    Raises
    ------
    LabError
        If a name is unknown, or the policy remembers without a bound.
    """
    config = Config.of(kvm, policy)
    mends = {name for name, feature in features().items() if "mends" in feature}
    mended = replace(config.kvm, features=config.kvm.features | mends)
    return explore(replace(config, kvm=mended), fields=_SHOWN, each_field=False)


def _of_mix(name: str, kvm: str, policies: Sequence[str], exits: int, seed: int) -> Workload:
    mix = workload.load(name)
    configs = [config_of(mix, kvm, policy) for policy in policies]
    simulated = simulate(mix.stream(exits, seed), configs)
    whole = re.fullmatch(r"executed run (\w+) \([^)]*\)", mix.source)
    return _workload(name, MIXES, mix.basis, simulated, drawn_from=whole[1] if whole else "")


def _of_run(name: str, kvm: str, policies: Sequence[str], exits: int, seed: int) -> Workload:
    del exits, seed  # a run has its own
    run = executed.load(name)
    configs = [replace(run.config, kvm=release(kvm), sync=policy) for policy in policies]
    # What L1 retires is the same under every policy, so where it is not known nothing is lost.
    return _workload(name, RUNS, "executed", simulate(run.stream, configs, allow_unknown=True))


def _workload(
    name: str, kind: str, basis: str, simulated: Sequence[Simulated], *, drawn_from: str = ""
) -> Workload:
    exits = simulated[0].exits
    lazy = next(s for s in simulated if s.config.sync == BASELINE)
    return Workload(
        name=name,
        kind=kind,
        basis=basis,
        exits=exits,
        pulls_share={s.config.sync: s.exits_that_pull / exits for s in simulated},
        rare_vmreads={s.config.sync: s.counter("rare_vmread") / exits for s in simulated},
        counts=np.array([s.round_trip[:P] for s in simulated]) / exits,
        group=AT_ONCE if lazy.config.evmcs else _group(lazy.expected_pulls_share),
        drawn_from=drawn_from,
    )


def _group(pulls_share: float) -> str:
    if pulls_share < 0.02:
        return NEVER
    if pulls_share < 0.2:
        return NOW_AND_THEN
    return OFTEN if pulls_share < 0.8 else ALWAYS


def _quantiles(name: str, values: Float64 | None) -> dict[str, float | None]:
    found = (None,) * 3 if values is None else np.quantile(values, (0.05, 0.5, 0.95)).tolist()
    return {f"{name}_{q}": value for q, value in zip(QUANTILES, found, strict=True)}
