"""Wrong changes to who may read a state and who understands it, and to what an accepted recipe claims; `mutations.py`
runs them. The fields are `Mutation`'s."""

from __future__ import annotations

ALONE = "test_private.py::test_"

STATE = (
    (7, "files of the state may be read by everybody", "store/state_files.py",
     (("write_atomic(self.private / name, data, PRIVATE)", "write_atomic(self.private / name, data)"),),
     (ALONE + "everything_that_is_written_is_its_owners_alone",)),
    (7, "receipts may be read by everybody", "store/deletion.py",
     ((", opener=partial(os.open, mode=PRIVATE))", ")"),),
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
)  # fmt: skip
"""Number, what is wrong, file, edits, tests: see `Mutation`."""
