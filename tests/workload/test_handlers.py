"""Handlers: tables, conditions, enumeration, derivation from executed runs."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested.ops import Kind, Operation, parse
from nvmx_lab.workload import handlers

RULES = [
    (l1, name)
    for l1 in ("kvm-5.3", "xen-4.23", "virtualbox-6.1.97", "hyper-v", "hyper-v-evmcs")
    for name, handler in handlers.load(l1).items()
    if not handler.is_event
]
LOGS = [
    (l1, variant, name)
    for l1 in ("kvm-6.1", "xen-4.17")
    for variant, table in handlers.load_table(data.path("l1_handlers", f"{l1}.csv")).items()
    for name in table
]


def pulls(operations: tuple[Operation, ...]) -> bool:
    """Whether a lazy L0 5.3 with shadow VMCS must pull before L2 runs again."""
    return any(
        (op.kind is Kind.VMREAD and vmcs.is_rare(op.arg))
        or (op.kind is Kind.VMWRITE and op.arg not in vmcs.shadow_rw("5.3"))
        or op in (Operation(Kind.VMPTRLD, "other"), Operation(Kind.VMCLEAR, "current"))
        for op in operations
    )


def pull_share(l1: str, name: str, variant: str = "") -> float:
    return sum(
        word.probability
        for word in handlers.words(l1, name, variant=variant)
        if pulls(word.operations)
    )


@pytest.mark.parametrize(("l1", "name"), RULES)
def test_words_of_a_rule_are_complete(l1, name):
    words = handlers.words(l1, name)
    assert sum(word.probability for word in words) == pytest.approx(1, abs=1e-12)
    assert len({word.operations for word in words}) == len(words)
    for word in words:
        assert word.probability > 0
        assert word.operations[0].kind is Kind.EXIT
        assert word.operations[-1].kind in (Kind.VMRESUME, Kind.VMLAUNCH)
        assert word.l1_instructions > 0


@pytest.mark.parametrize(("l1", "variant", "name"), LOGS)
def test_words_of_a_log_are_complete(l1, variant, name):
    words = handlers.words(l1, name, variant=variant)
    assert sum(word.probability for word in words) == pytest.approx(1, abs=1e-12)
    assert all(word.operations[0].kind is Kind.EXIT for word in words)
    assert all(word.l1_instructions > 0 for word in words)


def naive(rows, chance):
    """Every combination of every condition, with no shortcut: the twin of the enumeration."""
    table = handlers.conditions()
    keys = [row.condition or f"#{number}" for number, row in enumerate(rows)]
    names = {key for key in keys if key[0] != "#"}
    for _ in range(3):
        names |= {
            parent for n in names for parent in (table[n].requires, table[n].excludes) if parent
        }
    own = {f"#{number}": row.probability for number, row in enumerate(rows) if not row.condition}
    free = sorted(names) + sorted(key for key, p in own.items() if 0 < p < 1)
    result = defaultdict(float)
    for values in itertools.product((False, True), repeat=len(free)):
        wish = dict(zip(free, values, strict=True))
        weight = 1.0
        for key, value in wish.items():
            p = own[key] if key in own else chance.get(key, table[key].probability)
            weight *= p if value else 1 - p
        if weight == 0:
            continue

        def holds(name, wish=wish):
            condition = table[name]
            return (
                wish[name]
                and (not condition.requires or holds(condition.requires))
                and not (condition.excludes and holds(condition.excludes))
            )

        sequence = tuple(
            row.operation
            for row, key in zip(rows, keys, strict=True)
            if (holds(key) if row.condition else own[key] == 1 or wish[key])
        )
        result[sequence] += weight
    return result


@given(
    which=st.sampled_from([r for r in RULES if r[1] != "hlt"]),
    p=st.dictionaries(
        st.sampled_from(sorted(handlers.conditions())), st.sampled_from([0.0, 0.25, 0.5, 1.0])
    ),
)
@settings(max_examples=40, deadline=None)
def test_enumeration_agrees_with_all_combinations(which, p):
    l1, name = which
    try:
        words = handlers.words(l1, name, probabilities=p)
    except LabError as error:
        assert "too many uncertain conditions" in str(error)
        return
    expected = naive(handlers.load(l1)[name].rows, p)
    assert {w.operations for w in words} == set(expected)
    for word in words:
        assert word.probability == pytest.approx(expected[word.operations], abs=1e-12)


# l1_profiles.md: in steady state these touch no rare field and write none that is not shadowed.
STEADY = [
    "cpuid",
    "hlt",
    "pio_kernel",
    "pio_user",
    "pio_string_64bit",
    "rdmsr",
    "wrmsr",
    "ept_violation",
    "mmio_fast",
    "mmio_kernel",
    "mmio_user",
    "external_interrupt",
    "nmi",
    "mov_cr0",
    "mov_cr4",
    "mov_cr8",
    "invlpg_no_ept",
    "vmcall",
    "interrupt_window",
    "tpr_below_threshold",
    "apic_access_eoi",
    "apic_access",
    "apic_write",
    "eoi_induced",
    "preemption_timer",
    "xsetbv",
    "wbinvd",
    "pause",
    "mov_dr",
    "mov_cr3_no_ept",
    "page_fault_no_ept",
]
CHURN = ("host_cr3_changed", "host_cr3_changed_after_sleep", "operand_uses_fs", "operand_uses_gs")


@pytest.mark.parametrize("name", STEADY)
def test_kvm_5_3_with_a_64bit_guest_never_pulls_in_steady_state(name):
    for word in handlers.words("kvm-5.3", name, probabilities=dict.fromkeys(CHURN, 0.0)):
        assert not pulls(word.operations)
        allowed = vmcs.shadow_rw("5.3") | vmcs.shadow_ro("5.3")
        trapped = {op.arg for op in word.operations if op.kind is Kind.VMREAD} - allowed
        assert trapped <= ({"GUEST_DR7"} if name == "mov_dr" else set())


def test_steady_handlers_read_5_to_20_fields():
    for name in STEADY:
        for word in handlers.words("kvm-5.3", name, probabilities=dict.fromkeys(CHURN, 0.0)):
            reads = sum(op.kind is Kind.VMREAD for op in word.operations)
            assert 2 <= reads <= 20, name


@pytest.mark.parametrize(
    "name", ["pio_string_32bit", "mmio_user_32bit", "task_switch_32bit", "pio_user + get_sregs"]
)
def test_16_and_32_bit_guests_and_get_sregs_always_pull(name):
    assert pull_share("kvm-5.3", name) == pytest.approx(1)


def test_one_condition_is_one_draw():
    words = handlers.words("kvm-5.3", "pio_user", probabilities={"host_fs_gs_changed": 0.5})
    fields = {"HOST_FS_SELECTOR", "HOST_GS_SELECTOR", "HOST_FS_BASE", "HOST_GS_BASE"}
    for word in words:
        assert len(fields & {op.arg for op in word.operations}) in (0, 4)


def test_virtualbox_pulls_on_nearly_every_handled_exit():
    for name, handler in handlers.load("virtualbox-6.1.97").items():
        if handler.is_event or name in ("hlt", "external_interrupt", "interrupt_window"):
            continue
        # MSR writes import no segments.
        expected = (
            0.0
            if name == "wrmsr"
            and not any(
                vmcs.is_rare(row.operation.arg)
                for row in handler.rows
                if row.operation.kind is Kind.VMREAD
            )
            else 1.0
        )
        assert pull_share("virtualbox-6.1.97", name) == pytest.approx(expected), name
    assert pull_share("virtualbox-6.1.97", "hlt + ring3") == pytest.approx(1)


def test_xen_pulls_when_it_emulates():
    assert pull_share("xen-4.23", "mmio") == pytest.approx(1)
    assert pull_share("xen-4.23", "cpuid") == pytest.approx(0.03)


def test_hyper_v_with_an_enlightened_vmcs_does_nothing_that_l0_sees():
    for name in handlers.load("hyper-v-evmcs"):
        (word,) = handlers.words("hyper-v-evmcs", name)
        assert [op.kind for op in word.operations] == [Kind.EXIT, Kind.VMRESUME]


def test_hyper_v_has_the_published_field_use():
    reads = writes = 0.0
    for word in handlers.words("hyper-v", "boot_exit"):
        reads += word.probability * sum(op.kind is Kind.VMREAD for op in word.operations)
        writes += word.probability * sum(op.kind is Kind.VMWRITE for op in word.operations)
    assert reads == pytest.approx(5_095_645 / (0.178 * 5_095_645), rel=0.01)
    assert writes == pytest.approx(2_176_011 / (0.178 * 5_095_645), rel=0.01)


def test_an_event_goes_before_the_entry_and_may_replace_it():
    (word, *_) = handlers.words("kvm-5.3", "cpuid + switch_l2_vcpu")
    texts = [str(op) for op in word.operations]
    assert texts.index("VMPTRLD other") < texts.index("VMWRITE GUEST_RIP")
    for word in handlers.words("kvm-5.3", "cpuid + cpu_migration"):
        texts = [str(op) for op in word.operations]
        assert texts[-1] == "VMLAUNCH"
        assert "VMRESUME" not in texts
        assert texts.index("VMCLEAR current") < texts.index("VMPTRLD other")
    plain = handlers.words("kvm-5.3", "cpuid")[0].l1_instructions
    joined = handlers.words("kvm-5.3", "cpuid + switch_l2_vcpu")[0].l1_instructions
    assert joined > plain


@pytest.mark.parametrize(
    ("l1", "name", "variant", "message"),
    [
        ("kvm-5.4", "cpuid", "", "unknown L1 hypervisor.*kvm-5.3"),
        ("kvm-5.3", "cpuidd", "", "unknown handler.*did you mean 'cpuid'"),
        ("kvm-6.1", "cpuid", "", "unknown variant"),
        ("kvm-6.1", "cpuid", "kstak", "did you mean 'kstack'"),
        ("kvm-5.3", "get_sregs", "", "an event needs a handler"),
        ("kvm-5.3", "cpuid + hlt", "", "only events"),
        ("kvm-6.1", "cpuid + cpuid", "kstack", "only events"),
    ],
)
def test_bad_handlers_are_refused(l1, name, variant, message):
    with pytest.raises(LabError, match=message):
        handlers.words(l1, name, variant=variant)


def test_bad_conditions_are_refused():
    with pytest.raises(LabError, match="did you mean 'pml_in_l1'"):
        handlers.words("kvm-5.3", "cpuid", probabilities={"pml_in_l2": 1.0})
    many = dict.fromkeys(handlers.conditions(), 0.5)
    with pytest.raises(LabError, match="too many uncertain conditions"):
        handlers.words("kvm-5.3", "hlt", probabilities=many)


def test_operations_can_be_left_out():
    rsp = parse("VMWRITE HOST_RSP")
    for without, expected in (((), 0.98), ((rsp,), 0.0)):
        words = handlers.words("kvm-6.1", "pio_write_user", variant="kstack", without=without)
        share = sum(word.probability for word in words if rsp in word.operations)
        assert share == pytest.approx(expected)


@pytest.mark.slow
def test_the_logged_handlers_are_what_the_derivation_gives():
    derived = handlers.derive_from_executed(data.path("executed"))
    for l1 in ("kvm-6.1", "xen-4.17"):
        committed = data.read_rows(data.path("l1_handlers", f"{l1}.csv"))
        assert committed == [row for row in derived if row["l1"] == l1]


@pytest.mark.slow
def test_the_executed_instructions_are_what_the_derivation_gives():
    derived = handlers.derive_instructions(data.path("executed"))
    committed = data.read_rows("l1_instructions.csv")
    assert [row for row in committed if row["basis"] == "executed"] == derived
    assert all(row["source"] for row in committed)


def test_executed_handlers_pull_as_often_as_logged():
    """Shares from the executed runs' own account of the rare reader, not from our field sets."""
    import pandas as pd

    # Only whole phases: the last exits of a log may be cut off.
    for run, variant in (
        ("kvm61_lazy_shadow", "kstack"),
        ("kvm61_lazy_shadow_nokstack", "nokstack"),
        ("kvm61_lazy_shadow_16_32bit", "nokstack-16-32bit"),
    ):
        exits = pd.read_parquet(data.path("executed", f"{run}.exits.parquet"))
        logged = exits.assign(pull=exits["l0_rare_vmread"] > 0).groupby("phase", observed=True)[
            "pull"
        ]
        for phase, share in logged.mean().items():
            if phase:
                assert pull_share("kvm-6.1", str(phase), variant) == pytest.approx(share, abs=1e-9)


def test_an_interrupt_that_l1_does_not_read_was_its_timer():
    for name, reads in (("external_interrupt", True), ("preemption_timer", False)):
        for word in handlers.words("kvm-6.1", name, variant="linux-kstack"):
            assert word.operations[0].arg == name.upper()
            assert (parse("VMREAD VM_EXIT_INTR_INFO") in word.operations) is reads


def test_derivation_names_the_file_that_is_not_there(tmp_path):
    with pytest.raises(LabError, match=r"kvm61_lazy_shadow\.exits\.parquet: cannot be read"):
        handlers.derive_from_executed(tmp_path)
    (tmp_path / "kvm61_lazy_shadow.exits.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(LabError, match="cannot be read as Parquet"):
        handlers.derive_from_executed(tmp_path)


def test_every_condition_is_used_and_sourced():
    used = {
        condition
        for file in data.path("l1_handlers").glob("*.csv")
        for table in handlers.load_table(file).values()
        for handler in table.values()
        for condition in handler.conditions()
    }
    assert used == set(handlers.conditions())
    for condition in handlers.conditions().values():
        assert condition.meaning
        assert condition.source
        if 0 < condition.probability < 1:
            assert condition.low < condition.high or condition.basis == "executed"


CONDITION = 'meaning = "m"\nprobability = 0.5\nbasis = "assumed"\nsource = "s"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\n" + CONDITION + "hihg = 1\n", r"\[a\]: unknown key.*did you mean 'high'"),
        ('[a]\nmeaning = "m"\n', r"\[a\]: probability is missing"),
        ("[a]\n" + CONDITION.replace("0.5", "1.5"), "probability is no probability"),
        ("[a]\n" + CONDITION.replace("0.5", "true"), "probability is no probability"),
        ("[a]\n" + CONDITION.replace("0.5", "nan"), "probability is no probability"),
        ("[a]\n" + CONDITION + "low = 0.9\n", "outside its own range"),
        ("[a]\n" + CONDITION.replace("assumed", "felt"), "unknown basis"),
        ("[a]\n" + CONDITION.replace('"m"', "3"), "meaning must be text"),
        ("[a]\n" + CONDITION + 'requires = "b"\n', "unknown condition"),
        ("a = 1\n", "a condition is a table"),
        ("[a\n", "malformed TOML"),
    ],
)
def test_bad_condition_tables_are_refused(tmp_path, text, message):
    file = tmp_path / "conditions.toml"
    file.write_text(text)
    with pytest.raises(LabError, match=message) as caught:
        handlers.load_conditions(file)
    assert str(file) in str(caught.value)


HEADER = "l1,handler,seq,op,arg,condition,probability,stage,source_function,basis,source\n"
FIRST = "x,h,0,EXIT,CPUID,,,exit,f,assumed,s\n"
LAST = "x,h,1,VMRESUME,,,,entry,f,assumed,s\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "the table is empty"),
        ("a,b\n1,2\n", "not a table of handlers"),
        (HEADER + FIRST, "a round trip ends"),
        (
            HEADER + FIRST + "x,h,1,VMREED,GUEST_RIP,,,exit,f,assumed,s\n" + LAST,
            ":3: unknown operation",
        ),
        (HEADER + FIRST + "x,h,1,VMREAD,GUEST_RIPP,,,exit,f,assumed,s\n" + LAST, ":3: .*GUEST_RIP"),
        (HEADER + FIRST + "x,h,1,VMREAD,GUEST_RIP,no,,exit,f,assumed,s\n", ":3: unknown condition"),
        (HEADER + FIRST + "x,h,1,VMREAD,GUEST_RIP,,2,exit,f,assumed,s\n", ":3: probability"),
        (HEADER + FIRST + "x,h,5,VMREAD,GUEST_RIP,,,exit,f,assumed,s\n", ":3: rows .* from 0"),
        (HEADER + FIRST + "x,h,1,VMREAD,GUEST_RIP,,,later,f,assumed,s\n", ":3: unknown stage"),
        (HEADER + FIRST + "x,h,1,VMREAD,GUEST_RIP,,,exit,f,felt,s\n", ":3: unknown basis"),
        (HEADER + FIRST + "x,h,1,VMREAD,GUEST_RIP,,,exit,f,assumed,\n", ":3: a row needs a source"),
        (
            "l1,variant,handler,weight,operations,source\nx,v,h,-1,EXIT CPUID; VMRESUME,s\n",
            ":2: weight",
        ),
        ("l1,variant,handler,weight,operations,source\nx,v,h,1,VMRESUME,s\n", ":2: a round trip"),
    ],
)
def test_bad_handler_tables_are_refused(tmp_path, text, message):
    file = tmp_path / "h.csv"
    file.write_text(text)
    with pytest.raises(LabError, match=message):
        handlers.load_table(file)
