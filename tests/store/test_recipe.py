"""The recipe: what changes bits is in it, what does not is not, and nothing in it tells where it was made."""

from __future__ import annotations

import copy
import json
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    TrainingArguments,
    ViTImageProcessor,
    default_data_collator,
)

from hf_s3t import RecipeError, S3TConfig
from hf_s3t.lora.layout import find_layout
from hf_s3t.lora.tuner import StageTuner
from hf_s3t.store.base_identity import base_digest
from hf_s3t.store.recipe import (
    base_config,
    bit_changing_arguments,
    make_recipe,
    processing_digest,
    steering_by,
    unset_arguments,
)
from hf_s3t.store.recipe_differences import STRUCTURE, check_accept, check_same
from models import bert_rows, llama_rows, tiny_bert, tiny_gpt2, tiny_llama


def arguments(folder, **fields) -> TrainingArguments:
    return TrainingArguments(str(folder), **{"report_to": [], "use_cpu": True} | fields)


def recipe(folder, *, model=None, args=None, processing_class=None, base_id="me/base", heads=None, **fields):
    model = model or tiny_llama()
    config = S3TConfig(**{"num_slices": 2, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM"} | fields)
    layout, args = find_layout(model, config), arguments(folder, **args or {})
    return make_recipe(config, layout, config.id_column, args, model, processing_class, default_data_collator, base_id,
                       heads or {})  # fmt: skip


FIELDS = S3TConfig(num_slices=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def differences(stored, wanted) -> set[str]:
    try:
        check_same(stored, wanted)
    except RecipeError as error:
        return {line.split(":")[0].strip() for line in str(error).splitlines()[1:-1]}
    return set()


def test_a_recipe_is_plain_data_and_the_same_every_time(tmp_path):
    first = recipe(tmp_path / "a")
    assert json.loads(json.dumps(first)) == first == recipe(tmp_path / "b")
    assert first["config"]["groups"] == [[4, 5, 6, 7], [0, 1, 2, 3]] and first["base"]["id"] == "me/base"
    check_same(first, recipe(tmp_path / "b"))


def test_a_recipe_tells_neither_where_it_was_made_nor_a_token(tmp_path):
    args = {"hub_token": "hf_secret", "run_name": "my run", "hub_model_id": "me/x"}
    text = json.dumps(recipe(tmp_path / "out", args=args))
    for secret in (str(tmp_path), "hf_secret", "my run", "me/x", socket.gethostname() + "/", "runs/"):
        assert secret not in text


COUNTS = {
    "r": ({"r": 4}, "config.r"),
    "alpha": ({"lora_alpha": 3}, "config.lora_alpha"),
    "dropout": ({"lora_dropout": 0.1}, "config.lora_dropout"),
    "initial values": ({"init_lora_weights": "gaussian"}, "config.init_lora_weights"),
    "rsLoRA": ({"use_rslora": True}, "config.use_rslora"),
    "targets": ({"target_modules": ["q_proj"]}, "config.target_modules"),
    "excluded": ({"exclude_modules": ["v_proj"]}, "config.target_modules"),
    "groups": ({"layers_per_slice": 3}, "config.groups"),
    "kind": ({"stage_parameters": "all"}, "config.stage_parameters"),
    "head": ({"modules_to_save": ["lm_head"]}, "config.modules_to_save"),
    "shards": ({"num_shards": 2}, "partition.num_shards"),
    "group column": ({"group_column": "person"}, "partition.group_column"),
    "slice columns": ({"slice_columns": ("a", "b")}, "partition.slice_columns"),
    "id column": ({"id_column": "text"}, "partition.id_column"),
    "learning rate": ({"args": {"learning_rate": 1e-3}}, "arguments.learning_rate"),
    "epochs": ({"args": {"num_train_epochs": 1}}, "arguments.num_train_epochs"),
    "seed": ({"args": {"seed": 1}}, "arguments.seed"),
    "batch": ({"args": {"per_device_train_batch_size": 3}}, "arguments.per_device_train_batch_size"),
    "accumulation": ({"args": {"gradient_accumulation_steps": 2}}, "arguments.gradient_accumulation_steps"),
    "schedule": ({"args": {"lr_scheduler_type": "cosine"}}, "arguments.lr_scheduler_type"),
    "workers": ({"args": {"dataloader_num_workers": 2}}, "arguments.dataloader_num_workers"),
    "bf16": ({"args": {"bf16": True}}, "arguments.bf16"),
    "base id": ({"base_id": "me/other"}, "base.id"),
    "base": ({"model": tiny_llama(seed=1)}, "base.sha256"),
    "dropout of the base": ({"model": tiny_llama(attention_dropout=0.5)}, "base.config.attention_dropout"),
    "attention kernel": ({"model": tiny_llama(attn_implementation="eager")}, "base.config.attention"),
    "positions": (
        {"model": tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 9.0})},
        "base.config.rope_parameters.rope_theta",
    ),
    "drawn head": ({"heads": {"score": "0" * 64}}, "base.drawn_heads.score"),
    "tokenizer": ({"processing_class": ViTImageProcessor()}, "processing"),
}
SILENT = {
    "sequences": {"sequence_selection": "cyclic"},
    "orders": {"sequence_selection": [[1, 0], [0]]},
    "budget": {"budget": 1},
    "pruning": {"prune": False},
    "spelled out": {"layers_per_slice": 4},
    "other order": {"target_modules": ["q_proj", "v_proj"]},
    "by pattern": {"target_modules": r".*\.(q|v)_proj"},
    "logging": {"args": {"logging_steps": 1, "logging_first_step": True, "disable_tqdm": True}},
    "saving": {"args": {"save_strategy": "steps", "save_steps": 7, "save_total_limit": 1}},
    "evaluation": {"args": {"eval_strategy": "steps", "eval_steps": 5, "per_device_eval_batch_size": 2}},
    "trackers": {"args": {"run_name": "another"}},
    "pinning": {"args": {"dataloader_pin_memory": False}},
    "cache of keys": {"model": tiny_llama(use_cache=False)},
}


@pytest.mark.parametrize("fields, changed", COUNTS.values(), ids=COUNTS.keys())
def test_what_changes_bits_is_refused_by_name(tmp_path, fields, changed):
    head = {"base.sha256", "base.heads.lm_head", "base.num_labels"}
    also = {
        "arguments.bf16": {"mixed_precision"}, "config.modules_to_save": head,
        "config.stage_parameters": {"config.groups"},
    }  # fmt: skip
    assert differences(recipe(tmp_path), recipe(tmp_path, **fields)) == {changed} | also.get(changed, set())


@pytest.mark.parametrize("fields", SILENT.values(), ids=SILENT.keys())
def test_what_changes_no_bit_is_not_in_the_recipe(tmp_path, fields):
    assert recipe(tmp_path / "other", **fields) == recipe(tmp_path)


def test_slices_change_the_layer_groups(tmp_path):
    assert differences(recipe(tmp_path), recipe(tmp_path, num_slices=4)) == {"partition.num_slices", "config.groups"}


def test_the_evaluation_counts_where_it_chooses_the_weights(tmp_path):
    choosing = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    first = recipe(tmp_path, args=choosing | {"eval_steps": 5, "save_steps": 5})
    second = recipe(tmp_path, args=choosing | {"eval_steps": 10, "save_steps": 10})
    assert differences(first, second) == {"arguments.eval_steps", "arguments.save_steps"}
    assert "arguments.load_best_model_at_end" in differences(first, recipe(tmp_path))


def steered(folder, args=None, callbacks=(), rows=4):
    eval_dataset = None if rows is None else llama_rows(rows)
    return {"steering": steering_by(arguments(folder, **args or {}), callbacks, eval_dataset)}


PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
LOOKING = {"eval_strategy": "steps", "eval_steps": 5}


@pytest.mark.parametrize(
    ("first", "second", "changed"),
    [
        ({"args": PLATEAU | {"eval_steps": 5}}, {"args": PLATEAU | {"eval_steps": 9}},
         {"steering.arguments.eval_steps"}),
        ({"args": PLATEAU}, {"args": PLATEAU, "rows": 5}, {"steering.evaluation."}),
        ({"args": {"load_best_model_at_end": True} | LOOKING | {"save_strategy": "steps", "save_steps": 5}},
         {"args": {"load_best_model_at_end": True} | LOOKING | {"save_strategy": "steps", "save_steps": 5}, "rows": 5},
         {"steering.evaluation."}),
        ({"callbacks": [EarlyStoppingCallback(2)]}, {"callbacks": [EarlyStoppingCallback(3)]}, {"steering.callbacks"}),
        ({"callbacks": [EarlyStoppingCallback(2)]}, {"callbacks": [EarlyStoppingCallback(2)], "rows": 5},
         {"steering.evaluation."}),
        ({"callbacks": [EarlyStoppingCallback(2)]}, {}, {"steering"}),
        ({"args": LOOKING}, {"args": LOOKING | {"eval_steps": 10}, "rows": 5}, set()),
        ({"args": LOOKING}, {"rows": None}, set()),
    ],
)  # fmt: skip
def test_what_an_evaluation_steers_by_is_part_of_the_recipe(tmp_path, first, second, changed):
    made = recipe(tmp_path)
    first, second = made | steered(tmp_path, **first), made | steered(tmp_path, **second)
    assert differences(first, second) == changed
    check_same({name: value for name, value in first.items() if name != "steering"}, second)  # of an older version
    check_same(first, {name: value for name, value in second.items() if name != "steering"})


@pytest.mark.parametrize("metric, decides", [("accuracy", True), ("loss", False), ("eval_loss", False), (None, False)])
def test_what_computes_a_metric_that_decides_is_part_of_the_recipe(tmp_path, metric, decides):
    model, args = tiny_llama(), arguments(tmp_path, **PLATEAU, metric_for_best_model=metric)

    def made(metrics, steering):
        layout, collator = find_layout(model, FIELDS), default_data_collator
        return make_recipe(FIELDS, layout, None, args, model, None, collator, None, {}, (), False, steering, metrics)

    steering = steering_by(args, (), llama_rows(4))
    stored, other = (made((partial(weighted, scale=scale), None), steering) for scale in (2.0, 3.0))
    assert differences(stored, other) == ({"metrics.values"} if decides else set())
    assert made((weighted, None), None)["metrics"] is None
    older = {name: value for name, value in stored.items() if name != "metrics"}
    check_same(older, other)  # was written before anybody looked


def test_a_streamed_evaluation_set_counts_as_well(tmp_path):
    args = arguments(tmp_path, **PLATEAU)
    whole = steering_by(args, (), llama_rows(4))
    assert steering_by(args, (), llama_rows(4).to_iterable_dataset()) == whole
    assert steering_by(args, (), {"a": llama_rows(4), "b": llama_rows(5)})["evaluation"].keys() == {"a", "b"}


def test_fields_that_one_version_of_a_config_has_are_no_difference(tmp_path):
    stored, wanted = recipe(tmp_path), recipe(tmp_path)
    del stored["base"]["config"]["attention_dropout"], wanted["base"]["config"]["hidden_act"]
    check_same(stored, wanted)
    del stored["base"]["config"]
    check_same(stored, wanted)
    check_same(wanted, stored)


def test_special_tokens_count_where_no_tokenizer_names_them(tmp_path):
    other, words = tiny_llama(), tokenizer()
    other.config.pad_token_id = 5
    assert differences(recipe(tmp_path), recipe(tmp_path, model=other)) == {"base.config.pad_token_id"}
    check_same(*(recipe(tmp_path, model=model, processing_class=words) for model in (None, other)))


def test_the_kind_of_loss_that_a_first_step_finds_out_is_no_difference(tmp_path):
    model = tiny_bert()
    before = base_config(model)
    rows = bert_rows(2)
    model(input_ids=torch.tensor(rows["input_ids"]), labels=torch.tensor(rows["labels"]))
    assert model.config.problem_type is not None and "problem_type" not in before
    after = base_config(model)
    assert after.pop("problem_type") and after == before


def test_an_argument_that_was_never_heard_of_counts(tmp_path):
    @dataclass
    class Arguments(TrainingArguments):
        margin: float = 0.5

    first, second = (bit_changing_arguments(Arguments(str(tmp_path), report_to=[], margin=m)) for m in (0.5, 1.0))
    assert (first["margin"], second["margin"]) == (0.5, 1.0)


def test_the_folder_it_runs_in_does_not_matter(tmp_path, monkeypatch):
    before = recipe("out")
    for name in ("adamw_torch", "adamw_torch_fused", "linear", "random"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert recipe("out") == before


def test_the_message_shows_every_difference_and_the_way_out(tmp_path):
    with pytest.raises(RecipeError) as caught:
        check_same(recipe(tmp_path), recipe(tmp_path, r=4, args={"seed": 1}))
    message = str(caught.value)
    assert "\n  config.r: the store has 8, this run 4\n" in message
    assert "\n  arguments.seed: the store has 42, this run 1\n" in message
    assert "\nUse the stored settings, or train into another output_dir. These cannot change: config.r: " in message
    assert STRUCTURE["config"] in message and "accept_recipe" not in message
    with pytest.raises(RecipeError, match=r"go on with these: accept_recipe=\['arguments.seed'\]\. Stages"):
        check_same(recipe(tmp_path), recipe(tmp_path, args={"seed": 1}))


@pytest.mark.parametrize(
    "stored, wanted, found",
    [
        ({"a": 1}, {}, {"a"}),
        ({}, {"a": 1}, {"a"}),
        ({"a": {"b": 1}}, {"a": 1}, {"a"}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 2, "c": 2}}, {"a.b"}),
        ({"a": [1]}, {"a": [2]}, {"a"}),
        ({"a": [1]}, {"a": [1]}, set()),
    ],
)
def test_what_is_absent_or_of_another_kind_is_a_difference(stored, wanted, found):
    assert differences(stored, wanted) == found


# Digests


@pytest.mark.parametrize(
    "make, fields", [(tiny_llama, {}), (tiny_gpt2, {"fan_in_fan_out": True}), (tiny_bert, {"task_type": "SEQ_CLS"})]
)
def test_the_base_is_known_with_and_without_adapters(make, fields):
    digest = base_digest(make())
    model = get_peft_model(make(), S3TConfig(target_modules="all-linear", num_slices=2, **fields))
    assert base_digest(model) == digest
    tuner = StageTuner(model)
    tuner.begin(1, seed=0, parent=None)
    with torch.no_grad():
        for value in tuner.adapter_parameters("default").values():
            value.normal_()
    tuner.begin(2, seed=0, parent=None)
    assert base_digest(model) == digest != base_digest(make(seed=1))
    with torch.no_grad():
        next(iter(model.get_base_model().parameters())).view(-1)[0] += 1
    assert base_digest(model) != digest


def test_a_head_is_known_as_the_base_had_it_whatever_was_trained():
    head = tiny_bert().classifier
    fields = {"target_modules": ["query"], "num_slices": 2, "task_type": "SEQ_CLS"}
    model = get_peft_model(tiny_bert(), S3TConfig(**fields))
    StageTuner(model).begin(1, seed=0, parent=None)
    wrapped = model.get_base_model().classifier
    with torch.no_grad():
        wrapped.modules_to_save["default"].weight.normal_()
    assert base_digest(wrapped) == base_digest(head)


def tokenizer(words=("a", "b", "c"), **fields) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", **fields)


def test_a_tokenizer_is_known_by_what_it_does():
    digest = processing_digest(tokenizer())
    assert digest == processing_digest(tokenizer())
    others = [
        tokenizer(words=("b", "a", "c")),
        tokenizer(padding_side="left"),
        tokenizer(chat_template="{{ messages }}"),
        tokenizer(eos_token="c"),
    ]
    assert len({digest, *map(processing_digest, others)}) == 5


def test_using_a_tokenizer_does_not_change_its_digest():
    used = tokenizer()
    digest = processing_digest(used)
    used(["a b", "c"], padding="max_length", truncation=True, max_length=5, return_tensors="pt")
    assert processing_digest(used) == digest


def test_an_image_processor_is_known_by_its_settings():
    first, second = (ViTImageProcessor(size={"height": edge, "width": edge}) for edge in (8, 16))
    assert processing_digest(first) == processing_digest(copy.deepcopy(first)) != processing_digest(second)
    assert processing_digest(None) is None


def weighted(loss: Any, weights: Any, *, scale: float = 1.0) -> Any:
    return (loss * weights).sum() * scale


def closing_over(weights: Any) -> Any:
    return lambda loss: (loss * weights).sum()


@pytest.mark.parametrize(
    ("first", "other"),
    [
        (partial(weighted, weights=torch.tensor([1.0, 2.0])), partial(weighted, weights=torch.tensor([1.0, 3.0]))),
        (partial(weighted, weights=np.array([1.0])), partial(weighted, weights=np.array([2.0]))),
        (partial(weighted, scale=2.0), partial(weighted, scale=3.0)),
        (closing_over(torch.tensor([1.0])), closing_over(torch.tensor([2.0]))),
        (closing_over((1, "a")), closing_over((1, "b"))),
        (partial(closing_over(1.0)), partial(closing_over(2.0))),
    ],
)
def test_what_a_loss_was_given_is_part_of_the_recipe(tmp_path, first, other):
    def made(loss: Any) -> Any:
        model, collator = tiny_llama(), default_data_collator
        layout, args = find_layout(model, FIELDS), arguments(tmp_path)
        return make_recipe(FIELDS, layout, None, args, model, None, collator, None, {}, (None, loss))

    stored = made(first)
    check_same(stored, made(first))
    assert differences(stored, made(other)) == {"user_values.code"}
    older = {name: value for name, value in stored.items() if name != "user_values"}
    check_same(older, made(other))  # was written before anybody looked


# Versions that know other arguments


def of_another_version(made, *without, **more):
    """A recipe as a version makes it that knows other arguments; of those that it lacks nothing is on record."""
    known = {name: value for name, value in made["arguments"].items() if name not in without}
    unset = [path for path in made["unset"] if path.split(".")[1] not in without]
    return {**made, "arguments": {**known, **more}, "unset": unset}


def test_an_argument_that_a_newer_trainer_brought_is_no_difference_at_its_default(tmp_path):
    stored = of_another_version(recipe(tmp_path), "adam_beta1", "optim_args", "accelerator_config")
    check_same(stored, recipe(tmp_path))
    check_same({name: value for name, value in stored.items() if name != "unset"}, recipe(tmp_path))
    with pytest.raises(RecipeError, match=r"arguments\.adam_beta1: the store does not name it, this run has 0\.8"):
        check_same(stored, recipe(tmp_path, args={"adam_beta1": 0.8}))


def test_an_argument_that_went_is_no_difference_where_it_is_known_that_nobody_had_set_it(tmp_path):
    stored = of_another_version(recipe(tmp_path), of_an_older_one=1)
    with pytest.raises(RecipeError, match=r"arguments\.of_an_older_one: the store has 1, this run does not name it"):
        check_same(stored, recipe(tmp_path))
    check_same({**stored, "unset": ["arguments.of_an_older_one"]}, recipe(tmp_path))


def test_a_setting_inside_an_argument_may_come_with_a_version_as_well(tmp_path):
    stored = recipe(tmp_path)
    del stored["arguments"]["accelerator_config"]["even_batches"]
    stored["unset"].remove("arguments.accelerator_config.even_batches")
    check_same(stored, recipe(tmp_path))
    wanted = recipe(tmp_path, args={"accelerator_config": {"even_batches": False}})
    assert differences(stored, wanted) == {"arguments.accelerator_config.even_batches"}


def test_what_nobody_set_is_told_from_what_somebody_set(tmp_path):
    args = arguments(tmp_path, weight_decay=0.1, accelerator_config={"split_batches": True})
    unset = unset_arguments(args)
    assert {"arguments.learning_rate", "arguments.accelerator_config.even_batches"} <= {*unset}
    told = {"arguments.weight_decay", "arguments.accelerator_config.split_batches", "arguments.output_dir"}
    assert not told & {*unset} and "arguments.accelerator_config" not in unset
    check_same({**recipe(tmp_path), "unset": []}, recipe(tmp_path))  # no setting itself


# What may be accepted


def test_what_is_named_may_differ_and_nothing_else(tmp_path):
    stored, wanted = recipe(tmp_path), recipe(tmp_path, args={"weight_decay": 0.1, "seed": 1})
    (decay, seed) = sorted(check_same(stored, wanted, ["arguments.weight_decay", "arguments.seed", "processes"]))[::-1]
    assert decay == ("arguments.weight_decay", 0.0, 0.1) and seed == ("arguments.seed", 42, 1)
    for accept in (["arguments.weight_decay"], ["arguments"], ["weight_decay", "seed"]):
        with pytest.raises(RecipeError, match=r"arguments\.seed"):
            check_same(stored, wanted, accept)


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"r": 4}, "config.r"), ({"num_shards": 2}, "partition.num_shards"), ({"base_id": "me/x"}, "base.id"),
        ({"model": tiny_llama(attention_dropout=0.5)}, "base.config.attention_dropout"),
        ({"model": tiny_llama(seed=1)}, "base.sha256"),
    ],
)  # fmt: skip
def test_what_a_promise_rests_on_can_not_be_accepted(tmp_path, fields, setting):
    reason = STRUCTURE[setting.split(".")[0]]
    with pytest.raises(RecipeError, match=f"These cannot change: {setting}: {reason}"):
        check_same(recipe(tmp_path), recipe(tmp_path, **fields), [setting])
    with pytest.raises(ValueError, match=f"'{setting}' cannot be accepted: {reason}"):
        check_accept([setting])


def test_another_attention_kernel_may_be_accepted(tmp_path):
    wanted = recipe(tmp_path, model=tiny_llama(attn_implementation="eager"))
    assert check_same(recipe(tmp_path), wanted, ["base.config.attention"])


@pytest.mark.parametrize("accept", [True, "arguments.seed", None])
def test_single_settings_are_accepted_and_not_whatever_comes(accept):
    with pytest.raises(ValueError, match="must be a list of settings"):
        check_accept(accept)
