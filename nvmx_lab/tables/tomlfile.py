"""Reading and checking one TOML file: every fault, with line and key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nvmx_lab.tables.fault import Fault
from nvmx_lab.tables.rules import Names, Rule, suggestion

Lines = Mapping[tuple[str, ...], int]
"""Line of each key, by its path; an item of an array of tables has its index in the path."""


@dataclass(frozen=True)
class Section:
    """What a TOML table must look like.

    Attributes
    ----------
    keys : mapping of str to Rule
        Every plain key; no other is allowed.
    optional : frozenset of str
        Keys and tables that may be absent.
    tables : mapping of str to Section
        Tables inside by name.
    arrays : mapping of str to Section
        Arrays of tables inside by name: each item follows the section.
    each : Section, optional
        What every other table inside follows.
    others : Rule, optional
        What the value of every other key follows; a table follows `each`.
    each_name : Rule, optional
        Rule for the names of those tables or keys.
    ascending : tuple of tuple of str
        Groups of keys whose numbers must not decrease from left to right.
    """

    keys: Mapping[str, Rule] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    tables: Mapping[str, Section] = field(default_factory=dict)
    arrays: Mapping[str, Section] = field(default_factory=dict)
    each: Section | None = None
    others: Rule | None = None
    each_name: Rule | None = None
    ascending: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Document:
    """A TOML file that could be read: its content and the line of each key."""

    content: Mapping[str, object]
    lines: Lines

    def line(self, path: Sequence[str]) -> int:
        """Return the line of a key, or of the nearest table around it."""
        known = tuple(path)
        while known and known not in self.lines:
            known = known[:-1]
        return self.lines.get(known, 1)


def read(path: Path, file: str) -> tuple[Document | None, list[Fault]]:
    """Return a TOML file's content, or what keeps it from being read."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        return None, [Fault(file, None, "", "cannot be read", str(error.strerror or error))]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8")
        line = before.count("\n") + 1
        key = before.rpartition("\n")[2].partition("=")[0].strip()
        return None, [Fault(file, line, key, "not UTF-8", f"byte 0x{raw[error.start]:02x}")]
    try:
        content = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        # The parser says the place in words; "end of document" is the last line.
        place = re.search(r"at line (\d+)", str(error))
        line = int(place[1]) if place else text.count("\n") + 1
        source = text.splitlines()[line - 1 : line]
        key = source[0].partition("=")[0].strip() if source and "=" in source[0] else ""
        return None, [Fault(file, line, key, f"malformed TOML: {error}")]
    return Document(content, _lines(text)), []


def check(file: str, section: Section, document: Document, names: Names) -> Iterator[Fault]:
    """Yield every fault of a TOML file that has been read."""
    yield from _check_table(file, section, document, document.content, (), names)


def _check_table(
    file: str,
    section: Section,
    document: Document,
    table: Mapping[str, object],
    path: tuple[str, ...],
    names: Names,
) -> Iterator[Fault]:
    required = {*section.keys, *section.tables, *section.arrays} - section.optional
    for key in sorted(required - set(table)):
        yield Fault(file, document.line(path), ".".join((*path, key)), "key missing")
    for key, value in table.items():
        inner = (*path, key)
        column, line = ".".join(inner), document.line(inner)
        if key in section.keys:
            found = section.keys[key].problem(value, names)
            if found is not None:
                yield Fault(file, line, column, found.what, _shown(value), found.allowed)
        elif key in section.tables:
            if isinstance(value, dict):
                yield from _check_table(file, section.tables[key], document, value, inner, names)
            else:
                yield Fault(file, line, column, "not a table", _shown(value))
        elif key in section.arrays:
            yield from _check_array(file, section.arrays[key], document, value, inner, names)
        elif section.others is not None or (section.each is not None and isinstance(value, dict)):
            found = section.each_name.problem(key, names) if section.each_name else None
            if found is not None:
                yield Fault(file, line, column, found.what, key, found.allowed)
            if section.each is not None and isinstance(value, dict):
                yield from _check_table(file, section.each, document, value, inner, names)
            elif section.others is not None:
                found = section.others.problem(value, names)
                if found is not None:
                    yield Fault(file, line, column, found.what, _shown(value), found.allowed)
        else:
            allowed = (*section.keys, *section.tables, *section.arrays)
            listed = ", ".join(sorted(allowed)) + suggestion(key, allowed)
            yield Fault(file, line, column, "unknown key", key, listed)
    for group in section.ascending:
        yield from _check_ascending(file, document, table, path, group)


def _check_array(
    file: str,
    section: Section,
    document: Document,
    value: object,
    path: tuple[str, ...],
    names: Names,
) -> Iterator[Fault]:
    if not isinstance(value, list) or not value:
        what = "not an array of tables with at least one item"
        yield Fault(file, document.line(path), ".".join(path), what, _shown(value))
        return
    for index, item in enumerate(value):
        inner = (*path, str(index))
        if isinstance(item, dict):
            yield from _check_table(file, section, document, item, inner, names)
        else:
            yield Fault(file, document.line(inner), ".".join(inner), "not a table", _shown(item))


def _check_ascending(
    file: str,
    document: Document,
    table: Mapping[str, object],
    path: tuple[str, ...],
    group: Sequence[str],
) -> Iterator[Fault]:
    last: tuple[str, float] | None = None
    for key in group:
        value = table.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if last is not None and value < last[1]:
            at = (*path, key)
            allowed = f">= {last[1]:g}"
            yield Fault(
                file, document.line(at), ".".join(at), f"less than {last[0]}", str(value), allowed
            )
        last = key, value


def _shown(value: object) -> str:
    return value if isinstance(value, str) else repr(value)


_HEADER = re.compile(r"\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_NAME = r"(?:[A-Za-z0-9_-]+|\"[^\"]*\"|'[^']*')"
_KEY = re.compile(rf"\s*({_NAME}(?:\s*\.\s*{_NAME})*)\s*=(.*)$")


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Find the line of each key of a valid TOML text.

    The standard parser tells no lines. This one knows tables, arrays of tables, keys and multi-line
    strings; a key inside an inline table or a multi-line array has the line of what is around it.
    """
    lines: dict[tuple[str, ...], int] = {}
    items: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    closing = ""  # what ends the multi-line string or array that we are in
    for number, line in enumerate(text.splitlines(), start=1):
        if closing:
            if line.strip().startswith(closing) if closing == "]" else closing in line:
                closing = ""
            continue
        header = _HEADER.match(line)
        if header is not None:
            table = _indexed(_parts(header[2]), items)
            if header[1] == "[[":
                items[table] = items.get(table, -1) + 1
                table = (*table, str(items[table]))
            lines.setdefault(table, number)
            continue
        key = _KEY.match(line)
        if key is None:
            continue
        path = (*table, *_parts(key[1]))
        lines.setdefault(path, number)
        value = key[2].lstrip()
        for quotes in ('"""', "'''"):
            if value.startswith(quotes) and value.count(quotes) == 1:
                closing = quotes
        if value.startswith("[") and value.count("[") > value.count("]"):
            closing = "]"
    return lines


def _parts(dotted: str) -> tuple[str, ...]:
    found = re.findall(r"\"([^\"]*)\"|'([^']*)'|([A-Za-z0-9_-]+)", dotted)
    return tuple(next(part for part in match if part) for match in found if any(match))


def _indexed(path: tuple[str, ...], items: Mapping[tuple[str, ...], int]) -> tuple[str, ...]:
    """Put the index of the current item behind each array of tables on the path but the last."""
    done: tuple[str, ...] = ()
    for position, part in enumerate(path):
        done = (*done, part)
        if done in items and position < len(path) - 1:
            done = (*done, str(items[done]))
    return done
