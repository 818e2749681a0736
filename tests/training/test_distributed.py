"""Two processes train one store: they agree bit for bit, one of them writes, and a deletion reaches both."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from conftest import REPOSITORY
from hf_s3t import S3TStore, Stage
from hf_s3t.lora.heads import tensor_digest
from ranks import train_rows, two_process_trainer
from trainers import artefacts

CONFIG = REPOSITORY / "accelerate_configs" / "cpu_2_processes.yaml"
SCRIPT = REPOSITORY / "tests/helpers/ranks.py"
SECONDS = 240
STAGES = ["shard-00/0", "shard-00/0-1", "shard-00/1"]

pytestmark = pytest.mark.timeout(600)


def launch(folder: Path, *scenarios: str) -> int:
    """Runs scenarios in two processes, the way a user starts them; returns the launcher's exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]
    launcher = subprocess.Popen(
        [*command, "--main_process_port", port, str(SCRIPT), str(folder), *scenarios],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = launcher.communicate(timeout=SECONDS)  # a process that waits for the other one for ever ends here
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    (folder / f"{scenarios[0]}.log").write_text(output)
    return launcher.returncode


def seen_by(folder: Path, scenario: str) -> list[dict[str, Any]]:
    """What both processes wrote."""
    files = [folder / f"{scenario}-{rank}.json" for rank in range(2)]
    absent = [file.name for file in files if not file.exists()]
    assert not absent, "\n".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes ran every scenario that ends by itself, one after the other."""
    folder = tmp_path_factory.mktemp("ranks")
    scenarios = ["train", "deletion_while_training", "cached"]
    if importlib.util.find_spec("bitsandbytes"):
        models.tiny_llama(num_hidden_layers=4).save_pretrained(folder / "base")
        scenarios.append("eight_bit")
    code = launch(folder, *scenarios)
    assert code == 0, (folder / "train.log").read_text()[-5000:]
    return folder


def digests(store: S3TStore, name: str) -> dict[str, str]:
    """Digests of a stored stage's tensors, as a process writes them down."""
    tensors = store.read_stage(Stage.from_name(name)).tensors
    return {tensor: tensor_digest(tensors[tensor]) for tensor in sorted(tensors)}


def test_two_processes_agree_bit_for_bit_after_every_stage(folder: Path) -> None:
    first, second = seen_by(folder, "train")
    assert first["processes"] == second["processes"] == 2
    assert sorted(first["trained"]) == STAGES
    assert first["trained"] == second["trained"]
    assert first["repaired"] == second["repaired"]
    store = S3TStore(folder / "store")
    assert {name: json.loads(text) for name, text in first["repaired"].items()} == {
        name: digests(store, name) for name in STAGES
    }
    # 16 rows in batches of 2 x 4 for stage 0, 32 for stage 0-1; after the deletion one row less.
    expected = {"shard-00/0": [1, 2], "shard-00/0-1": [1, 2, 3, 4] * 2, "shard-00/1": [1, 2] * 2}
    assert first["steps"] == second["steps"] == expected


def test_two_processes_answer_and_delete_as_one(folder: Path) -> None:
    first, second = seen_by(folder, "train")
    assert first["losses"] == second["losses"] and first["losses"][0] != first["losses"][1]
    assert first["receipt"] == second["receipt"]  # one deletion, not two
    assert first["removed"] == second["removed"] == ["shard-00/0-1", "shard-00/1"]
    store = S3TStore(folder / "store")
    assert store.status().requests == 1 and store.status().deleted_examples == 1
    assert [location.found for location in store.locate(ids=[train_rows()["id"][1]])] == ["deleted"]


def test_an_error_on_the_main_process_is_raised_on_both(folder: Path) -> None:
    first, second = seen_by(folder, "train")
    assert first["refusal"].startswith("RecipeError: The settings differ")
    assert "arguments.learning_rate: the store has 0.01, this run 0.5" in first["refusal"]
    assert first["refusal"] == second["refusal"]


def test_one_process_with_the_same_batches_gives_nearly_the_same(folder: Path, tmp_path: Path) -> None:
    alone = two_process_trainer(tmp_path, per_device=8)
    alone.train()
    together = seen_by(folder, "train")[0]["trained"]
    kept = S3TStore(folder / "store").read_stage(Stage(0, (0,))).tensors  # no deletion touched it
    assert json.loads(together["shard-00/0"]) == digests(S3TStore(folder / "store"), "shard-00/0")
    torch.testing.assert_close(alone.store.read_stage(Stage(0, (0,))).tensors, kept, rtol=1e-4, atol=1e-5)
    assert all(value.any() for value in kept.values())
    assert alone.store.manifest().recipe["processes"] == 1
    assert S3TStore(folder / "store").manifest().recipe["processes"] == 2


def test_a_deletion_from_outside_drops_the_running_stage_on_both(folder: Path) -> None:
    first, second = seen_by(folder, "deletion_while_training")
    # Dropped after its second step; trained anew with one row less.
    assert first["steps"]["shard-00/0-1"] == [1, 2, 1, 2, 3, 4]
    assert first["steps"] == second["steps"]
    assert artefacts(folder / "deleting") == artefacts(folder / "store")  # which lost the same row, and was repaired
    assert S3TStore(folder / "deleting").status().deleted_examples == 1


def test_two_processes_share_an_activation_cache(folder: Path) -> None:
    first, second = seen_by(folder, "cached")
    assert first == second
    # Stage 0-1 goes down to the lowest layer; the others start at layer 2, in slice 0 and slice 1.
    assert first["disk"]["blocks"] == [f"shard-00_slice-{number}_layer-2.states" for number in (0, 1)]
    assert first["memory"]["blocks"] == [] and first["disk"]["trained"] == first["memory"]["trained"]
    assert artefacts(folder / "disk") == artefacts(folder / "memory")
    assert "random batches cannot be cached" in first["refusal"]
    uncached = S3TStore(folder / "off").read_stage(Stage(0, (1,))).tensors
    cached = S3TStore(folder / "disk").read_stage(Stage(0, (1,))).tensors
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-5)


def test_quantised_weights_and_scales_stay_as_they_are(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    first, second = seen_by(folder, "eight_bit")
    assert len(first["before"]) == 4 * 7  # every linear layer of four layers
    assert first["before"] == first["after"] == second["before"] == second["after"]
    assert sorted(first["trained"]) == STAGES and first["trained"] == second["trained"]


@pytest.mark.slow
def test_both_killed_and_started_again_gives_the_same_bits(folder: Path) -> None:
    assert launch(folder, "killed") != 0
    killed = folder / "killed"
    assert sorted(path.name for path in killed.glob("shard-*/*")) == ["0"]
    assert [path.name for path in killed.glob(".s3t/running/*/*")] == ["checkpoint-2"]
    assert launch(folder, "resumed") == 0, (folder / "resumed.log").read_text()[-3000:]
    first, second = seen_by(folder, "resumed")
    assert first["steps"] == second["steps"] == {"shard-00/0-1": [3, 4], "shard-00/1": [1, 2]}
    trained = seen_by(folder, "train")[0]["trained"]
    assert {name: json.loads(text) for name, text in trained.items()} == {
        name: digests(S3TStore(killed), name) for name in STAGES
    }


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher leaves it to a process that did not join the others
    with pytest.raises(ValueError, match=r"started 2 processes, but each .* alone \(world size 1\).*`use_cpu=True`"):
        two_process_trainer(tmp_path / "store", args={"use_cpu": False})
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the processes find each other")
def test_a_launch_without_use_cpu_is_refused_on_both(tmp_path: Path) -> None:
    assert launch(tmp_path, "lonely") == 0
    for seen in seen_by(tmp_path, "lonely"):
        assert "The launcher started 2 processes, but each of them would train alone" in seen["refusal"]
    assert not (tmp_path / "lonely").exists()
