"""Primitives: the things that L0 (and L1) do on a nested round trip and that have a price.

The engine counts them, `nvmx_lab.costs` prices them; a total is counts times prices.
"""

from __future__ import annotations

PRIMITIVES: dict[str, str] = {
    "vmread_first": "VMREAD by L0 that starts a straight-line run of VMREADs",
    "vmread_next": "VMREAD by L0 right after another one in the same function",
    "vmwrite_first": "VMWRITE by L0 that starts a straight-line run of VMWRITEs",
    "vmwrite_next": "VMWRITE by L0 right after another one in the same function",
    "vmptrld": "VMPTRLD by L0",
    "vmclear": "VMCLEAR by L0",
    "rdmsr": "RDMSR by L0",
    "wrmsr": "WRMSR by L0",
    "invept": "INVEPT or INVVPID by L0",
    "ibpb": "IBPB (WRMSR IA32_PRED_CMD) on a switch of VMCS",
    "host_state_switch": "put and load of host state on a switch of VMCS (before patch 20)",
    "control_check": "VM-entry after a VMWRITE of one of the five major control fields: all checks",
    "field_lookup": "run-time lookup of a field's vmcs12 offset in a shadow copy (before patch 09)",
    "transition": "hardware VM-exit to L0 and VM-entry back, as a pair",
    "l0_instructions": "instructions that L0 retires between the VMX and MSR instructions",
    "l1_instructions": "instructions that L1 retires between the L2 exit and its VMRESUME",
    "l1_vmread": "VMREAD by L1 served by the shadow VMCS",
    "l1_vmwrite": "VMWRITE by L1 served by the shadow VMCS",
}
"""Name -> meaning, in the order of every counts vector."""

INFORMATION: dict[str, str] = {
    "retired": "all instructions that L0 retires, VMX and MSR instructions included",
    "rare_vmread": "VMREADs of rare fields (already counted as VMREADs)",
    "pulls": "lazy syncs: switch to vmcs02, read, switch back",
}
"""Counted along, but without a price of their own."""

COUNTERS: tuple[str, ...] = (*PRIMITIVES, *INFORMATION)
"""Order of every counts vector: the priced primitives first."""
