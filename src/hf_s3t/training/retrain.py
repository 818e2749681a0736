"""Trains one stage again, from what remains, and compares it with the store's byte for byte.

It happens in a scratch store with the same key, state and recipe, which lists every other stage as trained: `train()`
then has one stage to do. The real store is only read.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import read_safetensors
from ..lora.adapter import WEIGHTS_FILE
from ..plan.tree import Stage
from ..store.audit import Check, Findings, NotChecked, differing_examples, run_check
from ..store.folder import StoreFolder
from ..store.manifest import Manifest
from ..store.schema import write_in_order
from ..store.state import stack_line
from ..store.store import as_stage
from .trainer import S3TMixin

MakeTrainer = Callable[[str], S3TMixin]
"""Makes the trainer that trained the store, with another `output_dir`."""


def retrain_and_compare(store: StoreFolder, stage: str | Stage, make_trainer: MakeTrainer) -> Check:
    """Trains one live stage of a store again and compares the bytes. Needs the state and the key.

    `make_trainer` is given an `output_dir` and returns a trainer with the store's model, arguments, config and train
    set. The check is broken if the bytes differ without an innocent reason, such as other versions, rows that were
    added later, or settings that were accepted since.

    Example:

        ```py
        def make_trainer(output_dir):
            return S3TTrainer(model, TrainingArguments(output_dir), train_dataset=dataset, peft_config=config)

        check = retrain_and_compare(S3TStore("out"), "shard-00/2-0", make_trainer)
        assert check.outcome == "holds", check
        ```
    """
    stage, manifest = as_stage(stage), store.live()
    if stage not in manifest.stages:
        raise ValueError(f"{stage.name} is not a live stage of {store.path}. Name one that the model card lists.")
    with tempfile.TemporaryDirectory(prefix="hf_s3t-") as folder:
        scratch = _scratch_store(store, manifest, stage, Path(folder) / "store")
        trainer = make_trainer(str(scratch.path))
        if trainer.store.path.resolve() != scratch.path.resolve():
            raise ValueError(f"The trainer would train into {trainer.store.path}; it must use the given `output_dir`.")
        _train(trainer, scratch, stage)
        return run_check(f"{stage.name} trained again is the same", _differences(store, scratch, stage))


def _scratch_store(store: StoreFolder, manifest: Manifest, stage: Stage, path: Path) -> StoreFolder:
    scratch = StoreFolder(path)
    scratch.write_private("partition.key", store.key.hex().encode() + b"\n")
    with store.reading():  # a state that is not there is told of
        write_in_order(store.database, scratch.database)
    for above in stage.path[:-1]:
        shutil.copytree(store.path / above.name, path / above.name)
    trained = {**dict.fromkeys(manifest.plan.stages, manifest.stages[stage]), **manifest.stages}
    del trained[stage]
    scratch.write_manifest(replace(manifest, stages=trained))
    return scratch


def _train(trainer: Any, scratch: StoreFolder, stage: Stage) -> None:
    try:
        trainer.train()
    except StoreError:
        # Stages are listed that are not there, so that no root adapter can be made once this one is trained.
        if stage in scratch.manifest().plan.stages and not (scratch.path / stage.name).is_dir():
            raise
    if not (scratch.path / stage.name).is_dir():
        raise ValueError(f"The trainer's config has no stage {stage.name}. Give it the config that trained the stage.")


def _differences(store: StoreFolder, scratch: StoreFolder, stage: Stage) -> Findings:
    files = {name: (store.path / stage.name / name).read_bytes() for name in store.manifest().stages[stage]}
    again = {path.name: path.read_bytes() for path in (scratch.path / stage.name).iterdir()}
    differing = sorted(name for name in files.keys() | again.keys() if files.get(name) != again.get(name))
    if not differing:
        return
    with store.reading() as state:
        old = state.record(stage.name)
    with scratch.reading() as state:
        new = state.record(stage.name)
    assert new is not None  # it was trained just now
    if old is not None and old["data"] != new["data"]:
        yield differing_examples(stage.name, old["examples"], new["examples"])
    elif old is not None and old["versions"] != new["versions"]:
        there, here = stack_line(old["versions"]), stack_line(new["versions"])
        yield NotChecked(f"{stage.name} differs, but it was trained with {there}, and is now with {here}")
    elif changed := _changed_settings(store.manifest(), old):
        yield NotChecked(
            f"{stage.name} differs, but settings were changed after it was trained, or may have been, so that the two "
            f"are not comparable: {changed}"
        )
    else:
        yield f"{stage.name}: {', '.join(differing)} differ{_largest(store, scratch, stage)}; expected the same bytes"


def _changed_settings(manifest: Manifest, record: Mapping[str, Any] | None) -> str:
    """Settings that were accepted after a stage had been trained; all, where it is not on record when that was."""
    since = manifest.accepted[record.get("accepted", 0) if record else 0 :]
    return "; ".join(map(str, since))


def _largest(store: StoreFolder, scratch: StoreFolder, stage: Stage) -> str:
    """By how much the weights differ, where they can be compared."""
    old, new = (read_safetensors(folder.path / stage.name / WEIGHTS_FILE) for folder in (store, scratch))
    if {name: value.shape for name, value in old.items()} != {name: value.shape for name, value in new.items()}:
        return " in which tensors they hold"
    return f" by up to {max(float(abs(old[name] - new[name]).max()) for name in old):.3g}"
