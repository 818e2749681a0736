"""Seams of training that are no longer as expected: an error where a promise depends on one, else one warning.

Each test takes one thing away from another library, as an upgrade may.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraModel
from peft.tuners import tuners_utils
from transformers import BertForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerFast, Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

import models
from hf_s3t import CompatibilityError, DatasetError, S3TMixin, S3TTrainer, seams
from hf_s3t.lora.heads import draw_heads
from hf_s3t.lora.tuner import S3TModel, StageTuner
from hf_s3t.seams import arguments, overrides, trainer, tuners
from hf_s3t.seams import models as model_seams
from hf_s3t.seams.preparation import DIGEST_COLUMN, watched_preparation
from hf_s3t.seams.trainer import ATTRIBUTES, METHODS, PARAMETERS
from hf_s3t.store.recipe import bit_changing_arguments
from hf_s3t.training.callbacks import StageCallbackHandler
from hf_s3t.trunk.row_states import check_cache
from trainers import BASES, make_args, make_config, make_trainer, tensors_of

TRANSFORMERS = f"of transformers {__import__('transformers').__version__}"


def stages(path: Path) -> list[str]:
    """Folders of stages in a store."""
    return [str(found.parent.relative_to(path)) for found in path.glob("shard-*/**/adapter_model.safetensors")]


# The Trainer


def upstream(without: str = "", unused: str = "") -> type:
    """A Trainer that has, calls and uses all that ours need, but for one thing."""
    parameters = [name for name in PARAMETERS if name != without]
    used = [name for name in (*METHODS, *ATTRIBUTES) if name not in (unused, without)]
    code = f"def __init__(self, {', '.join(parameters)}): pass\n"
    code += "def train(self):\n" + "".join(f"    self.{name}\n" for name in used)
    code += "".join(f"def {name}(self): return super().{name}()\n" for name in METHODS if name != without)
    body: dict[str, Any] = {}
    exec(code, body)
    return type("Trainer", (), {name: value for name, value in body.items() if name != "__builtins__"})


def test_a_trainer_that_has_all_of_it():
    assert issubclass(type("Mine", (S3TMixin, upstream()), {}), S3TMixin)
    assert issubclass(type("Mine", (S3TMixin, Trainer), {}), S3TTrainer.__bases__)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_the_trainer_lacks_or_never_calls(name):
    with pytest.raises(CompatibilityError, match=rf"Trainer` has no method `{name}`\. hf_s3t needs .* {TRANSFORMERS}"):
        type("Mine", (S3TMixin, upstream(without=name)), {})
    with pytest.raises(CompatibilityError, match=rf"Trainer` never calls its method `{name}`\. .*\(promises 1, 5"):
        type("Mine", (S3TMixin, upstream(unused=name)), {})


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_the_trainer_does_not_use(name):
    with pytest.raises(CompatibilityError, match=f"Trainer` uses no attribute `{name}`"):
        type("Mine", (S3TMixin, upstream(unused=name)), {})


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_argument_that_is_refused_and_called_otherwise_now(name):
    with pytest.raises(CompatibilityError, match=f"Trainer` cannot be made with {name}"):
        type("Mine", (S3TMixin, upstream(without=name)), {})


@pytest.mark.parametrize("name", ["_train_stage", "_serve", "weights_loaded", "in_checkpoint"])
def test_a_method_of_the_trainer_that_ours_would_replace_by_chance(name):
    with pytest.raises(CompatibilityError, match=f"has a `{name}` now, which ours would replace"):
        type("Mine", (S3TMixin, type("Newer", (upstream(),), {name: lambda self: None})), {})


def test_a_real_trainer_whose_method_was_renamed(monkeypatch):
    """Of transformers itself, so that a subclass made by a user fails as it is made."""
    monkeypatch.setattr(Trainer, "_write_checkpoint", Trainer._save_checkpoint, raising=False)
    monkeypatch.delattr(Trainer, "_save_checkpoint")
    with pytest.raises(CompatibilityError, match="has no method `_save_checkpoint`"):
        type("Mine", (S3TMixin, Trainer), {})


def test_trainers_of_trl():
    trl = pytest.importorskip("trl")
    for name in ("SFTTrainer", "DPOTrainer", "RewardTrainer"):
        assert issubclass(type("Mine", (S3TMixin, getattr(trl, name)), {}), S3TMixin)


def decorated(function):
    def inner(self):
        return function(self)

    inner.__wrapped__ = function
    return inner


class Calls:
    """Uses names in every kind of place."""

    @staticmethod
    def static(self):
        return self._in_a_static_method()

    @property
    def shown(self):
        return self._in_a_property

    @decorated
    def below(self):
        return self._below_a_decorator()

    def outer(self):
        return [lambda item=item: item._inside_a_function() for item in self]

    def _only_itself(self):
        return super()._only_itself()


def test_where_a_name_may_be_used():
    for name in ("_in_a_static_method", "_in_a_property", "_below_a_decorator", "_inside_a_function"):
        assert overrides.uses([Calls], name)
    assert not overrides.uses([Calls], "_only_itself") and not overrides.uses([Calls], "_nowhere")


def test_checkpoints_in_a_folder_of_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.trainer.PREFIX_CHECKPOINT_DIR", "step")
    with pytest.raises(CompatibilityError, match=r"no checkpoint into checkpoint-1 but \['step-1'\]"):
        make_trainer(tmp_path, args={"save_strategy": "steps", "save_steps": 1}).train()
    assert not stages(tmp_path)


def test_noise_that_can_not_be_taken_back(tmp_path):
    made = make_trainer(tmp_path, args={"neftune_noise_alpha": 5.0})
    with pytest.raises(CompatibilityError, match="keeps no `neftune_hook_handle`"):
        made.remove_noise()
    make_trainer(tmp_path / "quiet").remove_noise()


@pytest.mark.parametrize("kept", [{}, {"scaler": None}])
def test_an_accelerator_that_keeps_its_state_elsewhere(kept):
    with pytest.raises(CompatibilityError, match=r"no attribute '\w+'.*`scaler` and `gradient_state`"):
        trainer.Pristine().restore(SimpleNamespace(**kept), [])


@pytest.mark.parametrize("event", ["on_train_begin", "on_pre_optimizer_step", "on_train_end"])
def test_an_event_that_the_guard_is_not_told_of(tmp_path, monkeypatch, event):
    monkeypatch.setattr(CallbackHandler, event, lambda self, args, state, control: control)
    with pytest.raises(CompatibilityError, match=f"told its callbacks nothing of {event}"):
        make_trainer(tmp_path).train()
    assert not stages(tmp_path)


def test_callbacks_that_are_not_in_a_list():
    with pytest.raises(CompatibilityError, match="has no list of `callbacks`"):
        StageCallbackHandler(SimpleNamespace(callbacks=None), [])


def test_a_handler_is_taken_over_whatever_it_is_made_with(tmp_path, monkeypatch):
    made = Trainer(models.tiny_llama(), make_args(tmp_path))
    made.callback_handler.more = 5
    monkeypatch.delattr(CallbackHandler, "__init__")
    assert StageCallbackHandler(made.callback_handler, []).more == 5


# What only comfort depends on


def no_call_event(monkeypatch):
    monkeypatch.delattr(CallbackHandler, "call_event")
    trainer.check_handler(SimpleNamespace(callbacks=[]))


def no_trackers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations", ModuleType("integrations"))
    assert trainer.tracker_classes([]) == ()


def no_logging_dir(monkeypatch):
    callback = TensorBoardCallback(tb_writer=object())
    vars(callback).pop("logging_dir", None)
    trainer.send_tensorboard(callback, "runs")


def no_shutdown(monkeypatch):
    loader, own = SimpleNamespace(_iterator=object()), trainer.TrainerSeam.end_workers
    handler = SimpleNamespace(train_dataloader=loader, eval_dataloader=None)
    own(SimpleNamespace(callback_handler=handler))


@pytest.mark.parametrize(
    "take_away, lost",
    [
        (no_shutdown, "five seconds for each"),
        (no_call_event, "`stage` in the arguments of callbacks"),
        (no_trackers, "one run for trackers"),
        (no_logging_dir, "tensorboard beside the store"),
    ],
)
def test_one_warning_names_what_is_lost(monkeypatch, caplog, take_away, lost):
    monkeypatch.setattr(seams, "_told", set())
    with caplog.at_level(logging.WARNING, "hf_s3t"):
        with monkeypatch.context() as patch:
            take_away(patch)
        with monkeypatch.context() as patch:
            take_away(patch)
    assert [lost in record.getMessage() for record in caplog.records] == [True]


# PEFT


def test_an_enum_that_takes_no_new_member(monkeypatch):
    class Closed(str):
        __members__: dict = {}

    monkeypatch.setattr(tuners, "PeftType", Closed)
    with pytest.raises(CompatibilityError, match=r"no attribute '_member_map_'.* \(promise 8\)"):
        tuners.add_peft_type("S3T")


def test_a_method_that_is_not_registered(monkeypatch):
    monkeypatch.setattr(tuners, "PEFT_TYPE_TO_TUNER_MAPPING", {})
    monkeypatch.setattr(tuners, "register_peft_method", lambda **kwargs: None)
    with pytest.raises(CompatibilityError, match="no tuner for S3T after it was registered"):
        tuners.register_tuner(make_config().peft_type, type(make_config()), S3TModel)


TUNER_METHODS = {
    "_pre_injection_hook": ("__init__", lambda self: None),
    "_prepare_adapter_config": ("inject_adapter", lambda self: self._check_target_module_exists()),
    "_check_target_module_exists": ("inject_adapter", lambda self: self._prepare_adapter_config()),
}
"""Who calls each in PEFT, and one that calls only what it called beside."""


@pytest.mark.parametrize("name", TUNER_METHODS)
def test_a_method_that_the_tuner_lacks_or_never_calls(monkeypatch, name):
    with monkeypatch.context() as patch:
        for cls in LoraModel.__mro__:
            if name in vars(cls):
                patch.delattr(cls, name)
        with pytest.raises(CompatibilityError, match=f"`peft.tuners.lora.model.LoraModel` has no method `{name}`"):
            type("Mine", (S3TModel,), {})
    monkeypatch.setattr(tuners_utils.BaseTuner, *TUNER_METHODS[name])
    with pytest.raises(CompatibilityError, match=f"LoraModel` never calls its method `{name}`"):
        type("Mine", (S3TModel,), {})


def test_an_adapter_that_lies_elsewhere(monkeypatch, tmp_path):
    made = make_trainer(tmp_path)
    monkeypatch.setattr(S3TModel, "is_target", lambda self, config, key: key.endswith("q_proj"))
    message = r"The adapter lies in model\.layers\.0.* was expected.*\(promise 1\)"
    with pytest.raises(CompatibilityError, match=message):
        made.train()
    assert not stages(tmp_path)


def test_parameters_that_are_called_otherwise(monkeypatch, tmp_path):
    made = make_trainer(tmp_path)
    stored = tuners.get_peft_model_state_dict

    def renamed(*args, **kwargs):
        return {name.replace("lora_A", "lora_down"): value for name, value in stored(*args, **kwargs).items()}

    monkeypatch.setattr(tuners, "get_peft_model_state_dict", renamed)
    with pytest.raises(CompatibilityError, match="An adapter has the parameters .*lora_A.*PEFT stores .*lora_B"):
        made.train()
    assert not stages(tmp_path)


def test_base_tensors_that_are_called_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(tuners, "base_name", lambda name: None if "lora_" in name else name)
    with pytest.raises(CompatibilityError, match="the base's tensors are called base_model.model"):
        make_trainer(tmp_path)


def test_active_adapters_that_can_not_be_set(monkeypatch, tmp_path):
    tuner: StageTuner = make_trainer(tmp_path).tuner
    with monkeypatch.context() as patch:
        patch.setattr(S3TModel, "active_adapter", property(lambda self: ["default"]), raising=False)
        with pytest.raises(CompatibilityError, match="has no setter.*`active_adapter` of the tuner"):
            tuners.set_active(tuner.model, ["other"])
    monkeypatch.setattr("peft.tuners.lora.LoraLayer.active_adapters", property(lambda self: ["other"]))
    with pytest.raises(CompatibilityError, match=r"A layer has \['other'\] active"):
        tuner.begin(1, 0, None)


def test_linear_layers_that_peft_does_not_name(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(tuners_utils, "_maybe_include_all_linear_layers", lambda config, model: config)
        with pytest.raises(CompatibilityError, match="all linear layers to be 'all-linear'"):
            make_trainer(tmp_path, config={"target_modules": "all-linear"})
    config = make_config(target_modules="all-linear")
    monkeypatch.delattr(tuners_utils, "_maybe_include_all_linear_layers")
    with pytest.raises(CompatibilityError, match="no attribute '_maybe_include_all_linear_layers'"):
        tuners.name_all_linear(config, BASES["llama"][0]())


def test_targets_that_are_matched_otherwise(monkeypatch):
    check = tuners._check_targeting.__wrapped__
    check()
    with monkeypatch.context() as patch:
        patch.setattr(tuners_utils, "check_target_module_exists", lambda config, path: path.endswith("b"))
        with pytest.raises(CompatibilityError, match=r"takes \['layers.1.b', .*'layers.11.b'.* for the targets"):
            check()
    monkeypatch.delattr(tuners_utils, "check_target_module_exists")
    with pytest.raises(CompatibilityError, match="no attribute 'check_target_module_exists'"):
        check()


def test_a_head_that_peft_adds_on_its_own(monkeypatch, tmp_path):
    monkeypatch.setitem(tuners.HEADS_BY_TASK, "SEQ_CLS", ("score",))
    with pytest.raises(CompatibilityError, match=r"PEFT trains classifier whole, where nothing was expected\. Naming"):
        make_trainer(tmp_path, base="bert")
    assert make_trainer(tmp_path, base="bert", config={"modules_to_save": ["classifier"]}).tuner.layout.heads


# Models and tokenizers


@pytest.fixture
def headless(tmp_path):
    """A checkpoint without a classifier."""
    models.tiny_bert().bert.save_pretrained(tmp_path / "headless")
    return tmp_path / "headless"


def test_parameters_that_are_not_marked_when_they_are_loaded(monkeypatch, headless):
    model = BertForSequenceClassification.from_pretrained(headless)
    monkeypatch.setattr(model_seams, "_is_marked", lambda parameter: False)
    model_seams._marks_are_set.cache_clear()
    try:
        with pytest.raises(CompatibilityError, match=r"does not mark the parameters that it loads.*\(promise 4\)"):
            draw_heads(model, ("classifier",), 0)
        assert draw_heads(models.tiny_bert(), ("classifier",), 0) == {}  # it was not loaded
    finally:
        model_seams._marks_are_set.cache_clear()


def test_a_loaded_config_makes_a_model_without_marks(headless):
    config = PreTrainedConfig.get_config_dict(headless)[0]
    model = BertForSequenceClassification(models.tiny_bert().config.from_dict(config))
    model.config.name_or_path = str(headless)
    assert draw_heads(model, ("classifier",), 0) == {}


@pytest.mark.parametrize("method", [None, lambda module: None])
def test_a_head_that_is_not_drawn(headless, method):
    model = BertForSequenceClassification.from_pretrained(headless)
    model._init_weights = method
    with pytest.raises(CompatibilityError, match="'NoneType' .*method `_init_weights`|does not draw weight"):
        draw_heads(model, ("classifier",), 0)


def test_a_module_that_does_not_tell_whether_it_is_compiled(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.nn.Module, "_compiled_call_impl")
    with pytest.raises(CompatibilityError, match="no attribute '_compiled_call_impl'"):
        make_trainer(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_attention_kernel_that_is_not_known():
    with pytest.raises(CompatibilityError, match="no attribute '_attn_implementation'"):
        model_seams.computing_settings(SimpleNamespace(to_dict=dict))


def test_a_config_that_does_not_name_its_trunks(monkeypatch, tmp_path):
    model = BASES["llama"][0]()
    vars(model.config).pop("is_encoder_decoder", None)
    for cls in type(model.config).__mro__:
        if "is_encoder_decoder" in vars(cls):
            monkeypatch.delattr(cls, "is_encoder_decoder")
    with pytest.raises(CompatibilityError, match="no attribute 'is_encoder_decoder'"):
        check_cache("memory", None, False, make_config(), make_args(tmp_path), model)


def test_a_fast_tokenizer_without_its_backend(monkeypatch):
    for cls in PreTrainedTokenizerFast.__mro__:
        if "backend_tokenizer" in vars(cls):
            monkeypatch.delattr(cls, "backend_tokenizer")
    found = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    with pytest.raises(CompatibilityError, match="has no attribute backend_tokenizer"):
        model_seams.tokenizer_rules(found)


# Arguments

REFUSED = (
    "accelerator_config", "auto_find_batch_size", "bf16_full_eval", "deepspeed", "fp16_full_eval", "fsdp",
    "ignore_data_skip", "parallelism_config", "torch_compile", "use_liger_kernel",
)  # fmt: skip
REFUSED_BY_THE_CACHE = ("neftune_noise_alpha",)


def forget(monkeypatch, name: str) -> None:
    """Arguments have no field of this name."""
    fields = dataclasses.fields
    monkeypatch.setattr(arguments, "fields", lambda cls: [field for field in fields(cls) if field.name != name])


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_that_can_not_be_refused_any_more(monkeypatch, tmp_path, name):
    forget(monkeypatch, name)
    with pytest.raises(CompatibilityError, match=rf"`TrainingArguments` have no `{name}`.*\(promises 1 and 4\)"):
        make_trainer(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dispatch_batches", "use_seedable_sampler"])
def test_a_setting_of_loaders_that_can_not_be_refused_any_more(tmp_path, name):
    args = make_args(tmp_path)
    args.accelerator_config = SimpleNamespace(dispatch_batches=None, use_seedable_sampler=None)
    delattr(args.accelerator_config, name)
    with pytest.raises(CompatibilityError, match=f"no attribute '{name}'.* arguments that are refused"):
        S3TTrainer(BASES["llama"][0](), args, peft_config=make_config())


@pytest.mark.parametrize("name", REFUSED_BY_THE_CACHE)
def test_an_argument_that_the_cache_can_not_refuse_any_more(monkeypatch, tmp_path, name):
    forget(monkeypatch, name)
    with pytest.raises(CompatibilityError, match=f"`TrainingArguments` have no `{name}`"):
        make_trainer(tmp_path, activation_cache="memory")
    make_trainer(tmp_path)


@pytest.mark.parametrize("name", arguments.OF_TRL)
def test_an_argument_of_trl_that_can_not_be_refused_any_more(monkeypatch, tmp_path, name):
    trl = pytest.importorskip("trl")
    kind = arguments.OF_TRL[name]
    args = getattr(trl, kind)(str(tmp_path), report_to=[], use_cpu=True, activation_checkpointing=False)
    assert not arguments.setting(args, name)
    assert arguments.setting(make_args(tmp_path), name) is None
    forget(monkeypatch, name)
    with pytest.raises(CompatibilityError, match=f"`{kind}` has no `{name}`.* of trl"):
        arguments.setting(args, name)
    assert arguments.setting(make_args(tmp_path), name) is None


@pytest.mark.parametrize("name", ["log_margin", "eval_mixing", "do_sample_rows", "save_weighting"])
def test_a_new_argument_counts_whatever_its_name_begins_with(tmp_path, name):
    args = make_args(tmp_path)
    args.to_dict = lambda: {name: 0.5, "logging_steps": 3}
    assert bit_changing_arguments(args) == {name: 0.5}


def test_all_as_expected(tmp_path, caplog):
    """Nothing is told of a seam in the versions that are installed."""
    with caplog.at_level(logging.WARNING, "hf_s3t.seams"):
        made = make_trainer(tmp_path)
        made.train()
    assert len(stages(tmp_path)) >= 2 and all(isinstance(value, torch.Tensor) for value in tensors_of(made).values())
    assert not [record for record in caplog.records if record.name.startswith("hf_s3t.seams")]


# Preparation


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
@pytest.mark.parametrize("how", ["alone", "longest", "plain rows"])
def test_rows_that_are_prepared_with_others_are_told(form, how):
    def double(batch):
        return {"twice": [[2 * int(token) for token in row] for row in batch["tokens"]]}

    def pad(batch):
        longest = max(map(len, batch["tokens"]))
        return {"twice": [[int(token) for token in row] + [0] * (longest - len(row)) for row in batch["tokens"]]}

    tokens = [list(range(1 + row % 5)) for row in range(40)]
    rows = Dataset.from_dict({"tokens": tokens, DIGEST_COLUMN: list(range(40))}).with_format(form)
    before = Dataset.map
    with watched_preparation():
        if how == "longest":
            with pytest.raises(DatasetError, match="pad"):
                rows.map(pad, batched=True, keep_in_memory=True)
        elif how == "alone":
            assert len(rows.map(double, batched=True, keep_in_memory=True)) == 40
        else:
            rows.remove_columns(DIGEST_COLUMN).map(pad, batched=True, keep_in_memory=True)  # of no train set
    assert Dataset.map is before
