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

Whether a model can do that is found out by trying, never by the names of its class or arguments: see [`Members.look`].
Where rows of one batch can not be told apart, members answer in turn. Which tensors a member has is for `slots.py`,
how logits are averaged for `averages.py`.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .averages import Combine, average_logits, by_token
from .layout import split_layer_path
from .member_cache import MemberCache
from .seams import lost
from .seams.answering import (
    BASE,
    FUSED_HEAD,
    caches_in,
    check_logits,
    check_one_dimension,
    first_argument,
    lora_by_views,
    loss_of,
)

logger = logging.getLogger(__name__)

Hook = tuple[tuple[Any, ...], dict[str, Any]] | None
Path = tuple[int | str, ...]
"""Where a value is among the arguments of a layer: its position or name, and what it is inside of that."""

TRIED_ROWS, TRIED_TOKENS, TRIED_MEMBERS = 3, 5, 2
"""Of the batch that a model is tried with: no two of rows, members, rows x members and tokens are the same number."""


class OtherRows(Exception):
    """A module sees something else than rows of the batch."""


@dataclass
class Trial:
    """What is noted while rows are answered together for the first time.

    Args:
        rows (`int`): of the batch, before they are repeated for every member.
        reached (`bool`): whether the first layer has been reached.
        head_first (`bool`): whether a head came before it.
    """

    rows: int
    reached: bool = False
    head_first: bool = False


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
        self.batched = True
        self.shares_trunk: bool | None = None  # `None`: not tried yet, as there was none to share
        self._looked = False
        self._cache_name: str | None = None
        self._whole: set[Path] = set()
        self._trial: Trial | None = None
        self._views = True
        self._told = False  # PEFT's layers, whether adapters are on and which one is active
        self._turn = threading.RLock()
        self._attach()

    # ---- the model's forward, replaced ----

    def _attach(self) -> None:
        self._lora = {name: module for name, module in self.base.named_modules() if isinstance(module, LoraLayer)}
        self._heads = [module for module in self.base.modules() if isinstance(module, ModulesToSaveWrapper)]
        places = [place for place in map(split_layer_path, self._lora) if place is not None]
        self._layers = list(self.base.get_submodule(places[0][0]).children()) if places else []
        self._had_own_forward = "forward" in vars(self.base)
        self._forward = self.base.forward
        parameters = inspect.signature(self._forward).parameters
        self._positional = [name for name, parameter in parameters.items() if parameter.kind != parameter.VAR_KEYWORD]

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
                module.forward = partial(self._by_views, module, module.forward)
        self._hooks += [hook(module, partial(self._name_rows, len(self._layers))) for module in self._heads]

    def detach(self) -> None:
        """Gives the model its own forward back."""
        for hook in self._hooks:
            hook.remove()
        for module in self._lora.values():
            vars(module).pop("forward", None)
        if self._had_own_forward:
            self.base.forward = self._forward
        else:
            del self.base.forward

    def serve(self, names: Sequence[str], lowest_layer: int, weights: Sequence[float] | None = None) -> None:
        """Says who answers from now on; nothing may be answering meanwhile.

        Args:
            names (`list[str]`): adapters; empty: the bare base model answers.
            lowest_layer (`int`): no member has LoRA below it.
            weights (`list[float]`, *optional*): what each counts in the average, above 0. `None`: all the same.
        """
        switched, self.names, self.lowest_layer = bool(names) != bool(self.names), tuple(names), lowest_layer
        self.weights = None if weights is None else tuple(weights)
        self._share(bool(self.shares_trunk))
        for module in [*self._lora.values(), *self._heads] if switched or not self._told else ():
            module.enable_adapters(bool(names))
            if names:
                module.requires_grad_(False)
        if len(names) == 1 or (names and not self._told):
            self._activate(names[0])
        self._told = True
        if lowest_layer > 0 and self.shares_trunk is None:
            self._looked = False

    def _share(self, shared: bool) -> None:
        self.trunk = self.lowest_layer if shared else 0

    def _activate(self, name: str) -> None:
        for module in self._lora.values():
            module.set_adapter([name], inference_mode=True)
        for module in self._heads:
            module.set_adapter(name, inference_mode=True)

    # ---- what the model can do, found out by trying ----

    def look(self, inputs: dict[str, Any] | None = None) -> None:
        """Tries, once, whether several members can answer one batch, and whether they can share the trunk.

        A few rows are answered by two members in turn, by both together, and by both on a shared trunk: the logits
        have to be the same. Nothing depends on what arguments are called, so that a new name changes nothing.

        Args:
            inputs (`dict`, *optional*): arguments of a forward pass, with rows to try with. `None`: rows of tokens; of
                a model that takes something else, nothing is tried before its first answer.
        """
        with self._turn:
            if self._looked or len(self.names) < 2:
                return
            rows = self._tokens() if inputs is None or self.base.main_input_name == "input_ids" else self._some(inputs)
            if rows is None or self._tried(rows, given=inputs is not None):
                return
            if inputs is not None:
                self._tried(self._some(inputs), given=True)

    def _tried(self, rows: dict[str, Any], given: bool) -> bool:
        """Tries with some rows; returns whether that was conclusive, which rows that were `given` always are."""
        names, weights = self.names, self.weights
        self.names, self.weights = names[:TRIED_MEMBERS], None
        try:
            with self._trying(), torch.no_grad():
                return self._compare(rows, given)
        finally:
            self.names, self.weights = names, weights
            self._share(bool(self.shares_trunk))
            self._activate(names[0])

    def _compare(self, rows: dict[str, Any], given: bool) -> bool:
        self.batched, self.trunk, self._views, self._whole = False, 0, True, set()
        try:
            expected = self._in_turn(dict(rows))
        except Exception as error:  # what a model says of rows that it does not take is not ours to foresee
            if given:
                self._settle(False, f"it does not take several rows ({error})")
            return given
        self._cache_name = next(iter(caches_in(expected)), None)
        self.batched = True
        reason, trial = self._difference(rows, expected)
        if reason is not None:
            self._views = False
            again, trial = self._difference(rows, expected)
            if again is not None:
                self._settle(False, reason)
                return True
            lost("lora_by_views", f"PEFT's LoRA layers can not be computed by views: {reason}")
        self._settle(True)
        if self.lowest_layer > 0:
            self._share(True)
            reason = "a head comes before the layers" if trial.head_first else self._difference(rows, expected)[0]
            self.shares_trunk = reason is None
            if reason is not None:
                logger.warning("the members share no trunk: it runs for each of them, as %s", reason)
        return True

    def _settle(self, batched: bool, reason: str = "") -> None:
        self.batched, self._looked = batched, True
        self.shares_trunk = None if batched else False
        if not batched:
            logger.warning("the members answer in turn, not together, as %s", reason)

    def _difference(self, rows: dict[str, Any], expected: ModelOutput) -> tuple[str | None, Trial]:
        """Why members do not answer together as they answer in turn, `None` where they do; and what was noted."""
        trial = self._trial = Trial(len(self._main_input(rows)))
        try:
            found = self._together(dict(rows))
        except Exception as error:  # whatever a model raises when it sees rows that it did not expect
            return f"together they fail ({type(error).__name__}: {error})", trial
        finally:
            self._trial = None
        exact = {value.dtype for value in self.base.parameters()} <= {torch.float32, torch.float64}
        for name, value in expected.items():
            if isinstance(value, torch.Tensor) and not _close(found[name], value, 1e-4 if exact else 0.05):
                return f"together they have other {name}", trial
        return None, trial

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """The model is in eval mode, in which a row has the same answer twice."""
        before = [(module, module.training) for module in self.base.modules()]
        for module, _ in before:
            module.training = False
        try:
            yield
        finally:
            for module, training in before:
                module.training = training

    def _tokens(self) -> dict[str, Any] | None:
        """Rows of tokens of different lengths."""
        size = getattr(self.base.config.get_text_config(), "vocab_size", None)
        if self.base.main_input_name != "input_ids" or size is None:
            return None
        shape = TRIED_ROWS, TRIED_TOKENS
        tokens = torch.arange(TRIED_ROWS * TRIED_TOKENS).reshape(shape).mul(7).add(3) % max(size - 1, 1)
        mask = torch.arange(TRIED_TOKENS) < TRIED_TOKENS - torch.arange(TRIED_ROWS)[:, None]
        rows = {"input_ids": tokens.to(self.base.device)}
        if "attention_mask" in self._positional:
            rows["attention_mask"] = mask.long().to(self.base.device)
        return rows | self._with_cache()

    def _some(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As many rows as it takes, of those that were given; a row that comes again is moved a little."""
        count = len(self._main_input(inputs))
        some = {name: value for name, value in inputs.items() if name not in caches_in(inputs)}
        for name, value in some.items():
            if isinstance(value, torch.Tensor) and self._is_per_row(name, value, count):
                rows = [
                    value[row % count].roll(row // count, -1) if value.is_floating_point() else value[row % count]
                    for row in range(TRIED_ROWS)
                ]
                some[name] = torch.stack(rows)
        return some | self._with_cache()

    def _with_cache(self) -> dict[str, Any]:
        return {"use_cache": True} if "use_cache" in self._positional else {}

    # ---- answering ----

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.names) < 2:
            return self._forward(*args, **kwargs)
        self.refuse_encoder_decoder()
        kwargs |= zip(self._positional, args, strict=False)
        labels, items = kwargs.pop("labels", None), kwargs.pop("num_items_in_batch", None)
        fused = kwargs.pop(FUSED_HEAD, False)
        as_tuple, kwargs["return_dict"] = kwargs.pop("return_dict", None) is False, True
        if not self._looked:
            self.look(kwargs)
        kwargs = self._with_members_cache(kwargs)
        output = self._together(kwargs) if self.batched else self._in_turn(kwargs)
        if fused:
            return by_token(output["logits"], labels)
        if labels is not None:
            output["loss"] = loss_of(self.base, output["logits"], labels, items)
        return output.to_tuple() if as_tuple else output

    def refuse_encoder_decoder(self) -> None:
        """Raises `ValueError` for several members of a model whose encoder runs apart from what is asked of it."""
        if self.base.config.is_encoder_decoder:
            raise ValueError(
                "Several members of an encoder-decoder model can not answer together. Serve one prefix of the store "
                "at a time (`store.export(path, prefix=...)`)."
            )

    def _with_members_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with a cache that has rows for every member, where a cache is wanted.

        Raises:
            ValueError: a cache was given that has not.
        """
        given = {name: cache for name, cache in caches_in(kwargs).items() if cache is not None}
        for name, cache in given.items():
            self.check_cache(name, cache)
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = getattr(self.base.config, "use_cache", False)
        if given or not wanted or self._cache_name is None:
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

    def _together(self, kwargs: dict[str, Any]) -> ModelOutput:
        rows, count = len(self._main_input(kwargs)), len(self.names)
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor) and self._is_per_row(name, value, rows):
                kwargs[name] = value.repeat(count, *[1] * (value.ndim - 1))
        output = self._forward(**kwargs)
        return self._combined(output, lambda name: output[name].unflatten(0, (count, rows)))

    def _in_turn(self, kwargs: dict[str, Any]) -> ModelOutput:
        batched, self.batched = self.batched, False
        caches = [cache for cache in caches_in(kwargs).values() if isinstance(cache, MemberCache)]
        outputs = []
        with self._turn:  # which adapter is active is a property of the model, not of the call
            try:
                for turn, name in enumerate(self.names):
                    self._activate(name)
                    with caches[0].turn(turn) if caches else nullcontext():
                        outputs.append(self._forward(**kwargs))
            finally:
                self.batched = batched
        return self._combined(outputs[0], lambda name: torch.stack([output[name] for output in outputs]))

    def _main_input(self, kwargs: dict[str, Any]) -> torch.Tensor:
        for name in (self.base.main_input_name, "inputs_embeds"):
            if kwargs.get(name) is not None:
                return kwargs[name]
        return next(value for value in kwargs.values() if isinstance(value, torch.Tensor))

    @staticmethod
    def _is_per_row(name: str, value: torch.Tensor, rows: int) -> bool:
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
                values[name] = average_logits(members(name), self.combine, problem, self.weights)
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
        if self._cache_name is None:
            return {}
        return {self._cache_name: MemberCache(self.base.config, self._copies, self._turns)}

    # ---- rows ----

    def _enter(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Before a layer: takes one member's rows in the trunk, and repeats them for all members where it ends."""
        count = len(self.names)
        if not self.batched or count < 2 or index > self.trunk:
            return None
        if self.trunk == 0:
            self._note(args, kwargs)
            return None
        name = "" if args else first_argument(module.forward)
        hidden = args[0] if args else kwargs[name]
        if index == self.trunk:
            hidden = hidden.repeat(count, *[1] * (hidden.ndim - 1))
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, name: hidden})
        rows = len(hidden) // count if index == 0 else len(hidden)
        cut = partial(self._first_member, rows, rows * count)
        return (
            tuple(cut((place,), value) for place, value in enumerate(args)),
            {name: cut((name,), value) for name, value in kwargs.items()},
        )

    def _note(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """In a trial: notes which arguments of a layer have something else than rows in their first dimension."""
        if self._trial is None:
            return
        self._trial.reached, total = True, self._trial.rows * len(self.names)

        def note(path: Path, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                if value.ndim and len(value) not in (1, total):
                    self._whole.add(path)
                return value
            return _mapped(note, path, value)

        for place, value in [*enumerate(args), *kwargs.items()]:
            note((place,), value)

    def _first_member(self, rows: int, total: int, path: Path, value: Any) -> Any:
        """The first member's rows of what has rows for all. What has none, as was seen in the trial, stays."""
        if isinstance(value, torch.Tensor):
            return value[:rows] if value.ndim and len(value) == total and path not in self._whole else value
        return _mapped(partial(self._first_member, rows, total), path, value)

    def _name_rows(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hook:
        """Before a layer with LoRA or a head: says which adapter each row is for."""
        count = len(self.names)
        if not self.batched or count < 2:
            return None
        rows = len(args[0])
        if self._trial is not None:
            self._check_rows(index, type(module).__name__, rows)
        if index < self.trunk:
            names = [BASE] * rows
        else:
            names = [name for name in self.names for _ in range(rows // count)]
        return args, {**kwargs, "adapter_names": names}

    def _check_rows(self, index: int, kind: str, rows: int) -> None:
        """In a trial: raises [`OtherRows`] unless a layer with LoRA, or a head, sees the rows of the batch."""
        assert self._trial is not None
        expected = self._trial.rows * (len(self.names) if index >= self.trunk else 1)
        if index < 0 or rows % expected:
            raise OtherRows(f"{kind} sees {rows} rows where {expected} were expected")
        self._trial.head_first |= index == len(self._layers) and not self._trial.reached

    def _by_views(self, module: Any, forward: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """PEFT's forward of a linear layer, with views of rows that lie together in the place of copies."""
        names = kwargs.get("adapter_names")
        if names is None or not self._views or module.merged or module.disable_adapters or args or len(kwargs) > 1:
            return forward(x, *args, **kwargs)
        return lora_by_views(module, x, () if names[0] == BASE else self.names)


def _mapped(function: Callable[[Path, Any], Any], path: Path, value: Any) -> Any:
    """A tuple, list or dictionary with a function applied to its parts, which know where they are."""
    if isinstance(value, dict):
        return type(value)((name, function((*path, name), part)) for name, part in value.items())
    if type(value) in (list, tuple):
        return type(value)(function((*path, place), part) for place, part in enumerate(value))
    return value


def _close(found: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    """Whether logits differ by no more than a share of their size."""
    return found.shape == expected.shape and bool((found - expected).norm() <= bound * expected.norm())
