"""`S3TTrainer`: a Trainer whose `train()` trains every stage that the store lacks.

One stage is one ordinary `Trainer.train()` on the rows of its prefix. This file decides which stage comes next,
prepares model, rows and a fresh optimizer for it, and hands the result to the store; the loop itself, user hooks,
checkpoints and distribution stay the Trainer's. Which parameters train is for `lora/tuner.py`, what is on disk for
`store/store.py`.
"""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from huggingface_hub.utils import validate_repo_id
from transformers import EarlyStoppingCallback, Trainer, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..errors import DatasetError, IsolationError
from ..files import remove
from ..lora.adapter import Adapter
from ..lora.config import S3TConfig
from ..lora.tuner import StageTuner, Tensors, owned_layers, plain_lora_config, tensor_digest
from ..plan.tree import Stage
from ..seams.preparation import watched_preparation
from ..seams.trainer import kept_generators, written_checkpoint
from ..store.deletion import versions
from ..store.folder import LOCK_SECONDS
from ..store.recipe import argument_defaults, make_recipe, steering_by
from ..store.store import S3TStore
from ..trunk.row_numbers import MarkingCollator, RowGuard
from ..trunk.row_states import ActivationCache, check_cache
from .callbacks import PlanProgressCallback, StageCallbackHandler, StageGuard
from .checkpoints import collates_the_same, latest_checkpoint, mark_complete
from .reconcile import Missing, Wanted, plan_repair, reconcile, warn_of_other_stacks
from .rows import DIGEST_COLUMN, TrainRows
from .served_model import ServedModelMixin
from .stage_orders import StageDropped, StageOrder, commit, is_hit, next_order, running_folder
from .staging import (
    Repair,
    check_processes,
    check_repair,
    make_plan,
    on_main_process,
    public_id,
    refuse_arguments,
    set_stage_defaults,
    stage_seed,
    wrap_model,
)
from .trunk_cache import FedTrainerMixin, TrunkCache

logger = get_logger(__name__)


class S3TMixin(FedTrainerMixin, ServedModelMixin):
    """Makes a subclass of [`~transformers.Trainer`] train slice by slice. Put it first among the base classes.

    Args:
        model (`PreTrainedModel`): the base model, or a [`~peft.PeftModel`] made with an [`S3TConfig`].
        args ([`~transformers.TrainingArguments`]): `output_dir` is the store; epochs, steps, learning rate, scheduler,
            evaluation and saving are per stage.
        data_collator, train_dataset: as for the Trainer; the train set is partitioned before anything else touches it.
        peft_config ([`S3TConfig`], *optional*): what a stage trains.
        partition_key (`str` or `bytes`, *optional*): decides which slice an example lies in; written to `.s3t/` only.
            `None`: `HF_S3T_KEY`, else a new random key.
        missing (`"error"`, `"delete"` or `"ignore"`): what to do with examples that were trained on and are gone from
            the train set, or changed. `"delete"` deletes them.
        extend (`bool`): train stages again that saw other rows than the train set has for them now, or whose parents
            did. By default only stages trained from now on see new rows.
        base_model_id (`str`, *optional*): the base's id on the Hub, where it was loaded from a local folder.
        activation_cache (`"off"`, `"memory"` or `"disk"`): keep what enters the layers of a stage, computed once for
            each example, so that stages run from there up. Part of the recipe, wherever it is kept: states of a row
            alone may differ in their last bits from those in a batch.
        activation_cache_gb (`float`, *optional*): how much to keep, in 10^9 bytes. `None`: all that is of use.
        eval_trunk (`bool`): with a cache, whether layers that drop out in training may run without, below a stage.
        kwargs: everything else that the Trainer takes.

    Example:

        ```py
        class S3TSFTTrainer(S3TMixin, SFTTrainer): ...
        ```
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *,
        peft_config: S3TConfig | None = None,
        partition_key: str | bytes | None = None,
        missing: Missing = "error",
        extend: bool = False,
        base_model_id: str | None = None,
        activation_cache: ActivationCache = "off",
        activation_cache_gb: float | None = None,
        eval_trunk: bool = False,
        **kwargs: Any,
    ):
        self.train_dataset: Any
        self.data_collator: Any
        self.callback_handler: Any
        refuse_arguments(model, args, kwargs, missing)
        if base_model_id is not None:
            validate_repo_id(base_model_id)
        set_stage_defaults(args)
        self.trunk_cache = TrunkCache(self, activation_cache, activation_cache_gb, eval_trunk)
        self.missing, self.extend = missing, extend
        self.store = S3TStore(Path(args.output_dir), partition_key)  # a `str` might be the id of a repository
        model, self.s3t_config, self._drawn_heads = wrap_model(model, peft_config, args.seed)
        check_cache(activation_cache, activation_cache_gb, eval_trunk, self.s3t_config, args, model)
        self.base_model_id = base_model_id or public_id(model)
        self.s3t_config.base_model_name_or_path = self.base_model_id
        self._rows: TrainRows | None = None
        check_processes(args)
        if train_dataset is not None:
            key = on_main_process(args, self.store.ensure_key)
            self._rows = TrainRows(train_dataset, key, self.s3t_config)
            train_dataset = self._rows.marked(train_dataset)
        with watched_preparation(DIGEST_COLUMN, _mixing):
            super().__init__(
                model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, **kwargs
            )
        self.tuner = StageTuner(self.model)
        if self._rows is not None:
            self.train_dataset = self._rows.adopt(self.train_dataset)
        self.guard = StageGuard(self.tuner, self._drop_if_hit, self._check_rows)
        self.callback_handler = StageCallbackHandler(self.callback_handler, self.args.report_to)
        self.callback_handler.keep_outside(self.args.output_dir)
        self.add_callback(self.guard)
        self.progress = PlanProgressCallback(self.s3t_config.replay)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self.progress)
        self._order: StageOrder | None = None
        self._members: dict[str, int] | None = None
        self._marks: Any = None

    # ---- training ----

    def train(
        self,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        repair: Repair = "all",
        cost_budget: int | None = None,
    ) -> TrainOutput:
        """Trains every stage that the store lacks: a first run, a resumed run and a repair are the same call.

        `repair="best"` does not come back to the config's plan: it spends at most `cost_budget` slice passes per
        epoch, over all shards, on the stages that add most given what still lives, and what lives costs nothing.
        What is added is served length over the requests to come: where a short stage promises more than a long prefix,
        the prefix that is served now stays as it is. Those stages are the plan from then on, until `repair="all"`.
        Called again with the same budget before another deletion, it goes on with them (a killed repair), or trains
        nothing. What a deletion removes of them while they train is trained again on the rest, as of any plan.

        Args:
            resume_from_checkpoint (`bool`, *optional*): a killed stage is always resumed; only `None`, `True` and
                `False` are accepted, and `False` starts a killed stage again.
            trial: not supported, as hyperparameter search needs a store per trial.
            ignore_keys_for_eval (`list[str]`, *optional*): as for the Trainer.
            repair (`"all"` or `"best"`, *optional*, defaults to `"all"`): every stage of the config's plan that is
                missing, or the best for the cost.
            cost_budget (`int`, *optional*): with `repair="best"`, and only then.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: steps and mean loss over the stages trained by this call.

        Raises:
            RecipeError, DatasetError, StateError, StoreLockedError: nothing was trained.
            IsolationError: a stage touched what it does not own.
        """
        if resume_from_checkpoint not in (None, True, False) or trial is not None:
            raise ValueError("`train()` resumes from the store itself; pass no checkpoint path and no trial.")
        check_repair(repair, cost_budget, self.extend, self.s3t_config.num_slices)
        if self._rows is None:
            raise ValueError("`train()` needs a `train_dataset`.")
        with self._training_lock():
            logger.info("%s", self._on_main(partial(self._open_store, cost_budget)))
            try:
                if self._on_main(lambda: self.progress.total):
                    self.try_evaluation()
                outputs = self._train_missing(resume_from_checkpoint is not False, ignore_keys_for_eval)
            finally:
                self.trunk_cache.close()
            self._on_main(self._close_store)
        self.callback_handler.end_run(self.args, self.state, self.control)
        self.progress.close()
        self._serve()
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub()
        return _summary(outputs)

    @contextmanager
    def _training_lock(self) -> Iterator[None]:
        """One training per store; a deletion needs another lock and never waits for this one."""
        self._on_main(partial(self.store.train_lock.acquire, 0))
        try:
            yield
        finally:
            if self.is_world_process_zero():
                self.store.train_lock.release()

    def _open_store(self, cost_budget: int | None = None) -> str:
        """Brings store, settings and rows into agreement; returns what is about to be trained, in one line."""
        recipe = make_recipe(
            self.s3t_config, self.tuner.layout, self.rows.id_column, self.args, self.model, self.processing_class,
            self.data_collator, self.base_model_id, self._drawn_heads,
            user_code=(self.optimizer_cls_and_kwargs, self.compute_loss_func), cached_trunk=self.trunk_cache.on,
            steering=steering_by(self.args, self.stateful_callbacks(), self.eval_dataset),
        )  # fmt: skip
        prior = self.s3t_config.deletion_prior
        wanted_plan = make_plan(self.s3t_config, self.args.seed) if cost_budget is None else None
        defaults = argument_defaults(self.args)
        wanted = Wanted(recipe, wanted_plan, prior, self.rows, self.missing, self.extend, defaults)
        with self.store.writing():
            manifest = reconcile(self.store, self.s3t_config, wanted)
        if cost_budget is not None:
            manifest = plan_repair(self.store, cost_budget, prior)
        plan = manifest.plan
        missing = plan.missing(manifest.stages)
        if missing:
            warn_of_other_stacks(self.store, manifest)
        cost = round(sum(stage.passes(self.s3t_config.replay) for stage in missing), 2)
        layout = self.tuner.layout
        numel = sum(self.tuner.stage_numel(owned_layers(self.s3t_config, layout, stage.depth)) for stage in missing)
        self.progress.total = cost
        return (
            f"{len(missing)} of {len(plan.stages)} stages to train, {cost} slice passes = "
            f"{cost / (plan.num_shards * plan.num_slices):.1f} x one plain fine-tuning, "
            f"{4 * numel / 1e6:.1f} MB of stages"
        )

    @property
    def rows(self) -> TrainRows:
        """The partitioned train set."""
        assert self._rows is not None
        return self._rows

    def _train_missing(self, resume: bool, ignore_keys_for_eval: list[str] | None) -> dict[Stage, TrainOutput]:
        outputs: dict[Stage, TrainOutput] = {}
        self._base_digests: dict[str, str] = {}
        while (order := self._on_main(self._next_order)) is not None:
            try:
                outputs[order.stage] = self._train_stage(order, resume, ignore_keys_for_eval)
            except StageDropped:
                logger.warning("stage %s was hit by a deletion: dropped", order.stage.name)
                self._on_main(partial(remove, running_folder(self.store, order.stage)))
        return outputs

    def _next_order(self) -> StageOrder | None:
        self._marks = self.store.marks()
        return next_order(self.store, self.rows)

    def _train_stage(self, order: StageOrder, resume: bool, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        """One stage from its fresh parameters to its place in the store."""
        started, seed = time.monotonic(), stage_seed(self.args.seed, order.stage)
        self._order, self.callback_handler.stage = order, order.stage
        given = self.train_dataset, self.data_collator
        drop_last = self.args.dataloader_drop_last
        try:
            self.begin_afresh()
            self.tuner.begin(order.stage.depth, seed, order.parent)
            output = TrainOutput(0, 0.0, {})
            if order.examples:
                self._hand_rows(order)
                with self.trunk_cache.stage(order):
                    checkpoint = self._on_main(partial(self._resumable_checkpoint, resume))
                    frozen = self.tuner.frozen_digests(self._base_digests)
                    set_seed(seed)
                    with self.guard.stage(lambda: self.state):
                        output = super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
                    self.remove_noise()
                    self._base_digests = self.tuner.check_frozen(frozen)
            else:
                self.tuner.empty_stage()
            self._store_stage(order, output, started)
        except IndexError as error:
            raise _drawn_beyond(error, order) from error
        finally:
            self._order = self.callback_handler.stage = self._members = self.row_guard = None
            self.is_in_train = False
            self.remove_noise(ended=False)
            self.args.dataloader_drop_last = drop_last
            self.train_dataset, self.data_collator = given
        return output

    def _hand_rows(self, order: StageOrder) -> None:
        """Gives the Trainer the rows of a stage, marked, and a guard that lets no others in."""
        rows = self.rows.select(order.examples)
        self.train_dataset, self.data_collator = rows, MarkingCollator(self.data_collator)
        self.row_guard, self._mask_moved = RowGuard(rows), False
        batch = self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and len(rows) < batch:
            self.args.dataloader_drop_last = False
            logger.warning(
                "stage %s has %d rows, fewer than a batch of %d: that batch is kept although `dataloader_drop_last` "
                "is set, as the stage would not be trained at all", order.stage.name, len(rows), batch,
            )  # fmt: skip

    def before_forward(self) -> None:
        """Nothing but what the stage owns trains, whatever happened since the last step."""
        if self.tuner.hold_mask() and not self._mask_moved:
            self._mask_moved = True
            logger.warning(
                "stage %s: something (a callback, a loss, `set_adapter`) changed which parameters train or which "
                "adapters answer. That was put right before the step; take it out.", self.order.stage.name,
            )  # fmt: skip

    def _check_rows(self) -> None:
        if self.row_guard is not None:
            self.row_guard.check_step()

    def _store_stage(self, order: StageOrder, output: TrainOutput, started: float) -> None:
        tensors = self.tuner.stage_tensors()
        layers = owned_layers(self.s3t_config, self.tuner.layout, order.stage.depth)
        self._check_ranks(tensors)
        config = plain_lora_config(self.s3t_config, self.tuner.layout, layers)
        config["auto_mapping"] = self._auto_mapping(order.stage)
        record = {
            "generation": order.generation,
            "examples": len(order.examples),
            "data": order.mark["data"],
            "steps": output.global_step,
            "seconds": round(time.monotonic() - started, 3),
            "versions": versions(),
        }
        self._on_main(partial(commit, self.store, order, Adapter.from_tensors(config, tensors), record))
        numel = sum(value.numel() for value in tensors.values())
        logger.info(
            "stage %s: layers %s, %d examples, %d trainable parameters, loss %.4f, %.1f s",
            order.stage.name, list(layers), len(order.examples), numel, output.training_loss, record["seconds"],
        )  # fmt: skip

    def _auto_mapping(self, stage: Stage) -> dict[str, Any]:
        """PEFT's field for libraries: the base's class, which stages this one builds on, and whether by rank."""
        base, kind = self.model.get_base_model(), self.s3t_config.stage_parameters
        parents = [above.name for above in stage.path[:-1]]
        stacked = {"stage_parameters": kind} if kind == "rank_group" else {}
        about = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        return {**about, "parents": parents, **stacked}

    def _close_store(self) -> None:
        with self.store.writing():
            self.store.write_manifest(self.store.write_root(self.store.manifest()))
            remove(self.store.private / "running")

    def _check_ranks(self, tensors: Tensors) -> None:
        """Every process must hold the same stage, bit for bit."""
        if self.args.world_size == 1:
            return
        digest = hashlib.sha256("".join(tensor_digest(tensors[name]) for name in sorted(tensors)).encode()).hexdigest()
        if len(set(gather_object([digest]))) > 1:
            raise IsolationError(
                "The processes ended the stage with different weights: gradients were not averaged between them. "
                "Nothing was stored. See whether a callback or a loss changes the model on one process only."
            )

    # ---- deletions while a stage trains ----

    def _drop_if_hit(self) -> None:
        """Raises [`StageDropped`] on every process at the same step once an intent covers the running stage."""
        hit = False
        if self._order is not None and self.is_world_process_zero():
            marks = self.store.marks()
            if marks != self._marks:
                hit = is_hit(self.store, self.order)
                self._marks = marks
        if self.args.world_size > 1:
            flag: Any = torch.tensor([hit], device=self.args.device, dtype=torch.int32)
            torch.distributed.broadcast(flag, 0)
            hit = bool(flag)
        if hit:
            raise StageDropped

    # ---- running checkpoints ----

    @property
    def order(self) -> StageOrder:
        """The running stage's order."""
        assert self._order is not None
        return self._order

    @property
    def _running(self) -> Path:
        return running_folder(self.store, self.order.stage)

    def checkpoint_folder(self) -> Path | None:
        """A running stage's own: the store receives our files only, the Trainer's checkpoints are scratch."""
        return self._running if self._order else None

    def _resumable_checkpoint(self, resume: bool) -> str | None:
        """The newest complete checkpoint of the running stage; whatever else lies there is removed."""
        for other in self.store.private.glob("running/*"):
            if other != self._running or not resume or self.args.save_only_model or self._stops_early:
                remove(other)
        checkpoint = latest_checkpoint(self._running, self.order.mark)
        if checkpoint is not None:
            loader = self.get_train_dataloader()
            if not collates_the_same(loader.dataset, loader.collate_fn, self.args.per_device_train_batch_size):
                logger.warning("stage %s starts again: its batches are random", self.order.stage.name)
                remove(self._running)
                return None
        return checkpoint

    @property
    def _stops_early(self) -> bool:
        """Whether a callback counts evaluations, which a checkpoint does not restore: such a stage starts again."""
        return any(isinstance(callback, EarlyStoppingCallback) for callback in self.callback_handler.callbacks)

    @contextmanager
    def writing_checkpoint(self) -> Iterator[None]:
        """Under the write lock: a deletion either waits for the checkpoint and then removes it, or comes first."""
        self._on_main(self._enter_checkpoint)
        try:
            yield
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                mark_complete(written_checkpoint(self._running, self.state.global_step), self.order.mark)
        finally:
            if self.is_world_process_zero():
                self.store.write_lock.release()

    def _enter_checkpoint(self) -> None:
        self.store.write_lock.acquire(LOCK_SECONDS)
        try:
            if is_hit(self.store, self.order):
                raise StageDropped
        except BaseException:  # nobody but the caller of a checkpoint that begins gives the lock back
            self.store.write_lock.release()
            raise

    def weights_loaded(self) -> None:
        """Makes the stage's own parameters train again, and no others."""
        self.tuner.arm(training=True)  # loading turns everything in the adapter on, and the prefix off

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; metrics of a stage carry its name, and steps count over the whole plan."""
        if self._order is None:
            super().log(logs, *args, **kwargs)
            return
        name = self._order.stage.name
        named = {
            f"eval_{name}/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"{name}/{key}": value
            for key, value in logs.items()
        }
        self.state.global_step += self._order.steps_before
        try:
            with kept_generators():
                super().log(named, *args, **kwargs)
        finally:
            self.state.global_step -= self._order.steps_before

    # ---- processes ----

    def _on_main(self, function: Callable[[], Any]) -> Any:
        return on_main_process(self.args, function)


def _mixing(function: str) -> Exception:
    """What a function is told that makes a row out of several."""
    return DatasetError(
        f"`{function}` prepares a row otherwise alone than in a batch with others, so that prepared rows hold "
        "something of other examples (a completion, a length to pad to), in whatever slice these lie. Deleting "
        "one would leave it in others. Prepare rows one by one, pad in the collator, or choose a loss "
        "that needs no other rows."
    )


def _drawn_beyond(error: IndexError, order: StageOrder) -> Exception:
    """What an index error of a loader means."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not any("torch" in Path(file).parts and "data" in Path(file).parts for file in files):
        return error
    return IsolationError(
        f"A sampler drew a row that stage {order.stage.name} does not have ({error}): its length is that of the whole "
        "train set or of another stage. Make it anew from `self.train_dataset` in `_get_train_sampler` or "
        "`get_train_dataloader`."
    )


def _summary(outputs: Mapping[Stage, TrainOutput]) -> TrainOutput:
    steps = sum(output.global_step for output in outputs.values())
    loss = sum(output.training_loss * output.global_step for output in outputs.values()) / max(steps, 1)
    return TrainOutput(steps, loss, {f"{stage.name}/loss": out.training_loss for stage, out in outputs.items()})


class S3TTrainer(S3TMixin, Trainer):
    """[`~transformers.Trainer`] that can forget; see [`S3TMixin`] for its arguments.

    Example:

        ```py
        config = S3TConfig(task_type="CAUSAL_LM", num_slices=4, target_modules="all-linear")
        trainer = S3TTrainer(model, TrainingArguments("out"), train_dataset=dataset, peft_config=config)
        trainer.train()
        trainer.delete(ids=["row-17"])
        trainer.train()  # repairs
        ```
    """
