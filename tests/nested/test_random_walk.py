"""The random walk agrees with the explorer: it sees nothing that the explorer missed."""

from __future__ import annotations

import pytest

from nvmx_lab import vmcs
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.explorer import ENVIRONMENTS
from nvmx_lab.nested.model import Nvmx
from nvmx_lab.nested.policies import SYNC_POLICIES
from tests.nested.explored import explored
from tests.nested.random_walk import (
    IN_SMRAM,
    MENDED,
    OLD_MENDED,
    RELEASES,
    Walk,
    Walked,
    Wrong,
    known,
    table,
)

STEPS_MENDED = 3_500  # 5 environments of 4 policies and 3 old releases
STEPS_BUGGY = 13_000


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("sync", sorted(SYNC_POLICIES))
def test_no_value_is_ever_wrong_where_the_explorer_finds_nothing(
    sync: str, environment: str
) -> None:
    walk = Walk(Config.of(MENDED, sync, **ENVIRONMENTS[environment]), seed=5)
    walk.go(STEPS_MENDED)
    assert not walk.wrong
    assert walk.compared > STEPS_MENDED / 10


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("release", OLD_MENDED)
def test_no_value_is_ever_wrong_on_an_old_release_with_every_mend(
    release: str, environment: str
) -> None:
    walk = Walk(Config.of(release, **ENVIRONMENTS[environment]), seed=6)
    walk.go(STEPS_MENDED)
    assert not walk.wrong
    assert walk.compared > STEPS_MENDED / 10


@pytest.mark.xdist_group("explorer")
@pytest.mark.parametrize("release", RELEASES)
def test_whatever_goes_wrong_on_a_release_with_bugs_the_explorer_knows(release: str) -> None:
    walk = Walk(Config.of(release), seed=7)
    walk.go(STEPS_BUGGY)
    assert walk.wrong.keys() <= known(explored(release))
    # The flag that outlives vmcs02 is met by chance too; in 5.2 there is no flag.
    assert bool({w for w in walk.wrong if w.kind == "uninitialised" and vmcs.is_rare(w.field)}) == (
        release != "5.2"
    )


def test_the_walk_sees_a_pull_that_is_missing() -> None:
    class NoPull(Walked):
        def copy_vmcs02_to_vmcs12_rare(self) -> None:
            pass

    walk = Walk(Config.of(MENDED), seed=8, nvmx=NoPull, record=True)
    walk.go(1000)
    assert {wrong.kind for wrong in walk.wrong} >= {"stale"}
    shortest = min(walk.example.values(), key=len)
    assert shortest[-1].startswith(("VMREAD", "L2_READ"))


def test_the_walk_tells_whose_value_a_wrong_one_is() -> None:
    class Keeps(Walked):
        """VMPTRLD leaves one field as it was."""

        def set_current_vmptr(self, vmptr: str, *, launched: bool) -> None:
            if self.evmcs:
                self.vmcs12["HOST_FS_BASE"] = self.evmcs["HOST_FS_BASE"]
            super().set_current_vmptr(vmptr, launched=launched)

        def l1_vmwrite(self, name: str, value: int) -> object:  # type: ignore[override]
            if name == "HOST_FS_BASE":
                self.evmcs[name] = value
            return super().l1_vmwrite(name, value)

    walk = Walk(Config.of(MENDED), seed=9, nvmx=Keeps)
    walk._choose_fields = lambda: setattr(walk, "focus", ["HOST_FS_BASE"])  # type: ignore[method-assign]
    walk.of_l2 = ["GUEST_CR3"]
    walk.go(2000)
    assert set(walk.wrong) == {Wrong("another VMCS's", "HOST_FS_BASE")}


def test_the_same_seed_gives_the_same_walk() -> None:
    first, second, other = (Walk(Config.of("5.3"), seed, record=True) for seed in (1, 1, 2))
    for walk in (first, second, other):
        walk.go(500)
    assert (first.last, first.wrong, first.compared) == (second.last, second.wrong, second.compared)
    assert first.last != other.last


def test_the_table_has_a_row_for_each_release() -> None:
    walks = [(release, "shadow VMCS", Walk(Config.of(release))) for release in ("5.2", "5.3")]
    for _, _, walk in walks:
        walk.go(200)
    head, *rows = table(walks).splitlines()
    assert head.split()[:4] == ["release", "walks", "steps", "compared"]
    assert [row.split()[:3] for row in rows] == [["5.2", "1", "200"], ["5.3", "1", "200"]]


def test_what_an_smi_saves_is_what_the_catalogue_says() -> None:
    assert set(IN_SMRAM) == set(vmcs.saved_in_smram())
    assert issubclass(Walked, Nvmx)
