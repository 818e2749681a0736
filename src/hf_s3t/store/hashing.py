"""From the rows of a train set to keyed digests and entries of the index, in one process or in several."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from .ids import id_text, same_to_the_eye
from .partition import (
    DIGEST_CHARS,
    Entry,
    Index,
    begun_mac,
    drawn_place,
    ended_mac,
    id_source,
    in_arrow,
    raw_rows,
    row_digest,
)

if TYPE_CHECKING:
    import hmac

    from ..lora.config import S3TConfig

BAR_SECONDS = 2.0
"""Hashing that takes longer shows a bar."""

ROWS_AT_ONCE = 20_000
"""What one of several processes hashes before it takes more; fewer rows are hashed by one."""


class _Names:
    """A column that names examples, or groups of them; without one they are named by their content."""

    def __init__(self, key: bytes, kind: Literal["id", "group"], column: str | None):
        self.kind, self.column = kind, column
        self.strange: set[str] = set()  # texts that can be written in another Unicode form: no other one is kept
        self._begun = begun_mac(key, kind)

    def digest(self, value: Any, position: int) -> str:
        """The keyed digest of what stands in a row."""
        try:
            text = id_text(value)
        except ValueError as error:
            raise ValueError(f"Row {position} has no {self.kind} in column {self.column!r}: {error}") from None
        if not text.isascii():
            self.strange.add(text)
        return ended_mac(self._begun, text)[:DIGEST_CHARS]


class _Hashing:
    """From rows to keyed digests and entries. Each row is hashed by itself, so that processes may share the rows."""

    def __init__(self, key: bytes, config: S3TConfig, columns: Sequence[str]):
        self.config = config
        self.names = _Names(key, "id", id_source(config, columns))
        self.people = _Names(key, "group", config.group_column)
        self._contents, self._places = begun_mac(key, "content"), begun_mac(key, "place")

    def hash(self, rows: Iterable[Mapping[str, Any]], first: int = 0) -> Iterator[tuple[str, Entry]]:
        """Keyed digest and entry of each row; `first` is the position of the first one in the dataset."""
        names, people = self.names, self.people
        for position, row in enumerate(rows, first):
            content = _content(row, position)
            digest = names.digest(content if names.column is None else row.get(names.column), position)
            person = None if people.column is None else row.get(people.column)
            group = None if person is None else people.digest(person, position)
            place = _place(row, position, group or digest, self._places, self.config)
            yield digest, Entry(*place, group, ended_mac(self._contents, content)[:DIGEST_CHARS])


def read_rows(
    dataset: Any, key: bytes, config: S3TConfig, progress: bool = False, workers: int = 0
) -> tuple[list[str], Index]:
    """Keyed digest of every row, in the dataset's order, and what the index is to know of them.

    Each id occurs once, each group in one place, or it is a `ValueError`. With `progress` a bar shows how far it is,
    if it takes longer than two seconds. A [`~datasets.Dataset`] of many rows is hashed by `workers` processes.
    """
    first = next(iter(raw_rows(dataset)), None)
    if first is None:
        return [], {}
    digests: list[str] = []
    index: Index = {}
    twice: list[int] = []
    hashing = _Hashing(key, config, list(first))
    several = workers > 1 and len(dataset) > ROWS_AT_ONCE and in_arrow(dataset)
    found = _hash_in_processes(dataset, key, hashing, workers) if several else hashing.hash(raw_rows(dataset))
    for position, (digest, entry) in enumerate(_with_bar(found, len(dataset)) if progress else found):
        if digest in index and hashing.names.column is not None:
            twice.append(position)
        if entry.group is not None:  # one text for all rows of a group
            entry = entry._replace(group=sys.intern(entry.group))
        digests.append(digest)
        index[digest] = entry
    if twice:
        rows = itertools.compress(raw_rows(dataset), map(set(twice[:5]).__contains__, itertools.count()))
        shown = ", ".join(repr(row[str(hashing.names.column)]) for row in itertools.islice(rows, len(twice[:5])))
        raise ValueError(
            f"{len(twice)} ids occur more than once in column {hashing.names.column!r}, e.g. {shown}. Make ids unique."
        )
    _check_groups(index)
    for column in (hashing.names, hashing.people):
        _warn_of_look_alikes(column.column, column.strange)
    return digests, index


def _hash_in_processes(dataset: Any, key: bytes, hashing: _Hashing, workers: int) -> Iterator[tuple[str, Entry]]:
    """The same, by several processes; `hashing` learns of names that look alike."""
    from concurrent.futures import ProcessPoolExecutor

    starts = range(0, len(dataset), ROWS_AT_ONCE)
    shared = (dataset, key, hashing.config)
    with ProcessPoolExecutor(min(workers, len(starts)), initializer=_begin_process, initargs=shared) as pool:
        for columns, strange_names, strange_people in pool.map(_hash_some, starts):
            hashing.names.strange |= strange_names
            hashing.people.strange |= strange_people
            digests, *fields = columns
            yield from zip(digests, itertools.starmap(Entry, zip(*fields, strict=True)), strict=True)


_shared: tuple[Any, bytes, Any]
"""In a process that hashes: the dataset, the key and the config."""


def _begin_process(*shared: Any) -> None:
    global _shared
    _shared = shared


def _hash_some(start: int) -> tuple[list[tuple[Any, ...]], set[str], set[str]]:
    """Digests and the fields of entries, by column: they travel faster than entry by entry."""
    dataset, key, config = _shared
    rows = raw_rows(dataset.select(range(start, min(start + ROWS_AT_ONCE, len(dataset)))))
    hashing = _Hashing(key, config, dataset.column_names)
    found = ((digest, *entry) for digest, entry in hashing.hash(rows, start))
    return list(zip(*found, strict=True)), hashing.names.strange, hashing.people.strange


def _content(row: Mapping[str, Any], position: int) -> str:
    try:
        return row_digest(row)
    except ValueError as error:
        raise ValueError(f"Row {position}: {error}") from None


def _with_bar(found: Iterable[tuple[str, Entry]], total: int) -> Iterable[tuple[str, Entry]]:
    from tqdm.auto import tqdm

    return tqdm(found, "hashing", total, unit=" rows", delay=BAR_SECONDS, dynamic_ncols=True, leave=False)


def _warn_of_look_alikes(column: str | None, texts: Iterable[str]) -> None:
    """Warns of names that are one to the eye and two to a deletion."""
    pairs = same_to_the_eye(texts)
    if pairs:
        shown = "; ".join(" and ".join(map(ascii, pair)) for pair in pairs[:5])
        warnings.warn(
            f"{len(pairs)} names in column {column!r} are written in several Unicode forms that look the same, e.g. "
            f"{shown}. To a deletion they are different: who asks for one of them is not found in rows of the other. "
            "Normalise the column (`unicodedata.normalize('NFC', text)`) before the first training.",
            UserWarning,
            stacklevel=3,
        )


def _place(row: Mapping[str, Any], position: int, digest: str, begun: hmac.HMAC, config: S3TConfig) -> tuple[int, int]:
    if config.slice_columns is None:
        return drawn_place(begun, digest, config.num_shards, config.num_slices)
    shard, slice_id = (cast(int, row.get(column)) for column in config.slice_columns)
    limits = (config.num_shards, config.num_slices)
    for column, value, limit in zip(config.slice_columns, (shard, slice_id), limits, strict=True):
        if type(value) is not int or not 0 <= value < limit:
            raise ValueError(f"Row {position} has {value!r} in column {column!r}; expected a number below {limit}.")
    return shard, slice_id


def _check_groups(index: Index) -> None:
    places: dict[str, tuple[int, int]] = {}
    torn = 0
    for entry in index.values():
        if entry.group is not None and places.setdefault(entry.group, entry[:2]) != entry[:2]:
            torn += 1
    if torn:
        raise ValueError(
            f"`slice_columns` put {torn} rows apart from other rows of their group. All rows of a group must lie in "
            "one slice, or deleting the group would hit several."
        )
