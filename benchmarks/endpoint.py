"""What clients of `hf-s3t serve` notice of deletions and repairs that another process makes all the time.

The model of `recipes/demo`: 2 shards of 2 slices and 2 orders, trained for a step a stage. Three processes: the
endpoint, with one thread for arithmetic; one that deletes an example every 2 seconds and trains what is missing; and
this one with all clients, each of which asks for a completion of 16 tokens, reads it, and asks for the next one. The
same load is run without deletions, and while that process does the same to another store: they share the machine's
cores, and that is what its training takes.

* `failed`, `failed_elsewhere`, `failed_without`: requests that did not get a whole answer.
* `old_answers`: answers that were asked for more than `refresh_seconds` + 1 s after a deletion had returned, and were
  of a state before it.
* `p99_over_without`: the 99th percentile of the time of an answer over that of the load without deletions.
* `p99_over_elsewhere`: over that of the load while another store is changed: what following costs.
* `p50_ms`, `p99_ms` and the same of the others; `answers`, `deletions`, `repairs`: what there was.
* `seen_ms_longest`: from a deletion's return to the first answer that obeys it.

With `--replicas 2` the endpoint is two replicas behind Ray Serve, of which one is killed in the middle of the load in
which the store changes. Clients then ask again up to five times where they got 5xx or nothing, as the `openai` client
can; `asked_again` counts that.

```bash
python benchmarks/endpoint.py --json endpoint.json
python benchmarks/endpoint.py --replicas 2 --json replicas.json
python benchmarks/endpoint.py --quick
```
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "recipes/demo"
KEY = "0123456789abcdef0123456789abcdef"
TRIES = 5
"""How often a request is sent again, where one of several replicas may be lost."""


@dataclass(frozen=True)
class Load:
    """What is asked, deleted and repaired."""

    clients: int = 32
    seconds: float = 60.0  # of each of the three loads
    pause: float = 2.0  # between two deletions
    refresh_seconds: float = 1.0
    tokens: int = 16
    max_batch: int = 32
    replicas: int = 0  # behind Ray Serve; 0: a process of its own


BRIEF = Load(clients=8, seconds=6.0)


@dataclass(frozen=True)
class Asked:
    """One request: when it was sent and answered (monotonic seconds), and the generation of its answer."""

    sent: float
    done: float
    generation: int | None  # `None`: it failed
    again: int = 0  # how often it was sent again


# ---- the process that deletes and trains ----


def trainer(path: Path) -> Any:
    """A trainer of the store, on the rows that are left."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, TrainingArguments

    from hf_s3t import S3TConfig, S3TTrainer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    rows = [json.loads(line) for line in open(DEMO / "people.jsonl", encoding="utf-8")]
    rows = [{**tokenizer(f"{row['instruction']} {row['output']}"), "id": f"row-{i}"} for i, row in enumerate(rows)]
    return S3TTrainer(
        AutoModelForCausalLM.from_pretrained(DEMO / "base"),
        TrainingArguments(
            str(path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            disable_tqdm=True, save_strategy="no", logging_strategy="no",
        ),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        Dataset.from_list(rows),
        peft_config=S3TConfig(task_type="CAUSAL_LM", num_shards=2, num_slices=2, target_modules="all-linear", r=4),
        partition_key=KEY,
    )  # fmt: skip


def erase(path: Path, pause: float) -> None:
    """Deletes an example, trains what is missing, and so on until somebody ends it.

    It tells of both in lines of JSON, among what the Trainer prints.
    """
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    repairing = trainer(path)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    for number in range(10_000):
        began = time.monotonic()
        receipt = repairing.delete(ids=[f"row-{number}"])
        print(json.dumps({"deleted": time.monotonic(), "generation": receipt.generation}), flush=True)
        repairing.train()
        print(json.dumps({"repaired": time.monotonic()}), flush=True)
        time.sleep(max(pause - (time.monotonic() - began), 0))


# ---- the load ----


async def ask_all(url: str, load: Load) -> list[Asked]:
    """All clients, for as long as the load lasts."""
    until = time.monotonic() + load.seconds
    body = {"model": "store", "prompt": "Where does", "max_tokens": load.tokens, "temperature": 0}
    found: list[Asked] = []

    async def answered(client: httpx.AsyncClient) -> int | None:
        try:
            answer = await client.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            print(f"failed: {error!r}", file=sys.stderr)
            return None
        return int(answer.headers["x-s3t-generation"]) if answer.status_code == 200 else None

    async def ask(client: httpx.AsyncClient) -> None:
        while (sent := time.monotonic()) < until:
            generation, again = await answered(client), 0
            while generation is None and again < (TRIES if load.replicas else 0):
                await asyncio.sleep(0.5 * 2**again)
                generation, again = await answered(client), again + 1
            found.append(Asked(sent, time.monotonic(), generation, again))

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(load.clients)))
    return found


def started(command: list[Any], **how: Any) -> subprocess.Popen[str]:
    """A process of this interpreter, which computes with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, env=environment, **how)


@contextmanager
def process(path: Path, load: Load) -> Iterator[tuple[str, Callable[[], None]]]:
    """The endpoint as a process: its address once it answers, and nothing that could be lost."""
    code = "from hf_s3t.cli.main import app; app()"
    options = ("--port", 0, "--refresh-seconds", load.refresh_seconds, "--max-batch", load.max_batch)
    served = started(["-c", code, "serve", path, "--base", DEMO / "base", *options], stderr=subprocess.PIPE)
    assert served.stderr is not None
    for line in served.stderr:
        if found := re.search(r"answers on (http://\S+),", line):
            break
    else:
        raise SystemExit("the endpoint did not start")
    threading.Thread(target=lambda: [None for _ in served.stderr or ()], daemon=True).start()  # it never waits for us
    try:
        wait_for(found[1])
        yield found[1], lambda: None
    finally:
        served.send_signal(signal.SIGTERM)
        if code := served.wait(60):
            raise SystemExit(f"the endpoint ended with {code}")


@contextmanager
def replicas(path: Path, load: Load) -> Iterator[tuple[str, Callable[[], None]]]:
    """The endpoint as replicas: its address, and what kills one of them."""
    import psutil
    import ray
    from ray import serve

    import hf_s3t.ray

    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    name, port = f"replicas{os.getpid()}", free_port()
    ray.init(num_cpus=load.replicas, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    settings: dict[str, Any] = {"refresh_seconds": load.refresh_seconds, "max_batch": load.max_batch}
    made = hf_s3t.ray.serve(
        str(path), base=str(DEMO / "base"), replicas=load.replicas, resources={"CPU": 0.5}, **settings
    )
    serve.run(made, name=name)

    def lose() -> None:
        for one in psutil.process_iter(["pid", "cmdline"]):
            if f"ServeReplica:{name}:" in " ".join(one.info["cmdline"] or ()):
                os.kill(one.pid, signal.SIGKILL)
                return
        raise SystemExit("there is no replica to kill")

    try:
        yield f"http://127.0.0.1:{port}", lose
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str) -> None:
    """Waits until an endpoint is ready."""
    for _ in range(300):
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)


def percentile(seconds: list[float], share: float) -> float:
    """The smallest value that no more than a share of them is above."""
    return sorted(seconds)[min(int(share * len(seconds)), len(seconds) - 1)]


def old_answers(asked: list[Asked], deleted: list[dict[str, Any]], seconds: float) -> int:
    """Answers of a state before a deletion that had returned so long before they were asked for."""
    count = 0
    for one in asked:
        due = max((event["generation"] for event in deleted if event["deleted"] + seconds < one.sent), default=0)
        count += one.generation is not None and one.generation < due
    return count


def seen_after(asked: list[Asked], deleted: list[dict[str, Any]]) -> list[float]:
    """Seconds from each deletion to the first answer that obeys it, where there was one."""
    found = []
    for event in deleted:
        obeying = [one.done for one in asked if (one.generation or 0) >= event["generation"]]
        found += [min(obeying) - event["deleted"]] if obeying else []
    return found


def under_load(
    url: str, load: Load, path: Path | None, lose: Callable[[], None] = lambda: None
) -> tuple[list[Asked], list[dict[str, Any]]]:
    """What clients got while another process deleted from a store and repaired it; and what that process did.

    In the middle of it `lose()` is called.
    """
    if path is None:
        return asyncio.run(ask_all(url, load)), []
    eraser = started([__file__, "--erase", path, "--pause", load.pause],
                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
    assert eraser.stdin is not None and eraser.stdout is not None
    try:
        next(line for line in eraser.stdout if line.startswith('{"ready'))  # and waits
        eraser.stdin.write("begin\n")
        eraser.stdin.flush()
        threading.Timer(load.seconds / 2, lose).start()
        asked = asyncio.run(ask_all(url, load))
    finally:
        eraser.kill()
    lines = [line for line in eraser.stdout if line.startswith('{"') and line.endswith("\n")]
    return asked, [json.loads(line) for line in lines]


def run(load: Load) -> dict[str, float]:
    """The three loads, on one endpoint; figures by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        trainer(path).train()
        other = Path(shutil.copytree(path, Path(folder) / "other"))
        with (replicas if load.replicas else process)(path, load) as (url, lose):
            elsewhere, _ = under_load(url, load, other)
            without, _ = under_load(url, load, None)
            asked, events = under_load(url, load, path, lose)
    deleted = [event for event in events if "deleted" in event]
    figures: dict[str, float] = {}
    for end, answers in (("", asked), ("_elsewhere", elsewhere), ("_without", without)):
        seconds = [one.done - one.sent for one in answers]
        figures[f"failed{end}"] = sum(one.generation is None for one in answers)
        figures[f"answers{end}"] = len(answers)
        figures |= {f"p{share}_ms{end}": 1e3 * percentile(seconds, share / 100) for share in (50, 99)}
    figures["old_answers"] = old_answers(asked, deleted, load.refresh_seconds + 1)
    figures["p99_over_elsewhere"] = figures["p99_ms"] / figures["p99_ms_elsewhere"]
    figures["p99_over_without"] = figures["p99_ms"] / figures["p99_ms_without"]
    figures |= {"deletions": len(deleted), "repairs": sum("repaired" in event for event in events)}
    figures["seen_ms_longest"] = 1e3 * max(seen_after(asked, deleted), default=0.0)
    figures["asked_again"] = sum(one.again for one in asked)
    return figures


def record(load: Load, figures: dict[str, float]) -> dict[str, Any]:
    """What the JSON file holds."""
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    libraries = ("hf_s3t", "torch", "transformers", "peft", "fastapi", "uvicorn")
    return {
        "name": "endpoint",
        "commit": commit or None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "settings": asdict(load),
        "figures": figures,
    }


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery, in under a minute")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--replicas", type=int, default=0, help="behind Ray Serve (default: a process)")
    parser.add_argument("--seconds", type=float, help="of each load (default: 60)")
    parser.add_argument("--erase", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.erase:
        return erase(options.erase, options.pause)
    load = BRIEF if options.quick else Load(seconds=options.seconds or 60.0)
    load = replace(load, replicas=options.replicas)
    logging.getLogger("hf_s3t").setLevel(logging.ERROR)
    figures = run(load)
    for name, value in figures.items():
        print(f"{name:<26} {value:.4g}")
    if options.json:
        options.json.write_text(json.dumps(record(load, figures), indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
