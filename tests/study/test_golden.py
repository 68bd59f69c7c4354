"""Nothing changes unnoticed. A change that is meant: ``python -m tests.study.golden --update``."""

from __future__ import annotations

import copy
import json

from tests.study import golden


def test_comparisons_are_the_golden_ones():
    """The other part, what the model counts for the executed runs, is in test_validate.py."""
    lines = golden.seen("comparisons", golden.comparisons())
    assert not lines, "python -m tests.study.golden --update, if meant:\n" + "\n".join(lines[:40])


def test_a_difference_is_seen():
    then = json.loads(golden.FILE.read_text())
    assert golden.differences(then, then) == []
    now = copy.deepcopy(then)
    first = next(iter(now["comparisons"]))
    now["comparisons"][first]["pulls"][1] += 1
    now["comparisons"][first]["verdict"] = "?"
    del now["executed runs, model"]["kvm61_lazy_shadow"]["pulls"]
    kinds = sorted(line.split(":")[0].split(" / ")[0] for line in golden.differences(then, now))
    assert kinds == ["comparisons", "comparisons", "gone"]
