"""Flows: the model compiled to what each step does to the value of one field.

L0 decides by its control state and only copies values, so a step taken in one control state always
moves the same cells to the same cells. Running the model once on marked values tells which; that
fields never mix is checked in passing. Exploring every state then needs no model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from nvmx_lab import vmcs
from nvmx_lab.nested.architecture import CELLS, Architecture, Fail, Standing, role
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import DYNAMIC, Control, Nvmx, Trace, Violation, VmFail
from nvmx_lab.nested.steps import (
    ENTRY_FAILURE,
    POINTERS,
    Step,
    Tracked,
    apply_to_architecture,
    apply_to_model,
    in_vmcs12,
    possible,
    same,
    steps,
)

L0_CELLS: Final = ("vmcs01", "vmcs02", "vmcs12", "shadow", "evmcs", "A", "B", "smram")
COLUMNS: Final = (*L0_CELLS, *(f"true {cell}" for cell in CELLS))
"""Where a field's value can be: L0's cells, then the architecture's."""

ZERO, UNDEFINED, L1S_OWN, FRESH_A, FRESH_B, NUMBER = range(len(COLUMNS), len(COLUMNS) + 6)
"""Sources that are no cell: never written since VMCLEAR, arbitrary, L1's own state (vmcs01), a new
value for A or B; `NUMBER` + n is the VM-instruction error n."""

SOURCES: Final = NUMBER + 16


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
    """Return the model without its accounts: what a step costs plays no part here."""

    def nothing(self: Nvmx, *args: object) -> None:
        del self, args

    return type(nvmx.__name__, (nvmx,), {"_emit": nothing, "_stretch": nothing})


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
        What is wrong whatever the values: a `Violation`, a wrong answer, a value of another field.
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


class _Effect(NamedTuple):
    """What one step does to L0: the fields whose values move, and the answer."""

    after: int
    moved: dict[str, bytes]
    seen: object
    fault: str


EVMCS_GROUPS: Final = frozenset(
    token.removeprefix("dirty_").upper() for token in DYNAMIC if token.startswith("dirty_")
)
"""Clean-field groups of the enlightened VMCS that decide what an entry writes."""

FlowTable = Sequence[Sequence[tuple[Step, "Flow"]]]
UNMOVED: Final = bytes(range(len(L0_CELLS)))


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

    Attributes
    ----------
    places : list of Place
        Reachable places, the start first.
    """

    def __init__(
        self,
        config: Config,
        nvmx: type[Nvmx],
        fields: Sequence[str],
        without: Collection[str] = (),
    ) -> None:
        self.config, self.nvmx = config, _free_of_charge(nvmx)
        self.steps = [step for step in steps(*fields) if step.word not in without]
        self.followed = in_vmcs12()
        self._gated = frozenset(fields) & gated_by_a_write(nvmx(config))
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
        self._truths: dict[tuple[object, ...], tuple[Standing, bytes, object]] = {}
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

    def _id(self, place: Place) -> int:
        if place not in self._ids:
            self._ids[place] = len(self.places)
            self.places.append(place)
        return self._ids[place]

    def _relevant(self, control: Control) -> Control:
        """Drop what decides only about cost: no row that copies vmcs12 depends on it."""
        return replace(
            control,
            controls_written=frozenset(),
            host_rsp_stale=frozenset(),
            dr_unlocked=False,
            written=control.written & self._gated,
            evmcs_groups=control.evmcs_groups & EVMCS_GROUPS,
        )

    def _put(self, l0: Nvmx, place: Place) -> None:
        l0.control, l0.current_vmptr = place.control, place.current
        l0.memory = {p: (dict(self._marks[p]), p in place.launched) for p in POINTERS}
        for cell in L0_CELLS:
            if cell not in POINTERS:
                setattr(l0, cell, dict(self._marks[cell]))
        l0.trace = Trace()

    def _effect(self, l0: Nvmx, place: Place, step: Step) -> _Effect:
        self._put(l0, place)
        standing, _, truth = self._truth(place.standing, step, "written", False, False)
        try:
            l0, seen = apply_to_model(step, l0, lambda name, owner: self._fresh[owner][name])
        except Violation as violation:
            return _Effect(0, {}, None, str(violation))
        moved: dict[str, bytearray] = {}
        fault = ""
        for column, cell in enumerate(L0_CELLS):
            values = l0.memory[cell][0] if cell in POINTERS else getattr(l0, cell)
            before = self._marks[cell]
            for name, value in values.items():
                if value is before.get(name):
                    continue
                if isinstance(value, _Mark) and value.field != name:
                    fault = f"{cell}.{name} has the value of {value.field}"
                moved.setdefault(name, bytearray(UNMOVED))[column] = self._source(value)
            for name in before.keys() - values.keys():
                moved.setdefault(name, bytearray(UNMOVED))[column] = ZERO
        if (isinstance(seen, VmFail) or isinstance(truth, Fail)) and not same(seen, truth):
            fault = f"{step} answers {_said(seen)}, it should answer {_said(truth)}"
        after = Place(
            self._relevant(l0.control),
            l0.current_vmptr,
            frozenset(p for p, (_, launched) in l0.memory.items() if launched),
            standing,
        )
        return _Effect(self._id(after), {n: bytes(m) for n, m in moved.items()}, seen, fault)

    @staticmethod
    def _source(value: object) -> int:
        if isinstance(value, _Mark):
            return value.source
        number = int(value)  # type: ignore[call-overload]
        return NUMBER + number if number else ZERO

    # -- running the architecture --------------------------------------------------------------

    def _truth(
        self,
        standing: Standing,
        step: Step,
        role: str,
        in_smram: bool,
        entry: bool,
        own: bool = False,
    ) -> tuple[Standing, bytes, object]:
        key = (standing, step, role, in_smram, entry, own)
        if key not in self._truths:
            cells: dict[str, object] = {cell: self._true[f"true {cell}"] for cell in CELLS}
            truth = Architecture(role, in_smram=in_smram, standing=standing, cells=cells)
            tracked = Tracked(step.arg if own else "", role, in_smram, entry)
            marks = {"A": _Mark("", FRESH_A), "B": _Mark("", FRESH_B)}
            seen = apply_to_architecture(step, truth, tracked, lambda _, owner: marks[owner])
            moves = bytes(self._source(truth.cells[cell]) for cell in CELLS)
            self._truths[key] = (truth.standing, moves, seen)
        return self._truths[key]

    def passive(self, name: str, like: Collection[str]) -> tuple[bytes, ...]:
        """Return what every step does to a field, but for steps about one of those `like` it."""
        return tuple(
            effect.moved.get(name, UNMOVED)
            for effects in self._effects
            for step, effect in effects
            if step.arg not in like
        )

    # -- flows of one field --------------------------------------------------------------------

    def flows(self, name: str) -> list[list[tuple[Step, Flow]]]:
        """Return, for each place, every step that does something to the field or to L0, once.

        Of steps that do the same the first is named.
        """
        kind, in_smram = role(name, self.config), name in vmcs.saved_in_smram()
        saved, entry = kind == "saved", name in ENTRY_FAILURE
        table = []
        for place, effects in zip(self.places, self._effects, strict=False):
            flows: dict[Flow, Step] = {}
            for step, effect in effects:
                own = step.arg == name
                if own and step.word in ("L2_READ", "L2_WRITE") and not saved:
                    continue
                _, moves, truth = self._truth(place.standing, step, kind, in_smram, entry, own)
                seen = None
                if own and isinstance(effect.seen, int) and not isinstance(truth, Fail | None):
                    seen = (self._source(effect.seen), self._source(truth))
                moved = effect.moved.get(name, UNMOVED)
                flow = Flow(effect.after, moved + moves, seen, effect.fault)
                flows.setdefault(flow, step)
            table.append([(step, flow) for flow, step in flows.items()])
        return table


def gated_by_a_write(l0: Nvmx) -> frozenset[str]:
    """Return the control fields that an entry writes only if L1 changed them."""
    return frozenset(
        token.removeprefix("changed:")
        for rows in l0.resolved_paths.values()
        for row in rows
        for token in row.condition
        if token.startswith("changed:")
    )


def _said(answer: object) -> str:
    if isinstance(answer, VmFail | Fail):
        return "VMfailInvalid" if answer.number is None else f"VMfailValid({answer.number})"
    return "VMsucceed"
