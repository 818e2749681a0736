"""How long an answer waits because a model forgets meanwhile, and how much memory that takes in the end.

The store and the model of `serving.py`. Threads generate without a break, an answer of two seconds and more each:
after every token a streamer waits, as for a slow reader. That is done twice: without a deletion, and while ids are
deleted one after the other.

* `wait_ms_p999`, `wait_ms_p999_without`: the 99.9th percentile of the time from the call of `generate` to its first
  forward pass, with deletions and without; of fewer than 1,000 answers that is the longest.
* `wait_ms_more`: the difference.
* `delete_ms_longest`: the longest `delete`, with all durable writes.
* `drained_seconds_longest`: how long after a `delete` the last answer that had begun before it ended.
* `deletions`, `answers`, `answers_without`: how many there were.
* `memory_mb_more`: what the process has more in memory after the deletions than after the load without them.

```bash
python benchmarks/waiting.py --json waiting.json
python benchmarks/waiting.py --quick
```
"""

from __future__ import annotations

import gc
import json
import logging
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hf_s3t import S3TEnsemble, S3TStore
from serving import KEY, QUICK, Settings, base_model, build_store, make_parser, record, rows_by_place, tokens


@dataclass(frozen=True)
class Load:
    """What is asked, and deleted."""

    threads: int = 4
    new_tokens: int = 12
    pause: float = 0.18  # seconds after every token
    deletions: int = 100
    seconds: float = 75.0  # of each of the two loads


BRIEF = Load(threads=2, new_tokens=4, pause=0.05, deletions=3, seconds=1.5)


class SlowReader(BaseStreamer):
    """Takes its time over every token."""

    def __init__(self, pause: float):
        self.pause = pause

    def put(self, value: Any) -> None:
        """Waits."""
        time.sleep(self.pause)

    def end(self) -> None:
        """Has nothing to do."""


class Askers:
    """Threads that generate until they are stopped."""

    def __init__(self, ensemble: S3TEnsemble, load: Load, prompt: torch.Tensor):
        self.ensemble, self.load, self.prompt = ensemble, load, prompt
        self.waits: list[float] = []
        self._asked = threading.local()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(load.threads)]
        self._hook = ensemble.get_input_embeddings().register_forward_pre_hook(self._begins)

    def _begins(self, *args: Any) -> None:
        asked = getattr(self._asked, "at", None)
        if asked is not None:
            self.waits.append(time.perf_counter() - asked)
            self._asked.at = None

    def _ask(self) -> None:
        while not self._stop.is_set():
            self._asked.at = time.perf_counter()
            self.ensemble.generate(
                self.prompt, max_new_tokens=self.load.new_tokens, do_sample=False, streamer=SlowReader(self.load.pause)
            )

    def __enter__(self) -> Askers:
        for thread in self._threads:
            thread.start()
            time.sleep(self.load.pause / self.load.threads)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._hook.remove()


def resident_mb() -> float:
    """What this process has in memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def percentile(values: list[float], share: float) -> float:
    """The smallest value that no more than a share of them is above."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def deletions_under_load(ensemble: S3TEnsemble, store: S3TStore, settings: Settings, load: Load) -> dict[str, float]:
    """Deletes one id after the other, spread over the time of the load; seconds of the slowest."""
    names = [name for _, name in sorted(rows_by_place(store, settings).items())]
    more = [f"row-{number}" for number in range(settings.rows) if f"row-{number}" not in set(names)]
    slowest, drained = 0.0, 0.0
    for name in (more + names)[: load.deletions]:
        began = time.perf_counter()
        ensemble.delete(ids=[name])
        done = time.perf_counter()
        slowest = max(slowest, done - began)
        if load.deletions < 10 or int(name.removeprefix("row-")) % 20 == 0:  # the others do not wait for old answers
            ensemble.drained()
            drained = max(drained, time.perf_counter() - done)
        time.sleep(max(load.seconds / load.deletions - (time.perf_counter() - began), 0))
    return {"delete_ms_longest": 1e3 * slowest, "drained_seconds_longest": drained}


def run(settings: Settings, load: Load, seed: int) -> dict[str, float]:
    """Both loads, on one model."""
    with tempfile.TemporaryDirectory() as folder:
        store = build_store(Path(folder) / "store", settings, seed)
        ensemble = S3TEnsemble.from_pretrained(store.path, base_model(settings, seed), key=KEY)
        prompt = tokens(settings, seed)[:1, :8]
        with Askers(ensemble, load, prompt) as without:
            time.sleep(load.seconds)
        before = resident_mb()
        with Askers(ensemble, load, prompt) as asking:
            figures = deletions_under_load(ensemble, store, settings, load)
        waits = {"wait_ms_p999": asking.waits, "wait_ms_p999_without": without.waits}
        figures |= {name: 1e3 * percentile(values, 0.999) for name, values in waits.items()}
        figures["wait_ms_more"] = figures["wait_ms_p999"] - figures["wait_ms_p999_without"]
        counts = {"deletions": load.deletions, "answers": len(asking.waits), "answers_without": len(without.waits)}
        members = {"generation": ensemble.generation, "members": len(ensemble.members)}
        return figures | counts | members | {"memory_mb_more": resident_mb() - before}


def main() -> None:
    """Runs the benchmark."""
    options = make_parser(__doc__).parse_args()
    settings, load = (QUICK, BRIEF) if options.quick else (Settings(), Load())
    torch.set_num_threads(settings.threads)
    logging.getLogger("hf_s3t").setLevel(logging.ERROR)  # shards die here, on purpose
    figures = run(settings, load, options.seed)
    for name, value in figures.items():
        print(f"{name:<26} {value:.4g}")
    if options.json:
        found = record(settings, options.seed, figures)
        found |= {"name": "waiting", "settings": found["settings"] | asdict(load)}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
