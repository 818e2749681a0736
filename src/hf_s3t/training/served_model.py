"""What a trainer does with what it has trained: evaluate and save the served model, delete from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..lora.tuner import StageTuner
from ..seams.trainer import TrainerSeam, kept_generators
from ..serving.ensemble import S3TEnsemble
from ..serving.loading import read_members
from ..store.exports import Export
from ..store.receipts import Receipt
from ..store.status import Location, Status
from ..store.store import S3TStore
from .processes import on_main_process
from .stage_orders import StageOrder

logger = logging.getLogger(__name__)


def _is_data(value: Any) -> bool:
    """Whether something is made of numbers and texts alone."""
    if isinstance(value, Mapping):
        return all(map(_is_data, value.values()))
    if isinstance(value, list | tuple | set):
        return all(map(_is_data, value))
    return value is None or isinstance(value, bool | int | float | str)


def _put_back(owner: Any, name: str, value: Any) -> None:
    """Gives an attribute its old value; a list or a dict that somebody else may hold stays the same object."""
    now = getattr(owner, name)
    if isinstance(now, dict) and isinstance(value, dict):
        now.clear()
        now.update(value)
    elif isinstance(now, list) and isinstance(value, list):
        now[:] = value
    else:
        setattr(owner, name, value)


class ServedModelMixin(TrainerSeam):
    """The part of [`S3TMixin`] that works on the served model."""

    model: Any
    model_wrapped: Any
    eval_dataset: Any
    store: S3TStore
    tuner: StageTuner
    _order: StageOrder | None
    _members: dict[str, int] | None
    _served_marks: Any = None
    _apart = False
    """Whether members are evaluated one by one."""

    def _marks_now(self) -> Any:
        return self.store.marks() if self.store.exists else None

    def _serve(self) -> None:
        """Puts the served prefixes into the model and activates the first live shard's."""
        self._served_marks = self._marks_now()
        members = on_main_process(self.args, lambda: read_members(self.store) if self.store.exists else {})
        self.tuner.serve(members)
        self._members = {name: min(member.config["layers_to_transform"]) for name, member in members.items()}
        self.model_wrapped = self.model

    @contextmanager
    def _served_model(self) -> Iterator[None]:
        """While a stage trains, the model as it stands; otherwise the served model, an ensemble for several shards."""
        if self._order is not None:
            yield
            return
        if self._members is None or on_main_process(self.args, lambda: self._served_marks != self._marks_now()):
            self._serve()
        members = self._members or {}
        if len(members) < 2:
            yield
            return
        peft_model = self.model
        self.settle_columns()  # of the base model: the ensemble takes whatever it is given
        self.model = self.model_wrapped = ensemble = S3TEnsemble(peft_model, members)
        try:
            yield
        finally:
            ensemble.detach()
            self.model = self.model_wrapped = peft_model
            self.tuner.activate(next(iter(members)))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates the served model, as the Trainer does. While a stage trains, evaluates that stage."""
        evaluate = partial(super().evaluate, *args, **kwargs)
        with kept_generators():
            if self._apart:
                return self._evaluate_apart(evaluate)
            try:
                with self._served_model():
                    return evaluate()
            except (AttributeError, TypeError, ValueError) as error:
                if self._order is not None or len(self._members or {}) < 2:
                    raise
                found = self._evaluate_apart(evaluate)  # what ails the set or the metrics is raised here again
                logger.warning(
                    "%s cannot evaluate the ensemble of the shards (%s: %s). It evaluates each shard by itself, and "
                    "reports the means of their metrics", type(self).__name__, type(error).__name__, error,
                )  # fmt: skip
                self._apart = True
                return found

    def _evaluate_apart(self, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The means over the live shards of what an evaluation gives."""
        with self._served_model():
            members = list(self._members or {})
        try:
            found = []
            for name in members:
                self.tuner.activate(name)
                found.append(evaluate())
        finally:
            self.tuner.activate(members[0])
        return {key: sum(metrics[key] for metrics in found) / len(found) for key in found[0]}

    def try_evaluation(self) -> None:
        """Runs one batch of each evaluation set through the model, so that what cannot be evaluated fails at once."""
        sets = self.eval_dataset
        counted = {name: deepcopy(value) for name, value in vars(self).items() if _is_data(value)}
        with kept_generators():
            for name in sets if isinstance(sets, Mapping) else (None,) if sets is not None else ():
                self.model.eval()
                for batch in self.get_eval_dataloader(name):
                    try:
                        self.prediction_step(self.model, batch, prediction_loss_only=True)
                    except Exception as error:
                        error.add_note("The evaluation set was tried with one batch before the first stage.")
                        raise
                    break
        for name, value in counted.items():  # what a subclass counts for its log
            _put_back(self, name, value)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predicts with the served model, as the Trainer does."""
        with self._served_model(), kept_generators():
            return super().predict(*args, **kwargs)

    def delete(self, ids: Any = (), groups: Any = (), rows: Any = (), slices: Any = (), **kwargs: Any) -> Receipt:
        """Deletes examples from the store and from the model in memory; see [`S3TStore.delete`]."""
        receipt = on_main_process(self.args, lambda: self.store.delete(ids, groups, rows, slices, **kwargs))
        if self._order is None and not kwargs.get("dry_run"):
            self._serve()
        return receipt

    def export(self, path: str | os.PathLike[str], prefix: Any = None, merge: bool = False, **kwargs: Any) -> Export:
        """Writes the served model, or any live prefix, for stock runtimes; see [`S3TStore.export`]."""
        return on_main_process(self.args, lambda: self.store.export(path, prefix, merge, **kwargs))

    def locate(self, ids: Any = (), groups: Any = ()) -> list[Location]:
        """Finds ids and groups, and the live stages that saw them; see [`S3TStore.locate`]."""
        return on_main_process(self.args, lambda: self.store.locate(ids, groups))

    def status(self, **kwargs: Any) -> Status:
        """Tells what is trained, served, missing and deleted; see [`S3TStore.status`]."""
        return on_main_process(self.args, lambda: self.store.status(**kwargs))

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Writes the root adapter and the tokenizer; the store itself holds its root adapter already.

        With `args.push_to_hub` the store is pushed, too.
        """
        if self.in_checkpoint:
            super().save_model(output_dir, *args, **kwargs)
            return
        target = Path(output_dir or self.args.output_dir)
        if self.args.should_save and target.resolve() != self.store.path.resolve():
            self.store.export(target)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(target)
        if self.args.push_to_hub:  # as upstream's
            self.push_to_hub(commit_message="Model save")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The store writes its own card: the Trainer's would name datasets and losses, and replace it."""

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Pushes the store to `args.hub_model_id` in one commit; see [`S3TStore.push`].

        Upstream would upload the folder: in several commits, the private state and optimizer states included.

        Args:
            commit_message (`str`, *optional*): first line of the commit's message.
            blocking (`bool`): `False`: return a future.
            token (`str`, *optional*): `None`: `args.hub_token`, else the one that is logged in.
            revision: must be `None`: a store lives on the main branch, because its deletions change that branch.
            private (`bool`, *optional*): make a new repository private. `None`: `args.hub_private_repo`, else `True`.
            kwargs: ignored: they are for upstream's model card, and the store writes its own.

        Returns:
            `CommitInfo`, a future of it, or `None` on all but the main process.
        """
        if revision is not None or self.args.hub_revision is not None:
            raise ValueError("A store is pushed to the main branch, which its deletions change. Leave `revision` out.")
        if not self.is_world_process_zero():
            return None
        token = token or self.args.hub_token
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, private=private)
        private = self.args.hub_private_repo if private is None else private
        push = partial(
            self.store.push, self.hub_model_id, private is not False, token=token, commit_message=commit_message
        )
        return push() if blocking else HfApi().run_as_future(push)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As upstream's, but a new repository is private unless told otherwise."""
        private = self.args.hub_private_repo if private is None else private
        super().init_hf_repo(token=token, private=private is not False)
