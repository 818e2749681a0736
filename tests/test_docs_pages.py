"""Each page that a new user follows runs as it stands, in a folder that has the recipes, and prints what it says."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from test_docs import follow, out, promised_lines  # noqa: F401  `out` is a fixture

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
QUICK = ("quickstart.md", "howto/images.md", "howto/quantised.md")
PYTHON_PAGES = sorted(
    str(page.relative_to(DOCS)) for page in [DOCS / "quickstart.md", *DOCS.glob("howto/*.md")]
    if "```python" in page.read_text(encoding="utf-8")
)  # fmt: skip


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with what a clone has."""
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PYTHON_PAGES])
def test_the_code_of_a_page_runs_and_prints_what_it_says(name: str, clone: Path) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    if "train_dataset=rows" in page or "trl" in page:
        pytest.importorskip("trl")
    names: dict = {"__name__": "page"}
    for head, block in re.findall(r"^ *```python(.*)\n((?:.*\n)*?) *```$", page, re.M):
        title = re.search(r'title="(.+)"', head)
        if title:
            (clone / title[1]).write_text(block, encoding="utf-8")
            continue
        block = re.sub(r"^   ", "", block, flags=re.M) if block.startswith("   ") else block
        if name in QUICK:
            block = re.sub(r"num_train_epochs=\d", "max_steps=2", block)
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, name, "exec"), names)
        lines = [line for line in printed.getvalue().splitlines() if line in promised_lines(block)]
        assert lines == promised_lines(block), printed.getvalue()
    for command in re.findall(r"^(ACCELERATE_USE_CPU=true .*)$", page, re.M):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env={**os.environ, "PATH": path})
        assert done.returncode == 0 and "processes: 2" in done.stdout, done.stderr[-2000:]


def test_the_page_on_a_request(out: Path) -> None:  # noqa: F811
    done = follow((DOCS / "howto/erasure-request.md").read_text(encoding="utf-8"), str(out.parent))
    assert [(command.split()[1], code) for command, code, _ in done] == [
        ("locate", 0), ("delete", 0), ("delete", 0), ("status", 0), ("verify", 0), ("receipt", 0),
    ], done  # fmt: skip
    assert "Nothing was changed" in done[1][2] and "DSR-2026-118" in done[2][2]


@pytest.mark.parametrize("name", ["choosing", "newer-stack"])
def test_the_commands_of_a_page(name: str, out: Path) -> None:  # noqa: F811
    done = follow(re.sub(r" *```python\n.*?```", "", (DOCS / f"howto/{name}.md").read_text(encoding="utf-8"),
                         flags=re.S), str(out.parent))  # fmt: skip
    assert done and all(code == 0 for _, code, _ in done), done


def test_every_picture_is_drawn_from_its_script(tmp_path: Path) -> None:
    script = DOCS / "images/draw.py"
    copy = tmp_path / "draw.py"
    copy.write_bytes(script.read_bytes())
    subprocess.run([sys.executable, str(copy)], check=True)
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name: path.read_bytes() for path in script.parent.glob("*.svg")}
    assert {name.rsplit("-", 1)[1] for name in drawn} == {"light.svg", "dark.svg"}
