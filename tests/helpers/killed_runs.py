"""A run that deletes while it trains, killed at an instant, run again, and held against one that was never killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import TrainerCallback

from hf_s3t import S3TStore, StoreError
from hf_s3t.serving.loading import read_members
from killing import MODES, train_struck
from stores import records_of, tombstones_of
from trainings import CASES, make_trainer, place, published, rows_of, without


class DeleteWhileTraining(TrainerCallback):
    """Deletes the victim in the middle of stage 0-1, unless that is done."""

    def __init__(self, path: Path, victim: str):
        self.path, self.victim = path, victim

    def on_step_end(self, args, state, control, stage=None, **kwargs):
        if stage.depth == 2 and state.global_step == 3:
            delete_unless_done(self.path, self.victim)


def delete_unless_done(path: Path, victim: str) -> None:
    store = S3TStore(path)
    if store.locate(ids=[victim])[0].found == "live":
        store.delete(ids=[victim])


class Run:
    """One model and kind: the run that is to be killed, its instants, and what a run that is never killed leaves."""

    def __init__(self, case: str, kind: str, folder: Path):
        self.case, self.kind, self.folder = CASES[case], kind, folder
        rows = rows_of(self.case, 48)
        slices = [[row for row, name in enumerate(rows["id"]) if place(name, slices=2)[1] == i] for i in (0, 1)]
        self.rows = rows.select(slices[0][:8] + slices[1][:12])  # stage 0-1: 3 steps an epoch
        self.victim = next(name for name in self.rows["id"] if place(name, slices=2)[1] == 0)
        self.reference, self.categories = folder / "reference", []

    def train(self, path: Path, rows=None, callbacks=(), **options):
        args = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "save_steps": 2}
        options |= {"num_slices": 2, "model": self.case.make_model(num_hidden_layers=2), "args": args}
        rows = self.rows if rows is None else rows
        make_trainer(path, self.case, self.kind, rows, callbacks=list(callbacks), **options).train()

    def scenario(self, path: Path) -> None:
        self.train(path, callbacks=[DeleteWhileTraining(path, self.victim)])
        if S3TStore(path).locate(ids=[self.victim])[0].found == "live":  # stage 0-1 was there before it could be done
            S3TStore(path).delete(ids=[self.victim])
            self.train(path)

    def never_killed(self) -> dict[str, str]:
        if not self.categories:
            log = self.folder / "instants"
            assert train_struck(log, lambda: self.scenario(self.reference), None, "") == 0
            self.categories = log.read_text().split()
            scratch = self.folder / "scratch"
            self.train(scratch, without(self.rows, {self.victim}))
            assert published(scratch) == published(self.reference)
        return published(self.reference)

    def draw(self, category: str, number: int) -> tuple[int, str]:
        chance = random.Random(f"{self.case.name} {self.kind} {number}")
        self.never_killed()
        return chance.choice([i for i, found in enumerate(self.categories) if found == category]), chance.choice(MODES)


def check_readers(path: Path, run: Run) -> None:
    """What a reader finds is whole, and of a stage that a deletion hits nothing. No writer has recovered it yet."""
    store = S3TStore(path)
    if not store.exists:
        return
    members, live, records = read_members(store), store.live().stages, records_of(store)
    assert set(members) == {f"shard-{shard:02d}" for shard in store.served()}
    deleted = bool(store.intents() or tombstones_of(store)["id"])
    for stage in live:
        store.assemble(stage.shard, stage.prefix)  # compares every file with the manifest
        trained_since = records[stage.name]["generation"] == 1 and not store.intents()
        assert not deleted or trained_since or (0, 0) not in stage.slices, stage.name
    for prefix in ((0,), (0, 1)) if store.intents() else ():
        with pytest.raises(StoreError, match="not in the store"):
            store.assemble(0, prefix)


def check_leftovers(path: Path) -> None:
    """Nothing half-written is left once a training has ended."""
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert not [name for name in names if name.endswith((".tmp", "-journal"))]
    assert not any((path / ".s3t" / name).exists() for name in ("running", "scratch"))
    assert not list((path / ".s3t" / "intents").glob("*"))
    assert {name for name in names if name.startswith("shard-")} == {
        f"{stage.name}/{name}" for stage, files in S3TStore(path).manifest().stages.items() for name in files
    }


def check_kill(run: Run, path: Path, category: str, number: int) -> None:
    instant, mode = run.draw(category, number)
    log = path.with_name("struck")
    assert train_struck(log, lambda: run.scenario(path), instant, mode) == -9
    found = log.read_text().split()
    assert found[: instant + 1] == run.categories[: instant + 1]
    check_readers(path, run)
    run.scenario(path)
    assert published(path) == run.never_killed()
    check_leftovers(path)
