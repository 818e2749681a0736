"""What an ensemble of several shards costs to serve, and how fast it forgets.

A Llama-shaped model of 16 layers and a store of 5 shards with 16 stages each: real files, manifest, index and state,
filled with random numbers, since nothing here depends on what was learnt. A layer group has two layers; every shard
has two orders, so that a deletion can move it to a prefix that is not in memory yet.

Time of an answer, for served prefixes of every depth (a batch of 4 x 64 tokens, no cache). One thread computes, and
its CPU time is taken: on an idle machine that is the time that passes, and other programs do not count.

* `batched_over_switching`: the ensemble's one batch over what stock PEFT offers, `set_adapter` and a forward pass per
  member, averaged alike. Where arithmetic is the limit it cannot be below the predicted ratio over the number of
  members, which is 1 where all layers have LoRA: the figure is of the depth where half of the layers have it.
* `few_tokens_over_switching`: the same for a batch of 4 x 1 tokens, as many as a step of generation computes; of the
  full depth.
* `ensemble_over_predicted`: (ensemble over one member) over the ratio that counting operations gives: the layers
  below the lowest LoRA once, the others and the head once per member; layers' projections, attention and LoRA are
  counted. One member is the same prefix alone, exported and loaded by stock PEFT. The figure is of the worst depth.
* `decode_over_one`: a step of generation with a cache over one member's, of the depth where half of the layers have
  LoRA.

Forgetting, each time with an id that its shard's served prefix contains:

* `live_deletion_over_copy`: the time until an idle model in memory has forgotten, over reading and copying alone. It
  begins when the store tells the ensemble of it: the intent is durable and nothing else has been done. It ends
  when answers that begin run on the new slots; the old ones, which are zeroed next, are not in it. The reference
  is `safetensors.torch.load_file` of the stages that the new prefix needs and the model lacks, `copy_` into tensors
  of the same shapes, and `zero_` of what goes. Files are in the page cache. Three kinds of deletion: `other`, another
  order of the shard takes over and its stages are read; `shorter`, the order loses its end and nothing is read;
  `dead`, nothing of the shard is left. The figure is of `other`.
* `live_deletion_over_bound`: the same time over three times the reference plus 5 ms; of the slowest kind.
* `busy_ms_more`: what it takes longer when another thread asks all the time; nobody waits for its answers.
* `durable_ms`: the whole of `delete`, less what the model took: reading the store, the intent, all durable writes.
* `gradient_steps`: steps of any optimizer while deleting.
* `store_deletion_seconds`: `S3TStore(folder).delete` of an id without a model, from opening the folder on.

Memory: `member_memory_mb` is what one member adds to the peak of the tensors that are alive during the same forward
pass, to the bare base model's: its weights, its rows and its logits (MB of 1e6 bytes).

```bash
python benchmarks/serving.py --json serving.json
python benchmarks/serving.py --quick
```
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, default_data_collator

from hf_s3t import Plan, S3TConfig, S3TEnsemble, S3TStore, Stage
from hf_s3t.lora.adapter import WEIGHTS_FILE, Adapter
from hf_s3t.lora.layout import find_layout
from hf_s3t.lora.tuner import plain_lora_config
from hf_s3t.serving.members import average_logits
from hf_s3t.store.hashing import read_rows
from hf_s3t.store.manifest import Manifest
from hf_s3t.store.recipe import make_recipe
from hf_s3t.store.state import key_check_value

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "benchmarks/serving.py"
LIMIT_SECONDS = 0.005
"""What a live deletion may take beside three times reading and copying."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    layers: int = 16
    hidden: int = 256
    intermediate: int = 704
    heads: int = 8
    vocabulary: int = 2048
    num_shards: int = 5
    num_slices: int = 8
    orders: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3, 4, 5, 6, 7), (4, 5, 6, 7, 0, 1, 2, 3))
    r: int = 8
    rows: int = 4000
    batch: int = 4
    length: int = 64
    new_tokens: int = 16
    depths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    repeats: int = 7
    rounds: int = 3
    threads: int = 1


QUICK = Settings(
    layers=8, hidden=64, intermediate=160, heads=4, rows=400, batch=2, length=16, new_tokens=4, depths=(4, 8),
    repeats=2, rounds=1,
)  # fmt: skip

Times = dict[str, list[float]]


def make_parser(about: str | None = __doc__) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="check the machinery on a small model, in under a minute")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default: 0)")
    return parser


# ---- a store and its models, without any training ----


def base_model(settings: Settings, seed: int) -> Any:
    """The Llama-shaped model, the same on every call."""
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def s3t_config(settings: Settings) -> S3TConfig:
    """All linear layers, two layers to a layer group."""
    return S3TConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.r,
        target_modules="all-linear",
        num_shards=settings.num_shards,
        num_slices=settings.num_slices,
        id_column="id",
    )


def build_store(path: Path, settings: Settings, seed: int, base: Any = None) -> S3TStore:
    """A store as a training leaves it, over a base that is made where none is given; its stages hold small random
    numbers."""
    base, config = base_model(settings, seed) if base is None else base, s3t_config(settings)
    layout = find_layout(base, config)
    plan = Plan.make(settings.num_shards, settings.num_slices, settings.orders, prune=False)
    arguments = TrainingArguments(str(path), use_cpu=True, report_to=[])
    recipe = make_recipe(config, layout, "id", arguments, base, None, default_data_collator, None, {})
    store = S3TStore(path, KEY)
    store.ensure_key()
    names = Dataset.from_dict({"id": [f"row-{number}" for number in range(settings.rows)]})
    with store.changing(create=True) as state:
        places = itertools.product(range(plan.num_shards), range(plan.num_slices))
        state.begin(key_check_value(store.key), places)
        state.add_examples(read_rows(names, store.key, config)[1])
        for stage in plan.stages:
            state.write_record(stage.name, {"generation": 0, "examples": 1, "steps": 1})
        tombstones = state.tombstones_hmac(store.key)
    generator = torch.Generator().manual_seed(seed)
    files = {}
    for stage in plan.stages:
        layers, tensors = layout.groups[stage.depth - 1], {}
        for module in sorted(layout.module_names(layers)):
            rows, columns = base.get_submodule(module).weight.shape
            for part, shape in (("lora_A", (settings.r, columns)), ("lora_B", (rows, settings.r))):
                tensors[f"base_model.model.{module}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.05
        about = {"auto_mapping": {"parents": [above.name for above in stage.path[:-1]]}}
        adapter = Adapter.from_tensors({**plain_lora_config(config, layout, layers), **about}, tensors)
        files[stage] = store.write_stage(stage, adapter)
    manifest = Manifest(0, tombstones, key_check_value(store.key), recipe, plan, files)
    store.write_manifest(store.write_root(manifest))
    return store


def copy_store(store: S3TStore, path: Path) -> S3TStore:
    """A copy that is on the disk as a whole, so that no later write waits for it."""
    shutil.copytree(store.path, path)
    os.sync()
    return S3TStore(path, KEY)


def stock_model(store: S3TStore, settings: Settings, seed: int, depth: int, shards: Sequence[int], path: Path) -> Any:
    """Prefixes of one depth, exported and loaded by stock PEFT, one adapter each."""
    model: Any = base_model(settings, seed)
    for shard in shards:
        folder = path / f"{depth}-{shard}"
        store.export(folder, prefix=Stage(shard, settings.orders[0][:depth]))
        if model.__class__ is LlamaForCausalLM:
            model = PeftModel.from_pretrained(model, folder, adapter_name=f"shard-{shard}")
        else:
            model.load_adapter(folder, adapter_name=f"shard-{shard}")
    model.set_adapter(f"shard-{shards[0]}")
    return model.eval()


def tokens(settings: Settings, seed: int) -> torch.Tensor:
    """A batch of random tokens, `(batch, length)`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, settings.vocabulary, (settings.batch, settings.length), generator=generator)


# ---- time of an answer ----


def interleaved(repeats: int, things: Mapping[str, Callable[[], Any]]) -> Times:
    """CPU seconds of each thing, one after the other in every repeat; the first round is not counted."""
    seconds: Times = {name: [] for name in things}
    for repeat in range(repeats + 1):
        for name, thing in things.items():
            started = time.process_time()
            thing()
            if repeat:
                seconds[name].append(time.process_time() - started)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """What each repeat gave, so that a machine's slow moments fall on both sides."""
    return [one / other for one, other in zip(above, below, strict=True)]


def predicted_ratio(settings: Settings, depth: int) -> float:
    """Operations of the ensemble over those of one member, whose prefixes have `depth` layer groups."""
    hidden, inner = settings.hidden, settings.intermediate
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner)] * 3
    layer = 2 * sum(rows * columns for rows, columns in shapes) + 4 * hidden * settings.length  # per token
    lora = 2 * settings.r * sum(rows + columns for rows, columns in shapes)
    with_lora = depth * settings.layers // settings.num_slices
    trunk, rest = (settings.layers - with_lora) * layer, with_lora * (layer + lora) + 2 * hidden * settings.vocabulary
    return (trunk + settings.num_shards * rest) / (trunk + rest)


def serve_depth(store: S3TStore, manifest: Manifest, depth: int) -> None:
    """Writes the manifest of a training that has come to `depth`: every shard serves a prefix of that length."""
    store.write_manifest(manifest.without([stage for stage in manifest.stages if stage.depth > depth]))


def switching(model: Any, names: Sequence[str], batch: torch.Tensor) -> torch.Tensor:
    """What stock PEFT offers: one adapter after the other, averaged by hand."""
    members = []
    for name in names:
        model.set_adapter(name)
        members.append(model(input_ids=batch, use_cache=False).logits)
    return average_logits(torch.stack(members), "probabilities")


def decode_step(settings: Settings, long: Sequence[float], short: Sequence[float]) -> list[float]:
    """Seconds of one step, from generations of many tokens and of one."""
    return [(one - other) / settings.new_tokens for one, other in zip(long, short, strict=True)]


@torch.no_grad()
def measure_answers(store: S3TStore, settings: Settings, seed: int, scratch: Path) -> list[dict[str, Any]]:
    """One record per depth: seconds, ratios, and how far the two ways of averaging are apart."""
    store = copy_store(store, scratch / "answers")
    manifest, batch = store.manifest(), tokens(settings, seed)
    shards = list(range(settings.num_shards))
    ensemble = S3TEnsemble.from_pretrained(store.path, base_model(settings, seed), key=KEY)
    found = []
    for depth in sorted(settings.depths, reverse=True):  # what a manifest does not list any more is swept away
        serve_depth(store, manifest, depth)
        ensemble.refresh()
        names = [f"shard-{shard}" for shard in shards]
        several = stock_model(store, settings, seed, depth, shards, scratch / "several")
        one = stock_model(store, settings, seed, depth, shards[:1], scratch / "one")
        away = (ensemble(input_ids=batch, use_cache=False).logits - switching(several, names, batch)).abs().max()
        assert away < 1e-3, f"the ensemble is not the average of its members: {away} away"

        def generate(model: Any, count: int) -> Any:
            return model.generate(input_ids=batch, max_new_tokens=count, do_sample=False)  # noqa: B023

        seconds = interleaved(
            settings.repeats,
            {
                "switching": lambda: switching(several, names, batch),  # noqa: B023
                "ensemble": lambda: ensemble(input_ids=batch, use_cache=False),
                "one": lambda: one(input_ids=batch, use_cache=False),  # noqa: B023
                "few_switching": lambda: switching(several, names, batch[:, :1]),  # noqa: B023
                "few_ensemble": lambda: ensemble(input_ids=batch[:, :1], use_cache=False),
                "ensemble_long": lambda: generate(ensemble, settings.new_tokens + 1),
                "ensemble_short": lambda: generate(ensemble, 1),
                "one_long": lambda: generate(one, settings.new_tokens + 1),  # noqa: B023
                "one_short": lambda: generate(one, 1),  # noqa: B023
            },
        )
        found.append(answer_record(settings, depth, seconds))
    return found[::-1]


def answer_record(settings: Settings, depth: int, seconds: Times) -> dict[str, Any]:
    """Figures of one depth."""
    predicted = predicted_ratio(settings, depth)
    over_one = ratios(seconds["ensemble"], seconds["one"])
    step = {who: decode_step(settings, seconds[f"{who}_long"], seconds[f"{who}_short"]) for who in ("ensemble", "one")}
    record: dict[str, Any] = {"depth": depth, "predicted": predicted}
    for name, values in {
        "one_ms": [1e3 * value for value in seconds["one"]],
        "ensemble_ms": [1e3 * value for value in seconds["ensemble"]],
        "switching_ms": [1e3 * value for value in seconds["switching"]],
        "batched_over_switching": ratios(seconds["ensemble"], seconds["switching"]),
        "few_tokens_over_switching": ratios(seconds["few_ensemble"], seconds["few_switching"]),
        "ensemble_over_one": over_one,
        "ensemble_over_predicted": [value / predicted for value in over_one],
        "decode_over_one": ratios(step["ensemble"], step["one"]),
        "decode_tokens_per_second": [settings.batch / value for value in step["ensemble"]],
        "one_decode_tokens_per_second": [settings.batch / value for value in step["one"]],
    }.items():
        record |= spread(name, values)
    return record


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and deviation."""
    both = {name: statistics.median(values)}
    return both | {f"{name}_std": statistics.stdev(values)} if len(values) > 1 else both


# ---- forgetting ----


class Clock:
    """When a deletion was durable, and since when an answer that begins is free of what was deleted."""

    def __init__(self, ensemble: S3TEnsemble):
        self.durable = self.free = self.done = 0.0
        follow, replace = ensemble._follow_deletion, ensemble._answers.replace

        def when_durable() -> None:
            first, self.durable = not self.durable, self.durable or time.perf_counter()
            follow()
            if first:  # at the end of the deletion it is called once more, and has nothing to do
                self.done = time.perf_counter()

        def begins(*args: Any) -> None:
            self.free = self.free or time.perf_counter()
            replace(*args)

        ensemble._follow_deletion, ensemble._answers.replace = when_durable, begins
        self._undo = (lambda: delattr(ensemble, "_follow_deletion"), lambda: delattr(ensemble._answers, "replace"))

    def remove(self) -> None:
        """Leaves the ensemble as it was."""
        for undo in self._undo:
            undo()


def copy_seconds(store: S3TStore, before: Stage, after: Stage | None) -> float:
    """Reading and copying alone: what a shard's new prefix needs and the old one has not."""
    known = set(before.path)
    needed = [stage for stage in (after.path if after else ()) if stage not in known]
    gone = [stage for stage in before.path if after is None or stage not in after.path]
    files = [store.path / stage.name / WEIGHTS_FILE for stage in needed]
    shapes = {name: value for file in files for name, value in load_file(file).items()}
    targets = {name: torch.ones_like(value) for name, value in shapes.items()}
    old = {name: value for stage in gone for name, value in load_file(store.path / stage.name / WEIGHTS_FILE).items()}
    going = [torch.ones_like(value) for name, value in old.items() if name not in targets]
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        for file in files:
            for name, value in load_file(file).items():
                targets[name].copy_(value)
        for tensor in going:
            tensor.zero_()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def kinds_of_deletion(settings: Settings) -> dict[str, list[int]]:
    """Per kind the slices to delete from, one after the other, and all but the last beforehand."""
    first, second = settings.orders
    return {"other": [first[1]], "shorter": [first[-1]], "dead": [second[0], first[0]]}


def rows_by_place(store: S3TStore, settings: Settings) -> dict[tuple[int, int], str]:
    """An id of every slice."""
    found = store.locate(ids=[f"row-{number}" for number in range(settings.rows)])
    return {location.places[0]: location.asked for location in found}


@torch.no_grad()
def delete_live(
    store: S3TStore, ensemble: S3TEnsemble, shard: int, name: str, batch: torch.Tensor, busy: bool
) -> dict[str, float]:
    """Deletes one id from a model in memory.

    Args:
        busy (`bool`): whether another thread asks all the time.

    Returns:
        `dict[str, float]`: seconds.
    """
    preview = store.delete(ids=[name], dry_run=True)
    before = Stage(shard, tuple(preview.served_before[str(shard)]))
    after = preview.served_after.get(str(shard))
    copying = copy_seconds(store, before, Stage(shard, tuple(after)) if after else None)
    os.sync()

    def ask() -> Any:
        with torch.no_grad():
            return ensemble(input_ids=batch, use_cache=False)

    for _ in range(2):
        ask()
    clock, stop = Clock(ensemble), threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            ask()

    thread = threading.Thread(target=keep_asking)
    if busy:
        thread.start()
        time.sleep(0.2)
    started = time.perf_counter()
    receipt = ensemble.delete(ids=[name])
    whole = time.perf_counter() - started
    stop.set()
    if busy:
        thread.join()
    clock.remove()
    assert receipt.generation == ensemble.generation == preview.generation
    durable = whole - (clock.done - clock.durable)
    return {"answer": clock.free - clock.durable, "copy": copying, "durable": durable, "whole": whole}


def measure_live_deletion(store: S3TStore, settings: Settings, seed: int, scratch: Path) -> dict[str, list[Any]]:
    """Records of deletions by kind, in every shard of fresh stores; and those of a busy model."""
    batch, places = tokens(settings, seed), rows_by_place(store, settings)
    found: dict[str, list[Any]] = {}
    for number in range(settings.rounds):
        for kind, slices in kinds_of_deletion(settings).items():
            copy = copy_store(store, scratch / f"live-{kind}-{number}")
            ensemble = S3TEnsemble.from_pretrained(copy.path, base_model(settings, seed), key=KEY)
            for shard in range(settings.num_shards):
                for slice_id in slices[:-1]:
                    ensemble.delete(ids=[places[shard, slice_id]])
                busy = kind == "other" and shard % 2 == 1
                name = places[shard, slices[-1]]
                seconds = delete_live(copy, ensemble, shard, name, batch, busy)
                found.setdefault("busy" if busy else kind, []).append(seconds)
            check_same_answer(ensemble, copy, settings, seed, batch)
            shutil.rmtree(copy.path)
    return found


@torch.no_grad()
def check_same_answer(ensemble: S3TEnsemble, store: S3TStore, settings: Settings, seed: int, batch: Any) -> None:
    """Fails unless the model in memory answers as one that is loaded from the store now."""
    ensemble.refresh()
    fresh = S3TEnsemble.from_pretrained(store.path, base_model(settings, seed), key=KEY)
    assert torch.equal(ensemble(input_ids=batch).logits, fresh(input_ids=batch).logits)


def live_figures(found: Mapping[str, list[Any]], steps: int) -> dict[str, Any]:
    """Figures of the deletions from models in memory."""
    figures: dict[str, Any] = {"gradient_steps": steps}
    by_kind = {}
    for kind, records in found.items():
        answers, copies = [one["answer"] for one in records], [one["copy"] for one in records]
        bounds = [3 * value + LIMIT_SECONDS for value in copies]
        by_kind[kind] = {
            **spread("answer_ms", [1e3 * value for value in answers]),
            **spread("copy_ms", [1e3 * value for value in copies]),
            **spread("over_bound", ratios(answers, bounds)),
            **spread("durable_ms", [1e3 * one["durable"] for one in records]),
            **spread("delete_ms", [1e3 * one["whole"] for one in records]),
        }
    other = found["other"]
    figures |= spread("live_deletion_over_copy", ratios([o["answer"] for o in other], [o["copy"] for o in other]))
    slowest = max((kind for kind in by_kind if kind != "busy"), key=lambda kind: by_kind[kind]["over_bound"])
    figures |= {f"live_deletion_{name}": by_kind[slowest][name] for name in by_kind[slowest] if "over_bound" in name}
    figures["busy_ms_more"] = by_kind["busy"]["answer_ms"] - by_kind["other"]["answer_ms"]
    figures |= spread("durable_ms", [1e3 * one["durable"] for one in other])
    return figures | {"live_deletion_by_kind": by_kind}


def measure_store_deletion(store: S3TStore, settings: Settings, scratch: Path) -> list[float]:
    """Seconds of a deletion from a folder, without a model."""
    places, seconds = rows_by_place(store, settings), []
    for repeat in range(settings.repeats):
        copy = copy_store(store, scratch / f"folder-{repeat}")
        name = places[repeat % settings.num_shards, settings.orders[0][1]]
        started = time.perf_counter()
        receipt = S3TStore(copy.path, KEY).delete(ids=[name])
        seconds.append(time.perf_counter() - started)
        assert receipt.examples == 1 and receipt.stages_removed
        shutil.rmtree(copy.path)
    return seconds


# ---- memory ----


def peak_bytes(run: Callable[[], Any]) -> int:
    """How much more memory is alive in tensors, at the worst moment of `run`, than at its beginning."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@torch.no_grad()
def measure_memory(store: S3TStore, settings: Settings, seed: int) -> dict[str, float]:
    """MB that a member adds: weights, and all of the peak."""
    batch = tokens(settings, seed)
    base = base_model(settings, seed)
    alone = peak_bytes(lambda: base(input_ids=batch, use_cache=False))
    before = sum(value.nbytes for value in base.state_dict().values())
    ensemble = S3TEnsemble.from_pretrained(store.path, base, key=KEY)
    weights = sum(value.nbytes for value in ensemble.model.state_dict().values()) - before
    together = peak_bytes(lambda: ensemble(input_ids=batch, use_cache=False))
    members = len(ensemble.members)
    return {
        "member_memory_mb": (weights + together - alone) / members / 1e6,
        "member_weights_mb": weights / members / 1e6,
        "base_weights_mb": before / 1e6,
        "base_forward_mb": alone / 1e6,
        "ensemble_forward_mb": together / 1e6,
    }


# ---- results ----


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """Measures everything.

    Returns:
        `dict`: figures by name.
    """
    steps: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        store = build_store(scratch / "store", settings, seed)
        store_seconds = measure_store_deletion(store, settings, scratch)
        counting = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
        live = measure_live_deletion(store, settings, seed, scratch)
        counting.remove()
        memory = measure_memory(store, settings, seed)
        depths = measure_answers(store, settings, seed, scratch)
    half, full = (next(one for one in depths if one["depth"] == settings.num_slices // part) for part in (2, 1))
    worst = max(depths, key=lambda record: record["ensemble_over_predicted"])
    figures = {name: half[name] for name in half if name.startswith(("batched_over_switching", "decode_over_one"))}
    figures |= {name: full[name] for name in full if name.startswith("few_tokens_over_switching")}
    figures |= {name: worst[name] for name in worst if name.startswith("ensemble_over_predicted")}
    figures |= live_figures(live, len(steps)) | spread("store_deletion_seconds", store_seconds)
    return figures | memory | {"by_depth": depths}


def record(settings: Settings, seed: int, figures: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file holds."""
    describe = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    libraries = ("hf_s3t", "torch", "transformers", "peft", "safetensors")
    return {
        "name": "serving",
        "commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "settings": {**asdict(settings), "seed": seed},
        "figures": figures,
    }


def print_table(figures: dict[str, Any]) -> None:
    """Answers by depth, deletions by kind, and the rest."""
    print("answers, by depth of the served prefixes (layer groups with LoRA); in parentheses the deviation")
    print("depth  one ms  ensemble ms  switching ms  batched/switching  few tokens/switching  over one  "
          "predicted  over predicted  decode over one  tokens/s")  # fmt: skip
    for one in figures["by_depth"]:
        print(
            f"{one['depth']:>5} {one['one_ms']:>7.1f} {one['ensemble_ms']:>12.1f} {one['switching_ms']:>13.1f} "
            f"{shown(one, 'batched_over_switching'):>18} {shown(one, 'few_tokens_over_switching'):>21} "
            f"{one['ensemble_over_one']:>9.2f} {one['predicted']:>10.2f} "
            f"{shown(one, 'ensemble_over_predicted'):>15} {shown(one, 'decode_over_one'):>16} "
            f"{one['decode_tokens_per_second']:>9.0f}"
        )
    print("\ndeletions from a model in memory, by kind")
    print("kind     new answers are free of it ms  read and copy ms  over bound  durable writes ms  whole delete ms")
    for kind, one in figures["live_deletion_by_kind"].items():
        print(
            f"{kind:<8} {shown(one, 'answer_ms'):>30} {shown(one, 'copy_ms'):>17} {one['over_bound']:>11.2f} "
            f"{shown(one, 'durable_ms'):>18} {one['delete_ms']:>16.1f}"
        )
    print()
    for name, value in figures.items():
        if not isinstance(value, (list, dict)) and not name.endswith("_std"):
            print(f"{name:<28} {shown(figures, name)}")


def shown(values: Mapping[str, Any], name: str) -> str:
    """A value, with its deviation where it has one."""
    if f"{name}_std" not in values:
        return f"{values[name]:.3g}"
    return f"{values[name]:.3g} ({values[f'{name}_std']:.2g})"


def main() -> None:
    """Runs the benchmark."""
    options = make_parser().parse_args()
    settings = QUICK if options.quick else Settings()
    torch.set_num_threads(settings.threads)
    logging.getLogger("hf_s3t").setLevel(logging.ERROR)  # shards die here, on purpose
    figures = run(settings, options.seed)
    print_table(figures)
    if options.json:
        options.json.write_text(json.dumps(record(settings, options.seed, figures), indent=1) + "\n")


if __name__ == "__main__":
    main()
