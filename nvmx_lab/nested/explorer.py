"""The explorer: is what L0 defers ever visible? Exhaustive search over the model, field by field.

The property: every value that L1, L2 or the target of a migration can see is what the architecture
says (`nvmx_lab.nested.architecture`), no instruction works on a VMCS that is not loaded, and the
kernel's own warning never fires. The search covers every step of `nvmx_lab.nested.steps` in every
order, to the end: there is no bound on the number of steps.

It is exhaustive for the model, not for KVM: what the model leaves out cannot fail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType
from typing import Final

from nvmx_lab import vmcs
from nvmx_lab.errors import unknown
from nvmx_lab.nested.architecture import UNKNOWN_AFTER_RSM, role
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.flows import EVMCS_GROUPS, Flows, gated_by_a_write
from nvmx_lab.nested.model import Nvmx
from nvmx_lab.nested.search import WRONG_VALUES, Failure, Search
from nvmx_lab.nested.steps import ENTRY_FAILURE, Step, in_evmcs, in_vmcs12

ENVIRONMENTS: Final[Mapping[str, Mapping[str, bool]]] = MappingProxyType(
    {
        "shadow VMCS": {},
        "no shadow VMCS": {"shadow_vmcs": False},
        "enlightened VMCS": {"evmcs": True},
        "PAE, virtual interrupts": {"pae": True, "vid": True},
        "old CPU": {"mpx": False, "apicv": False, "pml": False, "preemption_timer": False},
    }
)
"""Machines on which an L0 is checked: name -> options of `Config`."""


COMPANIONS: Final = ("GUEST_GS_BASE", "GUEST_RIP", "GUEST_CS_AR_BYTES", "HOST_RIP")
"""A field of each kind, as L0 treats accesses: rare, shadowed for both or for reading, trapping."""


@dataclass(frozen=True)
class Finding:
    """One way in which an L0 fails.

    Attributes
    ----------
    config : Config
        The L0.
    field : str
        The field that shows it.
    fields : tuple of str
        All fields to which the same happens, `field` included.
    wrong : str
        What was seen instead of the true value, as in `nvmx_lab.nested.search.Failure`.
    steps : tuple of Step
        The shortest sequence that shows it, from a new vCPU; the last step sees it.
    """

    config: Config
    field: str
    fields: tuple[str, ...]
    wrong: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Exploration:
    """What the explorer found out about one L0.

    Attributes
    ----------
    config : Config
        The L0.
    findings : tuple of Finding
        Shortest first; empty if the property holds.
    states, transitions : int
        States visited, and steps taken from them: what the searches did, summed over the classes
        of fields. Of steps that do the same to the field and to L0, one is counted.
    depth : int
        Steps from the start to the farthest state, over all classes.
    places : int
        Control states of L0, combined with where L1 stands: the most that one class needed.
    classes : int
        Classes of fields to which the same happens; one field of each was explored.
    complete : bool
        Whether every reachable state of these classes was visited.
    seconds : float
        Wall time of compiling and searching.
    """

    config: Config
    findings: tuple[Finding, ...]
    states: int
    transitions: int
    depth: int
    places: int
    classes: int
    complete: bool
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the property holds, as far as was explored: see `complete`."""
        return not self.findings

    @property
    def transitions_per_minute(self) -> float:
        """Transitions by wall time, that of compiling included."""
        return 60 * self.transitions / self.seconds


def explore(
    config: Config,
    nvmx: type[Nvmx] = Nvmx,
    *,
    depth: int | None = None,
    without: Collection[str] = (),
    fields: Collection[str] | None = None,
    each_field: bool = True,
    advance: Callable[[int], object] = lambda transitions: None,
) -> Exploration:
    """Visit every state of one L0.

    Parameters
    ----------
    config : Config
        The L0.
    nvmx : type of Nvmx, optional
        The model, or a mutant of it.
    depth : int, optional
        Stop after so many steps; by default when nothing is left.
    without : collection of str, optional
        Words of steps that do not happen (``SET_NESTED_STATE``).
    fields : collection of str, optional
        Explore only the classes that contain one of these fields of vmcs12, and what is split from
        them because L0 treats it otherwise; by default all. Steps
        about fields of other classes do not happen then, but for one of each kind of access: to a
        rare field, a shadowed one, one that traps, and one that vmcs12 lacks.
    each_field : bool, optional
        Whether to try the steps about every field, to see that those of a class are treated alike;
        else only a change of the model that no path and no set of fields shows goes unnoticed: one
        that asks for a field by name.
    advance : callable, optional
        Called with the number of transitions after each class of fields.

    Raises
    ------
    LabError
        If vmcs12 has no such field, or the sync policy remembers so much that L0 has too many
        control states.
    """
    began = perf_counter()
    wanted = frozenset(in_vmcs12() if fields is None else map(_field_of_vmcs12, fields))
    findings: list[Finding] = []
    states = transitions = deepest = places = explored = 0
    complete = True
    faults: set[str] = set()  # they are no matter of one field: reported once
    for flows, classes in _compiled(config, nvmx, without, wanted, each_field=each_field):
        places = max(places, len(flows.places))
        for alike in classes:
            search = Search(flows.flows(alike[0]), depth)
            states, transitions = states + search.states, transitions + search.transitions
            deepest, complete = max(deepest, search.depth), complete and search.complete
            explored += 1
            advance(search.transitions)
            findings += [
                Finding(config, alike[0], alike, failure.wrong, failure.steps)
                for failure in _shortest(search.failures())
                if failure.wrong not in faults
            ]
            faults |= {f.wrong for f in findings if f.wrong not in WRONG_VALUES}
    findings.sort(key=lambda finding: len(finding.steps))
    return Exploration(
        config,
        tuple(findings),
        states,
        transitions,
        deepest,
        places,
        explored,
        complete,
        perf_counter() - began,
    )


def _field_of_vmcs12(name: str) -> str:
    if not vmcs.field(name).in_vmcs12:
        raise unknown("field of vmcs12", name, in_vmcs12(), where="explore(fields=)")
    return vmcs.field(name).name


def _shortest(failures: Sequence[Failure]) -> list[Failure]:
    """Return the first failure of each kind; they come shortest first."""
    kinds: dict[str, Failure] = {}
    for failure in failures:
        kinds.setdefault(failure.wrong, failure)
    return list(kinds.values())


def _compiled(
    config: Config,
    nvmx: type[Nvmx],
    without: Collection[str],
    wanted: frozenset[str],
    *,
    each_field: bool,
) -> Iterator[tuple[Flows, list[tuple[str, ...]]]]:
    """Yield flows, and the classes of fields to explore in them.

    A control field that an entry writes only if L1 changed it has its own flows: whether L1 changed
    it is part of the state, and matters to no other field.
    """
    gated = gated_by_a_write(nvmx(config))
    asked = [fields for fields in field_classes(config, nvmx) if not wanted.isdisjoint(fields)]
    common = [fields for fields in asked if not gated.intersection(fields)]
    if common:
        others = (*COMPANIONS, *sorted(gated), _absent())
        yield _compile_common(config, nvmx, common, others, without, each_field=each_field)
    for fields in asked:
        if gated.intersection(fields):
            steps_about = (fields[0], *COMPANIONS, _absent())
            yield Flows(config, nvmx, steps_about, without, gated=fields[:1]), [fields]


def _compile_common(
    config: Config,
    nvmx: type[Nvmx],
    classes: list[tuple[str, ...]],
    others: Collection[str],
    without: Collection[str],
    *,
    each_field: bool,
) -> tuple[Flows, list[tuple[str, ...]]]:
    """Compile with one field of each class, two of the rare ones; split classes that differ."""
    while True:
        chosen = [name for fields in classes for name in fields[: 1 + vmcs.is_rare(fields[0])]]
        chosen += [name for name in others if name not in chosen]
        flows = Flows(config, nvmx, chosen, without)
        split = [part for fields in classes for part in flows.alike(fields)]
        if each_field and len(split) == len(classes):
            apart = flows.unlike(classes)
            split = [tuple(n for n in fields if n not in apart) for fields in classes]
            split += [(name,) for name in sorted(apart)]
        if len(split) == len(classes):
            return flows, classes
        classes = split


def _absent() -> str:
    """Return a field that vmcs12 lacks: VMREAD and VMWRITE of it fail."""
    return next(name for name in vmcs.catalogue() if name not in in_vmcs12())


def field_classes(config: Config, nvmx: type[Nvmx] = Nvmx) -> list[tuple[str, ...]]:
    """Return the fields of vmcs12 in classes whose members L0 has no reason to treat differently.

    The explorer looks at one of each class. Whether the others are really treated alike is checked
    when the flows are compiled.
    """
    l0 = nvmx(config)
    gated = gated_by_a_write(l0)
    copied: dict[str, list[Hashable]] = defaultdict(list)
    for path, rows in l0.resolved_paths.items():
        for row in rows:
            for access in row.accesses if row.copies_vmcs12 else ():
                # "changed:" names the field itself.
                condition = tuple(token.partition(":")[0] for token in row.condition)
                copied[access.field].append((path, access.op, condition))
    classes: dict[Hashable, list[str]] = defaultdict(list)
    for name in dict.fromkeys((*COMPANIONS, *in_vmcs12())):
        group = vmcs.field(name).evmcs_clean_group
        key = (
            role(name, config),
            vmcs.is_rare(name),
            name in vmcs.saved_in_smram(),
            name in vmcs.carried_by_user_space(),
            name in UNKNOWN_AFTER_RSM,
            name in ENTRY_FAILURE,
            in_evmcs(name),
            group if group in EVMCS_GROUPS else "",
            name in l0.rare,
            name in l0.shadow_rw,
            name in l0.shadow_ro,
            l0.is_shadow_field_rw(name),
            name in l0.tracked,
            name in l0.exit_info,
            name in vmcs.host_state(),
            name in gated,
            frozenset(copied[name]),
        )
        classes[key].append(name)
    return [tuple(names) for names in classes.values()]
