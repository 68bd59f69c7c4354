"""A calibrated price list: prices drawn together from a posterior, not one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from pydantic import ValidationError

from nvmx_lab import files
from nvmx_lab.costs.prices import PARAMETERS, FloatArray, Price, PriceList, rng
from nvmx_lab.errors import LabError

_KEY = b"nvmx-lab"
_LAYOUT = 1


@dataclass(frozen=True, kw_only=True)
class Posterior(PriceList):
    """A price list whose sampled prices are drawn together.

    Attributes
    ----------
    sampled : tuple of str
        Parameters with a joint posterior; the others are drawn from their own quantiles.
    samples : float64[n, len(sampled)]
        Draws of it, TSC cycles (cpi: per instruction).
    about : mapping
        What it was made of: fit, seed, claims, convergence, hashes of its inputs.

    See Also
    --------
    nvmx_lab.costs.calibration : makes them.
    """

    sampled: tuple[str, ...]
    samples: FloatArray = field(repr=False)
    about: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def sample(self, n: int, seed: int) -> dict[str, FloatArray]:
        """Draw prices by parameter; no row of the posterior comes twice before all came once."""
        drawn = super().sample(n, seed)
        rows = rng(seed, "posterior").permutation(len(self.samples))
        rows = np.resize(rows, n)
        return drawn | dict(zip(self.sampled, self.samples[rows].T, strict=True))

    def write(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the posterior and what it was made of to a Parquet file.

        Raises
        ------
        LabError
            If the path does not end in ``.parquet``.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if path.suffix != ".parquet":
            raise LabError("a posterior is a Parquet file", where=path, mend="end it in .parquet")
        header = {
            "layout": _LAYOUT,
            **{name: getattr(self, name) for name in ("id", "name", "generation", "years", "note")},
            "digest": self.digest,
            "parameters": {name: p.model_dump() for name, p in self.parameters.items()},
            "about": dict(about),
        }
        table = pa.table(dict(zip(self.sampled, self.samples.T, strict=True)))
        table = table.replace_schema_metadata({_KEY: json.dumps(header).encode()})
        files.write_with(path, lambda new: pq.write_table(table, new, compression="zstd"))


def read(path: Path) -> Posterior:
    """Read a posterior that `Posterior.write` wrote.

    Raises
    ------
    LabError
        If the file cannot be read or is no such file: names it and what is wrong.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise LabError("no such file", where=path)
    try:
        table = pq.read_table(path)
    except OSError as error:
        raise LabError(f"cannot be read: {error.strerror or error}", where=path) from None
    except pa.ArrowInvalid:
        raise LabError("not a Parquet file", where=path) from None
    raw = (table.schema.metadata or {}).get(_KEY)
    mend = "write one with: nvmx-lab calibrate --out FILE.parquet"
    if raw is None:
        raise LabError("a Parquet file, but not a posterior of prices", where=path, mend=mend)
    try:
        header = json.loads(raw)
        if header["layout"] != _LAYOUT:
            raise LabError(
                "a posterior of another layout", where=path, got=header["layout"], mend=mend
            )
        parameters = {
            name: Price.model_validate(header["parameters"][name])
            for name in PARAMETERS
            if name in header["parameters"]
        }
        columns = [table[name].to_numpy() for name in table.column_names]
        samples = np.stack(columns, axis=1).astype(np.float64)
        texts = {n: str(header[n]) for n in ("id", "name", "generation", "years", "note")}
        digest, about = str(header["digest"]), dict(header["about"])
    except (KeyError, ValueError, TypeError, ValidationError) as error:
        what = f"a malformed posterior: {type(error).__name__}"
        raise LabError(what, where=path, mend=mend) from None
    strange = [name for name in table.column_names if name not in parameters]
    if strange or not len(samples) or not np.isfinite(samples).all() or (samples < 0).any():
        raise LabError(
            "a malformed posterior: its draws are no prices",
            where=path,
            got=", ".join(strange) or None,
            mend=mend,
        )
    return Posterior(
        **texts,
        parameters=MappingProxyType(parameters),
        digest=digest,
        sampled=tuple(table.column_names),
        samples=samples,
        about=about,
    )
