"""`train(repair="best", cost_budget=...)`: what it spends and on what, and that the promises hold for its stages."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from hf_s3t import S3TStore
from hf_s3t.cli import main as cli
from hf_s3t.plan.repair import best_repair
from hf_s3t.plan.sequences import training_cost
from hf_s3t.plan.survival import Lattice
from hf_s3t.store.audit import verify
from hf_s3t.training import reconcile
from hf_s3t.training.refusals import check_repair
from killing import kill, train_struck
from trainings import CASES, World, place, published, without

OPTIONS = {"num_shards": 2, "num_slices": 3, "args": {"per_device_train_batch_size": 8}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(CASES["bert"], "layer_group", tmp_path_factory.mktemp("repair"))
    world.trainer(world.folder / "whole", **OPTIONS).train()
    store = S3TStore(shutil.copytree(world.folder / "whole", world.folder / "hit"))
    store.delete(ids=victims(world))
    return world


def victims(world) -> list[str]:
    """One example of slice 1 of each shard."""
    return [next(n for n in world.rows["id"] if place(n, 2, 3) == (shard, 1)) for shard in (0, 1)]


def repaired(world, path, **repair):
    world.trainer(path, without(world.rows, {*victims(world)}), **OPTIONS).train(**repair)
    return S3TStore(path).manifest()


@pytest.fixture
def hit(world, tmp_path):
    return shutil.copytree(world.folder / "hit", tmp_path / "out")


def shown(store) -> str:
    """What `hf-s3t status` prints, without its line breaks."""
    return " ".join(CliRunner().invoke(cli.app, ["status", str(store.path)]).stdout.split())


def value(manifest) -> float:
    """Of the stages that are there, all shards together."""
    lattice, surviving = Lattice([1 / 3] * 3), manifest.plan.surviving(manifest.stages)
    return sum(lattice.value(surviving.get(shard, ())) for shard in range(manifest.plan.num_shards))


@pytest.mark.brief("5")
@pytest.mark.parametrize("cost_budget", [2, 5, 8])
def test_the_budget_is_kept_and_what_lives_stays(world, hit, cost_budget):
    before, bytes_before = S3TStore(hit).manifest(), published(hit)
    after = repaired(world, hit, repair="best", cost_budget=cost_budget)
    new = after.stages.keys() - before.stages.keys()
    assert new and sum(stage.depth for stage in new) <= cost_budget
    assert before.stages.items() <= after.stages.items() and not after.plan.missing(after.stages)
    alive = before.plan.surviving(before.stages)
    assert list(after.plan.sequences) == best_repair(3, [alive[0], alive[1]], cost_budget)
    kept = {name for name in bytes_before if name.startswith("shard-")}
    assert kept and all(published(hit)[name] == bytes_before[name] for name in kept)


def test_what_is_trained_adds_more_than_the_plan_in_its_order(world, hit):
    """The same money spent from the front of the plan goes to the first shard alone."""
    before = S3TStore(hit).manifest()
    after = repaired(world, hit, repair="best", cost_budget=5)
    in_order, spent = [], 0
    for stage in before.plan.missing(before.stages):
        spent += stage.depth
        if spent <= 5:
            in_order.append(stage)
    naive = replace(before, stages=before.stages | dict.fromkeys(in_order, {}))
    assert {stage.shard for stage in in_order} == {0}
    assert value(before) < value(naive) < value(after)


def test_every_stage_is_the_one_of_a_store_that_never_had_the_example(world, hit, tmp_path):
    """Promises 3 and 4, of stages that the config's plan does not have."""
    after = repaired(world, hit, repair="best", cost_budget=6)
    orders = after.plan.sequences
    assert orders[0] != S3TStore(world.folder / "whole").manifest().plan.sequences[0]
    both = [list(order) for order in {*orders[0], *orders[1]}]
    options = OPTIONS | {"sequence_selection": both, "prune": False}
    world.trainer(tmp_path / "scratch", without(world.rows, {*victims(world)}), **options).train()
    scratch, found = published(tmp_path / "scratch"), published(hit)
    stages = [name for name in found if name.startswith("shard-")]
    assert len(stages) == 2 * len(after.stages) and all(found[name] == scratch[name] for name in stages)


def test_called_again_it_trains_nothing_and_after_a_deletion_it_plans_anew(world, hit):
    first = repaired(world, hit, repair="best", cost_budget=4)
    assert repaired(world, hit, repair="best", cost_budget=4) == first
    S3TStore(hit).delete(slices=[(0, 0)])
    again = repaired(world, hit, repair="best", cost_budget=4)
    assert again.repair.deletions == first.repair.deletions + 1
    assert again.stages.keys() - {stage for stage in first.stages if (0, 0) not in stage.slices}
    assert not again.plan.missing(again.stages)


@pytest.mark.slow
def test_a_readmission_is_no_reason_to_plan_anew_but_another_prior_is(world, hit):
    first = repaired(world, hit, repair="best", cost_budget=4)
    S3TStore(hit).readmit(ids=victims(world)[:1])
    assert repaired(world, hit, repair="best", cost_budget=4).stages == first.stages
    prior = {"sequence_selection": "optimal", "deletion_prior": [0.8, 0.1, 0.1]}
    rows = without(world.rows, {*victims(world)})
    world.trainer(hit, rows, **OPTIONS | prior).train(repair="best", cost_budget=4)
    after = S3TStore(hit).manifest()
    assert after.deletion_prior == (0.8, 0.1, 0.1) and len(after.stages) > len(first.stages)


def test_a_deletion_does_not_wait_for_the_search_and_begins_it_again(world, hit, monkeypatch):
    searched = []

    def delete_meanwhile(num_slices, alive, *rest):
        searched.append(alive)
        if len(searched) == 1:
            S3TStore(hit).delete(slices=[(0, 2)])  # with the lock held, it would wait for ever
        return best_repair(num_slices, alive, *rest)

    monkeypatch.setattr(reconcile, "best_repair", delete_meanwhile)
    after = repaired(world, hit, repair="best", cost_budget=4)
    assert len(searched) == 2 and searched[0] != searched[1]
    assert after.repair.deletions == after.deletions == 2 and not after.plan.missing(after.stages)


@pytest.mark.slow
def test_another_budget_is_spent_on_top(world, hit):
    first = repaired(world, hit, repair="best", cost_budget=2)
    second = repaired(world, hit, repair="best", cost_budget=3)
    new = second.stages.keys() - first.stages.keys()
    assert first.stages.items() <= second.stages.items() and 0 < sum(stage.depth for stage in new) <= 3


def test_a_repair_of_everything_comes_back_to_the_plan_of_the_config(world, hit):
    repaired(world, hit, repair="best", cost_budget=2)
    after = repaired(world, hit)
    whole = S3TStore(world.folder / "whole").manifest()
    assert after.plan == whole.plan and after.repair is None and whole.stages.keys() <= after.stages.keys()


def test_a_killed_repair_goes_on_with_the_same_stages(world, hit, tmp_path):
    """Promise 5: what it had trained before does not count as alive, so no more is spent than was allowed."""
    other = shutil.copytree(hit, tmp_path / "other")
    never_killed = repaired(world, other, repair="best", cost_budget=6)
    log = tmp_path / "struck"
    assert train_struck(log, lambda: repaired(world, shutil.copytree(hit, tmp_path / "counted"), repair="best",
                                              cost_budget=6), None, "") == 0  # fmt: skip
    commits = [number for number, found in enumerate(log.read_text().split()) if found == "manifest"]
    for instant in commits[1:3]:
        path = shutil.copytree(hit, tmp_path / f"killed-{instant}")
        run = lambda path=path: repaired(world, path, repair="best", cost_budget=6)  # noqa: E731
        assert train_struck(log, run, instant, "after", kill) == -9
        killed = S3TStore(path).manifest()
        assert killed.repair == never_killed.repair and len(killed.stages) < len(never_killed.stages)
        run()
        assert published(path) == published(other)


def test_a_shard_of_which_nothing_is_left(world, hit):
    S3TStore(hit).delete(slices=[(0, 0), (0, 1), (0, 2)])
    after = repaired(world, hit, repair="best", cost_budget=6)
    new = [stage for stage in after.stages if stage.shard == 0]
    assert new and training_cost({stage.prefix for stage in new}) <= 6 and 0 in S3TStore(hit).served()


def test_a_dead_shard_for_which_no_money_is_left_stays_dead(world, hit):
    store = S3TStore(hit)
    store.delete(slices=[(shard, slice_id) for shard in (0, 1) for slice_id in (0, 1, 2)])
    after = repaired(world, hit, repair="best", cost_budget=1)
    assert len(after.stages) == 1 and sorted(map(len, after.plan.sequences)) == [0, 1]
    assert len(store.served()) == 1 and len(store.status().dead_shards) == 1
    assert store.status().life["uniform"].until_first_dead.mean == 0 and verify(store).ok
    assert ", by cost (1); train() returns to the config's plan" in shown(store)
    assert "1 of 6; in each shard at least 0" in shown(store)
    assert len(repaired(world, hit).stages) == 14
    assert "6 of 6; in each shard at least 3" in shown(store) and "repair by cost" not in shown(store)


def test_the_served_model_is_there_at_once(world, hit):
    """The root adapter and the trainer's own model are those of the new plan."""
    trainer = world.trainer(hit, without(world.rows, {*victims(world)}), **OPTIONS)
    trainer.train(repair="best", cost_budget=12)
    assert {shard: len(prefix) for shard, prefix in S3TStore(hit).served().items()} == {0: 3, 1: 3}
    assert trainer.evaluate(trainer.train_dataset)


@pytest.mark.parametrize(
    ("repair", "message"),
    [
        ({"repair": "best"}, "needs the number of slice passes"),
        ({"cost_budget": 3}, "`repair='all'` trains whatever is missing"),
        ({"repair": "most"}, "must be 'all' or 'best', got 'most'"),
        ({"repair": "best", "cost_budget": 0}, "cost_budget, in slice passes per epoch over all shards, must be"),
        ({"repair": "best", "cost_budget": 2.5}, "must be an integer"),
    ],
)
def test_what_makes_no_sense_is_refused(world, hit, repair, message):
    before = published(hit)
    with pytest.raises(ValueError, match=re.escape(message)):
        repaired(world, hit, **repair)
    assert published(hit) == before


def test_many_slices_are_not_searched():
    with pytest.raises(ValueError, match="up to 16 slices, and there are 17. Run `train\\(\\)` without `repair`"):
        check_repair("best", 40, False, 17)
    check_repair("all", None, False, 17)


def test_live_stages_are_not_trained_again_within_a_budget(world, hit):
    trainer = world.trainer(hit, without(world.rows, {*victims(world)}), extend=True, **OPTIONS)
    with pytest.raises(ValueError, match="which a cost budget forbids"):
        trainer.train(repair="best", cost_budget=4)


def test_there_must_be_something_to_repair(world, tmp_path):
    with pytest.raises(ValueError, match="no store in .* to repair"):
        repaired(world, tmp_path / "new", repair="best", cost_budget=6)
    assert not S3TStore(tmp_path / "new").exists


def test_rows_that_vanished_are_deleted_before_the_repair_is_planned(world, tmp_path):
    path = shutil.copytree(world.folder / "whole", tmp_path / "out")
    trainer = world.trainer(path, without(world.rows, {*victims(world)}), missing="delete", **OPTIONS)
    trainer.train(repair="best", cost_budget=4)
    manifest = S3TStore(path).manifest()
    assert manifest.repair.deletions == manifest.generation == 1
    assert not manifest.plan.missing(manifest.stages)
