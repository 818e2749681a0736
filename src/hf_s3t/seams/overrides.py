"""Whether the classes of another library still call what ours override in them: read from their code.

An override that nobody calls any more does nothing, and nothing complains. So it is looked for when a class is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from types import CodeType
from typing import Any

from . import broken


def classes_behind(cls: type, ours: type) -> list[type]:
    """What `ours`, a base of `cls`, is mixed into: the classes behind it in the order of resolution."""
    order = cls.__mro__
    return [behind for behind in order[order.index(ours) + 1 :] if behind is not object]


def check_overrides(
    seam: str, classes: Sequence[type], methods: Iterable[str], attributes: Iterable[str] = ()
) -> None:
    """Checks that classes of another library have and call the methods that ours override, and use attributes."""
    shown = f"`{classes[0].__module__}.{classes[0].__qualname__}`"
    for name in methods:
        if not any(name in vars(cls) for cls in classes):
            raise broken(seam, f"{shown} has no method `{name}`")
        if not uses(classes, name):
            raise broken(seam, f"{shown} never calls its method `{name}`")
    for name in attributes:
        if not uses(classes, name):
            raise broken(seam, f"{shown} uses no attribute `{name}`")


def uses(classes: Sequence[type], name: str) -> bool:
    """Whether any method of some classes, other than those of this name, uses a name."""
    members = (member for cls in classes for owner, member in vars(cls).items() if owner != name)
    return any(name in code.co_names for member in members for code in _codes(member))


def _codes(member: Any) -> Iterator[CodeType]:
    """The code of a method or a property, of the functions inside, and of what is below decorators."""
    if isinstance(member, staticmethod | classmethod):
        yield from _codes(member.__func__)
    elif isinstance(member, property):
        yield from _codes(member.fget)
        yield from _codes(member.fset)
    elif isinstance(member, cached_property):
        yield from _codes(member.func)
    elif inspect.isfunction(member):
        yield from _nested(member.__code__)
        if hasattr(member, "__wrapped__"):
            yield from _codes(member.__wrapped__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
