"""Looks for bytes in every file below a folder, also inside what is compressed, packed or escaped.

Every file's own bytes are searched, then what is in it: gzip, zip (which `torch.save` writes), bzip2, xz, zstandard,
Arrow and parquet tables, sqlite databases, strings of JSON and of safetensors headers, and so on inwards.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import sqlite3
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

Needles = dict[str, bytes]
"""What is looked for, by a name for it."""


def find(root: Path, needles: Needles) -> set[tuple[str, str]]:
    """Where anything is found, as (name of what was found, path below the root)."""
    found = set()
    for path in sorted(root.rglob("*")):
        relative = str(path.relative_to(root))
        parts = [relative.encode()]
        if path.is_symlink():
            parts.append(str(path.readlink()).encode())
        elif path.is_file():
            parts.extend(contents(path.read_bytes()))
        found |= {(name, relative) for name, needle in needles.items() for part in parts if needle in part}
    return found


def contents(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """The bytes, then what is inside them."""
    yield data
    if depth == 5:
        raise AssertionError("packed more than five times: nobody looked further")
    for opener in (_gzip, _bzip2, _xz, _zstandard, _zip, _sqlite, _arrow, _parquet, _safetensors, _json):
        for inner in opener(data):
            yield from contents(inner, depth + 1)


def _gzip(data: bytes) -> Iterator[bytes]:
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)


def _bzip2(data: bytes) -> Iterator[bytes]:
    if data[:3] == b"BZh":
        yield bz2.decompress(data)


def _xz(data: bytes) -> Iterator[bytes]:
    if data[:6] == b"\xfd7zXZ\0":
        yield lzma.decompress(data)


def _zstandard(data: bytes) -> Iterator[bytes]:
    if data[:4] == b"\x28\xb5\x2f\xfd":
        yield pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd").read()


def _zip(data: bytes) -> Iterator[bytes]:
    if data[:2] == b"PK" and zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield archive.read(name)


def _sqlite(data: bytes) -> Iterator[bytes]:
    if data[:16] == b"SQLite format 3\0":
        database = sqlite3.connect(":memory:")
        database.deserialize(data[:18] + b"\1\1" + data[20:])  # also of one that has a write-ahead log
        tables = [row[0] for row in database.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            for row in database.execute(f'select * from "{table}"'):
                yield from _values(list(row))
        database.close()


def _arrow(data: bytes) -> Iterator[bytes]:
    opener = pyarrow.ipc.open_file if data[:6] == b"ARROW1" else None
    if opener is None and data[:4] == b"\xff\xff\xff\xff":
        opener = pyarrow.ipc.open_stream
    if opener is not None:
        yield from _table(opener(pyarrow.BufferReader(data)).read_all())


def _parquet(data: bytes) -> Iterator[bytes]:
    if data[:4] == b"PAR1":
        yield from _table(pyarrow.parquet.read_table(pyarrow.BufferReader(data)))


def _table(table: pyarrow.Table) -> Iterator[bytes]:
    for row in table.to_pylist():
        yield from _values(row)


def _safetensors(data: bytes) -> Iterator[bytes]:
    if len(data) > 8 and data[8:9] == b"{":
        (length,) = struct.unpack("<Q", data[:8])
        if length <= len(data) - 8:
            yield data[8 : 8 + length]


def _json(data: bytes) -> Iterator[bytes]:
    """Strings as they are read, where JSON may have escaped them; each line too, for files of lines."""
    if data[:1] not in (b"{", b"[", b"\n", b'"'):
        return
    for text in (data, *data.splitlines()):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        for inner in _values(value):
            if inner != data:
                yield inner


def _values(value: Any) -> Iterator[bytes]:
    """Every string, and every run of numbers, in plain data."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, str):
        yield value.encode()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _values(key)
            yield from _values(inner)
    elif isinstance(value, list):
        if value and all(type(item) is int and abs(item) < 1 << 63 for item in value):
            yield np.array(value, dtype="<i8").tobytes()
        elif value and all(type(item) is float for item in value):
            yield np.array(value, dtype="<f4").tobytes()
        else:
            for item in value:
                yield from _values(item)


def needles_of(row: Mapping[str, Any]) -> Needles:
    """Everything by which a row might be told: its id, its text, unkeyed digests of both, its tokens or pixels."""
    canonical = json.dumps(dict(row), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
    texts = {"id": row["id"].encode(), "text": row["note"].encode()}
    needles = dict(texts) | {"id as bytes": bytes.fromhex(row["id"])}
    for name, data in {**texts, "row": canonical}.items():
        for kind in ("md5", "sha1", "sha256", "sha512", "blake2b"):
            digest = hashlib.new(kind, data)
            needles[f"{kind} of the {name}"] = digest.hexdigest()[:32].encode()
            needles[f"raw {kind} of the {name}"] = digest.digest()[:16]
    return needles | _runs(row)


def _runs(row: Mapping[str, Any]) -> Needles:
    if "pixel_values" in row:
        return {"pixels": np.array(row["pixel_values"], dtype="<f4").ravel()[:8].tobytes()}
    tokens = list(row["input_ids"])[:6]
    runs = {f"tokens as {kind}": np.array(tokens, dtype=kind).tobytes() for kind in ("<i8", "<i4", "<i2")}
    separators = {"tokens in JSON": ",", "tokens in text": ", "}
    return runs | {name: separator.join(map(str, tokens)).encode() for name, separator in separators.items()}


def tensor_needles(files: Mapping[str, bytes], kept: bytes) -> Needles:
    """The bytes of every tensor in some safetensors files, but those that are all zeros or that `kept` holds, too."""
    needles: Needles = {}
    for file, data in files.items():
        (length,) = struct.unpack("<Q", data[:8])
        for name, about in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                value = data[8 + length + start : 8 + length + end][:64]
                if any(value) and value not in kept:
                    needles[f"{file} {name}"] = value
    return needles
