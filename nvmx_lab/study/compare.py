"""Compare two L0s on a mix: what one saves over the other, where, why, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import interval, price
from nvmx_lab.errors import LabError
from nvmx_lab.nested import config
from nvmx_lab.nested.primitives import COUNTERS
from nvmx_lab.study.pulls import break_even
from nvmx_lab.study.simulate import EXITS, P, Simulated, simulate_mix
from nvmx_lab.workload.mixes import Mix

if TYPE_CHECKING:
    import pandas as pd

QUANTILES = ("p05", "p50", "p95")
NO_DIFFERENCE_CYCLES = 0.5


@dataclass(frozen=True)
class Side:
    """One of the compared L0s: counts of the whole run, cycles as means per exit.

    Attributes
    ----------
    kvm, sync : str
        Release and sync policy.
    pulls : int
        Lazy syncs in the whole run.
    pulls_share : float
        Share of the exits after which L0 pulled.
    rare_vmreads_per_exit : float
        VMREADs of rare fields, mean per exit.
    counts : dict of str to float
        Primitives of the whole run; ``vmread`` and ``vmwrite`` are first and next together.
    exit_leg_cycles, round_trip_cycles : dict of str to float
        p05, p50, p95 over price draws.
    """

    kvm: str
    sync: str
    pulls: int
    pulls_share: float
    rare_vmreads_per_exit: float
    counts: Mapping[str, float] = field(repr=False)
    exit_leg_cycles: Mapping[str, float]
    round_trip_cycles: Mapping[str, float]


@dataclass(frozen=True)
class Comparison:
    """Two L0s on one mix; shows itself as a table in Jupyter.

    Attributes
    ----------
    mix, title, basis, source : str
        The mix, and where its weights come from.
    cpu, cpu_basis : str
        The price list, and what it rests on.
    exits, seed : int
        Size and seed of the stream.
    results : tuple of Side
        The two L0s, as asked for.
    saving : dict
        First minus second, paired: ``exit_leg_cycles`` and ``round_trip_cycles`` (p05, p50, p95),
        ``rare_vmreads_per_exit`` and ``vmreads_per_exit``.
    break_even_pull_rate : dict of str to float or None
        Share of exits with a pull at which the lazy sync saves nothing (p05, p50, p95); None where
        nothing is ever pulled, or a pull has no price.
    left_out : tuple of str
        Primitives without a price that the totals leave out, if that was asked for.
    evmcs : bool
        Whether L1 uses an enlightened VMCS.
    """

    mix: str
    title: str
    basis: str
    source: str
    cpu: str
    cpu_basis: str
    exits: int
    seed: int
    results: tuple[Side, ...]
    saving: Mapping[str, Any]
    break_even_pull_rate: Mapping[str, float] | None
    left_out: tuple[str, ...] = ()
    evmcs: bool = False

    @property
    def verdict(self) -> str:
        """By the round trip's interval: "saves", "costs", "no difference" or "unclear"."""
        return verdict(self.saving["round_trip_cycles"])

    @property
    def explanation(self) -> str:
        """Why, in a sentence or two made from the counts."""
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values, in the layout that scripts rely on."""
        return {
            "mix": self.mix,
            "cpu": self.cpu,
            "cpu_basis": self.cpu_basis,
            "basis": self.basis,
            "exits": self.exits,
            "seed": self.seed,
            "results": [
                {
                    "kvm": side.kvm,
                    "sync": side.sync,
                    "pulls": side.pulls,
                    "pulls_share": side.pulls_share,
                    "rare_vmreads_per_exit": side.rare_vmreads_per_exit,
                    "counts": dict(side.counts),
                    "exit_leg_cycles": dict(side.exit_leg_cycles),
                    "round_trip_cycles": dict(side.round_trip_cycles),
                }
                for side in self.results
            ],
            "saving": {
                key: dict(value) if isinstance(value, Mapping) else value
                for key, value in self.saving.items()
            },
            "break_even_pull_rate": self.break_even_pull_rate and dict(self.break_even_pull_rate),
            "verdict": self.verdict,
            "explanation": self.explanation,
            "left_out": list(self.left_out),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per L0 and one for the saving; cycles are means per nested exit."""
        import pandas as pd

        rows: list[dict[str, Any]] = [
            {
                "kvm": side.kvm,
                "sync": side.sync,
                "rare_vmreads_per_exit": side.rare_vmreads_per_exit,
                "pulls_share": side.pulls_share,
                **_flat(side.exit_leg_cycles, "exit_leg_cycles"),
                **_flat(side.round_trip_cycles, "round_trip_cycles"),
            }
            for side in self.results
        ]
        rows.append(
            {
                "kvm": "saving",
                "sync": "",
                "rare_vmreads_per_exit": self.saving["rare_vmreads_per_exit"],
                "pulls_share": self.results[0].pulls_share - self.results[1].pulls_share,
                **_flat(self.saving["exit_leg_cycles"], "exit_leg_cycles"),
                **_flat(self.saving["round_trip_cycles"], "round_trip_cycles"),
            }
        )
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, Any]:
        """Return the row of the report's summary: mix, basis, saving, verdict."""
        return {
            "mix": self.mix,
            "title": self.title,
            "basis": self.basis,
            "source": self.source,
            "pulls_share": self.results[-1].pulls_share,
            "rare_vmreads_saved_per_exit": self.saving["rare_vmreads_per_exit"],
            **_flat(self.saving["exit_leg_cycles"], "exit_leg_saving_cycles"),
            **_flat(self.saving["round_trip_cycles"], "round_trip_saving_cycles"),
            "break_even_pull_rate_p50": self.break_even_pull_rate
            and self.break_even_pull_rate["p50"],
            "verdict": self.verdict,
            "why": self.explanation,
        }

    def __str__(self) -> str:
        lines = [
            f"{self.mix}: {self.title} ({self.basis}); {self.exits:,} exits, seed {self.seed}",
            f"prices: {self.cpu} ({self.cpu_basis})",
            "",
            f"{'':26}{'rare VMREADs':>13}{'pulls':>8}{'exit leg, cycles':>26}"
            f"{'round trip, cycles':>28}",
        ]
        for side in self.results:
            lines.append(
                f"{f'KVM {side.kvm}, {side.sync}':26}{side.rare_vmreads_per_exit:>13.2f}"
                f"{side.pulls_share:>8.1%}{_span(side.exit_leg_cycles):>26}"
                f"{_span(side.round_trip_cycles):>28}"
            )
        lines += [
            f"{'saving':26}{self.saving['rare_vmreads_per_exit']:>13.2f}{'':8}"
            f"{_span(self.saving['exit_leg_cycles']):>26}"
            f"{_span(self.saving['round_trip_cycles']):>28}",
            "",
            f"{self.verdict}: {self.explanation}",
            "Means per nested exit: median [90 % interval over price draws, the mix as given]; "
            "simulated counts.",
        ]
        if self.left_out:
            lines.append(f"Without {', '.join(self.left_out)}: no price.")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = self.to_frame().to_html(index=False, border=0, float_format=lambda x: f"{x:,.2f}")
        said = f"<b>{self.mix}</b>: {self.title}. <b>{self.verdict}</b>: {self.explanation}"
        return f"<p>{said}</p>{body}"


def compare(
    mix: str | Path | Mix,
    *,
    kvm: Sequence[str] = ("5.2", "5.2+patch13"),
    sync: str | Sequence[str | None] | None = None,
    cpu: str | Path = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
    draws: int = prices.DRAWS,
    allow_unknown: bool = False,
) -> Comparison:
    """Compare two KVM releases or sync policies on a mix.

    Parameters
    ----------
    mix : str, Path or Mix
        Name of a mix (`nvmx_lab.workload.mixes.names`) or the path of a TOML file.
    kvm : sequence of str
        Two releases, or one for two policies.
    sync : str or sequence of str, optional
        A policy for both sides, or one for each; None: the release's own.
    cpu : str or Path
        Price list.
    exits : int
        Nested exits to draw, 1 to 10**10.
    seed : int
        Seed of the stream and of the price draws.
    draws : int
        Price lists to draw.
    allow_unknown : bool
        Give totals without the primitives that have no price, instead of refusing.

    Returns
    -------
    Comparison

    Raises
    ------
    LabError
        If a name is unknown, a size absurd, or a price missing.
    """
    pairs = pairs_of(kvm, sync)
    price_list = prices.load(cpu)
    loaded, simulated = simulate_mix(
        mix,
        [k for k, _ in pairs],
        [s for _, s in pairs],
        exits=exits,
        seed=seed,
    )
    return priced(
        loaded, simulated, price_list, seed=seed, draws=draws, allow_unknown=allow_unknown
    )


def priced(
    mix: Mix,
    simulated: Sequence[Simulated],
    price_list: prices.PriceList,
    *,
    seed: int,
    draws: int = prices.DRAWS,
    allow_unknown: bool = False,
) -> Comparison:
    """Price two simulated L0s: the second half of `compare`, for many price lists over one run."""
    drawn = price_list.draw(draws, seed)
    exits = simulated[0].exits
    legs = np.array([[s.exit_leg[:P], s.round_trip[:P]] for s in simulated]) / exits
    cycles = price(legs, drawn, allow_unknown=allow_unknown)
    low, middle, high = interval(cycles)
    difference = interval(price(legs[0] - legs[1], drawn, allow_unknown=allow_unknown))

    def quantiles(values: Sequence[Any]) -> dict[str, float]:
        return dict(zip(QUANTILES, (float(v) for v in values), strict=True))

    sides = tuple(
        Side(
            kvm=s.config.kvm.name,
            sync=s.config.sync,
            pulls=round(s.counter("pulls")),
            pulls_share=s.exits_that_pull / exits,
            rare_vmreads_per_exit=s.counter("rare_vmread") / exits,
            counts=_counts(s),
            exit_leg_cycles=quantiles((low[k, 0], middle[k, 0], high[k, 0])),
            round_trip_cycles=quantiles((low[k, 1], middle[k, 1], high[k, 1])),
        )
        for k, s in enumerate(simulated)
    )
    vmreads = [side.counts["vmread"] / exits for side in sides]
    even = break_even(simulated[-1].config, drawn)
    return Comparison(
        mix=mix.name,
        title=mix.title,
        basis=mix.basis,
        source=mix.source,
        cpu=price_list.id,
        cpu_basis=price_list.basis,
        exits=exits,
        seed=seed,
        results=sides,
        saving={
            "exit_leg_cycles": quantiles([q[0] for q in difference]),
            "round_trip_cycles": quantiles([q[1] for q in difference]),
            "rare_vmreads_per_exit": sides[0].rare_vmreads_per_exit
            - sides[1].rare_vmreads_per_exit,
            "vmreads_per_exit": vmreads[0] - vmreads[1],
        },
        break_even_pull_rate=None if even is None else quantiles(even),
        left_out=cycles.left_out,
        evmcs=mix.host.evmcs,
    )


def verdict(saving: Mapping[str, float]) -> str:
    """Return "saves", "costs", "no difference" or "unclear" for an interval of a saving."""
    low, high = saving["p05"], saving["p95"]
    if max(abs(low), abs(high)) < NO_DIFFERENCE_CYCLES:
        return "no difference"
    if low > 0:
        return "saves"
    return "costs" if high < 0 else "unclear"


def explain(result: Comparison) -> str:
    """Return why the saving is what it is, from the counts of both sides."""
    text = _of_rare_fields(result)
    before, after = (config.release(side.kvm).features for side in result.results)
    others = len((before ^ after) - {"patch13"})
    if others:
        more = "one more feature, which is" if others == 1 else f"{others} more features, which are"
        text += f" That is the sync alone: the two releases differ in {more} in the saving too."
    return text


def _of_rare_fields(result: Comparison) -> str:
    before, after = result.results
    saved = result.saving["rare_vmreads_per_exit"]
    if result.evmcs:
        return (
            "No VMREAD of a rare field fewer: L1 reads an enlightened VMCS straight from memory, "
            "so L0 must copy every field before L1 runs, with either sync."
        )
    if (before.sync, after.sync) != ("eager", "lazy"):
        sides = " against ".join(
            f"KVM {side.kvm} ({side.sync}): {side.rare_vmreads_per_exit:.2f} rare fields read per "
            f"exit, {side.counts['pulls'] / result.exits:.3f} pulls"
            for side in result.results
        )
        return f"{sides}."
    pulls, even = after.pulls_share, result.break_even_pull_rate
    text = f"{saved:.2f} VMREADs of rare fields fewer per exit"
    if pulls == 0:
        return f"{text}: L1 never needs a rare field and never dirties vmcs12, so L0 never pulls."
    text += (
        "; L1 forces a pull (two switches of VMCS and all rare fields) after "
        f"{pulls * 100:.2f} % of the exits"
    )
    if even is None:
        return f"{text}; a pull has no price here, so no break-even rate."
    side = "below" if pulls < even["p50"] else "above"
    return f"{text}, {side} the break-even rate of {even['p50'] * 100:.0f} %."


def _counts(simulated: Simulated) -> dict[str, float]:
    values = dict(zip(COUNTERS, (float(v) for v in simulated.round_trip), strict=True))
    totals = {
        "vmread": values["vmread_first"] + values["vmread_next"],
        "vmwrite": values["vmwrite_first"] + values["vmwrite_next"],
    }
    return totals | values


def pairs_of(
    kvm: Sequence[str], sync: str | Sequence[str | None] | None
) -> list[tuple[str, str | None]]:
    """Return the two sides of a comparison as (release, policy); a list of one serves both.

    Raises
    ------
    LabError
        If they do not make two sides.
    """
    releases = [kvm] if isinstance(kvm, str) else list(kvm)
    for name in releases:
        if not isinstance(name, str):
            raise LabError("a KVM release is text", where="kvm", got=name, mend=f'write "{name}"')
    policies: list[str | None] = [sync] if sync is None or isinstance(sync, str) else list(sync)
    size = max(len(releases), len(policies))
    if size != 2 or not {len(releases), len(policies)} <= {1, 2}:
        raise LabError(
            "a comparison has two sides",
            where="kvm and sync",
            got=f"{len(releases)} releases, {len(policies)} policies",
            allowed="two releases, two policies, or two of each",
        )
    releases, policies = releases * (2 // len(releases)), policies * (2 // len(policies))
    return list(zip(releases, policies, strict=True))


def _flat(values: Mapping[str, float], name: str) -> dict[str, float]:
    return {f"{name}_{quantile}": values[quantile] for quantile in QUANTILES}


def _span(values: Mapping[str, float]) -> str:
    low, middle, high = (round(values[q]) for q in QUANTILES)  # round: no "-0"
    return f"{middle:,} [{low:,}, {high:,}]"
