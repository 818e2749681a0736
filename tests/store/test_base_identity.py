"""A base is known by the same sha256 as ever, which a machine computes once; what is remembered changes no answer."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import get_peft_model

from hf_s3t import S3TConfig, StoreError
from hf_s3t.lora.heads import tensor_digest
from hf_s3t.lora.tuner import StageTuner
from hf_s3t.store import base_identity
from hf_s3t.store.base_identity import Memory, base_digest, memory_path, tensors_digest
from hf_s3t.store.base_model import check_base
from killing import in_child
from models import tiny_bert, tiny_llama

HEADS = ("classifier",)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A Hugging Face home for each test."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(base_identity, "_told", set())
    return tmp_path / "home"


@pytest.fixture
def hashed(monkeypatch) -> list[torch.Tensor]:
    """The tensors whose sha256 was computed."""
    found: list[torch.Tensor] = []

    def counted(tensor: torch.Tensor) -> str:
        found.append(tensor)
        return tensor_digest(tensor)

    monkeypatch.setattr(base_identity, "tensor_digest", counted)
    return found


def written_out(model: torch.nn.Module, heads: tuple[str, ...] = ()) -> str:
    """The formula that recipes have been written with, in plain words."""
    digests = {}
    for name, value in model.state_dict().items():
        if not any(name.startswith(f"{head}.") for head in heads):
            data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            digests[name] = hashlib.sha256(data).hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def change(model: torch.nn.Module) -> None:
    """One number by the least there is."""
    last = list(model.parameters())[-1].data.view(-1)[-1:].view(torch.uint8)
    last[0] ^= 1


# The digest


@pytest.mark.parametrize(
    "make, heads",
    [
        (tiny_llama, ()),
        (lambda: tiny_llama(tie_word_embeddings=True).to(torch.bfloat16), ()),
        (tiny_bert, ()),
        (tiny_bert, HEADS),
    ],
    ids=["llama", "tied, bf16", "bert", "without its head"],
)
def test_the_digest_is_that_of_old_recipes(make, heads):
    assert base_digest(make(), heads) == base_digest(make(), heads) == written_out(make(), heads)
    model = get_peft_model(make(), S3TConfig(target_modules="all-linear", num_slices=2))
    StageTuner(model).begin(1, seed=0, parent=None)
    assert base_digest(model, heads) == written_out(make(), heads)


def test_tensors_are_hashed_in_threads_and_joined_in_their_order(monkeypatch):
    """Two threads wait for each other before each digest; the later tensor is done first."""
    tensors = {str(number): torch.full((3,), number) for number in range(6)}
    alone = tensors_digest(tensors)
    both, done = threading.Barrier(2, timeout=60), [threading.Event() for _ in tensors]

    def in_pairs(tensor: torch.Tensor) -> str:
        number = int(tensor[0])
        both.wait()
        if number % 2 == 0:
            assert done[number + 1].wait(60)
        done[number].set()
        return tensor_digest(tensor)

    monkeypatch.setattr(base_identity, "_cores", lambda: 2)
    monkeypatch.setattr(base_identity, "tensor_digest", in_pairs)
    assert tensors_digest(tensors) == alone


def test_a_process_may_begin_with_it():
    """As one does that checks a base and has imported nothing of PEFT."""
    command = [sys.executable, "-c", "from hf_s3t.store.base_identity import base_digest"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_there_are_as_many_threads_as_cores_that_may_be_used():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert base_identity._cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
    assert base_identity._cores() == len(allowed)


# What is remembered


def test_a_base_is_hashed_once_and_a_changed_one_again(hashed):
    model = tiny_llama()
    digest = base_digest(model)
    assert len(hashed) == len(model.state_dict())
    hashed.clear()
    assert base_digest(model) == base_digest(tiny_llama()) == digest and hashed == []
    change(model)
    assert base_digest(model) == written_out(model) != digest and hashed
    hashed.clear()
    change(model)
    assert base_digest(model) == digest and hashed == []


def test_another_name_or_type_of_the_same_bytes_is_another_base(hashed):
    model = tiny_llama(num_hidden_layers=1)
    digest = base_digest(model)
    hashed.clear()
    model.more = model.lm_head
    assert base_digest(model) != digest and hashed
    del model.more
    hashed.clear()
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.detach().view(torch.int32), requires_grad=False)
    assert base_digest(model) == digest and len(hashed) == len(model.state_dict())


def test_a_base_in_memory_that_was_changed_is_refused_although_it_was_remembered(hashed):
    model = tiny_llama()
    recipe = {"config": {}, "base": {"sha256": base_digest(model), "dtype": "torch.float32", "quantization": None}}
    hashed.clear()
    check_base(model, recipe)
    assert hashed == []
    change(model)
    with pytest.raises(StoreError, match="This is not the base model"):
        check_base(model, recipe)


def test_neither_heads_nor_adapters_are_in_the_file(hashed):
    model = get_peft_model(tiny_bert(), S3TConfig(target_modules=["query"], num_slices=2, task_type="SEQ_CLS"))
    digest, stored = base_digest(model, HEADS), memory_path().read_bytes()
    hashed.clear()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name or "classifier" in name:
                value.normal_()
    assert base_digest(model, HEADS) == digest and hashed == []
    assert memory_path().read_bytes() == stored and memory_path().stat().st_mode & 0o077 == 0


def test_the_oldest_are_forgotten(monkeypatch, hashed):
    monkeypatch.setattr(base_identity, "ENTRIES", 2)
    models = [tiny_llama(seed, num_hidden_layers=1) for seed in range(3)]
    digests = [base_digest(model) for model in models]
    assert list(json.loads(memory_path().read_text())["digests"].values()) == digests[1:]
    hashed.clear()
    assert [base_digest(model) for model in models[1:]] == digests[1:] and hashed == []
    assert base_digest(models[0]) == digests[0] and hashed


DAMAGES = {
    "empty": b"",
    "torn": b'{"version": 1, "seed": 5, "dig',
    "no object": b"[1, 2]",
    "no text": b"\xff\xfe\x00",
    "a newer version": json.dumps({"version": 2, "seed": 5, "digests": {}}).encode(),
    "no seed": json.dumps({"version": 1, "seed": "5", "digests": {}}).encode(),
    "no digests": json.dumps({"version": 1, "seed": 5, "digests": {"a": "b"}}).encode(),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_costs_speed_alone_and_is_made_anew(damage, hashed, caplog):
    caplog.set_level(logging.WARNING, "hf_s3t")
    memory_path().parent.mkdir(parents=True)
    memory_path().write_bytes(DAMAGES[damage])
    assert base_digest(tiny_llama()) == written_out(tiny_llama())
    [warning] = caplog.messages
    assert str(memory_path()) in warning and "Only speed is lost" in warning
    hashed.clear()
    assert base_digest(tiny_llama()) == written_out(tiny_llama()) and hashed == []
    assert len(caplog.messages) == 1


def no_home(home: Path, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", "~nobody/huggingface")


def a_file_for_a_home(home: Path, monkeypatch) -> None:
    home.write_text("not a folder")


def a_folder_for_a_file(home: Path, monkeypatch) -> None:
    memory_path().mkdir(parents=True)


def read_only(home: Path, monkeypatch) -> None:
    """Root may write anywhere, so the file system says no in its place."""

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)


@pytest.mark.parametrize("place", [no_home, a_file_for_a_home, a_folder_for_a_file, read_only])
def test_where_nothing_can_be_written_bases_are_hashed_each_time(place, home, monkeypatch, tmp_path, hashed, caplog):
    caplog.set_level(logging.WARNING, "hf_s3t")
    place(home, monkeypatch)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        hashed.clear()
        assert base_digest(tiny_llama()) == written_out(tiny_llama()) and hashed
    assert len(caplog.messages) == 1 and "Only speed is lost" in caplog.messages[0]
    assert not list(tmp_path.glob("~*"))


def entries(memory: Memory, process: int) -> None:
    """What a process does that sees 20 new bases."""
    for number in range(20):
        key = f"{process}-{number}"
        memory.digests[key] = "0" * 64
        base_identity._remember(memory_path(), memory, key)


def test_two_processes_that_write_at_once_leave_a_whole_file():
    base_digest(tiny_llama())
    children = [partial(entries, base_identity._read(memory_path()), process) for process in (1, 2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(in_child, children)) == [0, 0]
    left = json.loads(memory_path().read_text())
    assert len(left["digests"]) == 41
    assert sorted(path.name for path in memory_path().parent.iterdir() if path.suffix != ".lock") == [
        memory_path().name
    ]


def test_what_was_found_under_another_seed_is_not_written():
    """Another process made the file anew while this one hashed."""
    base_digest(tiny_llama())
    stored = memory_path().read_bytes()
    entries(Memory(), 1)
    assert memory_path().read_bytes() == stored
