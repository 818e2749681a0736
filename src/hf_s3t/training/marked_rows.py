"""The rows of a stage on their way to a step: marked when they are handed over, looked at before the model sees them.

Marks and the guard that reads them are `trunk/row_numbers.py`'s; where states are cached, `trunk_cache.py` feeds them.
"""

from __future__ import annotations

import traceback
from copy import copy
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from ..errors import IsolationError
from ..lora.tuner import StageTuner
from ..trunk.row_numbers import ROW_NUMBER, MarkingCollator, NumberedRows, RowGuard, without_marks
from .rows import TrainRows
from .running_stage import RunningStageMixin
from .stage_orders import StageOrder
from .trunk_cache import TrunkCache

logger = get_logger(__name__)


class MarkedRowsMixin(RunningStageMixin):
    """The part of [`S3TMixin`] by which rows keep their marks on the way to a step, and are looked at there."""

    tuner: StageTuner
    trunk_cache: TrunkCache
    train_dataset: Any
    data_collator: Any
    row_guard: RowGuard | None = None
    _rows: TrainRows | None
    _mask_moved = False

    @property
    def rows(self) -> TrainRows:
        """The partitioned train set."""
        assert self._rows is not None
        return self._rows

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
                "is set, because otherwise the stage would not be trained", order.stage.name, len(rows), batch,
            )  # fmt: skip

    def weights_loaded(self) -> None:
        """Makes the stage's own parameters train again, and no others."""
        self.tuner.arm(training=True)  # loading turns everything in the adapter on, and the prefix off

    def _check_rows(self) -> None:
        if self.row_guard is not None:
            self.row_guard.check_step()

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; rows are fetched without the columns that no batch has."""
        rows = self.train_dataset
        if isinstance(rows, NumberedRows) and hasattr(rows.rows, "column_names"):
            self.train_dataset = rows.of(self.without_unused_columns(rows.rows))
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def rows_to_draw(self, rows: Any) -> Any:
        """What the sampler would see without marks."""
        return rows.rows if isinstance(rows, NumberedRows) else rows

    def more_columns(self) -> list[str]:
        """The column of the rows' marks."""
        return [ROW_NUMBER]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's, on rows of the stage alone; where states are cached the model starts at their layer."""
        if self.row_guard is None:
            return super().training_step(model, without_marks(inputs), *args, **kwargs)
        inputs = copy(inputs)  # the marks are taken out of it
        numbers = self.row_guard.take(inputs)
        self._hold_mask()
        with self.trunk_cache.feeding(inputs, numbers):
            return super().training_step(model, inputs, *args, **kwargs)

    def _hold_mask(self) -> None:
        """Nothing but what the stage owns trains, whatever happened since the last step."""
        if self.tuner.hold_mask() and not self._mask_moved:
            self._mask_moved = True
            logger.warning(
                "stage %s: something (a callback, a loss, `set_adapter`) changed which parameters train or which "
                "adapters answer. That was put right before the step; take it out.", self.order.stage.name,
            )  # fmt: skip

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; a callback may evaluate on rows of the train set."""
        return super().prediction_step(model, without_marks(inputs), *args, **kwargs)


def drawn_beyond(error: IndexError, order: StageOrder) -> Exception:
    """What an index error of a loader means."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if not any("torch" in Path(file).parts and "data" in Path(file).parts for file in files):
        return error
    return IsolationError(
        f"A sampler drew a row that stage {order.stage.name} does not have ({error}): its length is that of the whole "
        "train set or of another stage. Make it anew from `self.train_dataset` in `_get_train_sampler` or "
        "`get_train_dataloader`."
    )
