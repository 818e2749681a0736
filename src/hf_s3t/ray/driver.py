"""The driver: holds the store, hands out the stages that it lacks, and commits those that come back.

```
driver    S3TTrainer.train(): lock, reconcile, plan ---> orders ---> commit ---> root adapter, card
             key, state, store                          |      ^
                                                        v      |        rows by number, parents
workers                                               train a stage     no key, no state, no store
```

It is one `train()` whose stages are trained elsewhere (`stages_by`): what is checked, locked and written is the same
code, and so is what a stage is made of. Which worker trains a stage, and when, changes no bit.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import ray
from accelerate.logging import get_logger
from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError
from transformers.trainer_utils import TrainOutput

from ..errors import DatasetError, RecipeError, S3TError
from ..plan.schedule import ready
from ..plan.tree import Stage
from ..store.folder import KEY_VARIABLE
from ..store.recipe_differences import compare_recipes
from ..training.processes import is_bar_shown
from ..training.refusals import Repair
from ..training.rows_apart import Numbering
from ..training.stage_orders import StageDropped, next_order
from .hands import Hand
from .worker import Identity, MakeTrainer, build

logger = get_logger(__name__)

LOSSES = 3
"""So many workers may die of one stage, or in a row while they begin; then it is an error."""
LOOK_SECONDS = 1.0
"""How often the driver looks for deletions, at least."""
END_SECONDS = 30.0
"""How long running stages have to end where one of them failed."""
LONELY_SECONDS = 60.0
"""After so many without any worker there is a warning."""


def train(
    make_trainer: MakeTrainer,
    workers: int = 8,
    resources_per_worker: Mapping[str, float] | None = None,
    gpus_per_stage: int = 1,
    *,
    repair: Repair = "all",
    cost_budget: int | None = None,
) -> TrainOutput:
    """As [`S3TTrainer.train`]: trains every stage that the store lacks; on Ray's workers, several at a time.

    The process that calls it is the driver. It builds the trainer, too, and alone touches the store. Killed at any
    instant and run again, it goes on with what is in the store. Where Ray was not started, it is started here.

    Args:
        make_trainer (`Callable` or `str`): a function without arguments that builds the trainer as in a script, or
            `"module:function"`. It runs on the driver and on every worker, so it must not hold the partition key:
            that comes from the store's state, or on the driver from `HF_S3T_KEY`.
        workers (`int`): how many stages train at a time, at most.
        resources_per_worker (`Mapping[str, float]`, *optional*): what Ray reserves for each. `None`: one GPU. Torch
            computes with as many threads as there are whole `"CPU"`s; without any, one.
        gpus_per_stage (`int`): how many processes train a stage together, all on one node, each with
            `resources_per_worker`. The number is part of the recipe, as with `accelerate launch`.
        repair, cost_budget: as for [`S3TTrainer.train`].

    Returns:
        [`~transformers.trainer_utils.TrainOutput`]: steps and mean loss over the stages trained by this call.

    Raises:
        RecipeError, DatasetError: a worker has other settings, versions or rows than the driver; it trained nothing.
        S3TError: a stage's workers died three times.
        Exception: what a stage raised on its worker, with the stage's name in a note.
    """
    for name, value in {"workers": workers, "gpus_per_stage": gpus_per_stage}.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"`{name}` must be an integer from 1 on, got {value!r:.40}.")
    trainer = build(make_trainer)
    if trainer.args.world_size > 1:
        raise ValueError("The driver is one process: start it without `accelerate launch` or `torchrun`.")
    if trainer.store._given_key is not None:
        raise ValueError(
            "`make_trainer` passes a `partition_key`, so every worker would hold it. Leave it out: the driver finds "
            f"the key in the store's state, or in {KEY_VARIABLE}."
        )
    if not ray.is_initialized():
        ray.init()
    resources = dict({"GPU": 1} if resources_per_worker is None else resources_per_worker)
    trainer.stages_by = Driver(trainer, make_trainer, workers, resources, gpus_per_stage).train
    trainer.stage_processes = gpus_per_stage
    return trainer.train(repair=repair, cost_budget=cost_budget)


class Driver:
    """Trains the missing stages of a trainer's store, which is open and locked, on workers."""

    def __init__(
        self, trainer: Any, make_trainer: MakeTrainer, workers: int, resources: Mapping[str, float], processes: int
    ):
        self.processes = processes  # that train a stage together
        self.trainer, self.store, self.rows = trainer, trainer.store, trainer.rows
        self.make_trainer, self.workers, self.resources = make_trainer, workers, dict(resources)
        self.hands: list[Hand] = []
        self.outputs: dict[Stage, TrainOutput] = {}
        self._losses: Counter[Stage | None] = Counter()
        self._serial = 0
        self._missing: tuple[Stage, ...] = ()

    def train(self) -> dict[Stage, TrainOutput]:
        """What was trained, stage by stage."""
        self._manifest = self.store.manifest()
        self._missing = self._manifest.plan.missing(self._manifest.stages)
        if not self._missing:
            return {}
        self._numbering = Numbering(self.rows)
        self._numbers, self._recipe_of_trainer = ray.put(self._numbering.numbers), ray.put(self.make_trainer)
        self._started = time.monotonic()
        try:
            self.hands = [self._new_hand() for _ in range(min(self.workers, len(self._missing)))]
            while self._missing:
                self._call_off_what_is_hit()
                self._hand_out()
                self._take_what_ended()
                self._show()
        finally:
            self._dismiss()
        return self.outputs

    # ---- workers ----

    @cached_property
    def _identity(self) -> Identity:
        return Identity.of(self.trainer)

    def _check(self, worker: Identity) -> None:
        """Raises an error unless a worker computes what this process would."""
        driver = self._identity
        found = [str(one.between("the driver", "the worker")) for one in compare_recipes(driver.recipe, worker.recipe)]
        found += _other("version of", driver.versions, worker.versions)
        if driver.device != worker.device and driver.recipe.get("cached_trunk"):  # whose batches go with the device
            found.append(f"device: the driver has {driver.device!r}, the worker {worker.device!r}, with cached states")
        if found:
            raise RecipeError(
                f"{worker} would train with other settings than the driver, so its stages would not be those of one "
                "process:\n  " + "\n  ".join(found) + "\nGive every node the same environment, and let "
                "`make_trainer` depend on nothing that differs between them. Nothing of it was stored."
            )
        if rows := _other("", driver.rows, worker.rows):
            raise DatasetError(
                f"{worker} loaded another train set than the driver:\n  " + "\n  ".join(rows) + "\nLet `make_trainer` "
                "load the same rows in the same order on every node. Nothing of it was stored."
            )

    def _new_hand(self) -> Hand:
        hand = Hand.start(self.resources, self.processes)
        hand.do("begin", self._recipe_of_trainer, self._manifest)
        return hand

    def _dismiss(self) -> None:
        """Lets running stages go, and ends the workers, which remove what they have on their disks."""
        for hand in filter(Hand.is_training, self.hands):
            hand.ask("call_off", hand.serial)
        ending = [end for hand in self.hands if hand.identity is not None for end in hand.ask("end")]
        if ending:
            ray.wait(ending, num_returns=len(ending), timeout=END_SECONDS)
        for hand in self.hands:
            hand.kill()

    # ---- stages ----

    def _call_off_what_is_hit(self) -> None:
        if not self.trainer.watch.changed():
            return
        for hand in filter(Hand.is_training, self.hands):
            if not hand.called_off and self.trainer.watch.is_hit(hand.order):
                hand.ask("call_off", hand.serial)
                hand.called_off = True

    def _hand_out(self) -> None:
        for hand in self.hands:
            if hand.pending:
                continue
            order = next_order(self.store, self.rows, self._choose)
            if order is None:
                return
            self._serial += 1
            hand.order, hand.serial, hand.called_off, hand.share = order, self._serial, False, 0.0
            bare = replace(order, examples=(), content="")
            hand.do("train", self._serial, bare, self._numbering.of(order.examples), self._numbers)

    def _choose(self, missing: tuple[Stage, ...]) -> Iterable[Stage]:
        self._missing = missing
        begun = [hand.order.stage for hand in self.hands if hand.order is not None]
        return ready(missing, lambda stage: stage.passes(self.trainer.s3t_config.replay), begun)

    def _take_what_ended(self) -> None:
        busy = {work: hand for hand in self.hands for work in hand.pending}
        ended, _ = ray.wait(list(busy), timeout=LOOK_SECONDS) if busy else ([], [])
        for work in ended:
            hand = busy[work]
            try:
                ray.get(work)
            except (RayTaskError, RuntimeEnvSetupError) as error:
                lost = hand.lost()
                if lost is None:
                    raise hand.told(error) from None
                self._replace(hand, lost)
            except RayError as error:
                self._replace(hand, error)
            else:
                hand.pending.remove(work)
                if not hand.pending:
                    self._take(hand, ray.get(hand.work))
        if self._started and all(hand.identity is None for hand in self.hands):
            self._warn_if_lonely()

    def _take(self, hand: Hand, results: list[Any]) -> None:
        order, result, hand.order = hand.order, results[0], None
        if order is None:
            hand.identity = result
            for identity in results:
                self._check(identity)
            self._losses.pop(None, None)
            logger.info("a worker has begun: %s", result)
            return
        try:
            if result is None:
                raise StageDropped
            self.trainer._store_stage(order, result, f", by {hand.identity}")
        except StageDropped:
            logger.warning("stage %s was hit by a deletion: dropped", order.stage.name)
            return
        self.outputs[order.stage] = result.output
        self.trainer.progress.done += self.trainer.progress.meter.cost(order.stage)

    def _replace(self, hand: Hand, error: RayError) -> None:
        """A worker was lost: its stage is missing, as it was before."""
        hand.kill()
        stage = hand.order.stage if hand.order is not None else None
        what = f"stage {stage.name}" if stage else "the beginning of a worker"
        self._losses[stage] += 1
        self.hands.remove(hand)
        if self._losses[stage] >= LOSSES:
            raise S3TError(
                f"{LOSSES} workers died of {what}. The last one, {hand.identity or 'not begun'}: {error} Every stage "
                "that ended is in the store. Remove the cause (often memory), and run this again."
            ) from error
        why = str(error).strip().splitlines()[0]
        logger.warning("a worker was lost (%s): %s begins again. %s", hand.identity or "not begun", what, why)
        self.hands.append(self._new_hand())

    # ---- what is shown ----

    def _show(self) -> None:
        if not is_bar_shown(self.trainer.args):
            return
        for hand in filter(Hand.is_training, self.hands):
            hand.show_share()
        progress = self.trainer.progress
        cost = progress.meter.cost
        progress.open()
        running = (cost(hand.order.stage) * hand.share for hand in self.hands if hand.order is not None)
        progress.show(progress.done + sum(running))

    def _warn_if_lonely(self) -> None:
        if time.monotonic() - self._started > LONELY_SECONDS:
            self._started = 0.0
            logger.warning(
                "no worker has begun after %d s. Each asks for %s; the cluster has %s", LONELY_SECONDS, self.resources,
                ray.cluster_resources(),
            )  # fmt: skip


def _other(what: str, driver: Mapping[str, Any], worker: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {name}: the driver has {driver.get(name)!r}, the worker {worker.get(name)!r}".strip()
        for name in sorted(driver.keys() | worker.keys())
        if driver.get(name) != worker.get(name)
    ]
