"""A purge, over the real client: what a cold client still reaches afterwards, and that the report says just that."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, set_client_factory, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE, HF_XET_CACHE
from test_hub_server import seed, sha256

from hf_s3t import S3TStore, StoreError
from hf_s3t.errors import HubError
from hf_s3t.hub import purge as purging
from hf_s3t.hub.probes import recheck
from hf_s3t.hub.purge_report import read_reports
from hf_s3t.hub.repo import HubRepo
from hf_s3t.seams.hub import http_library
from hub_server import Server
from machines import Machine
from purging import NAME, REMOVED, WEIGHTS, Case, again, refused
from stores import people

pytest_plugins = ["hub_fixtures"]

HTTP: Any = http_library()

FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "all": {"gc": "lazy", "page_size": 2, "lfs_filename_missing": True, "purge_delay": 1.0, "stale_main": 6},
}
for name, value in FAULTS["all"].items():
    FAULTS[name] = {name: value}
SLOW = [pytest.param(FAULTS[name], id=name, marks=pytest.mark.slow) for name in FAULTS["all"]]


@pytest.mark.parametrize(
    "faults", [pytest.param(FAULTS["none"], id="none"), pytest.param(FAULTS["all"], id="all"), *SLOW]
)
def test_a_cold_client_reaches_no_removed_weight(new_case: Any, faults: dict[str, Any]) -> None:
    case = new_case(**faults)
    assert case.receipt["status"] == "inactive_at_head"
    assert {"refs/tags/v1", "refs/heads/dev", "refs/pr/1"} <= set(case.receipt["still_served_at"])
    assert len(case.cold(oids=[*case.oids().values()])[1]) == 3
    commits, names = case.clone()
    assert commits > 1 and REMOVED[0] in names

    report = case.purge()
    assert report["data"]["status"] == "no_longer_served" and not report["pending"], report["text"]
    assert report["data"]["receipts"] == [case.receipt["receipt"]]
    assert set(report["data"]["refs_removed"]) == {"refs/tags/v1", "refs/heads/dev", "refs/pr/1"}
    assert set(case.oids().values()) < report["data"]["removed"].keys() and len(report["data"]["removed"]) == 4
    case.check_gone()
    commits, names = case.clone()
    assert commits == 1 and not any(stage + "/" in names for stage in REMOVED)
    assert list(case.repository.refs()) == ["refs/heads/main"]
    assert report["data"]["head"] == case.repository.resolve("main")
    assert bool(report["plain"]) == (faults.get("gc") == "lazy")


def test_every_way_is_asked_before_and_after(new_case: Any) -> None:
    case = new_case()
    report = case.purge()["data"]
    probes = {(probe["oid"], probe["way"], probe["at"].split("?")[0]): probe for probe in report["probes"]}
    assert (
        sorted(case.old) == sorted(case.receipt["still_served_at"]) and len(case.old) == 5
    )  # three refs, the commit of the push, the commit of the pull request
    for path, oid in case.oids().items():
        for revision in case.old:
            probe = probes[oid, "revision", f"{revision}:{path}"]
            assert probe["before"] == "HTTP 302" and probe["answer"].startswith("HTTP 404"), probe
        ways = {way: probe for (of, way, _), probe in probes.items() if of == oid}
        assert ways["object"]["before"] == "downloadable" and ways["listing"]["before"] == "listed"
        assert (ways["object"]["answer"], ways["listing"]["answer"]) == ("object error 404", "not listed")
        assert ways["address"]["answer"] == "HTTP 404"
    assert all(probe["seen_at"] > report["began_at"] for probe in probes.values())


def test_the_report_holds_nothing_private(new_case: Any, tmp_path: Path) -> None:
    case = new_case()
    report = case.purge()
    text = json.dumps(report["data"]) + report["text"]
    for private in (str(tmp_path), str(case.machine.home), "signature", *(row["text"] for row in people())):
        assert private not in text
    assert not any(f'"{row["id"]}"' in text for row in people())
    assert "Not probed" in report["text"] and "Xet" in report["text"] and "Out of reach" in report["text"]
    (kept,) = (tmp_path / "store/.s3t").glob("purge-*.json")
    assert json.loads(kept.read_text()) == report["data"] and kept.stat().st_mode & 0o77 == 0


# ---- what stays is told ----


def test_an_address_that_an_edge_still_answers_is_pending(new_case: Any) -> None:
    # The edge knows what it has by the name of the repository, so this one has a name of its own.
    case = new_case("owner/warm", others=False, cdn_ttl=1000)
    case.cold(revisions=case.old, paths=list(case.oids()))  # warms the edge
    report = case.purge(seconds=0)
    assert {way for way, _, _ in report["pending"]} == {"address"} and len(report["pending"]) == 3
    assert report["data"]["status"] == "pending" and not report["still_served_at"]
    assert "signature" in json.dumps(report["data"]) and "signature" not in report["text"]
    case.server.faults.cdn_ttl = 0
    later = case.machine(again, data=report["data"])
    assert later["status"] == "no_longer_served" and "signature" not in json.dumps(later)


@pytest.mark.slow
def test_asking_for_an_address_does_not_warm_the_edge(new_case: Any) -> None:
    case = new_case("owner/cool", others=False, cdn_ttl=1000, purge_delay=1000)
    report = case.purge(seconds=0.5)
    waiting = [answer for way, _, answer in report["pending"] if way == "address"]
    assert waiting == ["not asked while the Hub has the content"] * 4
    case.repository.settle(at_once=True)
    later = case.machine(again, data=report["data"])
    assert later["status"] == "no_longer_served", [probe for probe in later["probes"] if probe["served"] is not False]


@pytest.mark.slow
def test_what_settles_late_is_pending_until_it_has(new_case: Any) -> None:
    case = new_case(purge_delay=1000, gc="lazy")
    report = case.purge(seconds=0.5)
    assert report["data"]["status"] == "pending"
    assert {way for way, _, _ in report["pending"]} == {"revision", "object", "listing", "address"}
    assert set(report["still_served_at"]) >= {old for old in case.old if len(old) == 40}
    still = case.machine(again, data=report["data"])
    assert still["status"] == "pending" and still["ended_at"] > report["data"]["ended_at"]
    case.repository.settle(at_once=True)
    assert case.machine(again, data=still)["status"] == "no_longer_served"
    case.check_gone()


@pytest.mark.slow
def test_a_kept_tag_and_pull_request_lose_the_weights_and_keep_plain_files(new_case: Any) -> None:
    case = new_case()
    report = case.purge(keep_refs=["refs/tags/v1", "refs/pr/1"])
    assert report["data"]["status"] == "no_longer_served", report["text"]
    assert report["data"]["refs_removed"] == ["refs/heads/dev"]
    config = f"{REMOVED[0]}/adapter_config.json"
    assert {f"refs/tags/v1:{config}", f"refs/pr/1:{config}"} <= set(report["plain"])
    assert config in report["text"] and "no weights, no examples" in report["text"]
    paths, oids = [config, *case.oids()], [*case.oids().values()]
    answers, given_out, files = case.cold(
        revisions=["refs/tags/v1", "refs/pr/1"], paths=paths, oids=oids, all_of="main"
    )
    assert answers == {"refs/tags/v1": [200, 404, 404, 404], "refs/pr/1": [200, 404, 404, 404]}
    assert given_out == []
    case.check_kept(files)


def propose(name: str) -> str:
    addition = CommitOperationAdd("new/adapter_model.safetensors", b"somebody's")
    return HfApi().create_commit(name, [addition], commit_message="more", revision="refs/pr/1").oid


def test_a_pull_request_that_is_kept_keeps_what_it_brought(new_case: Any) -> None:
    case = new_case()
    case.machine(propose, name=NAME)
    case.purge(keep_refs=["refs/pr/1"])
    paths = ["new/adapter_model.safetensors", f"{REMOVED[0]}/{WEIGHTS}"]
    assert case.cold(revisions=["refs/pr/1"], paths=paths)[0] == {"refs/pr/1": [200, 404]}


def test_a_kept_branch_that_has_a_removed_stage_is_pending(new_case: Any) -> None:
    case = new_case()
    began = time.monotonic()
    report = case.purge(keep_refs=["dev"], seconds=300)
    assert time.monotonic() - began < 60, "what is held does not settle, and is not waited for"
    assert set(report["data"]["held"]) >= set(case.oids().values()) and "held by a kept branch" in report["text"]
    assert report["data"]["status"] == "pending" and "refs/heads/dev" in report["still_served_at"]
    paths = list(case.oids())
    answers, _, files = case.cold(revisions=["dev", "main"], paths=paths, all_of="main")
    assert answers == {"dev": [200] * 3, "main": [404] * 3} and len(case.repository.log("dev")) == 1
    case.check_kept(files)
    done = case.purge()
    assert done["data"]["status"] == "no_longer_served", done["text"]
    assert "refs/heads/dev" in done["data"]["refs_removed"] and done["data"]["began_at"] == report["data"]["began_at"]
    case.check_gone()


def test_a_commit_that_only_a_receipt_names_is_asked_for(new_case: Any) -> None:
    case = new_case(others=False, gc="lazy", purge_delay=1000)
    case.repository.squash("main", "by hand")
    report = case.purge(seconds=0)
    lost = [at for at in case.receipt["still_served_at"] if len(at) == 40]
    assert lost and set(lost) <= set(report["still_served_at"])


# ---- what is refused, and what stays ----


def state_of(case: Case) -> Any:
    return case.repository.refs(), case.repository.large(), case.repository.meta["discussions"]


def test_other_refs_are_refused_and_named_unless_it_is_said_what_to_do(new_case: Any) -> None:
    case = new_case()
    before = state_of(case)
    name, message = case.machine(refused, name=NAME, folder=case.folder, keep_refs=None)
    assert name == "ValueError" and "refs/heads/dev, refs/tags/v1, refs/pr/1" in message and "keep_refs=[]" in message
    name, message = case.machine(refused, name=NAME, folder=case.folder, keep_refs=["nowhere"])
    assert name == "ValueError" and "refs/heads/nowhere" in message and state_of(case) == before
    assert "Nothing was changed" in case.machine(delete_too, name=NAME, folder=case.folder)
    assert state_of(case) == before


def delete_too(name: str, folder: str) -> str:
    try:
        S3TStore(name, state=f"{folder}/.s3t").delete(slices=[(0, 0)], purge=True)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.brief("reader_token")
@pytest.mark.parametrize("who", ["reader_token", "stranger_token"])
def test_without_the_right_to_write_nothing_is_changed(new_case: Any, who: str) -> None:
    case = new_case()
    before = state_of(case)
    token = getattr(case.server, who)
    name, message = case.machine(refused, name=NAME, folder=case.folder, token=token)
    assert name == "HubError" and ("write access" in message or "no access" in message)
    assert state_of(case) == before


def test_nothing_live_is_removed_whoever_asks(new_case: Any) -> None:
    case = new_case()
    before = state_of(case)
    assert "3 large files that are live" in case.machine(protect, name=NAME, oids=[*case.oids().values()])
    assert state_of(case) == before
    assert case.machine(live, name=NAME) == ["refs/heads/main", "refs/heads/dev"]


def protect(name: str, oids: list[str]) -> str:
    try:
        purging.purge(HubRepo(name), [], protected=oids)
    except StoreError as error:
        return str(error)
    return ""


def live(name: str) -> list[str]:
    repo, found = HubRepo(name), []
    for ref in ("refs/heads/main", "refs/heads/dev"):
        try:
            purging.refuse_if_live(repo, [ref], {max(purging.contents(repo.tree(ref)))}, [])
        except StoreError:
            found.append(ref)
    return found


def test_a_purge_of_nothing_and_a_second_one_change_nothing(new_case: Any) -> None:
    case = new_case()
    case.purge()
    before = state_of(case)
    report = case.purge()
    assert report["data"]["status"] == "no_longer_served" and not report["data"]["removed"]
    assert state_of(case) == before
    case.check_gone()


# ---- answers that say nothing ----


class Answers(BaseHTTPRequestHandler):
    """Knows the repository, and answers everything else with `status`; 0: not at all."""

    status = 0

    def do_HEAD(self) -> None:
        known = "/revision/" in self.path
        if not known and self.status == 0:
            self.close_connection = True
            return
        body = b'{"id": "owner/model", "sha": "0"}'
        self.send_response(200 if known else self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


def test_only_an_answer_that_says_gone_counts_as_gone(new_case: Any) -> None:
    case = new_case(others=False)
    data = case.purge()["data"]
    data["probes"] = [probe | {"served": None} for probe in data["probes"] if probe["way"] in ("revision", "object")]
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for Answers.status in (0, 401, 403, 429, 500, 503):
        later = case.machine(again, data=data, endpoint=f"http://127.0.0.1:{server.server_port}")
        assert later["status"] == "pending", Answers.status
        assert {probe["served"] for probe in later["probes"]} == {None}, Answers.status
    server.shutdown()
    server.server_close()
    nobody = case.machine(again, data=data, endpoint=f"http://127.0.0.1:{server.server_port}")
    assert {probe["served"] for probe in nobody["probes"]} == {None} and "no answer" in nobody["probes"][0]["answer"]


def test_whoever_does_not_see_the_repository_does_not_see_that_it_is_purged(new_case: Any) -> None:
    case = new_case(purge_delay=1000)
    data = case.purge(seconds=0)["data"]
    later = case.machine(again, data=data, token=case.server.stranger_token)
    assert later["status"] == "pending"
    assert {probe["answer"] for probe in later["probes"] if probe["served"] is None} == {
        "the repository is not there, or hidden from this token"
    }
    reader = case.machine(again, data=data, token=case.server.reader_token)  # may not list the storage
    case.repository.settle(at_once=True)
    reader = case.machine(again, data=reader, token=case.server.reader_token)
    assert {probe["way"] for probe in reader["probes"] if probe["served"] is None} == {"listing"}
    assert reader["status"] == "pending" and case.machine(again, data=reader)["status"] == "no_longer_served"


# ---- this machine ----


def fill(name: str) -> None:
    HfApi().create_repo("owner/other")
    snapshot_download("owner/other")
    snapshot_download(name, revision="v1")
    torn = Path(HF_HUB_CACHE) / "models--owner--model/blobs/abc.incomplete"
    torn.write_bytes(b"half of a removed file")
    for folder in ("chunk-cache", "shard-cache", "staging"):
        (Path(HF_XET_CACHE) / "server" / folder).mkdir(parents=True, exist_ok=True)
        (Path(HF_XET_CACHE) / "server" / folder / "file").write_text("blocks")


def test_this_machines_caches_forget_the_removed_weights(new_case: Any, tmp_path: Path) -> None:
    case = new_case()

    def contents() -> set[str]:
        return {path.read_bytes() for path in case.machine.home.rglob("*") if path.is_file()}

    case.machine(fill, name=NAME)
    cache = case.machine.home / "hub"
    forks = [cache / f"models--owner--fork{number}" for number in range(8)]  # with commits of the same names
    for fork in forks:
        other = shutil.ignore_patterns("*.safetensors", "blobs", "trees")
        shutil.copytree(cache / "models--owner--model", fork, ignore=other)
    weights = [case.pushed / path for path in case.oids()]
    weights = [path.read_bytes() for path in weights if path.exists()]
    assert len(weights) == 3 and all(content in contents() for content in weights)
    report = case.purge()
    assert not any(content in contents() for content in weights) and b"half of a removed file" not in contents()
    kept = [len(list(fork.rglob("*gitattributes"))) for fork in forks]
    assert kept == [1] * len(forks), "the cache of a fork stays"
    assert list((cache / "models--owner--other").rglob("*gitattributes")), "another repository's cache stays"
    assert not list((cache / "models--owner--model").glob("trees/*"))
    assert [path.parent.name for path in (case.machine.home / "xet").rglob("file")] == ["staging"]
    cleared = report["data"]["caches_cleared"]
    assert any(name.startswith("models--owner--model/snapshots/") for name in cleared)
    assert "xet/chunk-cache, of all repositories" in cleared


# ---- Xet ----


@pytest.mark.slow
def test_with_xet_files_are_gone_and_what_is_not_proven_is_said(server: Server, new_case: Any) -> None:
    case = new_case(xet=True)
    assert not list((case.repository.path / "lfs").iterdir()) and len(server.hub.cas.xorbs()) >= 4
    before = server.hub.cas.xorbs()
    report = case.purge()
    assert report["data"]["status"] == "no_longer_served", report["text"]
    case.check_gone()
    assert len(before - server.hub.cas.xorbs()) >= 3, "each stage had its own block"
    assert any("Xet" in line for line in report["data"]["not_probed"])


# ---- many files ----


@pytest.mark.slow
def test_1100_large_files(server: Server, machine: Machine) -> None:
    names = [f"{k:04}/a.safetensors" for k in range(1100)]
    repository = seed(server, {name: f"weights {name}" for name in names})
    repository.commit("refs/heads/main", repository.resolve("main"), "owner", "delete", dict.fromkeys(names[1:]))
    began = time.monotonic()
    report = machine(purge_alone, name=NAME)
    assert report["status"] == "no_longer_served" and len(report["removed"]) == 1099
    assert repository.large() == {sha256(f"weights {names[0]}")} and time.monotonic() - began < 120


def purge_alone(name: str) -> dict[str, Any]:
    report = purging.purge(HubRepo(name), seconds=30)
    return {"status": report.status, "removed": list(report.removed)}


# ---- what is served again, or by git itself ----


def commit(case: Case, changes: dict[str, Any]) -> str:
    """What somebody commits to the own branch; a text is the name of a stored large file."""
    repository = case.repository
    written = {
        path: repository.pointer(what, len(removed_bytes(case)[what]), path) if isinstance(what, str) else what
        for path, what in changes.items()
    }
    return repository.commit("refs/heads/main", repository.resolve("main"), "owner", "by hand", written)


def removed_bytes(case: Case) -> dict[str, bytes]:
    """The removed weights by their sha256, as the folder still has them that was pushed."""
    return {oid: (case.pushed / path).read_bytes() for path, oid in case.oids().items()}


@pytest.mark.slow
def test_removed_weights_at_the_head_under_another_name_are_held(new_case: Any) -> None:
    case = new_case(others=False)
    oid, other, _ = sorted(case.oids().values())
    commit(case, {"backup/weights.safetensors": oid})
    for _ in ("first", "again"):
        began = time.monotonic()
        report = case.purge(seconds=300)
        assert time.monotonic() - began < 60, "what is held does not settle, and is not waited for"
        assert report["data"]["status"] == "pending" and report["data"]["held"] == [oid]
        assert "refs/heads/main" in report["still_served_at"]
        assert "held by a kept branch: refs/heads/main:backup/weights.safetensors" in report["text"]
    assert case.cold(oids=[oid, other])[1] == [oid]
    commit(case, {"backup": None})
    report = case.purge()
    assert report["data"]["status"] == "no_longer_served" and not report["data"]["held"], report["text"]
    (path,) = (path for path, sha in case.oids().items() if sha == oid)
    asked = {probe["at"] for probe in report["data"]["probes"] if probe["oid"] == oid}
    assert {f"{revision}:{path}" for revision in case.old} <= asked, "what the first purge knew is asked to the end"
    case.check_gone()


def purge_with(name: str, receipt: dict[str, Any], protected: list[str]) -> dict[str, Any]:
    return purging.purge(HubRepo(name), [], 20, protected, [receipt]).to_json()


def test_a_stage_that_was_trained_again_to_the_same_bytes_is_not_held(new_case: Any) -> None:
    case = new_case(others=False)
    path, oid = min(case.oids().items())
    commit(case, {path: oid})
    report = case.machine(purge_with, name=NAME, receipt=case.receipt, protected=[oid])
    assert report["status"] == "no_longer_served" and not report["held"] and oid not in report["removed"]
    assert case.cold(oids=[*case.oids().values()])[1] == [oid]
    report = case.machine(purge_with, name=NAME, receipt=case.receipt, protected=[])
    assert report["status"] == "pending" and report["held"] == [oid], "no live stage has it"


def test_plain_weights_that_a_kept_tag_leads_to_are_pending(new_case: Any) -> None:
    case = new_case()
    weights = removed_bytes(case)[min(case.oids().values())]
    plain = {"old/last.BIN": b"some weights", "old/notes.dat": weights, "old/notes.txt": b"no weights"}
    case.repository.set_ref("refs/tags/v2", commit(case, plain))
    commit(case, {"old": None})
    began = time.monotonic()
    report = case.purge(keep_refs=["refs/tags/v2"], seconds=300)
    assert time.monotonic() - began < 60, "git keeps them while there is the tag"
    assert report["data"]["status"] == "pending" and "refs/tags/v2" in report["still_served_at"]
    assert {(way, at) for way, at, _ in report["pending"] if at.startswith("refs/")} == {
        ("plain weights", "refs/tags/v2:old/last.BIN"),
        ("plain weights", "refs/tags/v2:old/notes.dat"),
    }
    assert "refs/tags/v2:old/notes.txt" in report["plain"] and "kept by git itself" in report["text"]
    assert case.purge()["data"]["status"] == "no_longer_served"
    case.check_gone()


def test_removed_weights_at_the_head_as_a_plain_file_are_held(new_case: Any) -> None:
    case = new_case(others=False)
    weights = removed_bytes(case)[min(case.oids().values())]
    commit(case, {"notes.dat": weights, "settings.bin": b"somebody's own", "new.dat": b"x" * len(weights)})
    report = case.purge(seconds=300)
    assert report["data"]["status"] == "pending"
    assert [pending[:2] for pending in report["pending"]] == [["plain weights", "refs/heads/main:notes.dat"]]
    commit(case, {"notes.dat": b"other notes"})
    report = case.purge()
    assert report["data"]["status"] == "no_longer_served", report["text"]
    assert {"another content", "HTTP 404 RevisionNotFound"} >= {
        probe["answer"] for probe in report["data"]["probes"] if probe["way"] == "plain weights"
    }


def test_receipts_from_before_they_named_revisions_are_read() -> None:
    known = purging.Known([{"stages_removed": {}}, {"stages_removed": {}, "still_served_at": ["a" * 40, "main"]}])
    assert known.revisions == {"a" * 40}


def lost(name: str, pattern: str) -> str:
    """The error of a purge whose connection breaks at one request."""

    class Transport(HTTP.HTTPTransport):
        def handle_request(self, request: HTTP.Request) -> HTTP.Response:
            if re.search(pattern, request.url.path):
                raise HTTP.ReadTimeout("nothing came", request=request)
            return super().handle_request(request)

    set_client_factory(lambda: HTTP.Client(transport=Transport(), follow_redirects=True))
    try:
        purging.purge(HubRepo(name), [])
    except HubError as error:
        return str(error)
    raise AssertionError("it was not lost")


def test_a_lost_connection_is_told_as_every_other_failure(server: Server, machine: Machine) -> None:
    repository = seed(server, {"a/a.safetensors": "weights"})
    repository.commit("refs/heads/main", repository.resolve("main"), "owner", "delete", {"a": None})
    for pattern in ("/refs$", "/super-squash/"):
        assert "nothing came" in (message := machine(lost, name=NAME, pattern=pattern)) and "purge again" in message


def unseen(name: str) -> list[Any]:
    report = purging.purge(HubRepo(name), seconds=0)
    return [report.status, [[probe.oid, probe.way] for probe in report.proving_nothing], report.to_text()]


def test_probes_that_saw_nothing_before_either_are_counted(server: Server, machine: Machine) -> None:
    repository = seed(server, {"a/a.safetensors": "weights", "b/b.safetensors": "lost weights"})
    repository.purge({sha256("lost weights")}, rewrite=False)
    repository.commit("refs/heads/main", repository.resolve("main"), "owner", "delete", {"a": None, "b": None})
    status, probes, text = machine(unseen, name=NAME)
    assert status == "no_longer_served"
    assert {oid for oid, _ in probes} == {sha256("lost weights")}
    assert {way for _, way in probes} == {"object", "listing", "revision"}
    assert f"{len(probes)} probes saw nothing before the purge either" in text


def stopped(name: str, folder: str) -> list[Any]:
    """What stands in the kept report of a purge that a person stopped, and what asking again makes of it."""

    def stop(*how: Any) -> None:
        raise KeyboardInterrupt

    squash, purging.squash = purging.squash, stop
    try:
        S3TStore(name, state=f"{folder}/.s3t").purge([])
    except KeyboardInterrupt:
        purging.squash = squash
    (kept,) = read_reports(name, Path(folder) / ".s3t")
    asked = recheck(HubRepo(name), kept)
    return [kept.status, asked.status, asked.to_text()]


def test_a_purge_that_was_stopped_has_removed_nothing_yet_and_says_so(new_case: Any) -> None:
    case = new_case()
    *status, text = case.machine(stopped, name=NAME, folder=str(case.folder))
    assert status == ["begun", "begun"]
    assert "begun, and stopped before its end" in text and " large files to be removed" in text
    assert case.purge()["data"]["status"] == "no_longer_served"
    case.check_gone()


def test_a_report_without_anything_pending_is_not_made_newer(new_case: Any) -> None:
    case = new_case(others=False)
    data = case.purge()["data"]
    assert case.machine(again, data=data) == data
    assert case.machine(again, data=data, endpoint="http://127.0.0.1:9") == data


def test_short_names_of_refs_are_understood(new_case: Any) -> None:
    case = new_case()
    assert "refs/tags/v1" in case.purge(keep_refs=["v1", "dev"])["data"]["refs_kept"]


@pytest.mark.slow
def test_a_short_name_of_two_refs_is_refused(new_case: Any) -> None:
    """To guess would remove the other one."""
    case = new_case()
    case.repository.set_ref("refs/heads/v1", case.repository.resolve("main"))
    kind, message = case.machine(refused, name=NAME, folder=str(case.folder), keep_refs=["v1", "dev"])
    assert kind == "ValueError" and "refs/heads/v1" in message and "refs/tags/v1" in message
    assert set(case.repository.refs()) >= {"refs/heads/v1", "refs/tags/v1"}
