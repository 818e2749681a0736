"""A purge that is killed, or that the Hub fails, at every request that changes something, and is then run again."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import set_client_factory

from hf_s3t import S3TStore
from hf_s3t.errors import HubError
from hf_s3t.seams.hub import http_library
from machines import Died

pytest_plugins = ["hub_fixtures"]

HTTP: Any = http_library()

STEPS = ("close", "ref", "branch", "tag", "squash", "purge")
"""The requests of a purge that change something, in no order."""


def struck(name: str, folder: str, step: str, when: str) -> str:
    """Purges, and is struck at one step: killed before or after the request, or answered with 503 or 404."""
    patterns = {
        "close": "POST .*/status$",
        "ref": "DELETE .*/ref$",
        "branch": "DELETE .*/branch/",
        "tag": "DELETE .*/tag/",
        "squash": "POST .*/super-squash/",
        "purge": "POST .*/lfs-files/batch$",
    }

    class Transport(HTTP.HTTPTransport):
        def handle_request(self, request: HTTP.Request) -> HTTP.Response:
            hit = re.match(patterns[step], f"{request.method} {request.url.path}")
            if hit and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if hit and when == "refused":
                return HTTP.Response(503, request=request)
            response = super().handle_request(request)
            if hit and when == "after":
                response.read()
                os.kill(os.getpid(), signal.SIGKILL)
            if hit and when == "lost":
                response.read()
                return HTTP.Response(503, request=request)
            return response

    set_client_factory(lambda: HTTP.Client(transport=Transport(), follow_redirects=True))
    try:
        S3TStore(name, state=f"{folder}/.s3t").purge([])
    except HubError as error:
        return str(error)
    raise AssertionError("it was not struck")


def check(new_case: Any, tmp_path: Path, step: str, when: str) -> None:
    case = new_case()
    killed = when in ("before", "after")
    case.machine.begin(struck, name=case.name, folder=case.folder, step=step, when=when)
    if killed:
        with pytest.raises(Died) as died:
            case.machine.end()
        assert died.value.code == -signal.SIGKILL
    else:
        assert "purge again" in case.machine.end()
    (kept,) = (tmp_path / "store/.s3t").glob("purge-*.json")
    first = json.loads(kept.read_text())
    assert first["status"] == "begun" and first["probes"]
    report = case.purge()
    assert report["data"]["status"] == "no_longer_served", report["text"]
    assert report["data"]["began_at"] == first["began_at"]
    assert report["data"]["removed"].keys() >= set(case.oids().values())
    assert set(report["data"]["refs_removed"]) == {"refs/tags/v1", "refs/heads/dev", "refs/pr/1"}
    asked = {(probe["oid"], probe["at"]) for probe in report["data"]["probes"] if probe["before"] == "HTTP 302"}
    for path, oid in case.oids().items():
        assert {(oid, f"{revision}:{path}") for revision in case.old} <= asked
    assert [json.loads(path.read_text()) for path in kept.parent.glob("purge-*.json")] == [report["data"]]
    assert list(case.repository.refs()) == ["refs/heads/main"] and len(case.repository.log()) == 1
    case.check_gone()


@pytest.mark.brief("tag-lost")
@pytest.mark.parametrize(("step", "when"), [("squash", "after"), ("tag", "lost")])
def test_a_purge_that_was_stopped_ends_like_one_that_was_not(
    new_case: Any, tmp_path: Path, step: str, when: str
) -> None:
    check(new_case, tmp_path, step, when)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "after", "refused", "lost"])
@pytest.mark.parametrize("step", STEPS)
def test_every_step_and_every_way_to_fail(new_case: Any, tmp_path: Path, step: str, when: str) -> None:
    check(new_case, tmp_path, step, when)
