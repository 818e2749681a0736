"""What a worker does, without Ray: the same class, asked by the same driver's code, in one process."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from hf_s3t import DatasetError, RecipeError, S3TConfig
from hf_s3t.ray.driver import Driver
from hf_s3t.ray.scratch import PREFIX, Scratch
from hf_s3t.ray.worker import Identity, Worker
from hf_s3t.ray.worker import build as build_by_name
from hf_s3t.training.rows import TrainRows
from hf_s3t.training.rows_apart import Numbering, RowsApart
from hf_s3t.training.stage_orders import StageOrder, next_order
from killing import in_child, kill
from ray_trainings import build

KEY = "0fada7e11a5c0de5ca1ab1e0ddba1175"
SMALL = {"num_shards": 1, "num_slices": 2, "budget": 1}
TWICE = {"num_train_epochs": 2}  # so that states are worth keeping


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver's; and a place for scratch folders."""
    monkeypatch.setenv("HF_S3T_KEY", KEY)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def driver_and_worker(folder: Path, **options: Any) -> tuple[Any, Worker]:
    """A trainer with an open store, and a worker that has begun."""
    make = partial(build, folder / "store", folder, {}, config=SMALL, **options)
    trainer = make()
    trainer._open_store()
    worker = Worker(1)
    assert "HF_S3T_KEY" not in os.environ
    os.environ["HF_S3T_KEY"] = KEY  # the driver is this process, too
    worker.begin(make, trainer.store.manifest())
    return trainer, worker


def sent(trainer: Any, order: StageOrder) -> tuple[Any, ...]:
    """An order as a worker gets it."""
    numbering = Numbering(trainer.rows)
    return replace(order, examples=(), content=""), numbering.of(order.examples), numbering.numbers


@pytest.mark.parametrize("cache", ["off", "memory", "disk"])
def test_a_worker_trains_the_stage_that_the_driver_would(tmp_path, cache):
    trainer, worker = driver_and_worker(tmp_path, activation_cache=cache, args=TWICE)
    for serial in (1, 2):
        order = next_order(trainer.store, trainer.rows)
        found, expected = worker.train(serial, *sent(trainer, order)), trainer._train_stage(order, False, None)
        about = {"stage": order.stage.name}
        assert found.adapter.files(about) == expected.adapter.files(about)
        assert (found.steps, found.loss) == (expected.steps, expected.loss)
        trainer._store_stage(order, found)
    assert trainer.train().global_step == 0
    worker.end()
    assert not worker.scratch.path.exists()


def test_states_of_what_was_deleted_are_forgotten_by_the_worker(tmp_path):
    trainer, worker = driver_and_worker(tmp_path, activation_cache="disk", args=TWICE)
    order = next_order(trainer.store, trainer.rows)
    states = worker.scratch.path / ".s3t/activations"
    worker.train(1, *sent(trainer, order))
    before = {path.name for path in states.glob("*")}
    trainer.store.delete(slices=[(0, order.stage.prefix[0])])
    again = next_order(trainer.store, trainer.rows)
    assert before and again.stage == order.stage and not again.examples
    worker.train(2, *sent(trainer, again))
    assert not states.exists()


class CallOff(TrainerCallback):
    """Calls the first attempt off at its second step, as the driver would from another thread."""

    def __init__(self, worker: Worker):
        self.worker, self.checkpoints, self.steps = worker, [], []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)
        if self.steps == [1, 2]:
            self.checkpoints += self.worker.scratch.path.glob(".s3t/running/*/*")
            self.worker.call_off(1)


def test_an_attempt_that_was_called_off_is_dropped_and_no_other(tmp_path):
    trainer, worker = driver_and_worker(tmp_path, args={"save_strategy": "steps", "save_steps": 1})
    callback = CallOff(worker)
    worker.trainer.add_callback(callback)
    order = next_order(trainer.store, trainer.rows)
    assert worker.train(1, *sent(trainer, order)) is None
    assert callback.steps == [1, 2]
    assert callback.checkpoints and not any(folder.exists() for folder in callback.checkpoints)
    assert worker.train(2, *sent(trainer, order)).steps == len(callback.steps) - 2 > 2


def test_an_attempt_that_was_called_off_before_it_began_takes_no_step(tmp_path):
    trainer, worker = driver_and_worker(tmp_path)
    worker.call_off(1)
    assert worker.train(1, *sent(trainer, next_order(trainer.store, trainer.rows))) is None
    assert "step" not in (tmp_path / "notes").read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gone": ("nobody",)}, None, ""),
        ({"args": {"learning_rate": 0.5}}, RecipeError, r"arguments\.learning_rate: the driver has 0\.01, the worker"),
        ({"gone": "first"}, DatasetError, r"rows: the driver has 72, the worker 71"),
    ],
)
def test_a_worker_that_is_not_as_the_driver_is_refused(tmp_path, options, error, message):
    trainer = build(tmp_path / "store", tmp_path, {})
    trainer._open_store()
    if options.get("gone") == "first":
        options = {"gone": (trainer.rows.raw["id"][0],)}
    worker = Worker(1)
    identity = worker.begin(partial(build, tmp_path / "other", tmp_path, {}, **options), trainer.store.manifest())
    driver = Driver(trainer, "", 1, {}, 1)
    if error is None:
        driver._check(identity)
        with pytest.raises(RecipeError, match="version of torch: the driver has '.*', the worker '0.1'"):
            driver._check(replace(identity, versions={**identity.versions, "torch": "0.1"}))
        return
    with pytest.raises(error, match=message):
        driver._check(identity)


def test_a_trainer_is_built_by_the_name_of_a_function(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    assert build_by_name("ray_trainings:from_environment").store.path == tmp_path / "store"


def test_other_content_and_other_preparation_are_told_apart(tmp_path):
    found = []
    for number, turn in enumerate((None, "person", "labels")):
        trainer = build(tmp_path / str(number), tmp_path, {})
        trainer._rows.raw, trainer._rows.dataset = (
            rows.map(lambda row, name=turn: {name: row[name][::-1]}) if turn in rows.column_names else rows
            for rows in (trainer.rows.raw, trainer.rows.dataset)
        )
        found.append(Identity.of(trainer).rows)
    plain, person, labels = found
    assert plain["content"] != person["content"] and plain["some prepared rows"] != labels["some prepared rows"]
    assert plain["rows"] == person["rows"] == labels["prepared rows"] == 72


def test_rows_without_ids_of_which_some_are_alike_or_dropped_are_those_of_the_driver():
    texts = ["a", "b", "a", "c", "d", "a", "e"]
    rows, config = Dataset.from_dict({"text": texts}), S3TConfig(num_shards=2, num_slices=2)
    sides = [TrainRows(rows, bytes.fromhex(KEY), config), RowsApart(rows, b"", config)]
    for side in sides:
        marked = side.marked(rows)
        side.adopt(marked.select([position for position, text in enumerate(texts) if text != "c"][::-1]))
    driver, worker = sides
    numbering = Numbering(driver)
    worker.know(numbering.numbers)
    examples = sorted(driver.entries)
    names = worker.names(numbering.of(examples))
    assert names == list(worker.entries)
    for example, name in zip(examples, names, strict=True):
        assert [number for _, number in driver.numbered([example])] == [n for _, n in worker.numbered([name])]
        assert driver.entries[example][:2] == worker.entries[name][:2]
    assert len(worker.numbered(names)) == 6 and len(names) == 5


def test_what_a_killed_worker_left_is_removed_by_the_next_one(tmp_path):
    assert in_child(lambda: (Scratch(), kill())) == -9
    (left,) = (path for path in tmp_path.glob(f"{PREFIX}*") if path.is_dir())
    living = Scratch()
    assert not left.exists() and living.path.is_dir()
    Scratch().remove()
    assert living.path.is_dir(), "it lives"
    living.remove()
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def test_a_worker_that_starts_keeps_its_folder_whoever_cleans_up_meanwhile(tmp_path, monkeypatch):
    import fcntl

    lock, cleaned = fcntl.flock, []

    def clean_up_before(file: int, how: int) -> None:
        if how & fcntl.LOCK_EX and not cleaned:
            cleaned.append(True)
            assert in_child(lambda: (Scratch(), kill())) == -9
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", clean_up_before)
    starting = Scratch()
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cleaned and starting.path.stat().st_mode & 0o777 == 0o700
    Scratch()
    assert starting.path.is_dir(), "it lives"
    starting.remove()
    assert not starting.path.exists()


class Tracker(TrainerCallback):
    """One whose server is gone."""

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("nobody listens")


def test_a_worker_leaves_nothing_although_its_tracker_fails(tmp_path):
    trainer, worker = driver_and_worker(tmp_path)
    handler = worker.trainer.callback_handler
    handler.trackers = (Tracker,)
    worker.trainer.add_callback(Tracker())
    worker.train(1, *sent(trainer, next_order(trainer.store, trainer.rows)))
    with pytest.raises(ConnectionError, match="nobody listens"):
        worker.end()
    assert not worker.scratch.path.exists()
