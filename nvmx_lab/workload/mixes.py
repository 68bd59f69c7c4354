"""Mixes: workloads as weights over L1's handlers, one TOML file each in ``data/mixes``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nvmx_lab import data
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.ops import Operation, parse
from nvmx_lab.workload import handlers, streams

if TYPE_CHECKING:
    import pandas as pd

Basis = Literal["published", "executed", "published-code", "assumed"]
Text = Annotated[str, Field(min_length=1)]
Weight = Annotated[float, Field(ge=0, lt=1e15, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Override(_Strict):
    """A probability that differs from the default in ``data/l1_conditions.toml``, and why."""

    p: float = Field(ge=0, le=1)
    low: float | None = Field(default=None, ge=0, le=1)
    high: float | None = Field(default=None, ge=0, le=1)
    basis: Basis = "assumed"
    source: str = ""


class Host(_Strict):
    """What the workload needs of L0's configuration.

    L0's CPU has MPX (36 rare fields), as the generation that the patch was written on does, unless
    the mix comes from a run on a CPU without.
    """

    shadow_vmcs: bool = True
    evmcs: bool = False
    mpx: bool = True
    l2_mode: Literal["long", "legacy"] = "long"


class Published(_Strict):
    """Published cycles of one iteration, before and after the whole series of 43 patches."""

    before_cycles: float = Field(gt=0)
    after_cycles: float = Field(gt=0)
    exits_per_iteration: int = Field(default=1, ge=1)
    source: Text


class Mix(_Strict):
    """A workload: which exits, handled by which L1, under which conditions.

    Attributes
    ----------
    name, title, question : str
        Its name, a short title, and what it stands for in one sentence.
    basis : {"published", "executed", "published-code", "assumed"}
        Where the weights come from.
    source : str
        Their source: a URL, a Message-Id or a run.
    assumes : str
        What had to be assumed besides.
    l1, variant : str
        The handlers: see `nvmx_lab.workload.handlers.load`.
    exits : dict of str to float
        Weight of each handler (``"cpuid"``) or handler with events (``"pio_user + get_sregs"``);
        only their ratios count.
    conditions : dict of str to Override
        Probabilities that differ from their defaults; a bare number is an Override too.
    without : tuple of Operation
        Operations taken out of every word.
    host : Host
    published : Published or None
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$")]
    title: Annotated[str, Field(min_length=1, max_length=60)]
    question: Text
    basis: Basis
    source: Text
    assumes: str = ""
    l1: Text
    variant: str = ""
    exits: Annotated[dict[str, Weight], Field(min_length=1)]
    conditions: dict[
        str, Annotated[Override, BeforeValidator(lambda v: v if isinstance(v, dict) else {"p": v})]
    ] = Field(default_factory=dict)
    without: Annotated[
        tuple[Operation, ...],
        BeforeValidator(lambda v: tuple(map(parse, v)) if isinstance(v, list) else v),
    ] = ()
    host: Host = Host()
    published: Published | None = None

    @cached_property
    def _words(self) -> tuple[streams.Word, ...]:
        return tuple(self._enumerate())

    def words(self) -> tuple[streams.Word, ...]:
        """Return the distinct round trips; their probabilities sum to 1."""
        return self._words

    def _enumerate(self) -> Iterator[streams.Word]:
        """Weigh the words of each handler."""
        chance = {name: override.p for name, override in self.conditions.items()}
        total = sum(self.exits.values())
        for name, weight in self.exits.items():
            for word in handlers.words(
                self.l1, name, variant=self.variant, probabilities=chance, without=self.without
            ):
                yield streams.Word(
                    word.operations, word.probability * weight / total, name, word.l1_instructions
                )

    def stream(self, exits: int, seed: int) -> streams.Stream:
        """Return a stream that draws `exits` round trips.

        Parameters
        ----------
        exits : int
            1 to 10**10.
        seed : int
            The same seed gives the same stream.
        """
        return streams.drawn(self.words(), exits, seed, task=self.name)


def names() -> tuple[str, ...]:
    """Return the names of the mixes that come with the kit, sorted."""
    return tuple(sorted(file.stem for file in data.path("mixes").glob("*.toml")))


def load(name_or_path: str | Path) -> Mix:
    """Return a mix.

    Parameters
    ----------
    name_or_path : str or Path
        One of `names`, or the path of a TOML file (anything with a slash or ``.toml``).

    Raises
    ------
    LabError
        If there is none, or the file is not valid: with the file, the key and what was got.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(".toml"):
        return read(Path(text))
    if text not in names():
        raise unknown("mix", text, names())
    return read(data.path("mixes", f"{text}.toml"))


def read(file: Path) -> Mix:
    """Read and check a mix: its keys, its handlers, its conditions, its words."""
    raw = handlers.read_toml(file)
    try:
        mix = Mix.model_validate(raw)
    except ValidationError as error:
        raise _mendable(error, file) from None
    except LabError as error:  # an operation under `without`
        raise LabError(
            error.what, where=f"{file}: without", got=error.got, mend=error.mend
        ) from error
    if mix.name != file.stem:
        raise LabError("the name must be the file's", where=f"{file}: name", got=mix.name)
    if sum(mix.exits.values()) <= 0:
        raise LabError("no exit has a weight above 0", where=f"{file}: exits")
    _check_conditions(mix, file)
    try:
        mix.words()
    except LabError as error:
        raise LabError(
            error.what,
            where=f"{file}: exits",
            got=error.got,
            allowed=error.allowed,
            mend=error.mend,
        ) from error
    return mix


def _check_conditions(mix: Mix, file: Path) -> None:
    """Raise LabError for an override that is unknown or changes nothing."""
    if not mix.conditions:
        return
    table = handlers.load(mix.l1, mix.variant)
    used = {
        condition
        for name in mix.exits
        for part in handlers.split_name(name)
        if part in table
        for condition in table[part].conditions()
    }
    for name, override in mix.conditions.items():
        where = f"{file}: conditions.{name}"
        if name not in handlers.conditions():
            raise unknown("condition", name, handlers.conditions(), where=where)
        if name not in used:
            raise LabError(
                "no handler of this mix has the condition",
                where=where,
                allowed=", ".join(sorted(used)) or "none: handlers from logs have no conditions",
            )
        low, high = override.low, override.high
        if (low is not None and low > override.p) or (high is not None and high < override.p):
            raise LabError("probability outside its own range", where=where, got=override.p)


def _mendable(error: ValidationError, file: Path) -> LabError:
    """Turn the first fault that pydantic found into one that names file and key."""
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"] if part != "[key]"]
    where = f"{file}: {'.'.join(path)}" if path else str(file)
    if fault["type"] == "extra_forbidden":
        model: Mapping[str, Any] = Mix.model_fields
        for part, inner in (("host", Host), ("published", Published), ("conditions", Override)):
            if len(path) > 1 and path[0] == part:
                model = inner.model_fields
        return unknown("key", path[-1], model, where=where)
    if fault["type"] == "missing":
        return LabError("the key is missing", where=where)
    return LabError(fault["msg"], where=where, got=fault["input"])


def table() -> pd.DataFrame:
    """Return one row per mix: mix, title, l1, basis, words, operations_per_exit, source, ..."""
    import pandas as pd

    rows = []
    for name in names():
        mix = load(name)
        words = mix.words()
        rows.append(
            {
                "mix": name,
                "title": mix.title,
                "question": mix.question,
                "l1": f"{mix.l1} {mix.variant}".rstrip(),
                "basis": mix.basis,
                "handlers": len(mix.exits),
                "words": len(words),
                "operations_per_exit": sum(w.probability * len(w.operations) for w in words),
                "evmcs": mix.host.evmcs,
                "source": mix.source,
                "assumes": mix.assumes,
            }
        )
    return pd.DataFrame(rows)
