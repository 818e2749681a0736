"""The gate: answers together, a change alone, nobody for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from hf_s3t import S3TError
from hf_s3t.serving.gate import Gate

LONG = 10.0
"""Seconds after which something that should happen at once has not happened."""


@pytest.fixture
def threads() -> Callable[..., Future[Any]]:
    """Runs a function in a thread of its own, which keeps nobody from ending if it never does."""

    def submit(function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    return submit


class Block:
    """A block of the gate that a test holds open in another thread."""

    def __init__(self, threads: Callable[..., Future[Any]], block: Callable[[], Any], within: Any = None):
        self.inside, self._leave = threading.Event(), threading.Event()
        self._within = within
        self._done = threads(self._run, block)

    def _run(self, block: Callable[[], Any]) -> None:
        with block():
            self.inside.set()
            assert self._leave.wait(LONG)
            if self._within is not None:
                self._within()

    def enter(self) -> Block:
        assert self.inside.wait(LONG)
        return self

    def leave(self) -> None:
        self._leave.set()
        self._done.result(LONG)


def wait_for_changes(gate: Gate, count: int) -> None:
    """Returns when that many changes wait or are under way."""
    until = time.monotonic() + LONG
    while time.monotonic() < until:  # who begins to wait tells nobody
        with gate._condition:  # held by a change until it really waits
            if gate._changes == count:
                return
        time.sleep(0.001)
    pytest.fail("no change waits")


def test_answers_are_given_together(threads: Any) -> None:
    gate = Gate()
    met = threading.Barrier(3)

    def answer() -> int:
        with gate.answering():
            return met.wait(LONG)  # nobody leaves before all three are inside

    assert {future.result(LONG) for future in [threads(answer) for _ in range(3)]} == {0, 1, 2}


def test_a_change_waits_for_the_answers_that_run(threads: Any) -> None:
    gate = Gate()
    first, second = Block(threads, gate.answering).enter(), Block(threads, gate.answering).enter()
    change = Block(threads, gate.changing)
    wait_for_changes(gate, 1)
    first.leave()
    assert not change.inside.wait(0.05)
    second.leave()
    change.enter().leave()


def test_new_answers_wait_for_a_change_that_waits(threads: Any) -> None:
    gate = Gate()
    running = Block(threads, gate.answering).enter()
    change = Block(threads, gate.changing)
    wait_for_changes(gate, 1)
    late = Block(threads, gate.answering)
    assert not late.inside.wait(0.05)  # else answers that follow one another would keep the change out for ever
    running.leave()
    change.enter()
    assert not late.inside.wait(0.05)
    change.leave()
    late.enter().leave()


def test_a_change_comes_to_its_turn_under_load(threads: Any) -> None:
    gate, stop, begun = Gate(), threading.Event(), threading.Barrier(5)

    def ask() -> int:
        count = 0
        while not stop.is_set():
            with gate.answering():
                if not count:
                    begun.wait(LONG)
                count += 1
        return count

    asking = [threads(ask) for _ in range(4)]
    begun.wait(LONG)
    try:
        for _ in range(50):
            with gate.changing():
                assert gate._answers == 0
    finally:
        stop.set()
    assert all(future.result(LONG) > 0 for future in asking)


def test_changes_are_made_one_after_the_other(threads: Any) -> None:
    gate = Gate()
    first = Block(threads, gate.changing).enter()
    second = Block(threads, gate.changing)
    wait_for_changes(gate, 2)
    assert not second.inside.wait(0.05)
    first.leave()
    second.enter()
    late = Block(threads, gate.answering)
    assert not late.inside.wait(0.05)
    second.leave()
    late.enter().leave()


def test_an_answer_within_an_answer_does_not_wait_for_the_change_that_waits_for_it(threads: Any) -> None:
    gate = Gate()

    def nested() -> None:
        with gate.answering(), gate.answering():
            pass

    answer = Block(threads, gate.answering, within=nested).enter()
    change = Block(threads, gate.changing)
    wait_for_changes(gate, 1)
    answer.leave()
    change.enter().leave()


def test_a_change_within_an_answer_is_refused_and_nothing_stays_locked(threads: Any) -> None:
    gate = Gate()
    with gate.answering():
        with gate.answering():
            pass
        with pytest.raises(S3TError, match="from within its own answer"):
            with gate.changing():
                pytest.fail("changed in the middle of an answer")
        with pytest.raises(S3TError, match="from within its own answer"):
            gate.check_outside()
        threads(gate.check_outside).result(LONG)  # it is this thread's answer alone
        Block(threads, gate.answering).enter().leave()
    gate.check_outside()
    with gate.changing():
        pass


@contextmanager
def failing(block: Callable[[], Any]) -> Iterator[None]:
    with pytest.raises(ZeroDivisionError):
        with block():
            yield
            raise ZeroDivisionError


@pytest.mark.parametrize("kind", ["answering", "changing"])
def test_whoever_fails_leaves(kind: str, threads: Any) -> None:
    gate = Gate()
    with failing(getattr(gate, kind)):
        pass
    Block(threads, gate.answering).enter().leave()
    Block(threads, gate.changing).enter().leave()


@pytest.mark.parametrize("kind", ["answering", "changing"])
def test_whoever_is_interrupted_while_waiting_waits_no_more(kind: str, threads: Any, request: Any) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let it be ignored in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    gate = Gate()
    before = Block(threads, gate.changing if kind == "answering" else gate.answering).enter()

    def interrupt() -> None:
        if kind == "changing":
            wait_for_changes(gate, 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        threads(interrupt)
        with getattr(gate, kind)():
            pytest.fail("did not wait")
    before.leave()
    Block(threads, gate.answering).enter().leave()
    Block(threads, gate.changing).enter().leave()
