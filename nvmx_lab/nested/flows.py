"""Flows: the model compiled to what each step does to the value of one field.

L0 decides by its control state and only copies values, so a step taken in one control state always
moves the same cells to the same cells. Running the model once on marked values tells which; that
fields never mix is checked in passing. Exploring every state then needs no model.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from nvmx_lab import vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested.architecture import (
    CELLS,
    UNKNOWN_AFTER_RSM,
    Architecture,
    Fail,
    Standing,
    role,
)
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import DYNAMIC, Control, Nvmx, Trace, Violation, VmFail
from nvmx_lab.nested.policies import Oracle, Predictor
from nvmx_lab.nested.steps import (
    ARGUMENTS,
    AT_ENTRY,
    AT_EXIT,
    ENTRY_FAILURE,
    FIELD,
    POINTERS,
    USUAL_REASONS,
    Step,
    Tracked,
    apply_to_architecture,
    apply_to_model,
    exit_reasons,
    in_vmcs12,
    possible,
    said,
    same,
    steps,
    takes,
)

L0_CELLS: Final = ("vmcs01", "vmcs02", "vmcs12", "shadow", "evmcs", "A", "B", "smram")
COLUMNS: Final = (*L0_CELLS, *(f"true {cell}" for cell in CELLS))
"""Where a field's value can be: L0's cells, then the architecture's."""

ZERO, UNDEFINED, L1S_OWN, OTHER_FIELD, FRESH_A, FRESH_B, NUMBER = range(
    len(COLUMNS), len(COLUMNS) + 7
)
"""Sources that are no cell: never written since VMCLEAR, arbitrary, L1's own state (vmcs01),
another field's value, a new value for A or B; `NUMBER` + n is the VM-instruction error n."""

SOURCES: Final = NUMBER + 16

MOST_PLACES: Final = 4_000
"""Places after which compiling gives up; KVM's own sync policies need some hundred."""


class _Mark(int):
    """A value that stands for where it came from; masking does not change that."""

    field: str
    source: int

    def __new__(cls, name: str, source: int) -> _Mark:
        mark = super().__new__(cls, 1)
        mark.field, mark.source = name, source
        return mark

    def __and__(self, mask: object) -> _Mark:
        return self

    __rand__ = __and__

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def _free_of_charge(nvmx: type[Nvmx]) -> type[Nvmx]:
    """Return the model without its accounts, and without accesses that move no value.

    What a step costs plays no part here.
    """

    def make(self: Nvmx, config: Config) -> None:
        nvmx.__init__(self, config)
        if isinstance(self.policy, Predictor):
            self.policy = Oracle()  # which exits go either way: every guess that there can be
        self.resolved_paths = {
            path: tuple(row for row in rows if row.copies_vmcs12)
            for path, rows in self.resolved_paths.items()
        }

    def nothing(self: Nvmx, *args: object) -> None:
        del self, args

    free = {"__init__": make, "_emit": nothing, "_stretch": nothing}
    return type(nvmx.__name__, (nvmx,), free)


class _Kind(NamedTuple):
    """What the architecture knows of a field, its name apart: see `Tracked`; when it is taken."""

    role: str
    in_smram: bool
    entry_failure: bool
    after_rsm: bool
    taken: str = ""


_NO_KIND: Final = _Kind("written", in_smram=False, entry_failure=False, after_rsm=True)


def _asks_for_reasons(l0: Nvmx) -> bool:
    """Return whether the policy may ask for the exit reason: those of this package do not."""
    return not type(l0.policy).__module__.startswith("nvmx_lab.")


class Flow(NamedTuple):
    """What one step does to one field.

    Attributes
    ----------
    after : int
        Place afterwards.
    moves : bytes
        Source of each of `COLUMNS`.
    seen : tuple of int or None
        Sources of what L1 or L2 sees and of what it should see.
    fault : str
        What is wrong whatever the values: a `Violation`, or a wrong answer.
    """

    after: int
    moves: bytes
    seen: tuple[int, int] | None = None
    fault: str = ""


class Place(NamedTuple):
    """A control state of L0, and where L1 stands."""

    control: Control
    current: str | None
    launched: frozenset[str]
    standing: Standing


class _Moved:
    """The fields whose values a step moves. Few differ: most steps share one of these objects."""

    __slots__ = ("moves",)

    def __init__(self, moves: Mapping[str, bytes]) -> None:
        self.moves = moves


_Change = tuple[int, str, object]
"""A cell, as column of `COLUMNS`; a field; the value that it has there now."""


class _Ran(NamedTuple):
    """What the model did in a step: its part of the place afterwards, what moved, the answer."""

    after: tuple[Control, str | None, frozenset[str]]
    moved: _Moved
    moved_own: _Moved
    seen: object = None
    host_state: Mapping[str, object] = {}
    violation: str = ""


class _Effect(NamedTuple):
    """What one step does to L0: where it leads, what moves, the answer, what is wrong.

    And what the CPU takes without being asked (`takes`): when, and the host state.
    """

    after: int
    moved: _Moved
    moved_own: _Moved
    seen: object
    fault: str
    takes: str = ""
    host_state: Mapping[str, object] = {}

    def moves(self, name: str, *, own: bool) -> bytes:
        """Return the sources of a field's cells; `own`: the step is about the field."""
        return (self.moved_own if own else self.moved).moves.get(name, UNMOVED)


EVMCS_GROUPS: Final = frozenset(
    token.removeprefix("dirty_").upper() for token in DYNAMIC if token.startswith("dirty_")
)
"""Clean-field groups of the enlightened VMCS that decide what an entry writes."""

FlowTable = Sequence[Sequence[tuple[Step, "Flow"]]]
UNMOVED: Final = bytes(range(len(L0_CELLS)))
_NOTHING: Final = _Moved({})


class Flows:
    """One L0 as flows.

    Parameters
    ----------
    config : Config
        The L0.
    nvmx : type of Nvmx
        The model, or a mutant of it.
    fields : sequence of str
        Fields that steps read and write. Every field of vmcs12 is followed.
    without : collection of str
        Words of steps that do not happen.
    gated : collection of str
        Control fields of which it is followed whether L1 wrote them since the last entry: only for
        these `Flows.flows` is then right if an entry writes them only if L1 did.

    Attributes
    ----------
    places : list of Place
        Reachable places, the start first.

    Raises
    ------
    LabError
        If there are more than `MOST_PLACES`.
    """

    def __init__(
        self,
        config: Config,
        nvmx: type[Nvmx],
        fields: Sequence[str],
        without: Collection[str] = (),
        gated: Collection[str] = (),
    ) -> None:
        self.config, self.nvmx = config, _free_of_charge(nvmx)
        reasons = exit_reasons() if _asks_for_reasons(self.nvmx(config)) else USUAL_REASONS
        self.steps = [s for s in steps(fields, reasons) if s.word not in without]
        self.followed = in_vmcs12()
        self._gated = frozenset(gated)
        self._marks = {
            cell: {name: _Mark(name, column) for name in self.followed}
            for column, cell in enumerate(L0_CELLS)
        }
        self._fresh = {
            owner: {name: _Mark(name, source) for name in self.followed}
            for owner, source in (("A", FRESH_A), ("B", FRESH_B))
        }
        for name in set(fields).difference(self.followed):  # written in vain: vmcs12 lacks them
            self._fresh["A"][name] = self._fresh["B"][name] = _Mark(name, UNDEFINED)
        self._true = {cell: _Mark("", column) for column, cell in enumerate(COLUMNS)}
        self._truths: dict[object, dict[Step, tuple[Standing, bytes, object]]] = {}
        self._moves_by_cells: dict[tuple[object, ...], tuple[_Moved, _Moved]] = {}
        self._moved_by_changes: dict[tuple[_Change, ...], _Moved] = {}
        self._relevants: dict[Control, Control] = {}
        self._ran: dict[object, dict[Step, _Ran]] = defaultdict(dict)
        self.places: list[Place] = []
        self._ids: dict[Place, int] = {}
        self._effects: list[list[tuple[Step, _Effect]]] = []
        self._compile()

    # -- running the model ---------------------------------------------------------------------

    def _compile(self) -> None:
        l0 = self.nvmx(self.config)
        self._id(Place(self._relevant(l0.control), None, frozenset(), Standing()))
        while len(self._effects) < len(self.places):
            place = self.places[len(self._effects)]
            effects: list[tuple[Step, _Effect]] = []
            self._effects.append(effects)
            l0.control = place.control
            for step in self.steps:
                if possible(step, place.standing, l0):
                    effects.append((step, self._effect(l0, place, step)))
                    l0.control = place.control
        if vars(l0.policy):
            raise LabError(
                "the sync policy has attributes of its own",
                where=f"sync policy {self.config.sync!r}",
                got=", ".join(vars(l0.policy)),
                mend="keep them in Control.policy_memory, by Nvmx.remember: states are revisited",
            )

    def _id(self, place: Place) -> int:
        if place not in self._ids:
            if len(self.places) == MOST_PLACES:
                raise self._too_many_places()
            self._ids[place] = len(self.places)
            self.places.append(place)
        return self._ids[place]

    def _too_many_places(self) -> LabError:
        """Say who is to blame: what a sync policy remembers is the only part without a bound."""
        memories = {place.control.policy_memory for place in self.places}
        return LabError(
            f"L0 has more than {MOST_PLACES:,} control states",
            where=f"sync policy {self.config.sync!r}",
            got=f"{len(memories):,} different values of Control.policy_memory",
            allowed=f"{MOST_PLACES:,} control states (nvmx_lab.nested.flows.MOST_PLACES)",
            mend="let the policy remember less: a counter must stop somewhere",
        )

    def _relevant(self, control: Control) -> Control:
        """Drop what decides only about cost: no row that copies vmcs12 depends on it."""
        if control not in self._relevants:
            self._relevants[control] = control._replace(
                controls_written=frozenset(),
                host_rsp_stale=frozenset(),
                dr_unlocked=False,
                written=control.written & self._gated,
                evmcs_groups=control.evmcs_groups & EVMCS_GROUPS,
            )
        return self._relevants[control]

    def _put(self, l0: Nvmx, place: Place) -> None:
        l0.control, l0.current_vmptr = place.control, place.current
        l0.memory = {p: (dict(self._marks[p]), p in place.launched) for p in POINTERS}
        for cell in L0_CELLS:
            if cell not in POINTERS:
                setattr(l0, cell, dict(self._marks[cell]))
        l0.trace = Trace()
        l0.host_state = {}

    def _effect(self, l0: Nvmx, place: Place, step: Step) -> _Effect:
        known = self._ran[place[:3]]  # the model knows nothing of where L1 stands
        ran = known.get(step)
        if ran is None:
            ran = known[step] = self._run(l0, place, step)
        if ran.violation:
            return _Effect(0, _NOTHING, _NOTHING, None, ran.violation)
        standing, _, truth = self._truth(place.standing, step, _NO_KIND, own=False)
        seen = ran.seen
        if (isinstance(seen, VmFail) or isinstance(truth, Fail)) and not same(seen, truth):
            # From here on the two do not stand in the same place.
            fault = f"{step} answers {said(seen)}, it should answer {said(truth)}"
            return _Effect(0, _NOTHING, _NOTHING, None, fault)
        after = self._id(Place(*ran.after, standing))
        took = "" if isinstance(seen, VmFail) else takes(step, place.standing, standing)
        return _Effect(after, ran.moved, ran.moved_own, seen, "", took, ran.host_state)

    def _run(self, l0: Nvmx, place: Place, step: Step) -> _Ran:
        """Let the model take the step."""
        self._put(l0, place)
        try:
            l0, seen = apply_to_model(step, l0, lambda name, owner: self._fresh[owner][name])
        except Violation as violation:
            return _Ran(place[:3], _NOTHING, _NOTHING, violation=str(violation))
        launched = frozenset(p for p, (_, launched) in l0.memory.items() if launched)
        after = self._relevant(l0.control), l0.current_vmptr, launched
        return _Ran(after, *self._moves(l0, step), seen, l0.host_state)

    def _moves(self, l0: Nvmx, step: Step) -> tuple[_Moved, _Moved]:
        """Compare L0 with how `_put` left it: other fields, and the one that the step is about."""
        changed = {}
        for cell in L0_CELLS:
            values = l0.memory[cell][0] if cell in POINTERS else getattr(l0, cell)
            if values != self._marks[cell]:
                changed[cell] = values
        key = (step.arg, *((cell, *values, *values.values()) for cell, values in changed.items()))
        if key not in self._moves_by_cells:
            changes = [c for cell, values in changed.items() for c in self._changes(cell, values)]
            self._moves_by_cells[key] = (
                self._moved(change for change in changes if change[1] != step.arg),
                self._moved(change for change in changes if change[1] == step.arg),
            )
        return self._moves_by_cells[key]

    def _changes(self, cell: str, values: Mapping[str, object]) -> list[_Change]:
        """Return every value of the cell that moved; 0 for one that is gone."""
        column, before = L0_CELLS.index(cell), self._marks[cell]
        changed = [(column, n, v) for n, v in values.items() if v is not before.get(n)]
        return changed + [(column, n, 0) for n in before if n not in values]

    def _moved(self, changes: Iterable[_Change]) -> _Moved:
        key = tuple(changes)
        if key not in self._moved_by_changes:
            moves: dict[str, bytearray] = {}
            for column, name, value in key:
                own = not isinstance(value, _Mark) or value.field == name
                source = self._source(value) if own else OTHER_FIELD
                moves.setdefault(name, bytearray(UNMOVED))[column] = source
            self._moved_by_changes[key] = _Moved({n: bytes(m) for n, m in moves.items()})
        return self._moved_by_changes[key]

    @staticmethod
    def _source(value: object) -> int:
        if value is None:
            return UNDEFINED
        if isinstance(value, _Mark):
            return value.source
        number = int(value)  # type: ignore[call-overload]
        if NUMBER + number >= SOURCES:
            raise LabError("L0 makes a value up: it can only copy values", got=number)
        return NUMBER + number if number else ZERO

    # -- running the architecture --------------------------------------------------------------

    def _truth(
        self, standing: Standing, step: Step, kind: _Kind, *, own: bool
    ) -> tuple[Standing, bytes, object]:
        """Run a step on a field of the kind; `own`: the step is about the field."""
        known = self._truths.setdefault((standing, kind, own), {})
        if step not in known:
            cells: dict[str, object] = {cell: self._true[f"true {cell}"] for cell in CELLS}
            truth = Architecture(
                kind.role,
                in_smram=kind.in_smram,
                after_rsm=kind.after_rsm,
                standing=standing,
                cells=cells,
            )
            tracked = Tracked(step.arg if own else "", kind.entry_failure)
            marks = {"A": _Mark("", FRESH_A), "B": _Mark("", FRESH_B)}
            seen = apply_to_architecture(step, truth, tracked, lambda _, owner: marks[owner])
            moves = bytes(self._source(truth.cells[cell]) for cell in CELLS)
            known[step] = (truth.standing, moves, seen)
        return known[step]

    # -- flows of one field --------------------------------------------------------------------

    def unlike(self, classes: Collection[Sequence[str]]) -> set[str]:
        """Return the fields that L0 does not treat as it treats the first of their class.

        Every step about a field is tried in every place, for every field. A field and the first of
        its class may differ in nothing but their names: if the two were swapped, each step about
        one would do what the step about the other does.
        """
        l0 = self.nvmx(self.config)
        first = {name: fields[0] for fields in classes for name in fields}
        found: set[str] = set()
        # A step that is unlike may lead to a place that is not among these.
        for place, effects in zip(tuple(self.places), self._effects, strict=True):
            known = {step: effect for step, effect in effects if step.arg in first}
            for name in first.keys() - first.values() - found:
                for word in {step.word for step in known if step.arg == first[name]}:
                    effect = self._effect(l0, place, Step(word, name))
                    if not _swapped(effect, known[Step(word, first[name])], name, first[name]):
                        found.add(name)
            for step, effect in known.items():  # what a step about one does to all the others
                for fields in classes:
                    if step.arg == fields[0] and fields[2:]:
                        like = effect.moves(fields[1], own=False)
                        found |= {n for n in fields[2:] if effect.moves(n, own=False) != like}
        return found

    def alike(self, fields: Sequence[str]) -> list[tuple[str, ...]]:
        """Split fields by what every step does to them, but for steps about one of them."""
        moved = {
            effect.moved: None
            for effects in self._effects
            for step, effect in effects
            if step.arg not in fields
        }
        loaded = [e.host_state for effects in self._effects for _, e in effects if e.host_state]
        groups: dict[tuple[object, ...], list[str]] = {}
        for name in fields:
            of_exits = frozenset(self._source(state.get(name)) for state in loaded)
            key = (of_exits, *(each.moves.get(name, UNMOVED) for each in moved))
            groups.setdefault(key, []).append(name)
        return [tuple(group) for group in groups.values()]

    def flows(self, name: str) -> list[list[tuple[Step, Flow]]]:
        """Return, for each place, every step that does something to the field or to L0, once.

        Of steps that do the same the first is named.
        """
        kind = _Kind(
            role(name, self.config),
            name in vmcs.saved_in_smram(),
            name in ENTRY_FAILURE,
            name not in UNKNOWN_AFTER_RSM,
            taken(name, self.config),
        )
        table = []
        for place, effects in zip(self.places, self._effects, strict=True):
            flows: dict[Flow, Step] = {}
            for step, effect in _different(effects, name):
                own = step.arg == name
                if own and step.word in ("L2_READ", "L2_WRITE") and kind.role != "saved":
                    continue
                _, moves, truth = self._truth(place.standing, step, kind, own=own)
                seen = None
                if own and isinstance(effect.seen, int) and not isinstance(truth, Fail | None):
                    seen = (self._source(effect.seen), self._source(truth))
                moved = effect.moves(name, own=own)
                if effect.takes and effect.takes == kind.taken:
                    got = moved[L0_CELLS.index("vmcs02")]
                    if kind.taken == AT_EXIT:
                        got = self._source(effect.host_state.get(name))
                    seen = (got, moves[CELLS.index("page")])
                flow = Flow(effect.after, moved + moves, seen, effect.fault)
                flows.setdefault(flow, step)
            table.append([(step, flow) for flow, step in flows.items()])
        return table


@functools.cache
def taken(name: str, config: Config) -> str:
    """Return when the CPU takes the field from the VMCS without being asked: see `takes`.

    At entry: what L0 copies to vmcs02 as it is, if only L1 writes it. Controls that L0 merges with
    its own, or writes only if they changed, are not followed in vmcs02.
    """
    if name in vmcs.host_state():
        return AT_EXIT
    l0 = Nvmx(config)
    copied = {
        access.field
        for path, rows in l0.resolved_paths.items()
        if path.startswith("prepare_vmcs02")
        for row in rows
        if row.copies_vmcs12
        for access in row.accesses
    }
    only_by_l1 = role(name, config) == "written"
    return AT_ENTRY if only_by_l1 and name in copied - gated_by_a_write(l0) else ""


def _swapped(one: _Effect, other: _Effect, name: str, first: str) -> bool:
    """Return whether a step about `name` does what the same step about `first` does."""
    moved, like = one.moved.moves, other.moved.moves
    return (
        one.after == other.after
        and bool(one.fault) == bool(other.fault)
        and one.moves(name, own=True) == other.moves(first, own=True)
        and moved.get(first, UNMOVED) == like.get(name, UNMOVED)
        and _seen_source(one.seen) == _seen_source(other.seen)
        and all(
            moved.get(field, UNMOVED) == like.get(field, UNMOVED)
            for field in (moved.keys() | like.keys()) - {name, first}
        )
    )


def _seen_source(seen: object) -> object:
    return seen.source if isinstance(seen, _Mark) else seen


def _different(
    effects: Sequence[tuple[Step, _Effect]], name: str
) -> Iterator[tuple[Step, _Effect]]:
    """Leave out steps about other fields that do to this one what a step before them does."""
    done = set()
    for step, effect in effects:
        if step.arg != name and ARGUMENTS[step.word] == (FIELD,):
            key = (step.word, step.arg in in_vmcs12(), effect.after, effect.moved, effect.fault)
            if key in done:
                continue
            done.add(key)
        yield step, effect


def gated_by_a_write(l0: Nvmx) -> frozenset[str]:
    """Return the control fields that an entry writes only if L1 changed them."""
    return frozenset(
        token.removeprefix("changed:")
        for rows in l0.resolved_paths.values()
        for row in rows
        for token in row.condition
        if token.startswith("changed:")
    )
