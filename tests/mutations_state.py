"""Wrong changes to who may read a state and who understands it, and to what an accepted recipe claims; `mutations.py`
runs them. The fields are `Mutation`'s."""

from __future__ import annotations

ALONE = "store/test_private.py::test_"
RECORDS = "store/test_deletion_records.py::test_"
ACCEPTED = "training/test_accepted_recipe.py::test_"
RECIPE = "store/test_recipe.py::test_"
PAST = RECORDS + "nothing_is_served_past_a_deletion_that_can_not_be_read"

STATE = (
    (7, "files of the state may be read by everybody", "store/state_files.py",
     (("write_atomic(self.private / name, data, PRIVATE)", "write_atomic(self.private / name, data)"),),
     (ALONE + "everything_that_is_written_is_its_owners_alone",)),
    (7, "the database may be read by everybody", "store/schema.py",
     (("os.O_WRONLY, PRIVATE)", "os.O_WRONLY, 0o644)"),),
     (ALONE + "everything_that_is_written_is_its_owners_alone",)),
    (7, "folders of the state may be entered by everybody", "files.py",
     (("    path.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)\n    tighten(path)",
       "    path.mkdir(parents=True, exist_ok=True)"),),
     (ALONE + "everything_that_is_written_is_its_owners_alone",)),
    (7, "a state that an older version left open stays so", "store/deletion.py",
     (("    folder.tighten()\n", ""),),
     (ALONE + "the_next_write_tightens_an_older_state_and_what_is_linked_stays",)),
    (3, "who may not see deletions sees none", "store/state_files.py",
     (("        except FileNotFoundError:\n            return []", "        except OSError:\n            return []"),),
     (ALONE + "who_may_not_look_into_the_state_is_told_and_served_nothing",)),
    (3, "a deletion that a newer version began is read as an older one", "store/deletion_records.py",
     (("    if read_count(number) > newest:", "    if False:"),),
     (PAST, RECORDS + "a_receipt_of_a_newer_version_is_refused_before_anything_is_deleted")),
    (3, "a field of a deletion that nobody here knows is left out", "store/deletion_records.py",
     (("    if absent or unknown:", "    if absent:"),),
     (PAST,)),
    (5, "a deletion that an older version began needs a format", "store/deletion_records.py",
     (('record.get("format", 1)', 'record["format"]'),),
     (RECORDS + "a_deletion_that_an_older_version_began_is_obeyed_and_ended",)),
    (5, "a receipt of a newer version stops a deletion in its middle", "store/deletion.py",
     (("    check_receipts(folder)  # refused before anything is on record\n", ""),),
     (RECORDS + "a_receipt_of_a_newer_version_is_refused_before_anything_is_deleted",)),
    (4, "one accepted setting lets every other one differ", "store/recipe_differences.py",
     (("if any(found.setting not in accept or why_not(found.setting) for found in differences):",
       "if any(not accept or why_not(found.setting) for found in differences):"),),
     (RECIPE + "what_is_named_may_differ_and_nothing_else",)),
    (2, "what a promise rests on may be accepted", "store/recipe_differences.py",
     (("if any(found.setting not in accept or why_not(found.setting) for", "if any(found.setting not in accept for"),),
     (RECIPE + "what_a_promise_rests_on_can_not_be_accepted",)),
    (4, "an argument that a newer Trainer brought makes a store unrepairable", "store/recipe_differences.py",
     (("        elif below not in unset and not below", "        elif not below"),),
     (RECIPE + "an_argument_that_a_newer_trainer_brought_is_no_difference_at_its_default",)),
    (4, "a receipt claims that a repair with other settings is training without the examples", "store/receipts.py",
     (("    if manifest.accepted:\n        names", "    if False:\n        names"),),
     (ACCEPTED + "receipts_tell_the_two_grades_of_claim_apart",)),
    (4, "a stage of earlier settings counts as forged", "training/retrain.py",
     (("elif changed := _changed_settings(store.manifest(), old):", "elif changed := '':"),),
     (ACCEPTED + "a_stage_of_other_settings_is_not_comparable_and_one_of_these_is",)),
    (4, "a checkpoint goes on with other settings", "training/reconcile.py",
     (('    remove(store.private / "running")  # begun with other settings\n', ""),),
     (ACCEPTED + "a_run_that_was_stopped_goes_on_with_the_accepted_settings",)),
    (4, "a pull forgets which settings were changed here", "store/sync.py",
     (("replace(_newest_recipe(theirs, ours), stages=stages,", "replace(theirs, stages=stages,"),),
     (ACCEPTED + "whoever_pushes_or_pulls_keeps_the_newest_settings",)),
)  # fmt: skip
"""Number, what is wrong, file, edits, tests: see `Mutation`."""
