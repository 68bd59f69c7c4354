"""Calibration: what published claims say about prices, given what was believed before.

Prices are functions of independent standard normal numbers (`PriceList.at`), one per parameter; a
claim is a sum of counts times prices, seen with a normal error. The posterior of the normal numbers
is sampled with emcee, by differential evolution: it needs no tuning, and decorrelates twice as fast
here as emcee's default move. Only the prices that a fitted claim needs are sampled, and those that
are fractions of them: all others stay as they were believed.

The three `FITS` differ in what they take for true, so that a reader sees what the patch's own
number adds, and that one price per VMREAD cannot explain the claims.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nvmx_lab import data
from nvmx_lab.costs import claims as published
from nvmx_lab.costs import prices
from nvmx_lab.costs.claims import Claim
from nvmx_lab.costs.posterior import Posterior
from nvmx_lab.costs.prices import FIRST_OF, PRICED_AS, Price, PriceList
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.primitives import PRIMITIVES

FloatArray = npt.NDArray[np.float64]

FITS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "blind": "all claims to fit but the patch's own: what the rest of the literature predicts",
        "with-claim": "the patch's own claim too",
        "one-constant": "the patch's own claim too, and every VMREAD costs the same, and VMWRITE",
    }
)
"""The three fits and what each takes for true."""

WALKERS: Final = 400
STEPS: Final = 2_000
_SHOW_PROGRESS_FROM = 400  # steps; fewer take about a second
_KEPT = 40_000  # draws: about as many as the chain is worth
_LONG_ENOUGH = 50  # autocorrelation times: emcee's own rule
_L0 = list(PRIMITIVES).index("l0_instructions")


@dataclass(frozen=True)
class Convergence:
    """How far to trust the sampler.

    Attributes
    ----------
    steps, walkers : int
        Kept steps of each walker, and walkers.
    autocorrelation_steps : float
        The longest integrated autocorrelation time of any price, in steps.
    acceptance : float
        Share of the moves that were accepted.
    effective_draws : float
        ``steps * walkers / autocorrelation_steps``: independent draws that they are worth.
    worst_r_hat : float
        The largest split R-hat over prices (Gelman and Rubin; halves of the walkers and of the
        steps as chains); 1 if they agree.
    """

    steps: int
    walkers: int
    autocorrelation_steps: float
    acceptance: float
    effective_draws: float
    worst_r_hat: float

    def __str__(self) -> str:
        return (
            f"{self.steps:,} steps of {self.walkers} walkers, autocorrelation time "
            f"{self.autocorrelation_steps:.0f} steps: {self.effective_draws:,.0f} effective draws; "
            f"split R-hat {self.worst_r_hat:.4f}"
        )

    @property
    def enough_steps(self) -> int:
        """Steps that would do by the autocorrelation time found, with a fifth to spare."""
        return 100 * math.ceil(1.2 * _LONG_ENOUGH * self.autocorrelation_steps / 100)

    @property
    def ok(self) -> bool:
        """Whether the chain is 50 autocorrelation times long and its parts agree to 2 %."""
        return self.steps >= _LONG_ENOUGH * self.autocorrelation_steps and self.worst_r_hat < 1.02


@dataclass(frozen=True)
class Calibration:
    """A fit: the posterior as a price list, and how it came about.

    Attributes
    ----------
    fit : str
        One of `FITS`.
    prior, posterior : PriceList
        What was believed before and after.
    claims : tuple of Claim
        What was fitted.
    convergence : Convergence
    """

    fit: str
    prior: PriceList = field(repr=False)
    posterior: Posterior = field(repr=False)
    claims: tuple[Claim, ...] = field(repr=False)
    convergence: Convergence


def prior(fit: str = "blind") -> PriceList:
    """Return what was believed before any claim (``data/calibration/prior.toml``).

    With ``"one-constant"`` a straight-line access costs what the first of its line costs.

    Raises
    ------
    LabError
        If the fit is unknown.
    """
    if fit not in FITS:
        raise unknown("fit", fit, FITS)
    believed = prices.load(data.path("calibration", "prior.toml"))
    if fit != "one-constant":
        return believed
    same = {
        name: believed.parameters[name].model_copy(
            update={"p05": 1.0, "p50": 1.0, "p95": 1.0, "source": "one constant: as the first"}
        )
        for name in FIRST_OF
    }
    return replace(
        believed,
        id=f"{believed.id}-one-constant",
        parameters=MappingProxyType({**believed.parameters, **same}),
        digest=hashlib.sha256(f"one-constant {believed.digest}".encode()).hexdigest(),
    )


def fitted_claims(fit: str) -> tuple[Claim, ...]:
    """Return the claims that a fit uses: those in the role "fit" that have a number and counts."""
    if fit not in FITS:
        raise unknown("fit", fit, FITS)
    roles = ("fit",) if fit == "blind" else ("fit", "target")
    return tuple(
        claim
        for claim in published.claims().values()
        if claim.role in roles and claim.counts is not None and claim.cycles == claim.cycles
    )


def weights(claims: Sequence[Claim], price_list: PriceList) -> FloatArray:
    """Return how often each claim pays each price: float64[claims, parameters].

    Columns in the order of ``price_list.parameters``. Software that a price includes is taken off,
    as `pricing.charged` does. Typed counts name the accesses alone: they come with the software
    that the price includes.
    """
    names = list(price_list.parameters)
    table = np.zeros((len(claims), len(names)))
    included = np.array(
        [
            price_list.parameters[PRICED_AS[p]].includes_instructions
            if PRICED_AS[p] in names
            else 0.0
            for p in PRIMITIVES
        ]
    )
    for row, claim in enumerate(claims):
        if claim.counts is None:
            raise LabError("nothing predicts this claim", where=f"claim {claim.id}", got=claim.note)
        bill = claim.counts.copy()
        if claim.basis == "simulated":
            bill[_L0] -= claim.counts @ included
        for primitive, times in zip(PRIMITIVES, bill, strict=True):
            if not times:
                continue
            if PRICED_AS[primitive] not in names:
                raise LabError(
                    "a claim needs a price that is unknown",
                    where=f"claim {claim.id}",
                    got=PRICED_AS[primitive],
                )
            table[row, names.index(PRICED_AS[primitive])] += times
    return table


def predict(claims: Sequence[Claim], price_list: PriceList, n: int, seed: int) -> FloatArray:
    """Return what drawn prices say of each claim: TSC cycles, float64[claims, n]."""
    drawn = price_list.sample(n, seed)
    table = weights(claims, price_list)
    cycles: FloatArray = table @ np.array([drawn[name] for name in price_list.parameters])
    return cycles


def log_likelihood(
    predicted: FloatArray, stated: FloatArray, sd: FloatArray, at_least: npt.NDArray[np.bool_]
) -> FloatArray:
    """Return the log-likelihood of claims, up to a constant.

    Parameters
    ----------
    predicted : float64[claims, n]
    stated, sd : float64[claims]
        The number and its assumed error, TSC cycles.
    at_least : bool[claims]
        Claims that state a lower bound: any higher prediction agrees as well.

    Returns
    -------
    float64[n]
    """
    from scipy.special import log_ndtr

    z = (predicted - stated[:, None]) / sd[:, None]
    total: FloatArray = np.where(at_least[:, None], log_ndtr(z), -0.5 * z**2).sum(axis=0)
    return total


def calibrate(
    fit: str = "with-claim",
    *,
    seed: int = 1,
    steps: int = STEPS,
    claims: Sequence[Claim] | None = None,
) -> Calibration:
    """Fit the prices to claims.

    Parameters
    ----------
    fit : str
        One of `FITS`.
    seed : int
        Seed of the sampler, not negative.
    steps : int
        Steps per walker that are kept; half as many are thrown away before.
    claims : sequence of Claim, optional
        Fit these instead: simulated ones in a test, a claim of one's own.

    Returns
    -------
    Calibration

    Raises
    ------
    LabError
        If the fit is unknown, the seed negative, there are under 100 steps, or a claim has no
        counts, no number or no error.
    """
    if seed < 0:
        raise LabError("not a seed", where="seed", got=seed, allowed="an integer from 0 up")
    if steps < 100:
        raise LabError("too few steps", where="steps", got=steps, allowed="100 or more")
    believed = prior(fit)
    chosen = tuple(fitted_claims(fit) if claims is None else claims)
    for claim in chosen:
        if not (claim.cycles == claim.cycles and claim.sd > 0):
            raise LabError("a claim to fit needs a number and an error", where=f"claim {claim.id}")
    table = weights(chosen, believed)
    names = list(believed.parameters)
    needed = {name for name, column in zip(names, table.T, strict=True) if column.any()}
    needed |= {FIRST_OF[name] for name in needed if name in FIRST_OF}
    needed |= {name for name, first in FIRST_OF.items() if first in needed}
    sampled = [name for name in names if name in needed]
    table = table[:, [names.index(name) for name in sampled]]
    narrow = replace(
        believed, parameters=MappingProxyType({n: believed.parameters[n] for n in sampled})
    )
    chain, acceptance = _sample(narrow, table, chosen, seed, steps)
    drawn = narrow.at(dict(zip(sampled, chain.reshape(-1, len(sampled)).T, strict=True)))
    by_price = np.stack([drawn[name] for name in sampled], axis=-1).reshape(chain.shape)
    moving = by_price.std(axis=(0, 1)) > 0
    convergence = _convergence(by_price[:, :, moving], acceptance)
    flat = by_price.reshape(-1, len(sampled))
    # At random: an even stride would keep a few walkers only.
    picked = prices.rng(seed, "kept draws").choice(len(flat), min(_KEPT, len(flat)), replace=False)
    return Calibration(
        fit=fit,
        prior=believed,
        posterior=_posterior(believed, fit, chosen, table, sampled, flat[picked], seed),
        claims=chosen,
        convergence=convergence,
    )


def _sample(
    believed: PriceList, table: FloatArray, claims: Sequence[Claim], seed: int, steps: int
) -> tuple[FloatArray, float]:
    """Run emcee: normal numbers float64[steps, walkers, prices], and the share accepted."""
    import emcee

    names = list(believed.parameters)
    stated, sd = np.array([c.cycles for c in claims]), np.array([c.sd for c in claims])
    at_least = np.array([c.bound == "at least" for c in claims])

    def log_probability(z: FloatArray) -> FloatArray:
        drawn = believed.at(dict(zip(names, z.T, strict=True)))
        predicted = table @ np.array([drawn[name] for name in names])
        value: FloatArray = log_likelihood(predicted, stated, sd, at_least) - 0.5 * (z**2).sum(1)
        return value

    source = np.random.SeedSequence([seed, _task("calibration")])
    start, moves = source.spawn(2)
    sampler = emcee.EnsembleSampler(
        WALKERS, len(names), log_probability, moves=emcee.moves.DEMove(), vectorize=True
    )
    first = np.random.default_rng(start).standard_normal((WALKERS, len(names)))
    # emcee's own random state is a RandomState; it takes the state of one.
    state = np.random.RandomState(np.random.MT19937(moves)).get_state()
    place = emcee.State(first, random_state=state)
    with tqdm(
        total=steps + steps // 2,
        unit="step",
        disable=True if steps < _SHOW_PROGRESS_FROM else None,
        delay=1,
    ) as bar:
        for stretch in (steps // 2, steps):  # the first is thrown away
            sampler.reset()
            for after in sampler.sample(place, iterations=stretch):
                place = after
                bar.update()
    chain: FloatArray = sampler.get_chain()
    return chain, float(sampler.acceptance_fraction.mean())


def _convergence(chain: FloatArray, acceptance: float) -> Convergence:
    """Judge a chain, float64[steps, walkers, prices]."""
    from emcee.autocorr import integrated_time

    steps, walkers, _ = chain.shape
    longest = float(np.max(integrated_time(chain, quiet=True, tol=0)))
    halves = [
        part.reshape(-1, chain.shape[2])
        for half in np.array_split(chain, 2, axis=0)
        for part in np.array_split(half, 2, axis=1)
    ]
    within = np.mean([part.var(axis=0) for part in halves], axis=0)
    between = np.var([part.mean(axis=0) for part in halves], axis=0)
    return Convergence(
        steps=steps,
        walkers=walkers,
        autocorrelation_steps=longest,
        acceptance=acceptance,
        effective_draws=steps * walkers / longest,
        worst_r_hat=float(np.sqrt(1 + between / within).max()),
    )


def _posterior(
    believed: PriceList,
    fit: str,
    claims: Sequence[Claim],
    table: FloatArray,
    sampled: Sequence[str],
    samples: FloatArray,
    seed: int,
) -> Posterior:
    """Return the samples as a price list, each price with the claims that it rests on."""
    parameters = dict(believed.parameters)
    for column, name in enumerate(sampled):
        low, middle, high = (float(q) for q in np.quantile(samples[:, column], (0.05, 0.5, 0.95)))
        before = believed.parameters[name]
        on = [c.id for c, row in zip(claims, table, strict=True) if row[column]]
        parameters[name] = Price(
            p05=low,
            p50=middle,
            p95=high,
            unit=before.unit if name == "cpi" else "TSC cycles",
            # A `next` that no claim is about moves with its `first` all the same.
            basis="calibrated" if on else "assumed",
            claims=tuple(on),
            includes_instructions=before.includes_instructions,
            source=f"posterior, fit {fit!r}; before: {before.source}"[:2000],
        )
    ids = " ".join(c.id for c in claims)
    text = f"{believed.digest} {ids} {fit} {seed} "
    digest = hashlib.sha256(text.encode() + np.ascontiguousarray(samples).tobytes()).hexdigest()
    return Posterior(
        id=f"{believed.generation.lower()}-posterior-{fit}",
        name=f"{believed.generation}, calibrated: {FITS[fit]}",
        generation=believed.generation,
        years=believed.years,
        note=f"Posterior of the prices given claims {ids}: drawn together, so that what the claims "
        "say of sums is kept. Prices without a claim are as they were believed before.",
        parameters=MappingProxyType(parameters),
        digest=digest,
        sampled=tuple(sampled),
        samples=samples,
    )


def _task(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def save(calibration: Calibration, path: Path, *, seed: int) -> None:
    """Write a posterior as a Parquet file that ``--cpu`` takes.

    The file carries the hashes of what it was made from: the claims, the prior and the tables that
    the model's counts come from.

    Raises
    ------
    LabError
        If the path does not end in ``.parquet`` or cannot be written.
    """
    inputs = {
        name: hashlib.sha256(data.path(*name.split("/")).read_bytes()).hexdigest()
        for name in (
            *("claims.csv", "calibration/prior.toml", "l0_paths.csv", "l0_lengths.csv"),
            *("l0_releases.toml", "vmcs_fields.csv"),
        )
    }
    about = {
        "fit": calibration.fit,
        "seed": seed,
        "claims": {c.id: {"cycles": c.cycles, "sd": c.sd} for c in calibration.claims},
        "convergence": {
            name: getattr(calibration.convergence, name)
            for name in Convergence.__dataclass_fields__
        },
        "inputs": inputs,
    }
    calibration.posterior.write(path, about)
