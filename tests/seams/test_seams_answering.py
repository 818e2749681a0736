"""Each seam of answering, when the other library is no longer as it was: a warning for speed, else an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, ModelOutput
from transformers.pipelines import base as pipelines

import models
from hf_s3t import CompatibilityError, S3TEnsemble
from hf_s3t.seams import answering
from hf_s3t.trunk.trunk import Trunk
from served import SHAPES, inputs_of, load, mean_probability, trained
from served import members as by_hand
from trainers import logits


def expected(shape: str = "llama") -> torch.Tensor:
    return mean_probability([logits(part, inputs_of(shape)) for part in by_hand(trained(shape), SHAPES[shape].build)])


def answer_of(ensemble: S3TEnsemble, shape: str = "llama") -> torch.Tensor:
    return logits(ensemble, inputs_of(shape))


def test_outputs_without_logits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.tiny_llama()
    ensemble = S3TEnsemble.from_pretrained(trained("llama"), base)
    forward = ensemble._members._forward

    def other(*args: Any, **kwargs: Any) -> ModelOutput:
        return CausalLMOutput(loss=forward(*args, **kwargs).logits.mean())

    monkeypatch.setattr(ensemble._members, "_forward", other)
    with pytest.raises(CompatibilityError, match="no logits"):
        answer_of(ensemble)


def test_a_model_without_its_loss_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble, inputs = load(trained("bert"), "bert"), inputs_of("bert")
    answer_of(ensemble, "bert")
    monkeypatch.delattr(PreTrainedModel, "loss_function")
    with pytest.raises(CompatibilityError, match="no attribute 'loss_function'"):
        ensemble(**inputs, labels=torch.zeros(len(inputs["input_ids"]), dtype=torch.long))


def test_a_model_that_does_not_say_whether_it_is_checkpointed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base = models.tiny_llama()
    base.model.layers[0] = torch.nn.Identity()
    monkeypatch.delattr(PreTrainedModel, "is_activation_checkpointing")
    monkeypatch.setattr(base, "get_base_model", lambda: base, raising=False)
    with pytest.raises(CompatibilityError, match="no attribute 'is_activation_checkpointing'"):
        Trunk(base, "model.layers").check_checkpointing(2)


def test_renamed_arguments_change_no_state_of_the_trunk() -> None:
    inputs, found = inputs_of("llama"), []
    for base in (models.tiny_llama(), models.renamed(models.tiny_llama())):
        base.get_base_model = lambda base=base: base
        trunk = Trunk(base, "model.layers")
        trunk.attach(5)
        with trunk.evaluating():
            states = trunk.states(inputs, [2, 5])
            given = list(states[2])
            found.append((*states.values(), trunk.states(inputs, [5], 2, given)[5]))
        trunk.detach()
    assert all(map(torch.equal, *found))
    assert torch.equal(found[1][1], found[1][2])


def test_pipelines_that_know_other_names_cost_a_clean_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(pipelines, "SUPPORTED_PEFT_TASKS")
    for _ in range(2):
        answering.introduce_to_pipelines("S3TEnsemble")
    assert caplog.text.count("SUPPORTED_PEFT_TASKS") == 1


def test_an_argument_of_one_dimension_that_nobody_knows_is_refused() -> None:
    ensemble, inputs = load(trained("llama"), "llama"), inputs_of("llama")
    with pytest.raises(ValueError, match="`positions` has 6 values for 6 rows"):
        ensemble(**inputs, positions=torch.arange(6))
