"""Measured prices: a CSV of timings, taken as `data/protocol/README.md` says, as a price list.

A row is one timed stretch of code in one boot: n back-to-back instructions between two reads of
the clock, by the quantiles of its repetitions. The cost of n accesses is ``first + (n - 1) *
next``; each boot gives its own two numbers, and the price's interval is that of the boots.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from nvmx_lab import files
from nvmx_lab.costs import prices
from nvmx_lab.costs.prices import FloatArray
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.tables import csvfile
from nvmx_lab.tables.csvfile import Row
from nvmx_lab.tables.schema import MEASUREMENTS, TIMED

if TYPE_CHECKING:
    import pandas as pd

LEAST_BOOTS: Final = 10
"""Boots that an interval is made of, at least: the 5 % quantile is then between the lowest two."""

LEAST_SIZES: Final = 4
"""Different n to which a line is fitted, at least: two give a line whatever the truth is."""

BENT, NO_LINE = 0.05, 0.20
"""Share of the cycles by which a fit may miss: beyond the first a warning, beyond the second no."""

_LINES: Final = {
    "vmread": ("vmread_first", "vmread_next"),
    "vmread-same-field": ("vmread-same-field, first", "vmread-same-field, next"),
    "vmwrite": ("vmwrite_first", "vmwrite_next"),
    "vmwrite-same-field": ("vmwrite-same-field, first", "vmwrite-same-field, next"),
}
_ONE_PRICE: Final = tuple(name for name in TIMED if name not in (*_LINES, "overhead"))
_RESOLUTION: Final = 2.0  # cycles that a fit may always miss: the clock counts whole ones
_ONE_MACHINE: Final = ("cpu_model", "microcode", "clock", "basis")
_SAME_TSC, _SAME_CORE = 1e-3, 1e-2  # relative, over all rows
_CLOCK_RATIOS: Final = (0.1, 10.0)
_QUANTILES: Final = ("p05", "p50", "p95")


@dataclass(frozen=True)
class Measurements:
    """Timings of one machine, complete: every boot has every stretch.

    Attributes
    ----------
    file : Path
        Where they were read.
    cpu_model, microcode, clock, basis : str
        As in the file; `basis` is "measured" or "simulated".
    tsc_hz, core_hz : float
        Medians over the rows.
    boots, repetitions : int
        How many boots, and the fewest repetitions of any row.
    sizes : mapping of str to tuple of int
        The n that were timed, by primitive, ascending.
    net : mapping of str to float64[boots, sizes]
        TSC cycles of the stretch without the overhead: medians, by primitive.
    """

    file: Path
    cpu_model: str
    microcode: str
    clock: str
    basis: str
    tsc_hz: float
    core_hz: float
    boots: int
    repetitions: int
    sizes: Mapping[str, tuple[int, ...]]
    net: Mapping[str, FloatArray] = field(repr=False)


@dataclass(frozen=True)
class Estimate:
    """What the boots say of one quantity.

    Attributes
    ----------
    quantity : str
        A parameter of price lists, or what else was timed.
    cycles : float64[boots]
        TSC cycles, one estimate per boot.
    residual : float
        Largest miss of the fit over n, as a share of the cycles: of the medians over the boots.
    """

    quantity: str
    cycles: FloatArray = field(repr=False)
    residual: float

    @property
    def is_price(self) -> bool:
        """Whether it becomes a price; the others are reported only."""
        return self.quantity in prices.PARAMETERS

    def quantiles(self) -> tuple[float, float, float]:
        """Return p05, p50 and p95 over the boots, in hundredths of a cycle."""
        low, middle, high = np.quantile(self.cycles, (0.05, 0.5, 0.95))
        return round(float(low), 2), round(float(middle), 2), round(float(high), 2)


@dataclass(frozen=True)
class Imported:
    """A price list made of measurements; shows itself as a table.

    Attributes
    ----------
    price_list : PriceList
        What was written, read back.
    out : Path
        Its file.
    measurements : Measurements
        What it was made of.
    estimates : tuple of Estimate
        The fits, prices or not.
    warnings : tuple of str
        What is doubtful about them.
    notes : tuple of str
        What to know before using the list.
    """

    price_list: prices.PriceList
    out: Path
    measurements: Measurements
    estimates: tuple[Estimate, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """Return one row per quantity.

        Returns
        -------
        DataFrame
            quantity, p05, p50, p95 (TSC cycles, over the boots), residual_percent, price (whether
            it is one), basis.
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for one in self.estimates:
            low, middle, high = one.quantiles()
            rows.append(
                {
                    "quantity": one.quantity,
                    "p05": low,
                    "p50": middle,
                    "p95": high,
                    "residual_percent": round(100 * one.residual, 2),
                    "price": one.is_price,
                    "basis": self.measurements.basis,
                }
            )
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        about = self.measurements
        lines = [
            f"{self.out}: {self.price_list.id}, {self.price_list.basis}",
            f"{about.basis}: {about.cpu_model}, microcode {about.microcode}; {about.boots} boots",
            "",
            f"{'TSC cycles':34}{'p05':>10}{'p50':>10}{'p95':>10}{'residual':>10}",
        ]
        for one in self.estimates:
            values = "".join(f"{value:>10,.1f}" for value in one.quantiles())
            reported = "" if one.is_price else "  (no price)"
            lines.append(f"{one.quantity:34}{values}{one.residual:>10.1%}{reported}")
        lines += ["", *(f"Warning: {text}." for text in self.warnings), *self.notes]
        return "\n".join(lines)


def read(file: Path | str) -> Measurements:
    """Read timings and check all that can be wrong with them before any fit.

    Parameters
    ----------
    file : Path or str
        A CSV file with the columns of `nvmx_lab.tables.schema.MEASUREMENTS`.

    Raises
    ------
    LabError
        The first fault with file, row and column, and how many more there are: another encoding,
        a missing column, a cell that is none, an unknown primitive, a row twice, two machines in
        one file, a clock that moved, too few boots, a boot without some row, no n = 1, too few
        n, an overhead larger than what it is part of.
    """
    path = Path(file)
    _refuse_other_encodings(path)
    rows, header, faults = csvfile.read(path, str(path))
    if header:
        faults += csvfile.check(str(path), MEASUREMENTS, header, rows, {})
    if faults:
        first = min(faults, key=lambda fault: fault.row or 0)
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        place = f"{path}:{first.row}" if first.row else str(path)
        semicolons = len(header) == 1 and ";" in header[0]
        raise LabError(
            first.what + more,
            where=f"{place}: {first.column}" if first.column else place,
            got=first.got or None,
            allowed=first.allowed or None,
            mend="separate the columns with commas, not semicolons" if semicolons else None,
        )
    _check_machine(path, rows)
    table, line_of = _by_primitive(path, rows)
    if "overhead" not in table:
        raise LabError(
            "no rows of the overhead: what a timed stretch of nothing takes is in every other row",
            where=f"{path}: primitive",
            allowed="overhead, n = 0, for each boot",
        )
    if set(table) == {"overhead"}:
        raise LabError("nothing but overhead was timed", where=f"{path}: primitive")
    overhead = table.pop("overhead")[1]
    net = {}
    for name, (sizes, cycles) in table.items():
        net[name] = cycles - overhead
        if (net[name] <= 0).any():
            boot, size = np.argwhere(net[name] <= 0)[0]
            line = line_of[name, sizes[size], int(boot)]
            raise LabError(
                "nothing is left of the stretch without its overhead",
                where=f"{path}:{line}: cycles_p50",
                got=f"{float(cycles[boot, size]):g} TSC cycles, overhead "
                f"{float(overhead[boot, 0]):g}",
                allowed="more than the overhead of the same boot",
            )
    return Measurements(
        file=path,
        **{column: rows[0][column] for column in _ONE_MACHINE},
        tsc_hz=float(np.median([_number(row, "tsc_hz") for row in rows])),
        core_hz=float(np.median([_number(row, "core_hz") for row in rows])),
        boots=len(overhead),
        repetitions=int(min(_number(row, "repetitions") for row in rows)),
        sizes=MappingProxyType({name: sizes for name, (sizes, _) in table.items()}),
        net=MappingProxyType(net),
    )


def fit(measured: Measurements) -> tuple[tuple[Estimate, ...], tuple[str, ...]]:
    """Fit prices, each boot by itself.

    VMREAD and VMWRITE: the slope over n is the median of the slopes between all pairs of n (Theil
    and Sen), first the median of what is left at each n. All others: the median of the cycles per
    execution over n; VMCLEAR is what its pair takes more than a hot VMPTRLD.

    Returns
    -------
    estimates : tuple of Estimate
    warnings : tuple of str
        Fits that miss by more than `BENT`, a next that was cut at its first, a clock other than
        the core's.

    Raises
    ------
    LabError
        If cycles do not grow with n, a further access takes more than the first, a fit misses by
        more than `NO_LINE`, or VMCLEAR cannot be told from the VMPTRLD beside it.
    """
    estimates: list[Estimate] = []
    warnings: list[str] = []
    for name, (first, following) in _LINES.items():
        if name in measured.net:
            estimates += _line(measured, name, first, following, warnings)
    alone = {name: _alone(measured, name, warnings) for name in _ONE_PRICE if name in measured.net}
    for name, (cycles, residual) in alone.items():
        if name in prices.PARAMETERS or name == "vmptrld-cold":
            estimates.append(Estimate(name, cycles, residual))
    if "vmclear-vmptrld" in alone:
        pair, residual = alone["vmclear-vmptrld"]
        clear = pair - _needed(measured, alone, "vmclear-vmptrld", "vmptrld")
        if (clear <= 0).any():
            raise LabError(
                "the pair takes no longer than a VMPTRLD alone",
                where=f"{measured.file}: vmclear-vmptrld",
                got=f"{float(np.min(clear)):g} TSC cycles left for VMCLEAR",
            )
        estimates.append(Estimate("vmclear", clear, residual))
    if "vmptrld-transition" in alone:
        both, residual = alone["vmptrld-transition"]
        for part in ("vmptrld", "transition"):
            both = both - _needed(measured, alone, "vmptrld-transition", part)
        # May well be negative: then the switch hides behind the VM-entry.
        estimates.append(Estimate("VM-entry after a switch, more", both, residual))
    if not any(one.is_price for one in estimates):
        raise LabError("nothing that has a price was timed", where=measured.file)
    ratio = measured.core_hz / measured.tsc_hz
    if abs(ratio - 1) > _SAME_CORE:
        warnings.append(
            f"the core ran at {ratio:.2f} times the TSC's frequency: in TSC cycles these prices "
            "hold for that frequency only"
        )
    return tuple(estimates), tuple(warnings)


def import_csv(file: Path | str, *, id: str, out: Path | str, base: str | None = None) -> Imported:
    """Turn timings into a price list that `nvmx_lab.costs.prices.load` accepts.

    Parameters
    ----------
    file : Path or str
        The timings, CSV.
    id : str
        Name of the price list: lower-case words with hyphens, none of the shipped ones.
    out : Path or str
        The TOML file to write; it is written whole or not at all.
    base : str, optional
        A shipped price list that lends what was not timed; without it that stays unknown.

    Raises
    ------
    LabError
        As `read` and `fit`; or if a name is taken or unknown, or `out` cannot be written.
    """
    target = Path(out)
    if target.suffix != ".toml":
        raise LabError(
            "a price list ends in .toml: --cpu takes other names for ids", where="--out", got=out
        )
    if id in prices.names():
        raise LabError(
            "the id of a shipped price list", where="--id", got=id, mend="choose another"
        )
    if base is not None and base not in prices.names():
        raise unknown("base price list", base, prices.names(), where="--base")
    measured = read(file)
    estimates, warnings = fit(measured)
    notes = _notes(measured, estimates, base)
    text = _toml(measured, estimates, id, base, warnings, notes)

    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")
        wrong = prices.faults(beside)  # read before it has its name: a list that loads, or none
        if wrong:
            place = (wrong[0].where or "").partition(": ")[2]
            raise LabError(wrong[0].what, where=place, got=wrong[0].got, allowed=wrong[0].allowed)

    files.write_with(target, write)
    return Imported(prices.load(target), target, measured, estimates, warnings, notes)


def _refuse_other_encodings(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise LabError(f"cannot be read: {error.strerror or error}", where=path) from error
    for mark in (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"):  # of UTF-8 and of UTF-16
        if start.startswith(mark):
            raise LabError(
                "not plain UTF-8: the file begins with a byte order mark",
                where=f"{path}:1",
                mend="save it as UTF-8 without a byte order mark",
            )


def _number(row: Row, column: str) -> float:
    value = row.number(column)
    assert value is not None, column  # noqa: S101 - the table's rules have seen it
    return value


def _check_machine(path: Path, rows: Sequence[Row]) -> None:
    """Check that all rows are of one machine, counted with one clock at one frequency."""
    for column in _ONE_MACHINE:
        for row in rows:
            if row[column] != rows[0][column]:
                raise LabError(
                    f"another {column} than in line {rows[0].line}",
                    where=f"{path}:{row.line}: {column}",
                    got=row[column],
                    allowed=f"{rows[0][column]!r}: one machine, one clock, one kind of evidence",
                )
    for column, tolerance in (("tsc_hz", _SAME_TSC), ("core_hz", _SAME_CORE)):
        middle = float(np.median([_number(row, column) for row in rows]))
        for row in rows:
            if abs(_number(row, column) / middle - 1) > tolerance:
                raise LabError(
                    "the frequency is not that of the other rows",
                    where=f"{path}:{row.line}: {column}",
                    got=row[column],
                    allowed=f"{middle:.6g} Hz to {tolerance:.1%}",
                    mend="fix the frequency (performance governor, turbo off) and time again",
                )
    ratio = _number(rows[0], "core_hz") / _number(rows[0], "tsc_hz")
    if not _CLOCK_RATIOS[0] <= ratio <= _CLOCK_RATIOS[1]:
        raise LabError(
            "core and TSC frequency do not fit together",
            where=f"{path}:{rows[0].line}: core_hz",
            got=f"core {rows[0]['core_hz']} Hz, TSC {rows[0]['tsc_hz']} Hz",
            allowed=f"a ratio of {_CLOCK_RATIOS[0]:g} to {_CLOCK_RATIOS[1]:g}",
        )


def _by_primitive(
    path: Path, rows: Sequence[Row]
) -> tuple[dict[str, tuple[tuple[int, ...], FloatArray]], dict[tuple[str, int, int], int]]:
    """Return n and TSC cycles[boot, n] of each primitive, and the line of each (boot by place)."""
    boots = sorted({int(_number(row, "boot")) for row in rows})
    if len(boots) < LEAST_BOOTS:
        raise LabError(
            "too few boots: an interval across so few says nothing",
            where=f"{path}: boot",
            got=len(boots),
            allowed=f"at least {LEAST_BOOTS}",
            mend="repetitions within a boot do not replace boots",
        )
    place = {boot: index for index, boot in enumerate(boots)}
    cells: dict[str, dict[tuple[int, int], float]] = {}
    line_of: dict[tuple[str, int, int], int] = {}
    for row in rows:
        name, n = row["primitive"], int(_number(row, "n"))
        if (n == 0) != (name == "overhead"):
            raise LabError(
                f"n does not fit {name}",
                where=f"{path}:{row.line}: n",
                got=n,
                allowed="0 for the overhead, at least 1 for all others",
            )
        boot = place[int(_number(row, "boot"))]
        line_of[name, n, boot] = row.line
        scale = _number(row, "tsc_hz") / _number(row, "core_hz") if row["clock"] == "core" else 1.0
        cells.setdefault(name, {})[boot, n] = scale * _number(row, "cycles_p50")
    table = {}
    for name, found in cells.items():
        sizes = tuple(sorted({n for _, n in found}))
        _check_sizes(path, name, sizes)
        for boot, index in place.items():
            for n in sizes:
                if (index, n) not in found:
                    raise LabError(
                        f"boot {boot} has no row of {name} with n = {n}, which others have",
                        where=f"{path}: boot",
                        mend="time everything in every boot, or leave it out everywhere",
                    )
        cycles = np.array([[found[boot, n] for n in sizes] for boot in range(len(boots))])
        table[name] = (sizes, cycles)
    return table, line_of


def _check_sizes(path: Path, name: str, sizes: tuple[int, ...]) -> None:
    if name == "overhead":
        return
    if 1 not in sizes:
        raise LabError(
            f"{name} was not timed alone",
            where=f"{path}: n",
            got=", ".join(map(str, sizes)),
            allowed="n = 1 and larger ones",
        )
    if name in _LINES and len(sizes) < LEAST_SIZES:
        raise LabError(
            f"too few different n of {name} to see whether first + (n - 1) * next holds",
            where=f"{path}: n",
            got=", ".join(map(str, sizes)),
            allowed=f"at least {LEAST_SIZES}; the protocol has 1, 2, 4, 8, 16, 35, 64",
        )


def _line(
    measured: Measurements, name: str, first: str, following: str, warnings: list[str]
) -> list[Estimate]:
    """Fit first + (n - 1) * next to each boot."""
    n = np.array(measured.sizes[name], dtype=np.float64)
    net = measured.net[name]
    low, high = np.triu_indices(len(n), k=1)
    slopes = np.median((net[:, high] - net[:, low]) / (n[high] - n[low]), axis=1)
    firsts = np.median(net - slopes[:, None] * (n - 1), axis=1)
    middle = np.median(net, axis=0)
    residual = _judge(
        measured, name, n, middle, np.median(firsts) + np.median(slopes) * (n - 1), warnings
    )
    if (slopes <= 0).any() or (firsts <= 0).any():
        raise LabError(
            f"the cycles of {name} do not grow with n as first + (n - 1) * next",
            where=f"{measured.file}: cycles_p50",
            got=f"first {float(np.min(firsts)):.1f}, next {float(np.min(slopes)):.1f}",
            allowed="both above 0",
        )
    ceiling, level = float(np.median(firsts)), float(np.median(slopes))
    if level > ceiling * (1 + BENT) + _RESOLUTION / 2:
        raise LabError(
            f"a further {name} takes more than the first",
            where=f"{measured.file}: cycles_p50",
            got=f"first {ceiling:.1f}, next {level:.1f}",
            allowed="next at most first",
            mend="look at the fences and at the overhead: too much of it was taken off n = 1",
        )
    if (slopes > firsts).any():
        warnings.append(
            f"{following} was cut at {first} in {int((slopes > firsts).sum())} of "
            f"{measured.boots} boots: no saving back to back can be seen there"
        )
    return [
        Estimate(first, firsts, residual),
        Estimate(following, np.minimum(slopes, firsts), residual),
    ]


def _alone(measured: Measurements, name: str, warnings: list[str]) -> tuple[FloatArray, float]:
    """Return the cycles of one execution in each boot, and by how much they are no constant."""
    n = np.array(measured.sizes[name], dtype=np.float64)
    each: FloatArray = np.median(measured.net[name] / n, axis=1)
    middle = np.median(measured.net[name], axis=0)
    return each, _judge(measured, name, n, middle, float(np.median(each)) * n, warnings)


def _judge(
    measured: Measurements,
    name: str,
    n: FloatArray,
    cycles: FloatArray,
    fitted: FloatArray,
    warnings: list[str],
) -> float:
    """Return the largest miss of a fit; note it if it is large, refuse it if it is no fit."""
    beyond = np.maximum(np.abs(cycles - fitted) - _RESOLUTION, 0.0) / cycles
    worst = int(np.argmax(beyond))
    said = (
        f"{name} is not linear in n: at n = {n[worst]:.0f} it took {cycles[worst]:.1f} TSC cycles, "
        f"the fit says {fitted[worst]:.1f}"
    )
    if beyond[worst] > NO_LINE:
        raise LabError(
            said,
            where=f"{measured.file}: cycles_p50",
            allowed=f"a miss of at most {NO_LINE:.0%} and {_RESOLUTION:g} cycles",
            mend="a price list has one price for each further one: leave out the n where the "
            "line bends, and say so",
        )
    if beyond[worst] > BENT:
        warnings.append(said)
    return float(np.max(np.abs(cycles - fitted) / cycles))


def _needed(
    measured: Measurements, alone: Mapping[str, tuple[FloatArray, float]], name: str, part: str
) -> FloatArray:
    if part not in alone:
        raise LabError(
            f"{name} needs rows of {part} too, to be told from it",
            where=f"{measured.file}: primitive",
        )
    return alone[part][0]


def _notes(
    measured: Measurements, estimates: Iterable[Estimate], base: str | None
) -> tuple[str, ...]:
    """Return what to know before using the list, a sentence or two each."""
    estimates = tuple(estimates)
    timed = [one.quantity for one in estimates if one.is_price]
    notes = []
    simulated = (
        "SIMULATED: these timings were made by a program. They are prices of no processor. "
        if measured.basis == "simulated"
        else ""
    )
    notes.append(
        f"{simulated}p05, p50 and p95 are quantiles over {measured.boots} boots of each boot's own "
        f"estimate (medians of at least {measured.repetitions:,} repetitions): how much boots "
        "differ, not how far a median may be off, and not how much single executions differ."
    )
    notes.append(
        f"{', '.join(timed)} are of bare instructions (includes_instructions = 0): the moves and "
        "branches beside them are charged as l0_instructions at cpi, where lists of published "
        "prices charge them within the price."
    )
    apart = [one for one in estimates if not one.is_price]
    if apart:
        said = "; ".join(f"{one.quantity} {one.quantiles()[1]:,.1f}" for one in apart)
        notes.append(f"Timed but no price (median TSC cycles): {said}.")
    missing = [name for name in prices.PARAMETERS if name not in timed]
    if base is not None:
        notes.append(f"Taken from {base}, where it has them: {', '.join(missing)}.")
    elif missing:
        notes.append(
            f"Unknown: {', '.join(missing)}. A total that needs one is refused; --base lends them."
        )
    return tuple(notes)


def _toml(
    measured: Measurements,
    estimates: Iterable[Estimate],
    id: str,
    base: str | None,
    warnings: Sequence[str],
    notes: Sequence[str],
) -> str:
    """Return the price list as TOML text: all that there is to say in its head, not in its note."""
    doubts = f" {len(warnings)} warnings stand at the head of the file." if warnings else ""
    header = {
        "id": id,
        "name": measured.cpu_model,
        "generation": "simulated" if measured.basis == "simulated" else "as in the name",
        "years": "not said",
        "note": notes[0] + doubts,
    }
    if base is not None:
        header["base"] = base
    source = (
        f"{measured.basis}: {measured.cpu_model}, microcode {measured.microcode}, TSC "
        f"{measured.tsc_hz / 1e9:.3f} GHz, core {measured.core_hz / 1e9:.3f} GHz; "
        f"{measured.boots} boots; {measured.file.name}, SHA-256 "
        f"{files.sha256(measured.file)[:16]}"
    )
    lines = ["# Made by `nvmx-lab cpus import`."]
    lines += [f"# Warning: {text}." for text in warnings]
    lines += [f"# {text}" for text in notes]
    lines += [f"{key} = {_quoted(value)}" for key, value in header.items()]
    for one in estimates:
        if not one.is_price:
            continue
        quantiles = dict(zip(_QUANTILES, one.quantiles(), strict=True))
        lines += [
            "",
            f"[{one.quantity}]",
            *(f"{key} = {value!r}" for key, value in quantiles.items()),
            'unit = "TSC cycles"',
            f'basis = "{measured.basis}"',
            "includes_instructions = 0.0",
            f"source = {_quoted(source)}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # A TOML basic string escapes as JSON does, but has no surrogate pairs.
    return json.dumps(text, ensure_ascii=False)
