"""How ids are written: whatever type they had in a dataset, the command line can spell them, and deletes no other."""

from __future__ import annotations

import datetime
import json
import unicodedata
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

import stores
from command_line import outcomes, plain, run
from hf_s3t import S3TStore, UnknownExampleError
from hf_s3t.store.hashing import read_rows
from hf_s3t.store.ids import id_text, look_alikes, same_to_the_eye
from hf_s3t.store.requests import LookAlikes

COMPOSED = unicodedata.normalize("NFC", "Zoë")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
TWELVE = [f"{number:02}" for number in range(4, 16)]


def store_of(path: Path, ids: list[Any], **columns: list[Any]) -> S3TStore:
    """A store of rows with these ids."""
    texts = [f"text {number}" for number in range(len(ids))]
    return stores.make_store(path, rows=Dataset.from_dict({"id": ids, "text": texts, **columns}))


def live(store: S3TStore, *ids: Any) -> list[bool]:
    return [location.found == "live" for location in store.locate(ids=ids) if not location.looks_like]


# ---- the text of an id ----


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "True"),
        (np.int64(7), "7"),
        (np.float64(7), "7"),
        (np.str_("é"), "é"),
        (1e-7, "1e-07"),
        (Decimal("1.50"), "1.5"),
        (Decimal("1E+3"), "1000"),
        (pd.Timestamp("2026-01-02"), "2026-01-02 00:00:00"),
        (datetime.time(9, 30), "09:30:00"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"),
        ([1, 2], "[1,2]"),
    ],
)
def test_every_value_has_one_text(value: Any, text: str) -> None:
    assert id_text(value) == text


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), Decimal("NaN"), {"a": 1}, object()])
def test_what_names_nobody_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is no id"):
        id_text(value)


@pytest.mark.parametrize(
    ("text", "other"),
    [("04", "4"), (" a", "a"), ('"a"', "a"), ("a", "A"), ("2026-01-02", "2026-01-02 00:00:00"), ("4.0", "4"),
     ("A ", "a"),
     ("ada lovelace", "Ada Lovelace"), ('"ada  lovelace" ', "Ada Lovelace")],
)
def test_what_may_be_meant(text: str, other: str) -> None:
    assert other in look_alikes(text) and text not in look_alikes(text)
    assert look_alikes(COMPOSED)[0] == DECOMPOSED and look_alikes(DECOMPOSED)[0] == COMPOSED


def test_texts_that_look_the_same() -> None:
    assert same_to_the_eye(["a", "b", COMPOSED]) == []
    assert same_to_the_eye([COMPOSED, "a", DECOMPOSED]) == [(DECOMPOSED, COMPOSED)]


DATES = [datetime.date(2026, 1, day) for day in range(1, 13)]


@pytest.mark.parametrize(
    ("ids", "asked"),
    [
        (DATES, "2026-01-02"),
        ([Decimal(number) / 4 for number in range(12)], "0.25"),
        ([float(number) for number in range(12)], "1"),
        ([bytes([number]) for number in range(12)], "01"),
    ],
)
def test_an_id_of_any_type_is_deleted_from_the_command_line(tmp_path: Path, ids: list[Any], asked: str) -> None:
    store = store_of(tmp_path / "out", ids)
    assert live(store, ids[1], ids[2]) == [True, True]
    (outcome,) = outcomes("locate", store.path, "--ids", asked)
    assert [location["asked"] for location in outcome["result"]] == [asked]
    assert outcomes("delete", store.path, "--ids", asked)[0]["result"]["examples"] == 1
    assert live(store, ids[1], ids[2]) == [False, True]


# ---- look-alikes ----


def test_an_unknown_id_is_told_what_it_looks_like(tmp_path: Path) -> None:
    store = store_of(tmp_path / "out", list(range(12)))
    with pytest.raises(UnknownExampleError, match=r"The store knows '4' \(like '04'\)"):
        store.delete(ids=["04"])
    found = store.locate(ids=["04"])
    assert [(location.asked, location.found, location.looks_like) for location in found] == [
        ("04", "unknown", ""), ("4", "live", "04"),
    ]  # fmt: skip
    assert "'4' (looks like '04')" in plain(run("locate", store.path, "--ids", "04").stdout)


def test_one_person_in_two_unicode_forms_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [COMPOSED, COMPOSED, DECOMPOSED, DECOMPOSED] * 3
    with pytest.warns(UserWarning, match="several Unicode forms that look the same"):
        store = stores.make_store(
            tmp_path / "out", group_column="person",
            rows=Dataset.from_dict({"id": list(range(12)), "person": names, "text": ["x"] * 12}),
        )  # fmt: skip
    found = store.locate(groups=[COMPOSED])
    assert [(location.asked, location.found) for location in found] == [(COMPOSED, "live"), (DECOMPOSED, "live")]
    assert store.delete(groups=[COMPOSED]).examples == 6
    assert "not deleted, because nobody asked for them" in caplog.text and ascii(DECOMPOSED) in caplog.text
    assert store.locate(groups=[DECOMPOSED])[0].found == "live"


def test_of_a_known_id_other_cases_are_somebody_else(tmp_path: Path) -> None:
    store = store_of(tmp_path / "out", ["a", "A", *"bcdefghijk"])
    with store.reading() as state:
        assert LookAlikes(state.has, store.key).of("id", "a") == []
    assert [location.asked for location in store.locate(ids=["a"])] == ["a"]


# ---- files of ids ----


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("utf8", "Zoë\nrow-2\n".encode()),
        ("bom and crlf", "\ufeffZoë\r\n\r\nrow-2".encode()),
        ("utf16", "Zoë\nrow-2".encode("utf-16")),
    ],
)
@pytest.mark.parametrize("stdin", [True, False])
def test_ids_are_read_alike_from_files_and_standard_input(tmp_path: Path, name: str, data: bytes, stdin: bool) -> None:
    store = store_of(tmp_path / "out", ["Zoë", *(f"row-{number}" for number in range(11))])
    (tmp_path / "ids.txt").write_bytes(data)
    file = "-" if stdin else tmp_path / "ids.txt"
    result = run("delete", store.path, "--ids-file", file, "--missing-ok", "--json", stdin=data if stdin else None)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)[0]["result"]["examples"] == 2
    assert live(store, "Zoë", "row-1", "row-2") == [False, True, False]


def test_a_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "out", ["Zoë", *(f"row-{number}" for number in range(11))])
    (tmp_path / "ids.txt").write_bytes("Zoë\nrow-2".encode("latin-1"))
    result = run("delete", store.path, "--ids-file", tmp_path / "ids.txt", "--missing-ok")
    assert result.exit_code == 2 and "Save it as UTF-8" in plain(result.stderr)
    assert live(store, "row-2") == [True]


def test_a_request_of_which_nothing_was_found_is_no_success(tmp_path: Path) -> None:
    store = store_of(tmp_path / "out", list(range(12)))
    assert run("delete", store.path, "--ids", "nobody", "--missing-ok").exit_code == 4
    assert run("delete", store.path, "--ids", "nobody", "--ids", "1", "--missing-ok").exit_code == 0
    assert run("delete", store.path, "--ids", "nobody", "--ids", "1", "--missing-ok").exit_code == 0  # deleted already


# ---- datasets of ids ----


def rows_file(path: Path, ids: list[Any], kind: str) -> Path:
    """A file of some rows, as somebody exports it."""
    file, rows = path / f"rows.{kind}", [{"id": name, "text": "x"} for name in ids]
    if kind == "csv":
        file.write_text("text,id\n" + "".join(f'"x, y",{name}\n' for name in ids))
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("kind", ["csv", "json", "jsonl", "parquet"])
def test_leading_zeros_are_part_of_an_id(tmp_path: Path, kind: str) -> None:
    store = store_of(tmp_path / "out", TWELVE)
    file = rows_file(tmp_path, TWELVE[:-1], kind)
    assert outcomes("delete", store.path, "--not-in", file)[0]["result"]["examples"] == 1
    assert live(store, *TWELVE) == [True] * 11 + [False]


def test_an_id_that_is_spelled_otherwise_in_the_file_is_not_deleted(tmp_path: Path) -> None:
    store = store_of(tmp_path / "out", list(range(4, 16)))
    result = run("delete", store.path, "--not-in", rows_file(tmp_path, TWELVE, "csv"), "--at-most", "100%")
    assert result.exit_code == 2 and "'4' for '04'" in plain(result.stderr)
    assert all(live(store, *range(4, 16)))


def test_more_than_a_share_is_not_deleted_unless_told(tmp_path: Path) -> None:
    store = store_of(tmp_path / "out", TWELVE)
    file = rows_file(tmp_path, TWELVE[:9], "csv")
    result = run("delete", store.path, "--not-in", file)
    assert result.exit_code == 2 and "25.0%, and --at-most allows 10%" in plain(result.stderr)
    assert all(live(store, *TWELVE))
    result = run("delete", store.path, "--not-in", file, "--at-most", "25%")
    assert result.exit_code == 0 and "3 of the 12 examples" in plain(result.stderr)
    assert live(store, *TWELVE) == [True] * 9 + [False] * 3
    assert run("delete", store.path, "--not-in", file, "--at-most", "all").exit_code == 2


def test_a_row_without_the_id_is_refused(tmp_path: Path) -> None:
    store = store_of(tmp_path / "out", TWELVE)
    (tmp_path / "rows.jsonl").write_text('{"id": "04"}\n{"name": "05"}\n')
    result = run("delete", store.path, "--not-in", tmp_path / "rows.jsonl", "--at-most", "100%")
    assert result.exit_code == 2 and "Row 1 lacks it" in plain(result.stderr)


def test_rows_without_a_name_are_counted_from_the_top() -> None:
    rows = [{"id": 1.0, "text": "a"}, {"id": float("nan"), "text": "b"}]
    with pytest.raises(ValueError, match="Row 1 has no id in column 'id'"):
        read_rows(rows, stores.KEY, stores.S3TConfig())
