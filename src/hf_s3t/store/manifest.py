"""What the store publishes about itself: the manifest `s3t.json`, and in it the log of deletions and readmissions.

It is plain data with a strict reader: a manifest may come from a hostile repository. Which file holds what, and when
it is written, is for `folder.py`; how a recipe is made, for `recipe.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import StoreError
from ..lora.adapter import CONFIG_FILE, WEIGHTS_FILE
from ..plan.survival import checked_prior
from ..plan.tree import STAGE_PARAMETERS, Plan, Stage
from .recipe_differences import Accepted

FORMAT = 2
"""Version of the folder format; a store of another version is refused."""

DAMAGED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What reading data of another shape can raise."""


NOT_KNOWN = "0" * 64
"""In place of the HMAC of a manifest whose writer had not the tombstones of all its events, or not the key."""


@dataclass(frozen=True)
class Event:
    """A deletion or a readmission that a manifest has obeyed: no stage that it lists was trained before it on these
    places. It has the name of its receipt; nothing in it tells whom it was about.

    It is not `named` where whole slices were deleted with the state lost, or where its tombstones were lost: whoever
    has the index makes them.

    `receipts` are digests of its receipt: none of a version before there were any, and of an honest one not two.
    """

    places: tuple[tuple[int, int], ...]  # (shard, slice)s; none for a readmission
    named: bool = True  # whether it made or lifted tombstones
    receipts: tuple[str, ...] = ()


Log = dict[str, Event]


def places_beyond(log: Log, known: Log) -> set[tuple[int, int]]:
    """Places of the events in a log that another one has not: what stages that know only the other must lose."""
    beyond: set[tuple[int, int]] = set()
    for name, event in log.items():
        beyond |= {*event.places} - {*(known[name].places if name in known else ())}
    return beyond


def merged(first: Log, second: Log) -> Log:
    """The events of two logs. One that both name has the places and receipts of both: names are easily forged.

    So nothing that somebody wrote under another's name takes its place, and an audit finds two receipts.
    """
    log = {**first, **second}
    for name in first.keys() & second.keys():
        one, other = first[name], second[name]
        places, receipts = {*one.places, *other.places}, {*one.receipts, *other.receipts}
        log[name] = Event(tuple(sorted(places)), one.named and other.named, tuple(sorted(receipts)))
    return log


@dataclass(frozen=True)
class RepairBudget:
    """For which repair the plan was made: `train(repair="best")`, called again after a kill, goes on with it."""

    cost_budget: int  # slice passes that it may cost, over all shards
    deletions: int  # how many there had been when it began


@dataclass(frozen=True)
class Manifest:
    """Content of `s3t.json`."""

    generation: int  # number of events so far
    tombstones: str  # HMAC over the events and their tombstones, or `NOT_KNOWN`
    key_check: str  # tells whether a partition key is this store's
    recipe: dict[str, Any]  # every setting that changes bits
    plan: Plan
    stages: dict[Stage, dict[str, str]] = field(default_factory=dict)  # sha256 per file of each trained stage
    root: dict[str, str] | None = None  # sha256 per file of the root adapter, `None` while there is none
    log: Log = field(default_factory=dict)  # what its stages have obeyed, by name
    deletion_prior: tuple[float, ...] | None = None  # that the plan was made for; `None`: all slices alike
    repair: RepairBudget | None = None  # `None` where the plan is the one of the config
    accepted: tuple[Accepted, ...] = ()  # settings that were changed while stages lived, oldest first

    @property
    def replay(self) -> float:
        """Share of the examples of each earlier slice that a stage saw again; a recipe that does not say it: all."""
        return self.recipe["config"].get("replay", 1.0)

    @property
    def deletions(self) -> int:
        """How many deletions its stages have obeyed; readmissions are none."""
        return sum(1 for event in self.log.values() if event.places)

    @property
    def weights(self) -> set[str]:
        """sha256 of the weights of each trained stage."""
        return {files[WEIGHTS_FILE] for files in self.stages.values()}

    @property
    def names(self) -> set[str]:
        """Names of the trained stages."""
        return {stage.name for stage in self.stages}

    @property
    def served_ends(self) -> list[Stage]:
        """The last stage of the served prefix of each live shard, in the shards' order."""
        return [Stage(shard, prefix) for shard, prefix in sorted(self.plan.served(self.stages).items())]

    def untouched_by(self, places: Set[tuple[int, int]]) -> Manifest:
        """The manifest less every stage that saw one of some `(shard, slice)`s."""
        return self.without(stage for stage in self.stages if stage.slices & places) if places else self

    def without(self, stages: Iterable[Stage]) -> Manifest:
        """The manifest less some stages."""
        gone = set(stages)
        return replace(self, stages={stage: files for stage, files in self.stages.items() if stage not in gone})

    def to_json(self) -> dict[str, Any]:
        """Plain data for `s3t.json`."""
        return {
            "library": "hf_s3t",
            "format": FORMAT,
            "generation": self.generation,
            "tombstones": self.tombstones,
            "key_check": self.key_check,
            "recipe": self.recipe,
            "plan": self.plan.to_json(),
            "deletion_prior": None if self.deletion_prior is None else list(self.deletion_prior),
            "repair": None if self.repair is None else asdict(self.repair),
            "accepted": [asdict(setting) for setting in self.accepted],
            "stages": {
                stage.name: {"parent": stage.parent.name if stage.parent else None, "sha256": files}
                for stage, files in sorted(self.stages.items())
            },
            "served": {end.name: list(end.prefix) for end in self.served_ends},
            "root": self.root,
            "log": log_json(self.log),
        }

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """Reads a manifest strictly. A [`StoreError`] if it is none, or of another format version."""
        if not isinstance(data, dict) or data.get("library") != "hf_s3t":
            raise StoreError("This is no manifest of hf_s3t. Give the folder that a training wrote.")
        if data.get("format") != FORMAT:
            raise StoreError(
                f"The store has format {data.get('format')!r}; this version of hf_s3t reads format {FORMAT}. "
                "Use the version that wrote it, or a newer one."
            )
        try:
            plan, root, log = Plan.from_json(data["plan"]), data["root"], read_log(data["log"])
            return cls(
                _generation(data["generation"], log),
                _digest(data["tombstones"], 64),
                _digest(data["key_check"], 32),
                _recipe(data["recipe"]),
                plan,
                {_stage(name, plan): _files(record["sha256"]) for name, record in data["stages"].items()},
                None if root is None else _files(root),
                log,
                _prior(data.get("deletion_prior"), plan),
                _repair(data.get("repair")),
                tuple(map(Accepted.from_json, data.get("accepted", ()))),
            )
        except DAMAGED as error:
            what = f"{type(error).__name__} {error}"
            raise StoreError(f"The manifest is damaged: {what}. Restore it from a backup.") from None


def read_count(value: Any) -> int:
    """A number from 0 on that a database can hold; a `ValueError` for anything else."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.80} is no number from 0 on")
    return value


def _generation(value: Any, log: Log) -> int:
    if read_count(value) != len(log):
        raise ValueError(f"generation {value} does not fit {len(log)} events")
    return value


def _digest(value: Any, length: int) -> str:
    if not re.fullmatch(f"[0-9a-f]{{{length}}}", value):
        raise ValueError(f"{value!r:.80} is no digest of {length} hexadecimal digits")
    return value


def _prior(value: Any, plan: Plan) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(chance) in (int, float) for chance in value):
        raise ValueError(f"{value!r:.80} is no list of chances")
    return tuple(checked_prior(value, plan.num_slices).tolist())


def _repair(value: Any) -> RepairBudget | None:
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) != {"cost_budget", "deletions"}:
        raise ValueError(f"{value!r:.80} is no budget of a repair")
    return RepairBudget(read_count(value["cost_budget"]), read_count(value["deletions"]))


def _recipe(value: Any) -> dict[str, Any]:
    parts = ("config", "partition", "base")
    if not isinstance(value, dict) or not all(isinstance(value[name], dict) for name in parts):
        raise ValueError("the recipe has not the sections config, partition and base")
    if value["base"].get("id") is not None:
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(value["base"]["id"])
    kind, replay = value["config"].get("stage_parameters", "layer_group"), value["config"].get("replay", 1.0)
    if kind not in STAGE_PARAMETERS:  # joined in another kind's way its stages would be another adapter
        raise ValueError(f"`stage_parameters` {kind!r:.80} is unknown to this version of hf_s3t")
    if type(replay) not in (int, float) or not 0 <= replay <= 1:
        raise ValueError(f"`replay` {replay!r:.80} is no number from 0 to 1")
    return value


def _stage(name: Any, plan: Plan) -> Stage:
    stage = Stage.from_name(name)
    if stage.shard >= plan.num_shards or max(stage.prefix) >= plan.num_slices:
        raise ValueError(f"{name} is no stage of {plan.num_shards} shards of {plan.num_slices} slices")
    return stage


def _files(record: Any) -> dict[str, str]:
    if not isinstance(record, dict) or set(record) != {CONFIG_FILE, WEIGHTS_FILE}:
        raise ValueError(f"{record!r:.200} does not name exactly {CONFIG_FILE} and {WEIGHTS_FILE}")
    return {name: _digest(digest, 64) for name, digest in record.items()}


def log_json(log: Mapping[str, Event]) -> dict[str, Any]:
    """Plain data."""
    return {
        name: {"places": [list(place) for place in e.places], "named": e.named}
        | ({"receipts": list(e.receipts)} if e.receipts else {})
        for name, e in log.items()
    }


def read_log(data: Any) -> Log:
    """Reads what [`log_json`] gave; one of [`DAMAGED`] for anything else."""
    return {str(name): _event(event) for name, event in data.items()}


def _event(data: Any) -> Event:
    places = tuple((read_count(shard), read_count(slice_id)) for shard, slice_id in data["places"])
    if type(data["named"]) is not bool:
        raise ValueError(f"{data['named']!r:.80} is neither true nor false")
    receipts = data.get("receipts", [])
    if not isinstance(receipts, list):
        raise ValueError(f"{receipts!r:.80} are no receipts")
    return Event(places, data["named"], tuple(_digest(receipt, 64) for receipt in receipts))
