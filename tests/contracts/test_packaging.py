"""What is installed is what is here, and what was tested is what is asked for."""

from __future__ import annotations

import importlib
import re
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import pipeline
from pipeline.settings.strict import CHECKOUT
from pipeline.store.provenance import RECORDED_LIBRARIES

PROJECT: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["project"]["optional-dependencies"].items()
}
PINS = [
    line
    for line in (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line.strip() and not line.startswith("#")
]


def test_every_package_is_listed_and_no_other() -> None:
    """A forgotten one would work in the checkout and be missing elsewhere."""
    found = {
        ".".join(path.parent.relative_to(CHECKOUT).parts)
        for name in ("pipeline", "stages", "launch", "trackers")
        for path in (CHECKOUT / name).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_every_folder_of_modules_is_a_package() -> None:
    bare = {
        str(path.parent.relative_to(CHECKOUT))
        for name in ("pipeline", "stages", "launch", "trackers")
        for path in (CHECKOUT / name).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert bare == set()


def test_the_command_is_there() -> None:
    module, _, name = PROJECT["project"]["scripts"]["slipway"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("requirement", [*DEPENDENCIES, *(r for lines in EXTRAS.values() for r in lines)], ids=str)
def test_every_requirement_has_an_upper_bound(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators & {"<", "<=", "=="}, requirement


@pytest.mark.parametrize("name", ["transformers", "deepspeed", "trl"])
def test_minors_of_the_trainers_are_bounded(name: str) -> None:
    """`>=5.17,<5.18`: the next minor is not admitted."""
    (requirement,) = [r for r in [*DEPENDENCIES, *EXTRAS["dev"]] if r.name == name]
    lower = next(Version(s.version) for s in requirement.specifier if s.operator == ">=")
    assert not requirement.specifier.contains(f"{lower.major}.{lower.minor + 1}.0")


@pytest.mark.parametrize("line", PINS)
def test_constraints_are_plain_pins(line: str) -> None:
    """No place, no build of one machine: `torch==2.13.0`, not `2.13.0+cpu`."""
    assert re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line)


def test_constraints_pin_each_once_and_in_order() -> None:
    names = [canonicalize_name(line.partition("==")[0]) for line in PINS]
    assert names == sorted(set(names))


@pytest.mark.parametrize("requirement", [*DEPENDENCIES, *EXTRAS["dev"]], ids=str)
def test_what_was_tested_is_what_is_asked_for(requirement: Requirement) -> None:
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in PINS)}
    version = pins.get(canonicalize_name(requirement.name))
    assert version is not None, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(version, prereleases=True)


def test_make_installs_the_torch_that_was_tested() -> None:
    named = set(re.findall(r"torch==[\d.]+", (CHECKOUT / "Makefile").read_text(encoding="utf-8")))
    assert named == {line for line in PINS if line.startswith("torch==")}


def test_the_libraries_that_manifests_record_are_required() -> None:
    assert set(map(canonicalize_name, RECORDED_LIBRARIES)) <= {canonicalize_name(r.name) for r in DEPENDENCIES}


def test_the_changelog_speaks_of_this_version() -> None:
    text = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(pipeline.__version__)}\]", text, flags=re.MULTILINE)
