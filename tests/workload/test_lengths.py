"""Lengths of L0's stretches: the table is what the logs give."""

from __future__ import annotations

import csv

import pandas as pd
import pytest

from nvmx_lab import data
from nvmx_lab.workload import lengths


@pytest.fixture(scope="module")
def derived() -> list[dict[str, str]]:
    return lengths.derive()


def test_the_table_is_what_the_logs_give(derived):
    """If this fails after a change: write `lengths.as_csv(lengths.derive())` to the table."""
    assert lengths.as_csv(derived) == data.path("l0_lengths.csv").read_text(encoding="utf-8")


def test_as_csv_can_be_read_back(derived):
    assert list(csv.DictReader(lengths.as_csv(derived).splitlines())) == derived


def test_medians_of_the_logs_typed_anew(derived):
    """The rounded numbers of the runs' description (data/README.md), lazy run."""
    table = {(row["stretch"], row["condition"]): float(row["instructions"]) for row in derived}
    assert table["rare_field", ""] == pytest.approx(181 / 35, abs=0.01)
    assert table["pull", ""] + 181 == pytest.approx(1667 - 1333, abs=2)
    assert table["entry.dirty", ""] == pytest.approx(7533 - 7133, abs=2)
    to_shadow, to_vmcs12 = (fields * table["shadow_field", ""] for fields in (35, 24))
    # Means lie a little above the medians: 6176 for the lazy exit leg of all kinds together.
    assert table["exit.CPUID", ""] + to_shadow == pytest.approx(5382, rel=0.02)
    assert table["l1_exit.VMRESUME", ""] + to_vmcs12 == pytest.approx(7133, rel=0.06)
    assert table["l1_exit.VMREAD", ""] == pytest.approx(1333, rel=0.06)
    assert table["l1_exit.VMWRITE", ""] == pytest.approx(1366, rel=0.08)
    assert table["l1_exit.RDMSR", ""] == pytest.approx(1191, rel=0.06)


def test_held_out_runs_are_not_read(derived, monkeypatch):
    """Validation on a run whose lengths went into the table would test less."""
    read: set[str] = set()
    real = pd.read_parquet

    def watched(file, *rest, **more):
        read.add(str(file))
        return real(file, *rest, **more)

    monkeypatch.setattr(pd, "read_parquet", watched)
    assert lengths.derive() == derived
    assert not any("nokstack" in name for name in read)
    named = {row["run"] for row in derived} - {""}
    assert all(any(f"{run}.segments" in name for name in read) for run in named)


def test_assumed_rows_say_so(derived):
    for row in derived:
        if not row["run"]:
            assert row["source"].startswith(("assumed", "derived", "by definition")), row
