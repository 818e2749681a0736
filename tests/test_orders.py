"""What a training takes from the store: only examples that a deletion would find."""

from dataclasses import replace

import pytest
from datasets import Dataset

import models
from hf_s3t import StateError
from hf_s3t.orders import is_hit, next_order
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
    assert set(order.examples) <= set(begun.store.index())


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
    begun.store.write_state(replace(begun.store.state(), ids={}))
    trainer = make_trainer(tmp_path / "store", train_dataset=models.llama_rows(ROWS))
    with pytest.raises(StateError, match="tombstones differ"):
        trainer.train()


def test_a_tombstone_counts_whatever_the_index_says(begun):
    order = next_order(begun.store, begun.rows)
    names = models.llama_rows(ROWS)["id"]
    name = next(n for n in names if set(begun.store.locate(ids=[n])[0].places) & order.stage.slices)
    begun.store.delete(ids=[name])
    assert len(begun.rows.examples(order.stage, begun.store.state())) == len(order.examples) - 1
