"""A replay as a sequence diagram: rows for a plot, and the same in text."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import wrap
from typing import Final, NamedTuple

from nvmx_lab import vmcs
from nvmx_lab.nested.architecture import Fail
from nvmx_lab.nested.model import Nvmx, VmFail
from nvmx_lab.nested.replay import Moment, Replay
from nvmx_lab.nested.steps import POINTERS, said
from nvmx_lab.nested.story import headline, value_name

LANES: Final = ("user space", "L2", "L1", "L0")
CELLS: Final[Mapping[str, str]] = {
    "vmcs02": "vmcs02",
    "vmcs12": "vmcs12",
    "shadow": "shadow",
    "evmcs": "evmcs",
    "A": "A",
    "B": "B",
    "smram": "SMRAM",
}
"""Cell of L0 -> its column; A and B are L1's VMCS regions in memory."""

TRUE, OLD, EMPTY, UNDEFINED = "true", "stale", "empty", "undefined"
"""What a cell holds: the true value, another one, none since it was cleared; or nobody asks."""

_WIDEST: Final = 110
_MARGIN: Final = 6
_LANE: Final = 5


class _Arrow(NamedTuple):
    """From one lane to another, or an event in one."""

    actor: str
    target: str
    label: str


def rows(replay: Replay) -> list[dict[str, object]]:
    """Return a replay as a tidy table: one row for each arrow and event.

    Returns
    -------
    list of dict
        step (from 1), actor, target (lanes), label, one column for each cell that matters
        (`CELLS`: ``"true"``, ``"stale"``, ``"empty"``, ``"undefined"``, after the step), flag
        (need_sync_vmcs02_to_vmcs12_rare), dirty (dirty_vmcs12), wrong (this is where it shows),
        and the same in each row: field, finding.
    """
    cells = _cells(replay)
    finding = headline(replay)
    table: list[dict[str, object]] = []
    before: Moment | None = None
    for number, moment in enumerate(replay.moments, 1):
        arrows = _arrows(replay, before, moment)
        for count, arrow in enumerate(arrows, 1):
            table.append(
                {
                    "step": number,
                    **arrow._asdict(),
                    **{CELLS[cell]: _state(replay, moment, cell) for cell in cells},
                    "flag": moment.control.need_sync_vmcs02_to_vmcs12_rare,
                    "dirty": moment.control.dirty_vmcs12,
                    "wrong": moment.wrong and count == len(arrows),
                    "field": replay.field,
                    "finding": finding,
                }
            )
        before = moment
    return table


def diagram(replay: Replay) -> str:
    """Draw a replay in text: who acts on whom, and what each cell of L0 holds after each step.

    Returns
    -------
    str
        At most 110 columns.
    """
    table = rows(replay)
    cells = [CELLS[cell] for cell in _cells(replay)]
    columns = {**{cell: max(len(cell), len(OLD)) + 2 for cell in cells}, "flag": 6, "dirty": 7}
    room = _WIDEST - _MARGIN - _LANE * len(LANES) - sum(columns.values())
    wide = min(room, max((len(str(row["label"])) for row in table), default=0))
    heads = "".join(lane.split()[0].ljust(_LANE) for lane in LANES)
    tail = "".join(f"  {name}".ljust(width) for name, width in columns.items())
    lines = [headline(replay), f"{'':{_MARGIN}}{heads}{'':{wide}}{tail}"]
    last: object = None
    for row, following in zip(table, [*table[1:], None], strict=True):
        start = f"{row['step']:4}" if row["step"] != last else "wrong" if row["wrong"] else ""
        done = following is None or following["step"] != row["step"]
        first, *more = wrap(str(row["label"]), wide)
        states = "".join(f"  {_said(row[name])}".ljust(width) for name, width in columns.items())
        lines.append(f"{start:{_MARGIN}}{_drawn(row)}{first:{wide}}{states if done else ''}")
        lines += [f"{'':{_MARGIN}}{_lifelines()}{text}" for text in more]
        last = row["step"]
    lines.append(
        "After each step: stale, not the true value; empty, nothing written since it was cleared;\n"
        "-, not looked at before it is overwritten (a cell), or clear (flag, dirty).\n"
        "flag: need_sync_vmcs02_to_vmcs12_rare; dirty: dirty_vmcs12."
    )
    return "\n".join(line.rstrip() for line in lines)


def _said(state: object) -> str:
    if isinstance(state, bool):
        return "set" if state else "-"
    return "-" if state == UNDEFINED else str(state)


def _lifelines() -> str:
    return "".join("│".ljust(_LANE) for _ in LANES)


def _drawn(row: Mapping[str, object]) -> str:
    """Draw one arrow between the lifelines."""
    line = list(_lifelines())
    start, end = (_LANE * LANES.index(str(row[end])) for end in ("actor", "target"))
    if start == end:
        line[start] = "*"
        return "".join(line)
    low, high = sorted((start, end))
    line[low + 1 : high] = "─" * (high - low - 1)
    line[end - 1 if end > start else end + 1] = ">" if end > start else "<"
    return "".join(line)


def _cells(replay: Replay) -> list[str]:
    """Return the cells in which the field's value can matter here."""
    config = replay.config
    l0 = Nvmx(config)
    words = {moment.step.word for moment in replay.moments}
    arguments = {moment.step.arg for moment in replay.moments}
    memory = "B" in arguments or words & {"VMXOFF", "VMCLEAR"}
    wanted = {
        "vmcs02": True,
        "vmcs12": True,
        "shadow": config.shadow_vmcs and replay.field in l0.shadow_rw + l0.shadow_ro,
        "evmcs": config.evmcs,
        "A": memory and "A" in arguments | {m.standing.current for m in replay.moments},
        "B": memory and "B" in arguments,
        "smram": "SMI" in words and replay.field in vmcs.saved_in_smram(),
    }
    return [
        cell
        for cell in CELLS
        if wanted[cell] and any(_state(replay, m, cell) != UNDEFINED for m in replay.moments)
    ]


def _state(replay: Replay, moment: Moment, cell: str) -> str:
    value, true = moment.l0[cell], replay.true(moment)
    if cell in POINTERS:
        # While a VMCS is current, memory is out of date, and may be.
        true = None if moment.standing.current == cell else moment.truth[cell]
    elif cell == "smram":
        true = moment.truth[cell] if moment.standing.smm else None
    if true is not None and value == true:
        return TRUE
    if value == 0:
        return EMPTY
    return UNDEFINED if true is None else OLD


def _arrows(replay: Replay, before: Moment | None, moment: Moment) -> list[_Arrow]:
    arrows = _arrows_of_step(replay, before, moment)
    if moment.trace.pulls and vmcs.is_rare(replay.field):
        count = moment.trace.rare_vmreads
        what = "pull: one field" if count == 1 else f"pull: {count} fields"
        arrows.insert(1, _Arrow("L0", "L0", f"{what}, vmcs02 to vmcs12"))
    if moment.fault:  # what the step would have led to did not happen
        return [arrows[0], _Arrow("L0", "L0", moment.fault)]
    return arrows


def _arrows_of_step(replay: Replay, before: Moment | None, moment: Moment) -> list[_Arrow]:
    word, text = moment.step.word, str(moment.step)
    halted = before is not None and before.control.halted
    match word:
        case "VMREAD" | "EVMCS_READ" | "L2_READ":
            return _reading(replay, moment)
        case "L2_WRITE":
            return [_Arrow("L2", "L2", text)]
        case "EVMCS_WRITE":
            return [_Arrow("L1", "L1", text)]
        case "VMWRITE" if moment.trace.l1_vmwrites:
            return [_Arrow("L1", "L1", f"{text}, no exit")]
        case "VMLAUNCH" | "VMRESUME":
            return [_Arrow("L1", "L0", text), _entry(moment)]
        case "EXIT":
            out = "user space" if moment.standing.interrupted else "L1"
            return [
                _Arrow("L0" if halted else "L2", "L0", text),
                _Arrow("L0", out, "reflected to L1" if out == "L1" else "a signal: L1 waits"),
            ]
        case "RUN":
            return [_Arrow("user space", "L0", text), _Arrow("L0", "L1", "L1 runs")]
        case "L0_EXIT":
            return [_Arrow("L2", "L0", text), _Arrow("L0", "L2", "L2 goes on")]
        case "SMI":
            return [
                _Arrow("L0" if halted else "L2", "L0", text),
                _Arrow("L0", "L1", "the SMI handler runs"),
            ]
        case "RSM":
            return [_Arrow("L1", "L0", text), _Arrow("L0", "L2", "L2 goes on")]
        case "GET_NESTED_STATE":
            return [_Arrow("user space", "L0", text)]
        case "SET_NESTED_STATE" | "MIGRATE":
            runs = "L2" if moment.standing.in_l2 else "L1"
            where = ", on the target" if word == "MIGRATE" else ""
            return [
                _Arrow("user space", "L0", text),
                _Arrow("L0", runs, f"{runs} goes on{where}"),
            ]
    failed = isinstance(moment.seen, VmFail)
    answer = [_Arrow("L0", "L1", said(moment.seen))] if failed or moment.wrong else []
    return [_Arrow("L1", "L0", text), *(answer if not moment.fault else [])]


def _entry(moment: Moment) -> _Arrow:
    took = isinstance(moment.seen, int) and not isinstance(moment.expected, Fail)
    if isinstance(moment.seen, VmFail) or (moment.wrong and not took):
        return _Arrow("L0", "L1", said(moment.seen))
    if not moment.standing.in_l2:
        return _Arrow("L0", "L1", "exit of a failed entry")
    if moment.control.halted:
        return _Arrow("L0", "L0", "L2 is halted: it does not run")
    return _Arrow("L0", "L2", "L2 runs")


def _reading(replay: Replay, moment: Moment) -> list[_Arrow]:
    reader = "L2" if moment.step.word == "L2_READ" else "L1"
    text = str(moment.step)
    silent = moment.step.word != "VMREAD" or moment.trace.l1_vmreads
    if moment.trace.l1_vmreads:
        text += ", no exit"
    arrows = [_Arrow(reader, reader if silent else "L0", text)]
    if moment.fault:
        return arrows
    if isinstance(moment.seen, int):
        answer = f"{reader} sees {value_name(replay, moment.seen)}"
    elif isinstance(moment.seen, VmFail) or moment.wrong:
        answer = said(moment.seen)
    else:
        return arrows
    return [*arrows, _Arrow(reader if silent else "L0", reader, answer)]
