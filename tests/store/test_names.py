"""What no file can hold is refused at the door: ids, groups, references, paths and settings with half a character."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainingArguments

import models
import trained_stores
from command_line import plain, run
from hf_s3t import S3TConfig, S3TStore, UnknownExampleError
from hf_s3t.store.hashing import read_rows
from hf_s3t.store.ids import id_text
from stores import KEY, make_store, people, tree

HALF = "row-\udc80"
"""A byte that is no UTF-8, as Python reads it from a command line or a file name."""
LONG = "x" * 100_000


@pytest.mark.parametrize("value", [HALF, ["a", "\ud83d"], "\ude00"])
def test_an_id_with_half_a_character_is_none(value: Any) -> None:
    with pytest.raises(ValueError, match=r"half a character .*here: .*\\ud.*Read it again, as UTF-8"):
        id_text(value)
    assert id_text("😀") == "😀"


@pytest.mark.parametrize("column", ["id", "person", "text"])
def test_a_training_names_the_row_that_holds_it(column: str) -> None:
    rows = people(12)
    rows[7][column] = HALF
    with pytest.raises(ValueError, match=r"Row 7\b.*half a character"):
        read_rows(rows, KEY, S3TConfig(group_column="person"))


@pytest.mark.parametrize(
    "change",
    [
        lambda store: store.locate(ids=[HALF]),
        lambda store: store.delete(ids=["row-1", HALF], missing_ok=True),
        lambda store: store.delete(rows=[{"id": HALF}]),
        lambda store: store.delete(groups=[HALF]),
        lambda store: store.readmit(ids=[HALF]),
        lambda store: store.delete(ids=["row-1"], reference="DSR \udc80"),
        lambda store: store.delete(ids=["row-1"], reference="x" * 1001),
        lambda store: store.delete(ids=["row-1"], reference=118),
        lambda store: store.readmit(ids=["row-2"], reference="DSR \udc80"),
        lambda store: store.readmit(ids=["row-2"], reference="x" * 1001),
        lambda store: store.export(store.path.parent / HALF),
    ],
)
def test_nothing_is_written_for_it(tmp_path, change) -> None:
    store = make_store(tmp_path / "out", group_column="person")
    store.delete(ids=["row-2"], reference="x" * 1000)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="half a character|at most 1,000 characters"):
        change(store)
    assert tree(tmp_path) == before


def test_a_setting_with_it_is_refused_before_a_store_is_written(tmp_path) -> None:
    trainer = trained_stores.make_trainer(str(tmp_path / "out"), models.llama_rows(16), num_shards=1, num_slices=2)
    assert isinstance(trainer.args, TrainingArguments)
    trainer.args.optim_args = "name=\udc80"
    with pytest.raises(ValueError, match=r"recipe\.arguments\.optim_args holds half a character"):
        trainer.train()
    assert not trainer.store.exists and not trainer.store.has_state


def test_the_command_line_says_it(tmp_path) -> None:
    store = make_store(tmp_path / "out")
    before = tree(tmp_path)
    result = run("delete", store.path, "--ids", HALF)
    assert result.exit_code == 2 and "half a character" in plain(result.stderr)
    assert tree(tmp_path) == before


# ---- long ones ----


def test_a_long_unknown_id_is_shown_shortened(tmp_path) -> None:
    store = make_store(tmp_path / "out")
    for change in (store.delete, store.readmit):
        with pytest.raises(UnknownExampleError, match=r"x\.\.\. \(100,002 characters\)") as caught:
            change(ids=[LONG])
        assert len(str(caught.value)) < 1000
    shown = run("locate", store.path, "--ids", LONG).stdout
    assert "(100,000 characters)" in plain(shown) and len(shown) < 3000
    assert S3TStore(store.path).locate(ids=[LONG])[0].asked == LONG
