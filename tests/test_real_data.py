"""The small pretrained Llama on real Alpaca rows: what the benchmark claims, and what stock PEFT makes of a store."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_s3t import S3TStore, Stage
from hf_s3t.store.card import prefix_lines

REPOSITORY = Path(__file__).resolve().parent.parent

# Runs lines that a card prints, in a process of its own. `base` comes from a folder: here it has no id on the Hub.
STOCK = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

folder, store, blocks, out = sys.argv[1:]
answers = []
for lines in json.loads(blocks):
    names = {"base": AutoModelForCausalLM.from_pretrained(folder), "store": store}
    exec(lines, names)
    with torch.no_grad():
        answers.append(names["model"].eval()(input_ids=torch.arange(3, 83).view(4, 20)).logits)
assert "hf_s3t" not in sys.modules and "peft" in sys.modules
torch.save(answers, out)
"""


@pytest.fixture(scope="module")
def alpaca(shared_data: Path) -> ModuleType:
    """The benchmark, as a module."""
    spec = importlib.util.spec_from_file_location("alpaca_benchmark", REPOSITORY / "benchmarks" / "alpaca.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def card_lines(store: Path) -> list[str]:
    """The Python of a store's card that loads an adapter: first the root adapter, then a prefix."""
    blocks = re.findall(r"```python\n(.*?)```", (store / "README.md").read_text(), re.S)
    return [block for block in blocks if "peft" in block]


@torch.no_grad()
def served_logits(trainer: Any, stage: Stage) -> torch.Tensor:
    """What hf_s3t's own model answers with a prefix."""
    adapter = trainer.store.assemble(stage.shard, stage.prefix)
    trainer.tuner.serve({"asked": adapter})
    return trainer.model.eval()(input_ids=torch.arange(3, 83).view(4, 20)).logits


@torch.no_grad()
def averaged_logits(base: torch.nn.Module, store: S3TStore) -> torch.Tensor:
    """What the base answers with the mean of the served prefixes' updates added to its weights."""
    served = store.served()
    for shard, prefix in served.items():
        adapter = store.assemble(shard, prefix)
        for name, down in adapter.tensors.items():
            if ".lora_A." in name:
                up = adapter.tensors[name.replace(".lora_A.", ".lora_B.")]
                path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                base.get_submodule(path).weight += adapter.scaling * up @ down / len(served)
    return base.eval()(input_ids=torch.arange(3, 83).view(4, 20)).logits


@pytest.mark.slow
def test_stock_peft_loads_the_root_adapter_and_any_prefix_by_the_lines_of_the_card(
    tmp_path: Path, alpaca: ModuleType
) -> None:
    settings = replace(alpaca.QUICK, train_rows=60)
    tokenizer, rows = alpaca.read_rows(settings, seed=0)
    trainer = alpaca.train_s3t(settings, tmp_path / "store", 0, tokenizer, rows["train"])
    store = trainer.store
    stages = sorted(store.manifest().stages)
    root, example = card_lines(store.path)
    assert example == prefix_lines(Stage(0, store.served()[0]), store.manifest())
    lines = [root, *(prefix_lines(stage, store.manifest()) for stage in stages)]
    out = tmp_path / "answers.pt"
    command = [sys.executable, "-c", STOCK, str(alpaca.data_folder() / "llama_stories260k"), str(store.path)]
    done = subprocess.run([*command, json.dumps(lines), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    whole, *prefixes = torch.load(out)
    assert len(prefixes) == 10
    for stage, answer in zip(stages, prefixes, strict=True):
        assert torch.equal(answer, served_logits(trainer, stage)), stage.name
    torch.testing.assert_close(whole, averaged_logits(alpaca.base_model(), store), atol=1e-4, rtol=1e-4)
    assert min((whole - answer).abs().max() for answer in prefixes) > 1e-3


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_its_figures(
    tmp_path: Path, alpaca: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "figures.json"
    monkeypatch.setattr(alpaca, "QUICK", replace(alpaca.QUICK, train_rows=40, test_rows=8))
    monkeypatch.setattr(sys, "argv", ["alpaca.py", "--quick", "--json", str(file)])
    alpaca.main()
    record = json.loads(file.read_text())
    assert set(record) == {"name", "commit", "versions", "hardware", "settings", "figures"}
    figures = record["figures"]["by_seed"]["0"]
    assert figures["slice_passes"] == 30 and figures["full_lora_epochs"] == 3
    assert len(figures["prefix_loss"]) == 10
    gained, possible = figures["base_loss"] - figures["served_loss"], figures["base_loss"] - figures["full_lora_loss"]
    assert figures["gap_share"] == pytest.approx(gained / possible) == record["figures"]["gap_share"]
    assert "gap share" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_served_model_closes_most_of_the_gap_to_full_lora(alpaca: ModuleType, seed: int) -> None:
    settings = alpaca.Settings()
    assert (settings.train_rows, settings.num_shards, settings.num_slices) == (2000, 2, 5)
    figures = alpaca.run(settings, seed)
    assert figures["full_lora_epochs"] * settings.num_shards * settings.num_slices == figures["slice_passes"]
    assert figures["full_lora_loss"] < figures["base_loss"]
    assert figures["gap_share"] >= 0.6
    losses = figures["prefix_loss"]
    assert len(losses) == 2 * 9 and all(map(math.isfinite, losses.values()))
    for shard in (0, 1):  # each layer group of the served order helps on rows that nobody trained on
        order = [losses[Stage(shard, tuple(range(depth))).name] for depth in range(1, 6)]
        assert order == sorted(order, reverse=True)
    single = [losses[f"shard-0{shard}/0-1-2-3-4"] for shard in (0, 1)]
    assert figures["served_loss"] < min(single)
