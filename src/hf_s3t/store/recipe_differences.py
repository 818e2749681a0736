"""How two recipes differ, which differences may be accepted, and what is claimed of a store where some were.

A repair with other settings is refused, unless its user names each setting that may differ. Even then what was deleted
is in no stage, by construction. But what is trained from then on is no longer bit-equal to training from scratch. The
manifest keeps what was accepted, for good.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..data_derived import DATA_DERIVED, named_in
from ..errors import RecipeError
from .partition import canonical

STRUCTURE = {
    "base": "live stages were trained on that base, so on another one they would be another model",
    "config": "live and new stages are joined into one adapter, so they must own the same parameters",
    "partition": "it says which slice an example lies in, so a deletion would look in the wrong place",
}
"""Parts of a recipe that stay as they are, and why."""
OUTSIDE = frozenset({"base.config.attention"})
"""Settings of those parts that change last bits and nothing else: which kernel computes attention."""

ABSENT = object()


class Difference(NamedTuple):
    """A setting that two recipes have otherwise, by its path; `ABSENT` where one does not name it."""

    setting: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return self.between("the store", "this run")

    def between(self, one: str, other: str) -> str:
        """What is told of it, where the recipes are those of `one` and of the `other`."""
        if self.before is ABSENT:
            return f"{self.setting}: {one} does not name it, {other} has {self.after!r}"
        after = "does not name it" if self.after is ABSENT else repr(self.after)
        return f"{self.setting}: {one} has {self.before!r}, {other} {after}"

    def accepted(self, generation: int) -> Accepted:
        """On record."""
        before, after = (None if value is ABSENT else value for value in (self.before, self.after))
        return Accepted(self.setting, before, after, generation)


@dataclass(frozen=True)
class Accepted:
    """A setting that was changed although stages live which were trained with another value."""

    setting: str  # its path in the recipe
    before: Any  # its values; `None`, too, where a side did not name it
    after: Any
    generation: int  # of the store when it was changed; what is trained from then on has the new value

    def __str__(self) -> str:
        return f"{self.setting}: {self.before!r}, since generation {self.generation} {self.after!r}"

    @classmethod
    def from_json(cls, data: Any) -> Accepted:
        """Reads one strictly; an error of `manifest.DAMAGED` for anything else."""
        accepted = cls(**data)
        if type(accepted.generation) is not int or accepted.generation < 0 or why_not(accepted.setting):
            raise ValueError(f"{data!r:.200} is no setting that was accepted")
        return accepted


NOT_BIT_EQUAL = "Stages trained since are influence-free by construction, and not bit-equal to training from scratch"


def why_not(setting: str) -> str | None:
    """Why a difference in a setting cannot be accepted; `None` where it can."""
    return None if setting in OUTSIDE else STRUCTURE.get(setting.split(".")[0])


def check_accept(accept: Any) -> None:
    """Raises `ValueError` unless `accept` names single settings, none of which has to stay as it is."""
    if isinstance(accept, str) or not isinstance(accept, Collection):
        raise ValueError(
            "`accept_recipe` must be a list of settings as the error names them, such as ['arguments.weight_decay'], "
            f"got {accept!r:.80}."
        )
    for setting in accept:
        if why_not(setting):
            raise ValueError(f"A change of {setting!r} cannot be accepted: {why_not(setting)}.")


def check_same(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], accept: Collection[str] = ()
) -> tuple[Difference, ...]:
    """What differs between two recipes and was accepted. A [`RecipeError`] if anything else does."""
    differences = compare_recipes(stored, wanted)
    if any(found.setting not in accept or why_not(found.setting) for found in differences):
        raise RecipeError(
            "The settings differ from those that the store was trained with, so repaired stages would differ from "
            "training from scratch:\n  " + "\n  ".join(map(str, differences)) + "\n" + _way_out(differences)
        )
    return differences


def compare_recipes(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Difference, ...]:
    """What differs between two recipes.

    An argument that one side does not know, because it came or went with a version of the Trainer, is no difference
    where the other side knows that nobody set it. A field of the base's config that only one has is none either, nor
    is what only one names as computed from data: that is a word on what was done, and changes no bit.
    """
    unset = {*stored.get(UNSET, ()), *wanted.get(UNSET, ())}
    before, after = _comparable(stored, wanted)
    return tuple(_differences(before, after, "", unset))


UNSET = "unset"
"""The part of a recipe that names the arguments which had their defaults. It is no setting itself."""


def recipe_digest(recipe: Mapping[str, Any]) -> str:
    """sha256 over a recipe: by it the record of a stage knows the one that the stage was trained with."""
    return hashlib.sha256(canonical(recipe)).hexdigest()


def _way_out(differences: Iterable[Difference]) -> str:
    names = [found.setting for found in differences]
    fixed = {name: reason for name in names if (reason := why_not(name))}
    if not fixed:
        return (
            f"Use the stored settings, train into another output_dir, or go on with these: accept_recipe={names}. "
            f"{NOT_BIT_EQUAL}."
        )
    reasons = [f"{', '.join(n for n in fixed if fixed[n] == why)}: {why}" for why in dict.fromkeys(fixed.values())]
    return f"Use the stored settings, or train into another output_dir. These cannot change: {'; '.join(reasons)}."


def _comparable(*recipes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Recipes without what one of them does not name, as it was written before there was such a part."""
    late = [name for name in ("user_values", "steering", "metrics") if not all(name in recipe for recipe in recipes)]
    kept = [{name: value for name, value in recipe.items() if name not in (UNSET, *late)} for recipe in recipes]
    kept = [_with_names_of_both(recipe, recipes) for recipe in kept]
    if not all("config" in recipe.get("base", ()) for recipe in kept):
        kept = [{**recipe, "base": {**recipe.get("base", {}), "config": {}}} for recipe in kept]
    return kept


def _with_names_of_both(recipe: dict[str, Any], recipes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    both = set[str].intersection(*(set(named_in(one)) for one in recipes))
    return {**recipe, DATA_DERIVED: {name: source for name, source in named_in(recipe).items() if name in both}}


def _differences(stored: Any, wanted: Any, path: str, unset: Collection[str]) -> Iterable[Difference]:
    if not (isinstance(stored, Mapping) and isinstance(wanted, Mapping)):
        if stored != wanted:
            yield Difference(path, stored, wanted)
        return
    for name in sorted(stored.keys() | wanted.keys()):
        below = f"{path}.{name}" if path else name
        if name in stored and name in wanted:
            yield from _differences(stored[name], wanted[name], below, unset)
        elif below not in unset and not below.startswith("base.config."):
            yield Difference(below, stored.get(name, ABSENT), wanted.get(name, ABSENT))
