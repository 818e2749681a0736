"""How much of what a full LoRA learns the served model keeps: a small pretrained Llama on real Alpaca rows.

Three models answer the same held-out rows, which neither training nor the choice of a setting has seen:

* the base model;
* *full LoRA*: one plain adapter over all layers, trained on all rows at once. Nobody can be deleted from it;
* the served model of a store: 2 shards of 5 slices, a layer per layer group, probabilities averaged over the shards.

*Equal slice passes*: S3T spends the plan's slice passes times the epochs of a stage; one epoch of full LoRA spends
`m * L` slice passes, so full LoRA trains `cost * epochs / (m * L)` epochs. Learning rates were chosen for each of the
two on a validation cut of the train split (`choose` in the settings tells how).

The loss is the mean over all response tokens of the held-out rows, in nats. `gap_share` is the part of the way from
the base model to full LoRA that the served model goes.

```bash
python benchmarks/alpaca.py --json alpaca.json
python benchmarks/alpaca.py --json alpaca_5.json --shards 5
python benchmarks/alpaca.py --quick
```
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_s3t import S3TConfig, S3TEnsemble, S3TStore, S3TTrainer

REPOSITORY = Path(__file__).resolve().parent.parent
IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    train_rows: int = 2000
    validation_rows: int = 200
    test_rows: int = 500
    max_length: int = 128
    num_shards: int = 2
    num_slices: int = 5
    budget: int = 2
    epochs: float = 1.0
    r: int = 16
    batch_size: int = 8
    stage_parameters: str = "layer_group"
    s3t_learning_rate: float = 1e-2
    full_learning_rate: float = 5e-3
    choose: str = (
        "learning rates by the loss on the validation rows of seed 0: S3T of 1e-2, 2e-2, 4e-2, on one shard; "
        "full LoRA of 5e-3, 1e-2, 2e-2, after 2 epochs"
    )


QUICK = Settings(train_rows=160, validation_rows=10, test_rows=20, max_length=96, budget=1)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery on a few rows, in under a minute")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--shards", type=int, help="number of shards m (default: 2)")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2], help="one run per seed (default: 0 1 2)")
    return parser


def data_folder() -> Path:
    """Where the real rows and the small Llama are: `HF_S3T_SHARED_DATA`, else beside the repository."""
    return Path(os.environ.get("HF_S3T_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))


def prompt(row: dict[str, str]) -> str:
    """The instruction as the model reads it, in few of the small tokenizer's pieces."""
    given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"


def tokenize(row: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Tokens of prompt and response, cut at `max_length`; only the response carries labels."""
    asked = tokenizer(prompt(row))["input_ids"]
    answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    tokens = (asked + answer)[:max_length]
    labels = ([IGNORED] * len(asked) + answer)[:max_length]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def read_rows(settings: Settings, seed: int) -> tuple[Any, dict[str, Dataset]]:
    """The tokenizer, and train, validation and test rows; train and validation are cut from the train split."""
    tokenizer = AutoTokenizer.from_pretrained(data_folder() / "llama_stories260k")
    splits = {}
    for split in ("train", "test"):
        rows = Dataset.from_parquet(str(data_folder() / "alpaca_9k" / f"{split}.parquet"), keep_in_memory=True)
        rows = rows.add_column("id", [f"{split}-{number}" for number in range(len(rows))])
        splits[split] = rows.shuffle(seed=seed, keep_in_memory=True) if split == "train" else rows
    sizes = {"train": settings.train_rows, "validation": settings.validation_rows, "test": settings.test_rows}
    cut = {}
    for name, size in sizes.items():
        start = settings.train_rows if name == "validation" else 0
        kept = []
        for row in splits["test" if name == "test" else "train"].select(range(start, start + size)):
            tokens = tokenize(row, tokenizer, settings.max_length)
            if any(label != IGNORED for label in tokens["labels"][1:]):  # a prompt may fill the whole length
                kept.append({"id": row["id"], **tokens})
        cut[name] = Dataset.from_list(kept)
    return tokenizer, cut


def base_model() -> Any:
    """The small pretrained Llama, fresh."""
    return AutoModelForCausalLM.from_pretrained(data_folder() / "llama_stories260k")


def collator(tokenizer: Any) -> DataCollatorForSeq2Seq:
    """Pads tokens and labels to the longest row of a batch."""
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)


@torch.no_grad()
def response_loss(model: torch.nn.Module, rows: Dataset, tokenizer: Any) -> float:
    """Mean loss over all response tokens of the rows; of an ensemble, the loss of its averaged probabilities."""
    model.eval()
    collate, total, tokens = collator(tokenizer), 0.0, 0
    ordered = sorted(rows.remove_columns("id"), key=lambda row: len(row["input_ids"]))  # less padding
    for start in range(0, len(ordered), 16):
        batch = collate(ordered[start : start + 16])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        sum_of_losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total, tokens = total + sum_of_losses.item(), tokens + int((labels != IGNORED).sum())
    return total / tokens


def arguments(settings: Settings, folder: Path, seed: int, rate: float, epochs: float) -> TrainingArguments:
    """The same for both trainings, but for learning rate and epochs."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=rate,
        warmup_steps=0.1,
        seed=seed,
        save_strategy="no",
        logging_steps=1_000_000,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )


def train_s3t(settings: Settings, folder: Path, seed: int, tokenizer: Any, rows: Dataset) -> S3TTrainer:
    """A store of all stages, and its trainer."""
    config = S3TConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.r,
        target_modules="all-linear",
        num_shards=settings.num_shards,
        num_slices=settings.num_slices,
        budget=settings.budget,
        stage_parameters=settings.stage_parameters,
    )
    trainer = S3TTrainer(
        base_model(),
        arguments(settings, folder, seed, settings.s3t_learning_rate, settings.epochs),
        data_collator=collator(tokenizer),
        train_dataset=rows,
        peft_config=config,
        partition_key=f"benchmarks/alpaca.py, seed {seed}",
    )
    trainer.train()
    return trainer


def train_full(settings: Settings, folder: Path, seed: int, tokenizer: Any, rows: Dataset, epochs: float) -> Any:
    """One plain LoRA of the same rank over all layers, on all rows."""
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=settings.r, lora_alpha=settings.r, target_modules="all-linear")
    model = get_peft_model(base_model(), config)
    args = arguments(settings, folder, seed, settings.full_learning_rate, epochs)
    Trainer(model, args, data_collator=collator(tokenizer), train_dataset=rows.remove_columns("id")).train()
    return model


def prefix_losses(store: S3TStore, folder: Path, rows: Dataset, tokenizer: Any) -> dict[str, float]:
    """Held-out loss of every trained prefix, each exported and loaded by stock PEFT."""
    losses = {}
    for stage in sorted(store.manifest().stages):
        path = folder / stage.name
        store.export(path, prefix=stage)
        losses[stage.name] = response_loss(PeftModel.from_pretrained(base_model(), path), rows, tokenizer)
    return losses


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Trains and measures with one seed.

    Returns:
        `dict`: figures by name.
    """
    started = time.monotonic()
    tokenizer, rows = read_rows(settings, seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trainer = train_s3t(settings, folder / "store", seed, tokenizer, rows["train"])
        store, after_s3t = trainer.store, time.monotonic()
        passes = store.manifest().plan.cost * settings.epochs
        epochs = passes / (settings.num_shards * settings.num_slices)
        full = train_full(settings, folder / "full", seed, tokenizer, rows["train"], epochs)
        after_full = time.monotonic()
        test = rows["test"]
        figures: dict[str, Any] = {
            "base_loss": response_loss(base_model(), test, tokenizer),
            "full_lora_loss": response_loss(full, test, tokenizer),
            "served_loss": response_loss(S3TEnsemble.from_pretrained(store.path, base_model()), test, tokenizer),
            "root_adapter_loss": response_loss(PeftModel.from_pretrained(base_model(), store.path), test, tokenizer),
        }
        prefixes = prefix_losses(store, folder / "exported", test, tokenizer)
    figures["gap_share"] = gap_share(figures, figures["served_loss"])
    figures |= {"slice_passes": passes, "full_lora_epochs": epochs, "s3t_seconds": after_s3t - started}
    figures |= {"full_lora_seconds": after_full - after_s3t, "prefix_loss": prefixes}
    return figures


def gap_share(figures: dict[str, Any], loss: float) -> float:
    """The part of the way from the base model's loss to full LoRA's that `loss` has gone."""
    return (figures["base_loss"] - loss) / (figures["base_loss"] - figures["full_lora_loss"])


def summary(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Medians and deviations over the seeds, and what each seed gave."""
    figures: dict[str, Any] = {}
    for name in next(iter(runs.values())):
        values = [one[name] for one in runs.values()]
        if not isinstance(values[0], dict):
            figures[name] = statistics.median(values)
            if len(values) > 1:
                figures[f"{name}_std"] = statistics.stdev(values)
    return figures | {"by_seed": {str(seed): one for seed, one in runs.items()}}


def record(settings: Settings, figures: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    libraries = ("hf_s3t", "torch", "transformers", "peft", "accelerate", "datasets")
    return {
        "name": "alpaca",
        "commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "settings": asdict(settings),
        "figures": figures,
    }


def print_table(runs: dict[int, dict[str, Any]]) -> None:
    """One line per seed, then the held-out loss by depth of the prefix."""
    titles = f"{'base':>7} {'full LoRA':>10} {'served':>7} {'gap share':>10} {'slice passes':>13} {'root adapter':>13}"
    print(f"{'seed':>4} {titles}")
    for seed, one in runs.items():
        print(
            f"{seed:>4} {one['base_loss']:>7.3f} {one['full_lora_loss']:>10.3f} {one['served_loss']:>7.3f} "
            f"{one['gap_share']:>10.1%} {one['slice_passes']:>13g} {one['root_adapter_loss']:>13.3f}"
        )
    print("\nmean held-out loss of single prefixes, by depth")
    for seed, one in runs.items():
        by_depth: dict[int, list[float]] = {}
        for name, loss in one["prefix_loss"].items():
            by_depth.setdefault(name.count("-"), []).append(loss)
        print(f"{seed:>4} " + " ".join(f"{statistics.mean(losses):.3f}" for _, losses in sorted(by_depth.items())))


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings, seeds = (QUICK, options.seed[:1]) if options.quick else (Settings(), options.seed)
    if options.shards:
        settings = replace(settings, num_shards=options.shards)
    runs = {seed: run(settings, seed) for seed in seeds}
    print_table(runs)
    if options.json:
        options.json.write_text(json.dumps(record(settings, summary(runs)), indent=1) + "\n")


if __name__ == "__main__":
    main()
