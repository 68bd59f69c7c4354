"""What L0 is: a KVM release with its features, a sync policy, and the machine that it runs on."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.policies import SYNC_POLICIES

RELEASES_TABLE = "l0_releases.toml"

LOGGED_RELEASE = "6.1"
"""The release that was executed: ``data/l0_lengths.csv`` holds its lengths."""


@dataclass(frozen=True)
class Release:
    """A KVM release as a set of features.

    Attributes
    ----------
    name : str
        As asked for: a base release and switched features, ``"5.3+ibpb"``.
    features : frozenset of str
        Names from ``data/l0_releases.toml``.
    source : str
        Where the base release's feature set comes from.
    """

    name: str
    features: frozenset[str]
    source: str

    @property
    def sync(self) -> str:
        """The release's own sync policy."""
        return "lazy" if "patch13" in self.features else "eager"

    @property
    def shadow_rw(self) -> frozenset[str]:
        """The fields that L1 reads and writes without an exit."""
        fields = vmcs.shadow_rw(self._shadow_version)
        if "patch43" in self.features:
            fields |= vmcs.shadow_rw("5.3") - vmcs.shadow_rw("patch13")
        if "shadow-host-rsp" in self.features:
            fields |= {"HOST_RSP"}
        return fields

    @property
    def shadow_ro(self) -> frozenset[str]:
        """The fields that L1 reads without an exit and does not write so."""
        return vmcs.shadow_ro(self._shadow_version)

    @property
    def _shadow_version(self) -> str:
        return "patch13" if "patch08" in self.features else "5.2"


@functools.cache
def _table() -> dict[str, Any]:
    return tomllib.loads(data.path(RELEASES_TABLE).read_text(encoding="utf-8"))


def features() -> Mapping[str, Mapping[str, Any]]:
    """Return every feature with its meaning and source."""
    return dict(_table()["features"])


def base_features(name: str) -> frozenset[str]:
    """Return the features of a base release, those of the release it extends included."""
    entry = _table()["releases"][name]
    inherited = base_features(entry["extends"]) if "extends" in entry else frozenset()
    return inherited | frozenset(entry["features"])


def releases() -> tuple[Release, ...]:
    """Return the base releases, oldest first."""
    table = _table()["releases"]
    return tuple(Release(name, base_features(name), table[name]["source"]) for name in table)


def release(spec: str) -> Release:
    """Read a release: a base and features switched on (``+``) or off (``-``).

    Parameters
    ----------
    spec : str
        ``"5.2"``, ``"5.2+patch13"``, ``"5.3+ibpb"``, ``"6.1-migration-sync"``.

    Raises
    ------
    LabError
        If the base or a feature is unknown, or a switch changes nothing.
    """
    where = f"KVM release {spec!r}"
    # A patch level ("6.1.192") is its release: none is known to differ.
    spec = re.sub(r"^(\d+\.\d+)\.\d+", r"\1", spec.strip())
    base, switches = re.fullmatch(r"([^+-]*)(.*)", spec, re.DOTALL).groups()  # type: ignore[union-attr]
    by_name = {r.name: r for r in releases()}
    if base not in by_name:
        raise unknown("KVM release", base, by_name, where=where)
    chosen = set(by_name[base].features)
    # Names hold hyphens ("no-ibpb-switch"), so a switch ends where the next sign follows a whole
    # name.
    names = "|".join(sorted(features(), key=len, reverse=True))
    while switches:
        match = re.match(rf"([+-])({names})(?=[+-]|$)", switches)
        if match is None:
            raise unknown("feature", switches[1:].split("+")[0], features(), where=where)
        sign, feature = match.groups()
        if (feature in chosen) == (sign == "+"):
            state = "already has" if sign == "+" else "does not have"
            raise LabError(f"{base} {state} this feature", where=where, got=sign + feature)
        chosen.symmetric_difference_update({feature})
        switches = switches[match.end() :]
    return Release(spec, frozenset(chosen), by_name[base].source)


@dataclass(frozen=True)
class Config:
    """Everything that L0's behaviour depends on besides the operations.

    Attributes
    ----------
    kvm : Release
        L0's KVM.
    sync : str
        Name of a policy in `nvmx_lab.nested.policies`.
    shadow_vmcs, evmcs : bool
        Whether L1 gets hardware VMCS shadowing, or uses an enlightened VMCS (never both).
    mpx, apicv, pml, preemption_timer : bool
        Features of L0's CPU.
    vid : bool
        L1 uses virtual-interrupt delivery and posted interrupts for L2.
    pae : bool
        L2 uses PAE paging.
    tpr_shadow, load_pat : bool
        L1 uses a TPR shadow for L2; L1 loads IA32_PAT at nested entry and exit.
    legacy, efer_host, x2apic : bool
        L2 starts outside IA-32e mode; with the host's EFER; with its APIC in x2APIC mode.
    """

    kvm: Release
    sync: str
    shadow_vmcs: bool = True
    evmcs: bool = False
    mpx: bool = True
    apicv: bool = True
    pml: bool = True
    preemption_timer: bool = True
    vid: bool = False
    pae: bool = False
    tpr_shadow: bool = True
    load_pat: bool = True
    legacy: bool = False
    efer_host: bool = False
    x2apic: bool = False

    @classmethod
    def of(cls, kvm: str, sync: str | None = None, **options: bool) -> Config:
        """Build a configuration from a KVM spec, a policy (None: the release's own) and options.

        Raises
        ------
        LabError
            If a name is unknown, or the options exclude each other.
        """
        rel = release(kvm)
        if sync is not None and sync not in SYNC_POLICIES:
            raise unknown("sync policy", sync, SYNC_POLICIES)
        known = {name for name in cls.__dataclass_fields__ if name not in ("kvm", "sync")}
        for name in options:
            if name not in known:
                raise unknown("option of L0", name, known)
        if options.get("evmcs"):
            # An L1 with an enlightened VMCS executes no VMREAD or VMWRITE: there is nothing to
            # shadow.
            options = {**options, "shadow_vmcs": False}
        return cls(rel, sync or rel.sync, **options)

    def flipped(self, *options: str) -> Config:
        """Return the same L0 with each of these options switched to its other value."""
        changes: dict[str, Any] = {name: not getattr(self, name) for name in options}
        return replace(self, **changes)

    def with_sync(self, sync: str) -> Config:
        """Return the same L0 with another sync policy."""
        return replace(self, sync=sync)
