"""The one error that a person can mend: what, where, got, allowed, how to mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class LabError(Exception):
    """Bad input, said once and clearly.

    Parameters
    ----------
    what : str
        What is wrong, one sentence without a full stop.
    where : str, optional
        File, row, column or parameter.
    got : object, optional
        What was found there.
    allowed : str, optional
        What would have been accepted.
    mend : str, optional
        What to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        got: object = None,
        allowed: str | None = None,
        mend: str | None = None,
    ) -> None:
        self.what, self.got, self.allowed, self.mend = what, got, allowed, mend
        self.where = None if where is None else str(where)
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.got is not None:
            parts.append(f"got {self.got!r}")
        if self.allowed:
            parts.append(f"allowed: {self.allowed}")
        if self.mend:
            parts.append(self.mend)
        return "; ".join(parts)


def unknown(
    kind: str, got: str, allowed: Iterable[str], *, where: str | Path | None = None
) -> LabError:
    """Return the error for a name that is not among `allowed`, with a suggestion if one is near."""
    names = sorted(allowed)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    if not near and got:  # a prefix is the other common slip
        near = [name for name in names if name.lower().startswith(got.lower())][:1]
    listed = ", ".join(names[:40]) + (f", ... ({len(names)} in all)" if len(names) > 40 else "")
    return LabError(
        f"unknown {kind}",
        where=where,
        got=got,
        allowed=listed or "nothing: the list is empty",
        mend=f"did you mean {near[0]!r}?" if near else None,
    )
