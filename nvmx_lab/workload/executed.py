"""Executed runs: real KVM, every VMX instruction logged, as streams and as counts to compare with.

A run is ``RUN.toml``, ``RUN.exits.parquet`` and ``RUN.l1_ops.parquet``; ``RUN.segments.parquet``
adds the retired instructions of each stretch. ``data/README.md`` describes the columns.

The log has instructions, not values. Where L0's next step depends on a value, the operations are
annotated from what L1 did; each rule is a function here and says what it infers from what.
"""

from __future__ import annotations

import itertools
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace
from nvmx_lab.nested.ops import Kind, Operation
from nvmx_lab.workload.streams import Stream, from_round_trips

if TYPE_CHECKING:
    import pandas as pd

EXITS_COLUMNS = (
    *("exit", "l2_exit_reason", "l0_vmread", "l0_vmwrite", "l0_vmptrld", "l0_vmclear"),
    "l0_rare_vmread",
)
L1_OPS_COLUMNS = ("exit", "seq", "op", "field")
SEGMENTS_COLUMNS = ("exit", "level", "handler", "instructions", "rare_vmread")

TEXT_COLUMNS = frozenset({"phase", "l2_exit_reason", "op", "level", "handler"})

NOT_A_PATH = ("HLT", "EPT_VIOLATION")
"""L1 exits whose stretch in L0 is no path of KVM: the idle wait of a halted vCPU, and allocation
and zeroing of memory on a page fault. Their lengths say how long L0 slept or how large a page
was."""

_LEGACY_PHASES = ("pm32", "real16")
_UART_BURST = 8

_ENTRIES = (Kind.VMRESUME, Kind.VMLAUNCH)
_FIRST_EXITS = 10
_UNKNOWN_AT_START: tuple[tuple[str, ...], ...] = tuple(
    sorted(
        itertools.chain.from_iterable(
            itertools.combinations(
                ("legacy", "efer_host", "x2apic", "tpr_shadow", "load_pat"), size
            )
            for size in range(6)
        ),
        # What a KVM or Xen L1 always sets up comes last.
        key=lambda names: (len({"tpr_shadow", "load_pat"} & set(names)), len(names)),
    )
)
"""Options that differ from the usual at the start of a log, the likeliest combinations first."""


@dataclass(frozen=True)
class ExecutedRun:
    """One run: L0's configuration, the operations as a stream, and what the log counted.

    Attributes
    ----------
    name : str
        Name of the run.
    config : Config
        L0 as ``RUN.toml`` says.
    stream : Stream
        One word per reflected exit.
    logged : DataFrame
        One row per exit: phase, vmread, vmwrite, vmptrld, vmclear, pulls, rare_vmread, and retired
        (L0's instructions except `NOT_A_PATH`; NaN without segments).
    not_compared : float
        Share of L0's retired instructions in `NOT_A_PATH` stretches (NaN without segments).
    initial_state : tuple of str
        Options of `config` that the log does not say and that its first exits decided.
    """

    name: str
    config: Config
    stream: Stream
    logged: pd.DataFrame
    not_compared: float
    initial_state: tuple[str, ...] = ()


def run_names(directory: Path | None = None) -> tuple[str, ...]:
    """Return the runs in a directory (default: those that the kit ships).

    Raises
    ------
    LabError
        If the directory does not exist or holds no run.
    """
    where = directory or data.path("executed")
    if not where.is_dir():
        raise LabError("no such directory of executed runs", where=where)
    names = tuple(
        sorted(p.name.removesuffix(".exits.parquet") for p in where.glob("*.exits.parquet"))
    )
    if not names:
        raise LabError(
            "no executed run here", where=where, allowed="RUN.exits.parquet and its like"
        )
    return names


def load(name: str, directory: Path | None = None) -> ExecutedRun:
    """Load a run.

    Parameters
    ----------
    name : str
        Name of the run, without ``.toml``.
    directory : Path, optional
        Where its files are (default: the shipped runs).

    Raises
    ------
    LabError
        If a file is missing or malformed.
    """
    where = directory or data.path("executed")
    known = run_names(where)
    if name not in known:
        raise unknown("executed run", name, known, where=where)
    settings = _settings(where / f"{name}.toml")
    exits = _parquet(where / f"{name}.exits.parquet", EXITS_COLUMNS).sort_values("exit")
    operations = _parquet(where / f"{name}.l1_ops.parquet", L1_OPS_COLUMNS)
    if "phase" not in exits:
        exits["phase"] = ""
    exits["phase"] = exits["phase"].astype(object).fillna("").astype(str)
    operations = operations.sort_values(["exit", "seq"])
    exits = _without_cut_end(exits, operations, where / f"{name}.l1_ops.parquet")
    guest_writes = operations[operations["op"] == "VMWRITE"]["name"]
    config = Config.of(
        settings["kvm"],
        settings["sync"],
        shadow_vmcs=settings["shadow_vmcs"],
        evmcs=settings["evmcs"],
        mpx=settings["mpx"],
        vid=bool((guest_writes == "GUEST_INTR_STATUS").any()),
    )
    toggles = not _is_kvm(operations)
    config, assumed = _initial_state(config, exits, operations, name, toggles=toggles)
    trips = _round_trips(exits, operations, config, name, toggles=toggles)
    segments = where / f"{name}.segments.parquet"
    retired, l1_retired, pulls, not_compared = _from_segments(segments, exits)
    stream = from_round_trips(
        trips, source=name, basis="executed", labels=exits["phase"], l1_instructions=l1_retired
    )
    logged = exits.rename(columns=lambda c: c.removeprefix("l0_")).reset_index(drop=True)
    logged["retired"] = retired
    logged["pulls"] = pulls if pulls is not None else _pulls_of(logged, config)
    return ExecutedRun(name, config, stream, logged, not_compared, assumed)


def _pulls_of(logged: pd.DataFrame, config: Config) -> Any:
    """Return the pulls of each exit where only the exit's totals are logged.

    An eager L0 or an enlightened VMCS runs the reader in the exit leg; that is no pull.
    """
    reader = len(vmcs.rare(mpx=config.mpx and "no-bndcfgs-read" not in config.kvm.features))
    runs = logged["rare_vmread"] // reader
    return runs * 0 if config.sync == "eager" or config.evmcs else runs


def _settings(file: Path) -> dict[str, Any]:
    try:
        got = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise LabError("cannot read the settings of a run", where=file, got=str(error)) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LabError("malformed TOML", where=file, got=str(error)) from None
    texts, flags = ("kvm", "sync"), ("shadow_vmcs", "evmcs", "mpx")
    for key, kind in [*((k, str) for k in texts), *((k, bool) for k in flags)]:
        if not isinstance(got.get(key), kind):
            raise LabError(f"needs {key}", where=file, got=got.get(key), allowed=kind.__name__)
    return got


def _parquet(file: Path, columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    try:
        frame = pd.read_parquet(file)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise LabError(
            "cannot read a log", where=file, got=f"{error}"[:120], mend="is the file whole?"
        ) from None
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise LabError("columns are missing", where=file, got=", ".join(missing))
    for column in columns:
        frame[column] = _checked(frame[column], file)
    if "exit" in columns and "l2_exit_reason" in columns and frame["exit"].duplicated().any():
        twice = int(frame.loc[frame["exit"].duplicated(), "exit"].iloc[0])
        raise LabError("two rows for one exit", where=f"{file}: column exit", got=twice)
    if "field" in columns:
        names = {-1: ""} | {f.encoding: f.name for f in vmcs.catalogue().values()}
        strangers = sorted(set(frame["field"]) - set(names))
        if strangers:
            raise LabError("unknown field encoding", where=file, got=hex(strangers[0]))
        frame["name"] = frame["field"].map(names)
    return frame


def _checked(values: pd.Series[Any], file: Path) -> pd.Series[Any]:
    """Return a column as text or as whole numbers, whatever type the file keeps them in."""
    import pandas as pd

    where = f"{file}: column {values.name}"
    if values.name in TEXT_COLUMNS:
        if values.isna().any() and values.name != "phase":
            raise LabError("a value is missing", where=where)
        return values.astype(object).fillna("").astype(str)
    try:
        numbers = pd.to_numeric(values)
    except (TypeError, ValueError):
        raise LabError("not a number", where=where, got=str(values.iloc[0])[:40]) from None
    if numbers.isna().any() or not (numbers == numbers.round()).all():
        raise LabError("not whole numbers, or some are missing", where=where)
    if values.name != "field" and (numbers < 0).any():
        raise LabError("a count is negative", where=where, got=int(numbers.min()))
    return numbers.astype("int64")


def _is_kvm(operations: pd.DataFrame) -> bool:
    """Return whether L1 is KVM: it reads VM_EXIT_REASON first after nearly every exit."""
    first = operations[operations["op"] == "VMREAD"].groupby("exit")["name"].first()
    return first.empty or bool((first == "VM_EXIT_REASON").mean() > 0.5)


def _without_cut_end(exits: pd.DataFrame, operations: pd.DataFrame, file: Path) -> pd.DataFrame:
    """Drop the last exit if the log ends before L1 resumed L2: its counts are not whole."""
    if exits.empty:
        raise LabError("no exit in the log", where=file)
    last = operations[operations["exit"] == exits["exit"].iloc[-1]]["op"]
    whole = last.isin(["VMRESUME", "VMLAUNCH"]).any()
    return exits if whole or len(exits) == 1 else exits.iloc[:-1]


def _initial_state(
    config: Config, exits: pd.DataFrame, operations: pd.DataFrame, run: str, *, toggles: bool
) -> tuple[Config, tuple[str, ...]]:
    """Find the state in which the log starts: it has no values, and L1's set-up came before it.

    The model replays the first exits from every combination of the options that matter, the usual
    one first, and the one whose VMREADs and VMWRITEs agree most often is taken.
    """
    head = exits.iloc[:_FIRST_EXITS]
    logged = list(zip(head["l0_vmread"], head["l0_vmwrite"], strict=True))
    before = operations[operations["exit"] <= head["exit"].iloc[-1]]
    best: tuple[Config, tuple[str, ...]] = (config, ())
    most = -1
    for changed in _UNKNOWN_AT_START:
        candidate = config.flipped(*changed)
        model = Nvmx(candidate)
        model.start()
        agreeing = 0
        for trip, counts in zip(
            _round_trips(head, before, candidate, run, toggles=toggles), logged, strict=True
        ):
            model.trace = Trace()
            for operation in trip:
                model.apply(operation)
            done = Counter(access.op for access in model.trace.accesses)
            agreeing += (done["VMREAD"], done["VMWRITE"]) == counts
        if agreeing > most:
            best, most = (candidate, changed), agreeing
        if agreeing >= 0.8 * len(logged):
            break
    return best


def _round_trips(
    exits: pd.DataFrame, operations: pd.DataFrame, config: Config, run: str, *, toggles: bool
) -> Iterator[tuple[Operation, ...]]:
    """Yield the operations of each reflected exit, annotated."""
    pairs = list(zip(operations["op"], operations["name"], strict=True))
    groups: dict[int, list[tuple[str, str]]] = {}
    for number, pair in zip(operations["exit"].tolist(), pairs, strict=True):
        groups.setdefault(number, []).append(pair)
    reasons, phases = list(exits["l2_exit_reason"]), list(exits["phase"])
    # What comes next, seen from each exit: the reason but for HLT, and the next phase with a name.
    upcoming, named = [""] * len(reasons), [""] * len(reasons)
    for i in range(len(reasons) - 2, -1, -1):
        upcoming[i] = reasons[i + 1] if reasons[i + 1] != "HLT" else upcoming[i + 1]
        named[i] = phases[i + 1] or named[i + 1]
    legacy, evmcs = config.legacy, config.evmcs
    for i, number in enumerate(exits["exit"]):
        ops = groups.get(number, [])
        body = _annotated(
            [*_l1_operations(ops), *_inferred_writes(reasons[i], upcoming[i], phases[i], evmcs)],
            evmcs,
        )
        modes = list(_mode_changes(reasons[i], ops, legacy, toggles=toggles))
        if evmcs and (phases[i] == "" or phases[i].endswith("_end")) and named[i]:
            wanted = named[i].startswith(_LEGACY_PHASES)
            if wanted != legacy:
                modes.append(Operation(Kind.L2_MODE, "legacy" if wanted else "long"))
        for mode in modes:
            if mode.arg in ("long", "legacy"):
                legacy = mode.arg == "legacy"
        trip = _with_one_entry(body, modes)
        if not any(op.kind in _ENTRIES for op in trip):
            raise LabError(
                "L1 neither resumes nor launches L2 after this exit",
                where=f"{run}, exit {number}",
                allowed="every exit but the last ends with VMRESUME or VMLAUNCH",
            )
        yield (Operation(Kind.EXIT, _reason(reasons[i], ops)), *trip)


def _with_one_entry(body: Sequence[Operation], modes: Sequence[Operation]) -> list[Operation]:
    """Put changes of mode before the entry that reached L2, the last; those before it failed."""
    entries = [i for i, op in enumerate(body) if op.kind in _ENTRIES]
    out = list(body)
    for i in entries[:-1]:
        out[i] = Operation(Kind.L1_EXIT, str(out[i].kind))
    if not entries:
        return [*out, *modes]
    last = out.pop(entries[-1])
    return [*out, *modes, last]


def _l1_operations(ops: Sequence[tuple[str, str]]) -> Iterator[Operation]:
    """Yield what L1 did.

    The log has no pointers: a VMCLEAR is of the current VMCS if L1 loads one afterwards without
    giving it its constant host state, which L1 does once for a new VMCS.
    """
    new = ("VMWRITE", "HOST_CS_SELECTOR") in ops
    for i, (op, name) in enumerate(ops):
        match op:
            case "VMREAD" | "VMWRITE":
                yield Operation(Kind(op), name)
            case "VMRESUME" | "VMLAUNCH" | "VMXON" | "VMXOFF":
                yield Operation(Kind(op))
            case "VMPTRLD":
                yield Operation(Kind.VMPTRLD, "other")
            case "VMCLEAR":
                loads = any(later == "VMPTRLD" for later, _ in ops[i + 1 :])
                yield Operation(Kind.VMCLEAR, "current" if loads and not new else "other")
            case _:
                yield Operation(Kind.L1_EXIT, op)


def _reason(reason: str, ops: Sequence[tuple[str, str]]) -> str:
    """Return the exit reason that L1 sees.

    The log has the hardware's. An external interrupt that belongs to L1 is acknowledged on exit,
    so L1 reads VM_EXIT_INTR_INFO; when L1 does not, L0's interrupt was the timer behind L1's
    VMX-preemption timer.
    """
    if reason != "EXTERNAL_INTERRUPT" or ("VMREAD", "VM_EXIT_INTR_INFO") in ops:
        return reason
    # An L1 with an enlightened VMCS reads memory instead; nothing to tell the two apart.
    return "PREEMPTION_TIMER" if any(op == "VMREAD" for op, _ in ops) else reason


def _inferred_writes(reason: str, upcoming: str, phase: str, evmcs: bool) -> Iterator[Operation]:
    """Yield what an L1 with an enlightened VMCS wrote: stores to memory, which no log shows.

    An INTERRUPT_WINDOW exit means that the window was opened at an entry before (not at one after a
    HLT: a halted L2 waits with the window open), and it is closed at the next one; KVM_SET_SREGS
    writes the segments and descriptor tables.
    """
    if not evmcs:
        return
    if reason == "INTERRUPT_WINDOW" or (upcoming == "INTERRUPT_WINDOW" and reason != "HLT"):
        yield Operation(Kind.VMWRITE, "CPU_BASED_VM_EXEC_CONTROL")
    if phase.endswith("set_sregs"):
        yield Operation(Kind.VMWRITE, "GUEST_CS_SELECTOR")
        yield Operation(Kind.VMWRITE, "GUEST_SYSENTER_CS")


def _annotated(ops: Sequence[Operation], evmcs: bool) -> list[Operation]:
    """Mark the L1 exits after which L0 delivers an interrupt to L1, and L1's ends of interrupt.

    * An external interrupt directly followed by a WRMSR was L1's timer: L1 runs its handler, which
      re-arms the timer. Not if the next interrupt follows at once: then L1 is idle and only moved
      it.
    * L1's console is a 16550 UART in L0's user space: of the eight port accesses that send one
      character, the first and the fifth raise its transmitter-empty interrupt.
    * With Hyper-V's enlightenments an end of interrupt is a WRMSR, the first after the interrupt.
    """
    out = list(ops)
    ports = [i for i, op in enumerate(ops) if op == (Kind.L1_EXIT, "IO_INSTRUCTION")]
    if len(ports) == _UART_BURST:
        for i in (ports[0], ports[_UART_BURST // 2]):
            out[i] = Operation(Kind.L1_EXIT, "IO_INSTRUCTION+irq")
    interrupt = (Kind.L1_EXIT, "EXTERNAL_INTERRUPT")
    for i in range(len(ops) - 1):
        if ops[i + 1] != (Kind.L1_EXIT, "WRMSR"):
            continue
        if ops[i] == interrupt and ops[i + 2 : i + 3] != [interrupt]:
            out[i] = Operation(Kind.L1_EXIT, "EXTERNAL_INTERRUPT+irq")
        if evmcs and ops[i].arg in ("EXTERNAL_INTERRUPT", "IO_INSTRUCTION"):
            out[i + 1] = Operation(Kind.L1_EXIT, "WRMSR+eoi")
    return out


def _mode_changes(
    reason: str, ops: Sequence[tuple[str, str]], legacy: bool, *, toggles: bool
) -> Iterator[Operation]:
    """Yield the changes of L2's mode that L1 carried out, from the controls that it wrote.

    VM_ENTRY_CONTROLS holds "IA-32e mode guest" and "load EFER". On a WRMSR outside legacy mode L1
    writes it because EFER became the host's; on any other exit because L2 entered or left IA-32e
    mode. KVM as L1 reads the access rights of TR when it enters (enter_lmode); another L1 does not
    tell, so there it is a toggle. SECONDARY_VM_EXEC_CONTROL on a WRMSR: L2 switched its APIC to
    x2APIC mode. An enlightened VMCS logs no writes: there the names of phases must tell
    ("pm32_...", "real16_...", "..._end", "..._set_sregs").
    """
    if any(op == "VMPTRLD" for op, _ in ops):
        return  # another VMCS is set up: these writes are its initial state
    wrote = {name for op, name in ops if op == "VMWRITE"}
    if "VM_ENTRY_CONTROLS" in wrote:
        if reason == "WRMSR" and not legacy:
            yield Operation(Kind.L2_MODE, "efer-host")
        elif reason != "WRMSR":
            enters = legacy if toggles else ("VMREAD", "GUEST_TR_AR_BYTES") in ops
            yield Operation(Kind.L2_MODE, "long" if enters else "legacy")
    if "SECONDARY_VM_EXEC_CONTROL" in wrote and reason == "WRMSR":
        yield Operation(Kind.L2_MODE, "x2apic")


def _from_segments(file: Path, exits: pd.DataFrame) -> tuple[Any, Any, Any, float]:
    """Return, per exit, L0's compared and L1's instructions and pulls; and the share left out."""
    import numpy as np

    nothing = np.full(len(exits), np.nan)
    if not file.exists():
        return nothing, nothing, None, float("nan")
    segments = _parquet(file, SEGMENTS_COLUMNS)
    index = exits["exit"]
    of_l0 = segments[segments["level"] == "L0"]
    path = of_l0[~of_l0["handler"].isin(NOT_A_PATH)]

    def per_exit(rows: pd.DataFrame, column: str) -> Any:
        sums = rows.groupby("exit")[column].sum()
        return sums.reindex(index, fill_value=0).to_numpy(dtype=float)

    pulled = of_l0[(of_l0["handler"] != "exit") & (of_l0["rare_vmread"] > 0)].assign(one=1)
    total = float(of_l0["instructions"].sum())
    share = 1 - float(path["instructions"].sum()) / total if total else float("nan")
    l1 = per_exit(segments[segments["level"] == "L1"], "instructions")
    return per_exit(path, "instructions"), l1, per_exit(pulled, "one"), share
