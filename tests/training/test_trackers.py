"""Trackers see one run: a chart for each metric, whatever the number of stages, on one count of steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

import models
from hf_s3t import S3TTrainer
from trainers import make_trainer

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
LOGGED = {"report_to": ["tensorboard"], "max_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(autouse=True)
def folder_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def train(folder: Path, slices: int, **options: Any) -> S3TTrainer:
    rows, others = models.llama_rows(12 * slices), models.llama_rows(4, seed=1)
    config = {"num_slices": slices, "budget": min(slices, 2)}
    trainer = make_trainer(folder, config=config, args=LOGGED, train_dataset=rows, eval_dataset=others, **options)
    trainer.train()
    return trainer


def charts(folder: Path) -> Any:
    """All that tensorboard reads of a store's runs."""
    (file,) = (folder.parent / f"{folder.name}-runs").rglob("*tfevents*")
    found = event_accumulator.EventAccumulator(str(file.parent))
    found.Reload()
    return found


def texts(found: Any) -> list[tuple[int, str]]:
    """The stages that tensorboard was told of, with their steps."""
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found.Tensors("stage/text_summary")]


def test_the_number_of_charts_is_that_of_the_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trainers = {slices: train(tmp_path / str(slices), slices) for slices in (1, 3)}
    found = {slices: charts(tmp_path / str(slices)) for slices in trainers}
    tags = {slices: {kind: set(names) for kind, names in found[slices].Tags().items() if isinstance(names, list)}
            for slices in found}  # fmt: skip
    assert tags[1] == tags[3]
    assert {"train/loss", "train/learning_rate", "eval/loss", "train/shard", "train/depth"} <= tags[3]["scalars"]
    assert not [tag for tag in tags[3]["scalars"] if "shard-" in tag]
    plan = trainers[3].store.manifest().plan
    steps = [2 * place + step for place in range(len(plan.stages)) for step in (1, 2)]
    assert len(plan.stages) > 3 and [event.step for event in found[3].Scalars("train/loss")] == steps
    depths = {event.step: event.value for event in found[3].Scalars("train/depth")}
    assert [depths[2 * place + 2] for place in range(len(plan.stages))] == [stage.depth for stage in plan.stages]
    assert texts(found[3]) == [(2 * place + 1, stage.name) for place, stage in enumerate(plan.stages)]
    assert not [record for record in caplog.records if "incorrect" in record.getMessage()]


def test_a_repair_goes_on_where_the_steps_ended(tmp_path: Path) -> None:
    seen: list[int] = []

    class Steps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
            seen.append(state.global_step)

    trainer = train(tmp_path / "out", 2, callbacks=[Steps()])
    last = seen[-1]
    assert last == 2 * 3 and seen == sorted(seen)
    trainer.evaluate()
    assert seen[-1] == last and trainer.state.global_step == 2  # of the served model, after the last stage
    trainer.delete(slices=[(0, 1)])
    trainer.train()
    assert seen == sorted(seen) and seen[-1] > last


def test_charts_of_each_stage_are_there_where_they_are_asked_for(tmp_path: Path) -> None:
    train(tmp_path / "out", 2, charts_per_stage=True)
    scalars = charts(tmp_path / "out").Tags()["scalars"]
    for stage in ("shard-00/0", "shard-00/0-1", "shard-00/1"):
        assert {f"train/{stage}/loss", f"eval/{stage}/loss"} <= {*scalars}
    assert "train/loss" not in scalars


@pytest.mark.parametrize("quiet", [False, True], ids=["bar", "no bar"])
def test_what_is_printed_and_kept_names_the_stage(tmp_path: Path, quiet: bool, capsys: Any) -> None:
    class Plain(TrainerCallback):
        seen: list[dict[str, Any]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    args = {"max_steps": 1, "logging_steps": 1, "disable_tqdm": quiet}
    trainer = make_trainer(tmp_path, args=args, callbacks=[plain := Plain()])
    trainer.train()
    printed = [line for line in capsys.readouterr().out.splitlines() if "'loss'" in line]
    assert len(printed) == 2
    for line, stage in zip(printed, ("shard-00/0", "shard-00/0-1"), strict=True):
        assert f"'stage': '{stage}'" in line
    assert {entry["stage"] for entry in trainer.state.log_history} == {"shard-00/0-1"}
    assert all(isinstance(value, int | float) for logs in plain.seen for value in logs.values())
    assert not [logs for logs in plain.seen if "shard" in logs]  # the callback is told `stage`

