"""What a config names as computed from data: its form, its way through recipes, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hf_s3t import RecipeError, S3TConfig, S3TStore
from hf_s3t.data_derived import LONGEST_SOURCE, MOST_NAMES, TRAIN_SET, limits_of_data, named_in, with_named
from hf_s3t.store.card import render_card
from hf_s3t.store.receipts import LIMITS, limits_of
from hf_s3t.store.recipe_differences import check_same
from hf_s3t.store.sync import _newest_recipe, check_same_store
from stores import make_store, people

NAMED = {"class_weights": "public counts", "tokenizer": TRAIN_SET}
SAID = (
    "Class weights: computed from public counts, by the config's own word, which nobody checked.",
    "Tokenizer: computed from the whole train set, by the config's own word; what that saw of the examples stays.",
)


@pytest.mark.parametrize(
    "value",
    [
        "tokenizer",
        ["tokenizer"],
        {"tokenizer": ""},
        {"tokenizer": "  "},
        {"tokenizer": None},
        {"tokenizer": True},
        {"tokenizer": "x" * (LONGEST_SOURCE + 1)},
        {"tokenizer": "two\nlines"},
        {"tokenizer": "\ud800"},
        {"": "x"},
        {"a.b": "x"},
        {"a b": "x"},
        {"n" * 41: "x"},
        {3: "x"},
        {f"name_{number}": "x" for number in range(MOST_NAMES + 1)},
    ],
)
def test_what_no_receipt_could_say_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`data_derived` "):
        S3TConfig(data_derived=value)


def test_the_longest_that_is_taken_is_read_again() -> None:
    named = {f"{'n' * 37}_{number:02}": "x" * LONGEST_SOURCE for number in range(MOST_NAMES)}
    assert S3TConfig(data_derived=named).data_derived == named == named_in({"data_derived": named})
    assert S3TConfig(data_derived={}).data_derived == {} and named_in({}) == {}


@pytest.mark.parametrize("value", [None, 3, "text", [["a", "b"]], {"a": {"b": 1}}, {"a b": "x"}, {"a": "x\n# y"}])
def test_what_a_strangers_manifest_names_otherwise_is_left_out(value: Any) -> None:
    assert named_in({"data_derived": value}) == {} and limits_of_data({"data_derived": value}) == ()
    assert named_in({"data_derived": {f"n{n}": "x" for n in range(1000)}}).keys() <= {f"n{n}" for n in range(1000)}
    assert len(named_in({"data_derived": {f"n{n}": "x" for n in range(1000)}})) == MOST_NAMES


def test_receipts_have_a_sentence_on_each() -> None:
    assert limits_of_data({"data_derived": NAMED}) == SAID
    assert limits_of_data({"steering": None, "base": {"class": "LlamaForCausalLM"}}) == ()
    (line,) = limits_of_data({"steering": {"arguments": {}}})
    assert "An evaluation set chose" in line and "a deletion does not reach it" in line
    for name in ("BertForSequenceClassification", "ViTForImageClassification"):
        assert "Classes and their names stay" in limits_of_data({"base": {"class": name}})[0]


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    """A store whose recipe names something."""
    make_store(tmp_path / "out", people())
    store = S3TStore(tmp_path / "out")
    manifest = store.manifest()
    store.write_manifest(dataclasses.replace(manifest, recipe={**manifest.recipe, "data_derived": NAMED}))
    return store


def test_a_receipt_and_the_card_say_it(store: S3TStore) -> None:
    assert store.delete(ids=["row-1"]).limits == (*LIMITS[:-1], *SAID, LIMITS[-1])
    card = (store.path / "README.md").read_text()
    assert all(f"- {line}\n" in card for line in SAID)
    assert json.loads((store.path / "s3t.json").read_text())["recipe"]["data_derived"] == NAMED
    recipe = {**store.manifest().recipe, "data_derived": {}}
    plain = dataclasses.replace(store.manifest(), recipe=recipe)
    assert limits_of(plain) == LIMITS and "Not reached by a deletion" not in render_card(plain)


def test_a_card_shows_no_markup_of_a_stranger(store: S3TStore) -> None:
    recipe = {**store.manifest().recipe, "data_derived": {"tokenizer": "<img src=x> `code`"}}
    card = render_card(dataclasses.replace(store.manifest(), recipe=recipe))
    assert "&lt;img src=x&gt; 'code'" in card and "<img" not in card


def test_another_word_is_a_change_of_the_recipe_and_a_new_name_is_none() -> None:
    recipe = {"config": {}, "base": {}, "partition": {}, "data_derived": NAMED}
    for other in ({}, {"data_derived": {}}, {"data_derived": {"loss": "no data"}}, {"data_derived": NAMED}):
        same = {**recipe, "data_derived": {}, **other}
        assert check_same(recipe, same) == check_same(same, recipe) == ()
    changed = {**recipe, "data_derived": NAMED | {"tokenizer": "the base"}}
    with pytest.raises(RecipeError, match=r"data_derived.tokenizer: the store has 'train set', this run 'the base'"):
        check_same(recipe, changed)
    (difference,) = check_same(recipe, changed, ["data_derived.tokenizer"])
    assert difference.after == "the base"


def test_what_was_named_once_stays_on_record() -> None:
    assert with_named({"a": 1, "data_derived": {"x": "1"}}, {"b": 2, "data_derived": {"x": "2", "y": "3"}}) == {
        "a": 1, "data_derived": {"x": "1", "y": "3"},
    }  # fmt: skip
    assert with_named({"a": 1}, {"b": 2}) == {"a": 1}


def test_two_machines_of_which_one_names_something_are_of_one_store(store: S3TStore, tmp_path: Path) -> None:
    make_store(tmp_path / "other", people())
    ours, theirs = store.manifest(), S3TStore(tmp_path / "other").manifest()
    check_same_store(ours, theirs)
    check_same_store(theirs, ours)
    joined = {_newest_recipe(*pair).recipe["data_derived"] == NAMED for pair in ((ours, theirs), (theirs, ours))}
    assert joined == {True}
