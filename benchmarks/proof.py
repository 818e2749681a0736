"""What it costs to show that a stage changed nothing else, and to tell a base model from another one.

The model is Llama-shaped, of 500 MB in bf16, its weights random; it lies on a GPU if there is one. Each figure is one
time over another one of the same turn, by the clock: the median of the repeats; `_p10` and `_p90` are its 10 to 90 %
range.

* `proof_over_sha256`: the check of a stage's end, every tensor that the stage does not own included, over sha256 of
  the same tensors in one thread.
* `identity_over_sha256`: the digest of a base model that is not remembered, in as many threads as there are cores,
  over the same.
* `remembered_over_sha256`: that of one which is remembered, over the same.
* `sha256_gb_per_s`: what one thread hashes of the model, in 10^9 bytes a second.

```bash
python benchmarks/proof.py --json proof.json
python benchmarks/proof.py --quick
```
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from huggingface_hub import constants
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_s3t import S3TConfig
from hf_s3t.lora.heads import tensor_digest
from hf_s3t.lora.tuner import StageTuner
from hf_s3t.store.base_identity import base_digest, base_tensors, memory_path, tensors_digest
from training import SLICES, make_parser, over, print_table, record, spread


@dataclass(frozen=True)
class Settings:
    """What a run is made of; written to the JSON file as it is."""

    layers: int = 24
    hidden: int = 960
    intermediate: int = 2560
    vocabulary: int = 2048
    repeats: int = 7


QUICK = Settings(layers=8, hidden=128, intermediate=256, repeats=1)


def make_tuner(settings: Settings, seed: int) -> StageTuner:
    """A model whose first stage begins."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers, num_attention_heads=8,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    s3t = S3TConfig(task_type="CAUSAL_LM", num_slices=SLICES, target_modules="all-linear")
    tuner = StageTuner(get_peft_model(base, s3t))
    tuner.begin(1, seed, None)
    return tuner


def seconds(act: Callable[[], Any]) -> float:
    """How long something takes that ends on the host."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def run(settings: Settings, seed: int) -> dict[str, Any]:
    """All figures by name."""
    tuner = make_tuner(settings, seed)
    tensors = base_tensors(tuner.model)
    before = tuner.frozen_fingerprints()
    ways = {
        "sha256": lambda: [tensor_digest(value) for value in tensors.values()],
        "proof": lambda: tuner.check_frozen(before),
        "identity": lambda: tensors_digest(tensors),
        "remembered": lambda: base_digest(tuner.model),
    }
    with tempfile.TemporaryDirectory() as home:
        constants.HF_HOME = home
        for way in ways.values():  # the first turn warms up, and is remembered
            way()
        assert memory_path().exists()
        turns = [{name: seconds(way) for name, way in ways.items()} for _ in range(settings.repeats)]
    times = {name: [turn[name] for turn in turns] for name in ways}
    size = sum(value.nbytes for value in tensors.values())
    figures: dict[str, Any] = {"megabytes": size / 1e6}
    for name in ("proof", "identity", "remembered"):
        figures |= over(f"{name}_over_sha256", times[name], times["sha256"])
    return figures | spread("sha256_gb_per_s", [size / 1e9 / one for one in times["sha256"]])


def main() -> None:
    """Runs the benchmark."""
    options = make_parser(__doc__).parse_args()
    settings = QUICK if options.quick else Settings()
    figures = run(settings, options.seed)
    print_table(figures)
    if options.json:
        found = record("proof", asdict(settings), options.seed, figures)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
