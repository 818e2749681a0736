"""The command line names options, Python names arguments."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import hf_s3t
from command_line import cli, plain, run
from hf_s3t.cli.wording import OPTIONS
from stores import make_store

PACKAGE = Path(hf_s3t.__file__).parent
LIBRARY = sorted(path for room in ("store", "hub", "plan", "planner", "lora", "trunk", "serving", "training")
                 for path in (PACKAGE / room).glob("*.py"))  # fmt: skip


def raised(path: Path) -> list[str]:
    """The texts of what a file raises or logs; what is filled in is left out."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(part.value for part in node.values if isinstance(part, ast.Constant)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)}  # fmt: skip
    return [text for text in texts if text not in docs]


def test_python_is_told_of_no_option() -> None:
    told = [(path.name, text) for path in LIBRARY for text in raised(path)
            if re.search(r"(?<![\w-])--[a-z]", re.sub(r"`?hf-s3t [^`]*`?", "", text))]  # fmt: skip
    assert told == []


PLAN = ("plan", "--examples", "10", "--requests-per-day", "1", "--horizon-days")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("delete", "{}", "--ids", "nobody"), "(`hf-s3t locate`), or give `--missing-ok` to delete"),
        (("delete", "{}"), "give --ids, --ids-file, --groups, --groups-file, --not-in or --slices."),
        (("export", "{}", "copy", "--base", "x"), "`--base` is for `--merge`"),
        (("purge", "{}"), "Open a repository: `me/model`"),
        (("status", "{}", "--prior", "x"), "The prior must be numbers"),
        ((*PLAN, "9", "--budget", "2"), "--budget 2 is given"),
        ((*PLAN, "0"), "--horizon-days must be"),
        (("delete", "{}", "--slices", "9:9"), "shards"),
    ],
)
def test_the_command_line_names_options(tmp_path, monkeypatch, arguments, told) -> None:
    monkeypatch.chdir(tmp_path)
    store = make_store(tmp_path / "out").path
    done = run(*(str(store) if word == "{}" else word for word in arguments))
    text = plain(done.stderr)
    assert done.exit_code in (2, 4) and told in text
    assert not re.search(r"`[a-z_]+=", text), text


def test_every_option_that_is_named_is_one_of_a_verb() -> None:
    from typer.main import get_command

    verbs = list(get_command(cli.app).commands.values())
    verbs += [inner for verb in verbs for inner in getattr(verb, "commands", {}).values()]
    options = {name for verb in verbs for parameter in verb.params for name in parameter.opts}
    assert set(OPTIONS.values()) <= options
    arguments = {name for verb in ("delete", "readmit", "export", "purge", "expire", "push")
                 for name in inspect.signature(getattr(hf_s3t.S3TStore, verb)).parameters}  # fmt: skip
    arguments |= {field.name for field in dataclasses.fields(hf_s3t.S3TPlanner)}
    same = {name for name in arguments if f"--{name.replace('_', '-')}" in options}
    plain_words = {"ids", "groups", "shards", "examples", "prior", "layers", "quality", "replay", "seconds"}
    assert same - OPTIONS.keys() <= plain_words


def test_a_lost_state_names_the_verb(tmp_path) -> None:
    store = make_store(tmp_path / "out")
    (store.path / ".s3t/state.sqlite").unlink()
    text = plain(run("locate", store.path, "--ids", "row-1").stderr)
    assert "`hf-s3t delete --slices SHARD:SLICE` still works" in text and "slices=" not in text
