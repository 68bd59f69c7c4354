"""The explorer: is what L0 defers ever visible? Exhaustive search over the model, field by field.

The property: every value that L1, L2 or the target of a migration can see is what the architecture
says (`nvmx_lab.nested.architecture`), no instruction works on a VMCS that is not loaded, and the
kernel's own warning never fires. The search covers every step of `nvmx_lab.nested.steps` in every
order, to the end: there is no bound on the number of steps.

It is exhaustive for the model, not for KVM: what the model leaves out cannot fail.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import MappingProxyType
from typing import Final

from nvmx_lab import vmcs
from nvmx_lab.nested.architecture import role
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.flows import EVMCS_GROUPS, Flows, gated_by_a_write
from nvmx_lab.nested.model import Nvmx
from nvmx_lab.nested.search import Failure, Search
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
        States visited and steps taken, summed over the classes of fields.
    depth : int
        Steps from the start to the farthest state.
    places : int
        Control states of L0, combined with where L1 stands.
    classes : int
        Classes of fields to which the same happens; one field of each was explored.
    complete : bool
        Whether every reachable state was visited.
    seconds : float
        Wall time.
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
        """Whether the property holds."""
        return not self.findings


def explore(
    config: Config,
    nvmx: type[Nvmx] = Nvmx,
    *,
    depth: int | None = None,
    without: Collection[str] = (),
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
    advance : callable, optional
        Called with the number of transitions after each class of fields.
    """
    began = perf_counter()
    findings: list[Finding] = []
    states = transitions = deepest = places = explored = 0
    complete = True
    for flows, classes in _compiled(config, nvmx, without):
        places = max(places, len(flows.places))
        for fields in classes:
            search = Search(flows.flows(fields[0]), depth)
            states, transitions = states + search.states, transitions + search.transitions
            deepest, complete = max(deepest, search.depth), complete and search.complete
            explored += 1
            advance(search.transitions)
            findings += [
                Finding(config, fields[0], fields, failure.wrong, failure.steps)
                for failure in _shortest(search.failures())
            ]
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


def _shortest(failures: Sequence[Failure]) -> list[Failure]:
    """Return the first failure of each kind; they come shortest first."""
    kinds: dict[str, Failure] = {}
    for failure in failures:
        kinds.setdefault(failure.wrong, failure)
    return list(kinds.values())


def _compiled(
    config: Config, nvmx: type[Nvmx], without: Collection[str]
) -> list[tuple[Flows, list[tuple[str, ...]]]]:
    """Return flows, and the classes of fields to explore in them.

    A control field that an entry writes only if L1 changed it has its own flows: whether L1 changed
    it is part of the state, and matters to no other field.
    """
    gated = gated_by_a_write(nvmx(config))
    classes = field_classes(config, nvmx)
    common = [fields for fields in classes if not gated.intersection(fields)]
    flows, common = _compile_common(config, nvmx, common, without)
    companions = [*[names[0] for names in common if vmcs.is_rare(names[0])][:1], "HOST_RIP"]
    compiled = [(flows, common)]
    for fields in classes:
        if gated.intersection(fields):
            compiled.append((Flows(config, nvmx, [fields[0], *companions], without), [fields]))
    return compiled


def _compile_common(
    config: Config,
    nvmx: type[Nvmx],
    classes: list[tuple[str, ...]],
    without: Collection[str],
) -> tuple[Flows, list[tuple[str, ...]]]:
    """Compile with one field of each class, two of the rare ones; split classes that differ."""
    absent = next(name for name in vmcs.catalogue() if name not in in_vmcs12())
    while True:
        chosen = [name for fields in classes for name in fields[: 1 + vmcs.is_rare(fields[0])]]
        flows = Flows(config, nvmx, [*chosen, absent], without)
        split = [part for fields in classes for part in _alike(flows, fields)]
        if len(split) == len(classes):
            return flows, classes
        classes = split


def _alike(flows: Flows, fields: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Split a class by what the model was seen to do to its members."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name in fields:
        groups[flows.passive(name, fields)].append(name)
    return [tuple(group) for group in groups.values()]


def field_classes(config: Config, nvmx: type[Nvmx] = Nvmx) -> list[tuple[str, ...]]:
    """Return the fields of vmcs12 in classes whose members L0 has no reason to treat differently.

    The explorer looks at one of each class. That the others move alike is checked when the flows
    are compiled, for every step that is not about the field itself.
    """
    l0 = nvmx(config)
    gated = gated_by_a_write(l0)
    copied: dict[str, list[Hashable]] = defaultdict(list)
    for path, rows in l0.resolved_paths.items():
        for number, row in enumerate(rows):
            for access in row.accesses if row.copies_vmcs12 else ():
                # "changed:" names the field itself.
                condition = tuple(token.partition(":")[0] for token in row.condition)
                alone = access.field in gated and number
                copied[access.field].append((path, access.op, condition, alone))
    classes: dict[Hashable, list[str]] = defaultdict(list)
    for name in in_vmcs12():
        group = vmcs.field(name).evmcs_clean_group
        key = (
            role(name, config),
            vmcs.is_rare(name),
            name in vmcs.saved_in_smram(),
            name in ENTRY_FAILURE,
            in_evmcs(name),
            group if group in EVMCS_GROUPS else "",
            name in l0.rare,
            name in l0.shadow_rw,
            name in l0.shadow_ro,
            l0.is_shadow_field_rw(name),
            name in l0.tracked,
            name in l0.exit_info,
            name in gated,
            frozenset(copied[name]),
        )
        classes[key].append(name)
    return [tuple(names) for names in classes.values()]
