"""Mixes: each loads, says where it is from, and gives what was logged or published."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested.ops import Kind, parse
from nvmx_lab.workload import mixes
from tests.workload.test_handlers import pulls

LOOPS = {row["test"]: row for row in data.read_rows("published_loops.csv")}
GOOD = """\
name = "mine"
title = "Mine"
question = "What if?"
basis = "assumed"
source = "me"
l1 = "kvm-5.3"

[exits]
cpuid = 3
hlt = 1
"""


def pull_share(name: str) -> float:
    return sum(word.probability for word in mixes.load(name).words() if pulls(word.operations))


@pytest.mark.parametrize("name", mixes.names())
def test_every_mix_loads_and_is_complete(name):
    mix = mixes.load(name)
    words = mix.words()
    assert sum(word.probability for word in words) == pytest.approx(1, abs=1e-9)
    for word in words:
        assert not math.isnan(word.l1_instructions)
        for operation in word.operations:
            assert parse(str(operation)) == operation
            if operation.kind in (Kind.VMREAD, Kind.VMWRITE):
                assert vmcs.field(operation.arg).name == operation.arg
    stream = mix.stream(50_000, 7)
    counts = np.bincount(stream.ids(), minlength=len(stream.words))
    expected = stream.probability * 50_000
    assert np.all(np.abs(counts - expected) <= 6 * np.sqrt(expected) + 8)
    if mix.basis != "executed":
        assert mix.assumes or mix.l1 == "virtualbox-6.1.97"


def test_there_are_mixes_for_all_the_issue_names():
    assert len(mixes.names()) >= 14
    wanted = {test.replace("_", "-") for test in LOOPS} | {
        "linux-boot-kstack", "linux-boot-nokstack", "pio-user-kstack", "pio-user-nokstack",
        "hyper-v-evmcs", "hyper-v-noevmcs", "32bit-mmio", "two-l2-one-cpu", "thread-churn",
        "virtualbox-cpuid", "xen-emulation", "xen-boot", "idle-windows-10",
    }  # fmt: skip
    assert wanted <= set(mixes.names())


@pytest.mark.parametrize("test", LOOPS)
def test_published_loops_carry_their_cycles(test):
    published = mixes.load(test.replace("_", "-")).published
    assert published is not None
    assert published.before_cycles == float(LOOPS[test]["before_cycles"])
    assert published.after_cycles == float(LOOPS[test]["after_cycles"])
    # Exits an iteration were reasoned; the cycles must not contradict them: an exit that stays in
    # the kernel takes 13,000-17,000 cycles, one to user space about three times that.
    per_exit = published.before_cycles / published.exits_per_iteration
    assert 13_000 < per_exit < (50_000 if test in ("inl_from_pmtimer", "inl_from_qemu") else 17_000)


@pytest.mark.parametrize(
    ("name", "share", "tolerance"),
    [
        ("linux-boot-kstack", 0.442, 0.001),  # facts of the executed runs
        ("linux-boot-nokstack", 0.0104, 0.002),
        ("xen-boot", 0.047, 0.001),
        ("pio-user-kstack", 0.98, 1e-9),
        ("pio-user-nokstack", 0, 0),
        ("kernel-exits", 0, 0),
        ("mmio-gs-segment", 1, 1e-9),
        ("get-sregs", 1, 1e-9),
        ("set-sregs", 1, 1e-9),
        ("mov-cr4", 1, 1e-9),
        ("32bit-mmio", 1, 1e-9),
        ("32bit-pio", 1, 1e-9),
        ("two-l2-one-cpu", 0.0017, 0.0001),
        ("virtualbox-cpuid", 1, 1e-9),
        ("hyper-v-evmcs", 0, 0),
    ],
)
def test_mixes_pull_as_often_as_the_runs_did(name, share, tolerance):
    assert pull_share(name) == pytest.approx(share, abs=tolerance or 1e-12)


def test_published_loops_hardly_ever_pull():
    for test in LOOPS:
        assert pull_share(test.replace("_", "-")) <= 0.011


def test_options_of_the_host():
    assert mixes.load("hyper-v-evmcs").host.evmcs
    assert mixes.load("32bit-mmio").host.l2_mode == "legacy"
    assert mixes.load("cpuid").host == mixes.Host()
    assert not mixes.load("cpuid-without-shadow-vmcs").host.shadow_vmcs


def test_the_table_lists_every_mix():
    table = mixes.table()
    assert table["mix"].tolist() == list(mixes.names())
    assert (table["words"] > 0).all()
    assert (table["operations_per_exit"] > 1.99).all()
    assert table["source"].str.len().min() > 0


@given(
    weights=st.dictionaries(
        st.sampled_from(["cpuid", "hlt", "pio_user", "wrmsr", "pio_user + get_sregs"]),
        st.floats(0, 1e6),
        min_size=1,
    ).filter(lambda w: sum(w.values()) > 1e-3),
    scale=st.floats(0.01, 100),
)
@settings(max_examples=20, deadline=None)
def test_only_ratios_of_weights_count(weights, scale):
    def words(factor):
        exits = {name: weight * factor for name, weight in weights.items()}
        mix = mixes.Mix(
            name="m",
            title="t",
            question="q",
            basis="assumed",
            source="s",
            l1="kvm-5.3",
            exits=exits,
        )
        return {(w.label, w.operations): w.probability for w in mix.words()}

    one, other = words(1.0), words(scale)
    assert one.keys() == other.keys()
    assert sum(one.values()) == pytest.approx(1)
    for key, probability in one.items():
        assert other[key] == pytest.approx(probability, abs=1e-12)


def write(tmp_path, text, name="mine"):
    file = tmp_path / f"{name}.toml"
    file.write_text(text)
    return file


def test_a_mix_of_ones_own_loads_from_a_path(tmp_path):
    mix = mixes.load(write(tmp_path, GOOD + "\n[conditions]\npml_in_l1 = 0\n"))
    assert mix.exits == {"cpuid": 3, "hlt": 1}
    assert mix.conditions["pml_in_l1"].p == 0
    assert all("GUEST_PML_INDEX" not in str(w.operations) for w in mix.words())
    assert mixes.load(str(tmp_path / "mine.toml")) == mix


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            'title = "Mine"',
            'titel = "Mine"',
            "titel: unknown key.*did you mean 'title'|title: the key",
        ),
        ('source = "me"', 'source = ""', "source: .*at least 1"),
        ('source = "me"\n', "", "source: the key is missing"),
        ('basis = "assumed"', 'basis = "felt"', "basis: .*'felt'"),
        ("cpuid = 3", "cpuid = -3", "exits.cpuid: .*-3"),
        ("cpuid = 3", "cpuid = nan", "exits.cpuid: "),
        ("cpuid = 3", "cpuid = 1e300", "exits.cpuid: "),
        ("cpuid = 3", 'cpuid = "3"', "exits.cpuid: "),
        ("cpuid = 3", "cpiud = 3", "exits: unknown handler.*did you mean 'cpuid'"),
        ("cpuid = 3\nhlt = 1", "cpuid = 0", "no exit has a weight"),
        ("cpuid = 3\nhlt = 1\n", "", "exits: "),
        ('l1 = "kvm-5.3"', 'l1 = "kvm-5.4"', "unknown L1 hypervisor.*kvm-5.3"),
        ('l1 = "kvm-5.3"', 'l1 = "kvm-5.3"\nvariant = "x"', "unknown variant"),
        ('l1 = "kvm-5.3"', 'l1 = "kvm-5.3"\nwithout = ["VMREED X"]', "without: unknown operation"),
        ('name = "mine"', 'name = "yours"', "name: the name must be the file's"),
        ('name = "mine"', 'name = "Mine!"', "name: "),
        ("[exits]", "[exits", "malformed TOML"),
        (
            "hlt = 1",
            "hlt = 1\n[host]\nevmsc = true",
            "host.evmsc: unknown key.*did you mean 'evmcs'",
        ),
        ("hlt = 1", "hlt = 1\n[host]\nevmcs = 1", "host.evmcs: "),
        ("hlt = 1", "hlt = 1\n[conditions]\npml_in_l2 = 1", "did you mean 'pml_in_l1'"),
        ("hlt = 1", "hlt = 1\n[conditions]\npml_in_l1 = 2", "conditions.pml_in_l1.p: "),
        ("hlt = 1", "hlt = 1\n[conditions]\npml_in_l1 = {q = 1}", "conditions.pml_in_l1.*"),
        ("hlt = 1", "hlt = 1\n[conditions]\nins_destination = 1", "no handler of this mix"),
        (
            "hlt = 1",
            "hlt = 1\n[conditions]\npml_in_l1 = {p = 0, low = 0.5}",
            "outside its own range",
        ),
    ],
)
def test_bad_mixes_name_the_file_and_the_key(tmp_path, old, new, message):
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(LabError, match=message) as caught:
        mixes.load(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value) or "unknown" in str(caught.value)


def test_bad_names_and_files_are_refused(tmp_path):
    with pytest.raises(LabError, match=r"unknown mix.*did you mean 'pio-user-kstack'"):
        mixes.load("pio-user-kstak")
    with pytest.raises(LabError, match="cannot be read"):
        mixes.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LabError, match="not UTF-8"):
        mixes.load(tmp_path / "binary.toml")
    with pytest.raises(LabError, match="cannot be read"):
        mixes.load(f"{tmp_path}/")
