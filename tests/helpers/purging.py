"""What the tests of a purge do to a repository, on a machine, and how they look at what is left."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url, snapshot_download
from huggingface_hub.utils import build_hf_headers, get_session

from hf_s3t import Plan, S3TStore
from hf_s3t.hub.probes import recheck
from hf_s3t.hub.purge_report import PurgeReport
from hf_s3t.hub.repo import HubRepo
from hf_s3t.plan.sequences import cyclic
from hub_server import Server
from machines import Machine
from stores import make_store

NAME = "owner/model"
WEIGHTS = "adapter_model.safetensors"
REMOVED = ("shard-00/0-1", "shard-00/1", "shard-00/1-0")
"""Stages that go with slice 1."""


def pushed(folder: str, name: str, private: bool = True) -> dict[str, str]:
    """A store of one shard and two slices, pushed; the sha256 of every file of a stage."""
    store = make_store(folder, plan=Plan.make(1, 2, cyclic(2, 2), prune=False))
    store.push(name, private=private)
    return {
        f"{stage.name}/{file}": sha for stage, files in store.manifest().stages.items() for file, sha in files.items()
    }


def refs(name: str) -> None:
    """A tag, a branch and an open pull request, all with every stage."""
    api = HfApi()
    api.create_tag(name, tag="v1")
    api.create_branch(name, branch="dev")
    api.create_commit(name, [CommitOperationAdd("proposed.txt", b"new")], commit_message="propose", create_pr=True)


def delete(name: str, folder: str, **how: Any) -> dict[str, Any]:
    """Deletes slice 1; the receipt."""
    return S3TStore(name, state=f"{folder}/.s3t").delete(slices=[(0, 1)], **how).to_json()


def purge(name: str, folder: str, keep_refs: list[str] | None = (), seconds: float = 20.0) -> dict[str, Any]:
    """The report, with what its class says of it."""
    report = S3TStore(name, state=f"{folder}/.s3t").purge(keep_refs, seconds)
    data = report.to_json()
    assert PurgeReport.from_json(data) == report
    pending = [[probe.way, probe.at.split("?")[0], probe.answer] for probe in report.pending]
    plain = [probe.at for probe in report.plain_files]
    said = {"text": report.to_text(), "pending": pending, "plain": plain, "still_served_at": report.still_served_at}
    return {"data": data, **said}


def again(data: dict[str, Any], seconds: float = 0.0, endpoint: str | None = None) -> dict[str, Any]:
    """Rechecks a report."""
    repo = HubRepo(data["repo"])
    repo.api.endpoint = endpoint or repo.api.endpoint
    return recheck(repo, PurgeReport.from_json(data), seconds).to_json()


def refused(name: str, folder: str, keep_refs: list[str] | None = ()) -> list[str]:
    """The error of a purge."""
    try:
        S3TStore(name, state=f"{folder}/.s3t").purge(keep_refs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("it was not refused")


# What is left, for a client that knows nothing


def look(
    name: str, revisions: list[str] = (), paths: list[str] = (), oids: list[str] = (), all_of: str = ""
) -> list[Any]:
    """The status of every path at every revision with redirects followed, the contents that the large-file storage
    gives out by their sha256, and the sha256 of every file of a revision."""
    answers: dict[str, list[int]] = {}
    for revision in revisions:
        for path in paths:
            url = hf_hub_url(name, path, revision=revision)
            got = get_session().get(url, headers=build_hf_headers(), follow_redirects=True)
            answers.setdefault(revision, []).append(got.status_code)
    body = {"operation": "download", "transfers": ["basic"], "objects": [{"oid": oid, "size": 1} for oid in oids]}
    url = f"{HfApi().endpoint}/{name}.git/info/lfs/objects/batch"
    got = get_session().post(url, json=body, headers=build_hf_headers()).json()
    found = {}
    if all_of:
        folder = Path(snapshot_download(name, revision=all_of))
        files = [path for path in folder.rglob("*") if path.is_file()]
        found = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return [answers, [thing["oid"] for thing in got["objects"] if "actions" in thing], found]


class Case:
    """A repository with a deletion that is not purged yet."""

    def __init__(
        self, server: Server, new_machine: Callable[..., Machine], tmp: Path, name: str = NAME, *,
        others: bool = True, xet: bool = False, **faults: Any,
    ):  # fmt: skip
        self.server, self.new_machine, self.xet, self.tmp, self.name = server, new_machine, xet, tmp, name
        self.folder, self.machine = str(tmp / "store"), new_machine(xet=xet)
        self.before = self.machine(pushed, folder=self.folder, name=name)
        self.pushed = shutil.copytree(self.folder, tmp / "pushed")  # the folder itself obeys the deletion, too
        if others:
            self.machine(refs, name=name)
        server.faults.set(**{key: value for key, value in faults.items() if key == "gc"})
        self.receipt = self.machine(delete, name=name, folder=self.folder)
        self.repository = server.repository(name)
        self.old = [revision for revision in self.history() if self.holds(revision)]
        server.faults.set(**faults)

    def history(self) -> list[str]:
        """Every ref, and every commit that one leads to."""
        found = list(self.repository.refs())
        return [*found, *dict.fromkeys(row["id"] for ref in found for row in self.repository.log(ref))]

    def holds(self, revision: str) -> bool:
        """Whether a revision has a removed stage."""
        return REMOVED[0] in self.repository.entries(revision)

    def oids(self) -> dict[str, str]:
        """sha256 of the removed weights, by path."""
        return {path: sha for path, sha in self.before.items() if path.endswith(WEIGHTS) and path.startswith(REMOVED)}

    def cold(self, **arguments: Any) -> Any:
        """Looks as a client without any cache."""
        return self.new_machine()(look, name=self.name, **arguments)

    def purge(self, **how: Any) -> dict[str, Any]:
        return self.machine(purge, name=self.name, folder=self.folder, **how)

    def check_gone(self) -> None:
        """No old revision and no sha256 gives a removed weight out, and every kept stage is what it was."""
        paths, oids = [*self.oids(), WEIGHTS], [*self.oids().values()]
        answers, given_out, files = self.cold(revisions=self.old, paths=paths, oids=oids, all_of="main")
        assert {status for statuses in answers.values() for status in statuses} == {404}, answers
        assert given_out == [] and not self.repository.large() & set(oids)
        self.check_kept(files)

    def check_kept(self, files: dict[str, str]) -> None:
        kept = {path: sha for path, sha in self.before.items() if not path.startswith(REMOVED)}
        assert {path: files[path] for path in kept} == kept and WEIGHTS in files
        assert not [path for path in files if path.startswith(REMOVED)]

    def clone(self) -> tuple[int, str]:
        """Commits and files of a fresh `git clone`."""
        address = self.server.endpoint.replace("//", f"//owner:{self.server.token}@") + f"/{self.name}"
        environment = dict(os.environ) | {
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "NO_PROXY": "127.0.0.1",
        }

        def git(*arguments: str) -> str:
            return subprocess.run(
                ["git", *arguments], env=environment, capture_output=True, text=True, check=True
            ).stdout

        target = str(self.tmp / f"clone{len(list(self.tmp.glob('clone*')))}")
        git("clone", "--quiet", address, target)
        everything = git("-C", target, "log", "--all", "--name-only", "--format=")
        return int(git("-C", target, "rev-list", "--count", "--all")), everything
