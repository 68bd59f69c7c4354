"""What is made from explorations: causes, tables, prices, files, and the commands."""

from __future__ import annotations

import functools
import json

import pandas as pd
import pytest
from click.testing import CliRunner

from nvmx_lab.cli import cli
from nvmx_lab.errors import LabError
from nvmx_lab.nested import config
from nvmx_lab.nested.counterexample import load
from nvmx_lab.nested.policies import SYNC_POLICIES, SyncPolicy
from nvmx_lab.study import correctness
from nvmx_lab.study import correctness_narrative as narrative
from nvmx_lab.study.habits import habits

pytestmark = pytest.mark.xdist_group("correctness")  # what is checked is kept for all tests here

MENDED = "6.1+flag-reset+smm-shadow-sync"
ENLIGHTENED = ["enlightened VMCS"]  # the quickest machine
SHADOW = ["shadow VMCS"]


@functools.cache
def checked(kvm: str) -> correctness.Correctness:
    return correctness.check(kvm, environments=correctness.USUAL_MACHINES)


def causes(kvm: str) -> dict[str, bool]:
    (verdict,) = checked(kvm).verdicts
    return {judged.cause: judged.eager_too for judged in verdict.findings}


def test_every_failure_of_a_release_is_explained_by_what_mends_it():
    assert causes("5.3") == {
        "flag-reset": False,
        "migration-sync": False,
        "cr3-always": True,
        "evmcs-fail-sync": True,
        "smm-shadow-sync": True,
    }
    assert causes("6.1") == {"flag-reset": False, "smm-shadow-sync": True}
    assert causes("5.2") == {"cr3-always": True, "evmcs-fail-sync": True, "smm-shadow-sync": True}
    assert causes(MENDED) == {}


def test_the_verdict_is_about_the_sync_alone():
    assert checked("5.2").ok, "eager copying fails only where it is not to blame"
    assert not checked("5.3").ok
    assert not checked("6.1").ok
    assert checked(MENDED).ok
    assert all(checked(kvm).verdicts[0].complete for kvm in ("5.2", "5.3", "6.1", MENDED))


def test_history_says_where_each_fault_was():
    parts = [checked(kvm).verdicts[0] for kvm in ("5.2", "5.3", "6.1")]
    past = correctness.history(correctness.Correctness(tuple(parts))).set_index("mend")
    assert list(past.loc["migration-sync", ["5.2", "5.3", "6.1"]]) == [
        "not found",
        "found",
        "mended",
    ]
    assert list(past.loc["flag-reset", ["5.2", "5.3", "6.1"]]) == ["not found", "found", "found"]
    assert list(past.loc["cr3-always", ["5.2", "5.3", "6.1"]]) == ["found", "found", "mended"]
    assert set(past.index) == {n for n, f in config.features().items() if "mends" in f}
    assert past["evidence"].str.len().gt(0).all()
    shown = narrative.history(past.reset_index())
    assert list(shown["fails because of"]) == [
        "the sync" if row["mend"] in ("migration-sync", "flag-reset") else "KVM"
        for row in past.reset_index().to_dict("records")
    ]


def test_a_mutant_is_the_cause_of_what_it_breaks():
    result = correctness.check(mutant="lazy-with-evmcs")
    (verdict,) = result.verdicts
    assert not result.ok
    assert {judged.cause for judged in verdict.findings} == {correctness.THE_MUTANT}
    assert verdict.kvm == MENDED


def test_mutants_are_caught_or_harmless_as_they_say():
    table = correctness.mutants(["lazy-with-evmcs", "flag-set-with-evmcs"]).set_index("mutant")
    assert list(table["verdict"]) == list(table["expected"]) == ["caught", "harmless"]
    assert table.loc["lazy-with-evmcs", "length"] >= 4
    assert table.loc["flag-set-with-evmcs", "reason"]
    assert len(narrative.mutants(table.reset_index())) == 2


def test_a_wrong_policy_of_a_user_is_found_and_named_the_cause():
    class Never(SyncPolicy):
        meaning = "never pulls for VMREAD"

        def before_vmread(self, l0, name):
            pass

    SYNC_POLICIES["never"] = Never
    try:
        result = correctness.check(MENDED, "never", environments=SHADOW)
    finally:
        del SYNC_POLICIES["never"]
    assert not result.ok
    assert {judged.cause for judged in result.verdicts[0].findings} == {correctness.THE_POLICY}


def test_results_show_themselves():
    result = checked("5.3")
    told = json.loads(result.to_json())
    assert told["ok"] is False
    (one,) = told["checked"]
    assert one["findings"][0]["steps"][-1].startswith(("VMREAD", "L2_READ"))
    assert {e["environment"] for e in one["environments"]} == set(correctness.USUAL_MACHINES)
    assert "KVM 5.3, lazy: FAILS" in str(result)
    assert "Not of the sync, eager copying fails in the same way" in str(result)
    assert len(result.findings()) == len(one["findings"])
    assert list(result.to_frame()["verdict"]) == ["fails"]
    assert "<table" in result._repr_html_()
    assert len(narrative.findings(result.verdicts[0])) == len(one["findings"])
    assert narrative.findings(checked(MENDED).verdicts[0]).empty
    assert list(narrative.machines(result.verdicts[0])["all states"]) == ["yes", "yes"]


def test_the_answer_says_what_was_found():
    past = correctness.history(checked("5.3"))
    priced = habits(draws=200)
    said = narrative.answer(checked("5.3"), past, pd.DataFrame(), priced)
    assert "It fails in 2 ways in which eager copying does not" in said
    said = narrative.answer(checked(MENDED), past, pd.DataFrame(), priced)
    assert "Nobody can tell it from eager copying" in said


class TestHabits:
    def test_what_pulls_costs_more_than_eager_copying_and_the_rest_saves(self):
        frame = habits(draws=2_000).set_index("habit")
        assert set(frame["pulls"]) == {0, 1}
        pulling = frame["pulls"] == 1
        assert (frame.loc[pulling, "lazy_p05"] > 0).all()
        assert (frame.loc[~pulling, "lazy_p95"] < 0).all()
        assert (frame["cycles_p05"] <= frame["cycles_p50"]).all()
        assert (frame["cycles_p50"] > 0).all()

    def test_one_pull_serves_all_reads(self):
        frame = habits(draws=200).set_index("habit")
        assert frame.loc["VMREAD of three rare fields", "pulls"] == 1
        one, three = (frame.loc[name, "lazy_p50"] for name in frame.index[[3, 4]])
        assert one == pytest.approx(three)

    def test_before_5_11_a_state_is_saved_without_a_pull(self):
        old, new = (habits(kvm, draws=200).iloc[-1]["pulls"] for kvm in ("5.3", "6.1"))
        assert (old, new) == (0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kvm": "9.9"}, "unknown KVM release"),
        ({"sync": "lazzy"}, "unknown sync policy.*did you mean 'lazy'"),
        ({"mutant": "no-pull-in-vmread"}, "unknown mutant.*did you mean"),
        ({"environments": ["shadow"]}, "unknown environment.*did you mean 'shadow VMCS'"),
        ({"without": ["MIGRATION"]}, "unknown step.*did you mean 'MIGRATE'"),
        ({"depth": 0}, "at least one step"),
    ],
)
def test_bad_input_is_one_clear_error(given, message):
    with pytest.raises(LabError, match=message):
        correctness.check(**given)


def invoke(*arguments: str):
    return CliRunner().invoke(cli, list(arguments))


class TestCommands:
    def test_exit_status_says_whether_the_property_holds(self):
        args = ("check", "--environment", *ENLIGHTENED, "--format", "json")
        held = invoke(*args, "--kvm", "5.3")
        assert held.exit_code == 0
        assert json.loads(held.stdout)["ok"] is True
        failed = invoke(*args, "--mutant", "lazy-with-evmcs")
        assert failed.exit_code == 1
        assert json.loads(failed.stdout)["ok"] is False

    def test_save_and_replay(self, tmp_path):
        folder, drawn = tmp_path / "found", tmp_path / "one.svg"
        saved = invoke("check", "--mutant", "lazy-with-evmcs", "--save", str(folder))
        assert saved.exit_code == 1
        files = sorted(folder.iterdir())
        assert files
        assert load(files[0]).mutant == "lazy-with-evmcs"
        told = invoke("check", "--replay", str(files[0]), "--svg", str(drawn))
        assert told.exit_code == 1
        assert "EVMCS_READ" in told.stdout
        assert drawn.read_bytes().lstrip().startswith(b"<?xml")
        as_json = invoke("check", "--replay", str(files[0]), "--format", "json")
        assert json.loads(as_json.stdout)["failed"] is True

    def test_a_replay_that_goes_well_has_status_0(self, tmp_path):
        folder = tmp_path / "found"
        invoke("check", "--mutant", "lazy-with-evmcs", "--save", str(folder))
        path = next(folder.iterdir())
        document = json.loads(path.read_text("utf-8")) | {"mutant": ""}
        path.write_text(json.dumps(document), "utf-8")
        assert invoke("check", "--replay", str(path)).exit_code == 0

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--replay", "x.json", "--kvm", "6.1"),
            ("--svg", "x.svg"),
            ("--replay", "nowhere.json"),
        ],
    )
    def test_options_that_do_not_go_together(self, arguments):
        outcome = invoke("check", *arguments)
        assert isinstance(outcome.exception, LabError)

    def test_mutants_are_listed(self):
        listed = invoke("mutants", "--format", "json")
        assert listed.exit_code == 0
        names = {row["name"] for row in json.loads(listed.stdout)}
        assert {"no-pull-in-vmwrite", "flag-outlives-vmcs02"} <= names
