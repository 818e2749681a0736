"""The code of the pages in docs/ runs as it stands, one block after the other."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from hf_s3t import S3TConfig, S3TTrainer
from hub_server import Server
from machines import Machine

pytest_plugins = ["hub_fixtures"]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the recipes and a store of two shards."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained("recipes/demo/base")
    rows = Dataset.from_list([json.loads(line) for line in open("recipes/demo/people.jsonl", encoding="utf-8")])
    rows = rows.map(lambda row: tokenizer(row["instruction"] + " " + row["output"]))
    fields = {"num_shards": 2, "num_slices": 2, "target_modules": "all-linear", "group_column": "person"}
    trainer = S3TTrainer(
        AutoModelForCausalLM.from_pretrained("recipes/demo/base"),
        TrainingArguments("out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        rows,
        peft_config=S3TConfig(task_type="CAUSAL_LM", **fields),
        partition_key="0123456789abcdef0123456789abcdef",
    )
    trainer.train()
    return tmp_path / "out"


def test_the_page_on_serving(out: Path, capsys: pytest.CaptureFixture) -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "docs/serving.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    promised = ["['shard-00', 'shard-01'] 0", "inactive 1", "1 2"]
    assert [line for line in printed if line in promised] == promised
    assert all(f"# {line}" in page for line in promised)
    assert names["tokens"].shape[1] == names["prompt"]["input_ids"].shape[1] + 8
    assert names["answer"][0]["generated_text"].startswith("Where does")
    assert names["pod"].generation == 2 and not Path("pod/.s3t").exists()
    assert not [file for file in Path("pod").rglob("*.new")]


def promised_lines(block: str) -> list[str]:
    """What a block of Python says that it prints: comments after a `print`, and lines that are comments."""
    lines = (re.fullmatch(r"(?: *print\(.*\)  )?# (.*)", line) for line in block.splitlines())
    return [line[1] for line in lines if line]


def test_the_page_on_planning(capsys: pytest.CaptureFixture) -> None:
    page = (ROOT / "docs/planning.md").read_text(encoding="utf-8")
    names: dict = {}
    promises = 0
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(block, "docs/planning.md", "exec"), names)
        promised = promised_lines(block)
        assert capsys.readouterr().out.splitlines() == promised
        promises += len(promised)
    assert promises >= 8
    assert "erased" not in page


def follow(page: str, folder: str) -> list[list]:
    """Runs a page in a folder: each command and each block of Python with its exit code and what it printed."""
    from typer.testing import CliRunner

    from hf_s3t.cli.main import app

    os.chdir(folder)
    done: list[list] = []
    names: dict = {}
    for kind, block in re.findall(r"```(bash|python)\n(.*?)```", page, re.S):
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, "page", "exec"), names)
            done.append(["python", 0, printed.getvalue()])
        for line in block.splitlines() if kind == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "export":
                os.environ.update([words[1].split("=", 1)])
            else:
                result = CliRunner().invoke(app, words[1:])
                done.append([" ".join(words), result.exit_code, " ".join((result.stdout + result.stderr).split())])
    return done


def test_the_page_on_the_hub(out: Path, server: Server, machine: Machine) -> None:
    page = (ROOT / "docs/hub.md").read_text(encoding="utf-8").replace("me/model", "owner/model")
    shutil.copytree(out, out.parent / "copy")
    done = machine(follow, page=page, folder=str(out.parent))
    files = server.repository("owner/model").entries("main")
    assert len(server.repository("owner/model").log()) == 1 and not [path for path in files if ".s3t" in path]
    codes = [(command, code) for command, code, _ in done]
    assert codes == [
        ("hf-s3t push out owner/model", 0),
        ("hf-s3t push out owner/model", 0),
        ("python", 0),
        ("python", 0),
        ("hf-s3t locate owner/model --groups Fetamir Medresson", 0),
        ("hf-s3t delete owner/model --groups Fetamir Medresson", 3),
        ("hf-s3t status owner/model", 3),
        ("hf-s3t purge owner/model --report report.json", 0),
        ("hf-s3t recheck report.json", 0),
        ("hf-s3t pull copy owner/model", 0),
        ("hf-s3t status copy", 0),
    ], done
    texts = [text for _, _, text in done]
    assert texts[0].split(" at ")[-1] == texts[1].split(" at ")[-1]
    assert texts[3].strip() == "0" and "# 0" in page
    assert "still served at" in texts[5] and "still serves what was deleted by" in texts[6]
    assert "no longer served" in texts[7] and "no longer served" in texts[8]
    assert (out.parent / "copy/.s3t/state.sqlite").exists() and "generation 1" in texts[10]


def table_rows(page: str, beginning: str) -> list[list[str]]:
    """Cells of the table that begins so, without its first two lines."""
    table = page[page.index(f"\n{beginning}") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_tables_on_speed() -> None:
    page = (ROOT / "docs/speed.md").read_text(encoding="utf-8")
    counted = [row for row in table_rows(page, "| | paper |") if row[0] != "formula"]
    assert len(counted) == 5
    for case, *passes in counted:
        layers, *trained, stages = [int(number) for number in re.findall(r"\d+", case)]
        group, depths = (trained or [layers])[0] // stages, range(1, stages + 1)
        paper = sum(depth * 3 * layers for depth in depths)
        uncached = sum(depth * (layers + depth * group) for depth in depths)
        cached = sum(depth * 2 * depth * group for depth in depths)
        assert [int(cell) for cell in passes] == [paper, uncached, cached]
    sizes = table_rows(page, "| model |")
    assert len(sizes) == 3
    for _, shape, one, four, eight in sizes:
        entrance = 1e6 * int(shape.split()[1].replace(",", "")) * 2 / 1e9  # a million positions in bf16
        assert float(one.split()[0]) == round(entrance, 1)
        assert [float(cell.split()[0]) for cell in (four, eight)] == [round(entrance * count) for count in (3, 7)]
