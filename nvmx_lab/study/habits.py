"""Habits: what an L1 can do between an exit and its VMRESUME, and what L0 spends on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from nvmx_lab.costs import prices
from nvmx_lab.costs.pricing import interval, price
from nvmx_lab.nested.config import Config
from nvmx_lab.nested.primitives import COUNTERS
from nvmx_lab.nested.round_trip import round_trip
from nvmx_lab.study.simulate import P

if TYPE_CHECKING:
    import pandas as pd

HABITS: Final[dict[str, tuple[str, ...]]] = {
    "VMREAD of a shadowed field (GUEST_RIP)": ("VMREAD GUEST_RIP",),
    "VMWRITE of a read-write shadowed field (GUEST_RIP)": ("VMWRITE GUEST_RIP",),
    "VMREAD of a field that traps but is not rare (HOST_RIP)": ("VMREAD HOST_RIP",),
    "VMREAD of a rare field (GUEST_GS_BASE)": ("VMREAD GUEST_GS_BASE",),
    "VMREAD of three rare fields": (
        "VMREAD GUEST_GS_BASE",
        "VMREAD GUEST_ES_SELECTOR",
        "VMREAD GUEST_CS_BASE",
    ),
    "VMWRITE of a rare field (GUEST_GS_BASE)": ("VMWRITE GUEST_GS_BASE",),
    "VMWRITE of a read-only shadowed field (GUEST_CS_AR_BYTES)": ("VMWRITE GUEST_CS_AR_BYTES",),
    "VMWRITE of any other field that traps (HOST_RSP)": ("VMWRITE HOST_RSP",),
    "VMPTRLD of another VMCS, and back": ("VMPTRLD other", "VMPTRLD other"),
    "VMCLEAR of the current VMCS, VMPTRLD, VMLAUNCH": ("VMCLEAR current", "VMPTRLD same"),
    "KVM_GET_NESTED_STATE while L1 runs (L0's user space)": ("GET_NESTED_STATE",),
}
"""What an L1 may do between an exit and the entry that resumes L2."""


def habits(
    kvm: str = "6.1",
    *,
    cpu: str = prices.DEFAULT,
    draws: int = prices.DRAWS,
    seed: int = 1,
) -> pd.DataFrame:
    """Price what an L1 can do after an exit, beside doing nothing but resume L2.

    Parameters
    ----------
    kvm : str
        Release of L0, with its lazy sync.
    cpu : str
        Price list.
    draws, seed : int
        Price lists to draw, and their seed.

    Returns
    -------
    DataFrame
        One row per habit: habit, pulls, vmreads and vmwrites (of L0, more than without the habit),
        the cycles of L0 for it (``cycles_p05``, ``_p50``, ``_p95``), and how many of them eager
        copying would not have spent, its reader at the exit counted (``lazy_p05``, ...): negative
        where the lazy sync saves.
    """
    import pandas as pd

    drawn = prices.load(cpu).draw(draws, seed)
    counts = {
        (sync, name): round_trip(
            Config.of(kvm, sync),
            operations,
            "VMLAUNCH" if "VMCLEAR current" in operations else "VMRESUME",
        )[1]
        for sync in ("lazy", "eager")
        for name, operations in {"": (), **HABITS}.items()
    }
    rows = []
    for name in HABITS:
        more = counts["lazy", name] - counts["lazy", ""]
        against = counts["lazy", name] - counts["eager", name]
        both = interval(price(np.array([more[:P], against[:P]]), drawn))
        executed = dict(zip(COUNTERS, more, strict=True))
        rows.append(
            {
                "habit": name,
                "pulls": int(executed["pulls"]),
                "vmreads": int(executed["vmread_first"] + executed["vmread_next"]),
                "vmwrites": int(executed["vmwrite_first"] + executed["vmwrite_next"]),
                **{
                    f"{what}_{quantile}": float(values[row])
                    for row, what in enumerate(("cycles", "lazy"))
                    for quantile, values in zip(("p05", "p50", "p95"), both, strict=True)
                },
            }
        )
    return pd.DataFrame(rows)
