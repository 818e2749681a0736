"""`S3TEnsemble`: the served model in memory, which forgets while it answers.

It holds the base model once, a slot per shard and spare ones, allocated at full depth (`slots.py`). A deletion, or a
store that somebody else changed, writes into spare slots, on which new answers begin (`answers.py`).
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_outputs import ModelOutput

from ..errors import S3TError, StoreError
from ..lora.adapter import WEIGHTS_FILE
from ..plan.tree import Stage
from ..seams.answering import caches_in, introduce_to_pipelines
from ..store.manifest import Manifest
from ..store.receipts import Receipt
from ..store.store import S3TStore
from .answers import Answers
from .averages import Combine
from .loading import base_of, member_name, opened, stacked
from .members import Members, Serving
from .slots import Change, Slot
from .stack import Stack

logger = logging.getLogger(__name__)

READINGS = 5
"""How often a store is read anew that changes while it is read."""


LOOKING = ("_", "can_", "create_extended_", "get_", "is_", "num_", "prepare_inputs_", "print_", "warn_")
"""How the methods of a model begin that change nothing in it. The private ones are for those who know what they do."""


@dataclass(frozen=True)
class State:
    """What an answer is computed with, from its beginning to its end."""

    generation: int
    names: tuple[str, ...]  # of the members
    serving: Serving
    held: Mapping[int, Slot] = field(default_factory=dict)  # by shard


class S3TEnsemble(nn.Module):
    """Answers with the average of its members, the served prefixes of a store's live shards.

    Any number of threads may call it and `generate` while another deletes or refreshes: an answer is computed wholly
    before a change or wholly after it, and does not wait for it.

    Args:
        model ([`~peft.PeftModel`] or `PreTrainedModel`): holds one loaded adapter per member.
        members (`dict[str, int]`): name of each member's adapter, and the lowest layer that it has LoRA in. Empty: the
            model answers as it is.
        combine (`"probabilities"` or `"logits"`): what is averaged. Logits that leave the ensemble are the logarithm
            of the mean probability, or the mean of the logits; those of a single member are its own.

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
        self._slots: dict[int, Slot] = {}  # by number
        nobody = State(0, (), Serving(torch.zeros(0, dtype=torch.long, device=stack.base.device)))
        self._answers = Answers(nobody, stack.slots, self._clear, seconds)
        self._members = Members(stack, combine, lambda: self._state.serving)
        self._following = threading.Lock()
        self._store: S3TStore | None = None
        self._empty = Slot(stack, 0)  # is asked for the prefix of a shard that has none
        self._shards = 0
        self._marks: Any = None
        self.register_forward_pre_hook(_begin_pass, with_kwargs=True)
        self.register_forward_hook(_end_pass, always_call=True)

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
            folder (`str`, `Path` or [`S3TStore`]): the store: a folder, the id of a repository, or one that was opened
                already. Answering and refreshing need neither key nor state, deleting does.
            base_model (`PreTrainedModel` or `str`, *optional*): the bare base, which will carry the adapters, or where
                to load it from. `None`: the id that the store names.
            combine (`"probabilities"` or `"logits"`): what is averaged over the members.
            key, state, revision, token (*optional*): how the store is opened, see [`S3TStore`]; a revision and a token
                are those of its repository. The base is loaded at the revision that the store names, with the token
                that is logged in.
            spare_slots (`int`, *optional*): room for prefixes that take over, at least 1. A change of as many shards
                keeps no answer waiting, whatever runs. `None`: as many as there are shards.
            old_answers_seconds (`float`, *optional*): how long an answer may go on that began before a deletion; then
                it ends with an [`AnswerCutOffError`]. `None`: to its end.
            kwargs: for the base model's `from_pretrained`: `dtype`, `device_map`, `quantization_config` and so on.

        Raises:
            ValueError: the store was opened already, or is a folder, and arguments say how to open a repository.
            StoreError: the store does not say which base it needs, its files are damaged, or the base is another one.
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
        ensemble._slots = {number: Slot(stack, number, rank) for number in range(stack.slots)}
        for slot in ensemble._slots.values():
            slot.clear()
        ensemble._empty = Slot(stack, 0, rank)
        ensemble._store, ensemble._shards = store, shards
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
                f"S3TEnsemble has no `{name}`: on the model in it, it would act past what deletions know of. Take a "
                "copy with `S3TStore.export`, push with `S3TStore.push`, or ask `ensemble.model` on your own account."
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
                return self._members.answer(state.serving, args, kwargs)
        return self._members.answer(serving, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's `generate`: greedy, sampling or beam search on the ensemble's probabilities.

        The whole generation is one answer: it ends on the state that it began with.

        Raises:
            ValueError: an encoder-decoder model, or a kind of cache that cannot hold several members.
            AnswerCutOffError: a deletion came meanwhile, and it went on for too long.
        """
        with self._answers.answering() as state:
            alone = None  # the base's `generate` may run parts of an encoder-decoder beside its `forward`
            if state.serving.members > 1:
                kwargs = self._with_cache(state.serving, kwargs)
            else:
                alone = self._members.pass_of(state.serving)
            with self._stack.route.taking(alone):
                return self._members.base.generate(*args, **kwargs)

    def _with_cache(self, serving: Serving, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._members.refuse_encoder_decoder()
        self._members.look(serving)
        given, caches = kwargs.get("generation_config"), caches_in(kwargs)
        for name, cache in caches.items():
            self._members.check_cache(serving, name, cache)
        if caches or kwargs.get("use_cache", (given or self.generation_config).use_cache) is False:
            return kwargs
        kind = kwargs.get("cache_implementation", given and given.cache_implementation)
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} makes a cache that has one row per example, an ensemble needs one per "
                "member. Leave it out: a dynamic cache is made for the members."
            )
        return {**kwargs, **self._members.new_cache(serving), "cache_implementation": None}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a copy that no deletion knows of would carry on what was deleted."""
        raise S3TError("Save a copy with `store.export(path)`: a later deletion then names it, or makes it anew.")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the members are what the store serves."""
        raise S3TError("The members' tensors are the store's. Load another store with `S3TEnsemble.from_pretrained`.")

    def detach(self) -> None:
        """Gives the base model back: it answers by itself again, with whichever adapter is active."""
        self._members.detach()
        self._stack.take_out()

    # ---- changing ----

    def delete(self, ids: Any = (), groups: Any = (), rows: Any = (), slices: Any = (), **kwargs: Any) -> Receipt:
        """Deletes examples from the store on disk and from this model, without a gradient step.

        As soon as the deletion is on record in the store, new answers begin without anything it covers; then the
        files are removed. Answers that run end on what they began with: [`drained`] tells when. Arguments, return
        value and errors are those of [`S3TStore.delete`]; other copies of the model [`refresh`].
        """
        asked = {"ids": ids, "groups": groups, "rows": rows, "slices": slices}
        self._answers.check_outside()
        receipt = self._own_store()._delete(asked, when_durable=self._follow_deletion, **kwargs)
        if not kwargs.get("dry_run"):
            self._follow_deletion()  # nothing is left to do, unless it had been deleted elsewhere before
        return receipt

    def refresh(self) -> bool:
        """Takes over what others did to the store since: a deletion, a repair. Needs no key.

        Returns:
            `bool`: whether the store had changed.

        Raises:
            StoreError: a prefix could not be read, and what is no longer live was dropped all the same; or the store
                is older than what it was loaded from, as it knows fewer deletions, and nothing was changed.
        """
        self._answers.check_outside()
        with self._following:
            changed = self._follow(strict=True)
            state = self._answers.current
            if _lowest_layer(state.held) > state.serving.lowest_layer and not self._members.compiled:
                with self._answers.changing(0):  # a deletion left it where it was
                    state = self._state_of(state.generation, state.held, settled=True)
                    self._answers.replace(state, {slot.number for slot in state.held.values()})
        return changed

    def drained(self, timeout: float | None = None) -> bool:
        """Waits until the last answer that began before a deletion or a refresh has ended, and its slots are zero.

        Returns whether that is so, at the latest after `timeout` seconds; `None`: however long it takes.
        """
        return self._answers.drained(timeout)

    def _own_store(self) -> S3TStore:
        if self._store is None:
            raise S3TError("This ensemble was not loaded from a store. Load it with `S3TEnsemble.from_pretrained`.")
        return self._store

    def _follow_deletion(self) -> None:
        with self._following:
            self._follow(strict=False)

    def _follow(self, strict: bool) -> bool:
        """Makes the slots what the store serves now; returns whether the store had changed.

        A member whose new prefix cannot be read keeps the old one if all of it is still live, and is dropped if not;
        with `strict` that is an error at the end.
        """
        marks = self._own_store().marks()
        if marks == self._marks:
            return False
        manifest, changes, problems = self._read_changes()
        if manifest.generation < self.generation:  # an older copy of the store: it may serve what was deleted
            error = StoreError(
                f"{self._own_store().path} is of generation {manifest.generation} now, the model answers with "
                f"{self.generation}, which is kept. An older copy was put there: bring the store up to date."
            )
            if strict:
                raise error
            logger.error("%s", error)
            return False
        before = self.members
        self._take(manifest.generation, changes)
        if not self.members and (self._marks is None or before):
            logger.warning("no stage of %s is live: the bare base model answers", self._own_store().path)
        for problem in problems:
            logger.error("a member could not be brought up to date: %s", problem)
        if problems and strict:
            raise problems[0]
        self._marks = None if problems else marks
        return True

    def _take(self, generation: int, changes: Mapping[int, Change]) -> None:
        """Writes prefixes that change into spare slots; then who has a live prefix answers."""
        held = dict(self._answers.current.held)
        paths = {shard: change.path for shard, change in changes.items()}
        kept = {shard: slot for shard, slot in held.items() if paths.get(shard, slot.path) == slot.path}
        wanted = {shard: change for shard, change in changes.items() if change.path and shard not in kept}
        with self._answers.changing(len(wanted)) as spare:
            taken, written = dict(kept), []
            try:
                for place, (shard, change) in enumerate(wanted.items()):
                    slot = self._slots[spare[place]] if spare else self._own_slot(shard, held)
                    written.append(slot)
                    slot.take(change, held.get(shard, slot))
                    taken[shard] = slot
            except BaseException:  # interrupted: who still has an old prefix and should not answers no more
                for slot in written:
                    slot.clear()
                self._answers.replace(self._state_of(generation, kept), {slot.number for slot in kept.values()})
                raise
            self._answers.replace(self._state_of(generation, taken), {slot.number for slot in taken.values()})

    def _own_slot(self, shard: int, held: Mapping[int, Slot]) -> Slot:
        """A slot that may be written over while nobody answers: the shard's own, or one that no shard has."""
        numbers = {slot.number for slot in held.values()}
        return held.get(shard) or next(slot for number, slot in self._slots.items() if number not in numbers)

    def _state_of(self, generation: int, held: Mapping[int, Slot], settled: bool = False) -> State:
        """The state in which shards answer from the slots that they hold; the trunk moves up where it is `settled`."""
        held, before = dict(sorted(held.items())), self._answers.current
        lowest = _lowest_layer(held)
        if before.names and not settled:
            lowest = min(lowest, before.serving.lowest_layer)
        numbers = torch.tensor([slot.number for slot in held.values()], dtype=torch.long)
        serving = Serving(numbers.to(self._stack.base.device), lowest)
        return State(generation, tuple(map(member_name, held)), serving, held)

    def _clear(self, number: int) -> None:
        if self._slots:
            self._slots[number].clear()

    def _read_changes(self) -> tuple[Manifest, dict[int, Change], list[StoreError]]:
        """What has to change, read while answers go on; anew where the store changed meanwhile."""
        store = self._own_store()
        for reading in range(READINGS):
            marks, manifest = store.marks(), store.live()
            changes, problems = {}, []
            served = manifest.plan.served(manifest.stages)
            if more := sorted(shard for shard in served if shard >= self._shards):
                problems.append(StoreError(f"{store.path} has shards now that were not loaded: {more}. Load it anew."))
            held = self._answers.current.held
            for shard in range(self._shards):
                slot = held.get(shard, self._empty)
                path = _needed(Stage(shard, served[shard]), manifest) if shard in served else ()
                try:
                    changes[shard] = slot.plan(store, manifest, path)
                except (StoreError, OSError) as error:
                    problems.append(error if isinstance(error, StoreError) else StoreError(str(error)))
                    if any(manifest.stages.get(stage, {}).get(WEIGHTS_FILE) != sha for stage, sha in slot.path):
                        changes[shard] = slot.plan(store, manifest, ())
            if not problems or store.marks() == marks or reading == READINGS - 1:
                break
        return manifest, changes, problems


def _lowest_layer(held: Mapping[int, Slot]) -> int:
    return min((slot.lowest_layer for slot in held.values()), default=0)


PASS = "_s3t_serving"
"""The argument by which a forward pass is told who answers: what runs before it is not compiled with it."""


@torch.compiler.disable
def _begin_pass(ensemble: S3TEnsemble, args: Any, kwargs: dict[str, Any]) -> Any:
    ensemble._answers.begin()
    return args, {**kwargs, PASS: ensemble._answers.state.serving}


@torch.compiler.disable
def _end_pass(ensemble: S3TEnsemble, args: Any, output: Any) -> None:
    ensemble._answers.end()


def _needed(stage: Stage, manifest: Manifest) -> tuple[Stage, ...]:
    """The stages along a prefix whose tensors it has: where a stage trains all layers, the last one alone."""
    return stage.path[-1:] if manifest.recipe["config"].get("stage_parameters") == "all" else stage.path
