"""An endpoint follows a repository on the Hub as it does a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import served
from hf_s3t import S3TEnsemble, S3TStore
from hub_server import Server
from machines import Machine

pytest_plugins = ["hub_fixtures"]
REPO = "owner/served"


def follow(path: str) -> list[Any]:
    """Pushes a store, and serves the repository while it changes and goes; what is answered meanwhile."""
    from huggingface_hub import delete_repo

    from endpoints import NAME, running, wait_until

    S3TStore(path).push(REPO)
    model = S3TEnsemble.from_pretrained(REPO, served.SHAPES["llama"].build())
    asked = {"model": NAME, "prompt": "abc", "max_tokens": 50, "temperature": 0}
    with running(model, refresh_seconds=0.1, max_staleness=3.0) as endpoint:

        def ask() -> list[Any]:
            answer = endpoint.http.post("/v1/completions", json=asked)
            found = answer.json()
            told = found["error"]["message"] if "error" in found else found["choices"][0]["text"]
            return [answer.status_code, answer.headers.get("x-s3t-generation"), told]

        found = [ask()]
        S3TStore(REPO, state=Path(path) / ".s3t").delete(slices=[(0, 1), (1, 0), (2, 2)])
        endpoint.wait_for(1)
        found.append(ask())
        delete_repo(REPO)
        wait_until(lambda: endpoint.http.get("/health").status_code == 503)
        return [*found, ask()]


@pytest.mark.slow
def test_a_repository_is_followed(server: Server, machine: Machine, tmp_path: Path) -> None:
    before, after, gone = machine(follow, path=str(served.copy("llama", tmp_path).path))
    assert before[:2] == [200, "0"] and after[:2] == [200, "1"] and before[2] != after[2]
    assert gone[0] == 503 and "deletions may be unknown here" in gone[2] and REPO in gone[2]
