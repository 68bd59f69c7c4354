"""What ``06_break_even`` shows beside figures: tables and sentences, each made from results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from nvmx_lab.costs import prices
from nvmx_lab.nested.config import features, release
from nvmx_lab.study.break_even import LIGHT_PULL
from nvmx_lab.study.narrative import badge

if TYPE_CHECKING:
    import pandas as pd

_SPACE: Final = "\N{NO-BREAK SPACE}"
_NONE: Final = "\N{EN DASH}"
_HOST: Final = {False: "without IBPB", True: "with IBPB"}
_FAR: Final = 50_000.0  # cycles: no switch costs that
_SAVING: Final = "round_trip_saving_cycles"


def about(kvm: str) -> str:
    """Return which L0 is looked at, and what its pulls do at a switch, as Markdown."""
    chosen = release(kvm)
    text = f"L0 is **KVM {kvm}**"
    if chosen.sync != "lazy":
        text += f", whose own sync is {chosen.sync}; here it is given the lazy one as well"
    known = features()
    if LIGHT_PULL in chosen.features:
        text += f". Its pulls are light ({known[LIGHT_PULL]['meaning']})"
    else:
        text += ". A pull issues an IBPB at each of its switches if the host is set up so"
    return f"{text}. *With IBPB* means: {known['ibpb']['meaning']} ({known['ibpb']['source']})."


def weights(rates: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `nvmx_lab.study.break_even.rates` by price list, worded.

    Returns
    -------
    DataFrame
        Index price list; columns the reader, the VMREADs of a pull, a switch and the break-even
        rate on either host: medians and 90 % intervals, or what has no price.
    """
    return _worded_rates(rates, "cpu", "price list")


def by_release(rates: pd.DataFrame) -> pd.DataFrame:
    """Return the same by release, with which pulls are light."""
    shown = _worded_rates(rates, "kvm", "KVM")
    light = rates.drop_duplicates("kvm").set_index("kvm")["light_pull"]
    shown.insert(0, "light pull", light.map({True: "yes", False: "no"}))
    return shown


def _worded_rates(rates: pd.DataFrame, index: str, title: str) -> pd.DataFrame:
    import pandas as pd

    plain, ibpb = (rates[rates["ibpb"] == host].set_index(index) for host in _HOST)
    shown = pd.DataFrame(
        {
            "reader at each exit, cycles": _column(plain, "reader_cycles", _cycles, brief=True),
            "VMREADs of a pull, cycles": _column(plain, "reads_cycles", _cycles, brief=True),
            "a switch, cycles": _column(plain, "switch_cycles", _cycles),
            "with IBPB": _column(ibpb, "switch_cycles", _cycles),
            "break-even, exits that pull": _column(plain, "break_even_rate", _share),
            "break-even with IBPB": _column(ibpb, "break_even_rate", _share),
        },
        index=plain.index,
    )
    shown.index.name = title
    return shown


def _column(rates: pd.DataFrame, name: str, say: Any, *, brief: bool = False) -> list[str]:
    return [
        (_NONE if brief else f"no price of {row['unpriced']}")
        if row["unpriced"]
        else _interval(row, name, say)
        for row in _rows(rates)
    ]


def mixes(placed: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `nvmx_lab.study.break_even.placed`, worded, the most pulls first."""
    import pandas as pd

    first = placed.drop_duplicates("mix").set_index("mix")
    shown = pd.DataFrame({"exits that pull": first["pulls_share"].map(_share)})
    for host, name in _HOST.items():
        own = placed[placed["ibpb"] == host].set_index("mix")
        if len(own):
            worded = {key: _saving(row) for key, row in zip(own.index, _rows(own), strict=True)}
            shown[f"saving {name}, cycles"] = shown.index.map(worded)
    shown["breaks even with a switch of, cycles"] = [_bears(row) for row in _rows(first)]
    return shown


def runs(executed: pd.DataFrame) -> pd.DataFrame:
    """Return the table of `nvmx_lab.study.break_even.executed`, worded."""
    shown = executed.drop_duplicates("run").set_index("run")[["l1", "l2", "exits"]]
    shown.columns = ["L1", "L2", "exits"]
    shown["exits that pull"] = (
        executed.drop_duplicates("run").set_index("run")["pulls_share"].map(_share)
    )
    for host, name in _HOST.items():
        own = executed[executed["ibpb"] == host].set_index("run")
        if len(own):
            shown[f"saving {name}, cycles"] = [_saving(row) for row in _rows(own)]
    return shown


def of_agreement(placed: pd.DataFrame) -> str:
    """Return how far the simulated mixes are from the line, and why, as Markdown."""
    differs = (placed["instructions_left_over"] != 0) | (placed["left_over"] != "")
    text = (
        f"{badge('simulated')} {_count(placed['mix'].nunique(), 'mix', 'mixes')} on "
        f"{_count(placed['ibpb'].nunique(), 'host', 'hosts')}: {(~differs).sum()} of {len(placed)} "
        "simulations give exactly the counts of the formula."
    )
    if differs.any():
        worst = placed.sort_values("difference_cycles").to_dict("records")[-1]
        text += (
            f" The largest difference, in any price draw, is {worst['difference_cycles']:.1f}"
            f"{_SPACE}cycles (`{worst['mix']}`)."
        )
    if (placed["left_over"] != "").any():
        named = sorted({name for some in placed["left_over"] if some for name in some.split(", ")})
        return f"{text} Counts of {_listed(named)} differ, which the formula does not explain."
    most = float(placed["instructions_left_over"].abs().max())
    if differs.any():
        text += (
            f" Only retired instructions of L0 differ, by {most:.2g} per exit at most: the lengths "
            "of its stretches are means, and the model rounds their sum at each operation."
        )
    return (
        f"{text} Nothing else is at work: no exit pulls twice, as the first pull brings all rare "
        "fields, and the dirty entry that follows a VMWRITE costs both syncs the same."
    )


def of_ibpb(cpu: str, rates: pd.DataFrame) -> str:
    """Return what an IBPB does to the break-even rate by one price list, as Markdown."""
    own = _rows(rates[(rates["cpu"] == cpu) & rates["ibpb"]])[0]
    if own["unpriced"]:
        return f"{cpu} has no price of {own['unpriced']}, so there is nothing to draw."
    if own["light_pull"]:
        return "The pulls of this release are light: they issue none, so it is the figure above."
    ibpb = prices.load(cpu).parameters["ibpb"]
    return (
        f"{badge(ibpb.basis)} An IBPB takes {ibpb.p50:,g} ({ibpb.p05:,g} to {ibpb.p95:,g}) cycles "
        f"in {cpu}: {ibpb.source}."
    )


def answer(
    kvm: str,
    cpu: str,
    rates: pd.DataFrame,
    placed: pd.DataFrame,
    executed: pd.DataFrame,
    releases: pd.DataFrame,
) -> str:
    """Return what the notebook found, as Markdown."""
    said = [_of_rates(kvm, cpu, rates)]
    light = bool(rates["light_pull"].all())  # then the hosts do not differ
    said += [
        _of_mixes(placed[placed["ibpb"] == host], executed[executed["ibpb"] == host], host=host)
        for host in _HOST
        if (placed["ibpb"] == host).any() and not (host and light)
    ]
    said.append(_of_releases(releases))
    said.append(_of_unknown(cpu, rates))
    return "\n\n".join(part for part in said if part)


def _of_rates(kvm: str, cpu: str, rates: pd.DataFrame) -> str:
    own = rates[(rates["cpu"] == cpu) & (rates["unpriced"] == "")]
    plain, ibpb = (next(iter(_rows(own[own["ibpb"] == host])), None) for host in _HOST)
    if plain is None:
        return f"{badge('simulated')} {cpu} has no price of a whole pull: no break-even rate."
    text = (
        f"{badge('simulated')} On KVM {kvm}, by the prices of {cpu}, the lazy sync saves as long "
        f"as fewer than **{_share(plain['break_even_rate_p50'])} of the exits** pull (90{_SPACE}% "
        f"interval {_span(plain, 'break_even_rate', _share)}): a skipped reader is worth "
        f"{_cycles(plain['reader_cycles_p50'])}{_SPACE}cycles, a pull costs "
        f"{_cycles(plain['pull_cycles_p50'])}. (Medians, each on its own: the rate is the median "
        "of the draws' ratios, not the ratio of two medians.)"
    )
    if ibpb is None:
        return f"{text} An IBPB has no price there."
    if abs(ibpb["pull_cycles_p50"] - plain["pull_cycles_p50"]) < 1e-6:
        return f"{text} An IBPB at switches of VMCS changes nothing: pulls of this release skip it."
    return (
        f"{text} Where each switch issues an IBPB, a pull costs "
        f"{_cycles(ibpb['pull_cycles_p50'])}{_SPACE}cycles and "
        f"**{_share(ibpb['break_even_rate_p50'])}** "
        f"({_span(ibpb, 'break_even_rate', _share)}) is all that the saving bears."
    )


def _of_mixes(placed: pd.DataFrame, executed: pd.DataFrame, *, host: bool) -> str:
    on_line = placed[~placed["evmcs"]]
    beyond = on_line[on_line["pulls_share"] > on_line["break_even_rate_p50"]]
    where = "With" if host else "Without"
    text = f"{where} IBPB, {len(beyond)} of {len(on_line)} mixes are beyond break-even (medians)"
    apart = int(placed["evmcs"].sum())
    if apart:
        text += f" ({apart} more never pull: an enlightened VMCS)"
    if len(executed):
        over = executed[executed["pulls_share"] > executed["break_even_rate_p50"]]
        named = (f"`{row['run']}` ({_share(row['pulls_share'])})" for row in _rows(over))
        found = {0: "none pulls", 1: "one pulls"}.get(len(over), f"{len(over)} pull")
        text += (
            f". Of {_count(len(executed), 'run', 'runs')} whose pull rate is {badge('executed')} "
            f"(on KVM 6.1, priced here as if that were L0's rate on the KVM of this page), {found} "
            "more often than that median"
        )
        text += f": {_listed(named)}" if len(over) else ""
    hopeless = beyond[beyond["bears_switch_cycles_p50"] < 0]
    if len(hopeless) and not host:
        verb = "mix pulls" if len(hopeless) == 1 else "mixes pull"
        text += (
            f". {len(hopeless)} {verb} so often that not even a switch for nothing would make it "
            "pay: the VMREADs of the pulls alone cost more than the skipped readers"
        )
    return f"{text}."


def _of_releases(rates: pd.DataFrame) -> str:
    light = list(rates.loc[rates["light_pull"], "kvm"].unique())
    heavy = list(rates.loc[~rates["light_pull"], "kvm"].unique())
    if not light or not heavy:
        return ""
    return (
        f"Pulls are light in KVM {_listed(light)}, not in {_listed(heavy)}: {LIGHT_PULL} makes a "
        f"switch cheaper by what it skips, so the question of IBPB is one of KVM {_listed(heavy)}."
    )


def _of_unknown(cpu: str, rates: pd.DataFrame) -> str:
    switch = prices.load(cpu).parameters.get("vmptrld")
    text = ""
    if switch is not None:
        text = (
            f"{badge(switch.basis)} The rate hangs on the price of VMPTRLD, {switch.p05:g} to "
            f"{switch.p95:g}{_SPACE}cycles in {cpu}: {switch.source}."
        )
    unpriced = rates[(rates["unpriced"] != "") & ~rates["ibpb"]]
    if len(unpriced):
        lists = (f"{row['cpu']} ({row['unpriced']})" for row in _rows(unpriced))
        text += f" Without a price of a pull: {_listed(lists)}."
    return text.strip()


def _bears(row: Mapping[str, Any]) -> str:
    if row["evmcs"] or not row["pulls_share"]:
        return "never pulls"
    if row["bears_switch_cycles_p50"] < 0:
        return "not even for nothing"
    if row["bears_switch_cycles_p50"] > _FAR:
        return f"above {_cycles(_FAR)}"
    return _interval(row, "bears_switch_cycles", _cycles)


def _saving(row: Mapping[str, Any]) -> str:
    return f"{_interval(row, _SAVING, _cycles)} {row['verdict']}"


def _interval(row: Mapping[str, Any], name: str, say: Any) -> str:
    text = f"{say(row[f'{name}_p50'])} ({_span(row, name, say)})"
    return text.replace(" ", _SPACE)


def _span(row: Mapping[str, Any], name: str, say: Any) -> str:
    return f"{say(row[f'{name}_p05'])} to {say(row[f'{name}_p95'])}"


def _cycles(value: float) -> str:
    text = f"{value:,.0f}"
    return "0" if text == "-0" else text.replace("-", "\N{MINUS SIGN}")


def _share(value: float) -> str:
    if value in (0, 1):
        return f"{100 * value:.0f}{_SPACE}%"
    return f"{100 * value:.{1 if 0.001 <= value < 0.999 else 2}f}{_SPACE}%"


def _count(number: int, one: str, many: str) -> str:
    return f"one {one}" if number == 1 else f"{number} {many}"


def _listed(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]
