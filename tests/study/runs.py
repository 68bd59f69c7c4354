"""Executed runs made from the shipped ones, for tests: other configurations, damaged files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nvmx_lab import data, vmcs

NAME = "made"


def write(
    folder: Path,
    exits: pd.DataFrame,
    l1_ops: pd.DataFrame,
    segments: pd.DataFrame | None = None,
    **settings: str | bool,
) -> Path:
    """Write a run called `NAME`; `settings` are those of RUN.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        **{"kvm": "6.1", "sync": "lazy", "shadow_vmcs": True, "evmcs": False, "mpx": False},
        **{"l1": "made by a test", "l2": "made by a test"},
        **settings,
    }
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in given.items()
    ]
    (folder / f"{NAME}.toml").write_text("\n".join(lines) + "\n")
    exits.to_parquet(folder / f"{NAME}.exits.parquet")
    l1_ops.to_parquet(folder / f"{NAME}.l1_ops.parquet")
    if segments is not None:
        segments.to_parquet(folder / f"{NAME}.segments.parquet")
    return folder


def read(run: str, table: str) -> pd.DataFrame:
    """Read a table of a shipped run."""
    return pd.read_parquet(data.path("executed", f"{run}.{table}.parquet"))


def without_shadow_vmcs(run: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the exits and L1's operations of a run as they would be without a shadow VMCS.

    By hand, from the executed numbers (data/README.md): every access of L1 exits and costs L0 12
    VMREADs and 2 VMWRITEs; the exit leg loses the copy of 35 fields to the shadow VMCS, the entry
    that of 24 fields from it; a VMWRITE of a read-only shadowed field no longer updates the shadow.
    For runs whose L1 loads no other VMCS: that copies too.
    """
    exits, ops = read(run, "exits").set_index("exit"), read(run, "l1_ops")
    ops["op"] = ops["op"].astype(str)
    access = ops["op"].isin(["VMREAD", "VMWRITE"])

    def per_exit(rows: pd.Series) -> pd.Series:
        return ops[rows].groupby("exit").size().reindex(exits.index, fill_value=0)

    new = per_exit(access & ~ops["trapped"])
    entered = per_exit(ops["op"].isin(["VMRESUME", "VMLAUNCH"])).clip(upper=1)
    read_only = {vmcs.field(name).encoding for name in vmcs.shadow_ro("5.3")}
    updates = per_exit((ops["op"] == "VMWRITE") & ops["field"].isin(read_only))
    exits["l0_vmread"] += 12 * new - 24 * entered
    exits["l0_vmwrite"] += 2 * new - 35 - updates
    exits["l0_vmptrld"] += -2 - 2 * entered - 2 * updates
    exits["l0_vmclear"] += -1 - entered - updates
    exits["l1_exits"] += new
    return exits.reset_index(), ops.assign(trapped=ops["trapped"] | access)
