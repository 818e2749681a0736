"""Manifest and state: what is written is read back, and what a hostile or damaged file says is refused."""

from __future__ import annotations

import json

import pytest

from hf_s3t import Plan, Stage, StoreError
from hf_s3t.files import json_bytes
from hf_s3t.store.manifest import FORMAT, Event, Manifest, merged, places_beyond
from hf_s3t.store.state import key_check_value

HASH = "0123456789abcdef" * 4
LOG = {f"receipt-{number}": Event(((0, number),), number > 0) for number in range(3)}
FILES = {"adapter_config.json": HASH, "adapter_model.safetensors": HASH[::-1]}


def manifest(**fields) -> Manifest:
    plan = Plan.make(2, 3, [(0, 1, 2), (1, 2, 0)], prune=False)
    recipe = {"config": {"task_type": "CAUSAL_LM"}, "partition": {"group_column": None}, "base": {"id": None}}
    stages = {Stage(1, (0,)): FILES, Stage(0, (0,)): FILES, Stage(0, (0, 1)): FILES}
    return Manifest(**{"generation": 3, "log": LOG, "tombstones": HASH, "key_check": HASH[:32], "recipe": recipe,
                       "plan": plan, "stages": stages, "root": FILES} | fields)  # fmt: skip


def as_json(**fields):
    return json.loads(json_bytes(manifest(**fields).to_json()))


@pytest.mark.parametrize("fields", [{}, {"stages": {}, "root": None}, {"generation": 0, "log": {}}])
def test_a_manifest_round_trips(fields):
    data = as_json(**fields)
    assert Manifest.from_json(data) == manifest(**fields)
    assert json_bytes(Manifest.from_json(data).to_json()) == json_bytes(data)


def test_a_manifest_says_what_is_served_and_builds_on_what():
    data = as_json()
    assert data["format"] == FORMAT and data["library"] == "hf_s3t"
    assert data["served"] == {"shard-00/0-1": [0, 1], "shard-01/0": [0]}
    assert data["stages"]["shard-00/0-1"]["parent"] == "shard-00/0" and data["stages"]["shard-01/0"]["parent"] is None


def test_without_leaves_stages_out_and_the_original_alone():
    whole = manifest()
    assert set(whole.without([Stage(0, (0, 1)), Stage(0, (2,))]).stages) == {Stage(1, (0,)), Stage(0, (0,))}
    assert len(whole.stages) == 3


@pytest.mark.parametrize("other", [0, FORMAT + 1, None, "1", [FORMAT], 1e300])
def test_another_format_is_refused(other):
    with pytest.raises(StoreError, match="reads format"):
        Manifest.from_json(as_json() | {"format": other})


@pytest.mark.parametrize("data", [None, [], "x", 1, {}, {"library": "peft"}])
def test_other_json_is_no_manifest(data):
    with pytest.raises(StoreError, match="no manifest of hf_s3t"):
        Manifest.from_json(data)


BAD_NAMES = [
    "shard-00/../../x",
    "../shard-00/0",
    "/etc/0",
    "shard-00/0/../1",
    "shard-00",
    "shard-0/0",
    "shard-00/0 ",
    "shard-00/0-0",
    "shard-00/00",
    "shard-00/-1",
    "shard-00\\0",
    "shard-00/0\n",
    "",
    ".s3t/partition.key",
]
BAD_FILES = {
    "leaves the folder": {"../adapter_config.json": HASH},
    "absolute": {"/etc/passwd": HASH},
    "backslash": {"a\\b": HASH},
    "hidden": {".s3t": HASH},
    "another file": FILES | {"pickle.bin": HASH},
    "empty name": FILES | {"": HASH},
    "no files": {},
    "one file": {"adapter_config.json": HASH},
    "short hash": FILES | {"adapter_config.json": HASH[:63]},
    "upper case": FILES | {"adapter_config.json": HASH.upper()},
    "path as hash": FILES | {"adapter_config.json": "../../x"},
    "number as hash": FILES | {"adapter_config.json": 1},
    "null": None,
    "list": [],
    "text": HASH,
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_stage_name_that_is_none_is_refused(name):
    data = as_json()
    data["stages"][name] = {"parent": None, "sha256": FILES}
    with pytest.raises(StoreError, match="manifest is damaged"):
        Manifest.from_json(data)


@pytest.mark.parametrize("files", BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_list_that_is_none_is_refused(files):
    stage, root = as_json(), as_json()
    stage["stages"]["shard-00/0"]["sha256"] = files
    root["root"] = files
    for data in (stage, root) if files is not None else (stage,):  # there may be no root adapter
        with pytest.raises(StoreError, match="manifest is damaged"):
            Manifest.from_json(data)


@pytest.mark.parametrize(
    "field, values",
    [
        ("generation", [-1, 0, 4, 1.5, "3", True, None, [], 1e400, float("nan"), {}]),
        ("tombstones", [None, 1, "x", [], HASH + "0", "\n"]),
        ("key_check", [None, 1, "", "../x", {}]),
        ("recipe", [None, [], "x", 1, {"base": "x", "config": {}, "partition": {}}, {"config": {}}]),
        ("plan", [None, [], {}, {"num_shards": 10**9, "num_slices": 3, "sequences": []}]),
        ("stages", [None, [], "x", {"shard-00/0": None}, {"shard-00/0": []}, {"shard-07/0": {"sha256": FILES}},
                    {"shard-00/7": {"sha256": FILES}}]),
        ("root", [[], "x", 1]),
    ],
)  # fmt: skip
def test_wrong_types_and_ranges_are_refused(field, values):
    for value in values:
        with pytest.raises(StoreError, match="manifest is damaged"):
            Manifest.from_json(as_json() | {field: value})
            pytest.fail(f"{field}={value!r} was read")
    data = as_json()
    del data[field]
    with pytest.raises(StoreError, match="manifest is damaged"):
        Manifest.from_json(data)


def test_the_key_check_value_tells_keys_apart_and_does_not_hold_them():
    first, second = key_check_value(b"k" * 16), key_check_value(b"o" * 16)
    assert first != second and (b"k" * 16).hex() not in first and len(first) == 32


def test_logs_joined_have_the_places_of_both():
    first = {"a": Event(((0, 0),)), "b": Event(((0, 1),), named=False)}
    second = {"a": Event(()), "b": Event(((1, 0),)), "c": Event(((1, 1),))}
    assert places_beyond(first, second) == {(0, 0), (0, 1)} and places_beyond(first, first) == set()
    assert merged(first, second) == merged(second, first)
    assert merged(first, second)["b"] == Event(((0, 1), (1, 0)), named=False)
    assert places_beyond(merged(first, second), second) == {(0, 0), (0, 1)}


@pytest.mark.parametrize("name", ['x") or print("', "a/b/c", "../x", "two\nlines", 3])
def test_a_base_that_is_no_repository_is_refused(name):
    data = as_json()
    data["recipe"]["base"]["id"] = name
    with pytest.raises(StoreError, match="manifest is damaged"):
        Manifest.from_json(data)


@pytest.mark.parametrize(
    "field, values",
    [
        ("replay", ["0.5", None, -0.1, 1.1, 1e400, float("nan"), [1], True]),
        ("stage_parameters", ["wedge", None, 1, ["all"]]),  # joined as layer groups it would be another adapter
    ],
)
def test_a_recipe_that_does_not_say_what_its_stages_are_is_refused(field, values):
    for value in values:
        data = as_json()
        data["recipe"]["config"][field] = value
        with pytest.raises(StoreError, match=f"manifest is damaged: ValueError .*`{field}`"):
            Manifest.from_json(data)
            pytest.fail(f"{field}={value!r} was read")
