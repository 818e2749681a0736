"""What a model in memory does when its store has changed: it reads what is new, and puts it into slots."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import StoreError
from ..lora.adapter import WEIGHTS_FILE
from ..plan.tree import Order, Stage
from ..store.manifest import Manifest
from ..store.outlook import tell_of_change
from ..store.store import S3TStore
from .answers import Answers
from .loading import member_name
from .members import Serving
from .slots import Change, Owner, Slot
from .stack import Stack

logger = logging.getLogger(__name__)

READINGS = 5
"""How often a store is read anew that changes while it is read."""


@dataclass(frozen=True)
class State:
    """What an answer is computed with, from its beginning to its end."""

    generation: int
    names: tuple[str, ...]  # of the members
    serving: Serving
    held: Mapping[int, Slot] = field(default_factory=dict)  # by shard
    paths: tuple[tuple[str, ...], ...] = ()  # of the members: what each slot held, as slots are written over later

    @property
    def identity(self) -> tuple[Any, ...]:
        """The same for two states whose members have the same tensors, in plain data."""
        return self.names, self.paths


class Follower:
    """Keeps the slots of a model what a store serves.

    Args:
        store ([`S3TStore`]): that is followed.
        stack ([`Stack`]): has the slots.
        answers ([`Answers`]): which of them answers run on.
        shards (`int`): those that are followed, from 0 on.
        rank (`int`, *optional*): of a rank group; `None`: stages have matrices of their own.
    """

    def __init__(self, store: S3TStore, stack: Stack, answers: Answers[State], shards: int, rank: int | None):
        self.store, self.stack, self.answers, self.shards = store, stack, answers, shards
        self.empty = Slot(stack, 0, rank)  # is asked for the prefix of a shard that has none
        self.slots = {number: self.empty.beside(number) for number in range(stack.slots)}
        self.marks: Any = None
        self.told: dict[int, Order] = {}  # what answered when the log was last told of it
        self._manifest: Manifest | None = None  # that was followed last
        self.lacking = 0  # slots, for prefixes that the store serves and the model not yet
        self._waiting = threading.Lock()  # of whoever may wait for answers, one after the other
        self._following = threading.Lock()  # of whoever changes the slots, which waits for nobody
        for number in self.slots:
            self.clear(number)

    def clear(self, number: int) -> None:
        """Zeroes a slot that nobody uses any more."""
        self.stack.wait()
        self.slots[number].clear()

    def follow(self, strict: bool, settle: bool = False, wait: bool = True) -> bool:
        """Makes the slots what the store serves now; returns whether the store had changed.

        A member whose new prefix cannot be read keeps the old one if all of it is still live, and is dropped if not;
        with `strict` that is an error at the end. So it is, without an error, where fewer slots are spare than there
        are new prefixes, until running answers have ended: with `wait` that is waited for, and otherwise left to the
        next time. With `settle` the trunk moves up where a deletion left it too low.
        """
        if not wait:
            return self._step(strict, settle)[0]
        with self._waiting:
            changed, lacking = self._step(strict, settle)
            while lacking:
                with self.answers.changing(lacking) as spare:
                    lacking = self._step(strict, settle, alone=not spare)[1]
        return changed

    @property
    def served(self) -> dict[int, Order]:
        """The prefix that each member answers with, by shard."""
        return {shard: slot.path[-1][0].prefix for shard, slot in self.answers.current.held.items() if slot.path}

    def tell(self) -> None:
        """One warning if less answers than when this was last asked. Nobody waits for it."""
        if self.lacking or self._manifest is None:  # more will answer as soon as running answers end
            return
        before, self.told = self.told, self.served
        tell_of_change(self.store, self._manifest, before, self.told)

    def _step(self, strict: bool, settle: bool, alone: bool = False) -> tuple[bool, int]:
        """Does what can be done without waiting; returns whether the store had changed, and how many slots lack.

        `alone`: no answer runs meanwhile.
        """
        with self._following:
            found = self._follow(strict, alone)
            state = self.answers.current
            if settle and _lowest_layer(state.held) > state.serving.lowest_layer:
                self._replace(state.generation, state.held, settled=True)
        return found

    def _follow(self, strict: bool, alone: bool) -> tuple[bool, int]:
        marks = self.store.marks()
        if marks == self.marks:
            return False, 0
        manifest, changes, problems = self._read_changes()
        generation, before = self.answers.current.generation, self.answers.current.names
        if manifest.generation < generation:  # an older copy of the store: it may serve what was deleted
            error = StoreError(
                f"{self.store.path} is of generation {manifest.generation} now, the model answers with "
                f"{generation}, which is kept. An older copy was put there: bring the store up to date."
            )
            if strict:
                raise error
            logger.error("%s", error)
            return False, 0
        self.lacking = lacking = self._take(manifest, changes, alone)
        self._manifest = manifest
        if lacking:
            logger.warning(
                "%d new prefixes of %s wait until running answers end. Until then these answer: %s", lacking,
                self.store.path, ", ".join(self.answers.current.names) or "nobody",
            )  # fmt: skip
        elif not self.answers.current.names and self.marks is None and not before:
            logger.warning("no stage of %s is live: the bare base model answers", self.store.path)
        for problem in problems:
            logger.error("a member could not be brought up to date: %s", problem)
        self.marks = None if problems or lacking else marks
        if problems and strict:
            raise problems[0]
        return True, lacking

    def _take(self, manifest: Manifest, changes: Mapping[int, Change], alone: bool) -> int:
        """Writes prefixes that change into spare slots; then who has a live prefix answers.

        Returns how many slots that needs, if fewer are spare: then nobody answers with what is not live any more, and
        where no member is left new answers wait.
        """
        held, generation = dict(self.answers.current.held), manifest.generation
        paths = {shard: change.path for shard, change in changes.items()}
        kept = {shard: slot for shard, slot in held.items() if paths.get(shard, slot.path) == slot.path}
        wanted = {shard: change for shard, change in changes.items() if change.path and shard not in kept}
        if kept == held and not wanted and generation == self.answers.current.generation:
            return 0
        spare = self.answers.spare
        if len(spare) < len(wanted) and not alone:
            old = {shard: held[shard] for shard in wanted if shard in held and _is_live(held[shard].path, manifest)}
            self._replace(generation, kept | old, unfinished=not (kept or old))
            return len(wanted)
        slots = self._own_slots(wanted, held) if alone else [self.slots[number] for number in spare[: len(wanted)]]
        try:
            for slot, (shard, change) in zip(slots, wanted.items(), strict=True):
                slot.take(change, held.get(shard, slot))
        except BaseException:  # interrupted: who still has an old prefix and should not answers no more
            for slot in slots:
                slot.clear()
            self._replace(generation, kept)
            raise
        self._replace(generation, kept | dict(zip(wanted, slots, strict=True)))
        return 0

    def _own_slots(self, wanted: Iterable[int], held: Mapping[int, Slot]) -> list[Slot]:
        """Slots that may be written over while nobody answers: a shard's own, or one that no shard has."""
        used = {slot.number for slot in held.values()}
        free = [slot for number, slot in self.slots.items() if number not in used]
        return [held[shard] if shard in held else free.pop() for shard in wanted]

    def _replace(
        self, generation: int, held: Mapping[int, Slot], settled: bool = False, unfinished: bool = False
    ) -> None:
        self.stack.wait()
        state = self._state_of(generation, held, settled)
        self.answers.replace(state, {slot.number for slot in held.values()}, unfinished)

    def _state_of(self, generation: int, held: Mapping[int, Slot], settled: bool = False) -> State:
        """The state in which shards answer from the slots that they hold; the trunk moves up where it is `settled`."""
        held, before = dict(sorted(held.items())), self.answers.current
        lowest = _lowest_layer(held)
        if before.names and not settled:
            lowest = min(lowest, before.serving.lowest_layer)
        numbers = torch.tensor([slot.number for slot in held.values()], dtype=torch.long)
        serving = Serving(numbers.to(self.stack.base.device), lowest)
        paths = tuple(tuple(f"{stage.name} {sha}" for stage, sha in slot.path) for slot in held.values())
        return State(generation, tuple(map(member_name, held)), serving, held, paths)

    def _read_changes(self) -> tuple[Manifest, dict[int, Change], list[StoreError]]:
        """What has to change, read while answers go on; anew where the store changed meanwhile."""
        store = self.store
        for reading in range(READINGS):
            marks, manifest = store.marks(), store.live()
            changes, problems = {}, []
            served = manifest.plan.served(manifest.stages)
            if more := sorted(shard for shard in served if shard >= self.shards):
                problems.append(StoreError(f"{store.path} has shards now that were not loaded: {more}. Load it anew."))
            held = self.answers.current.held
            for shard in range(self.shards):
                slot = held.get(shard, self.empty)
                path = _needed(Stage(shard, served[shard]), manifest) if shard in served else ()
                try:
                    changes[shard] = slot.plan(store, manifest, path)
                except (StoreError, OSError) as error:
                    problems.append(error if isinstance(error, StoreError) else StoreError(str(error)))
                    if not _is_live(slot.path, manifest):
                        changes[shard] = slot.plan(store, manifest, ())
            if not problems or store.marks() == marks or reading == READINGS - 1:
                break
        return manifest, changes, problems


def _is_live(path: Iterable[Owner], manifest: Manifest) -> bool:
    return all(manifest.stages.get(stage, {}).get(WEIGHTS_FILE) == sha for stage, sha in path)


def _lowest_layer(held: Mapping[int, Slot]) -> int:
    return min((slot.lowest_layer for slot in held.values()), default=0)


def _needed(stage: Stage, manifest: Manifest) -> tuple[Stage, ...]:
    """The stages along a prefix whose tensors it has: where a stage trains all layers, the last one alone."""
    return stage.path[-1:] if manifest.recipe["config"].get("stage_parameters") == "all" else stage.path
