"""What notebooks show beside figures: tables and sentences, each made from results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nvmx_lab.costs import prices
from nvmx_lab.nested.config import release
from nvmx_lab.nested.primitives import INFORMATION, PRIMITIVES
from nvmx_lab.study import published
from nvmx_lab.study.compare import NO_DIFFERENCE_CYCLES, Comparison
from nvmx_lab.study.sweep import sweep
from nvmx_lab.workload import mixes as workload

if TYPE_CHECKING:
    import pandas as pd

_CLAIM = "A"  # in claims.csv: what the patch's author measured
_PATCH = "patch13"  # the patch itself, among the features of a release
_NO_PULLS, _BELOW, _ABOVE, _UNPRICED = (
    "copies everything at once",
    "pulls below break-even",
    "pulls above break-even",
    "pulls at an unknown price",
)
_SPACE = "\N{NO-BREAK SPACE}"  # a number does not part from its unit, an interval stays on a line
_WHY = {
    _NO_PULLS: "L1 reads an enlightened VMCS straight from memory: L0 copies every field before L1 "
    "runs, whatever the policy.",
    _BELOW: "Most exits skip the rare fields and never come back for them.",
    _ABOVE: "L1 comes back for a rare field, or dirties vmcs12, so often that the switches of VMCS "
    "cost more than the reads that are skipped.",
    _UNPRICED: "A pull has no price in this list, so there is no break-even rate to compare with.",
}


def about_mix(name: str) -> str:
    """Return what a mix stands for, and what it rests on, as Markdown."""
    mix = workload.load(name)
    text = f"**{mix.title}** (`{mix.name}`). {mix.question}\n\n"
    text += f"Weights of the exits: {badge(mix.basis)} {mix.source}."
    if mix.assumes:
        text += f"\n\n{badge('assumed')} {mix.assumes}"
    return text


def badge(word: str) -> str:
    """Return where a number comes from, as the mark that reports show."""
    return f'<span class="badge {word}">{word}</span>'


def savings(comparison: Comparison) -> pd.DataFrame:
    """Return both L0s and the saving, worded for a table: cycles with their intervals."""
    import pandas as pd

    frame = comparison.to_frame()
    names = [
        f"KVM {k}, {s}" if s else "saving" for k, s in zip(frame.kvm, frame["sync"], strict=True)
    ]
    shown = {
        "rare VMREADs per exit": frame["rare_vmreads_per_exit"],
        "exits that pull": [*(_share(s.pulls_share) for s in comparison.results), None],
        "exit leg, cycles": [_interval(row, "exit_leg_cycles") for row in _rows(frame)],
        "round trip, cycles": [_interval(row, "round_trip_cycles") for row in _rows(frame)],
    }
    return pd.DataFrame(shown).set_index(pd.Index(names, name="L0"))


def counts(comparison: Comparison) -> pd.DataFrame:
    """Return how often each priced thing happens per exit, without those that never do.

    Returns
    -------
    DataFrame
        Index primitive; columns before, after, fewer (per nested exit), meaning.
    """
    import pandas as pd

    names = {**PRIMITIVES, **{n: INFORMATION[n] for n in ("rare_vmread", "pulls")}}
    before, after = (
        [side.counts[name] / comparison.exits for name in names] for side in comparison.results
    )
    frame = pd.DataFrame(
        {"before": before, "after": after, "meaning": list(names.values())},
        index=pd.Index(names, name="per nested exit"),
    )
    frame.insert(2, "fewer", frame["before"] - frame["after"])
    return _rounded(frame[(frame["before"] != 0) | (frame["after"] != 0)])


def price_list(comparison: Comparison) -> pd.DataFrame:
    """Return the prices, what each rests on, and how much of each the saving is made of.

    Returns
    -------
    DataFrame
        Index price; columns price (median and 90 % interval), unit, basis, claims, fewer (how many
        the second L0 needs less, per exit).
    """
    frame = prices.load(comparison.cpu).frame().set_index("parameter")
    first, second = (side.counts for side in comparison.results)
    fewer = {name: (first[name] - second[name]) / comparison.exits for name in PRIMITIVES}
    frame["fewer"] = [
        fewer["l0_instructions"] + fewer["l1_instructions"] if name == "cpi" else fewer[name]
        for name in frame.index
    ]
    frame["claims"] = frame["claims"].replace("", "none")
    frame.index.name = "price of"
    frame["price"] = [
        f"{row['p50']:,g} ({row['p05']:,g} to {row['p95']:,g})" if row["unit"] else "unknown"
        for row in _rows(frame)
    ]
    return _rounded(frame[["price", "unit", "basis", "claims", "fewer"]])


def prediction(mix: str, *, kvm: tuple[str, str], cpu: str, exits: int, seed: int) -> pd.DataFrame:
    """Return the saving on the exit leg by the prices in use, and by those made without the claim.

    Returns
    -------
    DataFrame
        Index says what; columns basis ("simulated", "published"), p05, p50, p95 (cycles per exit),
        "fitted to the claim" (whether a price is). The claim itself is a row only where the patch
        is all that the second release adds: it says nothing about other changes.
    """
    import pandas as pd

    lists = list(dict.fromkeys([cpu, prices.BLIND]))
    simulated = sweep([mix], kvm=[kvm], cpu=lists, exits=exits, seed=seed)
    rows: list[dict[str, Any]] = [
        {
            "saving on the exit leg": f"by the prices of {name}",
            "basis": "simulated",
            **{q: row[f"exit_leg_saving_cycles_{q}"] for q in ("p05", "p50", "p95")},
            "fitted to the claim": "yes" if _CLAIM in prices.load(name).claims else "no",
        }
        for name, row in zip(lists, _rows(simulated), strict=True)
    ]
    if _adds_the_patch_alone(*kvm):
        rows.append(
            {
                "saving on the exit leg": "as the patch's author measured, about",
                "basis": "published",
                "p50": published.claimed_saving()[0],
                "fitted to the claim": "is the claim",
            }
        )
    return pd.DataFrame(rows).set_index("saving on the exit leg")


def of_pulls(comparison: Comparison) -> str:
    """Return how often L1 forces a pull, and how often it may, as Markdown."""
    even, after = comparison.break_even_pull_rate, comparison.results[1]
    if comparison.evmcs:
        return (
            f"{badge('simulated')} On this mix nothing is left to pull: L1 reads an enlightened "
            f"VMCS straight from memory, so L0 copies all {after.rare_vmreads_per_exit:.0f} rare "
            "fields within the exit leg."
        )
    pulls = (
        f"{badge('simulated')} L0 pulls after **{_share(after.pulls_share)}** of the exits of "
        "this mix."
    )
    if even is None:
        return (
            f"{pulls} {comparison.cpu} has no price for some part of a pull, so there is no "
            "break-even rate to compare this with."
        )
    return (
        f"{pulls} A lazy sync breaks even at **{_share(even['p50'])}** "
        f"(90 % interval {_share(even['p05'])} to {_share(even['p95'])}): that is what the skipped "
        "reads are worth, divided by what a pull costs."
    )


def of_published(frame: pd.DataFrame) -> str:
    """Return how simulated totals and published ones agree, as Markdown; the frame may be empty."""
    if frame.empty:
        return "No total is published for this workload, so its sum of cycles is not tested here."
    totals, savings_ = frame[frame["what"] != "saving"], frame[frame["what"] == "saving"]
    parts = []
    for kind, rows in (("totals", totals), ("savings of the whole series", savings_)):
        inside = int(rows["inside"].sum())
        parts.append(f"{inside} of {len(rows)} published {kind}")
    text = (
        f"{badge('published')} {' and '.join(parts)} lie inside the simulated 90 % interval "
        "(nothing was fitted to them, though some prices rest on claims of the same series). The "
        "intervals span about a factor of two, so being inside says little."
    )
    ratios = totals["cycles_p50"] / totals["published_cycles"]
    low, high = ratios.min(), ratios.max()
    span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
    text += f" The simulated medians are {span} times the published totals."
    if high > 1.1:
        text += (
            " Where the simulation is above, L0's software takes fewer instructions (the lengths "
            "are those of the executed KVM 6.1), or fewer cycles each, than the median assumed."
        )
    if low < 0.9:
        text += (
            " Where it is below, the loop does more than the simulated round trip: an exit to "
            "L1's user space takes as many instructions here as in the executed runs, whose user "
            "space is not the published loops'."
        )
    return text


def published_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.published.against_published` worded for a table."""
    import pandas as pd

    return pd.DataFrame(
        {
            "mix": frame["mix"].array,
            "KVM": [
                f"{kvm} ({what})" for kvm, what in zip(frame["kvm"], frame["what"], strict=True)
            ],
            "simulated, cycles": [_interval(row, "cycles") for row in _rows(frame)],
            "published, cycles": [_number(value) for value in frame["published_cycles"]],
            "inside": ["yes" if inside else "no" for inside in frame["inside"]],
        }
    )


def answer(comparison: Comparison, predicted: pd.DataFrame, totals: pd.DataFrame) -> str:
    """Return the answer to "what does the change save on this mix?", as Markdown."""
    first, second = comparison.results
    leg, trip = comparison.saving["exit_leg_cycles"], comparison.saving["round_trip_cycles"]
    verdicts = {
        "saves": "It saves.",
        "costs": "It costs.",
        "no difference": "It makes no difference.",
        "unclear": "It is unclear: the interval has zero in it.",
    }
    where = f"KVM {second.kvm} ({second.sync}) against KVM {first.kvm} ({first.sync})"
    said = f"a round trip takes {_change(trip)}"
    if f"{leg['p50']:.0f}" != f"{trip['p50']:.0f}":
        said += f", the exit leg alone {_change(leg)}"
    elif trip["p50"] > 0.5:
        said += ", and all of it is on the exit leg"
    lines = [
        f"**{verdicts[comparison.verdict]}** On `{comparison.mix}`, {where}: {said}.",
        "",
        f"Why: {comparison.explanation}",
        "",
        f"- {badge('simulated')} How often L0 executes each instruction: a model that is held to "
        "executed logs of KVM, exit by exit. Cycles are these counts times a price list; nothing "
        "here was timed.",
    ]
    if not _adds_the_patch_alone(first.kvm, second.kvm):
        others = len(_other_features(first.kvm, second.kvm))
        why = (
            f"these two releases differ in {_features(others)}"
            if others
            else "the second of these releases does not add it"
        )
        lines.append(
            "- What the patch's author measured is about the patch alone. It is not set beside "
            f"this saving: {why}."
        )
    elif (first.sync, second.sync) == ("eager", "lazy") and not comparison.evmcs:
        lines.append(f"- {badge('published')} {_of_claim(comparison, predicted)}")
    lines.append(f"- {of_published(totals)}")
    weak = assumed_prices(comparison)
    if weak:
        lines.append(f"- {badge('assumed')} {weak}")
    return "\n".join(lines)


def _of_claim(comparison: Comparison, predicted: pd.DataFrame) -> str:
    """Set the saving beside what the patch's author measured."""
    claim, source = published.claimed_saving()
    commit, _, _ = source.partition(";")
    fitted = predicted["fitted to the claim"].iloc[0] == "yes"
    blind = predicted[predicted["basis"] == "simulated"].iloc[-1]
    inside = "inside" if blind["p05"] <= claim <= blind["p95"] else "outside"
    return (
        f"About {claim:.0f} cycles per nested exit ({commit}). "
        + (
            f"The prices of {comparison.cpu} are fitted to that number, so it is reproduced, "
            "not predicted. "
            if fitted
            else f"No price of {comparison.cpu} is fitted to it. "
        )
        + f"Prices made without it predict {_words(blind)}: the published number is {inside}."
    )


def assumed_prices(comparison: Comparison) -> str:
    """Return which prices that the saving needs are assumed; nothing if none is."""
    table = price_list(comparison)
    needed = table[(table["fewer"].abs() > 1e-3) & (table["basis"] == "assumed")]
    if needed.empty:
        return ""
    which = _listed([f"`{name}`" for name in needed.index])
    return f"The saving also rests on prices that nobody has published: {which}."


def savings_of_all(frame: pd.DataFrame, cpu: str) -> pd.DataFrame:
    """Return one row per mix, worded for a table, from the largest saving to the largest loss.

    Parameters
    ----------
    frame : DataFrame
        Of `nvmx_lab.study.sweep.sweep`, by `cpu` and by the blind price list.
    cpu : str
        The price list in use.

    Returns
    -------
    DataFrame
        Index mix; basis, exits that pull, rare VMREADs saved, exit leg, round trip, round trip by
        the blind prices (median), verdict.
    """
    import pandas as pd

    own, blind = frame[frame["cpu"] == cpu], frame[frame["cpu"] == prices.BLIND].set_index("mix")
    own = own.sort_values(
        ["round_trip_saving_cycles_p50", "mix"], ascending=[False, True], kind="stable"
    )
    return pd.DataFrame(
        {
            "basis": own["basis"].array,
            "exits that pull": [_share(value) for value in own["pulls_share"]],
            "rare VMREADs saved": own["rare_vmreads_saved_per_exit"].array,
            "exit leg, cycles": [_interval(row, "exit_leg_saving_cycles") for row in _rows(own)],
            "round trip, cycles": [
                _interval(row, "round_trip_saving_cycles") for row in _rows(own)
            ],
            "blind prices, median": [
                _number(blind.loc[mix, "round_trip_saving_cycles_p50"]) for mix in own["mix"]
            ],
            "verdict": own["verdict"].array,
        },
        index=pd.Index(own["mix"], name="mix"),
    )


def groups(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the mixes by why they save or lose.

    Parameters
    ----------
    frame : DataFrame
        One row per mix, of `nvmx_lab.study.sweep.sweep` by one price list.

    Returns
    -------
    DataFrame
        Index group; mixes (how many), exits that pull, round trip (range of the medians, cycles),
        why, which.
    """
    import pandas as pd

    rows = []
    for name, some in frame.groupby(_group_of(frame), sort=False):
        middles = some["round_trip_saving_cycles_p50"]
        rows.append(
            {
                "group": name,
                "mixes": len(some),
                "exits that pull": _range(some["pulls_share"], _share),
                "median saving, cycles": _range(middles, _number),
                "why": _WHY[str(name)],
                "which": ", ".join(sorted(some["mix"])),
            }
        )
    order = [_BELOW, _ABOVE, _UNPRICED, _NO_PULLS]
    return (
        pd.DataFrame(rows)
        .set_index("group")
        .reindex([g for g in order if g in {r["group"] for r in rows}])
    )


def evidence() -> pd.DataFrame:
    """Return how often real KVM pulled in the executed runs, worded for a table."""
    runs = published.executed_pulls()
    runs["exits that pull"] = [_share(value) for value in runs.pop("pulls_share")]
    runs.insert(0, "basis", "executed")
    return runs.set_index("run")


def answer_for_all(frame: pd.DataFrame, cpu: str) -> str:
    """Return the answer to "on which workloads does it pay?", as Markdown."""
    own = frame[frame["cpu"] == cpu]
    blind = frame[frame["cpu"] == prices.BLIND]
    lines = [f"**{_tally(own)}**", ""]
    of_group = _group_of(own)
    for name in (_BELOW, _ABOVE, _UNPRICED, _NO_PULLS):
        some = own[of_group == name]
        if some.empty:
            continue
        middles = some["round_trip_saving_cycles_p50"]
        lines.append(
            f"- {_count(len(some))} whose L0 {name}: {_range(middles, _number)} cycles in the "
            f"median. {_WHY[name]}"
        )
    others = len(_other_features(*own["kvm_before"], *own["kvm_after"]))
    if others:
        which = "which is" if others == 1 else "which are"
        lines += [
            "",
            f"The reasons speak of the sync alone; the releases differ in {_features(others)}, "
            f"{which} in the cycles too.",
        ]
    both = own.set_index("mix")["verdict"].to_frame("own").join(blind.set_index("mix")["verdict"])
    changed = both[both["own"] != both["verdict"]]
    steady = own[(own["pulls_share"] < 0.02) & own["break_even_pull_rate_p50"].notna()]
    lines += [
        "",
        f"{badge('simulated')} Counts by a model that is held to executed logs; cycles by the "
        f"prices of {cpu}.",
    ]
    if cpu != prices.BLIND and not steady.empty:
        with_blind = blind[blind["mix"].isin(steady["mix"])]["exit_leg_saving_cycles_p50"]
        lines[-1] += (
            f" With prices made without the patch's own measurement the exit leg of the mixes that "
            f"hardly pull would be shorter by {_range(with_blind, _number)} cycles, not "
            f"{_range(steady['exit_leg_saving_cycles_p50'], _number)}; "
            + (
                f"the verdict changes for {_listed(f'`{mix}`' for mix in changed.index)}."
                if len(changed)
                else "no verdict changes."
            )
        )
    runs = published.executed_pulls().set_index("run")["pulls_share"]
    lines += [
        "",
        f"{badge('executed')} In logged runs of KVM 6.1, a Linux L2 booting under an L1 with "
        f"kernel-stack randomization (the default of many distributions) made L0 pull after "
        f"{_share(runs['kvm61_lazy_linux_l2'])} of the exits. A micro-guest that provokes "
        f"each kind of exit a hundred times made it pull after {_share(runs['kvm61_lazy_shadow'])} "
        f"with the randomization and {_share(runs['kvm61_lazy_shadow_nokstack'])} without.",
        "",
        f"{badge('assumed')} VMPTRLD, of which a pull has two, has no published price: the "
        "break-even rate, and what a mix near it does, rest on an assumption.",
    ]
    return "\n".join(lines)


def by_leg(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the parts of a round trip under both L0s, worded for a table.

    Parameters
    ----------
    frame : DataFrame
        Of `nvmx_lab.study.breakdown.breakdown`.

    Returns
    -------
    DataFrame
        Index leg, in order, and "all"; before and after: VMX and MSR instructions per exit, cycles
        (sum of the steps' medians), and their share in per cent.
    """
    return _parts(frame, "leg", list(frame["leg"].unique()), "part of the round trip")


def largest(frame: pd.DataFrame, top: int = 8) -> pd.DataFrame:
    """Return the steps that take most, whatever the leg, worded as `by_leg`.

    Parameters
    ----------
    frame : DataFrame
        As `by_leg` takes.
    top : int
        How many; the steps that the sync changes follow if they are not among them.
    """
    order = frame.groupby("step")["cycles_p50"].sum().sort_values(ascending=False).index
    sides = [side.groupby("step")["cycles_p50"].sum() for _, side in _sides(frame)]
    moved = sides[0].sub(sides[1], fill_value=0.0).abs()
    special = [step for step in order[top:] if moved[step] > NO_DIFFERENCE_CYCLES]
    return _parts(frame, "step", list(order), "step").loc[[*order[:top], *special, "all"]]


def of_sides(frame: pd.DataFrame) -> str:
    """Return which L0s "before" and "after" are."""
    (before, _), (after, _) = _sides(frame)
    return (
        f"Before: {before}; after: {after}. Cycles: the steps' medians, added up, which is not the "
        "median of the whole."
    )


def _parts(frame: pd.DataFrame, column: str, order: list[str], name: str) -> pd.DataFrame:
    import pandas as pd

    shown: dict[str, Any] = {}
    for when, (_, side) in zip(("before", "after"), _sides(frame), strict=True):
        sums = (
            side.groupby(column)[["instructions", "cycles_p50"]]
            .sum()
            .reindex(order, fill_value=0.0)
        )
        sums.loc["all"] = sums.sum()
        shown[f"VMX and MSR instructions {when}"] = sums["instructions"]
        cycles = sums["cycles_p50"]
        shown[f"cycles {when}"] = cycles.map(_number)
        shown[f"% of cycles {when}"] = 100 * cycles / cycles.iloc[-1]
    table = pd.DataFrame(shown)
    table.index.name = name
    return table


def answer_for_cycles(frame: pd.DataFrame, totals: pd.DataFrame) -> str:
    """Return the answer to "where do the cycles of a round trip go?", as Markdown."""
    (before, first), (after, second) = _sides(frame)
    whole = first["cycles_p50"].sum()
    steps = first.groupby("step")["cycles_p50"].sum().sort_values(ascending=False)
    top = _listed(f"{step} {_share(c / whole)}" for step, c in steps.head(3).items())
    rare, rare_after = (side[side["step"] == "rare fields"] for side in (first, second))
    lines = [
        f"**Under {before} the rare fields are {_share(rare['cycles_p50'].sum() / whole)} of a "
        f"round trip: about {_number(rare['cycles_p50'].sum())} of {_number(whole)} cycles, "
        f"{rare['instructions'].sum():.1f} VMREADs.** The largest steps: {top}.",
        "",
        f"Under {after} about {_number(rare_after['cycles_p50'].sum())} cycles go to the rare "
        f"fields ({rare_after['instructions'].sum():.1f} VMREADs)"
        + _where(rare_after)
        + f", and switches of VMCS take about {_number(_of(second, 'switch of VMCS'))} cycles"
        + _than_before(_of(first, "switch of VMCS"), _of(second, "switch of VMCS"))
        + ".",
        "",
        f"- {badge('simulated')} Instructions by step: the model's own trace, in the order and the "
        "functions in which KVM runs them.",
        f"- {badge('assumed')} Software between the VMX instructions is "
        f"{_share(_software(first) / whole)} of the cycles: counted instructions times 0.5 to 1.5 "
        f"cycles each, which nobody has measured. It differs by about "
        f"{_cycles(abs(_software(first) - _software(second)))} between the two, so it "
        "widens the totals much more than the saving.",
        f"- {of_published(totals)}",
    ]
    return "\n".join(lines)


def _sides(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Return the L0s of a breakdown in their order, with names for a reader."""
    return [
        (f"KVM {kvm} ({sync})", frame[(frame["kvm"] == kvm) & (frame["sync"] == sync)])
        for kvm, sync in frame[["kvm", "sync"]].drop_duplicates().itertuples(index=False)
    ]


def _of(side: pd.DataFrame, step: str) -> float:
    return float(side.loc[side["step"] == step, "cycles_p50"].sum())


def _than_before(before: float, after: float) -> str:
    """Say what was instead of the second, unless a reader would see the same number twice."""
    if _number(before) == _number(after):
        return ", as before"
    return f" instead of {_number(before)}"


def _software(side: pd.DataFrame) -> float:
    return float(side.loc[side["step"].str.startswith("software of"), "cycles_p50"].sum())


def _where(rare: pd.DataFrame) -> str:
    legs = rare.loc[rare["cycles_p50"] >= 0.5, "leg"]
    return f', in the part "{_listed(legs)}"' if len(legs) else ""


def _group_of(frame: pd.DataFrame) -> pd.Series:
    """Return the group of each mix: whether anything is pulled, and how often."""
    even = frame["break_even_pull_rate_p50"].astype(float)
    pulls, saved = frame["pulls_share"], frame["rare_vmreads_saved_per_exit"]
    group = pulls.lt(even).map({True: _BELOW, False: _ABOVE})
    # No rate: nothing is ever skipped or pulled, or a pull has no price. None is below any price.
    group = group.mask(even.isna(), _NO_PULLS)
    group = group.mask(even.isna() & (saved > 0) & (pulls == 0), _BELOW)
    return group.mask(even.isna() & (pulls > 0), _UNPRICED).rename("group")


def _other_features(*releases: str) -> frozenset[str]:
    """Return the features, the patch apart, that some of the releases have and others lack."""
    sets = [release(str(name)).features for name in dict.fromkeys(releases)]
    return frozenset.union(*sets) - frozenset.intersection(*sets) - {_PATCH}


def _adds_the_patch_alone(before: str, after: str) -> bool:
    """Return whether the second release is the first with the patch, which the claim is about."""
    has = [_PATCH in release(name).features for name in (before, after)]
    return has == [False, True] and not _other_features(before, after)


def _features(number: int) -> str:
    return f"{'one feature' if number == 1 else f'{number} features'} other than the patch"


def _tally(frame: pd.DataFrame) -> str:
    found = frame["verdict"].value_counts()
    said = {
        "saves": "clearly saves",
        "costs": "clearly costs",
        "unclear": "has zero in its interval",
        "no difference": "makes no difference",
    }
    parts = [f"{text} on {found[verdict]}" for verdict, text in said.items() if verdict in found]
    return f"Of {_count(len(frame))}, the change {_listed(parts)}."


def _count(number: int) -> str:
    return "one mix" if number == 1 else f"{number} mixes"


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _number(value: float) -> str:
    text = f"{value:,.0f}"
    return "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")


def _cycles(value: float) -> str:
    text = _number(value)
    return f"{text} cycle" if text == "1" else f"{text} cycles"


def _words(values: Mapping[str, Any] | pd.Series) -> str:
    low, middle, high = (_number(values[q]) for q in ("p05", "p50", "p95"))
    return f"{middle} (90 % interval {low} to {high})"


def _change(saving: Mapping[str, float]) -> str:
    """Say a saving as cycles less, a loss as cycles more."""
    if max(abs(value) for value in saving.values()) < NO_DIFFERENCE_CYCLES:
        return "as long"
    if saving["p50"] >= 0:
        return f"{_words(saving)} cycles less"
    lost = {"p05": -saving["p95"], "p50": -saving["p50"], "p95": -saving["p05"]}
    return f"{_words(lost)} cycles more"


def _rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Round to what a table shows, so that nothing is shown as minus zero."""
    shown = frame.copy()
    for name in shown.select_dtypes("number"):
        shown[name] = shown[name].round(2) + 0.0
    return shown


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, middle, high = (_number(row[f"{name}_{q}"]) for q in ("p05", "p50", "p95"))
    return f"{middle} ({low} to {high})".replace(" ", _SPACE)


def _share(value: float) -> str:
    if value in (0, 1):
        return f"{100 * value:.0f}{_SPACE}%"
    return f"{100 * value:.{1 if 0.001 <= value < 0.999 else 2}f}{_SPACE}%"


def _range(values: pd.Series, say: Any) -> str:
    low, high = say(values.min()), say(values.max())
    return str(low) if low == high else f"{low}{_SPACE}to{_SPACE}{high}"


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
