"""The activation cache: the same losses, the same bytes wherever it lies, every promise, and what it refuses."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import models
from hf_s3t import RecipeError, S3TConfig, S3TMixin, S3TStore, S3TTrainer
from hf_s3t.store.activation_blocks import BlockName, FileBlocks, FileWriter
from hf_s3t.store.partition import keyed_digest
from hf_s3t.trunk.choice import choose_blocks
from hf_s3t.trunk.row_states import check_cache
from killed_runs import Run, check_kill
from killing import in_child
from scanner import find
from stores import index_of
from trainings import (
    CASES,
    KEY,
    VICTIM_SLICE,
    WEIGHTS,
    World,
    assert_same_stores,
    bring_published_files,
    make_trainer,
    place,
    published,
    rows_of,
    tensor_bytes,
    without,
)

STEADY = {"bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
"""Fields of a model's config that take dropout out of its trunk."""


class CachedWorld(World):
    """As a `World`, with states on the disk unless told otherwise."""

    def trainer(self, path: Path, rows: Dataset | None = None, **options: Any) -> Any:
        options = {"activation_cache": "disk", "model": self.model()} | options
        return super().trainer(path, rows, **options)

    def model(self, **config: Any) -> Any:
        return self.case.make_model(**STEADY.get(self.case.name, {}) | config)

    @cached_property
    def uncached(self) -> list[float]:
        """Losses without a cache."""
        return losses_of(self.trainer(self.folder / "uncached", activation_cache="off"))


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    return {name: CachedWorld(case, "layer_group", tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


@pytest.fixture(params=CASES)
def any_world(request, worlds):
    return worlds[request.param]


@pytest.fixture(params=[pytest.param(case, marks=() if case == "llama" else pytest.mark.slow) for case in CASES])
def world(request, worlds):
    return worlds[request.param]


@pytest.fixture
def llama(worlds):
    return worlds["llama"]


def losses_of(trainer: Any) -> list[float]:
    """Loss of every step of a training."""
    losses, compute = [], trainer.compute_loss

    def computed(*args: Any, **kwargs: Any) -> Any:
        loss = compute(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = computed
    trainer.train()
    return losses


def blocks_of(path: Path) -> dict[str, Path]:
    """Files of the cache, by `slice-layer`."""
    files = {file: BlockName.from_file(file.name) for file in (path / ".s3t/activations").glob("*")}
    return {f"{name.slice}-{name.layer}": file for file, name in files.items()}


def ragged(count: int = 24) -> Dataset:
    """Rows of 4 to 12 tokens, not padded."""
    rows = rows_of(CASES["llama"], count).to_list()
    for position, row in enumerate(rows):
        for name in ("input_ids", "attention_mask", "labels"):
            row[name] = row[name][: 4 + position % 9]
    return Dataset.from_list(rows)


def pad(rows: list[dict[str, Any]], left: bool = False) -> dict[str, torch.Tensor]:
    """A batch as long as its longest row."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, values: list[int]) -> list[int]:
        padding = [fill[name]] * (width - len(values))
        return [*padding, *values] if left else [*values, *padding]

    return {name: torch.tensor([padded(name, row[name]) for row in rows]) for name in fill}


# ---- the same training ----


@pytest.mark.brief("llama")
def test_losses_are_those_without_a_cache(any_world, tmp_path):
    losses = losses_of(any_world.trainer(tmp_path / "out"))
    assert len(losses) == len(any_world.uncached) > 20
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(any_world.uncached), rtol=0, atol=1e-5)


def test_losses_of_rows_of_different_lengths(tmp_path):
    common = {"rows": ragged(), "data_collator": pad}
    cached = losses_of(make_trainer(tmp_path / "cached", CASES["llama"], activation_cache="disk", **common))
    plain = losses_of(make_trainer(tmp_path / "plain", CASES["llama"], **common))
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(plain), rtol=0, atol=1e-5)
    lengths = {len(states) for file in blocks_of(tmp_path / "cached").values() for states in block(file).states}
    assert lengths == set(range(4, 13))


def block(path: Path) -> Any:
    """A block, whatever it was made for."""
    return BlockReader(path).read(BlockName.from_file(path.name))


class BlockReader(FileBlocks):
    """Reads a file of whatever settings."""

    def __init__(self, path: Path):
        super().__init__(path.parent.parent, re.search(rb'"tie": "(\w+)"', path.read_bytes())[1].decode())


@contextmanager
def watched(path: Path) -> Iterator[list[int]]:
    """Notes how many bytes the cache has, after whatever is written to it."""
    seen, write = [], FileWriter._write

    def writing(writer, data):
        write(writer, data)
        writer._file.flush()
        seen.append(sum(file.stat().st_size for file in (path / ".s3t/activations").iterdir()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileWriter, "_write", writing)
        yield seen


def test_where_and_how_much_is_kept_changes_no_bit(world, tmp_path):
    whole = sum(path.stat().st_size for path in blocks_of(world.trained).values())
    settings = {
        "memory": {"activation_cache": "memory"},
        "tight": {"activation_cache_gb": 0.6 * whole / 1e9},
        "nothing": {"activation_cache_gb": 1e-9},
    }
    for name, options in settings.items():
        with watched(tmp_path / name) as seen:
            world.trainer(tmp_path / name, **options).train()
        assert_same_stores(tmp_path / name, world.trained)
        assert max(seen, default=0) <= {"tight": 0.6 * whole, "nothing": 0.02 * whole}.get(name, 0)
    assert blocks_of(tmp_path / "memory") == blocks_of(tmp_path / "nothing") == {}
    assert 0 < len(blocks_of(tmp_path / "tight")) < len(blocks_of(world.trained))
    assert sum(path.stat().st_size for path in blocks_of(tmp_path / "tight").values()) <= 0.6 * whole


def by_slice(lengths: dict[int, int]) -> Dataset:
    """Rows as long as their slice says."""
    rows = rows_of(CASES["llama"]).to_list()
    for row in rows:
        length = lengths[place(row["id"])[1]]
        row |= {name: (row[name] * 4)[:length] for name in ("input_ids", "attention_mask", "labels")}
    return Dataset.from_list(rows)


@pytest.mark.slow
def test_a_limit_holds_beside_blocks_that_are_larger_than_rows_are_on_average(tmp_path):
    """Rows of slice 1 are long, and their block is there; those of slice 0, which comes first, are short."""
    path, rows = tmp_path / "out", by_slice({0: 4, 1: 48, 2: 4})
    options = {"data_collator": pad, "activation_cache": "disk", "args": {"num_train_epochs": 3}}
    options |= {"sequence_selection": [[0, 1]], "num_slices": 3, "layers_per_slice": 1}

    def trainer(rows, **more):
        model = models.tiny_llama(num_hidden_layers=4)
        return make_trainer(path, CASES["llama"], rows=rows, model=model, **options, **more)

    trainer(rows).train()
    assert {name[0] for name in blocks_of(path)} == {"0", "1"}
    victim = next(name for name in rows["id"] if place(name)[1] == 0)
    S3TStore(path).delete(ids=[victim])
    there = sum(file.stat().st_size for file in blocks_of(path).values())
    limit = 0.5 * there
    with watched(path) as seen:
        trainer(without(rows, {victim}), activation_cache_gb=limit / 1e9).train()
    assert max(seen, default=0) <= limit
    assert sum(file.stat().st_size for file in blocks_of(path).values()) <= limit


def test_a_block_that_is_made_anew_takes_no_room_twice(llama, tmp_path):
    path, options = tmp_path / "out", {"sequence_selection": [[0]], "args": {"num_train_epochs": 3}}
    llama.trainer(path, llama.rows.select(range(20)), **options).train()
    (file,) = blocks_of(path).values()
    limit = 1.7 * file.stat().st_size
    with watched(path) as seen:
        llama.trainer(path, extend=True, activation_cache_gb=limit / 1e9, **options).train()
    assert len(blocks_of(path)) == 1 and 0 < max(seen) <= limit


def test_a_limit_holds_for_what_is_there_when_no_stage_asks(llama, tmp_path):
    store = llama.copy(tmp_path)
    sizes = sorted(path.stat().st_size for path in blocks_of(store.path).values())
    llama.trainer(store.path, activation_cache_gb=sizes[-1] / 1e9).train()
    left = [path.stat().st_size for path in blocks_of(store.path).values()]
    assert 0 < sum(left) <= sizes[-1]


def test_the_cache_is_part_of_the_recipe_and_where_it_lies_is_not(world, tmp_path):
    store = world.copy(tmp_path)
    world.trainer(store.path, activation_cache="memory").train()
    with pytest.raises(RecipeError, match="cached_trunk: the store has {'positions': 512}, this run does not name it"):
        world.trainer(store.path, activation_cache="off").train()


class LowerLayers(TrainerCallback):
    """Counts how often each layer computes, while steps are taken and otherwise."""

    def __init__(self, case: Any, model: Any):
        self.stage, self.training, self.counts = None, False, Counter()
        for number, layer in enumerate(model.get_submodule(case.layer_path)):
            inner = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))
            inner.register_forward_pre_hook(lambda *_, number=number: self.count(number))

    def count(self, number):
        self.counts[self.stage, number] += 1

    def on_step_begin(self, args, state, control, stage=None, **kwargs):
        self.stage = stage.depth

    def on_step_end(self, args, state, control, **kwargs):
        self.stage = None


def test_layers_below_the_stage_do_not_run(world, tmp_path):
    model = world.model()
    counter = LowerLayers(world.case, model)
    trainer = world.trainer(tmp_path / "out", model=model, callbacks=[counter], args={"num_train_epochs": 2})
    trainer.train()
    size = world.case.layers // 3
    ran = {(depth, layer) for depth, layer in counter.counts if depth}
    tops = {depth: world.case.layers - size * depth for depth in (1, 2, 3)}
    lowest_kept = {depth: tops[depth] for depth in tops}
    assert {depth: min(layer for at, layer in ran if at == depth) for depth in tops} == lowest_kept
    # Outside of steps: every row once, and some rows to see whether they can be cached at all.
    assert counter.counts[None, 0] < 24 + 3 * 16


def test_an_evaluation_while_a_stage_trains_runs_the_whole_model(world, tmp_path):
    held_out = rows_of(world.case, 30).select(range(24, 30))
    seen: dict[str, list[float]] = {"disk": [], "off": []}

    class Evaluations(TrainerCallback):
        def __init__(self, found):
            self.found = found

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            self.found.append(metrics["eval_loss"])

    for cache, found in seen.items():
        args = {"eval_strategy": "steps", "eval_steps": 2}
        options = {"activation_cache": cache, "eval_dataset": held_out, "callbacks": [Evaluations(found)]}
        world.trainer(tmp_path / cache, args=args, sequence_selection=[[0, 1]], **options).train()
    assert len(seen["disk"]) == len(seen["off"]) > 2
    torch.testing.assert_close(torch.tensor(seen["disk"]), torch.tensor(seen["off"]), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_layers_that_belong_to_no_stage_are_trunk(tmp_path):
    """12 layers in 3 groups of 3: of every stage the lowest 3 are cached; 4 in 4 of 1: the last has nothing below."""
    options = {"activation_cache": "disk", "layers_per_slice": 3, "sequence_selection": [[0, 1, 2], [1, 0]]}
    model = CASES["llama"].make_model(num_hidden_layers=12)
    make_trainer(tmp_path / "left", CASES["llama"], model=model, args={"num_train_epochs": 3}, **options).train()
    assert {name.split("-")[1] for name in blocks_of(tmp_path / "left")} == {"9", "6", "3"}
    options = {"activation_cache": "disk", "num_slices": 4, "sequence_selection": [[0, 1, 2, 3], [1, 0]]}
    model = CASES["llama"].make_model(num_hidden_layers=4)
    make_trainer(tmp_path / "all", CASES["llama"], model=model, args={"num_train_epochs": 3}, **options).train()
    assert {name.split("-")[1] for name in blocks_of(tmp_path / "all")} == {"3", "2", "1"}


def test_blocks_are_filled_from_the_block_below(llama, tmp_path):
    """Slice 1 comes second at first, and only what enters layer 2 is kept of it; then it comes first, too."""
    path, options = tmp_path / "out", {"args": {"num_train_epochs": 2}}
    llama.trainer(path, sequence_selection=[[0, 1, 2]], **options).train()
    assert blocks_of(path).keys() == {"0-4", "0-2", "1-2"}
    options["sequence_selection"] = [[1, 0]]
    llama.trainer(path, **options).train()
    assert blocks_of(path).keys() == {"0-4", "0-2", "1-4", "1-2"}
    llama.trainer(tmp_path / "scratch", activation_cache_gb=1e-9, **options).train()
    llama.assert_stages(path, tmp_path / "scratch", "1", "1-0")


def test_rows_that_came_later_make_a_block_anew(llama, tmp_path):
    """Stages that were there keep what they saw; later ones see more."""
    llama.trainer(tmp_path / "out", llama.rows.select(range(16)), sequence_selection=[[0, 1]]).train()
    assert blocks_of(tmp_path / "out").keys() == {"0-2"}
    for name in ("out", "scratch"):
        llama.trainer(tmp_path / name, sequence_selection=[[1, 0]]).train()
    llama.assert_stages(tmp_path / "out", tmp_path / "scratch", "1", "1-0")


def test_columns_as_wide_as_a_batch_by_chance(tmp_path):
    """Eight labels to a row of 4 to 12 tokens."""
    config = {"problem_type": "multi_label_classification", "num_labels": 8, **STEADY["bert"]}

    def collate(rows):
        labels = [[float(row["id"] < str(label)) for label in range(8)] for row in rows]
        return pad(rows) | {"labels": torch.tensor(labels)}

    losses = {}
    for cache in ("off", "disk"):
        options = {"rows": ragged(), "model": models.tiny_bert(**config), "data_collator": collate}
        options |= {"activation_cache": cache, "args": {"remove_unused_columns": False}, "num_slices": 2}
        losses[cache] = torch.tensor(losses_of(make_trainer(tmp_path / cache, CASES["bert"], **options)))
    torch.testing.assert_close(losses["disk"], losses["off"], rtol=0, atol=1e-5)


class Weighted(S3TTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        assert "input_ids" in self.train_dataset.column_names
        lengths = [len(tokens) for tokens in self.train_dataset["input_ids"]]
        return torch.utils.data.WeightedRandomSampler(lengths, len(lengths))


@pytest.mark.brief("length")
@pytest.mark.parametrize("sampling", ["own sampler", "length", "length column"])
def test_a_sampler_that_reads_a_column_draws_as_without_a_cache(tmp_path, sampling):
    rows = ragged().add_column("length", [7 * row % 5 + 1 for row in range(24)])
    losses = {}
    for cache in ("off", "disk"):
        args = {"train_sampling_strategy": "random" if sampling == "own sampler" else "group_by_length"}
        args["remove_unused_columns"] = sampling != "length column"
        options = {"rows": rows, "data_collator": pad, "activation_cache": cache, "args": args}
        trainer = make_trainer(tmp_path / cache, CASES["llama"], sequence_selection=[[0, 1]], **options)
        trainer.__class__ = Weighted if sampling == "own sampler" else S3TTrainer
        losses[cache] = torch.tensor(losses_of(trainer))
    torch.testing.assert_close(losses["disk"], losses["off"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_layers_that_give_more_values_all_of_them_none(tmp_path):
    config = DebertaV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pooler_dropout=0.0,
        relative_attention=True, pos_att_type=["p2c", "c2p"], initializer_range=0.2, num_labels=3,
    )  # fmt: skip
    losses = {}
    for cache in ("off", "disk"):
        torch.manual_seed(0)
        model = DebertaV2ForSequenceClassification(config)
        options = {"target_modules": ["query_proj"], "sequence_selection": [[0, 1]], "activation_cache": cache}
        losses[cache] = torch.tensor(losses_of(make_trainer(tmp_path / cache, CASES["bert"], model=model, **options)))
    torch.testing.assert_close(losses["disk"], losses["off"], rtol=0, atol=1e-5)


def test_an_example_of_several_rows(tmp_path):
    """The preparation cuts every row in two."""

    class Cutting(Trainer):
        def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any):
            halves = [
                {name: value[part * 6 :][:6] if isinstance(value, list) else value for name, value in row.items()}
                for row in train_dataset
                for part in (0, 1)
            ]
            super().__init__(*args, train_dataset=Dataset.from_list(halves), **kwargs)

    class S3TCutting(S3TMixin, Cutting): ...

    found = {}
    for cache in ("off", "disk"):
        trainer = S3TCutting(
            models.tiny_llama(), TrainingArguments(str(tmp_path / cache), report_to=[], use_cpu=True, max_steps=4),
            train_dataset=models.llama_rows(12), data_collator=default_data_collator, partition_key=KEY,
            peft_config=S3TConfig(num_slices=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            activation_cache=cache,
        )  # fmt: skip
        found[cache] = torch.tensor(losses_of(trainer))
    torch.testing.assert_close(found["disk"], found["off"], rtol=0, atol=1e-5)
    whole = block(next(iter(blocks_of(tmp_path / "disk").values())))
    assert set(Counter(example for example, _ in whole.examples).values()) == {2}


def test_activation_checkpointing_changes_nothing(llama, tmp_path):
    plan = {"sequence_selection": [[0, 1]]}
    args = {"activation_checkpointing": True}
    llama.trainer(tmp_path / "with", args=args, **plan).train()
    llama.assert_stages(tmp_path / "with", llama.trained, "0", "0-1")


# ---- the promises ----


def test_deleted_and_repaired_is_training_from_scratch_without_the_example(world, tmp_path):
    store = world.copy(tmp_path)
    hit = {name for name in blocks_of(store.path) if name.startswith(f"{VICTIM_SLICE}-")}
    others = blocks_of(store.path).keys() - hit
    assert hit and others
    store.delete(ids=[world.victim])
    assert blocks_of(store.path).keys() == others
    untouched = {name: path.stat().st_mtime_ns for name, path in blocks_of(store.path).items()}
    world.trainer(store.path, without(world.rows, {world.victim})).train()
    assert_same_stores(store.path, world.never_had)
    assert {name: blocks_of(store.path)[name].stat().st_mtime_ns for name in others} == untouched


def test_after_delete_no_file_holds_a_state_of_the_example(world, tmp_path):
    store = world.copy(tmp_path)
    needles = {}
    for name, path in blocks_of(store.path).items():
        if name.startswith(f"{VICTIM_SLICE}-"):
            for number, states in enumerate(block(path).states):  # the last position has seen all others
                needles[f"{name} {number}"] = tensor_bytes(states[-1])[:64]
    assert needles and {name for name, _ in find(store.path, needles)} == needles.keys()
    store.delete(ids=[world.victim])
    assert find(store.path, needles) == set()


def test_a_slice_deleted_with_the_state_lost_takes_its_states_along(llama, tmp_path):
    store = llama.copy(tmp_path)
    for name in ("state.sqlite", "partition.key"):
        (store.private / name).unlink()
    store.delete(slices=[(0, VICTIM_SLICE)])
    assert {name.split("-")[0] for name in blocks_of(store.path)} == {"0", "2"}


def test_a_slice_deleted_with_a_torn_state_takes_all_states_along(llama, tmp_path, caplog):
    store = llama.copy(tmp_path)
    store.database.write_bytes(store.database.read_bytes()[:1000])
    store.delete(slices=[(0, VICTIM_SLICE)])
    assert set(published(store.path)) & {f"shard-00/{VICTIM_SLICE}/{WEIGHTS}", f"shard-00/0/{WEIGHTS}"} == {
        f"shard-00/0/{WEIGHTS}"
    }
    assert not blocks_of(store.path) and "not known whose states it holds" in caplog.text


def test_a_deletion_with_the_state_elsewhere_takes_its_states_along(llama, tmp_path):
    """And the running checkpoints of the stages that it hits."""
    out, elsewhere = llama.copy(tmp_path).path, tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("state.sqlite", "partition.key"):
        (out / ".s3t" / name).rename(elsewhere / name)
    for stage in ("shard-00_0-1", "shard-00_2"):
        (out / ".s3t/running" / stage / "checkpoint-3").mkdir(parents=True)
    S3TStore(out, state=elsewhere).delete(ids=[llama.victim])
    assert {name.split("-")[0] for name in blocks_of(out)} == {"0", "2"}
    assert [path.name for path in (out / ".s3t/running").iterdir()] == ["shard-00_2"]


def test_states_of_an_example_that_left_the_index_elsewhere_are_removed(llama, tmp_path):
    """The deletion was made on another machine; the published files and the state came here, after a kill."""
    here, there = llama.copy(tmp_path, "here"), llama.copy(tmp_path, "there")
    for path in blocks_of(here.path).values():
        data = path.read_bytes()
        path.with_name(path.name + ".part").write_bytes(data[: len(data) * 2 // 3])
    there.delete(ids=[llama.victim])
    bring_published_files(there, here)
    there.export_state(tmp_path / "backup.sqlite")
    here.import_state(tmp_path / "backup.sqlite")
    with here.writing():
        pass
    left = sorted(path.name for path in (here.private / "activations").iterdir())
    assert {BlockName.from_file(name).slice for name in left} == {0, 2}
    whole = [path.name for path in blocks_of(there.path).values()]
    assert left == sorted([*whole, *(f"{name}.part" for name in whole)])


@pytest.mark.parametrize("cache", ["disk", pytest.param("memory", marks=pytest.mark.slow)])
def test_a_deletion_while_a_stage_trains_takes_its_states_along(llama, tmp_path, cache):
    path = tmp_path / "out"
    seen = []

    class Delete(TrainerCallback):
        def on_step_end(self, args, state, control, stage=None, **kwargs):
            if stage.depth == 2 and state.global_step == 2 and not seen:
                before = set(blocks_of(path))
                assert in_child(lambda: S3TStore(path).delete(ids=[llama.victim])) == 0
                seen.extend([before, set(blocks_of(path))])

    llama.trainer(path, callbacks=[Delete()], activation_cache=cache).train()
    assert_same_stores(path, llama.never_had)
    if cache == "disk":
        assert {name.split("-")[0] for name in seen[0] - seen[1]} == {str(VICTIM_SLICE)}


def test_a_deletion_while_states_are_written_leaves_none_of_them(llama, tmp_path, monkeypatch):
    path, end, removed = tmp_path / "out", FileWriter.end, []

    def ended(writer):
        end(writer)
        if writer.name.slice == VICTIM_SLICE and not removed:
            assert in_child(lambda: S3TStore(path).delete(ids=[llama.victim])) == 0
            removed.append(writer.path.exists())

    monkeypatch.setattr(FileWriter, "end", ended)
    llama.trainer(path).train()
    assert removed == [False]
    assert_same_stores(path, llama.never_had)
    rows = {example for file in blocks_of(path).values() for example, _ in block(file).examples}
    assert rows == index_of(S3TStore(path)).keys() and len(rows) == 23


def test_what_is_in_memory_is_dropped_with_its_example(llama, tmp_path):
    """While stage 2 trains an example of slice 1 is deleted. Stage 0-1 is next, and enters at layer 2, not at 4."""
    path, held = tmp_path / "out", []
    digest = keyed_digest(bytes.fromhex(KEY), "id", llama.victim)

    class Delete(TrainerCallback):
        def on_train_begin(self, args, state, control, stage=None, **kwargs):
            blocks = trainer.trunk_cache.blocks.blocks
            held.append([name for name, found in blocks.items() if digest in dict(found.examples)])

        def on_step_end(self, args, state, control, stage=None, **kwargs):
            if stage.name == "shard-00/2" and S3TStore(path).locate(ids=[llama.victim])[0].found == "live":
                S3TStore(path).delete(ids=[llama.victim])

    options = {"callbacks": [Delete()], "activation_cache": "memory", "args": {"num_train_epochs": 2}}
    trainer = llama.trainer(path, **options)
    trainer.train()
    two = [BlockName(0, VICTIM_SLICE, layer) for layer in (2, 4)]
    assert [sorted(names) for names in held[3:]] == [two, two, two, *[[]] * (len(held) - 6)]
    assert trainer.trunk_cache.blocks is None


class CachedRun(Run):
    """The run that is killed, of 3 layers: one is below every stage."""

    def train(self, path, rows=None, callbacks=(), **options):
        args = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "save_steps": 2}
        model = self.case.make_model(num_hidden_layers=3, **STEADY.get(self.case.name, {}))
        options |= {"num_slices": 2, "layers_per_slice": 1, "model": model, "args": args, "activation_cache": "disk"}
        rows = self.rows if rows is None else rows
        make_trainer(path, self.case, self.kind, rows, callbacks=list(callbacks), **options).train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {case: CachedRun(case, "layer_group", tmp_path_factory.mktemp(case)) for case in CASES}


@pytest.mark.brief("0-llama-rename")
@pytest.mark.parametrize(("case", "category"), [("llama", "other"), ("llama", "rename"), ("bert", "deletion")])
@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_an_instant_and_run_again_is_never_killed(runs, tmp_path, case, category, number):
    check_kill(runs[case], tmp_path / "out", category, 200 + number)
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("category", ["step", "checkpoint", "rename", "manifest", "deletion", "other"])
@pytest.mark.parametrize("number", range(2))
def test_killed_at_many_instants(runs, tmp_path, case, category, number):
    check_kill(runs[case], tmp_path / "out", category, 300 + number)


# ---- files ----


def written(path: Path) -> FileBlocks:
    """A folder with one block of two rows."""
    blocks = FileBlocks(path, "tie")
    writer = blocks.writer(BlockName(0, 1, 4), [("example", "content"), ("another", "content")])
    for length in (3, 5):
        writer.add("inputs", torch.randn(length, 8))
    writer.end()
    blocks.install(writer)
    return blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_comes_back_bit_by_bit(tmp_path, dtype):
    states = [torch.randn(length, 8).to(dtype) for length in (3, 5, 1)]
    blocks, name = FileBlocks(tmp_path, "tie"), BlockName(12, 3, 40)
    examples = [(f"example {number}", "content") for number in range(len(states))]
    writer = blocks.writer(name, examples)
    for number, value in enumerate(states):
        writer.add(f"inputs {number}", value)
    assert blocks.read(name) is None
    writer.end()
    blocks.install(writer)
    found = blocks.read(name)
    assert [tensor_bytes(value) for value in found.states] == [tensor_bytes(value) for value in states]
    assert [value.dtype for value in found.states] == [dtype] * 3
    assert [value.shape for value in found.states] == [(3, 8), (5, 8), (1, 8)]
    assert (found.examples, found.inputs) == (examples, ["inputs 0", "inputs 1", "inputs 2"])
    assert blocks.sizes().keys() == {name}


def damaged(data: bytes) -> bytes:
    """One bit of a state."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


BREAKS = {
    "damaged": damaged,
    "torn": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a few bytes": lambda data: data[:7],
    "foreign": lambda data: b"a file of somebody else's, which is long enough to have an end",
    "longer": lambda data: data + b"x",
}


@pytest.mark.parametrize("breaking", BREAKS)
def test_a_broken_file_is_removed(tmp_path, breaking, caplog):
    blocks, name = written(tmp_path), BlockName(0, 1, 4)
    path = tmp_path / "activations" / name.file
    path.write_bytes(BREAKS[breaking](path.read_bytes()))
    assert blocks.read(name) is None and not path.exists()
    assert "is removed and made anew" in caplog.text


def test_a_file_of_other_settings_is_removed(tmp_path, caplog):
    written(tmp_path)
    assert FileBlocks(tmp_path, "other tie").read(BlockName(0, 1, 4)) is None
    assert not list(tmp_path.glob("activations/*")) and "another base model" in caplog.text


@pytest.mark.brief("torn")
@pytest.mark.parametrize("breaking", ["damaged", "torn"])
def test_a_broken_file_is_made_anew(llama, tmp_path, breaking):
    store = llama.copy(tmp_path)
    store.delete(ids=[llama.victim])
    (path, *_) = (path for name, path in blocks_of(store.path).items() if name.startswith("0-"))
    whole = path.read_bytes()
    path.write_bytes(BREAKS[breaking](whole))
    llama.trainer(store.path, without(llama.rows, {llama.victim})).train()
    # A torn one is not worth being made again for what is left to train, and is computed for its batches.
    assert breaking == "torn" or path.read_bytes() == whole
    assert not path.exists() or path.read_bytes() == whole
    assert_same_stores(store.path, llama.never_had)


def coarse_norms(model: Any) -> Any:
    """A change that no config tells."""
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-2
    return model


OTHER_MODELS = {
    "attention": lambda case: case.make_model(attn_implementation="eager"),
    "no config tells": lambda case: coarse_norms(case.make_model()),
}


@pytest.mark.parametrize("change", [pytest.param("attention", marks=pytest.mark.slow), "no config tells"])
def test_states_of_another_model_are_made_anew(llama, tmp_path, change):
    store = llama.copy(tmp_path)
    store.delete(ids=[llama.victim])
    before = {name: path.read_bytes() for name, path in blocks_of(store.path).items()}
    rows, model = without(llama.rows, {llama.victim}), OTHER_MODELS[change](llama.case)
    llama.trainer(store.path, rows, model=model, accept_recipe=["base.config.attention"]).train()
    after = {name: path.read_bytes() for name, path in blocks_of(store.path).items()}
    assert any(name.startswith("0-") for name in after)
    assert all(data != before.get(name) for name, data in after.items())


def test_states_are_made_anew_after_the_collator_was_edited(llama, tmp_path, caplog):
    """It has the same name, so that the recipe does not tell."""

    def trainer(rows, ignored):
        edited = {"ignored": ignored}  # nobody looks into it

        def collate(found):
            batch = pad(found)
            batch["labels"][:, -1] = -100 if edited["ignored"] else batch["labels"][:, -1]
            return batch

        options = {"data_collator": collate, "activation_cache": "disk", "sequence_selection": [[0, 1]]}
        return make_trainer(tmp_path / "out", llama.case, rows=rows, **options)

    trainer(llama.rows, ignored=False).train()
    S3TStore(tmp_path / "out").delete(ids=[llama.victim])
    trainer(without(llama.rows, {llama.victim}), ignored=True).train()
    assert "is made again: a row of it differs from what the collator" in caplog.text
    assert not S3TStore(tmp_path / "out").status().missing


def test_other_names_in_the_folder_are_removed(llama, tmp_path):
    store = llama.copy(tmp_path)
    names = {path.name for path in (store.path / ".s3t/activations").iterdir()}
    for name in ("notes.txt", "shard-0_slice-1_layer-4.states", "shard-00_slice-01_layer-4.states"):
        (store.path / ".s3t/activations" / name).write_text("x")
    with store.writing():
        pass
    assert {path.name for path in (store.path / ".s3t/activations").iterdir()} == names


def test_a_full_disk_leaves_nothing_half_written_and_changes_no_bit(llama, tmp_path, monkeypatch, caplog):
    def full(writer):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileWriter, "end", full)
    llama.trainer(tmp_path / "out").train()
    assert not list((tmp_path / "out/.s3t/activations").iterdir())
    assert "could not be written" in caplog.text and "Make room" in caplog.text
    assert_same_stores(tmp_path / "out", llama.trained)


@pytest.mark.slow
def test_what_the_cache_takes_is_said_before_it_is_written(tmp_path, caplog):
    """To whoever leaves logging as it is. Rows of all slices count, not only those of the slice that comes first."""
    options = {"rows": by_slice({0: 4, 1: 8, 2: 40}), "data_collator": pad, "activation_cache": "disk"}
    make_trainer(tmp_path / "out", CASES["llama"], **options).train()
    found = re.search(r"activation cache \(disk\): what enters layers (\[.*\]), of 24 rows of 3 slices, about (\d+)"
                      r" positions, (\S+) GB", caplog.text)  # fmt: skip
    assert found and int(found[2]) == sum(map(len, options["rows"]["input_ids"]))
    assert caplog.text.count("activation cache (disk)") == 1
    written = sum(path.stat().st_size for path in blocks_of(tmp_path / "out").values())
    assert float(found[3]) * 1e9 == pytest.approx(written, rel=0.5)


def test_the_size_of_rows_of_one_length_is_said_exactly(llama, tmp_path, caplog):
    llama.trainer(tmp_path / "out", sequence_selection=[[0, 1]]).train()
    written = sum(states.nbytes for path in blocks_of(tmp_path / "out").values() for states in block(path).states)
    found = re.search(r"of (\d+) rows of (\d) slices, about (\d+) positions, (\S+) GB", caplog.text)
    assert float(found[4]) * 1e9 == pytest.approx(written, rel=0.01)


# ---- which blocks are kept ----


def test_without_a_limit_all_that_saves_is_kept():
    passes = {(0, 0): {12: 4, 8: 2, 4: 1}, (0, 1): {12: 1}, (0, 2): {8: 3}}
    found = choose_blocks(passes, dict.fromkeys(passes, 10))
    assert found == [BlockName(0, 0, 4), BlockName(0, 0, 8), BlockName(0, 0, 12), BlockName(0, 2, 8)]


def test_a_tight_limit_keeps_what_saves_most():
    passes = {(0, 0): {12: 4, 8: 3}, (0, 1): {12: 8}}
    sizes = dict.fromkeys(passes, 10)
    assert choose_blocks(passes, sizes, 10) == [BlockName(0, 1, 12)]
    assert choose_blocks(passes, sizes, 20) == [BlockName(0, 0, 8), BlockName(0, 1, 12)]
    assert choose_blocks(passes, sizes, 9) == []
    assert choose_blocks(passes, sizes, 20, {BlockName(0, 0, 12): 10}) == [BlockName(0, 0, 12), BlockName(0, 1, 12)]
    assert choose_blocks(passes, {(0, 0): 10, (0, 1): 30}, 25) == [BlockName(0, 0, 8), BlockName(0, 0, 12)]



# ---- refusals ----


def test_an_encoder_decoder_is_refused(tmp_path):
    fields = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    model, args = T5ForConditionalGeneration(T5Config(**fields)), TrainingArguments(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="An encoder-decoder model has two trunks"):
        check_cache("disk", None, False, S3TConfig(), args, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_cache": "gpu"}, "must be 'off', 'memory' or 'disk', got 'gpu'"),
        ({"activation_cache": "off", "activation_cache_gb": 1}, "activation cache, which is off"),
        ({"activation_cache": "off", "eval_trunk": True}, "activation cache, which is off"),
        ({"activation_cache_gb": 0}, "must be above 0, got 0"),
        ({"stage_parameters": "all"}, "with stage_parameters='all' every layer has one"),
        ({"args": {"neftune_noise_alpha": 5.0}}, "`neftune_noise_alpha=5.0`: it adds noise to the embeddings"),
    ],
)
def test_what_is_refused_before_anything_is_written(tmp_path, options, message):
    options = {"activation_cache": "disk"} | options
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "out", CASES["llama"], **options)
    assert not (tmp_path / "out").exists()


def shuffled(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = pad(rows)
    return batch | {"input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.3, 5, batch["input_ids"])}


def joined(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    names = ("input_ids", "labels")
    return {name: torch.tensor([[token for row in rows for token in row[name]]]) for name in names}


def maskless(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in pad(rows).items() if name != "attention_mask"}


def left_padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return pad(rows, left=True)


@pytest.mark.parametrize(
    ("collator", "message"),
    [
        (shuffled, "random batches cannot be cached"),
        (left_padded, "padding on the left, packing and random batches"),
        (joined, "gives 'input_ids' of shape .* for 4 rows"),
    ],
)
def test_a_batch_that_is_not_its_rows_is_refused(tmp_path, collator, message):
    trainer = make_trainer(
        tmp_path / "out", CASES["llama"], rows=ragged(), data_collator=collator, activation_cache="disk"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not blocks_of(tmp_path / "out")


def ragged_late() -> Dataset:
    """Rows of 12 tokens, but for the last of every slice, which has 4."""
    rows = sorted(rows_of(CASES["llama"]).to_list(), key=lambda row: keyed_digest(bytes.fromhex(KEY), "id", row["id"]))
    for row in {place(row["id"]): row for row in rows}.values():
        row |= {name: row[name][:4] for name in ("input_ids", "attention_mask", "labels")}
    return Dataset.from_list(rows)


@pytest.mark.parametrize("make_rows", [ragged, ragged_late])
def test_rows_that_see_each_others_padding_are_refused(tmp_path, make_rows):
    rows = make_rows().remove_columns("labels").add_column("labels", [i % 3 for i in range(24)])

    def collate(found):
        batch = pad([{**row, "labels": row["input_ids"]} for row in found])
        return {"input_ids": batch["input_ids"], "labels": torch.tensor([row["labels"] for row in found])}

    options = {"data_collator": collate, "activation_cache": "disk", "model": models.tiny_bert(**STEADY["bert"])}
    trainer = make_trainer(tmp_path / "out", CASES["bert"], rows=rows, **options)
    with pytest.raises(ValueError, match="depends on the other rows .* collator without attention mask"):
        trainer.train()


def test_a_random_trunk_is_refused_unless_it_may_run_in_eval_mode(tmp_path):
    options = {"activation_cache": "disk", "sequence_selection": [[0, 1]]}
    with pytest.raises(ValueError, match="The trunk is random in training.*eval_trunk=True"):
        make_trainer(tmp_path / "no", CASES["bert"], **options).train()
    trainer = make_trainer(tmp_path / "yes", CASES["bert"], eval_trunk=True, **options)
    trainer.train()
    assert len(trainer.store.manifest().stages) == 2


def test_a_trunk_that_computes_otherwise_in_training_is_told_from_a_random_one(tmp_path):
    model = CASES["llama"].make_model()
    model.model.layers[0].mlp.register_forward_hook(lambda mlp, args, output: output * (1 + 1e-3 * mlp.training))
    trainer = make_trainer(tmp_path / "out", CASES["llama"], model=model, activation_cache="disk")
    with pytest.raises(ValueError, match="computes differently in training and in eval mode, always in the same way"):
        trainer.train()


def test_layers_above_that_depend_on_more_than_the_states_are_refused(tmp_path):
    """The head adds what an embedding gave."""
    model, seen = CASES["llama"].make_model(), []
    model.model.layers[0].register_forward_hook(lambda layer, args, output: seen.append(output))
    model.model.norm.register_forward_hook(lambda norm, args, output: output + seen[-1])
    trainer = make_trainer(tmp_path / "out", CASES["llama"], model=model, activation_cache="disk")
    with pytest.raises(ValueError, match="What enters layer 4 is not all that the layers above depend on"):
        trainer.train()


def test_embeddings_of_a_stages_own_are_refused(tmp_path):
    trainer = make_trainer(tmp_path / "out", CASES["llama"], modules_to_save=["embed_tokens"], activation_cache="disk")
    with pytest.raises(ValueError, match="`modules_to_save` names .*, which lies below the layers"):
        trainer.train()


def test_several_sequences_per_row_are_refused(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rows = [{"id": str(row), "input_ids": [[row + 3, 5, 7], [row + 4, 8, 9]], "labels": row % 2} for row in range(24)]
    trainer = make_trainer(
        tmp_path / "out", CASES["bert"], rows=Dataset.from_list(rows), model=BertForMultipleChoice(config),
        task_type=None, modules_to_save=["classifier"], activation_cache="disk",
    )  # fmt: skip
    with pytest.raises(ValueError, match="Several sequences per row cannot be cached"):
        trainer.train()


CHANGES = {
    "tokens": lambda batch: {"input_ids": batch["input_ids"].flip(0)},
    "mask": lambda batch: {"attention_mask": torch.ones_like(batch["attention_mask"]).tril()},
    "positions": lambda batch: {"position_ids": torch.zeros_like(batch["input_ids"])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_loss_that_changes_its_batch_is_refused(tmp_path, change):
    class Noisy(S3TTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, {**inputs, **CHANGES[change](inputs)}, *args, **kwargs)

    trainer = make_trainer(tmp_path / "out", CASES["llama"], activation_cache="disk")
    trainer.__class__ = Noisy
    with pytest.raises(ValueError, match="changes one of .'attention_mask', 'input_ids'. on its way to the model"):
        trainer.train()


def tiny_opt(layers: int = 4, **config: Any) -> OPTForCausalLM:
    fields = {
        "vocab_size": 64, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": layers, "num_attention_heads": 4,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0,
    }  # fmt: skip
    return OPTForCausalLM(OPTConfig(**fields | config))


def test_layer_drop_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="`layerdrop=0.1`: the layer that cached states enter would be left out"):
        check_cache("disk", None, True, S3TConfig(), args, tiny_opt(layerdrop=0.1))


def test_a_model_that_leaves_out_the_entrance_is_refused(tmp_path):
    """Its config does not tell."""
    model = tiny_opt(8)
    model.model.decoder.layerdrop = 0.5
    options = {"activation_cache": "memory", "eval_trunk": True, "num_slices": 2, "layers_per_slice": 4}
    trainer = make_trainer(tmp_path / "out", CASES["llama"], model=model, sequence_selection=[[0]], **options)
    with pytest.raises(ValueError, match="left out layer 4, which cached states enter"):
        trainer.train()


def test_a_training_leaves_the_model_as_it_was(llama, tmp_path):
    trainer = llama.trainer(tmp_path / "out", sequence_selection=[[0, 1]])
    collator = trainer.data_collator
    trainer.train()
    assert trainer.data_collator is collator
    layers = trainer.model.get_base_model().get_submodule("model.layers")
    assert not any("forward" in vars(layer) or layer._forward_pre_hooks for layer in layers)
    assert not trainer.model._forward_pre_hooks
    assert published(tmp_path / "out")["shard-00/0/adapter_config.json"]
    assert place(llama.victim) == (0, VICTIM_SLICE)
