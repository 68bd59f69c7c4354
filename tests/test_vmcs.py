"""The field catalogue against the counts that the kernel's source gives, typed here once more."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError

SEGMENTS = ("ES", "CS", "SS", "DS", "FS", "GS", "LDTR", "TR")
# is_vmcs12_ext_field of commit 7952d769c29c, in the order in which the rare reader reads.
RARE = (
    *(f"GUEST_{s}_SELECTOR" for s in SEGMENTS),
    *(f"GUEST_{s}_LIMIT" for s in (*SEGMENTS, "GDTR", "IDTR")),
    *(f"GUEST_{s}_AR_BYTES" for s in SEGMENTS if s not in ("CS", "SS")),
    *(f"GUEST_{s}_BASE" for s in (*SEGMENTS, "GDTR", "IDTR")),
    "GUEST_PENDING_DBG_EXCEPTIONS",
    "GUEST_BNDCFGS",
)


def test_numbers_of_fields() -> None:
    fields = vmcs.catalogue().values()
    assert len(fields) == 171
    assert sum(f.in_vmcs12 for f in fields) == 143
    assert len({f.encoding for f in fields}) == 171


def test_the_rare_fields_are_those_of_the_patch_in_reading_order() -> None:
    assert vmcs.rare() == RARE
    assert len(RARE) == 36
    assert vmcs.rare(mpx=False) == RARE[:-1]
    widths = Counter(vmcs.field(name).width for name in vmcs.rare())
    assert widths == {"16": 8, "32": 16, "natural": 11, "64": 1}
    assert vmcs.is_rare("GUEST_BNDCFGS")
    assert not vmcs.is_rare("GUEST_CS_AR_BYTES")
    assert not vmcs.is_rare("GUEST_SS_AR_BYTES")


@pytest.mark.parametrize(
    "run", [p.name.split(".")[0] for p in sorted(data.path("executed").glob("*.l0_ops.parquet"))]
)
def test_executed_kvm_reads_the_rare_fields_in_this_order(run: str) -> None:
    columns = ["exit", "op", "function", "field"]
    table = pq.read_table(data.path("executed", f"{run}.l0_ops.parquet"), columns=columns)
    frame = table.to_pandas()
    frame = frame[(frame["function"] == "sync_vmcs02_to_vmcs12_rare") & (frame["op"] == "VMREAD")]
    logged = set(frame.groupby("exit")["field"].agg(tuple))
    # 6.1 keeps BNDCFGS up to date elsewhere and reads 35.
    assert logged == {tuple(vmcs.field(name).encoding for name in RARE[:-1])}


@pytest.mark.parametrize(
    ("version", "rw", "ro"), [("5.2", 25, 9), ("patch13", 23, 11), ("5.3", 24, 11)]
)
def test_shadow_sets(version: str, rw: int, ro: int) -> None:
    assert len(vmcs.shadow_rw(version)) == rw
    assert len(vmcs.shadow_ro(version)) == ro
    assert not vmcs.shadow_rw(version) & vmcs.shadow_ro(version)
    assert not (vmcs.shadow_rw(version) | vmcs.shadow_ro(version)) & set(RARE)
    assert vmcs.shadow_rw(version) == {
        f.name for f in vmcs.catalogue().values() if f.shadow(version) == "rw"
    }


def test_what_the_series_changed_in_the_shadow_sets() -> None:
    access_rights = {"GUEST_CS_AR_BYTES", "GUEST_SS_AR_BYTES"}
    assert vmcs.shadow_rw("5.2") - vmcs.shadow_rw("patch13") == access_rights  # patch 08
    assert vmcs.shadow_ro("patch13") - vmcs.shadow_ro("5.2") == access_rights
    added = vmcs.shadow_rw("5.3") - vmcs.shadow_rw("patch13")
    assert added == {"PIN_BASED_VM_EXEC_CONTROL"}  # patch 43
    needs_hardware = {f.requires for f in vmcs.catalogue().values() if f.shadow("5.3") == "rw"}
    assert needs_hardware == {"", "pml", "preemption_timer", "apicv"}


def test_what_is_synced_at_every_exit() -> None:
    before = {f.name for f in vmcs.catalogue().values() if f.synced_at_exit("5.2")}
    assert len(before) == 61
    assert set(RARE) <= before
    assert len(vmcs.eager("5.2")) == 25
    assert vmcs.eager("patch13") == vmcs.eager("5.2")
    # 5.3 takes PAT and DEBUGCTL from L2's WRMSR (patches 25 and 27).
    assert vmcs.eager("patch13") - vmcs.eager("5.3") == {"GUEST_IA32_PAT", "GUEST_IA32_DEBUGCTL"}
    assert {"GUEST_CS_AR_BYTES", "GUEST_SS_AR_BYTES", "GUEST_PDPTR0"} <= vmcs.eager()
    for version in vmcs.VERSIONS:
        assert not vmcs.eager(version) & set(RARE)


@pytest.mark.parametrize("key", ["GUEST_CS_BASE", 0x6808, "0x6808"])
def test_a_field_by_name_or_encoding(key: str | int) -> None:
    field = vmcs.field(key)
    assert (field.name, field.encoding, field.width, field.group, field.rare) == (
        "GUEST_CS_BASE",
        0x6808,
        "natural",
        "guest",
        True,
    )


@pytest.mark.parametrize("key", ["0x6809", "0xzz", 1, -1, ""])
def test_an_unknown_field_is_an_error(key: str | int) -> None:
    with pytest.raises(LabError, match="unknown VMCS field"):
        vmcs.field(key)


def test_errors_suggest() -> None:
    with pytest.raises(LabError, match=re.escape("did you mean 'GUEST_CS_BASE'?")):
        vmcs.field("GUEST_CS_BAES")
    for ask in (vmcs.shadow_rw, vmcs.shadow_ro, vmcs.eager):
        with pytest.raises(LabError, match=r"unknown version.*5\.2, 5\.3, patch13"):
            ask("5.4")
    with pytest.raises(LabError, match="unknown version"):
        vmcs.field("GUEST_RIP").shadow("5.4")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0x0000", "zero", "VIRTUAL_PROCESSOR_ID: unusable row"),
        ("true,false,,none", "true,no,,none", "'no' is neither true nor false"),
        ("name,encoding", "name,code", "unusable row: 'encoding'"),
        ("POSTED_INTR_NV", "VIRTUAL_PROCESSOR_ID", "field appears twice"),
    ],
)
def test_an_unusable_catalogue_is_one_clear_error(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = data.path("vmcs_fields.csv").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "vmcs_fields.csv"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(LabError, match=re.escape(message)):
        vmcs.load(file)
