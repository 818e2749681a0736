"""Threads that ask without a break while deletions and repairs land, many times over.

Each round has one change in the middle of the answers of four threads: an answer equals the one before or the one
after it, as a model that nobody else uses gives them. Then everybody rests, and memory is looked at.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_s3t import S3TEnsemble, S3TStore
from hf_s3t.lora.adapter import Adapter
from served import ROUNDING, inputs_of, prompts
from trainers import BASES, make_trainer

LONG = 60.0
SETTINGS = {"max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 0}


def logits_of(ensemble: S3TEnsemble, count: int) -> torch.Tensor:
    """The scores of a greedy generation, `(tokens, batch, vocabulary)`."""
    output = ensemble.generate(**prompts(count), return_dict_in_generate=True, output_logits=True, **SETTINGS)
    return torch.stack(output.logits)


@torch.no_grad()
def forward(ensemble: S3TEnsemble) -> torch.Tensor:
    return ensemble(**inputs_of("llama")).logits


ASKED: tuple[Callable[[S3TEnsemble], torch.Tensor], ...] = (
    lambda ensemble: logits_of(ensemble, 4),
    lambda ensemble: ensemble.generate(**prompts(6), **SETTINGS),
    lambda ensemble: ensemble.generate(**prompts(2), num_beams=2, do_sample=False, **SETTINGS),
    lambda ensemble: forward(ensemble) if random.random() < 0.5 else logits_of(ensemble, 6),
)
"""What the threads ask, one each."""


def same(answer: torch.Tensor, expected: torch.Tensor) -> bool:
    """To rounding: the trunk of a model loaded anew may be another one."""
    return answer.shape == expected.shape and torch.allclose(answer.double(), expected.double(), **ROUNDING)


class Expected:
    """What a model of its own, loaded anew from the store as it is, answers."""

    def __init__(self, store: S3TStore):
        fresh = S3TEnsemble.from_pretrained(store.path, BASES["llama"][0]())
        self.members = fresh.members
        self.answers = [[ask(fresh)] for ask in ASKED[:3]] + [[forward(fresh), logits_of(fresh, 6)]]

    def gives(self, asked: int, answer: torch.Tensor) -> bool:
        return any(same(answer, expected) for expected in self.answers[asked])

    def differs(self, other: Expected) -> bool:
        return (self.answers[3][0] - other.answers[3][0]).abs().max() > 1e-3


class Askers:
    """Four threads that ask in rounds."""

    def __init__(self, ensemble: S3TEnsemble, pool: ThreadPoolExecutor):
        self.ensemble = ensemble
        self.changed = threading.Event()
        self.stopped = False
        self.gathered = threading.Barrier(len(ASKED) + 1)
        self.begun = [threading.Event() for _ in ASKED]
        self.answers: list[tuple[int, bool, torch.Tensor]] = []
        self._running = [pool.submit(self._ask, asked) for asked in range(len(ASKED))]

    def _ask(self, asked: int) -> None:
        try:
            while True:
                self.gathered.wait(LONG)
                if self.stopped:
                    return
                after = False
                while not after:  # the last one begins after the change
                    after = self.changed.is_set()
                    self.begun[asked].set()
                    self.answers.append((asked, after, ASKED[asked](self.ensemble)))
                self.gathered.wait(LONG)
        except threading.BrokenBarrierError:
            pass
        except BaseException:
            self.gathered.abort()
            raise

    def around(self, change: Callable[[], Any]) -> list[tuple[int, bool, torch.Tensor]]:
        """The answers of a round with a change in its middle: what was asked, whether after the change, the answer."""
        self.answers.clear()
        self.changed.clear()
        for event in self.begun:
            event.clear()
        try:
            self.gathered.wait(LONG)
            for event in self.begun:
                assert event.wait(LONG)
            change()
            self.changed.set()
            self.gathered.wait(LONG)
        except threading.BrokenBarrierError:
            for future in self._running:
                future.result(LONG)
            raise
        return self.answers

    def __enter__(self) -> Askers:
        return self

    def __exit__(self, error: Any, *about: Any) -> None:
        self.stopped = True
        self.changed.set()
        if error is not None:
            self.gathered.abort()
            return
        self.gathered.wait(LONG)
        for future in self._running:
            future.result(LONG)


def repair(store: S3TStore, patterns: dict[Any, Adapter], seed: int) -> None:
    """Writes every missing stage, with numbers that were never there, as a training does."""
    generator = torch.Generator().manual_seed(seed)
    with store.writing():
        manifest = store.manifest()
        stages = dict(manifest.stages)
        for stage in manifest.plan.missing(manifest.stages):
            config, tensors = patterns[stage]
            drawn = {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in tensors.items()}
            stages[stage] = store.write_stage(stage, Adapter.from_tensors(config, drawn))
        store.write_manifest(replace(manifest, stages=stages))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held(ensemble: S3TEnsemble) -> dict[str, tuple[int, int]]:
    """Where each of the model's tensors lies, and the size of its storage."""
    tensors = {**dict(ensemble.named_parameters()), **dict(ensemble.named_buffers())}
    return {name: (value.data_ptr(), value.untyped_storage().nbytes()) for name, value in tensors.items()}


def alive() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    kinds = torch.Tensor, torch.nn.Parameter  # what a compiler pretends lies nowhere
    tensors = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return sum({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}.values())


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Whoever waits for the interpreter gets it soon: a change touches many small files among busy threads."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_threads")
@pytest.mark.parametrize("cycles", [5, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_answers_are_of_before_or_after_whatever_lands(cycles: int, tmp_path: Path) -> None:
    config = {"num_shards": 3, "budget": None, "sequence_selection": [[0, 1], [1]], "layers_per_slice": 1}
    make_trainer(tmp_path / "store", config=config, args={"learning_rate": 5e-2}).train()
    store, elsewhere = S3TStore(tmp_path / "store"), S3TStore(tmp_path / "store")
    patterns = {stage: store.read_stage(stage) for stage in store.manifest().stages}
    ensemble = S3TEnsemble.from_pretrained(store.path, BASES["llama"][0]())
    where, draw, counts = held(ensemble), random.Random(0), {"before": 0, "after": 0, "states": 0, "dead": 0}
    sizes: dict[int, tuple[int, int]] = {}
    before = Expected(store)

    def change(cycle: int, repairs: bool) -> None:
        if repairs:
            repair(elsewhere, patterns, cycle)
            ensemble.refresh()
            return
        places = draw.sample(
            [(shard, slice_id) for shard in range(3) for slice_id in range(2)], draw.choice([1, 2, 6])
        )
        if cycle % 5:
            ensemble.delete(slices=places)
        else:
            elsewhere.delete(slices=places)
            ensemble.refresh()

    with ThreadPoolExecutor(len(ASKED)) as pool, Askers(ensemble, pool) as askers:
        for cycle in range(1, cycles + 1):
            for repairs in (False, True):
                answers = askers.around(partial(change, cycle, repairs))
                after = Expected(store)
                assert ensemble.members == after.members and ensemble.generation == store.manifest().generation
                for asked, late, answer in answers:
                    was, now = before.gives(asked, answer), after.gives(asked, answer)
                    assert now or (was and not late), f"cycle {cycle}: an answer of neither state"
                    counts["before"] += was and not now
                    counts["after"] += now and not was
                counts["states"] += after.differs(before)
                counts["dead"] += not after.members
                before = after
                assert held(ensemble) == where
            if cycle in (3, 20, cycles):
                del answers, answer  # whichever came last
                askers.answers.clear()
                sizes[cycle] = alive(), resident()

    assert min(counts["before"], counts["after"], counts["states"]) > cycles and counts["dead"] > cycles / 10
    assert len({tensors for tensors, _ in sizes.values()}) == 1
    if cycles >= 200:
        assert sizes[200][1] <= 1.05 * sizes[20][1] + 20e6
