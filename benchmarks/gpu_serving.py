"""What an ensemble costs on this device, and what deletions do to answers: `--part serving` of `gpu.py`.

A base in Llama-2-7B's shape in bf16, and stores whose stages hold random numbers in all linear layers of the whole
depth (`build_store` of `serving.py`), on the local disk; one of one shard, and one of five.

`load`: seconds of `S3TEnsemble.from_pretrained` for a base that is loaded already: `first_seconds` on a machine that
has never seen it, `again_seconds` on one that remembers it.

The others, beside stock PEFT with one adapter on a second copy of the base. The two take turns; medians:

* `prefill_tokens_per_s`: rows times the length of the prompt, over a generation of one token;
* `decode_tokens_per_s`: rows times steps, over a generation of many tokens less that of one;
* `stock_*`: the same of stock PEFT; `prefill_over_stock`, `decode_over_stock`: time over its time in the same turn.

`deletions under load`: threads generate all the time, at first without deletions (`quiet_*`), then while ids are
deleted one after the other (`busy_*`):

* `*_tokens_per_s`: of all threads;
* `*_longest_wait_ms`: from asking to the answer's first forward pass, by the host's clock, of the answer that waited
  longest; `*_median_wait_ms`: of all;
* `free_seconds`: until new answers are free of an id, which is when `delete` returns, the median; and
  `free_longest_seconds`.
"""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_runs import Case, Note, NotRun, drawn_in, free_memory, now, on_gpu
from peft import PeftModel

import serving
from hf_s3t import S3TEnsemble, S3TStore, Stage
from hf_s3t.store.base_identity import memory_path
from serving import build_store, copy_store, ratios, rows_by_place


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    store: serving.Settings = field(
        default_factory=lambda: serving.Settings(
            layers=32, hidden=4096, intermediate=11008, heads=32, vocabulary=32000, num_shards=5, num_slices=4,
            orders=((0, 1, 2, 3), (2, 3, 0, 1)), r=4, rows=400,
        )
    )  # fmt: skip
    members: tuple[int, ...] = (1, 5)
    rows: tuple[int, ...] = (1, 16)
    length: int = 256
    new_tokens: int = 32
    turns: int = 3
    threads: int = 4
    rows_of_thread: int = 4
    quiet_seconds: float = 10.0
    pause_seconds: float = 1.0
    deleted_slices: tuple[int, ...] = (0, 3)


QUICK = Settings(
    store=serving.Settings(
        layers=4, hidden=64, intermediate=160, heads=4, vocabulary=256, num_shards=5, num_slices=4,
        orders=((0, 1, 2, 3), (2, 3, 0, 1)), r=2, rows=400,
    ),
    length=16, new_tokens=4, turns=1, threads=2, rows_of_thread=1, quiet_seconds=0.5, pause_seconds=0.02,
    deleted_slices=(0,),
)  # fmt: skip


class Served:
    """Stores, a base under stock PEFT, and another one under the ensemble of one store at a time."""

    def __init__(self, settings: Settings, seed: int, scratch: Path):
        self.settings, self.seed, self.scratch = settings, seed, scratch
        self.stores: dict[int, S3TStore] = {}
        self.bases: list[Any] = []
        self.ensemble: Any = None
        self.members = 0
        self.stock: Any = None

    def take(self, members: int, stock: bool = False) -> None:
        """Makes what is measured, unless it is there."""
        if not self.bases:
            self.bases = [self._base(), self._base()]
        if members not in self.stores:
            shape = replace(self.settings.store, num_shards=members)
            self.close()
            self.stores[members] = build_store(self.scratch / f"store-{members}", shape, self.seed, self.bases[0])
        if stock and self.stock is None:
            self.stock = self._stock(self.stores[members])
        if self.members != members:
            self.load(self.stores[members], members)

    def _base(self) -> Any:
        with drawn_in(torch.bfloat16):
            return serving.base_model(self.settings.store, self.seed)

    def _stock(self, store: S3TStore) -> Any:
        """One served prefix as an adapter of stock PEFT."""
        folder = self.scratch / "adapter"
        store.export(folder, prefix=Stage(0, self.settings.store.orders[0]))
        model = PeftModel.from_pretrained(self.bases[1], folder, adapter_name="shard-0")
        model.set_adapter("shard-0")
        return model.eval()

    def load(self, store: S3TStore, members: int) -> None:
        """An ensemble in the place of the one before."""
        self.close()
        self.ensemble, self.members = S3TEnsemble.from_pretrained(store, self.bases[0]), members

    def close(self) -> None:
        """Gives the base back."""
        if self.ensemble is not None:
            self.ensemble.detach()
        self.ensemble, self.members = None, 0
        free_memory()

    def prompt(self, rows: int) -> torch.Tensor:
        """A batch of random tokens, `(rows, length)`."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = rows, self.settings.length
        return torch.randint(1, self.settings.store.vocabulary, shape, generator=generator).to(self.bases[0].device)

    # ---- what is measured ----

    def measure_load(self, members: int, note: Note) -> None:
        """Loading alone."""
        memory_path().unlink(missing_ok=True)
        for name in ("first", "again"):
            self.close()
            began = now()
            self.load(self.stores[members], members)
            note(**{f"{name}_seconds": now() - began})
        assert len(self.ensemble.members) == members

    @torch.no_grad()
    def measure_answers(self, rows: int, graphs: bool, note: Note) -> None:
        """Prefill and decode, beside stock PEFT."""
        settings, prompt = self.settings, self.prompt(rows)
        longer = settings.new_tokens + 1
        with decoding_graphs(self.ensemble, graphs):
            seconds = in_turn(
                settings.turns,
                {
                    "own": partial(generate, self.ensemble, prompt, 1),
                    "own_long": partial(generate, self.ensemble, prompt, longer),
                    "stock": partial(generate, self.stock, prompt, 1),
                    "stock_long": partial(generate, self.stock, prompt, longer),
                },
            )
        steps = {who: differences(seconds[f"{who}_long"], seconds[who]) for who in ("own", "stock")}
        for who, begins in (("own", ""), ("stock", "stock_")):
            prefill, decode = statistics.median(seconds[who]), statistics.median(steps[who])
            note(**{
                f"{begins}prefill_tokens_per_s": rows * settings.length / prefill,
                f"{begins}decode_tokens_per_s": rows * settings.new_tokens / decode,
            })  # fmt: skip
        note(
            prefill_over_stock=statistics.median(ratios(seconds["own"], seconds["stock"])),
            decode_over_stock=statistics.median(ratios(steps["own"], steps["stock"])),
        )

    def measure_deletions(self, members: int, note: Note) -> None:
        """The same load without deletions and with them."""
        settings = self.settings
        store = copy_store(self.stores[members], self.scratch / "deletions")
        self.load(store, members)
        places = rows_by_place(store, settings.store)
        names = [places[shard, slice_id] for slice_id in settings.deleted_slices for shard in range(members)]
        free: list[float] = []

        def delete_all() -> None:
            for name in names:
                time.sleep(settings.pause_seconds)
                began = time.perf_counter()
                self.ensemble.delete(ids=[name])
                free.append(time.perf_counter() - began)
                note(free_seconds=statistics.median(free), free_longest_seconds=max(free), deletions=len(free))

        for name, meanwhile in (("quiet", lambda: time.sleep(settings.quiet_seconds)), ("busy", delete_all)):
            load = Load(self.ensemble, self.prompt(settings.rows_of_thread), settings)
            load.run(meanwhile)
            note(**{f"{name}_{figure}": value for figure, value in load.figures().items()})
        self.close()
        shutil.rmtree(store.path)

    def end(self) -> None:
        """Gives all memory back."""
        self.stock = None
        self.bases.clear()
        self.close()


class Load:
    """Threads that generate all the time."""

    def __init__(self, model: Any, prompt: torch.Tensor, settings: Settings):
        self.model, self.prompt, self.settings = model, prompt, settings
        self.waits: list[float] = []
        self.answers: list[int] = []  # tokens of each
        self.began = self.seconds = 0.0
        self._asked, self._stop, self._errors = threading.local(), threading.Event(), list[BaseException]()
        self._warm = threading.Barrier(settings.threads + 1, action=self._begin)

    def run(self, meanwhile: Callable[[], None]) -> None:
        """Generates as long as something else takes."""
        hook = self.model.get_input_embeddings().register_forward_pre_hook(self._begins)
        threads = [threading.Thread(target=self._keep_asking) for _ in range(self.settings.threads)]
        for thread in threads:
            thread.start()
        try:
            self._warm.wait()
            meanwhile()
        except threading.BrokenBarrierError:
            pass  # a thread has failed; its error is raised below
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
            hook.remove()
        self.seconds = now() - self.began
        if self._errors:
            raise self._errors[0]

    def _begin(self) -> None:
        """Every thread has answered once: what is set up once is not in the figures."""
        self.waits.clear()
        self.answers.clear()
        self.began = now()

    def _keep_asking(self) -> None:
        try:
            self._ask()
            self._warm.wait()
            while not self._stop.is_set():
                self._ask()
        except BaseException as error:
            self._errors.append(error)
            self._warm.abort()

    def _ask(self) -> None:
        self._asked.at = time.perf_counter()
        answer = generate(self.model, self.prompt, self.settings.new_tokens)
        self.answers.append(answer.numel() - self.prompt.numel())

    def _begins(self, *_: Any) -> None:
        """The first forward pass of an answer begins."""
        asked = getattr(self._asked, "at", None)
        if asked is not None:
            self.waits.append(time.perf_counter() - asked)
            self._asked.at = None

    def figures(self) -> dict[str, float]:
        """Of all threads."""
        return {
            "tokens_per_s": sum(self.answers) / self.seconds,
            "longest_wait_ms": 1e3 * max(self.waits),
            "median_wait_ms": 1e3 * statistics.median(self.waits),
            "answers": len(self.answers),
        }


@torch.no_grad()
def generate(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy generation of as many tokens; no token ends it."""
    mask = torch.ones_like(prompt)
    return model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=count, do_sample=False)


@contextmanager
def decoding_graphs(ensemble: Any, on: bool) -> Iterator[None]:
    """Decodes with graphs, or without.

    Raises:
        NotRun: there are none here.
    """
    if on and not (on_gpu() and hasattr(ensemble, "decode_graphs")):
        raise NotRun("decoding graphs need a GPU" if not on_gpu() else "this ensemble has no decoding graphs")
    if not hasattr(ensemble, "decode_graphs"):
        yield
        return
    before, ensemble.decode_graphs = ensemble.decode_graphs, on
    try:
        yield
    finally:
        ensemble.decode_graphs = before


def in_turn(turns: int, things: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each thing, the device waited for; the first turn is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in things}
    for turn in range(turns + 1):
        for name, thing in things.items():
            began = now()
            thing()
            if turn:
                found[name].append(now() - began)
    return found


def differences(long: Sequence[float], short: Sequence[float]) -> list[float]:
    """What the steps after the first token took."""
    return [one - other for one, other in zip(long, short, strict=True)]


def cases(settings: Settings, seed: int, scratch: Path) -> Iterator[Case]:
    """Loading, answers and deletions."""
    served = Served(settings, seed, scratch)
    for members in settings.members:
        who = f"{members} member{'s' if members > 1 else ''}"
        take = partial(served.take, members)
        yield Case(f"serving {who} load", "load", partial(served.measure_load, members), take)
        for rows in settings.rows:
            for graphs in (False, True):
                yield Case(
                    f"serving {who} {rows} rows graphs {'on' if graphs else 'off'}", f"answers {members}",
                    partial(served.measure_answers, rows, graphs), partial(take, stock=True),
                )  # fmt: skip
        if members == max(settings.members):
            name = f"serving {who} deletions under load"
            yield Case(name, "deletions", partial(served.measure_deletions, members), take)
    served.end()
