"""The files in `accelerate_configs/`: accelerate takes them, every key says why it is there, and the two that can run
without a GPU really give two processes that talk to each other."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from conftest import REPOSITORY

CONFIGS = REPOSITORY / "accelerate_configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
SECONDS = 120

# One file per process, named by its id: two that both take themselves for rank 0 would share a file named by rank.
SCRIPT = """
import json, os, sys, torch
from accelerate import PartialState
from transformers import TrainingArguments

args = TrainingArguments(output_dir=os.path.join(sys.argv[1], "out"), use_cpu=True, report_to=[])
seen = {"world_size": args.world_size, "local_rank": args.local_process_index}
state = PartialState()
together = torch.ones(1)
torch.distributed.all_reduce(together)
seen |= {"rank": state.process_index, "processes": state.num_processes, "device": state.device.type}
seen |= {"backend": torch.distributed.get_backend(), "together": int(together.item())}
with open(os.path.join(sys.argv[1], f"{os.getpid()}.json"), "w") as file:
    json.dump(seen, file)
state.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(folder: Path, config: str, *options: tuple[str, ...]) -> list[dict[str, Any]]:
    """Runs `SCRIPT` under one `accelerate launch` per tuple of options, all at once.

    Returns:
        `list[dict]`: what each process saw, by rank.
    """
    script = folder / "script.py"
    script.write_text(SCRIPT)
    base = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    port = ["--main_process_port", str(free_port())]
    launchers = [
        subprocess.Popen(
            [*base, *port, *extra, str(script), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for extra in options
    ]
    try:
        for launcher in launchers:
            output, _ = launcher.communicate(timeout=SECONDS)
            assert launcher.returncode == 0, output
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, 9)
                launcher.wait()
    return sorted((json.loads(path.read_text()) for path in folder.glob("*.json")), key=lambda seen: seen["rank"])


def expected(rank: int, local_rank: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "local_rank": local_rank,
        "world_size": 2,
        "processes": 2,
        "device": "cpu",
        "backend": "gloo",
        "together": 2,
    }


def test_the_four_files() -> None:
    assert [path.stem for path in FILES] == ["cpu_2_processes", "multi_gpu_ddp", "single_gpu", "two_machines"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_known_and_explained(path: Path) -> None:
    load_config_from_file(str(path))  # refuses keys that accelerate does not know
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# Serves: ")
    assert any(line.startswith("# What was run: ") for line in lines)
    keys = [number for number, line in enumerate(lines) if re.match(r"\w", line)]
    assert keys and not [lines[number] for number in keys if not lines[number - 1].startswith("# ")]


@pytest.mark.slow
def test_two_processes_on_one_machine(tmp_path: Path) -> None:
    assert launch(tmp_path, "cpu_2_processes.yaml", ()) == [expected(0, 0), expected(1, 1)]


@pytest.mark.slow
def test_two_machines_over_loopback(tmp_path: Path) -> None:
    address = ("--main_process_ip", "127.0.0.1")
    ranks = [(*address, "--machine_rank", str(rank)) for rank in range(2)]
    assert launch(tmp_path, "two_machines.yaml", *ranks) == [expected(0, 0), expected(1, 0)]
