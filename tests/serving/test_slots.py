"""A slot: one prefix in the tensors of a model, overwritten where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_s3t import S3TEnsemble, S3TStore, Stage, StoreError
from hf_s3t.lora.adapter import is_lora
from hf_s3t.serving.slots import Slot
from served import copy, load
from trained_stores import WEIGHTS, edit_tensors


@pytest.fixture
def store(tmp_path: Path) -> S3TStore:
    return copy("bert", tmp_path)


@pytest.fixture
def empty(store: S3TStore) -> tuple[S3TEnsemble, Slot]:
    """A model, and the slot of its second member with nothing in it."""
    ensemble = load(store, "bert")
    return ensemble, ensemble._follower.slots[3]


def path_of(*prefix: int) -> tuple[Stage, ...]:
    return Stage(1, prefix).path if prefix else ()


def assert_holds(slot: Slot, store: S3TStore, prefix: tuple[int, ...]) -> None:
    """The slot has the tensors of a prefix, and zeros where it has none."""
    expected = store.assemble(1, prefix).tensors if prefix else {}
    assert set(expected) <= set(slot.tensors)
    for name, tensor in slot.tensors.items():
        assert torch.equal(tensor, expected.get(name, torch.zeros_like(tensor))), name
    assert set(slot.owners) == set(expected)


def test_a_slot_is_the_adapter_and_its_heads_and_nobody_elses(store: S3TStore) -> None:
    ensemble = load(store, "bert")
    own = [{tensor.data_ptr() for tensor in slot.tensors.values()} for slot in ensemble._follower.slots.values()]
    assert len(own) == 6 and len(set().union(*own)) == sum(map(len, own))
    names = set(ensemble._follower.slots[0].tensors)
    assert names == set(store.assemble(0, (0, 1, 2)).tensors)
    assert {name for name in names if not is_lora(name)} == {
        f"base_model.model.classifier.{kind}" for kind in ("weight", "bias")
    }


def test_every_prefix_can_follow_every_other(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    slot, manifest = empty[1], store.manifest()
    pointers = {name: tensor.data_ptr() for name, tensor in slot.tensors.items()}
    prefixes = [(0,), (0, 1), (0, 1, 2), (2,), (2, 0), ()]
    for before in prefixes:
        for after in prefixes:
            slot.take(slot.plan(store, manifest, path_of(*before)), slot)
            assert_holds(slot, store, before)
            slot.take(slot.plan(store, manifest, path_of(*after)), slot)
            assert_holds(slot, store, after)
    assert {name: tensor.data_ptr() for name, tensor in slot.tensors.items()} == pointers


def test_a_prefix_goes_on_in_another_slot(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    """What both have in common is copied from the old one, not read."""
    ensemble, old = empty
    manifest, new = store.manifest(), ensemble._follower.slots[4]
    for before, after in [((0, 1), (0, 1, 2)), ((0, 1, 2), (0, 1)), ((0, 1, 2), (0, 1, 2)), ((2,), (2, 0))]:
        old.take(old.plan(store, manifest, path_of(*before)), old)
        change = old.plan(store, manifest, path_of(*after))
        assert len(change.tensors) < len(change.owners)
        new.take(change, old)
        assert_holds(new, store, after)
        assert_holds(old, store, before)
        new.clear()


def test_a_stage_of_all_layers_replaces_its_parent(tmp_path: Path) -> None:
    store = copy("bert-all", tmp_path)
    slot, manifest = load(store, "bert-all")._follower.slots[3], store.manifest()
    for prefix in [(0, 1, 2), (0, 1), (2, 0), (0,)]:
        slot.take(slot.plan(store, manifest, path_of(*prefix)[-1:]), slot)
        assert_holds(slot, store, prefix)
        assert slot.lowest_layer == 0


def test_planning_changes_nothing(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    slot = empty[1]
    change = slot.plan(store, store.manifest(), path_of(0, 1))
    assert_holds(slot, store, ())
    slot.take(change, slot)
    assert_holds(slot, store, (0, 1))


def test_only_what_is_new_is_read(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    slot, manifest = empty[1], store.manifest()
    slot.take(slot.plan(store, manifest, path_of(0, 1)), slot)
    assert slot.plan(store, manifest, path_of(0, 1)).tensors == {}
    (store.path / "shard-01" / "0" / WEIGHTS).unlink()
    longer = slot.plan(store, manifest, path_of(0, 1, 2))  # the first stage's layers are in the slot already
    assert set(longer.tensors) == set(store.read_stage(Stage(1, (0, 1, 2))).tensors)
    with pytest.raises(StoreError, match="is missing"):  # its head is not any more
        slot.plan(store, manifest, path_of(0))


def test_the_head_is_that_of_the_prefix(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    slot = empty[1]
    heads = []
    for prefix in [(0, 1, 2), (0, 1), (0,)]:
        slot.take(slot.plan(store, store.manifest(), path_of(*prefix)), slot)
        heads.append(slot.tensors["base_model.model.classifier.weight"].clone())
        stored = store.read_stage(Stage(1, prefix)).tensors["base_model.model.classifier.weight"]
        assert torch.equal(heads[-1], stored)
    assert not torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


def test_a_repaired_stage_is_another_one(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    slot = empty[1]
    slot.take(slot.plan(store, store.manifest(), path_of(0, 1)), slot)
    edit_tensors(store.path, "shard-01/0", lambda tensors: [value.mul_(2) for value in tensors.values()])
    change = slot.plan(store, store.manifest(), path_of(0, 1))
    assert {name.split("layer.")[1][0] for name in change.tensors} == {"3"}  # the top group, and no head
    slot.take(change, slot)
    assert_holds(slot, store, (0, 1))


def test_lowest_layer(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    slot, manifest = empty[1], store.manifest()
    for prefix, lowest in [((0,), 3), ((0, 1), 2), ((0, 1, 2), 1), ((2,), 3)]:
        slot.take(slot.plan(store, manifest, path_of(*prefix)), slot)
        assert slot.lowest_layer == lowest


def test_clear_leaves_no_number(empty: tuple[S3TEnsemble, Slot], store: S3TStore) -> None:
    slot = empty[1]
    slot.take(slot.plan(store, store.manifest(), path_of(0, 1, 2)), slot)
    assert any(tensor.any() for tensor in slot.tensors.values())
    slot.owners = {}  # whatever it believes
    slot.clear()
    assert not any(tensor.any() for tensor in slot.tensors.values())


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def widen(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)


def to_float16(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (to_float16, "torch.float16; stages are stored in float32"),
        (widen, r"has shape \(2, 64\), the model asks for \(2, 32\)"),
        (lambda tensors: rename(tensors, "layer.2.", "layer.0."), "the model lacks.*layer.0"),
        (lambda tensors: rename(tensors, "classifier", "score"), "the model lacks.*score.*the stage .*classifier"),
        (lambda tensors: tensors.pop("base_model.model.classifier.bias"), "the stage .*classifier.bias"),
    ],
    ids=["dtype", "shape", "layers", "name of the head", "half a head"],
)
def test_a_stage_that_does_not_fit_is_refused(
    change: Any, message: str, store: S3TStore, empty: tuple[S3TEnsemble, Slot]
) -> None:
    slot = empty[1]
    slot.take(slot.plan(store, store.manifest(), path_of(0)), slot)
    edit_tensors(store.path, "shard-01/0-1", change)
    with pytest.raises(StoreError, match=message):
        slot.plan(store, store.manifest(), path_of(0, 1))
    assert_holds(slot, store, (0,))


def test_files_that_are_missing_or_cut_short_are_refused(store: S3TStore, empty: tuple[S3TEnsemble, Slot]) -> None:
    slot = empty[1]
    slot.take(slot.plan(store, store.manifest(), path_of(0)), slot)
    file = store.path / "shard-01" / "0-1" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(StoreError, match="sha256 differs"):
        slot.plan(store, store.manifest(), path_of(0, 1))
    file.unlink()
    with pytest.raises(StoreError, match="is missing"):
        slot.plan(store, store.manifest(), path_of(0, 1))
    assert_holds(slot, store, (0,))
