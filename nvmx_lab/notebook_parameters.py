"""What each notebook may be asked: typed, bounded parameters, one class per notebook.

papermill only warns when it is given a parameter that the notebook does not have, and then runs it
with the default. Here an unknown name, a wrong type or an absurd size is an error before any
kernel starts. `check_notebook` holds a notebook's own ``parameters`` cell to its class.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Final, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from nvmx_lab.errors import LabError, unknown

# The patterns are the regular expressions of pydantic-core: `$` is the very end, never a newline.
# A mix's name becomes part of a file's name, so nothing in it may climb out of a folder.
MixName = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9_]*(?:[.+-][a-z0-9_]+)*$",
        max_length=80,
        description="the name of a workload mix: lower-case letters, digits, '-', '_' and '.'",
    ),
]
Kvm = Annotated[
    str,
    Field(
        pattern=r"^[0-9][A-Za-z0-9_.+-]*$",
        max_length=120,
        description="a KVM release, with features switched if wanted: '5.2', '5.2+patch13'",
    ),
]
Cpu = Annotated[
    str,
    Field(
        pattern=r"^[a-z0-9][a-z0-9_.-]*$",
        max_length=80,
        description="the name of a price list: lower-case letters, digits, '-', '_' and '.'",
    ),
]
MaybeName = Annotated[
    str,
    Field(
        pattern=r"^(?:[a-z0-9]+(?:-[a-z0-9]+)*)?$",
        max_length=80,
        description="a name of lower-case letters, digits and '-', or nothing",
    ),
]
Machine = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z]+(?:,? [A-Za-z]+)*$",
        max_length=80,
        description="the name of a machine: 'shadow VMCS', 'enlightened VMCS'",
    ),
]
Exits = Annotated[
    int, Field(ge=1, le=10**9, description="a whole number of nested exits from 1 to 1000000000")
]
Seed = Annotated[
    int, Field(ge=0, lt=2**63, description="a whole number from 0 to 9223372036854775807")
]


class _Parameters(BaseModel):
    """What the parameters of every notebook have in common: they are strict."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, validate_default=True)

    notebook: ClassVar[str]


class _Comparison(_Parameters):
    """What the notebooks on the saving share: the two releases, the price list, and the draw."""

    kvm_before: Kvm = "5.2"
    kvm_after: Kvm = "5.2+patch13"
    cpu: Cpu = "skylake-2015"
    exits: Exits = 1_000_000
    seed: Seed = 1


class ReproduceTheSaving(_Comparison):
    """Parameters of ``01_reproduce_the_saving``: what the patch saves on one mix.

    Attributes
    ----------
    mix : str
        Name of the workload mix.
    kvm_before, kvm_after : str
        L0's KVM without and with the change; the saving is the first minus the second.
    cpu : str
        Name of the price list.
    exits : int
        Nested exits to run, 1 to 10**9.
    seed : int
        Seed of the drawn stream and of the price draws.
    """

    notebook: ClassVar[str] = "01_reproduce_the_saving"

    mix: MixName


class AcrossWorkloadMixes(_Comparison):
    """Parameters of ``02_across_workload_mixes``: all the mixes side by side.

    Attributes
    ----------
    mixes : list of str
        Names of the mixes; empty means all there are.
    kvm_before, kvm_after, cpu, exits, seed
        As in `ReproduceTheSaving`.
    """

    notebook: ClassVar[str] = "02_across_workload_mixes"

    mixes: list[MixName] = Field(default_factory=list, description="a list of names of mixes")


class WhereTheCyclesGo(_Comparison):
    """Parameters of ``03_where_the_cycles_go``: the breakdown of one round trip.

    Attributes
    ----------
    mix : str
        Name of the workload mix.
    kvm_before, kvm_after, cpu, exits, seed
        As in `ReproduceTheSaving`.
    """

    notebook: ClassVar[str] = "03_where_the_cycles_go"

    mix: MixName


class _Priced(_Parameters):
    """What the notebooks share that price something: the price list and the seed."""

    cpu: Cpu = "skylake-2015"
    seed: Seed = 1


class HowSure(_Parameters):
    """Parameters of ``04_how_sure``: calibration, held-out claims, sensitivity.

    Attributes
    ----------
    seed : int
        Seed of the sampler and of every other draw.
    steps : int
        Steps of the sampler that are kept, 100 to 100,000.
    """

    notebook: ClassVar[str] = "04_how_sure"

    seed: Seed = 1
    steps: Annotated[
        int, Field(ge=100, le=100_000, description="a whole number of steps from 100 to 100000")
    ] = 2_000


class TheSeries(_Priced):
    """Parameters of ``05_the_series``: the patch among the 43 of its series.

    Attributes
    ----------
    mix : str
        The published loop to take apart.
    exits : int
        Nested exits to run, 1 to 10**9.
    cpu, seed
        As in `ReproduceTheSaving`.
    """

    notebook: ClassVar[str] = "05_the_series"

    mix: MixName = "cpuid"
    exits: Exits = 1_000_000


class BreakEven(_Priced):
    """Parameters of ``06_break_even``: how many pulls the saving bears.

    Attributes
    ----------
    kvm : str
        L0's KVM, with the lazy sync.
    exits : int
        Nested exits to run, 1 to 10**9.
    cpu, seed
        As in `ReproduceTheSaving`.
    """

    notebook: ClassVar[str] = "06_break_even"

    kvm: Kvm = "5.3"
    exits: Exits = 1_000_000


class KernelStackRandomization(_Priced):
    """Parameters of ``07_kernel_stack_randomization``: one default of L1's that undoes the saving.

    Attributes
    ----------
    kvm : str
        L0's KVM, with the lazy sync.
    exits : int
        Nested exits to run, 1 to 10**9.
    cpu, seed
        As in `ReproduceTheSaving`.
    """

    notebook: ClassVar[str] = "07_kernel_stack_randomization"

    kvm: Kvm = "6.1"
    exits: Exits = 10_000_000  # small differences of long round trips


class BetterPolicies(_Priced):
    """Parameters of ``08_better_policies``: sync policies that nobody has tried.

    Attributes
    ----------
    kvm : str
        L0's KVM.
    exits : int
        Nested exits to run, 1 to 10**9.
    cpu, seed
        As in `ReproduceTheSaving`.
    """

    notebook: ClassVar[str] = "08_better_policies"

    kvm: Kvm = "6.1"
    exits: Exits = 10_000_000  # small differences of long round trips


class CouldYouMeasureIt(_Parameters):
    """Parameters of ``09_could_you_measure_it``: how many runs would show the saving.

    Attributes
    ----------
    loop_cycles, saving_cycles : float
        The loop that is timed, and the difference to be seen in it.
    power : float
        Probability of seeing it, above 0.5 and below 1.
    seed : int
        Seed of the simulated measurements.
    """

    notebook: ClassVar[str] = "09_could_you_measure_it"

    loop_cycles: Annotated[float, Field(gt=0, le=1e9, description="a number of cycles above 0")] = (
        14_000.0
    )
    saving_cycles: Annotated[
        float, Field(gt=0, le=1e9, description="a number of cycles above 0")
    ] = 200.0
    power: Annotated[
        float, Field(gt=0.5, lt=1, description="a probability above 0.5 and below 1")
    ] = 0.9
    seed: Seed = 1


class IsItCorrect(_Priced):
    """Parameters of ``10_is_it_correct``: the search for values that nobody should see.

    Attributes
    ----------
    kvm : str
        L0's KVM.
    sync : str
        Sync policy; empty for the release's own.
    mutant : str
        A wrong variant of L0 to look at; empty for none.
    machines : list of str
        Machines on which L0 runs (`nvmx_lab.nested.explorer.ENVIRONMENTS`), fewer for a quicker
        look; empty for all that matter to a question.
    releases : list of str
        Releases of the history; empty for all.
    mutants : list of str
        Wrong variants of which to say whether they are caught; empty for all.
    cpu, seed
        As in `ReproduceTheSaving`.
    """

    notebook: ClassVar[str] = "10_is_it_correct"

    kvm: Kvm = "6.1"
    sync: MaybeName = ""
    mutant: MaybeName = ""
    machines: list[Machine] = Field(default_factory=list, description="a list of machines' names")
    releases: list[Kvm] = Field(default_factory=list, description="a list of KVM releases")
    mutants: list[MaybeName] = Field(default_factory=list, description="a list of mutants' names")


Parameters = (
    ReproduceTheSaving
    | AcrossWorkloadMixes
    | WhereTheCyclesGo
    | HowSure
    | TheSeries
    | BreakEven
    | KernelStackRandomization
    | BetterPolicies
    | CouldYouMeasureIt
    | IsItCorrect
)

NOTEBOOKS: Final[Mapping[str, type[Parameters]]] = MappingProxyType(
    {kind.notebook: kind for kind in get_args(Parameters)}
)
"""Parameter class of each notebook, by the notebook's name without ``.ipynb``."""

_ENTRIES: Final[Mapping[str, tuple[str, type[_Parameters]]]] = MappingProxyType(
    {
        "mixes": ("mix", ReproduceTheSaving),
        "releases": ("kvm", IsItCorrect),
        "mutants": ("mutant", IsItCorrect),
    }
)


def validated(notebook_name: str, /, **values: Any) -> Parameters:
    """Return a notebook's parameters, checked.

    Parameters
    ----------
    notebook_name : str
        For example ``"01_reproduce_the_saving"``.
    **values
        The parameters; those left out keep their defaults. NumPy scalars and tuples are taken as
        the Python numbers and lists that they mean.

    Raises
    ------
    LabError
        For an unknown notebook or parameter (with a suggestion), a wrong type, a number out of
        bounds, or a parameter that is missing.
    """
    kind = _kind(notebook_name)
    for name in values:
        if name not in kind.model_fields:
            raise unknown("parameter", name, kind.model_fields, where=notebook_name)
    try:
        return kind(**{name: _plain(value) for name, value in values.items()})
    except ValidationError as error:
        raise _lab_error(notebook_name, kind, error.errors()[0]) from None


def check(notebook_name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of a notebook as JSON values, defaults filled in.

    Parameters
    ----------
    notebook_name : str
        For example ``"01_reproduce_the_saving"``.
    given : mapping
        Names and values; keys that are no text count as unknown parameters.

    Raises
    ------
    LabError
        As `validated`.
    """
    return validated(notebook_name, **{str(name): v for name, v in given.items()}).model_dump()


def check_notebook(path: Path) -> None:
    """Hold a notebook's ``parameters`` cell to the notebook's class: same names, same defaults.

    A parameter without a default in the class may have any valid value in the notebook. The cell
    is parsed, never run.

    Parameters
    ----------
    path : Path
        The notebook; its name without ``.ipynb`` says which class it must agree with.

    Raises
    ------
    LabError
        If the file is no notebook, if not exactly one code cell carries the tag, or if a name or
        a default differs.
    """
    name = path.stem
    kind = _kind(name)
    declared = declared_parameters(path)
    for given in declared:
        if given not in kind.model_fields:
            raise unknown("parameter", given, kind.model_fields, where=f"{path}: parameters cell")
    for field, info in kind.model_fields.items():
        if field not in declared:
            raise LabError(f"the parameters cell does not assign {field!r}", where=path)
        if info.is_required():
            continue
        default = info.get_default(call_default_factory=True, validated_data={})
        if type(declared[field]) is not type(default) or declared[field] != default:
            raise LabError(
                f"the default of {field!r} differs from the parameter class",
                where=path,
                got=declared[field],
                allowed=repr(default),
            )
    validated(name, **declared)


def declared_parameters(path: Path) -> dict[str, Any]:
    """Return the names and literal values that a notebook's ``parameters`` cell assigns.

    Raises
    ------
    LabError
        If the file is no notebook, if not exactly one code cell carries the tag, or if the cell
        holds anything but assignments of literals to names.
    """
    sources = [
        cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        for cell in _cells(path)
        if cell["cell_type"] == "code" and "parameters" in cell.get("metadata", {}).get("tags", [])
    ]
    if len(sources) != 1:
        raise LabError(
            "a notebook has exactly one code cell tagged 'parameters'",
            where=path,
            got=f"{len(sources)} of them",
        )
    where = f"{path}: parameters cell"
    try:
        statements = ast.parse(sources[0]).body
    except SyntaxError as error:
        raise LabError(f"not Python: {error.msg}", where=f"{where}, line {error.lineno}") from None
    values: dict[str, Any] = {}
    for statement in statements:
        target, value = _assignment(statement)
        if target is None or value is None:
            raise LabError(
                "only assignments of literals to names belong here",
                where=f"{where}, line {statement.lineno}",
                got=ast.unparse(statement),
            )
        if target in values:
            raise LabError(f"{target!r} is assigned twice", where=where)
        try:
            values[target] = ast.literal_eval(value)
        except ValueError:
            raise LabError(
                f"the value of {target!r} is no literal",
                where=f"{where}, line {statement.lineno}",
                got=ast.unparse(value),
            ) from None
    return values


def _assignment(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
        return statement.target.id, statement.value
    if (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
    ):
        return statement.targets[0].id, statement.value
    return None, None


def _cells(path: Path) -> list[dict[str, Any]]:
    try:
        cells = list(json.loads(path.read_bytes())["cells"])
        well_formed = all("source" in cell and "cell_type" in cell for cell in cells)
    except OSError as error:
        raise LabError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, KeyError, TypeError):
        well_formed = False
    if not well_formed:
        raise LabError("not a notebook (nbformat 4)", where=path)
    return cells


def _kind(notebook_name: str) -> type[Parameters]:
    kind = NOTEBOOKS.get(notebook_name)
    if kind is None:
        raise unknown("notebook", notebook_name, NOTEBOOKS)
    return kind


def _plain(value: Any) -> Any:
    """Turn a NumPy scalar or 1-d array into Python's own, and a tuple into a list."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    if getattr(value, "ndim", None) == 1 and callable(getattr(value, "tolist", None)):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return value


def _lab_error(notebook_name: str, kind: type[Parameters], first: ErrorDetails) -> LabError:
    name = str(first["loc"][0])
    place = name + "".join(f"[{step}]" for step in first["loc"][1:])
    if first["type"] == "missing":
        return LabError("the parameter is missing", where=f"{notebook_name}: {name}")
    allowed = kind.model_fields[name].description
    if len(first["loc"]) > 1:  # inside a list: an entry is what the parameter for one of them is
        single, of = _ENTRIES[name]
        allowed = of.model_fields[single].description
    return LabError(
        "the parameter cannot be this",
        where=f"{notebook_name}: {place}",
        got=first["input"],
        allowed=allowed,
    )
