"""Replay: run a sequence of steps on the whole model with concrete values, beside the architecture.

The explorer reasons about symbols; a replay shows that what it found happens. It follows one field
and notes, after each step, where its value is and what is true. Every value written is a new
number, and what was there before the first step has numbers of its own, so that a wrong value tells
where it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

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
from nvmx_lab.nested.flows import L0_CELLS, taken
from nvmx_lab.nested.model import Control, Nvmx, Trace, Violation, VmFail
from nvmx_lab.nested.search import FOREIGN, L1S, OTHER, STALE, UNINITIALISED
from nvmx_lab.nested.steps import (
    AT_EXIT,
    ENTRY_FAILURE,
    POINTERS,
    Step,
    Tracked,
    apply_to_architecture,
    apply_to_model,
    possible,
    said,
    same,
    takes,
)

FIRST_VALUE: Final = 16  # above every VM-instruction error, and no reserved bit of any field
LAST_VALUE: Final = 250
OTHER_FIELD: Final = 251  # every value of a field that is not followed
START: Final[Mapping[str, int]] = MappingProxyType(
    {**dict.fromkeys(L0_CELLS, 0), "A": 253, "B": 254, "vmcs01": 255}
)
"""The followed field before the first step: L1's memory holds something, and L1 has its own."""


@dataclass(frozen=True)
class Origin:
    """Where a value of the followed field came from: which step (from 0), and for which VMCS."""

    step: int
    owner: str


@dataclass(frozen=True)
class Moment:
    """L0 and the truth after one step.

    Attributes
    ----------
    step : Step
        What happened.
    l0 : dict of str to int
        The followed field in each cell of L0; 0 where nothing was written since it was cleared.
    truth : dict of str to (int or None)
        The same in the cells of the architecture; None where it is undefined.
    control : Control
        L0's control state.
    standing : Standing
        Where L1 stands.
    trace : Trace
        What L0 executed; for a migration, on the source.
    seen, expected : object
        What L1 or L2 saw and should have seen: an int, a `VmFail` or `Fail`; None if nothing, or
        if it is undefined.
    fault : str
        What the kernel's warning would say; empty if it is silent.
    """

    step: Step
    l0: Mapping[str, int]
    truth: Mapping[str, int | None]
    control: Control
    standing: Standing
    trace: Trace
    seen: object
    expected: object
    fault: str

    @property
    def wrong(self) -> bool:
        """Whether something was seen that should not be."""
        return bool(self.fault) or not same(self.seen, self.expected)


@dataclass(frozen=True)
class Replay:
    """A replayed sequence.

    Attributes
    ----------
    config : Config
        The L0.
    field : str
        The field that was followed.
    moments : tuple of Moment
        One for each step; it ends at the first that is wrong.
    origins : dict of int to Origin
        Where each value came from that a step wrote.
    mutant : str
        What is wrong with the model on purpose; empty if nothing.
    """

    config: Config
    field: str
    moments: tuple[Moment, ...]
    origins: Mapping[int, Origin]
    mutant: str = ""

    @property
    def failed(self) -> bool:
        """Whether the last step shows a failure."""
        return bool(self.moments) and self.moments[-1].wrong

    @property
    def wrong(self) -> str:
        """What was seen instead of the true value, in the explorer's words; empty if nothing."""
        if not self.failed:
            return ""
        last = self.moments[-1]
        seen, expected = last.seen, last.expected
        if last.fault:
            return last.fault
        if not isinstance(seen, int) or not isinstance(expected, int):
            return f"{last.step} answers {said(seen)}, it should answer {said(expected)}"
        if seen == 0:
            return UNINITIALISED
        if seen in (START["vmcs01"], OTHER_FIELD):
            return L1S if seen == START["vmcs01"] else FOREIGN
        origins = self.origins
        if seen in origins and expected in origins:
            return STALE if origins[seen].owner == origins[expected].owner else OTHER
        return STALE

    def true(self, moment: Moment) -> int | None:
        """Return the followed field as whoever runs must find it; None where it is undefined."""
        if moment.standing.in_l2 and role(self.field, self.config) == "saved":
            return moment.truth["l2"]
        return moment.truth["page"] if moment.standing.current else None


def replay(config: Config, steps: Sequence[Step], field: str, nvmx: type[Nvmx] = Nvmx) -> Replay:
    """Run steps from a new vCPU on, up to the first that goes wrong.

    Parameters
    ----------
    config : Config
        The L0.
    steps : sequence of Step
        What happens.
    field : str
        The field to follow.
    nvmx : type of Nvmx, optional
        The model, or a mutant of it.

    Raises
    ------
    LabError
        If a step cannot happen where it stands, or there are too many that write the field.
    """
    field = vmcs.field(field).name
    tracked = Tracked(field, field in ENTRY_FAILURE)
    l0 = nvmx(config)
    l0.vmcs01[field] = START["vmcs01"]
    l0.memory = {pointer: ({field: START[pointer]}, False) for pointer in POINTERS}
    truth = Architecture(
        role(field, config),
        in_smram=field in vmcs.saved_in_smram(),
        after_rsm=field not in UNKNOWN_AFTER_RSM,
        standing=Standing(),
        cells={**dict.fromkeys(CELLS), "smram": 0},
    )
    origins: dict[int, Origin] = {}
    moments: list[Moment] = []
    for number, step in enumerate(steps):
        _check(step, number, truth.standing, l0, tracked)
        new = FIRST_VALUE + len(origins)

        def fresh(name: str, owner: str, new: int = new, number: int = number) -> int:
            if name != field:
                return OTHER_FIELD
            origins[new] = Origin(number, owner)
            return new

        l0.trace = trace = Trace()
        before = truth.standing
        expected = apply_to_architecture(step, truth, tracked, fresh)
        seen, fault = None, ""
        try:
            l0, seen = apply_to_model(step, l0, fresh)
        except Violation as violation:
            fault = str(violation)
        about_it = step.arg == field or isinstance(seen, VmFail) or isinstance(expected, Fail)
        if not about_it or (expected is None and not isinstance(seen, VmFail)):
            seen = expected = None
        took = "" if fault or isinstance(seen, VmFail) else takes(step, before, truth.standing)
        if took and took == taken(field, config) and _known(truth.cells["page"]) is not None:
            expected = truth.cells["page"]
            seen = (l0.host_state if took == AT_EXIT else l0.vmcs02).get(field, 0)
        moment = Moment(
            step,
            {cell: _value(l0, cell, field) for cell in L0_CELLS},
            {cell: _known(truth.cells[cell]) for cell in CELLS},
            l0.control,
            truth.standing,
            trace,
            seen,
            expected,
            fault,
        )
        moments.append(moment)
        if moment.wrong:
            break
        if new not in moment.l0.values() and new not in moment.truth.values():
            origins.pop(new, None)  # offered, not taken
        if len(origins) + FIRST_VALUE > LAST_VALUE:
            raise LabError("too many steps write the field", where=f"step {number + 1}", got=field)
    return Replay(config, field, tuple(moments), origins)


def _check(step: Step, number: int, standing: Standing, l0: Nvmx, tracked: Tracked) -> None:
    where = f"step {number + 1}"
    if not possible(step, standing, l0):
        raise LabError("this step cannot happen here", where=where, got=str(step))
    of_l2 = step.word in ("L2_READ", "L2_WRITE")
    if of_l2 and step.arg == tracked.name and role(tracked.name, l0.config) != "saved":
        raise LabError("the field is no state of L2", where=where, got=str(step))


def _value(l0: Nvmx, cell: str, field: str) -> int:
    fields = l0.memory.get(cell, ({}, False))[0] if cell in POINTERS else getattr(l0, cell)
    return int(fields.get(field, 0))


def _known(value: object) -> int | None:
    return value if isinstance(value, int) else None
