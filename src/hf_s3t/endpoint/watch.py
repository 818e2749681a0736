"""Follows the store while the model answers, and says whether it may: how old its state is, and why."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .batcher import BARE, NotReadyError

if TYPE_CHECKING:
    from ..serving.ensemble import S3TEnsemble

logger = logging.getLogger(__name__)

LAST_LOOK = 10.0
"""Seconds that the end waits for a look."""


class Watch:
    """Refreshes a model from time to time.

    Args:
        model ([`S3TEnsemble`]): that answers.
        refresh_seconds, max_staleness: see [`Settings`].
        note: told how many deletions a look found, where it found any.
    """

    def __init__(
        self, model: S3TEnsemble, refresh_seconds: float, max_staleness: float, note: Callable[[int], None]
    ):
        self.model, self.refresh_seconds, self.max_staleness = model, refresh_seconds, max_staleness
        self._note = note
        self._generation = model.generation
        self._looked = time.monotonic()  # when the last look began that succeeded
        self._problem: str | None = None
        self._looking = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hf_s3t refresh", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the look that is under way, or without it where it hangs."""
        self._stop.set()
        self._thread.join(LAST_LOOK)

    @property
    def age(self) -> float:
        """Seconds since the state was known to be the store's newest."""
        return time.monotonic() - self._looked

    @property
    def reason(self) -> str | None:
        """Why nothing may be answered now; `None`: it may."""
        if self.age > self.max_staleness:
            problem = self._problem or "the last look has not ended yet"
            return (
                f"The store was last seen {self.age:.0f} seconds ago, and --max-staleness allows "
                f"{self.max_staleness:g}: deletions may be unknown here. {problem}"
            )
        if not self.model.members and not self.model.pending:
            return BARE
        return None

    def check(self) -> None:
        """Raises [`NotReadyError`] where nothing may be answered now."""
        if reason := self.reason:
            raise NotReadyError(reason)

    def check_before_answers(self) -> None:
        """The same in the model's own thread, where no answer runs: what had to wait for one is taken over first."""
        if self.model.pending:
            self.look()
        self.check()
        if self.model.pending and not self.model.members:
            raise NotReadyError(self._problem or "Every served prefix has changed, and the new ones are not read yet.")

    def look(self) -> None:
        """Takes over what changed in the store; a look that fails leaves the state, which grows older."""
        with self._looking:
            self._look()

    def _look(self) -> None:
        began = time.monotonic()
        try:
            self.model.refresh(wait=False)
        except Exception as error:  # of whatever kind: a disk, the network, a store that is half copied
            problem = str(error) or type(error).__name__
            if problem != self._problem:
                logger.error("the store was not taken over, and will be looked at again: %s", problem)
            self._problem = problem
        else:
            if self._problem is not None:
                logger.warning("the store is read again, it is of generation %d", self.model.generation)
            self._looked, self._problem = began, None
        if seen := self.model.generation - self._generation:
            self._generation += seen
            logger.info("%d deletions were seen: new answers are of generation %d", seen, self._generation)
            self._note(seen)

    def _run(self) -> None:
        wait = 0.0
        while not self._stop.wait(wait):
            began = time.monotonic()
            self.look()
            wait = max(self.refresh_seconds - (time.monotonic() - began), 0.0)
