"""What ``05_the_series`` shows beside figures: tables and sentences, each made from results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from nvmx_lab import data
from nvmx_lab.costs import prices
from nvmx_lab.study import series
from nvmx_lab.study.narrative import badge
from nvmx_lab.study.published import SERIES
from nvmx_lab.study.series import WHOLE, Waterfall

if TYPE_CHECKING:
    import pandas as pd

_SPACE: Final = "\N{NO-BREAK SPACE}"
_SMALL_SHARE: Final = 0.05
_SMALL_CYCLES: Final = 20.0
_SMALL_CHANGE: Final = 0.1
_THE_PATCH: Final = "patch13"
_TOTALS: Final = {
    "simulated": "all, simulated",
    "claims": "all claims",
    "measured": "measured",
    "unexplained": "not explained",
}
_SIDES: Final = {"within": "holds the claim", "above": "more", "below": "less"}


def about(mix: str) -> str:
    """Return what was measured on a loop, as Markdown.

    Raises
    ------
    LabError
        If the mix is unknown, or no total of it is published.
    """
    loop = series.loop(mix)
    published = loop.published
    assert published is not None  # noqa: S101 - `loop` has looked
    before, after = published.before_cycles, published.after_cycles
    times = published.exits_per_iteration
    exits = "one nested exit" if times == 1 else f"{times} nested exits"
    text = (
        f"**{loop.title}** (`{mix}`), {exits} per iteration. {badge('published')} Before the "
        f"series {_number(before)} cycles per iteration, after it {_number(after)}: "
        f"{_number(before - after)} less, {_percent((before - after) / before)}. Processor, clock "
        f"and mitigations are not given. {badge('simulated')} KVM {' and '.join(SERIES)} "
        "stand for before and after."
    )
    if loop.assumes:
        text += f"\n\n{badge('assumed')} {loop.assumes}"
    return text


def claims() -> pd.DataFrame:
    """Return what patches of the series claim, worded for a table.

    Returns
    -------
    DataFrame
        Index patch; columns change, claim, "cycles per round trip" (or what is claimed without a
        number), "in the model as", source. Patches without a claim are not in it.
    """
    import pandas as pd

    rows = [
        {
            "patch": patch.patches,
            "change": patch.subject,
            "claim": patch.claimed_text,
            "cycles per round trip": _claim(patch.claimed_low, patch.claimed_high) or "no number",
            "in the model as": patch.feature or "not in the model",
            "source": patch.source,
        }
        for patch in series.patches()
        if patch.claimed_text
    ]
    return pd.DataFrame(rows).set_index("patch")


def of_sum(mix: str) -> str:
    """Return how far the claims alone reach, as Markdown."""
    published = series.loop(mix).published
    assert published is not None  # noqa: S101 - `loop` has looked
    low, high = (bound * published.exits_per_iteration for bound in series.claims_sum())
    measured = published.before_cycles - published.after_cycles
    count = sum(patch.claimed_low is not None for patch in series.patches())
    text = (
        f"{badge('published')} The {count} numbers add up to **{_range(low, high)} cycles** per "
        f"iteration of `{mix}`, {_share(low, high, measured)} of the {_number(measured)} measured. "
    )
    if measured >= low:
        text += f"That leaves {_range(max(measured - high, 0.0), measured - low)} cycles for "
    else:
        text += "That leaves nothing for "
    silent = [p.patches for p in series.modelled() if p.claimed_low is None]
    text += (
        f"all others: of those in the model, {_listed(silent)}. The numbers are rounded, none has "
        "an error, and each may have been measured on another loop than this."
    )
    return text


def steps(result: Waterfall, mix: str) -> pd.DataFrame:
    """Return the steps of one loop, worded for a table: cycles per iteration.

    Returns
    -------
    DataFrame
        Index patch; columns "saves, in series order" (median and 90 % interval), mean, "alone in
        5.2", "last in 5.3", claim, "simulated against claim". Totals below the steps.
    """
    import pandas as pd

    frame = result.of(mix)
    first, end = SERIES
    rows = []
    for row in _rows(frame[frame["what"].isin(["step", *_TOTALS])]):
        step, what = row["what"] == "step", row["what"]
        simulated = step or what in ("simulated", "unexplained")
        saved = _interval(row, "cycles") if simulated else None
        rows.append(
            {
                "patch": row["patches"] if step else _TOTALS[what],
                "saves, in series order": _number(row["cycles_p50"])
                if what == "measured"
                else saved,
                "mean": _number(row["cycles_mean"]) if simulated else None,
                f"alone in {first}": _interval(row, "alone_cycles") if step else None,
                f"last in {end}": _interval(row, "last_cycles") if step else None,
                "claim": _claim(row["claimed_low_cycles"], row["claimed_high_cycles"]),
                "simulated, against the claim": _SIDES.get(row["against_claim"]),
            }
        )
    return pd.DataFrame(rows).set_index("patch").fillna("\N{EN DASH}")


def parts(result: Waterfall, mix: str) -> pd.DataFrame:
    """Return what each step is made of and rests on, worded for a table.

    Returns
    -------
    DataFrame
        Index patch; columns "made of" (prices with at least 5 % of the step's cycles), "rests on
        its own claim" and "on claims of other patches of the series" (by their letters).
    """
    import pandas as pd

    frame, made = result.of(mix), result.parts_of(mix)
    rows = []
    for row in _rows(frame[frame["what"] == "step"]):
        of_step = made[made["feature"] == row["feature"]].sort_values("share", ascending=False)
        own = row["own_claims"].split()
        others = [name for name in row["series_claims"].split() if name not in own]
        rows.append(
            {
                "patch": row["patches"],
                "made of": "; ".join(
                    f"{_part(part)}: {_number(part['cycles_mean'])}"
                    for part in _rows(of_step)
                    if part["share"] >= _SMALL_SHARE
                ),
                "rests on its own claim": ", ".join(own) or "no",
                "on claims of other patches of the series": ", ".join(others) or "no",
            }
        )
    return pd.DataFrame(rows).set_index("patch")


def of_claims(result: Waterfall, mix: str) -> str:
    """Return where single patches agree with their claims, and what that is worth, as Markdown."""
    frame = result.of(mix)
    claimed = _rows(frame[frame["against_claim"] != ""])
    lines = [_against(row, result.parts_of(mix)) for row in claimed]
    circular = [row["patches"] for row in _rows(frame) if row["own_claims"]]
    text = "\n".join(f"* {line}" for line in lines)
    text += "\n\n"
    if circular:
        whose = "the patch's own claim" if len(circular) == 1 else "the patches' own claims"
        text += (
            f"In {_listed(circular)} prices rest on {whose}: **there agreement is no test**, it is "
            f"how {result.cpu} was made. "
        )
    if WHOLE in prices.load(result.cpu).claims:
        text += "A price rests on the measured saving of the series, so the sum is no test either."
    else:
        text += "No price rests on the measured totals: they test the sum."
    return text.strip()


def _against(row: Mapping[str, Any], made: pd.DataFrame) -> str:
    """Say how one patch stands to its claim."""
    side = row["against_claim"]
    low, high = row["claimed_low_cycles"], row["claimed_high_cycles"]
    text = f"**{row['patches']}**: simulated {_words(row, 'cycles')}, claimed {_claim(low, high)}. "
    if side == "within":
        text += "The interval holds the claim"
        text += ", on which a price in it rests." if row["own_claims"] else "."
        return text
    text += "**The simulated saving is " + ("larger" if side == "above" else "smaller") + ".**"
    of_step = made[made["feature"] == row["feature"]]
    if row["left_out"]:
        writes = of_step.loc[of_step["price"].str.startswith("vmwrite"), "cycles_mean"].sum()
        text += f" The claim leaves out {row['left_out']}: {_number(writes)} cycles here (mean)."
    of_step = of_step[of_step["share"] >= _SMALL_SHARE].sort_values("share", ascending=False)
    biggest = _rows(of_step)[:2]
    said = _listed(f"{_number(part['cycles_mean'])} for {_part(part)}" for part in biggest)
    return f"{text} Most of it, in means: {said}."


def of_order(result: Waterfall, mix: str) -> str:
    """Return for which patches the order counts, as Markdown."""
    frame = result.of(mix)
    rows = _rows(frame[frame["what"] == "step"])
    first, end = SERIES
    moved = []
    for row in rows:
        middles = [row[f"{way}_p50"] for way in ("cycles", "alone_cycles", "last_cycles")]
        spread = max(middles) - min(middles)
        if spread > _SMALL_CYCLES and spread > _SMALL_CHANGE * max(map(abs, middles)):
            moved.append(
                f"* **{row['patches']}**: {_number(row['alone_cycles_p50'])} alone in {first}, "
                f"{_number(row['cycles_p50'])} in its place, "
                f"{_number(row['last_cycles_p50'])} as the last one in {end}."
            )
    if not moved:
        return "The order of the patches hardly matters: alone, in place or last, each saves alike."
    text = (
        f"{badge('simulated')} For {len(moved)} of {len(rows)} patches it matters which others are "
        "there (medians):\n\n" + "\n".join(moved)
    )
    pair = [row for row in rows if row["last_cycles_p05"] > 2 * max(row["alone_cycles_p50"], 0)]
    checks = result.parts_of(mix)
    needs = checks[(checks["price"] == "control_check") & (checks["cycles_mean"] > 0)]
    if len(pair) > 1 and set(needs["feature"]) <= {row["feature"] for row in pair} and len(needs):
        text += (
            f"\n\n{_listed(row['patches'] for row in pair)} need each other: as long as one of "
            "them is missing, a major control field is still written before every entry, and the "
            "processor checks them all. In the order of the series the last of them gets the "
            "whole saving."
        )
    return text


def loops(result: Waterfall) -> pd.DataFrame:
    """Return all loops, worded for a table: cycles per iteration.

    Returns
    -------
    DataFrame
        Index loop; columns exits, before, after, measured saving, simulated saving, not explained.
    """
    import pandas as pd

    rows = [
        {
            "loop": row["mix"],
            "exits": row["exits_per_iteration"],
            "before": _number(row["before_cycles"]),
            "after": _number(row["after_cycles"]),
            "measured saving": _number(row["measured_cycles"]),
            "simulated saving": _interval(row, "cycles"),
            "measured is inside": "yes" if row["inside"] else "no",
            "not explained": _interval(row, "unexplained_cycles"),
        }
        for row in _rows(result.by_loop())
    ]
    return pd.DataFrame(rows).set_index("loop")


def not_modelled() -> str:
    """Return the patches that the model does not have and that are not known to change nothing."""
    said = {
        "saves": "Would make the simulated saving larger",
        "adds": "Would make it smaller",
        "not known": "Effect not known",
    }
    absent = [patch for patch in series.patches() if not patch.feature]
    lines = []
    for effect, meaning in said.items():
        these = [patch for patch in absent if patch.effect == effect]
        if these:
            listed = "; ".join(f"{patch.patches} ({patch.subject})" for patch in these)
            lines.append(f"* {meaning}: {listed}.")
    rest = [patch.patches for patch in absent if patch.effect == "none"]
    return (
        "\n".join(lines)
        + "\n\nThe others change names, error paths, other configurations or nothing that a clean "
        f"nested round trip executes: {_listed(rest)}."
    )


def answer(result: Waterfall, mix: str) -> str:
    """Return what the notebook found, as Markdown."""
    rows = {row["what"]: row for row in _rows(result.of(mix))}  # of the steps, the last
    total, left = rows["simulated"], rows["unexplained"]
    measured = rows["measured"]["cycles_p50"]
    low, high = total["cycles_p05"], total["cycles_p95"]
    if measured < low:
        where = (
            "**The model saves more than was measured**: the measured saving lies below the "
            f"interval, and {_words(_turned(left), 'cycles')} simulated cycles were not seen."
        )
    elif measured > high:
        where = (
            "**The model explains less than was measured**: the measured saving lies above the "
            f"interval, and {_words(left, 'cycles')} cycles stay unexplained."
        )
    else:
        where = (
            "The measured saving lies inside the interval; measured minus simulated is "
            f"{_words(left, 'cycles')} cycles."
        )
    said = [
        f"{badge('published')} On `{mix}` the series of 43 patches saved {_number(measured)} "
        f"cycles per iteration. {badge('simulated')} The model, with the prices of {result.cpu}, "
        f"saves {_words(total, 'cycles')}. {where}",
        _of_misses(_rows(result.of(mix))),
        _of_groups(rows, result.parts_of(mix)),
        _of_the_patch(result, mix, measured),
        _of_loops(result),
        _of_doubt(result, mix, left),
    ]
    return "\n\n".join(said)


def _of_misses(rows: Iterable[Mapping[str, Any]]) -> str:
    """Say which patches the model does not agree with."""
    claimed = [row for row in rows if row["against_claim"]]
    missed = [
        f"{row['patches']} ({_number(row['cycles_p50'])} simulated, "
        f"{_claim(row['claimed_low_cycles'], row['claimed_high_cycles'])} claimed)"
        for row in claimed
        if row["against_claim"] != "within"
    ]
    if not missed:
        return f"Each of the {len(claimed)} patches with a number keeps it in the model."
    return (
        f"Of the {len(claimed)} patches with a number, the simulated interval misses it for "
        f"{_listed(missed)}."
    )


def _of_groups(rows: Mapping[str, Mapping[str, Any]], made: pd.DataFrame) -> str:
    """Say whether the excess is in the patches that claim a number, or in the others."""
    claimed, others = rows["claimed steps"], rows["other steps"]
    measured = rows["measured"]["cycles_p50"]
    low, high = claimed["claimed_low_cycles"], claimed["claimed_high_cycles"]
    text = (
        f"The numbers that patches claim add up to {_range(low, high)}; simulated, the same "
        f"patches save {_words(claimed, 'cycles')}. "
    )
    room = (measured - high, measured - low)
    if room[1] <= 0:
        return f"{text}The claims alone reach what was measured."
    text += (
        f"If they hold, {_range(max(room[0], 0.0), room[1])} of what was measured are left for the "
        f"patches without a number, which save {_words(others, 'cycles')} in the model: "
    )
    if others["cycles_p05"] > room[1]:
        silent = [patch.feature for patch in series.modelled() if patch.claimed_low is None]
        of_silent = made[made["feature"].isin(silent)].sort_values("cycles_mean")
        biggest = _rows(of_silent)[:-3:-1]
        said = _listed(f"{_number(part['cycles_mean'])} for {_part(part)}" for part in biggest)
        return f"{text}**there it saves too much**. Its largest parts there are {said}, in means."
    if others["cycles_p95"] < max(room[0], 0.0):
        return f"{text}**there it saves too little**."
    return f"{text}the two ranges overlap."


def _of_the_patch(result: Waterfall, mix: str, measured: float) -> str:
    rows = _rows(result.of(mix))
    row = next(row for row in rows if row["feature"] == _THE_PATCH)
    total = next(row["cycles_mean"] for row in rows if row["what"] == "simulated")
    text = (
        f"The patch that this kit is about, {row['patches']}, saves {_words(row, 'cycles')} of it: "
        f"{_percent(row['cycles_mean'] / total)} of the simulated saving (means)"
    )
    if row["claimed_high_cycles"] >= 0:
        text += (
            f"; its claim is {_percent(row['claimed_high_cycles'] / measured)} of the measured one "
            f"and {_percent(row['claimed_high_cycles'] / row['before_cycles'])} of the loop"
        )
    return f"{text}."


def _of_loops(result: Waterfall) -> str:
    loops = result.by_loop()
    inside = int(loops["inside"].sum())
    below = int((loops["measured_cycles"] < loops["cycles_p05"]).sum())
    above = len(loops) - inside - below
    return (
        f"Over {len(loops)} loops the measured saving is inside the simulated interval on "
        f"{inside}, below it on {below} and above it on {above}. These are not {len(loops)} tests: "
        "they share their prices, and their round trips differ mostly in what L1 does, which the "
        "series does not change."
    )


def _of_doubt(result: Waterfall, mix: str, left: Mapping[str, Any]) -> str:
    """Say what the comparison cannot decide."""
    circular = [row["patches"] for row in _rows(result.of(mix)) if row["own_claims"]]
    text = ""
    if circular:
        text = (
            f"In the steps of {_listed(circular)} prices rest on the patch's own claim, so only "
            "the sum and the other steps test anything. "
        )
    error = next(row for row in data.read_rows("claims.csv") if row["id"] == WHOLE)
    sd = float(error["observation_sd_cycles"]) * left["exits_per_iteration"]
    gap = abs(left["cycles_p50"])
    ends = left["cycles_p05"], left["cycles_p95"]
    near = 0.0 if ends[0] <= 0 <= ends[1] else min(abs(end) for end in ends)
    enough = "does" if gap <= 2 * sd else "does not"
    least = "bridges" if near <= 2 * sd else "does not bridge"
    return text + (
        f"The measured totals have no published error; twice an {badge('assumed')} standard "
        f"deviation of {_number(sd)} cycles {enough} bridge the gap of {_number(gap)} (median) and "
        f"{least} its near end of {_number(near)}. "
        f"What KVM {SERIES[0]} and {SERIES[1]} do alike with a KVM 6.1 that was executed is "
        f"{badge('assumed')} to take as many instructions."
    )


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def _number(value: float) -> str:
    text = f"{value:,.0f}"
    return "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")


def _part(part: Mapping[str, Any]) -> str:
    """Say how many of what a step saves, and what the price rests on."""
    count = f"{part['count']:,.1f}".removesuffix(".0").replace("-", "\N{MINUS SIGN}")
    name = "instructions" if part["price"] == "cpi" else part["price"]
    return f"{count} {name} ({part['basis']})"


def _turned(values: Mapping[str, Any]) -> dict[str, float]:
    """Return quantiles of the opposite: what was not seen of what was simulated."""
    turned = {"p05": "p95", "p50": "p50", "p95": "p05"}
    return {f"cycles_{q}": -float(values[f"cycles_{of}"]) for q, of in turned.items()}


def _words(values: Mapping[str, Any], name: str) -> str:
    """Say a median with its interval."""
    low, high = (_number(values[f"{name}_{end}"]) for end in ("p05", "p95"))
    return f"{_number(values[f'{name}_p50'])} (90 % interval {low} to {high})"


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, middle, high = (_number(row[f"{name}_{q}"]) for q in ("p05", "p50", "p95"))
    return f"{middle} ({low} to {high})".replace(" ", _SPACE)


def _claim(low: float | None, high: float | None) -> str | None:
    """Say a claimed number or range; None where there is none (None or NaN)."""
    if low is None or high is None or low != low:
        return None
    return _range(low, high)


def _range(low: float, high: float) -> str:
    ends = dict.fromkeys((_number(low), _number(high)))
    return f"{_SPACE}to{_SPACE}".join(ends)


def _share(low: float, high: float, whole: float) -> str:
    ends = dict.fromkeys(f"{100 * value / whole:.0f}" for value in (low, high))
    return f"{' to '.join(ends)}{_SPACE}%"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}{_SPACE}%"


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
