"""Golden numbers: what the kit said when somebody last looked.

``python -m tests.study.golden`` shows what differs now, ``--update`` writes it down.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nvmx_lab.study.compare import compare
from nvmx_lab.study.validate import COMPARED, RunValidation, validate
from nvmx_lab.workload import mixes

FILE = Path(__file__).with_suffix(".json")
PAIRS = (("5.2", "5.2+patch13"), ("5.2", "5.3"))
EXITS, SEED, DRAWS = 2_000, 1, 500


def current() -> dict[str, Any]:
    """Return all golden numbers as they are now."""
    return {"executed runs, model": runs(validate()), "comparisons": comparisons()}


def runs(results: Sequence[RunValidation]) -> dict[str, Any]:
    """Return what the model counts for each executed run."""
    return {run.run: {name: run.agreement[name].model for name in COMPARED} for run in results}


def comparisons() -> dict[str, Any]:
    """Return every mix, compared for each of `PAIRS`."""
    return {
        f"{mix}: {' against '.join(pair)}": compared(mix, pair)
        for mix in mixes.names()
        for pair in PAIRS
    }


def seen(part: str, now: dict[str, Any]) -> list[str]:
    """Return what differs in one part of the golden numbers."""
    return differences(json.loads(FILE.read_text())[part], now)


def compared(mix: str, pair: tuple[str, str]) -> dict[str, Any]:
    """Return the golden numbers of one comparison."""
    result = compare(mix, kvm=pair, exits=EXITS, seed=SEED, draws=DRAWS)
    return {
        "pulls": [side.pulls for side in result.results],
        "vmread": [side.counts["vmread"] for side in result.results],
        "vmwrite": [side.counts["vmwrite"] for side in result.results],
        "vmptrld": [side.counts["vmptrld"] for side in result.results],
        "retired": [round(side.counts["retired"]) for side in result.results],
        "round trip, cycles": [round(s.round_trip_cycles["p50"], 1) for s in result.results],
        "saving, cycles": {
            leg: {q: round(value, 2) for q, value in result.saving[f"{leg}_cycles"].items()}
            for leg in ("exit_leg", "round_trip")
        },
        "verdict": result.verdict,
    }


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Return nested values as one level, names joined."""
    if isinstance(values, dict):
        items = [(f"{name} / {key}" if name else str(key), v) for key, v in values.items()]
    elif isinstance(values, list):
        items = [(f"{name} [{i}]", v) for i, v in enumerate(values)]
    else:
        return {name: values}
    return {key: value for inner, v in items for key, value in flat(v, inner).items()}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each number that differs by more than rounding."""
    old, new = flat(then), flat(now)
    lines = [f"gone: {name}" for name in old.keys() - new.keys()]
    lines += [f"new: {name} = {new[name]}" for name in new.keys() - old.keys()]
    for name in old.keys() & new.keys():
        a, b = old[name], new[name]
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        same = abs(a - b) <= 1e-6 * abs(a) + 0.05 if numbers else a == b
        if not same:
            lines.append(f"{name}: was {a}, is {b}")
    return sorted(lines)


def main(arguments: list[str]) -> int:
    """Show the differences; with --update, write the numbers down."""
    now = current()
    then = json.loads(FILE.read_text()) if FILE.exists() else {}
    lines = differences(then, now)
    print("\n".join(lines) or "nothing differs")
    if arguments == ["--update"]:
        FILE.write_text(json.dumps(now, indent=1) + "\n")
        return 0
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
