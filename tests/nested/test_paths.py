"""The tables of L0: every path and condition is used, every name known."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvmx_lab import data, vmcs
from nvmx_lab.errors import LabError
from nvmx_lab.nested import model, policies
from nvmx_lab.nested import paths as module
from nvmx_lab.nested.config import Config, base_features, features, releases
from nvmx_lab.nested.model import CONFIG_TOKENS, DYNAMIC, Nvmx
from nvmx_lab.nested.paths import INSTRUCTIONS, lengths, paths
from tests.nested import words


def literals() -> set[str]:
    """Return every plain string in the source of the model and of its policies."""
    trees = (ast.parse(Path(m.__file__).read_text(encoding="utf-8")) for m in (model, policies))
    return {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def tokens() -> set[str]:
    rows = (row for table in (paths(), lengths()) for rows in table.values() for row in rows)
    return {token.removeprefix("!") for row in rows for token in row.condition}


def test_every_path_is_named_in_the_model_or_is_a_reason():
    """A path that nothing runs would be a row that says nothing."""
    named = literals()
    for path in paths():
        if path.startswith(("reflect.", "l1_exit.")):
            continue  # looked up by the exit's reason
        assert path in named, path


def test_every_path_that_the_model_runs_exists():
    asked: set[str] = set()

    class Watched(dict):
        def __getitem__(self, key):
            asked.add(key)
            return super().__getitem__(key)

    for kvm in words.RELEASES:
        for options in ({}, {"shadow_vmcs": False}, {"evmcs": True}):
            nvmx = Nvmx(Config.of(kvm, **options))
            nvmx.resolved_paths = Watched(nvmx.resolved_paths)
            nvmx.start()
            for operation in (
                *(op for op in words.OF_L1 if op.kind == "L1_EXIT"),
                *((words.ACCESSES) if not options.get("evmcs") else ()),
            ):
                nvmx.nested_exit("CPUID")
                nvmx.apply(operation)
                nvmx.vmptrld("B")
                nvmx.vmclear("B")
                nvmx.vmptrld("A")
                nvmx.apply(words.parse("VMRESUME"))
                nvmx.l0_exit("MSR")
            nvmx.nested_exit("CPUID")
            nvmx.vmxoff()
    reasons = {path for path in paths() if path.startswith(("reflect", "l1_exit"))}
    assert asked - reasons == set(paths()) - reasons


def test_every_condition_is_known():
    known = CONFIG_TOKENS | DYNAMIC | set(features())
    for token in tokens():
        if token.startswith("changed:"):
            vmcs.field(token.removeprefix("changed:"))
        else:
            assert token in known, token


def test_the_table_of_conditions_lists_those_in_use():
    listed = {row["name"] for row in data.read_rows(data.path("l0_conditions.csv"))}
    assert {token.partition(":")[0] for token in tokens()} - set(features()) <= listed


def test_every_feature_does_something():
    """A feature is named in a table or asked for by the model."""
    named = literals() | tokens()
    # Read as attributes of a release.
    named |= {"patch13", "patch08", "patch43", "shadow-host-rsp"}
    for feature in features():
        assert feature in named, feature


def test_every_row_runs_in_some_configuration():
    """No row's condition contradicts itself or the releases."""
    reachable = {
        Config.of(kvm, **{name: value for name in CONFIG_TOKENS - {"shadow_vmcs", "evmcs"}}).kvm
        for kvm in words.RELEASES
        for value in (True, False)
    }
    for path, rows in paths().items():
        for row in rows:
            static = [t for t in row.condition if t.removeprefix("!") in features()]
            assert any(
                all((t.removeprefix("!") in kvm.features) != t.startswith("!") for t in static)
                for kvm in reachable
            ), (path, row.condition)
            for token in row.condition:
                assert f"!{token}" not in row.condition, (path, row.condition)


@settings(max_examples=30)
@given(words.configs())
def test_every_stretch_has_a_length_that_always_holds(config):
    nvmx = Nvmx(config)
    nvmx.start()
    for stretch, rows in lengths().items():
        assert any(nvmx.holds(row.condition) for row in rows), stretch
        assert rows[-1].condition == (), f"{stretch}: the last row is for every other state"
        assert all(row.instructions >= 0 for row in rows)


@settings(max_examples=30)
@given(words.configs(), st.lists(words.words(), max_size=3))
def test_l0_retires_more_than_its_vmx_instructions(config, trips):
    """A stretch's length includes the instructions that its path executes."""
    nvmx = Nvmx(config)
    nvmx.start()
    for trip in trips:
        for operation in trip:
            nvmx.trace = model.Trace()
            nvmx.apply(operation)
            executed = sum(a.op not in INSTRUCTIONS[-2:] for a in nvmx.trace.accesses)
            if nvmx.trace.transitions:
                assert nvmx.trace.instructions > executed, operation


def test_releases_only_grow():
    """A later base release has every feature of an earlier one."""
    order = [release.name for release in releases()]
    assert order == ["5.2", "5.3", "5.8", "5.11", "6.1"]
    for earlier, later in itertools.pairwise(order):
        assert base_features(earlier) < base_features(later)


def test_a_bad_row_is_refused(monkeypatch, tmp_path):
    vmcs.catalogue()  # read once, from its own file
    file = tmp_path / "l0_paths.csv"
    head = "path,op,fields,copy,condition,function,source\n"
    monkeypatch.setattr(module.data, "path", lambda name: file)
    for row, says in (
        ("p,VMRAED,GUEST_RIP,,,f,s", "unknown instruction"),
        ("p,VMREAD,GUEST_RPI,,,f,s", "did you mean"),
    ):
        file.write_text(head + row + "\n")
        module.paths.cache_clear()
        with pytest.raises(LabError, match=says):
            module.paths()
    module.paths.cache_clear()
