"""Plots: a tidy frame in, a figure and its alternative text out.

A plot computes nothing but its layout: every number in it is a number of the frame. In Jupyter a
plot shows itself when it is the value of a cell.

>>> from nvmx_lab import plots
>>> plots.comparison(nx.compare("cpuid").to_frame())  # doctest: +SKIP
"""

from nvmx_lab.plots.cycles import breakdown, published_totals
from nvmx_lab.plots.figure import Plot, show
from nvmx_lab.plots.savings import comparison, pull_rate, saving_intervals
from nvmx_lab.plots.sequence import sequence, svg

__all__ = [
    "Plot",
    "breakdown",
    "comparison",
    "published_totals",
    "pull_rate",
    "saving_intervals",
    "sequence",
    "show",
    "svg",
]
