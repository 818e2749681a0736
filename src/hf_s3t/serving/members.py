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

Whether a model can do that is found out by trying (`trial.py`), never by the names of its class or arguments. Where
rows of one batch cannot be told apart, members answer in turn.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput

from ..seams.answering import FUSED_HEAD, caches_in, check_logits, check_one_dimension, loss_of, taken_labels
from .averages import Combine, average_logits, by_token
from .member_cache import MemberCache
from .member_rows import MemberRows
from .trial import Trial


class Members(MemberRows):
    """Makes a model answer as the average of some of its adapters."""

    def __init__(self, model: Any, combine: Combine = "probabilities"):
        if combine not in ("probabilities", "logits"):
            raise ValueError(f"combine must be 'probabilities' or 'logits', not {combine!r}.")
        super().__init__(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.combine = combine
        self.lowest_layer = 0
        self.shares_trunk: bool | None = None  # `None`: not tried yet, as there was none to share
        self.cache_name: str | None = None
        self.tried = False
        self._told = False  # PEFT's layers, whether adapters are on and which one is active
        self._turn = threading.RLock()
        self._had_own_forward = "forward" in vars(self.base)
        self._forward = self.base.forward
        parameters = inspect.signature(self._forward).parameters
        self.parameters = [name for name, parameter in parameters.items() if parameter.kind != parameter.VAR_KEYWORD]

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> ModelOutput:
            return self._answer(*args, **kwargs)

        self.base.forward = forward

    def detach(self) -> None:
        """Gives the model its own forward back."""
        super().detach()
        if self._had_own_forward:
            self.base.forward = self._forward
        else:
            del self.base.forward

    def serve(self, names: Sequence[str], lowest_layer: int) -> None:
        """Says which adapters answer from now on, and below which layer none of them has LoRA.

        Without any, the bare base model answers. Nothing may be answering meanwhile.
        """
        switched, self.names, self.lowest_layer = bool(names) != bool(self.names), tuple(names), lowest_layer
        self.share(bool(self.shares_trunk))
        if switched or not self._told:
            self.switch(bool(names))
        if len(names) == 1 or (names and not self._told):
            self.activate(names[0])
        self._told = True
        if lowest_layer > 0 and self.shares_trunk is None:
            self.tried = False

    def share(self, shared: bool) -> None:
        """Says whether all members share the layers below the lowest LoRA."""
        self.trunk = self.lowest_layer if shared else 0

    def look(self, inputs: dict[str, Any] | None = None) -> None:
        """Finds out, once, whether several members can answer one batch, and whether they can share the trunk.

        Without `inputs` (see [`Trial.run`]), a model that takes no tokens is tried with its first batch.
        """
        with self._turn:
            if not self.tried and len(self.names) > 1:
                Trial(self).run(inputs)

    # ---- answering ----

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.names) < 2:
            return self._forward(*args, **kwargs)
        self.refuse_encoder_decoder()
        kwargs |= zip(self.parameters, args, strict=False)
        labels, items = taken_labels(kwargs), kwargs.pop("num_items_in_batch", None)
        fused = kwargs.pop(FUSED_HEAD, False)
        as_tuple, kwargs["return_dict"] = kwargs.pop("return_dict", None) is False, True
        if not self.tried:
            self.look(kwargs)
        kwargs = self._with_members_cache(kwargs)
        output = self.together(kwargs) if self.batched else self.in_turn(kwargs)
        if fused:
            return by_token(output["logits"], labels["labels"])
        if labels:
            output["loss"] = loss_of(self.base, output, labels, items)
        return output.to_tuple() if as_tuple else output

    def refuse_encoder_decoder(self) -> None:
        """Raises `ValueError` for several members of a model whose encoder runs apart from what is asked of it."""
        if self.base.config.is_encoder_decoder:
            raise ValueError(
                "Several members of an encoder-decoder model cannot answer together. Serve one prefix of the store "
                "at a time (`store.export(path, prefix=...)`)."
            )

    def _with_members_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with a cache that has rows for every member, where a cache is wanted."""
        given = {name: cache for name, cache in caches_in(kwargs).items() if cache is not None}
        for name, cache in given.items():
            self.check_cache(name, cache)
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(self.base.config, "use_cache", False)
        if given or not wanted or self.cache_name is None:
            return kwargs
        return {**kwargs, **self.new_cache()}

    def check_cache(self, name: str, cache: Any) -> None:
        """Raises `ValueError` for a cache that was not made for these members."""
        if not isinstance(cache, MemberCache):
            raise ValueError(
                f"`{name}` is a cache that has one row per example, an ensemble needs one per member. Leave it out: a "
                "dynamic cache is made for the members, and returned."
            )
        if (cache.copies, cache.turns) != (self._copies, self._turns):
            raise ValueError(
                f"`{name}` is a cache of other members than those that answer now: the store has changed since. Begin "
                "anew without it."
            )

    def together(self, kwargs: dict[str, Any]) -> ModelOutput:
        """The answer to the arguments of a forward pass, in which every member has its rows."""
        rows, count = len(self.main_input(kwargs)), len(self.names)
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and self.is_per_row(name, value, rows):
                kwargs[name] = value.repeat(count, *[1] * (value.ndim - 1))
        output = self._forward(**kwargs)
        return self._combined(output, lambda name: output[name].unflatten(0, (count, rows)))

    def in_turn(self, kwargs: dict[str, Any]) -> ModelOutput:
        """The answer to the arguments of a forward pass that every member makes by itself."""
        caches = [cache for cache in caches_in(kwargs).values() if isinstance(cache, MemberCache)]
        outputs = []
        with self._turn:  # which adapter is active is a property of the model, not of the call
            for turn, name in enumerate(self.names):
                self.activate(name)
                with caches[0].turn(turn) if caches else nullcontext():
                    outputs.append(self._forward(**kwargs))
        return self._combined(outputs[0], lambda name: torch.stack([output[name] for output in outputs]))

    def main_input(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """The argument whose first dimension is that of the rows."""
        for name in (self.base.main_input_name, "inputs_embeds"):
            if kwargs.get(name) is not None:
                return kwargs[name]
        return next(value for value in kwargs.values() if isinstance(value, torch.Tensor))

    @staticmethod
    def is_per_row(name: str, value: torch.Tensor, rows: int) -> bool:
        """Whether an argument has something for each row."""
        if not value.ndim or len(value) != rows:
            return False
        return value.ndim > 1 or check_one_dimension(name, rows)

    def _combined(self, output: ModelOutput, members: Callable[[str], torch.Tensor]) -> ModelOutput:
        """The output with logits of `members(name)`, `(members, batch, ...)`, averaged; only they and the cache are
        the ensemble's."""
        problem = getattr(self.base.config, "problem_type", None)
        check_logits(output)
        values: dict[str, Any] = caches_in(output)
        for name in output:
            if name == "logits" or name.endswith("_logits"):
                values[name] = average_logits(members(name), self.combine, problem)
        return type(output)(**values)

    # ---- the cache ----

    @property
    def _turns(self) -> int:
        return 1 if self.batched else len(self.names)

    @property
    def _copies(self) -> tuple[int, ...]:
        """Per layer, how many members have rows in the cache."""
        count = len(self.names) if self.batched else 1
        return tuple(1 if index < self.trunk else count for index in range(len(self._layers)))

    def new_cache(self) -> dict[str, MemberCache]:
        """An empty key-value cache for these members, by the name that the model gives it; nothing if it has none."""
        if self.cache_name is None:
            return {}
        return {self.cache_name: MemberCache(self.base.config, self._copies, self._turns)}
