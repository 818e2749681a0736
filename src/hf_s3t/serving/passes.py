"""What comes before and after an answer: which state it has, and that no cache outlives the members that filled it.

A cache is given to one answer after the other. It bears the identity of the members that it was first given to, or
that made it, and only they go on with it: what others left in it would carry into new answers what was deleted since.
The identity is an attribute of the cache, so that a copy of a cache has it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import Cache

from ..seams.answering import caches_in
from .following import State
from .member_cache import of_other_members

PASS = "_s3t_serving"
"""The argument by which a forward pass is told who answers: what runs before it is not compiled with it."""

IDENTITY = "_s3t_members"
"""The attribute of a cache that says which members filled it."""


def take_caches(state: State, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a cache among the arguments that other members filled. An unknown one is theirs now."""
    given = caches_in({**{f"argument {place + 1}": value for place, value in enumerate(args)}, **kwargs})
    for name, cache in given.items():
        if any(getattr(part, IDENTITY, state.identity) != state.identity for part in _parts(cache)):
            raise of_other_members(name)
    _mark(state, given.values())


def give_caches(state: State, output: Any) -> Any:
    """The output of an answer, in which every cache bears the identity of the members."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    _mark(state, (value for value in values if isinstance(value, Cache)))
    return output


def _mark(state: State, caches: Iterable[Cache]) -> None:
    for cache in caches:
        for part in _parts(cache):
            setattr(part, IDENTITY, state.identity)


def _parts(cache: Cache) -> list[Cache]:
    """A cache, and those in it, which may be given by themselves."""
    return [cache, *caches_in(vars(cache)).values()]


@torch.compiler.disable
def begin_pass(ensemble: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a pass of an ensemble: an answer begins."""
    ensemble._answers.begin()
    state = ensemble._answers.state
    take_caches(state, args, kwargs)
    return args, {**kwargs, PASS: state.serving}


@torch.compiler.disable
def end_pass(ensemble: Any, args: Any, output: Any) -> None:
    """After a pass, whether or not it failed."""
    try:
        give_caches(ensemble._answers.begun_on, output)
    finally:
        ensemble._answers.end()
