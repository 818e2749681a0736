"""The seam to `datasets`: what a Trainer makes of a train set before its slices are cut must be made row by row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]

from ..errors import DatasetError
from . import broken

DIGEST_COLUMN = "hf_s3t_example"
"""By it the rows of the train set are known while they are prepared; other datasets are not looked at."""
LOOKED_AT = 16
"""Rows that are prepared once more, each alone."""
NEEDED = ("function", "batched", "with_indices", "with_rank", "input_columns", "fn_kwargs")


@contextmanager
def watched_preparation() -> Iterator[None]:
    """Inside, a function that makes rows in batches must make of a row alone what it made of it in a batch.

    Otherwise a row would hold something of others, which lie in other slices. Some of the rows are looked at.
    """
    plain: Any = Dataset.map
    signature = inspect.signature(plain)
    if not set(NEEDED) <= signature.parameters.keys():
        raise broken("preparation", f"`Dataset.map` takes {', '.join(signature.parameters)}")

    @wraps(plain)
    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = plain(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        if DIGEST_COLUMN in self.column_names and given.arguments["batched"] and not given.arguments["with_rank"]:
            if not _is_row_by_row(self, made, given.arguments):
                raise _made_of_several(given.arguments["function"])
        return made

    Dataset.map = watching
    try:
        yield
    finally:
        Dataset.map = plain


def _is_row_by_row(before: Any, after: Any, given: dict[str, Any]) -> bool:
    """Whether rows that a function made in batches are what it makes of each alone; where their number changed, yes:
    it is told elsewhere."""
    if len(before) != len(after):
        return True
    names = given["input_columns"]
    found = after.with_format(None)
    for position in range(0, len(before), max(len(before) // LOOKED_AT, 1)):
        batch = before[position : position + 1]  # in the form in which the function sees it
        picked = [batch[name] for name in ([names] if isinstance(names, str) else names)] if names else [batch]
        indices = [[position]] if given["with_indices"] else []
        alone = given["function"](*picked, *indices, **(given["fn_kwargs"] or {})) or {}
        alone = alone.to_pydict() if hasattr(alone, "to_pydict") else alone  # an arrow table
        for name, values in alone.items():
            if name in found.column_names and _plain(values[0]) != _plain(found[position][name]):
                return False
    return True


def _made_of_several(function: Any) -> DatasetError:
    return DatasetError(
        f"`{getattr(function, '__qualname__', repr(function))}` prepares a row otherwise alone than in a batch with "
        "others, so that prepared rows hold something of other examples (a completion, a length to pad to), in "
        "whatever slice these lie. Deleting one would leave it in others. Prepare rows one by one, pad in the "
        "collator, or choose a loss that needs no other rows."
    )


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
