"""Replay: run a sequence of steps on the whole model with concrete values, beside the architecture.

The explorer reasons about symbols; a replay shows that what it found happens. It follows one field
and notes, after each step, where its value is and what is true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nvmx_lab import vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested.architecture import CELLS, Architecture, Fail, Standing, role
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.flows import L0_CELLS
from nvmx_lab.nested.model import Control, Nvmx, Trace, Violation, VmFail
from nvmx_lab.nested.steps import (
    ENTRY_FAILURE,
    POINTERS,
    Step,
    Tracked,
    apply_to_architecture,
    apply_to_model,
    possible,
    same,
)

FIRST_VALUE = 16  # above every VM-instruction error, and no reserved bit of any field
LAST_VALUE = 255


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
        The followed field in each cell of L0; 0 where nothing was ever written.
    truth : dict of str to (int or None)
        The same in the cells of the architecture; None where it is undefined.
    control : Control
        L0's control state.
    standing : Standing
        Where L1 stands.
    trace : Trace
        What L0 executed.
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
        Where each value came from.
    """

    config: Config
    field: str
    moments: tuple[Moment, ...]
    origins: Mapping[int, Origin]

    @property
    def failed(self) -> bool:
        """Whether the last step shows a failure."""
        return bool(self.moments) and self.moments[-1].wrong


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
    tracked = Tracked(
        vmcs.field(field).name,
        role(field, config),
        field in vmcs.saved_in_smram(),
        field in ENTRY_FAILURE,
    )
    l0 = nvmx(config)
    truth = Architecture(
        tracked.role,
        in_smram=tracked.in_smram,
        standing=Standing(),
        cells={**dict.fromkeys(CELLS), "smram": 0},
    )
    origins: dict[int, Origin] = {}
    moments: list[Moment] = []
    for number, step in enumerate(steps):
        if not possible(step, truth.standing, l0):
            raise LabError(
                "this step cannot happen here", where=f"step {number + 1}", got=str(step)
            )
        new = FIRST_VALUE + len(origins)

        def fresh(name: str, owner: str, new: int = new, number: int = number) -> int:
            if name != field:
                return FIRST_VALUE
            origins[new] = Origin(number, owner)
            return new

        l0.trace = Trace()
        expected = apply_to_architecture(step, truth, tracked, fresh)
        seen, fault = None, ""
        try:
            l0, seen = apply_to_model(step, l0, fresh)
        except Violation as violation:
            fault = str(violation)
        if len(origins) + FIRST_VALUE > LAST_VALUE:
            raise LabError("too many steps write the field", where=f"step {number + 1}", got=field)
        about_it = step.arg == field or isinstance(seen, VmFail) or isinstance(expected, Fail)
        if not about_it or (expected is None and not isinstance(seen, VmFail)):
            seen = expected = None
        moment = Moment(
            step,
            {cell: _value(l0, cell, field) for cell in L0_CELLS},
            {cell: _known(truth.cells[cell]) for cell in CELLS},
            l0.control,
            truth.standing,
            l0.trace,
            seen,
            expected,
            fault,
        )
        moments.append(moment)
        if moment.wrong:
            break
    return Replay(config, field, tuple(moments), origins)


def _value(l0: Nvmx, cell: str, field: str) -> int:
    fields = l0.memory.get(cell, ({}, False))[0] if cell in POINTERS else getattr(l0, cell)
    return int(fields.get(field, 0))


def _known(value: object) -> int | None:
    return value if isinstance(value, int) else None
