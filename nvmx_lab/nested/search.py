"""Breadth-first search over everything that one field can be: the inner loop of the explorer.

A state is a place of the flows and a value in each cell. Values are symbols; two states that differ
only in how their values are called are one (a mechanism that only copies is right for all values if
it is right for fresh ones). Cells that nobody will ever look at again count as empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from nvmx_lab.errors import LabError
from nvmx_lab.nested.flows import (
    COLUMNS,
    FRESH_A,
    FRESH_B,
    L1S_OWN,
    OTHER_FIELD,
    UNDEFINED,
    ZERO,
    Flow,
    FlowTable,
)
from nvmx_lab.nested.steps import Step

WIDTH: Final = len(COLUMNS)
IDENTITY: Final = bytes(range(WIDTH))
START: Final = tuple(
    {"vmcs01": L1S_OWN, "A": UNDEFINED, "B": UNDEFINED}.get(
        cell, UNDEFINED if cell.startswith("true ") and cell != "true smram" else ZERO
    )
    for cell in COLUMNS
)
"""Value of each cell at the start: L1's VMCS regions hold whatever L1's memory held."""

UNINITIALISED: Final = "uninitialised"
STALE: Final = "stale"
OTHER: Final = "another VMCS's"
L1S: Final = "L1's own"
FOREIGN: Final = "another field's"
WRONG_VALUES: Final = (STALE, UNINITIALISED, OTHER, L1S, FOREIGN)


@dataclass(frozen=True)
class Failure:
    """A way in which L0 fails.

    Attributes
    ----------
    wrong : str
        What L1 or L2 saw instead of the true value: `STALE`, `UNINITIALISED`, `OTHER`, `L1S`; or
        the sentence of a fault that has nothing to do with values.
    steps : tuple of Step
        From the start; the last one shows it.
    """

    wrong: str
    steps: tuple[Step, ...]


def live_cells(table: FlowTable) -> list[frozenset[int]]:
    """Return, for each place, the cells whose value somebody may still see."""
    live: list[frozenset[int]] = [frozenset() for _ in table]
    used: dict[tuple[bytes, frozenset[int]], frozenset[int]] = {}
    changed = True
    while changed:
        changed = False
        for place in reversed(range(len(table))):
            before = live[place]
            for _, flow in table[place]:
                if flow.seen:
                    live[place] |= _cells(flow.seen)
                if flow.fault:
                    continue
                after = live[flow.after]
                if (flow.moves, after) not in used:
                    used[flow.moves, after] = _cells(flow.moves[cell] for cell in after)
                live[place] |= used[flow.moves, after]
            changed |= live[place] != before
    return live


def _cells(sources: Iterable[int]) -> frozenset[int]:
    return frozenset(source for source in sources if source < WIDTH)


class Search:
    """The search over one table of flows.

    Parameters
    ----------
    table : FlowTable
        The flows of one field, by place; place 0 is the start.
    limit : int, optional
        Steps after which to stop; by default when nothing is left.

    Attributes
    ----------
    states, transitions : int
        States visited, and steps taken from them; of steps that do the same in a state, one.
    depth : int
        Steps from the start to the farthest state.
    complete : bool
        Whether there is nothing beyond.

    Raises
    ------
    LabError
        If the states cannot be numbered in 64 bits.
    """

    def __init__(self, table: FlowTable, limit: int | None = None) -> None:
        self._limit = limit
        live = live_cells(table)
        table = _without_dead_cells(table, live)
        self._flows = [(step, flow) for flows in table for step, flow in flows]
        counts = [len(flows) for flows in table]
        self._count = np.array(counts, dtype=np.int64)
        self._first = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        self._number_values(frozenset[int]().union(*live))
        self._after = np.array([flow.after for _, flow in self._flows], dtype=np.int64)
        self._goes_on = np.array(
            [
                not flow.fault and (flow.moves != IDENTITY or flow.after != p)
                for p, flows in enumerate(table)
                for _, flow in flows
            ],
            dtype=bool,
        )
        self._fault = np.array([bool(flow.fault) for _, flow in self._flows], dtype=bool)
        nothing = (self._sources[ZERO], self._sources[ZERO])
        seen = [
            tuple(self._sources[s] for s in flow.seen) if flow.seen else nothing
            for _, flow in self._flows
        ]
        self._seen = np.array(seen, dtype=np.int64)
        self._moves = np.array(
            [[self._sources[s] for s in flow.moves] for _, flow in self._flows], dtype=np.int64
        )
        self._run()

    # -- values as small numbers ---------------------------------------------------------------

    def _number_values(self, live: frozenset[int]) -> None:
        """Assign numbers to the constants; a value is numbered by the first cell that has it.

        Two numbers for each such cell: the value belongs to VMCS A, or to B. A cell that is never
        `live` only has a constant.
        """
        fresh = (FRESH_A, FRESH_B)
        sources = {s for _, flow in self._flows for s in (*flow.moves, *(flow.seen or ()))}
        used = {s for s in sources if s >= WIDTH and s not in fresh} | {*START, ZERO, UNDEFINED}
        self._constants = sorted(used)
        known = len(self._constants)
        self._undefined = self._constants.index(UNDEFINED)
        new = known + 2 * WIDTH
        # What a step may copy from: the cells, then the constants, then a new value of A and of B.
        self._beyond = np.array([*range(known), new, new + 1], dtype=np.uint8)
        order = [*range(WIDTH), *self._constants, *fresh]
        self._sources = {source: index for index, source in enumerate(order)}
        radix = [known + 2 * (column + 1) * (column in live) for column in range(WIDTH)]
        weights = [1]
        for base in radix:
            weights.append(weights[-1] * base)
        if weights[-1] * len(self._count) >= 2**64:
            raise LabError(
                "too many control states: a state's number does not fit 64 bits",
                where="search of the explorer",
                got=len(self._count),
                allowed=f"at most {2**64 // weights[-1]} with {known} constant values",
                mend="let the sync policy remember less, or leave out steps (`without`)",
            )
        self._weights = np.array(weights, dtype=np.uint64)

    def _canonical(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        known = len(self._constants)
        first = (values[:, :, None] == values[:, None, :]).argmax(axis=2).astype(np.uint8)
        owner = (values - known) & 1
        return np.where(values >= known, known + 2 * first + owner, values)

    def _keys(
        self, places: npt.NDArray[np.int64], values: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint64]:
        keys: npt.NDArray[np.uint64] = places.astype(np.uint64) * self._weights[WIDTH]
        for column in range(WIDTH):
            keys += values[:, column] * self._weights[column]
        return keys

    # -- search --------------------------------------------------------------------------------

    def _run(self) -> None:
        values = np.array([[self._constants.index(s) for s in START]], dtype=np.uint8)
        places = np.zeros(1, dtype=np.int64)
        visited = self._keys(places, values)
        parents, vias = [np.array([-1])], [np.array([-1])]
        self._failing: dict[tuple[str, int], int] = {}
        before, self.transitions, self.depth = 0, 0, 0
        while len(values) and self.depth != self._limit:
            rows = np.repeat(np.arange(len(values)), self._count[places])
            offset = np.cumsum(self._count[places]) - self._count[places]
            flows = np.arange(len(rows)) - (offset - self._first[places])[rows]
            self.transitions += len(rows)
            sources = np.concatenate(
                [values, np.broadcast_to(self._beyond, (len(values), len(self._beyond)))], axis=1
            )
            self._look(sources, rows, flows, before)
            goes_on = self._goes_on[flows]
            rows, flows = rows[goes_on], flows[goes_on]
            moved = self._canonical(sources[rows[:, None], self._moves[flows]])
            after = self._after[flows]
            keys, first = np.unique(self._keys(after, moved), return_index=True)
            at = np.searchsorted(visited, keys)
            known = visited[np.minimum(at, len(visited) - 1)] == keys
            keys, first = keys[~known], first[~known]
            visited = np.insert(visited, at[~known], keys)
            parents.append(rows[first] + before)
            vias.append(flows[first])
            before += len(values)
            values, places = moved[first], after[first]
            self.depth += 1
        self.complete = not len(values)
        self.states = len(visited)
        self._parent, self._via = np.concatenate(parents), np.concatenate(vias)

    def _look(
        self,
        sources: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int64],
        flows: npt.NDArray[np.int64],
        before: int,
    ) -> None:
        """Note what is seen and should not be."""
        got, want = (sources[rows, self._seen[flows, side]] for side in (0, 1))
        wrong = (got != want) & (want != self._undefined)
        for row, flow, g, w in zip(
            rows[wrong], flows[wrong], got[wrong].tolist(), want[wrong].tolist(), strict=True
        ):
            self._failing.setdefault((self._relation(g, w), int(flow)), before + int(row))
        for row, flow in zip(rows[self._fault[flows]], flows[self._fault[flows]], strict=True):
            text = self._flows[flow][1].fault
            self._failing.setdefault((text, int(flow)), before + int(row))

    def _relation(self, got: int, want: int) -> str:
        known = len(self._constants)
        if got < known:
            source = self._constants[got]
            return {ZERO: UNINITIALISED, L1S_OWN: L1S, OTHER_FIELD: FOREIGN}.get(source, STALE)
        return STALE if want < known or (got - want) % 2 == 0 else OTHER

    def _path(self, state: int) -> list[Step]:
        steps = []
        while state > 0:
            steps.append(self._flows[self._via[state]][0])
            state = int(self._parent[state])
        return steps[::-1]

    def failures(self) -> tuple[Failure, ...]:
        """Return, of each kind, place and last step, the shortest way there; shortest first."""
        return tuple(
            Failure(wrong, (*self._path(state), self._flows[flow][0]))
            for (wrong, flow), state in self._failing.items()
        )


def _without_dead_cells(
    table: FlowTable, live: Sequence[frozenset[int]]
) -> list[list[tuple[Step, Flow]]]:
    cut: list[list[tuple[Step, Flow]]] = []
    known: dict[tuple[bytes, frozenset[int]], bytes] = {}
    for flows in table:
        kept: dict[Flow, Step] = {}
        for step, flow in flows:
            key = flow.moves, live[flow.after]
            if key not in known:
                known[key] = bytes(s if c in key[1] else ZERO for c, s in enumerate(flow.moves))
            kept.setdefault(Flow(flow.after, known[key], flow.seen, flow.fault), step)
        cut.append([(step, flow) for flow, step in kept.items()])
    return cut
