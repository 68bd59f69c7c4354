"""Break-even: how many pulls the saving bears, against what a switch of VMCS costs.

An eager L0 spends the reader at every exit; a lazy one spends a pull after a share of them::

    saving(rate) = reader - rate * pull,  pull = its VMREADs + switches * switch

so nothing is saved at ``rate = reader / pull``. A pull is the same whatever L1 did to need it, and
two in one round trip do not happen (the first brings every rare field), so the line is no
approximation: `placed` holds simulated mixes against it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from tqdm import tqdm

from nvmx_lab.costs import prices
from nvmx_lab.costs.prices import FloatArray
from nvmx_lab.costs.pricing import price
from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import Config, release, releases
from nvmx_lab.nested.primitives import COUNTERS, PRIMITIVES
from nvmx_lab.study import published, pulls
from nvmx_lab.study.compare import QUANTILES, verdict
from nvmx_lab.study.simulate import EXITS, P, Simulated, config_of, reader_and_pull_counts, simulate
from nvmx_lab.workload import mixes as workload

if TYPE_CHECKING:
    import pandas as pd

SWITCH_CYCLES: Final = tuple(float(x) for x in np.geomspace(20.0, 20_000.0, 31))
"""Costs of a switch at which a curve is drawn, TSC cycles."""

RATES: Final = tuple(float(x) for x in np.linspace(0.0, 1.0, 21))
"""Pull rates at which a line is drawn."""

IBPB: Final = "ibpb"
LIGHT_PULL: Final = "light-pull"
_L0: Final = "l0_instructions"
_SOFTWARE: Final = COUNTERS.index(_L0)
_OF_IBPB: Final = np.array([name == IBPB for name in COUNTERS])


def lazy_releases() -> tuple[str, ...]:
    """Return the base releases whose own sync is the lazy one, oldest first."""
    return tuple(one.name for one in releases() if one.sync == "lazy")


def hosts(kvm: str) -> tuple[str, str]:
    """Return a release on a host that issues no IBPB at a switch of VMCS, and on one that does.

    Raises
    ------
    LabError
        If the release is unknown.
    """
    if IBPB not in release(kvm).features:
        return kvm, f"{kvm}+{IBPB}"
    return re.sub(rf"\+{IBPB}(?=[+-]|$)", "", kvm), kvm


def rates(
    kvm: str | Sequence[str] = "5.3",
    *,
    cpu: Sequence[str] = (prices.DEFAULT,),
    draws: int = prices.DRAWS,
    seed: int = 1,
) -> pd.DataFrame:
    """Return the break-even rate, and what it is made of, with and without IBPB.

    Parameters
    ----------
    kvm : str or sequence of str
        Releases of L0, each with the lazy sync; the CPU has MPX.
    cpu : sequence of str
        Price lists.
    draws, seed : int
        Price lists to draw, and their seed.

    Returns
    -------
    DataFrame
        One row per release, price list and host: kvm, light_pull (whether a pull issues no IBPB
        anyway), ibpb (whether the host issues them), cpu, unpriced (what has no price, or empty),
        and p05, p50 and p95 of reader_cycles, reads_cycles, switch_cycles, pull_cycles,
        break_even_rate; NaN where a price is missing.
    """
    import pandas as pd

    rows = []
    lists = [prices.load(one).draw(draws, seed) for one in cpu]
    for name in [kvm] if isinstance(kvm, str) else kvm:
        for ibpb, host in enumerate(hosts(name)):
            config = Config.of(host, "lazy")
            for drawn in lists:
                missing = pulls.unpriced_in(config, drawn)
                about = {
                    "kvm": name,
                    "light_pull": LIGHT_PULL in config.kvm.features,
                    "ibpb": bool(ibpb),
                    "cpu": drawn.cpu,
                    "unpriced": ", ".join(missing),
                }
                rows.append(about | _weights(None if missing else pulls.weigh(config, drawn)))
    return pd.DataFrame(rows)


def curves(
    kvm: str = "5.3",
    *,
    cpu: Sequence[str] = (prices.DEFAULT,),
    switch_cycles: Sequence[float] = SWITCH_CYCLES,
    draws: int = prices.DRAWS,
    seed: int = 1,
) -> pd.DataFrame:
    """Return the break-even rate over the cost of a switch of VMCS.

    An IBPB is a part of that cost, so the curve is the same with it and without; `rates` says where
    on it a host is. The price of a switch itself plays no part: a list without one has a curve too.

    Parameters
    ----------
    kvm, cpu, draws, seed
        As in `rates`.
    switch_cycles : sequence of float
        Costs of one switch, TSC cycles.

    Returns
    -------
    DataFrame
        One row per price list and cost: cpu, switch_cycles, break_even_rate_p05, _p50, _p95.

    Raises
    ------
    LabError
        If VMREADs have no price.
    """
    import pandas as pd

    config = Config.of(kvm, "lazy")
    costs = np.asarray(switch_cycles, dtype=float)
    rows = []
    for one in cpu:
        weighed = pulls.curve_weighed(config, prices.load(one).draw(draws, seed))
        at = np.quantile(weighed.break_even_rate_at(costs), (0.05, 0.5, 0.95), axis=1)
        named = {f"break_even_rate_{q}": at[k] for k, q in enumerate(QUANTILES)}
        rows.append(pd.DataFrame({"cpu": prices.load(one).id, "switch_cycles": costs, **named}))
    return pd.concat(rows, ignore_index=True)


def line(
    kvm: str = "5.3",
    *,
    cpu: str = prices.DEFAULT,
    pull_rates: Sequence[float] = RATES,
    draws: int = prices.DRAWS,
    seed: int = 1,
) -> pd.DataFrame:
    """Return the saving over the pull rate, with and without IBPB.

    Parameters
    ----------
    kvm, cpu, draws, seed
        As in `rates`, one of each.
    pull_rates : sequence of float
        Shares of exits with a pull.

    Returns
    -------
    DataFrame
        One row per host and rate: ibpb, pulls_share, round_trip_saving_cycles_p05, _p50, _p95. A
        host on which a pull has no price has no rows.
    """
    import pandas as pd

    drawn = prices.load(cpu).draw(draws, seed)
    rows = []
    for ibpb, host in enumerate(hosts(kvm)):
        config = Config.of(host, "lazy")
        if pulls.unpriced_in(config, drawn):
            continue
        weighed = pulls.weigh(config, drawn)
        rows += [
            {
                "ibpb": bool(ibpb),
                "pulls_share": rate,
                **_quantiles("round_trip_saving_cycles", weighed.saving(rate)),
            }
            for rate in pull_rates
        ]
    return pd.DataFrame(rows, columns=["ibpb", "pulls_share", *_named("round_trip_saving_cycles")])


def placed(
    kvm: str = "5.3",
    *,
    cpu: str = prices.DEFAULT,
    mixes: Sequence[str] = (),
    exits: int = EXITS,
    draws: int = prices.DRAWS,
    seed: int = 1,
) -> pd.DataFrame:
    """Simulate mixes with either sync, with and without IBPB, and hold them against the line.

    Parameters
    ----------
    kvm, cpu, draws, seed
        As in `rates`, one of each. The seed is that of the streams too.
    mixes : sequence of str
        Names of mixes; empty for all.
    exits : int
        Nested exits per mix.

    Returns
    -------
    DataFrame
        One row per mix and host, the most pulls first: ibpb, mix, title, evmcs (L1 uses an
        enlightened VMCS: nothing is ever pulled), rare_fields (that the reader reads), pulls_share
        (of the exits, expected), drawn_share (as drawn), round_trip_saving_cycles_p05, _p50, _p95
        (simulated: eager minus lazy, the same release; moved from the drawn share to the expected
        one, so that it does not depend on the draw), verdict, line_cycles_p05, _p50, _p95 (by the
        line of this mix's L0), difference_cycles (the largest between the two over all price
        draws), instructions_left_over (of L0, by which they differ per exit), left_over (names of
        the other primitives whose counts differ: empty if none does),
        break_even_rate_p50, bears_switch_cycles_p05, _p50, _p95 (the cost of a switch at which this
        mix breaks even; NaN if it never pulls). A host on which a pull has no price has no rows.

    Raises
    ------
    LabError
        If a name is unknown, or a pull has no price on either host.
    """
    import pandas as pd

    drawn = prices.load(cpu).draw(draws, seed)
    chosen = [workload.load(name) for name in mixes or workload.names()]
    both = hosts(kvm)
    missing = [pulls.unpriced_in(Config.of(host, "lazy"), drawn) for host in both]
    if all(missing):
        raise LabError(
            "a pull has no price",
            where=f"cpu {drawn.cpu}",
            got=", ".join(missing[0]),
            mend="choose another cpu, or give the price in a TOML file of your own",
        )
    rows: list[dict[str, Any]] = []
    weighed: dict[Config, pulls.Weighed | None] = {}
    for mix in tqdm(chosen, unit="mix", disable=None, delay=1):
        # An IBPB changes nothing that L0 does (tested), so one simulation serves both hosts.
        configs = [config_of(mix, both[1], sync) for sync in ("eager", "lazy")]
        eager, lazy = simulate(mix.stream(exits, seed), configs)
        saved = (eager.round_trip - lazy.round_trip) / lazy.exits
        without = np.where(_OF_IBPB, 0.0, saved)
        for ibpb, (host, counts) in enumerate(zip(both, (without, saved), strict=True)):
            if not missing[ibpb]:
                about = {"ibpb": bool(ibpb), "mix": mix.name, "title": mix.title}
                config = config_of(mix, host, "lazy")
                if config not in weighed:
                    weighed[config] = None if config.evmcs else pulls.weigh(config, drawn)
                against = _against_the_line(config, weighed[config], counts, lazy, drawn)
                rows.append(about | against)
    frame = pd.DataFrame(rows)
    return frame.sort_values(
        ["ibpb", "pulls_share", "mix"], ascending=[True, False, True], ignore_index=True
    )


def _against_the_line(
    config: Config,
    weighed: pulls.Weighed | None,
    saved: FloatArray,
    lazy: Simulated,
    drawn: prices.Draws,
) -> dict[str, Any]:
    """Return a row of `placed`: simulated counts against the line's, at the expected rate."""
    reader, pull = reader_and_pull_counts(config)
    rate, drawn_rate = lazy.expected_pulls_share, lazy.counter("pulls") / lazy.exits
    left_over = np.round(saved - (reader - drawn_rate * pull), 9)[:P]
    difference = price(left_over, drawn).values
    by_line = weighed.saving(rate) if weighed else np.zeros_like(difference)
    saving = _quantiles("round_trip_saving_cycles", by_line + difference)
    return {
        "evmcs": weighed is None,
        "rare_fields": int(reader[COUNTERS.index("rare_vmread")]),
        "pulls_share": rate,
        "drawn_share": lazy.exits_that_pull / lazy.exits,
        **saving,
        "verdict": verdict(dict(zip(QUANTILES, saving.values(), strict=True))),
        **_quantiles("line_cycles", by_line),
        "difference_cycles": float(np.abs(difference).max()),
        "instructions_left_over": float(left_over[_SOFTWARE]),
        "left_over": ", ".join(
            name for name, n in zip(PRIMITIVES, left_over, strict=True) if n and name != _L0
        ),
        "break_even_rate_p50": float(np.median(weighed.break_even_rate)) if weighed else None,
        **_quantiles(
            "bears_switch_cycles", weighed.bearable_switch(rate) if weighed and rate else None
        ),
    }


def executed(
    kvm: str = "5.3", *, cpu: str = prices.DEFAULT, draws: int = prices.DRAWS, seed: int = 1
) -> pd.DataFrame:
    """Place executed runs on the line: their pull rate is executed, their saving is the line's.

    When L0 pulls is L1's doing, and KVM 6.1, which was executed, pulls for the same reasons as
    every lazy release here (tested), so the rate holds for `kvm` too. Their CPU has no MPX.

    Parameters
    ----------
    kvm, cpu, draws, seed
        As in `rates`, one of each.

    Returns
    -------
    DataFrame
        One row per run and host, the most pulls first: ibpb, run, l1, l2, exits, pulls_share,
        round_trip_saving_cycles_p05, _p50, _p95, verdict, break_even_rate_p50. A host on which a
        pull has no price has no rows.
    """
    import pandas as pd

    drawn = prices.load(cpu).draw(draws, seed)
    runs = published.executed_pulls()
    rows = []
    for ibpb, host in enumerate(hosts(kvm)):
        config = Config.of(host, "lazy", mpx=False)
        if pulls.unpriced_in(config, drawn):
            continue
        weighed = pulls.weigh(config, drawn)
        for run in runs.to_dict("records"):
            saving = _quantiles(
                "round_trip_saving_cycles", weighed.saving(float(run["pulls_share"]))
            )
            rows.append(
                {
                    "ibpb": bool(ibpb),
                    **{str(key): value for key, value in run.items()},
                    **saving,
                    "verdict": verdict(dict(zip(QUANTILES, saving.values(), strict=True))),
                    "break_even_rate_p50": float(np.median(weighed.break_even_rate)),
                }
            )
    return pd.DataFrame(rows)


def _weights(weighed: pulls.Weighed | None) -> dict[str, float]:
    return {
        **_quantiles("reader_cycles", weighed.reader if weighed else None),
        **_quantiles("reads_cycles", weighed.reads if weighed else None),
        **_quantiles("switch_cycles", weighed.switch if weighed else None),
        **_quantiles("pull_cycles", weighed.pull if weighed else None),
        **_quantiles("break_even_rate", weighed.break_even_rate if weighed else None),
    }


def _quantiles(name: str, values: FloatArray | None) -> dict[str, float]:
    if values is None:
        return dict.fromkeys(_named(name), float("nan"))
    found = np.quantile(values, (0.05, 0.5, 0.95))
    return dict(zip(_named(name), (float(v) for v in found), strict=True))


def _named(name: str) -> tuple[str, ...]:
    return tuple(f"{name}_{quantile}" for quantile in QUANTILES)
