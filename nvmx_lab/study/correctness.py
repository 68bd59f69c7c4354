"""Correctness: is what L0 defers ever visible, and in which releases.

`check` explores releases and sync policies and says of each failure what mends it and whether eager
copying fails too; `history` and `mutants` are the tables made from it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tqdm import tqdm

from nvmx_lab import files
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested import config as configs
from nvmx_lab.nested import diagram as diagrams
from nvmx_lab.nested import mutants as catalogue
from nvmx_lab.nested import story as stories
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.counterexample import Counterexample, load
from nvmx_lab.nested.explorer import ENVIRONMENTS, Exploration, Finding, explore
from nvmx_lab.nested.model import Nvmx
from nvmx_lab.nested.replay import Replay, replay
from nvmx_lab.nested.search import WRONG_VALUES
from nvmx_lab.nested.steps import ARGUMENTS

if TYPE_CHECKING:
    import pandas as pd

NOT_OF_L1: Final = ("GET_NESTED_STATE", "SET_NESTED_STATE", "MIGRATE", "SMI")
"""Steps that are no doing of L1 or L2."""

USUAL_MACHINES: Final = ("shadow VMCS", "enlightened VMCS")
"""Machines that show everything that any machine shows, but for fields that they lack."""

ONE_OF_EACH: Final = (
    *("GUEST_GS_BASE", "GUEST_PENDING_DBG_EXCEPTIONS", "GUEST_CS_AR_BYTES", "GUEST_RIP"),
    *("GUEST_CR3", "GUEST_SYSENTER_ESP", "GUEST_INTERRUPTIBILITY_INFO", "GUEST_PDPTR0"),
    *("GUEST_INTR_STATUS", "HOST_RIP", "EXIT_QUALIFICATION", "VM_INSTRUCTION_ERROR"),
    *("VM_EXIT_REASON", "CR4_GUEST_HOST_MASK"),
)
"""Fields that show most mistakes: searched first, because the whole search takes longer."""

THE_MUTANTS: Final = "the mutant's own"
THE_MUTANT: Final = "the mutant"
THE_POLICY: Final = "the policy: lazy does not fail in these steps"
UNEXPLAINED: Final = "no known mend"


@dataclass(frozen=True)
class Judged:
    """A way to fail: findings that one change mends.

    Attributes
    ----------
    finding : Finding
        The one with the shortest sequence.
    fields : tuple of str
        All fields to which it happens.
    environments : tuple of str
        Where it was found.
    cause : str
        The feature of L0 that mends it, `THE_MUTANT`, or `UNEXPLAINED`.
    eager_too : bool
        Whether the same release fails in the same sequence with eager copying: then the sync is not
        to blame.
    """

    finding: Finding
    fields: tuple[str, ...]
    environments: tuple[str, ...]
    cause: str
    eager_too: bool

    @property
    def meaning(self) -> str:
        """What goes wrong, in a sentence; empty if that is not known."""
        return str(configs.features().get(self.cause, {}).get("mends", ""))

    @property
    def who(self) -> str:
        """Who sees the wrong value."""
        last = self.finding.steps[-1]
        entered = last.word in ("VMLAUNCH", "VMRESUME") and not last.arg  # under a wrong control
        of_l2 = last.word.startswith("L2_") or (entered and self.finding.wrong in WRONG_VALUES)
        observer = "L2" if of_l2 else "L1"
        migrated = any(step.word == "MIGRATE" for step in self.finding.steps)
        return f"{observer}, after migration" if migrated else observer

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {
            "cause": self.cause,
            "meaning": self.meaning,
            "eager_too": self.eager_too,
            "wrong": self.finding.wrong,
            "who": self.who,
            "field": self.finding.field,
            "fields": list(self.fields),
            "environments": list(self.environments),
            "steps": [str(step) for step in self.finding.steps],
        }


@dataclass(frozen=True)
class Verdict:
    """One L0, explored on several machines.

    Attributes
    ----------
    kvm, sync : str
        Release and policy.
    mutant : str
        Name of the mutant, or empty.
    explorations : dict of str to Exploration
        By environment.
    findings : tuple of Judged
        Those of the sync first, then shortest first.
    """

    kvm: str
    sync: str
    mutant: str
    explorations: dict[str, Exploration] = field(repr=False)
    findings: tuple[Judged, ...]

    @property
    def title(self) -> str:
        """Which L0 it is."""
        return f"KVM {self.kvm}, {self.sync}" + f", mutant {self.mutant}" * bool(self.mutant)

    @property
    def ok(self) -> bool:
        """Whether nobody can tell this L0 from one that copies eagerly."""
        return all(judged.eager_too for judged in self.findings)

    @property
    def complete(self) -> bool:
        """Whether every reachable state was visited."""
        return all(exploration.complete for exploration in self.explorations.values())

    def total(self, name: str) -> float:
        """Return the sum of a number over the environments: states, transitions, seconds."""
        return float(sum(getattr(e, name) for e in self.explorations.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values."""
        return {
            "kvm": self.kvm,
            "sync": self.sync,
            "mutant": self.mutant,
            "ok": self.ok,
            "complete": self.complete,
            "environments": [
                {
                    "environment": environment,
                    "states": e.states,
                    "transitions": e.transitions,
                    "depth": e.depth,
                    "places": e.places,
                    "classes": e.classes,
                    "complete": e.complete,
                    "seconds": round(e.seconds, 3),
                }
                for environment, e in self.explorations.items()
            ],
            "findings": [judged.to_dict() for judged in self.findings],
        }

    def __str__(self) -> str:
        reach = (
            "every reachable state"
            if self.complete
            else f"to {max(e.depth for e in self.explorations.values())} steps"
        )
        rate = self.total("transitions") / max(self.total("seconds"), 1e-9) * 60
        own = [judged for judged in self.findings if not judged.eager_too]
        shared = [judged for judged in self.findings if judged.eager_too]
        holds = "holds" if self.complete else "no failure found"
        lines = [
            f"{self.title}: {holds if self.ok else 'FAILS'}",
            f"  {reach}: {self.total('states'):,.0f} states, {self.total('transitions'):,.0f} "
            f"transitions on {_machines(len(self.explorations))} in {self.total('seconds'):.1f} s "
            f"({rate / 1e6:.1f} million a minute)",
            *_listed(own),
        ]
        if shared:
            lines.append("  Not of the sync, eager copying fails in the same way:")
            lines += _listed(shared)
        return "\n".join(lines)


def _machines(number: int) -> str:
    return "one machine" if number == 1 else f"{number} machines"


def _listed(findings: Iterable[Judged]) -> list[str]:
    lines = []
    for judged in findings:
        finding = judged.finding
        others = f" and {len(judged.fields) - 1} more" if len(judged.fields) > 1 else ""
        mend = f" ({judged.cause})"
        if judged.meaning:
            evidence = configs.features()[judged.cause]["evidence"]
            mend = f" (mend: {judged.cause}; {evidence})"
        lines += [
            f"  - {judged.who} sees a wrong value of {finding.field}{others}: {finding.wrong}"
            f"{mend}",
            f"    {'; '.join(map(str, finding.steps))}",
            f"    on: {', '.join(judged.environments)}",
        ]
    return lines


@dataclass(frozen=True)
class Correctness:
    """What was checked; shows itself as a table in Jupyter.

    Attributes
    ----------
    verdicts : tuple of Verdict
        One for each L0.
    """

    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """Whether the property holds for all."""
        return all(verdict.ok for verdict in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"ok": self.ok, "checked": [verdict.to_dict() for verdict in self.verdicts]}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def shortest(self) -> Told | None:
        """Return the shortest counterexample, told; those that eager copying shares last."""
        return shortest(self)

    def save(self, folder: Path) -> list[Path]:
        """Write each counterexample to a file of its own; return the files."""
        return save(self, folder)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per L0: kvm, sync, mutant, verdict, states, transitions, seconds."""
        import pandas as pd

        return pd.DataFrame(
            {
                "kvm": verdict.kvm,
                "sync": verdict.sync,
                "mutant": verdict.mutant,
                "verdict": "holds" if verdict.ok else "fails",
                "findings": sum(not judged.eager_too for judged in verdict.findings),
                "eager_too": sum(judged.eager_too for judged in verdict.findings),
                "complete": verdict.complete,
                "states": int(verdict.total("states")),
                "transitions": int(verdict.total("transitions")),
                "seconds": verdict.total("seconds"),
            }
            for verdict in self.verdicts
        )

    def findings(self) -> pd.DataFrame:
        """Return one row per finding, `steps` as text."""
        import pandas as pd

        return pd.DataFrame(
            {
                "kvm": verdict.kvm,
                "sync": verdict.sync,
                "mutant": verdict.mutant,
                **judged.to_dict(),
                "fields": len(judged.fields),
                "environments": ", ".join(judged.environments),
                "length": len(judged.finding.steps),
                "steps": "; ".join(map(str, judged.finding.steps)),
            }
            for verdict in self.verdicts
            for judged in verdict.findings
        )

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.verdicts))

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False, border=0, float_format=lambda x: f"{x:,.1f}")


def check(
    kvm: str | Sequence[str] | None = None,
    sync: str | None = None,
    *,
    mutant: str = "",
    environments: Collection[str] | None = None,
    depth: int | None = None,
    without: Collection[str] = (),
) -> Correctness:
    """Explore L0s and judge what is found.

    Parameters
    ----------
    kvm : str or sequence of str, optional
        Releases; every base release if not given, or the mutant's own.
    sync : str, optional
        Policy; by default the release's own.
    mutant : str
        Name of a mutant (`nvmx_lab.nested.mutants`).
    environments : collection of str, optional
        Machines, of `nvmx_lab.nested.explorer.ENVIRONMENTS`; all, or that of the mutant.
    depth : int, optional
        Stop after so many steps; by default when no state is left.
    without : collection of str
        Words of steps that do not happen, of `nvmx_lab.nested.steps.ARGUMENTS`.

    Raises
    ------
    LabError
        If a name is unknown.
    """
    chosen = catalogue.mutant(mutant) if mutant else None
    releases = [kvm] if isinstance(kvm, str) else list(kvm or ())
    environments = [environments] if isinstance(environments, str) else environments
    without = (without,) if isinstance(without, str) else without
    if not releases:
        releases = [chosen.kvm] if chosen else [release.name for release in configs.releases()]
    names = list(environments or ())
    for word in without:
        if word not in ARGUMENTS:
            raise unknown("step", word, ARGUMENTS, where="without")
    for name in names:
        if name not in ENVIRONMENTS:
            raise unknown("environment", name, ENVIRONMENTS)
    if depth is not None and depth < 1:
        raise LabError("at least one step", where="depth", got=depth)
    machines = {name: ENVIRONMENTS[name] for name in names}
    if not machines:
        machines = {THE_MUTANTS: chosen.options} if chosen else dict(ENVIRONMENTS)
    nvmx = chosen.nvmx if chosen else Nvmx
    if chosen and (sync or any(configs.release(name).sync != "lazy" for name in releases)):
        raise LabError(
            "a mutant is a variant of the lazy sync",
            where=f"mutant {mutant!r}",
            got=sync or ", ".join(releases),
            mend="leave the sync policy out, and name releases with patch13",
        )
    grid = {
        release: {name: Config.of(release, sync, **options) for name, options in machines.items()}
        for release in releases
    }
    verdicts = []
    with tqdm(total=len(releases) * len(machines), unit="L0", disable=None) as bar:
        for release, by_name in grid.items():
            explorations = {}
            for name, config in by_name.items():
                bar.set_description(f"{release}, {name}")
                explorations[name] = explore(config, nvmx, depth=depth, without=without)
                bar.update()
            policy = next(iter(by_name.values())).sync
            findings = _judged(explorations, nvmx)
            verdicts.append(Verdict(release, policy, mutant, explorations, findings))
    return Correctness(tuple(verdicts))


def _judged(explorations: dict[str, Exploration], nvmx: type[Nvmx]) -> tuple[Judged, ...]:
    """Judge every finding, and make one of those with the same cause and effect."""
    judged: list[Judged] = []
    for environment, exploration in explorations.items():
        found: dict[tuple[str, bool, str], list[Finding]] = defaultdict(list)
        for finding in exploration.findings:  # shortest first
            found[cause_of(finding, nvmx), fails_when_eager(finding), finding.wrong].append(finding)
        for (cause, eager_too, _), alike in found.items():
            fields = tuple(dict.fromkeys(name for finding in alike for name in finding.fields))
            judged.append(Judged(alike[0], fields, (environment,), cause, eager_too))
    merged: dict[tuple[object, ...], Judged] = {}
    for one in judged:
        # The same sequence on another machine.
        key = (one.cause, one.eager_too, one.finding.wrong, one.finding.field, one.finding.steps)
        known = merged.get(key, replace(one, environments=()))
        merged[key] = replace(
            known,
            fields=tuple(dict.fromkeys((*known.fields, *one.fields))),
            environments=(*known.environments, *one.environments),
        )
    judged = list(merged.values())
    return tuple(sorted(judged, key=lambda one: (one.eager_too, len(one.finding.steps))))


def cause_of(finding: Finding, nvmx: type[Nvmx] = Nvmx) -> str:
    """Return what mends a finding: a feature with which the same sequence does no harm.

    It is replayed on the whole model for each feature that mends something.

    Raises
    ------
    LabError
        If it does not fail there: L0 decides by something that the explorer does not follow.
    """
    if not _fails(finding, finding.config, nvmx):
        raise LabError(
            "what the explorer found does not happen with concrete values",
            where=f"sync policy {finding.config.sync!r}",
            got="; ".join(map(str, finding.steps)),
            mend="L0 may decide by its control state, by no value and no cell",
        )
    if nvmx is not Nvmx and not _fails(finding, finding.config):
        return THE_MUTANT
    for name, feature in configs.features().items():
        if "mends" in feature and name not in finding.config.kvm.features:
            mended = configs.release(f"{finding.config.kvm.name}+{name}")
            if not _fails(finding, replace(finding.config, kvm=mended), nvmx):
                return name
    if finding.config.sync != "lazy" and not _fails(finding, finding.config.with_sync("lazy")):
        return THE_POLICY
    return UNEXPLAINED


def fails_when_eager(finding: Finding) -> bool:
    """Return whether the release as it is, with eager copying, fails in the same sequence."""
    return _fails(finding, finding.config.with_sync("eager"))


def _fails(finding: Finding, config: Config, nvmx: type[Nvmx] = Nvmx) -> bool:
    return replay(config, finding.steps, finding.field, nvmx).failed


@dataclass(frozen=True)
class Told:
    """A counterexample, replayed.

    Attributes
    ----------
    counterexample : Counterexample
        What was replayed.
    replay : Replay
        What happened.
    """

    counterexample: Counterexample
    replay: Replay = field(repr=False)

    @property
    def story(self) -> str:
        """What happened, in sentences."""
        return stories.story(self.replay)

    @property
    def diagram(self) -> str:
        """What happened, as a sequence diagram in text."""
        return diagrams.diagram(self.replay)

    @property
    def failed(self) -> bool:
        """Whether somebody saw what nobody should."""
        return self.replay.failed

    def frame(self) -> pd.DataFrame:
        """Return the arrows of the diagram, for `nvmx_lab.plots.sequence`."""
        import pandas as pd

        return pd.DataFrame(diagrams.rows(self.replay))

    def to_dict(self) -> dict[str, Any]:
        """Return the counterexample, and how it ends, as JSON values."""
        return {
            **self.counterexample.to_dict(),
            "failed": self.failed,
            "story": self.story.splitlines(),
        }

    def __str__(self) -> str:
        return f"{self.story}\n\n{self.diagram}"


def told(path: Path, svg: Path | None = None) -> Told:
    """Replay a counterexample from a file; draw it to another if one is named.

    Raises
    ------
    LabError
        If the file is no counterexample, or the drawing cannot be written.
    """
    from nvmx_lab import plots

    counterexample = load(path)
    result = Told(counterexample, counterexample.replay())
    if svg is not None:
        drawn = plots.svg(plots.sequence(result.frame()))
        files.write_with(svg, lambda beside: beside.write_bytes(drawn))
    return result


def shortest(result: Correctness) -> Told | None:
    """Return the shortest counterexample, those that eager copying shares last; None if none."""
    found = [(judged, verdict) for verdict in result.verdicts for judged in verdict.findings]
    if not found:
        return None
    judged, verdict = min(found, key=lambda pair: (pair[0].eager_too, len(pair[0].finding.steps)))
    counterexample = Counterexample.of(judged.finding, verdict.mutant)
    return Told(counterexample, counterexample.replay())


def save(result: Correctness, folder: Path) -> list[Path]:
    """Write each counterexample to a file of its own; return the files.

    Raises
    ------
    LabError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"cannot be made: {error.strerror}", where=folder) from None
    written = []
    for verdict in result.verdicts:
        for number, judged in enumerate(verdict.findings, start=1):
            parts = (verdict.kvm, verdict.sync, verdict.mutant, str(number))
            path = folder / ("-".join(part for part in parts if part) + ".json")
            Counterexample.of(judged.finding, verdict.mutant).save(path)
            written.append(path)
    return written


def history(result: Correctness) -> pd.DataFrame:
    """Return in which releases each known way to fail was found.

    Parameters
    ----------
    result : Correctness
        Of several releases, each with its own policy.

    Returns
    -------
    DataFrame
        One row per feature that mends something: mend, what (what goes wrong), evidence, eager_too,
        shortest (steps), and for each release ``"found"``, ``"mended"`` if the release has the
        feature, else ``"not found"``.
    """
    import pandas as pd

    rows = []
    for name, feature in configs.features().items():
        if "mends" not in feature:
            continue
        found = {
            verdict.kvm: judged
            for verdict in result.verdicts
            for judged in reversed(verdict.findings)
            if judged.cause == name
        }
        shortest = min(found.values(), key=lambda j: len(j.finding.steps), default=None)
        rows.append(
            {
                "mend": name,
                "what": feature["mends"],
                "evidence": feature["evidence"],
                "eager_too": shortest is not None and shortest.eager_too,
                "shortest": "; ".join(map(str, shortest.finding.steps)) if shortest else "",
                **{
                    verdict.kvm: "found"
                    if verdict.kvm in found
                    else "mended"
                    if name in configs.release(verdict.kvm).features
                    else "not found"
                    for verdict in result.verdicts
                },
            }
        )
    return pd.DataFrame(rows)


def _of_the_mutant(exploration: Exploration) -> list[Finding]:
    """Return what is found that the model without the mistake does not show."""
    return [f for f in exploration.findings if not _fails(f, exploration.config)]


def mutants(names: Collection[str] | None = None) -> pd.DataFrame:
    """Explore mutants and say of each whether it is caught.

    The fields of `ONE_OF_EACH` are searched first, and all only if they show nothing: a
    counterexample is the shortest among the fields searched.

    Parameters
    ----------
    names : collection of str, optional
        Names of mutants; all if not given.

    Returns
    -------
    DataFrame
        One row per mutant: mutant, meaning, source, verdict (``"caught"`` or ``"harmless"``),
        expected (the same words), wrong, field, length and steps of the shortest counterexample,
        reason why it is harmless.
    """
    import pandas as pd

    rows = []
    chosen = [catalogue.mutant(name) for name in names or catalogue.MUTANTS]
    for item in tqdm(chosen, unit="mutant", disable=None, delay=1):
        config = item.config
        findings = _of_the_mutant(explore(config, item.nvmx, fields=ONE_OF_EACH, each_field=False))
        if not findings:  # only the whole search can say that there is nothing
            findings = _of_the_mutant(explore(config, item.nvmx))
        first = findings[0] if findings else None
        rows.append(
            {
                "mutant": item.name,
                "meaning": item.meaning,
                "source": item.source,
                "verdict": "caught" if first else "harmless",
                "expected": "harmless" if item.harmless else "caught",
                "wrong": first.wrong if first else "",
                "field": first.field if first else "",
                "length": len(first.steps) if first else None,
                "steps": "; ".join(map(str, first.steps)) if first else "",
                "reason": item.harmless,
            }
        )
    return pd.DataFrame(rows).astype({"length": "Int64"})
