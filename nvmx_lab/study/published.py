"""Published totals of whole loops: a test of the simulated cycles that no price was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmx_lab import data
from nvmx_lab.costs import prices
from nvmx_lab.study.compare import pairs_of, priced
from nvmx_lab.study.simulate import EXITS, simulate_mix
from nvmx_lab.workload import mixes as workload
from nvmx_lab.workload.mixes import Mix

if TYPE_CHECKING:
    import pandas as pd

SERIES = ("5.2", "5.3")
"""The releases without and with the series of 43 patches whose totals are published."""

COLUMNS = (
    *("mix", "what", "kvm", "cycles_p05", "cycles_p50", "cycles_p95"),
    *("published_cycles", "inside", "source"),
)


def against_published(
    mixes: str | Path | Mix | Sequence[str],
    *,
    cpu: str | Path = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
    draws: int = prices.DRAWS,
) -> pd.DataFrame:
    """Compare simulated totals with the published ones of the whole series.

    The published loops ran before and after all 43 patches, which KVM 5.2 and 5.3 stand for here,
    whatever two releases a report compares. No price is fitted to them.

    Parameters
    ----------
    mixes : str, Path, Mix, or sequence of str
        One mix or several; those without published totals are passed over.
    cpu, exits, seed, draws
        As in `nvmx_lab.study.compare.compare`.

    Returns
    -------
    DataFrame
        Three rows per mix with published totals, `COLUMNS`: mix, what ("before", "after", and
        "saving", the difference), kvm, cycles_p05, cycles_p50, cycles_p95 (simulated, per iteration
        of the loop: the mean round trip times the exits of an iteration), published_cycles, inside
        (whether the published total is in the 90 % interval), source. No rows if none has any.

    Raises
    ------
    LabError
        If a mix or a price list is unknown, or a price is missing.
    """
    import pandas as pd

    chosen: Sequence[str | Path | Mix] = [mixes] if isinstance(mixes, str | Path | Mix) else mixes
    rows = []
    for name in chosen:
        mix = name if isinstance(name, Mix) else workload.load(name)
        if mix.published is not None:
            rows += _rows(mix, cpu, exits, seed, draws)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(mix: Mix, cpu: str | Path, exits: int, seed: int, draws: int) -> list[dict[str, Any]]:
    published = mix.published
    assert published is not None  # noqa: S101 - the caller has looked
    pairs = pairs_of(SERIES, None)
    _, simulated = simulate_mix(
        mix, [k for k, _ in pairs], [s for _, s in pairs], exits=exits, seed=seed
    )
    result = priced(mix, simulated, prices.load(cpu), seed=seed, draws=draws)
    totals = {
        "before": (result.results[0].round_trip_cycles, published.before_cycles),
        "after": (result.results[1].round_trip_cycles, published.after_cycles),
        "saving": (
            result.saving["round_trip_cycles"],
            published.before_cycles - published.after_cycles,
        ),
    }
    rows = []
    releases = (*SERIES, " minus ".join(SERIES))
    for release, (what, (cycles, known)) in zip(releases, totals.items(), strict=True):
        low, middle, high = (
            published.exits_per_iteration * cycles[q] for q in ("p05", "p50", "p95")
        )
        rows.append(
            {
                "mix": mix.name,
                "what": what,
                "kvm": release,
                "cycles_p05": low,
                "cycles_p50": middle,
                "cycles_p95": high,
                "published_cycles": known,
                "inside": bool(low <= known <= high),
                "source": published.source,
            }
        )
    return rows


def claimed_saving() -> tuple[float, str]:
    """Return what the patch's author measured, TSC cycles per nested exit, and the source."""
    for row in data.read_rows("claims.csv"):
        if row["id"] == "A":
            return float(row["claimed_cycles"]), row["source_ref"]
    raise AssertionError("claims.csv has no claim A")  # `nvmx-lab tables check` would have said so


def executed_pulls() -> pd.DataFrame:
    """Return how often real KVM pulled in each executed run.

    Returns
    -------
    DataFrame
        run, l1, l2 (text of the run's file), exits, pulls_share (share of the exits between which
        and the next entry L0 read rare fields); lazy runs without an enlightened VMCS only,
        most pulls first.
    """
    import tomllib

    import pandas as pd

    rows = []
    for file in sorted(data.path("executed").glob("*.toml")):
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
        if settings["sync"] != "lazy" or settings["evmcs"]:
            continue
        exits = pd.read_parquet(file.with_suffix(".exits.parquet"), columns=["l0_rare_vmread"])
        rows.append(
            {
                "run": file.stem,
                "l1": settings["l1"],
                "l2": settings["l2"],
                "exits": len(exits),
                "pulls_share": float((exits["l0_rare_vmread"] > 0).mean()),
            }
        )
    frame = pd.DataFrame(rows).sort_values("pulls_share", ascending=False)
    return frame.reset_index(drop=True)
