"""The code of the pages in docs/ runs as it stands, one block after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

from hf_s3t import S3TConfig, S3TTrainer

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
