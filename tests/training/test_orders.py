"""What a training takes from the store: only examples that a deletion would find."""

from dataclasses import replace

import pytest
from datasets import Dataset, load_from_disk

import models
from hf_s3t import S3TStore, StateError
from hf_s3t.lora.adapter import Adapter
from hf_s3t.store import deletion, schema
from hf_s3t.store.database import StateDatabase
from hf_s3t.store.manifest import NOT_KNOWN, Event
from hf_s3t.store.partition import Entry
from hf_s3t.store.sweep import sweep
from hf_s3t.training.stage_orders import StageDropped, commit, is_hit, next_order
from stores import edit_database, index_of, statements
from trainers import make_trainer

ROWS = 24


@pytest.fixture
def begun(tmp_path):
    """A trainer whose store knows its rows and holds no stage yet."""
    trainer = make_trainer(tmp_path / "store", train_dataset=models.llama_rows(ROWS))
    trainer._open_store()
    return trainer


def test_a_row_readmitted_meanwhile_is_not_trained_on_before_the_index_knows_it(begun):
    asked = next_order(begun.store, begun.rows)
    names = models.llama_rows(ROWS)["id"]
    name = next(n for n in names if set(begun.store.locate(ids=[n])[0].places) & asked.stage.slices)
    begun.store.delete(ids=[name])
    begun.store.readmit(ids=[name])
    order = next_order(begun.store, begun.rows)
    assert order.stage == asked.stage and len(order.examples) == len(asked.examples) - 1
    assert set(order.examples) <= set(index_of(begun.store))


def test_a_deletion_that_was_lifted_again_still_drops_the_stage_that_saw_the_example(begun):
    order = next_order(begun.store, begun.rows)
    names = models.llama_rows(ROWS)["id"]
    seen = next(n for n in names if set(begun.store.locate(ids=[n])[0].places) & order.stage.slices)
    unseen = [n for n in names if not set(begun.store.locate(ids=[n])[0].places) & order.stage.slices]
    begun.store.delete(ids=unseen[:1])
    begun.store.readmit(ids=unseen[:1])
    assert not is_hit(begun.store, order)
    begun.store.delete(ids=[seen])
    begun.store.readmit(ids=[seen])
    assert is_hit(begun.store, order)


def test_a_checkpoint_is_not_that_of_the_same_ids_with_other_content(begun, tmp_path):
    order = next_order(begun.store, begun.rows)
    rows = models.llama_rows(ROWS).to_list()
    changed = Dataset.from_list([{**row, "labels": row["labels"][::-1]} for row in rows])
    trainer = make_trainer(tmp_path / "store", train_dataset=changed)
    trainer._open_store()
    other = next_order(trainer.store, trainer.rows)
    assert other.examples == order.examples and other.mark != order.mark


def test_a_state_whose_tombstones_were_taken_out_trains_nothing(begun, tmp_path):
    begun.store.delete(ids=[models.llama_rows(ROWS)["id"][0]])
    edit_database(begun.store, "DELETE FROM tombstones")
    trainer = make_trainer(tmp_path / "store", train_dataset=models.llama_rows(ROWS))
    with pytest.raises(StateError, match="tombstones differ"):
        trainer.train()


def test_a_deleted_example_is_none_of_its_stage_any_more(begun):
    order = next_order(begun.store, begun.rows)
    names = models.llama_rows(ROWS)["id"]
    name = next(n for n in names if set(begun.store.locate(ids=[n])[0].places) & order.stage.slices)
    begun.store.delete(ids=[name])
    with begun.store.reading() as state:
        assert len(begun.rows.examples(order.stage, state)) == len(order.examples) - 1


def test_a_deletion_whose_tombstones_did_not_come_drops_the_stage_and_ends_the_training(begun):
    """As a pull from a public repository leaves it, beside a training."""
    order = next_order(begun.store, begun.rows)
    manifest = begun.store.manifest()
    log = {"receipt-elsewhere": Event(tuple(order.stage.slices))}
    begun.store.write_manifest(replace(manifest, log=log, generation=1, tombstones=NOT_KNOWN))
    with pytest.raises(StageDropped):
        commit(begun.store, order, Adapter({}, {}), {})
    with pytest.raises(StateError, match="state import"):
        next_order(begun.store, begun.rows)


def test_a_deletion_that_is_being_carried_out_drops_the_stages_that_it_hits_and_no_other(begun, monkeypatch):
    """The manifest tells of it before the state does."""
    order = next_order(begun.store, begun.rows)
    found = {n: begun.store.locate(ids=[n])[0].places for n in models.llama_rows(ROWS)["id"]}
    unseen = next(n for n, places in found.items() if not set(places) & order.stage.slices)
    seen = next(n for n, places in found.items() if set(places) & order.stage.slices)
    hit = []

    def look(folder, manifest, *rest):
        hit.append((manifest.generation, is_hit(S3TStore(begun.store.path), order)))
        return sweep(folder, manifest, *rest)

    monkeypatch.setattr(deletion, "sweep", look)
    begun.store.delete(ids=[unseen])
    begun.store.delete(ids=[seen])
    assert hit == [(0, False), (1, False), (1, False), (2, True)]


def test_neither_an_order_nor_a_look_for_deletions_reads_the_examples_one_by_one(tmp_path):
    """With ten times the examples the same statements are run."""
    counts = {}
    for rows in (ROWS, 10 * ROWS):
        trainer = make_trainer(tmp_path / str(rows), train_dataset=models.llama_rows(rows))
        trainer._open_store()
        store = trainer.store
        with statements() as ordered:
            order = next_order(store, trainer.rows)
        with statements() as looked:
            assert not is_hit(store, order)
        assert not [statement for statement in looked if "examples" in statement]
        names = models.llama_rows(rows)["id"]
        unseen = next(n for n in names if not set(store.locate(ids=[n])[0].places) & order.stage.slices)
        store.delete(ids=[unseen])
        with statements() as looked_again:
            assert not is_hit(store, order)
        counts[rows] = len(order.examples), len(ordered), len(looked), len(looked_again)
    (few, *little), (many, *much) = counts.values()
    assert many > 8 * few and little == much, counts


def test_a_second_training_on_the_same_rows_writes_nothing_into_the_state(tmp_path):
    models.llama_rows(ROWS).save_to_disk(tmp_path / "rows")
    rows = load_from_disk(tmp_path / "rows")  # its files are on record
    make_trainer(tmp_path / "store", train_dataset=rows).train()
    store = S3TStore(tmp_path / "store")
    before, seen = store.database.read_bytes(), store.database.stat()
    for options in ({}, {"extend": True}):
        make_trainer(tmp_path / "store", train_dataset=rows, **options).train()
    after = store.database.stat()
    assert store.database.read_bytes() == before
    assert (after.st_ino, after.st_mtime_ns) == (seen.st_ino, seen.st_mtime_ns)


def test_an_imported_state_is_obeyed_by_a_new_store(tmp_path):
    first = make_trainer(tmp_path / "first", train_dataset=models.llama_rows(ROWS))
    first._open_store()
    name = models.llama_rows(ROWS)["id"][0]
    first.store.delete(ids=[name])
    first.store.export_state(tmp_path / "backup.json")
    S3TStore(tmp_path / "new").import_state(tmp_path / "backup.json")
    second = make_trainer(tmp_path / "new", train_dataset=models.llama_rows(ROWS))
    second._open_store()
    assert second.store.locate(ids=[name])[0].found == "deleted" and len(index_of(second.store)) == ROWS - 1
    assert second.store.manifest().log == first.store.manifest().log and second.store.manifest().generation == 1


def test_one_example_that_left_the_index_is_missed_among_many():
    state = StateDatabase(schema.in_memory())
    state.begin("0" * 32, [(0, 0)])
    digests = [f"{number:032x}" for number in range(1200)]
    state.add_examples({digest: Entry(0, 0, None, digest) for digest in digests})
    assert state.has_all([*digests, *digests[:3]]) and state.has_all([])
    for gone in (digests[0], digests[700], digests[-1]):
        state.remove_examples([gone])
        assert not state.has_all(digests) and state.has_all({*digests} - {gone})
        state.add_examples({gone: Entry(0, 0, None, gone)})
