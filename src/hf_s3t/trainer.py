"""`S3TTrainer`: a Trainer whose `train()` trains every stage that the store lacks.

One stage is one ordinary `Trainer.train()` on the rows of its prefix. This file decides which stage comes next, prepares
model, rows and a fresh optimizer for it, and hands the result to the store; the loop itself, user hooks, checkpoints
and distribution stay the Trainer's. Which parameters train is for `tuner.py`, what is on disk for `store.py`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import TrainOutput

from . import deletion
from .adapter import Adapter
from .callbacks import PlanProgressCallback, StageCallbackHandler, StageGuard
from .checkpoints import collates_the_same, latest_checkpoint, mark_complete
from .config import S3TConfig
from .deletion import Receipt, versions
from .ensemble import S3TEnsemble, read_members
from .errors import DatasetError, IsolationError, S3TError, StateError
from .files import remove
from .folder import LOCK_SECONDS
from .manifest import Manifest, State, key_check_value
from .partition import Entry, compare, examples_digest, id_source, raw_rows, read_rows, warn_of_empty_slices
from .plan import Stage
from .recipe import check_same, make_recipe
from .staging import make_plan, public_id, refuse_arguments, set_stage_defaults, stage_seed, wrap_model
from .store import S3TStore
from .tuner import StageTuner, Tensors, owned_layers, plain_lora_config, tensor_digest

logger = get_logger(__name__)

DIGEST_COLUMN = "hf_s3t_example"


class StageDropped(Exception):
    """A deletion hit the running stage: it is abandoned without a trace."""


@dataclass(frozen=True)
class StageOrder:
    """What every process needs to train one stage.

    Args:
        stage ([`Stage`]): the stage.
        examples (`tuple[str, ...]`): keyed digests of its examples, slice by slice, ordered by digest.
        parent (`Tensors`, *optional*): the assembled parent prefix.
        generation (`int`): generation of the store when it was given out.
    """

    stage: Stage
    examples: tuple[str, ...]
    parent: Tensors | None
    generation: int


class S3TMixin:
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
        extend (`bool`): train stages again whose slices got new rows. By default only stages trained from now on see
            them.
        base_model_id (`str`, *optional*): the base's id on the Hub, where it was loaded from a local folder.
        kwargs: everything else that the Trainer takes.

    Example:

        ```py
        class S3TSFTTrainer(S3TMixin, SFTTrainer): ...
        ```
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        *,
        peft_config: S3TConfig | None = None,
        partition_key: str | bytes | None = None,
        missing: Literal["error", "delete", "ignore"] = "error",
        extend: bool = False,
        base_model_id: str | None = None,
        **kwargs: Any,
    ):
        refuse_arguments(model, args, kwargs, missing)
        set_stage_defaults(args)
        self.missing, self.extend = missing, extend
        self.store = S3TStore(args.output_dir, partition_key)
        model, self.s3t_config, self._drawn_heads = wrap_model(model, peft_config, args.seed)
        self.base_model_id = base_model_id or public_id(model)
        self.s3t_config.base_model_name_or_path = self.base_model_id
        self._rows: dict[str, Entry] = {}
        self._id_column: str | None = None
        if train_dataset is not None:
            train_dataset = self._partition(train_dataset, args)
        super().__init__(model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, **kwargs)
        self.tuner = StageTuner(self.model)
        self._index_positions()
        self.guard = StageGuard(self.tuner, self._drop_if_hit)
        self.callback_handler = StageCallbackHandler(self.callback_handler, self.args.report_to)
        self.add_callback(self.guard)
        self.progress = PlanProgressCallback()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self.progress)
        self._order: StageOrder | None = None
        self._members: list[str] | None = None
        self._marks: Any = None
        self._steps_before = 0

    # ---- data ----

    def _partition(self, dataset: Any, args: TrainingArguments) -> Any:
        """Finds the slice of every raw row; the keyed digests travel with the rows through what subclasses do."""
        args.device  # noqa: B018  # starts the process group
        key = _on_main_process(args, self.store.ensure_key)
        self.store = S3TStore(args.output_dir, key) if args.world_size > 1 else self.store
        rows = read_rows(dataset, key, self.s3t_config)
        self._rows = dict(rows)
        first = next(iter(raw_rows(dataset)), None)
        self._id_column = id_source(self.s3t_config, list(first)) if first is not None else None
        logger.info("examples are named by %s", self._id_column or "a digest of their raw content")
        self._digests = [digest for digest, _ in rows]
        return dataset.add_column(DIGEST_COLUMN, self._digests) if hasattr(dataset, "add_column") else dataset

    def _index_positions(self) -> None:
        """Maps digests to positions in the train set that the subclass made, which may have dropped rows."""
        self._positions: dict[str, list[int]] = {}
        dataset = self.train_dataset
        if dataset is None:
            return
        if DIGEST_COLUMN in getattr(dataset, "column_names", ()):
            self._digests = dataset.with_format(None)[DIGEST_COLUMN][:]
            dataset = dataset.remove_columns(DIGEST_COLUMN)
        elif len(dataset) != len(self._digests):
            raise ValueError(
                f"{len(self._digests)} rows became {len(dataset)} without the column {DIGEST_COLUMN!r}: it is not known "
                "which row is whose. Keep extra columns in the dataset's preparation, and do not pack examples."
            )
        for position, digest in enumerate(self._digests):
            self._positions.setdefault(digest, []).append(position)
        self.train_dataset = self.full_train_dataset = dataset
        dropped = len(self._rows.keys() - self._positions.keys())
        if dropped:
            logger.warning("%d rows were dropped in the dataset's preparation: known to the index, not trained on", dropped)

    # ---- training ----

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput:
        """Trains every stage that the store lacks: a first run, a resumed run and a repair are the same call.

        Args:
            resume_from_checkpoint (`bool`, *optional*): a killed stage is always resumed; only `None`, `True` and
                `False` are accepted, and `False` starts a killed stage again.
            trial: not supported, as hyperparameter search needs a store per trial.
            ignore_keys_for_eval (`list[str]`, *optional*): as for the Trainer.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: steps and mean loss over the stages trained by this call.

        Raises:
            RecipeError, DatasetError, StateError, StoreLockedError: nothing was trained.
            IsolationError: a stage touched what it does not own.
        """
        if resume_from_checkpoint not in (None, True, False) or trial is not None:
            raise ValueError("`train()` resumes from the store itself; pass no checkpoint path and no trial.")
        if not self._positions:
            raise ValueError("`train()` needs a `train_dataset`.")
        with self._training_lock():
            generation_line = self._on_main(self._open_store)
            logger.info("%s", generation_line)
            outputs = {}
            while (order := self._on_main(self._next_order)) is not None:
                try:
                    output = self._train_stage(order, resume_from_checkpoint is not False, ignore_keys_for_eval)
                except StageDropped:
                    logger.warning("stage %s was hit by a deletion and dropped", order.stage.name)
                    self._on_main(lambda order=order: remove(self._running_dir(order.stage)))
                    continue
                outputs[order.stage] = output
            self._on_main(self._close_store)
        self.callback_handler.end_run(self.args, self.state, self.control)
        self.progress.close()
        self.train_dataset = self.full_train_dataset
        self._serve()
        return _summary(outputs)

    @contextmanager
    def _training_lock(self) -> Iterator[None]:
        """One training per store; a deletion needs another lock and never waits for this one."""
        if not self.is_world_process_zero():
            yield
            return
        with self.store.train_lock.hold(timeout=0):
            yield

    def _open_store(self) -> str:
        """Creates or checks the store, brings the index up to date, and says what is about to be trained."""
        with self.store.writing():
            manifest, state, index = self._read_or_create()
            rows = {digest: entry for digest, entry in self._rows.items() if not _buried(digest, entry, state)}
            comparison = compare(index, rows)
            gone = comparison.missing | comparison.changed
            if gone and manifest.stages and self.missing == "error":
                raise DatasetError(
                    f"{len(comparison.missing)} examples that were trained on are gone from the train set and "
                    f"{len(comparison.changed)} have changed. Stages still hold their influence. Pass missing='delete' "
                    "to delete them now, missing='ignore' to keep their influence, or restore the rows."
                )
            if gone and manifest.stages and self.missing == "delete":
                receipt = self.store.delete(digests=sorted(gone), reference="vanished or changed rows")
                deletion.readmit(self.store, dict.fromkeys(comparison.changed, "id"), "changed rows")
                logger.warning("deleted %d vanished or changed examples: %s", len(gone), receipt.receipt)
                manifest, state, index = self.store.manifest(), self.store.state(), self.store.index()
            if self.extend and comparison.new and manifest.stages:
                hit = {rows[digest][:2] for digest in comparison.new}
                manifest = manifest.without([stage for stage in manifest.stages if stage.slices & hit])
                manifest = self.store.write_root(manifest)
            kept = {digest: entry for digest, entry in index.items() if self.missing == "ignore" or digest in rows}
            merged = {**rows, **kept} if manifest.stages else rows
            if not manifest.stages:
                warn_of_empty_slices(merged, self.store.key, self.s3t_config)
            self.store.write_index(merged)
            self.store.write_state(replace(state, caches=tuple(sorted({*state.caches, *self._cache_files()}))))
            self.store.write_manifest(manifest)
            deletion.sweep(self.store, manifest)
            return self._announcement(manifest)

    def _read_or_create(self) -> tuple[Manifest, State, dict[str, Entry]]:
        key = self.store.key
        recipe = make_recipe(
            self.s3t_config, self.tuner.layout, self._id_column, self.args, self.model, self.processing_class,
            self.data_collator, self.base_model_id, self._drawn_heads,
        )  # fmt: skip
        plan = make_plan(self.s3t_config, self.args.seed)
        if not self.store.exists:
            logger.warning(
                "The private state of this store is in %s. Back it up (`hf-s3t state export`): without it, nobody can "
                "be found again.", self.store.private,
            )  # fmt: skip
            state = State()
            return Manifest(0, state.digest(key), key_check_value(key), recipe, plan), state, {}
        manifest, state = self.store.manifest(), self.store.state()
        check_same(manifest.recipe, recipe)
        if state.generation != manifest.generation or state.digest(key) != manifest.tombstones:
            raise StateError(
                f"The state is of generation {state.generation}, the manifest of {manifest.generation}, or their "
                "tombstones differ: something was deleted elsewhere, and training here would bring it back. Nothing was "
                "trained. Bring the state up to date: `hf-s3t state export` there, `hf-s3t state import` here."
            )
        return replace(manifest, plan=plan), state, self.store.index()

    def _announcement(self, manifest: Manifest) -> str:
        plan, config = manifest.plan, self.s3t_config
        missing = plan.missing(manifest.stages)
        numel = sum(self.tuner.stage_numel(owned_layers(config, self.tuner.layout, stage.depth)) for stage in missing)
        ratio = sum(stage.depth for stage in missing) / (plan.num_shards * plan.num_slices)
        self.progress.total = sum(stage.depth for stage in missing)
        return (
            f"{len(missing)} of {len(plan.stages)} stages to train, {self.progress.total} slice passes = {ratio:.1f} x one "
            f"plain fine-tuning, {4 * numel / 1e6:.1f} MB of stages"
        )

    def _next_order(self) -> StageOrder | None:
        """The first stage that the store lacks, with its rows as they may be used now."""
        with self.store.writing():
            manifest, state = self.store.manifest(), self.store.state()
            missing = manifest.plan.missing(manifest.stages)
            if not missing:
                return None
            stage = missing[0]
            self._marks = self.store.marks()
            parent = None
            if stage.parent is not None:
                parent = self.store.assemble(stage.shard, stage.parent.prefix, manifest).tensors
            return StageOrder(stage, self._examples(stage, state), parent, state.generation)

    def _examples(self, stage: Stage, state: State) -> tuple[str, ...]:
        found = []
        for slice_id in stage.prefix:
            place = (stage.shard, slice_id)
            found += sorted(
                digest
                for digest, entry in self._rows.items()
                if entry[:2] == place and digest in self._positions and not _buried(digest, entry, state)
            )
        return tuple(found)

    def _train_stage(self, order: StageOrder, resume: bool, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        """One stage from its fresh parameters to its place in the store."""
        stage, started = order.stage, time.monotonic()
        seed = stage_seed(self.args.seed, stage)
        self._order = order
        self.callback_handler.stage = stage
        try:
            self.tuner.begin(stage.depth, seed, order.parent)
            self.optimizer = self.lr_scheduler = None
            self.model_wrapped = self.model
            output = TrainOutput(0, 0.0, {})
            if order.examples:
                self.train_dataset = self._subset(order.examples)
                checkpoint = self._on_main(lambda: self._resumable_checkpoint(resume))
                frozen = self.tuner.frozen_digests()
                set_seed(seed)
                output = super().train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
                self.tuner.check_frozen(frozen)
            else:
                self.tuner.zero_stage()
            tensors = self.tuner.stage_tensors()
            self._check_ranks(tensors)
            record = self._record(order, output, time.monotonic() - started)
            self._on_main(lambda: self._commit(order, tensors, record))
        finally:
            self._order = self.callback_handler.stage = None
            self._members = None
            self.is_in_train = False
        self._steps_before += output.global_step
        logger.info(
            "stage %s: layers %s, %d examples, %d trainable parameters, loss %.4f, %.1f s", stage.name,
            list(owned_layers(self.s3t_config, self.tuner.layout, stage.depth)), len(order.examples),
            sum(value.numel() for value in tensors.values()), output.training_loss, record["seconds"],
        )  # fmt: skip
        return output

    def _subset(self, examples: Sequence[str]) -> Any:
        positions = [position for digest in examples for position in self._positions[digest]]
        dataset = self.full_train_dataset
        return dataset.select(positions) if hasattr(dataset, "select") else Subset(dataset, positions)

    def _commit(self, order: StageOrder, tensors: Tensors, record: dict[str, Any]) -> None:
        """Writes the stage, the record before the manifest that makes it count; or drops it, if it was hit."""
        layers = owned_layers(self.s3t_config, self.tuner.layout, order.stage.depth)
        config = plain_lora_config(self.s3t_config, self.tuner.layout, layers)
        config["auto_mapping"] = self._auto_mapping(order.stage)
        with self.store.writing():
            if self._is_hit(order):
                raise StageDropped
            files = self.store.write_stage(order.stage, Adapter(config, tensors))
            state, manifest = self.store.state(), self.store.manifest()
            self.store.write_state(replace(state, stages={**state.stages, order.stage.name: record}))
            self.store.write_manifest(replace(manifest, stages={**manifest.stages, order.stage: files}))
            remove(self._running_dir(order.stage))

    def _auto_mapping(self, stage: Stage) -> dict[str, Any]:
        """PEFT's field for libraries: the base's class, and which stages this one builds on."""
        base = self.model.get_base_model()
        parents = [above.name for above in stage.path[:-1]]
        return {"base_model_class": type(base).__name__, "parent_library": type(base).__module__, "parents": parents}

    def _record(self, order: StageOrder, output: TrainOutput, seconds: float) -> dict[str, Any]:
        return {
            "generation": order.generation,
            "examples": len(order.examples),
            "data": examples_digest(order.examples),
            "steps": output.global_step,
            "seconds": round(seconds, 3),
            "versions": versions(),
        }

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
                "The processes ended the stage with different weights: gradients were not averaged between them. Nothing "
                "was stored. See whether a callback or a loss changes the model on one process only."
            )

    # ---- deletions while a stage trains ----

    def _is_hit(self, order: StageOrder) -> bool:
        if any(order.stage.slices & intent["places"] for intent in self.store.intents()):
            return True
        state = self.store.state()
        stones = [*state.ids.values(), *state.groups.values()]
        return any(
            stone.generation > order.generation and order.stage.slices & set(stone.places) for stone in stones
        )

    def _drop_if_hit(self) -> None:
        """Raises [`StageDropped`] on every process at the same step once an intent covers the running stage."""
        hit = False
        if self._order is not None and self.is_world_process_zero():
            marks = self.store.marks()
            if marks != self._marks:
                hit = self._is_hit(self._order)
                self._marks = marks
        if self.args.world_size > 1:
            flag = torch.tensor([hit], device=self.args.device, dtype=torch.int32)
            torch.distributed.broadcast(flag, 0)
            hit = bool(flag.item())
        if hit:
            raise StageDropped

    # ---- running checkpoints ----

    def _running_dir(self, stage: Stage) -> Path:
        return self.store.private / "running" / stage.name.replace("/", "_")

    def _get_output_dir(self, trial: Any) -> str:
        # The store receives our files only: the Trainer's checkpoints are scratch.
        return str(self._running_dir(self._order.stage)) if self._order else super()._get_output_dir(trial)

    def _checkpoint_mark(self) -> dict[str, Any]:
        assert self._order is not None
        return {"stage": self._order.stage.name, "data": examples_digest(self._order.examples)}

    def _resumable_checkpoint(self, resume: bool) -> str | None:
        """The newest complete checkpoint of the running stage; whatever else lies there is removed."""
        assert self._order is not None
        running = self._running_dir(self._order.stage)
        for other in self.store.private.glob("running/*"):
            if other != running:
                remove(other)
        dataset, size = self.train_dataset, self.args.per_device_train_batch_size
        usable = resume and not self.args.save_only_model and collates_the_same(dataset, self.data_collator, size)
        if not usable:
            remove(running)
            return None
        return latest_checkpoint(running, self._checkpoint_mark())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Under the write lock: a deletion either waits for the checkpoint and then removes it, or comes first.
        self._on_main(self._enter_checkpoint)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                folder = self._running_dir(self._order.stage) / f"checkpoint-{self.state.global_step}"
                mark_complete(folder, self._checkpoint_mark())
        finally:
            if self.is_world_process_zero():
                self.store.write_lock.release()

    def _enter_checkpoint(self) -> None:
        self.store.write_lock.acquire(LOCK_SECONDS)
        if self._is_hit(self._order):
            self.store.write_lock.release()
            raise StageDropped

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.tuner.arm(training=True)  # loading turns everything in the adapter on, and the prefix off

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.tuner.arm(training=True)

    # ---- the served model ----

    def _serve(self) -> None:
        """Puts the served prefixes into the model and activates the first live shard's."""
        members = self._on_main(lambda: read_members(self.store) if self.store.exists else {})
        loaded = {
            name: (tuple(adapter.config["layers_to_transform"]), adapter.tensors) for name, adapter in members.items()
        }
        self.tuner.serve(loaded)
        self._members = list(members)
        self.model_wrapped = self.model

    @contextmanager
    def _served_model(self) -> Iterator[None]:
        """While a stage trains, the model as it stands; otherwise the served model, an ensemble for several shards."""
        if self._order is not None:
            yield
            return
        if self._members is None:
            self._serve()
        if len(self._members or ()) < 2:
            yield
            return
        peft_model = self.model
        self.model = self.model_wrapped = S3TEnsemble(peft_model, self._members)
        try:
            yield
        finally:
            self.model = self.model_wrapped = peft_model
            self.tuner.activate(self._members[0])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, of the served model; while a stage trains, of that stage."""
        with self._served_model():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, of the served model."""
        with self._served_model():
            return super().predict(*args, **kwargs)

    def delete(
        self, ids: Any = (), groups: Any = (), rows: Any = (), slices: Any = (), **kwargs: Any
    ) -> Receipt:
        """Deletes examples from the store and from the model in memory; see [`S3TStore.delete`]."""
        receipt = self._on_main(lambda: self.store.delete(ids, groups, rows, slices, **kwargs))
        if self._order is None and not kwargs.get("dry_run"):
            self._serve()
        return receipt

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the root adapter and the tokenizer; the store itself holds its root adapter already."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        target = Path(output_dir or self.args.output_dir)
        if not self.args.should_save or target.resolve() == self.store.path.resolve():
            return
        self.store.export(target)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(target)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The store writes its own card: the Trainer's would name datasets and losses, and replace it."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: upstream uploads the whole folder, the private state and optimizer states included."""
        raise S3TError("This version can not push a store to the Hub; uploading the folder would publish `.s3t/`.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; metrics of a stage carry its name, and steps count over the whole plan."""
        if self._order is None:
            super().log(logs, start_time)
            return
        name = self._order.stage.name
        named = {
            f"eval_{name}/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"{name}/{key}": value
            for key, value in logs.items()
        }
        self.state.global_step += self._steps_before
        try:
            super().log(named, start_time)
        finally:
            self.state.global_step -= self._steps_before

    # ---- processes ----

    def _on_main(self, function: Callable[[], Any]) -> Any:
        return _on_main_process(self.args, function)

    def _cache_files(self) -> list[str]:
        files = getattr(self.full_train_dataset, "cache_files", None) or ()
        return [record["filename"] for record in files]


def _on_main_process(args: TrainingArguments, function: Callable[[], Any]) -> Any:
    """Runs a function on the main process and gives every process its result, or its error."""
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            if args.world_size == 1:
                raise
            outcome[1] = error
    if args.world_size > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _buried(digest: str, entry: Entry, state: State) -> bool:
    """Whether a tombstone stands for an example or for its group."""
    return digest in state.ids or (entry.group is not None and entry.group in state.groups)


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
