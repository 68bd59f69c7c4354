"""Breakdown: where the cycles of a round trip go, step by step, for one or several L0s."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import charged
from nvmx_lab.nested.automaton import steps
from nvmx_lab.nested.ops import Kind, Operation
from nvmx_lab.nested.primitives import COUNTERS, PRIMITIVES
from nvmx_lab.study.compare import pairs_of
from nvmx_lab.study.simulate import EXITS, P, Simulated, simulate_mix
from nvmx_lab.workload.mixes import Mix

if TYPE_CHECKING:
    import pandas as pd

LEGS = (
    "L2 exit to L1",
    "VMREAD by L1",
    "VMWRITE by L1",
    "other exits of L1",
    "VMRESUME to L2",
    "L1 itself",
)
"""The parts of a round trip, in order."""

_PARTS = {
    "rare fields": ("sync_vmcs02_to_vmcs12_rare",),
    "eager fields": ("sync_vmcs02_to_vmcs12",),
    "shadow VMCS copy": ("copy_shadow_to_vmcs12", "nested_sync_vmcs12_to_shadow", "handle_vmwrite"),
    "switch of VMCS": (
        *("vmx_vcpu_load_vmcs", "vmx_vcpu_load", "vmx_switch_vmcs"),
        "vmx_vcpu_put and vmx_prepare_switch_to_guest",
    ),
    "vmcs01: L1's host state": ("load_vmcs12_host_state", "__vmx_set_segment", "nested_vmx_vmexit"),
    "vmcs02: rare part": ("prepare_vmcs02_rare", "set_cr4_guest_host_mask"),
    "vmcs02: every entry": (
        *("prepare_vmcs02_early", "nested_get_vmcs12_pages", "nested_vmx_enter_non_root_mode"),
        *("vmx_update_exception_bitmap", "add_atomic_switch_msr"),
    ),
}
_PART_OF = {function: part for part, functions in _PARTS.items() for function in functions}
_OTHER = "other VMX and MSR instructions"
_BY_PRIMITIVE = {
    "transition": "VM-exit and VM-entry",
    "control_check": "VM-exit and VM-entry",
    "field_lookup": "shadow VMCS copy",
    "l0_instructions": "software of L0",
    "l1_instructions": "software of L1",
    "l1_vmread": "VMREAD and VMWRITE of L1",
    "l1_vmwrite": "VMREAD and VMWRITE of L1",
}


def leg_of(operation: Operation) -> str:
    """Return the part of the round trip, one of `LEGS`, in which L0 does an operation's work."""
    match operation.kind:
        case Kind.EXIT:
            return "L2 exit to L1"
        case Kind.VMREAD | Kind.VMWRITE:
            return f"{operation.kind} by L1"
        case Kind.VMRESUME | Kind.VMLAUNCH:
            return "VMRESUME to L2"
    return "other exits of L1"


def counts_by_step(simulated: Simulated) -> dict[tuple[str, str], npt.NDArray[np.float64]]:
    """Return (leg, step) -> counts of the whole run, float64[P].

    The steps add up to the round trip exactly.
    """
    out: dict[tuple[str, str], npt.NDArray[np.float64]] = defaultdict(lambda: np.zeros(P))
    index = {name: i for i, name in enumerate(PRIMITIVES)}
    automaton = simulated.automaton
    for state, code in np.argwhere(simulated.pairs):
        operation, times = automaton.alphabet[code], simulated.pairs[state, code]
        leg = leg_of(operation)
        _, trace = automaton.trace(int(state), int(code))
        for primitive, function in steps(trace):
            part = _PART_OF.get(function, _OTHER)
            if function == "vmx_cache_reg" and leg == LEGS[0]:
                part = "eager fields"  # RSP and RIP, read through the register cache
            out[leg, part][index[primitive]] += times
        vector = automaton.counts[automaton.count_id[state, code]]
        for primitive, step in _BY_PRIMITIVE.items():
            where = "L1 itself" if primitive.startswith("l1_") else leg
            out[where, step][index[primitive]] += times * vector[COUNTERS.index(primitive)]
    out["L1 itself", "software of L1"][index["l1_instructions"]] = simulated.l1_instructions
    return dict(out)


def breakdown(
    mix: str | Path | Mix,
    *,
    kvm: Sequence[str] = ("5.2", "5.2+patch13"),
    sync: str | Sequence[str | None] | None = None,
    cpu: str | Path = prices.DEFAULT,
    exits: int = EXITS,
    seed: int = 1,
    draws: int = prices.DRAWS,
) -> pd.DataFrame:
    """Take the round trip of two L0s on a mix apart.

    Parameters
    ----------
    mix, kvm, sync, cpu, exits, seed, draws
        As in `nvmx_lab.study.compare.compare`.

    Returns
    -------
    DataFrame
        One row per L0 and step: kvm, sync, leg, step, instructions (VMX and MSR instructions, mean
        per exit), cycles_p05, cycles_p50, cycles_p95 (mean per exit). Software beside a VMREAD or
        VMWRITE that its price includes is with that step.

    Raises
    ------
    LabError
        As in `compare`; and if a price is unknown.
    """
    import pandas as pd

    pairs = pairs_of(kvm, sync)
    _, simulated = simulate_mix(
        mix, [k for k, _ in pairs], [s for _, s in pairs], exits=exits, seed=seed
    )
    drawn = prices.load(cpu).draw(draws, seed)
    rows = []
    for item in simulated:
        by_step = counts_by_step(item)
        for leg in LEGS:
            in_leg = {step: c for (where, step), c in by_step.items() if where == leg and c.any()}
            for step, (cycles, instructions) in _priced_steps(in_leg, drawn).items():
                low, middle, high = np.quantile(cycles / exits, (0.05, 0.5, 0.95))
                rows.append(
                    {
                        "kvm": item.config.kvm.name,
                        "sync": item.config.sync,
                        "leg": leg,
                        "step": step,
                        "instructions": instructions / exits,
                        "cycles_p05": low,
                        "cycles_p50": middle,
                        "cycles_p95": high,
                    }
                )
    return pd.DataFrame(rows)


_INSTRUCTIONS = [
    name in ("vmread_first", "vmread_next", "vmwrite_first", "vmwrite_next", "vmptrld", "vmclear")
    or name in ("rdmsr", "wrmsr", "invept", "l1_vmread", "l1_vmwrite")
    for name in PRIMITIVES
]


def _priced_steps(
    steps_of_leg: dict[str, npt.NDArray[np.float64]], drawn: prices.Draws
) -> dict[str, tuple[npt.NDArray[np.float64], float]]:
    """Price the steps of one leg; software that a price includes comes off the leg's."""
    priced: dict[str, tuple[npt.NDArray[np.float64], float]] = {}
    known = np.nan_to_num(drawn.cycles, nan=0.0)
    adjusted = {step: charged(counts, drawn) for step, counts in steps_of_leg.items()}
    # `charged` takes the software that a price includes off the software column: move it to where
    # the leg's software is.
    column = {
        "L0": list(PRIMITIVES).index("l0_instructions"),
        "L1": list(PRIMITIVES).index("l1_instructions"),
    }
    for level, index in column.items():
        holder = f"software of {level}"
        if holder not in adjusted:
            continue
        for step, counts in adjusted.items():
            if step != holder:
                adjusted[holder][index] += counts[index]
                counts[index] = 0.0
    for step, counts in adjusted.items():
        executed = float(steps_of_leg[step][_INSTRUCTIONS].sum())
        priced[step] = (known @ counts, executed)
    return priced
