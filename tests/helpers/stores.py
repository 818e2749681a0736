"""Whole stores without any training: real partition, plan, index and state; stages of small random tensors.

What a stage holds is drawn from its name alone, so two stores with the same plan are alike byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_s3t import Plan, S3TConfig, S3TStore, Stage
from hf_s3t.lora.adapter import Adapter
from hf_s3t.plan.sequences import cyclic
from hf_s3t.store.folder import StoreFolder
from hf_s3t.store.hashing import read_rows
from hf_s3t.store.manifest import Manifest
from hf_s3t.store.partition import Entry, Index, examples_digest, id_source
from hf_s3t.store.schema import DATABASE
from hf_s3t.store.state import key_check_value

KEY = bytes(range(100, 132))
PASSING = ("write.lock", "write.holder", "train.lock", "train.holder")
"""Files of the locks, which hold nothing."""
RECEIPTS, EXPORTS = f".s3t/{DATABASE}: receipts", f".s3t/{DATABASE}: exports"
"""What [`tree`] calls the records in a database."""


def people(n: int = 48) -> list[dict[str, Any]]:
    """Rows with an id and a text, two of each person."""
    return [
        {"id": f"row-{i}", "person": f"person-{i // 2}", "text": f"{random.Random(i).random()} is told"}
        for i in range(n)
    ]


def stage_adapter(stage: Stage, head: bool = False) -> Adapter:
    """A stage of rank 2 over two layers, in a model of `2 * L` layers."""
    generator = torch.Generator().manual_seed(zlib.crc32(stage.name.encode()))
    layers = [20 - 2 * stage.depth, 21 - 2 * stage.depth]
    tensors = {}
    for layer in layers:
        path = f"base_model.model.layers.{layer}.q_proj"
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, 4, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(4, 2, generator=generator)
    if head:
        tensors["base_model.model.score.weight"] = torch.randn(3, 4, generator=generator)
    config = {
        **{
            name: value for name, value in recipe_config(1, head).items() if name not in ("groups", "stage_parameters")
        },
        "peft_type": "LORA",
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": layers,
        "auto_mapping": {"parents": [above.name for above in stage.path[:-1]]},
    }
    return Adapter.from_tensors({**config, "modules_to_save": config["modules_to_save"] or None}, tensors)


def recipe_config(num_slices: int, head: bool = False) -> dict[str, Any]:
    """What a recipe says of such stages."""
    return {
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "fan_in_fan_out": False,
        "target_modules": ["q_proj"],
        "modules_to_save": ["score"] if head else [],
        "groups": [[20 - 2 * depth, 21 - 2 * depth] for depth in range(1, num_slices + 1)],
        "stage_parameters": "layer_group",
    }


def examples_of(stage: Stage, index: Index) -> list[str]:
    """The examples of a stage, slice by slice."""
    return [
        digest
        for number in stage.prefix
        for digest, entry in sorted(index.items())
        if entry[:2] == (stage.shard, number)
    ]


def make_store(
    path: Path,
    rows: list[dict[str, Any]] | None = None,
    *,
    plan: Plan | None = None,
    key: bytes | None = KEY,
    head: bool = False,
    trained: int | None = None,
    **columns: Any,
) -> S3TStore:
    """A store as a training leaves it.

    Args:
        rows: its train set; `people()` by default.
        plan: two shards, three slices, all rotations by default.
        key: given to the store, which writes it; `None`: whatever the environment holds.
        head: whether stages have heads, so that no root adapter averages them.
        trained: number of stages that are there; all by default.
        columns: of the `S3TConfig`, for example `group_column`.
    """
    plan = plan or Plan.make(2, 3, cyclic(3, 3), prune=False)
    config = S3TConfig(num_shards=plan.num_shards, num_slices=plan.num_slices, **columns)
    dataset = Dataset.from_list(people() if rows is None else rows)
    store = S3TStore(path, key)
    store.ensure_key()
    partition = {
        "num_shards": plan.num_shards,
        "num_slices": plan.num_slices,
        "id_column": id_source(config, dataset.column_names),
        "group_column": config.group_column,
        "slice_columns": config.slice_columns,
    }
    recipe = {"config": recipe_config(plan.num_slices, head), "partition": partition, "base": {"id": None}}
    _, index = read_rows(dataset, store.key, config)
    stages = plan.stages[:trained]
    seen = {stage: examples_of(stage, index) for stage in stages}
    records = {
        stage.name: {"generation": 0, "examples": len(seen[stage]), "data": examples_digest(seen[stage]), "steps": 1}
        for stage in stages
    }
    tombstones = write_state(store, plan, index, records)
    manifest = Manifest(0, tombstones, key_check_value(store.key), recipe, plan)
    stages_files = {stage: store.write_stage(stage, stage_adapter(stage, head)) for stage in stages}
    manifest = Manifest(0, manifest.tombstones, manifest.key_check, recipe, plan, stages_files)
    store.write_manifest(store.write_root(manifest))
    (store.private / "scratch").rmdir()
    return S3TStore(path)


def write_state(store: StoreFolder, plan: Plan, index: Index, records: dict[str, dict[str, Any]]) -> str:
    """Writes a state as a training leaves it; returns the HMAC of its tombstones."""
    with store.changing(create=True) as state:
        places = [(shard, number) for shard in range(plan.num_shards) for number in range(plan.num_slices)]
        state.begin(key_check_value(store.key), places)
        state.add_examples(index)
        for name, record in records.items():
            state.write_record(name, record)
        return state.tombstones_hmac(store.key)


def index_of(store: StoreFolder) -> Index:
    """The whole index."""
    with store.reading() as state:
        return dict(state.examples())


def records_of(store: StoreFolder) -> dict[str, dict[str, Any]]:
    """What each stage was trained on."""
    with store.reading() as state:
        return state.records()


def tombstones_of(store: StoreFolder) -> dict[str, set[str]]:
    """Keyed digests of what tombstones stand for, by its kind."""
    with store.reading() as state:
        return state.buried()


def state_of(store: StoreFolder) -> tuple[int, str]:
    """A state's generation, and the HMAC of its tombstones."""
    with store.reading() as state:
        return state.generation, state.tombstones_hmac(store.key)


def edit_database(store: StoreFolder | Path, statement: str, *values: Any) -> None:
    """Changes a state's database, or that in a store's folder, as somebody would who has the file."""
    path = store.database if isinstance(store, StoreFolder) else store
    path = path if path.is_file() else path / ".s3t" / DATABASE
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(statement, values)
        connection.commit()


@contextmanager
def statements() -> Iterator[list[str]]:
    """Every statement of SQL that is run on any state meanwhile, with its values."""
    run: list[str] = []
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(run.append)
        return connection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        yield run


@dataclass
class Known:
    """What a test knows of a store's train set: the rows by id, and where each lies."""

    rows: dict[str, dict[str, Any]]
    index: Index
    places: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, store: S3TStore, rows: list[dict[str, Any]] | None = None) -> Known:
        """Looks every row up, before anything is deleted."""
        rows = people() if rows is None else rows
        found = {location.asked: location.places[0] for location in store.locate(ids=[row["id"] for row in rows])}
        return cls({row["id"]: row for row in rows}, index_of(store), found)

    def at(self, shard: int, slice_id: int) -> list[str]:
        """Ids of the examples of a slice."""
        return [name for name, place in self.places.items() if place == (shard, slice_id)]

    def entry(self, name: str) -> Entry:
        """The index entry of an example, through its place alone."""
        return next(entry for entry in self.index.values() if entry[:2] == self.places[name])


def tree(path: Path) -> dict[str, str]:
    """sha256 of every file below a store, but the locks'; of a database of what its tables hold."""
    files = {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in PASSING
    }
    for name in [name for name in files if name.endswith(DATABASE)]:
        del files[name]
        files |= _tables(path / name, name)
    return files


def without_receipts(path: Path) -> dict[str, str]:
    """As [`tree`], less receipts and their digests, which are of one time and one salt."""
    manifest = json.loads((path / "s3t.json").read_bytes())
    for event in manifest["log"].values():
        event.pop("receipts", None)
    found = {name: digest for name, digest in tree(path).items() if name != RECEIPTS}
    return {**found, "s3t.json": json.dumps(manifest, sort_keys=True)}


def _tables(file: Path, name: str) -> dict[str, str]:
    """What a database holds, records apart; how its rows lie in the file is left out."""
    found: dict[str, list[Any]] = {name: [], RECEIPTS: [], EXPORTS: []}
    with closing(sqlite3.connect(file)) as connection:
        for table in ("slices", "people", "examples", "events", "event_places", "tombstones", "records", "caches"):
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if row[1] != "number"]
            values = ", ".join(columns).replace("person", "(SELECT digest FROM people AS p WHERE p.number = person)")
            found[name].append((table, sorted(map(repr, connection.execute(f"SELECT {values} FROM {table}")))))
        found[name].append(connection.execute("SELECT store FROM about").fetchall())
        found[RECEIPTS] += connection.execute("SELECT receipt FROM receipts ORDER BY number").fetchall()
        found[EXPORTS] += connection.execute("SELECT * FROM exports ORDER BY path").fetchall()
    return {part: hashlib.sha256(repr(rows).encode()).hexdigest() for part, rows in found.items() if rows}


def stage_folders(path: Path) -> set[str]:
    """Names of the stage folders on disk."""
    return {str(folder.relative_to(path)) for folder in path.glob("shard-*/*")}
