"""Everything at once: the reports of all mixes, their summary and the front page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nvmx_lab import files, notebook_parameters
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.reports import batch, inputs, site, summary

ONE_MIX = notebook_parameters.ReproduceTheSaving.notebook
ALL_MIXES = notebook_parameters.AcrossWorkloadMixes.notebook
BREAKDOWN = notebook_parameters.WhereTheCyclesGo.notebook
CORRECTNESS = notebook_parameters.IsItCorrect.notebook

BEYOND = (
    notebook_parameters.BetterPolicies.notebook,
    notebook_parameters.KernelStackRandomization.notebook,
    notebook_parameters.HowSure.notebook,
    notebook_parameters.TheSeries.notebook,
    notebook_parameters.BreakEven.notebook,
    notebook_parameters.CouldYouMeasureIt.notebook,
)
"""What ``--all`` adds to the main job, the longest first."""

USUAL_MIX = "cpuid"
"""The mix to take apart if nothing else is asked for: the shortest exit that L1 handles."""

ALWAYS_PRICED = ("vmread_first", "vmwrite_first", "vmptrld", "transition", "cpi")
"""Prices without which no round trip has a total."""


@dataclass(frozen=True)
class Reproduction:
    """What `reproduce` made.

    Attributes
    ----------
    out : Path
        The folder of reports.
    index : Path
        The front page.
    reports : int
        Finished reports, those that were there before included.
    reused : int
        How many of them were there before.
    failures : tuple of Failure
        Reports that could not be made; printing one says which, where and why.
    """

    out: Path
    index: Path
    reports: int
    reused: int
    failures: tuple[batch.Failure, ...]

    @property
    def exit_status(self) -> int:
        """0 if every report was made, else 1."""
        return 1 if self.failures else 0


def reproduce(
    mixes: Sequence[str] | None = None,
    *,
    jobs: int | None = None,
    out: Path | str = "reports",
    breakdown_mix: str | None = None,
    everything: bool = False,
    notebooks: Path | None = None,
    **parameters: Any,
) -> Reproduction:
    """Run every report, several at a time, and write the site.

    Parameters
    ----------
    mixes : sequence of str, optional
        Names of the mixes; all there are if not given.
    jobs : int, optional
        Worker processes; as many as there are cores if not given.
    out : Path or str
        The folder for the site, made if need be.
    breakdown_mix : str, optional
        The mix whose round trip ``03_where_the_cycles_go`` takes apart; if not given "cpuid", or
        the first where that is not among the mixes.
    everything : bool
        Run the notebooks of `BEYOND` too.
    notebooks : Path, optional
        The folder with the notebooks; this package's own if not given.
    **parameters
        Parameters of the notebooks on the saving: kvm_before, kvm_after, cpu, exits, seed; the
        other notebooks take those of them that they have.

    Returns
    -------
    Reproduction
        Where the front page is, and what failed.

    Raises
    ------
    LabError
        For an unknown mix, release, price list or parameter, or a folder that cannot be written;
        before any notebook is run.
    """
    out = Path(out)
    folder = inputs.notebooks_folder() if notebooks is None else notebooks
    names = _mixes(mixes)
    shared = _shared(parameters)
    if breakdown_mix is None:
        breakdown_mix = USUAL_MIX if USUAL_MIX in names else names[0]
    taken_apart = _mixes([breakdown_mix])[0]
    fingerprint = inputs.fingerprint()

    def planned(notebook: str, name: str, **more: Any) -> batch.Task:
        path = folder / f"{notebook}.ipynb"
        known = notebook_parameters.NOTEBOOKS[notebook].model_fields
        # Beyond the main job a notebook keeps defaults of its own unless somebody gave another.
        asked = parameters if notebook in BEYOND else shared
        given = {key: value for key, value in asked.items() if key in known}
        return batch.plan(path, {**given, **more}, name=name, fingerprint=fingerprint)

    tasks = [
        # The longest first, so that no core waits for them at the end.
        planned(CORRECTNESS, CORRECTNESS),
        *(planned(notebook, notebook) for notebook in BEYOND if everything),
        planned(ALL_MIXES, ALL_MIXES, mixes=names),
        planned(BREAKDOWN, BREAKDOWN, mix=taken_apart),
        *(planned(ONE_MIX, f"{ONE_MIX}--{name}", mix=name) for name in names),
    ]
    workers = batch.workers(jobs)
    with batch.hold(out) as held:
        reused = sum(batch.finished(out, task) is not None for task in tasks)
        # The front page goes first and comes back last: it never speaks of reports not there.
        site.withdraw(out)
        outcome = batch.run(tasks, held, jobs=workers)
        if not outcome.reports:  # nothing to lead to
            return Reproduction(out, out / "index.html", 0, 0, tuple(outcome.failures))
        return _gather(out, outcome, shared, names, reused=reused)


def _gather(
    out: Path,
    outcome: batch.Outcome,
    shared: Mapping[str, Any],
    names: Sequence[str],
    *,
    reused: int,
) -> Reproduction:
    """Write the summary, the record of the run, and last the page that leads to them."""
    failures = list(outcome.failures)
    rows: list[summary.Row] = []
    pages: dict[str, str] = {}
    for report in outcome.reports:
        if report.task.notebook != ONE_MIX:
            continue
        mix = str(report.task.parameters["mix"])
        try:
            (row,) = summary.rows(report.results.get("summary", []))
            if row.mix != mix:
                raise LabError("the notebook published another mix", got=row.mix, allowed=mix)
        except ValueError:
            failures.append(batch.Failure(report.task, "published no summary of one row"))
            continue
        except LabError as error:
            failures.append(batch.Failure(report.task, str(error)))
            continue
        rows.append(row)
        pages[mix] = f"{report.task.name}.html"
    rows.sort(key=lambda row: names.index(row.mix))
    table = summary.frame(rows)
    table["report"] = [pages[row.mix] for row in rows]
    summary.write(table, out)

    made = datetime.now(UTC).isoformat(timespec="seconds")
    versions = inputs.versions()
    files.write_json(
        out / "run.json",
        {
            "made": made,
            "arguments": {"mixes": list(names), **shared},
            "seed": shared["seed"],
            "platform": inputs.platform_name(),
            "versions": versions,
            "code": inputs.code_hash(),
            "data": inputs.data_hashes(),
            "reports": [
                {
                    "name": report.task.name,
                    "id": report.task.id,
                    "notebook": report.task.notebook,
                    "parameters": dict(report.task.parameters),
                    "seconds": report.seconds,
                    "files": report.files,
                }
                for report in outcome.reports
            ],
            "failures": [
                {"name": failure.task.name, "reason": failure.reason} for failure in failures
            ],
        },
    )
    site.write(
        out,
        rows=rows,
        pages=pages,
        links=[
            site.Link(f"{report.task.name}.html", _title(report.task), report.seconds)
            for report in sorted(outcome.reports, key=lambda report: report.task.notebook)
            if report.task.notebook != ONE_MIX
        ],
        failures=[str(failure) for failure in failures],
        before=str(shared["kvm_before"]),
        after=str(shared["kvm_after"]),
        provenance={
            "Made": made,
            "Price list": str(shared["cpu"]),
            "Exits per mix": f"{shared['exits']:,}",
            "Seed": str(shared["seed"]),
            "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
            "Code (SHA-256)": inputs.code_hash(),
            "Data (SHA-256)": inputs.digest(*(f"{k} {v}" for k, v in inputs.data_hashes().items())),
        },
    )
    return Reproduction(out, out / "index.html", len(outcome.reports), reused, tuple(failures))


def _mixes(given: Sequence[str] | None) -> list[str]:
    """Return the mixes to run, each of which exists, in the given order without repetition."""
    from nvmx_lab.workload import mixes

    if isinstance(given, str):
        raise LabError("the mixes are a list of names", got=given, mend=f"write [{given!r}]")
    names = list(dict.fromkeys(mixes.names() if given is None else given))
    if not names:
        raise LabError("no mix to run", allowed=", ".join(mixes.names()))
    for name in names:
        # A path would do elsewhere; a report's id covers only what comes with the kit.
        if name not in mixes.names():
            raise unknown("mix", name, mixes.names())
    return names


def _shared(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that all notebooks share, checked, and known to the kit."""
    from nvmx_lab.costs import prices
    from nvmx_lab.nested import config

    for own in ("mix", "mixes"):
        if own in parameters:
            raise LabError(f"{own!r} is not a parameter of all notebooks", mend="use mixes=[...]")
    checked = notebook_parameters.check(ALL_MIXES, parameters)
    checked.pop("mixes")
    config.release(checked["kvm_before"])
    config.release(checked["kvm_after"])
    price_list = prices.load(checked["cpu"])
    always = [name for name in ALWAYS_PRICED if name in price_list.unknown]
    if always:  # every report would refuse its total, one by one
        raise LabError(
            "no totals: the price list lacks prices that every round trip needs",
            where=f"cpu {price_list.id}",
            got=", ".join(always),
            mend="choose another cpu, or give the prices in a TOML file and use nvmx-lab compare",
        )
    return checked


def _title(task: batch.Task) -> str:
    """Return a notebook's own title: the heading in its first cell."""
    for cell in json.loads(task.source)["cells"]:
        text = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown" and text.startswith("# "):
            return text.splitlines()[0].removeprefix("# ").strip()
    return task.notebook.replace("_", " ")
