"""What a store publishes, as somebody hostile wrote it: refused by its name, or read; and a deletion goes on."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import strategies as st

from hf_s3t import Plan, S3TStore
from hf_s3t.store.audit import verify
from hostile import (
    DEEP,
    KINDS,
    Original,
    Outside,
    as_json,
    changed,
    damaged,
    fuzz,
    json_texts,
    only_typed,
    put_kind,
    quick_folder,
    run_cases,
)
from stores import make_store, people

PLAN = Plan.make(2, 2, [(0, 1), (1, 0)], prune=False)
MANIFEST = "s3t.json"
FIRST, KEPT = "shard-00/0", "shard-01/1-0"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def hostile():
    """A store that is put back before every case, and a folder beside it that nothing may touch."""
    with quick_folder() as root:
        make_store(root / "out", people(8), plan=PLAN)
        yield Original(root / "out"), Outside(root / "canary")


WAYS = {
    "status": lambda store: store.status().to_json(),
    "locate": lambda store: store.locate(ids=["row-1", "nobody"]),
    "verify": lambda store: verify(store).to_json(),
    "assemble": lambda store: store.assemble(0, (0, 1)),
    "root": lambda store: store.assemble_root(store.manifest()),
    "export": lambda store: store.export(store.path.parent / "export", prefix="shard-01/1"),
    "preview": lambda store: store.delete(ids=["row-1"], dry_run=True),
    "delete": lambda store: store.delete(ids=["row-1"]),
    "delete a slice": lambda store: store.delete(slices=[(0, 0)]),
    "expire": lambda store: store.expire("1d"),
    "import": lambda store: store.import_state(store.private / "state.sqlite"),
}
ways = st.sampled_from(sorted(WAYS))


def looked_at(hostile, way):
    """One way of using a store, whose outcome nobody knows."""
    original, outside = hostile
    error = only_typed(lambda: WAYS[way](S3TStore(original.path)))
    outside.check()
    return error


@fuzz(300)
def test_a_manifest(amount, hostile):
    original, _ = hostile

    def case(text, way):
        original.put_back()
        (original.path / MANIFEST).write_bytes(text)
        looked_at(hostile, way)

    known = [(b"[" * DEEP, "status"), (b'{"library": "\\ud800"}', "status"), (b"\xff", "delete")]
    run_cases(amount, case, json_texts(original.read(MANIFEST)), ways, first=known)


def deletes(hostile, slices=((0, 0),)):
    """A deletion that is asked for is carried out: what it hits is gone from manifest and disk."""
    original, outside = hostile
    receipt = S3TStore(original.path).delete(slices=slices)
    assert receipt.status == "inactive" and receipt.stages_removed
    left = {path.parent.name for path in original.path.glob("shard-00/*/*")}
    assert left <= {"1"} and not any("0" in name for name in left)
    assert {stage.name for stage in S3TStore(original.path).manifest().stages if stage.shard == 0} <= {"shard-00/1"}
    assert (original.path / "README.md").read_text().startswith("---\n")
    outside.check()


@fuzz(60)
def test_a_manifest_that_can_be_read_can_be_deleted_from(amount, hostile):
    """A card that cannot be told in whole, for example, is told in part."""
    original, _ = hostile
    manifest = original.read(MANIFEST)
    loose = {name: manifest[name] for name in ("recipe", "accepted", "deletion_prior", "repair")}

    def case(part):
        original.put_back()
        (original.path / MANIFEST).write_bytes(as_json(manifest | part if isinstance(part, dict) else part))
        if only_typed(S3TStore(original.path).manifest) is None:
            deletes(hostile)

    def of_task(value):
        return ({**loose, "recipe": {**loose["recipe"], "config": {**loose["recipe"]["config"], "task_type": value}}},)

    run_cases(amount, case, changed(loose), first=[of_task(value) for value in ({"a": 1}, [], "\ud800", 1)])


def test_a_plan_that_would_fill_the_memory_is_refused():
    """200 KB of numbers whose prefixes have a hundred million."""
    orders = [[(first + step) % 1000 for step in range(1000)] for first in range(200)]
    with pytest.raises(ValueError, match="The prefixes of the plan have 100000000 slices, more than 67108864"):
        Plan.from_json({"num_shards": 1, "num_slices": 1000, "sequences": [orders]})


def put_stage(original, name, file, data):
    """Other bytes for a stage, with a manifest that agrees."""
    manifest = original.read(MANIFEST)
    manifest["stages"][name]["sha256"][file] = hashlib.sha256(data).hexdigest()
    original.put_back()
    (original.path / MANIFEST).write_bytes(as_json(manifest))
    (original.path / name / file).write_bytes(data)


@fuzz(50)
def test_a_config_whose_hash_agrees(amount, hostile):
    original, _ = hostile
    config = original.read(f"{KEPT}/{CONFIG}")

    def case(text, way):
        put_stage(original, KEPT, CONFIG, text)
        looked_at(hostile, way)
        put_stage(original, KEPT, CONFIG, text)
        deletes(hostile)

    run_cases(amount, case, json_texts(config), st.sampled_from(["verify", "root", "export"]))


def header_of(data):
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def weights(draw, data):
    """Files in the place of weights: another header, another length, damaged bytes."""
    header, tensors = header_of(data)
    how = draw(st.sampled_from(("header", "header", "length", "bytes", "text")))
    if how == "bytes":
        return draw(damaged(data))
    text = draw(json_texts(header)) if how == "text" else as_json(draw(changed(header)))
    length = draw(st.sampled_from([0, 1, 8, 2**31, 2**63, 2**64 - 1])) if how == "length" else len(text)
    return struct.pack("<Q", length) + text + tensors


@fuzz(60)
def test_weights_whose_hash_agrees(amount, hostile):
    original, _ = hostile
    data = original.files[Path(f"{KEPT}/{WEIGHTS}")]

    def case(text, way):
        put_stage(original, KEPT, WEIGHTS, text)
        looked_at(hostile, way)
        put_stage(original, KEPT, WEIGHTS, text)
        deletes(hostile)

    run_cases(amount, case, weights(data), st.sampled_from(["verify", "root", "export"]))


FILES = [
    MANIFEST, "README.md", CONFIG, f"{KEPT}/{CONFIG}", f"{KEPT}/{WEIGHTS}", KEPT, "shard-01", f"{FIRST}/{WEIGHTS}",
]  # fmt: skip


@fuzz(50)
def test_something_in_the_place_of_a_file_that_is_none(amount, hostile):
    """A pipe, for example, must not keep anybody waiting."""
    original, outside = hostile

    def case(name, kind, way):
        original.put_back()
        put_kind(original.path / name, kind, outside.path)
        looked_at(hostile, way)

    known = [(name, "fifo", way) for name in FILES for way in ("status", "delete a slice", "verify")]
    run_cases(amount, case, st.sampled_from(FILES), st.sampled_from(KINDS), ways, first=known)
