"""Four processes push, delete, repair and pull against one repository, while the Hub fails in every way it can.

Every commit is looked at afterwards: no stage is served that saw what had been deleted by then, none is gone that no
deletion hit, and no deletion is forgotten.
"""

import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hf_s3t import Plan, S3TStore, Stage, StoreError
from hub_server import Faults
from stores import index_of, make_store, stage_adapter

pytest_plugins = ["hub_fixtures"]

PROCESSES = 4
WEIGHTS = "adapter_model.safetensors"
SWITCHES = [
    {"commit_503_after_apply": 1},
    {"fail_commits_412": 2},
    {"page_size": 3},
    {"page_size": 1000, "latency": 0.02},
    {"latency": 0.0, "lfs_filename_missing": True},
    {"stale_main": 3},
]


def make(path):
    """Two shards of two slices; returns who is in which slice, by keyed digest."""
    store = make_store(Path(path), plan=Plan.make(2, 2, [(0, 1), (1, 0)], prune=False))
    return {digest: entry[:2] for digest, entry in index_of(store).items()}


def push(path):
    S3TStore(Path(path)).push("owner/m")


def repair(store, note):
    """Trains what is missing: what a stage holds follows from the examples that it saw."""
    with store.writing():
        manifest, index = store.manifest(), index_of(store)
        stages = dict(manifest.stages)
        for stage in manifest.plan.missing(manifest.stages):
            seen = sorted(digest for digest, entry in index.items() if entry[:2] in stage.slices)
            adapter = stage_adapter(stage)
            for tensor in adapter.tensors.values():
                tensor += random.Random("".join(seen)).random()
            stages[stage] = store.write_stage(stage, adapter)
            note({"sha256": stages[stage][WEIGHTS], "seen": seen})
        store.write_manifest(store.write_root(replace(manifest, stages=stages)))


def work(path, seconds, seed, mine):
    """Does one thing after the other, a deletion and a repair at least, until the time is over; whatever fails cleanly
    is counted and left to the next command."""
    folder, draw, begun = Path(path), random.Random(seed), time.monotonic()
    done = {"push": 0, "delete": 0, "repair": 0, "pull": 0, "refused": 0}
    deleted = []

    def note(line):
        with open(folder.parent / "trained.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    while time.monotonic() - begun < seconds or not deleted or not (folder.parent / "trained.jsonl").exists():
        what = draw.choice(["push", "delete", "repair", "repair", "pull"])
        try:
            store = S3TStore(folder)
            if what == "push":
                store.push("owner/m")
            elif what == "pull":
                store.pull("owner/m")
            elif what == "repair":
                repair(store, note)
                store.push("owner/m")
            elif mine:
                digest = mine.pop()
                there = draw.random() < 0.5
                deleted.append(digest)
                (S3TStore("owner/m", state=store.private) if there else store)._delete({"digests": [digest]})
            done[what] += 1
        except StoreError as error:
            if "committed first" not in str(error):
                raise
            done["refused"] += 1
    return {"done": done, "deleted": deleted}


def settle(path):
    """Brings both sides to the same, as somebody does at the end of the day."""
    store = S3TStore(Path(path))
    store.pull("owner/m")
    store.push("owner/m")
    store.pull("owner/m")
    return store.status().to_json()


def history(repository):
    """Manifest and tombstones of every commit, oldest first."""
    for row in reversed(repository.log()[:-1]):
        entries = repository.entries(row["id"])
        read = {name: json.loads(repository.read(entries[name])) for name in ("s3t.json", "tombstones.json")}
        stages = {name: record["sha256"][WEIGHTS] for name, record in read["s3t.json"]["stages"].items()}
        folders = {path for path, entry in entries.items() if entry.folder and path.count("/") == 1}
        assert folders == set(stages)
        for name, sha256 in stages.items():
            assert entries[f"{name}/{WEIGHTS}"].sha256 == sha256
        stones: dict[str, list[list[int]]] = {}
        for _, digest, _, *place, _ in read["tombstones.json"]["tombstones"]:
            stones.setdefault(digest, []).append(place)
        yield row["title"], read["s3t.json"]["generation"], stages, stones


@pytest.mark.parametrize("seconds", [1, pytest.param(240, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_nothing_deleted_comes_back_and_nothing_live_is_lost(server, new_machine, tmp_path, seconds):
    machines = [new_machine() for _ in range(PROCESSES)]
    folders = [tmp_path / f"m{number}/out" for number in range(PROCESSES)]
    for machine, folder in zip(machines, folders, strict=True):
        machine.begin(make, path=folder)
    places = [machine.end() for machine in machines][0]
    seen = {}
    for file in folders[0].glob(f"shard-*/*/{WEIGHTS}"):
        stage = Stage.from_name(file.parent.relative_to(folders[0]).as_posix())
        sha256 = S3TStore(folders[0]).manifest().stages[stage][WEIGHTS]
        seen[sha256] = {digest for digest, place in places.items() if tuple(place) in stage.slices}
    machines[0](push, path=folders[0])
    draw = random.Random(0)
    digests = sorted(places)
    draw.shuffle(digests)
    for number, machine in enumerate(machines):
        mine = digests[number : 8 * PROCESSES : PROCESSES]
        machine.begin(work, path=folders[number], seconds=seconds, seed=number, mine=mine)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        server.faults.set(**draw.choice(SWITCHES))
        time.sleep(0.3)
    told = [machine.end() for machine in machines]
    vars(server.faults).update(vars(Faults()))
    for machine, folder in [*zip(machines, folders, strict=True)] * 2:
        status = machine(settle, path=folder)
    for folder in folders:
        trained = (folder.parent / "trained.jsonl").read_text().splitlines()
        seen |= {line["sha256"]: set(line["seen"]) for line in map(json.loads, trained)}
    commits = list(history(server.repository("owner/m")))
    before: tuple = (-1, {}, {})
    for title, generation, stages, stones in commits:
        for name, sha256 in stages.items():
            assert not seen[sha256] & stones.keys(), (title, name)
        news = {tuple(place) for digest, at in stones.items() if digest not in before[2] for place in at}
        for name in before[1].keys() - stages.keys():
            assert Stage.from_name(name).slices & news, (title, name)
        assert generation >= before[0] and before[2].keys() <= stones.keys(), title
        before = (generation, stages, stones)
    deleted = {digest for answer in told for digest in answer["deleted"]}
    assert deleted == before[2].keys() and len(deleted) >= PROCESSES
    assert status["interrupted_deletions"] == 0 and len(commits) > 5
    for folder in folders:
        manifest = S3TStore(folder).manifest()
        assert manifest.generation == before[0]
        assert {stage.name: files[WEIGHTS] for stage, files in manifest.stages.items()} == before[1]
