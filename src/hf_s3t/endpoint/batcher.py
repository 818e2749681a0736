"""Requests wait in a bounded queue; one thread takes them in batches, and answers each batch in one go.

```
HTTP, many clients            the model's thread
submit ──► [ 7 6 5 4 ] ──►  [ 3 2 1 ]  answered together, each ends when it has ended
           at most max_queue  at most max_batch rows
```

What an answer is, `generation.py` and `classification.py` know.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

FAILURES = 3
"""Batches that fail one after the other until the model is said to fail."""


@dataclass(frozen=True)
class Begun:
    """A request's answer has begun, on a state of this generation."""

    generation: int


@dataclass(frozen=True)
class Piece:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Ended:
    """The answer is complete: why, and how many tokens it has, or what it is."""

    reason: str = "stop"
    tokens: int = 0
    result: Any = None


class NotReadyError(Exception):
    """Nothing is answered now; the message says why."""


BARE = "No stage of the store is live, so that only the bare base model could answer. Repair it: train()."
"""Why a model without members does not answer."""


class QueueFullError(Exception):
    """As many requests wait as may."""

    def __init__(self, waiting: int, seconds: int):
        super().__init__(f"{waiting} requests are waiting, as many as may. Ask again in {seconds} s.")
        self.seconds = seconds


class Job:
    """A request on its way: what is asked, and events for the coroutine that sends the answer.

    Args:
        asked: for the one who answers.
        rows (`int`, *optional*, defaults to 1): of the batch that it takes.
        prompt_tokens (`int`, *optional*, defaults to 1): of its longest row.
        answer_tokens (`int`, *optional*, defaults to 0): that each row may be continued by.
    """

    def __init__(self, asked: Any, rows: int = 1, prompt_tokens: int = 1, answer_tokens: int = 0):
        self.asked, self.rows = asked, rows
        self.prompt_tokens, self.answer_tokens = prompt_tokens, answer_tokens
        self.since = time.monotonic()
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def tell(self, event: Begun | Piece | Ended | Exception) -> None:
        """Hands on what happened; for the model's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self.cancelled = True

    async def begun(self) -> int:
        """The generation of the state that the answer begins on."""
        event = await self._next()
        assert isinstance(event, Begun)
        return event.generation

    async def events(self) -> AsyncIterator[Piece | Ended]:
        """What follows, to the end of the answer. Whoever stops listening cancels it."""
        try:
            event: Any = None
            while not isinstance(event, Ended):
                event = await self._next()
                yield event
        finally:
            self.cancel()

    async def _next(self) -> Any:
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(event, Exception):
            raise event
        return event


class Batcher:
    """One thread that answers.

    Args:
        answer: answers a batch: tells each job that it began, its pieces, and that it ended.
        check: raises [`NotReadyError`] where nothing may be answered now.
        max_queue, max_batch, max_batch_tokens, mates_seconds: see [`Settings`].
        note: told of each batch: seconds that its jobs waited, and how many rows it has.
        room (`int`, *optional*): tokens that a row of a batch may have, its mates' padding included.
    """

    def __init__(
        self,
        answer: Callable[[list[Job]], None],
        check: Callable[[], None],
        max_queue: int,
        max_batch: int,
        max_batch_tokens: int,
        mates_seconds: float,
        note: Callable[[list[float], int], None],
        room: int | None = None,
    ):
        self._answer, self._check, self._note = answer, check, note
        self.max_queue, self.mates_seconds = max_queue, mates_seconds
        self.max_batch, self.max_batch_tokens = max_batch, max_batch_tokens
        self.room = math.inf if room is None else room
        self._waiting: deque[Job] = deque()
        self._condition = threading.Condition()
        self._stopped = self._gone = False
        self._failed, self._error = 0, ""  # batches one after the other, and how the last of them did
        self._seconds = 0.0  # of the last batch
        self._thread = threading.Thread(target=self._run, name="hf_s3t answers", daemon=True)

    def start(self) -> None:
        """Begins to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answers what waits, and ends."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self._thread.join()

    def __len__(self) -> int:
        with self._condition:
            return sum(not job.cancelled for job in self._waiting)

    @property
    def reason(self) -> str | None:
        """Why the model does not answer, although it should; `None`: it does."""
        if self._gone:
            return "The thread that answers has ended; the log says why. Start the endpoint again."
        if self._failed >= FAILURES:
            return (
                f"The last {self._failed} batches failed, the last one with: {self._error}. Requests are still tried. "
                "If they go on to fail, start the endpoint again."
            )
        return None

    def check_room(self) -> None:
        """Raises [`QueueFullError`] where as many wait as may."""
        if len(self) >= self.max_queue:
            raise QueueFullError(self.max_queue, max(1, math.ceil(self._seconds)))

    def submit(self, job: Job) -> None:
        """Lets a job wait for its turn. Those that nobody waits for any more have no place in the queue.

        Raises:
            NotReadyError: nobody answers any more.
            QueueFullError: as many wait as may.
        """
        with self._condition:
            if self._gone:
                raise NotReadyError(self.reason)
            self._waiting = deque(one for one in self._waiting if not one.cancelled)
            self.check_room()
            self._waiting.append(job)
            self._condition.notify_all()

    def _run(self) -> None:
        jobs: list[Job] = []
        try:
            while jobs := self._next():
                self._answer_batch(jobs)
        except BaseException:  # of whatever kind: nobody else would tell those who wait
            logger.critical("the thread that answers ends, and nothing is answered any more", exc_info=True)
            with self._condition:
                self._gone = True
                left = [*jobs, *self._waiting]
                self._waiting.clear()
            for job in left:
                job.tell(NotReadyError(self.reason))

    def _answer_batch(self, jobs: list[Job]) -> None:
        began = time.monotonic()
        try:
            self._note([began - job.since for job in jobs], sum(job.rows for job in jobs))
        except Exception:
            logger.exception("a batch was not counted")
        try:
            self._check()
            self._answer(jobs)
            self._failed = 0
        except Exception as error:
            if not isinstance(error, NotReadyError):
                logger.exception("a batch of %d requests failed", len(jobs))
                self._failed, self._error = self._failed + 1, f"{type(error).__name__}: {error}"
            for job in jobs:
                job.tell(error)
        self._seconds = time.monotonic() - began

    def _next(self) -> list[Job]:
        """The next batch, oldest first; empty at the end."""
        with self._condition:
            while True:
                self._condition.wait_for(lambda: self._waiting or self._stopped)
                if self._waiting and not self._stopped:
                    self._condition.wait_for(self._is_full, self.mates_seconds)
                jobs = self._taken()
                if jobs or (self._stopped and not self._waiting):
                    return jobs

    def _is_full(self) -> bool:
        return self._stopped or sum(job.rows for job in self._waiting) >= self.max_batch

    def _taken(self) -> list[Job]:
        """The oldest jobs that fit together. A row goes on to the end of its batch, whoever's that is: all of them are
        as long as the longest prompt and the longest answer, be they of different jobs."""
        jobs: list[Job] = []
        rows = prompt = answer = 0
        while self._waiting:
            job = self._waiting[0]
            more, longest = rows + job.rows, (max(prompt, job.prompt_tokens), max(answer, job.answer_tokens))
            length = sum(longest)
            if jobs and (more > self.max_batch or more * length > self.max_batch_tokens or length > self.room):
                break
            self._waiting.popleft()
            if not job.cancelled:
                jobs.append(job)
                rows, (prompt, answer) = more, longest
        return jobs

