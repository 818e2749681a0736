"""Where an example lives: from a row of the train set to `(shard, slice)`, and the index that remembers it.

An example's place is a keyed hash of its id (or of its group), so it never depends on other examples, on the order of
the rows or on the content beyond the id: deleting one example moves no other. Only keyed digests leave this file.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import DatasetError
from ..plan.tree import Stage
from .ids import encoded, id_text

if TYPE_CHECKING:
    from ..lora.config import S3TConfig

DIGEST_CHARS = 32
"""Length of a keyed digest in the index: 128 bits of HMAC-SHA256, in hexadecimal."""

PLAIN = frozenset((str, int, float, bool, type(None), bytes))
"""Types of values that hold no others: in a row of them there is no file."""

TOKENIZED_COLUMNS = ("input_ids", "attention_mask", "pixel_values", "input_values", "input_features")


class Entry(NamedTuple):
    """What the index knows of one example: its place, and keyed digests of its group and of its content."""

    shard: int
    slice: int
    group: str | None
    content: str


Index = dict[str, Entry]
"""Keyed digest of an example's id -> its entry."""


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return value.tolist()
    if isinstance(value, set | frozenset):
        raise ValueError("A row has a set, and its order changes with every run. Give a sorted list instead.")
    text = str(value)
    if f"{id(value):x}" in text.lower():  # a decoded image, for one
        raise ValueError(
            f"A row has a {type(value).__name__}, whose text {text[:80]!r} changes with every run, so it cannot "
            "name an example. Hand in the row undecoded: the first is `next(iter(raw_rows(dataset)))`, with "
            "`from hf_s3t.store.partition import raw_rows`."
        )
    return text


_CANONICAL = json.JSONEncoder(default=_plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def canonical(value: Any) -> bytes:
    """Canonical JSON of a value: sorted keys, no spaces, bytes as base64, numbers as Python prints them.

    >>> canonical({"b": 1, "a": b"x"})
    b'{"a":{"base64":"eA=="},"b":1}'
    """
    return encoded(_CANONICAL.encode(value), "A value")


def row_digest(row: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of an undecoded raw row; of a file's bytes and path only the bytes count."""
    return hashlib.sha256(canonical(_without_path(row))).hexdigest()


def _without_path(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return value if PLAIN.issuperset(map(type, value)) else [_without_path(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    is_file = value.keys() == {"bytes", "path"} and value["bytes"] is not None
    if type(value) is dict and not is_file and PLAIN.issuperset(map(type, value.values())):
        return value
    return {name: _without_path(item) for name, item in value.items() if not (is_file and name == "path")}


def begun_mac(key: bytes, kind: Literal["id", "group", "content", "key check", "place"]) -> hmac.HMAC:
    """An HMAC-SHA256 to which the text of something is to be added, in a copy of it ([`ended_mac`])."""
    return hmac.new(key, f"{kind}\0".encode(), hashlib.sha256)


def ended_mac(begun: hmac.HMAC, text: str) -> str:
    """An HMAC that was begun, with a text added, in hexadecimal."""
    mac = begun.copy()
    mac.update(text.encode())
    return mac.hexdigest()


def keyed_digest(key: bytes, kind: Literal["id", "group", "content", "key check"], value: Any) -> str:
    """HMAC-SHA256 of an id, group or content digest, in hexadecimal. An id `17` and an id `"17"` are the same id."""
    return ended_mac(begun_mac(key, kind), id_text(value))[:DIGEST_CHARS]


def assign(key: bytes, digest: str, num_shards: int, num_slices: int) -> tuple[int, int]:
    """The `(shard, slice)` of an example or group, from its keyed digest. Uniform over the `m * L` places.

    >>> key = b"a key of our own"
    >>> assign(key, keyed_digest(key, "id", "row-1"), 2, 4)
    (0, 1)
    """
    return drawn_place(begun_mac(key, "place"), digest, num_shards, num_slices)


def drawn_place(begun: hmac.HMAC, digest: str, num_shards: int, num_slices: int) -> tuple[int, int]:
    shard, slice_id = divmod(int(ended_mac(begun, digest), 16) % (num_shards * num_slices), num_slices)
    return shard, slice_id


def raw_rows(dataset: Any) -> Iterable[Mapping[str, Any]]:
    """Rows of a dataset before any transform or decoding, each a mapping from column to plain value."""
    if not hasattr(dataset, "__len__"):
        raise ValueError("S3T needs a train set with a length: a stream cannot be cut into slices. Materialise it.")
    if in_arrow(dataset):
        for batch in dataset.with_format("arrow").iter(batch_size=1000):
            yield from batch.to_pylist()
        return
    for position in range(len(dataset)):
        row = dataset[position]
        if not isinstance(row, Mapping):
            raise ValueError(f"Rows must be mappings from column to value, got {type(row).__name__}.")
        yield row


def in_arrow(dataset: Any) -> bool:
    """Whether a dataset is one of `datasets`, whose rows can be read in batches."""
    return hasattr(dataset, "with_format") and hasattr(dataset, "column_names")


def id_source(config: S3TConfig, columns: Sequence[str]) -> str | None:
    """The column that names an example, or `None` for a digest of the raw row, which must not be tokenised then."""
    for name in (config.id_column, config.group_column, *(config.slice_columns or ())):
        if name is not None and name not in columns:
            raise ValueError(f"The train set has no column {name!r}. Its columns: {', '.join(columns)}.")
    if config.id_column is not None:
        return config.id_column
    if "id" in columns:
        return "id"
    tokenized = [name for name in TOKENIZED_COLUMNS if name in columns]
    if tokenized:
        raise ValueError(
            f"The train set has no ids and is already tokenised ({', '.join(tokenized)}): a digest of tokens cannot "
            "be found again from a person's text. Keep an id column through tokenisation, pass the raw rows, or name "
            f"the column that shall serve as the id, e.g. `id_column={tokenized[0]!r}`."
        )
    return None


def warn_of_empty_slices(index: Mapping[str, Entry], key: bytes, config: S3TConfig) -> None:
    """Warns before the first training if a slice got no example, with the chance of it and the way out."""
    m, most = config.num_shards, config.num_slices
    filled = {entry[:2] for entry in index.values()}
    empty = [(shard, slice_id) for shard in range(m) for slice_id in range(most) if (shard, slice_id) not in filled]
    if not empty:
        return
    units = {entry.group or digest for digest, entry in index.items()}
    expected = m * most * (1 - 1 / (m * most)) ** len(units)
    advice = "Fill them in the dataset's own slice columns."
    if config.slice_columns is None:
        fits = [size for size in range(1, most) if len({assign(key, unit, m, size) for unit in units}) == m * size]
        largest = f"The largest num_slices without an empty slice is {max(fits)}." if fits else ""
        advice = largest or "There is too little data for any number of slices."
    warnings.warn(
        f"{len(empty)} of {m * most} slices are empty, e.g. (shard, slice) {empty[0]}: {len(units)} "
        f"{'groups' if config.group_column else 'examples'} leave {expected:.2f} empty on average. {advice}",
        UserWarning,
        stacklevel=3,
    )


class Comparison(NamedTuple):
    """How a train set differs from the index: keyed digests of rows that are gone, changed, or new."""

    missing: frozenset[str]
    changed: frozenset[str]
    new: frozenset[str]


def compare(index: Iterable[tuple[str, Entry]], rows: Mapping[str, Entry]) -> Comparison:
    """Compares the rows of a train set with the index of what was handed in before, which may stream.

    A [`DatasetError`] if a known example moved to another place, which only the dataset's own columns can cause.
    """
    moved, missing, changed, known = 0, set(), set(), set()
    for digest, entry in index:
        row = rows.get(digest)
        if row is None:
            missing.add(digest)
            continue
        known.add(digest)
        moved += row[:3] != entry[:3]
        if row.content != entry.content:
            changed.add(digest)
    if moved:
        raise DatasetError(
            f"{moved} known examples have another slice or group now. A stage that saw them would no longer be "
            "found by a deletion. Restore the columns, or delete these examples first and hand them in as new ones."
        )
    return Comparison(frozenset(missing), frozenset(changed), frozenset(rows.keys() - known))


def stage_examples(stage: Stage, by_slice: Mapping[int, Iterable[str]], replay: float = 1.0) -> tuple[str, ...]:
    """The examples that a stage sees: slice by slice along its prefix, ordered by digest.

    Of each slice but the newest they are a share, `replay`: those of which a digest, of the stage's name and the
    example's keyed digest, is small enough. So it depends on no other example, and without the key nobody can tell
    which they are. `by_slice` has the keyed digests of the examples of the stage's shard.
    """
    newest = stage.prefix[-1]
    return tuple(
        digest
        for slice_id in stage.prefix
        for digest in sorted(by_slice.get(slice_id, ()))
        if slice_id == newest or replay == 1 or _chance(stage, digest) < replay
    )


def _chance(stage: Stage, digest: str) -> float:
    """A number from 0 up to 1 that belongs to an example at a stage."""
    drawn = hashlib.sha256(f"{stage.name} {digest}".encode()).digest()
    return int.from_bytes(drawn[:6], "big") / 2**48


def examples_digest(digests: Sequence[str]) -> str:
    """One digest for the examples of a stage, in order. Made of keyed digests, it tells nothing without the key."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def entries_digest(digests: Sequence[str], entries: Mapping[str, Entry]) -> str:
    """One digest for what the index knows of some examples: who they are, their groups and their contents."""
    return examples_digest([f"{digest} {entries[digest].group} {entries[digest].content}" for digest in digests])
