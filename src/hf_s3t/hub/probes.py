"""Asks the Hub, without any cache, whether removed contents are still served.

An answer is one of three. *Served*: the Hub hands the content out, or an address for it, whether or not the address
answers. *Gone*: it says that there is no such thing. Everything else (no answer, 5xx, 401, 403, 429, a repository that
this token does not see) is *not known*, and stays pending.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

from huggingface_hub import hf_hub_url

from ..errors import CompatibilityError, HubError
from ..files import utc_now
from ..seams import hub as seam
from .answers import reading
from .purge_report import Probe, PurgeReport
from .repo import HubRepo

WORKERS = 8
"""Probes under way at once: a repository has thousands."""
BATCH = 100
"""Objects that one request of the large-file protocol asks for."""

Answer = tuple[bool | None, str]


def recheck(repo: HubRepo, report: PurgeReport, seconds: float = 0.0) -> PurgeReport:
    """Asks again for what a report does not have as gone, until nothing is pending or the time is over."""
    if not report.pending:
        return report  # nothing is asked, so nothing was seen later than it says
    deadline, pause = time.monotonic() + seconds, 0.2
    while True:
        report = _asked(repo, report)
        waits = [probe for probe in report.pending if probe.oid not in report.held]  # what is held does not settle
        if not waits or time.monotonic() + pause > deadline:
            return report
        time.sleep(pause)
        pause = min(2 * pause, 10.0)


def _asked(repo: HubRepo, report: PurgeReport) -> PurgeReport:
    probes = ask(repo, [probe for probe in report.probes if probe.served is not False])
    probes = [probe for probe in report.probes if probe.served is False] + probes
    report = replace(report, probes=sorted(probes, key=lambda probe: (probe.oid, probe.way, probe.at)))
    try:
        head = repo.branch_head() or ""
    except (seam.http_error(), HubError, OSError):
        head = report.head
    status = "pending" if report.pending else "no_longer_served"
    return replace(report, head=head, ended_at=utc_now(), status="begun" if report.status == "begun" else status)


def ask(repo: HubRepo, probes: Iterable[Probe]) -> list[Probe]:
    """Asks each probe once. A repository that is not there for this token answers nothing."""
    probes = list(probes)
    try:
        hidden = None if repo.info() is not None else "the repository is not there, or hidden from this token"
    except (seam.http_error(), HubError, OSError) as error:
        hidden = f"no answer: {_short(error)}"
    if hidden is not None:
        return [replace(probe, answer=hidden, served=None, seen_at=utc_now()) for probe in probes]
    first = [probe for probe in probes if probe.way != "address"]
    listing = _listing(repo) if any(probe.way == "listing" for probe in first) else "not asked"
    objects = _objects(repo, first)

    def one(probe: Probe) -> Probe:
        served, answer = _answer(repo, probe, listing, objects)
        return replace(probe, answer=answer, served=served, seen_at=utc_now())

    with ThreadPoolExecutor(WORKERS) as pool:
        done = list(pool.map(one, first))
        # To ask for an address makes the edge fetch what is behind it, so not while the Hub still has the content.
        there = {probe.oid for probe in done if probe.way in ("object", "revision") and probe.served is not False}
        addresses = [probe for probe in probes if probe.way == "address"]
        waiting = [replace(p, answer="not asked while the Hub has the content") for p in addresses if p.oid in there]
        return done + waiting + list(pool.map(_address, [probe for probe in addresses if probe.oid not in there]))


def _answer(repo: HubRepo, probe: Probe, listing: set[str] | str, objects: Mapping[str, Answer]) -> Answer:
    try:
        if probe.way == "head":
            found, head = repo.info(), repo.branch_head()
            late = found is None or found.sha != head
            return late, "answers with an older commit" if late else f"answers with {head}"
        if probe.way == "listing":
            if isinstance(listing, str):
                return None, listing
            return probe.oid in listing, "listed" if probe.oid in listing else "not listed"
        if probe.way == "object":
            return objects[probe.oid]
        return _judge(head_of(repo, *probe.at.split(":", 1)), probe.oid)
    except (seam.http_error(), HubError, OSError) as error:
        return None, f"no answer: {_short(error)}"


def _judge(response: Any, oid: str) -> Answer:
    """What the answer to a request for a file at a revision says about a content."""
    status, code = response.status_code, response.headers.get(seam.ERROR_CODE, "")
    if status < 400:
        linked = response.headers.get(seam.LINKED_ETAG, "").strip('"')
        named = re.fullmatch('(?:W/)?"([0-9a-f]{40})"', response.headers.get("etag", "")) if len(oid) == 40 else None
        other = linked != oid if linked else named is not None and named[1] != oid
        return (False, "another content") if other else (True, f"HTTP {status}")
    gone = status in (404, 410) and code != "RepoNotFound"
    return False if gone else None, f"HTTP {status} {code}".strip()


def _listing(repo: HubRepo) -> set[str] | str:
    try:
        return set(stored(repo))
    except (seam.http_error(), OSError, CompatibilityError) as error:
        return f"no list: {_short(error)}"


def _objects(repo: HubRepo, probes: Iterable[Probe]) -> dict[str, Answer]:
    sizes = {probe.oid: int(probe.at.split()[0]) for probe in probes if probe.way == "object"}
    oids = sorted(sizes)
    answers: dict[str, Answer] = {}
    for start in range(0, len(oids), BATCH):
        batch = oids[start : start + BATCH]
        try:
            answers |= dict.fromkeys(batch, (None, "not answered")) | _batch(repo, {oid: sizes[oid] for oid in batch})
        except (seam.http_error(), HubError, OSError) as error:
            answers |= dict.fromkeys(batch, (None, f"no answer: {_short(error)}"))
    return answers


def _batch(repo: HubRepo, sizes: Mapping[str, int]) -> dict[str, Answer]:
    """Asks for objects as git-lfs does, by sha256, whatever revision has them."""
    media = "application/vnd.git-lfs+json"
    objects = [{"oid": oid, "size": size} for oid, size in sizes.items()]
    body = {"operation": "download", "transfers": ["basic"], "objects": objects, "hash_algo": "sha256"}
    response = seam.session().post(
        f"{repo.api.endpoint}/{repo.repo_id}.git/info/lfs/objects/batch",
        headers={**repo.headers(), "accept": media, "content-type": media}, json=body, timeout=seam.TIMEOUT,
    )  # fmt: skip
    if response.status_code >= 400:
        return dict.fromkeys(sizes, (None, f"HTTP {response.status_code}"))
    with reading(repo.repo_id, "large files"):
        found = {one["oid"]: _object_answer(one) for one in response.json()["objects"]}
    return {oid: found[oid] for oid in sizes if oid in found}


def _object_answer(found: Mapping[str, Any]) -> Answer:
    if "download" in found.get("actions", {}):
        return True, "downloadable"
    code = found.get("error", {}).get("code")
    return False if code in (404, 410) else None, f"object error {code if type(code) is int else 'without a code'}"


def _address(probe: Probe) -> Probe:
    """Asks for the first byte: an address is signed for GET, and would refuse HEAD whatever is behind it."""
    try:
        with seam.session().stream("GET", probe.at, headers={"range": "bytes=0-0"}, timeout=seam.TIMEOUT) as response:
            status = response.status_code
    except (seam.http_error(), OSError) as error:
        return replace(probe, answer=f"no answer: {_short(error)}", served=None, seen_at=utc_now())
    gone = status in (404, 410) or (status == 403 and expired(probe.at))
    served = True if status < 400 else (False if gone else None)
    answer = f"HTTP {status}{', expired' if status == 403 and gone else ''}"
    where = probe.at.split("?")[0] if gone else probe.at
    return replace(probe, at=where, answer=answer, served=served, seen_at=utc_now())


def expired(address: str) -> bool:
    """Whether a signed address says itself that its time is over.

    >>> expired("https://cdn/x?Expires=1700000000&Signature=s"), expired("https://cdn/x?Signature=s")
    (True, False)
    >>> expired("https://s3/x?X-Amz-Date=20250101T000000Z&X-Amz-Expires=3600")
    True
    """
    query = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
    try:
        if "Expires" in query:
            return int(query["Expires"]) < time.time()
        began = datetime.datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%S%z")
        return began.timestamp() + int(query["X-Amz-Expires"]) < time.time()
    except (KeyError, ValueError):
        return False


# ---- what a probe asks for ----


def stored(repo: HubRepo) -> dict[str, int]:
    """sha256 of every large file that the Hub stores for the repository -> its size."""
    return seam.list_large_files(repo.api, repo.repo_id)


def head_of(repo: HubRepo, revision: str, path: str) -> Any:
    """The answer to a request for a file at a revision, without following where it leads."""
    # `get_hf_file_metadata` follows redirects inside the Hub and raises what has to be told apart here.
    url = hf_hub_url(repo.repo_id, path, revision=revision, endpoint=repo.api.endpoint)
    return seam.session().head(url, headers=repo.headers(), follow_redirects=False, timeout=seam.TIMEOUT)


def _short(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"HTTP {status}" if status else type(error).__name__
