"""A repair with other settings: only what is named, on record for good, and never claimed to be bit-equal."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_s3t import DatasetError, RecipeError, S3TStore, StateError, StoreError
from hf_s3t.cli.tables import show_status
from hf_s3t.store.audit import verify
from hf_s3t.store.manifest import Manifest
from hf_s3t.store.receipts import LIMITS, read_receipts
from hf_s3t.store.recipe_differences import NOT_BIT_EQUAL, Accepted
from hf_s3t.store.sync import check_same_store
from stores import edit_database, make_store, records_of
from trainings import CASES, World, place, published

pytest_plugins = ["hub_fixtures"]

PLAN = {"num_slices": 2, "sequence_selection": [[0, 1], [1]]}
DECAY, EPOCHS = "arguments.weight_decay", "arguments.num_train_epochs"
OTHER = {"args": {"weight_decay": 0.5}}
CLAIM = "not bit-equal to training from scratch"
OUT_OF_1 = {"shard-00/0-1", "shard-00/1"}
"""Stages that see slice 1."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    made = World(CASES["llama"], "layer_group", tmp_path_factory.mktemp("accepted"))
    made.trainer(made.folder / "small", **PLAN).train()
    return made


@pytest.fixture
def store(world: World, tmp_path: Path) -> S3TStore:
    """A store of three stages, from which an example of slice 1 was deleted."""
    store = S3TStore(shutil.copytree(world.folder / "small", tmp_path / "out"))
    store.delete(ids=[victim(world, 1)])
    return store


@pytest.fixture(scope="module")
def repaired(world: World) -> Path:
    """The same, repaired with another weight decay."""
    path = Path(shutil.copytree(world.folder / "small", world.folder / "repaired"))
    S3TStore(path).delete(ids=[victim(world, 1)])
    world.trainer(path, accept_recipe=[DECAY], **PLAN | OTHER).train()
    return path


def shown_by(table: Any) -> str:
    """What a person sees."""
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def victim(world: World, slice_id: int) -> str:
    return next(name for name in world.rows["id"] if place(name, slices=2) == (0, slice_id))


def test_other_settings_train_only_where_each_is_named(world, store):
    before = published(store.path)
    for accept in ([], [EPOCHS]):
        with pytest.raises(RecipeError, match=rf"{DECAY}: the store has 0\.0, this run 0\.5"):
            world.trainer(store.path, accept_recipe=accept, **PLAN | OTHER).train()
    with pytest.raises(RecipeError, match=r"arguments\.seed"):
        world.trainer(store.path, accept_recipe=[DECAY], **PLAN, args={"weight_decay": 0.5, "seed": 1}).train()
    with pytest.raises(ValueError, match=r"'config\.r' cannot be accepted: live and new stages are joined"):
        world.trainer(store.path, accept_recipe=["config.r"], **PLAN, r=4)
    assert published(store.path) == before and store.manifest().accepted == ()


def test_a_run_that_is_refused_for_another_reason_accepts_nothing(world, store):
    before, some = published(store.path), world.rows.select(range(8))
    with pytest.raises(DatasetError, match="gone from the train set"):
        world.trainer(store.path, some, accept_recipe=[DECAY], **PLAN | OTHER).train()
    assert published(store.path) == before and not store.manifest().accepted


def test_rows_that_vanish_from_such_a_run_have_receipts_of_the_lower_grade(world, store):
    first = next(place for place, name in enumerate(world.rows["id"]) if name != victim(world, 1))
    some = world.rows.select([row for row in range(len(world.rows)) if row != first])
    world.trainer(store.path, some, accept_recipe=[DECAY], missing="delete", **PLAN | OTHER).train()
    assert [CLAIM in read_receipts(store)[number]["limits"][-1] for number in (0, 1)] == [False, True]


def test_the_repair_goes_on_and_is_on_record_everywhere(world, repaired):
    before, store = published(world.folder / "small"), S3TStore(repaired)
    after, manifest = published(repaired), store.manifest()
    assert {name.rpartition("/")[0] for name in before if before[name] != after[name]} - {""} == OUT_OF_1
    assert manifest.accepted == (Accepted(DECAY, 0.0, 0.5, 1),) and manifest.recipe["arguments"]["weight_decay"] == 0.5
    data = json.loads((repaired / "s3t.json").read_text())
    assert data["accepted"] == [{"setting": DECAY, "before": 0.0, "after": 0.5, "generation": 1}]
    counts = {name: record.get("accepted", 0) for name, record in records_of(store).items()}
    assert counts == {"shard-00/0": 0, **dict.fromkeys(OUT_OF_1, 1)}
    card = (repaired / "README.md").read_text()
    assert f"| `{DECAY}` | `0.0` | `0.5` | 1 |" in card and CLAIM in card
    shown = shown_by(show_status(store.status()))
    assert DECAY in shown and "influence-free by construction, and not bit-equal" in " ".join(shown.split())
    assert [*store.status().to_json()["accepted"]] == data["accepted"] and verify(store).ok


def test_a_store_without_such_changes_says_nothing_of_them(world):
    store = S3TStore(world.folder / "small")
    said = [(store.path / "README.md").read_text(), shown_by(show_status(store.status()))]
    assert not any(CLAIM in text for text in said)
    assert all("accepted" not in record for record in records_of(store).values())


def test_receipts_tell_the_two_grades_of_claim_apart(world, repaired, tmp_path):
    store = S3TStore(shutil.copytree(repaired, tmp_path / "out"))
    (before,) = read_receipts(store)
    assert tuple(before["limits"]) == LIMITS
    limits = store.delete(ids=[victim(world, 0)]).limits
    assert limits[:-1] == LIMITS[:-1] and f"Settings were changed ({DECAY}). {NOT_BIT_EQUAL}." in limits[-1]
    assert "after repair it is what training without" not in " ".join(limits)


def test_a_run_that_was_stopped_goes_on_with_the_accepted_settings(world, store):
    running = store.private_folder("running") / "shard-00_1" / "checkpoint-1"
    running.mkdir(parents=True)
    trainer = world.trainer(store.path, accept_recipe=[DECAY], **PLAN | OTHER)
    trainer._train_missing = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not running.exists(), "what was begun with other settings is begun anew"
    assert len(store.manifest().accepted) == 1
    world.trainer(store.path, accept_recipe=[DECAY], **PLAN | OTHER).train()
    assert len(store.manifest().accepted) == 1 and not store.status().missing
    with pytest.raises(RecipeError, match=rf"{DECAY}: the store has 0\.5, this run 0\.0"):
        world.trainer(store.path, **PLAN).train()


def test_a_stage_of_other_settings_is_not_comparable_and_one_of_these_is(world, repaired):
    from_store, rows = S3TStore(repaired), [name for name in world.rows["id"] if name != victim(world, 1)]
    kept = world.rows.select([world.rows["id"].index(name) for name in rows])

    def make(folder):
        return world.trainer(Path(folder), kept, **PLAN | OTHER)

    earlier, later = from_store.verify(["shard-00/0", "shard-00/1"], make_trainer=make).retrained
    assert later.outcome == "equal", later
    assert earlier.outcome == "not comparable"
    assert f"or may have been: {DECAY}: 0.0, since generation 1 0.5" in earlier.reasons[0]


def test_a_stage_that_differs_without_such_a_reason_is_still_broken(world, repaired, tmp_path):
    path = Path(shutil.copytree(repaired, tmp_path / "out"))
    change = "UPDATE records SET record = json_set(record, '$.accepted', 1) WHERE stage = 'shard-00/0'"
    edit_database(path, change)
    rows = world.rows.filter(lambda row: row["id"] != victim(world, 1), keep_in_memory=True)
    report = S3TStore(path).verify(
        ["shard-00/0"], make_trainer=lambda to: world.trainer(Path(to), rows, **PLAN | OTHER)
    )
    assert report.bit_equal == "different" and report.retrained[0].reasons == ("expected the same bytes",)


def test_without_the_state_no_stage_is_trained_again_and_none_is_made(world, repaired, tmp_path):
    store = S3TStore(shutil.copytree(repaired, tmp_path / "out"))
    store.database.unlink()
    with pytest.raises(StateError, match="has no state"):
        store.verify(["shard-00/0"], make_trainer=lambda to: world.trainer(Path(to), **PLAN | OTHER))
    assert not store.database.exists()


# ---- in the manifest, and between machines ----


@pytest.mark.parametrize(
    "accepted",
    [
        [{"setting": "base.sha256", "before": "0", "after": "1", "generation": 0}],
        [{"setting": DECAY, "before": 0, "after": 1, "generation": -1}],
        [{"setting": DECAY, "before": 0, "after": 1}], [DECAY], 5,
    ],
)  # fmt: skip
def test_a_manifest_that_claims_what_can_not_be_accepted_is_damaged(tmp_path, accepted):
    data = make_store(tmp_path / "out").manifest().to_json()
    assert Manifest.from_json({name: value for name, value in data.items() if name != "accepted"}).accepted == ()
    with pytest.raises(StoreError, match="The manifest is damaged"):
        Manifest.from_json({**data, "accepted": accepted})


def with_decay(manifest: Manifest, *decays: float) -> Manifest:
    """A manifest whose weight decay was changed so many times, from 0."""
    steps = zip((0.0, *decays), decays, strict=False)
    accepted = tuple(Accepted(DECAY, before, after, 0) for before, after in steps)
    return replace(manifest, recipe={**manifest.recipe, "arguments": {"weight_decay": (0.0, *decays)[-1]}},
                   accepted=accepted)  # fmt: skip


def test_two_machines_meet_where_one_goes_on_from_the_other(tmp_path):
    manifest = make_store(tmp_path / "out").manifest()
    first, second, third = (with_decay(manifest, *decays) for decays in ((), (0.1,), (0.1, 0.2)))
    for ours, theirs in ((first, first), (first, third), (third, second), (second, third)):
        check_same_store(ours, theirs)
    with pytest.raises(RecipeError, match="accepted different settings"):
        check_same_store(second, with_decay(manifest, 0.3))
    with pytest.raises(RecipeError, match=DECAY):
        check_same_store(first, replace(second, accepted=()))


def change(path: str, *decays: float) -> None:
    store = S3TStore(path)
    store.write_manifest(store.write_root(with_decay(store.manifest(), *decays)))


def push(path: str) -> None:
    S3TStore(path).push("owner/m")


def pull(path: str) -> None:
    S3TStore(path).pull("owner/m")


def settings(path: str) -> list:
    manifest = S3TStore(path).manifest()
    return [manifest.recipe["arguments"]["weight_decay"], len(manifest.accepted)]


def test_whoever_pushes_or_pulls_keeps_the_newest_settings(machine, tmp_path):
    path, other = str(make_store(tmp_path / "out").path), str(tmp_path / "other")
    change(path)
    shutil.copytree(path, other)
    change(path, 0.1)
    machine(push, path=path)
    machine(push, path=other)  # which knows nothing of it
    assert machine(settings, path="owner/m") == [0.1, 1]
    change(path, 0.1, 0.2)
    machine(pull, path=path)
    machine(pull, path=other)
    assert (settings(path), settings(other)) == ([0.2, 2], [0.1, 1])
