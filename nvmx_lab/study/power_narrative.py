"""What ``09_could_you_measure_it`` shows beside its figure: tables and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from nvmx_lab.study import power as study
from nvmx_lab.study.narrative import badge

if TYPE_CHECKING:
    import pandas as pd

_SPACE = "\N{NO-BREAK SPACE}"
_HALF_WIDTH: Final = 1.645  # standard deviations, of a 90 % interval


def about(loop: float, saving: float, power: float) -> str:
    """Return what is asked and what the noise is known to be, as Markdown."""
    lines = [
        f"Asked: a saving of **{_number(saving)} cycles** in a loop of **{_number(loop)}** "
        f"({100 * saving / loop:.2g} %), to be seen with probability {power:g} by a two-sided "
        f"t test at {100 * study.ALPHA:g} %.",
        "",
        "How far two runs of one kernel lie apart:",
        "",
    ]
    for condition, row in study.repeatability().iterrows():
        percent = row["run_to_run_percent"]
        lines.append(
            f"- {badge('published')} {condition} ({row['meaning']}): {row['bound']} {percent:g} %, "
            f"that is {_number(loop * percent / 100)} cycles of this loop. {row['source']}, "
            f"{row['year']}."
        )
    lines += [
        "",
        f"{badge('assumed')} The source times another loop, not nested, and does not say what its "
        "per cent are. Here they are the standard deviation of a single run, and a loop of another "
        "length has the same per cent. Read as the half width of a 90 % interval they would be "
        f"{_HALF_WIDTH:g} standard deviations: {_HALF_WIDTH**2:.1f} times fewer runs, where many "
        "are needed.",
    ]
    return "\n".join(lines)


def needed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.power.needed` worded for a table."""
    import pandas as pd

    return pd.DataFrame(
        {
            "design": [
                "not paired" if design == "unpaired" else f"paired, correlation {correlation:g}"
                for design, correlation in zip(frame["design"], frame["correlation"], strict=True)
            ],
            "noise of a run, cycles": [_number(value) for value in frame["sd_cycles"]],
            "boots per kernel": [_number(value) for value in frame["runs"]],
            "power": [_percent(value) for value in frame["power"]],
            "power, simulated": [
                "not drawn: too many" if value != value else _percent(value)
                for value in frame["power_simulated"]
            ],
        },
        index=pd.Index(frame["condition"], name="runs are"),
    )


def boots(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.power.boots` as a table: a column per number of repeats."""
    table = frame.pivot_table(
        index=["condition", "share_between"], columns="repeats", values="boots", sort=False
    )
    return _by_repeats(table.map(_number), ["runs are", "variance between boots"])


def alarms(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.power.false_alarms` as a table: a column per number of repeats."""
    table = frame.pivot_table(index="share_between", columns="repeats", values="rate", sort=False)
    return _by_repeats(table.map(_percent), ["variance between boots"])


def _by_repeats(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    shown = table.rename(
        index=lambda key: _percent(key) if isinstance(key, float) else key,
        columns=lambda repeats: "1 repeat" if repeats == 1 else f"{repeats:,} repeats",
    )
    shown.index.names = names
    shown.columns.name = None
    return shown


def of_boots(frame: pd.DataFrame, alarms: pd.DataFrame) -> str:
    """Return what must be repeated, as Markdown."""
    most = frame["repeats"].max()
    low, high = frame["share_between"].min(), frame["share_between"].max()
    parts = []
    for condition, rows in frame.groupby("condition", sort=False):
        one = rows[rows["repeats"] == 1]["boots"].iloc[0]
        many = rows[rows["repeats"] == most].set_index("share_between")["boots"]
        parts.append(
            f"{condition} from {_number(one)} to {_number(many[low])} if {_percent(low)} of the "
            f"variance is between boots, to {_number(many[high])} if it is {_percent(high)}"
        )
    least, worst = _ends(alarms, "rate")
    return (
        f"{badge('assumed')} How the noise divides between boots and repeats is not published. "
        f"With {most:,} repeats in each boot the boots per kernel go, {'; '.join(parts)}. What is "
        "left must be repeated as **boots**: memory, firmware and the kernel's layout are the same "
        "in all repeats of one.\n\n"
        "Worse, one boot of each kernel with many repeats seems to be sure of a difference that is "
        f"none: in {_percent(least['rate'])} of such comparisons with {least['repeats']:,.0f} "
        f"repeats if {_percent(least['share_between'])} of the variance is between boots, in "
        f"{_percent(worst['rate'])} with {worst['repeats']:,.0f} if it is "
        f"{_percent(worst['share_between'])}, where the test promises {100 * study.ALPHA:g} %. "
        "If both variants can be loaded in turn within one boot, as modules, what the boot gives "
        "to both cancels: that is a pair, and its correlation the share between boots, but for "
        "what loading the module changes itself."
    )


def microbenchmark(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.power.microbenchmark` worded for a table."""
    import pandas as pd

    return pd.DataFrame(
        {
            "runs are": frame["condition"].array,
            "longer loop, cycles": [_number(value) for value in frame["loop_cycles"]],
            "difference, cycles": [_number(value) for value in frame["difference_cycles"]],
            "boots per loop": [_number(value) for value in frame["runs"]],
        },
        index=pd.Index(frame["question"], name="which of two?"),
    )


def of_question() -> str:
    """Return what the published claims leave open, as Markdown."""
    asked = study.open_question()
    return (
        f"{badge('published')} Claim A is {asked['in_run_cycles']:.1f} cycles for each of "
        f"{asked['vmreads']:.0f} VMREADs in a run; {asked['claims']:.0f} claims about a single one "
        f"say {asked['alone_low']:g} to {asked['alone_high']:g}. Without claim A the other claims "
        "put one in a run below one alone, and above claim A ([notebook 04](04_how_sure.ipynb)). "
        "In a loop of nothing but those VMREADs the signal is the whole loop. The noise is taken "
        "to be the same per cent of it, although a loop so short also has the granularity of the "
        "clock, a cycle or two."
    )


def recovered(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `nvmx_lab.study.measuring.recovered` worded for a table."""
    import pandas as pd

    return pd.DataFrame(
        {
            "known, cycles": frame["known_cycles"].array,
            "imported, cycles": [
                f"{row['p50']:,.1f} ({row['p05']:,.1f} to {row['p95']:,.1f})".replace(" ", _SPACE)
                for row in frame.to_dict("records")
            ],
            "error of the median, %": frame["error_percent"].array,
            "basis": frame["basis"].array,
        },
        index=pd.Index(frame["quantity"], name="price of"),
    )


def of_recovered(frame: pd.DataFrame) -> str:
    """Return how well the import recovers known prices, as Markdown."""
    _, worst = _ends(frame.assign(off=frame["error_percent"].abs()), "off")
    inside = frame["known_cycles"].between(frame["p05"], frame["p95"]).sum()
    return (
        f"{badge('simulated')} Of {len(frame)} known prices {inside} lie between the 5 and 95 % of "
        f"their boots; the median that is farthest off, `{worst['quantity']}`, is so by "
        f"{abs(worst['error_percent']):.1f} %. That the import recovers what went in says nothing "
        "about any processor."
    )


def answer(frame: pd.DataFrame, alarms: pd.DataFrame, micro: pd.DataFrame) -> str:
    """Return the answer to "could you measure it?", as Markdown."""
    lines = []
    for condition, rows in frame.groupby("condition", sort=False):
        unpaired = rows[rows["design"] == "unpaired"].iloc[0]
        high, low = _ends(rows[rows["design"] == "paired"], "correlation")
        lines.append(
            f"- **{str(condition).capitalize()}: {_number(unpaired['runs'])} boots of each "
            f"kernel**; in pairs {_number(low['runs'])} to {_number(high['runs'])}, by how much "
            f"the two of a pair vary together (correlation {low['correlation']:g} to "
            f"{high['correlation']:g}, {badge('assumed')})."
        )
    _, most = _ends(alarms, "rate")
    runs = micro["runs"]
    few = f"{runs.min()}" if runs.min() == runs.max() else f"{runs.min()} to {runs.max()}"
    asked = study.open_question()
    lines += [
        "- **Boots, not repeats.** One boot of each kernel decides nothing, however often the loop "
        f"runs in it: up to {_percent(most['rate'])} of such comparisons find a difference that is "
        f"none, by the shares of noise that are {badge('assumed')}.",
        f"- **The short way** {badge('simulated')}: time the {asked['vmreads']:.0f} VMREADs "
        f"alone. {few} boots are enough for the t test; the protocol asks for more because an "
        "interval is wanted too.",
    ]
    return "\n".join(
        [
            f"**{_verdict(frame)}** {badge('simulated')} with {badge('published')} repeatabilities "
            "read as standard deviations:",
            "",
            *lines,
            "",
            "What would settle it: **n back-to-back VMREADs, n from 1 to 64, and VMPTRLD in turn "
            "of two VMCSs, hot, evicted and with the VM-entry after it, on one named Intel host "
            "over ten boots** (`data/protocol/README.md`). That is the price of a first and of a "
            f"next VMREAD ({asked['alone_low']:g} to {asked['alone_high']:g} and "
            f"{asked['in_run_cycles']:.1f} cycles by the claims {badge('published')}), and of the "
            "switch that nobody has published. "
            "`nvmx-lab cpus import` makes a price list of it.",
        ]
    )


def _verdict(frame: pd.DataFrame) -> str:
    """Say whether the saving can be measured with a bearable number of boots."""
    unpaired = frame[frame["design"] == "unpaired"].set_index("condition")["runs"]
    best, worst = unpaired.min(), unpaired.max()
    if worst <= 10:
        return "Yes, easily."
    if best <= 50:
        return "Yes, with care." if worst > 3 * best else "Yes, with some patience."
    return "Hardly." if best <= 1000 else "No, not by timing the whole loop."


def _ends(frame: pd.DataFrame, column: str) -> tuple[pd.Series, pd.Series]:
    """Return the rows with the smallest and the largest value."""
    ordered = frame.sort_values(column)
    return ordered.iloc[0], ordered.iloc[-1]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.2g}"


def _percent(value: float) -> str:
    text = f"{100 * value:.1f}"
    return f"{text.removesuffix('.0')}{_SPACE}%"
