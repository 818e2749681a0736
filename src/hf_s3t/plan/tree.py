"""The tree of stages: what is trained, in which order, at what cost, and what a deletion hits.

Sequences (0,1,2), (1,2,0) and (2,0,1) of one shard, pruned:

    shard-00 --+-- 0 --- 0-1 --- 0-1-2      stage 0-1-2: layer group 3, on slices 0, 1, 2;
               +-- 1 --- 1-2                its parents 0 and 0-1 are frozen meanwhile
               +-- 2 --- 2-0                a deletion from slice 1 hits 0-1, 0-1-2, 1, 1-2: what is left is 2-0

Responsible for names, order, cost and survival of stages, and for reading a plan from an untrusted manifest. It leaves
the choice of the orders to `sequences.py`, and every file and tensor to `store/store.py` and `training/trainer.py`.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .sequences import Order, explicit, prune_orders, training_cost

MAX_SHARDS = 100_000  # bounds the work that an untrusted plan can ask for
MAX_PREFIXES = 1 << 26  # and its memory: so many slices in all prefixes together

STAGE_PARAMETERS = ("layer_group", "rank_group", "all")
"""What a stage may own."""


@dataclass(frozen=True, order=True)
class Stage:
    """One training run: layer group `depth` of a shard, on the slices of the prefix.

    Args:
        shard (`int`): The shard.
        prefix (`Order`): The slice ids, in the order in which their layer groups are trained.

    Raises:
        ValueError: If the prefix is empty or repeats a slice, or a number is negative.

    >>> Stage(0, (2, 0, 3)).name
    'shard-00/2-0-3'
    """

    shard: int
    prefix: Order

    def __post_init__(self) -> None:
        if self.shard < 0 or not self.prefix or min(self.prefix) < 0 or len(set(self.prefix)) < len(self.prefix):
            found = f"There is no stage of shard {self.shard} with prefix {self.prefix}"
            raise ValueError(f"{found}. Give a shard from 0 on and slice ids from 0 on, at least one, none twice.")

    @classmethod
    def from_name(cls, name: str) -> "Stage":
        """Read a stage's name, as a folder or a manifest gives it.

        Args:
            name (`str`): For example `"shard-00/2-0-3"`, exactly as [`Stage.name`] writes it.

        Returns:
            `Stage`: The stage of that name. Anything else, such as a path that leaves the store, is a `ValueError`.

        >>> Stage.from_name("shard-00/2-0-3")
        Stage(shard=0, prefix=(2, 0, 3))
        """
        match = re.fullmatch(r"shard-([0-9]{2,6})/([0-9]{1,4}(?:-[0-9]{1,4})*)", name) if type(name) is str else None
        if match:
            stage = cls(int(match[1]), tuple(map(int, match[2].split("-"))))
            if stage.name == name:
                return stage
        raise ValueError(f"{name!r:.80} is not the name of a stage, such as 'shard-00/2-0-3'. Remove or rename it.")

    @property
    def name(self) -> str:
        """The stage's folder in the store, and its key in the manifest."""
        return f"shard-{self.shard:02d}/{'-'.join(map(str, self.prefix))}"

    @property
    def depth(self) -> int:
        """Which layer group the stage trains, counted from 1 at the top; also its cost, if it sees all its slices."""
        return len(self.prefix)

    def passes(self, replay: float = 1.0) -> float:
        """Its cost in slice passes per epoch: one for the newest slice, and `replay`, a share, for each earlier one.

        >>> Stage(0, (2, 0, 3)).passes(), Stage(0, (2, 0, 3)).passes(replay=0.25)
        (3, 1.5)
        """
        return self.depth if replay == 1 else 1 + replay * (self.depth - 1)

    @property
    def parent(self) -> "Stage | None":
        """The stage whose layer groups this one builds on; `None` for the first."""
        return Stage(self.shard, self.prefix[:-1]) if self.depth > 1 else None

    @property
    def path(self) -> "tuple[Stage, ...]":
        """The stages from depth 1 down to this one: together they are the adapter of its prefix."""
        return tuple(Stage(self.shard, self.prefix[:depth]) for depth in range(1, self.depth + 1))

    @property
    def slices(self) -> frozenset[tuple[int, int]]:
        """Every `(shard, slice)` that the stage depends on. A deletion from any other leaves it as it is."""
        return frozenset((self.shard, slice_id) for slice_id in self.prefix)


def _check_shards(num_shards: object) -> None:
    if type(num_shards) is not int or not 1 <= num_shards <= MAX_SHARDS:
        raise ValueError(f"num_shards must be an integer from 1 to {MAX_SHARDS}, not {num_shards!r:.40}. Correct it.")


def _as_tuples(sequences: Iterable[Iterable[Any]]) -> tuple[tuple[Order, ...], ...]:
    """Lists become tuples; what is no order stays as it is, for the check to name it."""
    return tuple(tuple(tuple(o) if isinstance(o, list) else o for o in orders) for orders in sequences)


@dataclass(frozen=True)
class Plan:
    """The sequences that every shard trains, as a tree of stages.

    Args:
        num_shards (`int`): `m`.
        num_slices (`int`): `L`.
        sequences (`tuple[tuple[Order, ...], ...]`): The orders of each shard, as they are trained. [`Plan.make`] and
            [`Plan.make_per_shard`] prune them first. A shard may have none, for which a repair had no money left.

    Raises:
        ValueError: If a number is out of range, an order is invalid, there is not one list of orders per shard, or no
            shard has any.

    >>> Plan.make(1, 3, [(0, 1, 2), (1, 2, 0), (2, 0, 1)]).cost
    12
    """

    num_shards: int
    num_slices: int
    sequences: tuple[tuple[Order, ...], ...]

    def __post_init__(self) -> None:
        _check_shards(self.num_shards)
        if len(self.sequences) != self.num_shards:
            found = f"num_shards={self.num_shards}, but orders are given for {len(self.sequences)} shards"
            raise ValueError(f"{found}. Give one list of orders per shard.")
        for shard, orders in enumerate(self.sequences):
            try:
                if orders or not any(self.sequences):
                    explicit(orders, self.num_slices)
            except ValueError as error:
                raise ValueError(f"Shard {shard}: {error}") from error

    @classmethod
    def make(cls, num_shards: int, num_slices: int, sequences: Iterable[Sequence[int]], prune: bool = True) -> "Plan":
        """A plan in which every shard trains the same orders.

        Args:
            num_shards (`int`): `m`.
            num_slices (`int`): `L`.
            sequences (`Iterable[Sequence[int]]`): The orders, for example from [`select_sequences`].
            prune (`bool`, *optional*, defaults to `True`): Cut the tails that survival does not need: whatever is
                deleted, the longest surviving prefix is as long as before. Keep them to ensemble a shard's orders.

        Returns:
            `Plan`: The plan. Numbers out of range and invalid orders are a `ValueError`.

        >>> Plan.make(2, 2, [(0, 1), (1, 0)]).sequences
        (((0, 1), (1,)), ((0, 1), (1,)))
        """
        _check_shards(num_shards)
        orders = explicit(sequences, num_slices)
        return cls(num_shards, num_slices, (tuple(prune_orders(orders) if prune else orders),) * num_shards)

    @classmethod
    def make_per_shard(cls, num_slices: int, sequences: Iterable[Sequence[Order]], prune: bool = True) -> "Plan":
        """A plan with orders of its own for each shard; otherwise as [`Plan.make`].

        Args:
            sequences (`Iterable[Sequence[Order]]`): One list of orders per shard; there are as many shards as lists.

        >>> Plan.make_per_shard(2, [[(0, 1)], [(1, 0)]]).num_shards
        2
        """
        given = _as_tuples(sequences)
        plan = cls(len(given), num_slices, given)
        return cls(len(given), num_slices, tuple(tuple(prune_orders(o)) for o in given)) if prune else plan

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Every stage once, in training order: shard by shard, sequence by sequence, from the first slice on."""
        prefixes = (
            (shard, order[:depth])
            for shard, orders in enumerate(self.sequences)
            for order in orders
            for depth in range(1, len(order) + 1)
        )
        return tuple(Stage(shard, prefix) for shard, prefix in dict.fromkeys(prefixes))

    @property
    def cost(self) -> int:
        """What the whole plan costs, in slice passes per epoch."""
        return sum(map(training_cost, self.sequences))

    def affected(self, slices: Iterable[tuple[int, int]]) -> tuple[Stage, ...]:
        """The plan's stages that a deletion hits. Of stages of an older plan, ask [`Stage.slices`].

        Args:
            slices (`Iterable[tuple[int, int]]`): The `(shard, slice)` pairs that are deleted from.

        Returns:
            `tuple[Stage, ...]`: The stages, in training order. A pair that does not exist is a `ValueError`.

        >>> " ".join(stage.name for stage in Plan.make(1, 2, [(0, 1), (1, 0)]).affected([(0, 1)]))
        'shard-00/0-1 shard-00/1'
        """
        hit = set(slices)
        for shard, slice_id in hit:
            if not (0 <= shard < self.num_shards and 0 <= slice_id < self.num_slices):
                size = f"{self.num_shards} shards of {self.num_slices} slices, both counted from 0"
                raise ValueError(f"There is no slice {slice_id} of shard {shard}: the plan has {size}. Correct it.")
        return tuple(stage for stage in self.stages if not hit.isdisjoint(stage.slices))

    def live(self, trained: Iterable[Stage]) -> tuple[Stage, ...]:
        """The trained stages that can be served: those whose every parent is trained too.

        Args:
            trained (`Iterable[Stage]`): What the store holds, stages of an older plan included.

        Returns:
            `tuple[Stage, ...]`: The plan's own stages in training order, then the others, sorted.

        >>> Plan.make(1, 2, [(0, 1), (1, 0)]).live([Stage(0, (0, 1)), Stage(0, (1,))])
        (Stage(shard=0, prefix=(1,)),)
        """
        held = set(trained)
        own = [stage for stage in self.stages if stage in held]
        live: dict[Stage, None] = {}
        for stage in (*own, *sorted(held.difference(own))):  # parents come before their children in both
            if stage.parent is None or stage.parent in live:
                live[stage] = None
        return tuple(live)

    def missing(self, trained: Iterable[Stage]) -> tuple[Stage, ...]:
        """The plan's stages that are still to be trained, in training order.

        A stage that is there without its parent is missing too: it has to be trained again on top of it.

        >>> Plan.make(1, 2, [(0, 1), (1, 0)]).missing([Stage(0, (0,))])
        (Stage(shard=0, prefix=(0, 1)), Stage(shard=0, prefix=(1,)))
        """
        live = set(self.live(trained))
        return tuple(stage for stage in self.stages if stage not in live)

    def surviving(self, trained: Iterable[Stage]) -> dict[int, tuple[Order, ...]]:
        """For every shard the live prefixes that no longer live prefix begins with.

        Args:
            trained (`Iterable[Stage]`): What the store holds.

        Returns:
            `dict[int, tuple[Order, ...]]`: The longest first, those of equal length as [`Plan.live`] orders them.
            Shards of which nothing is left are absent.

        >>> Plan.make(1, 2, [(0, 1), (1, 0)]).surviving([Stage(0, (1,)), Stage(0, (0,)), Stage(0, (0, 1))])
        {0: ((0, 1), (1,))}
        """
        live = self.live(trained)
        parents = {stage.parent for stage in live}
        ends = sorted((stage for stage in live if stage not in parents), key=lambda stage: (stage.shard, -stage.depth))
        surviving: dict[int, list[Order]] = {}
        for stage in ends:
            surviving.setdefault(stage.shard, []).append(stage.prefix)
        return {shard: tuple(prefixes) for shard, prefixes in surviving.items()}

    def served(self, trained: Iterable[Stage]) -> dict[int, Order]:
        """For every shard the served prefix: the longest live one, of equal ones the plan's first.

        >>> Plan.make(1, 2, [(0, 1), (1, 0)]).served([Stage(0, (1,)), Stage(0, (0,))])
        {0: (0,)}
        """
        return {shard: prefixes[0] for shard, prefixes in self.surviving(trained).items()}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain numbers and lists, for the manifest.

        >>> Plan.make(1, 2, [(0, 1), (1, 0)]).to_json()
        {'num_shards': 1, 'num_slices': 2, 'sequences': [[[0, 1], [1]]]}
        """
        sequences = [[list(order) for order in orders] for orders in self.sequences]
        return {"num_shards": self.num_shards, "num_slices": self.num_slices, "sequences": sequences}

    @classmethod
    def from_json(cls, data: object) -> "Plan":
        """Read a plan from a manifest, trusting nothing in it.

        Args:
            data (`dict`): What [`Plan.to_json`] wrote, parsed.

        Returns:
            `Plan`: The same plan, not pruned again. What is absent, added, of another type or out of range is a
            `ValueError`.

        >>> Plan.from_json({"num_shards": 1, "num_slices": 2, "sequences": [[[0, 1], [1]]]}).cost
        4
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(data, dict) or set(data) != set(fields):
            raise ValueError(f"A plan must be a dict with exactly {fields}, not {data!r:.100}. Restore the manifest.")
        sequences = data["sequences"]
        if not isinstance(sequences, list) or not all(isinstance(orders, list) for orders in sequences):
            raise ValueError(f"sequences must be lists of orders, not {sequences!r:.50}. Restore the manifest.")
        size = sum(len(order) ** 2 for orders in sequences for order in orders if isinstance(order, list)) // 2
        if size > MAX_PREFIXES:
            raise ValueError(f"The prefixes of the plan have {size} slices, more than {MAX_PREFIXES}. It is hostile.")
        return cls(data["num_shards"], data["num_slices"], _as_tuples(sequences))
