"""Wrong changes each of which brings back a fault that the state once had: an index that is wrong, parts of different
times, a damaged file in everybody's way, half a character; `mutations.py` runs them. The fields are `Mutation`'s."""

from __future__ import annotations

RESTORED = "store/test_restored.py::test_"
COLUMNS = RESTORED + "an_example_that_cannot_lie_there_is_told_where_columns_say_its_slice"
UNKNOWN = RESTORED + "nobody_is_unknown_to_a_state_that_is_older_than_the_stages"
RECORD = "store/test_database.py::test_a_damaged_record_stops_no_deletion_and_a_backup_mends_it"
USELESS = "store/test_database.py::test_a_database_that_cannot_be_used_is_told_and_stops_no_deletion_of_slices"
TORN = USELESS + "[torn-damaged .*state import]"
INTENT = "store/test_deletion_records.py::test_a_begun_deletion_whose_file_is_damaged_names_its_way_out"
NAMES = "store/test_names.py::test_"
NOTHING_WRITTEN = NAMES + "nothing_is_written_for_it"
KEY_ELSEWHERE = "store/test_state_folder.py::test_a_key_that_is_given_from_the_start_is_never_written"
FULL = "store/test_independence.py::test_a_disk_that_stays_full_keeps_nobody_else_from_being_out_of_service"

STRUCK = "test_faults.py::test_struck_at_some_steps_it_is_as_before_or_as_after"
ODD = "store/test_copied.py::test_"

FAULTS = (
    # a fault at any step
    (5, "the name of a lock's holder hides what failed", "files.py",
     (("            with suppress(OSError):  # a disk that fails: what",
       "            with suppress():  # a disk that fails: what"),),
     ("test_faults.py::test_what_failed_is_told_where_the_disk_cannot_be_written_any_more",)),
    (5, "a move of the key that was interrupted cannot be ended", "store/key_place.py",
     (("    if _holds_key(store, file):", "    if False:"),),
     ("test_faults.py::test_a_move_of_the_key_that_was_interrupted_is_ended_and_never_loses_it",)),
    (5, "a new export is there before it is whole", "store/exports.py",
     (("    if not target.exists():\n        scratch.mkdir", "    if False:\n        scratch.mkdir"),),
     ("test_faults.py::test_an_export_is_whole_or_absent",)),
    (5, "a backup's records of stages that are gone stay after a kill", "store/state_backup.py",
     (("                    state.keep_records(store.manifest().names)", "                    pass"),),
     (STRUCK + "[import an older state]",)),
    (10, "a pull that is killed leaves records of other stages", "store/sync.py",
     (("    if store.has_state:  # of what others trained there is no record; none", "    if False:  # none"),
      ("    sweep(store, manifest)\n    return manifest\n", "    sweep(store, manifest)\n    if store.has_state:\n"
       "        with store.changing() as state:\n            state.keep_records({stage.name for stage in stages if "
       "ours.stages.get(stage) == stages[stage]})\n    return manifest\n")),
     ("hub/test_hub_faults.py::test_a_pull_that_is_killed_leaves_no_record_of_what_others_trained",)),
    # in odd hands
    (5, "an older copy of the manifest serves what the state knows to be deleted", "store/folder.py",
     (("places_beyond(self._newer_log(manifest), manifest.log)", "()"),),
     (ODD + "a_copy_of_parts_of_different_times_never_serves_what_it_knows_to_be_deleted",)),
    (3, "numbers of examples that are wrong are not seen", "store/audit.py",
     (("        if +counted != +state.counts():", "        if False:"),),
     (ODD + "a_state_that_was_copied_while_it_was_written_is_whole_or_damaged",)),
    (5, "who may not write is told of another user", "files.py",
     (("raise _unwritable(self.path.parent, error) from", "raise denied(self.path.parent) from"),),
     (ODD + "where_nothing_may_be_written_a_store_is_read_and_a_writer_told[modes]",)),
    # an index that is wrong
    (3, "columns may say a slice that the plan does not have", "store/requests.py",
     (("entry.shard in shards and entry.slice in slices and state.lies_at", "state.lies_at"),), (COLUMNS,)),
    (3, "a slice below the first one passes", "store/requests.py",
     (("entry.shard in shards and entry.slice in slices", "entry.shard < size[0] and entry.slice < size[1]"),),
     (COLUMNS,)),
    (3, "a bit that flipped in a place that columns say goes unseen", "store/requests.py",
     ((" and state.lies_at(digest, entry)", ""),), (COLUMNS,)),
    (3, "the audit does not look where examples lie", "store/audit.py",
     (("        if misplaced:", "        if False:"),),
     (RESTORED + "an_example_that_does_not_lie_where_it_belongs_is_told_and_nothing_is_deleted",)),
    # parts of different times
    (3, "whoever is unknown beside others is passed over unasked", "store/deletion.py",
     (("    if request.unknown:\n        check_agreement(", "    if request.unknown and not missing_ok:\n"
       "        check_agreement("),), (UNKNOWN + "[delete what is known]",)),
    (3, "`locate` does not know somebody whom a newer state knows", "store/store.py",
     (("            check_agreement(self, manifest)", "            pass"),), (UNKNOWN + "[locate]",)),
    (3, "a state that is older than the stages is trained with", "training/reconcile.py",
     (("    check_agreement(store, manifest)\n", ""),),
     (RESTORED + "nothing_is_trained_with_a_state_that_is_older_than_the_stages",)),
    (3, "receipts are not held against the deletions that are known", "store/audit.py",
     (("        if unknown:", "        if False:"),),
     (RESTORED + "a_receipt_of_a_deletion_that_the_state_does_not_know_is_told",)),
    (3, "receipts beside the database are not held against them", "store/audit.py",
     (("told = [*state.receipts(), *map(read_json, folder.loose_receipts())]", "told = state.receipts()"),),
     (RESTORED + "a_receipt_beside_the_database_tells_of_a_deletion_that_was_undone",)),
    (3, "a receipt that was changed still follows the one before it", "store/audit.py",
     (("in state.broken_receipts():", "in ():"),),
     (RESTORED + "a_receipt_that_was_changed_removed_or_moved_is_told",)),
    (6, "the way out of a lost state is not named", "training/reconcile.py",
     (("`hf-s3t state accept-loss {store.path}` names them", "{store.path}: start"),),
     ("store/test_lost_state.py::test_a_training_is_refused_and_told_the_way_out",)),
    # two steps where it is one
    (6, "changed rows are deleted by a training and stay buried", "training/reconcile.py",
     (("renewed=comparison.changed", "renewed=()"),),
     ("training/test_trainer_refusals.py::test_rows_that_vanished_or_changed",)),
    # a damaged file in everybody's way
    (3, "a state that cannot be read stops the deletion of slices", "store/state_files.py",
     (("        except StateError as error:\n            logger.warning(\"going on without",
       "        except () as error:\n            logger.warning(\"going on without"),), (TORN,)),
    (3, "a receipt that the database cannot take stops a deletion", "store/receipts.py",
     (("    except StateError as error:\n        logger.error(\"receipt %s is kept",
       "    except () as error:\n        logger.error(\"receipt %s is kept"),), (TORN,)),
    (6, "a backup is not put in the place of a state that cannot be read", "store/state_backup.py",
     (("            _put_aside(store)\n", ""),), (TORN,)),
    (6, "a record that cannot be read stops the import of its backup", "store/state_backup.py",
     (("                state.mend_records(", "                (lambda *_: None)("),),
     (RECORD + "[exports]", RECORD + "[records]", RECORD + "[receipts]")),
    (6, "a record of another form stays when its backup is imported", "store/record_tables.py",
     (("found.keys() == {*fields}", "True"),), (RECORD + "[exports of another form]",)),
    (6, "a record that no backup has stays as it is", "store/record_tables.py",
     (('elif table != "receipts":', "elif False:"),), (RECORD + "[exports that the backup does not have]",)),
    (5, "a record of exports stops a deletion", "store/export_records.py",
     (("    except StateError as error:  # a record that", "    except () as error:  # a record that"),),
     (RECORD + "[exports]",)),
    (5, "an earlier receipt that cannot be read stops a deletion", "store/deletion.py",
     (("    except StateError as error:  # it was deleted", "    except () as error:  # it was deleted"),),
     (RECORD + "[receipts]",)),
    (5, "a begun deletion that cannot be read stops everybody else's", "store/deletion.py",
     (("in folder.intents() if others else folder.readable_intents():", "in folder.intents():"),), (INTENT,)),
    (5, "what is served is asked of a begun deletion that cannot be read", "store/deletion.py",
     (("folder.live(intents=folder.readable_intents())", "folder.live()"),), (INTENT,)),
    (5, "the file of a begun deletion is to be restored, which no backup has", "store/state_files.py",
     (("return read_intent(read_limited(path, MAX_JSON_BYTES), path)",
       "from ..files import read_json\n            read_json(path)\n"
       "            return read_intent(read_limited(path, MAX_JSON_BYTES), path)"),), (INTENT,)),
    (5, "on a full disk one deletion keeps the next one from beginning", "store/deletion.py",
     (("            if others:\n                raise\n", "            raise\n"),), (FULL,)),
    # what is said
    (5, "a readmission that was ended on the way says that nothing was changed", "store/store.py",
     (("for intent, receipt in recovered:", "for intent, receipt in ():"),),
     ("store/test_independence.py::test_a_readmission_that_is_run_again_tells_that_it_is_done",)),
    (5, "a deletion that was begun ends the command line as bad input", "cli/outcomes.py",
     (("        return PENDING\n", "        return BAD_INPUT\n"),),
     ("cli/test_cli.py::test_a_full_disk_leaves_a_deletion_begun_and_the_next_one_ends_it[delete]",)),
    # what no file can hold
    (5, "an id with half a character is let in", "store/ids.py",
     (('        encoded(value, "An id or a group")\n', ""),), (NOTHING_WRITTEN,)),
    (5, "a train set's row with half a character is not named", "store/partition.py",
     (('return encoded(_CANONICAL.encode(value), "A value")', "return _CANONICAL.encode(value).encode()"),),
     (NAMES + "a_training_names_the_row_that_holds_it",)),
    (5, "an export's path with half a character is let in", "store/store.py",
     (('        encoded(str(target), "The path of an export")\n', ""),), (NOTHING_WRITTEN,)),
    (5, "a reference has no limit", "store/requests.py",
     ((" or len(reference) > LONGEST_REFERENCE", ""),), (NOTHING_WRITTEN,)),
    (5, "a long unknown id is shown whole", "store/ids.py",
     (("return text if len(text) <= SHOWN else", "return text if text else"),),
     (NAMES + "a_long_unknown_id_is_shown_shortened",)),
    # what is kept of a deleted person
    (7, "a key that is given from the start is written, too", "store/folder.py",
     (("if key is not None and key != self._environment_key():", "if key is not None:"),), (KEY_ELSEWHERE,)),
    (7, "the status does not say where the key is", "store/key_place.py",
     (('return "given" if store.has_key else "not here"', 'return "beside the state"'),), (KEY_ELSEWHERE,)),
)  # fmt: skip
"""Number, what is wrong, file, edits, tests: see `Mutation`."""
