"""What a training computed from its rows beside the adapters, as its config names it, and what receipts say of that.

Class weights, a tokenizer, statistics: no deletion reaches them. The config says what each was computed from. That
travels in the recipe, so in the published manifest and the card, and every receipt has a line on it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

DATA_DERIVED = "data_derived"
"""The field of the config, and the part of a recipe."""
TRAIN_SET = "train set"
"""What something was computed from that keeps what it saw of rows that are deleted later."""
MOST_NAMES = 20
LONGEST_SOURCE = 200
NAME = re.compile("[A-Za-z][A-Za-z0-9_]{0,39}")


def _is_named(name: Any, source: Any) -> bool:
    known = isinstance(name, str) and NAME.fullmatch(name) and isinstance(source, str)
    return bool(known) and 0 < len(source.strip()) and len(source) <= LONGEST_SOURCE and source.isprintable()


def check_data_derived(value: Any) -> None:
    """Raises `ValueError` unless a value names at most 20 things, and of each what it was computed from."""
    if value is None:
        return
    if not isinstance(value, Mapping) or len(value) > MOST_NAMES:
        raise ValueError(
            f"`data_derived` must name at most {MOST_NAMES} things and what each was computed from, such as "
            f"{{'class_weights': {TRAIN_SET!r}}}, got {value!r:.200}."
        )
    for name, source in value.items():
        if not _is_named(name, source):
            raise ValueError(
                f"`data_derived` has {name!r:.80}: {source!r:.80}. A name is a letter and up to 39 letters, digits "
                f"and underscores; what it was computed from is one line of at most {LONGEST_SOURCE} characters. Both "
                "are published, so name no person."
            )


def named_in(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What a recipe names, by name. A recipe may be a stranger's: what no config could have named is left out."""
    named = recipe.get(DATA_DERIVED)
    fit = [pair for pair in named.items() if _is_named(*pair)] if isinstance(named, Mapping) else []
    return dict(sorted(fit)[:MOST_NAMES])


def with_named(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe, and what another one names and it does not: what was named once stays on record."""
    named = named_in(other) | named_in(recipe)
    return {**recipe, DATA_DERIVED: named} if named else dict(recipe)


def spoken(name: str) -> str:
    """A name as a sentence begins with it.

    >>> spoken("class_weights")
    'Class weights'
    """
    words = name.replace("_", " ")
    return words[0].upper() + words[1:]


def limits_of_data(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """What a receipt says of all that no deletion reaches, as far as a recipe knows: one sentence each."""
    lines = []
    for name, source in named_in(recipe).items():
        if source == TRAIN_SET:
            kept = "computed from the whole train set, by the config's own word; what that saw of the examples stays"
        else:
            kept = f"computed from {source}, by the config's own word, which nobody checked"
        lines.append(f"{spoken(name)}: {kept}.")
    if recipe.get("steering") is not None:
        lines.append(
            "An evaluation set chose weights, learning rates or when to stop: it shapes every stage, and a deletion "
            "does not reach it."
        )
    if "Classification" in str((recipe.get("base") or {}).get("class")):
        lines.append("Classes and their names stay, even those that only deleted examples had.")
    return tuple(lines)
