"""The automaton: the model compiled to tables by visiting control states.

``(state, operation) -> (next state, counts)``. The tables come from running
`nvmx_lab.nested.model` on every control state that the operations of a stream can reach; nobody
writes them by hand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nvmx_lab.errors import LabError
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Control, Nvmx, Trace
from nvmx_lab.nested.ops import Operation
from nvmx_lab.nested.primitives import COUNTERS

UNREACHED = -1

MOST_STATES = 100_000
"""Control states after which compiling gives up; a hundred is usual."""

_FIRST_NEXT = {
    "VMREAD": ("vmread_first", "vmread_next"),
    "VMWRITE": ("vmwrite_first", "vmwrite_next"),
}
_ONE_PRIMITIVE = {
    "VMPTRLD": "vmptrld",
    "VMCLEAR": "vmclear",
    "RDMSR": "rdmsr",
    "WRMSR": "wrmsr",
    "INVEPT": "invept",
    "IBPB": "ibpb",
    "HOST_STATE_SWITCH": "host_state_switch",
}
_NOT_AN_INSTRUCTION = ("IBPB", "HOST_STATE_SWITCH")


def steps(trace: Trace) -> list[tuple[str, str]]:
    """Return (primitive, function) of every access of a trace, in order.

    An access is "next" if the one before it was the same instruction in the same function: straight
    line code. Any other is "first". A function and its ``_rare`` part, which it calls in the midst
    of its accesses, are one line.
    """
    out = []
    before = ("", "")
    for access in trace.accesses:
        line = (access.op, access.function.removesuffix("_rare"))
        if access.op in _FIRST_NEXT:
            out.append((_FIRST_NEXT[access.op][line == before], access.function))
        else:
            out.append((_ONE_PRIMITIVE[access.op], access.function))
        before = line
    return out


def count(trace: Trace) -> npt.NDArray[np.float64]:
    """Return a trace as counts, float64[len(COUNTERS)]."""
    got = Counter(primitive for primitive, _ in steps(trace))
    executed = sum(access.op not in _NOT_AN_INSTRUCTION for access in trace.accesses)
    retired = round(trace.instructions)  # lengths are means; whole numbers add up exactly
    values = {
        **got,
        "transition": trace.transitions,
        "control_check": trace.control_checks,
        "field_lookup": trace.field_lookups,
        "l0_instructions": max(retired - executed, 0),
        "l1_vmread": trace.l1_vmreads,
        "l1_vmwrite": trace.l1_vmwrites,
        "retired": retired,
        "rare_vmread": trace.rare_vmreads,
        "pulls": trace.pulls,
    }
    return np.array([values.get(name, 0.0) for name in COUNTERS])


@dataclass
class Automaton:
    """One L0 as tables over an alphabet of operations.

    Parameters
    ----------
    config : Config
        The L0 that is compiled.
    alphabet : sequence of Operation
        The operations; a code is an index into it.

    Attributes
    ----------
    next_state : int32[S, A]
        Next state, `UNREACHED` where the pair was not visited.
    counts : float64[T, C]
        Distinct count vectors, in the order of `nvmx_lab.nested.primitives.COUNTERS`.
    count_id : int32[S, A]
        Row of `counts` for each visited pair.
    """

    config: Config
    alphabet: Sequence[Operation]
    states: list[Control] = field(default_factory=list)
    _ids: dict[Control, int] = field(default_factory=dict)
    _next: list[list[int]] = field(default_factory=list)
    _count_id: list[list[int]] = field(default_factory=list)
    _vectors: dict[bytes, int] = field(default_factory=dict)
    _rows: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.alphabet:
            raise LabError(
                "an automaton needs at least one operation", where="alphabet", got="none"
            )
        self._model = Nvmx(self.config)
        self._model.start()
        self._id(self._model.control)

    def _id(self, state: Control) -> int:
        if state not in self._ids:
            if len(self.states) == MOST_STATES:
                raise LabError(
                    f"L0 has more than {MOST_STATES:,} control states on this stream",
                    where=f"sync policy {self.config.sync!r}",
                    mend="let the policy remember less: a counter must stop somewhere",
                )
            self._ids[state] = len(self.states)
            self.states.append(state)
            self._next.append([UNREACHED] * len(self.alphabet))
            self._count_id.append([UNREACHED] * len(self.alphabet))
        return self._ids[state]

    def trace(self, state: int, code: int) -> tuple[Control, Trace]:
        """Run the model for one (state, operation); return the next control state and the trace."""
        model = self._model
        model.control = self.states[state]
        model.current_vmptr = "A" if model.control.has_vmcs12 else None
        model.memory.clear()  # else the result would depend on which pairs were visited before
        model.trace = Trace()
        model.apply(self.alphabet[code])
        return model.control, model.trace

    def visit(self, state: int, code: int) -> int:
        """Return the next state of (state, operation), running the model if it is not known yet."""
        known = self._next[state][code]
        if known != UNREACHED:
            return known
        control, trace = self.trace(state, code)
        vector = count(trace)
        key = vector.tobytes()
        if key not in self._vectors:
            self._vectors[key] = len(self._rows)
            self._rows.append(vector)
        after = self._id(control)
        self._next[state][code] = after
        self._count_id[state][code] = self._vectors[key]
        return after

    def visit_words(self, words: Iterable[Sequence[int]]) -> None:
        """Visit every (state, operation) that any sequence of these words can reach."""
        pending = [tuple(word) for word in words]
        seen = {0}
        frontier = [0]
        while frontier:
            start = frontier.pop()
            for word in pending:
                state = start
                for code in word:
                    after = self._next[state][code]
                    state = self.visit(state, code) if after == UNREACHED else after
                if state not in seen:
                    seen.add(state)
                    frontier.append(state)

    @property
    def next_state(self) -> npt.NDArray[np.int32]:
        """Next state of each (state, operation), int32[S, A]."""
        return np.array(self._next, dtype=np.int32)

    @property
    def count_id(self) -> npt.NDArray[np.int32]:
        """Row of `counts` of each (state, operation), int32[S, A]."""
        return np.array(self._count_id, dtype=np.int32)

    @property
    def counts(self) -> npt.NDArray[np.float64]:
        """Distinct count vectors, float64[T, C]."""
        return np.array(self._rows)
