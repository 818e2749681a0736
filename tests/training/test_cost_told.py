"""Before it begins a training says what it costs and on how many rows: seen by default, once, on the main process."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from transformers import TrainerCallback

import models
from hf_s3t import Plan, S3TTrainer, Stage
from hf_s3t.store.partition import assign
from hf_s3t.store.slice_sizes import EVEN
from hf_s3t.training.callbacks import PlanProgressCallback
from hf_s3t.training.cost import Meter, cost_line
from trainers import make_trainer

PLAN = Plan.make(1, 4, [(0, 1, 2, 3), (2, 3)])
WHOLE = "A shard of one slice has nothing left to serve after a deletion in it, until the repair."
SHOWN = {"disable_tqdm": False}


class Halted(Exception):
    """The first stage has begun."""


class Halt(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise Halted


def begun(trainer: S3TTrainer, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What stands on standard output when the first stage begins."""
    trainer.add_callback(Halt())
    capsys.readouterr()
    with pytest.raises(Halted):
        trainer.train()
    return capsys.readouterr().out.splitlines()


def rows_per_slice(trainer: S3TTrainer, shards: int, slices: int, column: int | None = None) -> list[int]:
    """Counted from the partition alone: rows, or of groups those that lie there."""
    units = {(entry.group if column else digest): entry[:2] for digest, entry in trainer.rows.entries.items()}
    counts = Counter(units.values()) if column else Counter(entry[:2] for entry in trainer.rows.entries.values())
    return sorted(counts[shard, at] for shard in range(shards) for at in range(slices))


def spread(numbers: list[int]) -> str:
    return f"least {min(numbers)}, median {median(numbers):g}, most {max(numbers)}"


# Cost


@pytest.mark.parametrize("quiet", [False, True], ids=["bar", "no bar"])
def test_the_cost_is_seen_before_the_first_stage(tmp_path: Path, quiet: bool, capsys: Any, caplog: Any) -> None:
    config = {"num_slices": 4, "budget": 2}
    trainer = make_trainer(tmp_path, config=config, args={"num_train_epochs": 2, "disable_tqdm": quiet})
    lines = begun(trainer, capsys)
    assert lines[0].startswith("7 of 7 stages to train, 32 slice passes = 4.0 x one plain fine-tuning, ")
    assert "A stage has 2 epochs over the slices of its prefix" in lines[0] and "The bar counts" in lines[0]
    assert sum("plain fine-tuning" in line for line in lines) == 1
    assert not [record for record in caplog.records if "slice passes" in record.getMessage()]  # it is no warning


def test_where_nothing_is_to_be_trained_nothing_is_said(tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, config={"num_slices": 1})
    trainer.train()
    assert "1 of 1 stages to train" in capsys.readouterr().out
    trainer.train()
    assert "stages to train" not in capsys.readouterr().out


def test_another_process_than_the_first_is_silent(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    monkeypatch.setattr(trainer.store.train_lock, "acquire", lambda seconds: None)
    assert begun(trainer, capsys) == []


@pytest.mark.parametrize(
    ("meter", "costs", "plain", "unit"),
    [
        (Meter(), [1, 2, 3, 4, 1, 2], 4, "slice passes"),
        (Meter(epochs=2), [2, 4, 6, 8, 2, 4], 8, "slice passes"),
        (Meter(replay=0.5, epochs=3), [3, 4.5, 6, 7.5, 3, 4.5], 12, "slice passes"),
        (Meter(epochs=3, max_steps=10), [10] * 6, 10, "steps"),
    ],
)
def test_epochs_and_steps_are_counted(meter: Meter, costs: list[float], plain: float, unit: str) -> None:
    assert [meter.cost(stage) for stage in PLAN.stages] == costs
    line = cost_line(PLAN.stages, PLAN, meter, 0.25)
    told = f"6 of 6 stages to train, {sum(costs):g} {unit} = {sum(costs) / plain:.1f} x one plain fine-tuning, "
    assert line.startswith(told + "0.2 MB") and meter.meaning in line
    assert cost_line([], PLAN, meter, 0).startswith("0 of 6 stages to train, 0 ")


def test_the_bar_counts_every_epoch_and_says_what_is_left(tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, config={"num_slices": 2, "budget": 2}, args={"num_train_epochs": 3, **SHOWN})
    seen: list[float] = []

    class Look(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, stage: Stage, **kwargs: Any) -> None:
            assert isinstance(trainer.progress.training_bar.total, float | int)
            seen.append(trainer.progress.training_bar.n)

    trainer.add_callback(Look())
    trainer.train()
    passes = [stage.depth * 3 for stage in trainer.store.manifest().plan.stages]
    assert seen == [sum(passes[: place + 1]) for place in range(len(passes))]
    shown = capsys.readouterr().err
    total = sum(passes)
    assert f"{total}/{total} slice passes" in shown
    assert re.search(r"slice passes \[\d\d:\d\d, \d\d:\d\d left", shown)


def test_with_max_steps_the_bar_counts_steps(tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, args={"max_steps": 2, **SHOWN})
    trainer.train()
    assert "4/4 steps [" in capsys.readouterr().err
    assert isinstance(trainer.progress, PlanProgressCallback) and trainer.progress.meter == Meter(1.0, 1, 2)


# Rows


def test_rows_and_groups_of_each_slice_are_told(tmp_path: Path, capsys: Any) -> None:
    fields = {"num_shards": 2, "num_slices": 3, "group_column": "person"}
    trainer = make_trainer(tmp_path, config=fields, train_dataset=models.llama_rows(180))
    lines = begun(trainer, capsys)
    rows, groups = rows_per_slice(trainer, 2, 3), rows_per_slice(trainer, 2, 3, column=1)
    assert rows != [3 * number for number in range(6)] and sum(rows) == 180 and sum(groups) == 60
    assert lines[1] == f"Rows per slice: {spread(rows)}, of 6 slices. Groups (person) per slice: {spread(groups)}."
    units = {entry.group for entry in trainer.rows.entries.values()}
    cut = {size: Counter(assign(trainer.store.key, unit, *size) for unit in units) for size in ((2, 1), (1, 3))}
    assert lines[2] == (
        f"60 groups are few for 6 slices: chance makes them uneven below {EVEN} per slice. Better: num_slices=1 "
        f"({spread([*cut[2, 1].values()])}); or num_shards=1 ({spread([*cut[1, 3].values()])}). {WHOLE}"
    )


def test_empty_slices_are_named_and_what_would_fill_them(tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, config={"num_slices": 4}, train_dataset=models.llama_rows(2))
    filled = {entry.slice for entry in trainer.rows.entries.values()}
    with pytest.warns(UserWarning, match="slices are empty"):
        lines = begun(trainer, capsys)
    names = ", ".join(f"0: {at}" for at in range(4) if at not in filled)
    assert lines[1].startswith("Rows per slice: least 0, ")
    assert lines[2] == f"Empty (shard: slice): {names}. A stage that has only such slices learns nothing."
    assert lines[3].endswith("Better: num_slices=1 (least 2, median 2, most 2). " + WHOLE)


def test_enough_rows_get_no_advice_and_a_repair_none_either(tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, config={"num_slices": 2}, train_dataset=models.llama_rows(2 * EVEN))
    lines = begun(trainer, capsys)
    assert [line.split(":")[0] for line in lines[1:]] == ["Rows per slice"]
    few = make_trainer(tmp_path / "few")
    few.train()
    few.delete(slices=[(0, 1)])
    told = begun(few, capsys)
    left = sum(entry.slice == 0 for entry in few.rows.entries.values())
    assert told[1] == f"Rows per slice: least 0, median {left / 2:g}, most {left}, of 2 slices."
    assert told[2].startswith("Empty (shard: slice): 0: 1.") and len(told) == 3


def test_slices_of_the_dataset_itself_are_not_drawn_again(tmp_path: Path, capsys: Any) -> None:
    drawn = random.Random(0)
    rows = models.llama_rows(12).add_column("cut", [drawn.choice("ab") for _ in range(12)])
    rows = rows.add_column("part", [0] * 12).add_column("slot", [number % 2 for number in range(12)])
    trainer = make_trainer(tmp_path, config={"slice_columns": ("part", "slot")}, train_dataset=rows)
    lines = begun(trainer, capsys)
    assert lines[1] == "Rows per slice: least 6, median 6, most 6, of 2 slices."
    assert lines[2].endswith("The dataset's own slice columns decide.")
