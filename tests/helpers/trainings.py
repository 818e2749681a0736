"""Real trainings small enough to be repeated: a model of each shape, its rows, and what is compared bit by bit."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model_state_dict
from transformers import TrainerCallback, TrainingArguments, default_data_collator

import models
from hf_s3t import S3TConfig, S3TStore, S3TTrainer, Stage
from hf_s3t.store.partition import assign, keyed_digest

KEY = "5ca1ab1e0ddba11c0ffee00ddeadbeef"
KINDS = ("layer_group", "rank_group", "all")
JOINED_RANKS = {"bert": 2e-6, "vit": 2e-6, "llama": 2e-5}
"""How far logits of fp32 may be apart where ranks are joined; everything else is bit for bit. Twelve layers take
either some 5e-6 away from what fp64 gives, in which they agree: see `test_rank_groups.py`."""
SLICES = 3
VICTIM_SLICE = 1
"""The deleted example lies here: of the stages 0, 0-1, 0-1-2, 1, 1-2, 2, 2-0 a deletion leaves 0, 2 and 2-0."""
WEIGHTS = "adapter_model.safetensors"
TRAINER_OPTIONS = (
    "missing", "extend", "accept_recipe", "base_model_id", "data_collator", "eval_dataset",
    "activation_cache", "activation_cache_gb", "eval_trunk",
)  # fmt: skip



@dataclass(frozen=True)
class Case:
    """A model, its rows, and what S3T has to know of them."""

    name: str
    make_model: Callable[[], Any]
    rows: Callable[..., Dataset]
    config: dict[str, Any]
    layer_path: str
    layers: int
    heads: tuple[str, ...] = ()
    collate: Callable[[Any], Any] = default_data_collator


CASES = {
    "llama": Case(
        "llama", partial(models.tiny_llama, num_hidden_layers=6), models.llama_rows,
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]},
        "model.layers", 6,
    ),
    "bert": Case(
        "bert", models.tiny_bert, models.bert_rows,
        {"task_type": "SEQ_CLS", "target_modules": ["query", "intermediate.dense"]},
        "bert.encoder.layer", 4, ("classifier",),
    ),
    "vit": Case(
        "vit", models.tiny_vit, models.vit_rows,
        {"target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]},
        "vit.layers", 4, ("classifier",),
    ),
}  # fmt: skip

SHORT = [*((case, "layer_group") for case in CASES), ("bert", "rank_group"), ("llama", "all")]
WORLDS = [
    pytest.param((case, kind), id=f"{case}-{kind}", marks=[pytest.mark.slow] if (case, kind) not in SHORT else [])
    for case in CASES
    for kind in KINDS
]
"""Every case with every kind of stage parameters; what a stage of all layers or ranks is, one tells soon enough."""


def rows_of(case: Case, n: int = 24) -> Dataset:
    """Rows with 128-bit random ids and a text about somebody, which no model sees."""
    rows = case.rows(n)
    notes = [f"Zoë Ångström-{random.Random(f'note {i}').getrandbits(64):x} wrote this" for i in range(n)]
    return rows.add_column("note", notes)


def make_trainer(
    folder: Path, case: Case, kind: str = "layer_group", rows: Dataset | None = None, **options: Any
) -> Any:
    """A trainer with LoRA dropout and with running checkpoints, whose stages take 2 to 6 steps.

    Args:
        options: `callbacks`, options of the trainer, `args` (a dict for the TrainingArguments), fields of the config.
    """
    own = {name: options.pop(name) for name in TRAINER_OPTIONS if name in options}
    callbacks, args = options.pop("callbacks", None), options.pop("args", {})
    settings = {
        "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [],
        "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True, "logging_steps": 1000, "use_cpu": True,
    }  # fmt: skip
    config = {"num_slices": SLICES, "r": 2, "lora_dropout": 0.1, "stage_parameters": kind} | case.config
    return S3TTrainer(
        options.pop("model", None) or case.make_model(),
        TrainingArguments(str(folder), **settings | args),
        train_dataset=rows_of(case) if rows is None else rows,
        peft_config=S3TConfig(**config | options),
        partition_key=KEY,
        callbacks=callbacks,
        **{"data_collator": case.collate} | own,
    )


def place(example_id: str, shards: int = 1, slices: int = SLICES) -> tuple[int, int]:
    """Where an example lies, by the key alone."""
    key = bytes.fromhex(KEY)
    return assign(key, keyed_digest(key, "id", example_id), shards, slices)


def without(rows: Dataset, gone: set[str]) -> Dataset:
    """The rows less some, by id; like a user's own filter, it keeps no trace in a cache file."""
    return rows.select([position for position, name in enumerate(rows["id"]) if name not in gone])


def published(path: Path) -> dict[str, str]:
    """sha256 of every file of the store that holds weights or a config, but the running checkpoints."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.name in ("adapter_model.safetensors", "adapter_config.json") and ".s3t" not in file.parts
    }


def assert_same_stores(found: Path, expected: Path) -> None:
    """Promise 4: every `*.safetensors`, every `adapter_config.json` and the manifest's stages are the same bytes."""
    assert published(found) == published(expected)
    ours, theirs = (S3TStore(path).manifest() for path in (found, expected))
    assert (ours.stages, ours.root, ours.plan) == (theirs.stages, theirs.root, theirs.plan)
    assert stage_files(found) == stage_files(expected)


def stage_files(path: Path) -> set[str]:
    """Names of all files in stage folders, whatever they are."""
    return {str(file.relative_to(path)) for file in path.glob("shard-*/**/*")}


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and tensor_bytes(found[name]) == tensor_bytes(expected[name])
        for name in expected
    )


def probe(case: Case, answers: bool = False) -> dict[str, torch.Tensor]:
    """A batch that no stage trains on; with `answers`, or where the model's input follows from them, with labels."""
    held_out = case.rows(28).select(range(24, 28)).remove_columns(["id", "person"])
    batch = case.collate([held_out[position] for position in range(4)])
    kept = answers or "decoder" in case.layer_path
    return {
        name: value
        for name, value in batch.items()
        if kept or name not in ("labels", "start_positions", "end_positions")
    }


@torch.no_grad()
def outputs_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whatever logits a model gives of a batch, without dropout, by their names; the model is left as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    output = model(**batch)
    for module in training:
        module.training = True
    return {name: value.clone() for name, value in output.items() if name.endswith("logits")}


def logits_of(model: torch.nn.Module, case: Case) -> torch.Tensor:
    """Logits of the probe; where an answer has two ends, `(ends, batch, positions)`."""
    found = list(outputs_of(model, probe(case)).values())
    return found[0] if len(found) == 1 else torch.stack(found)


@dataclass
class StageRecord:
    """The whole model around one stage: sha256 of every tensor before and after, and what it answered at the end."""

    before: dict[str, str]
    optimized: set[str]
    after: dict[str, str] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class Recorder(TrainerCallback):
    """Records the model at both ends of every stage, and the assembled adapter once the stage is in the store."""

    def __init__(self, case: Case, folder: Path):
        self.case, self.store, self.stages = case, S3TStore(folder), {}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, stage=None, **kwargs):
        self.assemble_new()
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in held}
        frozen = [module for name, module in model.named_modules() if name.endswith(".lora_dropout.prefix")]
        assert not any(isinstance(module, torch.nn.Dropout) for module in frozen), "the prefix runs with dropout"
        assert len(names) == len(held), "the optimizer holds a tensor that is not the model's"
        self.stages[stage] = StageRecord(_digests(model), names)

    def on_train_end(self, args, state, control, model=None, stage=None, **kwargs):
        record = self.stages[stage]
        record.after, record.logits = _digests(model), logits_of(model, self.case)
        for name in model.active_adapters:
            tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            for key, value in tensors.items():
                stacked = ".lora_" in key and key in record.tensors  # rank groups: those of the parents come first
                parts = [value, record.tensors[key]] if stacked else [value]
                record.tensors[key] = torch.cat(parts, dim=0 if ".lora_A." in key else -1).detach().clone()

    def assemble_new(self) -> None:
        manifest = self.store.manifest()
        for stage in manifest.stages:
            if not self.stages[stage].files:
                self.stages[stage].files = assembled_files(self.store, stage)


def assembled_files(store: S3TStore, stage: Stage) -> dict[str, bytes]:
    """The adapter of a prefix as the bytes of its two files."""
    return store.assemble(stage.shard, stage.prefix).files({"prefix": stage.name})


def _digests(model: torch.nn.Module) -> dict[str, str]:
    """Of every tensor of the model, also those that a quantised layer keeps beside its parameters."""
    return {
        name: hashlib.sha256(tensor_bytes(value)).hexdigest()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


@dataclass
class World:
    """One model and one kind of stage: a trained store, and others to compare with, each trained when first asked."""

    case: Case
    kind: str
    folder: Path

    @cached_property
    def rows(self) -> Dataset:
        return rows_of(self.case)

    @cached_property
    def victim(self) -> str:
        """Id of an example of slice 1."""
        return next(name for name in self.rows["id"] if place(name) == (0, VICTIM_SLICE))

    @cached_property
    def slice_ids(self) -> set[str]:
        """Ids of every example of the victim's slice."""
        return {name for name in self.rows["id"] if place(name) == (0, VICTIM_SLICE)}

    def trainer(self, path: Path, rows: Dataset | None = None, **options: Any) -> Any:
        return make_trainer(path, self.case, self.kind, self.rows if rows is None else rows, **options)

    @cached_property
    def recorder(self) -> Recorder:
        """Of the training that made `trained`."""
        path = self.folder / "trained"
        recorder = Recorder(self.case, path)
        self.trainer(path, callbacks=[recorder]).train()
        recorder.assemble_new()
        return recorder

    @property
    def trained(self) -> Path:
        """Trained on all rows."""
        return self.recorder.store.path

    @cached_property
    def never_had(self) -> Path:
        """Trained from scratch on all rows but the victim."""
        return self._train("never_had", without(self.rows, {self.victim}))

    @cached_property
    def never_had_slice(self) -> Path:
        """Trained on the rows of the other slices, by the two sequences that are left after a deletion."""
        return self._train("slice", without(self.rows, self.slice_ids), sequence_selection=[[2, 0], [0]])

    def _train(self, name: str, rows: Dataset, **options: Any) -> Path:
        self.trainer(self.folder / name, rows, **options).train()
        return self.folder / name

    def assert_stages(self, found: Path, expected: Path, *names: str) -> None:
        """Some stages of two stores are the same files, byte for byte."""
        ours, theirs = published(found), published(expected)
        files = {f"shard-00/{name}/{file}" for name in names for file in ("adapter_config.json", WEIGHTS)}
        assert {name: ours.get(name) for name in files} == {name: theirs[name] for name in files}

    def copy(self, tmp_path: Path, name: str = "out") -> S3TStore:
        """A copy of `trained`, to delete from."""
        return S3TStore(shutil.copytree(self.trained, tmp_path / name))


def bring_published_files(source: S3TStore, target: S3TStore) -> None:
    """What a pull from a shared repository does: the published files alone."""
    for path in [*target.path.glob("shard-*"), *(path for path in target.path.iterdir() if path.is_file())]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in source.path.iterdir():
        if path.name != ".s3t":
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(path, target.path / path.name)
