"""A tiny trained store, what trains it, and how it is tampered with.

`make_trainer` is what `hf-s3t verify --trainer` is given, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from transformers import TrainingArguments, default_data_collator

import models
from hf_s3t import S3TConfig, S3TTrainer, Stage
from hf_s3t.store.audit import VerifyReport

KEY = "0123456789abcdef0123456789abcdef"
ROWS = 40
WEIGHTS = "adapter_model.safetensors"
CONTENTS = "stages own their layers and nothing else"


def make_trainer(output_dir: str, train_dataset: Any, base: Any = None, **config: Any) -> S3TTrainer:
    """2 shards of 3 slices, 14 stages of two layers each."""
    args = TrainingArguments(
        output_dir, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        save_strategy="no", logging_steps=1000, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    fields = {
        "num_shards": 2,
        "num_slices": 3,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        "r": 2,
        "group_column": "person",
    }
    return S3TTrainer(
        base or models.tiny_llama(),
        args,
        data_collator=default_data_collator,
        train_dataset=train_dataset,
        peft_config=S3TConfig(**fields | config),
        partition_key=KEY,
    )


def train_store(path: Path, rows: Any = None, **kwargs: Any) -> Path:
    """A store that was trained from beginning to end."""
    make_trainer(str(path), models.llama_rows(ROWS) if rows is None else rows, **kwargs).train()
    return path


def tree(path: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    """Changes a JSON file in place."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(store: Path, stage: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a stage's tensors and makes the manifest agree, as somebody who covers the traces would."""
    file = store / stage / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    parents = [above.name for above in Stage.from_name(stage).path[:-1]]
    about = json.dumps({"stage": stage, "parents": parents})
    file.write_bytes(save(tensors, {"format": "pt", "hf_s3t": about}))
    forge(store, stage)


def forge(store: Path, stage: str) -> None:
    """Writes the sha256 of a stage's files as they are into the manifest."""
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (store / stage).iterdir()}
    edit_json(store / "s3t.json", lambda manifest: manifest["stages"][stage].update(sha256=digests))


def broken(report: VerifyReport) -> dict[str, str]:
    """The checks of `verify` that failed, with what they found."""
    return {check.name: "\n".join(check.broken) for check in report.checks if check.broken}
