"""The protocol's example, imported: whether the prices come back that it was simulated with."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nvmx_lab import data
from nvmx_lab.costs import measured
from nvmx_lab.costs.simulated_timings import KNOWN

if TYPE_CHECKING:
    import pandas as pd

EXAMPLE = ("protocol", "example-simulated.csv")
"""Where the example is below the data folder."""


def recovered() -> pd.DataFrame:
    """Return the prices that the import makes of the simulated example, beside the known ones.

    Returns
    -------
    DataFrame
        One row per price: quantity, known_cycles, p05, p50, p95 (over the simulated boots),
        error_percent (of the median), basis.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "simulated-example.toml"
        frame = measured.import_csv(data.path(*EXAMPLE), id=out.stem, out=out).frame()
    prices = frame[frame["price"]].drop(columns=["price", "residual_percent"])
    known = prices["quantity"].map(KNOWN)
    prices.insert(1, "known_cycles", known)
    prices.insert(5, "error_percent", 100 * (prices["p50"] / known - 1))
    return prices.reset_index(drop=True)
