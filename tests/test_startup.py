"""What a command loads: who answers a request for erasure waits for no library that the answer does not need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_s3t
import models
import trained_stores

HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "scipy", "matplotlib", "fastapi")
LOOKED_FOR = (*HEAVY, "numpy", "huggingface_hub.hf_api")
LOADED = f"""
import json, sys
print(json.dumps([name for name in {LOOKED_FOR!r} if name in sys.modules]), file=sys.stderr)
"""
COMMAND = """
import sys
from hf_s3t.cli.main import app
try:
    app()
except SystemExit as ended:
    code = ended.code
"""
PLAN = ("plan", "--examples", "100", "--requests-per-day", "0.1", "--horizon-days", "10", "--shards", "1",
        "--slices", "2")  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_stores.train_store(tmp_path_factory.mktemp("startup") / "trained")


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "store"))


def loaded(code: str, *arguments: object, ends_with: int = 0) -> list[str]:
    """Which of the libraries a new process has loaded at its end."""
    code = f"code = 0\n{code}\n{LOADED}\nsys.exit(code)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "100"})
    assert done.returncode == ends_with, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def commands(store: Path) -> dict[str, tuple[object, ...]]:
    row = models.llama_rows(1)["id"][0]
    return {
        "status": ("status", store),
        "locate": ("locate", store, "--ids", row),
        "delete": ("delete", store, "--ids", row),
        "delete dry": ("delete", store, "--slices", "0:1", "--dry-run"),
        "verify": ("verify", store),
        "state export": ("state", "export", store, store.parent / "state"),
        "export": ("export", store, store.parent / "adapter", "--prefix", "shard-00/0-1"),
        "export root": ("export", store, store.parent / "adapter"),
    }


@pytest.mark.parametrize("name", commands(Path("store")))
def test_a_verb_of_a_folder_loads_numpy_alone(store: Path, name: str) -> None:
    assert loaded(COMMAND, *commands(store)[name]) == ["numpy"]


def test_readmission_and_import_of_a_state_load_numpy_alone(store: Path) -> None:
    row, backup = models.llama_rows(1)["id"][0], store.parent / "state"
    loaded(COMMAND, "state", "export", store, backup)
    loaded(COMMAND, "delete", store, "--ids", row)
    assert loaded(COMMAND, "readmit", store, "--ids", row) == ["numpy"]
    assert loaded(COMMAND, "state", "import", store, backup) == ["numpy"]


@pytest.mark.parametrize("verb", [(), *((verb,) for verb in ("status", "delete", "plan", "purge", "state", "serve"))])
def test_help_loads_nothing(verb: tuple[str, ...]) -> None:
    assert loaded(COMMAND, *verb, "--help") == []


def test_a_plan_loads_no_torch() -> None:
    assert set(loaded(COMMAND, *PLAN)) <= {"numpy", "scipy"}


def test_a_dataset_is_read_where_one_is_named(store: Path) -> None:
    rows = models.llama_rows(trained_stores.ROWS)
    rows.to_json(store.parent / "rows.jsonl")
    rows.to_parquet(store.parent / "rows.parquet")
    assert loaded(COMMAND, "delete", store, "--not-in", store.parent / "rows.jsonl") == ["numpy"]
    assert "datasets" in loaded(COMMAND, "delete", store, "--not-in", store.parent / "rows.parquet")


def test_the_import_loads_nothing() -> None:
    assert loaded("import hf_s3t") == []
    assert loaded("import hf_s3t\nassert hf_s3t.S3TStore and hf_s3t.Plan and hf_s3t.Receipt") == ["numpy"]


@pytest.mark.parametrize("name", hf_s3t.__all__)
def test_every_public_name_can_be_had_and_is_listed(name: str) -> None:
    assert name in dir(hf_s3t)
    assert getattr(hf_s3t, name).__name__ == name


def test_a_name_that_is_not_there_is_said_so() -> None:
    with pytest.raises(AttributeError, match="module 'hf_s3t' has no attribute 'S3TTrainr'"):
        hf_s3t.S3TTrainr  # noqa: B018


REGISTERED = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft import PeftType
assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("S3T")].__name__ == "S3TConfig"
assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType("S3T")].__name__ == "S3TModel"
"""


@pytest.mark.brief("import peft, hf_s3t")
@pytest.mark.parametrize(
    "first",
    [
        "import peft, hf_s3t",
        "from hf_s3t import S3TConfig",
        "from hf_s3t.lora.config import S3TConfig",
        "from hf_s3t.lora.tuner import S3TModel",
        "import hf_s3t; hf_s3t.S3TTrainer",
        "import hf_s3t; hf_s3t.S3TEnsemble",
    ],
)
def test_peft_knows_the_config_whatever_is_imported_first(first: str) -> None:
    loaded(f"{first}\n{REGISTERED}")


@pytest.mark.slow
@pytest.mark.parametrize("module", sorted(p.stem for p in (Path(hf_s3t.__file__).parent / "lora").glob("[a-z]*.py")))
def test_each_module_that_knows_peft_can_be_the_first_one(module: str) -> None:
    loaded(f"import hf_s3t.lora.{module}\n")
