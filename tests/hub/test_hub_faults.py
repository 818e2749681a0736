"""Faults at every numbered step between a store and a repository: of files, of the database, and of requests.

A kill, a request that is not sent, refused, or carried out unheard, a disk that fails. The head of the repository is
as before or as after, the folder as in `test_faults.py`, nothing deleted is served by either, and what was
interrupted, run again, ends as if it had never been.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from huggingface_hub import HfApi

from hf_s3t import Plan, S3TStore
from hub_server import Server
from hub_server.repository import Repository
from lifecycle import assert_nothing_deleted_is_served, assert_whole, difference, named, picture, without
from machines import Died, Failed, Machine
from seam import DISKS, KILLED, KILLS, Seam, strikes
from stores import make_store, people

pytest_plugins = ["hub_fixtures"]

NAME = "owner/m"
ROWS = people(12)
MEMORY = Path("/dev/shm")

# What the machine is told


def make(root: str) -> None:
    """A store of one shard and two slices, from which somebody was deleted."""
    named("receipt-1")
    store = make_store(Path(root) / "out", ROWS, plan=Plan.make(1, 2, [(0, 1), (1, 0)], prune=False))
    store.export_state(Path(root) / "backup")
    store.delete(ids=["row-0"])


def _push(root: Path) -> None:
    S3TStore(root / "out").push(NAME)


def _pull(root: Path) -> None:
    S3TStore(root / "there").pull(NAME)


def _delete_here(root: Path) -> None:
    S3TStore(root / "out").delete(ids=[_other(root)])


def _delete_there(root: Path) -> None:
    store = S3TStore(NAME, state=root / "out/.s3t")
    if store.locate(ids=[name := _other(root)])[0].found == "live":
        store.delete(ids=[name])
    elif store.source.repo_id is not None:
        with store.writing():
            pass


def _other(root: Path) -> str:
    """Somebody of the other slice than the one that lost somebody."""
    places = {row["id"]: row for row in ROWS}
    known = json.loads((root / "other").read_text()) if (root / "other").exists() else None
    if known is None:
        store = S3TStore(root / "out")
        (gone,) = {place for event in store.manifest().log.values() for place in event.places}
        found = store.locate(ids=list(places))
        known = next(one.asked for one in found if one.found == "live" and one.places[0] != gone)
        (root / "other").write_text(json.dumps(known))
    return known


def _bring(root: Path) -> None:
    """Another folder with the state, and without the files."""
    store = S3TStore(root / "there")
    store.import_state(root / "backup")


def _purge(root: Path) -> None:
    S3TStore(NAME, state=root / "out/.s3t").purge([])


def _refs(root: Path) -> None:
    api = HfApi()
    api.create_tag(NAME, tag="v1")
    api.create_branch(NAME, branch="dev")


@dataclass(frozen=True)
class Operation:
    """What is done, and what was done before it."""

    act: Callable[[Path], Any]
    ready: tuple[Callable[[Path], Any], ...] = ()
    loose: str = "$^"


OPERATIONS = {
    "push": Operation(_push),
    "push a deletion": Operation(_push, (_push, _delete_here)),
    "pull": Operation(_pull, (_push, _bring), loose="there/"),
    "pull a deletion": Operation(_pull, (_push, _bring, _pull, _delete_there), loose="there/"),
    "delete there": Operation(_delete_there, (_push,)),
    "purge": Operation(_purge, (_push, _refs, _delete_there), loose=r"out/\.s3t/purge-"),
}


def prepare(root: str, name: str) -> None:
    named("receipt-2")
    for step in OPERATIONS[name].ready:
        step(Path(root))


def act(root: str, name: str, log: str = "", at: int | None = None, fault: str = "") -> None:
    named("receipt-3")
    if log:
        Seam(Path(log), Path(root), at, fault)
    OPERATIONS[name].act(Path(root))


def look(root: str, name: str) -> None:
    """What holds of the folders and of the repository, before and after whoever comes next."""
    there = Path(root) / "there"
    folders = [S3TStore(path) for path in (Path(root) / "out", there) if S3TStore(path).exists]
    if HfApi().repo_exists(NAME) and S3TStore(NAME).exists:
        folders.append(S3TStore(NAME, state=Path(root) / "out/.s3t"))
    for store in folders:
        assert_nothing_deleted_is_served(store)
    for store in folders:
        with store.writing():
            pass
    for store in folders:
        assert_nothing_deleted_is_served(store)
        assert not store.intents()
        if store.path != there and store.source.repo_id is None:
            assert_whole(store)


# ---- the Hub's side ----


class Life:
    """An operation between a machine and the server: as it begins, and as it ends when nothing befalls it."""

    def __init__(self, name: str, server: Server, machine: Machine, folder: Path):
        self.name, self.operation, self.server, self.machine = name, OPERATIONS[name], server, machine
        self.root, self.ready, self.hub, self.logs = (folder / part for part in ("root", "ready", "hub", "logs"))
        self.logs.mkdir()
        machine(make, root=self.root)
        machine(prepare, root=self.root, name=name)
        self.before = self.picture()
        shutil.copytree(self.root, self.ready)
        if NAME in server.hub.repositories:
            shutil.copytree(server.repository(NAME).path, self.hub)
        self.steps = self.run("first")
        self.machine(look, root=self.root, name=name)
        self.after = self.picture()

    def picture(self) -> dict[str, str]:
        """The folder, and the head of the repository."""
        found = picture(self.root)
        if NAME in self.server.hub.repositories:
            repository = self.server.repository(NAME)
            for path, entry in repository.entries("main").items():
                if not entry.folder:
                    found[f"hub/{path}"] = entry.sha256 or entry.oid
            found["history/refs"] = str(sorted(repository.refs()))
            found["history/large"] = str(sorted(repository.large()))
        return found

    def begin(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.ready, self.root)
        if NAME in self.server.hub.repositories:
            self.server.hub.delete(NAME)
        if self.hub.exists():
            path = self.server.hub.folder / "models" / NAME
            shutil.copytree(self.hub, path)
            self.server.hub.repositories[NAME] = Repository(path, self.server.faults, self.server.hub.cas)

    def run(self, log: str, at: int | None = None, fault: str = "") -> list[str]:
        """Does it, struck or not; the steps that it came to."""
        try:
            self.machine(act, root=self.root, name=self.name, log=self.logs / log, at=at, fault=fault)
            assert fault not in KILLS
        except Died as died:
            assert died.code in KILLED and fault in KILLS
        except Failed as failed:
            typed = ("OSError", "StoreError", "StateError", "HubError", "UnfinishedDeletionError", "HfHubHTTPError")
            assert fault in DISKS and failed.kind in typed, failed
        return (self.logs / log).read_text().splitlines()

    def strike(self, at: int, fault: str) -> None:
        self.begin()
        assert len(self.run("struck", at, fault)) > at
        loose = f"{self.operation.loose}|history/|.*-journal$"
        pictures = (self.picture(), self.before, self.after)
        heads = [{path: sha for path, sha in one.items() if path.startswith("hub/")} for one in pictures]
        assert heads[0] in heads[1:] or not heads[1], difference(*heads)
        self.machine(look, root=self.root, name=self.name)
        found, *expected = (without(loose, one) for one in (self.picture(), self.before, self.after))
        assert all(value in [one.get(key) for one in expected] for key, value in found.items() if "hub/" not in key), (
            difference(found, *expected)
        )
        self.machine(act, root=self.root, name=self.name)
        self.machine(look, root=self.root, name=self.name)
        found, after = (without(r"out/\.s3t/purge-", one) for one in (self.picture(), self.after))
        assert found == after, difference(found, after)


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as place:
        yield Path(place)


@pytest.mark.brief("push", "delete there")
@pytest.mark.parametrize("name", OPERATIONS)
def test_struck_at_some_steps(server: Server, machine: Machine, folder: Path, name: str) -> None:
    life = Life(name, server, machine, folder)
    kills = [strike for strike in strikes(life.steps) if strike[1] in KILLS]
    for strike in (kills[len(kills) // 2], kills[-2]):
        life.strike(*strike)


def test_a_pull_that_is_killed_leaves_no_record_of_what_others_trained(
    server: Server, machine: Machine, folder: Path
) -> None:
    life = Life("pull", server, machine, folder)
    (written,) = [at for at, line in enumerate(life.steps) if line == "replace there/.s3t.json.tmp"]
    life.strike(written, "after")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("faults", [KILLS, DISKS], ids=["kills", "failures"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_befalls_it_at_any_step(
    server: Server, machine: Machine, folder: Path, name: str, faults: tuple[str, ...]
) -> None:
    life = Life(name, server, machine, folder)
    chosen = [strike for strike in strikes(life.steps) if strike[1] in faults]
    for strike in chosen[:: 1 if faults == KILLS else 3]:
        life.strike(*strike)
