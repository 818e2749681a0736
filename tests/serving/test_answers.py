"""Answers go on as they began, a change waits for no answer while a slot is spare, nobody waits for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from hf_s3t import AnswerCutOffError, S3TError
from hf_s3t.serving.answers import Answers

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
    """A block that a test holds open in another thread."""

    def __init__(self, threads: Callable[..., Future[Any]], block: Callable[[], Any], within: Any = None):
        self.inside, self._leave = threading.Event(), threading.Event()
        self._within = within
        self._done = threads(self._run, block)

    def _run(self, block: Callable[[], Any]) -> None:
        with block() as self.value:
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


class Served:
    """Answers on states that are numbers; state N uses the slots that it says."""

    def __init__(self, slots: int, used: set[int], limit: float | None = None):
        self.cleared: list[int] = []
        self.answers: Answers[int] = Answers(0, slots, self.cleared.append, limit)
        with self.answers.changing(len(used)):
            self.answers.replace(1, used)

    def change(self, wanted: int, keeps: set[int]) -> list[int]:
        """Puts the next state in the place of the current one, which keeps some slots; the slots it was given."""
        with self.answers.changing(wanted) as given:
            self.answers.replace(self.answers.current + 1, keeps | {*given})
        return given


def wait_until(condition: Callable[[], Any]) -> None:
    """Returns when something is so; who begins to wait tells nobody."""
    until = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_answers_are_given_together(threads: Any) -> None:
    served, met = Served(2, {0}), threading.Barrier(3)

    def answer() -> int:
        with served.answers.answering() as state:
            met.wait(LONG)  # nobody leaves before all three are inside
            return state

    assert [future.result(LONG) for future in [threads(answer) for _ in range(3)]] == [1, 1, 1]


def test_neither_waits_while_a_slot_is_spare(threads: Any) -> None:
    served = Served(3, {0, 1})
    old = Block(threads, served.answers.answering).enter()
    assert threads(served.change, 1, {1}).result(LONG) == [2]
    new = Block(threads, served.answers.answering).enter()
    assert (old.value, new.value, served.answers.current) == (1, 2, 2)
    assert served.cleared == [] and not served.answers.drained(0.01)  # what the old one runs on is left alone
    old.leave()
    assert served.answers.drained(LONG) and served.cleared == [0]
    new.leave()
    assert served.change(1, {1}) == [0] and served.cleared == [0, 2]


def test_an_old_answer_keeps_its_state(threads: Any) -> None:
    served = Served(2, {0})
    with served.answers.answering() as state:
        threads(served.change, 1, set()).result(LONG)
        with served.answers.answering() as inner:
            assert state == inner == served.answers.state == 1
        assert served.answers.current == 2 and served.answers.running
    assert served.cleared == [0] and not served.answers.running


def test_a_slot_is_cleared_once_the_last_of_several_old_states_is_done_with_it(threads: Any) -> None:
    served = Served(4, {0, 1})
    first = Block(threads, served.answers.answering).enter()
    served.change(1, {1})  # 2 in the place of 0
    second = Block(threads, served.answers.answering).enter()
    served.change(1, {2})  # 3 in the place of 1
    second.leave()
    assert served.cleared == []  # 1 is of the first answer's state, too
    first.leave()
    assert sorted(served.cleared) == [0, 1]


def test_a_change_waits_for_old_answers_where_no_slot_is_spare_and_new_ones_go_on(threads: Any) -> None:
    served = Served(2, {0})
    old = Block(threads, served.answers.answering).enter()
    served.change(1, set())
    change = threads(served.change, 1, set())
    new = Block(threads, served.answers.answering).enter()  # does not wait
    assert new.value == 2 and not change.done()
    old.leave()
    assert change.result(LONG) == [0]
    new.leave()
    assert served.cleared == [0, 1]


def test_a_change_of_more_than_there_will_ever_be_waits_for_all_and_all_for_it(threads: Any) -> None:
    served = Served(3, {0, 1})
    running = Block(threads, served.answers.answering).enter()
    change = Block(threads, lambda: served.answers.changing(2))
    wait_until(lambda: served.answers._closed)
    late = Block(threads, served.answers.answering)
    assert not late.inside.wait(0.05)  # else answers that follow one another would keep the change out for ever
    running.leave()
    assert change.enter().value == []  # what the state uses may be written over
    assert not late.inside.wait(0.05)
    change.leave()
    late.enter().leave()


def test_a_change_comes_to_its_turn_under_load(threads: Any) -> None:
    served, stop, begun = Served(2, {0, 1}), threading.Event(), threading.Barrier(5)

    def ask() -> int:
        count = 0
        while not stop.is_set():
            with served.answers.answering():
                if not count:
                    begun.wait(LONG)
                count += 1
        return count

    asking = [threads(ask) for _ in range(4)]
    begun.wait(LONG)
    try:
        for _ in range(50):
            with served.answers.changing(1):
                assert served.answers._current.answers == 0
    finally:
        stop.set()
    assert all(future.result(LONG) > 0 for future in asking)


def test_changes_are_made_one_after_the_other(threads: Any) -> None:
    served = Served(3, {0})
    first = Block(threads, lambda: served.answers.changing(1)).enter()
    second = Block(threads, lambda: served.answers.changing(1))
    assert not second.inside.wait(0.05)
    first.leave()
    second.enter().leave()


def test_an_answer_within_an_answer_does_not_wait_for_the_change_that_waits_for_it(threads: Any) -> None:
    served = Served(1, {0})

    def nested() -> None:
        with served.answers.answering(), served.answers.answering():
            pass

    answer = Block(threads, served.answers.answering, within=nested).enter()
    change = Block(threads, lambda: served.answers.changing(1))
    wait_until(lambda: served.answers._closed)
    answer.leave()
    change.enter().leave()


def test_a_change_within_an_answer_is_refused_and_nothing_stays_locked(threads: Any) -> None:
    answers = Served(2, {0}).answers
    with answers.answering():
        for refused in (lambda: answers.changing(1).__enter__(), answers.check_outside, answers.drained):
            with pytest.raises(S3TError, match="An answer cannot change the model that computes it"):
                refused()
        threads(answers.check_outside).result(LONG)  # it is this thread's answer alone
        Block(threads, answers.answering).enter().leave()
    answers.check_outside()
    with answers.changing(1):
        pass


def test_an_old_answer_is_cut_off_after_a_while(threads: Any) -> None:
    served = Served(3, {0}, limit=0.05)
    with served.answers.answering():
        threads(served.change, 1, set()).result(LONG)
        assert served.answers.state == 1  # for now
        time.sleep(0.06)
        with pytest.raises(AnswerCutOffError, match="more than 0.05 seconds ago.*Ask again"):
            _ = served.answers.state
    with served.answers.answering():  # one that obeys the deletion may take as long as it likes
        time.sleep(0.06)
        assert served.answers.state == 2
    assert served.cleared == [0]


def test_a_slot_that_can_not_be_cleared_is_told(threads: Any) -> None:
    served = Served(2, {0})

    def fail(slot: int) -> None:
        raise ZeroDivisionError

    served.answers._clear = fail
    with pytest.raises(ZeroDivisionError):
        served.change(1, set())
    assert served.answers.current == 2 and served.answers.drained(LONG)
    Block(threads, served.answers.answering).enter().leave()


@contextmanager
def failing(block: Callable[[], Any]) -> Iterator[None]:
    with pytest.raises(ZeroDivisionError):
        with block():
            yield
            raise ZeroDivisionError


@pytest.mark.parametrize("slots", [None, 1, 2], ids=["answering", "changing", "changing alone"])
def test_whoever_fails_leaves(slots: int | None, threads: Any) -> None:
    answers = Served(2, {0}).answers
    block = answers.answering if slots is None else lambda: answers.changing(slots)
    with failing(block):
        pass
    assert not answers.running
    Block(threads, answers.answering).enter().leave()
    Block(threads, lambda: answers.changing(1)).enter().leave()
    Block(threads, lambda: answers.changing(2)).enter().leave()  # waits for whoever is still counted


@pytest.mark.parametrize("kind", ["answering", "changing"])
def test_whoever_is_interrupted_while_waiting_waits_no_more(kind: str, threads: Any, request: Any) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let it be ignored in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    answers = Served(1, {0}).answers
    change = lambda: answers.changing(1)  # noqa: E731
    before = Block(threads, change if kind == "answering" else answers.answering).enter()

    def interrupt() -> None:
        if kind == "changing":
            wait_until(lambda: answers._closed)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        threads(interrupt)
        with answers.answering() if kind == "answering" else change():
            pytest.fail("did not wait")
    if kind == "changing":  # nobody has to wait for a change that was given up
        Block(threads, answers.answering).enter().leave()
    before.leave()
    Block(threads, answers.answering).enter().leave()
    Block(threads, change).enter().leave()
