"""Promise 7: after a deletion no file holds anything of the example. Promise 8: stock PEFT loads what is left."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save
from transformers import TrainerCallback

from hf_s3t import S3TStore
from killing import in_child, kill
from scanner import find, needles_of, tensor_needles
from trainings import CASES, KINDS, WEIGHTS, WORLDS, World, logits_of, make_trainer, probe

PAIRS = [(case, kind) for case in CASES for kind in KINDS]
SHORT = [("llama", "layer_group"), ("bert", "layer_group"), ("bert", "rank_group"), ("vit", "all")]


@pytest.fixture(scope="module", params=WORLDS)
def world(request, tmp_path_factory):
    case, kind = request.param
    return World(CASES[case], kind, tmp_path_factory.mktemp(f"{case}-{kind}"))


# ---- 7. nothing left ----


class KillLate(TrainerCallback):
    """Kills the run in stage 0-1, when it has a running checkpoint."""

    def on_step_end(self, args, state, control, stage=None, **kwargs):
        if stage.prefix == (0, 1) and state.global_step == 4:
            kill()


def weights_below(path: Path, *patterns: str) -> dict[str, bytes]:
    files = (file for pattern in patterns for file in path.glob(pattern))
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def optimizer_needles(path: Path) -> dict[str, bytes]:
    """Moments of the optimizer in the running checkpoints."""
    needles = {}
    for file in path.glob(".s3t/running/*/*/optimizer.pt"):
        for number, moments in torch.load(file, weights_only=True)["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                value = moments[name].numpy().tobytes()[:64]
                if any(value):
                    needles[f"{name} {number}"] = value
    return needles


@pytest.mark.brief("llama-layer_group", "bert-layer_group")
def test_after_delete_no_file_holds_anything_of_the_example(world, tmp_path):
    """Two sequences are trained and a stage of a third is under way: stages, root and running checkpoints are hit."""
    path, plan = tmp_path / "out", {"sequence_selection": [[1, 2], [0]]}
    victim = world.rows[world.rows["id"].index(world.victim)]
    world.trainer(path, **plan).train()
    more = {"sequence_selection": [[1, 2], [0, 1]], "callbacks": [KillLate()]}
    assert in_child(lambda: world.trainer(path, **more).train()) == -9
    kept = (path / f"shard-00/0/{WEIGHTS}").read_bytes()
    derived = optimizer_needles(path)
    assert {file.split("/")[0] for _, file in find(path, derived)} == {".s3t"}
    derived |= tensor_needles(
        weights_below(path, f"shard-00/1*/{WEIGHTS}", WEIGHTS, f".s3t/running/*/*/{WEIGHTS}"), kept
    )
    holders = {file.removesuffix(f"/{WEIGHTS}") for _, file in find(path, derived) if file.endswith(WEIGHTS)}
    assert holders == {WEIGHTS, "shard-00/1", "shard-00/1-2", ".s3t/running/shard-00_0-1/checkpoint-3"}
    for row in world.rows.select(range(3)):
        assert find(path, needles_of(row)) == set(), "the store knows keyed digests only, before a deletion, too"

    S3TStore(path).delete(ids=[world.victim], reference="DSR-2026-118")
    assert find(path, derived | needles_of(victim)) == set()
    assert {file for _, file in find(path, {"reference": b"DSR-2026-118"})} == {".s3t/state.sqlite"}
    world.trainer(path, **plan).train()
    assert find(path, derived | needles_of(victim)) == set()


SECRETS = {"text": "Zoë Ångström wrote this".encode(), "number": bytes(random.Random(1).randbytes(16))}


def arrow_file(value: bytes, compression: str | None) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.table({"a": [b"x" * 100, value], "b": [[1], [3, 4, 5]]})
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    with pyarrow.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def arrow_stream(value: bytes) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.table({"a": pyarrow.array([value] * 3).dictionary_encode()})
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    with pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet_file(value: bytes) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": [value]}), sink, compression="zstd")
    return sink.getvalue()


def zip_file(value: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", value)
    return sink.getvalue()


def torch_file(value: bytes) -> bytes:
    sink = io.BytesIO()
    torch.save({"state": torch.frombuffer(bytearray(value), dtype=torch.uint8)}, sink)
    return sink.getvalue()


def sqlite_file(value: bytes) -> bytes:
    database = sqlite3.connect(":memory:")
    database.execute("create table a (b blob)")
    database.execute("insert into a values (?)", (b"x" * 5000 + value,))  # longer than a page
    database.commit()
    return database.serialize()


PACKED = {
    "plain": lambda value: b"before " + value + b" after",
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": zip_file,
    "gzip in zip": lambda value: zip_file(gzip.compress(value)),
    "torch.save": torch_file,
    "safetensors": lambda value: save({"a": torch.frombuffer(bytearray(value), dtype=torch.uint8)}),
    "arrow": lambda value: arrow_file(value, None),
    "arrow, zstd": lambda value: arrow_file(value, "zstd"),
    "arrow stream, lz4": arrow_stream,
    "parquet, zstd": parquet_file,
    "sqlite": sqlite_file,
}
WRITTEN = {
    "JSON, escaped": lambda text: json.dumps({"a": [{text: 1}]}).encode(),
    "lines of JSON": lambda text: b"\n" + b"\n".join(json.dumps(value).encode() for value in ({"a": 1}, {"b": text})),
    "safetensors header": lambda text: save({"a": torch.zeros(2)}, {"hf_s3t": json.dumps({"stage": text})}),
}


@pytest.mark.parametrize("packing", [*PACKED, *WRITTEN])
def test_the_scanner_finds_what_is_planted(tmp_path, packing):
    (tmp_path / "a/b").mkdir(parents=True)
    secrets = SECRETS if packing in PACKED else {"text": SECRETS["text"]}
    for name, value in secrets.items():
        data = PACKED[packing](value) if packing in PACKED else WRITTEN[packing](value.decode())
        (tmp_path / "a/b" / name).write_bytes(data)
    assert find(tmp_path, SECRETS) == {(name, f"a/b/{name}") for name in secrets}


def test_the_scanner_finds_every_kind_of_needle_and_names(tmp_path):
    for case in CASES:
        needles = needles_of(World(CASES[case], "all", tmp_path).rows[3])
        assert {"id", "text", "sha256 of the id", "raw md5 of the row"} <= needles.keys()
        assert "pixels" in needles or {"tokens as <i8", "tokens in JSON"} <= needles.keys()
        for number, needle in enumerate(needles.values()):
            (tmp_path / case / str(number)).mkdir(parents=True)
            (tmp_path / case / str(number) / "file.gz").write_bytes(gzip.compress(b"\0" + needle))
        assert {name for name, _ in find(tmp_path / case, needles)} == needles.keys()
    row = World(CASES["llama"], "all", tmp_path).rows[3]
    (tmp_path / row["id"]).symlink_to(row["note"])
    assert {"id", "text"} <= {name for name, where in find(tmp_path, needles_of(row)) if where == row["id"]}


def test_the_scanner_finds_tokens_in_tables_and_json(tmp_path):
    rows = World(CASES["llama"], "all", tmp_path).rows
    (tmp_path / "rows.json").write_text(json.dumps([dict(row) for row in rows], indent=1))
    pyarrow.parquet.write_table(rows.data.table, tmp_path / "rows.parquet")
    needles = needles_of(rows[5])
    for name in ("rows.json", "rows.parquet"):
        assert {"id", "text", "tokens as <i8"} <= {found for found, where in find(tmp_path, needles) if where == name}


# ---- 8. plain artefacts ----

READER = '''
import importlib.abc, json, re, sys
from pathlib import Path

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_s3t":
            raise ImportError("there is no hf_s3t on this machine")

sys.meta_path.insert(0, Refuse())
import torch
torch.set_num_threads(1)
import transformers
from transformers.utils import logging
logging.disable_progress_bar()

for job in json.loads(Path("jobs.json").read_text()):
    card = (Path(job["store"]) / "README.md").read_text()
    base_lines, root_lines, prefix_lines = re.findall("```python\\n(.*?)```", card, re.DOTALL)
    probe = torch.load(job["probe"], weights_only=True)
    answers = {}
    for name, lines in (("root", root_lines), ("prefix", prefix_lines)):
        names = {}
        exec(base_lines, names)
        names["store"] = job["store"]
        exec(lines, names)
        model = names["model"].eval()
        with torch.no_grad():
            answers[name] = model(**probe).logits
    torch.save(answers, job["answers"])
assert "hf_s3t" not in sys.modules
'''


@pytest.mark.parametrize("pairs", [SHORT, pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["short", "all"])
def test_stock_peft_loads_root_and_prefix_by_the_lines_of_the_card(tmp_path, pairs):
    """On a machine without hf_s3t, where the base model's id leads to the base model."""
    jobs, expected = [], {}
    for case, kind in pairs:
        name, path = f"{case}-{kind}", tmp_path / f"store-{case}-{kind}"
        base = CASES[case].make_model(num_hidden_layers=2)
        base.save_pretrained(tmp_path / "tiny" / case)
        options = {"num_slices": 2, "sequence_selection": [[1, 0]], "base_model_id": f"tiny/{case}", "model": base}
        trainer = make_trainer(path, CASES[case], kind, args={"max_steps": 2}, **options)
        trainer.train()
        expected[name] = logits_of(trainer.model, CASES[case])
        torch.save(probe(CASES[case]), tmp_path / f"{name}.probe")
        jobs.append({"store": str(path), "probe": f"{name}.probe", "answers": f"{name}.answers"})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "reader.py").write_text(READER)
    done = subprocess.run(
        [sys.executable, "reader.py"], cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, logits in expected.items():
        answers = torch.load(tmp_path / f"{name}.answers", weights_only=True)
        assert torch.equal(answers["root"], logits) and torch.equal(answers["prefix"], logits), name
