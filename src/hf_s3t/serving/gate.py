"""The gate between answers and changes: many answers at a time, or one change alone. Knows nothing of models."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import S3TError


class Gate:
    """Lets threads answer together and one thread change alone, between two answers.

    A change that waits lets no new answer begin, so that it comes to its turn under any load.

    >>> gate = Gate()
    >>> with gate.answering(), gate.answering():  # a thread may begin an answer within its own
    ...     pass
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._answers = 0
        self._changes = 0  # waiting ones, and the one that is under way
        self._changing = False
        self._thread = threading.local()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """What runs in this block sees no change."""
        depth = getattr(self._thread, "depth", 0)
        if depth == 0:
            with self._condition:
                self._condition.wait_for(lambda: self._changes == 0)
                self._answers += 1
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth
            if depth == 0:
                with self._condition:
                    self._answers -= 1
                    self._condition.notify_all()

    def check_outside(self) -> None:
        """Raises [`S3TError`] in the middle of this thread's own answer, which a change would wait for without end."""
        if getattr(self._thread, "depth", 0):
            raise S3TError(
                "The model cannot be changed from within its own answer. Do it when the answer is complete."
            )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What runs in this block runs while nothing is answered."""
        self.check_outside()
        with self._condition:
            self._changes += 1
            try:
                self._condition.wait_for(lambda: self._answers == 0 and not self._changing)
            except BaseException:  # interrupted: nobody has to wait for this change any more
                self._changes -= 1
                self._condition.notify_all()
                raise
            self._changing = True
        try:
            yield
        finally:
            with self._condition:
                self._changing = False
                self._changes -= 1
                self._condition.notify_all()
