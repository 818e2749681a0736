"""Wrong changes to what comes into a state, what is kept of a deleted person and for how long, and to the way out of a
lost state; `mutations.py` runs them. The fields are `Mutation`'s."""

from __future__ import annotations

NAMES = "store/test_names.py::test_"
TERMS = "store/test_retention.py::test_"
LOSS = "store/test_lost_state.py::test_"
FOLDER = "store/test_state_folder.py::test_"

KEEPING = (
    (5, "a reference that no file can hold is found out in the middle of a deletion", "store/requests.py",
     (('    encoded(reference, "`reference`")\n', ""),),
     (NAMES + "nothing_is_written_for_it",)),
    (5, "a setting that no file can hold is found out when the store is written", "store/recipe.py",
     (('    _check_texts(plain, "recipe")\n', ""),),
     (NAMES + "a_setting_with_it_is_refused_before_a_store_is_written",)),
    (7, "a state is committed to git", "store/state_files.py",
     (('write_atomic(ignored, b"*\\n", PRIVATE)', "pass"),),
     (FOLDER + "git_commits_nothing_of_a_state",)),
    (7, "a key that was moved away stays beside the state, too", "store/key_place.py",
     (("    remove(store.private / KEY_FILE)\n", ""),),
     (FOLDER + "the_key_moves_out_of_the_state",)),
    (7, "a backup puts the key back beside the state", "store/state_backup.py",
     (("if key and as_key(key) != store.given_key:", "if key:"),),
     (FOLDER + "a_backup_that_has_the_key_does_not_put_it_back_where_it_is_given",)),
    (6, "the key leaves the state before it is durable elsewhere", "store/key_place.py",
     (("    _write_new(file, text.encode() + b\"\\n\")\n",
       "    remove(store.private / KEY_FILE)\n    _write_new(file, text.encode() + b\"\\n\")\n"),),
     (FOLDER + "whatever_fails_the_key_is_somewhere",)),
    (7, "what had its term stays in the bytes of the database", "store/record_tables.py",
     (('        self._sql.execute("UPDATE about SET disturbed = 1")\n        last = ""\n', '        last = ""\n'),),
     (TERMS + "no_byte_of_it_is_left",)),
    (7, "a reference outlives its term", "store/retention.py",
     (('**copies, "reference": None, "caches": []}', '**copies, "caches": []}'),),
     (TERMS + "old_receipts_lose_what_nothing_depends_on",)),
    (7, "receipts that had their term look forged", "store/record_tables.py",
     (("            last = chained(last, text)\n            self._sql", "            self._sql"),),
     (TERMS + "old_receipts_lose_what_nothing_depends_on",)),
    (7, "a receipt beside the database has no term", "store/retention.py",
     (("for name in loose & lessened.keys():", "for name in ():"),),
     (TERMS + "a_receipt_beside_the_database_loses_it_too",)),
    (3, "stages that saw the slices of lost deletions stay", "store/lost_state.py",
     (("receipt.receipt: Event(loss.places)})", "receipt.receipt: Event(())})"),),
     (LOSS + "the_lost_slices_start_anew_and_the_others_stay",)),
    (6, "examples of the slices of lost deletions stay in the index", "store/lost_state.py",
     (("            state.remove_examples(state.examples_of(place))\n", "            pass\n"),),
     (LOSS + "the_lost_slices_start_anew_and_the_others_stay",)),
    (6, "a deletion that is lost here counts as lifted where it is known", "store/database.py",
     (("for row in ours - standing - lost_there if", "for row in ours - standing if"),),
     (LOSS + "another_machine_keeps_the_tombstones_that_are_lost_here",)),
    (6, "tombstones that are found again are not believed", "store/database.py",
     (("if row in lost_here or (name", "if (name"),),
     (LOSS + "tombstones_that_are_found_again_are_believed",)),
    (3, "stages that were trained without tombstones outlive their return", "store/tombstones.py",
     (("    if again:\n        state.add_log({receipt_name(): Event(tuple(sorted(again)))})\n", ""),),
     (LOSS + "tombstones_that_are_found_again_are_believed",)),
    (3, "what a lost readmission let in is kept and counts as deleted", "store/lost_state.py",
     (("    if readmissions:\n        places |= state.newest_deletions().keys()\n", ""),),
     (LOSS + "a_readmission_that_is_lost_starts_anew_whatever_was_deleted",)),
)  # fmt: skip
