"""`S3TEnsemble`: the served model in memory, which forgets while it answers.

It holds the base model once and one slot per shard, allocated at full depth (`slots.py`). A deletion, or a store that
somebody else changed, overwrites the slots between two answers (`gate.py`).
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.modeling_outputs import ModelOutput

from ..errors import S3TError, StoreError
from ..lora.adapter import WEIGHTS_FILE
from ..plan.tree import Stage
from ..seams.answering import caches_in, introduce_to_pipelines
from ..store.manifest import Manifest
from ..store.receipts import Receipt
from ..store.store import S3TStore
from .averages import Combine
from .gate import Gate
from .loading import base_of, member_name, opened, take_out, with_slots
from .members import Members
from .slots import Change, Slot

logger = logging.getLogger(__name__)

READINGS = 5
"""How often a store is read anew that changes while it is read."""


LOOKING = ("_", "can_", "create_extended_", "get_", "is_", "num_", "prepare_inputs_", "print_", "warn_")
"""How the methods of a model begin that change nothing in it. The private ones are for those who know what they do."""


class S3TEnsemble(nn.Module):
    """Answers with the average of its members, the served prefixes of a store's live shards.

    Any number of threads may call it and `generate` while another deletes or refreshes: an answer is computed wholly
    before a change or wholly after it.

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
        self.model: Any = model
        self.generation = 0
        self._members = Members(model, combine)
        self._gate = Gate()
        self._following = threading.Lock()
        self._slots: dict[int, Slot] = {}  # by shard
        self._store: S3TStore | None = None
        self._marks: Any = None
        self._members.serve(list(members), min(members.values(), default=0))

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
            kwargs: for the base model's `from_pretrained`: `dtype`, `device_map`, `quantization_config` and so on.

        Raises:
            ValueError: the store was opened already, or is a folder, and arguments say how to open a repository.
            StoreError: the store does not say which base it needs, its files are damaged, or the base is another one.
        """
        store = opened(folder, key=key, state=state, revision=revision, token=token)
        manifest = store.live()
        names = [member_name(shard) for shard in range(manifest.plan.num_shards)]
        model = with_slots(base_of(store, base_model, kwargs), manifest, names)
        ensemble = cls(model, {}, combine)
        stored = manifest.recipe["config"]
        rank = stored["r"] if stored.get("stage_parameters") == "rank_group" else None
        ensemble._slots = {shard: Slot.of(model, name, rank) for shard, name in enumerate(names)}
        for slot in ensemble._slots.values():
            slot.clear()
        ensemble._store = store
        introduce_to_pipelines(cls.__name__)
        try:
            ensemble.refresh()
        except BaseException:
            ensemble.detach()
            take_out(model)
            raise
        ensemble.eval()._members.look()
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
    def members(self) -> list[str]:
        """Names of the members that answer: one per live shard."""
        return list(self._members.names)

    # ---- answering ----

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        """As the base model's; the logits are the ensemble's, and a loss follows from them.

        Shapes are the base model's, too: `(batch, classes)`, `(batch, sequence, vocabulary)`.
        """
        with self._gate.answering():
            return self._members.base(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the base model's `generate`: greedy, sampling or beam search on the ensemble's probabilities.

        The whole generation is one answer: a deletion waits for it.

        Raises:
            ValueError: an encoder-decoder model, or a kind of cache that cannot hold several members.
        """
        with self._gate.answering():
            if len(self.members) > 1:
                kwargs = self._with_cache(kwargs)
            return self._members.base.generate(*args, **kwargs)

    def _with_cache(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        self._members.refuse_encoder_decoder()
        self._members.look()
        given, caches = kwargs.get("generation_config"), caches_in(kwargs)
        for name, cache in caches.items():
            self._members.check_cache(name, cache)
        if caches or kwargs.get("use_cache", (given or self.generation_config).use_cache) is False:
            return kwargs
        kind = kwargs.get("cache_implementation", given and given.cache_implementation)
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} makes a cache that has one row per example, an ensemble needs one per "
                "member. Leave it out: a dynamic cache is made for the members."
            )
        return {**kwargs, **self._members.new_cache(), "cache_implementation": None}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a copy that no deletion knows of would carry on what was deleted."""
        raise S3TError("Save a copy with `store.export(path)`: a later deletion then names it, or makes it anew.")

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the members are what the store serves."""
        raise S3TError("The members' tensors are the store's. Load another store with `S3TEnsemble.from_pretrained`.")

    def detach(self) -> None:
        """Gives the base model back: it answers by itself again, with whichever adapter is active."""
        self._members.detach()

    # ---- changing ----

    def delete(self, ids: Any = (), groups: Any = (), rows: Any = (), slices: Any = (), **kwargs: Any) -> Receipt:
        """Deletes examples from the store on disk and from this model, without a gradient step.

        As soon as the deletion is on record in the store, the model stops answering with anything it covers; then the
        files are removed. Running answers are waited for. Arguments, return value and errors are those of
        [`S3TStore.delete`]; other copies of the model [`refresh`].
        """
        asked = {"ids": ids, "groups": groups, "rows": rows, "slices": slices}
        self._gate.check_outside()
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
        self._gate.check_outside()
        with self._following:
            changed = self._follow(strict=True)
            lowest = self._lowest_layer()
            if lowest != self._members.lowest_layer:  # a deletion left it where it was
                with self._gate.changing():
                    self._members.serve(self.members, lowest)
        return changed

    def _own_store(self) -> S3TStore:
        if self._store is None:
            raise S3TError("This ensemble was not loaded from a store. Load it with `S3TEnsemble.from_pretrained`.")
        return self._store

    def _live_slots(self) -> list[Slot]:
        """The slots that answer, by shard."""
        return [slot for slot in self._slots.values() if slot.path]

    def _lowest_layer(self) -> int:
        return min((slot.lowest_layer for slot in self._live_slots()), default=0)

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
        with self._gate.changing():
            self._take(changes)
            self.generation = manifest.generation
        if not self.members and (self._marks is None or before):
            logger.warning("no stage of %s is live: the bare base model answers", self._own_store().path)
        for problem in problems:
            logger.error("a member could not be brought up to date: %s", problem)
        if problems and strict:
            raise problems[0]
        self._marks = None if problems else marks
        return True

    def _take(self, changes: Mapping[int, Change]) -> None:
        """Overwrites the slots that change; who has a live prefix then answers."""
        try:
            for shard, change in changes.items():
                self._slots[shard].take(change)
        except BaseException:  # interrupted: who still has an old prefix and should not answers no more
            for shard, change in changes.items():
                if self._slots[shard].path != change.path:
                    self._slots[shard].clear()
            raise
        finally:
            live, lowest = [slot.name for slot in self._live_slots()], self._lowest_layer()
            if live != self.members or lowest < self._members.lowest_layer:
                self._members.serve(live, lowest)

    def _read_changes(self) -> tuple[Manifest, dict[int, Change], list[StoreError]]:
        """What has to change, read while answers go on; anew where the store changed meanwhile."""
        store = self._own_store()
        for reading in range(READINGS):
            marks, manifest = store.marks(), store.live()
            changes, problems = {}, []
            served = manifest.plan.served(manifest.stages)
            if more := sorted(served.keys() - self._slots.keys()):
                problems.append(StoreError(f"{store.path} has shards now that were not loaded: {more}. Load it anew."))
            for shard, slot in self._slots.items():
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


def _needed(stage: Stage, manifest: Manifest) -> tuple[Stage, ...]:
    """The stages along a prefix whose tensors it has: where a stage trains all layers, the last one alone."""
    return stage.path[-1:] if manifest.recipe["config"].get("stage_parameters") == "all" else stage.path
