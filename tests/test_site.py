"""The documentation is a site in which no link leads nowhere, and the command line's page has every verb."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def test_the_site_is_built_and_strict(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    verbs = (site / "reference/command-line/index.html").read_text(encoding="utf-8")
    assert all(f"hf-s3t {verb}" in verbs for verb in ("plan", "delete", "verify", "state export", "purge"))
    names = (site / "reference/python/index.html").read_text(encoding="utf-8")
    assert all(name in names for name in ("S3TConfig", "S3TTrainer", "S3TStore", "S3TEnsemble", "IsolationError"))


def test_every_page_is_in_the_contents() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    contents = str(yaml.safe_load(text)["nav"])
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in contents] == []
