"""Sync policies: when rare guest fields move from vmcs02 to vmcs12.

A policy is a class with a hook for each moment at which it may act. The base class is the patch's
own rule; a policy overrides what it does otherwise, and registers under a name::

    @register("often")
    class Often(SyncPolicy):
        meaning = "eager after an HLT, else lazy"

        def at_exit(self, l0, reason, *, foreseen):
            return reason != "HLT"

`nvmx_lab.nested.explorer` decides whether it is right; the tests run it on every registered policy.
One that only guesses at the exit is shorter as a `Predictor`, and cannot be wrong:
`nvmx_lab/study/example_policy.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, Final

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

    def at_entry(self, l0: Nvmx) -> None:
        """L2 is about to be entered: whatever L1 needed since the last exit, it has asked for."""

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


class Predictor(SyncPolicy):
    """Guesses at each exit whether L1 will need a rare field; the patch's rule mends a wrong guess.

    L1's accesses to rare fields exit to L0 whether or not these were copied, so L0 sees after which
    exits L1 needed them. A subclass says what to `expect`, and what to `learn` from what came. Both
    get what was learned and never L0: all that a predictor can do is to choose at an exit. So the
    explorer lets every exit go either way, and what it says holds for every predictor.
    """

    first: ClassVar[Hashable] = None
    """What is known before the first exit."""

    def expect(self, learned: Any, reason: str) -> bool:
        """Return whether L1 will need a rare field after an exit for this reason."""
        raise NotImplementedError

    def learn(self, learned: Any, reason: str, *, needed: bool) -> Hashable:
        """Return what is known when L1 resumes L2; `needed`: L1 needed a rare field.

        It must be bounded: each value that it can have is a control state.
        """
        raise NotImplementedError

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse attributes: states are revisited."""
        mend = "return it from `learn`"
        raise LabError("a predictor has attributes of its own", got=name, mend=mend)

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        """Stay unless L1 is expected to need them, or L0 itself forces the exit."""
        del foreseen
        learned, _, _ = self._memory(l0)
        l0.remember((learned, reason, False))
        return not (reason and self.expected(learned, reason))

    def expected(self, learned: Hashable, reason: str) -> bool:
        """Return what `expect` does.

        Raises
        ------
        LabError
            If it is not True or False.
        """
        got: object = self.expect(learned, reason)
        if not isinstance(got, bool):
            where = f"expect of {type(self).__name__}"
            raise LabError("a predictor must expect True or False", where=where, got=got)
        return got

    def at_entry(self, l0: Nvmx) -> None:
        """Learn from the exit; one that L0 forced teaches nothing."""
        learned, reason, needed = self._memory(l0)
        if reason:
            learned = self.learn(learned, reason, needed=needed)
        l0.remember((learned, "", False))

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        """Notice a VMREAD that needs a rare field."""
        if vmcs.is_rare(name):
            self._notice(l0)
        super().before_vmread(l0, name)

    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        """Notice a VMWRITE that needs them all."""
        if not l0.is_shadow_field_rw(name):
            self._notice(l0)
        super().before_vmwrite(l0, name)

    def before_release(self, l0: Nvmx) -> None:
        """Notice that L1 leaves its VMCS."""
        self._notice(l0)
        super().before_release(l0)

    def before_get_nested_state(self, l0: Nvmx) -> None:
        """Notice what makes L0 pull for its user space."""
        if l0.has("migration-sync"):
            self._notice(l0)
        super().before_get_nested_state(l0)

    def _notice(self, l0: Nvmx) -> None:
        learned, reason, _ = self._memory(l0)
        l0.remember((learned, reason, bool(reason)))

    def _memory(self, l0: Nvmx) -> tuple[Hashable, str, bool]:
        """Return what was learned, the reason of the exit, and whether L1 needed a field since."""
        memory: Any = l0.control.policy_memory
        return memory or (self.first, "", False)


SYNC_POLICIES: dict[str, type[SyncPolicy]] = {}
"""Sync policy by name, those of users included."""


def register(name: str) -> Callable[[type[SyncPolicy]], type[SyncPolicy]]:
    """Return a class decorator that makes a policy known under a name.

    Raises
    ------
    LabError
        If the name is taken by another class, or a public method is no hook.
    """

    def decorate(policy: type[SyncPolicy]) -> type[SyncPolicy]:
        hooks = [hook for hook in vars(SyncPolicy) if hook.startswith(("at_", "before_"))]
        if issubclass(policy, Predictor):
            hooks = ["expect", "learn"]
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
            l0.copy_some_rare_fields((name,))


@register("oracle")
class Oracle(SyncPolicy):
    """The lower bound for policies that copy all rare fields or none."""

    meaning = "knows the future: reads at the exit if L1 will need them, never pulls"

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        """Sync at once if L1 will need a rare field."""
        del l0, reason
        return not foreseen


RARE_GROUPS: Final = ("_SELECTOR", "_LIMIT", "_AR_BYTES", "_BASE", "")
"""Groups of rare fields, by how the name ends: the last one takes the rest."""


@functools.cache
def rare_group(group: str) -> frozenset[str]:
    """Return the rare fields of one of `RARE_GROUPS`."""
    return frozenset(name for name in vmcs.rare() if _group(name) == group)


def _group(name: str) -> str:
    return next(ending for ending in RARE_GROUPS if name.endswith(ending))


@register("group-wise")
class GroupWise(SyncPolicy):
    """Between the patch and per-field: what L1 reads together comes together.

    `Control.policy_memory` is the set of groups fetched since the exit; None while there are none.
    """

    meaning = "the group of the field that L1 reads (selectors, limits, access rights, bases, rest)"

    def at_exit(self, l0: Nvmx, reason: str, *, foreseen: bool) -> bool:
        """All stay; what was fetched before is old now."""
        del reason, foreseen
        l0.remember(None)
        return True

    def at_entry(self, l0: Nvmx) -> None:
        """L2 changes its state: forget."""
        l0.remember(None)

    def before_vmread(self, l0: Nvmx, name: str) -> None:
        """Fetch the field's group, once."""
        if name in l0.rare:
            self._fetch(l0, {_group(name)})

    def before_vmwrite(self, l0: Nvmx, name: str) -> None:
        """Fetch what is missing: the dirty entry will write all rare fields."""
        if not l0.is_shadow_field_rw(name):
            self._fetch(l0, set(RARE_GROUPS))

    def before_release(self, l0: Nvmx) -> None:
        """Fetch what is missing."""
        self._fetch(l0, set(RARE_GROUPS))

    def before_get_nested_state(self, l0: Nvmx) -> None:
        """Fetch what is missing."""
        if l0.has("migration-sync"):
            self._fetch(l0, set(RARE_GROUPS))

    @staticmethod
    def _fetch(l0: Nvmx, groups: set[str]) -> None:
        """Fetch those of the groups that were not fetched since the exit."""
        memory = l0.control.policy_memory
        fetched = memory if isinstance(memory, frozenset) else frozenset()
        missing = groups - fetched
        if not l0.control.need_sync_vmcs02_to_vmcs12_rare or not missing:
            return
        fetched |= missing
        complete = fetched.issuperset(RARE_GROUPS)
        l0.copy_some_rare_fields(frozenset().union(*map(rare_group, missing)), last=complete)
        l0.remember(None if complete else fetched)


_MOST: Final = 3  # of a counter of two bits
_LIKELY: Final = 2


def _counted(counter: int, *, needed: bool) -> int:
    return min(counter + 1, _MOST) if needed else max(counter - 1, 0)


@register("adaptive")
class Adaptive(Predictor):
    """Expects what the last exits were like, whatever their reasons: one 2-bit counter."""

    meaning = "eager while L1 needs rare fields after most exits, else lazy (2-bit counter)"
    first = 0

    def expect(self, learned: Any, reason: str) -> bool:
        """Expect a need from the middle of the counter on."""
        del reason
        return bool(learned >= _LIKELY)

    def learn(self, learned: Any, reason: str, *, needed: bool) -> Hashable:
        """Count up or down."""
        del reason
        return _counted(learned, needed=needed)


TRACKED_REASONS: Final = 2
"""Exit reasons for which `by-reason` has a counter. KVM could have one for each; here every
combination of their values is a control state."""


@register("by-reason")
class ByReason(Predictor):
    """Expects what the last exits for the same reason were like: a 2-bit counter for a few reasons.

    A reason gets a counter when L1 needs a rare field after it, and loses it when it is back at 0.
    If there is none to be had, those of the others go down: the reasons after which L1 needs them
    most keep theirs. What is learned is ((reason, counter), ...), sorted.
    """

    meaning = f"eager after exits for reasons that needed it ({TRACKED_REASONS} counters of 2 bits)"
    first = ()

    def expect(self, learned: Any, reason: str) -> bool:
        """Expect a need from the middle of the reason's counter on."""
        return bool(dict(learned).get(reason, 0) >= _LIKELY)

    def learn(self, learned: Any, reason: str, *, needed: bool) -> Hashable:
        """Count up or down for the reason."""
        counters: dict[str, int] = dict(learned)
        if needed and reason not in counters and len(counters) == TRACKED_REASONS:
            counters = {name: count - 1 for name, count in counters.items()}
        else:
            counters[reason] = _counted(counters.get(reason, 0), needed=needed)
        return tuple(sorted((name, count) for name, count in counters.items() if count))
