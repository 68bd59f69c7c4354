"""The ``nvmx-lab`` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nvmx_lab import __version__
from nvmx_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("table", "json", "csv")
BAD_INPUT = 2

format_option = click.option(
    "--format", "fmt", type=click.Choice(FORMATS), default="table", show_default=True
)


class _Commands(click.Group):
    """Commands in the order in which they were added: the order in which one needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(self.commands)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nvmx-lab")
def cli() -> None:
    """Study the cost of nested virtualization: one KVM patch, its price list, its workloads.

    Start with `nvmx-lab compare --mix cpuid`, or `nvmx-lab reproduce` for every report.
    """


@cli.command()
@click.option(
    "--mix", required=True, help="Name of a workload mix (nvmx-lab mixes), or a TOML file."
)
@click.option(
    "--kvm",
    multiple=True,
    default=("5.2", "5.2+patch13"),
    show_default=True,
    help="L0's KVM: a release and switched features. Give it twice (A, then B).",
)
@click.option(
    "--sync", multiple=True, help="Sync policy, for both or one each; default: the release's."
)
@click.option(
    "--cpu", default="skylake-2015", show_default=True, help="Price list (nvmx-lab cpus)."
)
@click.option(
    "--exits", type=int, default=1_000_000, show_default=True, help="Nested exits to draw."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of stream and prices.")
@click.option(
    "--without-unknown-prices", is_flag=True, help="Give totals without what has no price."
)
@format_option
def compare(
    mix: str,
    kvm: tuple[str, ...],
    sync: tuple[str, ...],
    cpu: str,
    exits: int,
    seed: int,
    without_unknown_prices: bool,
    fmt: str,
) -> None:
    """Compare two KVM releases or sync policies on a mix: A minus B is the saving."""
    from nvmx_lab.study.compare import compare as run

    result = run(
        _name_or_file(mix),
        kvm=kvm,
        sync=sync or None,
        cpu=_name_or_file(cpu),
        exits=exits,
        seed=seed,
        allow_unknown=without_unknown_prices,
    )
    if fmt == "json":
        click.echo(result.to_json())
    elif fmt == "csv":
        click.echo(result.to_frame().to_csv(index=False), nl=False)
    else:
        click.echo(str(result))


@cli.group()
def validate() -> None:
    """Hold the model against what real KVM executed."""


@validate.command("executed")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    help="Directory of executed runs; default: the shipped.",
)
@format_option
def validate_executed(runs: Path | None, fmt: str) -> None:
    """Replay executed runs through the model and compare, exit by exit.

    Exit status 1 if pulls, VMPTRLD or VMCLEAR disagree anywhere.
    """
    from nvmx_lab.study import validate as study

    results = study.validate(runs)
    if fmt == "json":
        _echo_json({"runs": [result.to_dict() for result in results]})
    elif fmt == "csv":
        click.echo(study.as_frame(results).to_csv(index=False), nl=False)
    else:
        click.echo(study.as_table(results))
    if not all(result.ok for result in results):
        sys.exit(1)


@cli.command()
@click.option("--kvm", multiple=True, help="L0's KVM; repeat. Default: every release.")
@click.option("--sync", help="Sync policy; default: the release's.")
@click.option("--mutant", default="", help="A wrong variant of L0 (nvmx-lab mutants).")
@click.option("--environment", multiple=True, help="Machine; repeat. Default: all.")
@click.option("--without", multiple=True, help="Leave a step out, SET_NESTED_STATE; repeat.")
@click.option("--depth", type=int, help="Stop after so many steps; default: at the last state.")
@click.option(
    "--save",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write each counterexample to a file in this folder.",
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Tell the story of a counterexample instead.",
)
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --replay: draw it to this file.",
)
@format_option
def check(
    kvm: tuple[str, ...],
    sync: str | None,
    mutant: str,
    environment: tuple[str, ...],
    without: tuple[str, ...],
    depth: int | None,
    save: Path | None,
    replay: Path | None,
    svg: Path | None,
    fmt: str,
) -> None:
    """Search every reachable state of L0's model for a value that L1 or L2 should not see.

    Exit status 1 if one is found that eager copying would not show.
    """
    from nvmx_lab.study import correctness

    if replay is not None:
        searched = (kvm, sync, mutant, environment, without, depth, save)
        if any(searched):
            raise LabError("--replay takes no option of the search", mend="--svg goes with it")
        told = correctness.told(replay, svg)
        _echo_json(told.to_dict()) if fmt == "json" else click.echo(str(told))
        sys.exit(1 if told.failed else 0)
    if svg is not None:
        raise LabError("--svg goes with --replay", mend="use --save, then --replay FILE --svg FILE")
    result = correctness.check(
        kvm or None,
        sync,
        mutant=mutant,
        environments=environment or None,
        depth=depth,
        without=without,
    )
    if save is not None:
        for path in correctness.save(result, save):
            click.echo(f"wrote {path}", err=True)
    if fmt == "json":
        click.echo(result.to_json())
    elif fmt == "csv":
        click.echo(result.findings().to_csv(index=False), nl=False)
    else:
        click.echo(str(result))
    sys.exit(0 if result.ok else 1)


@cli.command()
@click.option("--check", "explored", is_flag=True, help="Explore each: is it caught?")
@format_option
def mutants(explored: bool, fmt: str) -> None:
    """List the wrong variants of L0 on which the search is tried.

    With --check exit status 1 if one is not caught that should be, or the other way round.
    """
    import pandas as pd

    from nvmx_lab.nested.mutants import MUTANTS

    if not explored:
        columns = ["name", "source", "meaning", "harmless"]
        known = [{name: getattr(m, name) for name in columns} for m in MUTANTS.values()]
        _show(pd.DataFrame(known), fmt, columns=columns[:3])
        return
    from nvmx_lab.study import correctness

    table = correctness.mutants()
    _show(table, fmt, columns=["mutant", "verdict", "wrong", "length", "meaning"])
    sys.exit(0 if (table["verdict"] == table["expected"]).all() else 1)


@cli.command()
@format_option
def mixes(fmt: str) -> None:
    """List the workload mixes, with their sources."""
    from nvmx_lab.workload import mixes as workload

    table = workload.table()
    _show(table, fmt, columns=["mix", "basis", "l1", "title", "source"])


@cli.command()
@format_option
def kvm(fmt: str) -> None:
    """List the KVM releases and the features that can be switched (5.3+ibpb)."""
    import pandas as pd

    from nvmx_lab.nested import config, policies

    known = [
        {
            "name": r.name,
            "kind": "release",
            "meaning": " ".join(sorted(r.features)),
            "source": r.source,
        }
        for r in config.releases()
    ]
    known += [
        {"name": name, "kind": "feature", "meaning": entry["meaning"], "source": entry["source"]}
        for name, entry in config.features().items()
    ]
    known += [
        {"name": name, "kind": "sync policy", "meaning": policy.meaning, "source": ""}
        for name, policy in policies.SYNC_POLICIES.items()
    ]
    _show(pd.DataFrame(known), fmt)


class _NamesOrCommands(_Commands):
    """A group whose first word may be a name: `cpus skylake-2015` is `cpus show skylake-2015`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


@cli.group(cls=_NamesOrCommands, invoke_without_command=True)
@format_option
@click.pass_context
def cpus(ctx: click.Context, fmt: str) -> None:
    """List the price lists; show one (cpus CPU); or make one of timings."""
    ctx.obj = fmt
    if ctx.invoked_subcommand is None:
        from nvmx_lab.costs import prices

        _show(prices.overview(), fmt, columns=["cpu", "years", "basis", "note"])


@cpus.command("show")
@click.argument("cpu")
@click.option("--format", "fmt", type=click.Choice(FORMATS), help="As of cpus.")
@click.pass_obj
def cpus_show(of_group: str, cpu: str, fmt: str | None) -> None:
    """List every price of CPU, a name or a file, with its source."""
    from nvmx_lab.costs import prices

    _show(prices.load(_name_or_file(cpu)).frame(), fmt or of_group)


@cpus.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--id", "name", required=True, help="Id of the price list: my-cpu-2026.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="TOML file to write.")
@click.option("--base", help="Price list that lends what was not timed.")
@click.option("--format", "fmt", type=click.Choice(FORMATS), help="As of cpus.")
@click.pass_obj
def cpus_import(
    of_group: str, file: Path, name: str, out: Path, base: str | None, fmt: str | None
) -> None:
    """Make a price list of FILE, a CSV of timings as data/protocol/README.md describes it.

    Use it with --cpu and the name of the file.
    """
    from nvmx_lab.costs import measured

    result = measured.import_csv(file, id=name, out=out, base=base)
    if (fmt or of_group) == "table":
        click.echo(str(result))
        return
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    _show(result.frame(), fmt or of_group)


@cli.command()
@click.option(
    "--fit",
    type=click.Choice(["blind", "with-claim", "one-constant"]),
    default="with-claim",
    show_default=True,
    help="What is taken for true: without the patch's claim, with it, or one price per VMREAD.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the sampler.")
@click.option("--steps", type=int, default=2_000, show_default=True, help="Steps that are kept.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the posterior to this .parquet file, which --cpu takes.",
)
@format_option
def calibrate(fit: str, seed: int, steps: int, out: Path | None, fmt: str) -> None:
    """Fit the prices to published claims, and say what the other claims make of that.

    Exit status 1 if the sampler did not converge; nothing is written then.
    """
    from nvmx_lab.costs import calibration
    from nvmx_lab.study import how_sure

    if out is not None and out.suffix != ".parquet":
        raise LabError("a posterior is a Parquet file", where="--out", got=str(out))
    found = calibration.calibrate(fit, seed=seed, steps=steps)
    claims = how_sure.against_claims({fit: found}, seed=seed)
    if fmt == "table":
        _show(how_sure.calibrated_prices({fit: found}), fmt, columns=how_sure.PRICE_COLUMNS)
        click.echo()
        _show(claims.round(1), fmt, columns=how_sure.CLAIM_COLUMNS)
        click.echo(f"\n{found.convergence}")
    else:
        _show(claims, fmt)
    if not found.convergence.ok:
        enough = found.convergence.enough_steps
        click.echo(f"not converged, nothing written: give --steps {enough} or more", err=True)
        sys.exit(1)
    if out is not None:
        calibration.save(found, out, seed=seed)
        click.echo(f"wrote {out}", err=True)


@cli.group()
def tables() -> None:
    """Check the data tables that everything rests on."""


@tables.command("check")
@click.option(
    "--data", type=click.Path(path_type=Path), help="Data folder; default: the kit's own."
)
def tables_check(data: Path | None) -> None:
    """Check every table: schema, units, sources, cross-references. Exit status 1 on a fault."""
    from nvmx_lab import tables as checker

    if data is not None and not data.is_dir():
        raise LabError("no such folder of data tables", where=data)
    faults = checker.check(data)
    click.echo(checker.report(faults))
    if faults:
        sys.exit(1)


@cli.command()
@click.option("--mixes", multiple=True, help="Only these mixes (repeat, or separate by commas).")
@click.option("--jobs", type=int, help="Worker processes; default: the number of cores.")
@click.option(
    "--out",
    default="reports",
    show_default=True,
    help="Folder of the reports.",
)
@click.option("--kvm", multiple=True, help="L0's KVM before and after; give it twice.")
@click.option("--cpu", help="Price list.")
@click.option("--exits", type=int, help="Nested exits per mix.")
@click.option("--seed", type=int, help="Seed.")
@click.option("--all", "everything", is_flag=True, help="The notebooks beyond the main job too.")
def reproduce(
    mixes: tuple[str, ...],
    jobs: int | None,
    out: str,
    kvm: tuple[str, ...],
    cpu: str | None,
    exits: int | None,
    seed: int | None,
    everything: bool,
) -> None:
    """Run every report and write a site to read in a browser.

    Finished reports are not run again: a killed run goes on where it stopped.
    """
    from nvmx_lab.reports.reproduce import reproduce as run

    if not out.strip():
        raise LabError("--out names no folder", got=out, mend="use --out reports, or --out .")
    if kvm and len(kvm) != 2:
        raise LabError(
            "--kvm takes two releases", got=" ".join(kvm), mend="give it twice, or not at all"
        )
    given: dict[str, Any] = {"cpu": cpu, "exits": exits, "seed": seed}
    if kvm:
        given |= {"kvm_before": kvm[0], "kvm_after": kvm[1]}
    names = [name.strip() for text in mixes for name in text.split(",")] or None
    chosen = {key: value for key, value in given.items() if value is not None}
    result = run(names, jobs=jobs, out=Path(out), everything=everything, **chosen)
    for failure in result.failures:
        click.echo(f"failed: {failure}", err=True)
    made = result.reports - result.reused
    if result.reports:
        click.echo(f"{made} reports made, {result.reused} were there; open {result.index}")
    sys.exit(result.exit_status)


def _name_or_file(text: str) -> str | Path:
    """Take what looks like a file for one: it has a separator or ends in .toml or .parquet."""
    looks_like_file = text.endswith((".toml", ".parquet")) or os.sep in text
    return Path(text) if looks_like_file else text


def _show(frame: pd.DataFrame, fmt: str, columns: Sequence[str] | None = None) -> None:
    """Print a frame; the table has fewer columns and wraps its last one."""
    if fmt == "json":
        _echo_json(json.loads(frame.to_json(orient="records")))
    elif fmt == "csv":
        click.echo(frame.to_csv(index=False), nl=False)
    else:
        shown = frame[list(columns)] if columns else frame
        click.echo(_columns(shown))


def _columns(frame: pd.DataFrame) -> str:
    """Return a frame as text; cells are never cut, the last column goes on below itself."""
    import shutil
    import textwrap

    cells = [[str(name) for name in frame.columns]]
    cells += [
        ["" if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in row]
        for row in frame.itertuples(index=False)
    ]
    widths = [min(max(len(row[i]) for row in cells), 44) for i in range(len(cells[0]) - 1)]
    left = sum(width + 2 for width in widths)
    room = max(shutil.get_terminal_size((120, 24)).columns - left, 40)
    lines = []
    for row in cells:
        wrapped = [
            textwrap.wrap(text, width) or [""]
            for text, width in zip(row, [*widths, room], strict=True)
        ]
        for k in range(max(map(len, wrapped))):
            parts = [w[k] if k < len(w) else "" for w in wrapped]
            padded = [part.ljust(width) for part, width in zip(parts, [*widths, 0], strict=True)]
            lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def main() -> None:
    """Run the command; bad input is one line on standard error and exit status 2."""
    try:
        cli(standalone_mode=False)
    except LabError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(BAD_INPUT)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except BrokenPipeError:  # before OSError, whose kind it is
        # The reader of our output went away (head): not an error of ours. Python would complain
        # again when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        click.echo(f"error: cannot write the result: {error}", err=True)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
