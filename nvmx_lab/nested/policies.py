"""Sync policies: when rare guest fields move from vmcs02 to vmcs12.

A policy is a class with a hook for each moment at which it may act. The base class is the patch's
own rule; a policy overrides what it does otherwise, and registers under a name::

    @register("often")
    class Often(SyncPolicy):
        meaning = "eager after an HLT, else lazy"

        def at_exit(self, l0, reason, *, foreseen):
            return reason != "HLT"

`nvmx_lab.nested.explorer` decides whether it is right; the tests run it on every registered policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from nvmx_lab import vmcs
from nvmx_lab.errors import LabError, unknown

if TYPE_CHECKING:
    from nvmx_lab.nested.model import Nvmx


class SyncPolicy:
    """The patch's rule: leave the rare fields in vmcs02, pull all of them when L1 needs one.

    Hooks get the L0 that they act on. They may call `Nvmx.copy_vmcs02_to_vmcs12_rare` and its like,
    read `Nvmx.control`, and keep something hashable in `Control.policy_memory` by `Nvmx.remember`.
    Attributes of their own are refused: states are revisited. What decides must not be a value of a
    field, the trace, or a part of the control state that is only about cost or about control fields
    (`written`): the explorer takes those as constant.
    """

    meaning: ClassVar[str] = "all rare fields are read when L1 first needs one: the patch"

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        """Return whether the rare fields stay in vmcs02 at this nested exit.

        Parameters
        ----------
        l0 : Nvmx
            L0, vmcs02 loaded.
        reason : str
            Basic exit reason; empty where L0 forces the exit (SMI, KVM_SET_NESTED_STATE).
        foreseen : bool
            Whether L1 will need a rare field before it resumes L2: for policies that know the
            future.
        """
        del l0, reason, foreseen
        return True

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        """L1's VMREAD of a field trapped and vmcs12 is about to be read."""
        if vmcs.is_rare(name):
            l0.copy_vmcs02_to_vmcs12_rare()

    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        """L1's VMWRITE of a field trapped and vmcs12 is about to be written."""
        if not l0.is_shadow_field_rw(name):
            # Else the field is crushed by a later pull, or the dirty entry consumes a stale one.
            l0.copy_vmcs02_to_vmcs12_rare()

    def before_release(self, l0: Nvmx) -> None:
        """vmcs12 is about to be written back to L1's memory (VMCLEAR, VMPTRLD of another)."""
        l0.copy_vmcs02_to_vmcs12_rare()

    def before_get_nested_state(self, l0: Nvmx) -> None:
        """KVM_GET_NESTED_STATE while L1 runs."""
        if l0.has("migration-sync"):
            l0.copy_vmcs02_to_vmcs12_rare()


SYNC_POLICIES: dict[str, type[SyncPolicy]] = {}
"""Sync policy by name, those of users included."""


def register(name: str) -> Callable[[type[SyncPolicy]], type[SyncPolicy]]:
    """Return a class decorator that makes a policy known under a name.

    Raises
    ------
    LabError
        If the name is taken by another class, or a public method is no hook.
    """
    hooks = [hook for hook in vars(SyncPolicy) if hook.startswith(("at_", "before_"))]

    def decorate(policy: type[SyncPolicy]) -> type[SyncPolicy]:
        for method in vars(policy):
            public = callable(getattr(policy, method)) and not method.startswith("_")
            if public and method not in hooks:
                raise unknown("hook", method, hooks, where=f"sync policy {name!r}")
        known = SYNC_POLICIES.get(name)
        # A notebook's cell may run twice and define its class anew.
        if known is not None and known.__qualname__ != policy.__qualname__:
            raise LabError("there is a sync policy of this name already", got=name)
        SYNC_POLICIES[name] = policy
        return policy

    return decorate


@register("eager")
class Eager(SyncPolicy):
    """KVM before the patch."""

    meaning = "every rare field is read at each nested exit (KVM before the patch)"

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        """Nothing stays."""
        del l0, reason, foreseen
        return False


register("lazy")(SyncPolicy)


@register("per-field")
class PerField(SyncPolicy):
    """The alternative that the patch's message rejects."""

    meaning = "only the field that L1 reads; all when L1 dirties vmcs12 (the patch rejects it)"

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        """Fetch the one field; there is no memory of what was fetched before."""
        if vmcs.is_rare(name):
            l0.copy_one_rare_field(name)


@register("oracle")
class Oracle(SyncPolicy):
    """The lower bound of what any policy can cost."""

    meaning = "knows the future: reads at the exit if L1 will need them, never pulls (lower bound)"

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        """Sync at once if L1 will need a rare field."""
        del l0, reason
        return not foreseen
