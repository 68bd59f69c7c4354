"""How sure are we: three calibrations side by side, and every claim held against each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nvmx_lab.costs import prices
from nvmx_lab.costs.calibration import FITS, STEPS, Calibration, calibrate, predict, weights
from nvmx_lab.costs.claims import TARGET, Claim, claims
from nvmx_lab.errors import LabError
from nvmx_lab.study.compare import QUANTILES, priced
from nvmx_lab.study.simulate import EXITS, simulate_mix

if TYPE_CHECKING:
    import pandas as pd

FREE = tuple(f"free_cycles_{q}" for q in QUANTILES)
"""Columns: a claim's prediction if a VMREAD behind another took nothing."""

AGREES_WITH_ANYTHING = 4.0
"""A predicted interval whose ends are further apart than by this factor tests little: assumed."""

PRICE_COLUMNS = ("fit", "parameter", "cycles_p05", "cycles_p50", "cycles_p95", "basis", "claims")
CLAIM_COLUMNS = (
    *("claim", "role", "used", "stated_cycles", "cycles_p05", "cycles_p50", "cycles_p95"),
    *("verdict", "description"),
)
"""What the command line shows of the frames here."""


def fits(seed: int = 1, steps: int = STEPS) -> dict[str, Calibration]:
    """Return the three fits of `nvmx_lab.costs.calibration.FITS`.

    Parameters
    ----------
    seed, steps
        As in `nvmx_lab.costs.calibration.calibrate`.
    """
    return {fit: calibrate(fit, seed=seed, steps=steps) for fit in FITS}


def calibrated_prices(calibrations: Mapping[str, Calibration]) -> pd.DataFrame:
    """Return every price that a claim is about, before and after each fit.

    Returns
    -------
    DataFrame
        One row per fit and price, "prior" first: fit, parameter, unit, cycles_p05, cycles_p50,
        cycles_p95 (TSC cycles; cpi: per instruction), basis, claims.
    """
    import pandas as pd

    first = next(iter(calibrations.values()))
    sampled = first.posterior.sampled
    drawn = first.prior.sample(prices.DRAWS, seed=0)
    rows: list[dict[str, Any]] = []
    for name in sampled:  # a fraction has no cycles of its own: those of the drawn prices
        low, middle, high = np.quantile(drawn[name], (0.05, 0.5, 0.95))
        basis = first.prior.parameters[name].basis
        rows.append(_price("prior", name, (low, middle, high), basis, ()))
    for fit, calibration in calibrations.items():
        for name in calibration.posterior.sampled:
            price = calibration.posterior.parameters[name]
            ends = (price.p05, price.p50, price.p95)
            rows.append(_price(fit, name, ends, price.basis, price.claims))
    return pd.DataFrame(rows)


def _price(
    fit: str, name: str, ends: tuple[float, float, float], basis: str, on: tuple[str, ...]
) -> dict[str, Any]:
    unit = "TSC cycles per instruction" if name == "cpi" else "TSC cycles"
    cycles = {f"cycles_{q}": float(v) for q, v in zip(QUANTILES, ends, strict=True)}
    return {
        "fit": fit,
        "parameter": name,
        "unit": unit,
        **cycles,
        "basis": basis,
        "claims": " ".join(on),
    }


def against_claims(calibrations: Mapping[str, Calibration], *, seed: int = 1) -> pd.DataFrame:
    """Hold every claim against what each fit predicts for it.

    A claim is inside if its number lies in the 90 % interval of the prediction with the claim's own
    (assumed) error added. Claims that a fit used are marked: for them that is no test. Nor is it
    for a claim all of whose prices no fitted claim is about.

    Returns
    -------
    DataFrame
        One row per fit and claim: fit, claim, description, detail, per, microarchitecture, year,
        role, used (by this fit), counts ("simulated", "assumed" or ""), stated_cycles, sd_cycles,
        at_least, cycles_p05, cycles_p50, cycles_p95 (predicted), low_cycles, high_cycles (with the
        error added), verdict ("inside", "inside, weak", "outside", "prior alone", "no
        prediction"), times_stated (median over the stated number), free_cycles_p05 ... _p95 (if a
        VMREAD behind another took nothing; NaN without one), mended_by_next (whether some price of
        it brings the claim inside; None if the claim is not outside, or has none), note, source.

    Raises
    ------
    LabError
        If there is no fit.
    """
    import pandas as pd

    if not calibrations:
        raise LabError("nothing to hold claims against", where="calibrations", got="none")
    known = claims().values()
    predictable = [claim for claim in known if claim.counts is not None]
    rows = []
    for fit, calibration in calibrations.items():
        posterior = calibration.posterior
        cycles = predict(predictable, posterior, prices.DRAWS, seed)
        bill = weights(predictable, posterior)
        names = list(posterior.parameters)
        fitted = np.array([bool(posterior.parameters[name].claims) for name in names])
        of_next = bill[:, names.index("vmread_next")]
        free = cycles - of_next[:, None] * np.maximum(bare_next(posterior, seed), 0.0)
        used = {claim.id for claim in calibration.claims}
        place = {claim.id: k for k, claim in enumerate(predictable)}
        for claim in known:
            k = place.get(claim.id)
            if k is None or claim.cycles != claim.cycles:
                row = _not_judged(claim)
            else:
                row = _judged(claim, cycles[k], free[k] if of_next[k] else None, seed)
                if not bill[k, fitted].any():
                    row["verdict"] = "prior alone"
            rows.append({"fit": fit, "used": claim.id in used, **row})
    return pd.DataFrame(rows)


def bare_next(price_list: prices.PriceList, seed: int = 0) -> prices.FloatArray:
    """Return drawn prices of a VMREAD behind another, without the instructions beside it.

    Returns
    -------
    float64[DRAWS]
        TSC cycles; see `nvmx_lab.costs.prices.PriceList.bare`.
    """
    return price_list.bare("vmread_next", price_list.sample(prices.DRAWS, seed))


def _about(claim: Claim) -> dict[str, Any]:
    return {
        "claim": claim.id,
        "description": claim.description,
        "detail": claim.detail,
        "per": claim.per,
        "microarchitecture": claim.microarchitecture,
        "year": claim.year,
        "role": claim.role,
        "counts": claim.basis,
        "stated_cycles": claim.cycles,
        "sd_cycles": claim.sd,
        "at_least": claim.bound == "at least",
        "note": claim.note,
        "source": claim.source,
    }


def _not_judged(claim: Claim) -> dict[str, Any]:
    """Return a claim without a number, or without a prediction."""
    predicted = (*(f"cycles_{q}" for q in QUANTILES), "low_cycles", "high_cycles", "times_stated")
    nothing = dict.fromkeys((*predicted, *FREE), float("nan"))
    return {**_about(claim), **nothing, "verdict": "no prediction", "mended_by_next": None}


def _judged(
    claim: Claim, predicted: prices.FloatArray, free: prices.FloatArray | None, seed: int
) -> dict[str, Any]:
    """Return a claim beside its prediction; `free`: if VMREADs behind another took nothing."""
    about = _about(claim)
    sd = claim.sd if claim.sd == claim.sd else 0.0
    noise = sd * prices.rng(seed, f"claim {claim.id}").standard_normal(len(predicted))
    low, high = np.quantile(predicted + noise, (0.05, 0.95))
    inside = claim.cycles <= high if about["at_least"] else low <= claim.cycles <= high
    mended = None
    if free is not None and not inside:
        # Dearer they would bring any prediction up; cheaper than nothing they cannot be.
        mended = bool(claim.cycles > high or claim.cycles >= np.quantile(free + noise, 0.05))
    weak = low <= 0 or high / low > AGREES_WITH_ANYTHING
    ends = np.quantile(predicted, (0.05, 0.5, 0.95))
    return {
        **about,
        **{f"cycles_{q}": float(v) for q, v in zip(QUANTILES, ends, strict=True)},
        **dict(zip(FREE, _quantiles(free), strict=True)),
        "mended_by_next": mended,
        "low_cycles": float(low),
        "high_cycles": float(high),
        "times_stated": float(ends[1] / claim.cycles),
        "verdict": ("inside, weak" if weak else "inside") if inside else "outside",
    }


def _quantiles(values: prices.FloatArray | None) -> list[float]:
    nothing = [float("nan")] * len(QUANTILES)
    return nothing if values is None else np.quantile(values, (0.05, 0.5, 0.95)).tolist()


def savings(
    calibrations: Mapping[str, Calibration],
    mix: str = "cpuid",
    *,
    kvm: tuple[str, str] = ("5.2", "5.2+patch13"),
    exits: int = EXITS,
    seed: int = 1,
) -> pd.DataFrame:
    """Return what the patch saves on a mix with each fit's prices, and with the shipped lists.

    Returns
    -------
    DataFrame
        One row per price list: prices, cpu, rests_on_the_claim, meets_the_claim (whether the
        patch's claim is inside, as in `against_claims`), and exit_leg_cycles_p05 ... _p95 (the
        saving per nested exit).
    """
    import pandas as pd

    chosen, simulated = simulate_mix(mix, list(kvm), [None, None], exits=exits, seed=seed)
    lists: dict[str, prices.PriceList] = {
        f"fit: {fit}": calibration.posterior for fit, calibration in calibrations.items()
    }
    lists |= {f"shipped: {cpu}": prices.load(cpu) for cpu in (prices.DEFAULT, prices.BLIND)}
    target = claims()[TARGET]
    rows = []
    for name, price_list in lists.items():
        (predicted,) = predict([target], price_list, prices.DRAWS, seed)
        saving = priced(chosen, simulated, price_list, seed=seed).saving["exit_leg_cycles"]
        rows.append(
            {
                "prices": name,
                "cpu": price_list.id,
                "rests_on_the_claim": TARGET in price_list.claims,
                "meets_the_claim": _judged(target, predicted, None, seed)["verdict"] != "outside",
                **{f"exit_leg_cycles_{q}": saving[q] for q in QUANTILES},
            }
        )
    return pd.DataFrame(rows)
