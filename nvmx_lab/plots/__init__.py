"""Plots: a tidy frame in, a figure and its alternative text out.

A plot computes nothing but its layout: every number in it is a number of the frame. In Jupyter a
plot shows itself when it is the value of a cell.

>>> from nvmx_lab import plots
>>> plots.comparison(nx.compare("cpuid").to_frame())  # doctest: +SKIP
"""

from nvmx_lab.plots.break_even import break_even_rates, saving_over_rate
from nvmx_lab.plots.claims import against_claims, prices
from nvmx_lab.plots.cycles import breakdown, published_totals
from nvmx_lab.plots.figure import Plot, show
from nvmx_lab.plots.kernel_stack import (
    pulls_by_cause,
    saving_with_and_without,
    savings_of_fixes,
)
from nvmx_lab.plots.policies import gap_closed, policy_costs
from nvmx_lab.plots.power import detectable
from nvmx_lab.plots.savings import comparison, pull_rate, saving_intervals
from nvmx_lab.plots.sensitivity import sobol, tornado
from nvmx_lab.plots.sequence import sequence, svg
from nvmx_lab.plots.series import series_loops, waterfall

__all__ = [
    "Plot",
    "against_claims",
    "break_even_rates",
    "breakdown",
    "comparison",
    "detectable",
    "gap_closed",
    "policy_costs",
    "prices",
    "published_totals",
    "pull_rate",
    "pulls_by_cause",
    "saving_intervals",
    "saving_over_rate",
    "saving_with_and_without",
    "savings_of_fixes",
    "sequence",
    "series_loops",
    "show",
    "sobol",
    "svg",
    "tornado",
    "waterfall",
]
