"""Joining and averaging against dense arithmetic: what an adapter adds to a weight is `scaling * B @ A`."""

from __future__ import annotations

import math

import pytest
import torch

from hf_s3t.lora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, average, is_lora, join, scaling_of, with_rank

IN, OUT = 6, 5
HEAD = "base_model.model.score.weight"


def name(layer: int, matrix: str, module: str = "q_proj") -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{matrix}.weight"


def adapter(seed, layers, r=2, lora_alpha=3, use_rslora=False, head=False, modules=("q_proj",)) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for module in modules:
            tensors[name(layer, "A", module)] = torch.randn(r, IN, generator=generator)
            tensors[name(layer, "B", module)] = torch.randn(OUT, r, generator=generator)
    if head:
        tensors[HEAD] = torch.randn(3, OUT, generator=generator)
    config = {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora, "layers_to_transform": list(layers)}
    return Adapter.from_tensors({**config, "auto_mapping": {"parents": ["x"]}, "lora_dropout": 0.1}, tensors)


def dense(one: Adapter, layer: int, module: str = "q_proj") -> torch.Tensor:
    """What an adapter adds to a weight, by the definition of LoRA and in fp64."""
    if name(layer, "A", module) not in one.tensors:
        return torch.zeros(OUT, IN, dtype=torch.float64)
    r, alpha = one.config["r"], one.config["lora_alpha"]
    scaling = alpha / (math.sqrt(r) if one.config["use_rslora"] else r)
    return scaling * one.tensors[name(layer, "B", module)].double() @ one.tensors[name(layer, "A", module)].double()


MEMBERS = {
    "alike": [adapter(0, [2, 3]), adapter(1, [2, 3])],
    "ranks": [adapter(0, [2, 3], r=2), adapter(1, [2, 3], r=4, lora_alpha=16), adapter(2, [2, 3], r=1)],
    "layers": [adapter(0, [3]), adapter(1, [1, 2, 3]), adapter(2, [2], r=3)],
    "modules": [adapter(0, [3], modules=("q_proj", "v_proj")), adapter(1, [3], modules=("v_proj",))],
    "rsLoRA": [adapter(0, [2, 3], r=4, use_rslora=True), adapter(1, [3], r=9, lora_alpha=1, use_rslora=True)],
}
every_kind = pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS.keys())


@every_kind
def test_the_average_adds_the_mean_of_what_its_members_add(members):
    root = average(members)
    assert root.scaling == 1 and root.config["lora_alpha"] == root.config["r"] == sum(m.config["r"] for m in members)
    assert root.config["use_rslora"] is False
    assert root.config["layers_to_transform"] == sorted(
        set().union(*(m.config["layers_to_transform"] for m in members))
    )
    for layer in range(5):
        for module in ("q_proj", "v_proj"):
            expected = sum(dense(member, layer, module) for member in members) / len(members)
            assert torch.allclose(dense(root, layer, module), expected, rtol=0, atol=2e-6)
            assert expected.any() == (name(layer, "A", module) in root.tensors)


@every_kind
def test_the_average_keeps_every_a_and_rounds_every_b_once(members):
    root = average(members)
    for key, value in root.tensors.items():
        start = 0
        assert value.dtype == torch.float32 and value.is_contiguous()
        for member in members:
            span = slice(start, start + member.config["r"])
            start = span.stop
            part = value[span] if ".lora_A." in key else value[:, span]
            if key not in member.tensors:
                assert not part.any()
            elif ".lora_A." in key:
                assert torch.equal(part, member.tensors[key])
            else:
                exact = member.tensors[key].double() * (member.scaling / len(members))
                assert torch.equal(part, exact.float())
        assert start == value.shape[0 if ".lora_A." in key else 1]


def test_the_average_of_one_is_itself_heads_included():
    one = adapter(0, [2, 3], head=True, use_rslora=True)
    assert average([one]) is one


@pytest.mark.parametrize(
    "members",
    [[], [adapter(0, [1], head=True), adapter(1, [1], head=True)], [adapter(0, [1]), adapter(1, [1], head=True)]],
)
def test_nothing_and_several_with_heads_have_no_average(members):
    assert average(members) is None


def test_averaging_changes_no_member():
    members = MEMBERS["layers"]
    before = [{key: value.clone() for key, value in member.tensors.items()} for member in members]
    average(members)
    assert all(
        torch.equal(old[key], member.tensors[key]) for old, member in zip(before, members, strict=True) for key in old
    )


def test_join_is_the_union_of_layer_groups_and_the_last_head():
    first, second = adapter(0, [3, 4], head=True), adapter(1, [1, 2], head=True)
    whole = join([first, second])
    assert whole.config["layers_to_transform"] == [1, 2, 3, 4]
    assert whole.config["auto_mapping"] is None and whole.config["lora_dropout"] == 0.1
    for layer in range(6):
        assert torch.equal(dense(whole, layer), dense(first, layer) + dense(second, layer))
    assert torch.equal(whole.tensors[HEAD], second.tensors[HEAD])
    assert whole.heads == {HEAD}
    assert first.config["layers_to_transform"] == [3, 4], "the stages stay as they are"


def test_join_of_stages_that_own_all_layers_is_the_last_one():
    stages = [adapter(seed, [1, 2, 3], head=True) for seed in range(3)]
    whole = join(stages)
    assert whole.tensors.keys() == stages[-1].tensors.keys()
    assert all(torch.equal(value, stages[-1].tensors[key]) for key, value in whole.tensors.items())


@pytest.mark.parametrize("use_rslora", [False, True])
def test_join_of_rank_groups_adds_what_the_stages_add(use_rslora):
    stages = [adapter(seed, [1, 2, 3], r=3, lora_alpha=7, use_rslora=use_rslora, head=True) for seed in range(4)]
    whole = join(stages, "rank_group")
    assert (whole.config["r"], whole.config["use_rslora"], whole.config["auto_mapping"]) == (12, False, None)
    assert whole.scaling == stages[0].scaling
    assert {tuple(value.shape) for key, value in whole.tensors.items() if key != HEAD} == {(12, IN), (OUT, 12)}
    for layer in range(5):
        expected = sum(dense(stage, layer) for stage in stages)
        assert torch.allclose(dense(whole, layer), expected, rtol=0, atol=1e-12)
    assert torch.equal(whole.tensors[HEAD], stages[-1].tensors[HEAD])
    assert stages[0].tensors[name(1, "A")].shape == (3, IN), "the stages stay as they are"


def test_the_scaling_stays_when_ranks_add_up():
    """Bit for bit; with rsLoRA, or a fraction, there may be no float whose quotient it is: then it is the next one."""
    inexact = 0
    for r in range(1, 33):
        for lora_alpha in (1, 2, 3, 5, 7, 16, 31, 64, 0.1):
            for use_rslora in (False, True):
                one = {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora}
                for count in range(1, 17):
                    joined = with_rank(one, count * r)
                    assert joined["r"] == count * r and joined["use_rslora"] is False
                    found, expected = scaling_of(joined), scaling_of(one)
                    if not use_rslora and lora_alpha != 0.1:
                        assert found == expected
                        assert repr(joined["lora_alpha"]) == str(lora_alpha * count)
                    assert abs(found - expected) <= math.ulp(expected)
                    inexact += found != expected
    assert inexact / (32 * 9 * 16) < 0.2


def test_heads_are_told_from_lora_matrices():
    assert is_lora(name(0, "A")) and is_lora(name(0, "B"))
    assert not is_lora(HEAD) and not is_lora("base_model.model.lora_head.weight")


def test_files_of_equal_adapters_differ_by_what_they_are_about():
    one = adapter(0, [1])
    files, again = (one.files({"stage": "shard-00/0", "parents": []}) for _ in range(2))
    other = one.files({"stage": "shard-01/0", "parents": []})
    assert files.keys() == {CONFIG_FILE, WEIGHTS_FILE}
    assert files == again
    assert files[WEIGHTS_FILE] != other[WEIGHTS_FILE] and files[CONFIG_FILE] == other[CONFIG_FILE]
