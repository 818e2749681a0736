"""Digests are what a store finds people by for years: no version may write other ones for the same rows."""

from __future__ import annotations

import datetime
import hashlib
import hmac
from decimal import Decimal
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from hf_s3t import S3TConfig
from hf_s3t.store.hashing import read_rows
from hf_s3t.store.partition import Entry, assign, keyed_digest, row_digest

KEY = bytes(range(32))
ROWS: dict[str, Any] = {
    "text": {"text": "Grüße, 世界 \u2028 \"quoted\" \\ \n\t\x00", "id": "row-1"},
    "numbers": {
        "a": 1, "b": -(2**70), "c": 0.1, "d": 1e300, "e": float("inf"), "f": float("nan"), "g": -0.0, "h": True,
    },
    "nothing": {"a": None, "b": "", "c": [], "d": {}},
    "no columns": {},
    "order": {"b": 2, "ä": 3, "a": 1, "B": 4},
    "nested": {"a": [{"c": [1, (2, 3)], "b": None}], "m": {"z": {"y": "x"}, "k": [[], [1.5, "s"]]}},
    "tokens": {"input_ids": [101, 7592, 102], "attention_mask": (1, 1, 1)},
    "bytes": {"a": b"\xff\x00", "b": bytearray(b"x"), "c": memoryview(b"y"), "d": [b"z"]},
    "dates": {
        "a": datetime.date(2026, 1, 2), "b": datetime.datetime(2026, 1, 2, 3, 4, 5, 6), "c": datetime.time(1, 2),
        "d": datetime.timedelta(days=1, seconds=2), "e": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    },
    "numpy": {
        "a": np.arange(6).reshape(2, 3), "b": np.float32(0.1), "c": np.int64(7), "d": np.array(["é"]),
        "e": np.bool_(True), "f": [np.float64(0.25)], "g": np.str_("s"),
    },
    "others": {"a": Decimal("1.50"), "b": 2 + 1j},
    "image": {"image": {"bytes": b"\x89PNG", "path": "/a/x.png"}, "label": 3},
    "images": {"views": [{"path": "x", "bytes": b"1"}, {"path": None, "bytes": b"2"}], "label": 3},
    "image elsewhere": {"image": {"bytes": None, "path": "/a/x.png"}},
    "no image": {"image": {"bytes": b"1", "path": "x", "more": 1}},
    "a row that is a file": {"bytes": b"1", "path": "x"},
    "a row that is a file of text": {"bytes": "1", "path": "x"},
    "a row that names a file": {"bytes": None, "path": "x"},
    "other mappings": MappingProxyType({"a": 1, "b": MappingProxyType({"bytes": b"1", "path": "x"})}),
}  # fmt: skip

CONTENT = {
    "text": "d3eb349e8d5571eb3f95123df9212d48bedd5c81edeb04649d1103e102e6165f",
    "numbers": "d7e9aa699a3c7d7506ae2bfb8ba396a33497727e5ab6beb9cb46aa0cf76c18a9",
    "nothing": "9471b5aab1b36e30da183c8172d2a8f681870a33eb6200c16e8a717fa4e8c212",
    "no columns": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
    "order": "ce51c2ac4085aae4dbc65f87e6c5b1aad0260dcb71193c0930e7713209294fbe",
    "nested": "5469ed2642e9875440271358997c6cfd62516f38225368d5f741cb6c36755b1a",
    "tokens": "af973aa7f390e68ea299416b1d915336af3576f45694737d33bb6f1074ca8665",
    "bytes": "8f642f2418ebdb82d8c6aabbd90170d9c8e431e87dc88150acd90c8ccc3445bd",
    "dates": "d0f2f07ed900a5dc5599df8db9c5506192bfe76ff8ee3574bbbc58009c4ee182",
    "numpy": "f493da188841780ff305a1330b2cc552a51c8ebbdd9aa49f4e1fe106315556d3",
    "others": "ff2c5693c9e5da7fef33c33f962698a885dca02f84dc707983c271bf6f90cd53",
    "image": "381f59280adc4daa2d4fcd1bbabb1d6d14834b7a203467168a174d8f1298d1f5",
    "images": "dd8a0f1f902972dcdbf5905009c7ec144d4a6da9652d0636556e6b4fc8ef8ca7",
    "image elsewhere": "e6bd3923fa1aae556df8ef0e7965f76d4ea5c91155ed43c534eb7b7ffea977c3",
    "no image": "7874eb56b19f875aef943161e3421d7db2e54944e90f42c6ba49e445a2fe2f8d",
    "a row that is a file": "6cf364b339528675d4a4e6bf8ac86dc4f3e38ffdec7aecebf6fc272d8f12599a",
    "a row that is a file of text": "e3dcda3343e06f0b2cb7398148b049162ca1e993b9d126d609301f8e9131d8d9",
    "a row that names a file": "9214199cdad150d5c052b9bf2120cf260b6a98cbcfda7271e69e955eae79f485",
    "other mappings": "677a963c7e31d2b0c18dce098b99faac8d61c5a6d53071d3eb3cc1bdb6318c3b",
}

PLACED: list[dict[str, Any]] = [
    {"id": "row-1", "person": "ann", "m": 0, "l": 0, "n": 0},
    {"id": "Grüße", "person": None, "m": 1, "l": 1, "n": 1},
    {"id": "世界", "person": "ann", "m": 0, "l": 2, "n": 2},
    {"id": "", "person": "bob", "m": 1, "l": 0, "n": 3},
]
NAMES = [
    "e06ed27be1ce9ee4f10379f5367b7e20",
    "c6439d5c2a289f24aae94b33a8dff770",
    "68a72b527dc4f580ead0531012d2f499",
    "d0fab3f26a161bc38496b2c5b5c8508a",
]
KEYED = [
    "8cb3da69a07d2676e2f351cdd77f81b3",
    "4f80921e20641003ec0fae89ccd7b504",
    "0b428a7f10d1848e4d73b7d672d0a5bb",
    "33b525a1e9e5d8fd17289aabe2b8559f",
]
ANN, BOB = "a52d107974c14be94359db2204b41796", "d5893a2872ea1a1db708524e66162d4e"


def config(**fields: Any) -> S3TConfig:
    return S3TConfig(num_shards=5, num_slices=8, **fields)


@pytest.mark.parametrize("name", CONTENT)
def test_of_the_same_row_every_version_makes_the_same_digest(name):
    assert row_digest(ROWS[name]) == CONTENT[name]


def test_every_row_has_a_digest():
    assert ROWS.keys() == CONTENT.keys() and len({*CONTENT.values()}) == len(CONTENT)


@pytest.mark.parametrize(
    "fields, groups, places",
    [
        ({}, [None] * 4, [(4, 6), (3, 3), (3, 2), (0, 0)]),
        ({"group_column": "person"}, [ANN, None, ANN, BOB], [(2, 7), (3, 3), (2, 7), (4, 7)]),
        ({"slice_columns": ("m", "l")}, [None] * 4, [(0, 0), (1, 1), (0, 2), (1, 0)]),
    ],
)
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_names_groups_contents_and_places_are_those_of_every_version(kind, fields, groups, places):
    digests, index = read_rows(kind(PLACED), KEY, config(**fields))
    assert digests == NAMES
    found = [Entry(*place, group, content) for place, group, content in zip(places, groups, KEYED, strict=True)]
    assert index == dict(zip(NAMES, found, strict=True))


def test_rows_without_ids_are_named_as_by_every_version():
    digests, index = read_rows(Dataset.from_list([{"text": text} for text in "bab"]), KEY, config())
    first, second = "3f84dfd8031c74552f28ff9351ef1404", "baf81f01fd4d20033cac411c043400cd"
    assert digests == [first, second, first]
    assert index == {
        first: Entry(2, 3, None, "57b7ff47a8e0ccd9341539ed581d20d7"),
        second: Entry(4, 1, None, "25c7d2269f3d5f4b3b38c711e0f31b17"),
    }


@pytest.mark.parametrize(
    "kind, value, digest",
    [
        ("id", 17, "e5a8b0d7ce03ab0663391ce1025c743e"),
        ("id", b"x", "cee5ad99fa159c2f473cd93222dcd348"),
        ("id", [1, 2], "b5c6edbc96104f5970e43e3772ad2f7b"),
        ("group", 2.5, "6ba813ec46e8a51820d96cd34fa711ca"),
        ("content", "ab", "66f39117ce949ef2723849cdba88226c"),
        ("key check", "hf_s3t", "14e8d35b8904404b52496830e7f01a6a"),
    ],
)
def test_keyed_digests_are_those_of_every_version(kind, value, digest):
    assert keyed_digest(KEY, kind, value) == digest


def test_a_keyed_digest_is_an_hmac_and_a_place_is_one_of_it():
    digest = hmac.digest(KEY, b"id\0row-1", hashlib.sha256).hex()[:32]
    assert keyed_digest(KEY, "id", "row-1") == digest
    number = int.from_bytes(hmac.digest(KEY, f"place\0{digest}".encode(), hashlib.sha256), "big") % 40
    assert assign(KEY, digest, 5, 8) == divmod(number, 8)


@pytest.mark.parametrize("progress, seconds, shown", [(False, 0.0, False), (True, 0.0, True), (True, 3600.0, False)])
def test_a_bar_is_shown_where_it_is_asked_for_and_takes_long(progress, seconds, shown, monkeypatch, capfd):
    monkeypatch.setattr("hf_s3t.store.hashing.BAR_SECONDS", seconds)
    read_rows(PLACED, KEY, config(), progress=progress)
    assert ("hashing" in capfd.readouterr().err) is shown
