"""Whether an evaluation set that chooses what is kept of a stage holds examples of the train set.

Such a set leaves its mark on every stage, whatever slices the stage saw. Somebody who is in it, too, would be deleted
from the slices and stay in the choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..data_derived import TRAIN_SET, named_in
from ..errors import DatasetError
from ..store.ids import id_text
from ..store.partition import keyed_digest, raw_rows, row_digest
from ..store.store import S3TStore
from .rows import TrainRows

EVALUATION = "evaluation"
"""The name under which a config says that the evaluation set holds rows of the train set."""


def check_evaluation(store: S3TStore, rows: TrainRows, recipe: Mapping[str, Any], sets: Iterable[Any]) -> None:
    """Raises [`DatasetError`] if sets that steer hold examples that were deleted, or that may be.

    They are known by id and by group. The latter may be if the config names the evaluation.

    Args:
        recipe (`dict`): of this run; its part `steering` tells whether an evaluation steers.
        sets: evaluation sets, or mappings of them, as they were given and as they were prepared.
    """
    if recipe.get("steering") is None:
        return
    named = EVALUATION in named_in(recipe) or (store.exists and EVALUATION in named_in(store.manifest().recipe))
    buried: dict[Any, set[str]] = {"id": set(), "group": set()}
    if store.has_state:
        with store.reading() as state:
            buried = state.buried()
    live = {"id": rows.entries.keys(), "group": {entry.group for entry in rows.entries.values()}}
    known = set(map(tuple, _digests(rows, recipe["partition"]["group_column"], sets)))
    deleted = sum(any(digest in buried[kind] for kind, digest in digests) for digests in known)
    shared = sum(any(digest in live[kind] for kind, digest in digests) for digests in known)
    chooses = "The evaluation set chooses weights, learning rates or when to stop, and holds"
    if deleted:
        raise DatasetError(
            f"{chooses} {deleted} deleted examples, by id or group: every stage would learn from them again. Nothing "
            "was trained. Take them out of the evaluation set. Live stages keep what these chose: go on with "
            "accept_recipe=[...], as the next error names it, or train a new store. If these ids name other examples "
            "than those of the train set, use other ids."
        )
    if shared and not named:
        raise DatasetError(
            f"{chooses} {shared} examples of the train set, by id or group: a later deletion would not undo what they "
            "chose. Nothing was trained. Take them out of the evaluation set. If these ids name other examples, use "
            f"other ids. Or declare it, for receipts: S3TConfig(data_derived={{{EVALUATION!r}: {TRAIN_SET!r}}})."
        )


def _digests(rows: TrainRows, group_column: str | None, sets: Iterable[Any]) -> Iterable[list[tuple[str, str]]]:
    """For each row what it is known by: kind and keyed digest."""
    for given in {id(given): given for given in sets}.values():
        for one in given.values() if isinstance(given, Mapping) else (given,):
            for row in () if one is None else raw_rows(one) if hasattr(one, "__len__") else one:
                columns = row if isinstance(row, Mapping) else {}  # of a stream, which may give anything
                name = columns.get(rows.id_column) if rows.id_column else row_digest(row)
                known = {"id": name, "group": columns.get(group_column) if group_column else None}
                yield [(kind, _digest(rows.key, kind, value)) for kind, value in known.items() if _is_name(value)]


def _digest(key: bytes, kind: Any, value: Any) -> str:
    return keyed_digest(key, kind, value)


def _is_name(value: Any) -> bool:
    try:
        id_text(value)
    except ValueError:  # nothing, or what names nobody
        return False
    return True
