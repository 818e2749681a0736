"""The smallest wrong changes, each of which must turn a test of the promises red.

    python tests/mutations.py             # applies one after the other to a copy of src/, writes docs/mutations.md
    python tests/mutations.py --only head # those whose description contains a text; the other rows of the table stay
    python tests/mutations.py --missing   # those that have no row yet

A mutation that stays green is a test that is missing. The tests run without any first: red means something only then.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mutations_database import DATABASE
from mutations_derived import DERIVED
from mutations_endpoint import ENDPOINT
from mutations_faults import FAULTS
from mutations_hub import ON_THE_HUB
from mutations_isolation import ISOLATION
from mutations_keeping import KEEPING
from mutations_planning import PLANNING
from mutations_ray import ON_RAY
from mutations_serving import SERVING
from mutations_speed import SPEED
from mutations_state import STATE
from mutations_systems import SYSTEMS

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = Path("src/hf_s3t")
TABLE = REPOSITORY / "docs" / "mutations.md"
HEAVY = ("torch", "transformers", "transformers.trainer", "peft", "datasets", "pytest", "scipy.optimize")


@dataclass(frozen=True)
class Mutation:
    """A wrong change.

    Args:
        promise (`int`): what it breaks; 9: what docs/serving.md says of answers; 10: docs/hub.md; 12:
            docs/endpoint.md.
        about (`str`): what is wrong then.
        file (`str`): below `src/hf_s3t`.
        edits (`tuple[tuple[str, str], ...]`): old text, which occurs once, and the new one.
        tests (`tuple[str, ...]`): node ids below `tests/`; one of them has to fail.
    """

    promise: int
    about: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


LLAMA, BERT, VIT = "[llama-layer_group]", "[bert-layer_group]", "[vit-layer_group]"
P, CRASH, FILES, ROWS = (f"promises/test_promises{name}.py::test_" for name in ("", "_crash", "_files", "_rows"))
OWNS = P + "a_stage_changes_what_it_owns_and_nothing_else"
STORES = P + "a_stage_stores_its_own_layers_and_heads"
BEGINS = P + "a_stage_begins_where_its_parent_ended"
ROGUE = P + "a_callback_that_breaks_isolation_is_stopped"
STOOD = P + "a_prefix_is_what_stood_when_its_stage_had_been_trained"
STOCK = P + "stock_peft_gives_a_prefix_the_logits_of_that_time"
NEVER_SEEN = P + "after_delete_nothing_served_ever_saw_the_example"
MEMORY = P + "the_model_in_memory_forgets_too"
REPAIR = P + "delete_and_train_is_training_from_scratch_without_the_example"
ORDER = P + "the_order_of_the_rows_changes_no_bit"
BURIED = P + "a_deleted_example_that_is_handed_in_again_is_not_trained_on"
MACHINE = P + "a_machine_with_an_old_state_trains_nothing"
KILLED = CRASH + "killed_at_an_instant_and_run_again_is_never_killed"
RESUMED = CRASH + "a_killed_stage_goes_on_where_its_checkpoint_was_written"
RUNNING = CRASH + "a_deletion_does_not_wait_for_the_stage_that_it_drops"
NOTHING_LEFT = FILES + "after_delete_no_file_holds_anything_of_the_example"
CARD = FILES + "stock_peft_loads_root_and_prefix_by_the_lines_of_the_card"
SHARDS = ROWS + "several_shards"
MEAN = "lora/test_adapter.py::test_the_average_adds_the_mean_of_what_its_members_add"

MUTATIONS = (
    # 1. isolation
    Mutation(1, "layers matched by substring: layers.1 is layers.10, too", "lora/tuner.py", ((
        "return key in self.layout.module_names(self.layout.grouped_layers if layers is None else layers)",
        "return any(name.split('.self')[0] in key and key.endswith(name.split('.')[-1])\n"
        "                   for name in self.layout.module_names(layers or self.layout.grouped_layers))",
    ),), ("lora/test_tuner.py::test_layers_are_told_by_their_whole_numbers",)),
    Mutation(1, "the optimizer of the last stage is kept", "seams/trainer.py",
             (("self.optimizer = self.lr_scheduler = None", "pass"),), (OWNS + LLAMA,)),
    Mutation(1, "requires_grad is not looked at", "lora/tuner.py",
             (("if training != self.training_owned or not training:", "if not training:"),), (ROGUE,)),
    Mutation(1, "the optimizer's tensors are not looked at", "lora/tuner.py",
             (("if held != set(owned):", "if not held:"),), (ROGUE,)),
    Mutation(1, "frozen tensors are not compared", "training/trainer.py",
             (("self._base_fingerprints = self.tuner.check_frozen(frozen)", "pass"),), (ROGUE,)),
    Mutation(1, "a stage that received no gradient is stored", "training/callbacks.py",
             (("if len(self.waiting) == len(self.tuner.training_owned):", "if False:"),),
             (P + "a_stage_without_any_gradient_is_an_error",)),
    Mutation(1, "the frozen prefix runs with dropout", "lora/tuner.py",
             (('self.config.lora_dropout if name == "default" else 0.0', "self.config.lora_dropout"),),
             (OWNS + LLAMA,)),
    Mutation(1, "an override that the Trainer never calls passes", "seams/overrides.py",
             (("        if not uses(classes, name):\n            raise broken(seam, f\"{shown} never",
               "        if False:\n            raise broken(seam, f\"{shown} never"),),
             ("seams/test_seams_training.py::test_a_method_that_the_trainer_lacks_or_never_calls",)),
    Mutation(4, "what another library lacks now is not told as such", "seams/__init__.py",
             (("except (AttributeError, ImportError, KeyError, TypeError) as error:", "except () as error:"),),
             ("seams/test_seams_training.py::test_a_module_that_does_not_tell_whether_it_is_compiled",)),
    Mutation(1, "where an adapter lies is not looked at", "seams/tuners.py",
             (("    if found != set(places):", "    if False:"),),
             ("seams/test_seams_training.py::test_an_adapter_that_lies_elsewhere",)),
    Mutation(4, "a head that was not drawn is kept as it is", "seams/models.py",
             (("    if left:", "    if False:"),), ("seams/test_seams_training.py::test_a_head_that_is_not_drawn",)),
    # 2. prefix
    Mutation(2, "the head is unversioned: a stage does not store it", "lora/tuner.py", ((
        "copy=True) for name, value in tensors.items()}",
        'copy=True) for name, value in tensors.items() if "lora_" in name}',
    ),), (STORES + BERT, STOOD + BERT)),
    Mutation(2, "the parent's head is not restored", "lora/tuner.py",
             (("{**heads, **lora} if self._goes_on else heads", "lora if self._goes_on else {}"),), (BEGINS + BERT,)),
    Mutation(2, "the parent's LoRA is not loaded", "lora/tuner.py",
             (('self._load("prefix", lora, whole=True)', "pass"),), (BEGINS + LLAMA, STOCK + LLAMA)),
    Mutation(2, "the first head along a prefix wins, not the last", "lora/adapter.py",
             (("arrays.update(stage.arrays)", "arrays = {**stage.arrays, **arrays}"),), (STOOD + BERT,)),
    Mutation(2, "a stage of all layers starts fresh, not at its parent", "lora/tuner.py",
             (("{**heads, **lora} if self._goes_on else heads", "heads"),), (BEGINS + "[llama-all]",)),
    # 3. never seen
    Mutation(3, "a deletion removes nothing", "store/deletion.py",
             (("replace(manifest.untouched_by(hit), log=log), state)\n            title",
               "replace(manifest, log=log), state)\n            title"),),
             (NEVER_SEEN + LLAMA,)),
    Mutation(3, "only the last slice of a prefix counts as hit", "plan/tree.py",
             (("for slice_id in self.prefix)", "for slice_id in self.prefix[-1:])"),), (NEVER_SEEN + LLAMA,)),
    Mutation(3, "the root adapter is not rewritten", "store/deletion.py",
             (("manifest = folder.write_root(manifest)", "pass"),), (NEVER_SEEN + LLAMA,)),
    Mutation(3, "readers ignore intents", "store/folder.py",
             (("for intent in intents for place in", "for intent in () for place in"),),
             (KILLED,)),
    Mutation(3, "the model in memory keeps what was deleted", "training/served_model.py",
             (('if self._order is None and not kwargs.get("dry_run"):', "if False:"),), (MEMORY + LLAMA,)),
    Mutation(3, "a stage that a deletion hit while it ended is stored", "training/stage_orders.py", ((
        "        if is_hit(store, order):\n            raise StageDropped\n        files", "        files",
    ),), (RUNNING,)),
    # 4. repair
    Mutation(4, "a stage's seed does not depend on its prefix", "training/stage_plan.py",
             ((", stage {stage.name}", ""),), (BEGINS + LLAMA,)),
    Mutation(4, "LoRA is drawn from whatever the random state is", "lora/tuner.py",
             (("        set_seed(seed)\n        owned", "        owned"),), (REPAIR + LLAMA,)),
    Mutation(4, "examples are ordered by their place in the dataset", "store/partition.py",
             (("for digest in sorted(by_slice.get(slice_id, ()))", "for digest in by_slice.get(slice_id, ())"),),
             ("training/test_replay.py::test_a_stage_sees_all_of_its_newest_slice_and_a_share_of_the_others",)),
    Mutation(4, "the recipe is not compared", "training/reconcile.py",
             (("check_same(manifest.recipe, wanted.recipe, wanted.accept)", "()"),),
             (ROWS + "a_changed_recipe_trains_nothing",)),
    Mutation(4, "a group's rows are spread over the slices", "store/hashing.py",
             (("_place(row, position, group or digest,", "_place(row, position, digest,"),),
             (ROWS + "a_person_is_deleted_with_all_rows",)),
    Mutation(4, "a child of an empty stage starts at zeros", "lora/tuner.py",
             (("trained = any(bool(value.any()) for value in lora.values())", "trained = True"),),
             (P + "a_whole_slice_deleted_one_by_one_and_repaired[llama-all]",)),
    # 5. resume
    Mutation(5, "requires_grad is not set again after a resume", "training/marked_rows.py",
             (("self.tuner.arm(training=True)  # loading", "pass  # loading"),
              ("if self.tuner.hold_mask() and not self._mask_moved:", "if False:")), (RESUMED,)),
    Mutation(5, "the marker of a complete checkpoint is not looked at", "training/checkpoints.py",
             (("if step.isdigit() and _has_mark(folder, mark):", "if step.isdigit():"),), (KILLED,)),
    Mutation(5, "the manifest is written before the stage's folder", "training/stage_orders.py", (
        ("        files = store.write_stage(order.stage, adapter)\n",
         "        import hashlib\n"
         "        about = {'stage': order.stage.name, 'parents': [above.name for above in order.stage.path[:-1]]}\n"
         "        files = {name: hashlib.sha256(data).hexdigest() for name, data in adapter.files(about).items()}\n"),
        ("        remove(running_folder(store, order.stage))", "        store.write_stage(order.stage, adapter)"),
    ), (KILLED,)),
    Mutation(5, "an interrupted deletion is not finished", "store/deletion.py",
             (("done.append((intent, carry_out(folder, intent)))", "pass"),), (KILLED,)),
    Mutation(5, "temporary files are left behind", "store/sweep.py",
             (("        remove(scrap)", "        pass"),), (KILLED,)),
    Mutation(5, "random batches are resumed in the middle", "training/running_stage.py",
             (("if not collates_the_same(", "if False and not collates_the_same("),),
             (CRASH + "a_stage_with_random_batches_starts_again",)),
    Mutation(6, "the rows of a stage are not held against the index", "training/rows.py",
             (("[d for d in state.examples_of((stage.shard, slice_id)) if",
               "[d for d, e in self.entries.items() if (e.shard, e.slice) == (stage.shard, slice_id) and"),),
             ("training/test_orders.py::test_a_deleted_example_is_none_of_its_stage_any_more",)),
    Mutation(5, "a deletion that is being carried out drops every stage", "training/stage_orders.py",
             (("if not told.keys() <= {*intents, *log}:", "if not told.keys() <= log.keys():"),),
             ("training/test_orders.py::test_a_deletion_that_is_being_carried_out_drops_the_stages_that_it_hits_and_no_"
              "other",)),
    Mutation(5, "a stage that is hit trains on", "training/running_stage.py",
             (("hit = self.watch.changed() and self.watch.is_hit(self.order)", "hit = False"),), (RUNNING,)),
    # 6. tombstones
    Mutation(6, "rows that a tombstone stands for go into the index", "training/reconcile.py",
             (("    if not any(buried.values()):\n", "    if True:\n"),), (BURIED + LLAMA,)),
    Mutation(6, "a deletion leaves no tombstone", "store/tombstones.py",
             (("        if digest not in intent[\"renewed\"]:\n", "        if False:\n"),), (BURIED + LLAMA,)),
    Mutation(6, "generations are not compared", "training/reconcile.py",
             (("    if state.knows(manifest) and state", "    if True or state"),), (MACHINE + LLAMA,)),
    Mutation(6, "the names of the deletions alone are compared", "training/reconcile.py",
             ((" and state.tombstones_hmac(store.key) == manifest.tombstones:", ":"),),
             ("training/test_orders.py::test_a_state_whose_tombstones_were_taken_out_trains_nothing",)),
    Mutation(6, "the tombstone of a group is ignored", "training/reconcile.py",
             ((" and entry.group not in groups}", "}"),),
             (ROWS + "a_person_is_deleted_with_all_rows",)),
    Mutation(6, "the index keeps what was deleted", "store/tombstones.py",
             (('    state.remove_examples(intent["ids"])\n', ""),),
             ("store/test_store.py::test_locate_says_where_and_in_which_stages",)),
    # 7. nothing left
    Mutation(7, "a running checkpoint survives the deletion", "store/sweep.py",
             (("        if stage is None or stage.slices & hit:\n            remove(running)", "        pass"),),
             (NOTHING_LEFT + BERT,)),
    Mutation(7, "folders of removed stages stay", "store/sweep.py",
             (("if stage is None or stage not in manifest.stages or", "if stage is None or False and"),),
             (NOTHING_LEFT + BERT,)),
    Mutation(7, "the index holds a plain digest of the content", "store/hashing.py",
             (("ended_mac(self._contents, content)[:DIGEST_CHARS])", "content[:DIGEST_CHARS])"),),
             (NOTHING_LEFT + LLAMA,)),
    Mutation(7, "a stage's metadata does not name it: two share a file", "store/folder.py",
             (('adapter.files({"stage": stage.name, "parents": [above.name for above in stage.path[:-1]]})',
               "adapter.files({})"),), (ROWS + "two_stages_never_share_their_bytes",)),
    # 8. plain artefacts
    Mutation(8, "the card loads the last stage of a prefix alone", "store/card.py",
             (("for above in stage.path)", "for above in stage.path[-1:])"),), (CARD,)),
    Mutation(8, "the average is not divided by the number of shards", "lora/adapter.py",
             (("member.scaling / count, dtype", "member.scaling, dtype"),), (SHARDS, MEAN)),
    Mutation(8, "adapters in the store are of type S3T", "lora/tuner.py",
             (('plain["modules_to_save"] =', 'plain["peft_type"], plain["modules_to_save"] = "S3T",'),), (CARD,)),
)  # fmt: skip

MORE = (
    SERVING, ENDPOINT, ON_THE_HUB, ON_RAY, PLANNING, SPEED, SYSTEMS, ISOLATION, STATE, DATABASE, KEEPING, FAULTS,
    DERIVED,
)  # fmt: skip
MUTATIONS += tuple(Mutation(*fields) for rows in MORE for fields in rows)


def check_anchors(mutation: Mutation) -> list[str]:
    """Old texts that do not occur exactly once."""
    text = (REPOSITORY / SOURCE / mutation.file).read_text()
    return [old for old, _ in mutation.edits if text.count(old) != 1]


def run_tests(source: Path, tests: tuple[str, ...], log: Path) -> int:
    """Runs tests against a copy of the package, in a forked process that has the heavy imports already."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 99
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(REPOSITORY)
        os.environ["PYTHONPATH"] = str(source)
        os.environ["HF_S3T_TESTS_SHARED"] = tempfile.mkdtemp(dir=source.parent)  # nothing that others trained
        sys.path.insert(0, str(source))
        import pytest

        paths = [f"tests/{test}" for test in tests]
        code = int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *paths]))
        import hf_s3t

        assert str(source) in str(hf_s3t.__file__), "the tests ran against another copy"
    finally:
        sys.stdout.flush()
        os._exit(code)


def apply(mutation: Mutation | None, folder: Path) -> Path:
    """A copy of `src/`, with the change."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(REPOSITORY / "src", folder, ignore=shutil.ignore_patterns("__pycache__"))
    if mutation is not None:
        path = folder / "hf_s3t" / mutation.file
        text = path.read_text()
        for old, new in mutation.edits:
            text = text.replace(old, new)
        path.write_text(text)
    return folder


def caught_by(log: str) -> str:
    """The first test that failed, as pytest names it."""
    match = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", log, re.MULTILINE)
    return match[1] if match else ""


def try_out(mutation: Mutation, source: Path, log: Path) -> tuple[str, str]:
    """The test that a mutation turned red, or nothing, and what pytest wrote."""
    if check_anchors(mutation):
        raise SystemExit(f"{mutation.about}: {check_anchors(mutation)} must occur once in {mutation.file}.")
    code = run_tests(apply(mutation, source), mutation.tests, log)
    output = log.read_text()
    return caught_by(output) if code == 1 else "", output


def row(mutation: Mutation, test: str) -> str:
    return f"| {mutation.promise} | {mutation.about} | `{mutation.file}` | `{test}` |"


HEADER = """\
# Mutations

Each row is a small wrong change to the library and the test that turned red with it, as `python tests/mutations.py`
found it. The changes themselves are in `tests/mutations.py` and beside it. Number 9 is what `docs/serving.md` says of
answers: they are the served members' average, wholly before or wholly after a change. Number 10 is what `docs/hub.md`
says, number 11 what `docs/planning.md` says, number 12 what `docs/endpoint.md` says.

| promise | what is wrong | file | caught by |
|---|---|---|---|
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="mutations whose promise, description or file has it")
    parser.add_argument("--missing", action="store_true", help="mutations without a row in the table")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    only, table = arguments.only, TABLE.read_text() if TABLE.exists() else ""
    chosen = [item for item in MUTATIONS if not only or only in f"{item.promise} {item.about} {item.file}"]
    if arguments.missing:
        chosen = [item for item in chosen if row(item, "").removesuffix("`` |") not in table]
    if not chosen:
        return
    __import__("conftest")  # sets the environment, before anything reads it
    for name in HEAVY:
        __import__(name)
    rows: dict[str, str] = {}
    green = []
    with tempfile.TemporaryDirectory() as folder:
        source, log = Path(folder) / "src", Path(folder) / "log"
        tests = tuple(dict.fromkeys(test for mutation in chosen for test in mutation.tests))
        if run_tests(apply(None, source), tests, log) != 0:
            raise SystemExit(f"The tests fail without any mutation.\n{log.read_text()}")
        for mutation in chosen:
            started = time.monotonic()
            test, output = try_out(mutation, source, log)
            rows[mutation.about] = row(mutation, test) if test else ""
            green += [] if test else [mutation.about]
            sys.stdout.write(f"{mutation.promise}  {mutation.about}  {time.monotonic() - started:.0f} s\n   ")
            sys.stdout.write(f"red: {test}\n" if test else f"GREEN\n{output[-1500:]}\n")
            if test and only:
                sys.stdout.write("".join(line for line in output.splitlines(True) if "Error" in line)[:600])
            sys.stdout.flush()
    write_table(rows)
    if green:
        raise SystemExit(f"{len(green)} mutations stayed green: {green}")


def write_table(rows: dict[str, str]) -> None:
    """Puts rows into the table; those of mutations that were not run now stay, those that are no more go."""
    known = TABLE.read_text().splitlines() if TABLE.exists() else []
    for mutation in MUTATIONS:
        beginning = row(mutation, "").removesuffix("`` |")
        rows.setdefault(mutation.about, next((line for line in known if line.startswith(beginning)), ""))
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(HEADER + "".join(f"{rows[mutation.about]}\n" for mutation in MUTATIONS if rows[mutation.about]))


if __name__ == "__main__":
    main()
