"""Faults at every numbered step of a store's life: a kill, a full disk, one that fails, one that may only be read.

After each the store opens and is as before or as after, nothing deleted is served, nothing else is lost, and what was
interrupted, run again, ends as if it had never been. What is looked at is `lifecycle.check`'s; training is in
`promises/test_promises_crash.py`, push, pull and purge in `hub/test_hub_faults.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from lifecycle import OPERATIONS, Operation, check, make_root, named, open_store, picture, unnamed, without
from seam import DISKS, KILLS, strikes, struck
from stores import Known


@dataclass
class Life:
    """The stores of one operation: as it begins, and as it ends when nothing befalls it."""

    operation: Operation
    made: Path
    known: Known
    folder: Path
    root: Path

    @cached_property
    def steps(self) -> list[str]:
        """The steps of the operation; they are the same every time."""
        self.begin(self.made)
        named("receipt-2")
        self.operation.ready(self.root, self.known)
        named("receipt-3")
        self.before = picture(self.root)
        shutil.copytree(self.root, self.folder / "ready")
        log = self.folder / "steps"
        outcome = struck(lambda: self.operation.act(self.root, self.known), log, self.root)
        assert not outcome.kind, outcome.trace
        with open_store(self.root).writing():
            pass
        self.after = picture(self.root)
        return log.read_text().splitlines()

    def begin(self, made: Path) -> None:
        """Puts a store where it is known to be: exports are on record by their paths."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(made, self.root)

    def strike(self, at: int, fault: str) -> bool:
        """Strikes once and looks; returns whether the operation was done all the same."""
        self.begin(self.folder / "ready")
        log = self.folder / "struck"
        outcome = struck(lambda: self.operation.act(self.root, self.known), log, self.root, at, fault)
        assert outcome.killed == (fault in KILLS)
        assert log.read_text().splitlines()[: at + 1] == self.steps[: at + 1]
        return check(self.operation, self.root, self.known, self.before, self.after, outcome)


ENDED_BY_ANY_WRITER = ("finish a deletion", "obey the state")
MEMORY = Path("/dev/shm")
"""Where SQLite need not wait for a disk, which no test takes the power from."""


@pytest.fixture(scope="module")
def lives() -> Iterator[dict[str, Life]]:
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as place:
        folder = Path(place)
        named("receipt-1")
        known = make_root(folder / "root")
        shutil.copytree(folder / "root", folder / "made")
        unnamed()
        yield {
            name: Life(operation, folder / "made", known, folder / f"life-{number}", folder / "root")
            for number, (name, operation) in enumerate(OPERATIONS.items())
        }


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    """What `named` sets is taken back."""
    named("receipt-3")
    yield
    unnamed()


def every(step: int, life: Life, faults: tuple[str, ...]) -> list[tuple[int, str]]:
    found = [strike for strike in strikes(life.steps) if strike[1] in faults]
    return found[step // 2 :: step]


@pytest.mark.parametrize("name", OPERATIONS)
def test_struck_at_some_steps_it_is_as_before_or_as_after(lives: dict[str, Life], name: str) -> None:
    """Of every operation two steps or more; `slow` strikes at each of them."""
    life = lives[name]
    kills, failures = every(max(len(life.steps) // 2, 1), life, KILLS), every(150, life, DISKS)
    assert len(kills) >= 2
    for strike in kills + failures:
        life.strike(*strike)


def begun(life: Life, kind: str, part: str) -> int:
    """Number of the first step of a kind that is about some file."""
    return next(at for at, line in enumerate(life.steps) if line.startswith(f"{kind} ") and part in line)


def test_what_failed_is_told_where_the_disk_cannot_be_written_any_more(lives: dict[str, Life]) -> None:
    """Nor can the name of the lock's holder be removed then, which is nothing."""
    life = lives["delete"]
    at = begun(life, "create", ".s3t.json.tmp")
    life.begin(life.folder / "ready")
    outcome = struck(lambda: life.operation.act(life.root, life.known), life.folder / "struck", life.root, at, "EROFS")
    assert outcome.kind == "UnfinishedDeletionError" and "Read-only file system" in outcome.message


@pytest.mark.parametrize("kind", ["write", "fsync", "unlink"])
def test_a_move_of_the_key_that_was_interrupted_is_ended_and_never_loses_it(lives: dict[str, Life], kind: str) -> None:
    life = lives["move the key"]
    at = begun(life, kind, "key") if kind != "unlink" else begun(life, kind, "partition.key") + 1
    life.begin(life.folder / "ready")
    struck(lambda: life.operation.act(life.root, life.known), life.folder / "struck", life.root, at, "before")
    key = (life.folder / "ready/out/.s3t/partition.key").read_text()
    there = [file for file in (life.root / "key", life.root / "out/.s3t/partition.key") if file.exists()]
    assert key in [file.read_text() for file in there]
    open_store(life.root).move_key(life.root / "key")
    assert (life.root / "key").read_text() == key and not (life.root / "out/.s3t/partition.key").exists()
    assert (life.root / "key").stat().st_mode & 0o777 == 0o600


def test_an_export_is_whole_or_absent(lives: dict[str, Life]) -> None:
    life = lives["export"]
    number = sum("new" in line for line in life.steps)
    assert number > 5
    for at in [at for at, line in enumerate(life.steps) if "new" in line]:
        life.begin(life.folder / "ready")
        struck(lambda: life.operation.act(life.root, life.known), life.folder / "struck", life.root, at, "before")
        names = {file.name for file in (life.root / "new").glob("*")}
        assert names in (set(), {"adapter_config.json", "adapter_model.safetensors"})


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("faults", [KILLS, *((fault,) for fault in DISKS)], ids=["kills", *DISKS])
@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_befalls_it_at_any_step(lives: dict[str, Life], name: str, faults: tuple[str, ...]) -> None:
    life = lives[name]
    outcomes = [life.strike(*strike) for strike in every(1, life, faults)]
    assert len(outcomes) >= len(life.steps) // 3
    same = without(life.operation.loose, life.before) == without(life.operation.loose, life.after)
    ends = {True} if name in ENDED_BY_ANY_WRITER else {True, False}
    assert faults != KILLS or same or set(outcomes) == ends
