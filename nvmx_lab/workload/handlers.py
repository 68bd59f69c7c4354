"""L1's handlers: what an L1 hypervisor does between an L2 exit and its VM-entry.

Two kinds of table in ``data/l1_handlers`` say it:

* *rules*, read from the source of a hypervisor (KVM 5.3, Xen 4.23, VirtualBox 6.1, Hyper-V): the
  operations of a handler in order, some under a condition (``data/l1_conditions.toml``);
* *logs*, counted in executed runs (KVM 6.1, Xen 4.17): the distinct sequences and how often each
  occurred, made by `derive_from_executed`.

`words` turns either into words with probabilities. Whether L0 sees an operation (a field traps or
is shadowed) is not decided here but by the model of L0.
"""

from __future__ import annotations

import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.ops import Kind, Operation, parse
from nvmx_lab.workload.streams import Word, check_word

if TYPE_CHECKING:
    import pandas as pd

MAX_UNCERTAIN: Final = 10
"""Most independent uncertain conditions in one handler: up to 2**10 words."""

BASES: Final = ("published-code", "published", "executed", "assumed")

_RULE_COLUMNS: Final = (
    "l1",
    "handler",
    "seq",
    "op",
    "arg",
    "condition",
    "probability",
    "stage",
    "source_function",
    "basis",
    "source",
)
LOG_COLUMNS: Final = ("l1", "variant", "handler", "weight", "operations", "source")
INSTRUCTION_COLUMNS: Final = (
    "l1",
    "variant",
    "handler",
    "exit_reason",
    "instructions",
    "basis",
    "source",
)

# Executed run -> (L1, variant, whether the phases of the micro-guest name the handlers).
# Without phases (a booting Linux) the exit reason does. The eager run is not here: L1 does the
# same in it as in kvm61_lazy_shadow.
_RUNS: Final[Mapping[str, tuple[str, str, bool]]] = {
    "kvm61_lazy_shadow": ("kvm-6.1", "kstack", True),
    "kvm61_lazy_shadow_nokstack": ("kvm-6.1", "nokstack", True),
    "kvm61_lazy_shadow_16_32bit": ("kvm-6.1", "nokstack-16-32bit", True),
    "kvm61_lazy_linux_l2": ("kvm-6.1", "linux-kstack", False),
    "kvm61_lazy_two_l2_vcpus": ("kvm-6.1", "two-l2-nokstack", False),
    "kvm61_lazy_evmcs": ("kvm-6.1", "evmcs-nokstack", True),
    "kvm61_lazy_xen_l1": ("xen-4.17", "linux-pvh", False),
}


@dataclass(frozen=True)
class Condition:
    """What a row of a handler may depend on, as ``data/l1_conditions.toml`` declares it.

    Attributes
    ----------
    id, meaning : str
    probability : float
        Default; a mix may override it.
    basis, source : str
    low, high : float
        Range worth sweeping.
    requires, excludes : str
        Another condition that must hold, or must not; "" for none.
    """

    id: str
    meaning: str
    probability: float
    basis: str
    source: str
    low: float
    high: float
    requires: str = ""
    excludes: str = ""


@dataclass(frozen=True)
class Row:
    """One operation of a handler, and when it happens.

    Attributes
    ----------
    operation : Operation
    condition : str
        Id of the condition; "" where it always happens or has its own `probability`.
    probability : float
        1 unless the row is a draw of its own.
    entry : bool
        Belongs to the VM-entry: what is inserted (an event) goes before it.
    """

    operation: Operation
    condition: str = ""
    probability: float = 1.0
    entry: bool = False


@dataclass(frozen=True)
class Handler:
    """What L1 does about one kind of exit, or an event that joins a handler.

    Attributes
    ----------
    l1, name : str
    rows : tuple of Row
        A handler by rules: from its EXIT to its VMRESUME; an event has no EXIT.
    sequences : tuple of (tuple of Operation, float)
        A handler by log: the distinct round trips and their weights.
    """

    l1: str
    name: str
    rows: tuple[Row, ...] = ()
    sequences: tuple[tuple[tuple[Operation, ...], float], ...] = ()

    @property
    def is_event(self) -> bool:
        """Whether it only joins another handler (``"pio_user + get_sregs"``)."""
        return bool(self.rows) and self.rows[0].operation.kind is not Kind.EXIT

    def conditions(self) -> frozenset[str]:
        """Return the conditions that the rows depend on, directly or through another."""
        found = {row.condition for row in self.rows} - {""}
        waiting = list(found)
        while waiting:
            condition = conditions()[waiting.pop()]
            parents = {condition.requires, condition.excludes} - {""} - found
            found |= parents
            waiting += parents
        return frozenset(found)


@cache
def conditions() -> Mapping[str, Condition]:
    """Return the conditions by id."""
    return load_conditions(data.path("l1_conditions.toml"))


def load_conditions(file: Path) -> Mapping[str, Condition]:
    """Read a table of conditions.

    Raises
    ------
    LabError
        If it is no TOML, or a key, a probability, a basis or a named condition is not valid.
    """
    raw = read_toml(file)
    allowed = {f.name for f in fields(Condition)} - {"id"}
    found: dict[str, Condition] = {}
    for name, entry in raw.items():
        where = f"{file}: [{name}]"
        if not isinstance(entry, dict):
            raise LabError("a condition is a table", where=where, got=entry)
        for key in entry:
            if key not in allowed:
                raise unknown("key", key, allowed, where=where)
        for key in ("meaning", "probability", "basis", "source"):
            if key not in entry:
                raise LabError(f"{key} is missing", where=where)
        for key in ("meaning", "source", "basis", "requires", "excludes"):
            if not isinstance(entry.get(key, ""), str):
                raise LabError(f"{key} must be text", where=where, got=entry[key])
        if entry["basis"] not in BASES:
            raise unknown("basis", entry["basis"], BASES, where=where)
        numbers = {}
        for key in ("probability", "low", "high"):
            value = entry.get(key, entry["probability"])
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value <= 1
            ):
                raise LabError(f"{key} is no probability", where=where, got=value, allowed="0 to 1")
            numbers[key] = float(value)
        if not numbers["low"] <= numbers["probability"] <= numbers["high"]:
            raise LabError("probability outside its own range", where=where, got=numbers)
        found[name] = Condition(
            id=name,
            meaning=entry["meaning"],
            basis=entry["basis"],
            source=entry["source"],
            requires=entry.get("requires", ""),
            excludes=entry.get("excludes", ""),
            **numbers,
        )
    for name, condition in found.items():
        for parent in (condition.requires, condition.excludes):
            if parent and parent not in found:
                raise unknown("condition", parent, found, where=f"{file}: [{name}]")
    return MappingProxyType(found)


def l1_names() -> tuple[str, ...]:
    """Return the names of the L1 hypervisors that have a table of handlers."""
    return tuple(sorted(file.stem for file in data.path("l1_handlers").glob("*.csv")))


def load(l1: str, variant: str = "") -> Mapping[str, Handler]:
    """Return the handlers of an L1 hypervisor by name.

    Parameters
    ----------
    l1 : str
        ``"kvm-5.3"``; one of `l1_names`.
    variant : str
        How L1 and L2 were set up, for handlers from logs: ``"kstack"``, ``"nokstack"``, ...

    Raises
    ------
    LabError
        If there is no such L1 or variant, or a row of the table is not valid.
    """
    if l1 not in l1_names():
        raise unknown("L1 hypervisor", l1, l1_names())
    variants = load_table(data.path("l1_handlers", f"{l1}.csv"))
    if variant not in variants:
        raise unknown("variant", variant, variants, where=f"handlers of {l1}")
    return variants[variant]


@cache
def load_table(file: Path) -> Mapping[str, Mapping[str, Handler]]:
    """Read a table of handlers: variant (``""`` for rules) -> handler name -> handler."""
    rows = data.read_rows(file)
    if not rows:
        raise LabError("the table is empty", where=file)
    columns = list(rows[0])
    if columns == list(LOG_COLUMNS):
        return _read_log(file, rows)
    if columns == list(_RULE_COLUMNS):
        return _read_rules(file, rows)
    raise LabError(
        "not a table of handlers",
        where=file,
        got=",".join(columns),
        allowed=f"{','.join(_RULE_COLUMNS)} or {','.join(LOG_COLUMNS)}",
    )


def _read_rules(
    file: Path, table: Sequence[Mapping[str, str]]
) -> Mapping[str, Mapping[str, Handler]]:
    """Read handlers written as rows with conditions."""
    found: dict[str, list[Row]] = {}
    for number, cells in enumerate(table, start=2):
        where = f"{file}:{number}"
        operation = _operation(f"{cells['op']} {cells['arg']}", where)
        if cells["condition"] and cells["condition"] not in conditions():
            raise unknown("condition", cells["condition"], conditions(), where=where)
        if cells["basis"] not in BASES:
            raise unknown("basis", cells["basis"], BASES, where=where)
        if cells["stage"] not in ("exit", "entry"):
            raise unknown("stage", cells["stage"], ("exit", "entry"), where=where)
        if not cells["source"]:
            raise LabError("a row needs a source", where=where)
        rows = found.setdefault(cells["handler"], [])
        if cells["seq"] != str(len(rows)):
            raise LabError(
                "rows of a handler are numbered from 0",
                where=where,
                got=cells["seq"],
                allowed=str(len(rows)),
            )
        probability = _number(cells["probability"] or "1", where, "probability", high=1.0)
        if probability != 1 and cells["condition"]:
            raise LabError("a row has a condition or a probability, not both", where=where)
        rows.append(Row(operation, cells["condition"], probability, cells["stage"] == "entry"))
    l1 = table[0]["l1"]
    handlers = {name: Handler(l1, name, rows=tuple(rows)) for name, rows in found.items()}
    for handler in handlers.values():
        if not handler.is_event:
            check_word(
                [row.operation for row in handler.rows], where=f"{file}, handler {handler.name}"
            )
    return MappingProxyType({"": MappingProxyType(handlers)})


def _read_log(
    file: Path, table: Sequence[Mapping[str, str]]
) -> Mapping[str, Mapping[str, Handler]]:
    """Read handlers written as weighted sequences."""
    found: dict[str, dict[str, list[tuple[tuple[Operation, ...], float]]]] = {}
    for number, cells in enumerate(table, start=2):
        where = f"{file}:{number}"
        operations = tuple(_operation(text, where) for text in cells["operations"].split(";"))
        check_word(operations, where=where)
        weight = _number(cells["weight"], where, "weight")
        if not cells["source"]:
            raise LabError("a row needs a source", where=where)
        by_name = found.setdefault(cells["variant"], {})
        by_name.setdefault(cells["handler"], []).append((operations, weight))
    l1 = table[0]["l1"]
    return MappingProxyType(
        {
            variant: MappingProxyType(
                {name: Handler(l1, name, sequences=tuple(s)) for name, s in by_name.items()}
            )
            for variant, by_name in found.items()
        }
    )


def words(
    l1: str,
    name: str,
    *,
    variant: str = "",
    probabilities: Mapping[str, float] | None = None,
    without: Sequence[Operation] = (),
) -> list[Word]:
    """Return the words of one handler; their probabilities sum to 1.

    Parameters
    ----------
    l1, variant : str
        As in `load`.
    name : str
        A handler, with the events that join it: ``"pio_user + get_sregs"``.
    probabilities : mapping of condition id to float, optional
        Overrides of the defaults.
    without : sequence of Operation
        Operations to leave out, wherever they occur.

    Raises
    ------
    LabError
        If a handler or condition is unknown, or more than `MAX_UNCERTAIN` conditions of the
        handler are uncertain at once.
    """
    handlers, names = load(l1, variant), split_name(name)
    for part in names:
        if part not in handlers:
            raise unknown("handler", part, handlers, where=f"L1 {l1} {variant}".rstrip())
    where = f"L1 {l1}, handler {name}"
    chance = {key: condition.probability for key, condition in conditions().items()}
    for key, value in (probabilities or {}).items():
        if key not in chance:
            raise unknown("condition", key, chance, where=where)
        chance[key] = value
    first, *events = (handlers[part] for part in names)
    if first.is_event:
        raise LabError("an event needs a handler to join", where=where, mend="'handler + event'")
    if not all(event.is_event for event in events):
        raise LabError("only events can join a handler", where=where)
    if first.sequences:
        if events:
            raise LabError("a handler from a log takes no events", where=where)
        total = sum(weight for _, weight in first.sequences)
        drawn = [(operations, weight / total) for operations, weight in first.sequences]
    else:
        drawn = list(_enumerate(_join(first, events), chance, where))
    merged: dict[tuple[Operation, ...], float] = defaultdict(float)
    for operations, probability in drawn:
        merged[tuple(op for op in operations if op not in without)] += probability
    return [
        Word(ops, probability, name, sum(_instructions(l1, variant, part, ops) for part in names))
        for ops, probability in merged.items()
    ]


def split_name(name: str) -> list[str]:
    """Split ``"pio_user + get_sregs"`` into the handler and its events."""
    return [part.strip() for part in name.split("+")]


def _join(handler: Handler, events: Sequence[Handler]) -> list[Row]:
    """Insert events before the handler's entry; an event's own entry replaces the handler's."""
    rows = list(handler.rows)
    for event in events:
        entry = [row for row in event.rows if row.operation.kind is Kind.VMLAUNCH]
        at = next(number for number, row in enumerate(rows) if row.entry)
        rows[at:at] = [row for row in event.rows if row not in entry]
        rows[-1:] = entry or rows[-1:]
    return rows


def _enumerate(
    rows: Sequence[Row], chance: Mapping[str, float], where: str
) -> Iterator[tuple[tuple[Operation, ...], float]]:
    """Yield every sequence that the draws of the conditions can give, with its probability."""
    draws: dict[str, float] = {}  # in an order that has what a condition depends on before it

    def declare(name: str) -> None:
        condition = conditions()[name]
        for parent in (condition.requires, condition.excludes):
            if parent:
                declare(parent)
        draws.setdefault(name, chance[name])

    keys = []
    for number, row in enumerate(rows):
        if row.condition:
            declare(row.condition)
        elif row.probability < 1:
            draws[f"row {number}"] = row.probability
        keys.append(row.condition or (f"row {number}" if row.probability < 1 else ""))
    uncertain = [name for name, probability in draws.items() if 0 < probability < 1]
    if len(uncertain) > MAX_UNCERTAIN:
        raise LabError(
            "too many uncertain conditions",
            where=where,
            got=", ".join(uncertain),
            allowed=f"{MAX_UNCERTAIN}",
            mend="set some of them to 0 or 1 under [conditions]",
        )
    worlds: list[tuple[dict[str, bool], float]] = [({"": True}, 1.0)]
    for name, probability in draws.items():
        declared = conditions().get(name)
        following: list[tuple[dict[str, bool], float]] = []
        for holds, share in worlds:
            possible = declared is None or (
                holds.get(declared.requires, True)
                and not holds.get(declared.excludes or "-", False)
            )
            true = probability if possible else 0.0
            if true > 0:
                following.append(({**holds, name: True}, share * true))
            if true < 1:
                following.append(({**holds, name: False}, share * (1 - true)))
        worlds = following
    for holds, share in worlds:
        taken = (row.operation for row, key in zip(rows, keys, strict=True) if holds[key])
        yield tuple(taken), share


@cache
def _instruction_table() -> Mapping[tuple[str, str, str, str], float]:
    """Return (l1, variant, handler, exit reason) -> instructions that L1 retires."""
    file = data.path("l1_instructions.csv")
    found = {}
    for number, row in enumerate(data.read_rows(file), start=2):
        where = f"{file}:{number}"
        if list(row) != list(INSTRUCTION_COLUMNS):
            raise LabError("not the columns expected", where=where, got=",".join(row))
        if row["basis"] not in BASES:
            raise unknown("basis", row["basis"], BASES, where=where)
        key = (row["l1"], row["variant"], row["handler"], row["exit_reason"])
        found[key] = _number(row["instructions"], where, "instructions")
    return found


def _instructions(l1: str, variant: str, name: str, ops: Sequence[Operation]) -> float:
    """Return what L1 retires for a handler or event; NaN if the table has no number."""
    table = _instruction_table()
    for reason in (ops[0].arg, ""):  # an event has the same number whatever it joins
        if (l1, variant, name, reason) in table:
            return table[l1, variant, name, reason]
    return float("nan")


def derive_from_executed(run_dir: Path) -> list[dict[str, str]]:
    """Count the distinct round trips of the executed runs, by handler.

    The noise of the host's timer is taken out: an EXTERNAL_INTERRUPT exit of L1, and the WRMSR
    (the end of that interrupt) right after it. Their rate says nothing: the emulator that ran
    this counts instructions, not time. Round trips outside any phase of a micro-guest (between
    two modes) are left out, and so is a last one that the log cuts off.

    Parameters
    ----------
    run_dir : Path
        Folder with ``RUN.exits.parquet`` and ``RUN.l1_ops.parquet`` of each run.

    Returns
    -------
    list of dict
        Rows with `LOG_COLUMNS`, most frequent first within a handler.
    """
    rows: list[dict[str, str]] = []
    for run, (l1, variant, phases) in _RUNS.items():
        frame = _round_trips(run_dir, run, phases)
        counted: dict[str, Counter[str]] = {}
        for handler, operations in zip(frame["handler"], frame["operations"], strict=True):
            counted.setdefault(handler, Counter())[operations] += 1
        rows += [
            {
                "l1": l1,
                "variant": variant,
                "handler": handler,
                "weight": str(count),
                "operations": operations,
                "source": f"executed run {run}",
            }
            for handler, counts in counted.items()
            for operations, count in counts.most_common()
        ]
    return rows


def derive_instructions(run_dir: Path) -> list[dict[str, str]]:
    """Measure the instructions that L1 retires per round trip in the executed runs.

    The median over the round trips of a handler and exit reason; those that an interrupt of L1
    prolonged are left out where others remain. VMX instructions of L1 are included.

    Parameters
    ----------
    run_dir : Path
        Folder with ``RUN.segments.parquet`` of each run besides the files of
        `derive_from_executed`.

    Returns
    -------
    list of dict
        Rows with `INSTRUCTION_COLUMNS`.
    """
    rows: list[dict[str, str]] = []
    for run, (l1, variant, phases) in _RUNS.items():
        frame = _round_trips(run_dir, run, phases)
        segments = _parquet(run_dir / f"{run}.segments.parquet")
        retired = segments[segments["level"] == "L1"].groupby("exit")["instructions"].sum()
        frame = frame.assign(instructions=retired.reindex(frame.index, fill_value=0))
        for (handler, reason), group in frame.groupby(["handler", "reason"], sort=False):
            quiet = group[~group["noisy"]]
            chosen = quiet if len(quiet) else group
            rows.append(
                {
                    "l1": l1,
                    "variant": variant,
                    "handler": str(handler),
                    "exit_reason": str(reason),
                    "instructions": f"{chosen['instructions'].median():g}",
                    "basis": "executed",
                    "source": f"executed run {run}: median of {len(chosen)} round trips",
                }
            )
    return rows


def _round_trips(run_dir: Path, run: str, phases: bool) -> pd.DataFrame:
    """Return one row per exit of a run: handler, reason, operations (text), noisy."""
    exits = _parquet(run_dir / f"{run}.exits.parquet").set_index("exit").sort_index()
    ops = _parquet(run_dir / f"{run}.l1_ops.parquet").sort_values(["exit", "seq"])
    ops["op"] = ops["op"].astype(str)
    interrupt = ops["op"] == "EXTERNAL_INTERRUPT"
    after = interrupt.groupby(ops["exit"]).shift(1, fill_value=False)
    noise = interrupt | ((ops["op"] == "WRMSR") & after)
    noisy = set(ops.loc[noise, "exit"])
    ops = ops[~noise]
    ops = ops.assign(text=[_logged(*pair) for pair in zip(ops["op"], ops["field"], strict=True)])
    text = ops.groupby("exit")["text"].agg("; ".join)
    text = text.reindex(exits.index, fill_value="")
    reason = exits["l2_exit_reason"].astype(str)
    # The log has the hardware's reason. L1 reads VM_EXIT_INTR_INFO of an interrupt that is its own;
    # when it does not, L0's timer stood in for the VMX-preemption timer of L1 (an enlightened VMCS
    # logs no reads and leaves the two together).
    timer = (reason == "EXTERNAL_INTERRUPT") & text.str.contains("VMREAD")
    timer &= ~text.str.contains("VMREAD VM_EXIT_INTR_INFO")
    reason = reason.mask(timer, "PREEMPTION_TIMER")
    frame = exits.assign(
        reason=reason,
        handler=exits["phase"].astype(str) if phases else reason.str.lower(),
        operations="EXIT " + reason + "; " + text,
        noisy=exits.index.isin(list(noisy)),
    )
    whole = frame["operations"].str.endswith(("VMRESUME", "VMLAUNCH"))
    return frame.loc[whole & (frame["handler"] != ""), ["handler", "reason", "operations", "noisy"]]


def _logged(op: str, encoding: int) -> str:
    """Return an operation's text from a log, which has no operands of VMPTRLD and VMCLEAR."""
    if op in ("VMREAD", "VMWRITE"):
        return f"{op} {vmcs.field(int(encoding)).name}"  # the log's own name may be empty
    if op in ("VMRESUME", "VMLAUNCH"):
        return op
    # KVM as L1 loads a VMCS only when it is not current, and in these runs it clears one only
    # to set up a new vCPU: both name another VMCS than the current one.
    return f"{op} other" if op in ("VMPTRLD", "VMCLEAR") else f"L1_EXIT {op}"


def _parquet(file: Path) -> pd.DataFrame:
    """Read a Parquet file of an executed run."""
    import pandas as pd

    try:
        return pd.read_parquet(file)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise LabError(f"cannot be read as Parquet: {error}", where=file) from error


def read_toml(file: Path) -> dict[str, object]:
    """Read a TOML file; LabError if it cannot be read or is malformed."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise LabError(f"not UTF-8 at byte {error.start}", where=file) from error
    except OSError as error:
        raise LabError(f"cannot be read: {error.strerror or error}", where=file) from error
    except tomllib.TOMLDecodeError as error:
        raise LabError(f"malformed TOML: {error}", where=file) from error


def _operation(text: str, where: str) -> Operation:
    """Parse an operation of a table, and look its field up."""
    try:
        operation = parse(text)
        if operation.kind in (Kind.VMREAD, Kind.VMWRITE):
            vmcs.field(operation.arg)
    except LabError as error:
        raise LabError(error.what, where=where, got=error.got or text, mend=error.mend) from error
    return operation


def _number(text: str, where: str, column: str, high: float = 1e12) -> float:
    """Read a number that is not negative."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= high:  # NaN as well
        raise LabError(
            f"{column} is no number in range", where=where, got=text, allowed=f"0..{high:g}"
        )
    return value
