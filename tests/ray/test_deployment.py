"""The endpoint as replicas behind a real local Ray Serve: each follows the store by itself, and one may die."""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

import served
from endpoints import running, wait_until, write_base
from hf_s3t import S3TStore, StoreError

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
ray_serve = pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

from hf_s3t.ray import application, serve  # noqa: E402  # where there is Ray
from hf_s3t.ray.deployment import Replica  # noqa: E402

PAGE = (Path(__file__).parents[2] / "docs/endpoint.md").read_text(encoding="utf-8")
NAME = f"replicas{os.getpid()}"
ASKED = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "temperature": 0}
REFRESH = 0.2


def test_what_cannot_be_served_is_refused_before_a_replica_starts(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        serve(str(tmp_path))
    with pytest.raises(ValueError, match="Replicas delete nothing"):
        serve(str(tmp_path), delete_token="a token that is long enough")
    store = served.trained("llama")
    with pytest.raises(ValueError, match="--max-queue must be at least 1"):
        application({"store": str(store), "max_queue": 0})
    assert not ray.is_initialized()


def test_the_page_describes_applications_that_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    store = str(served.trained("llama"))
    ran: list[Any] = []
    monkeypatch.setattr(ray_serve, "run", lambda application, name: ran.append((application, name)))
    exec(re.findall(r"```python\n(import ray\n.*?)```", PAGE, re.S)[0].replace("me/model", store), {})
    (file,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.S))
    (one,) = file["applications"]
    module, _, builder = one["import_path"].partition(":")
    ran.append((getattr(importlib.import_module(module), builder)({**one["args"], "store": store}), one["name"]))
    assert [(type(application), name) for application, name in ran] == [(ray_serve.Application, "chat")] * 2


def test_a_replica_is_sent_what_it_refuses_itself() -> None:
    made = serve(str(served.trained("llama")), max_queue=5, max_batch=3, drain_seconds=7.0)._bound_deployment
    assert made.max_ongoing_requests >= 5 + 3 + 32  # all that it has taken, and some that it answers 429
    assert 5 <= made.max_queued_requests < 100  # not for ever at Ray's proxy
    assert made._deployment_config.graceful_shutdown_timeout_s == 7


def test_a_replica_whose_model_fails_is_replaced_and_none_because_of_its_store() -> None:
    model = served.load(served.trained("llama"), "llama")
    made = serve(str(served.trained("llama")))._bound_deployment
    assert issubclass(made.func_or_class, Replica)
    replica = Replica()
    with running(model, max_staleness=0.06) as endpoint:
        replica.app = endpoint.app
        replica.check_health()
        watch = endpoint.app.state.endpoint.watch
        watch.stop()
        wait_until(lambda: watch.reason is not None)
        replica.check_health()
        watch.max_staleness = 999.0
        model.get_input_embeddings().register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(3):
            endpoint.http.post("/v1/completions", json=ASKED)
        with pytest.raises(RuntimeError, match="The last 3 batches failed, the last one with: ZeroDivisionError"):
            replica.check_health()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base", room=4096, ends=False)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two cores of Ray on this machine; the address at which Ray Serve answers."""
    monkeypatch.delenv("HF_S3T_KEY", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # as in test_ray.py: one process has one way for all its clusters
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    path = os.pathsep.join([str(Path(served.__file__).parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        ray_serve.shutdown()
    finally:
        ray.shutdown()


def replicas() -> set[int]:
    """Processes of this test's replicas."""
    processes = psutil.process_iter(["pid", "cmdline"])
    return {one.pid for one in processes if f"ServeReplica:{NAME}:" in " ".join(one.info["cmdline"] or ())}


def delete(store: S3TStore, place: tuple[int, int]) -> float:
    """Another process deletes a slice; when it had done so."""
    code = f"import sys; from hf_s3t import S3TStore; S3TStore(sys.argv[1]).delete(slices=[{place}])"
    subprocess.run([sys.executable, "-c", code, str(store.path)], check=True)
    return time.monotonic()


@pytest.mark.slow
def test_two_replicas_follow_the_store_and_nobody_misses_one_that_is_killed(
    cluster: str, base: Path, tmp_path: Path
) -> None:
    store = served.copy("llama", tmp_path)
    two = {"min_replicas": 2, "max_replicas": 2}
    options: dict[str, Any] = {"base": str(base), "name": "tiny", "refresh_seconds": REFRESH, "autoscaling": two}
    ray_serve.run(application({"store": str(store.path), "resources": {"CPU": 0.5}, **options}), name=NAME)
    both = replicas()
    assert len(both) == 2
    stop, found = threading.Event(), []

    def ask() -> int:
        client = openai.OpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=5)
        while not stop.is_set():
            began = time.monotonic()
            found.append((began, client.completions.create(**ASKED).system_fingerprint))
        return 1

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        wait_until(lambda: len(found) > 20)
        deletions = [delete(store, (0, 1))]
        wait_until(lambda: time.monotonic() > deletions[0] + REFRESH + 1.5)
        os.kill(min(both), signal.SIGKILL)
        deletions.append(delete(store, (1, 1)))
        wait_until(lambda: len(replicas()) == 2 and min(both) not in replicas(), 60)
        replaced = time.monotonic()
        wait_until(lambda: time.monotonic() > replaced + 1.5)
        stop.set()
        assert [one.result() for one in asking] == [1] * 4  # no request failed for good
    for generation, deleted in enumerate(deletions, 1):
        late = {int(name.rpartition("-")[2]) for began, name in found if began > deleted + REFRESH + 1}
        assert late and min(late) >= generation
    assert len({name for _, name in found}) == 3
    _streams_and_refuses(cluster)


def _streams_and_refuses(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    pieces = list(client.completions.create(**{**ASKED, "max_tokens": 40, "stream": True}))
    assert len(pieces) > 5 and pieces[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="`n` is not supported here"):
        client.completions.create(**{**ASKED, "n": 2})
    assert httpx.get(f"{url}/health").json()["generation"] == 2
    assert httpx.request("DELETE", f"{url}/v1/examples", json={"ids": ["x"]}).status_code == 404
