"""Wrong changes to what is said and asked of what no deletion reaches by itself: things that were computed from data, and
copies that were exported. See `mutations.py`."""

# ruff: noqa: E501

NAMED, CARRIED, CHOOSES = (
    f"{name}.py::test_" for name in ("test_data_derived", "training/test_carried_along", "training/test_evaluation_rows")
)
ONCE = CARRIED + "one_warning_names_all_and_a_config_that_names_them_is_not_asked"
SAID = NAMED + "a_receipt_and_the_card_say_it"
COPIES = "store/test_exports.py::test_"
WHATEVER = CHOOSES + "deleted_examples_are_refused_whatever_the_config_says"

DERIVED = (
    (7, 'what a config names is not in the recipe', 'store/recipe.py',
     (('    if config.data_derived:\n', '    if False:\n'),), (ONCE,)),
    (7, 'receipts do not say what was computed from data', 'store/receipts.py',
     (('*limits_of_data(manifest.recipe), ', ''),), (SAID,)),
    (7, 'the card does not say what was computed from data', 'store/card.py',
     (('if lines else ""\n', 'if False else ""\n'),), (SAID,)),
    (7, 'a card shows the markup of a stranger', 'store/card.py',
     (('html.escape(line, quote=False)', 'line'),), (NAMED + 'a_card_shows_no_markup_of_a_stranger',)),
    (7, 'a source may have several lines', 'data_derived.py',
     ((' and source.isprintable()', ''),), (NAMED + 'what_no_receipt_could_say_is_refused', NAMED + 'what_a_strangers_manifest_names_otherwise_is_left_out')),
    (4, 'another word on what something was computed from is no difference', 'store/recipe_differences.py',
     (('for name, source in named_in(recipe).items() if name in both', 'for name, source in ()'),),
     (NAMED + 'another_word_is_a_change_of_the_recipe_and_a_new_name_is_none',)),
    (7, 'what a config names later is not kept', 'training/reconcile.py',
     (('    if recipe != manifest.recipe:', '    if False:'),), (ONCE,)),
    (7, 'what was named once goes when the next config does not name it', 'training/reconcile.py',
     (('recipe = with_named(manifest.recipe, wanted.recipe)', 'recipe = {**manifest.recipe, "data_derived": wanted.recipe.get("data_derived", {})}'),),
     (ONCE,)),
    (7, 'what was named once goes with a setting that was accepted', 'training/reconcile.py',
     (('    recipe = with_named(recipe, manifest.recipe)\n', ''),
      ('recipe = with_named(manifest.recipe, wanted.recipe)', 'recipe = manifest.recipe')), (WHATEVER,)),
    (7, 'what one machine names is lost where two meet', 'store/sync.py',
     (('with_named(with_named(newest.recipe, manifest.recipe), other.recipe)', 'newest.recipe'),),
     (NAMED + 'two_machines_of_which_one_names_something_are_of_one_store',)),
    (3, 'a word lets deleted examples choose weights', 'training/evaluation_rows.py',
     (('    if deleted:\n', '    if deleted and not named:\n'),), (WHATEVER,)),
    (3, 'an evaluation set that chooses may hold rows of the train set', 'training/evaluation_rows.py',
     (('    if shared and not named:', '    if False:'),),
     (CHOOSES + 'an_evaluation_that_steers_holds_no_row_of_the_train_set',)),
    (3, 'another row of a person may choose weights', 'training/evaluation_rows.py',
     (('row.get(group_column) if group_column else None', 'None'),),
     (CHOOSES + 'a_person_counts_whatever_the_row',)),
    (3, 'the evaluation set is looked at after its ids were taken off', 'training/trainer.py',
     (('(self._given_evaluation, self.eval_dataset)', '(self.eval_dataset,)'),),
     (CHOOSES + 'rows_are_known_by_what_they_were_when_they_were_given',)),
    (3, 'an evaluation set that was set later is not looked at', 'training/trainer.py',
     (('(self._given_evaluation, self.eval_dataset)', '(self._given_evaluation,)'),),
     (CHOOSES + 'an_evaluation_set_that_was_set_later_is_looked_at',)),
    (7, 'a loss of one\'s own is not asked about', 'training/carried_along.py',
     (('"loss": _loss(trainer),', '"loss": None,'),), (CARRIED + 'a_loss_of_ones_own_is_asked_about',)),
    (7, 'a collator that holds numbers is not asked about', 'training/carried_along.py',
     (('"collator": _collator(trainer.data_collator),', '"collator": None,'),), (CARRIED + 'a_collator_that_holds_numbers_is_asked_about',)),
    (7, 'a transform is not asked about', 'training/carried_along.py',
     (('"transform": _transform(trainer.rows.raw),', '"transform": None,'),), (CARRIED + 'a_transform_is_asked_about',)),
    (7, 'tokens that were added are not asked about', 'training/carried_along.py',
     (('    if added:\n', '    if False:\n'),), (CARRIED + 'a_tokenizer_that_is_not_the_bases_is_asked_about',)),
    (7, 'a tokenizer that was trained on the rows passes for the base\'s', 'training/carried_along.py',
     (('rules[0] != rules[1]', 'False'),), (CARRIED + 'a_tokenizer_that_is_not_the_bases_is_asked_about',)),
    (7, 'statistics of images are not asked about', 'training/carried_along.py',
     (('if name in base and list', 'if False and list'),), (CARRIED + 'statistics_of_images_that_are_not_the_bases_are_asked_about',)),
    (7, 'one word answers all questions', 'training/carried_along.py',
     (('if named.keys().isdisjoint(_answers(name))', 'if not named'),), (CARRIED + 'a_word_answers_its_own_question_alone',)),
    (7, 'an export that holds one deleted stage beside live ones is not named', 'store/export_records.py',
     (('return any(newest.get(place, 0)', 'return all(newest.get(place, 0)'),), (COPIES + 'without_being_asked_a_deletion_names_each_and_touches_none',)),
    (7, 'an export that could not be made anew passes for a fresh one', 'store/exports.py',
     (('outcome: str | None = "exports"\n', 'outcome: str | None = "exports_refreshed"\n'),), (COPIES + 'what_can_not_be_made_anew_is_named_and_the_deletion_ends',)),
    (7, 'an export of which nothing is live stays where it is', 'store/exports.py',
     (('        _take_away(path, record)\n        with', '        with'),), (COPIES + 'made_anew_each_equals_a_fresh_export',)),
    (7, 'a class that only deleted examples had is not told', 'training/carried_along.py',
     (('    if empty:\n', '    if False:\n'),), (CARRIED + 'a_class_that_only_deleted_examples_had_is_told',)),
)  # fmt: skip
