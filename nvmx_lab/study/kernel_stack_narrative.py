"""What ``07_kernel_stack_randomization`` shows beside figures: each text made from results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from nvmx_lab.errors import LabError
from nvmx_lab.nested.story import story
from nvmx_lab.study.kernel_stack import (
    WITHOUT,
    WRITE_PARTS,
    Judgement,
    executed_totals,
    fix,
)
from nvmx_lab.study.narrative import badge
from nvmx_lab.workload import mixes as workload

if TYPE_CHECKING:
    import pandas as pd

_SPACE = "\N{NO-BREAK SPACE}"
BOOT_WITHOUT = "linux-boot-nokstack"
"""The mix that says what is known of the Linux boot without randomization."""

_RIGHT, _WRONG = "holds", "fails"


def about(kvm: str) -> str:
    """Return which L0 is looked at, as Markdown."""
    return (
        f"L0 is **KVM {kvm}**, with the lazy sync unless a text says otherwise. Its changes are "
        "features that no release has, tried in the model only."
    )


# -- executed ----------------------------------------------------------------------------------


def executed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.kernel_stack.executed` worded for a table: kinds that ever pull."""
    import pandas as pd

    pulling = frame.loc[frame["pulls"] > 0, ["l2", "kind"]].drop_duplicates()
    shown = frame.merge(pulling, on=["l2", "kind"]).sort_values(
        ["l2", "kind", "randomization"], ascending=[True, True, False], kind="stable"
    )
    return pd.DataFrame(
        {
            "L2": shown["l2"].array,
            "exit": shown["kind"].array,
            "randomization": shown["randomization"].array,
            "exits": shown["exits"].array,
            "that pull": [_share(p / n) for p, n in _pairs(shown, "pulls", "exits")],
            "by HOST_RSP": [_share(p / n) for p, n in _pairs(shown, "host_rsp", "exits")],
            "what made L0 pull, most frequent first": shown["first"].replace("", "nothing").array,
        }
    )


def of_executed(frame: pd.DataFrame) -> str:
    """Return how often L0 pulled in each run, and why, as Markdown."""
    lines = []
    for row in _rows(executed_totals(frame)):
        text = (
            f"- {badge('executed')} {row['l2']}, randomization {row['randomization']}: "
            f"{row['pulls']:,} of {row['exits']:,} reflected exits made L0 pull "
            f"(**{_share(row['pulls_share'])}**)"
        )
        if row["host_rsp"]:
            text += f", {row['host_rsp']:,} of them by a VMWRITE of HOST_RSP. "
            text += f"All other causes together: {_share(row['other_share'])} of the exits."
        else:
            text += ", none by a VMWRITE of HOST_RSP."
        lines.append(text)
    return "\n".join([*lines, "", _same_exits(frame), "", _boot_without()]).rstrip()


def _boot_without() -> str:
    """Say what is known of the Linux boot without randomization: its log is not among the data."""
    mix = workload.load(BOOT_WITHOUT)
    return f"{badge(mix.basis)} The Linux boot without randomization (`{mix.name}`): {mix.assumes}"


def _same_exits(frame: pd.DataFrame) -> str:
    """Say what the two runs that differ in randomization alone show, kind by kind."""
    keys = ["l2", "kind"]
    on, off = (frame[frame["randomization"] == state].set_index(keys) for state in ("on", "off"))
    both = on.merge(off, left_index=True, right_index=True, suffixes=("_on", "_off"))
    both = both[both["host_rsp_on"] > 0]
    if both.empty:
        return ""
    more = (both["pulls_on"] / both["exits_on"]) > (both["pulls_off"] / both["exits_off"])
    never = int((both["pulls_off"] == 0).sum())
    return (
        f"The same micro-guest ran with randomization and without. {len(both)} kinds of exit pull "
        f"because of HOST_RSP with it; {_all_of(int(more.sum()), len(both))} pull more often than "
        f"without it, and {_all_of(never, len(both))} never pull without it."
    )


def _all_of(number: int, whole: int) -> str:
    return "all of them" if number == whole else f"{number} of them"


# -- the mechanism -----------------------------------------------------------------------------


def steps(mechanism: pd.DataFrame) -> str:
    """Return the mechanism, step by step, as Markdown."""
    row = mechanism.iloc[0]
    other_reads = row["vmreads"] - row["rare_vmreads"]
    return "\n".join(
        [
            "By KVM's source, and as the logs have it:",
            "",
            "1. L2 exits; L0 reflects the exit and leaves the rare fields in vmcs02 (the lazy "
            "sync). L1 handles it and returns to its user space.",
            "2. L1's user space calls KVM_RUN again. Kernel-stack randomization gives this system "
            "call another stack depth than the last.",
            "3. L1's KVM keeps its stack pointer in HOST_RSP and writes it only when it changed "
            "(`vmx_update_host_rsp`). Now it nearly always did.",
            "4. HOST_RSP is in no shadow list, so the VMWRITE **exits** to L0.",
            "5. `handle_vmwrite` **pulls** before it writes a field that is not RW-shadowed: "
            f"{row['rare_vmreads']} VMREADs and {row['vmptrlds']} VMPTRLDs.",
            "6. It sets `dirty_vmcs12`, so the next entry takes the **slow path** and writes the "
            "rare fields to vmcs02 again, though L1 changed none of them.",
            "",
            f"{badge('simulated')} Against a round trip without the write L0 executes "
            f"{row['vmreads']} VMREADs more ({row['rare_vmreads']} of them rare, {other_reads} to "
            f"emulate the instruction), {row['vmwrites']} VMWRITEs and {row['vmptrlds']} VMPTRLDs, "
            f"and retires {row['instructions']:,} instructions. The value itself matters to no "
            "L2: L0 uses it only when it next enters L1.",
        ]
    )


def mechanism(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.kernel_stack.mechanism` worded for a table."""
    shown = frame.rename(
        columns={
            "exits": "exits of L1",
            "vmreads": "VMREADs",
            "rare_vmreads": "of them rare",
            "vmwrites": "VMWRITEs",
            "vmptrlds": "VMPTRLDs",
            "instructions": "instructions of L0",
        }
    )
    return shown.drop(columns="kvm").set_index("fix")


# -- cost --------------------------------------------------------------------------------------


def savings(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.kernel_stack.savings` worded for a table: a row per price list."""
    shown = frame.assign(
        cell=[_interval(row, "saving") for row in _rows(frame)],
        column=[f"{row['mix']}, {'with' if row['write'] else 'without'}" for row in _rows(frame)],
    )
    order = list(dict.fromkeys(shown["column"]))
    table = shown.pivot(index="cpu", columns="column", values="cell")
    table = table.loc[list(dict.fromkeys(frame["cpu"])), order]
    table.columns.name = None
    return table


def write_costs(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.kernel_stack.write_costs` worded for a table: a row per part."""
    import pandas as pd

    return pd.DataFrame(
        {
            "mix": frame["mix"].array,
            "part": frame["part"].array,
            "per round trip, cycles": [_interval(row, "cycles") for row in _rows(frame)],
            "per write, median": [_number(value) for value in frame["each_p50"]],
            "of the round trip": [_shares(row, "share") for row in _rows(frame)],
        }
    )


def write_costs_by_cpu(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the whole cost of the write worded for a table: price lists by mixes."""
    whole = frame[frame["part"] == WRITE_PARTS[-1]]
    cells = [
        f"{_interval(row, 'cycles')}; {_share(row['share_p50'])}".replace("–; –", "–")
        for row in _rows(whole)
    ]
    table = whole.assign(cell=cells).pivot(index="cpu", columns="mix", values="cell")
    table = table.loc[list(dict.fromkeys(whole["cpu"])), list(dict.fromkeys(whole["mix"]))]
    table.columns.name = None
    return table


def of_costs(savings: pd.DataFrame, costs: pd.DataFrame) -> str:
    """Return what the write does to the patch's saving, and what it costs, as Markdown.

    Parameters
    ----------
    savings, costs : DataFrame
        Of `nvmx_lab.study.kernel_stack.savings` and `write_costs`.
    """
    lines = []
    priced = savings[savings["verdict"] != "no price"]
    for mix, some in priced.groupby("mix", sort=False):
        with_write, quiet = some[some["write"]], some[~some["write"]]
        lines.append(
            f"- {badge('simulated')} `{mix}`: the patch {_tally(with_write)} with the write "
            f"({_share(with_write['pulls_share'].iloc[0])} of the exits pull), and "
            f"{_tally(quiet)} without ({_share(quiet['pulls_share'].iloc[0])} pull)."
            if len(with_write) and len(quiet)
            else f"- {badge('simulated')} `{mix}`: no price list has all prices."
        )
    missing = sorted(set(savings.loc[savings["verdict"] == "no price", "cpu"]))
    if missing:
        lines.append(f"- Without a price for some part: {_listed(missing)}.")
    whole = costs[(costs["part"] == WRITE_PARTS[-1]) & costs["cycles_p50"].notna()]
    if len(whole):
        lines.append(
            f"- {badge('simulated')} The write as a whole costs {_span(whole['each_p50'], _number)}"
            f" cycles each time (medians, by price list and mix), {_largest_part(costs)}."
        )
    return "\n".join(lines)


def _largest_part(costs: pd.DataFrame) -> str:
    """Say which part of the write costs most, in how many of the priced cases."""
    parts = costs[costs["part"] != WRITE_PARTS[-1]].dropna(subset=["cycles_p50"])
    whole = parts.groupby(["mix", "cpu"]).filter(lambda some: len(some) == len(WRITE_PARTS) - 1)
    largest = whole.loc[whole.groupby(["mix", "cpu"])["cycles_p50"].idxmax(), "part"]
    found = largest.value_counts()
    if len(found) == 1:
        return f"most of it for the {found.index[0]}, on every list and mix"
    return "most of it for " + _listed(f"the {part} in {n} cases" for part, n in found.items())


def _tally(rows: pd.DataFrame) -> str:
    """Say how many price lists give each verdict."""
    said = {
        "saves": "saves",
        "costs": "costs",
        "unclear": "is unclear",
        "no difference": "makes no difference",
    }
    found = rows["verdict"].value_counts()
    if len(found) == 1:
        return f"{said[found.index[0]]} on {_lists(int(found.iloc[0]), every=True)}"
    return _listed(f"{said[v]} on {_lists(found[v])}" for v in said if v in found)


def _lists(number: int, *, every: bool = False) -> str:
    if number == 1:
        return "one price list"
    return f"all {number} price lists that can price it" if every else f"{number} price lists"


# -- fixes -------------------------------------------------------------------------------------


def judgements(found: Sequence[Judgement]) -> pd.DataFrame:
    """Return what was tried, and whether it is right, worded for a table."""
    import pandas as pd

    return pd.DataFrame(
        {
            "features": ["+".join(each.fix.features) for each in found],
            "what changes": [each.fix.idea for each in found],
            "correct?": [_said(each) for each in found],
            "states searched": [f"{each.exploration.states:,}" for each in found],
        },
        index=pd.Index([each.fix.name for each in found], name="fix"),
    )


def _said(judgement: Judgement) -> str:
    if judgement.holds:
        return _RIGHT if judgement.exploration.complete else "no failure found"
    steps = len(judgement.exploration.findings[0].steps)
    return f"{_WRONG} in {steps} steps"


def stories(found: Sequence[Judgement]) -> str:
    """Return the shortest counterexample of each fix that fails, as Markdown."""
    parts = []
    for each in found:
        if each.replay is not None:
            parts.append(
                f"**{each.fix.name}** (`{'+'.join(each.fix.features)}`): {each.fix.idea}.\n\n"
                f"```text\n{story(each.replay)}\n```"
            )
    return "\n\n".join(parts) if parts else "No fix fails."


def of_rules(found: Sequence[Judgement]) -> str:
    """Return what must be true for a VMWRITE not to pull, as Markdown."""
    by_name = {each.fix.name: each.holds for each in found}

    def both(right: str, wrong: str) -> bool:
        return by_name.get(right, False) and not by_name.get(wrong, True)

    lines = [
        "The pull before a VMWRITE protects two things: a rare field that L1 writes (a later pull "
        "would crush it), and the rare fields of vmcs12 that a dirty entry writes to vmcs02 (they "
        "would be old).",
        "",
    ]
    if both("clean and unpulled host writes", "unpulled host writes"):
        lines.append(
            "- A HOST_ field is not rare, so nothing is crushed. That it leaves vmcs12 clean is "
            "what makes the pull needless: the same write without the pull, but dirty, fails."
        )
    if both("unpulled writes + pull at entry", "unpulled writes"):
        lines.append(
            "- For any other field the pull can wait until the entry, where vmcs02 is loaded "
            "anyway and no switch is needed; it cannot be left out."
        )
    if both("unpulled writes + skip at entry", "unpulled writes"):
        lines.append(
            "- Or the entry leaves the rare fields alone while the flag is set: a set flag says "
            "that L1 wrote none of them since the exit, so vmcs02 has the true values."
        )
    lines.append(
        "- What a check of the entry reads must be current too. Among the rare fields that is "
        "GUEST_BNDCFGS alone, and only if L1 asks to load it; so a VMWRITE of VM_ENTRY_CONTROLS "
        f"still pulls. {badge('assumed')} The model has no such checks: this rule is by reading, "
        "the search says nothing about it."
    )
    lines.append(
        "- The search looks at what L1 gets as its host state after each exit, and at the controls "
        "under which L2 is entered: a change that left them old would be seen."
    )
    needing = [each.fix.name for each in found if each.holds and each.needs_flag_reset]
    if needing:
        lines.append(
            f"- {badge('simulated')} By trusting the flag at an entry, {_listed(needing)} need"
            f"{'s' if len(needing) == 1 else ''} the mend `flag-reset`, which no release has: "
            "without it the flag outlives vmcs02, and restoring a state in which L2 runs over one "
            "in which it ran gives L2 wrong rare fields. KVM as it is stays right there."
        )
    return "\n".join(lines)


def verdicts(found: Sequence[Judgement], frame: pd.DataFrame) -> pd.DataFrame:
    """Return the verdict on each fix, worded for a table.

    Parameters
    ----------
    found : sequence of Judgement
        Of `nvmx_lab.study.kernel_stack.judge`.
    frame : DataFrame
        Of `nvmx_lab.study.kernel_stack.fixes`, by one price list.

    Returns
    -------
    DataFrame
        One row per mix and fix: correct?, exits that pull, cycles saved against the lazy sync as it
        is and against the eager one, and the share of the gap that is closed (medians, 90 %
        intervals).
    """
    import pandas as pd

    _one_cpu(frame)
    said = {each.fix.name: _said(each) for each in found}
    rows = _rows(frame)
    return pd.DataFrame(
        {
            "mix": [row["mix"] for row in rows],
            "fix": [row["fix"] for row in rows],
            "correct?": [said.get(row["fix"], "–") for row in rows],
            "exits that pull": [_share(row["pulls_share"]) for row in rows],
            "saved against lazy": [_interval(row, "lazy") for row in rows],
            # Of an L1 that does not write, the eager L0 would be one without the write too.
            "saved against eager": [
                "–" if row["fix"] == WITHOUT else _interval(row, "eager") for row in rows
            ],
            "gap closed": [_shares(row, "closed") for row in rows],
        }
    )


def by_cpu(found: Sequence[Judgement], frame: pd.DataFrame, mix: str) -> pd.DataFrame:
    """Return what the correct fixes save on one mix, worded for a table: a row per price list."""
    right = [each.fix.name for each in found if each.holds]
    some = frame[(frame["mix"] == mix) & frame["fix"].isin(right)]
    table = some.assign(cell=[_interval(row, "lazy") for row in _rows(some)]).pivot(
        index="cpu", columns="fix", values="cell"
    )
    table = table.loc[list(dict.fromkeys(some["cpu"])), right]
    table.columns.name = None
    return table


def answer(
    executed: pd.DataFrame,
    savings: pd.DataFrame,
    costs: pd.DataFrame,
    found: Sequence[Judgement],
    frame: pd.DataFrame,
) -> str:
    """Return the answer to the notebook's question, as Markdown.

    Parameters
    ----------
    executed, savings, costs : DataFrame
        Of `nvmx_lab.study.kernel_stack`: `executed`; `savings` and `write_costs` by one price list.
    found : sequence of Judgement
        What the explorer says of the fixes.
    frame : DataFrame
        `fixes` by the same price list.
    """
    _one_cpu(frame)
    cpu = str(frame["cpu"].iloc[0])
    totals = executed_totals(executed)
    boot = totals.sort_values("exits").iloc[-1]
    lines = [
        f"**A VMWRITE of HOST_RSP made {_share(boot['host_rsp_share'])} of the reflected exits of "
        f"the largest executed run pull, all other causes together "
        f"{_share(boot['other_share'])}.** {badge('executed')} ({boot['l2']}, randomization "
        f"{boot['randomization']}.)",
        "",
    ]
    for mix in dict.fromkeys(savings["mix"]):
        some = savings[savings["mix"] == mix]
        with_write, quiet = (_rows(some[some["write"] == write])[0] for write in (True, False))
        whole = costs[(costs["mix"] == mix) & (costs["part"] == WRITE_PARTS[-1])]
        lines.append(
            f"- {badge('simulated')} `{mix}` by {cpu}: the patch's saving is "
            f"{_words(with_write, 'saving')} cycles per round trip with the write and "
            f"{_words(quiet, 'saving')} without. The write itself costs "
            f"{_words(_rows(whole)[0], 'cycles')} cycles, "
            f"{_share(_rows(whole)[0]['share_p50'])} of the round trip."
        )
    right, wrong = ([e.fix.name for e in found if e.holds is ok] for ok in (True, False))
    lines.append(_of_fixes(right, frame, cpu))
    if wrong:
        lines.append(
            f"- Wrong, each with a counterexample above: {_listed(wrong)}. What they would save "
            "counts for nothing."
        )
    lines.append(
        f"- {badge('assumed')} Correct means: nobody sees a wrong value in any state of the model "
        "that the search reaches, following a field of each kind, with every known mend, on a "
        "machine with VMCS shadowing. No fix was tried on a kernel."
    )
    return "\n".join(lines)


def _of_fixes(right: Sequence[str], frame: pd.DataFrame, cpu: str) -> str:
    """Say which correct fix closes most of the gap, and what the others do."""
    some = frame[frame["fix"].isin(right)].dropna(subset=["closed_p50"])
    if some.empty:
        why = f"{cpu} lacks a price that they need" if right else "none holds"
        return f"- No fix can be recommended here: {why}."
    closed = some.groupby("fix")["closed_p50"].agg(["min", "max"]).sort_values("max")[::-1]
    best, others = closed.index[0], closed.iloc[1:]
    which = f"Of the {len(closed)} correct fixes **{best}** closes most of the gap"
    if len(closed) == 1:
        which = f"The only correct fix, **{best}**, closes part of the gap"
    text = (
        f"- {badge('simulated')} {which} to an L1 that does not write: "
        f"{_range(closed.loc[best, 'min'], closed.loc[best, 'max'])} (`"
        f"{'+'.join(fix(str(best)).features)}`)."
    )
    if len(others):
        text += " The others: " + _listed(
            f"{name} {_range(row['min'], row['max'])}" for name, row in others.iterrows()
        )
        text += "."
    return text


def _one_cpu(frame: pd.DataFrame) -> None:
    if frame["cpu"].nunique() != 1:
        raise LabError("the text is about one price list", where="cpu", got=list(frame["cpu"]))


# -- words -------------------------------------------------------------------------------------


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _pairs(frame: pd.DataFrame, one: str, other: str) -> list[tuple[float, float]]:
    return list(zip(frame[one], frame[other], strict=True))


def _number(value: float) -> str:
    if value != value:
        return "–"
    text = f"{value:,.0f}"
    return "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")


def _share(value: float) -> str:
    if value != value:
        return "–"
    if value in (0, 1):
        return f"{100 * value:.0f}{_SPACE}%"
    return f"{100 * value:.1f}{_SPACE}%".replace("-", "\N{MINUS SIGN}")


def _interval(row: dict[str, Any], name: str) -> str:
    if row[f"{name}_p50"] != row[f"{name}_p50"]:
        return "–"
    low, middle, high = (_number(row[f"{name}_{q}"]) for q in ("p05", "p50", "p95"))
    return f"{middle} ({low} to {high})".replace(" ", _SPACE)


def _shares(row: dict[str, Any], name: str) -> str:
    if row[f"{name}_p50"] != row[f"{name}_p50"]:
        return "–"
    low, middle, high = (f"{100 * row[f'{name}_{q}']:.0f}" for q in ("p05", "p50", "p95"))
    same = f"{middle}{_SPACE}%"
    return same if low == high else f"{same} ({low} to {high})".replace(" ", _SPACE)


def _words(row: dict[str, Any], name: str) -> str:
    if row[f"{name}_p50"] != row[f"{name}_p50"]:
        return "an unknown number"
    low, middle, high = (_number(row[f"{name}_{q}"]) for q in ("p05", "p50", "p95"))
    return f"{middle} (90 % interval {low} to {high})"


def _range(low: float, high: float) -> str:
    one, other = f"{100 * low:.0f}", f"{100 * high:.0f}"
    return f"{one}{_SPACE}%" if one == other else f"{one} to {other}{_SPACE}%"


def _span(values: pd.Series[float], say: Any) -> str:
    low, high = say(values.min()), say(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
