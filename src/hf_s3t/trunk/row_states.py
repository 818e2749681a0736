"""Rows one at a time: what enters a layer for a row alone, and whether that may stand for the row in a batch.

A batch of one, without padding, in eval mode: then the states depend on the row and the base model, and on nothing
else that a deletion could take away. `row_batches.py` computes them faster. What a cache of them cannot serve is
refused here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..lora.config import S3TConfig
from ..seams.arguments import setting
from ..seams.models import LAYER_DROPS, is_encoder_decoder
from ..store.recipe import quantization
from .row_numbers import ROW_NUMBER, NumberingCollator, row_length, without_marks
from .trunk import Trunk, is_close

ActivationCache = Literal["off", "memory", "disk"]

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip

COMPANY = 4
"""Rows that are computed together, once, to see that it makes no difference."""


def check_cache(
    cache: ActivationCache, limit_gb: float | None, eval_trunk: bool, config: S3TConfig, args: Any, model: Any
) -> None:
    """Raises `ValueError` for what an activation cache cannot serve, as far as it is known before the first row."""
    if cache not in ("off", "memory", "disk"):
        raise ValueError(f"`activation_cache` must be 'off', 'memory' or 'disk', got {cache!r}.")
    if cache == "off":
        if limit_gb is not None or eval_trunk:
            raise ValueError(
                "`activation_cache_gb` and `eval_trunk` are about the activation cache, which is off. Pass "
                "activation_cache='disk' or 'memory', too, or leave them out."
            )
        return
    if limit_gb is not None and not limit_gb > 0:
        raise ValueError(f"`activation_cache_gb` must be above 0, got {limit_gb!r}. `None` sets no limit.")
    if config.stage_parameters != "layer_group":
        raise ValueError(
            "An activation cache needs layers without adapters, and with stage_parameters="
            f"{config.stage_parameters!r} every layer has one. Use stage_parameters='layer_group', or "
            "activation_cache='off'."
        )
    if is_encoder_decoder(model):
        raise ValueError("An encoder-decoder model has two trunks. It cannot be cached: use activation_cache='off'.")
    for name in LAYER_DROPS:
        if getattr(model.config, name, 0):
            raise ValueError(
                f"The model's config has `{name}={getattr(model.config, name)!r}`: the layer that cached states enter "
                f"would be left out at times. Load the model with `{name}=0`, or use activation_cache='off'."
            )
    refusals = {
        "neftune_noise_alpha": "it adds noise to the embeddings, below what is cached",
        "padding_free": "it joins the rows of a batch",
    }
    for name, reason in refusals.items():
        if setting(args, name):
            raise ValueError(
                f"An activation cache does not work with `{name}={getattr(args, name)!r}`: {reason}. Leave it out, or "
                "use activation_cache='off'."
            )


class AloneRows:
    """The rows of the stage that a trainer is about to train, each alone."""

    def __init__(self, trainer: Any, trunk: Trunk, collator: NumberingCollator):
        self.trainer, self.trunk, self.collator = trainer, trunk, collator
        self.loader = trainer.get_train_dataloader()
        self._positions = {number: position for position, number in enumerate(trainer.train_dataset.numbers)}

    def batch(self, *numbers: int) -> Any:
        """Rows as the collator makes a batch of them: one row, or some together."""
        return self.loader.collate_fn([self.loader.dataset[self._positions[number]] for number in numbers])

    def digest(self, batch: Any) -> str:
        """By what the row of a batch of one is known."""
        return self.collator.digest(batch, 0, 1)

    def inputs(self, batch: Any) -> dict[str, Any]:
        """A batch where the model is."""
        return send_to_device(dict(without_marks(batch)), self.trainer.args.device)

    def states(self, batch: Any, layers: Sequence[int], start: int = 0, given: Any = None) -> dict[int, torch.Tensor]:
        """What enters some layers of a batch of one, each `(positions, hidden)`; the model has to be in eval mode.

        The model starts at layer `start`, with what is `given` to enter there.
        """
        with self.trainer.accelerator.autocast():
            seen = self.trunk.states(self.inputs(batch), layers, start, None if given is None else [given])
        for states in seen.values():
            if states.ndim != 3 or len(states) != 1:
                reason = "Several sequences per row" if states.ndim == 3 else "Layers that pass on something else"
                raise ValueError(
                    f"Of one row, states of shape {tuple(states.shape)} enter a layer; (1, positions, hidden) was "
                    f"expected. {reason} cannot be cached: use activation_cache='off'."
                )
        return {layer: states[0] for layer, states in seen.items()}

    def lengths(self, numbers: Sequence[int]) -> list[int]:
        """Positions that rows take in the model, of whatever stage; the model has to be in eval mode."""
        rows, mark = self.trainer.rows.dataset, self.trainer.train_dataset.mark
        batches = [self.loader.collate_fn([{**rows[number], ROW_NUMBER: mark(number)}]) for number in numbers]
        return [len(self.states(batch, [0])[0]) for batch in batches]

    def company(self, numbers: Sequence[int]) -> list[int]:
        """A few of some rows, from the shortest to the longest."""
        ordered = sorted(numbers, key=lambda number: row_length(self.digest(self.batch(number))))
        last = len(ordered) - 1
        return [ordered[position * last // (COMPANY - 1)] for position in range(COMPANY)] if last else ordered


def check_model(rows: AloneRows, numbers: Sequence[int], entrance: int, eval_trunk: bool) -> None:
    """Raises `ValueError` unless some rows have the same states alone and together, and in training, too.

    With `eval_trunk` they may differ in training. The states have to be all that the layers above depend on.
    """
    trunk, trainer = rows.trunk, rows.trainer
    batches = [rows.batch(number) for number in numbers]
    rows.collator.expected = dict(zip(numbers, map(rows.digest, batches), strict=True))
    together = rows.inputs(rows.batch(*numbers))
    _check_heads(rows, batches[0], entrance)
    with trunk.evaluating():
        alone = [rows.states(batch, [entrance])[entrance] for batch in batches]
    if not eval_trunk:
        _check_not_random(rows, batches, entrance, alone)
    one = rows.inputs(batches[0])
    with trunk.evaluating(), torch.no_grad(), trainer.accelerator.autocast():
        company = trunk.states(together, [entrance])[entrance]
        unfed = trainer.model(**trunk.taken(one))
        with trunk.fed(entrance, alone[:1], one):
            fed = trainer.model(**trunk.taken(one))
    bound = closeness(rows, alone[0])
    if not all(is_close(found[: len(states)], states, bound) for found, states in zip(company, alone, strict=True)):
        raise ValueError(
            "What enters a layer depends on the other rows of a batch, so it cannot be cached. A "
            "collator without attention mask may be the reason; otherwise use activation_cache='off'."
        )
    if not all(is_close(*pair, bound) for pair in zip(_tensors(fed), _tensors(unfed), strict=True)):
        raise ValueError(
            f"What enters layer {entrance} is not all that the layers above depend on: fed with it, the model gives "
            "something else. It cannot be cached: use activation_cache='off'."
        )


def _check_heads(rows: AloneRows, batch: Any, entrance: int) -> None:
    base = rows.trunk.base
    heads = [base.get_submodule(head) for head in rows.trainer.tuner.layout.heads]
    hooks = [head.register_forward_pre_hook(_refuse_head) for head in heads]
    try:
        with rows.trunk.evaluating():
            rows.states(batch, [entrance])
    finally:
        for hook in hooks:
            hook.remove()


def _check_not_random(rows: AloneRows, batches: list[Any], entrance: int, alone: list[torch.Tensor]) -> None:
    with rows.trunk.evaluating(random=True), torch.random.fork_rng():
        again, once_more = ([rows.states(batch, [entrance])[entrance] for batch in batches] for _ in range(2))
    if _equal(again, alone):
        return
    if _equal(again, once_more):
        raise ValueError(
            "The trunk computes differently in training and in eval mode, always in the same way (another kernel?). "
            "Pass `eval_trunk=True` to train on a trunk that runs in eval mode, or use activation_cache='off'."
        )
    raise ValueError(
        "The trunk is random in training (dropout, layer drop or augmentation), so its states differ from epoch "
        "to epoch. Pass `eval_trunk=True` to train on a trunk that runs in eval mode, set its dropout to 0 in the "
        "model's config, or use activation_cache='off'."
    )


def _equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def _refuse_head(module: Any, args: Any) -> None:
    raise ValueError(
        f"`modules_to_save` names {type(module).__name__}, which lies below the layers: what enters them is then a "
        "stage's own. Leave it out, or use activation_cache='off'."
    )


def closeness(rows: AloneRows, states: torch.Tensor) -> float:
    """By which share of their size states may differ in a batch of another shape."""
    return 1e-4 if _is_exact(rows, states) else 0.03


def _is_exact(rows: AloneRows, states: torch.Tensor) -> bool:
    """Whether all of a trunk computes in 32 bits or more: then a batch of another shape moves the last bits only."""
    base, matmul = rows.trunk.base, torch.backends.cuda.matmul
    if rows.trainer.accelerator.mixed_precision != "no" or quantization(base) is not None:
        return False
    setting = getattr(matmul, "fp32_precision", None)  # torch 2.9 and later
    tf32 = matmul.allow_tf32 if setting is None else setting not in ("none", "ieee")
    if rows.trainer.args.device.type != "cpu":  # cuDNN takes TF32 for convolutions unless told otherwise
        tf32 |= any(isinstance(module, CONVOLUTIONS) for module in base.modules())
    return states.itemsize >= 4 and not tf32


def _tensors(output: Any) -> list[torch.Tensor]:
    values = output.values() if isinstance(output, Mapping) else output
    return [value for value in values if isinstance(value, torch.Tensor)]
