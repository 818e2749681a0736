"""What a deletion does to a store, whoever asks and however they name the examples, and what its receipt says."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import pytest

from hf_s3t import Plan, S3TStore, StoreError, UnknownExampleError
from hf_s3t.serving.loading import read_members
from hf_s3t.store.manifest import NOT_KNOWN
from hf_s3t.store.partition import keyed_digest
from hf_s3t.store.receipts import LIMITS, read_receipts
from stores import RECEIPTS, Known, index_of, make_store, people, stage_folders, state_of, tombstones_of, tree

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "out"
    store = make_store(path, group_column="person")
    with store.writing():
        pass
    return path, Known.of(store)


@pytest.fixture
def store(made, tmp_path):
    return S3TStore(shutil.copytree(made[0], tmp_path / "out"))


@pytest.fixture
def known(made):
    return made[1]


def spared(store, *places) -> set[str]:
    return {stage.name for stage in store.manifest().stages if not stage.slices & set(places)}


# What is removed


def test_a_deletion_removes_every_stage_that_saw_the_slice_and_nothing_else(store, known):
    before, expected = tree(store.path), spared(store, (0, 1))
    store.delete(ids=[known.at(0, 1)[0]])
    after = tree(store.path)
    assert stage_folders(store.path) == {stage.name for stage in store.manifest().stages} == expected
    assert expected == {"shard-00/0", "shard-00/2", "shard-00/2-0"} | {n for n in expected if n.startswith("shard-01")}
    assert all(after[name] == before[name] for name in after if name.startswith("shard-"))
    assert store.served() == {0: (2, 0), 1: (0, 1, 2)}
    assert list(read_members(store)) == ["shard-00", "shard-01"]
    with pytest.raises(StoreError, match="not in the store"):
        store.assemble(0, (0, 1))


def test_one_that_is_deleted_is_nowhere_in_the_store(store, known):
    name, text = known.at(0, 1)[0], known.rows[known.at(0, 1)[0]]["text"]
    digest = keyed_digest(store.key, "id", name)
    store.delete(ids=[name])
    written = {file: file.read_bytes() for file in store.path.rglob("*") if file.is_file()}
    for secret in (f'"{name}"', text, known.rows[name]["person"] + '"', digest):
        assert not [file for file, data in written.items() if secret.encode() in data]
    holding = {file.name: data.count(bytes.fromhex(digest)) for file, data in written.items()}
    assert {file: count for file, count in holding.items() if count} == {"state.sqlite": 1}
    assert tombstones_of(store)["id"] == {digest} and digest not in index_of(store)


def test_several_ids_in_one_call_are_one_deletion(store, known, monkeypatch):
    written = []
    write_manifest = S3TStore.write_manifest
    monkeypatch.setattr(
        S3TStore, "write_manifest", lambda self, manifest: (written.append(1), write_manifest(self, manifest))
    )
    names = [known.at(m, l)[0] for m, l in [(0, 0), (0, 1), (1, 2)]]  # noqa: E741
    receipt = store.delete(ids=names)
    assert len(written) == 1 and store.manifest().generation == receipt.generation == 1
    assert stage_folders(store.path) == {"shard-00/2", "shard-01/0", "shard-01/0-1", "shard-01/1"}
    assert len(read_receipts(store)) == 1 and receipt.found == receipt.examples == 3


def test_generations_count_deletions_in_manifest_and_state(store, known):
    for generation, name in enumerate(known.at(0, 0)[:3], start=1):
        assert store.delete(ids=[name]).generation == generation
        assert store.manifest().generation == state_of(store)[0] == generation
        assert store.manifest().tombstones == state_of(store)[1]
    assert [receipt["generation"] for receipt in read_receipts(store)] == [1, 2, 3]


def test_of_equally_long_prefixes_the_plans_first_is_served(tmp_path):
    orders = [(2, 1, 0), (0, 1, 2), (1, 2, 0)]
    store = make_store(tmp_path / "out", plan=Plan.make(1, 3, orders, prune=False))
    assert store.served() == {0: (2, 1, 0)}
    store.delete(slices=[(0, 0)])
    assert store.served() == {0: (2, 1)}
    store.delete(slices=[(0, 2)])
    assert store.served() == {0: (1,)}
    assert store.delete(slices=[(0, 1)]).served_after == {} and store.served() == {}


def test_a_slice_that_is_gone_is_not_deleted_again(store):
    first = store.delete(slices=[(0, 1)])
    again = store.delete(slices=[(0, 1)])
    assert (again.status, again.generation, again.already_deleted, again.found) == ("unchanged", 1, 1, 0)
    assert again.deleted_by == [first.receipt] and again.inactive_since == first.inactive_since
    assert store.manifest().generation == 1
    other = store.delete(slices=[(0, 1), (1, 0)])
    assert (other.status, other.generation, other.already_deleted, other.found) == (first.status, 2, 1, 1)


@pytest.mark.parametrize("verb", ["locate", "readmit", "delete"])
@pytest.mark.parametrize("asked", [{"ids": "row-1"}, {"groups": "Ada"}, {"ids": b"row-1"}, {"ids": {"row-1": 1}}])
def test_one_thing_is_no_list_of_things(store, verb, asked):
    with pytest.raises(ValueError, match=rf"`{next(iter(asked))}` must be a list"):
        getattr(store, verb)(**asked)


# Receipts


def test_a_receipt_tells_what_was_asked_found_and_done(store, known):
    (first, second, *_), other = known.at(0, 1), known.at(1, 0)[0]
    store.delete(ids=[other])
    before = store.manifest()
    receipt = store.delete(
        ids=[first, second, first, other, "nobody"], missing_ok=True, reference="DSR-2026-118 é\u2028"
    )
    assert (receipt.kind, receipt.status, receipt.generation) == ("delete", "inactive", 2)
    assert (receipt.asked, receipt.found, receipt.already_deleted, receipt.examples) == (4, 2, 1, 2)
    assert receipt.dark_examples == len(known.at(0, 1)) - 2
    assert receipt.served_before == {"0": [0, 1, 2], "1": [1, 2]}
    assert receipt.served_after == {"0": [2, 0], "1": [1, 2]}
    gone = {stage.name: files for stage, files in before.stages.items() if (0, 1) in stage.slices}
    assert receipt.stages_removed == gone and len(gone) == 6
    assert receipt.requested_at <= receipt.inactive_since and receipt.inactive_since.endswith("+00:00")
    assert receipt.limits == LIMITS and {"hf_s3t", "peft", "torch"} <= set(receipt.versions)
    kept = read_receipts(store)[-1]
    assert kept == json.loads(json.dumps(receipt.to_json())) and kept["reference"] == "DSR-2026-118 é\u2028"


def test_dark_are_those_whose_slices_are_no_longer_served(tmp_path):
    rows = people(40)
    store = make_store(tmp_path / "out", rows, plan=Plan.make(1, 3, [(0, 1, 2)], prune=False))
    known = Known.of(store, rows)
    receipt = store.delete(ids=[known.at(0, 1)[0]])  # the prefix (0, 1, 2) becomes (0,): slices 1 and 2 are dark
    assert receipt.dark_examples == len(known.at(0, 1)) + len(known.at(0, 2)) - 1


def test_receipts_are_kept_in_their_order(store, known):
    store.delete(ids=["row-0"], reference="first é")
    assert store.delete(ids=["row-8"], reference="second").found == 1
    assert [receipt["reference"] for receipt in read_receipts(store)] == ["first é", "second"]
    assert store.status().requests == 2


# Asking


@pytest.mark.parametrize(
    "request_, error, message",
    [
        (
            {"ids": ["row-0", "x", "y"]},
            UnknownExampleError,
            "2 of 3 are not known to .*: 'x', 'y'. Nothing was changed",
        ),
        ({"groups": ["nobody"]}, UnknownExampleError, "1 of 1 are not known"),
        ({"groups": ["row-0"]}, UnknownExampleError, "1 of 1 are not known"),
        ({"rows": [{"id": "x"}]}, UnknownExampleError, "1 of 1 are not known"),
        ({"digests": ["0" * 32]}, UnknownExampleError, "1 of 1 are not known"),
        ({"rows": [{"text": "x"}]}, ValueError, "named by column 'id', which a given row lacks"),
        ({}, ValueError, "request is empty: give ids, groups, rows or slices."),
        ({"ids": [], "rows": iter(())}, ValueError, "request is empty"),
        ({"slices": [(2, 0)]}, ValueError, "There is no slice 0 of shard 2"),
        ({"slices": [(0, 3)], "ids": ["row-0"]}, ValueError, "There is no slice 3 of shard 0"),
        ({"slices": [(0, -1)]}, ValueError, "There is no slice -1"),
        ({"slices": (0, 1)}, ValueError, "pairs"),
        ({"ids": "row-0"}, ValueError, r"`ids` must be a list, got 'row-0'. For a single one write `ids=\[...\]`"),
        ({"groups": "person-0"}, ValueError, "`groups` must be a list"),
        ({"rows": {"id": "row-0"}}, ValueError, "`rows` must be a list"),
        ({"rows": ["row-0"]}, ValueError, "`rows` must be mappings"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_request_that_can_not_be_met_changes_nothing(store, request_, error, message, dry_run):
    before = tree(store.path)
    with pytest.raises(error, match=message):
        store._delete(request_, dry_run=dry_run)
    assert tree(store.path) == before


def test_groups_need_a_group_column(tmp_path):
    store = make_store(tmp_path / "out")
    before = tree(store.path)
    with pytest.raises(ValueError, match="was trained without `group_column`"):
        store.delete(groups=["person-0"])
    assert tree(store.path) == before


def test_a_dry_run_tells_the_truth_and_changes_no_byte(store, known):
    before, request_ = tree(store.path), {"ids": [known.at(0, 1)[0]], "groups": ["person-3"]}
    dry = store.delete(**request_, dry_run=True)
    assert tree(store.path) == before and dry.status == "dry run" and dry.inactive_since is None
    real = store.delete(**request_)
    for name in ("generation", "asked", "found", "examples", "dark_examples", "stages_removed", "served_after"):
        assert getattr(dry, name) == getattr(real, name)


@pytest.mark.parametrize("request_", [{"ids": ["row-0"]}, {"groups": ["person-0"]}, {"rows": [people()[0]]}])
def test_deleting_twice_is_unchanged(store, request_):
    first = store.delete(**request_)
    before = tree(store.path)
    again = store.delete(**request_)
    assert (again.deleted_by, again.inactive_since) == ([first.receipt], first.inactive_since)
    assert store.status().requests == 1
    assert (again.status, again.asked, again.found, again.already_deleted) == ("unchanged", 1, 0, 1)
    assert again.stages_removed == {} and again.examples == 0
    after = tree(store.path)
    assert {name for name in after if before.get(name) != after[name]} == {RECEIPTS}


def test_missing_ok_with_nothing_known_is_unchanged(store):
    before = tree(store.path)
    receipt = store.delete(ids=["x"], missing_ok=True)
    assert (receipt.status, receipt.found) == ("unchanged", 0)
    before.pop(RECEIPTS, None)
    after = tree(store.path)
    assert after.pop(RECEIPTS) and after == before


def test_slices_and_names_in_one_call(store, known):
    receipt = store.delete(ids=[known.at(0, 0)[0]], slices=[(1, 2)])
    assert receipt.asked == receipt.found == 2
    assert receipt.examples == 1 + len(known.at(1, 2))
    assert not any(stage.slices & {(0, 0), (1, 2)} for stage in store.manifest().stages)
    assert {location.found for location in store.locate(ids=known.at(1, 2))} == {"deleted"}
    assert {location.found for location in store.locate(ids=known.at(0, 0)[1:])} == {"live"}


ROWS = {
    "column": people(),
    "content": [{name: value for name, value in row.items() if name != "id"} for row in people()],
    "slices": [row | {"m": int(row["person"][7:]) % 2, "l": int(row["person"][7:]) % 3} for row in people()],
}


@pytest.mark.parametrize("group_column", ["person", None])
@pytest.mark.parametrize("kind", ROWS)
def test_every_way_of_naming_deletes_on_a_copied_folder(tmp_path, kind, group_column):
    rows = ROWS[kind]
    columns = {"group_column": group_column} | ({"slice_columns": ("m", "l")} if kind == "slices" else {})
    made = make_store(tmp_path / "made", rows, **columns)
    index = index_of(made)
    for number, (way, asked) in enumerate(
        {"ids": ["row-5"], "rows": [rows[5]], "groups": [rows[5]["person"]]}.items()
    ):
        store = S3TStore(shutil.copytree(made.path, tmp_path / str(number)))
        if (way == "groups" and not group_column) or (way == "ids" and kind == "content"):
            with pytest.raises((ValueError, UnknownExampleError), match="without `group_column`|not known"):
                store.delete(**{way: asked})
            continue
        receipt = store.delete(**{way: asked})
        gone = index.keys() - index_of(store).keys()
        places = {index[digest][:2] for digest in gone}
        assert receipt.examples == len(gone) == (2 if way == "groups" else 1) and len(places) == 1
        assert kind != "slices" or places == {(rows[5]["m"], rows[5]["l"])}
        assert not any(stage.slices & places for stage in store.manifest().stages)
        assert receipt.stages_removed.keys() == {s.name for s in made.manifest().stages if s.slices & places}
        assert tombstones_of(store)["id"] == gone and len(tombstones_of(store)["group"]) == (way == "groups")
        assert store.delete(**{way: asked}).status == "unchanged"


# With part of the store lost


@pytest.mark.parametrize("lost", [".s3t", ".s3t/state.sqlite", ".s3t/partition.key"])
def test_with_the_state_lost_slices_can_be_deleted_and_names_say_why_not(store, lost):
    expected = spared(store, (0, 1))
    path = store.path / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(StoreError, match="partition key|no state"):
        store.delete(ids=["row-0"])
    receipt = store.delete(slices=[(0, 1)])
    assert receipt.status == "inactive" and stage_folders(store.path) == expected
    assert store.status().interrupted_deletions == 0 and store.manifest().generation == 1
    with store.writing():
        pass
    assert stage_folders(store.path) == expected


def test_a_damaged_stage_that_stays_does_not_block_a_deletion(store, known):
    weights = store.path / "shard-01" / "0" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    expected = spared(store, (0, 1))
    receipt = store.delete(ids=[known.at(0, 1)[0]])
    assert receipt.status == "inactive" and stage_folders(store.path) == expected
    assert store.manifest().root is None and not (store.path / "adapter_model.safetensors").exists()
    assert store.assemble(0, (2, 0)).tensors


def test_a_state_that_missed_a_deletion_does_not_pass_for_a_newer_one(store, made, known, tmp_path):
    """Else the example that was deleted elsewhere would be trained on again."""
    there = S3TStore(shutil.copytree(made[0], tmp_path / "there"))
    there.delete(ids=[known.at(0, 0)[0]])
    shutil.copy(there.path / "s3t.json", store.path / "s3t.json")
    victim = known.at(1, 1)[0]
    for generation, request_ in [(2, {"ids": [victim]}), (3, {"slices": [(1, 2)]})]:
        assert store.delete(**request_).status == "inactive"
        assert state_of(store)[0] == generation - 1 and store.manifest().generation == generation
        with store.reading() as state:
            assert not state.knows(store.manifest()) and store.manifest().tombstones == NOT_KNOWN
    assert stage_folders(store.path) == spared(store, (0, 0), (1, 1), (1, 2))
    assert store.locate(ids=[victim])[0].found == "deleted"
    there.export_state(tmp_path / "state.json")
    store.import_state(tmp_path / "state.json")
    assert store.manifest().tombstones == state_of(store)[1]
    assert {store.locate(ids=[name])[0].found for name in (victim, known.at(0, 0)[0])} == {"deleted"}


# Two at once


def delete_one(path, name, start):
    start.wait(30)
    S3TStore(path).delete(ids=[name])


def test_two_processes_that_delete_at_once_both_succeed(store, known):
    names = [known.at(0, 0)[0], known.at(1, 1)[0], known.at(0, 2)[0]]
    start = FORK.Barrier(len(names))
    processes = [FORK.Process(target=delete_one, args=(store.path, name, start)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert {location.found for location in store.locate(ids=names)} == {"deleted"}
    assert sorted(receipt["generation"] for receipt in read_receipts(store)) == [1, 2, 3]
    assert stage_folders(store.path) == spared(store, (0, 0), (1, 1), (0, 2)) == {
        "shard-00/1", "shard-01/0", "shard-01/2", "shard-01/2-0"}  # fmt: skip
    assert store.manifest().tombstones == state_of(store)[1] and len(tombstones_of(store)["id"]) == 3


# When it can no longer be undone


def test_when_it_is_durable_the_caller_is_told_once_and_before_anything_goes(store, known):
    before, looks = tree(store.path), []

    def look():
        reader = S3TStore(store.path)
        (intent,) = reader.intents()
        looks.append((reader.live().generation, reader.served()))
        now = tree(store.path)
        assert {name for name in now if before.get(name) != now[name]} == {f".s3t/intents/{intent['file']}"}

    request_ = {"ids": [known.at(0, 1)[0]]}
    assert store._delete(request_, dry_run=True, when_durable=look) and not looks
    receipt = store._delete(request_, when_durable=look)
    assert looks == [(receipt.generation, {0: (2, 0), 1: (0, 1, 2)})] and store.manifest().generation == 1
    for nothing in (request_, {"ids": ["nobody"]}):
        assert store._delete(nothing, missing_ok=True, when_durable=look).status == "unchanged"
    with pytest.raises(UnknownExampleError):
        store._delete({"ids": ["nobody"]}, when_durable=look)
    assert len(looks) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_the_caller_raises_then_keeps_nothing_from_being_deleted(store, known, error):
    def fail():
        raise error("the model is gone")

    expected = spared(store, (0, 1))
    with pytest.raises(error, match="the model is gone"):
        store._delete({"ids": [known.at(0, 1)[0]]}, when_durable=fail)
    assert stage_folders(store.path) == expected and not store.intents()
    assert [receipt["status"] for receipt in read_receipts(store)] == ["inactive"]
    assert store.delete(ids=[known.at(0, 1)[0]]).status == "unchanged"


def test_without_the_state_what_is_not_known_is_not_counted_as_nothing(store):
    shutil.rmtree(store.private)
    receipt = store.delete(slices=[(0, 1)])
    assert receipt.stages_removed and receipt.examples is receipt.dark_examples is None
    assert store.status().requests == 1 and store.status().examples is None
    assert [known["receipt"] for known in read_receipts(store)] == [receipt.receipt]
