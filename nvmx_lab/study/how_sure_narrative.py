"""What notebook 04 says: tables and sentences made from calibrations and claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nvmx_lab.costs.calibration import FITS, Calibration
from nvmx_lab.costs.claims import TARGET, claim
from nvmx_lab.nested.primitives import PRIMITIVES
from nvmx_lab.study.how_sure import FREE, bare_next
from nvmx_lab.study.narrative import badge

if TYPE_CHECKING:
    import pandas as pd

NAMES: Final = {
    "prior": "before any claim",
    "blind": "without the patch's claim",
    "with-claim": "with the patch's claim",
    "one-constant": "one constant per VMREAD",
}
_SPACE = "\N{NO-BREAK SPACE}"

TESTED: Final = ("inside", "inside, weak", "outside")
"""Verdicts of claims that test a fit."""


def about() -> str:
    """Return what the three fits take for true, as Markdown."""
    lines = "\n".join(f"* **{NAMES[fit]}**: {meaning}." for fit, meaning in FITS.items())
    target = claim(TARGET)
    return (
        f"The claim in question: about {target.cycles:.0f} cycles per {target.per} "
        f"{badge('published')}, with an error of {target.sd:.0f} {badge('assumed')}.\n\n{lines}"
    )


def of_claims() -> str:
    """Return how the claims are used, as Markdown."""
    from nvmx_lab.costs.claims import claims

    known = claims().values()
    by = {
        role: [c.id for c in known if c.role == role and c.basis]
        for role in ("target", "fit", "check", "hold-out")
    }
    run = [c.id for c in known if c.basis == "simulated"]
    typed = [c.id for c in known if c.basis == "assumed"]
    none = [c.id for c in known if not c.basis]
    held = by["hold-out"] + by["check"]
    return (
        f"There are {len(known)} claims {badge('published')}. The target is {_ids(by['target'])}; "
        f"{_ids(by['fit'])} are for fitting, {_ids(held)} are held out. None gives an error: "
        f"each is {badge('assumed')}. What a claim is about is counted in a run of the model for "
        f"{_ids(run)} {badge('simulated')} and typed for {_ids(typed)} {badge('assumed')}; nothing "
        f"here predicts {_ids(none)}."
    )


def convergence(calibrations: Mapping[str, Calibration]) -> pd.DataFrame:
    """Return how well each chain was sampled, one row per fit."""
    import pandas as pd

    rows = []
    for fit, calibration in calibrations.items():
        found = calibration.convergence
        rows.append(
            {
                "fit": NAMES[fit],
                "claims fitted": " ".join(c.id for c in calibration.claims),
                "steps": f"{found.steps:,}",
                "walkers": found.walkers,
                "autocorrelation, steps": f"{found.autocorrelation_steps:.0f}",
                "effective draws": f"{found.effective_draws:,.0f}",
                "split R-hat": f"{found.worst_r_hat:.4f}",
                "converged": "yes" if found.ok else "no",
            }
        )
    return pd.DataFrame(rows).set_index("fit")


def price_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the prices of `how_sure.calibrated_prices`, a row per price, a column per fit."""
    shown = frame.assign(
        text=[
            f"{row.cycles_p50:.3g} ({row.cycles_p05:.3g} to {row.cycles_p95:.3g})".replace(
                " ", _SPACE
            )
            for row in frame.itertuples()
        ]
    )
    table = shown.pivot(index="parameter", columns="fit", values="text")
    table = table.reindex(
        index=list(dict.fromkeys(frame["parameter"])), columns=list(dict.fromkeys(frame["fit"]))
    )
    on = frame[frame["fit"] == "with-claim"].set_index("parameter")["claims"]
    table["claims about it"] = on
    return table.rename(columns=NAMES)


def held_out(frame: pd.DataFrame, fit: str) -> pd.DataFrame:
    """Return every claim that one fit did not use, worded for a table."""
    import pandas as pd

    rows = []
    for row in _rows(frame[(frame["fit"] == fit) & ~frame["used"]]):
        rows.append(
            {
                "claim": row["claim"],
                "about": row["description"],
                "on": f"{row['microarchitecture']}, {row['year']}",
                "stated": _stated(row),
                "predicted": _span(row, "cycles_p05", "cycles_p50", "cycles_p95"),
                "with the claim's error": _ends(row),
                "verdict": _meaning(row),
                "counts": row["counts"] or "none",
            }
        )
    return pd.DataFrame(rows).set_index("claim")


def fitted(frame: pd.DataFrame, fit: str) -> pd.DataFrame:
    """Return how well one fit meets the claims that it was fitted to."""
    import pandas as pd

    rows = [
        {
            "claim": row["claim"],
            "about": row["description"],
            "stated": _stated(row),
            "error (assumed)": f"{row['sd_cycles']:.0f}",
            "after the fit": _span(row, "cycles_p05", "cycles_p50", "cycles_p95"),
            "with the claim's error": _ends(row),
            "verdict": row["verdict"],
        }
        for row in _rows(frame[(frame["fit"] == fit) & frame["used"]])
    ]
    return pd.DataFrame(rows).set_index("claim")


def savings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the saving with each price list, worded for a table."""
    import pandas as pd

    rows = [
        {
            "prices": row["prices"],
            "saving on the exit leg, cycles": _span(
                row, *(f"exit_leg_cycles_{q}" for q in ("p05", "p50", "p95"))
            ),
            "rests on the patch's claim": _rests(row),
        }
        for row in _rows(frame)
    ]
    return pd.DataFrame(rows).set_index("prices")


def _rests(row: Mapping[str, Any]) -> str:
    if not row["rests_on_the_claim"]:
        return "no: predicted"
    if row["meets_the_claim"]:
        return "yes: reproduced, not predicted"
    return "yes, and misses it all the same"


def of_one_constant(frame: pd.DataFrame) -> str:
    """Return what becomes of the claims if every VMREAD costs the same, as Markdown."""
    rows = frame[frame["fit"] == "one-constant"]
    missed = rows[rows["verdict"] == "outside"]
    own = frame[(frame["fit"] == "with-claim") & (frame["verdict"] == "outside")]
    more = sorted(set(missed["claim"]) - set(own["claim"]))
    if not more:
        return (
            "**One constant does no worse here**: every claim outside its prediction is outside "
            "that of the two-price fit too."
        )
    lost = [row for row in _rows(rows) if row["claim"] in more]
    two = frame[frame["fit"] == "with-claim"].set_index("claim")["verdict"]
    weakly = [name for name in more if two[name] == "inside, weak"]
    kinds = []
    for access, some in (
        ("VMREAD", [row for row in lost if not _of_vmwrites(row["claim"])]),
        ("VMWRITE", [row for row in lost if _of_vmwrites(row["claim"])]),
    ):
        named = "; ".join(
            f"{row['claim']} ({row['description']}, {row['microarchitecture']}: stated "
            f"{row['stated_cycles']:,.5g}, predicted {row['cycles_p50']:,.0f})"
            for row in some
        )
        if some:
            kinds.append(f"* of {access}s: {named}")
    return (
        f"**One constant per access fails.** (Predicted: {badge('simulated')}, stated: "
        f"{badge('published')}.) It misses "
        f"{_count(len(more), 'claim')} that two prices meet"
        + (f", {_ids(weakly)} as almost any number would" if weakly else "")
        + ":\n\n"
        + "\n".join(kinds)
        + "\n\n"
        "To meet the patch's claim a VMREAD's constant must be as low as a straight line asks, "
        "and a single VMREAD is then too cheap; a VMWRITE's, which single ones fix, makes a "
        "straight line of them too dear."
    )


def _of_vmwrites(name: str) -> bool:
    """Return whether a claim is about VMWRITEs."""
    counts = claim(name).counts
    return counts is not None and bool(counts[list(PRIMITIVES).index("vmwrite_first")])


def of_contradictions(frame: pd.DataFrame, fit: str = "with-claim") -> str:
    """Return the held-out claims that contradict a fit, and those that agree, as Markdown."""
    tested = frame[(frame["fit"] == fit) & ~frame["used"] & frame["verdict"].isin(TESTED)]
    outside = tested[tested["verdict"] == "outside"]
    inside = tested[tested["verdict"] == "inside"]
    weak = tested[tested["verdict"] == "inside, weak"]
    text = (
        f"Of {len(tested)} claims that test this fit, {_ids(outside['claim'])} "
        f"{_are(len(outside))} outside the prediction, {_ids(inside['claim'])} "
        f"{_are(len(inside))} inside, and {_ids(weak['claim'])} {_are(len(weak))} inside an "
        "interval so wide that it tests little."
    )
    alone = list(frame[(frame["fit"] == fit) & (frame["verdict"] == "prior alone")]["claim"])
    if alone:
        text += f" {_of_prior(alone)}"
    lines = [
        f"* **{row['claim']}**, {row['description']}: {_why(row)}. Counted: {row['note']}."
        for row in _rows(outside)
    ]
    return text + ("\n\n" + "\n".join(lines) if lines else "")


def answer(
    calibrations: Mapping[str, Calibration],
    frame: pd.DataFrame,
    prices: pd.DataFrame,
    sensitivity: pd.DataFrame,
) -> str:
    """Return the notebook's answer, as Markdown.

    Parameters
    ----------
    calibrations
        The fits.
    frame
        `how_sure.against_claims`.
    prices
        `how_sure.calibrated_prices`.
    sensitivity
        `nvmx_lab.study.sensitivity.sensitivity` with prices made without the claim.
    """
    (blind,) = (r for r in _rows(frame) if (r["fit"], r["claim"]) == ("blind", TARGET))
    by = {(row["fit"], row["parameter"]): row for row in _rows(prices)}
    next_without, next_with = (by[fit, "vmread_next"] for fit in ("blind", "with-claim"))
    ratio = blind["cycles_p50"] / blind["stated_cycles"]
    inside = blind["verdict"] != "outside"
    leader = max(_rows(sensitivity), key=lambda row: row["total"])
    ok = all(c.convergence.ok for c in calibrations.values())
    return "\n\n".join(
        [
            f"**The claim is {'possible' if inside else 'not what was to be expected'}, "
            f"{'and' if inside else 'but'} it carries itself.** Without it, the other claims "
            f"predict {_span(blind, 'cycles_p05', 'cycles_p50', 'cycles_p95')} cycles for it, "
            f"{ratio:.1f} times what is stated as median {badge('simulated')}; "
            f"{blind['stated_cycles']:.0f} {badge('published')} is "
            f"{'inside' if inside else 'outside'} that interval. With it, a VMREAD right behind "
            f"another costs {_price(next_with)} cycles instead of {_price(next_without)} "
            f"{badge('calibrated')}.",
            _of_held_out(frame),
            of_one_constant(frame),
            f"**What moves the answer most** is `{leader['input']}`: {leader['total']:.0%} of the "
            "variance of the saving that prices made without the claim predict, the inputs it acts "
            "with included "
            f"{badge('simulated')}.".replace("%", f"{_SPACE}%"),
            _of_measuring(calibrations),
            ""
            if ok
            else "**The sampler has not converged**: run it again with more steps before using "
            "any of this.",
        ]
    ).strip()


def _of_held_out(frame: pd.DataFrame) -> str:
    """Say how many held-out claims agree, and of what the contradictions are."""
    rows = {
        fit: {r["claim"]: r for r in _rows(frame[(frame["fit"] == fit) & ~frame["used"]])}
        for fit in ("with-claim", "blind")
    }
    tested = {k: r for k, r in rows["with-claim"].items() if r["verdict"] in TESTED}
    by = {
        verdict: [k for k, r in tested.items() if r["verdict"] == verdict]
        for verdict in ("inside", "inside, weak", "outside")
    }
    text = (
        f"**Of {len(tested)} claims held out that test the fit, {len(by['inside'])} agree, "
        f"{len(by['inside, weak'])} agree as almost any number would, and {len(by['outside'])} "
        f"contradict** ({_ids(by['outside'])}) {badge('simulated')}."
    )
    alone = [k for k, r in rows["with-claim"].items() if r["verdict"] == "prior alone"]
    if alone:
        text += f" {_of_prior(alone)}"
    of_next = [k for k in tested if _has_next(k)]
    if of_next:
        good = [k for k in of_next if k not in by["outside"]]
        text += (
            f" Only {_ids(of_next)} have a VMREAD behind another in them; of those "
            f"{len(good)} of {len(of_next)} agree: "
            + "; ".join(f"{k} is {_why(tested[k])}" for k in of_next if k not in good)
            + f" (predicted: {badge('simulated')}, stated: {badge('published')})."
        )
    other = [k for k in by["outside"] if tested[k]["mended_by_next"] is False]
    if other:
        text += (
            " With such VMREADs for nothing the prediction would be "
            + " and ".join(
                f"{_span(tested[k], *FREE)} for the {tested[k]['stated_cycles']:,.0f} of {k}"
                for k in other
            )
            + f" {badge('simulated')}: what {_ids(other)} "
            f"{'contradicts' if len(other) == 1 else 'contradict'} is something else in the "
            "prices or the counts."
        )
    turned = [k for k in by["outside"] if rows["blind"][k]["verdict"] != "outside"]
    if turned:
        weakly = all(rows["blind"][k]["verdict"] == "inside, weak" for k in turned)
        text += (
            f" {_ids(turned)} {_are(len(turned))} inside without the patch's claim"
            + (", as almost any number would be" if weakly else "")
            + ": it is the "
            f"claim that {'contradicts it' if len(turned) == 1 else 'contradicts them'}."
        )
    return text


def _has_next(name: str) -> bool:
    """Return whether a claim's counts have a VMREAD right behind another."""
    counts = claim(name).counts
    return counts is not None and bool(counts[list(PRIMITIVES).index("vmread_next")])


def _of_measuring(calibrations: Mapping[str, Calibration]) -> str:
    """Say what to time, on what, and what which result would mean."""
    claimed, other = (bare_next(calibrations[fit].posterior) for fit in ("with-claim", "blind"))
    low, middle, high = np.quantile(claimed, (0.05, 0.5, 0.95))
    low_other, middle_other, high_other = np.quantile(other, (0.05, 0.5, 0.95))
    included = calibrations["blind"].posterior.parameters["vmread_next"].includes_instructions
    shared = f"{np.mean(other < high):.0%}".replace("%", f"{_SPACE}%")
    below = f"{np.mean(claimed < 0):.0%}".replace("%", f"{_SPACE}%")
    return (
        "**What would settle it:** time 1 and 35 back-to-back VMREADs of distinct fields of the "
        "current VMCS, on one named Intel host of the patch's time, Skylake to Coffee Lake. Each "
        f"more takes {_decimal(middle, low, high)} cycles by the prices with the claim and "
        f"{_decimal(middle_other, low_other, high_other)} without it {badge('calibrated')}, both "
        f"less the {included:g} instructions that the prices include beside each "
        f"{badge('assumed')}. More than {high:.0f} would contradict the claim, if its machine, "
        f"which is not stated, was one of those. Less would not prove it: {shared} of the draws "
        "without it are there too. But it would replace the price on which the saving hangs most "
        f"by a measured one. ({below} of the draws with it are below 0: there it leaves less than "
        "those instructions are taken to cost.) "
        "[Notebook 09](09_could_you_measure_it.ipynb) says how."
    )


def _decimal(middle: float, low: float, high: float) -> str:
    text = f"{middle:.1f} ({low:.1f} to {high:.1f})".replace(" ", _SPACE)
    return text.replace("-", "\N{MINUS SIGN}")


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _meaning(row: Mapping[str, Any]) -> str:
    """Say what a verdict means, in a few words."""
    match row["verdict"]:
        case "no prediction":
            return row["note"] or "nothing to compare with"
        case "inside":
            return "agrees"
        case "inside, weak":
            return "agrees, as almost any number would"
        case "prior alone":
            return "says nothing of the fit: no claim was fitted to its prices"
    return f"contradicts: predicted {_off(row)}"


def _why(row: Mapping[str, Any]) -> str:
    numbers = f"{row['cycles_p50']:,.0f} for {row['stated_cycles']:,.0f} cycles"
    return f"predicted {_off(row)} ({numbers})"


def _off(row: Mapping[str, Any]) -> str:
    times = row["times_stated"]
    return f"{times:.1f} times too high" if times > 1 else f"{1 / times:.1f} times too low"


def _stated(row: Mapping[str, Any]) -> str:
    if row["stated_cycles"] != row["stated_cycles"]:
        return "no number"
    least = "at least " if row["at_least"] else ""
    return f"{least}{row['stated_cycles']:,.5g}"


def _span(row: Mapping[str, Any], low: str, middle: str, high: str) -> str:
    if row[middle] != row[middle]:
        return "\N{EN DASH}"
    text = f"{row[middle]:,.0f} ({row[low]:,.0f} to {row[high]:,.0f})"
    return text.replace(" ", _SPACE).replace("-", "\N{MINUS SIGN}")


def _ends(row: Mapping[str, Any]) -> str:
    if row["low_cycles"] != row["low_cycles"]:
        return "\N{EN DASH}"
    text = f"{row['low_cycles']:,.0f} to {row['high_cycles']:,.0f}"
    return text.replace(" ", _SPACE).replace("-", "\N{MINUS SIGN}")


def _price(row: Mapping[str, Any]) -> str:
    return (
        f"{row['cycles_p50']:.1f} ({row['cycles_p05']:.1f} to {row['cycles_p95']:.1f})"
    ).replace(" ", _SPACE)


def _ids(names: object) -> str:
    listed = list(names)  # type: ignore[call-overload]
    if not listed:
        return "none"
    *first, last = listed
    return f"{', '.join(first)} and {last}" if first else str(last)


def _are(n: int) -> str:
    return "is" if n in (0, 1) else "are"


def _of_prior(names: Sequence[str]) -> str:
    """Say which claims test no fit."""
    if len(names) == 1:
        return f"{_ids(names)} says nothing of it: no claim was fitted to its prices."
    return f"{_ids(names)} say nothing of it: no claim was fitted to their prices."


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
