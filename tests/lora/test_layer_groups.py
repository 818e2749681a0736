"""Layer groups in models of every shape: by the whole number in a module's path, from the top, nothing outside."""

from __future__ import annotations

import ast
import re

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import architectures
from hf_s3t import S3TConfig
from hf_s3t.lora.adapter import split_layer_path
from hf_s3t.lora.heads import find_heads
from hf_s3t.lora.layout import find_layout
from models import tiny_bert, tiny_gpt2, tiny_llama, tiny_llama_12, tiny_roberta, tiny_vit

ATTENTION = {
    "llama": ("model.layers", ["q_proj", "v_proj"], tiny_llama, ("self_attn.q_proj", "self_attn.v_proj")),
    "gpt2": ("transformer.h", ["c_attn"], tiny_gpt2, ("attn.c_attn",)),
    "bert": ("bert.encoder.layer", ["query"], tiny_bert, ("attention.self.query",)),
    "roberta": ("roberta.encoder.layer", ["query"], tiny_roberta, ("attention.self.query",)),
    "vit": ("vit.layers", ["q_proj"], tiny_vit, ("attention.q_proj",)),
}


def config(**fields) -> S3TConfig:
    return S3TConfig(**{"num_slices": 2, "target_modules": "all-linear"} | fields)


@pytest.mark.parametrize("name", ATTENTION)
def test_layers_are_grouped_from_the_top_in_every_architecture(name):
    container, targets, make, suffixes = ATTENTION[name]
    model = make()
    layout = find_layout(model, config(target_modules=targets))
    layers = len(model.get_submodule(container))
    half = layers // 2
    assert layout.container == container
    assert layout.groups == (tuple(range(half, layers)), tuple(range(half)))
    assert layout.grouped_layers == tuple(range(layers))
    assert layout.targets == {layer: suffixes for layer in range(layers)}
    assert layout.suffixes == tuple(sorted(targets)) and layout.heads == ()
    assert all(isinstance(model.get_submodule(path), nn.Module) for path in layout.module_names([0, layers - 1]))


def test_layer_1_is_not_layers_10_and_11():
    layout = find_layout(tiny_llama_12(), config(num_slices=12, target_modules=["q_proj"]))
    assert layout.groups == tuple((layer,) for layer in reversed(range(12)))
    assert layout.module_names(layout.groups[10]) == {"model.layers.1.self_attn.q_proj"}
    assert layout.module_names(layout.groups[0]) == {"model.layers.11.self_attn.q_proj"}


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_roberta, tiny_vit])
def test_all_linear_is_every_linear_module_of_every_layer_and_nothing_else(make):
    model = make()
    layout = find_layout(model, config())
    linear = {
        path for path, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D") and
        any(part.isdigit() for part in path.split("."))
    }  # fmt: skip
    assert layout.module_names(layout.grouped_layers) == linear and len(linear) >= 4 * 4


@pytest.mark.parametrize(
    "fields, groups",
    [
        ({"num_slices": 4}, ((6, 7), (4, 5), (2, 3), (0, 1))),
        ({"num_slices": 3}, ((6, 7), (4, 5), (2, 3))),
        ({"num_slices": 5}, ((7,), (6,), (5,), (4,), (3,))),
        ({"num_slices": 8}, tuple((layer,) for layer in reversed(range(8)))),
        ({"num_slices": 2, "layers_per_slice": 1}, ((7,), (6,))),
        ({"num_slices": 2, "layers_per_slice": 3}, ((5, 6, 7), (2, 3, 4))),
        ({"num_slices": 1}, (tuple(range(8)),)),
    ],
)
def test_leftover_bottom_layers_belong_to_no_group(fields, groups):
    assert find_layout(tiny_llama(), config(**fields)).groups == groups


@pytest.mark.parametrize("kind", ["all", "rank_group"])
@pytest.mark.parametrize("slices", [3, 9])
def test_stages_of_all_layers_leave_none_out_whatever_their_number(kind, slices):
    layout = find_layout(tiny_llama(), config(num_slices=slices, stage_parameters=kind))
    assert layout.groups == (tuple(range(8)),)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_slices": 9}, "9 slices of 1 layers need 9 layers, but the model has 8. Use fewer slices .at most 8."),
        ({"num_slices": 3, "layers_per_slice": 3}, "3 slices of 3 layers need 9 .*or fewer layers for each"),
        ({"target_modules": ["absent"]}, "match no module in numbered layers"),
        ({"target_modules": ["lm_head"]}, "match no module in numbered layers"),
        ({"target_modules": ["q_proj", "lm_head"]}, "outside the numbered layers: lm_head"),
        ({"target_modules": r"model\.layers\.[01]\..*q_proj"}, r"match nothing in layers .*4, 5, 6, 7"),
        (
            {"target_modules": r"model\.layers\.([0-5]\..*q_proj|[67]\..*v_proj)"},
            "different modules in different layers",
        ),
        ({"modules_to_save": ["q_proj"]}, "modules inside the numbered layers: model.layers.0.self_attn.q_proj"),
    ],
)
def test_targets_that_make_no_stages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        find_layout(tiny_llama(), config(**fields))


def test_targets_outside_the_layers_are_refused_by_name_with_the_ways_out():
    with pytest.raises(
        ValueError, match="outside the numbered layers: bert.pooler.dense. .*exclude_modules.*modules_to_save"
    ):
        find_layout(tiny_bert(), config(target_modules=["dense"]))
    without = find_layout(tiny_bert(), config(target_modules=["dense"], exclude_modules=["pooler.dense"]))
    joined = find_layout(tiny_bert(), config(target_modules=["dense"], modules_to_save=["pooler"],
                                             exclude_modules=["pooler.dense"]))  # fmt: skip
    assert without.targets == joined.targets and len(without.targets[0]) == 3
    assert (without.heads, joined.heads) == ((), ("bert.pooler",))


def test_one_of_several_stacks_has_to_be_chosen():
    """By the end of its path, by modules that it alone has, or by what is excluded; stock PEFT finds it again."""
    bart, t5, vision = architectures.tiny_bart(), architectures.tiny_t5(), architectures.tiny_qwen2_vl()
    for model, targets, stacks in (
        (bart, ["q_proj"], ("model.decoder.layers", "model.encoder.layers")),
        (t5, ["q"], ("decoder.block", "encoder.block")),
        (vision, "all-linear", ("model.language_model.layers", "model.visual.blocks")),
    ):
        fields = {"num_slices": 2, "target_modules": targets}
        with pytest.raises(ValueError, match=f"several stacks: {', '.join(stacks)}.*numbers those of all") as found:
            find_layout(model, config(**fields))
        for advice in re.findall(r"`(layers_pattern|target_modules)=(.*?)`", str(found.value)):
            own = {advice[0]: ast.literal_eval(advice[1])}
            assert find_layout(model, config(**fields | own)).container == stacks[0]
        for stack in stacks:
            layout = find_layout(model, config(**fields, layers_pattern=stack))
            stock = LoraConfig(target_modules=list(layout.suffixes), layers_to_transform=[0, 1],
                               layers_pattern=layout.pattern)  # fmt: skip
            assert layout.container == stack
            assert _stock(model, stock) == layout.module_names([0, 1])
    with pytest.raises(ValueError, match="'coder.layers'. is the end of the path of no stack .* those are model.deco"):
        find_layout(bart, config(target_modules=["q_proj"], layers_pattern="coder.layers"))
    chosen = find_layout(bart, config(target_modules=["q_proj"], exclude_modules=r".*encoder\..*"))
    assert (chosen.container, chosen.stack) == ("model.decoder.layers", "decoder.layers")


def _stock(model, lora):
    return {path for path, _ in model.named_modules() if check_target_module_exists(lora, path)}


def test_fused_experts_are_refused_by_name_or_left_out_aloud(caplog):
    model = architectures.tiny_mixtral()
    for targets in (["experts"], ["q_proj", "gate_up_proj"]):
        with pytest.raises(ValueError, match="experts that are fused into one parameter: .*experts.gate_up_proj, "):
            find_layout(model, config(num_slices=3, target_modules=targets))
    layout = find_layout(model, config(num_slices=3, target_modules="all-linear"))
    assert layout.suffixes == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert "left out experts that are fused into one parameter (experts.down_proj, experts.gate_up" in caplog.text


def test_pefts_own_targets_are_used_where_none_are_named():
    assert find_layout(tiny_gpt2(), config(target_modules=None)).suffixes == ("c_attn",)
    model = tiny_llama()
    model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="no default `target_modules` for model type 'unheard-of'; name them"):
        find_layout(model, config(target_modules=None))


@pytest.mark.parametrize(
    "make, fields, heads",
    [
        (tiny_bert, {"task_type": "SEQ_CLS"}, ("classifier",)),
        (tiny_roberta, {"task_type": "SEQ_CLS"}, ("classifier",)),
        (tiny_bert, {}, ()),
        (tiny_vit, {"modules_to_save": ["classifier"]}, ("classifier",)),
        (tiny_bert, {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}, ("bert.pooler", "classifier")),
        (tiny_llama, {"task_type": "CAUSAL_LM"}, ()),
        (tiny_llama, {"modules_to_save": ["lm_head"]}, ("lm_head",)),
    ],
)
def test_heads_are_what_peft_saves_whole(make, fields, heads):
    assert find_heads(make(), config(**fields)) == heads
    stock = get_peft_model(make(), LoraConfig(target_modules=["q_proj", "query"], **fields))
    wrapped = {
        name.removeprefix("base_model.model.")
        for name, module in stock.named_modules()
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module")
    }
    assert wrapped == set(heads)


@pytest.mark.parametrize(
    "make, targets", [(tiny_bert, ["dense", "query"]), (tiny_llama_12, ["q_proj"]), (tiny_gpt2, ["c_proj"])]
)
def test_stock_peft_finds_the_same_modules_by_the_suffixes(make, targets):
    model = make()
    layout = find_layout(model, config(target_modules=targets, exclude_modules=["pooler.dense"]))
    layers = list(layout.groups[1])
    stock = LoraConfig(target_modules=list(layout.suffixes), layers_to_transform=layers,
                       layers_pattern=layout.pattern, fan_in_fan_out=make is tiny_gpt2)  # fmt: skip
    found = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in get_peft_model(model, stock).named_modules()
        if name.endswith(".lora_A")
    }
    assert found == layout.module_names(layers)


@pytest.mark.parametrize("targets", [["intermediate.dense", "output.dense"], "all-linear"])
def test_the_suffixes_alone_find_the_layout_again(targets):  # a store's reader has no more than them
    layout = find_layout(tiny_bert(), config(target_modules=targets))
    again = find_layout(tiny_bert(), config(target_modules=list(layout.suffixes)))
    assert again == layout and "bert.pooler.dense" not in layout.suffixes


@pytest.mark.parametrize(
    "path, parts",
    [
        ("model.layers.11.mlp.up_proj", ("model.layers", 11, "mlp.up_proj")),
        ("h.0", ("h", 0, "")),
        ("model.layers.1.experts.10.w1", ("model.layers", 1, "experts.10.w1")),
        ("classifier.out_proj", None),
        ("layer1.conv2", None),
    ],
)
def test_the_layer_is_the_first_number_in_a_path(path, parts):
    assert split_layer_path(path) == parts
