"""Every file in examples/ runs as it stands in a clone, is short, and says what it did."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRINTED = {
    "existing_script": "6 rows deleted; stages removed: shard-00/",
    "chat": "6 rows deleted",
    "erase": "not covered:",
    "serve": "generation 3 of 3",
    "plan": "S3TConfig(num_shards=2, num_slices=4",
    "dpo": "6 examples;",
}
AFTER_CHAT = ("erase", "serve")


def run(name: str, folder: Path) -> str:
    script = ROOT / "examples" / f"{name}.py"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, str(script)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PRINTED.keys() - {"chat", *AFTER_CHAT}))
def test_an_example_runs(name: str, clone: Path) -> None:
    assert PRINTED[name] in run(name, clone)


@pytest.mark.slow
def test_the_examples_of_a_chat_run_one_after_the_other(clone: Path) -> None:
    for name in ("chat", *AFTER_CHAT):
        assert PRINTED[name] in run(name, clone), name


def test_every_example_is_short_and_tried() -> None:
    scripts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")}
    assert scripts.keys() == PRINTED.keys()
    for name, text in scripts.items():
        assert len(text.splitlines()) <= 40 and f"python examples/{name}.py" in text.splitlines()[0], name
