"""Purging a repository's history of what its head does not serve, and an honest report of what was seen afterwards.

A commit that removes a file leaves it in every older revision. A purge removes the refs that lead to those, squashes
the branches that stay, deletes large files by the difference of two sets of contents (everything stored, less what a
kept branch serves), and then asks again, for every removed content and every way that led to it. It reports what was
seen and when; what the Hub keeps behind its interface nobody outside can see.
"""

from __future__ import annotations

import datetime
import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

from huggingface_hub import scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE, HF_XET_CACHE
from huggingface_hub.utils import get_session, hf_raise_for_status
from huggingface_hub.utils._pagination import paginate

from .errors import StoreError
from .hub import HubRepo

logger = logging.getLogger(__name__)

SECONDS = 180.0
"""How long a purge is waited for before what it did not reach counts as pending."""

OUT_OF_REACH = (
    "Clones, downloads and caches of others, duplicates of the repository, and runtimes that loaded an adapter.",
    "What the Hub's storage keeps until its garbage is collected: no time is published for it.",
    "Copies at the edge of the Hub's delivery network, for as long as they live there.",
    "Pages of closed pull requests, which keep showing the differences of text files.",
)
NOT_PROBED = (
    "Blocks of Xet storage: an answer that a file is gone does not prove that its blocks are.",
    "Revisions that no ref led to when the purge began.",
)


@dataclass(frozen=True)
class Probe:
    """One way to a removed content, and what it answered.

    Args:
        oid (`str`): sha256 of the content.
        way (`str`): `"revision"`, `"object"` (by its sha256), `"listing"`, `"address"` (one that was handed out
            before), or `"plain file"` (kept by git itself, which no purge of large files removes).
        at (`str`): revision and path, or address.
        answer (`str`): what came back.
        served (`bool`, *optional*): whether the content, or its name, is still there; `None`: not known yet.
        seen_at (`str`): UTC time.
    """

    oid: str
    way: str
    at: str
    answer: str = ""
    served: bool | None = None
    seen_at: str = ""


@dataclass(frozen=True)
class PurgeReport:
    """What a purge removed, what was seen afterwards, and what can not be seen.

    Args:
        status (`str`): `"no_longer_served"`: every probe said so; `"pending"`: some did not, ask again later.
        removed (`dict[str, list[str]]`): sha256 of each removed content -> the paths that it had.
        refs_removed, refs_kept (`list[str]`): names of branches, tags and pull requests.
        probes (`list[Probe]`): the last answer of every probe.
        caches_cleared (`list[str]`): files and folders of this machine.
    """

    repo: str
    status: str
    began_at: str
    ended_at: str
    head: str
    removed: dict[str, list[str]] = field(default_factory=dict)
    refs_removed: list[str] = field(default_factory=list)
    refs_kept: list[str] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    caches_cleared: list[str] = field(default_factory=list)
    not_probed: tuple[str, ...] = NOT_PROBED
    out_of_reach: tuple[str, ...] = OUT_OF_REACH

    @property
    def pending(self) -> list[Probe]:
        """Probes that still found something, or could not be made."""
        return [probe for probe in self.probes if probe.served is not False]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PurgeReport:
        """Reads a report that [`to_json`] gave."""
        try:
            probes = [Probe(**probe) for probe in data["probes"]]
            return cls(**{**data, "probes": probes, "not_probed": tuple(data["not_probed"]),
                          "out_of_reach": tuple(data["out_of_reach"])})  # fmt: skip
        except (KeyError, TypeError) as error:
            raise StoreError(f"This is no purge report: {error!r}. Give the JSON file that a purge wrote.") from None

    def to_text(self) -> str:
        """A page for a person."""
        lines = [
            f"Purge of {self.repo}: {self.status.replace('_', ' ')}",
            f"from {self.began_at} to {self.ended_at}; head {self.head}",
            "",
            f"{len(self.removed)} contents removed:",
            *(f"  {oid[:16]}  {', '.join(paths) or 'no name known'}" for oid, paths in sorted(self.removed.items())),
            "",
            f"refs removed: {', '.join(self.refs_removed) or 'none'}",
            f"refs kept: {', '.join(self.refs_kept) or 'none'}",
            "",
            f"{len(self.probes)} probes, {len(self.pending)} of them pending:",
            *(f"  {probe.way} {probe.at}: {probe.answer} ({probe.seen_at})" for probe in self.pending),
            "",
            "Not probed:",
            *(f"  - {line}" for line in self.not_probed),
            "Out of reach:",
            *(f"  - {line}" for line in self.out_of_reach),
        ]
        return "\n".join(lines) + "\n"


def purge(
    repo: HubRepo, keep_refs: Iterable[str] | None = None, seconds: float = SECONDS, protected: Iterable[str] = ()
) -> PurgeReport:
    """Removes from a repository's history what its kept branches do not serve.

    Args:
        repo ([`HubRepo`]): its own branch is always kept.
        keep_refs (`Iterable[str]`, *optional*): other refs to keep: `"dev"`, `"refs/tags/v1"`, `"refs/pr/1"`. `None`:
            refuse if there are others. Branches that are kept are squashed; tags and pull requests can not be, and
            keep serving what they contain.
        seconds (`float`): how long to wait for the Hub to settle.
        protected (`Iterable[str]`): sha256 of contents that must stay.

    Raises:
        StoreError: there are other refs, and nobody said what to do with them (nothing was changed), or something
            protected would go (nothing was purged).
    """
    began = _now()
    kept, dropped = _sort_refs(repo, keep_refs)
    ways = _ways(repo, [*kept, *dropped])
    live = {oid for ref in kept if not _is_fixed(ref) for oid in _large(repo, ref).values()}
    gone = {way.oid for way in ways if way.way == "revision"} - live
    addresses = [Probe(oid, "address", address) for oid, address in _addresses(repo, ways, gone).items()]
    for ref in dropped:
        _drop_ref(repo, ref)
    for ref in kept:
        if not _is_fixed(ref):
            repo.api.super_squash_history(
                repo.repo_id, branch=ref.removeprefix("refs/heads/"), commit_message="Squash"
            )
    unwanted = set(_stored(repo)) - live
    if unwanted & set(protected):
        raise StoreError(
            f"A purge of {repo.repo_id} would remove what its manifest lists as live. Nothing was purged."
        )
    doomed: list[Any] = [SimpleNamespace(file_oid=oid) for oid in sorted(unwanted)]
    repo.api.permanently_delete_lfs_files(repo.repo_id, doomed)
    gone |= unwanted
    removed = {oid: sorted({way.at.split(":", 1)[1] for way in ways if way.oid == oid and way.way == "revision"})
               for oid in sorted(gone)}  # fmt: skip
    probes = [way for way in ways if way.oid in gone or way.way == "plain file"] + addresses
    probes += [Probe(oid, way, oid) for oid in sorted(gone) for way in ("object", "listing")]
    report = PurgeReport(
        repo.repo_id, "pending", began, began, "", removed, dropped, kept, probes,
        caches_cleared=clear_caches(repo.repo_id, _old_revisions(ways)),
    )  # fmt: skip
    return recheck(repo, report, seconds)


def recheck(repo: HubRepo, report: PurgeReport, seconds: float = 0.0) -> PurgeReport:
    """Asks again for what a report has as pending, until nothing is or the time is over."""
    deadline, pause = time.monotonic() + seconds, 0.2
    while True:
        report = _probed(repo, report)
        if not report.pending or time.monotonic() + pause > deadline:
            return report
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def _probed(repo: HubRepo, report: PurgeReport) -> PurgeReport:
    stored = set(_stored(repo))
    probes = [probe if probe.served is False else _probe(repo, probe, stored) for probe in report.probes]
    info = repo.info()
    report = replace(report, probes=probes, head=info.sha if info else "", ended_at=_now())
    return replace(report, status="pending" if report.pending else "no_longer_served")


# ---- refs ----


def _sort_refs(repo: HubRepo, keep_refs: Iterable[str] | None) -> tuple[list[str], list[str]]:
    found = repo.api.list_repo_refs(repo.repo_id, include_pull_requests=True)
    refs = [ref.ref for ref in (*found.branches, *found.tags, *(found.pull_requests or ()), *found.converts)]
    own = f"refs/heads/{repo.branch}"
    others = [ref for ref in refs if ref != own]
    if keep_refs is None and others:
        raise StoreError(
            f"{repo.repo_id} has other refs, whose history may serve what is to be purged: "
            f"{', '.join(others)}. "
            "Nothing was changed. Say which ones to keep (`keep_refs=[...]`, `--keep-ref`); the others are removed."
        )
    wanted = {ref if ref.startswith("refs/") else f"refs/heads/{ref}" for ref in keep_refs or ()}
    unknown = wanted - set(refs)
    if unknown:
        raise StoreError(f"{repo.repo_id} has no {', '.join(sorted(unknown))}; it has {', '.join(refs)}.")
    return [own, *(ref for ref in others if ref in wanted)], [ref for ref in others if ref not in wanted]


def _is_fixed(ref: str) -> bool:
    return not ref.startswith("refs/heads/")


def _drop_ref(repo: HubRepo, ref: str) -> None:
    api, name = repo.api, repo.repo_id
    if ref.startswith("refs/heads/"):
        api.delete_branch(name, branch=ref.removeprefix("refs/heads/"))
    elif ref.startswith("refs/tags/"):
        api.delete_tag(name, tag=ref.removeprefix("refs/tags/"))
    elif ref.startswith("refs/pr/"):
        number = int(ref.removeprefix("refs/pr/"))
        if api.get_discussion_details(name, number).status == "open":
            api.change_discussion_status(name, number, "closed")
        # The client has no method for this one.
        url = f"{api.endpoint}/api/models/{name}/discussions/{number}/ref"
        hf_raise_for_status(get_session().delete(url, headers=api._build_hf_headers()))
    else:
        raise StoreError(f"{ref} of {name} can not be removed from here. Remove it on the Hub, then purge again.")


# ---- ways to a content ----


def _large(repo: HubRepo, revision: str) -> dict[str, str]:
    """Paths of the large files of a revision -> sha256."""
    tree = repo.tree(revision)
    return {path: entry.lfs.sha256 for path, entry in tree.items() if entry.lfs is not None}


def _ways(repo: HubRepo, refs: Sequence[str]) -> list[Probe]:
    """Every revision and path by which a file can be asked for today: large ones, and plain ones inside a folder."""
    ways, seen = {}, set()
    for ref in refs:
        commits = [commit.commit_id for commit in repo.api.list_repo_commits(repo.repo_id, revision=ref)]
        for revision in [ref, *commits]:
            if revision in seen:
                continue
            seen.add(revision)
            for path, entry in repo.tree(revision).items():
                if entry.lfs is not None:
                    ways[revision, path] = Probe(entry.lfs.sha256, "revision", f"{revision}:{path}")
    return list(ways.values())


def _old_revisions(ways: Iterable[Probe]) -> set[str]:
    return {way.at.split(":", 1)[0] for way in ways if not way.at.startswith("refs/")}


def _addresses(repo: HubRepo, ways: Iterable[Probe], oids: set[str]) -> dict[str, str]:
    """The address that the Hub hands out for each content now: an edge may go on answering it."""
    found: dict[str, str] = {}
    for way in ways:
        if way.oid in oids and way.oid not in found:
            answer = _head(repo, *way.at.split(":", 1))
            if answer.status_code in (302, 307) and "location" in answer.headers:
                found[way.oid] = answer.headers["location"]
    return found


def _stored(repo: HubRepo) -> dict[str, str]:
    """sha256 of every large file that the Hub stores for the repository -> its name, where it has one."""
    url = f"{repo.api.endpoint}/api/models/{repo.repo_id}/lfs-files"  # the client's own method needs every name
    return {item["fileOid"]: item.get("filename", "") for item in paginate(url, {}, repo.api._build_hf_headers())}


def _head(repo: HubRepo, revision: str, path: str) -> Any:
    url = f"{repo.api.endpoint}/{repo.repo_id}/resolve/{quote(revision, safe='')}/{quote(path)}"
    return get_session().head(url, headers=repo.api._build_hf_headers(), follow_redirects=False)


def _probe(repo: HubRepo, probe: Probe, stored: set[str]) -> Probe:
    """Asks once, without any cache."""
    try:
        if probe.way == "listing":
            served = probe.oid in stored
            answer = "listed" if served else "not listed"
        elif probe.way == "object":
            served, answer = _probe_object(repo, probe.oid)
        elif probe.way == "address":
            status = get_session().head(probe.at, follow_redirects=False).status_code
            served, answer = status < 400, f"HTTP {status}"
        else:
            response = _head(repo, *probe.at.split(":", 1))
            same = probe.oid in (response.headers.get("x-linked-etag", ""), response.headers.get("etag", ""),
                                 response.headers.get("x-linked-etag", "").strip('"'))  # fmt: skip
            served = response.status_code < 400 and (same or "x-linked-etag" not in response.headers)
            answer = f"HTTP {response.status_code}"
            if response.status_code >= 500:
                return replace(probe, answer=answer, served=None, seen_at=_now())
    except OSError as error:
        return replace(probe, answer=f"no answer: {error}", served=None, seen_at=_now())
    return replace(probe, answer=answer, served=served, seen_at=_now())


def _probe_object(repo: HubRepo, oid: str) -> tuple[bool, str]:
    url = f"{repo.api.endpoint}/{repo.repo_id}.git/info/lfs/objects/batch"
    headers = {**repo.api._build_hf_headers(), "accept": "application/vnd.git-lfs+json",
               "content-type": "application/vnd.git-lfs+json"}  # fmt: skip
    body = {
        "operation": "download",
        "transfers": ["basic"],
        "objects": [{"oid": oid, "size": 1}],
        "hash_algo": "sha256",
    }
    response = get_session().post(url, headers=headers, json=body)
    if response.status_code >= 400:
        return False, f"HTTP {response.status_code}"
    (found,) = response.json()["objects"]
    if "error" in found or "actions" not in found:
        return False, "no such object"
    return True, "downloadable"


def clear_caches(repo_id: str, revisions: set[str]) -> list[str]:
    """Removes old revisions of a repository, and lists of their files, from this machine's own caches."""
    cleared: list[str] = []
    folder = Path(HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    if folder.exists():
        cached = {revision.commit_hash for repo in scan_cache_dir().repos for revision in repo.revisions
                  if repo.repo_id == repo_id}  # fmt: skip
        found = sorted(cached & revisions)
        if found:
            scan_cache_dir().delete_revisions(*found).execute()
            cleared += [f"{folder.name}/snapshots/{revision}" for revision in found]
        for listing in sorted((folder / "trees").glob("*.json")):
            listing.unlink()
            cleared.append(f"{folder.name}/trees/{listing.name}")
    if Path(HF_XET_CACHE).exists():
        shutil.rmtree(HF_XET_CACHE, ignore_errors=True)
        cleared.append("the Xet cache")
    return cleared


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
