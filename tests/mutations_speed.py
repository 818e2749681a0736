"""Wrong changes to the activation cache; see `mutations.py`, which runs them. The fields are those of `Mutation`."""

from __future__ import annotations

LLAMA, BERT = "[llama]", "[bert]"
T = "test_activations.py::test_"
LOSSES = T + "losses_are_those_without_a_cache"
RAGGED = T + "losses_of_rows_of_different_lengths"
SAME_BITS = T + "where_and_how_much_is_kept_changes_no_bit"
LEFT = T + "after_delete_no_file_holds_a_state_of_the_example"
WRITTEN = T + "a_deletion_while_states_are_written_leaves_none_of_them"
BROKEN = T + "a_broken_file_is_removed"
BATCHES = T + "a_batch_that_is_not_its_rows_is_refused"

SPEED = (
    (3, "a deletion leaves the states of its slice", "activations.py",
     (("if name is None or name.place in hit or not", "if name is None or not"),), (LEFT + LLAMA,)),
    (3, "states of a slice that a deletion hits meanwhile are kept", "feeding.py",
     (('if self.cache == "disk" and is_hit(store, order):', "if False:"),), (WRITTEN,)),
    (7, "states of examples that left the index elsewhere stay", "activations.py",
     (("return index is None or all(row[0] in index", "return True or all(row[0] in index"),),
     (T + "states_of_an_example_that_left_the_index_elsewhere_are_removed",)),
    (7, "a file that is being written survives the deletion", "activations.py",
     (("    for path in paths:\n", "    for path in [path for path in paths if not path.name.endswith(PART)]:\n"),),
     (WRITTEN,)),
    (7, "states in memory outlive their example", "feeding.py",
     (("        self._forget_deleted()\n", ""),), (T + "what_is_in_memory_is_dropped_with_its_example",)),
    (4, "a row's states are fed to its neighbour", "feeding.py",
     (("name.layer, block.states[position]", "name.layer, block.states[position - 1]"),), (LOSSES + LLAMA,)),
    (4, "states of a layer below the stage are fed as they are", "feeding.py",
     (("if layer < self._entrance:", "if False:"),), (SAME_BITS + LLAMA,)),
    (4, "a block starts from states that enter another layer", "feeding.py",
     (("start, source = below[-1] if below else (0, None)", "start, source = 0, below[-1][1] if below else None"),),
     (T + "blocks_are_filled_from_the_block_below",)),
    (4, "padding holds what the model made of it", "trunk.py",
     (("padded = torch.zeros(hidden.shape, dtype=states[0].dtype, device=hidden.device)",
       "padded = torch.randn(hidden.shape, dtype=states[0].dtype, device=hidden.device)"),), (RAGGED,)),
    (4, "a block of other rows is taken", "activations.py",
     (("except (KeyError, IndexError):\n            return None", "except LookupError:\n            return [0]"),),
     (T + "rows_that_came_later_make_a_block_anew",)),
    (4, "a block of other settings is taken", "activations.py",
     (('if about["tie"] != self.tie:', "if False:"),), (T + "a_file_of_other_settings_is_removed",)),
    (4, "the checksum is not looked at", "activations.py",
     (("if self._checked.get(name) != mark and not _is_whole(data):", "if False:"),), (BROKEN,)),
    (4, "rows are not compared with what their states were computed from", "numbered.py",
     (("if expected is not None and self.digest(", "if False and self.digest("),), (BATCHES,)),
    (4, "a random trunk is cached", "alone.py",
     (("    if not eval_trunk:\n", "    if False:\n"),),
     (T + "a_random_trunk_is_refused_unless_it_may_run_in_eval_mode",)),
    (4, "rows that see each other's padding are cached", "alone.py",
     (("if not same or not all(", "if not all("),), (T + "rows_that_see_each_others_padding_are_refused",)),
    (4, "the cache is not part of the recipe", "recipe.py",
     (("    if cached_trunk:\n", "    if False:\n"),),
     (T + "the_cache_is_part_of_the_recipe_and_where_it_lies_is_not" + LLAMA,)),
    (4, "an evaluation is fed the last batch's states", "trunk.py",
     (("        self._pass = None\n\n    def _run_layer", "        pass\n\n    def _run_layer"),),
     (T + "an_evaluation_while_a_stage_trains_runs_the_whole_model" + LLAMA,)),
    (5, "a block counts before it is whole", "feeding.py",
     (("                writer.end()\n            check_room()\n            self._install(order, writers)\n",
       "                writer._file.flush()\n            self._install(order, writers)\n"),),
     (SAME_BITS + LLAMA, T + "a_training_leaves_the_model_as_it_was")),
)  # fmt: skip
