"""What ``10_is_it_correct`` shows beside figures: tables and sentences, each made from results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvmx_lab.nested.config import features
from nvmx_lab.nested.mutants import MUTANTS
from nvmx_lab.nested.search import L1S, OTHER, STALE, UNINITIALISED
from nvmx_lab.study.correctness import THE_MUTANT, Correctness, Judged, Told, Verdict
from nvmx_lab.study.narrative import badge

if TYPE_CHECKING:
    import pandas as pd

_SPACE = "\N{NO-BREAK SPACE}"
_WRONG = {
    STALE: "an old value of the same VMCS",
    UNINITIALISED: "nothing: the cell was never written since its VMCS was cleared",
    OTHER: "the value of another VMCS",
    L1S: "a value of L1's own state",
}
_FOUND = {"found": "fails", "mended": "mended", "not found": "\N{EN DASH}"}


def about(kvm: str, sync: str, mutant: str) -> str:
    """Return which L0 is looked at, as Markdown."""
    text = f"L0 is **KVM {kvm}**" + (f" with the **{sync}** sync." if sync else ".")
    if mutant:
        text += f" It is made wrong on purpose, as `{mutant}`: {MUTANTS[mutant].meaning}."
    return text


def of_wrong(judged: Judged) -> str:
    """Return what was seen instead of the true value, in words."""
    return _WRONG.get(judged.finding.wrong, judged.finding.wrong)


def machines(verdict: Verdict) -> pd.DataFrame:
    """Return how far the search of one L0 went, by machine.

    Returns
    -------
    DataFrame
        Index machine; columns states, transitions, farthest (steps from the start), seconds,
        "all states" (yes or no), found (ways to fail, those that eager copying shares included).
    """
    import pandas as pd

    frame = pd.DataFrame(
        {
            "machine": environment,
            "control states": e.places,
            "states": f"{e.states:,}",
            "transitions": f"{e.transitions:,}",
            "farthest state, steps": e.depth,
            "all states": "yes" if e.complete else "no",
            "seconds": round(e.seconds, 1),
        }
        for environment, e in verdict.explorations.items()
    )
    return frame.set_index("machine")


def findings(verdict: Verdict) -> pd.DataFrame:
    """Return the ways in which one L0 fails, worded for a table; no rows if it does not."""
    import pandas as pd

    frame = pd.DataFrame(
        {
            "who": judged.who,
            "sees": of_wrong(judged),
            "in": _fields(judged),
            "after": f"{len(judged.finding.steps)} steps",
            "why": judged.meaning or judged.cause,
            "eager copying": "fails too" if judged.eager_too else "does not",
            "on": ", ".join(judged.environments),
        }
        for judged in verdict.findings
    )
    return frame.set_index("who") if len(frame) else frame


def _fields(judged: Judged) -> str:
    more = len(judged.fields) - 1
    return f"{judged.finding.field}" + (f" and {more} more" if more else "")


def story(told: Told | None) -> str:
    """Return the story of a counterexample, as Markdown."""
    if told is None:
        return "There is none: nobody sees a wrong value."
    return f"```text\n{told.story}\n```"


def history(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `nvmx_lab.study.correctness.history`, worded: one column per release."""
    named = frame.set_index("what")
    releases = [name for name in named.columns if name[:1].isdigit()]
    shown = named[releases].map(_FOUND.__getitem__)
    shown.insert(0, "fails because of", named["eager_too"].map({True: "KVM", False: "the sync"}))
    never = ~(named[releases] == "found").any(axis=1)
    shown.loc[never, "fails because of"] = "\N{EN DASH}"
    shown["mend"] = named["mend"]
    shown["outside the model"] = named["evidence"]
    return shown


def mutants(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `nvmx_lab.study.correctness.mutants`, worded."""
    shown = frame.set_index("mutant")[["meaning", "source", "verdict"]].copy()
    shown["shortest counterexample, or why harmless"] = [
        f"{row['length']} steps: {row['steps']}" if row["steps"] else row["reason"]
        for row in frame.to_dict("records")
    ]
    return shown


def habits(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `nvmx_lab.study.habits.habits`, worded: medians with intervals."""
    shown = frame.set_index("habit")[["pulls", "vmreads", "vmwrites"]].copy()
    shown.columns = ["pulls", "VMREADs of L0", "VMWRITEs of L0"]
    for name, title in (("cycles", "cycles added"), ("lazy", "more than with eager copying")):
        shown[title] = [
            f"{_number(row[f'{name}_p50'])} ({_number(row[f'{name}_p05'])} to "
            f"{_number(row[f'{name}_p95'])})".replace(" ", _SPACE)
            for row in frame.to_dict("records")
        ]
    return shown


def _number(value: float) -> str:
    return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")


def answer(
    result: Correctness, past: pd.DataFrame, caught: pd.DataFrame, priced: pd.DataFrame
) -> str:
    """Return what the notebook found, as Markdown."""
    verdict = result.verdicts[0]
    own = [judged for judged in verdict.findings if not judged.eager_too]
    reach = "Every reachable state" if verdict.complete else "A part of the reachable states"
    said = [
        f"{badge('simulated')} {reach} of the model of KVM {verdict.kvm} with the "
        f"**{verdict.sync}** sync was visited (machines: {'; '.join(verdict.explorations)}): "
        f"{verdict.total('states'):,.0f} states, "
        f"{verdict.total('transitions'):,.0f} transitions. "
    ]
    if own:
        listed = "; ".join(f"{judged.meaning or judged.cause} ({_mend(judged)})" for judged in own)
        ways = "one way" if len(own) == 1 else f"{len(own)} ways"
        said[0] += f"**It fails in {ways} in which eager copying does not**: {listed}."
    else:
        said[0] += "**Nobody can tell it from eager copying.**"
    said.append(_of_history(past))
    if len(caught):
        wrong = caught[caught["verdict"] == "caught"]
        said.append(
            f"The search is not blind: of {len(caught)} variants made wrong on purpose it catches "
            f"{len(wrong)}, in {wrong['length'].max()} steps at most. {len(caught) - len(wrong)} "
            "cannot be told from the model, each for a reason."
        )
    pulling = priced[priced["pulls"] > 0]
    low, high = (_number(end(pulling["lazy_p50"])) for end in (min, max))
    span = low if low == high else f"{low} to {high}"
    said.append(
        f"What makes L0 pull is safe but slow: about {span} cycles more per exit than with eager "
        f"copying, where an exit without a pull saves {_number(-priced['lazy_p50'].min())} "
        "(medians of the price list)."
    )
    said.append(
        "All this is about the model. That the model is KVM's mechanism rests on source that was "
        "read, and on logs of an executed KVM 6.1, in which none of these failures was provoked."
    )
    return "\n\n".join(said)


def _mend(judged: Judged) -> str:
    return judged.cause if judged.cause == THE_MUTANT else f"mended by `{judged.cause}`"


def _of_history(past: pd.DataFrame) -> str:
    releases = [name for name in past.columns if name[:1].isdigit()]
    parts = []
    for row in past.to_dict("records"):
        failing = [name for name in releases if row[name] == "found"]
        if failing and not row["eager_too"]:
            parts.append(f"{row['what']} ({', '.join(failing)}; {row['evidence']})")
    if not parts:
        return "In none of the releases does the sync fail."
    return f"Over the releases, the sync fails in this: {'; '.join(parts)}."


def of_mends() -> str:
    """Return what mends what, as a Markdown list."""
    return "\n".join(
        f"* `{name}`: {feature['meaning']} ({feature['source']})."
        for name, feature in features().items()
        if "mends" in feature
    )
