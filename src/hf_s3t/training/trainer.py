"""`S3TTrainer`: a Trainer whose `train()` trains every stage that the store lacks.

One stage is one ordinary `Trainer.train()` on the rows of its prefix. This file prepares model, rows and a fresh
optimizer for one stage after the other, and hands the results to the store; the loop itself, user hooks, checkpoints
and distribution stay the Trainer's.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from ..files import remove
from ..lora.adapter import Adapter
from ..lora.config import S3TConfig
from ..lora.tuner import StageTuner, owned_layers, plain_lora_config
from ..lora.wrapping import wrap_model
from ..plan.tree import Stage
from ..seams.overrides import classes_behind
from ..seams.preparation import watched_preparation
from ..seams.trainer import TrainerSeam, by_name, with_state
from ..store.base_model import public_id
from ..store.recipe import make_recipe, reference_of, steering_by
from ..store.recipe_differences import check_accept
from ..store.slice_sizes import SliceSizes
from ..store.store import S3TStore
from ..trunk.row_states import ActivationCache, check_cache
from .apart import apart_here
from .callbacks import PlanProgressCallback, StageCallbackHandler, StageGuard, StagePrinter
from .carried_along import warn_of_what_stays
from .cost import Meter, cost_line, tell
from .evaluation_rows import check_evaluation
from .marked_rows import MarkedRowsMixin, drawn_beyond
from .processes import check_processes, check_ranks, is_bar_shown, on_main_process
from .reconcile import Missing, Wanted, plan_repair, reconcile, warn_of_other_stacks
from .refusals import Repair, check_repair, refuse_arguments, set_stage_defaults
from .retrain import RetrainingMixin
from .rows import TrainRows
from .rows_apart import RowsApart
from .served_model import ServedModelMixin
from .stage_orders import StageDropped, StageOrder, StoreWatch, commit, next_order, running_folder
from .stage_plan import make_plan, stage_seed
from .trained_stage import TrainedStage, machine, summary
from .trunk_cache import TrunkCache

logger = get_logger(__name__)


class S3TMixin(MarkedRowsMixin, ServedModelMixin, RetrainingMixin):
    """Makes a subclass of [`~transformers.Trainer`] train slice by slice. Put it first among the base classes.

    Args:
        model (`PreTrainedModel`): the base model, or a [`~peft.PeftModel`] made with an [`S3TConfig`].
        args ([`~transformers.TrainingArguments`]): `output_dir` is the store. Epochs, steps, learning rate, scheduler,
            evaluation and saving apply to each stage.
        train_dataset (`Dataset`): as for the Trainer. It is partitioned before tokenisation.
        peft_config ([`S3TConfig`], *optional*): what a stage trains.
        partition_key (`str` or `bytes`, *optional*): decides which slice an example is in. It is written to `.s3t/`
            only. `None`: `HF_S3T_KEY`, else a new random key.
        missing (`"error"`, `"delete"` or `"ignore"`): what to do if examples that were trained on have changed or
            are no longer in the train set. `"delete"` deletes them.
        extend (`bool`): train a stage again if its rows, or those of its parents, are not what the train set has now.
            By default only stages trained from now on see new rows.
        accept_recipe (`Collection[str]`): settings that may differ from the store's, as the [`RecipeError`] names
            them, for example `["arguments.weight_decay"]`. Live stages stay. New stages are influence-free by
            construction and not bit-equal to training from scratch. The store says so from then on.
        base_model_id (`str`, *optional*): the base's id on the Hub, if it was loaded from a local folder.
        activation_cache (`"off"`, `"memory"` or `"disk"`): compute once for each example what enters the layers of a
            stage, and keep it. A stage then runs its own layers and those above. This is part of the recipe: the
            states may differ in their last bits from those in a step's batch.
        activation_cache_gb (`float`, *optional*): the most to keep, in 10^9 bytes. `None`: no limit.
        eval_trunk (`bool`): with a cache, whether the layers below a stage may run without their dropout.
        charts_per_stage (`bool`): whether logged metrics carry the stage's name (`shard-00/0-1/loss`), so that
            trackers draw a chart for each stage. By default all stages share metric names and one global step.
        given: positional arguments, in the order of the Trainer's.
        kwargs: all other arguments of the Trainer.

    Example:

        ```py
        class S3TSFTTrainer(S3TMixin, SFTTrainer): ...
        ```
    """

    stages_by: Callable[[], dict[Stage, TrainOutput]] | None = None
    """Who trains and stores the missing stages in this trainer's place, if anybody does."""
    stage_processes: int | None = None
    """How many processes train a stage there."""

    def __init__(
        self,
        *given: Any,
        peft_config: S3TConfig | None = None,
        partition_key: str | bytes | None = None,
        missing: Missing = "error",
        extend: bool = False,
        accept_recipe: Collection[str] = (),
        base_model_id: str | None = None,
        activation_cache: ActivationCache = "off",
        activation_cache_gb: float | None = None,
        eval_trunk: bool = False,
        charts_per_stage: bool = False,
        **kwargs: Any,
    ):
        kwargs = by_name(classes_behind(type(self), TrainerSeam), given, kwargs)
        model, args, train_dataset = (kwargs.pop(name, None) for name in ("model", "args", "train_dataset"))
        peft_config = peft_config or kwargs.pop("peft_config", None)  # by position
        refuse_arguments(model, args, kwargs, missing)
        if base_model_id is not None:
            validate_repo_id(base_model_id)
        check_accept(accept_recipe)
        set_stage_defaults(args)
        apart = apart_here()
        if apart is not None:
            apart.settle(args)
        self.trunk_cache = TrunkCache(self, activation_cache, activation_cache_gb, eval_trunk)
        self.missing, self.extend, self.accept_recipe = missing, extend, tuple(accept_recipe)
        self.charts_per_stage = charts_per_stage
        self.store = S3TStore(Path(args.output_dir), partition_key)  # a `str` might be the id of a repository
        self.watch = apart or StoreWatch(self.store)
        model, self.s3t_config, self._drawn_heads = wrap_model(model, peft_config, args.seed)
        check_cache(activation_cache, activation_cache_gb, eval_trunk, self.s3t_config, args, model)
        self.base_model_id = base_model_id or public_id(model)
        self.s3t_config.base_model_name_or_path = self.base_model_id
        check_processes(args)
        self._rows, self._given_evaluation = None, kwargs.get("eval_dataset")
        if train_dataset is not None:
            if apart is None:
                key, bar = on_main_process(args, self.store.ensure_key), is_bar_shown(args)
                self._rows = TrainRows(train_dataset, key, self.s3t_config, bar, args.dataloader_num_workers)
            else:
                key = on_main_process(args, partial(secrets.token_bytes, 32))
                self._rows = RowsApart(train_dataset, key, self.s3t_config)
            train_dataset = self._rows.marked(train_dataset)
        with watched_preparation():
            super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        self.tuner = StageTuner(self.model)
        if self._rows is not None:
            self.train_dataset = self._rows.adopt(self.train_dataset)
        self._adopt_callbacks()
        self._order = self._members = None
        self._base_fingerprints: dict[str, str] = {}

    def _adopt_callbacks(self) -> None:
        """Makes the user's callbacks see one run, and adds the guard and our progress bar to them."""
        self.callback_handler = StageCallbackHandler(self.callback_handler, self.args.report_to)
        self.callback_handler.keep_outside(self.args.output_dir)
        self.guard = StageGuard(self.tuner, self._drop_if_hit, self._check_rows)
        self.add_callback(self.guard)
        self.progress = PlanProgressCallback()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self.progress)
        if self.pop_callback(PrinterCallback) is not None:
            self.add_callback(StagePrinter())

    def train(
        self,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        repair: Repair = "all",
        cost_budget: int | None = None,
    ) -> TrainOutput:
        """Trains every stage that the store lacks. A first run, a resumed run and a repair are the same call.

        `repair="best"` leaves the config's plan. It spends at most `cost_budget` slice passes per epoch, over all
        shards, on the stages that add most to the live ones. These stages are the plan from then on, until
        `repair="all"`. See "Plan again at repair" in docs/planning.md.

        Args:
            resume_from_checkpoint (`bool`, *optional*): `None` or `True`: resume a killed stage. `False`: start it
                again. A path is refused.
            trial: refused, because hyperparameter search needs one store per trial.
            ignore_keys_for_eval (`list[str]`, *optional*): as for the Trainer.
            repair (`"all"` or `"best"`, *optional*, defaults to `"all"`): train every missing stage of the config's
                plan, or the best stages for the cost.
            cost_budget (`int`, *optional*): slice passes per epoch over all shards, for `repair="best"` only.

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
            lines = self._on_main(partial(self._open_store, cost_budget))
            logger.info("%s", lines)
            if self.is_world_process_zero() and self.progress.total:
                tell(lines)
            try:
                elsewhere, resume = self.stages_by, resume_from_checkpoint is not False
                outputs = elsewhere() if elsewhere else self._train_missing(resume, ignore_keys_for_eval)
            finally:
                self.trunk_cache.close()
                self.end_workers()
            self._on_main(self._close_store)
        self.callback_handler.end_run(self.args, self.state, self.control)
        self.progress.close()
        self._serve()
        if self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END:
            self.push_to_hub()
        return summary(outputs)

    def recipe(self) -> dict[str, Any]:
        """Every setting of this trainer that changes bits; see [`make_recipe`]."""
        recipe = make_recipe(
            self.s3t_config, self.tuner.layout, self.rows.id_column, self.args, self.model, self.processing_class,
            self.data_collator, self.base_model_id, self._drawn_heads,
            user_code=(self.optimizer_cls_and_kwargs, self.compute_loss_func), cached_trunk=self.trunk_cache.way(),
            steering=steering_by(self.args, with_state(self.callback_handler.callbacks), self.eval_dataset),
            metrics=(self.compute_metrics, self.preprocess_logits_for_metrics),
        )  # fmt: skip
        return {**recipe, **reference_of(self), "processes": self.stage_processes or self.args.world_size}

    def _open_store(self, cost_budget: int | None = None) -> str:
        """Brings store, settings and rows into agreement; tells what is about to be trained, and on how many rows."""
        recipe = self.recipe()
        prior = self.s3t_config.deletion_prior
        wanted_plan = make_plan(self.s3t_config, self.args.seed) if cost_budget is None else None
        wanted = Wanted(recipe, wanted_plan, prior, self.rows, self.missing, self.extend, self.accept_recipe)
        check_evaluation(self.store, self.rows, recipe, (self._given_evaluation, self.eval_dataset))
        with self.store.writing():
            manifest = reconcile(self.store, self.s3t_config, wanted)
        if cost_budget is not None:
            manifest = plan_repair(self.store, cost_budget, prior)
        plan = manifest.plan
        missing = plan.missing(manifest.stages)
        if missing:
            warn_of_other_stacks(self.store, manifest)
            warn_of_what_stays(self, manifest)
        self.progress.begin(Meter.of(self.args, self.s3t_config.replay), missing)
        layout = self.tuner.layout
        numel = sum(self.tuner.stage_numel(owned_layers(self.s3t_config, layout, stage.depth)) for stage in missing)
        line = cost_line(missing, plan, self.progress.meter, 4 * numel / 1e6)
        if not missing:
            return line
        with self.store.reading() as state:
            sizes = SliceSizes.of(self.rows.trained_on(state), self.s3t_config)
        return "\n".join([line, *sizes.lines(None if manifest.stages else self.store.key)])

    def _train_missing(self, resume: bool, ignore_keys_for_eval: list[str] | None) -> dict[Stage, TrainOutput]:
        outputs: dict[Stage, TrainOutput] = {}
        self._base_fingerprints = {}
        if self._on_main(lambda: self.progress.total):
            self.try_evaluation()
        while (order := self._on_main(self._next_order)) is not None:
            try:
                trained = self._train_stage(order, resume, ignore_keys_for_eval)
                self._on_main(partial(self._store_stage, order, trained))
                outputs[order.stage] = trained.output
            except StageDropped:
                logger.warning("stage %s was hit by a deletion: dropped", order.stage.name)
                self._on_main(partial(remove, running_folder(self.store, order.stage)))
        return outputs

    def _next_order(self) -> StageOrder | None:
        self.watch.changed()
        return next_order(self.store, self.rows)

    def _train_stage(self, order: StageOrder, resume: bool, ignore_keys_for_eval: list[str] | None) -> TrainedStage:
        """One stage from its fresh parameters to what is to be stored of it."""
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
                    frozen = self.tuner.frozen_fingerprints(self._base_fingerprints)
                    set_seed(seed)
                    with self.guard.stage(lambda: self.state):
                        output = super().train(checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
                    self.remove_noise()
                    self._base_fingerprints = self.tuner.check_frozen(frozen)
            else:
                self.tuner.empty_stage()
            trained = self._trained(order.stage, output, time.monotonic() - started)
        except IndexError as error:
            raise drawn_beyond(error, order) from error
        finally:
            self._order = self.callback_handler.stage = self._members = self.row_guard = None
            self.is_in_train = False
            self.remove_noise(ended=False)
            self.args.dataloader_drop_last = drop_last
            self.train_dataset, self.data_collator = given
        return trained

    def _trained(self, stage: Stage, output: TrainOutput, seconds: float) -> TrainedStage:
        tensors = self.tuner.stage_tensors()
        layers = owned_layers(self.s3t_config, self.tuner.layout, stage.depth)
        check_ranks(self.args, tensors)
        config = plain_lora_config(self.s3t_config, self.tuner.layout, layers)
        config["auto_mapping"] = self._auto_mapping(stage)
        adapter = Adapter.from_tensors(config, tensors)
        return TrainedStage(adapter, output.global_step, output.training_loss, round(seconds, 3), machine(self.args))

    def _store_stage(self, order: StageOrder, trained: TrainedStage, where: str = "") -> None:
        commit(self.store, order, trained.adapter, order.about | trained.about)
        logger.info("%s%s", trained.line(order.stage, len(order.examples)), where)

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
