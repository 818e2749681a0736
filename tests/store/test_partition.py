"""Where examples live: independent of one another, uniform, and found again from an id, a group or the raw row."""

from __future__ import annotations

import datetime
import io
import random
import warnings

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from scipy.stats import chisquare

from hf_s3t import DatasetError, S3TConfig
from hf_s3t.store import hashing
from hf_s3t.store.hashing import read_rows
from hf_s3t.store.partition import (
    Entry,
    assign,
    canonical,
    compare,
    examples_digest,
    id_source,
    keyed_digest,
    raw_rows,
    row_digest,
    warn_of_empty_slices,
)

KEY = bytes(range(32))


def config(**fields) -> S3TConfig:
    return S3TConfig(**{"num_shards": 2, "num_slices": 4} | fields)


def people(n: int) -> list[dict]:
    return [{"id": f"row-{i}", "person": f"person-{i % (n // 3)}", "text": f"text {i}"} for i in range(n)]


def entries(rows, key=KEY, **fields) -> dict[str, Entry]:
    dataset = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    return read_rows(dataset, key, config(**fields))[1]


def of(value, kind="id") -> str:
    return keyed_digest(KEY, kind, value)


# Places


@pytest.mark.parametrize("fields", [{}, {"group_column": "person"}])
def test_deleting_and_reshuffling_rows_moves_nobody(fields):
    rows = people(60)
    whole = entries(rows, **fields)
    fewer = random.Random(0).sample(rows, 40)
    assert entries(fewer, **fields).items() <= whole.items()
    assert entries(fewer + [{"id": "new", "person": "new", "text": ""}], **fields).items() & whole.items()
    assert len(whole) == 60 and len({entry[:2] for entry in whole.values()}) > 4


def test_content_beyond_the_id_moves_nobody():
    rows = people(20)
    changed = entries([row | {"text": "other"} for row in rows])
    assert {digest: entry[:3] for digest, entry in changed.items()} == {d: e[:3] for d, e in entries(rows).items()}


def test_places_are_uniform():
    digests = [of(f"row-{i}") for i in range(8000)]
    counts = np.bincount([4 * shard + slice_id for shard, slice_id in (assign(KEY, d, 3, 4) for d in digests)])
    assert len(counts) == 12
    assert chisquare(counts).pvalue > 0.01
    # Neither correlated with the places of another shape or another key.
    for other in (lambda d: assign(KEY, d, 1, 5)[1], lambda d: assign(b"another key", d, 1, 5)[1]):
        table = np.zeros((12, 5))
        for digest in digests:
            shard, slice_id = assign(KEY, digest, 3, 4)
            table[4 * shard + slice_id, other(digest)] += 1
        assert chisquare(table.ravel()).pvalue > 0.01


def test_another_key_is_another_partition():
    rows = people(60)
    assert not entries(rows).keys() & entries(rows, key=b"k" * 32).keys()
    places = [[entry[:2] for entry in entries(rows, key=key).values()] for key in (KEY, b"k" * 32)]
    assert 0 < sum(a == b for a, b in zip(*places, strict=True)) < 20


def test_rows_of_a_group_share_a_place_and_rows_without_one_stand_alone():
    rows = people(60) + [{"id": f"alone-{i}", "person": None, "text": ""} for i in range(20)]
    found = entries(rows, group_column="person")
    by_group = {}
    for entry in found.values():
        by_group.setdefault(entry.group, set()).add(entry[:2])
    assert len(by_group.pop(None)) > 3
    assert len(by_group) == 20 and all(len(places) == 1 for places in by_group.values())
    assert {found[of(f"row-{i}")].group for i in (0, 20, 40)} == {of("person-0", "group")}


def test_a_group_and_an_id_of_the_same_name_are_two_things():
    assert len({of("x", kind) for kind in ("id", "group", "content")}) == 3


# Names


@pytest.mark.parametrize("name", [17, "17", np.int64(17)])
def test_a_number_and_its_text_are_the_same_id(name):
    assert of(name) == of("17") != of("017")


def test_an_id_that_occurs_twice_is_refused_with_examples():
    rows = [{"key": name, "text": "x"} for name in ["a", "b", "a", "c", "b", "a"]]
    with pytest.raises(ValueError, match="3 ids occur more than once in column 'key', e.g. 'a', 'b', 'a'. Make"):
        entries(rows, id_column="key")
    with pytest.raises(ValueError, match="1 ids occur more than once"):
        read_rows([{"id": 17}, {"id": "17"}], KEY, config())


@pytest.mark.parametrize("rows", [people(3) + [{"id": None, "person": "x", "text": "y"}], people(3) + [{"text": "y"}]])
def test_a_row_without_its_id_is_refused(rows):
    with pytest.raises(ValueError, match="Row 3 has no id"):
        read_rows(rows, KEY, config())


def test_rows_without_ids_are_named_by_content_and_duplicates_share_a_slice():
    rows = [{"text": f"text {i % 7}"} for i in range(20)]
    digests, index = read_rows(Dataset.from_list(rows), KEY, config())
    assert digests == [of(row_digest(row)) for row in rows]
    assert {*digests} == index.keys() and len(index) == 7
    assert len({entry[:2] for entry in index.values()}) > 1


@pytest.mark.parametrize("field", ["id_column", "group_column"])
def test_a_named_column_that_is_not_there_is_refused(field):
    with pytest.raises(ValueError, match="no column 'missing'. Its columns: id, person, text"):
        entries(people(3), **{field: "missing"})
    with pytest.raises(ValueError, match="no column 'missing'"):
        entries(people(3), slice_columns=("id", "missing"))


@pytest.mark.parametrize("column", ["input_ids", "pixel_values", "input_features"])
def test_tokenized_rows_need_a_named_id(column):
    rows = [{column: [i, 1, 2], "labels": 0} for i in range(5)]
    with pytest.raises(ValueError, match=f"already tokenised .{column}.*id_column='{column}'"):
        entries(rows)
    assert entries(rows, id_column=column).keys() == {of([i, 1, 2]) for i in range(5)}
    assert id_source(config(), [column, "id"]) == "id"


@pytest.mark.parametrize("columns, source", [(["text", "id"], "id"), (["text"], None)])
def test_the_column_id_names_an_example_without_being_named(columns, source):
    assert id_source(config(), columns) == source
    assert id_source(config(id_column="text"), columns) == "text"


# Content


@pytest.mark.parametrize(
    "value, text",
    [
        ({"b": 1, "a": "é"}, '{"a":"é","b":1}'),
        ([1.5, None, True], "[1.5,null,true]"),
        (b"\xff", '{"base64":"/w=="}'),
        (np.arange(3), "[0,1,2]"),
        (np.float32(0.5), "0.5"),
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        (float("nan"), "NaN"),
    ],
)
def test_canonical_json(value, text):
    assert canonical(value).decode() == text


def test_a_row_digest_depends_on_every_column_by_name_and_not_on_their_order():
    row = {"a": "1", "b": "2"}
    assert row_digest(row) == row_digest({"b": "2", "a": "1"})
    assert len({row_digest(other) for other in (row, {"a": "2", "b": "1"}, {"a": "1"}, {"a": "1", "b": 2}, {})}) == 5


def png(color: int) -> bytes:
    buffer = io.BytesIO()
    PILImage.new("L", (2, 2), color).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [lambda file: file, lambda file: [file, file], lambda file: {"front": file}])
def test_of_a_file_only_the_bytes_count(wrap):
    here, there = ({"image": wrap({"bytes": png(3), "path": path})} for path in ("/a/x.png", None))
    other = {"image": wrap({"bytes": png(4), "path": "/a/x.png"})}
    assert row_digest(here) == row_digest(there) != row_digest(other)
    remote = {"image": wrap({"bytes": None, "path": "/a/x.png"})}
    assert row_digest(remote) != row_digest({"image": wrap({"bytes": None, "path": "/a/y.png"})})


def test_images_and_bytes_are_read_undecoded():
    features = Features({"image": Image(), "views": List(Image()), "raw": Value("binary")})
    rows = [{"image": {"bytes": png(i), "path": f"{i}.png"}, "views": [], "raw": bytes([i])} for i in range(3)]
    dataset = Dataset.from_list(rows, features=features)
    assert [row["image"]["bytes"] for row in raw_rows(dataset)] == [png(i) for i in range(3)]
    assert read_rows(dataset, KEY, config())[0] == [of(row_digest(row)) for row in rows]


@pytest.mark.parametrize("form", ["torch", "numpy", None])
def test_a_row_taken_from_the_dataset_names_the_example(form):
    rows = [{"numbers": [i, 2], "weight": 0.1 * i, "text": f"é {i}"} for i in range(3)]
    dataset = Dataset.from_list(rows)
    (digest, *_), _ = read_rows(dataset.with_format(form), KEY, config())
    assert digest == of(row_digest(rows[0])) == of(row_digest(dataset[0]))


def test_transforms_and_selections_do_not_change_the_raw_rows():
    dataset = Dataset.from_list(people(2500))
    transformed = dataset.with_transform(lambda batch: {"text": ["x" for _ in batch["text"]]})
    assert list(raw_rows(transformed)) == people(2500)
    assert list(raw_rows(dataset.select([7, 3]))) == [people(2500)[7], people(2500)[3]]


def test_any_sequence_of_mappings_is_a_train_set():
    assert read_rows(people(30), KEY, config()) == read_rows(Dataset.from_list(people(30)), KEY, config())


def test_streams_and_rows_that_are_no_mappings_are_refused():
    with pytest.raises(ValueError, match="needs a train set with a length"):
        read_rows(Dataset.from_list(people(3)).to_iterable_dataset(), KEY, config())
    with pytest.raises(ValueError, match="needs a train set with a length"):
        read_rows(iter(people(3)), KEY, config())
    with pytest.raises(ValueError, match="must be mappings from column to value, got tuple"):
        read_rows([("text", 1)], KEY, config())


# The dataset's own places


def placed(*places, person="x"):
    return [{"id": f"row-{i}", "person": person, "m": m, "l": l} for i, (m, l) in enumerate(places)]  # noqa: E741


def test_the_datasets_own_columns_place_its_rows():
    rows = placed((0, 3), (1, 0), (1, 2))
    found = entries(rows, slice_columns=("m", "l"))
    assert [found[of(row["id"])][:2] for row in rows] == [(0, 3), (1, 0), (1, 2)]


@pytest.mark.parametrize("place", [(2, 0), (-1, 0), (0, 4), (0, -1), (0.0, 1), ("0", 1), (None, 0), (0, True)])
def test_a_place_that_is_none_is_refused(place):
    with pytest.raises(ValueError, match="Row 1 has .* in column '[ml]'; expected a (whole )?number below [24]"):
        read_rows(placed((0, 0), place), KEY, config(slice_columns=("m", "l")))


def test_a_group_in_two_places_is_refused():
    fields = {"slice_columns": ("m", "l"), "group_column": "person"}
    with pytest.raises(ValueError, match="put 2 rows apart from other rows of their group"):
        entries(placed((0, 0), (0, 1), (0, 0), (1, 0)), **fields)
    assert len(entries(placed((0, 1), (0, 1)), **fields)) == 2
    assert len(entries(placed((0, 0), (0, 1), person=None), **fields)) == 2


# Empty slices


def test_an_empty_slice_is_warned_about_with_its_chance_and_the_largest_number_of_slices():
    index = entries(people(12), num_shards=1, num_slices=8)
    with pytest.warns(UserWarning) as caught:
        warn_of_empty_slices(index, KEY, config(num_shards=1, num_slices=8))
    filled = {entry.slice for entry in index.values()}
    fits = [size for size in range(1, 8) if len({assign(KEY, digest, 1, size) for digest in index}) == size]
    first = min(set(range(8)) - filled)
    expected = (
        rf"{8 - len(filled)} of 8 slices are empty, e.g. .* \(0, {first}\): 12 examples leave {8 * (7 / 8) ** 12:.2f} "
    )
    assert caught[0].message.args[0].startswith(expected.replace("\\", "").replace(".*", "(shard, slice)"))
    assert caught[0].message.args[0].endswith(f"The largest num_slices without an empty slice is {max(fits)}.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_empty_slices(
            entries(people(12), num_shards=1, num_slices=max(fits)), KEY, config(num_shards=1, num_slices=max(fits))
        )


def test_groups_count_as_one_in_the_warning_about_empty_slices():
    rows = [row | {"person": f"person-{i % 2}"} for i, row in enumerate(people(60))]
    fields = {"group_column": "person", "num_shards": 1}
    with pytest.warns(UserWarning, match=r"2 groups leave 2\.25 empty on average"):
        warn_of_empty_slices(entries(rows, **fields), KEY, config(**fields))


@pytest.mark.parametrize(
    "rows, fields, advice",
    [
        (people(3), {"num_shards": 20}, "There is too little data"),
        (placed((0, 0)), {"slice_columns": ("m", "l")}, "Fill them in the dataset's own slice columns"),
    ],
)
def test_the_warning_about_empty_slices_knows_the_way_out(rows, fields, advice):
    with pytest.warns(UserWarning, match=advice):
        warn_of_empty_slices(entries(rows, **fields), KEY, config(**fields))


# Comparing


def test_a_comparison_tells_missing_changed_and_new_rows():
    rows = people(30)
    index = entries(rows, group_column="person")
    today = rows[2:20] + [rows[20] | {"text": "changed"}] + rows[21:] + [{"id": "new", "person": "p", "text": ""}]
    found = compare(index.items(), entries(today, group_column="person"))
    assert (found.missing, found.changed, found.new) == ({of("row-0"), of("row-1")}, {of("row-20")}, {of("new")})
    same = compare(index.items(), entries(list(reversed(rows)), group_column="person"))
    assert not (same.missing or same.changed or same.new)


@pytest.mark.parametrize("field, value", [("m", 1), ("l", 2), ("person", "other"), ("person", None)])
def test_a_known_example_that_moved_is_refused(field, value):
    fields = {"slice_columns": ("m", "l"), "group_column": "person"}
    rows = [row | {"person": f"person-{i}"} for i, row in enumerate(placed((0, 0), (0, 0), (0, 0)))]
    with pytest.raises(DatasetError, match="1 known examples have another slice or group now"):
        compare(entries(rows, **fields).items(), entries([rows[0] | {field: value}, *rows[1:]], **fields))


def test_the_digest_of_a_stages_examples_depends_on_their_order():
    assert examples_digest(["a", "b"]) == examples_digest(("a", "b"))
    assert len({examples_digest(x) for x in (["a", "b"], ["b", "a"], ["ab"], [])}) == 4


@pytest.mark.parametrize("kind", [set, frozenset])
def test_a_set_names_no_example(kind):
    with pytest.raises(ValueError, match="has a set, and its order changes with every run.*sorted list"):
        row_digest({"tags": kind(["a", "b"])})


def test_a_decoded_image_names_no_example():
    row = {"image": PILImage.new("L", (2, 2)), "label": 0}
    with pytest.raises(ValueError, match="changes with every run, so it cannot name an example. Hand in the row"):
        row_digest(row)


@pytest.fixture
def three_at_once(monkeypatch):
    """Processes take three rows at a time; what they were given is counted."""
    begun = []
    monkeypatch.setattr(hashing, "ROWS_AT_ONCE", 3)
    in_processes = hashing._hash_in_processes

    def counted(dataset, key, one, workers):
        begun.append(workers)
        return in_processes(dataset, key, one, workers)

    monkeypatch.setattr(hashing, "_hash_in_processes", counted)
    return begun


@pytest.mark.parametrize("fields", [{}, {"group_column": "person"}, {"id_column": "text"}])
def test_several_processes_find_what_one_does(fields, three_at_once):
    rows = Dataset.from_list(people(20)).shuffle(seed=0)  # no longer in the order of its table
    assert read_rows(rows, KEY, config(**fields), workers=2) == read_rows(rows, KEY, config(**fields))
    assert three_at_once == [2]


def test_few_rows_and_rows_of_other_datasets_are_hashed_here(three_at_once):
    read_rows(Dataset.from_list(people(3)), KEY, config(), workers=2)
    read_rows(people(9), KEY, config(), workers=2)
    read_rows(Dataset.from_list(people(9)), KEY, config(), workers=1)
    assert three_at_once == []


def test_several_processes_say_what_is_wrong_as_one_does(three_at_once):
    bad = Dataset.from_list([*people(9), {"id": None, "person": "x", "text": "y"}])
    with pytest.raises(ValueError, match=r"^Row 9 has no id in column 'id'"):
        read_rows(bad, KEY, config(), workers=2)
    twice = Dataset.from_list([*people(9), *people(6)])
    with pytest.raises(ValueError, match=r"^6 ids occur more than once .* 'row-0', .*'row-4'\. Make"):
        read_rows(twice, KEY, config(), workers=2)
    alike = Dataset.from_list([{"id": name} for name in ("a", "b", "caf\u00e9", "c", "d", "cafe\u0301")])
    with pytest.warns(UserWarning, match="1 names in column 'id' are written in several Unicode forms"):
        read_rows(alike, KEY, config(), workers=2)
    assert three_at_once == [2, 2, 2]
