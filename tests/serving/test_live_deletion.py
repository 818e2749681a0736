"""A served model forgets: in place, between two answers, by the call that changes the store."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import models
from hf_s3t import AnswerCutOffError, S3TEnsemble, S3TError, S3TStore, StoreError, UnknownExampleError
from hf_s3t.errors import UnfinishedDeletionError
from hf_s3t.lora.adapter import Adapter
from hf_s3t.seams.answering import caches_in
from hf_s3t.serving.slots import Slot
from hf_s3t.store import deletion
from served import ROUNDING, SHAPES, copy, inputs_of, load, prompts, shorten, trained
from stores import tree
from trained_stores import WEIGHTS, edit_tensors
from trainers import logits

LONG = 30.0
GENERATION = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
ROBERTA = pytest.param("roberta", marks=pytest.mark.slow)
ALL = pytest.param("llama-all", marks=pytest.mark.slow)
KINDS = pytest.mark.parametrize("shape", ["llama", ALL, "llama-rank", "bert", ROBERTA])


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return copy("llama", tmp_path)


@pytest.fixture
def ensemble(store: S3TStore) -> S3TEnsemble:
    return load(store, "llama")


@pytest.fixture
def threads() -> Iterator[Callable[..., Future[Any]]]:
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def memory(ensemble: S3TEnsemble) -> dict[str, tuple[int, int]]:
    """Where every tensor of a model lies, and its bytes."""
    tensors = {**dict(ensemble.named_parameters()), **dict(ensemble.named_buffers())}
    return {name: (tensor.data_ptr(), tensor.untyped_storage().nbytes()) for name, tensor in tensors.items()}


def modules(ensemble: S3TEnsemble) -> dict[str, int]:
    return {name: id(module) for name, module in ensemble.named_modules()}


def tensors_of(ensemble: S3TEnsemble, shard: int) -> dict[str, torch.Tensor]:
    """A member's tensors, named as in an adapter file; of a shard that does not answer, those of all spare slots."""
    slot = ensemble._state.held.get(shard)
    if slot is not None:
        return ensemble._stack.tensors(slot.number)
    used = {slot.number for slot in ensemble._state.held.values()}
    spare = [number for number in range(ensemble._stack.slots) if number not in used]
    return {f"{number} {name}": value for number in spare for name, value in ensemble._stack.tensors(number).items()}


def assert_served(ensemble: S3TEnsemble, store: S3TStore) -> None:
    """Every member's tensors are those of the store's served prefix, and zero beyond it; so are spare slots."""
    served = store.served()
    assert ensemble.members == [f"shard-{shard:02d}" for shard in sorted(served)]
    assert ensemble.drained(LONG)
    for shard in [*served, -1]:
        expected = store.assemble(shard, served[shard]).tensors if shard in served else {}
        found = tensors_of(ensemble, shard)
        assert found and set(expected) <= set(found)
        for name, tensor in found.items():
            whole = torch.zeros_like(tensor)
            if name in expected:  # in the corner: a prefix of rank groups has fewer ranks than the slot
                whole[tuple(slice(length) for length in expected[name].shape)] = expected[name]
            assert torch.equal(tensor, whole), name
    assert ensemble.generation == store.manifest().generation


# What a deletion does to the model


@pytest.mark.brief("llama", "bert")
@KINDS
def test_a_deletion_overwrites_in_place_and_equals_a_fresh_load(shape: str, tmp_path: Path) -> None:
    store, inputs = copy(shape, tmp_path), inputs_of(shape)
    ensemble = load(store, shape)
    where, graph, generation = memory(ensemble), modules(ensemble), ensemble.generation
    answers = [logits(ensemble, inputs)]
    for slices in ([(0, 1)], [(0, 0), (1, 2)], [(1, 0)], [(0, 2), (2, 1)], [(2, 0), (2, 2)]):
        receipt = ensemble.delete(slices=slices)
        assert receipt.status == "inactive"
        generation += 1
        assert ensemble.generation == store.manifest().generation == receipt.generation == generation
        assert_served(ensemble, store)
        answers.append(logits(ensemble, inputs))
        fresh = load(store, shape)
        assert torch.equal(answers[-1], logits(fresh, inputs))
        assert (answers[-1] - answers[-2]).abs().max() > 1e-3
        assert memory(ensemble) == where and modules(ensemble) == graph
    assert ensemble.members == []
    assert torch.equal(answers[-1], logits(SHAPES[shape].build(), inputs))


def test_no_value_of_what_was_deleted_is_left(store: S3TStore, ensemble: S3TEnsemble) -> None:
    def drawn(shard: int) -> torch.Tensor:
        """The numbers in a member's matrices A, hardly any of which is there twice by chance."""
        parts = [value.flatten() for name, value in tensors_of(ensemble, shard).items() if ".lora_A." in name]
        return torch.cat(parts).clone()

    before = [drawn(shard) for shard in range(3)]
    ensemble.delete(slices=[(0, 0), (0, 2), (1, 1)])  # shard 0 is dead, shard 1 goes from (0, 1, 2) to (2, 0)
    values = torch.cat([value.flatten() for value in ensemble.parameters()])
    left = [float(torch.isin(numbers, values[values != 0]).float().mean()) for numbers in before]
    assert left[0] < 0.01 and left[1] < 0.01 and left[2] == 1.0
    assert not any(tensor.any() for tensor in tensors_of(ensemble, 0).values())


def test_a_load_holds_the_served_prefixes_and_zeros(store: S3TStore) -> None:
    assert_served(load(shorten(store), "llama"), store)


def test_the_model_forgets_before_the_files_are_removed(
    store: S3TStore, ensemble: S3TEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(deletion, "carry_out", fail)
    with pytest.raises(UnfinishedDeletionError, match="no space"):
        ensemble.delete(slices=[(0, 0), (0, 2)])
    assert (store.path / "shard-00" / "0" / WEIGHTS).exists()
    assert ensemble.members == ["shard-01", "shard-02"] and ensemble.generation == 1
    assert not any(tensor.any() for tensor in tensors_of(ensemble, 0).values())


def test_an_id_is_deleted_from_store_and_model(store: S3TStore, ensemble: S3TEnsemble) -> None:
    wanted = SHAPES["llama"].rows(36)["id"][5]
    (location,) = store.locate(ids=[wanted])
    before = logits(ensemble, inputs_of("llama"))
    receipt = ensemble.delete(ids=[wanted], reference="a request")
    assert receipt.asked == receipt.found == receipt.examples == 1 and receipt.reference == "a request"
    assert set(receipt.stages_removed) == set(location.stages) != set()
    assert store.locate(ids=[wanted])[0].found == "deleted"
    assert not any((store.path / name).exists() for name in location.stages)
    assert store.intents() == []
    assert_served(ensemble, store)
    assert not torch.equal(logits(ensemble, inputs_of("llama")), before)


def test_generation_forgets_too(store: S3TStore, ensemble: S3TEnsemble) -> None:
    for slices in ([(0, 1), (1, 0)], [(1, 1), (1, 2)], [(0, 0), (0, 2)]):
        before = ensemble.generate(**prompts(), **GENERATION)
        ensemble.delete(slices=slices)
        after = ensemble.generate(**prompts(), **GENERATION)
        assert torch.equal(after, load(store, "llama").generate(**prompts(), **GENERATION))
        assert not torch.equal(after, before)


def test_refreshing_moves_the_trunk_up_and_no_bit(store: S3TStore, ensemble: S3TEnsemble) -> None:
    rows: list[int] = []
    layer = ensemble.model.model.layers[3]
    layer.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    ensemble.delete(slices=[(0, 1), (1, 1), (2, 1)])  # two groups of each: layers 2 and 3 are zero
    answer = logits(ensemble, inputs_of("llama"))
    assert ensemble.refresh() is False  # the store has not changed
    assert torch.equal(logits(ensemble, inputs_of("llama")), answer)
    assert rows == [18, 6] and ensemble.drained(0)


# What it leaves alone


def assert_unchanged(call: Callable[[], Any], error: type[Exception], ensemble: S3TEnsemble, store: S3TStore) -> None:
    """A call is refused, and neither the store nor the model is another one."""
    values = {name: value.clone() for name, value in ensemble.named_parameters()}
    files, generation, names = tree(store.path), ensemble.generation, ensemble.members
    with pytest.raises(error):
        call()
    assert tree(store.path) == files
    assert (ensemble.generation, ensemble.members) == (generation, names)
    assert all(torch.equal(value, values[name]) for name, value in ensemble.named_parameters())


def test_what_is_not_known_changes_nothing(store: S3TStore, ensemble: S3TEnsemble) -> None:
    known = SHAPES["llama"].rows(36)["id"][0]
    assert_unchanged(lambda: ensemble.delete(ids=[known, "nobody"]), UnknownExampleError, ensemble, store)
    assert_unchanged(lambda: ensemble.delete(slices=[(0, 7)]), (ValueError, S3TError), ensemble, store)
    receipt = ensemble.delete(ids=[known, "nobody"], missing_ok=True)
    assert receipt.found == 1
    assert_served(ensemble, store)


def test_a_dry_run_changes_nothing(store: S3TStore, ensemble: S3TEnsemble) -> None:
    answer, files = logits(ensemble, inputs_of("llama")), tree(store.path)
    receipt = ensemble.delete(slices=[(0, 0)], dry_run=True)
    assert receipt.stages_removed and tree(store.path) == files
    assert ensemble.refresh() is False and ensemble.generation == 0
    assert torch.equal(logits(ensemble, inputs_of("llama")), answer)


class Within(LogitsProcessor, BaseStreamer):
    """Calls something in the middle of an answer."""

    def __init__(self, call: Callable[[], Any]):
        self.run, self.seen = call, 0

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.put(tokens)
        return scores

    def put(self, value: Any) -> None:
        self.seen += 1
        if self.seen == 2:
            self.run()

    def end(self) -> None:
        pass


@pytest.mark.parametrize("place", ["streamer", "processor"])
@pytest.mark.parametrize("change", ["delete", "refresh"])
def test_a_change_within_an_answer_is_refused(place: str, change: str, store: S3TStore, ensemble: S3TEnsemble) -> None:
    call = (lambda: ensemble.delete(slices=[(0, 0)])) if change == "delete" else ensemble.refresh
    within = Within(call)
    one = {name: value[:1] for name, value in prompts().items()}
    given = {"streamer": within} if place == "streamer" else {"logits_processor": [within]}
    assert_unchanged(lambda: ensemble.generate(**one, **given, **GENERATION), S3TError, ensemble, store)
    assert within.seen == 2
    ensemble.delete(slices=[(0, 0)])  # nothing stayed locked
    assert_served(ensemble, store)


def test_an_ensemble_without_a_store_can_not_delete(store: S3TStore) -> None:
    bare = S3TEnsemble(models.tiny_llama(), {})
    for call in (lambda: bare.delete(slices=[(0, 0)]), bare.refresh):
        with pytest.raises(S3TError, match="not loaded from a store"):
            call()


def test_a_cache_of_other_members_is_refused(store: S3TStore, ensemble: S3TEnsemble) -> None:
    tokens = inputs_of("llama")["input_ids"]
    with torch.no_grad():
        kept = caches_in(ensemble(tokens[:, :7], use_cache=True))
        ensemble.delete(slices=[(0, place) for place in range(3)])
        for ask in (ensemble, ensemble.generate):
            with pytest.raises(ValueError, match="of other members"):
                ask(tokens[:, 7:], **kept)


def test_a_cache_from_before_the_trunk_moved_up_is_refused(ensemble: S3TEnsemble) -> None:
    """The same members made it, and have rows in other layers."""
    tokens = inputs_of("llama")["input_ids"]
    ensemble.delete(slices=[(0, 1), (1, 1), (2, 1)])
    with torch.no_grad():
        kept = caches_in(ensemble(tokens[:, :7], use_cache=True))
        assert not ensemble.refresh()
        for ask in (ensemble, ensemble.generate):
            with pytest.raises(ValueError, match="of other members"):
                ask(tokens[:, 7:], **kept)


# A compiled model


def count_frames(function: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What a function returns, and what dynamo did meanwhile."""
    from torch._dynamo.utils import counters

    counters.clear()
    result = function()
    return result, dict(counters["stats"])


@pytest.mark.parametrize("shape", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_pass_is_one_graph_and_a_deletion_does_not_recompile(shape: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    store, inputs = copy(shape, tmp_path), inputs_of(shape)
    ensemble = load(store, shape)
    runs: list[int] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            runs.append(1)
            return graph.forward(*args)

        return run

    compiled = torch.compile(ensemble, fullgraph=True, backend=backend)
    first, frames = count_frames(lambda: logits(compiled, inputs))
    torch.testing.assert_close(first, logits(ensemble, inputs), **ROUNDING)
    assert frames["unique_graphs"] == len(runs) == 1
    changes = [lambda: ensemble.delete(slices=[(0, 1), (1, 2), (2, 0)]), lambda: store.delete(slices=[(1, 1)])]
    for number, change in enumerate(changes):  # every shard stays alive
        change()
        ensemble.refresh()
        with torch.compiler.set_stance("fail_on_recompile"):
            second, frames = count_frames(lambda: logits(compiled, inputs))
        assert len(runs) == 2 + number and not frames
        torch.testing.assert_close(second, logits(load(store, shape), inputs), **ROUNDING)
        assert (second - first).abs().max() > 1e-2
        first = second
    torch._dynamo.reset()


def test_a_step_of_generation_is_one_graph(store: S3TStore, ensemble: S3TEnsemble) -> None:
    torch._dynamo.reset()
    tokens = inputs_of("llama")["input_ids"]

    @torch.no_grad()
    def steps(step: Any) -> torch.Tensor:
        cache = ensemble._members.new_cache(ensemble._state.serving, 16)
        ensemble(tokens[:, :6], **cache)
        return torch.cat([step(tokens[:, place : place + 1], **cache).logits for place in range(6, 9)], dim=1)

    compiled = torch.compile(ensemble, fullgraph=True, backend="aot_eager")
    found, frames = count_frames(lambda: steps(compiled))
    assert frames["unique_graphs"] == 1
    ensemble.delete(slices=[(0, 1), (1, 2)])
    with torch.compiler.set_stance("fail_on_recompile"):
        later = steps(compiled)
    ensemble.refresh()
    for answer, model in ((later, ensemble), (later, load(store, "llama"))):
        with torch.no_grad():
            torch.testing.assert_close(answer, model(tokens).logits[:, 6:9], **ROUNDING)
    assert (found - later).abs().max() > 1e-2
    torch._dynamo.reset()


# What others did to the store


def repair(store: S3TStore, source: Path) -> None:
    """Puts stages back that a deletion removed, as a training does: the folders, then the manifest."""
    whole, generation = S3TStore(source), store.manifest().generation
    with store.writing():
        manifest = store.manifest()
        stages = dict(manifest.stages)
        for stage in manifest.plan.missing(manifest.stages):
            adapter = whole.read_stage(stage)
            tensors = {name: 1.5 * value for name, value in adapter.tensors.items()}
            stages[stage] = store.write_stage(stage, Adapter.from_tensors(adapter.config, tensors))
        store.write_manifest(replace(manifest, stages=stages))
    assert store.manifest().generation == generation


def test_refresh_follows_a_deletion_elsewhere(store: S3TStore, ensemble: S3TEnsemble) -> None:
    answer = logits(ensemble, inputs_of("llama"))
    store.delete(slices=[(1, 0), (1, 2)])
    assert torch.equal(logits(ensemble, inputs_of("llama")), answer)
    assert ensemble.generation == 0
    assert ensemble.refresh() is True
    assert_served(ensemble, store)
    assert ensemble.members == ["shard-00", "shard-02"] and ensemble.generation == 1
    assert torch.equal(logits(ensemble, inputs_of("llama")), logits(load(store, "llama"), inputs_of("llama")))
    assert ensemble.refresh() is False


@KINDS
def test_refresh_follows_a_repair(shape: str, tmp_path: Path) -> None:
    store, inputs = copy(shape, tmp_path), inputs_of(shape)
    ensemble = load(store, shape)
    whole, where = logits(ensemble, inputs), memory(ensemble)
    ensemble.delete(slices=[(0, 0), (0, 2), (1, 0)])
    repair(store, trained(shape))
    assert ensemble.refresh() is True
    assert_served(ensemble, store)
    assert ensemble.members == ["shard-00", "shard-01", "shard-02"]
    assert torch.equal(logits(ensemble, inputs), logits(load(store, shape), inputs))
    assert not torch.equal(logits(ensemble, inputs), whole) and memory(ensemble) == where


def test_the_same_prefix_of_repaired_stages_is_another_one(store: S3TStore, ensemble: S3TEnsemble) -> None:
    served = store.served()
    store.delete(slices=[(0, 1)])
    repair(store, trained("llama"))  # between two refreshes: the prefix has the old name and a new last stage
    assert store.served() == served
    assert ensemble.refresh() is True
    assert_served(ensemble, store)
    assert torch.equal(logits(ensemble, inputs_of("llama")), logits(load(store, "llama"), inputs_of("llama")))


def test_a_deletion_takes_over_a_repair_below_the_trunk(store: S3TStore) -> None:
    store.delete(slices=[(shard, slice_id) for shard in range(3) for slice_id in (0, 1)])
    ensemble = load(store, "llama")  # every member has layers 6 and 7 alone
    repair(store, trained("llama"))
    ensemble.delete(slices=[(0, 1)])
    assert store.served() == {0: (2, 0), 1: (0, 1, 2), 2: (0, 1, 2)}
    assert_served(ensemble, store)
    assert torch.equal(logits(ensemble, inputs_of("llama")), logits(load(store, "llama"), inputs_of("llama")))


def test_the_dead_come_alive_again(store: S3TStore, caplog: pytest.LogCaptureFixture) -> None:
    store.delete(slices=[(shard, slice_id) for shard in range(3) for slice_id in (0, 2)])
    ensemble, base = load(store, "llama"), models.tiny_llama()
    assert "the bare base model answers" in caplog.text and ensemble.members == []
    assert torch.equal(logits(ensemble, inputs_of("llama")), logits(base, inputs_of("llama")))
    alone = base.generate(**prompts(), **GENERATION)
    assert torch.equal(ensemble.generate(**prompts(), **GENERATION), alone)
    repair(store, trained("llama"))
    assert ensemble.refresh() is True
    assert_served(ensemble, store)
    assert torch.equal(logits(ensemble, inputs_of("llama")), logits(load(store, "llama"), inputs_of("llama")))


def test_deleting_what_was_deleted_elsewhere_brings_the_model_up_to_date(
    store: S3TStore, ensemble: S3TEnsemble
) -> None:
    wanted = SHAPES["llama"].rows(36)["id"][3]
    store.delete(ids=[wanted])
    assert ensemble.generation == 0
    receipt = ensemble.delete(ids=[wanted])
    assert receipt.status == "unchanged" and receipt.already_deleted == 1
    assert_served(ensemble, store)
    assert ensemble.generation == 1


def test_an_open_intent_is_obeyed(store: S3TStore, ensemble: S3TEnsemble, tmp_path: Path) -> None:
    other = S3TStore(shutil.copytree(store.path, tmp_path / "other"))
    seen: list[Any] = []

    def look() -> None:
        seen.append(list(other.private.glob("intents/*.json"))[0].read_text())

    other._delete({"slices": [(0, 0)]}, when_durable=look)
    (store.private / "intents").mkdir(exist_ok=True)
    (store.private / "intents" / json.loads(seen[0])["file"]).write_text(seen[0])  # as a killed writer leaves it
    assert ensemble.refresh() is True
    assert store.served()[0] == (2,) and (store.path / "shard-00" / "0").exists()
    assert ensemble.generation == 1
    assert torch.equal(logits(ensemble, inputs_of("llama")), logits(load(other, "llama"), inputs_of("llama")))


# Damage


def test_a_member_whose_new_prefix_is_damaged_drops_out(
    store: S3TStore, ensemble: S3TEnsemble, caplog: pytest.LogCaptureFixture
) -> None:
    file = store.path / "shard-00" / "2" / WEIGHTS
    file.write_bytes(file.read_bytes()[:100])
    receipt = ensemble.delete(slices=[(0, 1)])  # shard 0 would go on with (2, 0)
    assert receipt.status == "inactive" and "could not be brought up to date" in caplog.text
    assert ensemble.members == ["shard-01", "shard-02"] and ensemble.generation == 1
    assert not any(tensor.any() for tensor in tensors_of(ensemble, 0).values())
    with pytest.raises(StoreError, match="sha256 differs"):
        ensemble.refresh()
    whole = trained("llama") / "shard-00" / "2" / WEIGHTS
    shutil.copyfile(whole, file)
    assert ensemble.refresh() is True
    assert_served(ensemble, store)


def test_refresh_drops_what_is_not_live_and_keeps_what_is_before_it_raises(
    store: S3TStore, ensemble: S3TEnsemble
) -> None:
    store.delete(slices=[(0, 0), (1, 2), (2, 1)])  # shard 0 goes on with (2,), 1 with (0, 1), 2 with (2, 0)
    shutil.rmtree(store.path / "shard-00" / "2")
    with pytest.raises(StoreError, match="is missing"):
        ensemble.refresh()
    assert ensemble.members == ["shard-01", "shard-02"] and ensemble.generation == 1
    assert not any(tensor.any() for tensor in tensors_of(ensemble, 0).values())
    for shard in (1, 2):
        expected = store.assemble(shard, store.served()[shard]).tensors
        for name, tensor in tensors_of(ensemble, shard).items():
            assert torch.equal(tensor, expected.get(name, torch.zeros_like(tensor)))


def test_a_damaged_repair_leaves_the_member_that_is_live(store: S3TStore, ensemble: S3TEnsemble) -> None:
    ensemble.delete(slices=[(0, 1)])
    answer = logits(ensemble, inputs_of("llama"))
    repair(store, trained("llama"))
    (store.path / "shard-00" / "0-1-2" / WEIGHTS).unlink()
    with pytest.raises(StoreError, match="is missing"):
        ensemble.refresh()
    assert len(ensemble.members) == 3
    assert torch.equal(logits(ensemble, inputs_of("llama")), answer)


def test_what_can_not_be_read_is_no_reason_to_serve_on(store: S3TStore, ensemble: S3TEnsemble) -> None:
    store.delete(slices=[(0, 1)])  # shard 0 would go on with (2, 0)
    file = store.path / "shard-00" / "2-0" / WEIGHTS
    file.unlink()
    file.mkdir()  # stands for a disk that answers with an error
    with pytest.raises(StoreError, match="is a folder, and a file is expected"):
        ensemble.refresh()
    assert ensemble.members == ["shard-01", "shard-02"] and ensemble.generation == 1
    assert not any(tensor.any() for tensor in tensors_of(ensemble, 0).values())


def test_an_interrupted_change_leaves_nothing_that_is_not_live(
    store: S3TStore, ensemble: S3TEnsemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(slot: Slot, change: Any, source: Slot) -> None:
        raise KeyboardInterrupt

    store.delete(slices=[(0, 1), (2, 2)])
    with monkeypatch.context() as patch:
        patch.setattr(Slot, "take", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ensemble.refresh()
    assert ensemble.members == ["shard-01"]
    for shard in (0, 2):
        assert not any(tensor.any() for tensor in tensors_of(ensemble, shard).values())
    assert ensemble.refresh() is True
    assert_served(ensemble, store)


def test_a_store_written_over_in_place_is_noticed(store: S3TStore, ensemble: S3TEnsemble, tmp_path: Path) -> None:
    other = S3TStore(shutil.copytree(store.path, tmp_path / "other"))
    other.delete(slices=[(0, 1)])
    shutil.rmtree(store.private)  # a copy that carries no state
    assert ensemble.refresh() in (True, False)
    manifest = store.path / "s3t.json"
    inode, times = manifest.stat().st_ino, manifest.stat()
    manifest.write_bytes((other.path / "s3t.json").read_bytes())
    os.utime(manifest, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert manifest.stat().st_ino == inode
    assert ensemble.refresh() is True
    assert_served(ensemble, other)


def test_an_older_copy_of_the_store_is_not_followed(
    store: S3TStore, ensemble: S3TEnsemble, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = shutil.copytree(store.path, tmp_path / "older", ignore=shutil.ignore_patterns(".s3t"))
    ensemble.delete(slices=[(0, 1)])
    newer, answer = shutil.copytree(store.path, tmp_path / "newer"), logits(ensemble, inputs_of("llama"))
    shutil.copytree(older, store.path, dirs_exist_ok=True)
    for _ in range(2):  # it is not forgotten that this was not followed
        with pytest.raises(StoreError, match="is of generation 0 now, the model answers with 1"):
            ensemble.refresh()
    ensemble._follow_deletion()
    assert "is of generation 0 now" in caplog.text and ensemble.generation == 1
    assert torch.equal(logits(ensemble, inputs_of("llama")), answer)
    with store.writing():  # whoever writes obeys the tombstones first
        pass
    assert ensemble.refresh() is True
    assert_served(ensemble, S3TStore(newer))


def test_how_a_store_is_opened_is_said_where_it_is_opened(store: S3TStore) -> None:
    for how in ({"revision": "main"}, {"token": "hf_x"}):
        with pytest.raises(ValueError, match=r"`revision` and `token` are for a store in a repository"):
            S3TEnsemble.from_pretrained(store.path, **how)
    for how in ({"revision": "main"}, {"token": "hf_x"}, {"state": store.private}, {"key": "k" * 16}):
        with pytest.raises(ValueError, match=f"{next(iter(how))}.* but one was given"):
            S3TEnsemble.from_pretrained(store, **how)


def to_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "shard-01/0-1" / WEIGHTS).unlink(), "is missing"),
        (lambda path: (path / "shard-01/0-1" / WEIGHTS).write_bytes(b"\0" * 40), "sha256 differs"),
        (lambda path: edit_tensors(path, "shard-01/0-1", to_bfloat16), "stages are stored in float32"),
    ],
    ids=["missing", "truncated", "bfloat16"],
)
def test_a_damaged_store_is_not_loaded(damage: Callable[[Path], Any], message: str, store: S3TStore) -> None:
    damage(store.path)
    with pytest.raises(StoreError, match=message):
        load(store, "llama")


@pytest.mark.parametrize("shape", ["llama", "bert"])
def test_a_failed_load_gives_the_base_back(shape: str, tmp_path: Path) -> None:
    store, base, inputs = copy(shape, tmp_path), SHAPES[shape].build(), inputs_of(shape)
    graph = {name: type(module) for name, module in base.named_modules()}
    file = store.path / "shard-02/2-0" / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(b"")
    store.delete(slices=[(2, 1)])
    with pytest.raises(StoreError, match="sha256 differs"):
        S3TEnsemble.from_pretrained(store.path, base)
    assert {name: type(module) for name, module in base.named_modules()} == graph
    assert torch.equal(logits(base, inputs), logits(SHAPES[shape].build(), inputs))
    file.write_bytes(content)
    assert_served(S3TEnsemble.from_pretrained(store.path, base), store)


def test_a_base_carries_one_ensemble(store: S3TStore) -> None:
    base = SHAPES["llama"].build()
    first = S3TEnsemble.from_pretrained(store.path, base)
    answer = logits(first, inputs_of("llama"))
    with pytest.raises(StoreError, match="already carries adapters"):
        S3TEnsemble.from_pretrained(store.path, base)
    assert torch.equal(logits(first, inputs_of("llama")), answer)


def test_an_offloaded_base_is_refused(store: S3TStore, tmp_path: Path) -> None:
    SHAPES["llama"].build().save_pretrained(tmp_path / "base")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{layer}": "cpu" if layer < 6 else "disk" for layer in range(8)}
    with pytest.raises(StoreError, match="offloaded"):
        S3TEnsemble.from_pretrained(
            store.path, str(tmp_path / "base"), device_map=places, offload_folder=tmp_path / "disk"
        )


def test_a_copy_is_the_stores_to_make(ensemble: S3TEnsemble, tmp_path: Path) -> None:
    with pytest.raises(S3TError, match=r"store.export\(path\)"):
        ensemble.save_pretrained(tmp_path / "copy")
    for name in ("push_to_hub", "set_adapter", "add_adapter", "load_adapter", "disable_adapters", "tie_weights"):
        assert not hasattr(ensemble, name)
        with pytest.raises(AttributeError, match=f"no `{name}`.*deletions would not know"):
            getattr(ensemble, name)
    assert ensemble.config is ensemble.model.config and ensemble.get_input_embeddings() is not None
    with pytest.raises(S3TError, match="the store's"):
        ensemble.load_state_dict(ensemble.state_dict())
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "base",
    [
        lambda: models.tiny_llama(hidden_size=16),
        lambda: models.tiny_llama(num_hidden_layers=6),
        lambda: models.tiny_llama(seed=1),
        models.tiny_gpt2,
    ],
    ids=["narrower", "lower", "same sizes", "another kind"],
)
def test_another_base_is_refused(base: Callable[[], nn.Module]) -> None:
    with pytest.raises(StoreError, match="not the base model that the store was trained on"):
        S3TEnsemble.from_pretrained(trained("llama"), base())


# While others ask


class Pause(LogitsProcessor):
    """Stops a generation after its first token until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if tokens.shape[1] == 9:
            self.reached.set()
            assert self.go.wait(LONG)
        return scores


SLICES = [(0, 0), (1, 1), (2, 0), (2, 2)]
"""A deletion that changes all three shards."""


@pytest.fixture
def fresh(store: S3TStore, tmp_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """What is generated, and the logits, once `SLICES` are deleted."""
    other = S3TStore(shutil.copytree(store.path, tmp_path / "deleted"))
    other.delete(slices=SLICES)
    model = load(other, "llama")
    return model.generate(**prompts(), **GENERATION), logits(model, inputs_of("llama"))


def test_neither_a_deletion_nor_a_new_answer_waits_for_an_old_answer(
    store: S3TStore, ensemble: S3TEnsemble, threads: Callable[..., Future[Any]], fresh: Any
) -> None:
    before = ensemble.generate(**prompts(), **GENERATION)
    pause = Pause()
    running = threads(ensemble.generate, **prompts(), logits_processor=[pause], **GENERATION)
    assert pause.reached.wait(LONG)
    assert ensemble.delete(slices=SLICES).status == "inactive"
    assert ensemble.generation == 1 and ensemble.members == ["shard-00", "shard-01"]
    assert store.served() == {0: (2,), 1: (2, 0)}
    assert not torch.equal(fresh[0], before)
    assert torch.equal(threads(ensemble.generate, **prompts(), **GENERATION).result(LONG), fresh[0])
    torch.testing.assert_close(threads(logits, ensemble, inputs_of("llama")).result(LONG), fresh[1], **ROUNDING)
    assert not running.done() and not ensemble.drained(0.01)
    pause.go.set()
    assert torch.equal(running.result(LONG), before)  # wholly before, although most of it was computed after
    assert ensemble.drained(LONG)
    assert_served(ensemble, store)


def test_a_pass_that_runs_keeps_its_slots(
    store: S3TStore, ensemble: S3TEnsemble, threads: Callable[..., Future[Any]], fresh: Any
) -> None:
    reached, go = threading.Event(), threading.Event()

    def pause(*args: Any) -> None:
        reached.set()
        assert go.wait(LONG)

    before = logits(ensemble, inputs_of("llama"))
    hook = ensemble.model.model.layers[1].register_forward_hook(pause)
    running = threads(logits, ensemble, inputs_of("llama"))
    assert reached.wait(LONG)
    hook.remove()
    ensemble.delete(slices=SLICES)
    torch.testing.assert_close(logits(ensemble, inputs_of("llama")), fresh[1], **ROUNDING)
    go.set()
    assert torch.equal(running.result(LONG), before)
    assert_served(ensemble, store)


def test_an_answer_that_fails_has_ended(store: S3TStore, ensemble: S3TEnsemble) -> None:
    wrong = {"input_ids": torch.full((2, 4), 10**6)}  # no such tokens
    for ask in (ensemble, ensemble.forward, ensemble.generate):
        with pytest.raises(IndexError):
            ask(**wrong)
        assert not ensemble._answers.running and ensemble._answers._current.answers == 0
    ensemble.delete(slices=SLICES)
    assert ensemble.drained(0)
    assert_served(ensemble, store)


def test_a_deletion_that_finds_too_few_spare_slots_waits_and_new_answers_for_it(
    store: S3TStore, threads: Callable[..., Future[Any]], fresh: Any
) -> None:
    ensemble, pause = load(store, "llama", spare_slots=1), Pause()
    before = ensemble.generate(**prompts(), **GENERATION)
    running = threads(ensemble.generate, **prompts(), logits_processor=[pause], **GENERATION)
    assert pause.reached.wait(LONG)
    change = threads(ensemble.delete, slices=SLICES)
    while not ensemble.pending:
        assert not change.done()
        threading.Event().wait(0.001)
    assert store.served() == {0: (2,), 1: (2, 0)}  # on record at once
    late = threads(ensemble.generate, **prompts(), **GENERATION)
    with pytest.raises(TimeoutError):
        late.result(0.1)
    assert not change.done() and ensemble.generation == 1 and ensemble.members == []
    pause.go.set()
    assert torch.equal(running.result(LONG), before)
    assert change.result(LONG).status == "inactive"
    assert torch.equal(late.result(LONG), fresh[0])
    assert_served(ensemble, store)


def test_no_lock_is_held_while_a_deletion_waits_for_slots(
    store: S3TStore, threads: Callable[..., Future[Any]]
) -> None:
    ensemble, pauses = load(store, "llama"), (Pause(), Pause())

    def answer_that_lasts(pause: Pause) -> Future[Any]:
        running = threads(ensemble.generate, **prompts(), logits_processor=[pause], **GENERATION)
        assert pause.reached.wait(LONG)
        return running

    first = answer_that_lasts(pauses[0])
    ensemble.delete(slices=[(shard, 1) for shard in range(3)])  # takes all three spare slots
    second = answer_that_lasts(pauses[1])
    assert store.served() == {shard: (2, 0) for shard in range(3)}
    waiting, until = threads(ensemble.delete, slices=[(0, 0), (1, 0)]), time.monotonic() + LONG
    while not ensemble.pending:
        assert not waiting.done() and time.monotonic() < until
        threading.Event().wait(0.001)
    assert ensemble.members == ["shard-02"] and ensemble.generation == 2  # new answers are free of it
    while store.manifest().generation < 2:
        assert time.monotonic() < until, "the deletion does not end"
        threading.Event().wait(0.001)
    with S3TStore(store.path).writing():  # nobody else waits
        pass
    refreshed = ensemble.refresh(wait=False)
    assert refreshed and ensemble.members == ["shard-02"] and not waiting.done()
    ensemble.delete(slices=[(2, 0)], dry_run=True)
    for pause in pauses:
        pause.go.set()
    assert waiting.result(LONG).status == "inactive"
    first.result(LONG)
    second.result(LONG)
    assert not ensemble.pending
    assert_served(ensemble, store)


def test_a_deletion_that_fails_while_slots_lack_leaves_nobody_waiting(
    store: S3TStore, threads: Callable[..., Future[Any]], fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensemble, pause = load(store, "llama", spare_slots=1), Pause()
    running = threads(ensemble.generate, **prompts(), logits_processor=[pause], **GENERATION)
    assert pause.reached.wait(LONG)

    def full(*args: Any) -> None:
        pause.go.set()  # the answer ends, and slots are spare again
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(S3TStore, "write_root", full)
        with pytest.raises(UnfinishedDeletionError):
            ensemble.delete(slices=SLICES)
    running.result(LONG)
    assert not ensemble.pending and ensemble.generation == 1
    assert torch.equal(threads(ensemble.generate, **prompts(), **GENERATION).result(LONG), fresh[0])


def test_an_old_answer_is_cut_off_if_somebody_said_so(
    store: S3TStore, threads: Callable[..., Future[Any]], fresh: Any
) -> None:
    ensemble, pause = load(store, "llama", old_answers_seconds=0.0), Pause()
    running = threads(ensemble.generate, **prompts(), logits_processor=[pause], **GENERATION)
    assert pause.reached.wait(LONG)
    ensemble.delete(slices=SLICES)
    pause.go.set()
    with pytest.raises(AnswerCutOffError, match="has forgotten examples since this answer began"):
        running.result(LONG)
    assert ensemble.drained(LONG)
    assert_served(ensemble, store)
    assert torch.equal(ensemble.generate(**prompts(), **GENERATION), fresh[0])


def test_spare_slots_are_at_least_one(store: S3TStore) -> None:
    with pytest.raises(ValueError, match="`spare_slots` must be at least 1, got 0"):
        load(store, "llama", spare_slots=0)
    assert load(store, "llama", spare_slots=1)._stack.slots == 4 and load(store, "llama")._stack.slots == 6


def test_deletions_of_several_threads_all_land(
    store: S3TStore, ensemble: S3TEnsemble, threads: Callable[..., Future[Any]]
) -> None:
    changes = [threads(ensemble.delete, slices=[place]) for place in [(0, 1), (1, 2), (2, 0)]]
    changes.append(threads(ensemble.refresh))
    for change in changes:
        change.result(LONG)
    assert store.served() == {0: (2, 0), 1: (0, 1), 2: (2,)}
    assert_served(ensemble, store)
    assert ensemble.generation == 3
