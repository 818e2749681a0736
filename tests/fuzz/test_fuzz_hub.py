"""A Hub whose answers nobody expects: whoever asks it is told so in words of ours, and nothing is written elsewhere."""

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


def status(folder):
    return S3TStore(NAME, state=f"{folder}/.s3t").status().to_json()


WAYS = {
    "status": status,
    "locate": lambda folder: S3TStore(NAME, state=f"{folder}/.s3t").locate(ids=["row-1", "nobody"]),
    "history": lambda folder: S3TStore(NAME).source.places_served(frozenset()),
    "delete": lambda folder: S3TStore(NAME, state=f"{folder}/.s3t").delete(slices=[(0, 0)]),
    "pull": lambda folder: S3TStore(Path("new").resolve()).pull(NAME),
    "push": lambda folder: S3TStore(Path(folder)).push(NAME),
    "purge": lambda folder: S3TStore(NAME, state=f"{folder}/.s3t").purge((), 0.0),
    "recheck": lambda folder: recheck(HubRepo(NAME), asked_for(folder)).to_json(),
}
CHANGING = ("delete", "push", "purge")
ASKED = {
    "status": ("refs", "paths"),
    "locate": ("refs", "paths"),
    "history": ("refs", "commits", "tree"),
    "delete": ("refs", "paths", "commits", "tree", "uploads", "commit", "info"),
    "pull": ("refs", "paths"),
    "push": ("refs", "paths", "info", "tree", "uploads", "commit", "commits"),
    "purge": ("refs", "commits", "tree", "large files", "objects", "info", "discussion"),
    "recheck": ("refs", "info", "large files", "objects"),
}
"""Which lists each way asks for."""


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
        self.server, self.root = server, root
        case = Case(server, new_machine, root / "made")
        self.machine = case.machine
        report = case.purge()["data"]
        for probe in report["probes"]:
            probe["served"] = None
        server.hub.delete(NAME)
        shutil.rmtree(root / "made")
        case = Case(server, new_machine, root / "made")
        shutil.rmtree(root / "made/pushed")
        (root / "made/report.json").write_text(json.dumps(report))
        self.path = server.repository(NAME).path
        self.kept = shutil.copytree(self.path, root / "repository")
        self.folder = Original(root / "made")
        self.outside = Outside(root / "canary")
        self.answers = {}
        self.asked = {way: self.record(way) for way in WAYS}

    def put_back(self):
        shutil.rmtree(self.path)
        shutil.copytree(self.kept, self.path)
        hub = self.server.hub
        hub.repositories[NAME] = Repository(self.path, hub.faults, hub.cas)

    def record(self, way):
        """What a way asks for, with a genuine answer to each."""
        seen = set()

        def note(request, response):
            kind = kind_of(request)
            if kind and response.status_code == 200 and response.body:
                seen.add(kind)
                self.answers.setdefault(kind, json.loads(response.body))
            return response

        self.server.hub.odd = note
        assert self.look(way) is None
        return seen

    def look(self, way):
        self.folder.put_back()
        for name in ("canary.txt", "home"):
            shutil.rmtree(self.root / name, ignore_errors=True)
        self.machine.home = self.root / "home"
        before = sorted(path.name for path in self.root.iterdir())
        try:
            error = self.machine(look, way=way, folder=self.root / "made/store")
        finally:
            self.server.hub.odd, odd = None, self.server.hub.odd
            if way in CHANGING:
                self.put_back()
            self.server.hub.odd = odd
        assert {path.name for path in self.root.iterdir()} <= {*before, "home"}
        self.outside.check()
        return error


@fuzz(60)
def test_a_list(amount, server, new_machine):
    with quick_folder() as root:
        hostile = Hostile(root, server, new_machine)
        print(hostile.asked)
        assert hostile.answers.keys() == LISTS.keys()

        def case(asked, status):
            way, kind, text = asked

            def odd(request, response):
                if kind_of(request) != kind:
                    return response
                return Response(text, status, media_type="application/json")

            hostile.server.hub.odd = odd
            hostile.look(way)

        pairs = [(way, kind) for way, kinds in hostile.asked.items() for kind in sorted(kinds)]
        drawn = st.sampled_from(pairs).flatmap(
            lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), json_texts(hostile.answers[pair[1]]))
        )
        run_cases(amount, case, drawn, st.sampled_from([200, 200, 200, 200, 403, 404, 409]))
