"""Kills inside the database: between two statements, and at any time; the next writer completes what is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import stores
from hf_s3t import S3TStore
from hf_s3t.errors import UnfinishedDeletionError
from hf_s3t.store import deletion, schema
from hf_s3t.store.audit import verify
from hf_s3t.store.receipts import read_receipts
from killing import in_child
from stores import Known, make_store, people

PEOPLE = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Known]:
    store = make_store(tmp_path_factory.mktemp("made") / "out", people(PEOPLE), group_column="person")
    store.delete(ids=["row-59"])
    store.export_state(store.path.parent / "backup")
    return store.path, Known.of(store, people(PEOPLE - 1))


def fresh(made, tmp_path: Path) -> S3TStore:
    path = tmp_path / "out"
    shutil.rmtree(path, ignore_errors=True)
    return S3TStore(shutil.copytree(made[0], path))


def at_statement(number: int | None, strike: Callable[[], None]) -> list[str]:
    """Strikes before a statement of the whole process; returns those that were begun, as they are begun."""
    begun: list[str] = []
    connect = schema._connect

    def watched(path):
        connection = connect(path)

        def pass_(statement: str) -> None:
            begun.append(statement)
            if len(begun) - 1 == number:
                strike()

        connection.set_trace_callback(pass_)
        return connection

    schema._connect = watched
    return begun


@pytest.fixture(autouse=True)
def one_name(monkeypatch):
    """Deletions have the same name in every run."""
    monkeypatch.setattr(deletion, "receipt_name", lambda: "receipt-of-the-test")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTS: dict[str, Callable[[S3TStore, Known], object]] = {
    "delete": lambda store, known: store.delete(ids=known.at(0, 1)[:2], reference="the test"),
    "readmit": lambda store, known: store.readmit(ids=["row-59"]),
    "import": lambda store, known: store.import_state(store.path.parent / "backup"),
    "renew": lambda store, known: store._delete({"digests": sorted(known.index)[:3]}, renewed=sorted(known.index)[:2]),
}


def without_receipts(path: Path) -> dict[str, str]:
    """What a store holds. A journal that was never complete is not looked at, as the next change removes it."""
    return {name: d for name, d in stores.without_receipts(path).items() if not name.endswith("-journal")}


def statements_of(act: str, made, tmp_path: Path) -> int:
    log = tmp_path / "statements"

    def run() -> None:
        begun = at_statement(None, kill)
        ACTS[act](fresh(made, tmp_path), made[1])
        log.write_text(str(len(begun)))

    assert in_child(run) == 0
    return int(log.read_text())


@pytest.mark.parametrize(
    ("act", "step"),
    [(act, 9) for act in ACTS] + [pytest.param(act, 1, marks=pytest.mark.slow) for act in ACTS],
)
def test_killed_before_any_statement_it_is_done_or_not(made, tmp_path, act, step):
    shutil.copy(made[0].parent / "backup", tmp_path / "backup")
    before = without_receipts(made[0])
    whole = fresh(made, tmp_path)
    ACTS[act](whole, made[1])
    after, count, kills, outcomes = without_receipts(whole.path), statements_of(act, made, tmp_path), 0, set()
    for number in range(0, count, step):
        store = fresh(made, tmp_path)

        def run(store=store, number=number) -> None:
            at_statement(number, kill)
            ACTS[act](S3TStore(store.path), made[1])

        assert in_child(run) == -signal.SIGKILL
        kills += 1
        with store.writing():
            pass
        found = without_receipts(store.path)
        assert found in (before, after)
        outcomes.add(found == after)
        assert not store.intents() and verify(store).ok
    assert kills >= count // step and (act == "import" or outcomes == {True, False})


def seeds(number: int) -> Iterator[int]:
    return iter(range(number))


@pytest.mark.parametrize("rounds", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_killed_at_any_time_nothing_is_half_done(made, tmp_path, monkeypatch, rounds):
    """The kill comes wherever the process is: also inside of SQLite's own writes."""
    cut_short = 0
    for seed in range(rounds):
        store, draw = fresh(made, tmp_path), random.Random(seed)
        names = draw.sample(sorted(made[1].places), 12)
        told, tell = os.pipe()
        child = os.fork()
        if not child:
            try:
                monkeypatch.undo()
                os.write(tell, b".")
                for name in names:
                    S3TStore(store.path).delete(ids=[name])
                    os.write(tell, b".")
            finally:
                os._exit(0)
        os.close(tell)
        os.read(told, 1)
        began, whole = time.monotonic(), draw.randint(1, 8)
        for _ in range(whole):
            os.read(told, 1)
        time.sleep(draw.uniform(0.0, 1.5) * (time.monotonic() - began) / whole)  # in the next one or the one after it
        os.kill(child, signal.SIGKILL)
        os.close(told)
        cut_short += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with store.writing():
            pass
        assert not store.intents() and verify(store).ok, seed
        found = [location.found for location in store.locate(ids=names)]
        done = found.count("deleted")
        assert found == ["deleted"] * done + ["live"] * (len(names) - done), seed
        hit = {made[1].places[name] for name in names[:done]}
        assert not any(stage.slices & hit for stage in store.manifest().stages), seed
        assert len(read_receipts(store)) == done + 1
    assert cut_short > rounds // 2


# ---- a full disk ----


def limited(monkeypatch, path: Path) -> None:
    """A database that may not grow: SQLite's own answer to a disk that is full."""
    connect = schema._connect

    def full(path):
        connection = connect(path)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(schema, "_connect", full)


def test_a_full_disk_leaves_a_deletion_that_is_obeyed_and_ended_later(made, tmp_path, monkeypatch):
    store = fresh(made, tmp_path)
    names = [name for name, place in made[1].places.items() if place == (0, 1)]
    monkeypatch.undo()
    long = "a reference that needs pages of its own " * 20
    with monkeypatch.context() as patch:
        limited(patch, store.path)
        with pytest.raises(UnfinishedDeletionError, match="not served any more, but is still on the disk") as error:
            for name in [*names, *sorted(made[1].places)]:
                store.delete(ids=[name], reference=long, missing_ok=True)
        assert "No space left" in str(error.value)
        (intent,) = store.intents()
        assert not any(stage.slices & intent["places"] for stage in store.live().stages)
    with store.writing():
        pass
    assert not store.intents() and verify(store).ok
