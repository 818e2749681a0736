"""Deletion streams of `quality.py`: accuracy over requests, storage and life against the budget, time over requests.

Every stage of the plan is trained, and the probabilities of every prefix on the test rows are kept. Along a stream,
what survives is then known exactly, and the served model's answers are the average of its members' probabilities,
which is what `S3TEnsemble` computes (checked in the run). SISA's and full retraining's accuracy after requests is that
of real retrainings: some, as each differs from the next by one row of thousands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality_tasks import Settings, Task, score_of
from quality_training import run, served, train_full, train_s3t

from hf_s3t import Plan, S3TEnsemble, Stage
from hf_s3t.plan.life import life_left
from hf_s3t.plan.optimal import optimal
from hf_s3t.plan.sequences import select_sequences
from hf_s3t.planner.renewal import RepairRule, outlook

Answers = dict[Stage, torch.Tensor]
FEWER_PASSES = 10  # of 12 that the rotation of three slices costs


class Served:
    """What a plan serves after some places were hit, and how often it is right.

    Args:
        answers (`dict[Stage, torch.Tensor]`): probabilities of each prefix, `(rows, classes)`.
        base (`torch.Tensor`): those of the base model, which answers when nothing is left.
        labels (`list[int]`): the truth.
    """

    def __init__(self, answers: Answers, base: torch.Tensor, labels: list[int]):
        self.answers, self.base, self.labels = answers, base, labels
        self._known: dict[Any, float] = {}

    def probabilities(self, plan: Plan, trained: set[Stage]) -> torch.Tensor:
        """The ensemble's: the mean over the live shards' served prefixes."""
        members = [Stage(shard, prefix) for shard, prefix in plan.served(trained).items()]
        return torch.stack([self.answers[stage] for stage in members]).mean(0) if members else self.base

    def accuracy(self, plan: Plan, trained: set[Stage]) -> float:
        """In percent."""
        key = (plan.sequences, frozenset(trained))
        if key not in self._known:
            self._known[key] = score_of(self.probabilities(plan, trained), self.labels)["accuracy"]
        return self._known[key]

    def along(self, plan: Plan, streams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy after 0, 1, 2, ... requests, `(streams, requests + 1)`, and after which nothing was left (0: none).

        Args:
            streams (`np.ndarray`): places `shard * L + slice`, `(streams, requests)`.
        """
        curves = np.empty((len(streams), streams.shape[1] + 1))
        dead = np.zeros(len(streams), dtype=int)
        for number, stream in enumerate(streams):
            trained = set(plan.stages)
            curves[number, 0] = self.accuracy(plan, trained)
            for request, place in enumerate(stream, start=1):
                hit = divmod(int(place), plan.num_slices)
                trained = {stage for stage in trained if hit not in stage.slices}
                curves[number, request] = self.accuracy(plan, trained)
                if not trained:
                    dead[number] = request
                    curves[number, request:] = curves[number, request]
                    break
        return curves, dead


def answers_of(trainer: Any, task: Task, rows: Any, only_served: bool = False) -> Answers:
    """Probabilities of every prefix that the store holds, or of the served ones."""
    stages = sorted(trainer.store.manifest().stages)
    if only_served:
        stages = [Stage(shard, prefix) for shard, prefix in sorted(trainer.store.served().items())]
    return {
        stage: task.probabilities(served(trainer, trainer.store.assemble(stage.shard, stage.prefix)), rows)
        for stage in stages
    }


def ensemble_score(trainer: Any, task: Task, rows: Any) -> float:
    """Accuracy of the served model, in percent."""
    mean = torch.stack(list(answers_of(trainer, task, rows, only_served=True).values())).mean(0)
    return score_of(mean, rows["labels"])["accuracy"]


def check_against_ensemble(trainer: Any, task: Task, found: Served, rows: Any) -> float:
    """Deletes two slices for real and compares the composed answers with those of `S3TEnsemble`; the largest
    difference of a probability."""
    plan, hit = trainer.store.manifest().plan, {(0, 1)}
    hit.add((plan.num_shards - 1, 0))
    trainer.store.delete(slices=sorted(hit))
    left = {stage for stage in plan.stages if hit.isdisjoint(stage.slices)}
    count = min(64, len(rows))
    ensemble = S3TEnsemble.from_pretrained(trainer.store.path, task.base())
    answered = task.probabilities(ensemble, rows.select(range(count)))
    difference = (found.probabilities(plan, left)[:count] - answered).abs().max().item()
    assert difference < 1e-4, f"S3TEnsemble answers otherwise than the average of its members: {difference}"
    return difference


def life_figures(settings: Settings, slices: int, sizes: dict[Stage, int]) -> list[dict[str, Any]]:
    """For each budget: bytes of the stages, slice passes, requests until nothing is left and until a shard is dead."""
    found = []
    for budget in range(1, slices + 1):
        plan = Plan.make(settings.shards, slices, select_sequences("cyclic", slices, budget))
        life = life_left(plan)
        found.append(
            {
                "budget": budget, "slice_passes": plan.cost, "bytes": sum(sizes[stage] for stage in plan.stages),
                "life": life.until_all_dead.mean, "first_shard_dead": life.until_first_dead.mean,
            }
        )  # fmt: skip
    return found


def time_figures(settings: Settings, slices: int, seconds: dict[str, float], epochs: float) -> dict[str, Any]:
    """Slice passes and seconds of training over many requests, the first training included, in expectation."""
    cyclic = Plan.make(settings.shards, slices, select_sequences("cyclic", slices, slices))
    cheaper = Plan.make(settings.shards, slices, optimal(slices, cost_budget=FEWER_PASSES).orders)
    sisa = Plan.make(settings.shards, slices, select_sequences("cyclic", slices, 1))
    plans = {
        "s3t_cyclic": (cyclic, RepairRule(below=1), 1),
        "s3t_optimal": (cheaper, RepairRule(below=1), 1),
        "sisa": (sisa, RepairRule(below=slices), 1),
        "full": (Plan.make(1, 1, [(0,)]), RepairRule(below=1), settings.shards * slices),
    }
    of = {"s3t_cyclic": "layer_group", "s3t_optimal": "layer_group", "sisa": "all", "full": "full"}
    found = {}
    for name, (plan, rule, slice_passes) in plans.items():
        expected = outlook(plan, rule, per_day=1, horizon_days=settings.many_requests)
        passes = epochs * slice_passes * (plan.cost + expected.repair_cost)
        found[name] = {
            "slice_passes": passes, "seconds": passes * seconds[of[name]],
            "trainings": expected.repairs,
        }  # fmt: skip
    return found


def stage_bytes(trainer: Any) -> dict[Stage, int]:
    """Bytes of each stage's folder."""
    return {
        stage: sum(file.stat().st_size for file in (trainer.store.path / stage.name).iterdir() if file.is_file())
        for stage in trainer.store.manifest().stages
    }


def retrain_sisa(trainer: Any, task: Task, rows: Any, number: int, draw: Any) -> list[dict[str, float]]:
    """Deletes one drawn example after the other and retrains from the last clean slice, for real."""
    found = []
    ids = list(task.rows["train"]["id"])
    for wanted in draw.choice(len(ids), number, replace=False):
        before = set(trainer.store.manifest().stages)
        trainer.delete(ids=[ids[wanted]])
        lost = before - set(trainer.store.manifest().stages)
        seconds = run(trainer)
        found.append(
            {
                "accuracy": ensemble_score(trainer, task, rows), "seconds": seconds,
                "slice_passes": sum(stage.depth for stage in lost) * trainer.args.num_train_epochs,
            }
        )  # fmt: skip
    return found


def stream_figures(settings: Settings, task: Task, scratch: Path) -> dict[str, Any]:
    """Trains everything, composes the streams; figures and curves."""
    slices, epochs = task.settings.num_slices, settings.stream_epochs
    rows = task.first("test", settings.stream_rows)
    draw = np.random.default_rng(task.seed)
    orders = [list(order) for order in select_sequences("cyclic", slices, slices)]
    many = {"num_shards": settings.shards, "num_slices": slices, "epochs": epochs}
    s3t, s3t_seconds = train_s3t(task, scratch / "s3t", sequence_selection=orders, budget=None, **many)
    plan = s3t.store.manifest().plan
    cheaper = Plan.make(settings.shards, slices, optimal(slices, cost_budget=FEWER_PASSES).orders)
    assert set(cheaper.stages) <= set(plan.stages), "the cheaper plan has stages that were not trained"
    found = Served(answers_of(s3t, task, rows), task.probabilities(task.base(), rows), rows["labels"])
    sizes = stage_bytes(s3t)

    life = life_left(plan).until_all_dead
    requests = int(life.mean + 10 * life.standard_deviation)
    streams = draw.integers(0, settings.shards * slices, (settings.streams, requests))
    curves, figures = {}, {}
    for name, of in (("s3t_cyclic", plan), ("s3t_optimal", cheaper)):
        accuracy, dead = found.along(of, streams)
        curves[name] = {"mean": accuracy.mean(0).tolist(), "std": accuracy.std(0, ddof=1).tolist()}
        figures[f"{name}_accuracy"] = float(accuracy[:, 0].mean())
        figures[f"{name}_dead_streams"] = int((dead > 0).sum())
        if dead.all():
            error = dead.std(ddof=1) / len(dead) ** 0.5
            assert abs(dead.mean() - life.mean) < 4 * error, (dead.mean(), life.mean, error)
            figures[f"{name}_life"] = float(dead.mean())
    figures["ensemble_difference"] = check_against_ensemble(s3t, task, found, rows)

    sisa, sisa_seconds = train_s3t(
        task, scratch / "sisa", stage_parameters="all", sequence_selection=[orders[0]], budget=None, **many
    )
    sisa_accuracy = ensemble_score(sisa, task, rows)
    sisa_bytes = sum(stage_bytes(sisa).values())
    sisa_cost = sisa.store.manifest().plan.cost
    retrained = retrain_sisa(sisa, task, rows, settings.sisa_retrainings, draw)

    gone = set(draw.choice(len(task.rows["train"]), settings.full_retraining_after, replace=False).tolist())
    kept = task.rows["train"].select([row for row in range(len(task.rows["train"])) if row not in gone])
    full, full_seconds = train_full(task, scratch / "full", epochs, kept)
    seconds = {
        "layer_group": s3t_seconds / (plan.cost * epochs), "all": sisa_seconds / (sisa_cost * epochs),
        "full": full_seconds / (settings.shards * slices * epochs),
    }  # fmt: skip
    return figures | {
        "curves": curves,
        "sisa_accuracy": sisa_accuracy,
        "sisa_retrained": retrained,
        "full_accuracy": score_of(task.probabilities(full, rows), rows["labels"])["accuracy"],
        "base_accuracy": score_of(found.base, rows["labels"])["accuracy"],
        "life_by_formula": life.mean,
        "storage": life_figures(settings, slices, sizes),
        "sisa_bytes": sisa_bytes,
        "seconds_per_slice_pass": seconds,
        "over_requests": time_figures(settings, slices, seconds, epochs),
    }
