"""Promise 5: killed at any instant and run again equals never killed, and a deletion interrupted anywhere holds.

The run trains three stages, deletes an example while the second one trains, and trains what is then missing. All its
instants are counted once; the kills are drawn from them with a seed, each kind of instant as often as `DRAWN` says.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

from hf_s3t import S3TStore
from killed_runs import Run, check_kill, check_leftovers, check_readers
from killing import CATEGORIES, MODES, fill_disk, in_child, kill, train_struck
from lifecycle import TYPED
from scanner import find
from seam import strikes, struck
from trainings import CASES, KINDS, place, published, tensor_bytes, without

DRAWN = {"step": 4, "checkpoint": 4, "rename": 3, "manifest": 4, "deletion": 5, "state": 4}
PAIRS = [(case, kind) for case in CASES for kind in KINDS]
SHORT = [(case, kind) for case, kind in PAIRS if kind != "rank_group" or case == "bert"]
KILLS = [(*SHORT[number % len(SHORT)], category, number) for number, category in
         enumerate(category for category, times in DRAWN.items() for _ in range(times))]  # fmt: skip
LONG = [(case, kind, category, 100 + number) for case, kind in PAIRS for category in CATEGORIES for number in range(3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {pair: Run(*pair, tmp_path_factory.mktemp("-".join(pair))) for pair in PAIRS}


@pytest.mark.brief(
    "llama-layer_group-step-0", "llama-layer_group-checkpoint-7", "bert-layer_group-rename-9",
    "llama-layer_group-manifest-14", "bert-all-deletion-18", "bert-layer_group-state-23",
)  # fmt: skip
@pytest.mark.parametrize(("case", "kind", "category", "number"), KILLS)
def test_killed_at_an_instant_and_run_again_is_never_killed(runs, tmp_path, case, kind, category, number):
    check_kill(runs[case, kind], tmp_path / "out", category, number)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "kind", "category", "number"), LONG)
def test_killed_at_many_instants(runs, tmp_path, case, kind, category, number):
    check_kill(runs[case, kind], tmp_path / "out", category, number)


def test_every_kind_of_instant_is_drawn(runs):
    assert sum(DRAWN.values()) == len(KILLS) == 24
    run = runs["llama", "layer_group"]
    run.never_killed()
    assert set(run.categories) == set(CATEGORIES)


@pytest.mark.brief("0", "3")
@pytest.mark.parametrize("number", range(6))
def test_a_full_disk_leaves_nothing_half_written(runs, tmp_path, number):
    run, path = runs[PAIRS[number]], tmp_path / "out"
    category = ("checkpoint", "rename", "manifest", "deletion", "state", "other")[number]
    instant, _ = run.draw(category, 50 + number)
    log = tmp_path / "struck"
    assert train_struck(log, lambda: run.scenario(path), instant, "before", fill_disk) == errno.ENOSPC
    check_readers(path, run)
    run.scenario(path)
    assert published(path) == run.never_killed()
    check_leftovers(path)


# ---- whatever befalls a training, at any step ----


@pytest.fixture(scope="module")
def steps(runs):
    """The numbered steps of a run that deletes while it trains."""
    run = runs["llama", "layer_group"]
    log, path = run.folder / "steps", run.folder / "counted"
    run.never_killed()
    assert not struck(lambda: run.scenario(path), log, path).kind
    assert published(path) == run.never_killed()
    return log.read_text().splitlines()


@pytest.mark.brief("3", "14")
@pytest.mark.parametrize("number", range(80))
def test_struck_at_a_step_and_run_again_is_never_struck(runs, steps, tmp_path, number):
    run, path = runs["llama", "layer_group"], tmp_path / "out"
    assert len(steps) > 400
    possible = strikes(steps)
    at, fault = possible[(2 * number + 1) * len(possible) // 160]
    outcome = struck(lambda: run.scenario(path), tmp_path / "struck", path, at, fault)
    assert outcome.killed == (fault in MODES) and outcome.kind in ("", "OSError", *TYPED), outcome
    check_readers(path, run)
    run.scenario(path)
    assert published(path) == run.never_killed()
    check_leftovers(path)


# ---- inside a stage ----


class StepCounter(TrainerCallback):
    """Notes at which step each stage began, and how many it took."""

    def __init__(self):
        self.began, self.taken = {}, {}

    def on_train_begin(self, args, state, control, stage=None, **kwargs):
        self.began[stage.name], self.taken[stage.name] = state.global_step, 0

    def on_step_end(self, args, state, control, stage=None, **kwargs):
        self.taken[stage.name] += 1


class Killer(TrainerCallback):
    """Kills the process at a step of a stage of depth 2."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, stage=None, **kwargs):
        if stage.depth == 2 and state.global_step == self.step:
            kill()


@pytest.mark.brief("llama-layer_group", "bert-rank_group")
@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_a_killed_stage_goes_on_where_its_checkpoint_was_written(runs, tmp_path, case, kind):
    run, path, whole = runs[case, kind], tmp_path / "out", tmp_path / "whole"
    run.train(whole)
    assert in_child(lambda: run.train(path, callbacks=[Killer(5)])) == -9
    assert {folder.name for folder in path.glob(".s3t/running/shard-00_0-1/*")} == {"checkpoint-2", "checkpoint-4"}
    steps = StepCounter()
    run.train(path, callbacks=[steps])
    assert (steps.began["shard-00/0-1"], steps.taken["shard-00/0-1"]) == (4, 2)
    assert published(path) == published(whole)


def test_a_stage_with_random_batches_starts_again(runs, tmp_path):
    run = runs["llama", "layer_group"]

    def noisy(rows):
        batch = default_data_collator(rows)
        tokens = torch.randint(3, 60, batch["input_ids"].shape)
        return {**batch, "input_ids": torch.where(torch.rand(tokens.shape) < 0.2, tokens, batch["input_ids"])}

    run.train(tmp_path / "whole", data_collator=noisy)
    assert in_child(lambda: run.train(tmp_path / "out", callbacks=[Killer(5)], data_collator=noisy)) == -9
    steps = StepCounter()
    run.train(tmp_path / "out", callbacks=[steps], data_collator=noisy)
    assert (steps.began["shard-00/0-1"], steps.taken["shard-00/0-1"]) == (0, 6)
    assert published(tmp_path / "out") == published(tmp_path / "whole")


def test_a_checkpoint_of_other_data_is_not_resumed(runs, tmp_path):
    """Between kill and resume an example of the running stage's slice is deleted."""
    run = runs["llama", "all"]
    assert in_child(lambda: run.train(tmp_path / "out", callbacks=[Killer(5)])) == -9
    later = next(name for name in run.rows["id"] if place(name, slices=2)[1] == 1)
    S3TStore(tmp_path / "out").delete(ids=[later])
    assert not list((tmp_path / "out/.s3t/running").glob("*"))
    run.train(tmp_path / "out")
    run.train(tmp_path / "scratch", without(run.rows, {later}))
    assert published(tmp_path / "out") == published(tmp_path / "scratch")


# ---- a deletion while a stage trains ----


class DeleteFromElsewhere(TrainerCallback):
    """Another process deletes at one event of stage 0-1; afterwards nothing may be written for that stage."""

    def __init__(self, path: Path, ids: list[str], event: str, step: int):
        self.path, self.ids, self.step, self.states, self.dropped = path, ids, step, [], {}
        setattr(self, event, self.strike)

    def strike(self, args, state, control, model=None, stage=None, **kwargs):
        if stage.depth == 2 and state.global_step == self.step and not self.states:
            assert in_child(lambda: S3TStore(self.path).delete(ids=self.ids)) == 0
            self.states.append((stage.name, state.global_step, state.max_steps))
            owned = {name: value for name, value in model.named_parameters() if ".lora_B.default." in name}
            self.dropped = {name: tensor_bytes(value)[:64] for name, value in owned.items() if value.any()}

    def on_train_begin(self, args, state, control, stage=None, **kwargs):
        if self.states and not self.states[1:]:
            assert self.dropped and find(self.path, self.dropped) == set(), "a file holds the dropped stage"
            self.states.append((stage.name, state.global_step, sorted(self.path.glob(".s3t/running/shard*/*"))))

    def on_optimizer_step(self, args, state, control, stage=None, **kwargs):
        assert len(self.states) != 1, "the dropped stage took another step"

    def on_save(self, args, state, control, stage=None, **kwargs):
        assert len(self.states) != 1, "a checkpoint of the dropped stage was written"


EVENTS = [("on_step_end", 3), ("on_step_end", 2), ("on_step_end", 6), ("on_train_end", 6)]


@pytest.mark.brief("layer_group-on_step_end-3", "layer_group-on_step_end-2", "layer_group-on_train_end-6")
@pytest.mark.parametrize(("event", "step"), EVENTS)
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "rank_group")) for k in KINDS])
def test_a_deletion_does_not_wait_for_the_stage_that_it_drops(runs, tmp_path, monkeypatch, kind, event, step):
    run, path = runs["llama", kind], tmp_path / "out"
    run.never_killed()
    callback = DeleteFromElsewhere(path, [run.victim], event, step)
    kept = watch_stage_folders(monkeypatch, path)
    run.train(path, callbacks=[callback])
    deletion, again = callback.states
    assert deletion == ("shard-00/0-1", step, 6)  # it returned, and the stage was still running
    assert again == ("shard-00/0", 0, [])  # the next stage to train, with no checkpoint left
    assert kept == ["shard-00/0", "shard-00/0", "shard-00/0-1", "shard-00/1"]  # 0-1 only once, after the repair of 0
    assert find(path, callback.dropped) == set()
    assert published(path) == run.never_killed()


def test_a_deletion_from_another_slice_lets_the_stage_go_on(runs, tmp_path, monkeypatch):
    """Stage 1 trains; the deletion hits slice 0, whose stages are done."""
    run, path = runs["llama", "layer_group"], tmp_path / "out"
    run.never_killed()
    kept = watch_stage_folders(monkeypatch, path)

    class Late(DeleteFromElsewhere):
        def strike(self, args, state, control, stage=None, **kwargs):
            if stage.name == "shard-00/1" and not self.states:
                assert in_child(lambda: S3TStore(self.path).delete(ids=self.ids)) == 0
                self.states += [(stage.name, 0, 0), ("no stage was dropped", 0, [])]

    run.train(path, callbacks=[Late(path, [run.victim], "on_step_end", 0)])
    assert kept == ["shard-00/0", "shard-00/0-1", "shard-00/1", "shard-00/0", "shard-00/0-1"]
    assert published(path) == run.never_killed()


def watch_stage_folders(monkeypatch, path: Path) -> list[str]:
    """The stage folders that are installed from now on, in this process, in their order."""
    installed, rename = [], os.rename

    def watched(source, target, **kwargs):
        installed.append(str(Path(target).relative_to(path)))
        return rename(source, target, **kwargs)

    monkeypatch.setattr(os, "rename", watched)
    return installed
