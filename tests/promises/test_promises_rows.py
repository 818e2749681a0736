"""What the promises mean for the rows of a train set: vanished, changed, new or none at all; several shards."""

from __future__ import annotations

import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file

from hf_s3t import DatasetError, RecipeError, S3TEnsemble, S3TStore
from trainings import (
    CASES,
    KINDS,
    WEIGHTS,
    World,
    assert_same_stores,
    logits_of,
    place,
    probe,
    published,
    tensor_bytes,
    without,
)

PLAN = {"num_slices": 2, "sequence_selection": [[0, 1], [1]], "args": {"per_device_train_batch_size": 8}}


@pytest.fixture(scope="module", params=[pytest.param(k, marks=[pytest.mark.slow] * (k != KINDS[0])) for k in KINDS])
def world(request, tmp_path_factory):
    world = World(CASES["bert"], request.param, tmp_path_factory.mktemp(request.param))
    world.trainer(world.folder / "small", **PLAN).train()
    return world


@pytest.fixture
def store(world, tmp_path):
    return S3TStore(shutil.copytree(world.folder / "small", tmp_path / "out"))


@pytest.fixture(scope="module")
def scratch(world):
    """Trains into a fresh folder, once per name."""

    def train(name, rows, **options):
        path = world.folder / name
        if not path.exists():
            world.trainer(path, rows, **PLAN | options).train()
        return path

    return train


def victim_of(world, slice_id=1):
    return next(name for name in world.rows["id"] if place(name, slices=2) == (0, slice_id))


def changed(rows: Dataset, name: str) -> Dataset:
    """The rows with another content in one of them."""
    records = rows.to_list()
    record = next(record for record in records if record["id"] == name)
    record["labels"] = (record["labels"] + 1) % 3
    return Dataset.from_list(records, features=rows.features)


def test_vanished_rows_stop_a_training(world, store):
    before = published(store.path)
    rows = without(world.rows, {victim_of(world)})
    with pytest.raises(DatasetError, match="1 examples that were trained on are gone.*missing='delete'"):
        world.trainer(store.path, rows, **PLAN).train()
    with pytest.raises(DatasetError, match="0 examples.*are gone.*and 1 have changed"):
        world.trainer(store.path, changed(world.rows, victim_of(world)), **PLAN).train()
    assert published(store.path) == before


def test_vanished_rows_are_deleted_on_request(world, store, scratch):
    rows = without(world.rows, {victim_of(world)})
    world.trainer(store.path, rows, missing="delete", **PLAN).train()
    assert_same_stores(store.path, scratch("without", rows))
    world.trainer(store.path, world.rows, **PLAN).train()  # handed in again, it stays deleted
    assert_same_stores(store.path, scratch("without", rows))


def test_changed_rows_are_trained_on_anew(world, store, scratch):
    rows = changed(world.rows, victim_of(world))
    world.trainer(store.path, rows, missing="delete", **PLAN).train()
    assert_same_stores(store.path, scratch("changed", rows))
    assert published(store.path) != published(world.folder / "small")


def test_vanished_rows_are_ignored_on_request(world, store):
    before = published(store.path)
    rows = without(world.rows, {victim_of(world)})
    world.trainer(store.path, rows, missing="ignore", **PLAN).train()
    assert published(store.path) == before
    assert store.locate(ids=[victim_of(world)])[0].found == "live", "it can still be deleted"
    assert set(store.delete(ids=[victim_of(world)]).stages_removed) == {"shard-00/0-1", "shard-00/1"}


def test_new_rows_wait_for_new_stages(world, store, tmp_path, scratch):
    rows = without(world.rows, {victim_of(world)})
    waiting = shutil.copytree(scratch("without", rows), tmp_path / "waiting")
    world.trainer(waiting, world.rows, **PLAN).train()
    assert published(waiting) == published(scratch("without", rows))
    extended = shutil.copytree(scratch("without", rows), tmp_path / "extended")
    world.trainer(extended, world.rows, extend=True, **PLAN).train()
    assert_same_stores(extended, store.path)


def test_a_new_row_can_be_deleted_before_any_stage_saw_it(world, scratch, tmp_path):
    rows = without(world.rows, {victim_of(world)})
    path = shutil.copytree(scratch("without", rows), tmp_path / "grown")
    world.trainer(path, world.rows, **PLAN).train()
    S3TStore(path).delete(ids=[victim_of(world)])
    world.trainer(path, world.rows, **PLAN).train()
    assert_same_stores(path, scratch("without", rows))


def test_a_changed_recipe_trains_nothing(world, store):
    before = published(store.path)
    store.delete(ids=[victim_of(world)])
    after = published(store.path)
    for name, options in {
        "config.r": {"r": 4},
        "config.lora_dropout": {"lora_dropout": 0.0},
        "arguments.learning_rate": {"args": PLAN["args"] | {"learning_rate": 2e-2}},
        "base.sha256": {"model": world.case.make_model(seed=1)},
    }.items():
        with pytest.raises(RecipeError, match=f"(?s)The settings differ.*  {name}: the store has"):
            world.trainer(store.path, **PLAN | options).train()
    assert published(store.path) == after != before


def test_a_person_is_deleted_with_all_rows(world, tmp_path):
    person = world.rows["person"][0]
    gone = {row["id"] for row in world.rows if row["person"] == person}
    options = PLAN | {"group_column": "person"}
    world.trainer(tmp_path / "out", **options).train()
    receipt = S3TStore(tmp_path / "out").delete(groups=[person])
    assert receipt.examples == len(gone) == 3
    newcomer = world.rows.select([0]).to_list()[0] | {"id": "new row of the same person"}
    rows = Dataset.from_list([*world.rows.to_list(), newcomer], features=world.rows.features)
    world.trainer(tmp_path / "out", rows, **options).train()
    world.trainer(tmp_path / "scratch", without(world.rows, gone), **options).train()
    assert_same_stores(tmp_path / "out", tmp_path / "scratch")


def test_an_empty_slice_trains_stages_that_change_nothing(world, tmp_path):
    rows = without(world.rows, {name for name in world.rows["id"] if place(name, slices=2)[1] == 1})
    with pytest.warns(UserWarning, match="1 of 2 slices are empty"):
        world.trainer(tmp_path / "out", rows, **PLAN | {"sequence_selection": [[1, 0]]}).train()
    empty = load_file(tmp_path / f"out/shard-00/1/{WEIGHTS}")
    assert empty and all(not value.any() for name, value in empty.items() if ".lora_" in name)
    assert all(value.any() for name, value in empty.items() if name.endswith("classifier.weight"))
    full = load_file(tmp_path / f"out/shard-00/1-0/{WEIGHTS}")
    assert all(value.any() for name, value in full.items())


def test_two_stages_never_share_their_bytes(world, tmp_path):
    """Two empty slices: the same zeros in the same layers, yet two files, so that purging one leaves the other."""
    rows = without(world.rows, {name for name in world.rows["id"] if place(name, 2, 2)[1] == 1})
    with pytest.warns(UserWarning, match="2 of 4 slices are empty"):
        world.trainer(tmp_path / "out", rows, **PLAN | {"num_shards": 2, "sequence_selection": [[1]]}).train()
    first, second = (tmp_path / f"out/shard-0{shard}/1/{WEIGHTS}" for shard in (0, 1))
    tensors, others = load_file(first), load_file(second)
    assert {name: tensor_bytes(value) for name, value in tensors.items()} == {
        name: tensor_bytes(value) for name, value in others.items()
    }
    assert first.read_bytes() != second.read_bytes()


def test_without_dropout(world, tmp_path):
    base = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for name, rows in (("out", world.rows), ("scratch", without(world.rows, {victim_of(world)}))):
        model = world.case.make_model(**base)
        world.trainer(tmp_path / name, rows, model=model, lora_dropout=0.0, **PLAN).train()
    S3TStore(tmp_path / "out").delete(ids=[victim_of(world)])
    model = world.case.make_model(**base)
    world.trainer(tmp_path / "out", model=model, lora_dropout=0.0, **PLAN).train()
    assert_same_stores(tmp_path / "out", tmp_path / "scratch")


# ---- several shards ----


@pytest.mark.parametrize("case", [pytest.param("llama", marks=pytest.mark.slow), "bert"])
def test_several_shards(case, world, tmp_path):
    """One shard is hit: the others' files stay, the ensemble and the root adapter follow."""
    world = World(CASES[case], world.kind, tmp_path)
    options = PLAN | {"num_shards": 2}
    trainer = world.trainer(tmp_path / "out", **options)
    trainer.train()
    names = [name for name in world.rows["id"] if place(name, 2, 2) == (1, 0)]
    before = published(tmp_path / "out")
    S3TStore(tmp_path / "out").delete(ids=[names[0]])
    after = published(tmp_path / "out")
    assert {name for name in before if name.startswith("shard-00")} <= after.keys()
    assert S3TStore(tmp_path / "out").served() == {0: (0, 1), 1: (1,)}
    check_ensemble(world, tmp_path / "out")
    world.trainer(tmp_path / "out", **options).train()
    world.trainer(tmp_path / "scratch", without(world.rows, {names[0]}), **options).train()
    assert_same_stores(tmp_path / "out", tmp_path / "scratch")
    assert {name for name in before if name.startswith("shard-00")} == {
        name for name, digest in published(tmp_path / "out").items() if before.get(name) == digest and "00/" in name
    }


def test_the_best_tree_for_a_cost_is_trained_deleted_and_repaired(world, tmp_path):
    """Most of its sequences are truncated."""
    options = {"num_slices": 3, "sequence_selection": "optimal", "cost_budget": 9, "deletion_prior": [0.6, 0.3, 0.1]}
    trainer = world.trainer(tmp_path / "out", **options)
    trainer.train()
    plan = S3TStore(tmp_path / "out").manifest().plan
    assert plan.cost <= 9 and {len(order) for order in plan.sequences[0]} > {3}
    names = [name for name in world.rows["id"] if place(name, 1, 3) == (0, 1)]
    before = published(tmp_path / "out")
    S3TStore(tmp_path / "out").delete(ids=[names[0]])
    assert 1 not in S3TStore(tmp_path / "out").served()[0]
    world.trainer(tmp_path / "out", **options).train()
    world.trainer(tmp_path / "scratch", without(world.rows, {names[0]}), **options).train()
    assert_same_stores(tmp_path / "out", tmp_path / "scratch")
    kept = {name for name in before if name.startswith("shard-") and "1" not in name.split("/")[1]}
    assert kept and all(published(tmp_path / "out")[name] == before[name] for name in kept)


def check_ensemble(world: World, path) -> None:
    """The ensemble averages the members' probabilities; a root adapter is their weight average."""
    store = S3TStore(path)
    members = []
    for shard, prefix in store.served().items():
        store.export(path.parent / f"member-{shard}", prefix=f"shard-{shard:02d}/{'-'.join(map(str, prefix))}")
        model = PeftModel.from_pretrained(world.case.make_model(), path.parent / f"member-{shard}")
        members.append(logits_of(model, world.case).softmax(-1))
    ensemble = S3TEnsemble.from_pretrained(path, world.case.make_model())
    with torch.no_grad():
        answer = ensemble(**probe(world.case)).logits.softmax(-1)
    assert torch.allclose(answer, sum(members) / 2, atol=1e-6)
    assert tensor_bytes(members[0]) != tensor_bytes(members[1])
    assert (store.manifest().root is None) == bool(world.case.heads)
    if not world.case.heads:
        check_root(world, path)


def check_root(world: World, path) -> None:
    """The root adapter moves every weight by the mean of what the members move it by."""
    moved = []
    for folder in (path, path.parent / "member-0", path.parent / "member-1"):
        model = PeftModel.from_pretrained(world.case.make_model(), folder).merge_and_unload()
        base = world.case.make_model().state_dict()
        moved.append({name: value.double() - base[name].double() for name, value in model.state_dict().items()})
    root, first, second = moved
    assert any(value.any() for value in root.values())
    for name, value in root.items():
        assert torch.allclose(value, (first[name] + second[name]) / 2, atol=1e-6), name
