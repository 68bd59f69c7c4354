"""Everything at once, with small notebooks in place of the real ones."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from nvmx_lab import files, notebook_parameters
from nvmx_lab.errors import LabError
from nvmx_lab.reports import batch, reproduce
from nvmx_lab.workload import mixes

from .conftest import PARAMETERS, notebook

PUBLISH = """
from nvmx_lab.reports.result import publish
cycles = {f"{leg}_saving_cycles_{end}": value for leg in ("exit_leg", "round_trip")
          for end, value in (("p05", 100.0), ("p50", 200.0), ("p95", 300.0))}
publish({"mix": mix, "title": mix.upper(), "basis": "assumed", "source": "a test",
         "pulls_share": 0.0, "rare_vmreads_saved_per_exit": 35, "verdict": "saves", **cycles})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    here = tmp_path_factory.mktemp("notebooks")
    one = ("code", f'mix = "cpuid"\n{PARAMETERS}', "parameters")
    every = ("code", f"mixes = []\n{PARAMETERS}", "parameters")
    notebook(here / "01_reproduce_the_saving.ipynb", ("markdown", "# One"), one, ("code", PUBLISH))
    notebook(here / "02_across_workload_mixes.ipynb", ("markdown", "# All of them"), every)
    notebook(here / "03_where_the_cycles_go.ipynb", ("markdown", "# Where"), one)
    correct = (
        'kvm = "6.1"\nsync = ""\nmutant = ""\nmachines = []\nreleases = []\nmutants = []\n'
        'cpu = "skylake-2015"\nseed = 1'
    )
    correct_cell = ("code", correct, "parameters")
    notebook(here / "10_is_it_correct.ipynb", ("markdown", "# Correct"), correct_cell)
    return here


def test_site_and_a_second_run(folder, tmp_path, page_of):
    names = list(mixes.names()[:2])[::-1]
    out = tmp_path / "out"
    made = reproduce.reproduce(names, jobs=2, out=out, notebooks=folder, seed=3)
    assert (made.exit_status, made.reports, made.reused) == (0, 5, 0)
    table = pd.read_parquet(out / "summary.parquet")
    assert list(table["mix"]) == names
    assert list(table["report"]) == [f"01_reproduce_the_saving--{name}.html" for name in names]
    page = page_of(made.index.read_text("utf-8"))
    for link in page.all("a")[1:]:
        assert (out / link["href"]).is_file()
    assert "All of them" in page.text["a"]

    record = json.loads((out / "run.json").read_text("utf-8"))
    assert record["seed"] == 3
    assert record["arguments"]["mixes"] == names
    assert record["arguments"]["kvm_before"] == "5.2"
    assert len(record["reports"]) == 5
    for report in record["reports"]:
        assert report["parameters"]["seed"] == 3
        for name, digest in report["files"].items():
            assert files.sha256(out / name) == digest
    assert record["data"]["vmcs_fields.csv"]
    assert str(tmp_path) not in json.dumps(record)

    again = reproduce.reproduce(names, jobs=2, out=out, notebooks=folder, seed=3)
    assert (again.exit_status, again.reports, again.reused) == (0, 5, 5)
    assert len(list(out.iterdir())) == 3 * 5 + 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixes": ["cpuidd"]}, "unknown mix.*did you mean 'cpuid'"),
        ({"mixes": ["../cpuid"]}, "unknown mix"),
        ({"mixes": []}, "no mix to run"),
        ({"mixes": "cpuid"}, "a list of names"),
        ({"kvm_after": "5.2+patch1"}, "unknown feature"),
        ({"kvm_before": "9.9"}, "unknown KVM release"),
        ({"cpu": "skylake"}, "unknown cpu.*did you mean 'skylake"),
        ({"exits": 0}, "exits"),
        ({"exit": 5}, "did you mean 'exits'"),
        ({"jobs": 0}, "absurd"),
        ({"breakdown_mix": "nowhere"}, "unknown mix"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(folder, tmp_path, given, message):
    out = tmp_path / "out"
    with pytest.raises(LabError, match=message):
        reproduce.reproduce(**{"mixes": ["cpuid"], "out": out, "notebooks": folder} | given)
    assert not out.exists()


def test_notebook_that_disagrees_with_its_class_is_refused(folder, tmp_path):
    wrong = tmp_path / "notebooks"
    wrong.mkdir()
    for path in folder.iterdir():
        text = path.read_text("utf-8")
        (wrong / path.name).write_text(text.replace("1_000_000", "1_000_001"))
    with pytest.raises(LabError, match="the default of 'exits' differs"):
        reproduce.reproduce(["cpuid"], out=tmp_path / "out", notebooks=wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("published", [[], [{}, {}], [{"mix": "cpuid"}]])
def test_report_without_a_good_summary_is_a_failure(folder, tmp_path, page_of, published):
    task = batch.plan(folder / "01_reproduce_the_saving.ipynb", {"mix": "cpuid"}, fingerprint="")
    report = batch.Report(task, 1.0, {"summary": published}, {})
    made = reproduce._gather(
        tmp_path, batch.Outcome((report,), ()), dict(task.parameters), ["cpuid"], reused=0
    )
    assert made.exit_status == 1
    page = page_of(made.index.read_text("utf-8"))
    assert "Not made" in page.text["h2"]


def test_all_adds_the_notebooks_beyond_the_main_job(tmp_path, monkeypatch):
    planned = []

    def run(tasks, held, jobs):
        planned.extend(tasks)
        return batch.Outcome([], [])

    monkeypatch.setattr(batch, "run", run)
    reproduce.reproduce(["cpuid"], out=tmp_path, everything=True, cpu="haswell-2013")
    by_name = {task.notebook: task.parameters for task in planned}
    assert set(by_name) == set(notebook_parameters.NOTEBOOKS)
    policies = by_name["08_better_policies"]
    assert policies["cpu"] == "haswell-2013"
    assert policies["exits"] == notebook_parameters.BetterPolicies().exits
    planned.clear()
    reproduce.reproduce(["cpuid"], out=tmp_path)
    assert {task.notebook for task in planned} == set(by_name) - set(reproduce.BEYOND)
