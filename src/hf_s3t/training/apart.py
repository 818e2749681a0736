"""A training apart from its store: on a worker, which is given orders and gives back trained stages.

Who builds a trainer inside [`training_apart`] gets one that holds neither key nor state, and never touches the store:
its `output_dir` is a scratch folder, its examples have numbers for names (`rows_apart.py`), and of deletions it learns
by being called off. Everything else is the same trainer; that is why its stages are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from .stage_orders import StageOrder


class Apart:
    """Stands for the store in a training apart from it; see [`StoreWatch`], which has the same methods.

    Args:
        scratch (`Path`): a folder of this process alone.
        called_off (`Callable`): whether the running stage is to be dropped.
    """

    def __init__(self, scratch: Path, called_off: Callable[[], bool]):
        self.scratch, self.called_off = scratch, called_off

    def settle(self, args: Any) -> None:
        """Changes arguments so that nothing is written or shown outside of the scratch folder."""
        args.output_dir = str(self.scratch)
        args.push_to_hub, args.disable_tqdm = False, True

    def changed(self) -> bool:
        return self.called_off()

    def is_hit(self, order: StageOrder) -> bool:
        return self.called_off()

    def knows_all(self, examples: Iterable[str]) -> bool:
        return True  # what is in memory goes with the first order after a deletion

    def writing(self) -> AbstractContextManager[Any]:
        return nullcontext()


_apart: ContextVar[Apart | None] = ContextVar("apart", default=None)


@contextmanager
def training_apart(apart: Apart) -> Iterator[None]:
    """Trainers that are built inside train apart from their store."""
    token = _apart.set(apart)
    try:
        yield
    finally:
        _apart.reset(token)


def apart_here() -> Apart | None:
    """What a trainer that is built now has to use in place of its store; `None` where it has the store."""
    return _apart.get()
