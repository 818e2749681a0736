"""Wrong changes to the state's database, and to deletions that must not wait for one another; `mutations.py` runs
them. The fields are `Mutation`'s."""

from __future__ import annotations

BYTES = "promises/test_promises_database.py::test_"
NO_BYTE = BYTES + "of_what_was_deleted_no_byte_is_left_but_its_tombstone"
KNOWN = "store/test_database.py::test_"
KILLED = "store/test_database_kills.py::test_killed_before_any_statement_it_is_done_or_not"
RESTORED = "store/test_restored.py::test_"
INDEPENDENT = "store/test_independence.py::test_"

DATABASE = (
    (7, "the database keeps what is deleted in its free pages", "store/schema.py",
     (("secure_delete = ON", "secure_delete = OFF"),), (NO_BYTE + "[1]",)),
    (7, "a journal with what was deleted stays beside the database", "store/schema.py",
     (("PRAGMA journal_mode = DELETE", "PRAGMA journal_mode = PERSIST"),), (NO_BYTE + "[1]",)),
    (7, "a write-ahead log that was switched on by hand stays", "store/schema.py",
     (('        connection.execute("PRAGMA journal_mode = DELETE")\n', "        pass\n"),),
     (BYTES + "a_write_ahead_log_is_switched_off",)),
    (7, "examples are filled in out of order", "store/database.py",
     (("in sorted(entries.items())", "in entries.items()"),), (NO_BYTE + "[10000]",)),
    (7, "rows that come later leave copies in the pages that they split", "store/state_files.py",
     (("        if disturbed:\n", "        if False:\n"),), (BYTES + "what_came_later_leaves_nothing_either",)),
    (6, "a tombstone counts before its transaction ends", "store/database.py",
     (('        self._sql.execute("BEGIN IMMEDIATE")\n', ""),),
     (KNOWN + "what_fails_in_a_transaction_changes_nothing",)),
    (6, "the index loses what was deleted in a transaction of its own", "store/tombstones.py",
     (('    state.remove_examples(intent["ids"])\n', '    state.commit()\n    state._sql.execute("BEGIN")\n'
       '    state.remove_examples(intent["ids"])\n'),), (KILLED,)),
    (3, "a stage's weights are read once more after they were compared", "store/folder.py",
     (("parse_safetensors(*read[WEIGHTS_FILE])", "parse_safetensors(read[WEIGHTS_FILE][1].read_bytes(), self.path)"),),
     ("store/test_store.py::test_what_was_compared_is_what_is_used",)),
    (4, "tensors are read in another order each time", "files.py",
     (("sorted(deserialize(data), key=lambda named: named[0])", "deserialize(data)"),),
     ("test_files.py::test_tensors_are_read_in_the_order_of_their_names",)),
    (4, "a process that hashes rows counts them from its own first one", "store/hashing.py",
     (("hashing.hash(rows, start)", "hashing.hash(rows)"),),
     ("store/test_partition.py::test_several_processes_say_what_is_wrong_as_one_does",)),
    (4, "names that look alike in rows of other processes are not told", "store/hashing.py",
     (("            hashing.names.strange |= strange_names\n", ""),),
     ("store/test_partition.py::test_several_processes_say_what_is_wrong_as_one_does",)),
    (4, "a row between two processes is lost", "store/hashing.py",
     (("return list(zip(*found", "next(found)\n    return list(zip(*found"),),
     ("store/test_partition.py::test_several_processes_find_what_one_does",)),
    (3, "a question for the examples of a slice forgets the shard", "store/database.py",
     (("WHERE shard = ? AND slice = ? ORDER BY digest", "WHERE ? >= 0 AND slice = ? ORDER BY digest"),),
     (KNOWN + "examples_come_in_the_order_of_their_digests_however_many",)),
    (3, "where an example lies is not held against its hash", "store/requests.py",
     (("        if not fits(digest, entry):", "        if False:"),),
     (RESTORED + "an_example_that_does_not_lie_where_it_belongs_is_told_and_nothing_is_deleted",)),
    (3, "an older root adapter that was put back stays", "store/deletion.py",
     (("if isinstance(folder.source, FolderSource) and not folder.has_root_of(manifest):", "if False:"),),
     (RESTORED + "a_root_adapter_that_was_put_back_is_made_anew",)),
    (3, "somebody is unknown to a state that is older than the stages", "store/deletion.py",
     (("        check_agreement(folder, folder.manifest())\n", ""),),
     (RESTORED + "nobody_is_unknown_to_a_state_that_is_older_than_the_stages[delete]",)),
    (3, "a manifest is written that nobody can read again", "store/folder.py",
     (("        Manifest.from_json(json.loads(data))\n", ""),),
     (RESTORED + "a_manifest_that_nobody_could_read_again_is_never_written",)),
    (5, "a deletion waits for another one that cannot be finished", "store/deletion.py",
     (("            if others:\n                raise\n", "            raise\n"),),
     (INDEPENDENT + "a_stage_that_cannot_be_removed_keeps_nobody_else_from_being_deleted",)),
    (5, "files of another deletion stop a sweep", "store/sweep.py",
     (("            if ours:\n", "            if True:\n"),),
     (INDEPENDENT + "a_stage_that_cannot_be_removed_keeps_nobody_else_from_being_deleted",)),
    (5, "a training goes on past a deletion that cannot be finished", "store/state_care.py",
     (("yield deletion.recover(self, others)", "yield deletion.recover(self, False)"),),
     (INDEPENDENT + "a_stage_that_cannot_be_removed_keeps_nobody_else_from_being_deleted",)),
    (5, "a full disk in the middle of a deletion is told as bad input", "store/deletion.py",
     (("        raise _unfinished(intent, error) from error\n\n\ndef", "        raise\n\n\ndef"),),
     (INDEPENDENT + "a_full_disk_at_any_write_is_told_and_run_again_it_is_done[delete]",)),
    (6, "rows whose content changed stay buried", "store/tombstones.py",
     (('        if digest not in intent["renewed"]:\n', "        if True:\n"),),
     (INDEPENDENT + "changed_rows_are_deleted_and_readmitted_in_one_step",)),
    (6, "a deletion that is known is carried out again", "store/tombstones.py",
     (("    if name in state.log():", "    if False:"),),
     (KNOWN + "a_deletion_that_is_known_is_not_carried_out_again",)),
)  # fmt: skip
"""Number, what is wrong, file, edits, tests: see `Mutation`."""
