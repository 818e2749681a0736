"""The activation cache of a training: each row's states computed once, and fed to every stage that can use them.

Which states are kept, and where, changes no bit of a stage: what is not kept is computed when it is needed, in the
same way. How a block lies in memory or on the disk is for `activations.py`, how a model is entered at a layer for
`trunk.py`, what may be cached for `alone.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import Trainer

from .activations import Block, BlockName, Blocks, FileBlocks, MemoryBlocks, Place, Row, choose_blocks, layer_passes
from .alone import ActivationCache, AloneRows, check_model
from .deletion import versions
from .numbered import ROW_NUMBER, NumberedRows, NumberingCollator
from .orders import StageDropped, StageOrder, is_hit
from .partition import canonical
from .plan import Stage
from .staging import on_main_process
from .trunk import Trunk
from .tuner import owned_layers

logger = get_logger(__name__)

TrainerBase: Any = Trainer if TYPE_CHECKING else object

SAMPLE = 32
"""Rows that are looked at to estimate sizes."""
COMPANY = 4
"""Rows that are computed together, once, to see that it makes no difference."""


class TrunkCache:
    """Feeds the stages of one trainer.

    Args:
        trainer ([`S3TMixin`]): the trainer.
        cache (`"off"`, `"memory"` or `"disk"`): where states are kept.
        limit_gb (`float`, *optional*): how much of them, in 10^9 bytes.
        eval_trunk (`bool`): whether a trunk that is random in training may run without.
    """

    def __init__(self, trainer: Any, cache: ActivationCache, limit_gb: float | None, eval_trunk: bool):
        self.trainer, self.cache, self.eval_trunk = trainer, cache, eval_trunk
        self.limit = None if limit_gb is None else limit_gb * 1e9
        self.blocks: Blocks | None = None
        self.kept: list[BlockName] = []
        self._entrance = 0
        self._checked: set[int] = set()
        self._sources: dict[int, tuple[int, torch.Tensor | None]] = {}

    @property
    def on(self) -> bool:
        """Whether stages are fed."""
        return self.cache != "off"

    # ---- a stage ----

    @contextmanager
    def stage(self, order: StageOrder) -> Iterator[None]:
        """The trainer's rows and collator carry row numbers, and every state that the stage wants is known."""
        self._forget_deleted()
        entrance = self._entrance_of(order.stage)
        if not self.on or entrance == 0:
            yield
            return
        trainer, collate = self.trainer, self.trainer.data_collator
        rows = trainer.rows.numbered(order.examples)
        self._entrance, self.trunk = entrance, Trunk(trainer.model, trainer.tuner.layout.container)
        self.collator = NumberingCollator(collate, self.trunk.main_input, trainer.rows.key)
        self.trunk.check_checkpointing(entrance)
        trainer.train_dataset = NumberedRows(trainer.train_dataset, [number for _, number in rows])
        trainer.data_collator = self.collator
        self.trunk.attach(entrance)
        try:
            self._rows = AloneRows(trainer, self.trunk, self.collator)
            self._prepare(order, rows)
            yield
        finally:
            self.trunk.detach()
            trainer.data_collator = collate
            self._sources = {}

    def _entrance_of(self, stage: Stage) -> int:
        """The lowest layer that the stage trains: nothing below has an adapter."""
        return min(owned_layers(self.trainer.s3t_config, self.trainer.tuner.layout, stage.depth))

    def _prepare(self, order: StageOrder, rows: list[tuple[str, int]]) -> None:
        """Computes what no block holds yet, and finds out where the states of every row are."""
        if self._entrance not in self._checked:
            some = [number for _, number in rows[:COMPANY]]
            self._together(partial(check_model, self._rows, some, self._entrance, self.eval_trunk))
            self._checked.add(self._entrance)
        if self.blocks is None:
            self._settle(rows)
        by_place: dict[Place, list[tuple[str, int]]] = {}
        for example, number in rows:
            entry = self.trainer.rows.entries[example]
            by_place.setdefault((entry.shard, entry.slice), []).append((example, number))
        self._together(partial(self._fill_absent, order, by_place))
        for place, own in by_place.items():
            self._locate(place, own)

    def _usable(self, place: Place) -> list[BlockName]:
        """Blocks of a slice that the running stage can start from, the lowest first."""
        return sorted(name for name in self.kept if name.place == place and name.layer <= self._entrance)

    def _read(self, name: BlockName, rows: list[tuple[str, int]]) -> Block | None:
        """A block's part for some rows, in their order, if it has all of them."""
        assert self.blocks is not None
        block = self.blocks.read(name)
        entries = self.trainer.rows.entries
        places = block.find((example, entries[example].content) for example, _ in rows) if block else None
        if block is None or places is None:
            return None
        return Block(tuple(block.rows[place] for place in places), [block.states[place] for place in places])

    def _locate(self, place: Place, rows: list[tuple[str, int]]) -> None:
        """Notes where the states of a slice's rows start, and what the collator has to make of them."""
        found = [(name, block) for name in self._usable(place) if (block := self._read(name, rows)) is not None]
        for position, (_, number) in enumerate(rows):
            if found:
                name, block = found[-1]
                self._sources[number] = name.layer, block.states[position]
                self.collator.expected[number] = block.rows[position].inputs
            else:
                self._sources[number] = 0, None
                self.collator.expected[number] = self._rows.digest(self._rows.batch(number))

    # ---- computing states ----

    def _fill_absent(self, order: StageOrder, by_place: Mapping[Place, list[tuple[str, int]]]) -> None:
        """Fills what the stage lacks; files are written by one process each, memory by every process."""
        args = self.trainer.args
        for place, rows in sorted(by_place.items()):
            if self.cache == "memory" or place[1] % args.world_size == args.process_index:
                absent = [name for name in self._usable(place) if self._read(name, rows) is None]
                if absent:
                    self._fill(order, absent, rows)

    def _fill(self, order: StageOrder, names: list[BlockName], rows: list[tuple[str, int]]) -> None:
        """Computes blocks of one slice, row by row, from the highest block below them."""
        assert self.blocks is not None
        below = [(name.layer, self._read(name, rows)) for name in self._usable(names[0].place) if name < names[0]]
        start, source = below[-1] if below else (0, None)
        writers: list[Any] = []
        others = sum(size for name, size in self.blocks.sizes().items() if name not in names)

        def check_room() -> None:
            if self.limit is not None and others + sum(writer.bytes for writer in writers) > self.limit:
                raise OSError(f"more than the {self.limit / 1e9:.3g} GB of activation_cache_gb")

        try:
            writers.extend(map(self.blocks.writer, names))
            with self.trunk.evaluating():
                for position, (example, number) in enumerate(rows):
                    batch, given = self._rows.batch(number), source.states[position] if source else None
                    seen = self._rows.states(batch, [name.layer for name in names], start, given)
                    content, inputs = self.trainer.rows.entries[example].content, self._rows.digest(batch)
                    for writer in writers:
                        states = seen[writer.name.layer]
                        writer.add(Row(example, content, inputs, len(states)), states)
                    check_room()
            for writer in writers:
                writer.end()
            check_room()
            self._install(order, writers)
        except OSError as error:
            self.kept = [name for name in self.kept if name not in names]
            logger.warning(
                "the activation cache could not be written (%s): states of slice %s are computed anew for every "
                "batch. Make room, or set activation_cache_gb lower.", error, names[0].place,
                main_process_only=False,
            )  # fmt: skip
        finally:
            for writer in writers:
                writer.abandon()

    def _install(self, order: StageOrder, writers: Sequence[Any]) -> None:
        """Makes blocks count; files, which outlive the stage, under the write lock and unless a deletion came."""
        store, blocks = self.trainer.store, self.blocks
        assert blocks is not None
        with store.writing() if self.cache == "disk" else nullcontext():
            if self.cache == "disk" and is_hit(store, order):
                raise StageDropped
            for writer in writers:
                blocks.install(writer)

    # ---- a batch ----

    @contextmanager
    def feeding(self, inputs: MutableMapping[str, Any]) -> Iterator[None]:
        """The model starts a training step at the stage's own layer."""
        numbers = inputs.pop(ROW_NUMBER, None)
        if numbers is None:
            yield
            return
        states: list[Any] = []
        with self.trunk.evaluating() if self._computes else nullcontext():
            for number in numbers.tolist():
                layer, found = self._sources[number]
                if layer < self._entrance:
                    found = self._rows.states(self._rows.batch(number), [self._entrance], layer, found)[self._entrance]
                states.append(found)
        with self.trunk.fed(self._entrance, states, inputs[self.trunk.main_input]):
            yield

    @property
    def _computes(self) -> bool:
        return any(layer < self._entrance for layer, _ in self._sources.values())

    # ---- once per training ----

    def _settle(self, rows: list[tuple[str, int]]) -> None:
        """Chooses what to keep, and says how large that is before anything is written."""
        trainer = self.trainer
        manifest = self._on_main(trainer.store.manifest)
        tie = canonical([manifest.recipe, versions(), trainer.args.device.type])
        if self.cache == "memory":
            self.blocks = MemoryBlocks()
        else:
            self.blocks = FileBlocks(trainer.store.private, hashlib.sha256(tie).hexdigest())
            self._on_main(self.blocks.drop_unfinished)
        sample = [number for _, number in rows[:: max(len(rows) // SAMPLE, 1)]]
        with self.trunk.evaluating():
            inside = self._rows.states(self._rows.batch(sample[0]), [self._entrance])[self._entrance]
            lengths = [len(self._rows.states(self._rows.batch(number), [0])[0]) for number in sample]
        mean = sum(lengths) / len(lengths)
        counts: dict[Place, int] = {}
        for example, entry in trainer.rows.entries.items():
            place = entry.shard, entry.slice
            counts[place] = counts.get(place, 0) + len(trainer.rows.numbered([example]))
        sizes = {place: int(count * mean * inside.shape[-1] * inside.itemsize) for place, count in counts.items()}
        passes: dict[Place, dict[int, float]] = {}
        for stage in manifest.plan.missing(manifest.stages):
            entrance, shares = self._entrance_of(stage), self._shares(stage)
            for place in shares.keys() & counts.keys() if entrance else ():
                wanted = passes.setdefault(place, {})
                wanted[entrance] = wanted.get(entrance, 0.0) + self._epochs(stage, counts) * shares[place]
        self.kept = choose_blocks(passes, sizes, self.limit, self._on_main(self.blocks.sizes))
        self._on_main(partial(self._make_room, sizes))
        whole = sum(counts[place] * layer_passes(passes[place], []) for place in passes)
        cut = sum(
            counts[place] * layer_passes(passes[place], [name.layer for name in self.kept if name.place == place])
            for place in passes
        )
        logger.info(
            "activation cache (%s): what enters layers %s, of %d rows of %d slices, about %d positions, %.3g GB; "
            "%.0f %% of the layer forwards in the trunk are saved",
            self.cache, sorted({name.layer for name in self.kept}), sum(counts[place] for place in passes),
            len(passes), round(mean * sum(counts[place] for place in passes)),
            sum(sizes[name.place] for name in self.kept) / 1e9, 100 * (1 - cut / whole) if whole else 0,
        )  # fmt: skip

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

    def _make_room(self, sizes: Mapping[Place, int]) -> None:
        """Drops blocks of earlier trainings that this one has no use for, where the limit leaves them no room."""
        assert self.blocks is not None
        if self.limit is None:
            return
        left = self.limit - sum(sizes[name.place] for name in self.kept)
        for name, size in sorted(self.blocks.sizes().items()):
            if name not in self.kept:
                left -= size
                if left < 0:
                    self.blocks.drop(name)

    def _forget_deleted(self) -> None:
        """Drops what is in memory of examples that are no longer in the index; of files a deletion does it."""
        if not isinstance(self.blocks, MemoryBlocks):
            return
        blocks = self.blocks.blocks

        def deleted() -> list[BlockName]:
            index = self.trainer.store.index()
            return [name for name, block in blocks.items() if any(row.example not in index for row in block.rows)]

        for name in self._on_main(deleted):
            self.blocks.drop(name)

    def close(self) -> None:
        """Forgets everything that is in memory."""
        self.blocks, self.kept, self._checked = None, [], set()

    # ---- processes ----

    def _on_main(self, function: Callable[[], Any]) -> Any:
        return on_main_process(self.trainer.args, function)

    def _together(self, function: Callable[[], None]) -> None:
        """Runs a function on every process; an error on one of them is raised on all."""
        if self.trainer.args.world_size == 1:
            function()
            return
        error: Exception | None = None
        try:
            function()
        except Exception as raised:  # raised below, on every process: the others must not wait
            error = raised
        errors = [found for found in gather_object([error]) if found is not None]
        if errors:
            raise errors[0]


class FedTrainerMixin(TrainerBase):
    """The part of [`S3TMixin`] by which rows keep their numbers on the way to a training step."""

    trunk_cache: TrunkCache
    _signature_columns: Any

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.trunk_cache.on and ROW_NUMBER not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, ROW_NUMBER]

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the Trainer's; where states are cached the model starts at the layer that they enter."""
        if not self.trunk_cache.on:
            return super().training_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        with self.trunk_cache.feeding(inputs):
            return super().training_step(model, inputs, *args, **kwargs)
