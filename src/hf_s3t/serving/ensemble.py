"""`S3TEnsemble`: the served model in memory, which forgets while it answers.

It holds the base model once and one slot per shard, allocated at full depth (`slots.py`); all members answer one batch
together (`members.py`). A deletion, or a store that somebody else changed, overwrites the slots between two answers
(`gate.py`). What is served is decided by `store/folder.py`.
"""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.modeling_outputs import ModelOutput

from ..errors import S3TError, StoreError
from ..lora.adapter import WEIGHTS_FILE, with_rank
from ..lora.config import LORA_FIELDS, S3TConfig
from ..lora.layout import find_layout
from ..lora.tuner import plain_lora_config
from ..plan.tree import Stage
from ..seams.answering import caches_in, introduce_to_pipelines
from ..store.base_model import check_base, load_base
from ..store.deletion import Receipt
from ..store.folder import StoreFolder
from ..store.manifest import Manifest
from ..store.sources import is_repo_id
from ..store.store import S3TStore
from .averages import Combine
from .gate import Gate
from .members import Members
from .slots import Change, Slot

logger = logging.getLogger(__name__)

Serve = Literal["longest", "all"]
Place = tuple[int, int]
"""A slot's shard, and its number in it."""

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
        self._slots: dict[Place, Slot] = {}
        self._serve: Serve = "longest"
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
        serve: Serve = "longest",
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
            serve (`"longest"` or `"all"`): which prefixes answer: the served prefix of each live shard, all counting
                the same, or every surviving sequence of every shard, counting as much as it is long. The latter asks
                for memory and time for all of them.
            key, state, revision, token (*optional*): how the store is opened, see [`S3TStore`]; a revision and a token
                are those of its repository. The base is loaded at the revision that the store names, with the token
                that is logged in.
            kwargs: for the base model's `from_pretrained`: `dtype`, `device_map`, `quantization_config` and so on.

        Raises:
            ValueError: the store was opened already, or is a folder, and arguments say how to open a repository; or
                `serve` is neither of the two.
            StoreError: the store does not say which base it needs, its files are damaged, or the base is another one.
        """
        if serve not in ("longest", "all"):
            raise ValueError(f"serve must be 'longest' or 'all', not {serve!r}.")
        store = _opened(folder, key=key, state=state, revision=revision, token=token)
        manifest = store.live()
        if not isinstance(base_model, nn.Module):
            base_model, _ = load_base(store, base_model, **kwargs)
        elif kwargs:
            raise ValueError(f"{sorted(kwargs)} are for loading a base model, but one was given. Leave them out.")
        else:
            check_base(base_model, manifest.recipe)
        names = _slot_names(manifest, serve)
        model = _with_slots(base_model, manifest, list(names.values()))
        ensemble = cls(model, {}, combine)
        ensemble._serve = serve
        stored = manifest.recipe["config"]
        rank = stored["r"] if stored.get("stage_parameters") == "rank_group" else None
        ensemble._slots = {place: Slot.of(model, name, rank) for place, name in names.items()}
        for slot in ensemble._slots.values():
            slot.clear()
        ensemble._store = store
        introduce_to_pipelines(cls.__name__)
        try:
            ensemble.refresh()
        except BaseException:
            ensemble.detach()
            _take_out(model)
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
        """Names of the members that answer: one per live shard, or per surviving sequence."""
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
            ValueError: an encoder-decoder model, or a kind of cache that can not hold several members.
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
        self._gate.check_outside()
        receipt = self._own_store().delete(ids, groups, rows, slices, when_durable=self._follow_deletion, **kwargs)
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
                    self._members.serve(self.members, lowest, self._weights())
        return changed

    def _own_store(self) -> S3TStore:
        if self._store is None:
            raise S3TError("This ensemble was not loaded from a store. Load it with `S3TEnsemble.from_pretrained`.")
        return self._store

    def _live_slots(self) -> list[Slot]:
        """The slots that answer, as their stages are ordered: who has which slot, a sum's last bits must not tell."""
        return sorted((slot for slot in self._slots.values() if slot.path), key=lambda slot: slot.path[-1][0])

    def _lowest_layer(self) -> int:
        return min((slot.lowest_layer for slot in self._live_slots()), default=0)

    def _weights(self) -> list[float] | None:
        """What each member counts: the length of its prefix, where every surviving sequence answers."""
        if self._serve == "longest":
            return None
        return [float(slot.path[-1][0].depth) for slot in self._live_slots()]

    def _follow_deletion(self) -> None:
        with self._following:
            self._follow(strict=False)

    def _follow(self, strict: bool) -> bool:
        """Makes the slots what the store serves now; returns whether the store had changed.

        A member whose new prefix can not be read keeps the old one if all of it is still live, and is dropped if not;
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
        before, weights = self.members, self._weights()
        with self._gate.changing():
            try:
                for place, change in changes.items():
                    self._slots[place].take(change)
            except BaseException:  # interrupted: who still has an old prefix and should not answers no more
                for place, change in changes.items():
                    if self._slots[place].path != change.path:
                        self._slots[place].clear()
                raise
            finally:
                live, lowest = [slot.name for slot in self._live_slots()], self._lowest_layer()
                if live != before or lowest < self._members.lowest_layer or weights != self._weights():
                    self._members.serve(live, lowest, self._weights())
            self.generation = manifest.generation
        if not live and (self._marks is None or before):
            logger.warning("no stage of %s is live: the bare base model answers", self._own_store().path)
        for problem in problems:
            logger.error("a member could not be brought up to date: %s", problem)
        if problems and strict:
            raise problems[0]
        self._marks = None if problems else marks
        return True

    def _read_changes(self) -> tuple[Manifest, dict[Place, Change], list[StoreError]]:
        """What has to change, read while answers go on; anew where the store changed meanwhile."""
        store = self._own_store()
        for reading in range(READINGS):
            marks, manifest = store.marks(), store.live()
            changes = {}
            wanted, problems = self._wanted(manifest)
            for place, slot in self._slots.items():
                path = _needed(wanted[place], manifest) if place in wanted else ()
                try:
                    changes[place] = slot.plan(store, manifest, path)
                except (StoreError, OSError) as error:
                    problems.append(error if isinstance(error, StoreError) else StoreError(str(error)))
                    if any(manifest.stages.get(stage, {}).get(WEIGHTS_FILE) != sha for stage, sha in slot.path):
                        changes[place] = slot.plan(store, manifest, ())
            if not problems or store.marks() == marks or reading == READINGS - 1:
                break
        return manifest, changes, problems

    def _wanted(self, manifest: Manifest) -> tuple[dict[Place, Stage], list[StoreError]]:
        """The prefix of each slot, which is the one that has most of it already, and errors for what has no slot."""
        wanted: dict[Place, Stage] = {}
        problems = []
        for shard, prefixes in manifest.plan.surviving(manifest.stages).items():
            free = [place for place in self._slots if place[0] == shard]
            chosen = prefixes if self._serve == "all" else prefixes[:1]
            if len(free) < len(chosen):
                grown = "has more shards or sequences than when it was loaded. Load it anew."
                problems.append(StoreError(f"{self._own_store().path} {grown}"))
            for prefix in chosen[: len(free)]:
                stage = Stage(shard, prefix)
                place = max(free, key=lambda place: len({own for own, _ in self._slots[place].path} & {*stage.path}))
                wanted[place] = stage
                free.remove(place)
        return wanted, problems


def _opened(folder: str | os.PathLike[str] | S3TStore, **how: Any) -> S3TStore:
    given = {name: value for name, value in how.items() if value is not None}
    if isinstance(folder, S3TStore):
        if given:
            raise ValueError(f"{sorted(given)} say how to open a store, but one was given. Open it with them.")
        return folder
    if not is_repo_id(folder) and given.keys() & {"revision", "token"}:
        raise ValueError(
            f"`revision` and `token` are for a store in a repository, and {folder} is a folder. For another base, or "
            "with another token, load the base and pass `base_model=`."
        )
    return S3TStore(folder, **how)


def _needed(stage: Stage, manifest: Manifest) -> tuple[Stage, ...]:
    """The stages along a prefix whose tensors it has: where a stage trains all layers, the last one alone."""
    return stage.path[-1:] if manifest.recipe["config"].get("stage_parameters") == "all" else stage.path


def _slot_names(manifest: Manifest, serve: Serve) -> dict[Place, str]:
    """An adapter's name for each place: of every shard, or of every sequence that one has or may come to have."""
    if serve == "longest":
        return {(shard, 0): f"shard-{shard:02d}" for shard in range(manifest.plan.num_shards)}
    surviving = manifest.plan.surviving(manifest.stages)
    counts = [max(len(orders), len(surviving.get(shard, ()))) for shard, orders in enumerate(manifest.plan.sequences)]
    return {(shard, turn): f"shard-{shard:02d}-{turn}" for shard, count in enumerate(counts) for turn in range(count)}


def _with_slots(base: nn.Module, manifest: Manifest, names: list[str]) -> Any:
    """The base with adapters over all grouped layers, with rank groups of the ranks of all slices; what is
    in them is still to be written."""
    stored = manifest.recipe["config"]
    if any(isinstance(module, LoraLayer | ModulesToSaveWrapper) for module in base.modules()):
        raise StoreError("This base model carries adapters already, maybe another ensemble's. Load it once more.")
    kept = (*LORA_FIELDS, "task_type", "stage_parameters")
    fields: dict[str, Any] = {name: stored[name] for name in kept if name in stored}
    config = S3TConfig(num_shards=manifest.plan.num_shards, num_slices=manifest.plan.num_slices, **fields)
    layers = tuple(sorted(layer for group in stored["groups"] for layer in group))
    try:
        layout = find_layout(base, config)
        if not set(layers) <= set(layout.targets):
            raise ValueError(
                f"the store has stages for layers up to {layers[-1]}, the model has {len(layout.targets)}"
            )
    except ValueError as error:
        raise StoreError(f"This is not the base model that the store was trained on: {error}") from None
    plain = plain_lora_config(config, layout, layers)
    if config.stage_parameters == "rank_group":
        plain = with_rank(plain, config.r * manifest.plan.num_slices)
    model: Any = base
    with torch.random.fork_rng(devices=[]):  # PEFT draws numbers that are overwritten
        for name in names:
            if model is base:
                model = get_peft_model(base, LoraConfig(**plain), adapter_name=name)
            else:
                PeftModel.add_adapter(model, name, LoraConfig(**plain))
    return model.requires_grad_(False)


def _take_out(model: Any) -> None:
    """Gives the base model back as it was, without slots."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter([])
    model.unload()


def read_members(store: StoreFolder) -> dict[str, Any]:
    """The served prefix of every live shard, assembled, by the name that its adapter gets (`"shard-00"`)."""
    manifest = store.live()
    served = sorted(manifest.plan.served(manifest.stages).items())
    return {f"shard-{shard:02d}": store.assemble(shard, prefix, manifest) for shard, prefix in served}
