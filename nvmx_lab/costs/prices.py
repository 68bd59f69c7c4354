"""Price lists: what each primitive costs on a CPU generation, how sure that is, and who said so.

A price is three quantiles with a unit, a basis and a source; a price nobody knows is absent, and a
total that needs it is refused (`pricing.price`). The files are ``data/cpus/*.toml``.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nvmx_lab import data
from nvmx_lab.costs import sobol
from nvmx_lab.errors import LabError, unknown
from nvmx_lab.nested.primitives import PRIMITIVES

if TYPE_CHECKING:
    import pandas as pd

FloatArray = NDArray[np.float64]

DEFAULT = "skylake-2015"
"""The price list used unless another is named: the generation of the patch's time."""

BLIND = "skylake-2015-blind"
"""The same without the patch's own measurement."""

PARAMETERS: Mapping[str, str] = MappingProxyType(
    {
        name: meaning
        for name, meaning in PRIMITIVES.items()
        if name not in ("l0_instructions", "l1_instructions", "l1_vmread", "l1_vmwrite")
    }
    | {"cpi": "cycles per retired instruction of L0's and of L1's software"}
)
"""Name -> meaning of everything a price list may price."""

# L1 runs on the same core as L0: its VMREADs of the shadow VMCS and its software cost the same.
# They are priced as `first` because L1's accesses are scattered through its handler.
PRICED_AS: Mapping[str, str] = {name: name for name in PRIMITIVES} | {
    "l0_instructions": "cpi",
    "l1_instructions": "cpi",
    "l1_vmread": "vmread_first",
    "l1_vmwrite": "vmwrite_first",
}
"""Primitive -> the parameter that prices it."""
FIRST_OF: Mapping[str, str] = MappingProxyType(
    {"vmread_next": "vmread_first", "vmwrite_next": "vmwrite_first"}
)
"""The price of a straight-line access -> that of the access that starts the line."""

_CYCLES, _PER_INSTRUCTION = "TSC cycles", "TSC cycles per instruction"

RHO = 0.5
"""Correlation of `next` with `first` (of their normals): assumed, nothing is published."""

DRAWS = 2**16
"""Price lists drawn by default: a power of two, where a Sobol sequence is most even."""

_Z95 = NormalDist().inv_cdf(0.95)
_MOST_DRAWS = 10_000_000
_Id = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=60)]
_Text = Annotated[str, Field(min_length=1, max_length=2000)]
# A billion cycles is half a second: no primitive costs that, so a larger number is a slip.
_Amount = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]
_Claims = Annotated[
    tuple[Annotated[str, Field(pattern=r"^[A-Z][0-9]?$")], ...], Field(strict=False)
]


class Price(BaseModel):
    """One price: quantiles, unit and where they come from.

    Attributes
    ----------
    p05, p50, p95 : float
        Quantiles, in `unit`.
    unit : str
        ``TSC cycles``, ``TSC cycles per instruction`` (cpi), or, for a `next`, ``fraction of`` its
        `first`.
    basis : {"published", "measured", "simulated", "calibrated", "assumed"}
        Published: the source gives the number, or words that were read as one. Measured: timed on
        a machine that the source names. Simulated: made by a program, to try what reads it; no
        price of any processor. Calibrated: fitted to `claims`. Assumed: nobody published it for
        this generation.
    source : str
        Where it comes from.
    claims : tuple of str
        Ids of the claims (``data/claims.csv``) it rests on: those it cannot be tested against.
    includes_instructions : float
        Instructions beside this one that are part of the price, so that pricing takes them off the
        software's bill.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    p05: _Amount
    p50: _Amount
    p95: _Amount
    unit: Literal[
        "TSC cycles",
        "TSC cycles per instruction",
        "fraction of vmread_first",
        "fraction of vmwrite_first",
    ]
    basis: Literal["published", "measured", "simulated", "calibrated", "assumed"]
    source: _Text
    claims: _Claims = ()
    includes_instructions: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0

    @property
    def is_fraction(self) -> bool:
        """Whether the price is a fraction of another one."""
        return self.unit.startswith("fraction")

    def at(self, z: FloatArray) -> FloatArray:
        """Map standard normal numbers to prices: z = -1.645, 0, 1.645 give p05, p50, p95.

        Each half is log-normal (a split log-normal); a half that touches zero has no logarithm and
        is a straight line cut at zero. A fraction is bounded, and uniform on each side of its
        median.
        """
        if self.is_fraction:
            from scipy.special import ndtr  # slow to import

            u = ndtr(z)
            slope = np.where(u < 0.5, self.p50 - self.p05, self.p95 - self.p50) / 0.45
            within: FloatArray = np.clip(self.p50 + slope * (u - 0.5), 0.0, 1.0)
            return within
        low = _half(self.p50, self.p05, -z)
        high = _half(self.p50, self.p95, z)
        return np.where(z < 0, low, high)


def _half(middle: float, end: float, z: FloatArray) -> FloatArray:
    """Return the half of a split distribution that runs from `middle` (z=0) to `end` (z=1.645)."""
    steps = np.maximum(z, 0.0) / _Z95
    if middle > 0 and end > 0:
        curve: FloatArray = middle * (end / middle) ** steps
        return curve
    return np.maximum(middle + (end - middle) * steps, 0.0)


class _Header(BaseModel):
    """The top of a price list's file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    id: _Id
    name: _Text
    generation: _Text
    years: _Text
    note: _Text
    base: _Id | None = None


@dataclass(frozen=True)
class Draws:
    """Drawn prices: each row is one price list that the quantiles allow.

    Attributes
    ----------
    cpu : str
        Id of the price list.
    seed : int
        What they were drawn with.
    cycles : float64[n, P]
        Price of one of each primitive, in `PRIMITIVES` order; a column of NaN where unknown.
    includes_instructions : float64[P]
        Instructions of software that one of each primitive's price includes.
    """

    cpu: str
    seed: int
    cycles: FloatArray = field(repr=False)
    includes_instructions: FloatArray = field(repr=False)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The primitives without a price."""
        missing = np.isnan(self.cycles[0])
        return tuple(name for name, gone in zip(PRIMITIVES, missing, strict=True) if gone)


@dataclass(frozen=True)
class PriceList:
    """What each primitive costs on one CPU generation.

    Attributes
    ----------
    id, name, generation, years, note : str
        What it is, and what to know before using it.
    parameters : mapping of str to Price
        By name, in `PARAMETERS` order; a parameter that is absent is unknown.
    digest : str
        SHA-256 of all of it: changes when a price does.
    """

    id: str
    name: str
    generation: str
    years: str
    note: str = field(repr=False)
    parameters: Mapping[str, Price] = field(repr=False)
    digest: str = field(repr=False)

    @property
    def unknown(self) -> tuple[str, ...]:
        """The parameters without a price."""
        return tuple(name for name in PARAMETERS if name not in self.parameters)

    @property
    def claims(self) -> tuple[str, ...]:
        """Ids of the claims that any price rests on: a test against them would be circular."""
        return tuple(sorted({c for price in self.parameters.values() for c in price.claims}))

    @property
    def basis(self) -> str:
        """What the list rests on, in a line."""
        prices = self.parameters.values()
        found: list[str] = []
        for basis in ("published", "measured", "simulated", "calibrated", "assumed"):
            of_basis = [price for price in prices if price.basis == basis]
            if of_basis:
                on = sorted({c for price in of_basis for c in price.claims})
                fitted = f" (on claims {', '.join(on)})" if basis == "calibrated" else ""
                found.append(f"{len(of_basis)} {basis}{fitted}")
        if self.unknown:
            found.append(f"{len(self.unknown)} unknown")
        return ", ".join(found)

    def draw(self, n: int = DRAWS, seed: int = 0) -> Draws:
        """Draw `n` price lists.

        Every parameter has a dimension and a random stream of its own, whatever else has a price:
        two price lists drawn with one seed are paired, and changing one price moves nothing else. A
        `next` is correlated with its `first` (`RHO`) and never above it. L0 and L1 share their
        draws.

        Parameters
        ----------
        n : int
            How many; 100,000 take 14 MB. Best a power of two.
        seed : int
            Not negative.

        Returns
        -------
        Draws

        Raises
        ------
        LabError
            If `n` is not in 1 to 10,000,000 or `seed` is negative.
        """
        if not 1 <= n <= _MOST_DRAWS:
            raise LabError("not a number of draws", where="n", got=n, allowed=f"1 to {_MOST_DRAWS}")
        if seed < 0:
            raise LabError("not a seed", where="seed", got=seed, allowed="an integer from 0 up")
        drawn = self.sample(n, seed)
        cycles = np.full((n, len(PRIMITIVES)), np.nan)
        included = np.zeros(len(PRIMITIVES))
        for column, primitive in enumerate(PRIMITIVES):
            parameter = PRICED_AS[primitive]
            if parameter in drawn:
                cycles[:, column] = drawn[parameter]
                included[column] = self.parameters[parameter].includes_instructions
        cycles.flags.writeable = included.flags.writeable = False
        return Draws(self.id, seed, cycles, included)

    def sample(self, n: int, seed: int) -> dict[str, FloatArray]:
        """Draw prices by parameter, float64[n] each; `draw` gives the same by primitive."""
        return self.at(self.normals(n, seed))

    def normals(self, n: int, seed: int) -> dict[str, FloatArray]:
        """Return the standard normal numbers behind a draw, by parameter, float64[n] each.

        They are the first n points of a scrambled Sobol sequence, one dimension for each of
        `PARAMETERS`: medians move far less between seeds than those of independent numbers do, and
        least with n a power of two.
        """
        from scipy.special import ndtri  # slow to import

        return {
            name: ndtri(sobol.coordinate(dimension, n, rng(seed, name)))
            for dimension, name in enumerate(PARAMETERS)
            if name in self.parameters
        }

    def at(self, normal: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
        """Map independent standard normal numbers to prices: the one rule that all draws follow.

        Parameters
        ----------
        normal : mapping of str to float64[n]
            By parameter, all of `parameters`.

        Returns
        -------
        dict of str to float64[n]
            Prices in TSC cycles (cpi: per instruction). A fraction is multiplied by its `first`; a
            `next` in cycles is correlated with its `first` (`RHO`) and cut at it: where the two are
            close (nehalem-2009, core2-2006), fewer of its draws are high than its quantiles say.
        """
        drawn: dict[str, FloatArray] = {}
        for name, price in self.parameters.items():
            first = FIRST_OF.get(name)
            if first is None or first not in normal:
                drawn[name] = price.at(normal[name])
            elif price.is_fraction:
                drawn[name] = drawn[first] * price.at(normal[name])
            else:
                z = RHO * normal[first] + (1 - RHO**2) ** 0.5 * normal[name]
                drawn[name] = np.minimum(price.at(z), drawn[first])
        return drawn

    def bare(self, name: str, drawn: Mapping[str, FloatArray]) -> FloatArray:
        """Take the instructions that a price includes off it.

        Parameters
        ----------
        name : str
            Parameter.
        drawn : mapping of str to float64[n]
            Of `sample`.

        Returns
        -------
        float64[n]
            TSC cycles. Below 0 where a draw leaves less for both than the instructions take in it.
        """
        return drawn[name] - self.parameters[name].includes_instructions * drawn["cpi"]

    def frame(self) -> pd.DataFrame:
        """Return one row per parameter; an unknown one has NaN quantiles and basis ``unknown``.

        Returns
        -------
        DataFrame
            Columns parameter, p05, p50, p95, unit, basis, claims, source.
        """
        import pandas as pd  # slow to import, and a run needs no frame of prices

        rows: list[dict[str, object]] = []
        for name in PARAMETERS:
            price = self.parameters.get(name)
            rows.append(
                {
                    "parameter": name,
                    "p05": price.p05 if price else float("nan"),
                    "p50": price.p50 if price else float("nan"),
                    "p95": price.p95 if price else float("nan"),
                    "unit": price.unit if price else "",
                    "basis": price.basis if price else "unknown",
                    "claims": " ".join(price.claims) if price else "",
                    "source": price.source if price else "",
                }
            )
        return pd.DataFrame(rows)


def names() -> tuple[str, ...]:
    """Return the ids of the shipped price lists, the default first, then by year."""
    found = [file.stem for file in data.path("cpus").glob("*.toml")]
    return tuple(sorted(found, key=lambda cpu: (cpu != DEFAULT, cpu.split("-")[1:], cpu)))


def overview() -> pd.DataFrame:
    """Return one row per shipped price list.

    Returns
    -------
    DataFrame
        Columns cpu, name, years, basis, claims, unknown, note.
    """
    import pandas as pd

    lists = [load(cpu) for cpu in names()]
    return pd.DataFrame(
        {
            "cpu": [one.id for one in lists],
            "name": [one.name for one in lists],
            "years": [one.years for one in lists],
            "basis": [one.basis for one in lists],
            "claims": [" ".join(one.claims) for one in lists],
            "unknown": [" ".join(one.unknown) for one in lists],
            "note": [" ".join(one.note.split()) for one in lists],
        }
    )


def load(cpu: str | Path = DEFAULT) -> PriceList:
    """Read a price list.

    Parameters
    ----------
    cpu : str or Path
        Id of a shipped list, or the path of a TOML file like those in ``data/cpus``. A file with
        ``base = "<id>"`` takes from that shipped list every price it does not give itself. Or the
        path of a posterior, a Parquet file that ``nvmx-lab calibrate`` writes.

    Raises
    ------
    LabError
        Unknown id; unreadable or malformed file: names the file, the key and what is allowed.
    """
    if Path(cpu).suffix == ".parquet":
        from nvmx_lab.costs.posterior import read  # it needs this module

        return read(Path(cpu))
    if isinstance(cpu, str) and not cpu.endswith(".toml") and not {"/", "\\"} & set(cpu):
        if cpu not in names():
            raise unknown("cpu", cpu, names())
        file = data.path("cpus", f"{cpu}.toml")
    else:
        file = Path(cpu)
    found, wrong = _read(file)
    if found is None:
        more = f" (and {len(wrong) - 1} more faults)" if len(wrong) > 1 else ""
        first = wrong[0]
        raise LabError(
            first.what + more,
            where=first.where,
            got=first.got,
            allowed=first.allowed,
            mend=first.mend,
        )
    # Results name their price list by its id: a changed copy must not pass for the shipped one.
    if found.id in names() and file.resolve() != data.path("cpus", f"{found.id}.toml").resolve():
        raise LabError(
            "the id of a shipped price list",
            where=f"{file}: id",
            got=found.id,
            mend="give the file an id of its own",
        )
    return found


def faults(file: Path) -> list[LabError]:
    """Return everything wrong with a price list's file; nothing if it can be loaded."""
    return _read(file)[1]


def _read(file: Path, *, is_base: bool = False) -> tuple[PriceList | None, list[LabError]]:
    """Read and check a file: the list, or else every fault found."""
    try:
        raw = file.read_bytes()
        content = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        return None, [LabError(f"cannot be read: {error.strerror or error}", where=file)]
    except UnicodeDecodeError as error:
        return None, [LabError(f"not UTF-8 at byte {error.start}", where=file)]
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        return None, [LabError(f"malformed TOML: {error}", where=file)]

    wrong: list[LabError] = []
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    header: _Header | None = None
    try:
        header = _Header.model_validate({k: v for k, v in content.items() if k not in tables})
    except ValidationError as error:
        wrong += _explain(error, file, "", _Header)
    own: dict[str, Price] = {}
    for key, table in tables.items():
        if key not in PARAMETERS:
            wrong.append(unknown("parameter", key, PARAMETERS, where=file))
            continue
        try:
            own[key] = Price.model_validate(table)
        except ValidationError as error:
            wrong += _explain(error, file, f"{key}.", Price)
    if header is None or wrong:
        return None, wrong

    merged: dict[str, Price] = {}
    digest = hashlib.sha256(raw)
    if header.base is not None:
        where = f"{file}: base"
        if is_base:  # one level: nobody should have to chase prices through files
            wrong = [LabError("a base may not have a base itself", where=where, got=header.base)]
            return None, wrong
        if header.base not in names():
            return None, [unknown("base price list", header.base, names(), where=where)]
        base, wrong = _read(data.path("cpus", f"{header.base}.toml"), is_base=True)
        if base is None:
            return None, wrong
        merged.update(base.parameters)
        digest.update(base.digest.encode())
    merged.update(own)
    prices = {name: merged[name] for name in PARAMETERS if name in merged}
    if not prices:
        return None, [LabError("no price at all", where=file, mend="give one table per parameter")]
    wrong = _check(prices, file)
    if wrong:
        return None, wrong
    return (
        PriceList(
            id=header.id,
            name=header.name,
            generation=header.generation,
            years=header.years,
            note=header.note.strip(),
            parameters=MappingProxyType(prices),
            digest=digest.hexdigest(),
        ),
        [],
    )


def _explain(
    error: ValidationError, file: Path, prefix: str, model: type[BaseModel]
) -> list[LabError]:
    """Turn a validation error into one LabError per fault."""
    wrong: list[LabError] = []
    for fault in error.errors(include_url=False):
        key = str(fault["loc"][0]) if fault["loc"] else ""
        where = f"{file}: {prefix}{key}"
        if fault["type"] == "extra_forbidden":
            wrong.append(unknown("key", key, model.model_fields, where=where))
        elif fault["type"] == "missing":
            wrong.append(LabError("is missing", where=where))
        else:
            got: Any = fault["input"]
            what = fault["msg"][:1].lower() + fault["msg"][1:]
            # A whole table or a page of text helps nobody.
            wrong.append(LabError(what, where=where, got=got if len(repr(got)) < 120 else None))
    return wrong


def _check(prices: Mapping[str, Price], file: Path) -> list[LabError]:
    """Return what no single value shows: order of quantiles, units that fit, next above first."""
    wrong: list[LabError] = []
    for name, price in prices.items():
        where = f"{file}: {name}"
        if not price.p05 <= price.p50 <= price.p95:
            got = (price.p05, price.p50, price.p95)
            order = "p05 <= p50 <= p95"
            wrong.append(LabError("quantiles out of order", where=where, got=got, allowed=order))
        first = FIRST_OF.get(name)
        units = [_PER_INSTRUCTION] if name == "cpi" else [_CYCLES]
        if first is not None:
            units.append(f"fraction of {first}")
        if price.unit not in units:
            wrong.append(
                LabError(
                    "wrong unit", where=f"{where}.unit", got=price.unit, allowed=" or ".join(units)
                )
            )
        if price.basis == "calibrated" and not price.claims:
            wrong.append(
                LabError("a calibrated price must say which claims", where=f"{where}.claims")
            )
        if first is None:
            continue
        if price.is_fraction:
            if first not in prices:
                wrong.append(LabError(f"a fraction needs the price of {first}", where=where))
            elif price.p95 > 1:
                wrong.append(LabError("above 1", where=f"{where}.p95", got=price.p95))
        elif first in prices:
            ceiling = prices[first]
            for quantile in ("p05", "p50", "p95"):
                if getattr(price, quantile) > getattr(ceiling, quantile):
                    wrong.append(
                        LabError(
                            f"above that of {first}",
                            where=f"{where}.{quantile}",
                            got=getattr(price, quantile),
                            allowed=f"at most {getattr(ceiling, quantile)}",
                        )
                    )
    return wrong


def rng(seed: int, task: str) -> np.random.Generator:
    """Return the random stream of one task: named by seed and task alone."""
    # hash() differs from run to run; a digest does not.
    digest = hashlib.sha256(f"price {task}".encode()).digest()
    number = int.from_bytes(digest[:8], "little")
    return np.random.default_rng(np.random.SeedSequence([seed, number]))
