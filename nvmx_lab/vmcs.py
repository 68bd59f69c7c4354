"""The VMCS fields and the sets of them that decide what a nested exit costs.

Everything comes from ``data/vmcs_fields.csv``; no list of fields is typed in code. A *version* is
one of `VERSIONS`: L0's kernel before the patch, at the patch (number 13 of its series) and in the
release.

The classes of a vmcs12 field, by who has its value while L1 runs:

* RW-shadowed: the hardware shadow VMCS; L1 reads and writes it without an exit.
* RO-shadowed: vmcs12, with a copy in the shadow VMCS; L1 reads it without an exit, a VMWRITE exits.
* rare: vmcs02 until the first need (lazy sync), or vmcs12 (eager sync); every access exits.
* every other field: vmcs12; every access exits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from nvmx_lab import data
from nvmx_lab.errors import LabError, unknown

VERSIONS: Final = ("5.2", "patch13", "5.3")
"""Versions of the field sets, oldest first. Later releases (5.8 to 6.1) have the sets of 5.3."""

_SHADOW_COLUMN: Final = dict(
    zip(VERSIONS, ("shadow_v52", "shadow_at_patch13", "shadow_v53"), strict=True)
)
_SYNCED_COLUMN: Final = dict(
    zip(
        VERSIONS,
        ("synced_at_exit_before", "synced_at_exit_after", "synced_at_exit_v53_final"),
        strict=True,
    )
)


@dataclass(frozen=True, slots=True)
class Field:
    """One VMCS field.

    Attributes
    ----------
    name : str
        Its name in KVM, ``GUEST_CS_BASE``.
    encoding : int
        Its VMCS encoding (of the full access type).
    width : str
        ``"16"``, ``"32"``, ``"64"`` or ``"natural"``.
    group : str
        ``"control"``, ``"guest"``, ``"host"`` or ``"exit-info(read-only)"``.
    access_type : str
        ``"full"`` (the catalogue has no ``"high"`` halves).
    vmcs12_member : str
        Member of KVM's ``struct vmcs12``, empty if it has none.
    vmcs12_offset : int or None
        Offset of that member in bytes.
    rare : bool
        One of the 36 fields that the patch syncs only when needed.
    rare_order : int or None
        Place in which KVM's rare reader reads it, from 1.
    shadows : tuple of str
        ``"none"``, ``"ro"`` or ``"rw"`` for each of `VERSIONS`; see `shadow`.
    synced : tuple of bool
        Whether vmcs12 gets the field at each nested exit, for each of `VERSIONS`; see
        `synced_at_exit`.
    requires : str
        Feature of L0's CPU without which KVM leaves the field out of the shadow list (``"pml"``,
        ``"preemption_timer"``, ``"apicv"``) or of the sync (``"mpx"``, ``"apicv"``); empty if none.
    condition : str
        When the sync at exit reads it, in the words of whoever read the source.
    evmcs_clean_group : str
        Clean-field group of the enlightened VMCS, empty if the enlightened VMCS lacks the field.
    source : str
        Where name and encoding come from.
    """

    name: str
    encoding: int
    width: str
    group: str
    access_type: str
    vmcs12_member: str
    vmcs12_offset: int | None
    rare: bool
    rare_order: int | None
    shadows: tuple[str, ...]
    synced: tuple[bool, ...]
    requires: str
    condition: str
    evmcs_clean_group: str
    source: str

    @property
    def in_vmcs12(self) -> bool:
        """Whether KVM (5.3) lets L1 use the field at all."""
        return bool(self.vmcs12_member)

    def shadow(self, version: str = "5.3") -> str:
        """Return ``"rw"``, ``"ro"`` or ``"none"``: how the shadow VMCS serves the field."""
        return self.shadows[_version_index(version)]

    def synced_at_exit(self, version: str = "5.3") -> bool:
        """Return whether vmcs12 gets the field at each nested exit (its condition permitting)."""
        return self.synced[_version_index(version)]


@functools.cache
def catalogue() -> Mapping[str, Field]:
    """Return every field by name, in the order of the table (by encoding).

    Raises
    ------
    LabError
        If the table is missing or a row of it cannot be used.
    """
    return load(data.path("vmcs_fields.csv"))


def load(file: Path) -> Mapping[str, Field]:
    """Read a catalogue from a table of the layout of ``data/vmcs_fields.csv``.

    Raises
    ------
    LabError
        As `catalogue`.
    """
    fields: dict[str, Field] = {}
    # Rows are named by their field here; `nvmx_lab.tables` says the line of every fault.
    for row in data.read_rows(file):
        try:
            entry = _field(row)
        except (KeyError, ValueError) as error:
            raise LabError(
                f"unusable row: {error}",
                where=f"{file}, field {row.get('name', '?')}",
                mend="`nvmx-lab tables check` lists every fault",
            ) from error
        if entry.name in fields:
            raise LabError("field appears twice", where=file, got=entry.name)
        fields[entry.name] = entry
    return MappingProxyType(fields)


def field(name_or_encoding: str | int) -> Field:
    """Return a field by name, by encoding, or by an encoding in text (``"0x6808"``).

    Raises
    ------
    LabError
        If there is none, with a suggestion if a name is near.
    """
    fields = catalogue()
    if isinstance(name_or_encoding, str):
        if name_or_encoding in fields:
            return fields[name_or_encoding]
        if not name_or_encoding.lower().startswith("0x"):
            raise unknown("VMCS field", name_or_encoding, fields)
    try:
        encoding = int(str(name_or_encoding), 0)
        return fields[_by_encoding()[encoding]]
    except (KeyError, ValueError):
        raise LabError(
            "unknown VMCS field",
            got=name_or_encoding,
            allowed=f"a name or encoding among the {len(fields)} fields of data/vmcs_fields.csv",
        ) from None


@functools.cache
def rare(mpx: bool = True) -> tuple[str, ...]:
    """Return the rare fields in the order in which KVM's rare reader reads them.

    Parameters
    ----------
    mpx : bool
        Whether L0's CPU has MPX: only then KVM reads GUEST_BNDCFGS, the last one.

    Returns
    -------
    tuple of str
        36 names with MPX, 35 without. `is_rare` does not depend on MPX: an access by L1 to
        GUEST_BNDCFGS pulls the others all the same.
    """
    found = [entry for entry in catalogue().values() if entry.rare]
    if not mpx:
        found = [entry for entry in found if entry.requires != "mpx"]
    return tuple(entry.name for entry in sorted(found, key=lambda entry: entry.rare_order or 0))


@functools.cache
def saved_in_smram() -> tuple[str, ...]:
    """Return the guest fields whose register an SMI saves in SMRAM and RSM loads from there.

    KVM's enter_smm_save_state_64 and rsm_load_state_64: RIP, RSP, RFLAGS, the control registers and
    everything of the segment and descriptor-table registers.
    """
    registers = {f"GUEST_{r}" for r in ("RIP", "RSP", "RFLAGS", "CR0", "CR3", "CR4")}
    segment = tuple(f"_{part}" for part in ("SELECTOR", "BASE", "LIMIT", "AR_BYTES"))
    return tuple(
        entry.name
        for entry in catalogue().values()
        if entry.group == "guest" and (entry.name in registers or entry.name.endswith(segment))
    )


@functools.cache
def carried_by_user_space() -> tuple[str, ...]:
    """Return the guest fields whose register a migration carries besides the nested state.

    KVM_SET_REGS, KVM_SET_SREGS, KVM_SET_MSRS and KVM_SET_VCPU_EVENTS set them in whoever runs.
    """
    others = ("GUEST_BNDCFGS", "GUEST_INTERRUPTIBILITY_INFO")
    sysenter = tuple(name for name in catalogue() if name.startswith("GUEST_SYSENTER_"))
    return (*saved_in_smram(), *sysenter, *others)


@functools.cache
def host_state() -> tuple[str, ...]:
    """Return the fields of vmcs12 that hold L1's host state: what a VM exit to L1 loads."""
    return tuple(f.name for f in catalogue().values() if f.group == "host" and f.in_vmcs12)


def is_rare(name: str) -> bool:
    """Return KVM's ``is_vmcs12_ext_field``: whether a VMREAD of the field by L1 pulls."""
    return field(name).rare


@functools.cache
def shadow_rw(version: str = "5.3") -> frozenset[str]:
    """Return the fields that L1 reads and writes without an exit.

    On hardware without PML, preemption timer or APICv the fields that `Field.requires` them are not
    among them; that is for the caller to take out.

    Raises
    ------
    LabError
        If the version is not one of `VERSIONS`.
    """
    return _shadowed(version, "rw")


@functools.cache
def shadow_ro(version: str = "5.3") -> frozenset[str]:
    """Return the fields that L1 reads without an exit and whose VMWRITE exits.

    Raises
    ------
    LabError
        If the version is not one of `VERSIONS`.
    """
    return _shadowed(version, "ro")


@functools.cache
def eager(version: str = "5.3") -> frozenset[str]:
    """Return the fields that vmcs12 gets at each nested exit whatever the sync policy.

    These are the synced ones that are not rare; some under a condition (`Field.condition`), and
    some from software state without a VMREAD.

    Raises
    ------
    LabError
        If the version is not one of `VERSIONS`.
    """
    index = _version_index(version)
    return frozenset(f.name for f in catalogue().values() if f.synced[index] and not f.rare)


def _shadowed(version: str, kind: str) -> frozenset[str]:
    index = _version_index(version)
    return frozenset(f.name for f in catalogue().values() if f.shadows[index] == kind)


@functools.cache
def _by_encoding() -> Mapping[int, str]:
    return MappingProxyType({entry.encoding: entry.name for entry in catalogue().values()})


def _version_index(version: str) -> int:
    if version not in VERSIONS:
        raise unknown("version of the field sets", version, VERSIONS)
    return VERSIONS.index(version)


def _field(row: Mapping[str, str]) -> Field:
    return Field(
        name=row["name"],
        encoding=int(row["encoding"], 16),
        width=row["width"],
        group=row["group"],
        access_type=row["access_type"],
        vmcs12_member=row["vmcs12_member"],
        vmcs12_offset=int(row["vmcs12_offset"]) if row["vmcs12_offset"] else None,
        rare=_flag(row["rare"]),
        rare_order=int(row["rare_order"]) if row["rare_order"] else None,
        shadows=tuple(row[column] for column in _SHADOW_COLUMN.values()),
        synced=tuple(_flag(row[column]) for column in _SYNCED_COLUMN.values()),
        requires=row["requires"],
        condition=row["condition"],
        evmcs_clean_group=row["evmcs_clean_group"],
        source=row["source"],
    )


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"
