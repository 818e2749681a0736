"""The recipes run on tiny models and data of their own: every method trains, deletes and repairs."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_s3t import S3TEnsemble, S3TStore
from hf_s3t.errors import DatasetError
from hf_s3t.store.partition import raw_rows, row_digest
from hf_s3t.training.checkpoints import collates_the_same
from recipe_runs import (
    BASE,
    SMALL,
    TWO_SLICES,
    alpaca,
    common,
    glue,
    save_roberta,
    save_vit,
    vision,
    write_glue,
    write_images,
    write_instructions,
)
from trainings import assert_same_stores

METHODS = ("s3t", "sisa", "full")
TIMES = ["before deletion", "after deletion", "after repair"]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_roberta(tmp_path_factory.mktemp("roberta"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


def flags(folder: Path, data: Path, base: Path, method: str, delete: str | None = None) -> list[str]:
    """What every run of a recipe is told."""
    told = ["--method", method, "--data_dir", data, "--model_name_or_path", base, "--output_dir", folder / "out"]
    if delete is not None:
        (folder / "ids.txt").write_text(f"{delete}\n")
        told += ["--delete_ids", folder / "ids.txt"]
    return [*map(str, told), *SMALL, *([] if method == "full" else TWO_SLICES)]


def check_store(folder: Path, method: str, printed: str) -> None:
    """A store that was trained by a method, lost an example, and was repaired."""
    store = S3TStore(folder / "out")
    status, manifest = store.status(), store.manifest()
    assert (status.missing, status.deleted_examples, manifest.generation) == ((), 1, 1)
    assert manifest.recipe["config"]["stage_parameters"] == ("layer_group" if method == "s3t" else "all")
    slices = 1 if method == "full" else 2
    lengths = [int(found) for found in served_lengths(printed)]
    # Of two orders one meets the slice late; one order, and one slice, may leave nothing.
    allowed = {"s3t": {1}, "sisa": {0, 1}, "full": {0}}[method]
    assert lengths[::2] == [slices, slices] and lengths[1] in allowed
    assert len(manifest.stages) == {"s3t": 3, "sisa": 2, "full": 1}[method]


def served_lengths(printed: str) -> list[str]:
    line = next(line for line in printed.splitlines() if "length of the served prefixes" in line)
    return [cell.split(" of ")[0].strip() for cell in line.strip("│ ").split("│")[1:]]


# The tasks are chosen so that each kind of them is there: two texts, a regression, several choices.
@pytest.mark.brief("rte-s3t")
@pytest.mark.parametrize(("task", "method"), [("rte", "s3t"), ("stsb", "sisa"), ("copa", "full")])
def test_glue_trains_deletes_and_repairs(task, method, roberta, tmp_path, capsys):
    data = write_glue(tmp_path / "data", task)
    columns = glue.main(["--task", task, *flags(tmp_path, data, roberta, method, "3")])
    check_store(tmp_path, method, capsys.readouterr().out)
    names = {"loss", "pearson", "spearmanr"} if task == "stsb" else {"loss", "accuracy"}
    assert list(columns) == TIMES and all(set(figures) == names for figures in columns.values())
    assert len({figures["loss"] for figures in columns.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", glue.TASKS)
def test_every_task_trains_deletes_and_repairs_by_every_method(task, method, roberta, tmp_path, capsys):
    data = write_glue(tmp_path / "data", task)
    name = "3"
    if task == "multirc":  # its rows have no number, only a place
        name = row_digest(json.loads((data / "train.jsonl").read_text().splitlines()[3]))
    columns = glue.main(["--task", task, *flags(tmp_path, data, roberta, method, name)])
    check_store(tmp_path, method, capsys.readouterr().out)
    if task == "mnli":
        assert {"accuracy (matched)", "accuracy (mismatched)"} <= set(columns["after repair"])


@pytest.mark.parametrize(
    ("dataset", "method"),
    [
        pytest.param(dataset, method, marks=() if method == "s3t" else pytest.mark.slow)
        for dataset, method in zip(vision.DATASETS, METHODS, strict=True)
    ],
)
def test_vision_trains_deletes_and_repairs(dataset, method, vit, tmp_path, capsys):
    data = write_images(tmp_path / "data", dataset)
    columns = vision.main(["--dataset", dataset, *flags(tmp_path, data, vit, method, "train-3")])
    check_store(tmp_path, method, capsys.readouterr().out)
    assert list(columns) == TIMES and all(set(figures) == {"loss", "accuracy"} for figures in columns.values())
    assert len({figures["loss"] for figures in columns.values()}) == 3
    assert "classifier" in S3TStore(tmp_path / "out").manifest().recipe["config"]["modules_to_save"]


@pytest.mark.brief("s3t")
@pytest.mark.parametrize("method", METHODS)
def test_instruction_tuning_trains_deletes_and_repairs(method, tmp_path, capsys):
    data = write_instructions(tmp_path / "data", 16)
    name = json.loads((data / "train.jsonl").read_text().splitlines()[0])["id"]
    columns = alpaca.main([*flags(tmp_path, data, BASE, method, name), "--max_length", "64"])
    check_store(tmp_path, method, capsys.readouterr().out)
    assert [list(figures) for figures in columns.values()] == [["loss"]] * 3


def test_the_recipe_says_what_became_of_every_id(vit, tmp_path, capsys):
    told = ["--dataset", "cifar10", *flags(tmp_path, write_images(tmp_path / "data", "cifar10", 9), vit, "full", "?")]
    columns = vision.main(told)
    assert columns["before deletion"] == columns["after repair"]
    assert ": 1 of 1 ids are not known" in capsys.readouterr().out
    assert S3TStore(tmp_path / "out").status().generation == 0
    (tmp_path / "ids.txt").write_text("train-3\n?\n")
    vision.main(told)
    assert re.search(r"1 examples not served since .*; repaired; 1 of 2 ids are not known", capsys.readouterr().out)
    vision.main(told)
    assert ": 1 of 2 ids were deleted before; 1 of 2 ids are not known" in capsys.readouterr().out
    assert S3TStore(tmp_path / "out").status().generation == 1


@pytest.mark.parametrize(("text", "message"), [(None, "cannot be read"), ("\n \n", "has no id")])
def test_without_ids_to_delete_nothing_is_trained(text, message, vit, tmp_path):
    told = flags(tmp_path, write_images(tmp_path / "data", "cifar10", 9), vit, "full", "train-3")
    (tmp_path / "ids.txt").unlink()
    if text is not None:
        (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(ValueError, match=f"--delete_ids .*ids.txt {message}"):
        vision.main(["--dataset", "cifar10", *told])
    assert not (tmp_path / "out/s3t.json").exists()


@pytest.mark.slow
def test_rows_that_are_gone_are_deleted_where_the_recipe_is_told(roberta, tmp_path, capsys):
    data = write_glue(tmp_path / "data", "rte")
    told = ["--task", "rte", *flags(tmp_path, data, roberta, "full")]
    glue.main(told)
    rows = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(rows[1:]))
    with pytest.raises(DatasetError, match="1 examples that were trained on are gone"):
        glue.main(told)
    glue.main([*told, "--missing", "delete"])
    status = S3TStore(tmp_path / "out").status()
    assert (status.deleted_examples, status.missing) == (1, ())


def test_images_are_found_in_files_that_do_not_say_so(vit, tmp_path):
    data = write_images(tmp_path / "data", "cifar10", 9)
    arguments = vision.VisionArguments(dataset="cifar10", data_dir=str(data))
    digests = [row_digest(row) for row in raw_rows(vision.read_rows(arguments)[0])]
    for file in data.glob("*.parquet"):
        parquet.write_table(parquet.read_table(file).replace_schema_metadata(None), file)
    rows, validation = vision.read_rows(arguments)
    assert rows[0]["img"].size == validation[0]["img"].size == (16, 16)
    assert [row_digest(row) for row in raw_rows(rows)] == digests


# ---- what is measured ----


def test_the_metrics_are_the_served_models_also_of_several_shards(roberta, tmp_path):
    """Multiple choice, of which the ensemble answers several sequences a row."""
    data = write_glue(tmp_path / "data", "copa")
    told = [*flags(tmp_path, data, roberta, "s3t"), "--num_shards", "2", "--per_device_eval_batch_size", "9"]
    figures = glue.main(["--task", "copa", *told])["before deletion"]
    arguments, _ = common.read_arguments(glue.GlueArguments, glue.choose_preset, ["--task", "copa", *told])
    rows = list(glue.read_rows(arguments)[1]["validation"])
    model = S3TEnsemble.from_pretrained(tmp_path / "out", glue.load_model("copa", str(roberta)))
    assert model.members == ["shard-00", "shard-01"]
    collator = glue.TextCollator(glue.AutoTokenizer.from_pretrained(roberta), "copa", 256)
    batch = collator(rows)
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    assert figures["accuracy"] == pytest.approx((logits.argmax(-1) == batch["labels"]).float().mean().item())
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch["labels"]).item(), 1e-5)


# ---- images that are moved at random ----


class Killed(Exception):
    """A run ends in the middle of a stage."""


class KillAt(TrainerCallback):
    """Ends a run after so many steps of a stage of two slices."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, stage=None, **kwargs):
        if stage.depth == 2 and state.global_step == self.step:
            raise Killed


def make_vision_trainer(folder: Path, data: Path, vit: Path, *argv: str, gone: Sequence[str] = ()):
    """A trainer of two epochs a stage, with a checkpoint after every second step."""
    told = ["--dataset", "cifar10", *flags(folder, data, vit, "s3t"), "--budget", "1"]
    told += ["--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "2", *argv]
    arguments, args = common.read_arguments(vision.VisionArguments, vision.choose_preset, told)
    rows, validation = vision.read_rows(arguments)
    kept = [position for position, name in enumerate(rows["id"]) if name not in gone]
    return vision.make_trainer(arguments, args, rows.select(kept), validation)


@pytest.mark.slow
def test_moved_images_resume_and_repair_to_the_same_bytes(vit, tmp_path):
    data = write_images(tmp_path / "data", "cifar10")
    for name in ("whole", "killed", "scratch"):
        (tmp_path / name).mkdir()
    whole = make_vision_trainer(tmp_path / "whole", data, vit)
    whole.train()
    killed = make_vision_trainer(tmp_path / "killed", data, vit)
    killed.add_callback(KillAt(5))  # 3 steps an epoch: in the middle of the second one
    with pytest.raises(Killed):
        killed.train()
    assert list((tmp_path / "killed/out/.s3t/running").glob("*/checkpoint-4"))
    resumed = make_vision_trainer(tmp_path / "killed", data, vit)
    steps = SimpleNamespace(seen=[])
    resumed.add_callback(type("Note", (TrainerCallback,), {"on_step_end": lambda *a, **k: steps.seen.append(a[2])})())
    resumed.train()
    assert len(steps.seen) == 2  # of 6
    assert_same_stores(tmp_path / "killed" / "out", tmp_path / "whole" / "out")

    whole.delete(ids=["train-3"])
    whole.train()
    make_vision_trainer(tmp_path / "scratch", data, vit, gone=["train-3"]).train()
    assert_same_stores(tmp_path / "whole" / "out", tmp_path / "scratch" / "out")


@pytest.fixture
def collator(vit):
    processor = vision.AutoImageProcessor.from_pretrained(vit, backend="pil")
    return vision.ImageCollator(processor, "img", "label", 3, vision.EpochClock())


@pytest.fixture
def images():
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3)).astype(np.uint8)
    return [{"img": Image.fromarray(one), "label": number} for number, one in enumerate(pixels)]


def begin_epoch(collator, epoch):
    collator.clock.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)


def test_how_an_image_is_moved_follows_from_its_content_the_seed_and_the_epoch(collator, images):
    first = collator(images)["pixel_values"]
    assert collates_the_same(images, collator, 4)
    torch.testing.assert_close(collator(images[::-1])["pixel_values"].flip(0), first, rtol=0, atol=0)
    begin_epoch(collator, 1.0)
    second = collator(images)["pixel_values"]
    assert (first != second).flatten(1).any(1).sum() > 8
    begin_epoch(collator, 1.5)  # a run that was resumed there
    assert torch.equal(collator(images)["pixel_values"], second)
    collator.seed = 4
    assert not torch.equal(collator(images)["pixel_values"], second)
    still = [{**row, vision.HELD_OUT: True} for row in images]
    plain = collator.processor([row["img"] for row in images], return_tensors="pt")["pixel_values"]
    assert torch.equal(collator(still)["pixel_values"], plain)
    collator.seed = None
    assert torch.equal(collator(images)["pixel_values"], plain)


def test_an_image_is_moved_by_an_eighth_at_most_and_mirrored():
    image = Image.new("RGB", (16, 16), "white")
    seen = [np.asarray(vision.shifted_and_mirrored(image, random.Random(number)))[..., 0] for number in range(64)]
    assert all(one.shape == (16, 16) for one in seen)
    white = [(int((one > 0).any(0).sum()), int((one > 0).any(1).sum())) for one in seen]
    assert {min(pair) for pair in white} <= {14, 15, 16} and len(set(white)) > 4
    rising = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8), (16, 1))).convert("RGB")
    rows = [np.asarray(vision.shifted_and_mirrored(rising, random.Random(number)))[8, :, 0] for number in range(9)]
    assert {int(row[9]) - int(row[6]) for row in rows} == {3, -3}


def test_the_epoch_reaches_workers_that_outlive_it(collator, images):
    loader = DataLoader(images, batch_size=12, collate_fn=collator, num_workers=1, persistent_workers=True)
    for epoch in range(2):
        begin_epoch(collator, float(epoch))
        (batch,) = loader
        assert torch.equal(batch["pixel_values"], collator(images)["pixel_values"])


# ---- lm-evaluation-harness ----

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GROUP = "group: places\ntask: [rivers]\naggregate_metric_list: [{metric: acc}]\n"
without_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness (the extra `eval`) is not installed"
)


@without_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize("shards", ["1", "2"])
def test_the_harness_asks_the_served_model(shards, tmp_path):
    (tmp_path / "tasks").mkdir()
    rows = [{"question": f"Is town {number} large?", "answer": number % 2} for number in range(4)]
    (tmp_path / "towns.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("towns", "rivers"):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, file=tmp_path / "towns.jsonl"))
    (tmp_path / "tasks" / "places.yaml").write_text(GROUP)
    data = write_instructions(tmp_path / "data", 12)
    name = json.loads((data / "train.jsonl").read_text().splitlines()[0])["id"]
    told = [*flags(tmp_path, data, BASE, "s3t", name), "--num_shards", shards, "--max_length", "64"]
    told += ["--lm_eval", "--lm_eval_tasks", "towns", "places", "--lm_eval_include_path", str(tmp_path / "tasks")]
    columns = alpaca.main(told)
    assert list(columns) == TIMES
    assert all(list(figures) == ["loss", "towns acc", "places acc"] for figures in columns.values())
    assert all(figures["towns acc"] in (0, 0.25, 0.5, 0.75, 1) for figures in columns.values())


@without_lm_eval
@pytest.mark.slow
def test_the_harness_knows_the_papers_tasks():
    assert len(alpaca.ZERO_SHOT) == 8 and set(alpaca.ZERO_SHOT) <= set(alpaca.task_manager(None).all_tasks)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_nothing_is_trained(tmp_path):
    told = flags(tmp_path, write_instructions(tmp_path / "data"), BASE, "s3t")
    with pytest.raises(ImportError, match=r"pip install 'hf-s3t\[eval\]'"):
        alpaca.main([*told, "--lm_eval"])
    assert not (tmp_path / "out").exists()


# ---- real data, where it is ----


def with_digest(data: Path, **options) -> str:
    """The id of the first train row, which has none of its own."""
    rows = load_dataset("parquet", data_files=str(data / "train.parquet"), split="train")
    return row_digest(rows.with_format("arrow")[:1].to_pylist()[0])


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sst2", "rte"])
def test_glue_reads_real_data(task, roberta, tmp_path, shared_data, capsys):
    if not (shared_data / task).is_dir():
        pytest.skip(f"{task} is not in the shared data folder")
    name = "0" if task == "rte" else with_digest(shared_data / task)
    told = flags(tmp_path, shared_data / task, roberta, "s3t", name)
    columns = glue.main(["--task", task, *told, "--max_examples", "64", "--max_eval_examples", "32"])
    check_store(tmp_path, "s3t", capsys.readouterr().out)
    assert all(0 <= figures["accuracy"] <= 1 for figures in columns.values())


@pytest.mark.slow
def test_vision_reads_real_data_and_learns(vit, tmp_path, shared_data, capsys):
    if not (shared_data / "cifar10_12k").is_dir():
        pytest.skip("CIFAR-10 is not in the shared data folder")
    data = shared_data / "cifar10_12k"
    told = flags(tmp_path, data, vit, "s3t", with_digest(data))
    more = ["--max_examples", "1500", "--max_eval_examples", "500", "--num_train_epochs", "3"]
    columns = vision.main(["--dataset", "cifar10", *told, *more])
    check_store(tmp_path, "s3t", capsys.readouterr().out)
    assert columns["after repair"]["accuracy"] > 0.14  # one in ten by chance; three standard deviations above


@pytest.mark.slow
def test_instruction_tuning_reads_real_data(tmp_path, shared_data, capsys):
    if not (shared_data / "alpaca_9k").is_dir():
        pytest.skip("Alpaca is not in the shared data folder")
    data = shared_data / "alpaca_9k"
    told = flags(tmp_path, data, shared_data / "llama_stories260k", "s3t", with_digest(data))
    more = ["--max_examples", "200", "--max_eval_examples", "50", "--max_length", "128"]
    columns = alpaca.main([*told, *more])
    check_store(tmp_path, "s3t", capsys.readouterr().out)
    losses = [columns[time]["loss"] for time in TIMES]
    assert max(losses[0], losses[2]) < losses[1]  # what answers after the deletion has learnt less
