"""From JSON to plain data, and from plain data into a dataclass: its fields, of the types that it names, nothing else.

Whatever is read from a file may have been changed by a disk, or by somebody else. So each of its values is looked at
once, here, and not where it is used.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Read = TypeVar("Read")


def plain_json(data: str | bytes) -> Any:
    """What a JSON text holds. A `ValueError` if it is none, is nested too deep, or holds what no file can hold again.

    Half a character (a lone surrogate) can be written in JSON as an escape, and nowhere else.
    """
    try:
        value = json.loads(data)
        if (b"\\ud" if isinstance(data, bytes) else "\\ud") in data.lower():  # type: ignore[operator]
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8: {error}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


def read_as(cls: type[Read], data: Any) -> Read:
    """An instance of a dataclass from plain data.

    Its fields may be annotated with `str`, `int`, `float`, `bool`, `None`, `Any`, other such dataclasses, and lists,
    tuples, dicts and unions of these. A list stands for a tuple.

    Raises:
        ValueError: something is absent, unknown, or of another type.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Place:
    ...     shard: int
    ...     slices: tuple[int, ...] = ()
    >>> read_as(Place, {"shard": 1, "slices": [0, 2]})
    Place(shard=1, slices=(0, 2))
    """
    if not isinstance(data, dict):
        raise ValueError(f"{data!r:.80} is no record of named fields")
    known: Any = cls
    hints, required = _fields(known)
    absent, unknown = sorted(required - data.keys()), sorted(map(str, data.keys() - hints.keys()))
    if absent or unknown:
        raise ValueError(f"it lacks {absent}" if absent else f"it has unknown fields {unknown}")
    return cls(**{name: _read(hints[name], value, name) for name, value in data.items()})


@cache
def _fields(cls: Any) -> tuple[Mapping[str, Any], frozenset[str]]:
    required = (f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING)
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}, frozenset(required)


def _read(kind: Any, value: Any, name: str) -> Any:
    """A value of a type; a `ValueError` that names its field for any other."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _read(next(one for one in inner if one is not type(None)), value, name)
    if origin is list and type(value) is list:
        return [_read(inner[0], one, name) for one in value]
    if origin is tuple and type(value) in (list, tuple):
        return tuple(_read(inner[0], one, name) for one in value)
    if origin is dict and type(value) is dict:
        return {key: _read(inner[1], one, name) for key, one in value.items()}
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return value
    if origin is None and kind is not float and type(value) is kind:
        return value
    if origin is None and hasattr(kind, "__dataclass_fields__"):
        return read_as(kind, value)
    raise ValueError(f"`{name}` is {value!r:.80}")
