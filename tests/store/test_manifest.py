"""Manifest and state: what is written is read back, and what a hostile or damaged file says is refused."""

from __future__ import annotations

import copy
import itertools
import json
import random

import pytest

from hf_s3t import Plan, Stage, StateError, StoreError
from hf_s3t.files import json_bytes
from hf_s3t.store.manifest import FORMAT, Event, Manifest, merged, places_beyond
from hf_s3t.store.state import State, Tombstone, key_check_value, united
from hf_s3t.store.tombstones import with_tombstones

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
    with pytest.raises(StateError, match="not of format"):
        State.from_json(State().to_json() | {"format": other})


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


def state() -> State:
    stone = Tombstone({"receipt-1": ((0, 1),), "receipt-2": ((1, 0),)}, 2)
    records = {"shard-00/0": {"generation": 1, "examples": 7, "steps": 3, "versions": {"peft": "0.21"}}}
    return State(2, {HASH[:32]: stone}, {HASH[32:]: stone}, records, ("/cache/a.arrow",))


def test_a_state_round_trips():
    for one in (state(), State()):
        assert State.from_json(json.loads(json_bytes(one.to_json()))) == one


@pytest.mark.parametrize(
    "path, value",
    [
        (("generation",), None),
        (("generation",), 1e400),
        (("ids",), []),
        (("ids", HASH[:32]), None),
        (("ids", HASH[:32], "deletions"), [[0]]),
        (("ids", HASH[:32], "deletions"), {"receipt-1": [[0]]}),
        (("ids", HASH[:32], "deletions"), {"receipt-1": [[0, "x"]]}),
        (("groups",), None),
        (("stages",), 3),
        (("caches",), 5),
    ],
)
def test_a_damaged_state_is_refused(path, value):
    data = copy.deepcopy(json.loads(json_bytes(state().to_json())))
    *above, last = path
    target = data
    for key in above:
        target = target[key]
    target[last] = value
    with pytest.raises(StateError, match="state is damaged"):
        State.from_json(data)


def test_a_tombstone_buries_an_example_by_id_and_by_group():
    assert state().buries(HASH[:32], None) and state().buries("other", HASH[32:])
    assert not state().buries("other", None) and not state().buries("other", "third")


def test_the_digest_tells_tombstones_apart_and_needs_the_key():
    key, other_key = b"k" * 16, b"o" * 16
    digest = state().digest(key)
    assert digest == State.from_json(state().to_json()).digest(key)
    assert len({digest, state().digest(other_key), State().digest(key), State(groups=state().groups).digest(key)}) == 4
    # An id is no group, also when the digests are the same.
    stone = {HASH[:32]: Tombstone({"x": ()}, 1)}
    assert State(ids=stone).digest(key) != State(groups=stone).digest(key)


def test_the_key_check_value_tells_keys_apart_and_does_not_hold_them():
    first, second = key_check_value(b"k" * 16), key_check_value(b"o" * 16)
    assert first != second and (b"k" * 16).hex() not in first and len(first) == 32


@pytest.mark.parametrize("seed", range(30))
def test_states_joined_in_any_order_forget_no_deletion(seed):
    """Three machines delete, readmit and exchange: an example is buried while a deletion stands that nobody lifted
    who knew of it."""
    draw, states, seen, lifted, about = random.Random(seed), [State()] * 3, [set(), set(), set()], {}, {}
    for _ in range(40):
        here, there, digest = draw.randrange(3), draw.randrange(3), draw.choice("abc")
        act = draw.choice(["delete", "readmit", "join", "join"])
        if act == "join":
            states[here] = united(states[here], states[there])
            seen[here] |= seen[there]
        else:
            name = f"receipt-{draw.random()}"
            places = [(0, draw.randrange(2))] if act == "delete" else []
            receipt = {"kind": act, "receipt": {"receipt": name}, "places": places}
            states[here] = with_tombstones(states[here], {**receipt, "ids": {digest: places}, "groups": {}})
            if act == "delete":
                about[name] = digest
            else:
                lifted[name] = {known for known in seen[here] if about.get(known) == digest}
            seen[here].add(name)
        for state, known in zip(states, seen, strict=True):
            gone = set().union(*(lifted.get(name, ()) for name in known))
            standing = {name for name in known if name in about and name not in gone}
            assert {name for stone in state.ids.values() for name in stone.deletions} == standing
            assert state.ids.keys() == {about[name] for name in standing} and state.log.keys() == known
    joined = [united(united(a, b), c) for a, b, c in itertools.permutations(states)]
    assert len({state.digest(b"k" * 16) for state in joined}) == 1


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


def test_travelling_tombstones_need_the_key():
    data = json.loads(json_bytes(state().tombstones_json(b"k" * 16)))
    read = State.from_tombstones_json(data, b"k" * 16)
    assert (read.ids, read.groups, read.log) == (state().ids, state().groups, state().log)
    for forged in ({**data, "ids": {}}, {**data, "log": {"x": {"places": [], "named": True}}}, {**data, "hmac": None}):
        with pytest.raises(StateError, match="partition key"):
            State.from_tombstones_json(forged, b"k" * 16)
    with pytest.raises(StateError, match="partition key"):
        State.from_tombstones_json(data, b"o" * 16)
