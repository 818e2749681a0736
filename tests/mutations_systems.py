"""Wrong changes to rank groups, replay and to what serves; `mutations.py` runs them. The fields are `Mutation`'s."""

from __future__ import annotations

R = "lora/test_rank_groups.py::test_"
JOINED = "lora/test_adapter.py::test_join_of_rank_groups_adds_what_the_stages_add"
PROMISES, BERT = "promises/test_promises.py::test_", "[bert-rank_group]"

REPLAY = "training/test_replay.py::test_"

SYSTEMS = (
    (1, "a rank group starts at its parent's ranks, which stay frozen beside it", "lora/tuner.py",
     (("self._goes_on = trained and not frozen", "self._goes_on = trained"),),
     (PROMISES + "a_stage_begins_where_its_parent_ended" + BERT,)),
    (2, "ranks are stacked in another order in A than in B", "lora/adapter.py",
     (("[stage.arrays[name] for stage in stages]",
       '[stage.arrays[name] for stage in stages][:: -1 if ".lora_A." in name else 1]'),), (JOINED,)),
    (2, "joined ranks keep the lora_alpha of one stage", "lora/adapter.py",
     (('"lora_alpha": closest,', '"lora_alpha": config["lora_alpha"],'),), (JOINED,)),
    (2, "joined ranks of rsLoRA are rsLoRA again", "lora/adapter.py",
     (('"lora_alpha": closest, "use_rslora": False}', '"lora_alpha": closest}'),), (JOINED,)),
    (2, "the frozen prefix has the scaling of one stage over more ranks", "lora/tuner.py",
     (('for field in ("r", "lora_alpha", "use_rslora")', 'for field in ("r",)'),),
     (R + "a_joined_prefix_is_its_stages_one_beside_the_other",)),
    (3, "a deletion overwrites copies of a member's ranks", "serving/slots.py",
     (("view for number, view in", "view.clone() for number, view in"),),
     (R + "a_deletion_reaches_a_model_that_was_cast_meanwhile",)),
    (8, "the card's lines give joined ranks the lora_alpha of one stage", "store/card.py",
     (('lora_alpha=joined["lora_alpha"]', 'lora_alpha=config["lora_alpha"]'),),
     (PROMISES + "stock_peft_gives_a_prefix_the_logits_of_that_time" + BERT,)),
    (8, "a rank group does not say by what it is joined", "training/trainer.py",
     (('if kind == "rank_group" else {}', "if False else {}"),),
     (R + "there_may_be_more_slices_than_layers",)),
    (9, "a member of rank groups has its last stage alone", "serving/following.py",
     (('"stage_parameters") == "all" else stage.path', '"stage_parameters") != "layer_group" else stage.path'),),
     (R + "the_ensemble_is_its_members",)),
    (2, "a stage of all layers whose newest slice is empty forgets its parent", "lora/tuner.py",
     (("if LORA in name and not self._goes_on:", "if LORA in name:"),),
     (REPLAY + "a_stage_whose_newest_slice_is_empty_changes_nothing[all]",)),
    (4, "which examples are replayed depends on how many there are", "store/partition.py",
     (("_chance(stage, digest) < replay", "_chance(stage, str(len(by_slice[slice_id]))) < replay"),),
     (REPLAY + "no_example_moves_another",)),
    (4, "a repair replays everything", "training/rows.py",
     (("return stage_examples(stage, by_slice, self.replay)", "return stage_examples(stage, by_slice)"),),
     (REPLAY + "stages_see_fewer_examples_and_an_audit_knows_which",)),
    (4, "the share that is replayed is not part of the recipe", "store/recipe.py",
     (("if config.replay != 1:", "if False:"),),
     (REPLAY + "a_recipe_without_the_field_is_of_stages_that_saw_everything",)),
    (4, "a stage stays on a parent that is trained again on new rows", "training/reconcile.py",
     (("if not other.isdisjoint(stage.path)", "if stage in other"),),
     (REPLAY + "new_rows_of_an_early_slice_train_every_later_stage_again",)),
    (8, "an unknown kind of stage is joined as layer groups", "store/manifest.py",
     (("if kind not in STAGE_PARAMETERS:", "if False:"),),
     ("store/test_manifest.py::test_a_recipe_that_does_not_say_what_its_stages_are_is_refused",)),
)  # fmt: skip
