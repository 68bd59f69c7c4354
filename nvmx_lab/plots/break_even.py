"""Figures of break-even: the rate over the cost of a switch, and the saving over the rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from nvmx_lab.errors import LabError
from nvmx_lab.plots.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SKY,
    VERDICTS,
    VERMILLION,
    Plot,
    blank,
    entitle,
    legend,
    listed,
    require,
    share,
    span,
    thousands,
    whole_cycles,
)
from nvmx_lab.plots.savings import label_between

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTILES: Final = ("p05", "p50", "p95")
_RATE: Final = tuple(f"break_even_rate_{q}" for q in _QUANTILES)
_SWITCH: Final = tuple(f"switch_cycles_{q}" for q in _QUANTILES)
_SAVING: Final = tuple(f"round_trip_saving_cycles_{q}" for q in _QUANTILES)
_OTHERS: Final = ((ORANGE, "--"), (GREEN, "-."), (SKY, "-"), (VERMILLION, ":"), (GREY, "--"))
_OTHERS_AGAIN: Final = ((BLACK, ":"), (BLACK, "-."), (GREEN, "--"))
_HOSTS: Final = {False: ("o", "without IBPB"), True: ("D", "with an IBPB at each switch")}
_NEAR: Final = 1.13  # names of runs whose rates differ by less share a line on the page
_LOWEST: Final = 0.1  # per cent: the axis is logarithmic


def break_even_rates(
    curves: pd.DataFrame,
    rates: pd.DataFrame,
    *,
    cpu: str,
    placed: pd.DataFrame | None = None,
    executed: pd.DataFrame | None = None,
) -> Plot:
    """Draw the break-even rate over the cost of a switch: a curve per price list.

    Parameters
    ----------
    curves : DataFrame
        As `nvmx_lab.study.break_even.curves` makes: cpu, switch_cycles, break_even_rate_p05, ...
    rates : DataFrame
        As `nvmx_lab.study.break_even.rates` makes, of one release: cpu, ibpb, unpriced,
        switch_cycles_p05, ..., break_even_rate_p05, ...: where on its curve a host is.
    cpu : str
        The price list whose uncertainty is drawn.
    placed, executed : DataFrame, optional
        As `nvmx_lab.study.break_even.placed` and `executed` make: pulls_share, and run of the
        latter. Their rates are marked at the right edge.

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        If a column is missing, or `cpu` is not among the curves.
    """
    require(curves, ("cpu", "switch_cycles", *_RATE), "break_even_rates")
    require(rates, ("cpu", "ibpb", "unpriced", *_RATE, *_SWITCH), "break_even_rates")
    names = list(curves["cpu"].unique())
    if cpu not in names:
        raise LabError("no curve of this price list", where="cpu", got=cpu, allowed=listed(names))
    figure, (axes,) = blank(6.4)
    styles = iter((*_OTHERS, *_OTHERS_AGAIN) * len(names))
    for name in [cpu, *(other for other in names if other != cpu)]:
        own = curves[curves["cpu"] == name].sort_values("switch_cycles")
        colour, dashes = (BLUE, "-") if name == cpu else next(styles)
        missing = set(rates.loc[(rates["cpu"] == name) & ~rates["ibpb"], "unpriced"]) - {""}
        if name == cpu:
            ends = (100 * own[_RATE[0]], 100 * own[_RATE[2]])
            axes.fill_between(own["switch_cycles"], *ends, color=BLUE, alpha=0.15, linewidth=0)
        axes.plot(
            own["switch_cycles"],
            100 * own[_RATE[1]],
            dashes,
            color=colour,
            linewidth=2.4 if name == cpu else 1.3,
            label=f"{name} (no price of {listed(missing)})" if missing else name,
            zorder=3 if name == cpu else 2,
        )
        for _, row in rates[rates["cpu"] == name].iterrows():
            if not row["unpriced"]:
                _host(axes, row, colour, strong=name == cpu)
    axes.set(xscale="log", yscale="log", ylim=(_LOWEST, 100))
    axes.set_xlim(curves["switch_cycles"].min(), curves["switch_cycles"].max())
    thousands(axes.xaxis)
    _percent(axes)
    axes.set_xlabel("TSC cycles of one switch of VMCS within a pull (the band: 5 to 95 %)")
    axes.set_ylabel("exits that may pull before the lazy sync costs, %")
    marked = _levels(axes, placed, executed)
    _legend_of_hosts(axes, figure, rates)
    finding = _finding_of_rates(rates, cpu)
    entitle(figure, finding)
    said = [_said_host(row) for _, row in rates.iterrows() if not row["unpriced"]]
    alt = (
        f"Curves of the break-even pull rate over the cost of a switch of VMCS, one for each of "
        f"{len(names)} price lists, falling as the switch gets dearer. {finding}. "
        f"{' '.join(said)}{marked}"
    )
    return Plot(figure, alt)


def saving_over_rate(
    line: pd.DataFrame, placed: pd.DataFrame, executed: pd.DataFrame, *, ibpb: bool = False
) -> Plot:
    """Draw the saving over the pull rate: the analytic line, simulated mixes and executed runs.

    Parameters
    ----------
    line : DataFrame
        As `nvmx_lab.study.break_even.line` makes: ibpb, pulls_share, round_trip_saving_cycles_p05,
        _p50, _p95.
    placed : DataFrame
        As `nvmx_lab.study.break_even.placed` makes: the same and mix, verdict, difference_cycles,
        break_even_rate_p50, evmcs. Mixes with an enlightened VMCS are not on the line: left out.
    executed : DataFrame
        As `nvmx_lab.study.break_even.executed` makes: the same columns with run for mix.
    ibpb : bool
        Which of the hosts to draw.

    Returns
    -------
    Plot

    Raises
    ------
    LabError
        If a column is missing, or there are no rows of this host.
    """
    require(line, ("ibpb", "pulls_share", *_SAVING), "saving_over_rate")
    columns = ("ibpb", "pulls_share", "verdict", "break_even_rate_p50", *_SAVING)
    require(placed, ("mix", "evmcs", "difference_cycles", *columns), "saving_over_rate")
    line, placed = line[line["ibpb"] == ibpb], placed[(placed["ibpb"] == ibpb) & ~placed["evmcs"]]
    require(line, ("pulls_share",), "saving_over_rate")
    require(placed, ("mix",), "saving_over_rate")
    runs = executed[executed["ibpb"] == ibpb] if len(executed) else executed
    figure, (axes,) = blank(5.8)
    axes.axhline(0, color=BLACK, linewidth=1)
    at = 100 * line["pulls_share"]
    axes.fill_between(at, line[_SAVING[0]], line[_SAVING[2]], color=SKY, alpha=0.3, linewidth=0)
    axes.plot(at, line[_SAVING[1]], color=BLUE, linewidth=1.2, label="by the formula (5 to 95 %)")
    for verdict, (colour, marker) in VERDICTS.items():
        some = placed[placed["verdict"] == verdict]
        if len(some):
            axes.plot(
                100 * some["pulls_share"],
                some[_SAVING[1]],
                marker,
                color=colour,
                markersize=7,
                markeredgecolor="white",
                label=f"mix, simulated: {verdict} ({len(some)})",
                zorder=4,
            )
    if len(runs):
        axes.plot(
            100 * runs["pulls_share"],
            runs[_SAVING[1]],
            "P",
            color="none",
            markeredgecolor=BLACK,
            markersize=11,
            label=f"pull rate of an executed run ({len(runs)})",
            zorder=5,
        )
    axes.set_xlim(-3, 103)
    thousands(axes.yaxis)
    whole_cycles(axes.yaxis)
    axes.set_xlabel("nested exits after which L0 pulls the rare fields, %")
    axes.set_ylabel("round-trip saving per nested exit,\nTSC cycles")
    even = float(placed["break_even_rate_p50"].max())
    label_between(axes, _named_points(placed, runs), even)
    legend(figure, 3)
    finding = _finding_of_line(placed, runs, even, ibpb=ibpb)
    entitle(figure, finding)
    first, last = line.iloc[0], line.iloc[-1]
    alt = (
        f"The saving per nested exit over the share of exits that pull, falling in a straight "
        f"line from {span(first, 'round_trip_saving_cycles')} cycles at "
        f"{share(first['pulls_share'])} to {span(last, 'round_trip_saving_cycles')} at "
        f"{share(last['pulls_share'])}. {finding}. The {len(placed)} simulated mixes are on the "
        f"line to within {placed['difference_cycles'].max():.1f} cycles in every price draw."
    )
    for _, run in runs.iterrows():
        saved = span(run, "round_trip_saving_cycles")
        alt += f" {run['run']} pulls after {share(run['pulls_share'])}: {saved} cycles."
    return Plot(figure, alt)


def _host(axes: Axes, row: pd.Series, colour: str, *, strong: bool) -> None:
    """Mark where on its curve a host is, with the uncertainty of both."""
    x, y = row[_SWITCH[1]], 100 * row[_RATE[1]]
    if strong:
        across = [[x - row[_SWITCH[0]]], [row[_SWITCH[2]] - x]]
        upright = [[y - 100 * row[_RATE[0]]], [100 * row[_RATE[2]] - y]]
        axes.errorbar([x], [y], xerr=across, yerr=upright, fmt="none", ecolor=colour, zorder=4)
    axes.plot(
        [x],
        [y],
        _HOSTS[bool(row["ibpb"])][0],
        color=colour,
        markersize=10 if strong else 6,
        markeredgecolor="white",
        zorder=5,
    )


def _levels(axes: Axes, placed: pd.DataFrame | None, executed: pd.DataFrame | None) -> str:
    """Mark the pull rates of mixes and executed runs at the right edge, and say them."""
    said = ""
    transform = axes.get_yaxis_transform()
    if placed is not None and len(placed):
        own = placed[~placed["ibpb"]] if (~placed["ibpb"]).any() else placed
        seen = own[100 * own["pulls_share"] >= _LOWEST]
        axes.plot(
            [1.0] * len(seen),
            100 * seen["pulls_share"],
            marker=0,  # a tick to the left
            markersize=9,
            color=BLACK,
            linestyle="none",
            transform=transform,
            clip_on=False,
            label=f"pull rate of a mix ({len(seen)}; {len(own) - len(seen)} below "
            f"{share(_LOWEST / 100)})",
        )
        said += f" {len(seen)} of {len(own)} mixes pull after {share(_LOWEST / 100)} or more."
    if executed is not None and len(executed):
        runs = executed.drop_duplicates("run").sort_values("pulls_share")
        clusters: list[list[Any]] = []
        for _, run in runs.iterrows():
            near = clusters and run["pulls_share"] <= _NEAR * clusters[-1][0]["pulls_share"]
            if near:
                clusters[-1].append(run)
            else:
                clusters.append([run])
        right = axes.twinx()
        right.set(yscale="log", ylim=axes.get_ylim())
        right.minorticks_off()
        right.grid(visible=False)
        right.set_yticks(
            [100 * sum(run["pulls_share"] for run in c) / len(c) for c in clusters],
            ["\n".join(f"{share(r['pulls_share'])} {r['run']}" for r in c[::-1]) for c in clusters],
            fontsize=8,
        )
        right.set_title("executed:", fontsize=9, loc="right")
        for _, run in runs.iterrows():
            axes.axhline(100 * run["pulls_share"], color=GREY, linewidth=0.8, linestyle=":")
        pairs = (f"{r['run']} {share(r['pulls_share'])}" for _, r in runs.iloc[::-1].iterrows())
        said += f" Executed runs pull after: {listed(pairs)}."
    return said


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _legend_of_hosts(axes: Axes, figure: Figure, rates: pd.DataFrame) -> None:
    from matplotlib.lines import Line2D

    handles, _ = axes.get_legend_handles_labels()
    for ibpb, (marker, label) in _HOSTS.items():
        if ((rates["ibpb"] == ibpb) & (rates["unpriced"] == "")).any():
            handles.append(
                Line2D([], [], color=GREY, marker=marker, linestyle="none", label=f"host {label}")
            )
    legend(figure, 3, handles=handles)


def _finding_of_rates(rates: pd.DataFrame, cpu: str) -> str:
    own = rates[(rates["cpu"] == cpu) & (rates["unpriced"] == "")]
    plain, ibpb = own[~own["ibpb"]], own[own["ibpb"]]
    if plain.empty:
        return f"{cpu} has no price of a whole pull: a curve, but no place on it"
    rate = plain[_RATE[1]].iloc[0]
    text = f"By {cpu} the saving bears a pull after {share(rate)} of the exits"
    if ibpb.empty:
        return f"{text}; an IBPB has no price there"
    with_ibpb = ibpb[_RATE[1]].iloc[0]
    if abs(with_ibpb - rate) < 1e-9:
        return f"{text}, with IBPB or without"
    return f"{text}, and after {share(with_ibpb)} where each switch issues an IBPB"


def _said_host(row: pd.Series) -> str:
    rates = [share(row[name]) for name in _RATE]
    return (
        f"{row['cpu']} {_HOSTS[bool(row['ibpb'])][1]}: a switch takes "
        f"{span(row, 'switch_cycles')} cycles, break-even {rates[1]} "
        f"(90 % interval {rates[0]} to {rates[2]})."
    )


def _named_points(placed: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Return mixes and runs as points with one name each, all under `mix`."""
    import pandas as pd

    columns = ["mix", "pulls_share", _SAVING[1]]
    points = placed[columns]
    if len(runs):
        points = pd.concat([points, runs.rename(columns={"run": "mix"})[columns]])
    return points.reset_index(drop=True)


def _finding_of_line(placed: pd.DataFrame, runs: pd.DataFrame, even: float, *, ibpb: bool) -> str:
    beyond = int((placed["pulls_share"] > placed["break_even_rate_p50"]).sum())
    host = " with IBPB" if ibpb else ""
    text = f"{beyond} of {len(placed)} mixes"
    if len(runs):
        over = int((runs["pulls_share"] > runs["break_even_rate_p50"]).sum())
        text += f" and {over} of {len(runs)} executed runs"
    return f"{text} are beyond break-even{host}, a pull after {share(even)} of the exits (medians)"
