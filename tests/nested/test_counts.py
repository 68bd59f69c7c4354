"""What the model executes, against numbers typed anew from the sources.

Numbers of KVM 5.2 to 5.3 were counted in the source (nested.c, vmx.c); those of 6.1 are from the
executed runs, on a CPU without MPX (data/README.md).
"""

from __future__ import annotations

from collections import Counter

import pytest

from nvmx_lab.nested.config import Config
from nvmx_lab.nested.model import Nvmx, Trace, VmFail
from nvmx_lab.nested.ops import parse

VMX = ("VMREAD", "VMWRITE", "VMPTRLD", "VMCLEAR")
EXECUTED = {"mpx": False}  # the CPU of the executed runs


def l0(kvm: str, sync: str | None = None, **options: bool) -> Nvmx:
    model = Nvmx(Config.of(kvm, sync, **options))
    model.start()
    return model


def executes(model: Nvmx, *operations: str) -> Counter[str]:
    """Return what L0 executes for some operations; those before were not counted."""
    model.trace = Trace()
    for text in operations:
        model.apply(parse(text))
    return Counter(access.op for access in model.trace.accesses)


def vmx(model: Nvmx, *operations: str) -> tuple[int, ...]:
    """Return VMREADs, VMWRITEs, VMPTRLDs, VMCLEARs."""
    counted = executes(model, *operations)
    return tuple(counted[op] for op in VMX)


def within(model: Nvmx, *functions: str) -> int:
    return sum(access.function in functions for access in model.trace.accesses)


# -- the exit sync --------------------

SYNC = ("sync_vmcs02_to_vmcs12", "sync_vmcs02_to_vmcs12_rare", "vmx_cache_reg")


@pytest.mark.parametrize(
    ("kvm", "mpx", "vmreads"),
    [
        ("5.2", True, 55),
        ("5.2", False, 54),
        ("5.2+patch13", True, 19),
        ("5.2+patch13", False, 19),
        ("5.3", True, 15),
        ("5.3", False, 15),
        ("5.8", True, 12),  # without the three SYSENTER fields
        ("6.1", True, 12),
    ],
)
def test_vmreads_of_the_exit_sync(kvm, mpx, vmreads):
    model = l0(kvm, mpx=mpx)
    executes(model, "EXIT CPUID")
    assert within(model, *SYNC) == vmreads


@pytest.mark.parametrize(("kvm", "pdptrs"), [("5.2", 4), ("5.2+patch13", 4), ("5.3", 0)])
@pytest.mark.parametrize("pae", [True, False])
def test_pdptrs_are_read_for_every_l2_until_patch_30(kvm, pdptrs, pae):
    model = l0(kvm, pae=pae)
    executes(model, "EXIT CPUID")
    read = [a.field for a in model.trace.accesses if a.field.startswith("GUEST_PDPTR")]
    assert len(read) == (4 if pae else pdptrs)


@pytest.mark.parametrize(("kvm", "mpx", "rare"), [("5.3", True, 36), ("5.3", False, 35)])
def test_the_rare_reader_reads_each_rare_field_once(kvm, mpx, rare):
    model = l0(kvm, mpx=mpx)
    executes(model, "EXIT CPUID")
    executes(model, "VMREAD GUEST_ES_BASE")
    read = [a for a in model.trace.accesses if a.function == "sync_vmcs02_to_vmcs12_rare"]
    assert len(read) == len({a.field for a in read}) == rare == model.trace.rare_vmreads
    kinds = Counter(a.field.rpartition("_")[2] for a in read)
    assert (kinds["SELECTOR"], kinds["LIMIT"], kinds["BYTES"], kinds["BASE"]) == (8, 10, 6, 10)
    assert kinds["EXCEPTIONS"] == 1  # GUEST_PENDING_DBG_EXCEPTIONS
    assert kinds["BNDCFGS"] == mpx


def test_the_rare_reader_of_6_1_leaves_bndcfgs_out():
    model = l0("6.1")
    executes(model, "EXIT CPUID")
    executes(model, "VMREAD GUEST_ES_BASE")
    assert model.trace.rare_vmreads == 35


# -- shadow VMCS --------------------


@pytest.mark.parametrize(
    ("kvm", "from_shadow", "to_shadow", "lookups"),
    [("5.2", 34, 34, 34), ("5.2+patch07+patch08+patch09", 23, 34, 0), ("5.3", 24, 35, 0)],
)
def test_fields_of_the_shadow_copies(kvm, from_shadow, to_shadow, lookups):
    model = l0(kvm)
    executes(model, "EXIT CPUID")
    assert within(model, "nested_sync_vmcs12_to_shadow") == to_shadow + 3
    assert model.trace.field_lookups == lookups
    counted = executes(model, "VMRESUME")
    assert within(model, "copy_shadow_to_vmcs12") == from_shadow + 3
    assert (counted["VMPTRLD"], counted["VMCLEAR"]) == (3, 1)  # two for the copy, one for vmcs02
    assert model.trace.field_lookups == lookups


@pytest.mark.parametrize("feature", ["apicv", "pml", "preemption_timer"])
def test_a_field_without_its_cpu_feature_is_not_shadowed(feature):
    field = {
        "apicv": "GUEST_INTR_STATUS",
        "pml": "GUEST_PML_INDEX",
        "preemption_timer": "VMX_PREEMPTION_TIMER_VALUE",
    }[feature]
    for there in (True, False):
        model = l0("5.3", **{feature: there})
        executes(model, "EXIT CPUID", f"VMREAD {field}")
        assert model.trace.l1_vmreads == there


def test_vmwrites_of_read_only_shadow_fields_exit_since_patch_07():
    for kvm, exits in (("5.2", False), ("5.2+patch07", True), ("5.3", True)):
        model = l0(kvm)
        executes(model, "EXIT CPUID")
        assert bool(executes(model, "VMWRITE VM_EXIT_REASON")) == exits, kvm


# -- one CPUID round trip of the executed runs --------------------

EXIT_LEG, RESUME, RDMSR = (21, 90, 3, 1), (31, 27, 3, 1), (9, 1, 0, 0)
RARE = 35


def test_a_lazy_cpuid_round_trip_by_part():
    model = l0("6.1", **EXECUTED)
    assert vmx(model, "EXIT CPUID") == EXIT_LEG
    assert vmx(model, "L1_EXIT RDMSR") == RDMSR
    assert vmx(model, "VMRESUME") == RESUME


def test_a_cpuid_round_trip():
    trip = ("EXIT CPUID", "L1_EXIT RDMSR", "VMRESUME")
    assert vmx(l0("6.1", **EXECUTED), *trip) == (61, 118, 6, 2)
    assert vmx(l0("6.1", "eager", **EXECUTED), *trip) == (96, 118, 6, 2)


def test_eager_reads_the_rare_fields_in_the_exit_leg():
    assert vmx(l0("6.1", "eager", **EXECUTED), "EXIT CPUID") == (56, 90, 3, 1)


def test_a_dirty_entry_writes_57_fields_more():
    model = l0("6.1", **EXECUTED)
    assert vmx(model, "EXIT CPUID", "VMWRITE HOST_RSP")[0] > 0
    assert vmx(model, "VMRESUME") == (31, 27 + 57, 3, 1)
    assert within(model, "prepare_vmcs02_rare") == 54
    executes(model, "EXIT CPUID")
    assert vmx(model, "VMRESUME") == RESUME, "clean again"


@pytest.mark.parametrize("operation", ["VMREAD GUEST_CS_BASE", "VMWRITE HOST_RSP"])
def test_a_trapped_access_and_the_pull(operation):
    lazy, eager = l0("6.1", **EXECUTED), l0("6.1", "eager", **EXECUTED)
    executes(lazy, "EXIT CPUID"), executes(eager, "EXIT CPUID")
    assert vmx(eager, operation) == (12, 2, 0, 0)
    assert vmx(lazy, operation) == (12 + RARE, 2, 2, 0)
    assert lazy.trace.pulls == 1
    assert vmx(lazy, operation) == (12, 2, 0, 0), "once per exit of L2"


def test_a_sync_that_was_needed_saves_nothing():
    trip = ("EXIT IO_INSTRUCTION", "VMREAD GUEST_CS_BASE", "VMRESUME")
    lazy, eager = (vmx(l0("6.1", sync, **EXECUTED), *trip) for sync in ("lazy", "eager"))
    assert [a - b for a, b in zip(lazy, eager, strict=True)] == [0, 0, 2, 0]


def test_a_vmread_outside_the_rare_set_does_not_pull_a_vmwrite_does():
    model = l0("6.1", **EXECUTED)
    executes(model, "EXIT CPUID")
    assert vmx(model, "VMREAD HOST_RSP") == (12, 2, 0, 0)
    assert model.control.need_sync_vmcs02_to_vmcs12_rare
    assert vmx(model, "VMWRITE EPT_POINTER") == (47, 2, 2, 0)


def test_writing_a_read_only_shadowed_field_updates_the_shadow_vmcs():
    """KVM_SET_SREGS writes the rights of CS and SS: 4 more VMPTRLDs, 2 more VMCLEARs."""
    model = l0("6.1", **EXECUTED)
    executes(model, "EXIT CPUID", "VMWRITE GUEST_IDTR_LIMIT")
    got = vmx(model, "VMWRITE GUEST_CS_AR_BYTES", "VMWRITE GUEST_SS_AR_BYTES")
    assert got == (2 * 12, 2 * 3, 4, 2)


def test_an_external_interrupt_of_l1():
    model = l0("6.1", **EXECUTED)
    executes(model, "EXIT CPUID")
    assert vmx(model, "L1_EXIT EXTERNAL_INTERRUPT") == (5, 0, 0, 0)


@pytest.mark.parametrize("sync", ["lazy", "eager"])
def test_an_enlightened_vmcs_syncs_in_the_exit_leg(sync):
    model = l0("6.1", sync, evmcs=True, **EXECUTED)
    trip = ("EXIT CPUID", "L1_EXIT RDMSR", "VMRESUME")
    assert vmx(model, *trip) == (72, 95, 2, 0)
    assert model.trace.rare_vmreads == RARE
    assert model.trace.pulls == 0


# -- without shadow VMCS --------------------


def test_without_shadow_vmcs_nothing_is_copied_and_every_access_exits():
    model = l0("6.1", shadow_vmcs=False, **EXECUTED)
    # The exit leg less 35 VMWRITEs, two VMPTRLDs and the VMCLEAR of the copy to the shadow VMCS;
    # the entry less the 24 VMREADs of the copy from it.
    assert vmx(model, "EXIT CPUID") == (21, 90 - 35, 1, 0)
    for access in ("VMREAD GUEST_RIP", "VMREAD VM_EXIT_REASON", "VMWRITE GUEST_RIP"):
        assert vmx(model, access) == (12, 2, 0, 0)
    assert model.control.need_sync_vmcs02_to_vmcs12_rare, "a write of a RW field does not pull"
    assert not model.control.dirty_vmcs12, "nor dirty vmcs12"
    assert vmx(model, "VMRESUME") == (31 - 24, 27, 1, 0)


# -- switches of VMCS --------------------


@pytest.mark.parametrize(
    ("kvm", "per_switch"),
    [
        ("5.2", {"VMPTRLD": 1, "RDMSR": 1, "HOST_STATE_SWITCH": 1, "VMREAD": 2}),
        ("5.2+patch13", {"VMPTRLD": 1, "RDMSR": 1, "HOST_STATE_SWITCH": 1, "VMREAD": 2}),
        ("5.3", {"VMPTRLD": 1}),
        ("5.3+ibpb", {"VMPTRLD": 1, "IBPB": 1}),
        ("5.8+ibpb", {"VMPTRLD": 1}),
    ],
)
def test_a_switch_at_exit_and_entry(kvm, per_switch):
    model = l0(kvm)
    functions = ("vmx_vcpu_load_vmcs", "vmx_vcpu_load", "vmx_switch_vmcs")
    put = "vmx_vcpu_put and vmx_prepare_switch_to_guest"
    for operation in ("EXIT CPUID", "VMRESUME"):
        executes(model, operation)
        got = Counter(a.op for a in model.trace.accesses if a.function in (*functions, put))
        assert got == per_switch, operation


@pytest.mark.parametrize(
    ("kvm", "pull"),
    [
        ("5.2+patch13", {"VMPTRLD": 2, "RDMSR": 2, "VMREAD": 36}),
        ("5.3", {"VMPTRLD": 2, "RDMSR": 2, "VMREAD": 36}),
        ("5.3+ibpb", {"VMPTRLD": 2, "RDMSR": 2, "IBPB": 2, "VMREAD": 36}),
        ("5.11+ibpb", {"VMPTRLD": 2, "VMREAD": 36}),
        ("6.1", {"VMPTRLD": 2, "VMREAD": 35}),
    ],
)
def test_a_pull(kvm, pull):
    model = l0(kvm)
    executes(model, "EXIT CPUID")
    with_pull = executes(model, "VMREAD GUEST_CS_BASE")
    without = executes(model, "VMREAD GUEST_CS_BASE")
    assert with_pull - without == pull


# -- policies --------------------


def test_per_field_pays_a_pull_for_each_field():
    model = l0("5.3", "per-field")
    executes(model, "EXIT CPUID", "VMREAD GUEST_CS_BASE", "VMREAD GUEST_SS_BASE")
    assert (model.trace.pulls, model.trace.rare_vmreads) == (2, 2)


def test_the_oracle_reads_only_what_is_needed_and_never_pulls():
    for foreseen, rare in (("", 0), ("+pull", 36)):
        model = l0("5.3", "oracle")
        executes(model, f"EXIT CPUID{foreseen}")
        assert (model.trace.pulls, model.trace.rare_vmreads) == (0, rare)
    executes(model, "VMREAD GUEST_CS_BASE", "VMWRITE HOST_RSP")
    assert model.trace.pulls == 0


# -- events that are no instruction --------------------


def test_transitions_of_a_round_trip():
    model = l0("6.1", **EXECUTED)
    executes(model, "EXIT CPUID", "VMREAD VM_EXIT_REASON", "L1_EXIT RDMSR", "VMRESUME")
    assert model.trace.transitions == 3, "L2's exit, RDMSR, VMRESUME; the VMREAD is shadowed"
    executes(model, "EXIT CPUID", "VMREAD GUEST_CS_BASE", "VMRESUME")
    assert model.trace.transitions == 3


@pytest.mark.parametrize(("kvm", "checks"), [("5.2", 1), ("5.3", 0), ("6.1", 0)])
def test_entries_repeat_all_checks_while_controls_are_written_each_time(kvm, checks):
    model = l0(kvm)
    executes(model, "EXIT CPUID", "VMRESUME")
    executes(model, "EXIT CPUID", "VMRESUME")
    assert model.trace.control_checks == checks


@pytest.mark.parametrize(("shadow_vmcs", "clears"), [(True, 2), (False, 1)])
def test_vmxon_and_vmxoff_clear_vmcs02_and_the_shadow_vmcs(shadow_vmcs, clears):
    """alloc_loaded_vmcs, alloc_shadow_vmcs and free_nested: a VMCS is cleared at both ends."""
    nvmx = Nvmx(Config.of("5.3", shadow_vmcs=shadow_vmcs))
    for instruction in (nvmx.vmxon, nvmx.vmxoff):
        nvmx.trace = Trace()
        assert instruction() is None
        assert [access.op for access in nvmx.trace.accesses].count("VMCLEAR") == clears
        assert nvmx.trace.transitions == 1
    nvmx.vmxon()
    assert nvmx.vmxon() == VmFail(15)
