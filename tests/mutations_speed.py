"""Wrong changes to the activation cache; see `mutations.py`, which runs them. The fields are those of `Mutation`."""

from __future__ import annotations

LLAMA = "[llama]"
T = "trunk/test_activations.py::test_"
LOSSES = T + "losses_are_those_without_a_cache"
RAGGED = T + "losses_of_rows_of_different_lengths"
SAME_BITS = T + "where_and_how_much_is_kept_changes_no_bit"
LEFT = T + "after_delete_no_file_holds_a_state_of_the_example"
WRITTEN = T + "a_deletion_while_states_are_written_leaves_none_of_them"
BROKEN = T + "a_broken_file_is_removed"
STATE_LOST = T + "a_slice_deleted_with_the_state_lost_takes_its_states_along"
ELSEWHERE = T + "states_of_an_example_that_left_the_index_elsewhere_are_removed"
BATCHES = T + "a_batch_that_is_not_its_rows_is_refused"

SPEED = (
    (3, "a deletion leaves the states of its slice", "store/activation_blocks.py",
     (("if name is None or name.place in hit or", "if name is None or"),), (STATE_LOST,)),
    (3, "a deletion with the state elsewhere leaves states in the folder", "store/sweep.py",
     (('        privates.add(folder.path / ".s3t")\n', "        pass\n"),),
     (T + "a_deletion_with_the_state_elsewhere_takes_its_states_along",)),
    (3, "states of a slice that a deletion hits meanwhile are kept", "training/trunk_cache.py",
     (('if self.cache == "disk" and is_hit(store, order):', "if False:"),), (WRITTEN,)),
    (7, "states of examples that left the index elsewhere stay", "store/activation_blocks.py",
     (("return has_all(example for", "return True or has_all(example for"),), (ELSEWHERE,)),
    (7, "a half-written file is not held against the index", "store/activation_blocks.py",
     (("or not _knows_all(path, has_all):", "or not (path.name.endswith(PART) or _knows_all(path, has_all)):"),),
     (ELSEWHERE,)),
    (7, "a file that is being written survives the deletion", "store/activation_blocks.py",
     (('    for path in (private / FOLDER).glob("*"):\n', '    for path in (private / FOLDER).glob("*s"):\n'),),
     (WRITTEN,)),
    (7, "states are kept where it is not known whose they are", "store/sweep.py",
     (("        return False\n", "        return True\n"),),
     (T + "a_slice_deleted_with_a_torn_state_takes_all_states_along",)),
    (7, "states in memory outlive their example", "training/trunk_cache.py",
     (("        self._forget_deleted()\n", ""),), (T + "what_is_in_memory_is_dropped_with_its_example",)),
    (4, "a row's states are fed to its neighbour", "training/trunk_cache.py",
     (("name.layer, block.states[position]", "name.layer, block.states[position - 1]"),), (LOSSES + LLAMA,)),
    (4, "states of a layer below the stage are fed as they are", "training/trunk_cache.py",
     (("if layer < self._entrance:", "if False:"),), (SAME_BITS + LLAMA,)),
    (4, "a block starts from states that enter another layer", "training/trunk_cache.py",
     (("start, source = below[-1] if below else (0, None)", "start, source = 0, below[-1][1] if below else None"),),
     (T + "blocks_are_filled_from_the_block_below",)),
    (4, "padding holds what the model made of it", "trunk/trunk.py",
     (("padded = torch.zeros(hidden.shape, dtype=states[0].dtype, device=hidden.device)",
       "padded = torch.randn(hidden.shape, dtype=states[0].dtype, device=hidden.device)"),), (RAGGED,)),
    (4, "a block of other rows is taken", "store/activation_blocks.py",
     (("except LookupError:\n            return None", "except LookupError:\n            found = [0] * 99"),),
     (T + "rows_that_came_later_make_a_block_anew",)),
    (4, "a block of other settings is taken", "store/activation_blocks.py",
     (('if _head(path)["tie"] != self.tie:', "if False:"),), (T + "a_file_of_other_settings_is_removed",)),
    (4, "the checksum is not looked at", "store/activation_blocks.py",
     (("if self._checked.get(name) != mark:", "if False:"),), (BROKEN,)),
    (4, "a block of another model is taken", "training/trunk_cache.py",
     (("if not same or block.inputs[position]", "if block.inputs[position]"),),
     (T + "states_of_another_model_are_made_anew",)),
    (4, "a block of rows that are collated otherwise now is taken", "training/trunk_cache.py",
     (("if not same or block.inputs[position]", "if not same or False and block.inputs[position]"),),
     (T + "states_are_made_anew_after_the_collator_was_edited",)),
    (4, "the model leaves out the layer that states enter", "trunk/trunk.py",
     (("if run.calls.count(entrance) < run.times:", "if False:"),),
     (T + "a_model_that_leaves_out_the_entrance_is_refused",)),
    (4, "states are fed to another batch of the same tokens", "trunk/trunk.py",
     (("if found.keys() == batch.keys() and all(_same(found[name], batch[name]) for name in batch):",
       "if _same(found[self.main_input], batch[self.main_input]):"),),
     (T + "a_loss_that_changes_its_batch_is_refused",)),
    (4, "rows are not compared with what their states were computed from", "trunk/row_numbers.py",
     (("if expected is not None and self.digest(", "if False and self.digest("),), (BATCHES,)),
    (4, "a random trunk is cached", "trunk/row_states.py",
     (("    if not eval_trunk:\n", "    if False:\n"),),
     (T + "a_random_trunk_is_refused_unless_it_may_run_in_eval_mode",)),
    (4, "rows that see each other's padding are cached", "trunk/row_states.py",
     (("    if not all(is_close(found[: len(states)],", "    if False and not all(is_close(found[: len(states)],"),),
     (T + "rows_that_see_each_others_padding_are_refused",)),
    (4, "the cache is not part of the recipe", "store/recipe.py",
     (("    if cached_trunk:\n", "    if False:\n"),),
     (T + "the_cache_is_part_of_the_recipe_and_where_it_lies_is_not" + LLAMA,)),
    (4, "an evaluation is fed the last batch's states", "trunk/trunk.py",
     (("        self._pass = None\n\n    def _run_layer", "        pass\n\n    def _run_layer"),),
     (T + "an_evaluation_while_a_stage_trains_runs_the_whole_model" + LLAMA,)),
    (4, "columns as wide as a batch by chance are cut like tokens", "trunk/row_numbers.py",
     (('long = long if alone is None else alone.split(":")[1].ljust(len(tensors), "0")', "pass"),),
     (T + "columns_as_wide_as_a_batch_by_chance",)),
    (5, "a block counts before it is whole", "training/trunk_cache.py",
     (("                writer.end()\n", "                writer._file.flush()\n"),),
     (SAME_BITS + LLAMA, T + "a_training_leaves_the_model_as_it_was")),
)  # fmt: skip
