"""Which tensors a stage trains, holds and stores, in models of five architectures; what violates it is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn

from hf_s3t import IsolationError, S3TConfig
from hf_s3t.files import json_bytes
from hf_s3t.lora.adapter import Adapter, join
from hf_s3t.lora.fingerprints import fingerprints
from hf_s3t.lora.heads import find_heads
from hf_s3t.lora.tuner import StageTuner, frozen_layers, owned_layers, plain_lora_config
from models import bert_rows, llama_rows, tiny_bert, tiny_gpt2, tiny_llama_12, tiny_roberta, tiny_vit, vit_rows

CAUSAL = {"task_type": "CAUSAL_LM"}
CLASSIFIER = {"task_type": "SEQ_CLS"}
MODELS = {
    "llama": (tiny_llama_12, llama_rows, CAUSAL | {"target_modules": ["q_proj", "up_proj"]}, ()),
    "gpt2": (tiny_gpt2, llama_rows, CAUSAL | {"target_modules": ["c_attn"], "fan_in_fan_out": True}, ()),
    "bert": (tiny_bert, bert_rows, CLASSIFIER | {"target_modules": ["query", "value"]}, ("classifier",)),
    "roberta": (tiny_roberta, bert_rows, CLASSIFIER | {"target_modules": ["query", "value"]}, ("classifier",)),
    "vit": (tiny_vit, vit_rows, {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}, ("classifier",)),
}
KINDS = [(name, "layer_group") for name in MODELS] + [("bert", "rank_group"), ("llama", "all"), ("bert", "all")]


class Tuned:
    """A tiny model under the tuner, with a batch to ask it about."""

    def __init__(self, name: str, **fields):
        self.make, rows, config, self.heads = MODELS[name]
        columns = rows(3).remove_columns(["id", "person"]).to_dict()
        self.batch = {key: torch.tensor(values) for key, values in columns.items()}
        base = self.make()
        config = S3TConfig(**{"num_slices": 4, "r": 2, "lora_dropout": 0.1} | config | fields)
        config.modules_to_save = list(find_heads(base, config)) or None
        self.model = get_peft_model(base, config)
        self.tuner = StageTuner(self.model)
        self.config, self.layout = self.tuner.config, self.tuner.layout

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model.eval()(**self.batch).logits

    def train(self, seed: int = 0, steps: int = 2) -> None:
        """A few large steps on what trains."""
        trainable = [value for value in self.model.parameters() if value.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.5)
        torch.manual_seed(seed)
        self.model.train()
        for _ in range(steps):
            self.model(**self.batch).loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def stage(self, depth: int) -> Adapter:
        """The running stage as the store gets it."""
        config = plain_lora_config(self.config, self.layout, owned_layers(self.config, self.layout, depth))
        return Adapter.from_tensors(config, self.tuner.stage_tensors())

    def join(self, stages: list[Adapter]) -> Adapter:
        """Some stages as the store joins them."""
        return join(stages, self.config.stage_parameters)

    def trained_path(self, depth: int) -> list[Adapter]:
        """Stages 1 to `depth`, each trained on top of those before."""
        stages: list[Adapter] = []
        for above in range(1, depth + 1):
            self.tuner.begin(above, seed=above, parent=self.join(stages) if stages else None)
            self.train(above)
            stages.append(self.stage(above))
        return stages

    def layers_of(self, names) -> set[int]:
        """Layer numbers in parameter names, read without the library."""
        return {int(re.search(r"\.(\d+)\.", name)[1]) for name in names if "lora_" in name}


@pytest.fixture(params=KINDS, ids=" ".join)
def tuned(request) -> Tuned:
    name, kind = request.param
    return Tuned(name, stage_parameters=kind)


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What a stage owns and trains


def test_layers_are_told_by_their_whole_numbers():
    """Layer 1 is not the beginning of layers 10 and 11."""
    tuned = Tuned("llama")
    tuned.tuner.begin(4, seed=0, parent=None)
    assert tuned.layers_of(tuned.tuner.training_owned) == {0, 1, 2}


def test_a_stage_trains_its_layers_and_the_head_and_what_lies_beyond_holds_no_lora(tuned):
    groups, stages = tuned.layout.groups, []
    for depth in range(1, 4):
        tuned.tuner.begin(depth, seed=depth, parent=tuned.join(stages) if stages else None)
        owned = set(groups[depth - 1] if tuned.config.stage_parameters == "layer_group" else sum(groups, ()))
        trains = {name for name, value in tuned.model.named_parameters() if value.requires_grad}
        assert trains == tuned.tuner.training_owned and tuned.layers_of(trains) == owned
        rest = {name for name in trains if "lora_" not in name}
        assert all(".modules_to_save.default." in name for name in rest) and bool(rest) == bool(tuned.heads)
        assert all(f"base_model.model.{head}" in " ".join(rest) for head in tuned.heads)
        present = tuned.layers_of(name for name, _ in tuned.model.named_parameters())
        above = {layer for group in groups[:depth] for layer in group}
        assert present == (above if tuned.config.stage_parameters == "layer_group" else owned)
        tuned.tuner.check_mask()
        tuned.train()
        stage = tuned.stage(depth)
        assert tuned.layers_of(stage.tensors) == owned and len(stage.heads) == len(rest)
        stages.append(stage)


def test_owned_and_frozen_layers_together_are_the_prefix():
    tuned = Tuned("llama")
    for depth in (1, 2, 3, 4):
        owned, frozen = (
            owned_layers(tuned.config, tuned.layout, depth),
            frozen_layers(tuned.config, tuned.layout, depth),
        )
        assert (*frozen, *owned) and not set(frozen) & set(owned)
        assert sorted((*frozen, *owned)) == list(range(12 - 3 * depth, 12))


def test_training_a_stage_changes_nothing_else(tuned):
    parent = tuned.join(tuned.trained_path(1))
    tuned.tuner.begin(2, seed=2, parent=parent)
    before = {name: value.clone() for name, value in tuned.model.state_dict().items()}
    frozen, mine = tuned.tuner.frozen_fingerprints(), tuned.tuner.training_owned
    tuned.train()
    after = tuned.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    buffers = dict(tuned.model.named_buffers()).keys()
    assert changed == mine and frozen.keys() == (before.keys() | buffers) - mine
    tuned.tuner.check_frozen(frozen)


def test_beginning_twice_gives_the_same_bits_whatever_came_before(tuned):
    states = []
    for seed, noise in [(7, 1), (7, 2), (8, 1)]:
        torch.manual_seed(noise)
        tuned.tuner.begin(2, seed=3, parent=None)
        tuned.train(noise)
        tuned.tuner.begin(1, seed=seed, parent=None)
        states.append({name: value.clone() for name, value in tuned.model.state_dict().items()})
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_a_stage_begins_where_its_parent_stood(tuned):
    path = tuned.trained_path(2)
    stood, joined = tuned.logits(), tuned.join(path)
    parent = joined.tensors
    tuned.tuner.begin(3, seed=3, parent=joined)
    if tuned.config.stage_parameters != "all":
        prefix = {name: v for name, v in tuned.model.named_parameters() if ".prefix." in name}
        stored = {name.replace(".prefix.", "."): value for name, value in prefix.items()}
        assert same(stored, {name: value for name, value in parent.items() if "lora_" in name})
        assert not any(value.requires_grad for value in prefix.values())
    tensors = tuned.tuner.stage_tensors()
    heads = {name: value for name, value in tensors.items() if "lora_" not in name}
    assert same(heads, {name: value for name, value in parent.items() if "lora_" not in name})
    assert torch.allclose(tuned.logits(), stood, rtol=0, atol=2e-6)
    assert (stood - tuned.make()(**tuned.batch).logits).abs().max() > 0.01


def test_an_assembled_prefix_answers_as_the_model_stood(tuned):
    stages, stood = [], []
    for depth in (1, 2, 3):
        parent = tuned.join(stages) if stages else None
        tuned.tuner.begin(depth, seed=depth, parent=parent)
        tuned.train(depth)
        stages.append(tuned.stage(depth))
        stood.append(tuned.logits())
    for depth in (3, 1, 2):
        tuned.tuner.serve({"shard-00": tuned.join(stages[:depth])})
        assert torch.allclose(tuned.logits(), stood[depth - 1], rtol=0, atol=2e-6)
        assert not any(value.requires_grad for value in tuned.model.parameters())
    assert (stood[0] - stood[1]).abs().max() > 1e-3 and (stood[1] - stood[2]).abs().max() > 1e-3


def test_with_nothing_to_serve_the_base_answers(tuned):
    tuned.trained_path(2)
    tuned.tuner.serve({})
    assert torch.equal(tuned.logits(), tuned.make()(**tuned.batch).logits)


def test_members_are_served_in_turn_each_with_its_head(tuned):
    first = tuned.join(tuned.trained_path(1))
    stood = tuned.logits()
    tuned.tuner.begin(1, seed=99, parent=None)
    tuned.train(99, steps=3)
    second, other = tuned.stage(1), tuned.logits()
    tuned.tuner.serve({"shard-00": first, "shard-01": second})
    for name, expected in [("shard-00", stood), ("shard-01", other), ("shard-00", stood)]:
        tuned.tuner.activate(name)
        assert torch.equal(tuned.logits(), expected)
    assert not torch.equal(stood, other)


def test_a_stage_without_examples_changes_no_logit(tuned):
    parent = tuned.join(tuned.trained_path(1))
    stood = tuned.logits()
    tuned.tuner.begin(2, seed=2, parent=parent)
    tuned.tuner.empty_stage()
    if tuned.config.stage_parameters != "all":
        assert not any(value.any() for name, value in tuned.tuner.stage_tensors().items() if "lora_" in name)
    assert torch.allclose(tuned.logits(), stood, rtol=0, atol=2e-6)


def test_the_frozen_prefix_runs_without_dropout():
    tuned = Tuned("llama", lora_dropout=0.4)
    parent = tuned.join(tuned.trained_path(1))
    tuned.tuner.begin(2, seed=2, parent=parent)
    dropouts = {"default": set(), "prefix": set()}
    for module in tuned.model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            dropouts[name].add(getattr(dropout, "p", 0.0))
    assert dropouts == {"default": {0.4}, "prefix": {0.0}}


def test_the_size_of_a_stage_is_known_before_it_is_trained(tuned):
    for depth in (1, 3):
        tuned.tuner.begin(depth, seed=0, parent=None)
        stored = sum(value.numel() for value in tuned.tuner.stage_tensors().values())
        assert tuned.tuner.stage_numel(owned_layers(tuned.config, tuned.layout, depth)) == stored


# What others do to the mask


def resume(model, folder: Path) -> None:
    """What the Trainer does when it resumes."""
    model.save_pretrained(folder)
    model.load_adapter(folder, "default", is_trainable=True)
    model.set_adapter("default")


DISTURBANCES = {
    "resume": resume,
    "set_adapter": lambda model, folder: model.set_adapter("default"),
    "set_adapters": lambda model, folder: model.base_model.set_adapter(["default", "prefix"]),
    "train all": lambda model, folder: model.requires_grad_(True),
    "freeze": lambda model, folder: model.requires_grad_(False),
}


@pytest.mark.parametrize("what", DISTURBANCES)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_arming_restores_what_loading_and_switching_change(tmp_path, name, what):
    tuned = Tuned(name)
    parent = tuned.join(tuned.trained_path(1))
    tuned.tuner.begin(2, seed=2, parent=parent)
    tuned.train()
    trains = {key for key, value in tuned.model.named_parameters() if value.requires_grad}
    logits = tuned.logits()
    DISTURBANCES[what](tuned.model, tmp_path)
    disturbed = {key for key, value in tuned.model.named_parameters() if value.requires_grad}
    assert disturbed != trains or not torch.equal(tuned.logits(), logits)
    if disturbed != trains:
        with pytest.raises(IsolationError, match="parameters that train are not the stage's"):
            tuned.tuner.check_mask()
    tuned.tuner.arm(training=True)
    tuned.tuner.check_mask()
    assert {key for key, value in tuned.model.named_parameters() if value.requires_grad} == trains
    assert torch.equal(tuned.logits(), logits)


@pytest.mark.parametrize("change", ["one more", "one less", "none"])
def test_another_mask_is_noticed(change):
    tuned = Tuned("bert")
    tuned.tuner.begin(1, seed=0, parent=None)
    owned = tuned.tuner.adapter_parameters("default")
    if change == "one more":
        tuned.model.get_base_model().bert.pooler.dense.weight.requires_grad = True
    for value in list(owned.values())[: {"one more": 0, "one less": 1, "none": None}[change]]:
        value.requires_grad = False
    with pytest.raises(IsolationError, match="pooler" if change == "one more" else r"missing: \['base_model"):
        tuned.tuner.check_mask()


def test_another_optimizer_is_noticed():
    tuned = Tuned("bert")
    parent = tuned.join(tuned.trained_path(1))
    stale = torch.optim.SGD(list(tuned.tuner.adapter_parameters("default").values()))
    tuned.tuner.begin(2, seed=2, parent=parent)
    owned = list(tuned.tuner.adapter_parameters("default").values())
    tuned.tuner.check_optimizer(torch.optim.SGD(owned))
    tuned.tuner.check_optimizer(torch.optim.SGD([{"params": owned[:2]}, {"params": owned[2:]}]))
    more = [*owned, *tuned.tuner.adapter_parameters("prefix").values()]
    for optimizer, message in [
        (stale, f"holds {len(owned)} tensors that the stage does not own and lacks"),
        (torch.optim.SGD(owned[1:]), "holds 0 tensors that the stage does not own and lacks"),
        (torch.optim.SGD(more), f"holds {len(more) - len(owned)} tensors .* and lacks none of its own"),
    ]:
        with pytest.raises(IsolationError, match=message):
            tuned.tuner.check_optimizer(optimizer)


@pytest.mark.parametrize(
    "name", ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.3.attention.self.query.base_layer.weight"]
)
def test_a_changed_tensor_outside_the_stage_is_noticed(name):
    tuned = Tuned("bert")
    tuned.tuner.begin(1, seed=0, parent=None)
    before = tuned.tuner.frozen_fingerprints()
    with torch.no_grad():
        dict(tuned.model.get_base_model().named_parameters())[name][0, 0] += 1e-3
    with pytest.raises(
        IsolationError, match=f"changed 1 tensors that the stage does not own: base_model.model.{name}"
    ):
        tuned.tuner.check_frozen(before)


def test_tensors_of_another_shape_of_store_are_refused():
    tuned = Tuned("bert")
    path = tuned.trained_path(2)
    with pytest.raises(IsolationError, match="do not fit the layers of adapter 'prefix'"):
        tuned.tuner.begin(2, seed=0, parent=tuned.join(path))
    with pytest.raises(IsolationError, match="do not fit the layers of adapter 'shard-00': missing .*, surplus"):
        tuned.tuner.serve({"shard-00": path[1]._replace(config=path[0].config)})


# Plain artefacts


def test_stock_peft_answers_the_same_from_the_plain_config(tuned):
    whole = tuned.join(tuned.trained_path(2))
    tuned.tuner.serve({"shard-00": whole})
    logits = tuned.logits()
    config = json.loads(json_bytes(whole.config))
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    stock = get_peft_model(tuned.make(), LoraConfig(**config)).eval()
    report = set_peft_model_state_dict(stock, whole.tensors)
    assert not report.unexpected_keys
    assert torch.equal(stock(**tuned.batch).logits, logits)


PLAIN = """
import hashlib
from test_tuner import Tuned, json_bytes
print(hashlib.sha256(json_bytes(Tuned("llama", target_modules="all-linear").stage(1).config)).hexdigest())
"""


@pytest.mark.slow
def test_the_plain_config_is_the_same_bytes_in_every_process():
    tuned = Tuned("llama", target_modules="all-linear")
    first, second = (json_bytes(tuned.stage(1).config) for _ in range(2))
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    command = [sys.executable, "-c", PLAIN]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)

    assert first == second and printed.stdout.strip() == hashlib.sha256(first).hexdigest()


def test_a_base_tensor_is_read_once_and_known_to_the_next_stage(monkeypatch):
    tuned = Tuned("bert")
    parent = join(tuned.trained_path(1))
    tuned.tuner.begin(1, seed=0, parent=None)
    known = tuned.tuner.check_frozen(tuned.tuner.frozen_fingerprints())
    tuned.tuner.begin(2, seed=0, parent=parent)
    whole, read = tuned.tuner.frozen_fingerprints(), []
    look = lambda tensors: read.extend(tensors) or fingerprints(tensors)  # noqa: E731
    monkeypatch.setattr("hf_s3t.lora.tuner.fingerprints", look)
    assert tuned.tuner.frozen_fingerprints(known) == whole
    assert sorted(read) == sorted(name for name in whole if "lora_" in name or ".modules_to_save." in name)
    assert 0 < len(read) < len(whole) / 2
