"""Promises 1 to 6 over the architectures of docs/models.md, and what else its table says that they can do."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_promises import (  # noqa: F401  the same tests, over the `world` of this file
    test_a_prefix_is_what_stood_when_its_stage_had_been_trained,
    test_a_stage_changes_what_it_owns_and_nothing_else,
    test_a_stage_stores_its_own_layers_and_heads,
    test_after_delete_nothing_served_ever_saw_the_example,
    test_delete_and_train_is_training_from_scratch_without_the_example,
    test_stock_peft_gives_a_prefix_the_logits_of_that_time,
    test_the_model_in_memory_forgets_too,
    test_the_order_of_the_rows_changes_no_bit,
)

from architectures import ARCHITECTURES
from hf_s3t import S3TEnsemble, S3TStore
from hf_s3t.lora.layout import find_layout
from hf_s3t.store.audit import verify
from trainings import World, assert_same_stores, make_trainer, outputs_of, probe, without

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text(encoding="utf-8")
COLUMNS = ("train", "delete and repair", "activation cache", "ensemble", "generate", "export")
TABLE = {
    cells[0]: dict(zip(COLUMNS, cells[2:], strict=True))
    for cells in (re.split(r" *\| *", line.strip("| ")) for line in re.findall(r"^\| `.*$", PAGE, re.M))
    if len(cells) == 2 + len(COLUMNS)
}
"""What the page says of each architecture, by its name: `yes`, `no`, or `-` where there is nothing to ask for."""

def of_brief(*names: str) -> list[object]:
    """Every architecture as a parameter; those that are not named are slow."""
    return [pytest.param(name, marks=[] if name in names else pytest.mark.slow) for name in ARCHITECTURES]


@pytest.fixture(scope="module", params=of_brief("t5"))
def world(request, tmp_path_factory):
    return World(ARCHITECTURES[request.param], "layer_group", tmp_path_factory.mktemp(request.param))


def test_the_page_tells_of_every_architecture_that_is_tried():
    assert sorted(name.strip("`") for name in TABLE) == sorted(ARCHITECTURES)
    assert {cell for row in TABLE.values() for cell in row.values()} <= {"yes", "in turn", "no", "-"}
    assert all(row[name] == "yes" for row in TABLE.values() for name in ("train", "delete and repair", "export"))


def test_the_code_of_the_page_runs():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(block, "docs/models.md", "exec"), names)
    layout = find_layout(ARCHITECTURES["bart"].make_model(), replace(names["config"], num_slices=3))
    assert layout.stack == "decoder.layers"


def says(name: str, column: str) -> str:
    return TABLE[f"`{name}`"][column]


# ---- the activation cache ----

CACHED = {"activation_cache": "memory", "eval_trunk": True, "args": {"bf16": False}}
"""With its base's dropout off below a stage."""
NOT_CACHED = "two trunks|without a row per example it is not known whose states depend on it"


@pytest.mark.parametrize("name", of_brief("whisper"))
def test_a_cached_trunk_is_repaired_to_the_same_bits_or_refused(name, tmp_path):
    world = World(ARCHITECTURES[name], "layer_group", tmp_path)
    if says(name, "activation cache") == "no":
        with pytest.raises(ValueError, match=f"(?:{NOT_CACHED}).*activation_cache='off'"):
            world.trainer(tmp_path / "out", **CACHED).train()
        return
    world.trainer(tmp_path / "out", **CACHED).train()
    S3TStore(tmp_path / "out").delete(ids=[world.victim])
    rest = without(world.rows, {world.victim})
    world.trainer(tmp_path / "out", rest, **CACHED).train()
    world.trainer(tmp_path / "scratch", rest, **CACHED).train()
    assert_same_stores(tmp_path / "out", tmp_path / "scratch")


# ---- several members ----


@pytest.fixture(scope="module", params=of_brief("bart", "qwen2-vl"))
def served(request, tmp_path_factory):
    """The name of an architecture, its store of two shards, and stock PEFT's model of each member."""
    case, path = ARCHITECTURES[request.param], tmp_path_factory.mktemp(request.param)
    make_trainer(path / "out", case, num_shards=2, num_slices=2).train()
    store, members = S3TStore(path / "out"), []
    for name in store.live().to_json()["served"]:
        store.export(path / name, prefix=name)
        members.append(PeftModel.from_pretrained(case.make_model(), path / name).eval())
    assert len(members) == 2
    return request.param, store, members


def probabilities_of(model, batch):
    return {name: value.double().softmax(-1) for name, value in outputs_of(model, batch).items()}


def mean_of(members, batch):
    """The mean of the members' probabilities, per kind of logits."""
    found = [probabilities_of(member, batch) for member in members]
    assert all(not torch.allclose(*(own[name] for own in found), atol=1e-4) for name in found[0])
    return {name: torch.stack([own[name] for own in found]).mean(0) for name in found[0]}


def test_several_members_answer_with_the_mean_of_their_probabilities(served):
    name, store, members = served
    case = ARCHITECTURES[name]
    assert verify(store).ok
    ensemble, batch = S3TEnsemble.from_pretrained(store, case.make_model()), probe(case)
    expected = mean_of(members, batch)
    for _ in range(2):  # the first answer finds out how, and is no other
        torch.testing.assert_close(probabilities_of(ensemble, batch), expected, atol=1e-5, rtol=1e-5)
    assert ensemble._members.batched == (says(name, "ensemble") == "yes")
    answered = probe(case, answers=True)
    with torch.no_grad():
        loss = ensemble(**answered).loss
    torch.testing.assert_close(loss.double(), loss_of(case, expected, answered), atol=1e-4, rtol=1e-4)


def loss_of(case, probabilities, batch):
    """The cross-entropy of probabilities: of the next token, of the same one, or of both ends of a span."""
    if "start_positions" in batch:
        pairs = [(probabilities[f"{end}_logits"], batch[f"{end}_positions"]) for end in ("start", "end")]
    elif case.config.get("task_type") == "CAUSAL_LM":
        pairs = [(probabilities["logits"][:, :-1], batch["labels"][:, 1:])]
    else:
        pairs = [(probabilities["logits"], batch["labels"])]
    nll = torch.nn.functional.nll_loss
    losses = [nll(found.log().flatten(0, -2), labels.flatten(), ignore_index=-100) for found, labels in pairs]
    return torch.stack(losses).mean()


@torch.no_grad()
def by_hand(members, batch, steps, decoder_start):
    """Greedy tokens of the mean of the members' probabilities, each computed on all tokens so far."""
    pairs = decoder_start is not None
    rows = len(next(iter(batch.values())))
    tokens = torch.full((rows, 1), decoder_start) if pairs else batch["input_ids"]
    for _ in range(steps):
        grown = {"decoder_input_ids": tokens} if pairs else {"input_ids": tokens}
        for mask in () if pairs else ("attention_mask", "mm_token_type_ids"):
            if mask in batch:
                new = torch.full((rows, tokens.shape[1] - batch[mask].shape[1]), int(mask == "attention_mask"))
                grown[mask] = torch.cat([batch[mask], new], dim=1)
        mean = mean_of(members, batch | grown)["logits"][:, -1]
        tokens = torch.cat([tokens, mean.argmax(-1, keepdim=True)], dim=1)
    return tokens[:, -steps:]


def test_several_members_generate_by_the_mean_of_their_probabilities(served):
    name, store, members = served
    case = ARCHITECTURES[name]
    ensemble = S3TEnsemble.from_pretrained(store, case.make_model())
    if says(name, "generate") == "-":
        with pytest.raises(AttributeError, match="generat"):
            ensemble.generate(**probe(case))
        return
    batch = {kind: value for kind, value in probe(case).items() if kind != "labels"}
    start = ensemble.config.decoder_start_token_id if ensemble.config.is_encoder_decoder else None
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ensemble.generation_config.eos_token_id = None
    expected = by_hand(members, batch, 5, start)
    for cached in (True, False):
        assert torch.equal(ensemble.generate(**batch, **settings, use_cache=cached)[:, -5:], expected), cached


@pytest.mark.parametrize(("name", "recorded"), [("mixtral", True), ("qwen2-vl", False), ("bart", False)])
def test_steps_are_recorded_where_nothing_runs_beside_the_layers(name, recorded, monkeypatch):
    """On devices that can: there a step is replayed with what the model noted of another one."""
    ensemble = S3TEnsemble(ARCHITECTURES[name].make_model(), {})
    assert not ensemble._members.records  # this is a CPU
    monkeypatch.setattr(ensemble._members.decoding, "records", lambda device: True)
    assert ensemble._members.records == recorded


def test_members_that_differ_in_an_encoder_do_not_generate(tmp_path):
    """Their encoder runs once for all of them; asked for one answer as a whole they give it."""
    case = ARCHITECTURES["t5"]
    options = {"num_shards": 2, "num_slices": 2, "layers_pattern": "encoder.block"}
    make_trainer(tmp_path / "out", case, **options).train()
    ensemble = S3TEnsemble.from_pretrained(tmp_path / "out", case.make_model())
    batch = probe(case)
    before = outputs_of(ensemble, batch)["logits"]
    with pytest.raises(ValueError, match=r"differ in the encoder \(encoder.block.1.*runs once.*export\(path, prefix"):
        ensemble.generate(input_ids=batch["input_ids"], max_new_tokens=2)
    states = ensemble.get_encoder()(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="differ in the encoder"):
        ensemble(encoder_outputs=states, **batch)
    ensemble.delete(slices=[(1, 0), (1, 1)])  # one member is left
    assert ensemble.generate(input_ids=batch["input_ids"], max_new_tokens=2).shape[0] == 4
    assert not torch.equal(outputs_of(ensemble, batch)["logits"], before)
