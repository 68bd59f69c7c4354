"""Lengths of L0's stretches in retired instructions, from the executed runs.

``data/l0_lengths.csv`` is the output of `derive`; a test holds the two together. A length is the
mean over the logged stretches of one run, those longer than twice the median left out: these hold
work of L0 that is not on the path (scheduling, first touch). The runs that no row names are held
out.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from nvmx_lab import data

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("stretch", "condition", "instructions", "stretches", "run", "source")

RARE_READS = 35
"""VMREADs of the rare reader in the executed runs: their CPU has no MPX."""

LAZY, EAGER, EVMCS = "kvm61_lazy_shadow", "kvm61_eager_shadow", "kvm61_lazy_evmcs"
LINUX, XEN, LEGACY, TWO = (
    *("kvm61_lazy_linux_l2", "kvm61_lazy_xen_l1"),
    *("kvm61_lazy_shadow_16_32bit", "kvm61_lazy_two_l2_vcpus"),
)


class _Log:
    """L0's stretches of all runs in a directory."""

    def __init__(self, directory: Path) -> None:
        import pandas as pd

        frames = []
        for run in (LAZY, EAGER, EVMCS, LINUX, XEN, LEGACY, TWO):
            segments = pd.read_parquet(directory / f"{run}.segments.parquet")
            exits = pd.read_parquet(directory / f"{run}.exits.parquet")
            frame = segments.merge(exits[["exit", "l2_exit_reason"]], on="exit")
            frames.append(frame[frame["level"] == "L0"].assign(run=run))
        self.stretches: pd.DataFrame = pd.concat(frames, ignore_index=True)

    def select(self, run: str, handler: str, **equal: object) -> pd.Series[int]:
        rows = self.stretches
        keep = (rows["run"] == run) & (rows["handler"].astype(str) == handler)
        for column, value in equal.items():
            keep &= rows[column] == value
        return rows.loc[keep, "instructions"]


def derive(directory: Path | None = None) -> list[dict[str, str]]:
    """Return the rows of ``data/l0_lengths.csv``."""
    log = _Log(directory or data.path("executed"))
    rows: list[dict[str, str]] = []

    def add(stretch: str, condition: str, value: float, n: int, run: str, source: str) -> None:
        row = (stretch, condition, f"{value:.2f}".rstrip("0").rstrip("."), str(n), run, source)
        rows.append(dict(zip(COLUMNS, row, strict=True)))

    def typical(values: pd.Series[int]) -> float:
        return float(values[values < 2 * values.median()].mean())

    def median(run: str, handler: str, **equal: object) -> float:
        return float(log.select(run, handler, **equal).median())

    cpuid = {"l2_exit_reason": "CPUID"}
    rare = median(EAGER, "exit", **cpuid) - median(LAZY, "exit", **cpuid)
    to_shadow = median(LAZY, "exit", **cpuid) + rare - median(EVMCS, "exit", vmread=56, **cpuid)
    to_vmcs12 = to_shadow * 24 / 35
    pull = median(LAZY, "VMREAD", vmread=47) - median(LAZY, "VMREAD", vmread=12)
    legacy = median(LEGACY, "exit", vmread=22, **cpuid) - median(LEGACY, "exit", vmread=21, **cpuid)
    dirty = median(LAZY, "VMRESUME", vmwrite=84) - median(LAZY, "VMRESUME", vmwrite=27)

    difference = "difference of medians"
    add(
        *("rare_field", "", rare / RARE_READS, 100, EAGER),
        f"{difference}: eager minus lazy exit leg of CPUID, by the {RARE_READS} fields read",
    )
    add(
        *("pull", "", pull - rare, 200, LAZY),
        f"{difference}: trapped VMREAD with and without a pull, less its {RARE_READS} fields",
    )
    add(
        *("shadow_field", "", to_shadow / 35, 100, EVMCS),
        f"{difference}: lazy exit leg of CPUID plus the rare reader, minus that with an "
        "enlightened VMCS, by the 35 fields written; low by the copy to the enlightened VMCS, "
        "which is not logged; assumed for fields read too",
    )
    add(
        *("single_access", "", rare / RARE_READS, 0, ""),
        "assumed: as a rare field, for an access that the logged KVM does not execute, or not on "
        "every such path",
    )
    add(
        "exit_legacy",
        "",
        legacy,
        200,
        LEGACY,
        f"{difference}: CPUID exit leg, L2 in or out of IA-32e",
    )
    add("entry.clean", "", 0, 0, "", "by definition: VMRESUME below is with a clean vmcs12")
    add("entry.dirty", "", dirty, 1179, LAZY, f"{difference}: VMRESUME with dirty and clean vmcs12")

    mean = "mean of the logged stretches"

    def leg(reason: str, run: str, **equal: object) -> None:
        values = log.select(run, "exit", l2_exit_reason=equal.pop("hardware", reason), **equal)
        name = f"exit.{reason}" if reason else "exit"
        add(
            name, "", typical(values) - to_shadow, len(values), run, f"{mean}, less the shadow copy"
        )

    for reason in (
        *("CPUID", "CR_ACCESS", "EPT_VIOLATION", "HLT", "IO_INSTRUCTION", "RDMSR", "VMCALL"),
        *("WBINVD", "WRMSR", "XSETBV"),
    ):
        leg(reason, LAZY)
    leg("EXTERNAL_INTERRUPT", LINUX, vmread=26)
    leg("PREEMPTION_TIMER", LINUX, hardware="EXTERNAL_INTERRUPT", vmread=22)
    leg("INTERRUPT_WINDOW", LINUX)
    leg("EXCEPTION_NMI", XEN)
    leg("", LAZY, hardware="CPUID")
    rows[-1]["source"] += "; assumed for every other reason"

    for condition, run, writes, shadow in (
        ("vid !xapic", XEN, 27, True),
        ("vid", XEN, 28, True),
        ("evmcs", EVMCS, 39, False),
        ("!xapic", LINUX, 25, True),
        ("!efer_differs", LINUX, 26, True),
        ("legacy", LEGACY, 28, True),
        ("", LAZY, 27, True),
    ):
        values = log.select(run, "VMRESUME", vmwrite=writes)
        less = to_vmcs12 if shadow else 0.0
        source = f"{mean} with {writes} VMWRITEs" + (", less the shadow copy" if shadow else "")
        if run == XEN:  # no KVM L1 with virtual-interrupt delivery was executed
            source += "; assumed for any L1 with virtual-interrupt delivery, though L1 is Xen here"
        add("l1_exit.VMRESUME", condition, typical(values) - less, len(values), run, source)

    for handler, run, equal in (
        ("VMREAD", LAZY, {"vmread": 12}),
        ("VMWRITE", LAZY, {"vmread": 12}),
        ("RDMSR", LAZY, {}),
        ("WRMSR", LINUX, {}),
        ("CPUID", TWO, {}),
        ("EXTERNAL_INTERRUPT", LAZY, {"vmwrite": 0}),
        ("EXTERNAL_INTERRUPT+irq", LAZY, {"vmwrite": 1}),
        ("EPT_VIOLATION", LAZY, {}),
        ("EPT_MISCONFIG", LINUX, {}),
        ("IO_INSTRUCTION", LINUX, {"vmwrite": 2}),
        ("IO_INSTRUCTION+irq", LINUX, {"vmwrite": 3}),
        ("INVEPT", LAZY, {}),
        ("PAUSE", LINUX, {}),
        ("XSETBV", LINUX, {}),
        ("DR_ACCESS", LAZY, {}),
        ("VMCLEAR", TWO, {}),
    ):
        values = log.select(run, handler.partition("+")[0], **equal)
        add(f"l1_exit.{handler}", "", typical(values), len(values), run, mean)
    values = log.select(TWO, "VMPTRLD")
    add(
        *("l1_exit.VMPTRLD", "", typical(values) - pull - to_shadow - to_vmcs12, len(values), TWO),
        f"{mean}, less the pull and both shadow copies",
    )
    other = typical(log.select(LAZY, "RDMSR"))
    add("l1_exit.HLT", "", other, 0, "", "assumed: as RDMSR; the idle wait is not a path of KVM")
    add("l1_exit", "", other, 0, "", "assumed: as RDMSR, for reasons without a row")
    add("l0_exit", "", typical(log.select(LAZY, "EXTERNAL_INTERRUPT")), 0, "", "assumed: as L1's")
    return rows


def as_csv(rows: list[dict[str, str]]) -> str:
    """Return rows as the text of ``data/l0_lengths.csv``."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
