"""What a notebook hands to its report: numbers for the summary, and tables with captions.

The numbers travel in the executed notebook itself, as a display of a MIME type of our own. Nothing
but the notebook file has to survive, and JupyterLab shows a line of text in its place.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from nvmx_lab.errors import LabError

if TYPE_CHECKING:
    import pandas as pd

MIME_TYPE: Final = "application/vnd.nvmx-lab.result+json"

Record = dict[str, Any]


def publish(
    records: pd.DataFrame | Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    name: str = "summary",
) -> None:
    """Hand records over from a notebook to the report that runs it.

    Parameters
    ----------
    records : DataFrame, mapping, or iterable of mappings
        The rows. Values are text, numbers, booleans or None, also NumPy's; NaN becomes None.
    name : str
        What the records are. Those of ``01_reproduce_the_saving`` named "summary" become rows of
        the summary of all reports (see `nvmx_lab.reports.summary`).

    Raises
    ------
    LabError
        If a value has no JSON form, or is infinite.
    """
    from IPython.display import display

    rows = as_records(records)
    plain = f"{len(rows)} record{'' if len(rows) == 1 else 's'} for the report: {name}"
    display({MIME_TYPE: {"name": name, "records": rows}, "text/plain": plain}, raw=True)  # type: ignore[no-untyped-call]


def table(frame: pd.DataFrame, caption: str, *, index: bool = True, decimals: int = 1) -> None:
    """Show a frame as a table with a caption, in JupyterLab and in the report alike.

    Parameters
    ----------
    frame : DataFrame
        What to show. Long frames are shown whole: cut before.
    caption : str
        What the table says, in one sentence.
    index : bool
        Whether the index is a column of row headers.
    decimals : int
        Digits after the point of floating-point numbers; a cell without a value shows a dash.
    """
    from IPython.display import display

    body = frame.to_html(
        border=0, index=index, na_rep="–", float_format=lambda number: f"{number:,.{decimals}f}"
    )
    # The first tag is the table's own; pandas has no option for a caption.
    head, _, rest = body.partition(">")
    shown = f"{head}><caption>{html.escape(caption, quote=False)}</caption>{rest}"
    plain = f"{caption}\n{frame.to_string()}"
    display({"text/html": shown, "text/plain": plain}, raw=True)  # type: ignore[no-untyped-call]


def as_records(
    records: pd.DataFrame | Mapping[str, Any] | Iterable[Mapping[str, Any]],
) -> list[Record]:
    """Return rows as plain dictionaries of JSON values.

    Raises
    ------
    LabError
        If a value has no JSON form, or is infinite.
    """
    rows: Iterable[Mapping[str, Any]]
    if isinstance(records, Mapping):
        rows = [records]
    elif hasattr(records, "to_dict"):  # a frame, without importing pandas to ask
        rows = records.to_dict("records")  # type: ignore[assignment]
    else:
        rows = records
    return [
        {str(key): _json_value(value, where=f"row {i}: {key}") for key, value in row.items()}
        for i, row in enumerate(rows)
    ]


def published(notebook: Mapping[str, Any]) -> dict[str, list[Record]]:
    """Return what an executed notebook published, by name.

    Parameters
    ----------
    notebook : mapping
        The executed notebook, as nbformat reads it.

    Raises
    ------
    LabError
        If two displays carry the same name, or one is malformed.
    """
    results: dict[str, list[Record]] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            payload = output.get("data", {}).get(MIME_TYPE)
            if payload is None:
                continue
            try:
                name, records = str(payload["name"]), as_records(payload["records"])
            except (KeyError, TypeError, AttributeError):
                raise LabError("a malformed published result", got=payload) from None
            if name in results:
                raise LabError(f"the notebook published {name!r} twice")
            results[name] = records
    return results


def _json_value(value: Any, *, where: str) -> Any:
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        value = value.item()  # a NumPy scalar
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise LabError("an infinite number cannot be published", where=where, got=value)
        return None if math.isnan(value) else float(value)
    if isinstance(value, Mapping):
        return {str(k): _json_value(v, where=f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(v, where=f"{where}[{i}]") for i, v in enumerate(value)]
    raise LabError(
        "a value that cannot be published",
        where=where,
        got=type(value).__name__,
        allowed="text, numbers, booleans, None, and lists and mappings of them",
    )
