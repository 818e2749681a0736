"""What an index of packages shows of this project, and that its files agree on the version."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import hf_s3t

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the build writes about the package."""
    code = "import sys; from hatchling.build import prepare_metadata_for_build_wheel as make; print(make(sys.argv[1]))"
    folder = tmp_path_factory.mktemp("metadata")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (folder / done.stdout.split()[-1] / "METADATA").read_text(encoding="utf-8")


def test_no_link_of_the_readme_leads_nowhere_on_an_index(metadata: str) -> None:
    readme = metadata.split("\n\n", 1)[1]
    assert readme.startswith("# hf_s3t")
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert targets and all(target.startswith(("https://", "#")) for target in targets)
    assert "<picture>" not in readme and "src=" not in readme


def test_the_version_is_one() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {PROJECT["version"], hf_s3t.__version__, citation["version"]} == {PROJECT["version"]}
    assert f"## [{PROJECT['version']}] - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_python_of_the_classifiers_is_tried_by_ci() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    tried = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tried == named
    assert {"run": ".ci/run"} in workflow["jobs"]["tests"]["steps"]


def test_what_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:src|tests|docs|benchmarks|constraints)/[\w/.*]*|[a-z]+/\w+\.py)`", text):
        places = [*ROOT.glob(name), *(ROOT / "src/hf_s3t").glob(name)]
        assert places, name
    for path in re.findall(r"pytest ([^`]+)`", text):
        assert all((ROOT / one).exists() for one in path.split()), path
