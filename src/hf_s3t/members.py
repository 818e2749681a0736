"""Several adapters of one model answer one batch together: the forward pass of an ensemble.

```
        rows of the batch   0 1 | member 0    the trunk below the lowest layer that any member has LoRA in
  layer 7  ●   ●   ●        0 1 | member 1    is the same for all members: it runs once, on the rows of the batch.
  layer 6  ●   ●   ○        0 1 | member 2    From there on every member has a group of rows of its own.
  layer 5  ● ──○───○── rows are repeated here
  layer 4  ○   ○   ○        0 1               ● LoRA   ○ none
```

The base model's `forward` is replaced while a [`Members`] is attached to it, so that whatever is written for the base
(`generate`, pipelines) asks all members and receives their average. PEFT's `adapter_names` says which row is whose.
Where a layer can not take them, members answer in turn instead. Which tensors a member has is for `slots.py`.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import DynamicCache
from transformers.modeling_outputs import ModelOutput

from .layout import split_layer_path

Combine = Literal["probabilities", "logits"]
Hook = tuple[tuple[Any, ...], dict[str, Any]] | None

PER_ROW = {"hidden_states", "attention_mask", "position_ids", "position_embeddings", "encoder_hidden_states",
           "encoder_attention_mask"}  # fmt: skip
NOT_PER_ROW = {"past_key_values", "layer_past", "use_cache", "output_attentions", "cache_position"}
"""Arguments of a layer that are known to have a row per example, or to be none of their business."""

WHOLE = {"cache_position", "logits_to_keep"}
"""Arguments of a model whose tensors have no row per example, whatever their shape."""

OTHER_ROWS = {"deberta-v2", "led", "longformer", "xlnet"}
"""Models with layers whose first dimension is not the batch: of positions, or of chunks of the sequence."""

HEADS_BY_ROW = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What PEFT can run with a head per row."""


class Members:
    """Makes a model answer as the average of some of its adapters.

    Args:
        model ([`~peft.PeftModel`]): holds the adapters.
        combine (`"probabilities"` or `"logits"`): what is averaged.
    """

    def __init__(self, model: Any, combine: Combine = "probabilities"):
        if combine not in ("probabilities", "logits"):
            raise ValueError(f"combine must be 'probabilities' or 'logits', not {combine!r}.")
        self.combine = combine
        self.base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.names: tuple[str, ...] = ()
        self.weights: tuple[float, ...] | None = None
        self.lowest_layer = self.trunk = 0
        self._told = False  # PEFT's layers, whether adapters are on and which one is active
        self._turn = threading.Lock()
        self._attach()

    # ---- the model's forward, replaced ----

    def _attach(self) -> None:
        self._lora = {name: module for name, module in self.base.named_modules() if isinstance(module, LoraLayer)}
        self._heads = [module for module in self.base.modules() if isinstance(module, ModulesToSaveWrapper)]
        places = [place for place in map(split_layer_path, self._lora) if place is not None]
        self._layers = list(self.base.get_submodule(places[0][0]).children()) if places else []
        self.batched = self._rows_are_known()
        self._shareable = self.batched and self._trunk_is_shared()
        self._had_own_forward = "forward" in vars(self.base)
        self._forward = self.base.forward
        parameters = inspect.signature(self._forward).parameters.values()
        self._positional = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> ModelOutput:
            return self._answer(*args, **kwargs)

        self.base.forward = forward
        hook = partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        self._hooks = [hook(layer, partial(self._enter, index)) for index, layer in enumerate(self._layers)]
        for name, module in self._lora.items():
            place = split_layer_path(name)
            self._hooks.append(hook(module, partial(self._name_rows, -1 if place is None else place[1])))
            if type(module) is Linear:
                module._mixed_batch_forward = partial(self._by_views, module)
        self._hooks += [hook(module, partial(self._name_rows, len(self._layers))) for module in self._heads]

    def detach(self) -> None:
        """Gives the model its own forward back."""
        for hook in self._hooks:
            hook.remove()
        for module in self._lora.values():
            vars(module).pop("_mixed_batch_forward", None)
        if self._had_own_forward:
            self.base.forward = self._forward
        else:
            del self.base.forward

    def _rows_are_known(self) -> bool:
        """Whether every layer with LoRA, and every head, takes an adapter per row, and rows are what it sees."""
        if self.base.config.model_type in OTHER_ROWS:
            return False
        by_sequence = "ForSequenceClassification" in type(self.base).__name__
        if by_sequence and getattr(self.base.config, "pad_token_id", None) is None:
            return False  # decoders refuse more than one row without a padding token
        by_row = all(hasattr(module, "_mixed_batch_forward") for module in self._lora.values())
        # A number further down the path is an expert's, which sees some of the tokens only, in an order of its own.
        places = [split_layer_path(name) for name in self._lora]
        whole = all(place is not None and split_layer_path(place[2]) is None for place in places)
        return by_row and whole and all(isinstance(head.original_module, HEADS_BY_ROW) for head in self._heads)

    def _trunk_is_shared(self) -> bool:
        """Whether the arguments of the layers are known well enough to hand them some of the rows."""
        if getattr(self.base.config, "_attn_implementation", None) == "flex_attention":
            return False  # its mask is no tensor
        order = [module for module in self.base.modules() if module in self._layers or module in self._heads]
        if order and order[0] in self._heads:
            return False  # embeddings, say, that are a member's own
        known = PER_ROW | NOT_PER_ROW | {"self", "kwargs"}
        return all(set(inspect.signature(type(layer).forward).parameters) <= known for layer in self._layers)

    def serve(self, names: Sequence[str], lowest_layer: int, weights: Sequence[float] | None = None) -> None:
        """Says who answers from now on; nothing may be answering meanwhile.

        Args:
            names (`list[str]`): adapters; empty: the bare base model answers.
            lowest_layer (`int`): no member has LoRA below it.
            weights (`list[float]`, *optional*): what each counts in the average, above 0. `None`: all the same.
        """
        switched, self.names, self.lowest_layer = bool(names) != bool(self.names), tuple(names), lowest_layer
        self.weights = None if weights is None else tuple(weights)
        self.trunk = lowest_layer if self._shareable else 0
        for module in [*self._lora.values(), *self._heads] if switched or not self._told else ():
            module.enable_adapters(bool(names))
            if names:
                module.requires_grad_(False)
        if len(names) == 1 or (names and not self._told):
            self._activate(names[0])
        self._told = True

    def _activate(self, name: str) -> None:
        for module in self._lora.values():
            module.set_adapter([name], inference_mode=True)
        for module in self._heads:
            module.set_adapter(name, inference_mode=True)

    # ---- answering ----

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.names) < 2:
            return self._forward(*args, **kwargs)
        self.refuse_encoder_decoder()
        kwargs |= zip(self._positional, args, strict=False)
        labels, items = kwargs.pop("labels", None), kwargs.pop("num_items_in_batch", None)
        by_token = kwargs.pop("fused_lm_head", False)  # how TRL's SFTTrainer asks, since 1.16
        as_tuple, kwargs["return_dict"] = kwargs.pop("return_dict", None) is False, True
        output = self._together(kwargs) if self.batched else self._in_turn(kwargs)
        if by_token:
            return _by_token(output["logits"], labels)
        if labels is not None:
            output["loss"] = self._loss(output["logits"], labels, items)
        return output.to_tuple() if as_tuple else output

    def refuse_encoder_decoder(self) -> None:
        """Raises `ValueError` for several members of a model whose encoder runs apart from what is asked of it."""
        if self.base.config.is_encoder_decoder:
            raise ValueError(
                "Several members of an encoder-decoder model can not answer together. Serve one prefix of the store "
                "at a time (`store.export(path, prefix=...)`)."
            )

    def _together(self, kwargs: dict[str, Any]) -> ModelOutput:
        rows = len(self._main_input(kwargs))
        count = len(self.names)
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and name not in WHOLE and value.ndim and len(value) == rows:
                kwargs[name] = value.repeat(count, *[1] * (value.ndim - 1))
        output = self._forward(**kwargs)
        return self._combined(output, lambda name: output[name].unflatten(0, (count, rows)))

    def _in_turn(self, kwargs: dict[str, Any]) -> ModelOutput:
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(self.base.config, "use_cache", False)
        if "past_key_values" in self._positional and wanted:
            kwargs["use_cache"] = True
            cache = kwargs.get("past_key_values") or self.cache()
            if not isinstance(cache, MemberCache):
                raise ValueError(
                    "These members answer in turn, each with a cache of its own: give no past_key_values."
                )
            kwargs["past_key_values"] = cache
        outputs = []
        with self._turn:  # which adapter is active is a property of the model, not of the call
            for turn, name in enumerate(self.names):
                self._activate(name)
                if isinstance(kwargs.get("past_key_values"), MemberCache):
                    kwargs["past_key_values"].turn(turn)
                outputs.append(self._forward(**kwargs))
        return self._combined(outputs[0], lambda name: torch.stack([output[name] for output in outputs]))

    def _main_input(self, kwargs: dict[str, Any]) -> torch.Tensor:
        for name in (self.base.main_input_name, "inputs_embeds"):
            if kwargs.get(name) is not None:
                return kwargs[name]
        return next(value for value in kwargs.values() if isinstance(value, torch.Tensor))

    def _combined(self, output: ModelOutput, members: Any) -> ModelOutput:
        """The output with logits of `members(name)`, `(members, batch, ...)`, averaged; only they and the cache are
        the ensemble's."""
        problem = getattr(self.base.config, "problem_type", None)
        values = {name: value for name, value in output.items() if name == "past_key_values"}
        for name in output:
            if name == "logits" or name.endswith("_logits"):
                values[name] = average_logits(members(name), self.combine, problem, self.weights)
        return type(output)(**values)

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, items: Any) -> torch.Tensor:
        if "ForMultipleChoice" in type(self.base).__name__:  # transformers has no loss by that name
            return cross_entropy(logits, labels)
        kwargs = {"logits": logits, "labels": labels, "config": self.base.config, "pooled_logits": logits}
        if items is not None:
            kwargs["num_items_in_batch"] = items
        return self.base.loss_function(**kwargs, vocab_size=getattr(self.base.config, "vocab_size", None))

    def cache(self) -> MemberCache:
        """An empty key-value cache for a generation of these members."""
        layers = len(self._layers)
        copies = [1 if index < self.trunk or not self.batched else len(self.names) for index in range(layers)]
        return MemberCache(self.base.config, copies, turns=1 if self.batched else len(self.names))

    # ---- rows ----

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Before a layer: takes one member's rows in the trunk, and repeats them for all members where it ends."""
        count = len(self.names)
        if not self.batched or count < 2 or index > self.trunk or self.trunk == 0:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == self.trunk:
            hidden = hidden.repeat(count, *[1] * (hidden.ndim - 1))
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
        rows = len(hidden) // count if index == 0 else len(hidden)
        cut = partial(_first_member, rows, count)
        return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}

    def _name_rows(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Before a layer with LoRA or a head: says which adapter each row is for."""
        count = len(self.names)
        if not self.batched or count < 2:
            return None
        rows = len(args[0])
        if index < self.trunk:
            names = ["__base__"] * rows
        else:
            names = [name for name in self.names for _ in range(rows // count)]
        return args, {**kwargs, "adapter_names": names}

    def _by_views(
        self, module: Any, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """PEFT's forward with an adapter per row, for rows of a member that lie together: it gathers and scatters them
        by index, which costs up to a third of the whole forward pass; views of them give the same bits."""
        result = module.base_layer(x, *args, **{name: kwargs[name] for name in kwargs.keys() - VARIANT_KWARG_KEYS})
        if adapter_names[0] == "__base__":
            return result
        rows = len(x) // len(self.names)
        for turn, name in enumerate(self.names):
            if name in module.lora_A:
                own = slice(turn * rows, (turn + 1) * rows)
                lora_a, lora_b = module.lora_A[name], module.lora_B[name]
                update = lora_b(lora_a(module.lora_dropout[name](x[own].to(lora_a.weight.dtype))))
                result[own] += (update * module.scaling[name]).to(result.dtype)
        return result


def _first_member(rows: int, count: int, value: Any) -> Any:
    """The first member's rows of what has rows for all; a table of floats has none, whatever its length."""
    if isinstance(value, tuple):
        return tuple(_first_member(rows, count, part) for part in value)
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == rows * count:
        return value[:rows] if value.ndim > 2 or not value.is_floating_point() else value
    return value


def average_logits(
    members: torch.Tensor, combine: Combine, problem: str | None = None, weights: Sequence[float] | None = None
) -> torch.Tensor:
    """The logits of an ensemble.

    Args:
        members (`torch.Tensor`): `(members, batch, ..., classes)`.
        combine (`"probabilities"` or `"logits"`): `log(mean(softmax(logits)))`, or the mean of the logits.
        problem (`str`, *optional*): the config's `problem_type`; with several labels each has a probability of its
            own, and a regression's values are averaged as they are.
        weights (`list[float]`, *optional*): what each member counts, above 0. `None`: all the same.

    Returns:
        `torch.Tensor`: `(batch, ..., classes)`.
    """
    shares = None
    if weights is not None:
        shares = torch.tensor(weights, device=members.device).view(-1, *[1] * (members.ndim - 1)) / sum(weights)
    if combine == "logits" or problem == "regression" or members.shape[-1] == 1:
        return members.mean(dim=0) if shares is None else (members * shares).sum(dim=0).to(members.dtype)
    members = members.float()
    logs = 0.0 if shares is None else shares.log()
    if problem == "multi_label_classification":
        return (logsigmoid(members) + logs).logsumexp(dim=0) - (logsigmoid(-members) + logs).logsumexp(dim=0)
    if shares is None:
        return members.log_softmax(-1).logsumexp(dim=0) - math.log(len(members))
    return (members.log_softmax(-1) + logs).logsumexp(dim=0)


def _by_token(logits: torch.Tensor, labels: Any) -> ModelOutput:
    """Instead of logits what TRL's fused head gives per predicted token; zero where there is no label."""
    log_probabilities, wanted = logits[:, :-1].float().log_softmax(-1), labels[:, 1:]
    mask = wanted != -100
    values = {
        "log_probs": log_probabilities.gather(-1, wanted.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_probabilities.exp() * log_probabilities).sum(-1),
        "is_top1": log_probabilities.argmax(-1) == wanted,
    }
    return ModelOutput(**{name: value.masked_fill(~mask, 0) for name, value in values.items()}, label_mask=mask)


class MemberCache(DynamicCache):
    """A key-value cache of several members, whose rows beam search reorders within each member.

    Args:
        config (`PreTrainedConfig`): the base model's.
        copies (`list[int]`): per layer, how many members have rows in it: one in the shared trunk.
        turns (`int`): number of caches, where members answer in turn.
    """

    layers: list[Any]

    def __init__(self, config: Any, copies: Sequence[int], turns: int = 1):
        super().__init__(config=config)
        self.copies = copies
        self._turns = [self.layers, *(DynamicCache(config=config).layers for _ in range(turns - 1))]

    def turn(self, turn: int) -> None:
        """Makes the cache that of one member, where members answer in turn."""
        self.layers = self._turns[turn]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorders each member's rows alike; `beam_idx` has one number per row of the batch."""
        for layers in self._turns:
            for layer, copies in zip(layers, self.copies, strict=True):
                shifts = len(beam_idx) * torch.arange(copies, device=beam_idx.device)
                layer.reorder_cache((shifts[:, None] + beam_idx).flatten())

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens from every member's cache."""
        for layers in self._turns:
            for layer in layers:
                layer.crop(tokens_to_remove)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Not supported: which rows stay differs from layer to layer."""
        raise ValueError(
            "Rows can not be selected from the cache of several members. Use another generation strategy."
        )
