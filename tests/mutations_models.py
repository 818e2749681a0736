"""Wrong changes to what makes other architectures and trainers work; `mutations.py` runs them."""

from __future__ import annotations

LAYERS = "lora/test_layer_groups.py::test_"
SERVED = "promises/test_promises_models.py::test_"
MEAN = SERVED + "several_members_answer_with_the_mean_of_their_probabilities"

MODELS = (
    (8, "a stage's config does not tell its stack from another", "lora/layout.py",
     (('return self.stack or self.container.rsplit(".", 1)[-1]', 'return self.container.rsplit(".", 1)[-1]'),),
     (LAYERS + "one_of_several_stacks_has_to_be_chosen",)),
    (1, "of several stacks the first one is trained, unasked", "lora/layout.py",
     (("    if len(chosen) > 1:", "    if False:"),), (LAYERS + "one_of_several_stacks_has_to_be_chosen",)),
    (1, "experts that are named and fused are left out in silence", "lora/layout.py",
     (("    if hit and not everything_linear:", "    if False:"),),
     (LAYERS + "fused_experts_are_refused_by_name_or_left_out_aloud",)),
    (9, "a store does not say which stack its stages lie in", "store/recipe.py",
     (("    if layout.stack is not None:", "    if False:"),), (MEAN + "[bart]",)),
    (9, "members that differ in an encoder generate with none of theirs", "serving/members.py",
     (("beside = encoder_modules(self.base) if apart else set()", "beside = set()"),),
     (SERVED + "members_that_differ_in_an_encoder_do_not_generate",)),
    (9, "pictures are taken for rows of a batch", "seams/models.py",
     (("    if model.config.get_text_config() is not model.config:", "    if False:"),), (MEAN + "[qwen2-vl]",)),
    (9, "the loss of an encoder-decoder is of the next token", "seams/answering.py",
     (('    if is_encoder_decoder(base) and "labels" in labels', '    if False and "labels" in labels'),),
     (MEAN + "[bart]",)),
    (9, "the decoder's tokens do not follow from the labels", "serving/members.py",
     (('kwargs |= {**labels, "use_cache": False}', 'kwargs |= {"use_cache": False}'),), (MEAN + "[bart]",)),
    (9, "steps of models with something beside their layers are recorded", "serving/members.py",
     (("return self.alone is None and self.decoding", "return self.decoding"),),
     (SERVED + "steps_are_recorded_where_nothing_runs_beside_the_layers",)),
    (4, "what a launcher asks for is not looked at", "training/refusals.py",
     (("    for name, variable in launched().items():", "    for name, variable in {}.items():"),),
     ("training/test_trainer_refusals.py::test_what_a_launcher_asks_for_is_refused_as_the_argument_is",)),
    (4, "a reference model of one's own is no part of the recipe", "store/recipe.py",
     (("    if not isinstance(model, nn.Module):", "    if True:"),),
     ("promises/test_promises_preferences.py::test_a_reference_of_ones_own_has_to_be_the_same_at_a_repair",)),
    (4, "a reference is computed beforehand, over all slices", "training/refusals.py",
     (("        if setting(args, name):", '        if name != "precompute_ref_log_probs" and setting(args, name):'),),
     ("promises/test_promises_preferences.py::test_a_reference_that_is_computed_beforehand_is_refused",)),
)
