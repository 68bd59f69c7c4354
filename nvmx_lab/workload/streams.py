"""Streams: what the outside does to L0, as a sequence of round trips, in constant memory.

A *word* is what happens in one round trip: it starts with an EXIT and ends with the VMRESUME or
VMLAUNCH that re-enters L2. Workloads repeat few distinct words, so a stream is a small dictionary
of words and a long sequence of word ids. Drawn, executed and recorded streams are the same type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import numpy.typing as npt

from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.ops import Kind, Operation

if TYPE_CHECKING:
    import pandas as pd

Basis = Literal["drawn", "executed", "recorded"]

MAX_EXITS: Final = 10**10
"""Longest stream: at 100 million words a second, a hundred seconds of drawing."""

# Part of what makes a seed reproducible: every draw consumes the generator in blocks of this
# size whatever chunk the reader asks for, so changing it changes every drawn stream. 32768 ids
# and their scratch arrays (some 800 kB) stay in the second-level cache.
_BLOCK: Final = 1 << 15
_DEFAULT_CHUNK: Final = 1 << 18

_ENTRIES: Final = frozenset({Kind.VMRESUME, Kind.VMLAUNCH})
# What may follow the entry within the same word: it happens while L2 runs.
_WHILE_L2_RUNS: Final = frozenset(
    {Kind.L0_EXIT, Kind.GET_NESTED_STATE, Kind.SET_NESTED_STATE, Kind.L2_MODE}
)


@dataclass(frozen=True, eq=False)
class Words:
    """Dictionary of distinct round trips.

    Attributes
    ----------
    offsets : int64[W + 1]
        Word `w` is ``codes[offsets[w]:offsets[w + 1]]``.
    codes : uint16[N]
        Operations, as indices into the alphabet of the stream.
    labels : tuple of str, length W
        What each word is: the name of L1's handler, or the phase of an executed run.
    l1_instructions : float64[W]
        Instructions that L1 retires between the L2 exit and its entry; NaN where not known.
    """

    offsets: npt.NDArray[np.int64]
    codes: npt.NDArray[np.uint16]
    labels: tuple[str, ...]
    l1_instructions: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, word: int) -> npt.NDArray[np.uint16]:
        """Return the codes of one word."""
        return self.codes[self.offsets[word] : self.offsets[word + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Operations in each word, int64[W]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Word:
    """One kind of round trip and how likely it is; the input of `drawn`.

    Attributes
    ----------
    operations : tuple of Operation
        From the EXIT to the entry.
    probability : float
        Share of round trips that are this one.
    label : str
        Name of L1's handler.
    l1_instructions : float
        Instructions retired by L1; NaN if not known.
    """

    operations: tuple[Operation, ...]
    probability: float
    label: str = ""
    l1_instructions: float = float("nan")


@dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of round trips over a dictionary of words.

    Attributes
    ----------
    alphabet : tuple of Operation
        The distinct operations, in order of first use.
    words : Words
        The distinct round trips.
    exits : int
        Length of the sequence: one word for each reflected L2 exit.
    basis : {"drawn", "executed", "recorded"}
        Where the sequence comes from.
    source : str
        Mix and seed, run or file.
    probability : float64[W]
        Probability of each word; for a logged stream, its share.
    """

    alphabet: tuple[Operation, ...]
    words: Words
    exits: int
    basis: Basis
    source: str
    probability: npt.NDArray[np.float64]
    _ids: npt.NDArray[np.int32] | None = field(default=None, repr=False)
    _entropy: tuple[int, ...] = field(default=(), repr=False)

    def sequence(self, chunk: int = _DEFAULT_CHUNK) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the word ids in order, int32 arrays of `chunk` ids (the last may be shorter).

        Memory is proportional to `chunk`, not to `exits`. Every call starts from the beginning
        and yields the same ids; `chunk` only decides where they are cut.

        Raises
        ------
        LabError
            If `chunk` is not between 1 and 2**28.
        """
        if not 1 <= chunk <= 1 << 28:
            raise LabError("chunk out of range", got=chunk, allowed=f"1 to {1 << 28}")
        return self._cut(chunk)

    def _cut(self, chunk: int) -> Iterator[npt.NDArray[np.int32]]:
        """Cut the sequence into chunks; a generator of its own so that bad sizes raise at once."""
        if self._ids is not None:
            for start in range(0, self.exits, chunk):
                yield self._ids[start : start + chunk]
            return
        blocks = self._blocks()
        block, used = next(blocks), 0
        for start in range(0, self.exits, chunk):
            out = np.empty(min(chunk, self.exits - start), np.int32)
            filled = 0
            while filled < out.size:
                if used == _BLOCK:
                    block, used = next(blocks), 0
                take = min(_BLOCK - used, out.size - filled)
                out[filled : filled + take] = block[used : used + take]
                filled, used = filled + take, used + take
            yield out

    def _blocks(self) -> Iterator[npt.NDArray[np.int32]]:
        """Draw word ids for ever, `_BLOCK` at a time, into one buffer that is used again."""
        threshold, choice, shift = _alias_table(self.probability)
        generator = np.random.SFC64(np.random.SeedSequence(self._entropy))
        column = np.empty(_BLOCK, np.intp)
        limit, above = np.empty(_BLOCK, np.uint32), np.empty(_BLOCK, np.bool_)
        ids = np.empty(_BLOCK, np.int32)
        while True:
            draws = generator.random_raw(_BLOCK // 2).view(np.uint32)
            np.right_shift(draws, shift, out=column, casting="unsafe")
            threshold.take(column, out=limit, mode="clip")
            np.greater_equal(draws, limit, out=above)
            column += column
            column += above
            choice.take(column, out=ids, mode="clip")
            yield ids

    def ids(self) -> npt.NDArray[np.int32]:
        """Return the whole sequence, int32[exits]; for short streams and tests."""
        return np.concatenate(list(self.sequence()))

    def word(self, word: int) -> tuple[Operation, ...]:
        """Return the operations of one word."""
        return tuple(self.alphabet[code] for code in self.words[word])

    def operations(self) -> Iterator[Operation]:
        """Yield every operation in order: slow and readable, for the model and for teaching."""
        words = [self.word(w) for w in range(len(self.words))]
        for chunk in self.sequence():
            for word in chunk:
                yield from words[word]

    @property
    def operations_per_exit(self) -> float:
        """Operations per round trip (EXIT and entry included), mean over the probabilities."""
        return float(self.probability @ self.words.lengths)

    def frame(self) -> pd.DataFrame:
        """Return one row per word: word, label, probability, l1_instructions, operations."""
        import pandas as pd

        return pd.DataFrame(
            {
                "word": np.arange(len(self.words)),
                "label": self.words.labels,
                "probability": self.probability,
                "l1_instructions": self.words.l1_instructions,
                "operations": ["; ".join(map(str, self.word(w))) for w in range(len(self.words))],
            }
        )

    def __repr__(self) -> str:
        return (
            f"Stream({self.source!r}, {self.basis}: {self.exits:,} exits, {len(self.words)} words,"
            f" {len(self.alphabet)} operations)"
        )


def drawn(words: Iterable[Word], exits: int, seed: int, *, task: str = "") -> Stream:
    """Return the stream that draws words independently of each other.

    Parameters
    ----------
    words : iterable of Word
        Their probabilities must sum to 1 (within 1e-9). Words with the same label and the same
        operations are merged; those with probability 0 are dropped.
    exits : int
        1 to 10**10.
    seed : int
        Not negative. The same seed, task and words give the same ids on every machine.
    task : str
        Name of what is drawn (the mix): different tasks draw independently under one seed.

    Raises
    ------
    LabError
        If a size, a probability or a word is not valid.
    """
    exits, seed = _whole("exits", exits, 1, MAX_EXITS), _whole("seed", seed, 0, 2**64 - 1)
    merged: dict[tuple[str, tuple[Operation, ...]], list[float]] = {}
    for word in words:
        if not 0 <= word.probability <= 1:
            raise LabError(
                "probability out of range", where=word.label, got=word.probability, allowed="0 to 1"
            )
        if word.probability == 0:
            continue
        check_word(word.operations, where=word.label)
        weight = merged.setdefault((word.label, word.operations), [0.0, 0.0])
        weight[0] += word.probability
        weight[1] += word.probability * word.l1_instructions
    probability = np.array([weight[0] for weight in merged.values()])
    total = float(probability.sum())
    if abs(total - 1) > 1e-9:
        raise LabError("probabilities of the words do not sum to 1", where=task, got=total)
    alphabet, dictionary = _intern(
        list(merged), [instructions / share for share, instructions in merged.values()]
    )
    digest = hashlib.sha256(task.encode()).digest()
    return Stream(
        alphabet=alphabet,
        words=dictionary,
        exits=exits,
        basis="drawn",
        source=f"{task or 'words'}, seed {seed}",
        probability=probability / total,
        _entropy=(seed, int.from_bytes(digest[:8], "little")),
    )


def from_round_trips(
    round_trips: Iterable[Sequence[Operation]],
    *,
    source: str,
    basis: Basis = "executed",
    labels: Iterable[str] | None = None,
    l1_instructions: Iterable[float] | None = None,
) -> Stream:
    """Return the stream that repeats a logged sequence of round trips.

    Parameters
    ----------
    round_trips : iterable of sequences of Operation
        In order. Each starts with an EXIT and ends with an entry; the last may be cut short, as
        logs are.
    source : str
        Run or file.
    basis : {"executed", "recorded"}
        Whether our executed runs or a user's capture.
    labels, l1_instructions : iterable, optional
        One for each round trip: its label (default: the exit reason) and the instructions that L1
        retired (a word's number is the mean over its round trips, NaN where none is known).

    Raises
    ------
    LabError
        If there is no round trip, or one does not start or end as it must.
    """
    if basis not in get_args(Basis):
        raise unknown("basis", basis, get_args(Basis))
    trips = [tuple(trip) for trip in round_trips]
    if not trips:
        raise LabError("no round trip in the log", where=source)
    _whole("exits", len(trips), 1, MAX_EXITS)
    for number, trip in enumerate(trips):
        check_word(trip, where=f"{source}, exit {number}", complete=number + 1 < len(trips))
    names = [trip[0].arg for trip in trips] if labels is None else list(labels)
    retired = [float("nan")] * len(trips) if l1_instructions is None else list(l1_instructions)
    for what, given in (("labels", names), ("l1_instructions", retired)):
        if len(given) != len(trips):
            raise LabError(f"{what}: need one for each round trip", where=source, got=len(given))
    known: dict[tuple[str, tuple[Operation, ...]], int] = {}
    ids = np.fromiter(
        (known.setdefault(key, len(known)) for key in zip(names, trips, strict=True)),
        np.int32,
        len(trips),
    )
    measured = np.array(retired, np.float64)
    there = ~np.isnan(measured)
    size = len(known)
    with np.errstate(invalid="ignore"):  # 0 / 0: no instruction count known, NaN as documented
        instructions = np.bincount(ids[there], measured[there], size) / np.bincount(
            ids[there], minlength=size
        )
    alphabet, dictionary = _intern(list(known), instructions)
    return Stream(
        alphabet=alphabet,
        words=dictionary,
        exits=len(trips),
        basis=basis,
        source=source,
        probability=np.bincount(ids, minlength=size) / len(trips),
        _ids=ids,
    )


def check_word(operations: Sequence[Operation], *, where: str = "", complete: bool = True) -> None:
    """Raise LabError unless the operations are one round trip.

    Parameters
    ----------
    operations : sequence of Operation
        What should start with an EXIT, hold no other, and end with VMRESUME or VMLAUNCH (what
        happens while L2 runs again, such as L0_EXIT, may follow).
    where : str
        For the message.
    complete : bool
        False lets the end be missing.
    """
    if not operations or operations[0].kind is not Kind.EXIT:
        first = str(operations[0]) if operations else "nothing"
        raise LabError("a round trip starts with an EXIT", where=where, got=first)
    if any(operation.kind is Kind.EXIT for operation in operations[1:]):
        raise LabError("a second EXIT within a round trip", where=where)
    if not complete:
        return
    ends = [op.kind for op in operations if op.kind not in _WHILE_L2_RUNS]
    if ends[-1] not in _ENTRIES:
        raise LabError(
            "a round trip ends with VMRESUME or VMLAUNCH", where=where, got=str(operations[-1])
        )


def _intern(
    words: Sequence[tuple[str, tuple[Operation, ...]]],
    l1_instructions: npt.ArrayLike,
) -> tuple[tuple[Operation, ...], Words]:
    """Give each operation a number, in order of first use, and lay the words out flat."""
    numbers: dict[Operation, int] = {}
    codes = [numbers.setdefault(op, len(numbers)) for _, ops in words for op in ops]
    if len(numbers) > np.iinfo(np.uint16).max:
        raise LabError("too many distinct operations", got=len(numbers), allowed="at most 65535")
    offsets = np.zeros(len(words) + 1, np.int64)
    np.cumsum([len(ops) for _, ops in words], out=offsets[1:])
    labels = tuple(label for label, _ in words)
    arrays: tuple[npt.NDArray[Any], ...] = (
        offsets,
        np.array(codes, np.uint16),
        np.array(l1_instructions, np.float64),
    )
    for array in arrays:
        array.flags.writeable = False  # a Stream is a value: shared, cached, never changed
    return tuple(numbers), Words(offsets, arrays[1], labels, arrays[2])


def _alias_table(
    probability: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int32], np.uint32]:
    """Return Walker's alias table for 32-bit draws, with a power of two of columns.

    The top bits of a draw pick the column, the whole draw is compared with the column's threshold:
    two table reads a word and no multiplication. Probabilities are exact to about
    columns * 2**-32, far below what 10**10 draws could show.
    """
    # An unused column keeps the table at two or more, so the shift below stays under 32.
    bits = max(1, (len(probability) - 1).bit_length())
    columns = 1 << bits
    share = np.zeros(columns)
    share[: len(probability)] = probability * columns
    alias = np.arange(columns)
    kept = np.ones(columns)
    small = [int(c) for c in np.flatnonzero(share < 1)]
    large = [int(c) for c in np.flatnonzero(share >= 1)]
    while small and large:
        low, high = small.pop(), large[-1]
        kept[low], alias[low] = share[low], high
        share[high] -= 1 - share[low]
        if share[high] < 1:
            small.append(large.pop())
    # Columns left in either list are full but for rounding; one without a word of its own (a
    # padding column) must not be drawn, so it goes to the likeliest word.
    for column in small:
        if column >= len(probability):
            kept[column], alias[column] = 0.0, int(np.argmax(probability))
    width = 2.0 ** (32 - bits)
    thresholds = np.rint((np.arange(columns) + kept) * width)
    full = kept >= 1
    alias[full] = np.flatnonzero(full)
    choice = np.stack([np.arange(columns), alias], axis=1).ravel().astype(np.int32)
    threshold = np.minimum(thresholds, 2.0**32 - 1).astype(np.uint32)
    return threshold, choice, np.uint32(32 - bits)


def _whole(name: str, value: object, low: int, high: int) -> int:
    """Return `value` as an int if it is a whole number in the range."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or not low <= value <= high
    ):
        raise LabError(f"{name} must be a whole number", got=value, allowed=f"{low} to {high}")
    return int(value)
