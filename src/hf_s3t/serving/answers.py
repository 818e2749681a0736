"""Which answers run on what: a new answer begins on the newest state, a running one ends on the state it began with.

```
time ──────────────────────────────────────────────────────────────►
answer 1   [ state 0 ─────────────────────── ]               slot 2 is cleared and becomes spare
answer 2          [ state 0 ──── ]                           ┘ when the last answer of state 0 has ended
change            ┌ writes into a spare slot, then state 1 is current
answer 3           └─ [ state 1 ───────────── ]              waits for nobody
```

A change takes spare slots. So no answer waits for it, and it waits for none. Whoever needs more than are spare can
wait for those answers whose states were replaced before; where there will never be enough, for all answers, and new
ones wait meanwhile. Knows nothing of models.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from ..errors import AnswerCutOffError, S3TError

T = TypeVar("T")


class Held(Generic[T]):
    """A state, the slots that it uses, and the answers that run on it."""

    def __init__(self, state: T, slots: frozenset[int]):
        self.state, self.slots = state, slots
        self.answers = 0
        self.retired: float | None = None  # when another state took its place


class Answers(Generic[T]):
    """Lets threads answer on a state, and one thread at a time put another one in its place.

    Args:
        state: the first one.
        spare (`int`): slots, numbered from 0, that are spare at first; the state uses none.
        clear: called with the number of a slot that no answer and no state uses any more.
        limit (`float`, *optional*): seconds that an answer may go on after its state was replaced.

    >>> answers = Answers("before", 1, clear=print)
    >>> with answers.answering() as state, answers.changing(1) as spare:
    ...     answers.replace("after", {*spare})
    Traceback (most recent call last):
    ...
    hf_s3t.errors.S3TError: An answer cannot change the model that computes it. Do it when the answer is complete.
    """

    def __init__(self, state: T, spare: int, clear: Callable[[int], Any], limit: float | None = None):
        self.limit = limit
        self._clear = clear
        self._condition = threading.Condition()
        self._change = threading.Lock()
        self._current = Held(state, frozenset())
        self._old: list[Held[T]] = []  # replaced ones on which answers run
        self._spare = set(range(spare))
        self._clearing: set[int] = set()
        self._closed = self._unfinished = False
        self._thread = threading.local()

    # ---- answers ----

    @property
    def current(self) -> T:
        """The state that an answer would begin on now."""
        return self._current.state

    @contextmanager
    def answering(self) -> Iterator[T]:
        """An answer lasts as long as the block; one within another is part of it."""
        self.begin()
        try:
            yield self.state
        finally:
            self.end()

    def begin(self) -> None:
        """Begins an answer of this thread, or a part of the one that runs."""
        stack = self._running
        if stack:
            stack.append(stack[-1])
            return
        with self._condition:
            self._condition.wait_for(lambda: not (self._closed or self._unfinished))
            self._current.answers += 1
            stack.append(self._current)

    def end(self) -> None:
        """Ends what [`begin`] began."""
        held = self._running.pop()
        if self._running:
            return
        with self._condition:
            held.answers -= 1
            free = self._release(held)
        self._give_back(free)

    @property
    def state(self) -> T:
        """The state of this thread's answer.

        Raises:
            AnswerCutOffError: another one took its place longer ago than old answers may go on.
        """
        held = self._running[-1]
        if self.limit is not None and held.retired is not None and time.monotonic() - held.retired > self.limit:
            raise AnswerCutOffError(
                f"The model has forgotten examples since this answer began, more than {self.limit:g} seconds ago, and "
                "answers that began before may not go on for longer. Ask again."
            )
        return held.state

    @property
    def begun_on(self) -> T:
        """The state of this thread's answer, however long ago another one took its place."""
        return self._running[-1].state

    @property
    def running(self) -> bool:
        """Whether this thread is in an answer."""
        return bool(self._running)

    @property
    def _running(self) -> list[Held[T]]:
        return vars(self._thread).setdefault("running", [])

    def check_outside(self) -> None:
        """Raises [`S3TError`] in the middle of this thread's own answer, which a change might wait for without end."""
        if self._running:
            raise S3TError(
                "An answer cannot change the model that computes it. Do it when the answer is complete."
            )

    def drained(self, timeout: float | None = None) -> bool:
        """Waits until no answer runs on a state that was replaced and all that it used is cleared.

        Returns whether that is so, at the latest after `timeout` seconds.
        """
        self.check_outside()
        with self._condition:
            return self._condition.wait_for(lambda: not self._old and not self._clearing, timeout)

    # ---- changes ----

    @contextmanager
    def changing(self, slots: int) -> Iterator[list[int]]:
        """Changes are made one after the other, each with as many spare slots as it needs.

        Where there will never be enough, no answer runs meanwhile, and the list is empty: what the state uses itself
        may be written over.
        """
        self.check_outside()
        with self._change:
            with self._condition:
                self._closed = slots > len(self._spare | self._clearing | self._held_by_old())
                try:
                    if self._closed:
                        self._condition.wait_for(lambda: not (self._old or self._clearing or self._current.answers))
                    else:
                        self._condition.wait_for(lambda: len(self._spare) >= slots)
                except BaseException:
                    self._open()
                    raise
                given = [] if self._closed else sorted(self._spare)[:slots]
            try:
                yield given
            finally:
                with self._condition:
                    self._open()

    @property
    def spare(self) -> list[int]:
        """Slots that nobody uses and that are cleared. They are spare until whoever makes all changes takes them."""
        with self._condition:
            return sorted(self._spare)

    def replace(self, state: T, slots: set[int], unfinished: bool = False) -> None:
        """Makes a state the current one, which uses some slots: spare ones, or within [`changing`] any.

        No answer begins on an `unfinished` one: all wait for the next.
        """
        with self._condition:
            self._unfinished = unfinished
            self._condition.notify_all()
            old, self._current = self._current, Held(state, frozenset(slots))
            self._spare -= slots
            old.retired = time.monotonic()
            self._old.append(old)
            free = self._release(old)
        self._give_back(free)

    def _held_by_old(self) -> set[int]:
        return set().union(*(old.slots for old in self._old)) - self._current.slots

    def _release(self, held: Held[T]) -> set[int]:
        """Slots that nobody uses any more, if no answer runs on a replaced state."""
        if held.answers or held not in self._old:
            self._condition.notify_all()
            return set()
        self._old.remove(held)
        free = set(held.slots - self._current.slots - self._held_by_old())
        self._clearing |= free
        self._condition.notify_all()
        return free

    def _give_back(self, free: set[int]) -> None:
        for slot in free:
            try:
                self._clear(slot)
            finally:
                with self._condition:
                    self._clearing.discard(slot)
                    self._spare.add(slot)
                    self._condition.notify_all()

    def _open(self) -> None:
        self._closed = False
        self._condition.notify_all()
