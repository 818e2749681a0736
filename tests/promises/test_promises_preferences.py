"""Preference data is personal: the promises over TRL's trainers for DPO, KTO and rewards, made S3T by `S3TMixin`."""

from __future__ import annotations

import json
import random
import re
import runpy
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_promises import (  # noqa: F401  the same tests, over the `world` of this file
    HIT,
    KEPT,
    test_a_deleted_example_that_is_handed_in_again_is_not_trained_on,
    test_a_prefix_is_what_stood_when_its_stage_had_been_trained,
    test_a_stage_changes_what_it_owns_and_nothing_else,
    test_a_stage_stores_its_own_layers_and_heads,
    test_after_delete_nothing_served_ever_saw_the_example,
    test_delete_and_train_is_training_from_scratch_without_the_example,
    test_stock_peft_gives_a_prefix_the_logits_of_that_time,
    test_the_order_of_the_rows_changes_no_bit,
)
from transformers import AutoTokenizer, LlamaForSequenceClassification, TrainerCallback

import models
from hf_s3t import RecipeError, S3TConfig, S3TMixin, S3TStore
from scanner import find, needles_of, tensor_needles
from trainings import KEY, WEIGHTS, Case, World, published

trl = pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("default:.*is deprecated and will be removed:FutureWarning")
ROOT = Path(__file__).parents[2]
BASE = ROOT / "recipes/demo/base"
PEOPLE = [json.loads(line) for line in (ROOT / "recipes/demo/people.jsonl").read_text().splitlines()]
SETTINGS = {
    "num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 64, "report_to": [],
    "save_strategy": "steps", "save_steps": 3, "logging_steps": 1000, "disable_tqdm": True, "use_cpu": True,
    "activation_checkpointing": False, "bf16": False,
}  # fmt: skip


class S3TDPOTrainer(S3TMixin, trl.DPOTrainer):
    """Better and worse completions; the reference is the base without an adapter."""


class S3TKTOTrainer(S3TMixin, trl.KTOTrainer):
    """Completions that are liked or not."""


class S3TRewardTrainer(S3TMixin, trl.RewardTrainer):
    """A score for completions."""


def preferences(columns: tuple[str, ...], n: int, seed: int = 0) -> Dataset:
    """Rows of what somebody asked and liked."""
    rows = []
    for position, row in enumerate(PEOPLE[:n]):
        draw = random.Random(f"preference {seed} {position}")
        better, worse = row["output"], " ".join(reversed(row["output"].split()))
        made = {
            "prompt": row["instruction"], "chosen": better, "rejected": worse,
            "completion": better if position % 3 else worse, "label": bool(position % 3),
        }  # fmt: skip
        who = {"id": f"{draw.getrandbits(128):032x}", "person": row["person"]}
        rows.append(who | {name: made[name] for name in columns})
    return Dataset.from_list(rows)


def tokens(rows: list[dict[str, Any]]) -> Any:
    """A batch of the texts of some rows."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [row.get("prompt", "") + " " + row.get("chosen", row.get("completion", "")) for row in rows]
    return tokenizer(texts, return_tensors="pt", padding=True)


def scored() -> Any:
    """A tiny Llama that gives a score."""
    return models._build(LlamaForSequenceClassification, causal(num_labels=1).config, 0)


causal = partial(models.tiny_llama, vocab_size=len(AutoTokenizer.from_pretrained(BASE)), num_hidden_layers=3)
TRAINERS = {
    "dpo": (S3TDPOTrainer, trl.DPOConfig, {}, causal, ("prompt", "chosen", "rejected")),
    "kto": (S3TKTOTrainer, trl.KTOConfig, {"loss_type": "apo_zero_unpaired"}, causal,
            ("prompt", "completion", "label")),
    "reward": (S3TRewardTrainer, trl.RewardConfig, {}, scored, ("chosen", "rejected")),
}  # fmt: skip


def case_of(name: str) -> Case:
    """The case of a trainer."""
    _, _, _, make_model, columns = TRAINERS[name]
    task, heads = ("SEQ_CLS", ("score",)) if name == "reward" else ("CAUSAL_LM", ())
    config = {"task_type": task, "target_modules": ["q_proj", "v_proj"]}
    return Case(name, make_model, partial(preferences, columns), config, "model.layers", 3, heads, tokens)


@dataclass
class PreferenceWorld(World):
    """A world whose trainer is one of TRL's."""

    @cached_property
    def rows(self) -> Dataset:
        return self.case.rows(24)

    def trainer(self, path: Path, rows: Dataset | None = None, **options: Any) -> Any:
        trainer, make_args, own, make_model, _ = TRAINERS[self.case.name]
        args = SETTINGS | own | options.pop("args", {})
        kept = {name: options.pop(name) for name in ("callbacks", "ref_model") if name in options}
        config = {"num_slices": 3, "r": 2, "lora_dropout": 0.1, **self.case.config, **options}
        return trainer(
            model=make_model(), args=make_args(str(path), **args), train_dataset=self.rows if rows is None else rows,
            processing_class=AutoTokenizer.from_pretrained(BASE), peft_config=S3TConfig(**config), partition_key=KEY,
            **kept,
        )  # fmt: skip


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "reward")]


@pytest.fixture(scope="module", params=["dpo", *SLOW])
def world(request, tmp_path_factory):
    return PreferenceWorld(case_of(request.param), "layer_group", tmp_path_factory.mktemp(request.param))


def test_a_reference_of_ones_own_has_to_be_the_same_at_a_repair(tmp_path):
    world = PreferenceWorld(case_of("dpo"), "layer_group", tmp_path)
    brief = {"sequence_selection": [[0]], "args": {"max_steps": 1}}
    world.trainer(tmp_path / "out", ref_model=causal(seed=1), **brief).train()
    same = world.trainer(tmp_path / "out", ref_model=causal(seed=1), **brief)
    assert same.recipe() == same.store.manifest().recipe
    for other in ({"ref_model": causal(seed=2)}, {}):
        with pytest.raises(RecipeError, match="reference: the store has '[0-9a-f]{64}', this run "):
            world.trainer(tmp_path / "out", **other, **brief).train()


def test_the_page_tells_of_every_trainer_that_is_tried():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\w+Trainer)` \|", page, re.M)
    assert told == [trainer.__bases__[1].__name__ for trainer, *_ in TRAINERS.values()]
    assert '`loss_type="apo_zero_unpaired"`' in page and TRAINERS["kto"][2] == {"loss_type": "apo_zero_unpaired"}


class Stop(TrainerCallback):
    """A crash in the middle of the second stage."""

    def on_step_end(self, args, state, control, stage=None, **kwargs):
        if stage.depth == 2 and state.global_step == state.max_steps - 1:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_training_is_one_that_was_not(world, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        world.trainer(tmp_path / "out", callbacks=[Stop()]).train()
    world.trainer(tmp_path / "out").train()
    assert published(tmp_path / "out") == published(world.trained)


@pytest.mark.brief("dpo")
def test_no_file_holds_anything_of_a_deleted_choice(world, tmp_path):
    """Neither its texts nor its tokens, nor a tensor of a stage that saw it."""
    victim = next(row for row in world.rows if row["id"] == world.victim)
    store = world.copy(tmp_path)
    files = {str(file.relative_to(store.path)): file.read_bytes() for file in store.path.rglob(WEIGHTS)}
    hit = {name: data for name, data in files.items() if name.rsplit("/", 1)[0] in HIT}
    tensors = tensor_needles(hit, b"".join(files[f"{name}/{WEIGHTS}"] for name in KEPT))
    assert len(hit) == 4 and len(tensors) > 8
    store.delete(ids=[world.victim])
    for name in ("prompt", "chosen", "rejected", "completion"):
        if name in victim:
            (ids,) = AutoTokenizer.from_pretrained(BASE)([victim[name]])["input_ids"]
            assert find(store.path, needles_of(victim | {"note": victim[name], "input_ids": ids})) == set()
    assert find(store.path, tensors) == set()


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_reference_that_is_computed_beforehand_is_refused(name, tmp_path):
    world = PreferenceWorld(case_of(name), "layer_group", tmp_path)
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True`: it computes rows of different slices"):
        world.trainer(tmp_path / "out", args={"precompute_ref_log_probs": True})
    assert not (tmp_path / "out").exists()


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    path = ROOT / "examples/dpo.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    short = path.read_text(encoding="utf-8").replace("num_train_epochs=1", "max_steps=2, use_cpu=True")
    (tmp_path / "dpo.py").write_text(short, encoding="utf-8")
    trainer = runpy.run_path("dpo.py")["trainer"]
    printed = [line for line in capsys.readouterr().out.splitlines() if "examples;" in line]
    assert re.fullmatch(r"6 examples; \{'0': \[\d, \d\]\} -> \{'0': \[\d\]\}", printed[-1])
    status = S3TStore(trainer.args.output_dir).status()
    assert (status.missing, status.deleted_examples) == ((), 6)
