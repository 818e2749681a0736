"""From what an eraser asks for (ids, groups, rows, slices) to what the store knows: digests and places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import StateError, UnknownExampleError
from .database import Kind, Place, StateDatabase
from .folder import StoreFolder
from .ids import encoded, id_text, look_alikes, same_to_the_eye, shortened
from .manifest import Manifest
from .partition import Entry, assign, keyed_digest, row_digest
from .state import Tombstone

LONGEST_REFERENCE = 1000


@dataclass(frozen=True)
class Request:
    """A request in the store's own terms: keyed digests, places, and what was not found."""

    ids: dict[str, tuple[Place, ...]]  # places by keyed digest, of what is not deleted yet
    groups: dict[str, tuple[Place, ...]]
    places: frozenset[Place]  # every one that is hit
    asked: int  # number of things asked for
    already: int  # and of those that were deleted before
    unknown: tuple[Any, ...]  # what was asked for and is not known, as it was asked
    stones: tuple[Tombstone, ...] = ()  # of what was deleted before
    look_alikes: Mapping[str, list[str]] = field(default_factory=dict)  # other spellings that are known


class LookAlikes:
    """What an index knows that an id or a group may have been meant to be; `has` asks it."""

    def __init__(self, has: Callable[[Kind, str], bool], key: bytes):
        self.has, self.key = has, key

    def of(self, kind: Kind, value: Any) -> list[tuple[str, str]]:
        """Other spellings that are known, with their keyed digests; of one that is known, in other Unicode alone."""
        texts = look_alikes(value)
        if texts and self.has(kind, keyed_digest(self.key, kind, value)):
            texts = [text for text in texts if same_to_the_eye([text, id_text(value)])]
        found = [(text, keyed_digest(self.key, kind, text)) for text in texts]
        return [(text, digest) for text, digest in found if self.has(kind, digest)]


def check_lists(**given: Any) -> None:
    """Raises `ValueError` where one thing was given instead of a list of such things."""
    for name, value in given.items():
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise ValueError(f"`{name}` must be a list, got {value!r:.80}. For a single one write `{name}=[...]`.")


def check_reference(reference: Any) -> None:
    """Raises `ValueError` if a reference cannot be kept in a receipt."""
    if reference is None:
        return
    if not isinstance(reference, str) or len(reference) > LONGEST_REFERENCE:
        raise ValueError(
            f"`reference` must be a text of at most {LONGEST_REFERENCE:,} characters, got "
            f"{shortened(repr(reference))}. Nothing was changed. Give the name under which the request is filed."
        )
    encoded(reference, "`reference`")


def resolve(
    folder: StoreFolder,
    ids: Iterable[Any] = (),
    groups: Iterable[Any] = (),
    rows: Iterable[Mapping[str, Any]] = (),
    slices: Iterable[Place] = (),
    digests: Iterable[str] = (),
) -> Request:
    """Looks a request up in the index and the tombstones. Changes nothing."""
    manifest = folder.manifest()
    check_lists(ids=ids, groups=groups, rows=rows, slices=slices, digests=digests)
    hit = _places(slices)
    manifest.plan.affected(hit)  # refuses places out of range
    wanted: list[tuple[Any, Kind]] = [(value, "id") for value in ids]
    wanted += [(_row_id(row, manifest), "id") for row in rows]
    wanted += [(value, "group") for value in groups]
    digests = list(digests)
    if not wanted and not hit and not digests:
        raise ValueError("The request is empty: give ids, groups, rows or slices.")
    if any(kind == "group" for _, kind in wanted) and not manifest.recipe["partition"]["group_column"]:
        raise ValueError("This store was trained without `group_column`, so it has no groups. Delete by ids or rows.")
    if not wanted and not digests:
        return _slices_request(folder, hit)
    named = _named_request(folder, wanted, digests)
    if not hit:
        return named
    whole = _slices_request(folder, hit)
    return replace(
        named, ids={**whole.ids, **named.ids}, places=named.places | whole.places, asked=named.asked + whole.asked,
        already=named.already + whole.already, stones=(*named.stones, *whole.stones),
    )  # fmt: skip


def _named_request(folder: StoreFolder, wanted: Sequence[tuple[Any, Kind]], digests: Iterable[str]) -> Request:
    """A request for ids and groups, and for examples by their keyed digests."""
    key = folder.key if wanted else b""
    known: list[tuple[Any, str, Kind]] = [(digest, digest, "id") for digest in digests]
    known += [(value, keyed_digest(key, kind, value), kind) for value, kind in wanted]
    asked = {digest for _, digest, _ in known}
    with folder.reading() as state:
        alike = LookAlikes(state.has, key)
        others = {
            id_text(value): found
            for value, kind in wanted
            if (found := [text for text, digest in alike.of(kind, value) if digest not in asked])
        }
        request, entries = _look_up(state, known)
        fits = places_check(folder, folder.manifest(), state)
        for digest, entry in entries.items():
            if not fits(digest, entry):  # its own stages would stay
                raise StateError(
                    f"The index says that an example lies in (shard, slice) {entry[:2]}, where it does not belong: "
                    f"{folder.database} is damaged. Nothing was changed. Restore it from a backup (`hf-s3t state "
                    "import`), or delete whole slices (`slices=[...]`)."
                )
    return replace(request, look_alikes=others)


def places_check(folder: StoreFolder, manifest: Manifest, state: StateDatabase) -> Callable[[str, Entry], bool]:
    """Tells of a digest and its entry whether the example lies where it belongs.

    The key tells. Where columns of the dataset say where a row lies, or the key is not here, the index is held against
    itself: a place that was changed throughout looks right then.
    """
    size = (manifest.plan.num_shards, manifest.plan.num_slices)
    if manifest.recipe["partition"]["slice_columns"] is None and folder.has_key:
        key = folder.key
        return lambda digest, entry: entry[:2] == assign(key, entry.group or digest, *size)
    shards, slices = range(size[0]), range(size[1])
    return lambda digest, entry: entry.shard in shards and entry.slice in slices and state.lies_at(digest, entry)


def _places(slices: Iterable[Place]) -> set[Place]:
    try:
        return {(int(shard), int(slice_id)) for shard, slice_id in slices}
    except (TypeError, ValueError):
        raise ValueError("`slices` must be a list of pairs of numbers, e.g. `slices=[(0, 2)]`.") from None


def _row_id(row: Mapping[str, Any], manifest: Manifest) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"`rows` must be mappings from column to value, got {type(row).__name__}.")
    column = manifest.recipe["partition"]["id_column"]
    if column is None:
        return row_digest(row)
    if column not in row:
        raise ValueError(f"Examples of this store are named by column {column!r}, which a given row lacks.")
    return row[column]


def _slices_request(folder: StoreFolder, hit: set[Place]) -> Request:
    """A request for whole slices; with the state lost it still removes the stages."""
    trained: set[Place] = set().union(*(stage.slices for stage in folder.manifest().stages))
    if not folder.has_state:
        return Request({}, {}, frozenset(hit & trained), len(hit), len(hit - trained), ())
    with folder.reading() as state:
        ids: dict[str, tuple[Place, ...]] = {}
        for place in sorted(hit):
            ids |= dict.fromkeys(state.examples_of(place), (place,))
        there = trained.union(*ids.values())
        before = tuple(state.stones_at(hit - there))
    return Request(ids, {}, frozenset(hit & there), len(hit), len(hit - there), (), before)


def _look_up(
    state: StateDatabase, known: Sequence[tuple[Any, str, Kind]]
) -> tuple[Request, dict[str, Entry]]:
    """The request, and what the index holds of its examples."""
    entries: dict[str, Entry] = {}
    groups: dict[str, tuple[Place, ...]] = {}
    unknown: list[Any] = []
    stones: list[Tombstone] = []
    distinct = {(digest, kind): value for value, digest, kind in reversed(known)}
    for (digest, kind), value in reversed(distinct.items()):
        entry = state.entry(digest) if kind == "id" else None
        members = state.members(digest) if kind == "group" else {}
        if entry is not None:
            entries[digest] = entry
        elif members:
            entries |= members
            groups[digest] = tuple(sorted({found[:2] for found in members.values()}))
        elif (stone := state.tombstone(kind, digest)) is not None:
            stones.append(stone)
        else:
            unknown.append(value)
    ids: dict[str, tuple[Place, ...]] = {digest: (entry[:2],) for digest, entry in entries.items()}
    places = frozenset(entry[:2] for entry in entries.values())
    return Request(ids, groups, places, len(distinct), len(stones), tuple(unknown), tuple(stones)), entries


def alike_sentence(request: Request) -> str:
    """A sentence on what looks like something that was asked for, and is something else."""
    alike = [(asked, found) for asked, others in request.look_alikes.items() for found in others]
    pairs = [f"{shortened(ascii(found))} (like {shortened(ascii(asked))})" for asked, found in alike]
    return f" The store knows {', '.join(pairs[:5])}." if pairs else ""


def unknown_error(folder: StoreFolder, request: Request) -> UnknownExampleError:
    shown = ", ".join(shortened(repr(value)) for value in request.unknown[:5])
    return UnknownExampleError(
        f"{len(request.unknown)} of {request.asked} are not known to {folder.path}: {shown}. Nothing was changed."
        f"{alike_sentence(request)} Check them (`locate`), or pass `missing_ok=True` to delete the others."
    )
