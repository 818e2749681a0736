"""Promises 1 to 6, bit by bit, over a Llama-, a BERT- (with a trained head) and a ViT-shaped model, for every kind.

Kills are in `test_promises_crash.py`, promises 7 and 8 in `test_promises_files.py`; `test_promises_8bit.py` runs the
tests of this file over a quantised base. `mutations.py` shows that each of them can go red.
"""

from __future__ import annotations

import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_s3t import IsolationError, S3TStore, Stage, StateError
from hf_s3t.serving.loading import read_members
from hf_s3t.store.card import prefix_lines
from trainings import (
    CASES,
    JOINED_RANKS,
    VICTIM_SLICE,
    WORLDS,
    World,
    assembled_files,
    assert_same_stores,
    bring_published_files,
    logits_of,
    make_trainer,
    place,
    published,
    same_tensors,
    tensor_bytes,
    without,
)

HIT = {"shard-00/0-1", "shard-00/0-1-2", "shard-00/1", "shard-00/1-2"}
KEPT = {"shard-00/0", "shard-00/2", "shard-00/2-0"}


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    case, kind = request.param
    return World(CASES[case], kind, tmp_path_factory.mktemp(f"{case}-{kind}"))


def layer_of(world: World, name: str) -> int | None:
    """The layer that a LoRA tensor lies in, read from its name as a whole number."""
    match = re.search(re.escape(world.case.layer_path) + r"\.(\d+)\.", name)
    return int(match[1]) if match and ".lora_" in name else None


def owned(world: World, stage: Stage, name: str) -> bool:
    """Whether a tensor of the training model is the stage's: a head, or LoRA of its layers, counted from the top."""
    if ".default." not in name:
        return False
    if any(f".{head}.modules_to_save." in name for head in world.case.heads):
        return True
    return layer_of(world, name) in owned_layers(world, stage)


def owned_layers(world: World, stage: Stage) -> set[int]:
    top, size = world.case.layers, world.case.layers // 3
    if world.kind != "layer_group":
        return set(range(top))
    return {top - size * stage.depth + offset for offset in range(size)}


# ---- 1. isolation ----


def test_a_stage_changes_what_it_owns_and_nothing_else(world):
    for stage, record in world.recorder.stages.items():
        expected = {name for name in record.before if owned(world, stage, name)}
        assert expected and record.optimized == expected
        changed = {name for name in record.before if record.before[name] != record.after[name]}
        assert changed <= expected
        assert {name for name in expected if ".lora_B." in name or "modules_to_save" in name} <= changed
        assert record.before.keys() == record.after.keys()


def test_a_stage_stores_its_own_layers_and_heads(world):
    for stage in world.recorder.stages:
        tensors = load_file(world.trained / stage.name / "adapter_model.safetensors")
        layers = {layer_of(world, name) for name in tensors} - {None}
        assert layers == owned_layers(world, stage)
        heads = {name for name in tensors if layer_of(world, name) is None}
        assert {name.split(".")[2] for name in heads} == set(world.case.heads)
        assert {value.shape[0] for name, value in tensors.items() if ".lora_A." in name} == {2}


@pytest.mark.brief("llama-layer_group", "bert-layer_group")
def test_the_base_model_comes_out_as_it_went_in(world, tmp_path):
    base = world.case.make_model()
    before = {name: tensor_bytes(value) for name, value in base.state_dict().items()}
    trainer = world.trainer(tmp_path / "out", model=base, sequence_selection=[[0, 1]], args={"max_steps": 2})
    drawn = {name: tensor_bytes(value) for name, value in base.state_dict().items() if "original_module" in name}
    trainer.train()
    after = {name: tensor_bytes(value) for name, value in trainer.model.get_base_model().state_dict().items()}
    kept = {name.replace(".base_layer", "").replace(".original_module", ""): value for name, value in after.items()}
    assert all(kept[name] == value for name, value in before.items() if not name.startswith(world.case.heads))
    assert all(after[name] == value for name, value in drawn.items())


def test_a_stage_begins_where_its_parent_ended(world):
    """Its head, and what it is built on, are the parent's; what is fresh is drawn from its own seed."""
    drawn = set()
    for stage, record in world.recorder.stages.items():
        fresh = {name: record.before[name] for name in record.before if ".default." in name and ".lora_A." in name}
        if stage.parent is None or world.kind != "all":
            drawn.add(tuple(fresh.values()))
        if stage.parent is not None:
            parent = world.recorder.stages[stage.parent].after
            names = [name for name in record.before if name.endswith(".weight") and is_from_parent(world, stage, name)]
            stood = [name for name in names if world.kind != "rank_group" or stage.depth == 2 or ".lora_" not in name]
            assert names and all(
                record.before[name] in (parent.get(name), parent.get(name.replace(".prefix.", ".default.")))
                for name in stood
            )
    assert len(drawn) == (3 if world.kind == "all" else 7)


def is_from_parent(world: World, stage: Stage, name: str) -> bool:
    if ".lora_" in name:
        return ".prefix." in name or world.kind == "all"
    return ".modules_to_save.default." in name


# ---- 2. prefix ----


def test_a_prefix_is_what_stood_when_its_stage_had_been_trained(world):
    store = S3TStore(world.trained)
    for stage, record in world.recorder.stages.items():
        assert assembled_files(store, stage) == record.files
        assert same_tensors(store.assemble(stage.shard, stage.prefix).tensors, record.tensors)


def test_stock_peft_gives_a_prefix_the_logits_of_that_time(world):
    answers = set()
    for stage, record in world.recorder.stages.items():
        names = {"base": world.case.make_model(), "store": str(world.trained)}
        exec(prefix_lines(stage, S3TStore(world.trained).manifest()), names)
        assert same_logits(world, logits_of(names["model"], world.case), record.logits), stage.name
        answers.add(tensor_bytes(record.logits))
    assert len(answers) == len(world.recorder.stages) == 7


def same_logits(world: World, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits are the same bits; where ranks are joined, to rounding."""
    if world.kind != "rank_group":
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=0, atol=JOINED_RANKS[world.case.name])


# ---- 3. never seen ----


@pytest.mark.brief("llama-layer_group", "bert-layer_group", "vit-layer_group", "layer_group")
def test_after_delete_nothing_served_ever_saw_the_example(world, tmp_path):
    store = world.copy(tmp_path)
    receipt = store.delete(ids=[world.victim])
    assert set(receipt.stages_removed) == HIT and set(store.status().missing) == HIT
    assert {path.parent.name for path in store.path.glob("shard-*/*/*")} == {"0", "2", "2-0"}
    assert store.served() == {0: (2, 0)}
    assert published(store.path) == published(world.never_had_slice)
    ours, theirs = read_members(store), read_members(S3TStore(world.never_had_slice))
    assert ours.keys() == theirs.keys()
    assert all(same_tensors(ours[name].tensors, theirs[name].tensors) for name in theirs)


@pytest.mark.brief("llama-layer_group", "bert-layer_group", "vit-layer_group", "layer_group")
def test_the_model_in_memory_forgets_too(world, tmp_path):
    store = world.copy(tmp_path)
    trainer = world.trainer(store.path)
    with torch.no_grad():
        trainer.evaluate(trainer.train_dataset.select(range(2)))  # serves 0-1-2
    before = logits_of(trainer.model, world.case)
    trainer.delete(ids=[world.victim])
    model = PeftModel.from_pretrained(world.case.make_model(), world.never_had_slice)
    after = logits_of(trainer.model, world.case)
    assert torch.equal(after, logits_of(model, world.case)) and not torch.equal(after, before)


# ---- 4. repair ----


@pytest.mark.brief("llama-layer_group", "bert-rank_group", "layer_group")
def test_delete_and_train_is_training_from_scratch_without_the_example(world, tmp_path):
    store = world.copy(tmp_path)
    store.delete(ids=[world.victim])
    world.trainer(store.path, without(world.rows, {world.victim})).train()
    assert_same_stores(store.path, world.never_had)
    trained, repaired = published(world.trained), published(store.path)
    changed = {name for name in trained if trained[name] != repaired[name] and name.endswith(".safetensors")}
    assert {name.rsplit("/", 1)[0] for name in changed if "/" in name} == HIT


@pytest.mark.brief("llama-all", "bert-layer_group")
def test_a_whole_slice_deleted_one_by_one_and_repaired(world, tmp_path):
    store = world.copy(tmp_path)
    for name in sorted(world.slice_ids):
        store.delete(ids=[name])
    rows, plan = without(world.rows, world.slice_ids), [[1, 2], [2, 0], [0]]
    world.trainer(store.path, rows, sequence_selection=plan).train()
    with pytest.warns(UserWarning, match=r"1 of 3 slices are empty, e.g. \(shard, slice\) \(0, 1\)"):
        world.trainer(tmp_path / "scratch", rows, sequence_selection=plan).train()
    assert_same_stores(store.path, tmp_path / "scratch")
    empty = load_file(store.path / "shard-00/1/adapter_model.safetensors")
    assert all(not value.any() for name, value in empty.items() if ".lora_" in name)
    child = load_file(store.path / "shard-00/1-2/adapter_model.safetensors")
    assert all(value.any() for name, value in child.items() if ".lora_" in name)


@pytest.mark.brief("vit-layer_group")
def test_readmitted_and_trained_is_never_deleted(world, tmp_path):
    store = world.copy(tmp_path)
    store.delete(ids=[world.victim])
    store.readmit(ids=[world.victim])
    world.trainer(store.path, sequence_selection=[[0, 1], [1]]).train()
    world.assert_stages(store.path, world.trained, "0", "0-1", "1")


@pytest.mark.brief("llama-layer_group", "vit-layer_group", "layer_group")
def test_the_order_of_the_rows_changes_no_bit(world, tmp_path):
    shuffled = world.rows.select(torch.randperm(24, generator=torch.Generator().manual_seed(5)).tolist())
    world.trainer(tmp_path / "out", shuffled, sequence_selection=[[0, 1, 2]]).train()
    world.assert_stages(tmp_path / "out", world.trained, "0", "0-1", "0-1-2")


@pytest.mark.brief("llama-layer_group", "bert-layer_group", "vit-layer_group")
def test_a_stage_depends_on_its_prefix_alone(world):
    """Trained in another plan, after other stages, and in the company of other rows."""
    full, partial = published(world.trained), published(world.never_had_slice)
    assert {name for name in partial if "/" in name} == {name for name in full if name.rsplit("/", 1)[0] in KEPT}
    assert all(full[name] == digest for name, digest in partial.items() if "/" in name)


# ---- 6. tombstones ----


@pytest.mark.brief("llama-layer_group", "bert-rank_group")
def test_a_deleted_example_that_is_handed_in_again_is_not_trained_on(world, tmp_path):
    store = world.copy(tmp_path)
    store.delete(ids=[world.victim])
    world.trainer(store.path, world.rows).train()
    assert_same_stores(store.path, world.never_had)
    assert store.locate(ids=[world.victim])[0].found == "deleted"


@pytest.mark.brief("llama-layer_group")
def test_a_machine_with_an_old_state_trains_nothing(world, tmp_path):
    here, there = world.copy(tmp_path, "here"), world.copy(tmp_path, "there")
    here.delete(ids=[world.victim])
    bring_published_files(here, there)
    before = {path: path.read_bytes() for path in there.path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    with pytest.raises(StateError, match="generation 0, the manifest of 1.*Nothing was trained.*hf-s3t state import"):
        world.trainer(there.path).train()
    assert before == {
        path: path.read_bytes() for path in there.path.rglob("*") if path.is_file() and path.suffix != ".lock"
    }
    other = next(name for name in world.rows["id"] if place(name) == (0, 0))
    elsewhere = world.copy(tmp_path, "elsewhere")
    elsewhere.delete(ids=[other])  # as many deletions as here, but not the same
    bring_published_files(here, elsewhere)
    with pytest.raises(StateError, match="their tombstones differ"):
        world.trainer(elsewhere.path).train()
    here.export_state(tmp_path / "backup.sqlite")
    there.import_state(tmp_path / "backup.sqlite")
    world.trainer(there.path, sequence_selection=[[1]]).train()
    world.assert_stages(there.path, world.never_had, "1")


# ---- 1. isolation, broken on purpose ----


class Rogue(TrainerCallback):
    """Does something to the model or the optimizer at one event of the second stage."""

    def __init__(self, event, deed):
        self.deed = deed
        setattr(self, event, self.strike)

    def strike(self, args, state, control, model=None, optimizer=None, stage=None, **kwargs):
        if stage.depth == 2:
            self.deed(model, optimizer)


def base_weight(model):
    return dict(model.named_parameters())["base_model.model.model.layers.4.self_attn.q_proj.base_layer.weight"]


def prefix_weight(model):
    return dict(model.named_parameters())["base_model.model.model.layers.4.self_attn.q_proj.lora_B.prefix.weight"]


def train_it(model, optimizer):
    prefix_weight(model).requires_grad = True


def optimize_it(model, optimizer):
    optimizer.add_param_group({"params": [prefix_weight(model)]})


def move(parameter):
    with torch.no_grad():
        parameter.view(-1)[3] += 1e-6


def freeze_everything(model, optimizer):
    for parameter in model.parameters():
        parameter.requires_grad = False


ROGUES = {
    "trains the prefix": ("on_train_begin", train_it, "Unexpected: .*layers.4.*prefix"),
    "optimizes the prefix": ("on_train_begin", optimize_it, "holds 1 tensors that the stage does not own"),
    "moves a base weight": ("on_step_end", lambda model, _: move(base_weight(model)), "changed 1 tensors.*base_layer"),
    "moves the prefix": ("on_train_end", lambda model, _: move(prefix_weight(model)), "changed 1 tensors.*prefix"),
    "freezes the stage": ("on_train_begin", freeze_everything, "missing: .*layers.2.*default"),
}


@pytest.mark.parametrize("name", ROGUES)
def test_a_callback_that_breaks_isolation_is_stopped(name, tmp_path):
    event, deed, message = ROGUES[name]
    trainer = make_trainer(
        tmp_path / "out", CASES["llama"], callbacks=[Rogue(event, deed)], sequence_selection=[[0, 1]]
    )
    with pytest.raises(IsolationError, match=message):
        trainer.train()
    assert [stage.name for stage in S3TStore(tmp_path / "out").manifest().stages] == ["shard-00/0"]


class NoLoss(TrainerCallback):
    """Takes gradients away before the optimizer sees them."""

    def __init__(self, keep):
        self.keep = keep

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not self.keep(name):
                parameter.grad = None


def test_a_stage_without_any_gradient_is_an_error(tmp_path):
    callbacks = [NoLoss(lambda name: False)]
    with pytest.raises(IsolationError, match="No parameter of the stage received a gradient in 2 steps"):
        make_trainer(tmp_path / "out", CASES["llama"], callbacks=callbacks, sequence_selection=[[0]]).train()
    assert not S3TStore(tmp_path / "out").manifest().stages


def test_a_tensor_without_gradient_is_named(tmp_path, caplog):
    callbacks = [NoLoss(lambda name: "layers.5.self_attn.v_proj.lora_B" not in name)]
    make_trainer(tmp_path / "out", CASES["llama"], callbacks=callbacks, sequence_selection=[[0]]).train()
    warnings = [record.getMessage() for record in caplog.records if "never received a non-zero" in record.getMessage()]
    assert len(warnings) == 1 and "2 parameters" in warnings[0]  # without B, A gets none either
    assert "layers.5.self_attn.v_proj.lora_B" in warnings[0]


def test_the_slice_of_the_victim_is_what_the_tests_take_it_for(world):
    location = S3TStore(world.trained).locate(ids=[world.victim])[0]
    assert location.places == ((0, VICTIM_SLICE),) and set(location.stages) == HIT
