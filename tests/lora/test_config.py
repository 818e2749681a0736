"""What a user may set, what is refused and why, and that PEFT knows the type `S3T`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import hf_s3t.lora.config
from hf_s3t import S3TConfig, S3TModel
from hf_s3t.lora.config import BOOKKEEPING_FIELDS, LORA_FIELDS, REASONS, add_peft_type, register
from models import bert_rows, llama_rows, tiny_bert, tiny_llama

OWN = {
    "num_shards": 1,
    "num_slices": 4,
    "budget": None,
    "layers_per_slice": None,
    "sequence_selection": "spaced",
    "cost_budget": None,
    "deletion_prior": None,
    "stage_parameters": "layer_group",
    "replay": 1.0,
    "prune": True,
    "id_column": None,
    "group_column": None,
    "slice_columns": None,
    "data_derived": None,
    "stage_layers": None,
}
SUPPORTED = {
    "r": 4,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "target_modules": ["q_proj"],
    "exclude_modules": ["v_proj"],
    "modules_to_save": ["score"],
    "fan_in_fan_out": True,
    "init_lora_weights": "gaussian",
}
# A value for every field of LoraConfig that S3T does not have: each other than the default, and legal for PEFT alone.
REFUSED = {
    "bias": "lora_only",
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "trainable_token_indices": [1],
    "layer_replication": [(0, 2)],
    "use_dora": True,
    "lora_bias": True,
    "target_parameters": ["q_proj.weight"],
    "megatron_config": {"a": 1},
    "megatron_core": "another.core",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"cache_file": "x"},
    "lora_ga_config": {"x": 1},
    "velora_config": {"x": 1},
    "qalora_group_size": 32,
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "ensure_weight_tying": True,
    "arrow_config": {"x": 1},
    "use_bdlora": {"x": 1},
    "kasa_config": {"x": 1},
    "monteclora_config": {"x": 1},
}


def test_the_fields_and_their_defaults_are_those_of_the_design():
    own = {field.name: field.default for field in dataclasses.fields(S3TConfig)}
    inherited = {field.name for field in dataclasses.fields(LoraConfig)}
    assert {name: default for name, default in own.items() if name not in inherited} == OWN
    config, plain = S3TConfig(), LoraConfig()
    assert {name: getattr(config, name) for name in OWN} == OWN
    assert all(getattr(config, name) == getattr(plain, name) for name in LORA_FIELDS)


def test_every_field_of_its_own_is_documented_twice():
    for field in dataclasses.fields(S3TConfig):
        if field.name in OWN:
            assert field.metadata["help"].endswith(".") and re.search(rf"^ +{field.name} \(`", S3TConfig.__doc__, re.M)


def test_every_lora_field_is_supported_kept_by_peft_or_refused():
    known = {*LORA_FIELDS, *BOOKKEEPING_FIELDS}
    theirs = {field.name for field in dataclasses.fields(LoraConfig)}
    assert theirs == known | REFUSED.keys(), "peft has other fields now: the allow-list refuses new ones"
    assert set(LORA_FIELDS) == set(SUPPORTED) and set(REASONS) <= set(REFUSED)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(LoraConfig)])
def test_a_lora_field_works_or_is_refused_with_the_reason(field):
    if field in BOOKKEEPING_FIELDS:
        return
    if field in SUPPORTED:
        value = getattr(S3TConfig(**{field: SUPPORTED[field]}), field)
        assert value == (set(SUPPORTED[field]) if field in ("target_modules", "exclude_modules") else SUPPORTED[field])
        return
    config = S3TConfig()
    setattr(config, field, REFUSED[field])  # past PEFT's own checks, which refuse some combinations first
    reason = REASONS.get(field, "S3T has not been shown to keep its promises with it")
    with pytest.raises(ValueError) as caught:
        config._check_lora_fields()
    message = str(caught.value)
    assert f"does not support `{field}` (got {REFUSED[field]!r}): {reason}. Leave it at its default" in message
    assert all(name in message for name in LORA_FIELDS)


@pytest.mark.parametrize("field", ["bias", "use_dora", "rank_pattern", "trainable_token_indices", "layer_replication"])
def test_a_refused_field_is_refused_when_the_config_is_made(field):
    with pytest.raises(ValueError, match=f"does not support `{field}`"):
        S3TConfig(target_modules=["q_proj"], **{field: REFUSED[field]})


@pytest.mark.parametrize("value", [False, "pissa", "olora", "eva", "orthogonal", "pissa_niter_4"])
def test_initialisations_that_do_not_start_at_the_base_are_refused(value):
    with pytest.raises(ValueError, match=r"`init_lora_weights` must be True or 'gaussian'"):
        S3TConfig(init_lora_weights=value)


@pytest.mark.parametrize("field", ["num_shards", "num_slices", "budget", "layers_per_slice", "r"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True])
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"`{field}`"):
        S3TConfig(**{field: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"stage_parameters": "layer"}, "must be one of .'layer_group', 'rank_group', 'all'., got 'layer'"),
        ({"stage_parameters": "rank_group", "layers_per_slice": 2}, "`layers_per_slice` is 2, .*Leave it None"),
        ({"stage_parameters": "all", "layers_per_slice": 2}, "parameters='all' every stage .*Leave it None"),
        ({"replay": -0.1}, "`replay` must be a number from 0 to 1, got -0.1"),
        ({"replay": 1.01}, "`replay` must be a number from 0 to 1"),
        ({"replay": float("nan")}, "`replay` must be a number from 0 to 1"),
        ({"replay": "1"}, "`replay` must be a number from 0 to 1"),
        ({"replay": True}, "`replay` must be a number from 0 to 1"),
        ({"cost_budget": 10}, "`cost_budget` takes the place of `budget`, with `sequence_selection='optimal'`"),
        ({"cost_budget": 10, "sequence_selection": "optimal", "budget": 2}, "takes the place of `budget`"),
        ({"cost_budget": 9, "sequence_selection": "optimal"}, "`cost_budget` must be 10 or more, .* got 9"),
        ({"deletion_prior": [0.25] * 4}, "`deletion_prior` is for `sequence_selection` 'bms' and 'optimal'"),
        ({"deletion_prior": [0.5] * 2, "sequence_selection": "bms"}, "one number per slice, 4"),
        ({"deletion_prior": [0.5] * 4, "sequence_selection": "optimal"}, "sum to 1"),
        ({"sequence_selection": "best"}, "must be one of .*'bms', 'optimal'.* or orders, got 'best'"),
        ({"sequence_selection": []}, "list of orders is empty"),
        ({"sequence_selection": [[0, 0]]}, "names a slice twice"),
        ({"sequence_selection": [[4]]}, "must be an integer from 0 to 3, not 4"),
        ({"sequence_selection": [[0], [1]], "budget": 3}, "`budget` is 3 but 2 sequences are given"),
        ({"slice_columns": "shard"}, r"must name two columns, \(shard, slice\), got 'shard'"),
        ({"slice_columns": ("shard",)}, "must name two columns"),
        ({"slice_columns": ("a", "b", "c")}, "must name two columns"),
        ({"slice_columns": 2}, "must name two columns"),
        ({"slice_columns": ("a", 2)}, "must name two columns"),
        ({"slice_columns": ("a", "a")}, "must name two columns"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        S3TConfig(**fields)


@pytest.mark.parametrize(
    "fields, wanted",
    [
        ({}, 4),
        ({"num_slices": 6}, 6),
        ({"budget": 2}, 2),
        ({"sequence_selection": [[0, 1], (3,), [2, 0]]}, 3),
        ({"sequence_selection": [[0, 1], (3,)], "budget": 2}, 2),
    ],
)
def test_the_budget_follows_from_what_is_given(fields, wanted):
    config = S3TConfig(**fields)
    assert config.sequences_wanted == wanted
    if "sequence_selection" in fields:
        assert config.sequence_selection == [list(order) for order in fields["sequence_selection"]]


# Registration


def test_the_type_is_registered_with_peft():
    config = S3TConfig()
    assert config.peft_type is PeftType("S3T") is PeftType.S3T and config.peft_type == "S3T"
    assert "S3T" in PeftType.__members__ and PeftType.S3T in list(PeftType)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.S3T] is S3TConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.S3T] is S3TModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.S3T] == "lora_"


def test_registration_may_be_repeated():
    before = list(PeftType)
    assert add_peft_type("S3T") is PeftType.S3T
    register(S3TModel)
    assert list(PeftType) == before and PEFT_TYPE_TO_TUNER_MAPPING[PeftType.S3T] is S3TModel


def test_a_reload_of_the_module_is_harmless():
    kept = dict(vars(hf_s3t.lora.config))
    before = list(PeftType)
    try:
        importlib.reload(hf_s3t.lora.config)
        hf_s3t.lora.config.register(S3TModel)
        assert hf_s3t.lora.config.S3TConfig().peft_type is PeftType.S3T and list(PeftType) == before
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.S3T] is S3TConfig
    finally:  # other modules hold the classes of the first import
        vars(hf_s3t.lora.config).update(kept)


def test_a_config_survives_the_disk(tmp_path):
    config = S3TConfig(num_shards=2, num_slices=3, sequence_selection=[[0, 2], [1]], slice_columns=("m", "l"), r=3,
                       target_modules=["q_proj"], task_type="CAUSAL_LM", group_column="person", budget=2)  # fmt: skip
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_bytes())["peft_type"] == "S3T"
    for loaded in (PeftConfig.from_pretrained(tmp_path), S3TConfig.from_pretrained(tmp_path)):
        assert type(loaded) is S3TConfig
        same = {name: getattr(loaded, name) for name in (*OWN, *LORA_FIELDS)}
        assert same == {name: getattr(config, name) for name in (*OWN, *LORA_FIELDS)}


MODELS = {
    "llama": (tiny_llama, llama_rows, {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}),
    "bert": (tiny_bert, bert_rows, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_peft_makes_saves_and_loads_an_s3t_adapter(tmp_path, name):
    make, rows, fields = MODELS[name]
    batch = {
        key: torch.tensor(values[:]) for key, values in rows(3).remove_columns(["id", "person"]).to_dict().items()
    }
    model = get_peft_model(make(), S3TConfig(**fields, num_slices=2, init_lora_weights=True)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or "modules_to_save" in key:
                parameter.normal_(std=0.2)
        logits = model(**batch).logits
        assert not torch.allclose(logits, make()(**batch).logits, atol=1e-3)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
        assert torch.equal(loaded(**batch).logits, logits)
    assert isinstance(loaded.base_model, S3TModel) and isinstance(loaded.peft_config["default"], S3TConfig)
