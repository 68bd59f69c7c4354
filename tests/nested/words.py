"""Strategies: configurations, operations and whole round trips, drawn at random.

The operations are all that a stream may hold, in any order that a round trip allows, and so wilder
than any workload.
"""

from __future__ import annotations

from hypothesis import strategies as st

from nvmx_lab.nested.config import Config
from nvmx_lab.nested.ops import Kind, Operation, parse
from nvmx_lab.nested.policies import SYNC_POLICIES, Predictor

RELEASES = (
    *("5.2", "5.2+patch13", "5.2+patch07+patch13", "5.3", "5.3+ibpb", "5.3-patch13"),
    *("5.8", "5.11", "6.1", "6.1-migration-sync", "6.1-host-kstack"),
)
# What a predictor learns multiplies the states of a wild dictionary by hundreds. It is compiled
# apart from L0, and held to the model count for count in tests/study/test_walks.py.
POLICIES = tuple(name for name, kind in SYNC_POLICIES.items() if not issubclass(kind, Predictor))
OPTIONS = ("mpx", "apicv", "pml", "preemption_timer", "vid", "pae", "legacy")

EXITS = (
    *("CPUID", "IO_INSTRUCTION", "EPT_VIOLATION", "CR_ACCESS", "EXTERNAL_INTERRUPT", "HLT"),
    *("PREEMPTION_TIMER", "TRIPLE_FAULT"),  # the last has no path and no length of its own
)
FIELDS = (
    # rare
    *("GUEST_CS_BASE", "GUEST_GS_BASE", "GUEST_TR_LIMIT", "GUEST_ES_AR_BYTES", "GUEST_BNDCFGS"),
    # eager; the second moved from RW to RO shadowed, the last two are never shadowed
    *("GUEST_RIP", "GUEST_CS_AR_BYTES", "GUEST_CR3", "GUEST_PDPTR0"),
    # shadowed on some CPUs only
    *("GUEST_PML_INDEX", "VMX_PREEMPTION_TIMER_VALUE", "GUEST_INTR_STATUS"),
    # controls and host state, shadowed and not
    *("PIN_BASED_VM_EXEC_CONTROL", "CPU_BASED_VM_EXEC_CONTROL", "SECONDARY_VM_EXEC_CONTROL"),
    *("VM_ENTRY_CONTROLS", "VM_EXIT_CONTROLS", "EXCEPTION_BITMAP", "HOST_RSP", "EPT_POINTER"),
    # exit information; read-only shadowed
    *("VM_EXIT_REASON", "EXIT_QUALIFICATION"),
    # a field that vmcs12 does not have
    "ENCLS_EXITING_BITMAP",
)
OF_L1 = tuple(
    parse(text)
    for text in (
        *(f"L1_EXIT {reason}" for reason in ("RDMSR", "CPUID", "DR_ACCESS", "IO_INSTRUCTION")),
        *("L1_EXIT EXTERNAL_INTERRUPT+irq", "L1_EXIT WRMSR+eoi", "L1_EXIT HLT", "L1_EXIT INVEPT"),
        *("L1_EXIT EPT_MISCONFIG", "L1_EXIT XSETBV", "L1_EXIT PAUSE", "L1_EXIT NO_SUCH_REASON"),
        *("VMPTRLD same", "VMPTRLD other", "VMCLEAR other"),
        *("GET_NESTED_STATE", "SET_NESTED_STATE"),
        *(f"L2_MODE {mode}" for mode in ("long", "legacy", "efer-host", "x2apic", "xapic")),
    )
)
ACCESSES = tuple(Operation(kind, field) for kind in (Kind.VMREAD, Kind.VMWRITE) for field in FIELDS)
WHILE_L2_RUNS = tuple(
    map(parse, ("L0_EXIT EPT_VIOLATION", "L0_EXIT MSR", "GET_NESTED_STATE", "SET_NESTED_STATE"))
)
SWITCH = (parse("VMCLEAR current"), parse("VMPTRLD other"))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any L0: release, policy, how L1 reaches its VMCS, and the CPU's features."""
    options = {name: draw(st.booleans()) for name in OPTIONS}
    reach = draw(st.sampled_from(("shadow", "shadow", "trapped", "enlightened")))
    return Config.of(
        draw(st.sampled_from(RELEASES)),
        draw(st.sampled_from((None, *POLICIES))),
        shadow_vmcs=reach == "shadow",
        evmcs=reach == "enlightened",
        **options,
    )


@st.composite
def words(draw: st.DrawFn, max_size: int = 12) -> tuple[Operation, ...]:
    """One round trip."""
    reason = draw(st.sampled_from(EXITS)) + draw(st.sampled_from(("", "", "+pull")))
    body = draw(st.lists(st.sampled_from(OF_L1) | st.sampled_from(ACCESSES), max_size=max_size))
    if draw(st.booleans()) and draw(st.booleans()):
        at = draw(st.integers(0, len(body)))
        body[at:at] = SWITCH
    entry = draw(st.sampled_from((parse("VMRESUME"), parse("VMRESUME"), parse("VMLAUNCH"))))
    after = draw(st.lists(st.sampled_from(WHILE_L2_RUNS), max_size=2))
    return (Operation(Kind.EXIT, reason), *body, entry, *after)


def dictionaries(max_words: int = 6) -> st.SearchStrategy[list[tuple[Operation, ...]]]:
    """The distinct words of a stream."""
    return st.lists(words(), min_size=1, max_size=max_words, unique=True)
