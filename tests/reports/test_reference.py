"""The committed reference summary is what the default run gives today."""

from pathlib import Path

import pandas as pd
import pytest

import nvmx_lab as nx
from nvmx_lab.notebook_parameters import AcrossWorkloadMixes
from nvmx_lab.workload import mixes

REFERENCE = Path(__file__).parents[2] / "reports" / "reference" / "summary.csv"


@pytest.fixture(scope="module")
def reference():
    return pd.read_csv(REFERENCE).set_index("mix")


def test_the_reference_has_every_mix(reference):
    assert sorted(reference.index) == sorted(mixes.names())


@pytest.mark.parametrize("mix", ["cpuid", "pio-user-kstack", "kvm-evmcs", "linux-boot-kstack"])
def test_the_reference_is_what_the_default_run_gives(reference, mix):
    given = AcrossWorkloadMixes()
    now = nx.compare(
        mix,
        kvm=[given.kvm_before, given.kvm_after],
        cpu=given.cpu,
        exits=given.exits,
        seed=given.seed,
    ).summary()
    row = reference.loc[mix]
    assert row["verdict"] == now["verdict"]
    for column in reference.columns:
        if (
            column.endswith(("_p05", "_p50", "_p95", "_share", "_per_exit"))
            and now[column] is not None
        ):
            assert row[column] == pytest.approx(now[column], rel=1e-9, abs=1e-9), column
