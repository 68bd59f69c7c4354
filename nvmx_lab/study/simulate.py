"""Simulate once: a mix or an executed run under several L0s, as counts by operation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from nvmx_lab.engine import run
from nvmx_lab.errors import LabError
from nvmx_lab.nested.automaton import Automaton, count
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace
from nvmx_lab.nested.ops import Kind, Operation
from nvmx_lab.nested.primitives import COUNTERS, PRIMITIVES
from nvmx_lab.study.walks import compiled, marked
from nvmx_lab.workload import mixes
from nvmx_lab.workload.mixes import Mix
from nvmx_lab.workload.streams import Stream

Float64 = npt.NDArray[np.float64]
_SHOW_PROGRESS_FROM = 200_000_000  # words; fewer take less than two seconds
_L1_INSTRUCTIONS = COUNTERS.index("l1_instructions")
P = len(PRIMITIVES)

EXITS = 1_000_000
"""Nested exits drawn by default: they take a few hundredths of a second."""


@dataclass(frozen=True, eq=False)
class Simulated:
    """One L0 over a stream.

    Attributes
    ----------
    config : Config
        The L0.
    exits : int
        Reflected nested exits.
    by_operation : dict of Operation to float64[C]
        Counts of the whole run, in `COUNTERS` order, by the operation that caused them.
    exits_that_pull : int
        Exits after which L0 pulled at least once before the next.
    expected_pulls_share : float
        Share of the exits that pull, by the probabilities of the stream's words: without what
        drawing them adds. Whether a word pulls is a property of the word (see `foresee`); not where
        a predictor learns from the words before it: there it is the share as drawn.
    l1_instructions : float
        Instructions that L1 retires, whole run.
    automaton : Automaton
        The compiled L0.
    pairs : int64[S, A]
        How often each (state, operation) of it was met.
    """

    config: Config
    exits: int
    by_operation: dict[Operation, Float64] = field(repr=False)
    exits_that_pull: int
    expected_pulls_share: float
    l1_instructions: float
    automaton: Automaton = field(repr=False)
    pairs: npt.NDArray[np.int64] = field(repr=False)

    @property
    def exit_leg(self) -> Float64:
        """Counts of L2 exit to L1 entry, whole run, float64[C]."""
        return self._sum(op for op in self.by_operation if op.kind is Kind.EXIT)

    @property
    def round_trip(self) -> Float64:
        """Counts of L2 exit to L2 re-entry, whole run, float64[C]."""
        total = self._sum(self.by_operation)
        total[_L1_INSTRUCTIONS] = self.l1_instructions
        return total

    def _sum(self, operations: Iterable[Operation]) -> Float64:
        total: Float64 = np.sum([self.by_operation[op] for op in operations], axis=0)
        return total

    def counter(self, name: str) -> float:
        """Return one counter of the round trip, whole run."""
        return float(self.round_trip[COUNTERS.index(name)])


def config_of(mix: Mix, kvm: str, sync: str | None = None) -> Config:
    """Return the L0 that a mix runs on.

    Raises
    ------
    LabError
        If the release or the policy is unknown.
    """
    host = mix.host
    return Config.of(
        kvm,
        sync,
        shadow_vmcs=host.shadow_vmcs,
        evmcs=host.evmcs,
        mpx=host.mpx,
        legacy=host.l2_mode == "legacy",
    )


def foresee(stream: Stream, config: Config) -> Stream:
    """Mark the exits after which a lazy L0 would pull, for the oracle.

    A pull needs an operation of L1 between the exit and the entry, so whether one comes is a
    property of the word; the mark is ``+pull`` behind the exit reason.
    """
    (lazy,) = compiled([config.with_sync("lazy")], stream)
    pulls = lazy.pulls.any(axis=0)
    marks = {op: marked(op) for op in stream.alphabet if op.kind is Kind.EXIT}
    alphabet = (*stream.alphabet, *marks.values())
    codes = stream.words.codes.copy()
    for w in np.flatnonzero(pulls):
        first = stream.words.offsets[w]
        codes[first] = alphabet.index(marks[stream.alphabet[codes[first]]])
    return replace(stream, alphabet=alphabet, words=replace(stream.words, codes=codes))


def simulate(
    stream: Stream, configs: Sequence[Config], *, allow_unknown: bool = False
) -> list[Simulated]:
    """Run several L0s over one stream: paired, each sees the same exits.

    Parameters
    ----------
    stream : Stream
        A drawn, executed or recorded stream.
    configs : sequence of Config
        The L0s.
    allow_unknown : bool
        Take L1's instructions as 0 where the stream does not know them, instead of refusing.

    Raises
    ------
    LabError
        If there is no L0, or L1's instructions are not known.
    """
    if not configs:
        raise LabError("nothing to simulate", where="configs", got="none")
    if any(config.sync == "oracle" for config in configs):
        stream = foresee(stream, configs[0])
    walks = compiled(configs, stream)
    with _progress(stream) as advance:
        seen = run.visits(stream, [walk.walked for walk in walks], advance)
    l1 = stream.words.l1_instructions
    of_word = seen[0].sum(axis=0)
    if np.isnan(l1[of_word > 0]).any() and not allow_unknown:
        raise LabError(
            "no round trip: the instructions that L1 retires are not known",
            where=stream.source,
            mend="ask for the exit leg alone, or for the total without them",
        )
    l1_instructions = float(np.nansum(of_word * np.where(of_word > 0, l1, 0)))
    out = []
    for config, walk, visits_of_walk in zip(configs, walks, seen, strict=True):
        automaton, words = walk.automaton, walk.words
        visits = walk.own_visits(visits_of_walk)
        pairs = run.pair_visits(automaton, walk.lifted, visits, words.offsets, words.codes)
        by_operation = {}
        vectors, ids = automaton.counts, automaton.count_id
        for code in np.flatnonzero(pairs.sum(axis=0)).tolist():
            states = np.flatnonzero(pairs[:, code])
            operation = automaton.alphabet[code]
            by_operation[operation] = pairs[states, code] @ vectors[ids[states, code]]
        pulling = int(visits[walk.pulls].sum())
        expected = pulling / stream.exits
        if not walk.learns:
            expected = float(stream.probability[walk.pulls.any(axis=0)].sum())
        out.append(
            Simulated(
                config=config,
                exits=stream.exits,
                by_operation=by_operation,
                exits_that_pull=pulling,
                expected_pulls_share=expected,
                l1_instructions=l1_instructions,
                automaton=automaton,
                pairs=pairs,
            )
        )
    return out


def simulate_mix(
    mix: str | Path | Mix,
    kvm: Sequence[str],
    sync: Sequence[str | None],
    *,
    exits: int,
    seed: int,
) -> tuple[Mix, list[Simulated]]:
    """Draw a mix's stream and run it under L0s given by release and policy."""
    chosen = mix if isinstance(mix, Mix) else mixes.load(mix)
    configs = [config_of(chosen, k, s) for k, s in zip(kvm, sync, strict=True)]
    return chosen, simulate(chosen.stream(exits, seed), configs)


@functools.cache
def reader_and_pull_counts(config: Config) -> tuple[Float64, Float64]:
    """Return the counts of the rare reader within an exit leg, and of a pull; float64[C] each."""

    def exit_and_pull(sync: str, *, pull: bool) -> tuple[Float64, Float64]:
        model = Nvmx(config.with_sync(sync))
        model.start()
        model.nested_exit("CPUID")
        leg, model.trace = count(model.trace), Trace()
        if pull:
            model.copy_vmcs02_to_vmcs12_rare()
        return leg, count(model.trace)

    eager, _ = exit_and_pull("eager", pull=False)
    lazy, pulled = exit_and_pull("lazy", pull=True)
    reader = eager - lazy
    reader.flags.writeable = pulled.flags.writeable = False  # it is kept
    return reader, pulled


@contextlib.contextmanager
def _progress(stream: Stream) -> Iterator[Callable[[int], object] | None]:
    """Show a progress bar for long runs, on a terminal or in a notebook only."""
    if stream.exits < _SHOW_PROGRESS_FROM:
        yield None
        return
    with tqdm(total=stream.exits, unit="exit", unit_scale=True, disable=None) as bar:
        yield bar.update
