"""Sweeps: one comparison over a grid, simulated once per stream, priced many times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from nvmx_lab.costs import prices
from nvmx_lab.errors import LabError
from nvmx_lab.study.compare import pairs_of, priced
from nvmx_lab.study.simulate import EXITS, simulate_mix

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    mixes: Sequence[str],
    *,
    kvm: Sequence[Sequence[str]] = (("5.2", "5.2+patch13"),),
    cpu: Sequence[str] = (prices.DEFAULT,),
    exits: int = EXITS,
    seed: int = 1,
    draws: int = prices.DRAWS,
    allow_unknown: bool = False,
) -> pd.DataFrame:
    """Compare over every combination of mixes, pairs of releases and price lists.

    Parameters
    ----------
    mixes : sequence of str
        Names of mixes.
    kvm : sequence of pairs of str
        Pairs of releases.
    cpu : sequence of str
        Price lists; they share the simulation and the price draws.
    exits, seed, draws, allow_unknown
        As in `nvmx_lab.study.compare.compare`.

    Returns
    -------
    DataFrame
        One row per combination: kvm_before, kvm_after, cpu, and the columns of
        `Comparison.summary`.

    Raises
    ------
    LabError
        If a list is empty or a comparison is refused.
    """
    import pandas as pd

    for name, given in (("mixes", mixes), ("kvm", kvm), ("cpu", cpu)):
        if isinstance(given, str) or not given:
            raise LabError("needs a list with at least one entry", where=name, got=given)
    lists = [prices.load(name) for name in cpu]
    rows = []
    grid = list(itertools.product(mixes, kvm))
    for mix, releases in tqdm(grid, unit="mix", disable=None, delay=1):
        pairs = pairs_of(releases, None)
        loaded, simulated = simulate_mix(
            mix, [k for k, _ in pairs], [s for _, s in pairs], exits=exits, seed=seed
        )
        for price_list in lists:
            result = priced(
                loaded, simulated, price_list, seed=seed, draws=draws, allow_unknown=allow_unknown
            )
            before, after = result.results
            rows.append(
                {
                    "kvm_before": before.kvm,
                    "kvm_after": after.kvm,
                    "cpu": price_list.id,
                    **result.summary(),
                }
            )
    return pd.DataFrame(rows)
