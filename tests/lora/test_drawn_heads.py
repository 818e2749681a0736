"""Heads that a pretrained checkpoint lacks: drawn from the seed alone, and never lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification, BertModel, LlamaForCausalLM

from hf_s3t.lora.heads import draw_heads, freshly_initialized
from models import VOCABULARY, tiny_bert, tiny_llama


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> Path:
    """A checkpoint without a classifier, as pretrained models come."""
    path = tmp_path_factory.mktemp("headless")
    tiny_bert().bert.save_pretrained(path)
    return path


def drawn(path: Path, noise: int, seed: int = 3):
    torch.manual_seed(noise)
    model = BertForSequenceClassification.from_pretrained(path, num_labels=3)
    digests = draw_heads(model, ("classifier",), seed)
    return {name: value.clone() for name, value in model.state_dict().items()}, digests


def test_a_missing_head_is_drawn_from_the_seed_alone(headless):
    (first, digests), (second, again), (third, others) = (
        drawn(headless, 1),
        drawn(headless, 2),
        drawn(headless, 1, seed=4),
    )
    assert digests.keys() == {"classifier"} and same(first, second) and digests == again != others
    changed = {name for name in first if not torch.equal(first[name], third[name])}
    assert changed == {"classifier.weight"}
    assert first["classifier.weight"].std() > 0


def test_drawing_a_head_leaves_the_random_state_alone(headless):
    model = BertForSequenceClassification.from_pretrained(headless)
    torch.manual_seed(5)
    draw_heads(model, ("classifier",), 3)
    found = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(4))


def test_a_fresh_module_that_no_stage_stores_is_refused(headless, tmp_path):
    model = BertForSequenceClassification.from_pretrained(headless)
    assert freshly_initialized(model) == ["classifier"]
    with pytest.raises(ValueError, match=r"lacks weights for classifier, .*modules_to_save=\['classifier'\]"):
        draw_heads(model, (), 3)
    BertModel.from_pretrained(headless, add_pooling_layer=False).save_pretrained(tmp_path)
    poolerless = BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks weights for bert.pooler.dense, which"):
        draw_heads(poolerless, ("classifier",), 3)
    assert draw_heads(poolerless, ("classifier", "bert.pooler"), 3).keys() == {"bert.pooler.dense", "classifier"}


def test_what_was_resized_or_replaced_after_loading_is_not_drawn(tmp_path, caplog):
    tiny_llama(num_hidden_layers=2, tie_word_embeddings=False).save_pretrained(tmp_path)
    for change in ("resized", "replaced"):
        model = LlamaForCausalLM.from_pretrained(tmp_path)
        if change == "resized":
            model.resize_token_embeddings(VOCABULARY + 3)
        else:
            model.lm_head = torch.nn.Linear(*reversed(model.lm_head.weight.shape), bias=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert draw_heads(model, ("lm_head",), 3) == {}
        assert same(before, model.state_dict())
    assert "hf_s3t" not in caplog.text


def test_where_the_checkpoint_is_gone_nothing_is_drawn_and_the_log_says_so(headless, tmp_path, caplog):
    gone = shutil.copytree(headless, tmp_path / "gone")
    model = BertForSequenceClassification.from_pretrained(gone)
    shutil.rmtree(gone)
    assert draw_heads(model, ("classifier",), 3) == {}
    assert "a head that the checkpoint lacks is not drawn" in caplog.text


def test_a_head_of_another_size_than_the_checkpoints_is_drawn(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    torch.manual_seed(7)
    model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert draw_heads(model, ("classifier",), 3).keys() == {"classifier"}


def test_a_model_that_is_whole_or_built_from_a_config_is_taken_as_it_is(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    for model in (tiny_bert(), BertForSequenceClassification.from_pretrained(tmp_path)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert draw_heads(model, (), 3) == {} and freshly_initialized(model) == []
        assert same(before, model.state_dict())
