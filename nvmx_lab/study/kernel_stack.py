"""Kernel-stack randomization in L1: what its HOST_RSP write costs, and what would mend it.

L1 rewrites HOST_RSP after most exits that it sends to user space. The write exits to L0, makes it
pull, and dirties vmcs12. Here: how often it did in executed runs, what it costs by price list, and
what changes of L0 would save. "Without the write" is the same exits with that one operation taken
out, so that every difference is paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nvmx_lab import data
from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import price, unpriced
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested import config as configs
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.counterexample import Counterexample
from nvmx_lab.nested.explorer import Exploration, explore
from nvmx_lab.nested.ops import Kind, Operation
from nvmx_lab.nested.primitives import COUNTERS
from nvmx_lab.nested.replay import Replay, replay
from nvmx_lab.nested.round_trip import round_trip
from nvmx_lab.nested.steps import parse
from nvmx_lab.study.compare import QUANTILES, verdict
from nvmx_lab.study.simulate import EXITS, P, Simulated, config_of, reader_and_pull_counts, simulate
from nvmx_lab.workload import mixes as workload
from nvmx_lab.workload.streams import Stream

if TYPE_CHECKING:
    import pandas as pd

HOST_RSP_WRITE: Final = Operation(Kind.VMWRITE, "HOST_RSP")
RUNS: Final = ("kvm61_lazy_linux_l2", "kvm61_lazy_shadow", "kvm61_lazy_shadow_nokstack")
"""Executed runs that differ in L1's randomization or in L2; all with the lazy sync."""

MIXES: Final = ("linux-boot-kstack", "pio-user-kstack", "mmio-user-kstack")
WITHOUT: Final = "without the write"
WRITE_PARTS: Final = ("trapped exit", "pull", "dirty entry", "all")

SEARCHED: Final = (
    *("GUEST_GS_BASE", "GUEST_PENDING_DBG_EXCEPTIONS"),  # rare
    *("HOST_RSP", "HOST_FS_BASE"),  # host state: trapping, and shadowed
    *("GUEST_CS_AR_BYTES", "GUEST_SYSENTER_ESP"),  # eager, and written by a dirty entry alone
    "CR4_GUEST_HOST_MASK",  # a control that a dirty entry alone writes
)
"""A field of each kind that the changes treat differently."""


SECOND_STATE: Final = tuple(
    parse(step)
    for step in ("VMXON", "SET_NESTED_STATE L2", "SET_NESTED_STATE L2", "L2_READ GUEST_GS_BASE")
)
"""User space restores a state in which L2 runs, into a vCPU whose L2 ran: the flag of the old
vmcs02 is set, and the entry from the new state is dirty."""


@dataclass(frozen=True)
class Fix:
    """A change of L0 that has been tried.

    Attributes
    ----------
    name : str
        Short name for tables and figures.
    features : tuple of str
        Features of the release, of ``data/l0_releases.toml``.
    idea : str
        What changes, in a sentence.
    """

    name: str
    features: tuple[str, ...]
    idea: str


FIXES: Final = (
    Fix(
        "shadow HOST_RSP",
        ("shadow-host-rsp",),
        "HOST_RSP joins the RW-shadowed fields: L1 writes it without an exit, L0 copies one field "
        "more in each direction",
    ),
    Fix(
        "clean host writes",
        ("clean-host-writes",),
        "a VMWRITE of a HOST_ field pulls as before, but leaves vmcs12 clean",
    ),
    Fix(
        "clean and unpulled host writes",
        ("clean-host-writes", "no-pull-host-writes"),
        "a VMWRITE of a HOST_ field neither dirties vmcs12 nor pulls",
    ),
    Fix(
        "unpulled host writes",
        ("no-pull-host-writes",),
        "a VMWRITE of a HOST_ field dirties vmcs12 as before, but does not pull",
    ),
    Fix(
        "unpulled writes",
        ("no-pull-unchecked-writes",),
        "only VMWRITEs of rare fields and of VM_ENTRY_CONTROLS pull; a dirty entry is as before",
    ),
    Fix(
        "unpulled writes + pull at entry",
        ("no-pull-unchecked-writes", "pull-at-dirty-entry"),
        "the same, and a dirty entry reads the rare fields first, while it has vmcs02 loaded",
    ),
    Fix(
        "unpulled writes + skip at entry",
        ("no-pull-unchecked-writes", "skip-rare-at-entry"),
        "the same, and a dirty entry leaves out the rare fields that only vmcs02 has",
    ),
)


def fix(name: str) -> Fix:
    """Return a fix by name.

    Raises
    ------
    LabError
        If there is none, with a suggestion if a name is near.
    """
    by_name = {each.name: each for each in FIXES}
    if name not in by_name:
        raise unknown("fix", name, by_name)
    return by_name[name]


def with_features(kvm: str, features: Sequence[str]) -> str:
    """Return a release with those of the features that it lacks."""
    has = configs.release(kvm).features
    return "+".join([kvm, *(name for name in features if name not in has)])


# -- executed ----------------------------------------------------------------------------------


def executed() -> pd.DataFrame:
    """Count, in executed runs, how often L0 pulled and what made it.

    Returns
    -------
    DataFrame
        One row per run and kind of exit: run, l1, l2, randomization (``"on"`` or ``"off"``), kind
        (the phase of the micro-guest, else L2's exit reason), exits, pulls (exits after which L0
        pulled), host_rsp (those that a VMWRITE of HOST_RSP made it do), other, first (what made it
        do so, most frequent first). All of them counted from the logs.

    Raises
    ------
    LabError
        If the log of a run is missing.
    """
    import pandas as pd

    return pd.concat([_executed(run) for run in RUNS], ignore_index=True)


def _executed(run: str) -> pd.DataFrame:
    """Count one run."""
    import tomllib

    import pandas as pd

    folder = data.path("executed")
    settings = tomllib.loads((folder / f"{run}.toml").read_text(encoding="utf-8"))
    exits = pd.read_parquet(folder / f"{run}.exits.parquet").sort_values("exit")
    causes = first_causes(pd.read_parquet(folder / f"{run}.segments.parquet"))
    exits["cause"] = exits["exit"].map(causes).fillna("").astype(str)
    exits["kind"] = exits["phase"].where(exits["phase"] != "", exits["l2_exit_reason"])
    rows = []
    for kind, some in exits.groupby("kind", sort=True):
        found = some.loc[some["cause"] != "", "cause"].value_counts()
        host_rsp = int(found.get(str(HOST_RSP_WRITE), 0))
        rows.append(
            {
                "run": run,
                "l1": settings["l1"],
                "l2": settings["l2"],
                "randomization": "off" if "randomization off" in settings["l1"] else "on",
                "kind": kind,
                "exits": len(some),
                "pulls": int(found.sum()),
                "host_rsp": host_rsp,
                "other": int(found.sum()) - host_rsp,
                "first": ", ".join(found.index),
            }
        )
    return pd.DataFrame(rows)


def first_causes(segments: pd.DataFrame) -> dict[int, str]:
    """Return what made L0 pull after each exit at which it did: ``"VMWRITE HOST_RSP"``.

    Parameters
    ----------
    segments : DataFrame
        Stretches of a lazy run: exit, seq, level, handler, field_name, rare_vmread.
    """
    pulled = segments[(segments["level"] == "L0") & (segments["rare_vmread"] > 0)]
    first = pulled.sort_values(["exit", "seq"]).drop_duplicates("exit")
    texts = (first["handler"].astype(str) + " " + first["field_name"].astype(str)).str.strip()
    return dict(zip(first["exit"].astype(int), texts, strict=True))


def executed_totals(frame: pd.DataFrame) -> pd.DataFrame:
    """Sum `executed` by run: exits, pulls, host_rsp, other, and their shares of the exits."""
    keys = ["run", "l1", "l2", "randomization"]
    total = frame.groupby(keys, sort=False, as_index=False)[
        ["exits", "pulls", "host_rsp", "other"]
    ].sum()
    for name in ("pulls", "host_rsp", "other"):
        total[f"{name}_share"] = total[name] / total["exits"]
    return total


# -- the mechanism -----------------------------------------------------------------------------


def mechanism(kvm: str) -> pd.DataFrame:
    """Count what one HOST_RSP write adds to a round trip, with each fix.

    Returns
    -------
    DataFrame
        One row per L0, the unchanged first: fix, kvm, exits (of L1 to L0), vmreads, rare_vmreads,
        vmwrites, vmptrlds, instructions (retired by L0). Against the unchanged L0 and an L1 that
        does not write.
    """
    import pandas as pd

    _, quiet = round_trip(Config.of(kvm, "lazy", mpx=False))
    rows = []
    for name, release in {
        "as it is": kvm,
        **{each.name: with_features(kvm, each.features) for each in FIXES},
    }.items():
        config = Config.of(release, "lazy", mpx=False)
        _, trip = round_trip(config, [str(HOST_RSP_WRITE)])
        more = dict(zip(COUNTERS, trip - quiet, strict=True))
        rows.append(
            {
                "fix": name,
                "kvm": release,
                "exits": int(more["transition"]),
                "vmreads": int(more["vmread_first"] + more["vmread_next"]),
                "rare_vmreads": int(more["rare_vmread"]),
                "vmwrites": int(more["vmwrite_first"] + more["vmwrite_next"]),
                "vmptrlds": int(more["vmptrld"]),
                "instructions": int(more["retired"]),
            }
        )
    return pd.DataFrame(rows)


# -- simulated ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Runs:
    """One mix under several L0s, with L1's HOST_RSP writes and without them.

    Attributes
    ----------
    mix : Mix
        The workload.
    kvm : str
        L0's release.
    eager, lazy : Simulated
        That release with either sync.
    eager_without, lazy_without : Simulated
        The same for the same exits without the write.
    fixes : dict of str to Simulated
        The lazy sync with each of `FIXES`.
    writes : int
        HOST_RSP writes in the stream.
    """

    mix: workload.Mix
    kvm: str
    eager: Simulated
    lazy: Simulated
    eager_without: Simulated
    lazy_without: Simulated
    fixes: Mapping[str, Simulated] = field(repr=False)
    writes: int

    @property
    def exits(self) -> int:
        """Nested exits of the stream."""
        return self.lazy.exits


def run(
    kvm: str = "6.1", *, mixes: Sequence[str] = MIXES, exits: int = EXITS, seed: int = 1
) -> list[Runs]:
    """Simulate mixes with and without L1's HOST_RSP writes, under each fix.

    Parameters
    ----------
    kvm : str
        L0's release.
    mixes : sequence of str
        Mixes whose L1 writes HOST_RSP.
    exits, seed
        Size and seed of each stream.

    Raises
    ------
    LabError
        If a name is unknown, or L1 never writes HOST_RSP in a mix.
    """
    out = []
    for name in tqdm(mixes, unit="mix", disable=None, delay=1):
        mix = workload.load(name)
        stream = mix.stream(exits, seed)
        if HOST_RSP_WRITE not in stream.alphabet:
            raise LabError("L1 never writes HOST_RSP in this mix", where=f"mix {name!r}")
        releases = [with_features(kvm, each.features) for each in FIXES]
        both = [config_of(mix, kvm, sync) for sync in ("eager", "lazy")]
        fixed = [config_of(mix, release, "lazy") for release in releases]
        eager, lazy, *mended = simulate(stream, [*both, *fixed])
        eager_without, lazy_without = simulate(without(stream, HOST_RSP_WRITE), both)
        code = stream.alphabet.index(HOST_RSP_WRITE)
        out.append(
            Runs(
                mix=mix,
                kvm=kvm,
                eager=eager,
                lazy=lazy,
                eager_without=eager_without,
                lazy_without=lazy_without,
                fixes={each.name: sim for each, sim in zip(FIXES, mended, strict=True)},
                writes=int(lazy.pairs[:, code].sum()),
            )
        )
    return out


def without(stream: Stream, operation: Operation) -> Stream:
    """Return the same round trips in the same order, one operation taken out of each."""
    words = (stream.words[word].tolist() for word in range(len(stream.words)))
    kept = [[code for code in word if stream.alphabet[code] != operation] for word in words]
    offsets = np.cumsum([0, *map(len, kept)], dtype=np.int64)
    codes = np.array([code for word in kept for code in word], dtype=stream.words.codes.dtype)
    return replace(stream, words=replace(stream.words, offsets=offsets, codes=codes))


def savings(runs: Sequence[Runs], *, cpus: Sequence[str], seed: int = 1) -> pd.DataFrame:
    """Price what the lazy sync saves over the eager one, with and without the write.

    Parameters
    ----------
    runs : sequence of Runs
        Of `run`.
    cpus : sequence of str
        Price lists.
    seed : int
        Seed of the price draws.

    Returns
    -------
    DataFrame
        One row per mix, ``write`` (bool) and cpu: mix, write, cpu, pulls_share (of the exits),
        saving_p05, _p50, _p95 (cycles per round trip; NaN where the list lacks a price), verdict.
    """
    import pandas as pd

    rows = []
    for cpu, drawn in _drawn(cpus, seed).items():
        for each in runs:
            for write, eager, lazy in (
                (True, each.eager, each.lazy),
                (False, each.eager_without, each.lazy_without),
            ):
                cycles = _priced(_trip(eager) - _trip(lazy), drawn)
                rows.append(
                    {
                        "mix": each.mix.name,
                        "write": write,
                        "cpu": cpu,
                        "pulls_share": lazy.exits_that_pull / each.exits,
                        **_quantiles(cycles, "saving"),
                        "verdict": _verdict(cycles),
                    }
                )
    return pd.DataFrame(rows)


def write_costs(runs: Sequence[Runs], *, cpus: Sequence[str], seed: int = 1) -> pd.DataFrame:
    """Price the HOST_RSP write itself with the lazy sync: what a round trip takes more with it.

    Returns
    -------
    DataFrame
        One row per mix, cpu and part (`WRITE_PARTS`): mix, cpu, part, writes_per_exit, cycles_p05,
        _p50, _p95 (mean per round trip of the mix), each_p50 (per write), share_p05, _p50, _p95 (of
        the whole round trip). The parts add up to ``"all"``.
    """
    import pandas as pd

    rows = []
    for cpu, drawn in _drawn(cpus, seed).items():
        for each in runs:
            whole = _priced(_trip(each.lazy), drawn)
            for part, counts in parts_of_write(each).items():
                cycles = _priced(counts, drawn)
                rows.append(
                    {
                        "mix": each.mix.name,
                        "cpu": cpu,
                        "part": part,
                        "writes_per_exit": each.writes / each.exits,
                        **_quantiles(cycles, "cycles"),
                        "each_p50": float(np.median(cycles)) * each.exits / each.writes,
                        **_quantiles(cycles / whole, "share"),
                    }
                )
    return pd.DataFrame(rows)


def parts_of_write(runs: Runs) -> dict[str, npt.NDArray[np.float64]]:
    """Return what the writes add to a round trip, mean counts by part, float64[P] each.

    The pull is what L0 pulls more than without the write (another operation may need the pull
    anyway), the dirty entry what the entries execute more, the trapped exit all the rest.
    """

    def entries(simulated: Simulated) -> npt.NDArray[np.float64]:
        by_operation = simulated.by_operation
        found = [by_operation[o][:P] for o in by_operation if o.kind in _ENTRIES]
        total: npt.NDArray[np.float64] = np.sum(found, axis=0) / simulated.exits
        return total

    whole = _trip(runs.lazy) - _trip(runs.lazy_without)
    entry = entries(runs.lazy) - entries(runs.lazy_without)
    more = runs.lazy.counter("pulls") - runs.lazy_without.counter("pulls")
    _, one_pull = reader_and_pull_counts(runs.lazy.config)
    pull = more / runs.exits * one_pull[:P]
    parts = (whole - entry - pull, pull, entry, whole)
    return dict(zip(WRITE_PARTS, parts, strict=True))


def fixes(runs: Sequence[Runs], *, cpus: Sequence[str], seed: int = 1) -> pd.DataFrame:
    """Price each fix against the unchanged lazy and eager L0.

    Returns
    -------
    DataFrame
        One row per mix, cpu and fix, and one for `WITHOUT` (L1 does not write: what there is to
        gain): mix, cpu, fix, pulls_share, rare_vmreads_per_exit, lazy_p05, _p50, _p95 (cycles per
        round trip saved against the lazy sync as it is), eager_p05, ... (against the eager one),
        closed_p05, ... (share of the gap between the lazy sync with and without the write).
    """
    import pandas as pd

    rows = []
    for cpu, drawn in _drawn(cpus, seed).items():
        for each in runs:
            gap = _priced(_trip(each.lazy) - _trip(each.lazy_without), drawn)
            for name, sim in {**each.fixes, WITHOUT: each.lazy_without}.items():
                saved = _priced(_trip(each.lazy) - _trip(sim), drawn)
                rows.append(
                    {
                        "mix": each.mix.name,
                        "cpu": cpu,
                        "fix": name,
                        "pulls_share": sim.exits_that_pull / each.exits,
                        "rare_vmreads_per_exit": sim.counter("rare_vmread") / each.exits,
                        **_quantiles(saved, "lazy"),
                        # An eager L0 without the write is the one to compare an L1 without it with.
                        **_quantiles(
                            _priced(
                                _trip(each.eager_without if name == WITHOUT else each.eager)
                                - _trip(sim),
                                drawn,
                            ),
                            "eager",
                        ),
                        **_quantiles(saved / gap, "closed"),
                    }
                )
    return pd.DataFrame(rows)


_ENTRIES: Final = (Kind.VMRESUME, Kind.VMLAUNCH)


def _drawn(cpus: Sequence[str], seed: int) -> dict[str, prices.Draws]:
    return {cpu: prices.load(cpu).draw(prices.DRAWS, seed) for cpu in cpus}


def _trip(simulated: Simulated) -> npt.NDArray[np.float64]:
    """Return the counts of a mean round trip."""
    counts: npt.NDArray[np.float64] = simulated.round_trip[:P] / simulated.exits
    return counts


def _priced(counts: npt.NDArray[np.float64], drawn: prices.Draws) -> npt.NDArray[np.float64]:
    """Price counts; NaN where a price is unknown."""
    if unpriced(counts, drawn):
        return np.full(prices.DRAWS, np.nan)
    return price(counts, drawn).values


def _quantiles(cycles: npt.NDArray[np.float64], name: str) -> dict[str, float]:
    values = np.quantile(cycles, (0.05, 0.5, 0.95))
    return {f"{name}_{q}": float(v) for q, v in zip(QUANTILES, values, strict=True)}


def _verdict(cycles: npt.NDArray[np.float64]) -> str:
    if np.isnan(cycles).any():
        return "no price"
    values = np.quantile(cycles, (0.05, 0.5, 0.95))
    return verdict(dict(zip(QUANTILES, map(float, values), strict=True)))


# -- is it right? ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """What the explorer says of one fix.

    Attributes
    ----------
    fix : Fix
        What was tried.
    exploration : Exploration
        What was searched, and what was found.
    replay : Replay or None
        The shortest counterexample; None if there is none.
    needs_flag_reset : bool
        Whether it fails in `SECOND_STATE` without the mend ``flag-reset``, which no release has.
        The release as it is does not fail there.
    """

    fix: Fix
    exploration: Exploration = field(repr=False)
    replay: Replay | None = field(repr=False)
    needs_flag_reset: bool = False

    @property
    def holds(self) -> bool:
        """Whether nobody sees what is not so, in every state that was searched."""
        return self.exploration.ok

    def to_dict(self) -> dict[str, Any]:
        """Return the judgement as JSON values."""
        steps = self.exploration.findings[0].steps if self.exploration.findings else ()
        return {
            "fix": self.fix.name,
            "features": "+".join(self.fix.features),
            "holds": self.holds,
            "complete": self.exploration.complete,
            "states": self.exploration.states,
            "needs_flag_reset": self.needs_flag_reset,
            "steps": "; ".join(map(str, steps)),
        }


def judge(
    kvm: str = "6.1",
    names: Sequence[str] | None = None,
    *,
    fields: Sequence[str] = SEARCHED,
    without: Sequence[str] = (),
) -> list[Judgement]:
    """Explore L0 with each fix, on a machine with VMCS shadowing.

    The release gets every known mend, so that what is found is the fix's doing.

    Parameters
    ----------
    kvm : str
        L0's release.
    names : sequence of str, optional
        Names of fixes; all if not given.
    fields : sequence of str
        Fields to follow: one of each kind by default.
    without : sequence of str
        Words of steps that do not happen, of `nvmx_lab.nested.steps.ARGUMENTS`.

    Raises
    ------
    LabError
        If a name is unknown.
    """
    mends = [name for name, feature in configs.features().items() if "mends" in feature]
    chosen = [fix(name) for name in names] if names is not None else list(FIXES)
    out = []
    for each in tqdm(chosen, unit="fix", disable=None, delay=1):
        config = Config.of(with_features(kvm, (*mends, *each.features)), "lazy")
        found = explore(config, fields=fields, without=without, each_field=False)
        shortest = min(found.findings, key=lambda f: len(f.steps), default=None)
        told = Counterexample.of(shortest).replay() if shortest else None
        others = [name for name in mends if name != "flag-reset"]
        unmended = Config.of(with_features(kvm, (*others, *each.features)), "lazy")
        needs = replay(unmended, SECOND_STATE, SECOND_STATE[-1].arg).failed
        out.append(Judgement(each, found, told, needs))
    return out


def records(judged: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Return judgements as rows of JSON values."""
    return [each.to_dict() for each in judged]


def wrong(judged: Sequence[Judgement]) -> set[str]:
    """Return the names of the fixes that fail."""
    return {each.fix.name for each in judged if not each.holds}
