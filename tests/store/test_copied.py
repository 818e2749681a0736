"""A store in odd hands: copied while it changes, written by two, looked at where nothing may be written, its clock set
back."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import seam
from hf_s3t import S3TStore, StoreError
from hf_s3t.errors import StoreLockedError
from hf_s3t.serving.loading import read_members
from hf_s3t.store import deletion, lost_state, tombstones
from hf_s3t.store.audit import verify
from hf_s3t.store.receipts import read_receipts
from lifecycle import PLAN, ROWS, assert_nothing_deleted_is_served, assert_whole, picture, tables_of
from seam import Seam, struck
from stores import KEY, RECEIPTS, Known, make_store

NOBODY = 65534
TOLD = ("records", "receipts", "about")
"""Tables that only tell what was done: no promise on who is served or trained depends on them."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Known]:
    store = make_store(tmp_path_factory.mktemp("made") / "out", ROWS, plan=PLAN, group_column="person")
    return store.path, Known.of(store, ROWS)


@pytest.fixture
def store(made: tuple[Path, Known], tmp_path: Path) -> S3TStore:
    return S3TStore(shutil.copytree(made[0], tmp_path / "out"))


# ---- copied while it changes ----


def snapshots(store: S3TStore, folder: Path, act: str, **asked: object) -> list[Path]:
    """The store as it is on the disk at every step of a change."""
    found: list[Path] = []

    class Watching(Seam):
        def _begin(self, *args: object) -> int:  # type: ignore[override]
            with self._alone():
                copy = folder / f"{len(os.listdir(folder)):03d}"
                shutil.copytree(self.root, copy, ignore=shutil.ignore_patterns("*.lock", "*.holder"))
            return super()._begin(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seam, "Seam", Watching)
        folder.mkdir()
        outcome = struck(lambda: getattr(S3TStore(store.path), act)(**asked), folder.with_name("log"), store.path)
    assert not outcome.kind, outcome.trace
    found = sorted(folder.iterdir())
    shutil.copytree(store.path, folder / "end")
    return [*found, folder / "end"]


def test_a_copy_of_parts_of_different_times_never_serves_what_it_knows_to_be_deleted(
    store: S3TStore, made: tuple[Path, Known], tmp_path: Path
) -> None:
    """What copies a store reads one file after the other: the state may be of another time than the rest."""
    names = made[1].at(0, 1)[:1]
    times = snapshots(store, tmp_path / "times", "delete", ids=names)
    assert len(times) > 40
    told, newer = 0, 0
    for first in range(0, len(times), 4):
        for state, files in ((times[first], times[-1]), (times[-1], times[first])):
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(files, copy, ignore=shutil.ignore_patterns(".s3t"))
            shutil.copytree(state / ".s3t", copy / ".s3t")
            opened = S3TStore(copy)
            newer += len(opened.manifest().log) == 0 and not opened.intents() and files is times[first]
            try:
                assert_nothing_deleted_is_served(opened)
            except StoreError as error:
                told += 1
                assert "Restore it from a backup" in str(error)
            if files is not times[first]:
                continue
            with opened.writing():  # the state is whole: the next writer brings the rest up to it
                pass
            assert_nothing_deleted_is_served(opened)
            assert_whole(opened)
            assert opened.locate(ids=names)[0].found == "deleted"
    assert newer > 3 and told == 0


def test_a_state_that_was_copied_while_it_was_written_is_whole_or_damaged(
    store: S3TStore, made: tuple[Path, Known], tmp_path: Path
) -> None:
    """Halves of a database of two times, without its journal: nobody is told that it is whole."""
    names = sorted(made[1].places)[:6]
    times = snapshots(store, tmp_path / "times", "delete", ids=names)
    old, new = (path / ".s3t/state.sqlite" for path in (times[0], times[-1]))
    before, after = old.read_bytes(), new.read_bytes()
    pages = min(len(before), len(after)) // 4096
    assert pages > 3
    torn = told = 0
    for page in range(1, pages):
        for first, second in ((before, after), (after, before)):
            mixed = first[: page * 4096] + second[page * 4096 :]
            if mixed in (before, after):
                continue
            torn += 1
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(times[-1], copy)
            (copy / ".s3t/state.sqlite").write_bytes(mixed)
            opened = S3TStore(copy)
            assert set(read_members(opened)) == {f"shard-{shard:02d}" for shard in opened.served()}
            assert not any({made[1].places[name] for name in names} & stage.slices for stage in opened.live().stages)
            whole = verify(opened).ok
            found, expected = (
                {name: rows for name, rows in (tables_of(file) or {}).items() if name not in TOLD}
                for file in (opened.database, new)
            )
            assert not whole or found == expected, {k for k in expected if found.get(k) != expected[k]}
            told += not whole
    assert torn >= told > 3


# ---- two that write ----


def test_one_that_is_killed_with_the_lock_lets_the_other_in_which_ends_it(
    store: S3TStore, made: tuple[Path, Known]
) -> None:
    name, other = made[1].at(0, 1)[0], made[1].at(1, 0)[0]
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:

        def wait(*_: object) -> None:
            os.write(tell, b".")
            signal.pause()

        deletion.carry_out = wait
        S3TStore(store.path).delete(ids=[name])
        os._exit(0)
    try:
        assert os.read(told, 1) == b"."
        held = pytest.raises(StoreLockedError, match=f"held by process {child} on .* stopped process gives the lock")
        with held, S3TStore(store.path).writing(timeout=0.2):
            pass
        assert_nothing_deleted_is_served(store)  # readers wait for nobody
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    receipt = store.delete(ids=[other])
    assert receipt.status == "inactive" and not store.intents()
    assert [found.found for found in store.locate(ids=[name, other])] == ["deleted", "deleted"]
    assert len(read_receipts(store)) == 2
    assert_whole(store)


# ---- where nothing may be written ----


@contextmanager
def bound(path: Path) -> Iterator[None]:
    """As a user whom file modes bind, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("way", ["modes", "file system"])
def test_where_nothing_may_be_written_a_store_is_read_and_a_writer_told(
    made: tuple[Path, Known], way: str, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(made[0], Path(folder) / "out"))
        Path(folder).chmod(0o755)
        for file in (path, *path.rglob("*")):
            if os.geteuid() == 0:
                os.chown(file, NOBODY, NOBODY)
            file.chmod(file.stat().st_mode & ~0o222 if way == "modes" else file.stat().st_mode)

        def look() -> None:
            store = S3TStore(path, KEY)
            before = picture(path)
            assert store.status().served and store.locate(ids=["row-1"])[0].found == "live" and verify(store).ok
            assert_nothing_deleted_is_served(store)
            for write in (lambda: store.delete(ids=["row-1"]), lambda: store.export_state(tmp_path / "backup")):
                with pytest.raises(StoreError, match="may not be written .*Nothing was changed.*Make it writable"):
                    write()
            assert picture(path) == before

        if way == "modes":
            with bound(path):
                look()
        else:
            outcome = struck(look, tmp_path / "log", path, 0, "EROFS")
            assert outcome.kind == "", outcome.trace
        for file in (path, *path.rglob("*")):
            file.chmod(0o755)


# ---- a clock that goes back ----


@pytest.mark.parametrize("days", [-4000, 4000])
def test_no_order_is_taken_from_a_clock(
    store: S3TStore, made: tuple[Path, Known], monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Each look at it is earlier (later) by years: what is served, obeyed and lifted is the same."""
    now = [datetime.datetime(2060, 1, 1, tzinfo=datetime.UTC)]

    def moved() -> str:
        now[0] += datetime.timedelta(days=days / 10)
        return now[0].isoformat(timespec="milliseconds")

    twin = S3TStore(shutil.copytree(store.path, store.path.with_name("twin")))
    for one in (twin, store):
        if one is store:
            for module in ("deletion", "lost_state", "state_backup"):
                monkeypatch.setattr(f"hf_s3t.store.{module}.utc_now", moved)
        names = iter(range(9))
        for module in (deletion, lost_state, tombstones):
            monkeypatch.setattr(module, "receipt_name", lambda names=names: f"receipt-{next(names)}")
        one.delete(ids=made[1].at(0, 1)[:1], reference="first")
        one.export_state(one.path.with_name("backup"))
        one.delete(ids=made[1].at(0, 1)[1:2], reference="second")
        one.readmit(ids=made[1].at(0, 1)[:1])
        assert one.delete(ids=made[1].at(0, 1)[1:2]).status == "unchanged"
        one.import_state(one.path.with_name("backup"))  # an older backup forgets nothing
        assert_nothing_deleted_is_served(one)
        assert_whole(one)
        assert [receipt["receipt"] for receipt in read_receipts(one)] == [f"receipt-{n}" for n in range(4)]
    assert without_receipts(store.path) == without_receipts(twin.path)


def without_receipts(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """All that is in a store but its receipts, which have times and salts, and their digests."""
    manifest = json.loads((path / "s3t.json").read_bytes())
    for event in manifest["log"].values():
        event.pop("receipts", None)
    return {name: told for name, told in picture(path).items() if name not in (RECEIPTS, "s3t.json")}, manifest
