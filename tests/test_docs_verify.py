"""The page on verifying: its commands are those that there are, and what needs no training runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from command_line import run
from stores import make_store, people

PAGE = (Path(__file__).parent.parent / "docs" / "verify.md").read_text(encoding="utf-8")


def test_the_page_on_verifying(tmp_path: Path, monkeypatch) -> None:
    make_store(tmp_path / "out", people())
    (tmp_path / "texts.txt").write_text("row-17\nsaid by nobody\n")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [run(*words[1:]).exit_code for words in lines if "--retrain" not in words] == [0, 0]
    assert {run(*words[1:]).exit_code for words in lines if "--retrain" in words} == {2}, "there is no rows.parquet"


def test_every_option_that_the_page_names_exists(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    there = run("verify", "--help").stdout
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE))
    assert len(named) > 6 and all(option in there for option in named)
