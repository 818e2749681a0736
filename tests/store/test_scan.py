"""Texts and ids that are looked for in every byte below a store: each form, wherever it may lie, and nothing else."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import sqlite3
import tracemalloc
import zipfile
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_s3t import S3TStore
from hf_s3t.store import scan
from hf_s3t.store.audit import Check
from hf_s3t.store.folder import StoreFolder
from hf_s3t.store.needles import Needles, forms, read_texts
from hf_s3t.store.partition import row_digest
from hf_s3t.store.scan import scan_check
from stores import make_store, people

TEXT = 'Zoë "Ångström" 𝄞\nof 17/3'
SHORT = "r-17"


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return make_store(tmp_path / "store")


def looked_for(store: StoreFolder, *texts: str) -> Check:
    """The check of a scan for some texts, one on each line."""
    path = store.path.parent / "texts.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    return scan_check(store, path)


def hits(check: Check) -> set[tuple[int, str]]:
    """Lines and places of the findings."""
    return {(int(text.split()[1]), text.split(": in ")[1].rsplit(",", 1)[0]) for text in check.broken}


def capitals(text: str) -> str:
    return "".join(f"\\u{unit:04X}" for unit in memoryview(text.encode("utf-16-le")).cast("H"))


WRITINGS = {
    "as it is": TEXT.encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16, the other way": TEXT.encode("utf-16-be"),
    "JSON": json.dumps({"a": TEXT}).encode(),
    "JSON with few escapes": json.dumps({"a": TEXT}, ensure_ascii=False).encode(),
    "JSON where everything is escaped": f'{{"a": "{capitals(TEXT)}"}}'.encode(),
    "JSON with a slash": json.dumps({"a": TEXT}).replace("/", "\\/").encode(),
    "sha256": hashlib.sha256(TEXT.encode()).digest(),
    "sha256 in hexadecimal": hashlib.sha256(TEXT.encode()).hexdigest().encode(),
    "sha256 in capitals": hashlib.sha256(TEXT.encode()).hexdigest().upper().encode(),
    "a shortened sha1": hashlib.sha1(TEXT.encode()).hexdigest()[:32].encode(),
    "md5": hashlib.md5(TEXT.encode()).digest(),
}


@pytest.mark.parametrize("writing", WRITINGS)
def test_every_form_is_found_where_it_lies(store: S3TStore, writing: str) -> None:
    before = b"x" * 33
    (store.path / "notes").write_bytes(before + WRITINGS[writing] + b"tail")
    check = looked_for(store, "nobody at all", TEXT)
    assert check.broken and all(text.startswith("line 2 of texts.jsonl: in notes") for text in check.broken)
    first = min(int(text.split(" at byte ")[1].split(",")[0]) for text in check.broken)
    assert 33 <= first <= 33 + 10
    assert "Zoë" not in "".join(check.broken)


@pytest.mark.parametrize("writing", WRITINGS)
def test_nothing_is_found_where_one_bit_is_another(store: S3TStore, writing: str) -> None:
    data = bytearray(WRITINGS[writing])
    data[7] ^= 1
    (store.path / "notes").write_bytes(data)
    assert looked_for(store, TEXT).outcome == "holds"


def test_a_store_holds_nothing_of_its_rows(store: S3TStore) -> None:
    rows = people()
    check = looked_for(store, *(row["id"] for row in rows), *(row["text"] for row in rows))
    assert check.outcome == "holds" and "on 96 lines" in check.name
    report = store.verify(scan_for=store.path.parent / "texts.jsonl")
    assert report.checks[-1] == check and report.ok and report.retrained is None


@pytest.mark.parametrize("place", [".s3t/state.sqlite-wal", ".s3t/receipts/old", "README.md", "shard-00/x/y"])
def test_every_file_below_the_store_is_looked_at(store: S3TStore, place: str) -> None:
    (store.path / place).parent.mkdir(parents=True, exist_ok=True)
    with open(store.path / place, "ab") as file:
        file.write(SHORT.encode())
    assert {(1, place)} == {(line, where.split(" at ")[0]) for line, where in hits(looked_for(store, SHORT))}


def test_a_state_outside_the_store_is_looked_at(store: S3TStore, tmp_path: Path) -> None:
    (store.path / ".s3t").rename(tmp_path / "state")
    (tmp_path / "state/note").write_text(SHORT)
    apart = S3TStore(store.path, state=tmp_path / "state")
    assert hits(looked_for(apart, SHORT)) == {(1, "state/note at byte 0")}


@pytest.mark.parametrize("size", [4, 9, 11, 12, 40])
def test_no_place_in_a_stream_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Also where a text lies across what is read at once, however short it is."""
    monkeypatch.setattr(scan, "CHUNK", 64)
    text = "".join(random.Random(size).choices("abcdefgh", k=size))
    (tmp_path / "store").mkdir()
    for start in range(68):
        (tmp_path / "store" / f"notes-{start}").write_bytes(b"." * start + text.encode() + b"." * 70)
    expected = {(1, f"notes-{start} at byte {start}") for start in range(68)}
    check = looked_for(StoreFolder(tmp_path / "store"), text)
    assert hits(check) == expected and len(check.broken) == len(expected)


def test_what_is_escaped_is_found_once_wherever_a_read_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it ends within the escape of the last character."""
    text, file = "Zoë is töld", tmp_path / "file"
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in text).encode()
    monkeypatch.setattr(scan, "CHUNK", 256)
    for before in range(150, 300):
        file.write_bytes(b" " * before + escaped + b" " * 300)
        search = scan.Scan(Needles([(1, text)]))
        search.folder(tmp_path, "")
        assert [f"at byte {before}," in where for where in search.found] == [True], before


def test_each_of_thousands_is_found_and_no_other() -> None:
    draw = random.Random(3)
    texts = [(n, f"person-{n}" if n % 2 else draw.randbytes(12).hex()) for n in range(3000)]
    wanted = draw.sample(texts, 40)
    data = b""
    expected = set()
    for line, text in wanted:
        data += draw.randbytes(draw.randrange(50))
        expected.add((len(data), line))
        data += text.encode() + b"|"
    whole = {(hit.start, hit.line) for hit in Needles(texts).find(data)}
    assert expected <= whole
    by_hand = {(data.find(text.encode()), line) for line, text in texts if text.encode() in data}
    assert {line for _, line in by_hand} == {line for _, line in whole}


def test_forms_are_told() -> None:
    found = forms("row-17 of Zoë")
    assert found["row-17 of Zoë".encode()] == "as it is written"
    assert found[hashlib.md5("row-17 of Zoë".encode()).digest()] == "its md5"
    assert found[b"row-17 of Zo\\u00eb"] == found[b"row-17 of Zo\\u00EB"] == "escaped as in JSON"


# ---- what is inside ----


def _zip(data: bytes, name: str = "inner.txt") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zip": _zip}


@pytest.mark.parametrize("outer", PACKERS)
@pytest.mark.parametrize("inner", [None, *PACKERS])
def test_what_is_packed_is_opened(store: S3TStore, outer: str, inner: str | None) -> None:
    data = b"y" * 50 + TEXT.encode() + bytes(5000)
    packed = PACKERS[outer](data if inner is None else PACKERS[inner](data))
    assert TEXT.encode() not in packed
    (store.path / "cache.bin").write_bytes(packed)
    (where,) = hits(looked_for(store, TEXT))
    assert where[1].startswith("cache.bin") and where[1].endswith("at byte 50")


def test_an_archive_that_begins_further_on_and_the_old_form_of_xz_are_opened(store: S3TStore) -> None:
    data = b"y" * 50 + TEXT.encode() + bytes(5000)
    (store.path / "a.exe").write_bytes(b"MZ" + bytes(40) + _zip(data))
    (store.path / "b").write_bytes(lzma.compress(data, format=lzma.FORMAT_ALONE))
    found = {where for _, where in hits(looked_for(store, TEXT))}
    assert found == {"a.exe: inner.txt at byte 50", "b, unpacked at byte 50"}


def test_what_cannot_be_opened_is_named(store: S3TStore) -> None:
    deep = b"y" * 50 + TEXT.encode()
    for _ in range(scan.DEEPEST + 1):
        deep = gzip.compress(deep)
    files = {
        "a.zst": b"\x28\xb5\x2f\xfd123", "b.parquet": b"PAR1...", "c.gz": gzip.compress(b"abc" * 99)[:-9],
        "d.zip": b"PK\3\4damaged", "e.gz": deep, "h": zlib.compress(b"blob 3\0abc"), "i": zlib.compress(b"abc", 1),
    }  # fmt: skip
    for name, data in files.items():
        (store.path / name).write_bytes(data)
    (store.path / "f").symlink_to("/nowhere")
    os.mkfifo(store.path / "g")
    check = looked_for(store, TEXT)
    assert check.outcome == "not checked"
    told = dict(text.split(": ", 1) for text in check.not_checked)
    assert told["a.zst"].startswith("packed by zstd") and told["b.parquet"].startswith("a Parquet file")
    assert told["h"].startswith("maybe packed by zlib") and told["i"].startswith("maybe packed by zlib")
    assert "cannot be read to its end (EOFError)" in told["c.gz"] and "BadZipFile" in told["d.zip"]
    assert f"packed more than {scan.DEEPEST} times" in "".join(check.not_checked)
    assert told["f"] == "a link, which is not followed" and told["g"] == "no regular file"


def test_a_database_in_an_archive_is_named(store: S3TStore) -> None:
    (store.path / "b.zip").write_bytes(_zip(store.database.read_bytes(), "state"))
    assert looked_for(store, TEXT).not_checked == (
        "b.zip: state: a database, of which only the bytes were looked at",
    )


def test_a_folder_that_cannot_be_listed_is_named(store: S3TStore, monkeypatch: pytest.MonkeyPatch) -> None:
    (store.path / "closed").mkdir()
    scandir = os.scandir

    def refused(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    (told,) = looked_for(store, TEXT).not_checked
    assert told.endswith("closed: it cannot be read to its end (PermissionError)")


def test_what_unpacks_without_end_is_read_to_a_limit(store: S3TStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "PACKED_AT_LEAST", 1000)
    monkeypatch.setattr(scan, "PACKED_RATIO", 2)
    monkeypatch.setattr(scan, "CHUNK", 4096)
    (store.path / "bomb.gz").write_bytes(gzip.compress(bytes(1 << 20)))
    (told,) = looked_for(store, TEXT).not_checked
    assert told == "bomb.gz, unpacked: only the first 4,096 bytes of it were looked at"


def test_a_value_that_pages_of_a_database_cut_is_found(store: S3TStore) -> None:
    long = "Fetamir Medresson wrote this. " * 400
    with closing(sqlite3.connect(store.path / "other.db")) as database:
        database.execute("CREATE TABLE notes (number INTEGER, note TEXT)")
        database.execute("INSERT INTO notes VALUES (1, ?)", (long,))
        database.commit()
    assert long.encode() not in (store.path / "other.db").read_bytes()
    assert hits(looked_for(store, long.strip())) == {(1, "other.db, notes.note")}
    assert sorted(path.name for path in store.path.glob("other.db*")) == ["other.db"]


def test_a_header_of_tensors_is_found(store: S3TStore) -> None:
    save_file({"x": torch.zeros(4)}, store.path / "x.safetensors", {"note": TEXT})
    assert {line for line, _ in hits(looked_for(store, TEXT))} == {1}


def test_names_of_files_are_looked_at_and_not_shown(store: S3TStore) -> None:
    (store.path / "of Fetamir Medresson").mkdir()
    (store.path / "of Fetamir Medresson" / "x").write_text("Fetamir Medresson")
    (store.path / "link").symlink_to("of Fetamir Medresson")
    check = looked_for(store, "Fetamir Medresson")
    assert "Fetamir" not in "".join((*check.broken, *check.not_checked))
    assert any("in the name of of …," in text for text in check.broken)
    assert any("in of …/x at byte 0" in text for text in check.broken)
    assert any("the name of link" in text for text in check.broken)


# ---- the list ----


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "abc", "Line 1 of .* 3 characters"),
        ("a.txt", "\n\nlong enough\n é  \n", "Line 4 of .* 1 characters"),
        ("a.txt", "\n \n", "holds 0 texts"),
        ("a.jsonl", '"good enough"\n{"id": 17}\n', "Line 2 of .* has no text of 4"),
        ("a.jsonl", "{", "Line 1 of .* is no JSON"),
        ("a.jsonl", "[" * 100_000, "Line 1 of .* is no JSON"),
        ("a.txt", "x" * 100_001, "100001 characters"),
    ],
)
def test_a_list_that_would_find_anything_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)


def test_lists_of_several_encodings_are_read(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_text("\r\nZoë Ångström \r\nrow-17", encoding=encoding)
        assert read_texts(file) == [(2, "Zoë Ångström"), (3, "row-17")]
    file.write_bytes("Zoë".encode("latin-1"))
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_texts(file)


def test_a_row_is_looked_for_by_its_values_and_its_digest(store: S3TStore, tmp_path: Path) -> None:
    row: dict[str, Any] = {"id": 123456, "text": "something said", "label": "pos", "tags": ["a longer tag"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_texts(tmp_path / "rows.jsonl") == [
        (1, "123456"), (1, "something said"), (1, "a longer tag"), (1, row_digest(row))
    ]  # fmt: skip


def test_a_list_inside_the_store_is_refused(store: S3TStore) -> None:
    (store.path / "list.txt").write_text("some text")
    with pytest.raises(ValueError, match="inside the store"):
        store.verify(scan_for=store.path / "list.txt")


def test_many_findings_are_counted(store: S3TStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MOST_SHOWN", 5)
    (store.path / "notes").write_text("some text " * 12)
    check = looked_for(store, "some text")
    assert len(check.broken) == 6 and check.broken[-1] == "and in 7 more places"


def test_memory_does_not_grow_with_the_files(store: S3TStore) -> None:
    with open(store.path / "big", "wb") as file:
        file.truncate(96 << 20)
        file.seek(90 << 20)
        file.write(SHORT.encode())
    tracemalloc.start()
    try:
        check = looked_for(store, SHORT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert hits(check) == {(1, f"big at byte {90 << 20}")} and peak < 40 << 20
