"""What each of several processes does in `test_distributed.py`: `accelerate launch ranks.py FOLDER SCENARIO...`.

Every process writes what it saw to `FOLDER/SCENARIO-RANK.json`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, default_data_collator

import models
from hf_s3t import S3TError, S3TStore, S3TTrainer, Stage
from hf_s3t.lora.heads import tensor_digest
from trainers import Recorder, make_trainer

SLICES = 2
PER_SLICE = 16


def train_rows() -> Any:
    """16 rows per slice: every stage is a multiple of any batch that is used here."""
    count = SLICES * PER_SLICE
    slices = [row % SLICES for row in range(count)]
    return models.llama_rows(count).add_column("shard", [0] * count).add_column("slice", slices)


def two_process_trainer(path: Path, per_device: int = 4, **kwargs: Any) -> S3TTrainer:
    """Three stages; a checkpoint every second step."""
    args = {"per_device_train_batch_size": per_device, "save_strategy": "steps", "save_steps": 2}
    config = {"budget": None, "slice_columns": ("shard", "slice")}
    args |= kwargs.pop("args", {})
    return make_trainer(path, args=args, config=config, train_dataset=train_rows(), **kwargs)


class StageDigests(TrainerCallback):
    """Digests of what the running stage owns, at its end, on this process."""

    def __init__(self) -> None:
        self.trainer: S3TTrainer | None = None
        self.seen: dict[str, str] = {}

    def on_train_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
        tensors = self.trainer.tuner.stage_tensors()
        self.seen[stage.name] = json.dumps({name: tensor_digest(tensors[name]) for name in sorted(tensors)})


class AtStep(TrainerCallback):
    """Does something once, at a step of a stage."""

    def __init__(self, stage: str, step: int, action: Any):
        self.place, self.action = (stage, step), action

    def on_step_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
        if (stage.name, state.global_step) == self.place and self.action is not None:
            action, self.action = self.action, None
            action(args)


def train(folder: Path) -> dict[str, Any]:
    """Trains, is refused with other settings, deletes, repairs."""
    digests, steps = StageDigests(), Recorder("on_step_end")
    rows = models.llama_rows(8, seed=1)
    trainer = two_process_trainer(folder / "store", callbacks=[digests, steps], eval_dataset=rows)  # tried beforehand
    digests.trainer = trainer
    trainer.train()
    trained = dict(digests.seen)
    refusal = None
    try:
        two_process_trainer(folder / "store", args={"learning_rate": 0.5}).train()
    except S3TError as error:
        refusal = f"{type(error).__name__}: {error}"
    losses = [trainer.evaluate()["eval_loss"]]
    receipt = trainer.delete(ids=[train_rows()["id"][1]])
    losses.append(trainer.evaluate()["eval_loss"])
    trainer.train()
    return {
        "trained": trained,
        "repaired": digests.seen,
        "steps": steps.steps(),
        "refusal": refusal,
        "losses": losses,
        "receipt": receipt.receipt,
        "removed": sorted(receipt.stages_removed),
    }


def deletion_while_training(folder: Path) -> dict[str, Any]:
    """The first process's own eraser deletes through the folder alone; the trainer is not told."""
    victim = train_rows()["id"][1]

    def delete(args: Any) -> None:
        if args.process_index == 0:
            S3TStore(folder / "deleting").delete(ids=[victim])
        torch.distributed.barrier()

    steps = Recorder("on_step_end")
    trainer = two_process_trainer(folder / "deleting", callbacks=[steps, AtStep("shard-00/0-1", 2, delete)])
    trainer.train()
    return {"steps": steps.steps()}


def eight_bit(folder: Path) -> dict[str, Any]:
    """Digests of the quantised weights and their scales, before and after."""
    base = AutoModelForCausalLM.from_pretrained(
        folder / "base", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}
    )

    def quantised() -> dict[str, str]:
        found = {}
        for name, module in base.named_modules():
            if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):  # not PEFT's wrapper of that name
                plain = name.replace(".base_layer", "")
                found[plain] = tensor_digest(module.weight) + tensor_digest(module.state_dict()["SCB"])
        return found

    before = quantised()
    digests = StageDigests()
    trainer = two_process_trainer(folder / "eight_bit", model=base, callbacks=[digests])
    digests.trainer = trainer
    trainer.train()
    base = trainer.model.get_base_model()
    return {"before": before, "after": quantised(), "trained": digests.seen}


def cached(folder: Path) -> dict[str, Any]:
    """Trains with states on the disk, deletes and repairs; again with states in memory, and without a cache."""
    seen = {}
    for cache in ("disk", "memory", "off"):
        digests = StageDigests()
        options = {"callbacks": [digests], "activation_cache": cache, "args": {"num_train_epochs": 2}}
        trainer = two_process_trainer(folder / cache, **options)
        digests.trainer = trainer
        trainer.train()
        blocks = sorted(path.name for path in (folder / cache / ".s3t/activations").glob("*"))
        trainer.delete(ids=[train_rows()["id"][1]])
        trainer.train()
        seen[cache] = {"trained": digests.seen, "blocks": blocks}
    refusal = None
    try:
        two_process_trainer(folder / "refused", data_collator=shuffling, activation_cache="disk").train()
    except ValueError as error:
        refusal = str(error)
    return {**seen, "refusal": refusal}


def shuffling(rows: list[Any]) -> Any:
    """Random batches on the second process alone."""
    batch = default_data_collator(rows)
    if os.environ["RANK"] == "1":
        batch["input_ids"] = batch["input_ids"][:, torch.randperm(batch["input_ids"].shape[1])]
    return batch


def killed(folder: Path) -> dict[str, Any]:
    """Both processes are killed in the second stage, after its first checkpoint."""
    two_process_trainer(
        folder / "killed", callbacks=[AtStep("shard-00/0-1", 3, lambda args: os.kill(os.getpid(), signal.SIGKILL))]
    ).train()
    raise AssertionError("this process was to be killed")


def resumed(folder: Path) -> dict[str, Any]:
    """Goes on where `killed` was stopped."""
    steps = Recorder("on_step_end")
    two_process_trainer(folder / "killed", callbacks=[steps]).train()
    return {"steps": steps.steps()}


def lonely(folder: Path) -> dict[str, Any]:
    """Two processes that do not know of each other: nobody told them to use the CPU."""
    try:
        two_process_trainer(folder / "lonely", args={"use_cpu": False})
    except ValueError as error:
        return {"refusal": str(error)}
    return {"refusal": None}


def main(folder: Path, names: list[str]) -> None:
    """Runs scenarios one after the other."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not walked for garbage at every stage
    for name in names:
        seen = globals()[name](folder)
        if name != "lonely":
            seen["processes"] = torch.distributed.get_world_size()
        rank = int(os.environ["RANK"])
        (folder / f"{name}-{rank}.json").write_text(json.dumps(seen))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
