"""Counterexamples: what the explorer found, as a file that a person can read and a replay can run.

`nvmx_lab.nested.story` tells one in sentences, `nvmx_lab.nested.diagram` draws it in text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from nvmx_lab import files, vmcs
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.explorer import Finding
from nvmx_lab.nested.model import Nvmx
from nvmx_lab.nested.replay import Replay
from nvmx_lab.nested.replay import replay as run
from nvmx_lab.nested.steps import Step, parse

FORMAT: Final = "nvmx-lab counterexample"
VERSION: Final = 1
KEYS: Final = (
    *("format", "version", "kvm", "sync", "options", "mutant"),
    *("field", "wrong", "steps"),
)
MOST_BYTES: Final = 1 << 20
MOST_STEPS: Final = 10_000
MOST_LETTERS: Final = 500  # of a text

_OPTIONS: Final = {f.name: f.default for f in fields(Config) if f.name not in ("kvm", "sync")}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Counterexample:
    """A sequence of steps, and the L0 that it shows to be wrong.

    Attributes
    ----------
    kvm, sync : str
        Release and policy, as `Config.of` takes them.
    options : tuple of (str, bool)
        Options of `Config` that differ from the defaults.
    mutant : str
        Name in `nvmx_lab.nested.mutants`; empty for KVM as it is.
    field : str
        The field that shows it.
    wrong : str
        What was seen instead of the true value, as in `nvmx_lab.nested.search.Failure`.
    steps : tuple of Step
        From a new vCPU on; the last one shows it.
    """

    kvm: str
    sync: str
    options: tuple[tuple[str, bool], ...]
    mutant: str
    field: str
    wrong: str
    steps: tuple[Step, ...]

    @classmethod
    def of(cls, finding: Finding, mutant: str = "") -> Counterexample:
        """Make one from what the explorer found in KVM, or in a mutant of it."""
        config = finding.config
        options = tuple(
            (name, getattr(config, name))
            for name, default in _OPTIONS.items()
            if getattr(config, name) != default
        )
        return cls(
            config.kvm.name,
            config.sync,
            options,
            mutant,
            finding.field,
            finding.wrong,
            finding.steps,
        )

    @property
    def config(self) -> Config:
        """The L0."""
        return Config.of(self.kvm, self.sync, **dict(self.options))

    def replay(self) -> Replay:
        """Run the steps on the whole model.

        Raises
        ------
        LabError
            If there is no such mutant, or a step cannot happen where it stands.
        """
        nvmx = _mutant(self.mutant) if self.mutant else Nvmx
        replayed = run(self.config, self.steps, self.field, nvmx)
        return replace(replayed, mutant=self.mutant)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values, in the layout of its file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "kvm": self.kvm,
            "sync": self.sync,
            "options": dict(self.options),
            "mutant": self.mutant,
            "field": self.field,
            "wrong": self.wrong,
            "steps": [str(step) for step in self.steps],
        }

    def save(self, path: Path) -> None:
        """Write it as JSON; a reader sees the old file or all of the new one.

        Raises
        ------
        LabError
            If the file cannot be written; it is then as it was.
        """
        files.write_json(Path(path), self.to_dict())


def load(path: Path) -> Counterexample:
    """Read a counterexample; the file may come from anybody.

    Raises
    ------
    LabError
        If it is none: says what, at which key, what was found and what is allowed.
    """
    path = Path(path)
    document = _parsed(path)
    for key in document:
        if key not in KEYS:
            raise unknown("key", key, KEYS, where=path)
    for key in KEYS:
        if key not in document:
            raise LabError("a key is missing", where=path, got=key, allowed=", ".join(KEYS))
    _exactly(document, "format", FORMAT, path)
    _exactly(document, "version", VERSION, path)
    options = _options(document["options"], path)
    kvm, sync, mutant, field, wrong = (
        _text(document, key, path) for key in ("kvm", "sync", "mutant", "field", "wrong")
    )
    _at(f"{path}: kvm", lambda: Config.of(kvm))
    _at(f"{path}: sync", lambda: Config.of(kvm, sync))
    if mutant:
        _at(f"{path}: mutant", lambda: _mutant(mutant))
    name = _at(f"{path}: field", lambda: vmcs.field(field)).name
    steps = _steps(document["steps"], path)
    return Counterexample(kvm, sync, options, mutant, name, wrong, steps)


def _mutant(name: str) -> type[Nvmx]:
    from nvmx_lab.nested.mutants import mutant  # imports the explorer's side of the package

    return mutant(name).nvmx


# -- reading ---------------------------------------------------------------------------------------


def _parsed(path: Path) -> Mapping[str, Any]:
    try:
        if not path.is_file():  # a pipe would keep us waiting
            raise LabError("there is no such file", where=path)
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LabError(f"cannot be read: {reason}", where=path) from error
    if len(raw) > MOST_BYTES:
        raise LabError("the file is too large", where=path, allowed=f"{MOST_BYTES} bytes")
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise LabError(f"not UTF-8 at byte {error.start}", where=path) from error
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}:{error.colno}"
        raise LabError(f"malformed JSON: {error.msg}", where=where) from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a key twice, a huge number, brackets in brackets
        raise LabError(f"malformed JSON: {error}", where=path) from error
    if not isinstance(document, dict):
        raise LabError("no counterexample", where=path, got=_kind(document), allowed="an object")
    return document


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


# -- checks ----------------------------------------------------------------------------------------


def _at(where: str, act: Callable[[], _T]) -> _T:
    """Do something; if it fails, say where in the file."""
    try:
        return act()
    except LabError as error:
        got, allowed, mend = error.got, error.allowed, error.mend
        raise LabError(error.what, where=where, got=got, allowed=allowed, mend=mend) from error


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _exactly(document: Mapping[str, Any], key: str, wanted: object, path: Path) -> None:
    value = document[key]
    if type(value) is not type(wanted) or value != wanted:
        got = value if isinstance(value, str | int | float) else _kind(value)
        raise LabError("not this format", where=f"{path}: {key}", got=got, allowed=repr(wanted))


def _text(document: Mapping[str, Any], key: str, path: Path) -> str:
    value, where = document[key], f"{path}: {key}"
    if not isinstance(value, str):
        raise LabError("not a text", where=where, got=_kind(value), allowed="a text")
    return _checked(value, where)


def _checked(text: str, where: str) -> str:
    if len(text) > MOST_LETTERS or not text.isprintable():
        allowed = f"at most {MOST_LETTERS} printable letters"
        raise LabError("not a short text", where=where, got=text[:40], allowed=allowed)
    return text


def _options(value: object, path: Path) -> tuple[tuple[str, bool], ...]:
    where = f"{path}: options"
    if not isinstance(value, dict):
        raise LabError("not an object", where=where, got=_kind(value), allowed="an object")
    for name, on in value.items():
        if name not in _OPTIONS:
            raise unknown("option of L0", name[:MOST_LETTERS], _OPTIONS, where=where)
        if not isinstance(on, bool):
            raise LabError(
                "not a truth value",
                where=f"{where}: {name}",
                got=_kind(on),
                allowed="true, false",
            )
    return tuple((name, value[name]) for name in _OPTIONS if name in value)


def _steps(value: object, path: Path) -> tuple[Step, ...]:
    where = f"{path}: steps"
    if not isinstance(value, list):
        raise LabError("not a list", where=where, got=_kind(value), allowed="a list of texts")
    if not 0 < len(value) <= MOST_STEPS:
        raise LabError(
            "no steps, or too many", where=where, got=len(value), allowed=f"1 to {MOST_STEPS}"
        )
    return tuple(_step(text, f"{where}[{number}]") for number, text in enumerate(value))


def _step(text: object, where: str) -> Step:
    if not isinstance(text, str):
        raise LabError("not a text", where=where, got=_kind(text), allowed="a text")
    return _at(where, lambda: parse(_checked(text, where)))
