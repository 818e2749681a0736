"""`S3TEnsemble`: the served model in memory, which forgets while it answers.

It holds the base model once, a slot per shard and spare ones, allocated at full depth (`slots.py`). A deletion, or a
store that somebody else changed, writes into spare slots, on which new answers begin (`answers.py`).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import ModelOutput

from ..errors import S3TError
from ..seams.answering import caches_in, introduce_to_pipelines, room_of
from ..store.receipts import Receipt
from ..store.store import S3TStore
from .answers import Answers
from .averages import Combine
from .decoding import BLOCK
from .following import Follower, State
from .loading import base_of, opened, stacked
from .members import Members, Serving
from .passes import PASS, begin_pass, end_pass, give_caches, take_caches
from .stack import Stack

OTHER_WAYS = frozenset({"assistant_model", "custom_generate", "penalty_alpha", "prompt_lookup_num_tokens"})
"""Arguments of `generate` that ask for something else than tokens one by one, of as many rows as there are beams."""

LOOKING = ("_", "can_", "create_extended_", "get_", "is_", "num_", "prepare_inputs_", "print_", "warn_")
"""How the methods of a model begin that change nothing in it. The private ones are for those who know what they do."""


class S3TEnsemble(nn.Module):
    """Answers with the average of its members, the served prefixes of a store's live shards.

    Any number of threads may call it and `generate` while another thread deletes or refreshes. Each answer is computed
    entirely before a change or entirely after it, and does not wait for the change.

    Args:
        model ([`~peft.PeftModel`] or `PreTrainedModel`): holds one loaded adapter per member.
        members (`dict[str, int]`): name of each member's adapter, and the lowest layer that has its LoRA. Empty: the
            model answers as it is.
        combine (`"probabilities"` or `"logits"`): what is averaged. The ensemble's logits are the logarithm of the
            mean probability, or the mean of the logits. A single member's logits stay as they are.

    Example:

        ```py
        model = S3TEnsemble.from_pretrained("out", dtype=torch.bfloat16, device_map="auto")
        model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
        receipt = model.delete(ids=["row-17"])  # from the store and from this model, between two answers
        ```
    """

    def __init__(self, model: nn.Module, members: Mapping[str, int], combine: Combine = "probabilities"):
        super().__init__()
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        stack = Stack.of_adapters(base, list(members)) if members else Stack(base, {}, 0)
        self._begin(model, stack, combine)
        slots = torch.arange(len(members), device=base.device)
        serving = Serving(slots, min(members.values(), default=0))
        with self._answers.changing(len(members)):
            self._answers.replace(State(0, tuple(members), serving), set(slots.tolist()))

    def _begin(self, model: Any, stack: Stack, combine: Combine, seconds: float | None = None) -> None:
        """What an ensemble is made of, with no member yet."""
        self.model: Any = model
        self._stack = stack
        nobody = State(0, (), Serving(torch.zeros(0, dtype=torch.long, device=stack.base.device)))
        self._answers = Answers(nobody, stack.slots, lambda number: self._followed().clear(number), seconds)
        self._members = Members(stack, combine, lambda: self._state.serving)
        self._follower: Follower | None = None
        self.register_forward_pre_hook(begin_pass, with_kwargs=True)
        self.register_forward_hook(end_pass, always_call=True)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str] | S3TStore,
        base_model: nn.Module | str | None = None,
        combine: Combine = "probabilities",
        *,
        key: str | bytes | None = None,
        state: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | None = None,
        spare_slots: int | None = None,
        old_answers_seconds: float | None = None,
        **kwargs: Any,
    ) -> S3TEnsemble:
        """Loads the base model once, and prefixes of a store onto it.

        Args:
            folder (`str`, `Path` or [`S3TStore`]): the store: a folder, the id of a repository, or an open store.
                Deleting needs key and state; answering and refreshing do not.
            base_model (`PreTrainedModel` or `str`, *optional*): the bare base, which will carry the adapters, or where
                to load it from. `None`: the id that the store names.
            combine (`"probabilities"` or `"logits"`): what is averaged over the members.
            key, state, revision, token (*optional*): how to open the store, see [`S3TStore`]. Revision and token are
                for the store's repository. The base is loaded at the revision that the store names, with the token
                that is logged in.
            spare_slots (`int`, *optional*): room for new prefixes, at least 1. If no more shards than this change at
                once, no answer has to wait. `None`: as many as there are shards.
            old_answers_seconds (`float`, *optional*): how long an answer that began before a deletion may go on. Then
                it ends with an [`AnswerCutOffError`]. `None`: to its end.
            kwargs: for the base model's `from_pretrained`: `dtype`, `device_map`, `quantization_config` and so on.

        Raises:
            ValueError: arguments say how to open a repository, and the store is a folder or is open already.
            StoreError: the store does not name its base, its files are damaged, or the base is another one.
        """
        if spare_slots is not None and spare_slots < 1:
            raise ValueError(f"`spare_slots` must be at least 1, got {spare_slots}.")
        store = opened(folder, key=key, state=state, revision=revision, token=token)
        manifest = store.live()
        shards, stored = manifest.plan.num_shards, manifest.recipe["config"]
        base = base_of(store, base_model, kwargs)
        stack = stacked(base, manifest, shards + (shards if spare_slots is None else spare_slots))
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble._begin(base, stack, combine, old_answers_seconds)
        rank = stored["r"] if stored.get("stage_parameters") == "rank_group" else None
        ensemble._follower = Follower(store, stack, ensemble._answers, shards, rank)
        introduce_to_pipelines(cls.__name__)
        try:
            ensemble.refresh()
        except BaseException:
            ensemble.detach()
            raise
        ensemble.eval()
        ensemble._members.look(ensemble._state.serving)
        return ensemble

    def __getattr__(self, name: str) -> Any:
        """What the ensemble has not itself is the base model's: `config`, `device`, and methods that only look."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
        found = getattr(self.model, name)
        if inspect.ismethod(found) and not name.startswith(LOOKING):
            raise AttributeError(
                f"S3TEnsemble has no `{name}`: deletions would not know what it does to the model inside. Take a copy "
                "with `S3TStore.export`, push with `S3TStore.push`, or use `ensemble.model` at your own risk."
            )
        return found

    @property
    def generation_config(self) -> Any:
        """The base model's; what is set here is set there."""
        return self._members.base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._members.base.generation_config = value

    @property
    def _state(self) -> State:
        """That of this thread's answer, or the current one."""
        return self._answers.state if self._answers.running else self._answers.current

    @property
    def members(self) -> list[str]:
        """Names of the members that answer: one per live shard."""
        return list(self._state.names)

    @property
    def generation(self) -> int:
        """Number of deletions of the store that new answers obey."""
        return self._answers.current.generation

    # ---- answering ----

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """As the base model's; the logits are the ensemble's, and a loss follows from them.

        Shapes are the base model's, too: `(batch, classes)`, `(batch, sequence, vocabulary)`.
        """
        serving = kwargs.pop(PASS, None)
        if serving is None:  # not called through `__call__`
            with self._answers.answering() as state:
                take_caches(state, args, kwargs)
                return give_caches(state, self._members.answer(state.serving, args, kwargs))
        return self._members.answer(serving, args, kwargs)

    @contextmanager
    def answering(self) -> Iterator[int]:
        """Within the block, all calls of this thread are one answer, on one state. Gives its generation."""
        with self._answers.answering() as state:
            yield state.generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's `generate`: greedy, sampling or beam search on the ensemble's probabilities.

        The whole text is one answer: it ends on the state on which it began.

        Raises:
            ValueError: members that differ in an encoder, a kind of cache that cannot hold several of them, or one of
                members that answer no more.
            AnswerCutOffError: a deletion came in between, and the answer went on for too long after it.
        """
        with self._answers.answering() as state, ExitStack() as until_its_end:
            take_caches(state, args, kwargs)
            serving = state.serving
            if serving.members == 1:  # the base's `generate` may run parts of an encoder-decoder beside its `forward`
                until_its_end.enter_context(self._stack.route.taking(self._members.pass_of(serving)))
            if serving.members:
                kwargs = self._with_cache(until_its_end, serving, args, kwargs)
            return give_caches(state, self._members.base.generate(*args, **kwargs))

    @property
    def decode_graphs(self) -> bool:
        """Whether `generate` records a step as a CUDA graph and replays it. Other devices ignore it."""
        return self._members.decoding.on

    @decode_graphs.setter
    def decode_graphs(self, value: bool) -> None:
        self._members.decoding.on = value

    def _with_cache(self, until_its_end: ExitStack, serving: Serving, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments of `generate` with a cache for some members."""
        members, given = self._members, kwargs.get("generation_config") or self.generation_config
        kind, caches = kwargs.get("cache_implementation", given.cache_implementation), bool(caches_in(kwargs))
        if serving.members > 1:
            members.look(serving)
            kwargs, caches = members.with_own_cache(serving, kwargs)
            if members.keep_no_cache():  # `generate` would make one for the base
                return {**kwargs, "use_cache": False}
        if caches or kwargs.get("use_cache", given.use_cache) is False:
            return kwargs
        if serving.members > 1 and kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r} makes a cache that has one row per example, an ensemble needs one per "
                "member. Leave it out, or give 'static': a cache is made for the members."
            )
        names = ("inputs", members.base.main_input_name, "inputs_embeds")
        prompt = next((value for value in (*args, *map(kwargs.get, names)) if value is not None), None)
        wants = kind == "static" or (kind is None and members.records)
        if not wants or prompt is None or OTHER_WAYS & kwargs.keys() or members.base.config.is_encoder_decoder:
            new = members.new_cache(serving) if serving.members > 1 else {}
            return {**kwargs, **new, "cache_implementation": None} if new else kwargs
        rows, length = room_of(kwargs, given, prompt)
        named = members.name_cache(serving)
        if named is None:
            return kwargs
        fixed = {"cache_implementation": None, "disable_compile": True}  # what is compiled here is the step alone
        if kwargs.get("return_dict_in_generate", given.return_dict_in_generate):  # then the cache is the caller's
            cache = members.new_cache(serving, length)[named]
            until_its_end.callback(cache.steps.clear)
            return {**kwargs, named: cache, **fixed}
        make = lambda: members.new_cache(serving, length)[named]  # noqa: E731
        shape = (*members.shape(serving), rows, -(-length // BLOCK), members.base.device, members.base.dtype)
        return {**kwargs, named: until_its_end.enter_context(members.decoding.cache(shape, make)), **fixed}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a copy that no deletion knows of would carry on what was deleted."""
        raise S3TError("Save a copy with `store.export(path)`: a later deletion then names it, or rewrites it.")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the members are what the store serves."""
        raise S3TError("The members' tensors are the store's. Load another store with `S3TEnsemble.from_pretrained`.")

    def detach(self) -> None:
        """Takes the ensemble off the base model, which then answers by itself with its active adapter."""
        self._members.detach()
        self._stack.take_out()

    # ---- changing ----

    def delete(self, ids: Any = (), groups: Any = (), rows: Any = (), slices: Any = (), **kwargs: Any) -> Receipt:
        """Deletes examples from the store on disk and from this model, without a gradient step.

        When the deletion is on record in the store, new answers no longer use what it covers. Then the files are
        removed. Running answers end on the state on which they began: [`drained`] tells when. Arguments, return value
        and errors are those of [`S3TStore.delete`]. Other copies of the model must call [`refresh`].
        """
        asked = {"ids": ids, "groups": groups, "rows": rows, "slices": slices}
        self._answers.check_outside()
        try:
            receipt = self._followed().store._delete(asked, when_durable=self._follow_deletion, **kwargs)
        except BaseException:
            if self.pending:  # it was on record, and failed later: new answers may be waiting for the rest
                self._followed().follow(strict=False)
            raise
        if not kwargs.get("dry_run"):
            self._followed().follow(strict=False)  # what the deletion itself did not wait for
            self._followed().tell()
        return receipt

    def refresh(self, wait: bool = True) -> bool:
        """Takes over changes that others made to the store: a deletion, a repair. Needs no key.

        Args:
            wait (`bool`): wait until running answers free the slots that new prefixes need. `False`: drop members that
                are no longer live at once, and leave the rest to the next call. If no member is left, new answers
                wait for that call.

        Returns:
            `bool`: whether the store had changed.

        Raises:
            StoreError: a prefix could not be read; members that are no longer live were dropped. Or the store knows
                fewer deletions than this model, so it is an older copy; nothing was changed.
        """
        self._answers.check_outside()
        try:
            return self._followed().follow(strict=True, settle=not self._members.compiled, wait=wait)
        finally:
            self._followed().tell()

    @property
    def pending(self) -> bool:
        """Whether the store has prefixes that this model cannot load yet: running answers hold the slots."""
        return self._follower is not None and self._follower.lacking > 0

    def drained(self, timeout: float | None = None) -> bool:
        """Waits until every answer that began before a deletion or refresh has ended, and its slots are zeroed.

        Returns whether that happened within `timeout` seconds. `None`: waits as long as it takes.
        """
        return self._answers.drained(timeout)

    def _followed(self) -> Follower:
        if self._follower is None:
            raise S3TError("This ensemble was not loaded from a store. Load it with `S3TEnsemble.from_pretrained`.")
        return self._follower

    def _follow_deletion(self) -> None:
        """Under the store's lock, for which others wait: it must wait for no answer."""
        self._followed().follow(strict=False, wait=False)
