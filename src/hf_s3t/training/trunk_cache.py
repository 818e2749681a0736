"""The activation cache of a training: each row's states computed once, and fed to every stage that can use them.

Which states are kept, and where, changes no bit of a stage: what is not kept is computed when it is needed, in the
same way.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from accelerate.logging import get_logger

from ..lora.tuner import owned_layers
from ..plan.tree import Stage
from ..seams.models import computing_settings
from ..store.activation_blocks import Block, BlockName, Blocks, FileBlocks, MemoryBlocks
from ..store.manifest import Manifest
from ..store.partition import Entry, canonical
from ..store.receipts import versions
from ..store.requests import Place
from ..trunk.choice import choose_blocks, drop_beyond
from ..trunk.row_batches import RowBatches, Way, longest_of_each_width, way_to_compute
from ..trunk.row_numbers import NumberingCollator
from ..trunk.row_states import ActivationCache, AloneRows, check_model
from ..trunk.trunk import Trunk
from .processes import on_every_process, on_main_process
from .stage_orders import StageDropped, StageOrder

logger = get_logger(__name__)

Rows = list[tuple[str, int]]
"""Keyed digests of examples, with the numbers of their prepared rows."""
SAMPLE = 32
"""Rows that are looked at to estimate sizes, and to see how long rows are."""


class TrunkCache:
    """Feeds the stages of one trainer. What the arguments mean is told by [`S3TMixin`]."""

    def __init__(self, trainer: Any, cache: ActivationCache, limit_gb: float | None, eval_trunk: bool):
        self.trainer, self.cache, self.eval_trunk = trainer, cache, eval_trunk
        self.limit = None if limit_gb is None else limit_gb * 1e9
        self.blocks: Blocks | None = None
        self._batches = RowBatches(True, 0)
        self.kept: list[BlockName] = []
        self._entrance = 0
        self._checked: set[int] = set()
        self._verified: set[BlockName] = set()
        self._sources: dict[int, tuple[int, torch.Tensor | None]] = {}

    @property
    def on(self) -> bool:
        """Whether stages are fed."""
        return self.cache != "off"

    def way(self) -> Way:
        """How states are computed, for the recipe: as those of the store were; `False` without a cache."""
        store = self.trainer.store
        before = store.manifest().recipe.get("cached_trunk") if store.exists else None
        return self.on and way_to_compute(before, self.trainer.args.device.type)

    # ---- a stage ----

    @contextmanager
    def stage(self, order: StageOrder) -> Iterator[None]:
        """Every state that the stage wants is known, and the trainer's collator compares rows with them."""
        self._forget_deleted()
        entrance = self._entrance_of(order.stage.depth)
        if not self.on or entrance == 0:
            yield
            return
        trainer, marking = self.trainer, self.trainer.data_collator
        rows = trainer.rows.numbered(order.examples)
        self._entrance, self.trunk = entrance, Trunk(trainer.model, trainer.tuner.layout.container)
        self.collator = NumberingCollator(marking.collate, self.trunk.main_input, trainer.rows.key)
        self.trunk.check_checkpointing(entrance)
        trainer.data_collator = self.collator
        self.trunk.attach(entrance)
        try:
            self._rows = AloneRows(trainer, self.trunk, self.collator)
            self._prepare(order, rows)
            yield
        finally:
            self.trunk.detach()
            trainer.data_collator = marking
            self._sources = {}
            for name in ("trunk", "collator", "_rows"):
                vars(self).pop(name, None)

    def _entrance_of(self, depth: int) -> int:
        """The lowest layer that stages at a depth train: nothing below has an adapter."""
        return min(owned_layers(self.trainer.s3t_config, self.trainer.tuner.layout, depth))

    def _prepare(self, order: StageOrder, rows: Rows) -> None:
        """Computes what no block holds yet, and finds out where the states of every row are."""
        if self._entrance not in self._checked:
            some = self._rows.company(_sample([number for _, number in rows]))
            check = partial(check_model, self._rows, some, self._entrance, self.eval_trunk)
            on_every_process(self.trainer.args, check)
            self._checked.add(self._entrance)
        if self.blocks is None:
            self._settle(rows)
        self._batches.begin(self._rows)
        by_place: dict[Place, Rows] = {}
        for example, number in rows:
            entry = self.trainer.rows.entries[example]
            by_place.setdefault((entry.shard, entry.slice), []).append((example, number))
        on_every_process(self.trainer.args, partial(self._fill_absent, order, by_place))
        for place, own in by_place.items():
            self._locate(place, own)

    def _usable(self, place: Place) -> list[BlockName]:
        """Blocks of a slice that the running stage can start from, the lowest first."""
        return sorted(name for name in self.kept if name.place == place and name.layer <= self._entrance)

    def _examples(self, rows: Rows) -> list[tuple[str, str]]:
        return [(example, self.trainer.rows.entries[example].content) for example, _ in rows]

    def _read(self, name: BlockName, rows: Rows) -> Block | None:
        """A block's part for some rows, in their order, if it has all of them."""
        assert self.blocks is not None
        block = self.blocks.read(name)
        return block.part(self._examples(rows)) if block else None

    def _is_good(self, name: BlockName, rows: Rows) -> bool:
        """Whether a block is there, of these very rows, and what this run computes; rows of each width tell, once."""
        block = self._read(name, rows)
        if block is None or name in self._verified:
            return block is not None
        numbers = [number for _, number in rows]
        positions = longest_of_each_width(list(map(len, block.states)))
        with self.trunk.evaluating():
            found = self._batches.states([numbers[position] for position in positions], [name.layer])
        for position, seen in zip(positions, found, strict=True):
            states, kept = seen[name.layer].cpu(), block.states[position]
            same = states.dtype == kept.dtype and torch.equal(states, kept)
            if not same or block.inputs[position] != self._batches.digest(numbers[position]):
                logger.warning(
                    "%s is made again: a row of it differs from what the collator and the model give now", name.file,
                    main_process_only=False,
                )  # fmt: skip
                return False
        self._verified.add(name)
        return True

    def _locate(self, place: Place, rows: Rows) -> None:
        """Notes where the states of a slice's rows start, and what the collator has to make of them."""
        found = [(name, block) for name in self._usable(place) if (block := self._read(name, rows)) is not None]
        for position, (_, number) in enumerate(rows):
            if found:
                name, block = found[-1]
                self._sources[number] = name.layer, block.states[position]
                self.collator.expected[number] = block.inputs[position]
            else:
                self._sources[number] = 0, None
                self.collator.expected[number] = self._batches.digest(number)
            if self._sources[number][0] < self._entrance:  # steps will compute it: the probe comes before the first
                self._batches.digest(number)

    # ---- computing states ----

    def _fill_absent(self, order: StageOrder, by_place: Mapping[Place, Rows]) -> None:
        """Fills what the stage lacks; files are written by one process each, memory by every process."""
        args = self.trainer.args
        for place, rows in sorted(by_place.items()):
            if self.cache == "memory" or place[1] % args.world_size == args.process_index:
                absent = [name for name in self._usable(place) if not self._is_good(name, rows)]
                if absent:
                    self._fill(order, absent, rows)

    def _fill(self, order: StageOrder, names: list[BlockName], rows: Rows) -> None:
        """Computes blocks of one slice, batch by batch, from the highest block below them."""
        assert self.blocks is not None
        rows = self._batches.ordered(rows)
        below = [(name.layer, self._read(name, rows)) for name in self._usable(names[0].place) if name < names[0]]
        start, source = below[-1] if below else (0, None)
        writers: list[Any] = []
        for name in names:  # what is there of other rows would take room beside the new one
            self.blocks.drop(name)
        others = self._bytes_beside(names)

        def check_room(more: int = 0) -> None:
            if self.limit is not None and others + sum(writer.bytes for writer in writers) + more > self.limit:
                raise OSError(f"more than the {self.limit / 1e9:.3g} GB of activation_cache_gb")

        try:
            writers.extend(self.blocks.writer(name, self._examples(rows)) for name in names)
            numbers, layers = [number for _, number in rows], [name.layer for name in names]
            for places in self._batches.batches(numbers):
                with self.trunk.evaluating():
                    found = self._batches.states(
                        [numbers[place] for place in places], layers, start,
                        [source.states[place] for place in places] if source else None,
                    )  # fmt: skip
                check_room(sum(states.nbytes for seen in found for states in seen.values()))
                for place, seen in zip(places, found, strict=True):
                    for writer in writers:
                        writer.add(self._batches.digest(numbers[place]), seen[writer.name.layer])
            for writer in writers:
                writer.end()
            others = self._bytes_beside(names)  # other processes have written, too
            check_room()
            self._install(order, writers)
        except OSError as error:
            self.kept = [name for name in self.kept if name not in names]
            logger.warning(
                "the activation cache could not be written (%s): states of slice %s are computed anew for every "
                "batch. %s.", error, names[0].place,
                "Make room, or set activation_cache_gb lower" if error.errno else "Set it higher to keep them",
                main_process_only=False,
            )  # fmt: skip
        finally:
            for writer in writers:
                writer.abandon()

    def _bytes_beside(self, names: Sequence[BlockName]) -> int:
        assert self.blocks is not None
        return sum(size for name, size in self.blocks.sizes().items() if name not in names)

    def _install(self, order: StageOrder, writers: Sequence[Any]) -> None:
        """Makes blocks count; files, which outlive the stage, under the write lock and unless a deletion came."""
        watch, blocks = self.trainer.watch, self.blocks
        assert blocks is not None
        with watch.writing() if self.cache == "disk" else nullcontext():
            if self.cache == "disk" and watch.is_hit(order):
                raise StageDropped
            for writer in writers:
                blocks.install(writer)
        self._verified.update(writer.name for writer in writers)

    # ---- a batch ----

    @contextmanager
    def feeding(self, inputs: MutableMapping[str, Any], numbers: Sequence[int]) -> Iterator[None]:
        """The model starts a training step on some rows at the stage's own layer, where states are cached."""
        if not self._sources:
            yield
            return
        sources = [self._sources[number] for number in numbers]
        computes = any(layer < self._entrance for layer, _ in sources)
        with self.trunk.evaluating() if computes else nullcontext():
            states = self._batches.from_below(numbers, self._entrance, sources)
        with self.trunk.fed(self._entrance, states, inputs):
            yield

    # ---- once per training ----

    @cached_property
    def _model(self) -> dict[str, Any]:
        """What of the base model's config may change a state, as it was before the first training."""
        return computing_settings(self.trunk.base.config)

    def _settle(self, rows: Rows) -> None:
        """Chooses what to keep, and says how large that is before anything is written."""
        trainer = self.trainer
        manifest = self._on_main(trainer.store.manifest)
        self._batches = RowBatches(manifest.recipe["cached_trunk"], self._entrance_of(1))
        tie = canonical([manifest.recipe, versions(), trainer.args.device.type, self._model])
        if self.cache == "memory":
            self.blocks = MemoryBlocks()
        else:
            self.blocks = FileBlocks(trainer.store.private, hashlib.sha256(tie).hexdigest())
            self._on_main(self.blocks.drop_unfinished)
        counts = dict(Counter((entry.shard, entry.slice) for entry, _ in self._all_rows()))
        passes = self._passes(manifest, counts)
        with self.trunk.evaluating():
            inside = self._rows.states(self._rows.batch(rows[0][1]), [self._entrance])[self._entrance]
            lengths = self._rows.lengths(_sample([number for _, number in self._all_rows()]))
        mean = sum(lengths) / len(lengths)
        sizes = {place: int(count * mean * inside.shape[-1] * inside.itemsize) for place, count in counts.items()}
        there = self._on_main(self.blocks.sizes)
        self.kept = choose_blocks(passes, sizes, self.limit, there)
        needed = sum(there.get(name, sizes[name.place]) for name in self.kept)
        if self.limit is not None:
            self._on_main(partial(drop_beyond, self.blocks, self.limit - needed, self.kept))
        count = sum(counts[place] for place in passes)
        logger.warning(
            "activation cache (%s): what enters layers %s, of %d rows of %d slices, about %d positions, %.3g GB",
            self.cache, sorted({name.layer for name in self.kept}), count, len(passes), round(mean * count),
            needed / 1e9,
        )  # fmt: skip

    def _all_rows(self) -> list[tuple[Entry, int]]:
        rows = self.trainer.rows
        return [(rows.entries[example], number) for example, number in rows.numbered(list(rows.entries))]

    def _passes(self, manifest: Manifest, counts: Mapping[Place, int]) -> dict[Place, dict[int, float]]:
        """Per slice, how often the missing stages will have its rows enter each layer."""
        passes: dict[Place, dict[int, float]] = {}
        for stage in manifest.plan.missing(manifest.stages):
            entrance, shares = self._entrance_of(stage.depth), self._shares(stage)
            for place in shares.keys() & counts.keys() if entrance else ():
                wanted = passes.setdefault(place, {})
                wanted[entrance] = wanted.get(entrance, 0.0) + self._epochs(stage, counts) * shares[place]
        return passes

    def _shares(self, stage: Stage) -> dict[Place, float]:
        """How much of each of its slices a stage sees."""
        replay = self.trainer.s3t_config.replay
        shares = dict.fromkeys(stage.slices, replay) if replay else {}
        return shares | {(stage.shard, stage.prefix[-1]): 1.0}

    def _epochs(self, stage: Stage, counts: Mapping[Place, int]) -> float:
        args = self.trainer.args
        if args.max_steps <= 0:
            return args.num_train_epochs
        seen = sum(counts.get(place, 0) * share for place, share in self._shares(stage).items())
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return args.max_steps * batch / max(seen, 1)

    def _forget_deleted(self) -> None:
        """Drops what is in memory of examples that are no longer in the index; of files a deletion does it."""
        if not isinstance(self.blocks, MemoryBlocks):
            return
        blocks = self.blocks.blocks

        def deleted() -> list[BlockName]:
            knows_all = self.trainer.watch.knows_all
            return [name for name, block in blocks.items() if not knows_all(row for row, _ in block.examples)]

        for name in self._on_main(deleted):
            self.blocks.drop(name)

    def close(self) -> None:
        """Forgets everything that is in memory; where no stage asked for states, the limit holds for what is there."""
        if self.blocks is None and self.cache == "disk" and self.limit is not None:
            if self.trainer.args.process_index == 0:
                drop_beyond(FileBlocks(self.trainer.store.private, ""), self.limit)
        self.blocks, self.kept, self._checked, self._verified = None, [], set(), set()

    # ---- processes ----

    def _on_main(self, function: Callable[[], Any]) -> Any:
        return on_main_process(self.trainer.args, function)


def _sample(numbers: Sequence[int]) -> Sequence[int]:
    return numbers[:: max(len(numbers) // SAMPLE, 1)]
