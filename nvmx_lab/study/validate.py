"""Validation: executed KVM against the model, exit by exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nvmx_lab.engine import run as engine
from nvmx_lab.errors import LabError
from nvmx_lab.nested.automaton import Automaton
from nvmx_lab.nested.paths import lengths
from nvmx_lab.nested.primitives import COUNTERS
from nvmx_lab.workload import executed
from nvmx_lab.workload.executed import NOT_A_PATH, ExecutedRun

if TYPE_CHECKING:
    import pandas as pd

COMPARED = ("pulls", "vmptrld", "vmclear", "vmread", "vmwrite", "instructions")
"""What is compared; the first three must agree exactly at every exit."""

MUST_AGREE = ("pulls", "vmptrld", "vmclear")

_SUMS = {"vmread": ("vmread_first", "vmread_next"), "vmwrite": ("vmwrite_first", "vmwrite_next")}


@dataclass(frozen=True)
class Agreement:
    """How far the model and the log of a run agree on one instruction.

    Attributes
    ----------
    exact_share : float or None
        Share of the exits on which they agree exactly; None if the run does not log it.
    ratio : float or None
        Total of the model over total of the log; None if not logged or zero in both.
    model, logged : float or None
        The totals.
    first_difference : int or None
        Number of the first exit on which they differ.
    """

    exact_share: float | None
    ratio: float | None
    model: float
    logged: float | None
    first_difference: int | None = None


@dataclass(frozen=True)
class RunValidation:
    """One executed run against the model.

    Attributes
    ----------
    run : str
        Name of the run.
    exits : int
        Reflected exits compared.
    agreement : dict of str to Agreement
        For each of `COMPARED`.
    instructions_not_compared : float or None
        Share of L0's retired instructions in stretches that are no path of KVM (idle waits of a
        halted vCPU, page faults): left out on both sides. None if the run does not log
        instructions.
    """

    run: str
    exits: int
    agreement: dict[str, Agreement]
    instructions_not_compared: float | None
    initial_state: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether pulls, VMPTRLD and VMCLEAR agree at every exit."""
        return all(self.agreement[name].exact_share == 1.0 for name in MUST_AGREE)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON layout that scripts rely on."""
        return {
            "run": self.run,
            "exits": self.exits,
            "ok": self.ok,
            **{
                name: {
                    "exact_share": a.exact_share,
                    "ratio": a.ratio,
                    "model": a.model,
                    "logged": a.logged,
                    "first_difference": a.first_difference,
                }
                for name, a in self.agreement.items()
            },
            "initial_state": list(self.initial_state),
            "instructions_not_compared": self.instructions_not_compared,
            "not_compared": f"L0's {' and '.join(NOT_A_PATH)} stretches of L1",
        }


def model_per_exit(run: ExecutedRun) -> pd.DataFrame:
    """Return what the model executes at each exit of a run: one row per exit, `COMPARED` columns.

    Instructions leave out the `NOT_A_PATH` stretches, as the log's do.
    """
    import pandas as pd

    stream = run.stream
    offsets, codes = stream.words.offsets, stream.words.codes
    automaton = Automaton(run.config, stream.alphabet)
    automaton.visit_words([stream.words[w].tolist() for w in range(len(stream.words))])
    lifted = engine.lift(automaton, offsets, codes)
    of_words = engine.counts_of_word(automaton, lifted, offsets, codes)
    counts = engine.counts_per_exit(stream, lifted, of_words)
    frame = pd.DataFrame(counts, columns=list(COUNTERS))
    for name, parts in _SUMS.items():
        frame[name] = frame[list(parts)].sum(axis=1)
    left_out = np.zeros(len(frame))
    for reason in NOT_A_PATH:
        times = np.array(
            [
                sum(op.arg == reason and op.kind == "L1_EXIT" for op in stream.word(w))
                for w in range(len(stream.words))
            ]
        )
        left_out += times[stream.ids()] * lengths()[f"l1_exit.{reason}"][0].instructions
    frame["instructions"] = frame["retired"] - left_out
    return frame[list(COMPARED)]


def validate_run(run: ExecutedRun) -> RunValidation:
    """Compare the model with the log of one run."""
    model = model_per_exit(run)
    agreement = {}
    for name in COMPARED:
        column = "retired" if name == "instructions" else name
        ours, theirs = model[name].to_numpy(), run.logged[column].to_numpy(dtype=float)
        if np.isnan(theirs).any():
            agreement[name] = Agreement(None, None, float(ours.sum()), None)
            continue
        total = float(theirs.sum())
        different = np.flatnonzero(ours != theirs)
        agreement[name] = Agreement(
            exact_share=float(np.mean(ours == theirs)),
            ratio=float(ours.sum()) / total if total else (1.0 if not ours.any() else None),
            model=float(ours.sum()),
            logged=total,
            first_difference=int(run.logged["exit"].iloc[different[0]]) if different.size else None,
        )
    left_out = None if np.isnan(run.not_compared) else run.not_compared
    return RunValidation(run.name, len(model), agreement, left_out, run.initial_state)


def validate(
    directory: Path | None = None, names: Sequence[str] | None = None
) -> list[RunValidation]:
    """Replay every run of a directory through the model.

    Parameters
    ----------
    directory : Path, optional
        Where the runs are (default: those that the kit ships).
    names : sequence of str, optional
        Only these runs.

    Raises
    ------
    LabError
        If the directory holds no run or a file of a run is malformed.
    """
    wanted = list(names) if names is not None else list(executed.run_names(directory))
    if not wanted:
        raise LabError("no run to validate", where=directory)
    return [
        validate_run(executed.load(name, directory))
        for name in tqdm(wanted, unit="run", disable=None, delay=1)
    ]


def as_frame(results: Sequence[RunValidation]) -> pd.DataFrame:
    """Return one row per run: exits, and for each of `COMPARED` the exact share and the ratio."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "run": r.run,
                "exits": r.exits,
                **{f"{n}_exact_share": a.exact_share for n, a in r.agreement.items()},
                **{f"{n}_ratio": a.ratio for n, a in r.agreement.items()},
            }
            for r in results
        ]
    )


def as_table(results: Sequence[RunValidation]) -> str:
    """Return the comparison as text: exact share of exits and ratio of totals."""
    width = max(len(r.run) for r in results)
    head = f"{'run':{width}}{'exits':>7}" + "".join(f"{name:>17}" for name in COMPARED)
    lines = [
        f"{head}{'left out':>10}",
        f"{'':{width}}{'':7}" + f"{'exact   ratio':>17}" * len(COMPARED) + f"{'of them':>10}",
    ]
    for r in results:
        cells = []
        for name in COMPARED:
            a = r.agreement[name]
            exact = "-" if a.exact_share is None else f"{a.exact_share:.2%}"
            ratio = "-" if a.ratio is None else f"{a.ratio:.4f}"
            cells.append(f"{exact + '  ' + ratio:>17}")
        share = r.instructions_not_compared
        left_out = "-" if share is None else f"{share:.0%}"
        lines.append(f"{r.run:{width}}{r.exits:>7}" + "".join(cells) + f"{left_out:>10}")
    for r in results:
        for name in MUST_AGREE:
            if (exit_number := r.agreement[name].first_difference) is not None:
                lines.append(f"{r.run}: {name} differ first at exit {exit_number}")
    lines.append(
        "exact: share of the exits that agree; ratio: total of the model over total of the log. "
        "Left out: share of L0's\ninstructions in stretches that are no path of KVM, the idle wait "
        "of a halted L1 and page faults; the instructions\nare compared without them."
    )
    return "\n".join(lines)
