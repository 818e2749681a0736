"""Several members of one model answer one batch together: the forward pass of an ensemble.

```
        rows of the batch   0 1 | member 0    the trunk below the lowest layer that any member has LoRA in
  layer 7  ●   ●   ●        0 1 | member 1    is the same for all members: it runs once, on the rows of the batch.
  layer 6  ●   ●   ○        0 1 | member 2    From there on every member has a group of rows of its own.
  layer 5  ● ──○───○── rows are repeated here
  layer 4  ○   ○   ○        0 1               ● LoRA   ○ none
```

The base model's `forward` is replaced while a [`Members`] is attached to it, so that whatever is written for the base
(`generate`, pipelines) asks all members and receives their average. `stack.py` has their LoRA.

Whether a model can do that is found out by trying (`trial.py`), never by the names of its class or arguments. Where
rows of one batch cannot be told apart, members answer in turn.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import ModelOutput

from ..seams.answering import (
    CACHE_ARGUMENTS,
    FUSED_HEAD,
    caches_given,
    caches_in,
    check_logits,
    check_one_dimension,
    loss_of,
    taken_labels,
)
from ..seams.models import asked_alone, encoder_modules, is_encoder_decoder
from .averages import Combine, average_logits, by_token
from .decoding import BLOCK, Decoding
from .member_cache import MemberCache, of_other_members
from .member_rows import MemberRows, Notes
from .stack import Pass, Stack
from .trial import Trial


class Serving(NamedTuple):
    """Who answers: members, by the slots that hold their LoRA."""

    slots: torch.Tensor  # `(members,)`
    lowest_layer: int = 0  # below it no member has LoRA

    @property
    def members(self) -> int:
        """Number of members."""
        return len(self.slots)


class Members(MemberRows):
    """Makes a model answer as the average of the members that are said to serve."""

    def __init__(self, stack: Stack, combine: Combine, serving: Callable[[], Serving]):
        if combine not in ("probabilities", "logits"):
            raise ValueError(f"combine must be 'probabilities' or 'logits', not {combine!r}.")
        super().__init__(stack)
        self.combine = combine
        self.batched = True
        self.shares_trunk: bool | None = None  # `None`: not tried yet, as there was none to share
        self.cache_name: str | None = None
        self.tried = False
        self.compiled = False  # whether somebody has compiled a pass: moving the trunk up would do it once more
        self.decoding = Decoding()
        self._trying = threading.RLock()
        self._had_own_forward = "forward" in vars(self.base)
        self._forward = self.base.forward
        parameters = inspect.signature(self._forward).parameters
        self.parameters = [name for name, parameter in parameters.items() if parameter.kind != parameter.VAR_KEYWORD]

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> ModelOutput:
            return self.answer(serving(), args, kwargs)

        self.base.forward = forward

    def detach(self) -> None:
        """Gives the model its own forward back."""
        super().detach()
        if self._had_own_forward:
            self.base.forward = self._forward
        else:
            del self.base.forward

    def look(self, serving: Serving, inputs: dict[str, Any] | None = None) -> None:
        """Finds out, once, whether several members can answer one batch, and whether they can share the trunk.

        Without `inputs` (see [`Trial.run`]), a model that takes no tokens is tried with its first batch.
        """
        shared = serving.lowest_layer == 0 or self.shares_trunk is not None
        if serving.members < 2 or (self.tried and shared):
            return
        with self._trying:
            if not self.tried or (serving.lowest_layer > 0 and self.shares_trunk is None):
                Trial(self, serving).run(inputs)

    def name_cache(self, serving: Serving) -> str | None:
        """The name by which the model takes and gives a cache; `None`: it has none."""
        if self.cache_name is None and not self.tried:
            with self._trying:
                Trial(self, serving).name_cache()
        return self.cache_name

    def pass_of(self, serving: Serving) -> Pass | None:
        """What layers are told of a forward pass of these members, all at once."""
        trunk = serving.lowest_layer if serving.members == 1 or self.shares_trunk else 0
        return Pass(serving.slots.to(self.base.device), trunk) if serving.members else None

    # ---- answering ----

    def answer(self, serving: Serving, args: Any, kwargs: dict[str, Any]) -> Any:
        """The answer of some members to the arguments of a forward pass."""
        if torch.compiler.is_compiling():
            self.compiled = True
        elif self.records and (cache := self._cache_of_step(args, kwargs)) is not None:
            kwargs |= zip(self.parameters, args, strict=False)
            compute = lambda slots, given: self._answer(serving._replace(slots=slots), (), dict(given))  # noqa: E731
            return self.decoding.step(cache, self._kind(serving), serving.slots, kwargs, compute)
        return self._answer(serving, args, kwargs)

    @property
    def records(self) -> bool:
        """Whether steps of generation are recorded and replayed."""
        return self.alone is None and self.decoding.records(self.base.device)

    @functools.cached_property
    def alone(self) -> str | None:
        """Why each member has to be asked by itself, if it has to; found out by the model's kind, not by trying."""
        return asked_alone(self.base)

    def _cache_of_step(self, args: Any, kwargs: dict[str, Any]) -> MemberCache | None:
        """The cache of a step of generation that can be recorded: one token for each row."""
        caches = [cache for cache in caches_in(kwargs).values() if isinstance(cache, MemberCache) and cache.length]
        if not caches or args or kwargs.get("return_dict") is False or torch.is_grad_enabled():
            return None
        return caches[0] if self.main_input(kwargs).shape[1] == 1 and caches[0].can_be_recorded else None

    def _kind(self, serving: Serving) -> Any:
        """What a recording depends on beside the arguments of a step: the members, and where the model lies."""
        return self.shape(serving), next(self.base.parameters()).data_ptr(), self.stack.place

    def _answer(self, serving: Serving, args: Any, kwargs: dict[str, Any]) -> Any:
        if serving.members < 2:
            self._refuse_other_members(serving, kwargs)
            with self.route.taking(self.pass_of(serving)):
                return self._forward(*args, **kwargs)
        kwargs |= zip(self.parameters, args, strict=False)
        labels, items = taken_labels(kwargs), kwargs.pop("num_items_in_batch", None)
        if is_encoder_decoder(self.base):
            self.check_encoder(kwargs.get("encoder_outputs") is not None)
            kwargs |= {**labels, "use_cache": False}  # the decoder's tokens follow from the labels
        fused = kwargs.pop(FUSED_HEAD, False)
        as_tuple, kwargs["return_dict"] = kwargs.pop("return_dict", None) is False, True
        self.look(serving, kwargs)
        kwargs = self._with_members_cache(serving, kwargs)
        output = self.together(serving, kwargs) if self.batched else self.in_turn(serving, kwargs)
        if fused:
            return by_token(output["logits"], labels["labels"])
        if labels:
            output["loss"] = loss_of(self.base, output, labels, items)
        return output.to_tuple() if as_tuple else output

    def keep_no_cache(self) -> bool:
        """Whether several members generate without a cache."""
        if is_encoder_decoder(self.base):
            self.check_encoder(apart=True)
            return True
        return self.tried and self.cache_name is None

    def check_encoder(self, apart: bool) -> None:
        """Raises `ValueError` where members differ in an encoder that ran `apart`, for all of them alike."""
        beside = encoder_modules(self.base) if apart else set()
        inside = [path for path, own in self.stack.modules.items() if {id(own), id(own.inner)} & beside]
        if inside:
            raise ValueError(
                f"The members differ in the encoder ({inside[0]}), which runs once for all of them in `generate` or "
                "where `encoder_outputs` are given. Serve one prefix of the store at a time (`store.export(path, "
                "prefix=...)`), or train layers of the decoder (`layers_pattern`)."
            )

    def _with_members_cache(self, serving: Serving, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with a cache that has rows for every member, where a cache is wanted."""
        kwargs, given = self.with_own_cache(serving, kwargs)
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(self.base.config, "use_cache", False)
        if given or not wanted or self.cache_name is None:
            return kwargs
        return {**kwargs, **self.new_cache(serving)}

    def with_own_cache(self, serving: Serving, kwargs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """The arguments with a cache that was given under the model's own name for it, and whether there is one.

        Raises `ValueError` for a cache of somebody else, whatever it is called, and for two of them.
        """
        given = caches_given(kwargs, self.cache_name)
        for name, cache in given.items():
            self.check_cache(serving, name, cache)
        rest = {name: value for name, value in kwargs.items() if name not in (*CACHE_ARGUMENTS, *given)}
        if len(given) > 1:
            raise ValueError(f"{' and '.join(map(repr, given))} are two caches. Give one of them.")
        own = {self.cache_name or name: cache for name, cache in given.items()}
        return {**rest, **own}, bool(own)

    def _refuse_other_members(self, serving: Serving, kwargs: Mapping[str, Any]) -> None:
        """Raises `ValueError` for a cache of several members where one answers, or none."""
        for name, cache in caches_in(kwargs).items():
            if isinstance(cache, MemberCache):
                self.check_cache(serving, name, cache)

    def check_cache(self, serving: Serving, name: str, cache: Any) -> None:
        """Raises `ValueError` for a cache that was not made for these members."""
        if not isinstance(cache, MemberCache):
            raise ValueError(
                f"`{name}` is a cache with one row per example, but an ensemble needs one per member. Leave it out: a "
                "dynamic cache is made for the members, and returned."
            )
        if (cache.copies, cache.turns) != self.shape(serving):
            raise of_other_members(name)

    def together(self, serving: Serving, kwargs: dict[str, Any], notes: Notes | None = None) -> ModelOutput:
        """The answer to the arguments of a forward pass, in which every member has its rows."""
        rows, count, now = len(self.main_input(kwargs)), serving.members, self.pass_of(serving)
        assert now is not None
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and self.is_per_row(name, value, rows):
                kwargs[name] = value.repeat(count, *[1] * (value.ndim - 1))
        with self.route.taking(now._replace(notes=notes)):
            output = self._forward(**kwargs)
        return self._combined(output, lambda name: output[name].unflatten(0, (count, rows)))

    def in_turn(self, serving: Serving, kwargs: dict[str, Any]) -> ModelOutput:
        """The answer to the arguments of a forward pass that every member makes by itself."""
        caches = [cache for cache in caches_in(kwargs).values() if isinstance(cache, MemberCache)]
        outputs = []
        for turn, slot in enumerate(serving.slots.split(1)):
            alone = self.pass_of(Serving(slot, serving.lowest_layer))
            with self.route.taking(alone), caches[0].turn(turn) if caches else nullcontext():
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

    def shape(self, serving: Serving) -> tuple[tuple[int, ...], int]:
        """Per layer, how many members have rows in a cache at once; and how many of them answer in turn."""
        if not self.batched:
            return (1,) * len(self._layers), serving.members
        trunk = serving.lowest_layer if self.shares_trunk else 0
        return tuple(1 if index < trunk else serving.members for index in range(len(self._layers))), 1

    def new_cache(self, serving: Serving, length: int | None = None) -> dict[str, MemberCache]:
        """An empty key-value cache for some members, by the name that the model gives it; nothing if it has none.

        With a `length` it has room for as many positions, and stays where it is.
        """
        if self.cache_name is None:
            return {}
        if length is not None:
            length = -(-length // BLOCK) * BLOCK
        return {self.cache_name: MemberCache(self.base.config, *self.shape(serving), length)}
