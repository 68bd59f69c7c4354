"""Checks that need a whole table, or a cell's words one by one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from nvmx_lab.errors import LabError
from nvmx_lab.nested.ops import WITH_ARGUMENT, Kind, Operation, parse
from nvmx_lab.tables.csvfile import Row, WholeTable
from nvmx_lab.tables.fault import Fault
from nvmx_lab.tables.rules import Known, Names, Problem, Rule

# Intel SDM volume 3, appendix B: bits 14:13 of an encoding are the width, 11:10 the group.
_WIDTH: Final = ("16", "64", "32", "natural")
_GROUP: Final = ("control", "exit-info(read-only)", "guest", "host")
_ARGUMENT_NAMES: Final = {
    Kind.VMREAD: "field",
    Kind.VMWRITE: "field",
    Kind.EXIT: "exit reason",
    Kind.L0_EXIT: "exit reason",
    Kind.L1_EXIT: "exit reason",
}
_ARGUMENT_WORDS: Final = {
    Kind.VMPTRLD: ("same", "other"),
    Kind.VMCLEAR: ("current", "other"),
    Kind.L2_MODE: ("long", "legacy"),
}
SHADOW_COUNTS: Final = {
    "shadow_v52": (25, 9),
    "shadow_at_patch13": (23, 11),
    "shadow_v53": (24, 11),
}
"""Members of KVM's RW and RO shadow lists (x86-64), Linux v5.2.1, at patch 13, and v5.3.1."""

RARE_CLASSES: Final = {
    "8 selectors": (r"GUEST_(ES|CS|SS|DS|FS|GS|LDTR|TR)_SELECTOR", 8),
    "10 limits": (r"GUEST_(ES|CS|SS|DS|FS|GS|LDTR|TR|GDTR|IDTR)_LIMIT", 10),
    "6 access rights, without CS and SS": (r"GUEST_(ES|DS|FS|GS|LDTR|TR)_AR_BYTES", 6),
    "10 bases": (r"GUEST_(ES|CS|SS|DS|FS|GS|LDTR|TR|GDTR|IDTR)_BASE", 10),
    "the pending debug exceptions": (r"GUEST_PENDING_DBG_EXCEPTIONS", 1),
    "BNDCFGS": (r"GUEST_BNDCFGS", 1),
}
"""What commit 7952d769c29c makes rare: a class, the names in it, how many; 36 in all."""


@dataclass(frozen=True, kw_only=True)
class Fields(Rule):
    """Field names between spaces, or ``*n``: n accesses whose fields are not known."""

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge each word; the first bad one is reported."""
        if re.fullmatch(r"\*[1-9]\d?", str(value)):
            return None
        for word in str(value).split(" "):
            found = Known(kind="field").problem(word, names)
            if found is not None:
                return Problem(f"{found.what} {word!r}", f"{found.allowed}, or *1 to *99")
        return None


@dataclass(frozen=True, kw_only=True)
class Conditions(Rule):
    """Conditions of L0 between spaces, all of which must hold; ``!`` negates one."""

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge each word; the first bad one is reported."""
        for word in str(value).split(" "):
            name, colon, field = word.removeprefix("!").partition(":")
            found = Known(kind="L0 condition").problem(name, names)
            if found is None and (colon == ":") != (name == "changed"):
                found = Problem("a field behind a colon", "with changed, and only with it")
            if found is None and colon:
                found = Known(kind="field").problem(field, names)
            if found is not None:
                return Problem(f"{found.what} {word!r}", found.allowed)
        return None


@dataclass(frozen=True, kw_only=True)
class OneOperation(Rule):
    """One operation, ``"VMREAD GUEST_RIP"``, of a declared field or exit reason."""

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge the value."""
        try:
            operation = parse(value) if isinstance(value, str) else None
        except LabError as error:
            return Problem(error.what, error.allowed or "")
        if operation is None:
            return Problem("not text", "an operation")
        return argument_problem(operation, names)


@dataclass(frozen=True, kw_only=True)
class RoundTrip(Rule):
    """Operations between semicolons, from an EXIT to a VM-entry."""

    def problem(self, value: object, names: Names) -> Problem | None:
        """Judge each operation; the first bad one is reported."""
        texts = [text.strip() for text in str(value).split(";")]
        for text in texts:
            found = OneOperation().problem(text, names)
            if found is not None:
                return Problem(f"{found.what}: {text!r}", found.allowed)
        if not texts[0].startswith("EXIT ") or texts[-1] not in ("VMRESUME", "VMLAUNCH"):
            return Problem("not a round trip", "from an EXIT to VMRESUME or VMLAUNCH")
        return None


def argument_problem(operation: Operation, names: Names) -> Problem | None:
    """Return what is wrong with the argument of an operation, None if nothing."""
    kind, arg = operation
    if bool(arg) != (kind in WITH_ARGUMENT):
        return Problem(f"{kind} {'needs an' if kind in WITH_ARGUMENT else 'has no'} argument")
    if kind in _ARGUMENT_WORDS and arg not in _ARGUMENT_WORDS[kind]:
        return Problem(f"unknown argument of {kind}", ", ".join(_ARGUMENT_WORDS[kind]))
    if kind in _ARGUMENT_NAMES:
        return Known(kind=_ARGUMENT_NAMES[kind]).problem(arg, names)
    return None


def arguments(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that each operation of an L1 handler has the argument that its kind needs."""
    for row in rows:
        if row["op"] in set(Kind):
            found = argument_problem(Operation(Kind(row["op"]), row["arg"]), names)
            if found is not None:
                yield Fault(file, row.line, "arg", found.what, row["arg"], found.allowed)


def unique(column: str) -> WholeTable:
    """Return the check that no value of a column occurs twice (blanks aside)."""

    def check(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
        first: dict[str, int] = {}
        for row in rows:
            if row[column] in first:
                what = f"value again (line {first[row[column]]})"
                yield Fault(file, row.line, column, what, row[column])
            elif row[column]:
                first[row[column]] = row.line

    return check


def seq_counts_from(start: int, group: str) -> WholeTable:
    """Return the check that ``seq`` counts up by one from `start` within each group of rows."""

    def check(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
        following: dict[str, int] = defaultdict(lambda: start)
        for row in rows:
            expected = following[row[group]]
            if row["seq"] != str(expected):
                yield Fault(file, row.line, "seq", "does not count on", row["seq"], str(expected))
            # Go on from what is there: one gap is one fault.
            following[row[group]] = int(row.number("seq") or expected) + 1

    return check


def one_each(group: str, column: str) -> WholeTable:
    """Return the check that rows of one group agree in a column."""

    def check(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
        first: dict[str, Row] = {}
        for row in rows:
            same = first.setdefault(row[group], row)
            if row[column] != same[column]:
                what = f"differs from line {same.line} of the same {group}"
                yield Fault(file, row.line, column, what, row[column], same[column])

    return check


def fractions_agree(group: str) -> WholeTable:
    """Return the check of ``fraction``: count over total, and at most 1 in each group."""

    def check(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
        sums: dict[str, float] = defaultdict(float)
        for row in rows:
            fraction, count = row.number("fraction"), row.number("count")
            total = row.number("total_count")
            if fraction is None:
                continue
            sums[row[group]] += fraction
            # Published with six digits.
            if count is not None and total and abs(fraction - count / total) > 1e-6:
                allowed = f"count / total_count = {count / total:.6f}"
                yield Fault(file, row.line, "fraction", "not the share", row["fraction"], allowed)
            if sums[row[group]] > 1 + 1e-5:
                what = f"fractions of {row[group]} add up to more than 1"
                yield Fault(file, row.line, "fraction", what, f"{sums[row[group]]:.6f}")

    return check


def bound_agrees(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that a claim has a number unless its bound says that it has none."""
    for row in rows:
        if (row["bound"] == "no number") == bool(row["claimed_cycles"]):
            allowed = "empty if and only if bound is 'no number'"
            got = row["claimed_cycles"] or "nothing"
            yield Fault(file, row.line, "claimed_cycles", "disagrees with bound", got, allowed)


def patches_follow_on(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that every patch is in one row, in order, and that a number comes with words."""
    expected, seen = 1, set()
    for row in rows:
        if row["patches"] in seen:
            continue  # a row again has its own fault
        seen.add(row["patches"])
        first, _, last = row["patches"].partition("-")
        if first.isdecimal() and int(first) != expected:
            what = "does not count on"
            yield Fault(file, row.line, "patches", what, row["patches"], str(expected))
        end = last or first
        # Go on from what is there: one gap is one fault.
        expected = (int(end) if end.isdecimal() else expected) + 1
        for column in ("claimed_high_cycles", "claimed_text", "per"):
            if row["claimed_low_cycles"] and not row[column]:
                what = "nothing beside a claimed number"
                yield Fault(file, row.line, column, what, "nothing", "a value")


def one_draw_each(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that a row has a condition or a probability of its own, not both."""
    for row in rows:
        if row["condition"] and row["probability"]:
            what = "together with a condition"
            yield Fault(file, row.line, "probability", what, row["probability"], "nothing")


def handler_exists(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that the handler of a row is in the table of its L1 and variant."""
    for row in rows:
        declared = names.get(handlers_of(row["l1"], row["variant"]), frozenset())
        if row["l1"] in names.get("L1", ()) and row["handler"] not in declared:
            allowed = f"one of {len(declared)} of {row['l1']} {row['variant']}".rstrip()
            yield Fault(file, row.line, "handler", "unknown handler", row["handler"], allowed)


def handlers_of(l1: str, variant: str) -> str:
    """Return the kind of name that handlers of an L1 in a variant are."""
    return f"handler of {l1} {variant}".rstrip()


def l1_is_file_name(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that handlers of an L1 are in the file of its name."""
    name = file.rpartition("/")[2].removesuffix(".csv")
    for row in rows:
        if row["l1"] != name:
            yield Fault(file, row.line, "l1", "not the file's name", row["l1"], name)


def fields_where_needed(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that VMREAD and VMWRITE have fields and other instructions none."""
    for row in rows:
        if (row["op"] in ("VMREAD", "VMWRITE")) != bool(row["fields"]):
            allowed = "fields for VMREAD and VMWRITE, nothing for the others"
            yield Fault(file, row.line, "fields", f"with {row['op']}", row["fields"], allowed)


def encoding_agrees(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that width and group say what the encoding's bits say."""
    for row in rows:
        if not re.fullmatch(r"0x[0-9a-f]{4}", row["encoding"]):
            continue
        encoding = int(row["encoding"], 16)
        for column, expected in (
            ("width", _WIDTH[encoding >> 13 & 3]),
            ("group", _GROUP[encoding >> 10 & 3]),
        ):
            if row[column] != expected:
                what = f"disagrees with encoding {row['encoding']}"
                yield Fault(file, row.line, column, what, row[column], expected)


def shadow_sets(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that shadow sets are as large as in KVM, and that no member is rare."""
    for column, counts in SHADOW_COUNTS.items():
        for kind, expected in zip(("rw", "ro"), counts, strict=True):
            found = sum(row[column] == kind for row in rows)
            if found != expected:
                what = f"number of {kind} members"
                yield Fault(file, None, column, what, str(found), str(expected))
        for row in rows:
            # Were it both, L1 would read a stale value without an exit.
            if row[column] in ("rw", "ro") and row["rare"] == "true":
                yield Fault(file, row.line, column, "rare field is shadowed", row[column], "none")
            if row[column] in ("rw", "ro") and row["in_vmcs12"] == "false":
                what = "shadowed field is not in vmcs12"
                yield Fault(file, row.line, column, what, row[column], "none")


def rare_set(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check that the rare set is that of the patch: 36 fields in six classes, in reading order."""
    for description, (pattern, expected) in RARE_CLASSES.items():
        members = [row for row in rows if re.fullmatch(pattern, row["name"])]
        for row in members:
            if row["rare"] != "true":
                yield Fault(file, row.line, "rare", f"one of {description}", row["rare"], "true")
        if len(members) != expected:
            what = f"catalogue lacks fields of the rare class: {description}"
            yield Fault(file, None, "name", what, str(len(members)), str(expected))
    rare = [row for row in rows if row["rare"] == "true"]
    for row in rare:
        if not any(re.fullmatch(pattern, row["name"]) for pattern, _ in RARE_CLASSES.values()):
            yield Fault(
                file, row.line, "rare", "not among the 36 fields of the patch", "true", "false"
            )
    for row in rows:
        if (row["rare"] == "true") != bool(row["rare_order"]):
            what, allowed = "disagrees with rare", "a place for a rare field, else nothing"
            yield Fault(file, row.line, "rare_order", what, row["rare_order"] or "nothing", allowed)
        if row["rare_order"].isdecimal() and int(row["rare_order"]) > len(rare):
            yield Fault(file, row.line, "rare_order", "leaves a gap", row["rare_order"])


def derived_columns(file: str, rows: Sequence[Row], names: Names) -> Iterator[Fault]:
    """Check the columns that follow from others."""
    for row in rows:
        rare, in_vmcs12 = row["rare"], row["in_vmcs12"] == "true"
        not_rw = _flag(row["shadow_v53"] != "rw")
        follows: list[tuple[str, str]] = [
            ("in_vmcs12", _flag(bool(row["vmcs12_member"]))),
            ("l1_vmread_traps_v53", _flag(row["shadow_v53"] == "none") if in_vmcs12 else ""),
            ("l1_vmwrite_traps_v53", not_rw if in_vmcs12 else ""),
            ("l1_vmwrite_dirties_vmcs12_v53", not_rw if in_vmcs12 else ""),
            ("l1_vmread_triggers_rare_sync", rare if in_vmcs12 else ""),
            ("l1_vmwrite_triggers_rare_sync", not_rw if in_vmcs12 else ""),
        ]
        if rare == "true":
            follows += [("synced_at_exit_before", "true"), ("synced_at_exit_after", "false")]
            follows += [("synced_at_exit_v53_final", "false")]
        for column, expected in follows:
            if column in row.cells and row[column] != expected:
                what = "disagrees with the columns that it follows from"
                yield Fault(file, row.line, column, what, row[column], expected or "nothing")
        for column, filled in (
            ("vmcs12_offset", in_vmcs12),
            ("vmcs02_write_at_entry_v53", in_vmcs12),
            ("condition", row["synced_at_exit_before"] == "true"),
            ("n_vmread_x86_64", row["synced_at_exit_before"] == "true"),
        ):
            if column in row.cells and bool(row[column]) != filled:
                allowed = "a value" if filled else "nothing"
                what = "disagrees with the columns that it follows from"
                yield Fault(file, row.line, column, what, row[column] or "nothing", allowed)


def _flag(value: bool) -> str:
    return "true" if value else "false"
