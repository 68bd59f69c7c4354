"""The search against a naive twin: plain tuples, every cell kept, one state at a time."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from nvmx_lab.nested.flows import (
    COLUMNS,
    FRESH_A,
    FRESH_B,
    L1S_OWN,
    NUMBER,
    UNDEFINED,
    ZERO,
    Flow,
)
from nvmx_lab.nested.search import Search, live_cells
from nvmx_lab.nested.steps import Step

Table = list[list[tuple[Step, Flow]]]
Value = int | tuple[str, int]  # a constant, or the owner and the number of a value
Cells = tuple[Value, ...]
State = tuple[int, Cells]

CELLS = range(len(COLUMNS))
ACTIVE = tuple(COLUMNS.index(c) for c in ("vmcs01", "vmcs02", "vmcs12", "true page", "true l2"))
CONSTANTS = (ZERO, UNDEFINED, L1S_OWN, NUMBER + 7)
SOURCES = (*ACTIVE, *CONSTANTS, FRESH_A, FRESH_B)


def sources() -> st.SearchStrategy[int]:
    # A cell twice: most steps copy.
    return st.sampled_from((*ACTIVE, *SOURCES))


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Few places and cells; every step has a name of its own."""
    count = draw(st.integers(1, 4))
    table: Table = []
    for place in range(count):
        flows = []
        for number in range(draw(st.integers(not place, 4))):
            moves = bytearray(CELLS)
            for cell in draw(st.sets(st.sampled_from(ACTIVE), max_size=3)):
                moves[cell] = draw(sources())
            fault = draw(st.sampled_from(("", "", "", "", "warns")))
            flow = Flow(
                after=draw(st.integers(0, count - 1)),
                moves=bytes(moves),
                seen=None if fault else draw(st.none() | st.tuples(sources(), sources())),
                fault=fault,
            )
            flows.append((Step(f"{place}.{number}"), flow))
        table.append(flows)
    return table


class Naive:
    """The twin: states as tuples, values in full, nothing left out."""

    def __init__(self, table: Table) -> None:
        self.table = table
        # What goes wrong where, and after how few steps: (place, flow's look and outcome, what).
        self.wrong: dict[tuple[int, tuple[object, ...], str], int] = {}
        start: list[Value] = [UNDEFINED if name.startswith("true ") else ZERO for name in COLUMNS]
        for cell, value in (
            ("vmcs01", L1S_OWN),
            ("A", UNDEFINED),
            ("B", UNDEFINED),
            ("true smram", ZERO),
        ):
            start[COLUMNS.index(cell)] = value
        self.start: State = (0, tuple(start))
        self.visited = {self.start}
        self._run()

    @staticmethod
    def value(cells: Cells, source: int) -> Value:
        if source < len(cells):
            return cells[source]
        return {FRESH_A: ("A", 99), FRESH_B: ("B", 99)}.get(source, source)

    def take(self, cells: Cells, flow: Flow) -> Cells:
        """Copy, then call the values by the order in which they stand."""
        moved = [self.value(cells, source) for source in flow.moves]
        names: dict[Value, Value] = {}
        for value in moved:
            if isinstance(value, tuple):
                names.setdefault(value, (value[0], len(names)))
        return tuple(names.get(value, value) for value in moved)

    def look(self, cells: Cells, flow: Flow) -> list[str]:
        found = [flow.fault] if flow.fault else []
        if flow.seen is None:
            return found
        got, want = (self.value(cells, source) for source in flow.seen)
        if want == UNDEFINED or got == want:
            return found
        if got == ZERO:
            return [*found, "uninitialised"]
        if got == L1S_OWN:
            return [*found, "L1's own"]
        other = isinstance(got, tuple) and isinstance(want, tuple) and got[0] != want[0]
        return [*found, "another VMCS's" if other else "stale"]

    def key(self, place: int, flow: Flow, what: str) -> tuple[int, tuple[object, ...], str]:
        return place, (flow.after, flow.seen, flow.fault), what

    def _run(self) -> None:
        queue = deque([(self.start, 0)])
        while queue:
            (place, cells), depth = queue.popleft()
            for _, flow in self.table[place]:
                for what in self.look(cells, flow):
                    self.wrong.setdefault(self.key(place, flow, what), depth + 1)
                after = (flow.after, self.take(cells, flow))
                if not flow.fault and after not in self.visited:
                    self.visited.add(after)
                    queue.append((after, depth + 1))

    def walk(self, steps: tuple[Step, ...]) -> tuple[int, Cells, Flow]:
        """Return the place and the cells before the last of these steps, and that step's flow."""
        place, cells = self.start
        flow = None
        for number, step in enumerate(steps):
            flow = dict(self.table[place])[step]
            if number < len(steps) - 1:
                assert not flow.fault
                place, cells = flow.after, self.take(cells, flow)
        assert flow is not None
        return place, cells, flow


@given(table=tables())
def test_the_search_finds_the_failures_of_the_naive_twin_and_the_shortest_way_to_each(
    table: Table,
) -> None:
    naive, search = Naive(table), Search(table)
    found: dict[tuple[int, tuple[object, ...], str], int] = {}
    for failure in search.failures():
        place, cells, flow = naive.walk(failure.steps)
        assert failure.wrong in naive.look(cells, flow)
        key = naive.key(place, flow, failure.wrong)
        found[key] = min(len(failure.steps), found.get(key, 99))
    assert found == naive.wrong
    assert search.complete
    # The start is kept as it is, and is met again with its dead cells emptied.
    assert search.states <= len(naive.visited) + 1


@given(table=tables(), limit=st.integers(0, 4))
def test_a_limit_on_the_steps_cuts_what_takes_more_steps_and_nothing_else(
    table: Table, limit: int
) -> None:
    search = Search(table, limit)
    lengths = [len(failure.steps) for failure in search.failures()]
    kinds = {(failure.wrong, len(failure.steps)) for failure in search.failures()}
    assert lengths == sorted(lengths)
    assert {what for what, _ in kinds} == {
        what for (_, _, what), length in Naive(table).wrong.items() if length <= limit
    }
    assert max(lengths, default=0) <= limit
    assert search.depth <= limit


@given(table=tables())
def test_a_cell_is_live_where_some_sequence_of_steps_shows_its_value(table: Table) -> None:
    def shown(place: int, cell: int) -> bool:
        met, todo = {(place, cell)}, [(place, cell)]
        while todo:
            here, holds = todo.pop()
            for _, flow in table[here]:
                if holds in (flow.seen or ()):
                    return True
                if flow.fault:
                    continue
                there = {(flow.after, c) for c in CELLS if flow.moves[c] == holds} - met
                met |= there
                todo += there
        return False

    live = live_cells(table)
    assert live == [
        frozenset(cell for cell in CELLS if shown(place, cell)) for place in range(len(table))
    ]


def test_values_that_only_differ_in_their_names_make_one_state() -> None:
    """Write to A, copy, look: the same again and again, however often it is written."""
    page, l2 = COLUMNS.index("true page"), COLUMNS.index("vmcs02")
    write, copy = bytearray(CELLS), bytearray(CELLS)
    write[page], copy[l2] = FRESH_A, page
    table = [
        [
            (Step("write"), Flow(0, bytes(write))),
            (Step("copy"), Flow(0, bytes(copy))),
            (Step("look"), Flow(0, bytes(CELLS), seen=(l2, page))),
        ]
    ]
    search = Search(table)
    assert search.complete
    assert {(f.wrong, f.steps) for f in search.failures()} == {
        ("uninitialised", (Step("write"), Step("look"))),
        ("stale", (Step("copy"), Step("write"), Step("look"))),  # the copy is of something else
    }
    written = 2 * 3  # the page: undefined or not; the copy: empty, undefined, a value, an older one
    assert len(Naive(table).visited) == written
    assert search.states <= written + 1
