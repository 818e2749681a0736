"""From raw rows to the prepared rows of an example: none is lost, none is another's."""

from __future__ import annotations

import pytest
from datasets import Dataset, concatenate_datasets

from hf_s3t import S3TConfig
from hf_s3t.store.partition import keyed_digest
from hf_s3t.training.rows import TrainRows

KEY = bytes(range(32))
NAMES = [f"row-{i}" for i in range(6)]
EXAMPLES = [keyed_digest(KEY, "id", name) for name in NAMES]


def rows_of(dataset: Dataset) -> TrainRows:
    return TrainRows(dataset, KEY, S3TConfig(num_shards=1, num_slices=2))


def test_an_example_has_all_of_its_prepared_rows_and_a_dropped_one_has_none(caplog):
    raw = Dataset.from_dict({"id": NAMES})
    rows = rows_of(raw)
    marked = rows.marked(raw)
    with caplog.at_level("WARNING"):
        prepared = rows.adopt(concatenate_datasets([marked.select([4, 0, 2, 0]), marked.select([0, 5])]))
    assert prepared.column_names == ["id"]
    assert prepared["id"][:] == ["row-4", "row-0", "row-2", "row-0", "row-0", "row-5"]
    assert rows.numbered(EXAMPLES) == [(EXAMPLES[i], n) for i, n in ((0, 1), (0, 3), (0, 4), (2, 2), (4, 0), (5, 5))]
    assert "2 rows were dropped in the preparation" in caplog.text


def test_rows_of_the_same_content_are_one_example_with_several_rows():
    raw = Dataset.from_dict({"text": list("abcab")})
    rows = rows_of(raw)
    assert len(rows.entries) == 3
    rows.adopt(rows.marked(raw))
    assert sorted(number for _, number in rows.numbered(list(rows.entries))) == list(range(5))
    a, b, c = rows.entries
    assert rows.numbered([c, a]) == [(c, 2), (a, 0), (a, 3)] and rows.numbered([b]) == [(b, 1), (b, 4)]


def test_a_row_that_the_preparation_made_up_is_nobodys():
    raw = Dataset.from_dict({"id": NAMES})
    rows = rows_of(raw)
    strange = rows_of(Dataset.from_dict({"id": ["x"]})).marked(Dataset.from_dict({"id": ["x"]}))
    rows.adopt(concatenate_datasets([strange, rows.marked(raw)]))
    assert rows.numbered(EXAMPLES) == [(example, n + 1) for n, example in enumerate(EXAMPLES)]


def test_an_empty_train_set_is_refused():
    with pytest.raises(ValueError, match="The train set has no rows"):
        rows_of(Dataset.from_dict({"id": []}))
