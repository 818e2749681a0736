"""What a trainer does with what it has trained: evaluate and save the served model, delete from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from .deletion import Receipt
from .ensemble import S3TEnsemble, read_members
from .errors import S3TError
from .orders import StageOrder
from .staging import on_main_process
from .store import S3TStore
from .tuner import StageTuner

TrainerBase: Any = Trainer if TYPE_CHECKING else object


class ServedModelMixin(TrainerBase):
    """The part of [`S3TMixin`] that works on the served model."""

    model: Any
    model_wrapped: Any
    store: S3TStore
    tuner: StageTuner
    _order: StageOrder | None
    _members: dict[str, int] | None
    _served_marks: Any = None

    def _marks_now(self) -> Any:
        return self.store.marks() if self.store.exists else None

    def _serve(self) -> None:
        """Puts the served prefixes into the model and activates the first live shard's."""
        self._served_marks = self._marks_now()
        members = on_main_process(self.args, lambda: read_members(self.store) if self.store.exists else {})
        loaded = {
            name: (tuple(adapter.config["layers_to_transform"]), adapter.tensors) for name, adapter in members.items()
        }
        self.tuner.serve(loaded)
        self._members = {name: min(layers) for name, (layers, _) in loaded.items()}
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
        self._set_signature_columns_if_needed()  # of the base model: the ensemble takes whatever it is given
        self.model = self.model_wrapped = ensemble = S3TEnsemble(peft_model, members)
        try:
            yield
        finally:
            ensemble.detach()
            self.model = self.model_wrapped = peft_model
            self.tuner.activate(next(iter(members)))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, of the served model; while a stage trains, of that stage."""
        with self._served_model():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, of the served model."""
        with self._served_model():
            return super().predict(*args, **kwargs)

    def delete(self, ids: Any = (), groups: Any = (), rows: Any = (), slices: Any = (), **kwargs: Any) -> Receipt:
        """Deletes examples from the store and from the model in memory; see [`S3TStore.delete`]."""
        receipt = on_main_process(self.args, lambda: self.store.delete(ids, groups, rows, slices, **kwargs))
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
