"""The README's code runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_example_trains_deletes_and_repairs(tmp_path, monkeypatch, capsys):
    use, serve = blocks("python")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    assert "num_train_epochs=1)" in use
    exec(compile(use.replace("num_train_epochs=1)", "max_steps=2)"), "README.md", "exec"), names)
    line = [line for line in capsys.readouterr().out.splitlines() if " -> " in line][-1]
    assert re.fullmatch(r"6 examples; \{'0': \[\d, \d, \d, \d\]\} -> \{'0': \[[\d, ]+\]\}", line)
    assert names["trainer"].store.status().missing == ()
    assert names["trainer"].store.status().deleted_examples == 6
    exec(compile(serve, "README.md", "exec"), names)
    answer, state = capsys.readouterr().out.splitlines()[-2:]
    assert "Where does" in answer and state == "2 ['shard-00']"
    assert names["trainer"].store.status().generation == names["model"].generation == 2


def test_the_python_example_is_short():
    code, _ = blocks("python")
    assert sum(1 for line in code.splitlines() if line and not line.startswith(("from ", "import "))) <= 12


@pytest.mark.parametrize("verb", ["plan", "locate", "delete", "status", "verify", "export", "state"])
def test_every_verb_that_it_names_exists(verb):
    from typer.main import get_command

    from hf_s3t.cli.main import app

    assert f"hf-s3t {verb}" in README
    assert verb in get_command(app).commands


def test_both_commands_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
