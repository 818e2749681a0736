"""Trained stores of several shapes of models, and their ensembles: loaded, and put together by hand from stock PEFT.

Every store has three shards of three slices and two orders, `(0, 1, 2)` and `(2, 0)`. The process that needs it first
trains it for all processes of a run; tests that change one take a copy.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import default_data_collator

import models
from hf_s3t import S3TConfig, S3TEnsemble, S3TStore, S3TTrainer, Stage
from hf_s3t.store.card import prefix_lines
from trainers import batch, make_args

ORDERS = [[0, 1, 2], [2, 0]]
ROWS = 36
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


class Shape(NamedTuple):
    """A model, its rows, and what an `S3TConfig` says of it."""

    build: Callable[[], Any]
    rows: Callable[..., Any]
    config: dict[str, Any]


_llama = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
_gpt2 = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
_bert = {"task_type": "SEQ_CLS", "target_modules": ["query", "output.dense"]}
_vit = {"target_modules": ["q_proj", "v_proj", "up_proj"], "modules_to_save": ["classifier"]}
SHAPES = {
    "llama": Shape(models.tiny_llama, models.llama_rows, _llama),  # layers 0 and 1 belong to no stage
    "llama-all": Shape(
        partial(models.tiny_llama, num_hidden_layers=6), models.llama_rows, _llama | {"stage_parameters": "all"}
    ),
    "llama-wide": Shape(  # where a CPU has instructions for it, 4-bit layers have to be as wide as a block
        partial(models.tiny_llama, hidden_size=64, intermediate_size=128), models.llama_rows, _llama
    ),
    "gpt2": Shape(models.tiny_gpt2, models.llama_rows, _gpt2),
    "llama-rank": Shape(  # more slices than layers
        partial(models.tiny_llama, num_hidden_layers=2), models.llama_rows, _llama | {"stage_parameters": "rank_group"}
    ),
    "bert": Shape(models.tiny_bert, models.bert_rows, _bert),
    "bert-all": Shape(models.tiny_bert, models.bert_rows, _bert | {"stage_parameters": "all"}),
    "roberta": Shape(models.tiny_roberta, models.bert_rows, _bert),
    "vit": Shape(models.tiny_vit, models.vit_rows, _vit),
}


@functools.cache
def trained(shape: str) -> Path:
    """The store of a shape; nobody may change it."""
    path = Path(os.environ["HF_S3T_TESTS_SHARED"], "served", shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not Path(f"{path}.trained").exists():
            train(shape, path)
            Path(f"{path}.trained").touch()
    return path


def train(shape: str, path: Path) -> None:
    """Trains the store of a shape into a folder."""
    build, rows, config = SHAPES[shape]
    fields = {"num_shards": 3, "num_slices": 3, "sequence_selection": ORDERS, "r": 2, "lora_alpha": 8}
    trainer = S3TTrainer(
        build(),
        make_args(path, learning_rate=5e-2),
        data_collator=default_data_collator,
        train_dataset=rows(ROWS),
        peft_config=S3TConfig(**fields | config),
        partition_key=b"the partition key of the tests",
    )
    trainer.train()


def copy(shape: str, path: Path) -> S3TStore:
    """A store of that shape that a test may change."""
    return S3TStore(shutil.copytree(trained(shape), path / "store"))


def shorten(store: S3TStore) -> S3TStore:
    """Leaves shard 0 all of its three slices, shard 1 two, and shard 2 none."""
    store.delete(slices=[(1, 1), (2, 0), (2, 2)])
    assert store.served() == {0: (0, 1, 2), 1: (2, 0)}
    return store


def load(store: S3TStore | Path, shape: str, **kwargs: Any) -> S3TEnsemble:
    """The ensemble of a store on a base of its own."""
    path = store.path if isinstance(store, S3TStore) else store
    return S3TEnsemble.from_pretrained(path, SHAPES[shape].build(), **kwargs)


def inputs_of(shape: str, count: int = 6) -> dict[str, torch.Tensor]:
    """Rows that nothing was trained on, without their labels."""
    return {k: v for k, v in batch(SHAPES[shape].rows(12, seed=1), count).items() if k != "labels"}


def prompts(count: int = 6) -> dict[str, torch.Tensor]:
    """Prompts of 3 to 8 tokens, padded on the left."""
    tokens = inputs_of("llama", count)["input_ids"][:, :8].clone()
    mask = torch.ones_like(tokens)
    for row, padding in enumerate([0, 5, 2, 4, 1, 3][:count]):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


# By hand, with stock PEFT


def member(store: S3TStore, base: Any, shard: int, prefix: tuple[int, ...]) -> PeftModel:
    """A prefix on a fresh base, stage by stage, by the lines that the model card prints."""
    if store.manifest().recipe["config"]["stage_parameters"] == "rank_group":
        names = {"base": base, "store": str(store.path)}
        exec(prefix_lines(Stage(shard, prefix), store.manifest()), names)
        return names["model"]
    folders = [store.path / stage.name for stage in Stage(shard, prefix).path]
    configs = [LoraConfig.from_pretrained(folder) for folder in folders]
    configs[-1].layers_to_transform = sorted(set(sum((config.layers_to_transform for config in configs), [])))
    model = get_peft_model(base, configs[-1]).eval()
    for folder in folders:
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model


def members(store: S3TStore | Path, build: Callable[[], Any]) -> list[PeftModel]:
    """Every live shard's served prefix."""
    store = store if isinstance(store, S3TStore) else S3TStore(store)
    return [member(store, build(), shard, prefix) for shard, prefix in sorted(store.served().items())]


def repeated(inputs: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The batch `count` times, one below the other."""
    return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in inputs.items()}


def mean_probability(parts: list[torch.Tensor]) -> torch.Tensor:
    """The logarithm of the mean probability, of logits in fp32."""
    return torch.stack(parts).log_softmax(-1).logsumexp(0) - math.log(len(parts))


class ByHand:
    """The ensemble as one writes it down: every member in turn, the whole sequence for every token, no cache."""

    def __init__(self, parts: list[Any]):
        self.parts = parts
        self.margin = math.inf

    @torch.no_grad()
    def scores(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logarithms of the probabilities of the next token, `(batch, vocabulary)`."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        return mean_probability([part(**given).logits[:, -1] for part in self.parts])

    def loop(self, inputs: dict[str, torch.Tensor], new: int, choose: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """What follows the prompts, `(batch, new)`."""
        tokens, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(new):
            scores = self.scores(tokens, mask)
            best, second = scores.topk(2).values.unbind(-1)
            self.margin = min(self.margin, float((best - second).min()))
            tokens = torch.cat([tokens, choose(scores)[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        return tokens[:, -new:]

    def greedy(self, inputs: dict[str, torch.Tensor], new: int) -> torch.Tensor:
        return self.loop(inputs, new, lambda scores: scores.argmax(-1))

    def sampled(self, inputs: dict[str, torch.Tensor], new: int, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return self.loop(inputs, new, lambda scores: torch.multinomial(scores.softmax(-1), 1)[:, 0])

    def beams(self, inputs: dict[str, torch.Tensor], new: int, beams: int) -> torch.Tensor:
        """The continuations of every prompt with the `beams` highest scores, best first: `(batch, beams, new)`."""
        found = []
        for prompt, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            prompt = prompt[mask.bool()]
            paths = [((), 0.0)]
            for _ in range(new):
                tokens = torch.stack([torch.cat([prompt, torch.tensor(path).long()]) for path, _ in paths])
                scores = self.scores(tokens, torch.ones_like(tokens))
                longer = [
                    ((*path, token), so_far + float(score))
                    for (path, so_far), row in zip(paths, scores, strict=True)
                    for token, score in enumerate(row)
                ]
                paths = sorted(longer, key=lambda item: -item[1])[:beams]
            found.append([list(path) for path, _ in paths])
        return torch.tensor(found)
