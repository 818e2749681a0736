"""Trainings that Ray's workers can build, and what a worker's callback notes and does there.

`python ray_trainings.py ADDRESS STORE NOTES` is a driver in a process of its own. With `launch` for an address it
trains as one of several processes, without Ray. `ACTIONS` and `OPTIONS` in the environment are JSON.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import models
from hf_s3t import S3TConfig, S3TTrainer

SHARDS, SLICES = 2, 4
SECONDS = 240.0
CPU = {"CPU": 1}
THREE_STAGES = {"num_shards": 1, "num_slices": 2, "budget": 2}
ON_A_WORKER = "HF_S3T_TESTS_WORKER"
"""Is in the environment of workers, and not of drivers."""
PR_SET_PTRACER, ANYBODY = 0x59616D61, -1


class Notes(TrainerCallback):
    """Notes every beginning and every step of a stage, as lines `EVENT STAGE STEP PID`, and acts at a first step.

    Args:
        folder (`Path`): of the notes; also of the files by which a test and a worker speak to each other.
        actions (`dict[str, str]`): name of a stage -> `"kill"`, `"wait"`, `"raise"`, once; or `"always kill"`.
    """

    def __init__(self, folder: Path, actions: dict[str, str]):
        self.folder, self.actions = folder, actions

    def _note(self, event: str, stage: Any, step: int) -> None:
        with open(self.folder / "notes", "a") as file:
            file.write(f"{event} {stage.name} {step} {os.getpid()}\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, stage: Any = None, **kwargs: Any) -> None:
        self._note("begin", stage, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, stage: Any = None, **kwargs: Any) -> None:
        self._note("step", stage, state.global_step)
        action = self.actions.get(stage.name)
        if action is None or state.global_step != 1 or not (action == "always kill" or self._is_first(stage)):
            return
        if "kill" in action:
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "raise":
            raise LookupError("this callback fails")
        ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)  # the test may look into this process
        (self.folder / "reached.part").write_text(json.dumps({"pid": os.getpid(), "folder": args.output_dir}))
        (self.folder / "reached.part").rename(self.folder / "reached")
        wait_for(self.folder / "go")

    def _is_first(self, stage: Any) -> bool:
        try:
            (self.folder / f"acted-{stage.name.replace('/', '_')}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def wait_for(path: Path) -> None:
    """Waits until a file is there."""
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.05)


def rows(gone: tuple[str, ...] = ()) -> Any:
    """72 rows, less some by their ids."""
    every = models.llama_rows(72)
    return every.select([position for position, name in enumerate(every["id"]) if name not in gone])


def build(
    store: Path, notes: Path, actions: dict[str, str], gone: tuple[str, ...] = (), on_workers: str = "", **options: Any
) -> S3TTrainer:
    """A trainer of 20 stages, which take 2 to 10 steps.

    Args:
        gone (`tuple[str, ...]`): ids of rows that are left out.
        on_workers (`str`): what workers do otherwise: `"fewer rows"`, `"other rows"`, `"prepared"`, `"learning rate"`.
        options: for the trainer; `args` for its arguments, `config` for its config.
    """
    other = on_workers if ON_A_WORKER in os.environ else ""
    settings = {
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "report_to": [], "save_strategy": "no",
        "learning_rate": 2e-2 if other == "learning rate" else 1e-2, "disable_tqdm": True, "logging_steps": 1000,
        "use_cpu": True,
    }  # fmt: skip
    data = rows(gone)
    if other == "fewer rows":
        data = data.select(range(len(data) - 1))
    if other == "other rows":
        data = data.map(lambda row, at: {"person": "somebody"} if at == 7 else row, with_indices=True)
    config = S3TConfig(
        **{"num_shards": SHARDS, "num_slices": SLICES, "budget": 4, "r": 2, "lora_dropout": 0.1}
        | {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | options.pop("config", {})
    )  # fmt: skip
    trainer = S3TTrainer(
        models.tiny_llama(),
        TrainingArguments(str(store), **settings | options.pop("args", {})),
        train_dataset=data,
        peft_config=config,
        eval_dataset=models.llama_rows(8, seed=1),
        callbacks=[Notes(notes, actions)],
        **{"data_collator": default_data_collator} | options,
    )
    if other == "prepared":
        trainer.rows.dataset = trainer.train_dataset.map(lambda row: {"labels": row["labels"][::-1]})
    return trainer


def from_environment() -> S3TTrainer:
    """What a worker builds that is given `"ray_trainings:from_environment"`."""
    return build(Path(os.environ["STORE"]), Path(os.environ["STORE"]).parent, {})


def main(address: str, store: str, notes: str) -> None:
    """Trains as a driver that may be killed, or without Ray."""
    torch.set_num_threads(1)
    if address == "launch":
        build(Path(store), Path(notes), {}, config=THREE_STAGES, **json.loads(os.environ["OPTIONS"])).train()
        torch.distributed.destroy_process_group()
        return

    import ray

    from hf_s3t.ray import train

    ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": worker_environment()})
    actions = json.loads(os.environ["ACTIONS"])
    train(partial(build, Path(store), Path(notes), actions), workers=2, resources_per_worker=CPU)


def worker_environment() -> dict[str, str]:
    """What workers find the library and this module by."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), ON_A_WORKER: "1"}


if __name__ == "__main__":
    main(*sys.argv[1:])
