"""Trains stages of a store again, from what remains, so that their bytes can be compared: what `verify` asks for.

Each stage begins on the parent that the *store* has, not on the one that was trained again: so each is checked on its
own, also where only some are. Who keeps a wrong stage and trains honestly on it is found out at that stage alone. A
stage that was changed after its children had been trained shows at these, too; they are told as such. One trainer
trains them all: the base is loaded once, and rows are hashed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ..errors import StoreError
from ..files import remove
from ..plan.tree import Stage
from ..seams.trainer import TrainerSeam
from ..store.audit import Check, VerifyReport, differing_examples
from ..store.folder import StoreFolder, stage_files
from ..store.manifest import Manifest
from ..store.partition import examples_digest
from ..store.public_audit import NotChecked
from ..store.receipts import versions
from ..store.recipe_differences import Difference, check_same
from ..store.retraining import Retrain, RowDifferences
from ..store.stage_comparison import MACHINE, Retrained, compare_stage, innocent_reasons
from ..store.store import S3TStore
from .apart import Apart
from .stage_orders import StageOrder, StoreWatch, running_folder
from .trained_stage import machine

logger = get_logger(__name__)

OF_THE_LAUNCH = ("processes",)
"""Settings of a recipe that are another launch's, and no other training's: stages of it cannot be compared."""


class RetrainingMixin(TrainerSeam):
    """The part of [`S3TMixin`] that trains stages again and changes nothing of the store."""

    watch: StoreWatch | Apart
    _order: StageOrder | None

    def verify(
        self: Any,
        retrain: Retrain | None = None,
        *,
        sample: int | None = None,
        seed: int | None = None,
        scan_for: str | Path | None = None,
    ) -> VerifyReport:
        """Audits the store; where asked, trains stages again with this very trainer. See [`S3TStore.verify`].

        Example:

            ```py
            report = trainer.verify(sample=3)
            assert report.ok, report.findings
            ```

        Raises:
            ValueError: a stage is being trained.
        """
        if self._order is not None:
            raise ValueError("A stage is being trained. Verify the store before or after `train()`.")
        store, watch = self.store, self.watch
        if retrain is None and sample is None:
            return store.verify(seed=seed, scan_for=scan_for)

        def moved(folder: str) -> Any:
            self.store, self.watch = S3TStore(Path(folder)), Apart(Path(folder), lambda: False)
            return self

        with self._training_lock():
            try:
                report: VerifyReport = store.verify(
                    retrain, sample=sample, seed=seed, scan_for=scan_for,
                    make_trainer=None if retrain is None and sample is None else moved,
                )
            finally:
                self.store, self.watch = store, watch
        self._serve()
        return report

    def train_again(self: Any, store: StoreFolder, stages: Iterable[Stage]) -> tuple[Check, tuple[Retrained, ...]]:
        """Trains live stages of another store again, in this trainer's own folder, and compares the bytes.

        Raises:
            RecipeError: the settings are not those of the store.
            StateError: the state or the key is not there.
        """
        manifest, wanted = store.live(), sorted(stages)
        accepted = {*self.accept_recipe, *OF_THE_LAUNCH}
        apart = check_same(manifest.recipe, self.recipe(), accepted)
        if self.rows.key != store.key:
            raise ValueError("Trainer and store have different partition keys. Give the trainer the store's, or none.")
        self.watch = Apart(self.store.path, lambda: False)
        differences = RowDifferences(store, self.rows.entries)
        try:
            self._begin_again(wanted)
            found: dict[Stage, Retrained] = {}
            for stage in wanted:
                again = self._trained_again(store, manifest, stage, differences, apart)
                found[stage] = again.below([found[above] for above in stage.path[:-1] if above in found])
        finally:
            self.trunk_cache.close()
            self.end_workers()
        self.callback_handler.end_run(self.args, self.state, self.control)
        self.progress.close()
        return differences.check(manifest.stages), tuple(found.values())

    def _begin_again(self: Any, stages: Iterable[Stage]) -> None:
        self.progress.total = round(sum(stage.passes(self.s3t_config.replay) for stage in stages), 2)
        self._base_fingerprints: dict[str, str] = {}
        self.try_evaluation()

    def _trained_again(
        self: Any,
        store: StoreFolder,
        manifest: Manifest,
        stage: Stage,
        differences: RowDifferences,
        apart: tuple[Difference, ...],
    ) -> Retrained:
        with store.reading() as state:
            record, examples = state.record(stage.name), self.rows.examples(stage, state)
        told = differences.told(stage.slices)
        if (skipped := _not_trained(stage, record, examples, told, apart)) is not None:
            return skipped
        try:
            parent = store.assemble(stage.shard, stage.parent.prefix, manifest) if stage.parent else None
        except StoreError as error:
            return Retrained(stage.name, "not comparable", (f"the store's own parent of it cannot be used: {error}",))
        order = StageOrder(stage, examples, "", parent, manifest.generation, 0)
        trained = self._train_stage(order, False, None)
        remove(running_folder(self.store, stage))
        again = stage_files(stage, trained.adapter)
        stored = {name: _read(store, f"{stage.name}/{name}") for name in manifest.stages[stage]}
        made = {"versions": versions(), MACHINE: machine(self.args)}
        changed = "; ".join(map(str, manifest.accepted[record.get("accepted", 0) if record else 0 :]))
        if record is not None and not told and record["data"] != examples_digest(examples):
            told = [str(differing_examples("it", record["examples"], len(examples)))]
        found = compare_stage(
            stage.name, {name: data for name, data in stored.items() if data is not None}, again,
            iter(told), innocent_reasons(record, made, changed),
        )  # fmt: skip
        if found.outcome != "equal" and stage not in store.live().stages:
            return Retrained(stage.name, "not comparable", ("a deletion removed it meanwhile",))
        logger.info("stage %s trained again: %s", stage.name, found.outcome)
        return found


def _not_trained(
    stage: Stage,
    record: Mapping[str, Any] | None,
    examples: tuple[str, ...],
    told: list[str],
    apart: tuple[Difference, ...],
) -> Retrained | None:
    """What is known of a stage whose retraining would tell nothing; `None`: it is to be trained."""
    if apart:
        return Retrained(stage.name, "not comparable", tuple(map(str, apart)))
    if record is None or told or record["data"] == examples_digest(examples):
        return None
    later = differing_examples("it", record["examples"], len(examples))
    return Retrained(stage.name, "not comparable", (str(later),)) if isinstance(later, NotChecked) else None


def _read(store: StoreFolder, name: str) -> bytes | None:
    try:
        return store.source.file(name).read_bytes()
    except FileNotFoundError:
        return None
