"""Walks: an L0 compiled for the words of a stream, as the engine walks them.

A predictor only chooses at each exit whether the rare fields are copied. So L0 is compiled for both
choices of every word, and what the predictor learns is put beside it word by word: its values and
L0's control states multiply in a table of numbers, not in runs of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from nvmx_lab.engine import run
from nvmx_lab.engine.run import Lifted
from nvmx_lab.errors import LabError
from nvmx_lab.nested.automaton import Automaton
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.ops import Kind, Operation
from nvmx_lab.nested.policies import SYNC_POLICIES, Predictor
from nvmx_lab.nested.primitives import COUNTERS
from nvmx_lab.workload.streams import Stream, Words

Int64 = npt.NDArray[np.int64]
_PULLS: Final = COUNTERS.index("pulls")
_FORESEEN: Final = "+pull"

MOST_STATES: Final = 10_000
"""Control states of L0 times values of what a predictor learns, after which compiling gives up."""


@dataclass(frozen=True, eq=False)
class Walk:
    """One L0, compiled for a stream.

    Attributes
    ----------
    automaton : Automaton
        L0 over its own alphabet: a predictor's has both choices of every exit.
    words : Words
        The words over that alphabet: a predictor's are the stream's twice, not copied and copied.
    lifted : Lifted
        The automaton over these words.
    walked : Lifted
        What the engine walks over the stream's words; `lifted` itself but for a predictor.
    pulls : bool[B, V]
        Whether L0 pulls, for each state and word of `lifted`.
    """

    automaton: Automaton
    words: Words
    lifted: Lifted
    walked: Lifted
    pulls: npt.NDArray[np.bool_]
    _row: Int64 | None = field(default=None, repr=False)

    @property
    def learns(self) -> bool:
        """Whether what L0 does in a word depends on earlier words by a predictor."""
        return self._row is not None

    def own_visits(self, visits: Int64) -> Int64:
        """Return the visits of `lifted`, int64[B, V], from those of `walked`."""
        if self._row is None:
            return visits
        shape = self.lifted.next_of_word.shape
        seen = np.flatnonzero(visits)
        out = np.zeros(shape[0] * shape[1], np.int64)
        np.add.at(out, self._row.ravel()[seen], visits.ravel()[seen])
        return out.reshape(shape)


def compiled(configs: Sequence[Config], stream: Stream) -> list[Walk]:
    """Compile L0s for the words of a stream.

    Raises
    ------
    LabError
        If a sync policy remembers without a bound.
    """
    plain = functools.cache(_plain)  # predictors have what L0 does, either way, in common
    twice = functools.cache(both_ways)
    walks = []
    for config in configs:
        policy = SYNC_POLICIES[config.sync]
        if issubclass(policy, Predictor) and not config.evmcs:
            # The oracle does as the marks of the exits say.
            base = plain(config.with_sync("oracle"), twice(stream))
            walks.append(_with_predictor(policy(), base, stream))
        else:
            walks.append(plain(config, stream))
    return walks


def marked(exit_: Operation) -> Operation:
    """Return an exit with the mark that L1 will need a rare field."""
    return Operation(Kind.EXIT, exit_.arg.removesuffix(_FORESEEN) + _FORESEEN)


def both_ways(stream: Stream) -> Stream:
    """Return the stream's words twice: with unmarked exits, then with marked ones."""
    words, first = stream.words, stream.words.offsets[:-1]
    plain = {op: Operation(Kind.EXIT, op.arg.removesuffix(_FORESEEN)) for op in stream.alphabet}
    exits = {op for op in stream.alphabet if op.kind is Kind.EXIT}
    new = [each for op in stream.alphabet if op in exits for each in (plain[op], marked(op))]
    alphabet = tuple(dict.fromkeys((*stream.alphabet, *new)))
    index = {op: code for code, op in enumerate(alphabet)}
    codes = []
    for change in (plain.__getitem__, marked):
        changed = words.codes.copy()
        changed[first] = [index[change(stream.alphabet[code])] for code in words.codes[first]]
        codes.append(changed)
    doubled = replace(
        words,
        offsets=np.concatenate([words.offsets, words.offsets[1:] + words.offsets[-1]]),
        codes=np.concatenate(codes),
        labels=words.labels * 2,
        l1_instructions=np.tile(words.l1_instructions, 2),
    )
    return replace(stream, alphabet=alphabet, words=doubled)


def _plain(config: Config, stream: Stream) -> Walk:
    words = stream.words
    automaton = Automaton(config, stream.alphabet)
    automaton.visit_words(words[w].tolist() for w in range(len(words)))
    lifted = run.lift(automaton, words.offsets, words.codes)
    return Walk(automaton, words, lifted, lifted, _pulls(automaton, lifted, words))


def _pulls(automaton: Automaton, lifted: Lifted, words: Words) -> npt.NDArray[np.bool_]:
    """Return whether L0 pulls, for each boundary state and word: bool[B, V]."""
    table, pulling = automaton.next_state, automaton.counts[:, _PULLS] > 0
    of_pair = pulling[automaton.count_id]  # nonsense where not visited: not met either
    starts, stops = words.offsets[:-1], words.offsets[1:]
    state = np.repeat(lifted.boundary[:, None], starts.size, axis=1)
    out = np.zeros(state.shape, np.bool_)
    for step in range(int(words.lengths.max())):  # from every state, all words at once
        live = np.flatnonzero(starts + step < stops)
        code, here = words.codes[starts[live] + step], state[:, live]
        out[:, live] |= of_pair[here, code]
        state[:, live] = table[here, code]
    return out


def _with_predictor(policy: Predictor, base: Walk, stream: Stream) -> Walk:
    """Multiply what L0 does, either way, with what the predictor learns."""
    after = base.lifted.next_of_word.astype(np.int64)
    size = len(stream.words)
    exits = stream.words.codes[stream.words.offsets[:-1]]
    reasons, of_word = np.unique(exits, return_inverse=True)
    names = [stream.alphabet[code].arg.removesuffix(_FORESEEN) for code in reasons]
    needed = base.pulls[:, :size].astype(np.int64)  # nothing was copied: a need is a pull
    known: list[Hashable] = [policy.first]  # what can have been learned
    numbers: dict[Hashable, int] = {policy.first: 0}

    def number(learned: Hashable) -> int:
        if learned not in numbers:
            numbers[learned] = len(known)
            known.append(learned)
        return numbers[learned]

    @functools.cache
    def choices(learned: int) -> tuple[Int64, Int64]:
        """Return the column of each word, and what is learned there without and with a need."""
        had = known[learned]
        copied = np.array([policy.expected(had, name) for name in names], np.int64)
        ways = [[number(policy.learn(had, n, needed=x)) for n in names] for x in (False, True)]
        return np.arange(size) + size * copied[of_word], np.array(ways)[:, of_word]

    states = [
        0
    ]  # state of L0, plus as many times the states of L0 as the number of what is learned
    ids = {0: 0}
    next_of_word, rows = [], []
    for both in states:  # grows while it is walked
        learned, state = divmod(both, len(after))
        column, learns = choices(learned)
        reached = after[state, column] + len(after) * learns[needed[state], np.arange(size)]
        found, place = np.unique(reached, return_inverse=True)
        for each in found.tolist():
            if each not in ids:
                ids[each] = len(states)
                states.append(each)
        if len(states) > MOST_STATES:
            raise LabError(
                f"L0 has more than {MOST_STATES:,} control states on this stream",
                where=f"predictor {type(policy).__name__}",
                mend="let the predictor learn less: a counter must stop somewhere",
            )
        next_of_word.append(np.array([ids[each] for each in found.tolist()], np.int32)[place])
        rows.append(2 * size * state + column)
    walked = Lifted(np.arange(len(states), dtype=np.int32), np.array(next_of_word))
    return replace(base, walked=walked, _row=np.array(rows))
