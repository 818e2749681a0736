"""Wrong changes to training on Ray; see `mutations.py`, which runs them. The fields are those of `Mutation`."""

from __future__ import annotations

W = "ray/test_worker.py::test_"
WHOLE = ("ray/test_ray.py::test_one_worker_is_killed_an_example_is_deleted_and_the_store_is_that_of_one_process",)
SAME = W + "a_worker_trains_the_stage_that_the_driver_would"
CALLED_OFF = (W + "an_attempt_that_was_called_off_is_dropped_and_no_other",)
REFUSED = W + "a_worker_that_is_not_as_the_driver_is_refused"
ALIKE = (W + "rows_without_ids_of_which_some_are_alike_or_dropped_are_those_of_the_driver",)
DIFFERENT = (W + "other_content_and_other_preparation_are_told_apart",)

ON_RAY = (
    (3, "what runs on a worker is not held against a deletion", "ray/driver.py",
     (("if not hand.called_off and self.trainer.watch.is_hit(hand.order):", "if False:"),), WHOLE),
    (3, "a worker that is called off trains on", "training/apart.py",
     (("    def changed(self) -> bool:\n        return self.called_off()",
       "    def changed(self) -> bool:\n        return False"),),
     (W + "an_attempt_that_was_called_off_before_it_began_takes_no_step",)),
    (7, "a worker keeps the checkpoints of a stage that was dropped", "ray/worker.py",
     (('                remove(trainer.store.private / "running")\n', "                pass\n"),), CALLED_OFF),
    (7, "a worker keeps states of what was deleted", "ray/worker.py",
     (('lambda: remove(trainer.store.private / "activations"))', "lambda: None)"),),
     (W + "states_of_what_was_deleted_are_forgotten_by_the_worker",)),
    (7, "what a killed worker left on its disk stays there", "ray/scratch.py",
     (("                _remove(lock)\n", "                pass\n"),),
     (W + "what_a_killed_worker_left_is_removed_by_the_next_one",)),
    (7, "a worker ends and leaves its folder", "ray/worker.py",
     (("            self.scratch.remove()\n", "            pass\n"),), (SAME + "[off]",)),
    (7, "workers inherit the key", "ray/hands.py",
     (('"runtime_env": {"env_vars": {KEY_VARIABLE: ""}},', '"runtime_env": {},'),), WHOLE),
    (7, "a worker is sent the key", "ray/driver.py",
     (('hand.do("begin", self._recipe_of_trainer, self._manifest)',
       'hand.do("begin", self._recipe_of_trainer, replace(self._manifest, tombstones=self.rows.key.hex()))'),), WHOLE),
    (4, "the rows of a worker are not compared", "ray/driver.py",
     (('if rows := _other("", driver.rows, worker.rows):', "if rows := ():"),), (REFUSED,)),
    (4, "the content of a worker's rows is not looked at", "training/rows_apart.py",
     (("        digest.update(bytes.fromhex(row_digest(row)))\n", ""),), DIFFERENT),
    (4, "what a worker made of its rows is not looked at", "training/rows_apart.py",
     (('    if hasattr(prepared, "select"):\n', "    if False:\n"),), DIFFERENT),
    (4, "the settings of a worker are not compared", "ray/driver.py",
     (("        found = [str(one.between(", "        found = [] and [str(one.between("),), (REFUSED,)),
    (4, "the versions of a worker are not compared", "ray/driver.py",
     (('        found += _other("version of", driver.versions, worker.versions)\n', ""),), (REFUSED,)),
    (4, "rows that are alike are several examples on a worker", "training/rows_apart.py",
     (("super()._assign(names[examples[mark]] for mark in self._marks)",
       "super()._assign(names[min(mark, len(names) - 1)] for mark in self._marks)"),), ALIKE),
    (5, "a stage does not wait for its parent", "ray/driver.py",
     (("return ready(missing, lambda stage: stage.passes(self.trainer.s3t_config.replay), begun)",
       "return [stage for stage in missing if stage not in begun]"),), WHOLE),
    (5, "a training does not take the lock of its store", "training/trainer.py",
     (("        self._on_main(partial(self.store.train_lock.acquire, 0))\n", ""),), WHOLE),
    (5, "the stage of a lost worker is lost", "ray/driver.py",
     (("        self.hands.remove(hand)\n", "        hand.order = None\n"),), WHOLE),
    (12, "replicas of the endpoint may delete", "ray/deployment.py",
     (('if settings.get("delete_token") is not None:', "if False:"),),
     ("ray/test_deployment.py::test_what_cannot_be_served_is_refused_before_a_replica_starts",)),
    (12, "that there is no store is found out by replicas", "ray/deployment.py",
     (("    S3TStore(store).manifest()", "    S3TStore(store)"),),
     ("ray/test_deployment.py::test_what_cannot_be_served_is_refused_before_a_replica_starts",)),
    (12, "replicas look at the store as often as they like", "ray/deployment.py",
     (("name=name or model_name(store), **settings)", "name=name or model_name(store))"),),
     ("ray/test_deployment.py::test_what_cannot_be_served_is_refused_before_a_replica_starts",)),
    (12, "a replica whose model fails is kept", "ray/deployment.py",
     (("if reason := self.app.state.endpoint.batcher.reason:", "if reason := None:"),),
     ("ray/test_deployment.py::test_a_replica_whose_model_fails_is_replaced_and_none_because_of_its_store",)),
    (12, "a replica is replaced because its store cannot be reached", "ray/deployment.py",
     (("state.endpoint.batcher.reason:", "state.endpoint.reason:"),),
     ("ray/test_deployment.py::test_a_replica_whose_model_fails_is_replaced_and_none_because_of_its_store",)),
)  # fmt: skip
