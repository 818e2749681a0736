"""A Hub whose answers nobody expects: whoever asks is told so in words of ours, and nothing is written elsewhere."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import strategies as st
from starlette.responses import Response

import hf_s3t.hub.repo
import hf_s3t.store.sources
from hf_s3t import S3TStore
from hf_s3t.hub.probes import recheck
from hf_s3t.hub.purge_report import PurgeReport
from hf_s3t.hub.repo import HubRepo
from hostile import Original, Outside, bounded, fuzz, json_texts, only_typed, quick_folder, run_cases
from hub_server.repository import Repository
from machines import Machine
from purging import NAME, Case

pytest_plugins = ["hub_fixtures"]

LISTS = {
    "info": r"/api/models/[^/]+/[^/]+(/revision/[^/]+)?",
    "refs": ".*/refs",
    "commits": ".*/commits/[^/]+",
    "tree": ".*/tree/.*",
    "paths": ".*/paths-info/[^/]+",
    "large files": ".*/lfs-files",
    "objects": ".*/info/lfs/objects/batch",
    "uploads": ".*/preupload/[^/]+",
    "commit": ".*/commit/[^/]+",
    "discussion": r".*/discussions/\d+",
}
"""What the Hub is asked for, by the path of the request."""


WAYS = {
    "status": lambda folder: S3TStore(NAME, state=f"{folder}/.s3t").status().to_json(),
    "locate": lambda folder: S3TStore(NAME, state=f"{folder}/.s3t").locate(ids=["row-1", "nobody"]),
    "history": lambda folder: S3TStore(NAME).source.places_served(frozenset()),
    "delete": lambda folder: S3TStore(NAME, state=f"{folder}/.s3t").delete(slices=[(0, 0)]),
    "pull": lambda folder: S3TStore(Path("new").resolve()).pull(NAME),
    "push": lambda folder: S3TStore(Path(folder)).push(NAME),
    "purge": lambda folder: S3TStore(NAME, state=f"{folder}/.s3t").purge((), 0.0),
    "recheck": lambda folder: recheck(HubRepo(NAME), asked_for(folder)).to_json(),
}
CHANGING = ("delete", "push", "purge")

def asked_for(folder):
    """A report of which nothing is known yet."""
    return PurgeReport.from_json(json.loads((Path(folder).parent / "report.json").read_text()))


def look(way, folder):
    """On a machine: one way of using the repository; the error of ours that it ended in."""
    hf_s3t.hub.repo.SETTLING_SECONDS = hf_s3t.store.sources.LONGEST_WAIT = 0.001
    with bounded():
        error = only_typed(lambda: WAYS[way](folder))
    return error and f"{type(error).__name__}: {error}".encode(errors="replace").decode()


def kind_of(request):
    path = request.scope["path"]
    return next((kind for kind, pattern in LISTS.items() if re.fullmatch(pattern, path)), None)


class Hostile:
    """A repository with a deletion, a tag, a branch and a pull request, which is put back before every case."""

    def __init__(self, root, server, new_machine):
        self.hub, self.root = server.hub, root
        case = Case(server, new_machine, root / "made")
        shutil.rmtree(root / "made/pushed")
        self.machine, self.path = case.machine, case.repository.path
        self.kept, made = shutil.copytree(self.path, root / "repository"), Original(root / "made")
        report = case.purge()["data"]
        for probe in report["probes"]:
            probe["served"] = None
        self.put_back()
        made.put_back()
        (root / "made/report.json").write_text(json.dumps(report))
        self.folder, self.outside = Original(root / "made"), Outside(root / "canary")
        self.names = {path.name for path in root.iterdir()} | {"home"}
        self.answers = {}
        self.asked = [(way, kind) for way in WAYS for kind in sorted(self.record(way))]

    def record(self, way):
        """What a way asks for; the longest genuine answer to each is kept."""
        seen = set()

        def note(request, response):
            kind = kind_of(request)
            if kind and response.status_code == 200:
                seen.add(kind)
                self.answers[kind] = max(self.answers.get(kind, b""), response.body, key=len)
            return response

        assert self.look(way, note) is None
        return seen

    def look(self, way, odd):
        """One way, with other answers; the error of ours that it ended in."""
        self.folder.put_back()
        shutil.rmtree(self.root / "home", ignore_errors=True)
        self.machine.home = self.root / "home"  # which knows nothing yet
        self.hub.odd = odd
        try:
            error = self.machine(look, way=way, folder=self.root / "made/store")
        finally:
            self.hub.odd = None
            if way in CHANGING:
                self.put_back()
        assert {path.name for path in self.root.iterdir()} <= self.names
        assert {path.name for path in self.machine.home.iterdir()} <= {"hub", "new", "xet", "hf_s3t"}
        self.outside.check()
        return error

    def put_back(self):
        shutil.rmtree(self.path)
        shutil.copytree(self.kept, self.path)
        self.hub.repositories[NAME] = Repository(self.path, self.hub.faults, self.hub.cas)


@pytest.fixture(scope="module")
def hostile(running):
    made = []

    def new_machine(**how):
        made.append(Machine(running, root / "home", **how))
        return made[-1]

    with quick_folder() as root:
        try:
            yield Hostile(root, running, new_machine)
        finally:
            running.hub.delete(NAME)
            for machine in made:
                machine.stop()


@fuzz(60)
def test_a_list(amount, hostile):
    assert hostile.answers.keys() == LISTS.keys()

    def case(asked, status):
        way, kind, text = asked

        def odd(request, response):
            asked_for = kind_of(request) == kind
            return Response(text, status, media_type="application/json") if asked_for else response

        hostile.look(way, odd)

    lists = {kind: json_texts(json.loads(answer)) for kind, answer in hostile.answers.items()}
    asked = st.sampled_from(hostile.asked).flatmap(lambda pair: st.tuples(*map(st.just, pair), lists[pair[1]]))
    pairs = ("status", "refs"), ("pull", "paths")
    known = [((*pair, b"{}"), status) for pair in pairs for status in (200, 409)]
    run_cases(amount, case, asked, st.sampled_from([200, 200, 200, 200, 403, 404, 409]), first=known)


def with_change(kind, change):
    """Genuine answers, of which one kind is changed."""

    def odd(request, response):
        if kind_of(request) != kind or response.status_code != 200:
            return response
        answer = json.loads(response.body)
        change(answer)
        return Response(json.dumps(answer), media_type="application/json")

    return odd


def of_weights(tree, **changes):
    next(entry for entry in tree if "lfs" in entry)["lfs"].update(changes)


LIES = {
    "a commit that leaves the cache": (
        "status", "refs", lambda refs: [one.update(targetCommit="../../../../beside") for one in refs["branches"]],
        "HubError: .* is no commit",
    ),
    "another commit that leaves it": (
        "delete", "commit", lambda made: made.update(commitOid="../../../../beside"), None,  # it is found in the list
    ),
    "no commits": ("history", "commits", lambda commits: commits.clear(), "HubError: .*there are none"),
    "a size of another kind": ("pull", "paths", lambda paths: paths[0].update(size="1"), "HubError: .*of bytes"),
    "a size below zero": ("pull", "paths", lambda paths: paths[0].update(size=-1), "HubError: .*of bytes"),
    "another file": ("pull", "paths", lambda paths: paths[0].update(path="x"), "StoreError: .*no store"),
    "half a character": ("history", "refs", lambda refs: refs["tags"][0].update(ref="\ud800"), "HubError: .*refs"),
    "what is no sha256": ("purge", "tree", lambda tree: of_weights(tree, oid="x"), "HubError: The purge .*sha256"),
    "a live file by another name": (
        "purge", "large files", lambda files: [one.update(fileOid="x" * 64) for one in files], "CompatibilityError: ",
    ),
    "neither private nor public": (
        "push", "info", lambda info: info.update(private="no"), "HubError: The Hub does not say whether .* is private",
    ),
    "a pull request without a number": (
        "purge", "refs", lambda refs: [ref.update(ref="refs/pr/x") for ref in refs.get("pullRequests", ())],
        "ValueError: refs/pr/x .* cannot be removed from here. Nothing was changed",
    ),
    "an object that is none": ("recheck", "objects", lambda found: found["objects"][0].update(oid={}), None),
    "a code that is none": (
        "recheck", "objects", lambda found: [one.update(error={"code": "\ud800"}) for one in found["objects"]], None,
    ),
    "no info": ("recheck", "info", lambda info: info.clear(), None),
    "no branches": ("recheck", "refs", lambda refs: refs.clear(), None),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_lie(hostile, name):
    way, kind, change, expected = LIES[name]
    error = hostile.look(way, with_change(kind, change))
    assert error is None if expected is None else re.match(expected, error), error
