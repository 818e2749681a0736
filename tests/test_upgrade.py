"""A store outlives the versions that trained it: it is opened, deleted from and repaired by others, and says so."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
from rich.console import Console
from transformers.training_args import OptimizerNames

import models
from conftest import REPOSITORY
from hf_s3t import S3TStore, S3TTrainer
from hf_s3t.cli.tables import show_status
from hf_s3t.store.audit import verify
from hf_s3t.store.receipts import versions
from hf_s3t.store.state import stack_line
from stores import edit_database
from trained_stores import ROWS, make_trainer, tree

HERE = stack_line(versions())
CLAIM = "bit-equality"


def make(path: Path) -> S3TTrainer:
    """One shard of two slices: three stages. The default optimizer is another one in other versions of torch."""
    trainer = make_trainer(str(path), models.llama_rows(ROWS), num_shards=1, num_slices=2)
    trainer.args.optim = OptimizerNames.ADAMW_TORCH
    return trainer


@pytest.fixture(scope="module")
def older_python() -> str:
    """The interpreter of an environment of the lowest versions: `make install OLDEST=1` makes one."""
    python = Path(os.environ.get("HF_S3T_OLDEST", REPOSITORY / ".venv-oldest")) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no {python}: `make install OLDEST=1` makes it, HF_S3T_OLDEST names another environment")
    return str(python)


def printed(store: S3TStore) -> str:
    """What `hf-s3t status` shows."""
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(show_status(store.status()))
    return console.export_text()


def stages(path: Path) -> dict[str, str]:
    """sha256 of the files of all stages."""
    return {name: digest for name, digest in tree(path).items() if name.startswith("shard-")}


def check_upgrade(path: Path, older: str, caplog: pytest.LogCaptureFixture) -> None:
    """What somebody with other versions does with a store, months later."""
    store, trained = S3TStore(path), stages(path)
    assert store.status().stacks == {older: 3} and older != HERE
    (person,) = store.locate(groups=["person-1"])
    assert person.found == "live"
    receipt = store.delete(groups=["person-1"])
    left = stages(path)
    assert receipt.stages_removed and left and left.items() < trained.items()

    make(path).train()
    repaired = stages(path)
    assert repaired.keys() == trained.keys() and left.items() <= repaired.items()
    assert verify(store).ok
    status = store.status()
    assert (status.trained, status.missing) == (3, ())
    assert status.stacks == {older: 3 - len(receipt.stages_removed), HERE: len(receipt.stages_removed)}
    assert CLAIM in printed(store)
    (warning,) = [record.getMessage() for record in caplog.records if CLAIM in record.getMessage()]
    assert older in warning and HERE in warning

    caplog.clear()
    make(path).train()  # nothing is missing, so nothing is to be said
    assert CLAIM not in caplog.text


def test_the_log_and_the_status_name_the_stacks_of_a_repaired_store(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="hf_s3t")
    make(tmp_path).train()
    assert CLAIM not in caplog.text and CLAIM not in printed(S3TStore(tmp_path))
    older = {**versions(), "transformers": "5.0.0"}
    edit_database(
        tmp_path, "UPDATE records SET record = json_set(record, '$.versions', json(?))", json.dumps(older)
    )
    check_upgrade(tmp_path, stack_line(older), caplog)


@pytest.mark.slow
def test_a_store_of_the_lowest_versions_is_repaired_by_the_running_ones(tmp_path, caplog, older_python):
    caplog.set_level(logging.WARNING, logger="hf_s3t")
    code = "import sys, test_upgrade\ntest_upgrade.make(sys.argv[1]).train()\nprint(test_upgrade.HERE)"
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in ("src", "tests", "tests/helpers"))
    done = subprocess.run(
        [older_python, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    older = done.stdout.splitlines()[-1]
    if older == HERE:
        pytest.skip("the running versions are the lowest: there are no two stacks")
    check_upgrade(tmp_path, older, caplog)
