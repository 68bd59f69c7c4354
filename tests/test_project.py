"""The project's files agree with each other, and imports stay cheap and point one way."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYTHONS = ("3.11", "3.12", "3.13")
COMMANDS = ("make reproduce", "make test")

# conda-forge's name, where it is not PyPI's
CONDA_NAMES = {"matplotlib-base": "matplotlib"}
# In environment.yml, and no package of PyPI that pyproject.toml would name.
CONDA_ONLY = {"python", "pip"}
# Distributions that are a part of another one, which pins them exactly.
PARTS = {"pydantic-core": "pydantic"}


@pytest.fixture(scope="module")
def pyproject(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def runtime(pyproject) -> dict[str, Requirement]:
    return by_name(pyproject["project"]["dependencies"])


@pytest.fixture(scope="module")
def direct(pyproject, runtime) -> dict[str, Requirement]:
    """Return every requirement that pyproject.toml names: to run, to test, to build."""
    test = by_name(pyproject["project"]["optional-dependencies"]["test"])
    return runtime | test | by_name(pyproject["dependency-groups"]["build"])


@pytest.fixture(scope="module")
def lock(project: Path) -> list[tuple[Requirement, list[str]]]:
    """Return the lock's entries, each with its hashes."""
    text = (project / "requirements.lock").read_text("utf-8").replace("\\\n", " ")
    entries = []
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        entries.append((Requirement(requirement), hashes))
    return entries


@pytest.mark.xdist_group("kept-together")
def test_tests_of_a_group_run_in_one_process(request):
    """What they share is else made once in each process; xdist names the group in the test's id."""
    grouped = getattr(request.config.option, "loadgroup", False)  # xdist sets it, in its workers
    assert not grouped or request.node.nodeid.endswith("@kept-together")


def by_name(lines: list[str]) -> dict[str, Requirement]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def run_python(code: str, *, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# environment.yml


def test_environment_is_in_step_with_pyproject(project, pyproject, direct):
    environment = yaml.safe_load((project / "environment.yml").read_text("utf-8"))
    conda = {}
    for entry in environment["dependencies"]:
        if isinstance(entry, str):
            name, _, bounds = entry.partition(" ")
            conda[canonicalize_name(CONDA_NAMES.get(name, name))] = bounds

    assert environment["name"] == pyproject["project"]["name"]
    assert conda["python"] == pyproject["project"]["requires-python"]
    expected = {name: str(requirement.specifier) for name, requirement in direct.items()}
    assert {name: bounds for name, bounds in conda.items() if name not in CONDA_ONLY} == expected


# requirements.lock


def test_lock_names_no_host(project):
    text = (project / "requirements.lock").read_text("utf-8")
    host = r"://|--[a-z-]*index|--find-links|--trusted-host| @ |#"
    assert [line for line in text.splitlines() if re.search(host, line)] == []


def test_lock_is_exact_and_hashed(lock):
    assert len(lock) > 50
    for requirement, hashes in lock:
        assert [pin.operator for pin in requirement.specifier] == ["=="], str(requirement)
        assert hashes, str(requirement)
        for digest in hashes:
            assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest), str(requirement)


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_has_every_direct_requirement_once(lock, direct, python):
    here = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    pinned: dict[str, Version] = {}
    for requirement, _ in lock:
        if requirement.marker is None or requirement.marker.evaluate(here):
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"{name} is pinned twice for Python {python}"
            (pin,) = requirement.specifier
            pinned[name] = Version(pin.version)
    for name, requirement in direct.items():
        assert name in pinned, f"{name} is not in the lock for Python {python}: make lock"
        assert requirement.specifier.contains(pinned[name]), f"{requirement}: make lock"


# what the package imports


def test_every_import_is_declared(project, runtime):
    owners = metadata.packages_distributions()
    undeclared = set()
    for path in sorted((project / "nvmx_lab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            for top in {module.partition(".")[0] for module in modules}:
                if top == "nvmx_lab" or top in sys.stdlib_module_names:
                    continue
                distributions = {canonicalize_name(name) for name in owners.get(top, [top])}
                if not {PARTS.get(name, name) for name in distributions} & runtime.keys():
                    undeclared.add(f"{path.relative_to(project)}: {top}")
    assert undeclared == set()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("nvmx_lab", "pandas numba matplotlib papermill pyarrow pydantic"),
        ("nvmx_lab.cli", "pandas numba matplotlib papermill pyarrow pydantic jupyter_client"),
        ("nvmx_lab.engine", "pandas pyarrow matplotlib papermill"),
        ("nvmx_lab.nested", "numba pandas matplotlib papermill"),
        ("nvmx_lab.plots", "numba papermill nvmx_lab.engine nvmx_lab.nested nvmx_lab.costs"),
    ],
)
def test_import_stays_light(project, module, unwanted):
    # The whole subpackage, not only its __init__: a module that is never imported proves nothing.
    code = f"""
import importlib, pkgutil, sys
package = importlib.import_module({module!r})
if {module!r} != "nvmx_lab":
    for found in pkgutil.walk_packages(getattr(package, "__path__", []), {module!r} + "."):
        importlib.import_module(found.name)
print(*sorted(set({unwanted.split()!r}) & set(sys.modules)))
"""
    assert run_python(code, cwd=project).strip() == ""


# the two commands


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_names_the_command_and_make_knows_it(project, command):
    text = (project / "README.md").read_text("utf-8")
    assert re.search(rf"^\s*{command}\b", text, re.M), f"no line of README.md is {command!r}"
    target = command.removeprefix("make ")
    assert re.search(rf"^{target}:.*## ", (project / "Makefile").read_text("utf-8"), re.M)


def test_ci_runs_the_test_command_of_the_readme(project):
    script = project / ".ci" / "run"
    lines = [line.strip() for line in script.read_text("utf-8").splitlines()]
    assert "make test" in lines
    assert lines[-1] == "make test", "nothing is to come after the test runner's closing line"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_make_target_is_explained(project):
    text = (project / "Makefile").read_text("utf-8")
    (phony,) = re.findall(r"^\.PHONY: (help .*)$", text, re.M)
    assert set(phony.split()) == set(re.findall(r"^([a-z]+):.*## \S", text, re.M))


# what is published


def test_citation_has_the_version_and_licence_of_the_package(project, pyproject):
    citation = yaml.safe_load((project / "CITATION.cff").read_text("utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == pyproject["project"]["version"]
    assert citation["license"] == pyproject["project"]["license"] == "MIT"
    assert {"message", "title", "authors"} <= citation.keys()
    assert (project / "LICENSE").read_text("utf-8").startswith("MIT License")


def test_supported_pythons_are_those_that_are_declared(pyproject):
    prefix = "Programming Language :: Python :: 3."
    classifiers = pyproject["project"]["classifiers"]
    declared = [c.rpartition(" ")[2] for c in classifiers if c.startswith(prefix)]
    assert tuple(declared) == PYTHONS
    assert pyproject["project"]["requires-python"] == f">={PYTHONS[0]}"
    assert pyproject["tool"]["mypy"]["python_version"] == PYTHONS[0]


def test_wheel_carries_data_and_notebooks(project, tmp_path):
    pytest.importorskip("hatchling", reason="hatchling builds the wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=project,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    for here, there in (("data", "_data"), ("notebooks", "_notebooks")):
        committed = {
            path.relative_to(project / here).as_posix()
            for path in (project / here).rglob("*")
            if path.is_file() and not {".ipynb_checkpoints", "__pycache__"} & set(path.parts)
        }
        folder = installed / "nvmx_lab" / there
        carried = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert committed, f"{here}/ is empty"
        assert carried == committed
    # Its own tables, not those of a checkout that happens to be there.
    found = run_python(
        "from nvmx_lab import data; print(data.root())", cwd=tmp_path, PYTHONPATH=str(installed)
    )
    assert Path(found.strip()) == installed / "nvmx_lab" / "_data"
