"""The ledger of claims names tests and commands that there are, grades that there are, and every promise."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import mutations
from command_line import run
from hf_s3t.cli.main import app
from test_docs import table_rows

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
LEDGER = table_rows(PAGE, "| | claim | grade |")
GRADES = re.findall(r"^- \*(.+?)\*: ", PAGE.split("## The ledger")[0], re.M)
COMMANDS = sorted({*re.findall(r"`((?:hf-s3t|pytest|make) [^`]+)`", PAGE)} - {"pytest tests/FILE"})


def words_of(page: str) -> str:
    return " ".join(page.split())


def test_every_promise_has_a_claim_with_one_of_the_three_grades() -> None:
    assert GRADES == ["influence-free by construction", "bit-equal on this stack", "observed at time T"]
    assert {int(row[0]) for row in LEDGER} >= set(range(1, 9))
    assert {row[2] for row in LEDGER} == set(GRADES) and all(len(row) == 5 for row in LEDGER)


@pytest.mark.parametrize("row", LEDGER, ids=[f"{row[0]} {row[1][:40]}" for row in LEDGER])
def test_the_evidence_of_a_claim_is_there(row: list[str]) -> None:
    number, _, _, tests, commands = row
    named = re.findall(r"`([^`]+)`", tests)
    assert named and tests == ", ".join(f"`{name}`" for name in named)
    for name in named:
        assert "\ndef test_" in (ROOT / "tests" / name).read_text(encoding="utf-8"), name
    of_number = [item for item in mutations.MUTATIONS if item.promise == int(number)]
    broken = {test.split("::")[0] for item in of_number for test in item.tests}
    assert broken & set(named), f"no mutation of {number} is caught by {named}"
    assert re.findall(r"`([^`]+)`", commands)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_there_is(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{re.escape(words[0])}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif program == "pytest":
        assert words and all((ROOT / word).is_file() for word in words)
    else:
        verbs = words[: 2 if words[0] == "state" else 1]
        assert run(*verbs, "--help").exit_code == 0
        found: Any = get_command(app)
        for verb in verbs:
            found = found.commands[verb]
        known = {option for parameter in found.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known


def test_pages_that_it_leads_to_are_there() -> None:
    for page, folder in ((PAGE, ROOT / "docs"), (SECURITY, ROOT)):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page):
            assert (folder / target).is_file(), target
    anchor = "## What else was computed from the rows"
    assert "training.md#what-else-was-computed-from-the-rows" in PAGE
    assert anchor in (ROOT / "docs/training.md").read_text(encoding="utf-8")


def test_no_page_says_more_than_the_grades() -> None:
    for page in (PAGE, SECURITY):
        assert not re.search(r"\b(erased|guaranteed|impossible|anonymous data)\b", page)
        assert not re.search(r"[\w.]+@[\w.]+", page)  # no address is made up
    assert "private vulnerability reporting" in words_of(SECURITY)


def test_every_attacker_has_a_way_out() -> None:
    rows = table_rows(PAGE, "| who | can |")
    assert len(rows) >= 8 and all(len(row) == 4 and all(row) for row in rows)
