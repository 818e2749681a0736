"""`S3TEnsemble.from_pretrained`: what the members give, loaded one by one by stock PEFT and put together by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BertForQuestionAnswering

import models
from hf_s3t import Plan, S3TEnsemble, S3TStore, Stage, StoreError
from served import copy, inputs_of, load, members
from trainers import BASES, artefacts, batch, logits, make_trainer

ROWS = {"llama": models.llama_rows(12, seed=1), "bert": models.bert_rows(12, seed=1)}
BASE_NAMES = pytest.mark.parametrize("base", ["llama", "bert"])


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained store of three shards per base. Tests that delete take a copy."""
    folder = tmp_path_factory.mktemp("stores")
    for base in BASES:
        make_trainer(folder / base, base=base, config={"num_shards": 3}, args={"learning_rate": 3e-2}).train()
    return {base: folder / base for base in BASES}


def log_mean_softmax(parts: list[torch.Tensor]) -> torch.Tensor:
    """What an ensemble answers, from its members' logits, in double precision."""
    return torch.stack([part.double().softmax(-1) for part in parts]).mean(0).log().float()


# Logits


@BASE_NAMES
def test_logits_are_the_log_of_the_mean_probability(stores: dict[str, Path], base: str) -> None:
    inputs = batch(ROWS[base])
    parts = [logits(one, inputs) for one in members(S3TStore(stores[base]), BASES[base][0])]
    assert len(parts) == 3
    assert min((one - other).abs().max() for one in parts for other in parts if one is not other) > 1e-2
    ensemble = S3TEnsemble.from_pretrained(stores[base], BASES[base][0]())
    assert ensemble.members == ["shard-00", "shard-01", "shard-02"]
    torch.testing.assert_close(logits(ensemble, inputs), log_mean_softmax(parts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(ensemble, inputs).exp().sum(-1), torch.ones(parts[0].shape[:-1]))
    assert torch.equal(logits(ensemble, inputs), logits(ensemble, inputs))


@BASE_NAMES
def test_dead_shards_drop_out(stores: dict[str, Path], base: str, tmp_path: Path, caplog: Any) -> None:
    path, inputs, build = shutil.copytree(stores[base], tmp_path / "store"), batch(ROWS[base]), BASES[base][0]
    store = S3TStore(path)

    store.delete(slices=[(1, 0), (2, 1)])  # shard 1 is dead, shard 2 keeps a shorter prefix
    ensemble = S3TEnsemble.from_pretrained(path, build())
    assert ensemble.members == ["shard-00", "shard-02"] and store.served() == {0: (0, 1), 2: (0,)}
    parts = [logits(one, inputs) for one in members(store, build)]
    torch.testing.assert_close(logits(ensemble, inputs), log_mean_softmax(parts), atol=1e-5, rtol=1e-5)

    store.delete(slices=[(0, 0)])  # one member is left: no average, no rounding
    ensemble = S3TEnsemble.from_pretrained(path, build())
    (part,) = (logits(one, inputs) for one in members(store, build))
    assert torch.equal(logits(ensemble, inputs), part)

    store.delete(slices=[(2, 0)])
    ensemble = S3TEnsemble.from_pretrained(path, build())
    assert "the bare base model answers" in caplog.text
    assert ensemble.members == [] and torch.equal(logits(ensemble, inputs), logits(build(), inputs))


def test_a_shard_that_came_later_has_no_slot(tmp_path: Path) -> None:
    """It is named, those that were loaded go on, and a deletion is obeyed all the same."""
    store = copy("llama-rank", tmp_path)
    whole, orders = store.manifest(), [(0, 1, 2), (2, 0)]
    stages = {stage: files for stage, files in whole.stages.items() if stage.shard < 2}
    store.write_manifest(replace(whole, plan=Plan.make(2, 3, orders), stages=stages))
    ensemble = load(store, "llama-rank")
    store.write_manifest(whole)
    with pytest.raises(StoreError, match=r"has shards now that were not loaded: \[2\]. Load it anew"):
        ensemble.refresh()
    assert ensemble.members == ["shard-00", "shard-01"]
    ensemble.delete(slices=[(0, 1)])
    assert [slot.path[-1][0].name for slot in ensemble._state.held.values()] == ["shard-00/2-0", "shard-01/0-1-2"]
    assert ensemble.generation == 1 and len(load(store, "llama-rank").members) == 3


def test_each_prefix_answers_with_its_own_head(stores: dict[str, Path]) -> None:
    ensemble, store = S3TEnsemble.from_pretrained(stores["bert"], models.tiny_bert()), S3TStore(stores["bert"])
    name = "base_model.model.classifier.weight"
    for shard, slot in ensemble._state.held.items():
        assert torch.equal(slot.tensors[name], store.read_stage(Stage(shard, (0, 1))).tensors[name])
    heads = torch.stack([slot.tensors[name] for slot in ensemble._state.held.values()])
    assert len(heads.unique(dim=0)) == 3


def test_a_loss_comes_with_labels(stores: dict[str, Path]) -> None:
    for base, rows in ROWS.items():
        inputs = batch(rows, 12)
        ensemble = S3TEnsemble.from_pretrained(stores[base], BASES[base][0]())
        parts = [logits(one, inputs) for one in members(S3TStore(stores[base]), BASES[base][0])]
        answer, labels = log_mean_softmax(parts), inputs["labels"]
        if base == "llama":
            answer, labels = answer[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        with torch.no_grad():
            output = ensemble(**inputs)
        expected = torch.nn.functional.nll_loss(answer, labels, ignore_index=-100)
        torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
        assert "loss" not in ensemble(input_ids=inputs["input_ids"])


@pytest.mark.brief("regression")
@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_values_and_independent_labels_are_averaged_as_what_they_are(tmp_path: Path, problem: str) -> None:
    count = 1 if problem == "regression" else 3
    build = partial(models.tiny_bert, num_labels=count, problem_type=problem)

    def relabel(rows: Any) -> Any:
        values = [[float(label == place) for place in range(count)] for label in rows["labels"]]
        return rows.remove_columns("labels").add_column("labels", values)

    rows = relabel(models.bert_rows(24))
    varied = {"config": {"num_shards": 2}, "args": {"learning_rate": 3e-2}}
    trainer = make_trainer(tmp_path, base="bert", model=build(), train_dataset=rows, **varied)
    trainer.train()
    held_out = relabel(ROWS["bert"])
    inputs = batch(held_out, 12)
    parts = [logits(one, inputs) for one in members(trainer.store, build)]
    assert (parts[0] - parts[1]).abs().max() > 1e-2
    if problem == "regression":
        expected = torch.stack(parts).mean(0)
        loss = torch.nn.functional.mse_loss(expected, inputs["labels"])
    else:
        mean = torch.stack([part.double().sigmoid() for part in parts]).mean(0)
        expected = mean.logit().float()
        loss = torch.nn.functional.binary_cross_entropy(mean.float(), inputs["labels"])
    ensemble = S3TEnsemble.from_pretrained(tmp_path, build())
    torch.testing.assert_close(logits(ensemble, inputs), expected, atol=1e-5, rtol=1e-5)
    assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_a_base_of_another_config_is_named(stores: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    S3TEnsemble.from_pretrained(stores["bert"], models.tiny_bert())
    assert "config differs" not in caplog.text
    S3TEnsemble.from_pretrained(stores["bert"], models.tiny_bert(hidden_act="relu"))
    assert "the base model's config differs from that of the training (hidden_act)" in caplog.text


def test_what_torch_compile_returned_is_no_base(stores: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match=r"`torch\.compile` has compiled this model.*compile the ensemble"):
        S3TEnsemble.from_pretrained(stores["bert"], torch.compile(models.tiny_bert()))


@pytest.mark.slow
def test_a_compiled_ensemble_answers_and_forgets_as_one_that_is_not(tmp_path: Path) -> None:
    store, inputs = copy("llama", tmp_path), inputs_of("llama", 4)
    ensemble = load(store, "llama")
    compiled = torch.compile(ensemble)
    for gone in (None, (0, 1), (1, 0)):
        if gone is not None:
            ensemble.delete(slices=[gone])
        expected = logits(load(store, "llama"), inputs)
        torch.testing.assert_close(logits(compiled, inputs), expected, atol=1e-4, rtol=1e-4)


def test_an_answer_in_a_text_is_where_the_members_think_it_is(tmp_path: Path) -> None:
    def build() -> BertForQuestionAnswering:
        torch.manual_seed(0)
        return BertForQuestionAnswering(models.tiny_bert(num_labels=2).config)

    def asked(count: int, seed: int = 0) -> Any:
        rows = models.bert_rows(count, seed=seed).remove_columns("labels")
        places = [token % 5 for (token, *_) in rows["input_ids"]]
        return rows.add_column("start_positions", places).add_column("end_positions", [place + 2 for place in places])

    rows, config = asked(24), {"num_shards": 2, "task_type": "QUESTION_ANS"}
    trainer = make_trainer(tmp_path / "out", base="bert", model=build(), train_dataset=rows, config=config)
    trainer.train()
    held_out = asked(8, seed=1)
    inputs = batch(held_out, 8)
    with torch.no_grad():
        parts = [one(**inputs) for one in members(trainer.store, build)]
        output = S3TEnsemble.from_pretrained(tmp_path / "out", build())(**inputs)
    losses = []
    for side in ("start", "end"):
        expected = log_mean_softmax([part[f"{side}_logits"] for part in parts])
        torch.testing.assert_close(output[f"{side}_logits"], expected, atol=1e-5, rtol=1e-5)
        losses.append(torch.nn.functional.nll_loss(expected, inputs[f"{side}_positions"]))
    assert output.loss.item() == pytest.approx(sum(losses).item() / 2, rel=1e-5)
    assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    trainer.delete(ids=[rows["id"][3]])
    trainer.train()
    rest = rows.select([row for row in range(24) if row != 3])
    make_trainer(tmp_path / "scratch", base="bert", model=build(), train_dataset=rest, config=config).train()
    assert artefacts(tmp_path / "out") == artefacts(tmp_path / "scratch")


# Generation


@torch.no_grad()
def greedy_without_cache(parts: list[PeftModel], inputs: dict[str, torch.Tensor], new: int, pad: int, end: int) -> Any:
    """Greedy generation as one writes it down: the whole sequence through every member for every token."""
    rows = []
    for tokens, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        prompt = tokens[mask.bool()]  # a row by itself needs no padding
        added: list[int] = []
        while len(added) < new and end not in added:
            sequence = torch.cat([prompt, torch.tensor(added, dtype=torch.long)])[None]
            answers = [part(input_ids=sequence).logits[:, -1] for part in parts]
            added.append(int(log_mean_softmax(answers).argmax()))
        rows.append(added)
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def left_padded() -> dict[str, torch.Tensor]:
    """Prompts of 3 to 8 tokens, padded on the left."""
    tokens = batch(ROWS["llama"])["input_ids"][:, :8].clone()
    mask = torch.ones_like(tokens)
    for row, padding in enumerate([0, 5, 2, 4, 1, 3]):
        tokens[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def test_greedy_generation_is_the_loop_without_a_cache(stores: dict[str, Path]) -> None:
    inputs, build = left_padded(), BASES["llama"][0]
    parts = members(S3TStore(stores["llama"]), build)
    ensemble = S3TEnsemble.from_pretrained(stores["llama"], build())
    expected = greedy_without_cache(parts, inputs, 12, pad=0, end=-1)
    assert len(set(map(tuple, expected.tolist()))) == 6
    ensemble.model.generation_config.eos_token_id = None
    generated = ensemble.generate(**inputs, max_new_tokens=12)
    assert torch.equal(generated[:, :8], inputs["input_ids"])
    assert torch.equal(generated[:, 8:], expected)
    for part in parts:  # it is not what a member would say
        alone = greedy_without_cache([part], inputs, 12, pad=0, end=-1)
        assert not torch.equal(alone, expected)


@pytest.mark.brief("True")
@pytest.mark.parametrize("several", [False, True])
def test_a_row_that_ended_is_padded_and_generation_stops_with_the_last(stores: dict[str, Path], several: bool) -> None:
    inputs, build = left_padded(), BASES["llama"][0]
    parts = members(S3TStore(stores["llama"]), build)
    free = greedy_without_cache(parts, inputs, 12, pad=0, end=-1)
    end = int(free[0, 3])  # some row says it early, maybe others later or never
    expected = greedy_without_cache(parts, inputs, 12, pad=0, end=end)
    ensemble = S3TEnsemble.from_pretrained(stores["llama"], build())
    ensemble.model.generation_config.eos_token_id = [end, models.VOCABULARY - 1] if several else end
    if several:
        assert not (expected == models.VOCABULARY - 1).any()
    assert torch.equal(ensemble.generate(**inputs, max_new_tokens=12)[:, 8:], expected)
    assert (expected == 0).any()
    first = {name: value[:1] for name, value in inputs.items()}
    assert ensemble.generate(**first, max_new_tokens=12).shape == (1, 8 + int((free[0] == end).int().argmax()) + 1)


def test_generation_without_a_mask_takes_every_token(stores: dict[str, Path]) -> None:
    tokens = batch(ROWS["llama"])["input_ids"][:, :5]
    ensemble = S3TEnsemble.from_pretrained(stores["llama"], BASES["llama"][0]())
    masked = ensemble.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4)
    assert torch.equal(ensemble.generate(tokens, max_new_tokens=4), masked)


# Where the base comes from


def test_the_base_may_be_named(stores: dict[str, Path], tmp_path: Path) -> None:
    BASES["llama"][0]().save_pretrained(tmp_path / "base")
    inputs = batch(ROWS["llama"])
    given = S3TEnsemble.from_pretrained(stores["llama"], BASES["llama"][0]())
    named = S3TEnsemble.from_pretrained(str(stores["llama"]), str(tmp_path / "base"))
    assert torch.equal(logits(given, inputs), logits(named, inputs))
    with pytest.raises(ValueError, match="pass `base_model=`"):
        S3TEnsemble.from_pretrained(stores["llama"])


def test_neither_key_nor_state_is_needed(stores: dict[str, Path], tmp_path: Path) -> None:
    published = tmp_path / "published"
    shutil.copytree(stores["llama"], published, ignore=shutil.ignore_patterns(".s3t"))
    inputs = batch(ROWS["llama"])
    whole = S3TEnsemble.from_pretrained(stores["llama"], BASES["llama"][0]())
    public = S3TEnsemble.from_pretrained(published, BASES["llama"][0]())
    assert torch.equal(logits(whole, inputs), logits(public, inputs))
    assert not (published / ".s3t").exists()
