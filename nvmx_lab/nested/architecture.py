"""What nested VMX must look like from outside, one VMCS field at a time, with no mechanism at all.

A VMCS is memory, a VM entry loads L2's state from it, a VM exit stores all of it back: eager
copying in its purest form. Whatever L0 does to be fast, L1, L2 and the target of a migration must
not be able to tell. `nvmx_lab.nested.explorer` holds the model to this.

Fields never mix, so the specification needs only one: the five cells where its value can be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from nvmx_lab import vmcs
from nvmx_lab.nested.config import Config

CELLS = ("page", "l2", "A", "B", "smram")
"""The current VMCS, L2's register, the VMCS regions A and B in L1's memory, SMRAM."""

UNCHANGED_BY_L2 = frozenset(
    {
        "GUEST_ACTIVITY_STATE",
        "GUEST_DR7",
        "GUEST_IA32_DEBUGCTL",
        "GUEST_IA32_EFER",
        "GUEST_IA32_PAT",
        "VMX_PREEMPTION_TIMER_VALUE",
    }
)
"""Guest state that KVM saves from software or under exit controls that the model's L1 leaves off.

To L1 these are fields like any control field.
"""


UNKNOWN_AFTER_RSM = frozenset({"GUEST_BNDCFGS", "GUEST_INTERRUPTIBILITY_INFO"})
"""State that neither SMRAM nor an entry without VMRESUME restores; who does is not modelled."""


class Fail(NamedTuple):
    """VMfailValid with its number, or VMfailInvalid (None)."""

    number: int | None


Value = TypeVar("Value")
Cells = dict[str, Value]


def role(name: str, config: Config) -> str:
    """Return what a field is to L2's exits.

    Returns
    -------
    str
        ``"saved"``: loaded at entry, saved at exit. ``"exit-info"``: written by the CPU at exit.
        ``"error"``: the number of the last VMfail. ``"written"``: only L1 writes it.
    """
    field = vmcs.field(name)
    if name == "VM_INSTRUCTION_ERROR":
        return "error"
    if field.group == "exit-info(read-only)":
        return "exit-info"
    has = {
        "GUEST_BNDCFGS": config.mpx,
        "GUEST_INTR_STATUS": config.vid,
        **dict.fromkeys((f"GUEST_PDPTR{n}" for n in range(4)), config.pae),
    }
    saved = field.group == "guest" and field.synced_at_exit("5.2") and name not in UNCHANGED_BY_L2
    return "saved" if saved and has.get(name, True) else "written"


class Standing(NamedTuple):
    """Where L1 stands: all that decides what an instruction does, besides the values.

    Attributes
    ----------
    vmxon, in_l2, smm, interrupted : bool
        L1 is in VMX operation; L2 runs; an SMI took the vCPU out of L2; L2 has left, but a signal
        keeps L1 from running.
    current : str or None
        The current VMCS.
    page_launched : bool
        Whether the current VMCS is launched.
    launched : frozenset of str
        Regions whose launch state, as memory has it, is "launched".
    active : frozenset of str
        Regions of VMCSs that were loaded and not cleared since.
    """

    vmxon: bool = False
    in_l2: bool = False
    smm: bool = False
    interrupted: bool = False
    current: str | None = None
    page_launched: bool = False
    launched: frozenset[str] = frozenset()
    active: frozenset[str] = frozenset()


class Architecture:
    """The specification for one field.

    Parameters
    ----------
    role : str
        As `role` returns.
    in_smram : bool
        Whether SMI and RSM save and load the register behind the field.
    after_rsm : bool
        Whether the register is known after RSM: all but `UNKNOWN_AFTER_RSM`.
    standing : Standing
        Where L1 stands.
    cells : dict
        Value in each of `CELLS`. Values are opaque: they are only copied.
    """

    def __init__(
        self,
        role: str,
        *,
        in_smram: bool,
        after_rsm: bool,
        standing: Standing,
        cells: Cells[object],
    ) -> None:
        self.role, self.in_smram, self.after_rsm = role, in_smram, after_rsm
        self.standing, self.cells = standing, dict(cells)

    def _stand(self, **changes: object) -> None:
        self.standing = self.standing._replace(**changes)  # type: ignore[arg-type]

    def _with_current(self, act: Callable[[], Fail | None]) -> Fail | None:
        return Fail(None) if self.standing.current is None else act()

    def fail(self, number: int) -> Fail:
        """VMfailValid: the number goes to the current VMCS."""
        if self.role == "error":
            self.cells["page"] = number
        return Fail(number)

    # -- what L1 does --------------------------------------------------------------------------

    def vmxon(self) -> None:
        """VMXON."""
        self._stand(vmxon=True)

    def vmxoff(self) -> None:
        """VMXOFF: every VMCS that was not cleared is undefined (SDM, "VMXOFF" and VMCS states)."""
        self.forget_active()
        self._stand(vmxon=False, current=None, page_launched=False)

    def forget_active(self) -> None:
        """Leave the regions of active VMCSs undefined."""
        for pointer in self.standing.active:
            self.cells[pointer] = None
        self._stand(active=frozenset())

    def _write_back(self) -> None:
        current = self.standing.current
        if current is None:
            return
        self.cells[current] = self.cells["page"]
        others = self.standing.launched - {current}
        launched = others | {current} if self.standing.page_launched else others
        self._stand(current=None, page_launched=False, launched=launched)

    def vmptrld(self, pointer: str) -> None:
        """VMPTRLD: the VMCS that was current reaches memory."""
        if pointer != self.standing.current:
            self._write_back()
            self.cells["page"] = self.cells[pointer]
            self._stand(
                current=pointer,
                page_launched=pointer in self.standing.launched,
                active=self.standing.active | {pointer},
            )

    def vmclear(self, pointer: str) -> None:
        """VMCLEAR."""
        if pointer == self.standing.current:
            self._write_back()
        standing = self.standing
        self._stand(launched=standing.launched - {pointer}, active=standing.active - {pointer})

    def vmread(self) -> object:
        """VMREAD of the field."""
        return Fail(None) if self.standing.current is None else self.cells["page"]

    def vmwrite(self, value: object) -> Fail | None:
        """VMWRITE of the field."""

        def act() -> None:
            self.cells["page"] = value

        return self._with_current(act)

    def other_field(self, exists: bool) -> Fail | None:
        """VMREAD or VMWRITE of another field, which may not exist."""
        return self._with_current(lambda: None if exists else self.fail(12))

    def enter(
        self, *, launch: bool, fails: str = "", info: object = None, exits: bool = False
    ) -> Fail | None:
        """VMLAUNCH or VMRESUME; `fails` as in `Nvmx.nested_vmx_run`.

        `exits`: the field is one that a failed entry's exit writes; `info` is its value.
        """

        def act() -> Fail | None:
            if launch == self.standing.page_launched:
                return self.fail(4 if launch else 5)
            if fails == "controls":
                return self.fail(7)
            if fails:
                if exits:
                    self.cells["page"] = info
                return None
            self._stand(page_launched=True)
            self.load()
            return None

        return self._with_current(act)

    # -- what L2 does --------------------------------------------------------------------------

    def load(self) -> None:
        """Load L2's state from the current VMCS."""
        self._stand(in_l2=True)
        if self.role == "saved":
            self.cells["l2"] = self.cells["page"]

    def save(self) -> None:
        """Save L2's state to the current VMCS."""
        self._stand(in_l2=False)
        if self.role == "saved":
            self.cells["page"] = self.cells["l2"]

    def exit(self, info: object, *, interrupted: bool = False) -> None:
        """L2 exits to L1; `info` is what the CPU writes to the field if it is exit information."""
        self.save()
        self._stand(interrupted=interrupted)
        if self.role == "exit-info":
            self.cells["page"] = info

    def run(self) -> None:
        """KVM_RUN, or KVM_SET_NESTED_STATE in a new vCPU: L1 runs if nothing else does."""
        self._stand(interrupted=False)

    def l2_write(self, value: object) -> None:
        """L2 changes its register."""
        self.cells["l2"] = value

    def l2_read(self) -> object:
        """L2 reads its register."""
        return self.cells["l2"]

    def smi(self) -> None:
        """SMI: the vCPU leaves L2; L1 is told nothing."""
        if self.in_smram:
            self.cells["smram"] = self.cells["l2"]
        self.save()
        self._stand(smm=True)

    def rsm(self) -> None:
        """RSM: the vCPU returns to L2."""
        self._stand(smm=False)
        self.load()
        if self.in_smram:
            self.cells["l2"] = self.cells["smram"]
        elif not self.after_rsm:
            self.cells["l2"] = None
