"""Steps of generation that are recorded and replayed.

CUDA's recorder needs a GPU (`benchmarks/gpu.py`). Here operations are recorded by `torch.fx` and replayed on the CPU:
everything else is the code that runs there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hf_s3t import S3TEnsemble
from hf_s3t.seams.answering import room_of
from hf_s3t.serving import decoding
from hf_s3t.serving.decoding import Decoding, Step
from served import ROUNDING, copy, load, prompts, shorten, trained

GENERATION = {"max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
STATIC = GENERATION | {"cache_implementation": "static"}


class FxRecording:
    """Operations as a graph of `torch.fx`, which reads and writes the tensors that the function did."""

    made: list[FxRecording] = []

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def record(self, function: Callable[[], Any]) -> Any:
        held = [value.clone() for value in self.cache._held()]
        outputs: list[Any] = []

        def run(token: torch.Tensor) -> list[torch.Tensor]:
            outputs.append(function())
            return [outputs[-1]["logits"]]

        self.graph = make_fx(run)(torch.zeros(1))
        self.cache.put_back(held)  # tracing computes, too
        self.output = outputs[0]
        self.output["logits"] = torch.zeros_like(self.graph(torch.zeros(1))[0])
        self.cache.put_back(held)
        return self.output

    def replay(self) -> None:
        self.replays += 1
        self.output["logits"].copy_(self.graph(torch.zeros(1))[0])


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., S3TEnsemble]:
    """Makes an ensemble record its steps."""
    monkeypatch.setattr(FxRecording, "made", [])
    step = Decoding.step

    def know(self: Decoding, cache: Any, *args: Any) -> Any:
        FxRecording.cache = cache
        return step(self, cache, *args)

    monkeypatch.setattr(Decoding, "step", know)

    def make(ensemble: S3TEnsemble) -> S3TEnsemble:
        ensemble._members.decoding.recorder = FxRecording
        return ensemble

    return make


@pytest.mark.parametrize("shape", ["llama", "gpt2", "llama-all", "llama-rank"])
def test_a_static_cache_gives_the_same_tokens(shape: str) -> None:
    ensemble = load(trained(shape), shape)
    found = ensemble.generate(**prompts(), **STATIC)
    assert torch.equal(found, ensemble.generate(**prompts(), **GENERATION))
    with pytest.raises(ValueError, match="cache_implementation='offloaded'"):
        ensemble.generate(**prompts(), **GENERATION, cache_implementation="offloaded")


@pytest.mark.parametrize("alive", [3, 2, 1])
def test_replayed_steps_give_the_same_tokens_and_outlive_a_deletion(
    alive: int, recorded: Any, tmp_path: Path
) -> None:
    store = copy("llama", tmp_path)
    dead = [(shard, slice_id) for shard in range(3 - alive) for slice_id in (0, 2)]
    if dead:
        store.delete(slices=dead)
    ensemble, plain = recorded(load(store, "llama")), load(store, "llama")
    for _ in range(2):
        assert torch.equal(ensemble.generate(**prompts(), **GENERATION), plain.generate(**prompts(), **GENERATION))
    (one,) = FxRecording.made
    assert one.replays == 6 + 7  # of 8 tokens the first is the prompt's and the second computed; then all 7
    before = plain.generate(**prompts(), **GENERATION)
    for model in (ensemble, plain):
        model.delete(slices=[(2, 1)])
        model.refresh()
    after = ensemble.generate(**prompts(), **GENERATION)
    assert torch.equal(after, plain.generate(**prompts(), **GENERATION)) and not torch.equal(after, before)
    assert FxRecording.made == [one] or alive < 3  # other members, another graph


@pytest.mark.parametrize("settings", [{"num_beams": 3, "do_sample": False}, {"do_sample": True, "top_k": 0}])
def test_beams_and_samples_are_replayed_too(settings: dict[str, Any], recorded: Any, tmp_path: Path) -> None:
    store = shorten(copy("llama", tmp_path))
    answers = []
    for ensemble in (load(store, "llama"), recorded(load(store, "llama"))):
        torch.manual_seed(0)
        answers.append(ensemble.generate(**prompts(4), **GENERATION, **settings))
    assert torch.equal(*answers)
    assert FxRecording.made[0].replays == 6


def test_it_can_be_switched_off(recorded: Any) -> None:
    ensemble = recorded(load(trained("llama"), "llama"))
    ensemble.decode_graphs = False
    ensemble.generate(**prompts(), **STATIC)
    assert FxRecording.made == [] and not ensemble.decode_graphs


def test_other_shapes_have_other_graphs_and_few_caches_are_kept(recorded: Any) -> None:
    ensemble = recorded(load(trained("llama-rank"), "llama-rank"))
    for count, new in ((6, 8), (2, 8), (6, 140), (6, 8)):
        ensemble.generate(**prompts(count), **GENERATION | {"max_new_tokens": new})
    assert len(FxRecording.made) == 4 and len(ensemble._members.decoding._idle) == decoding.IDLE
    for _, cache in ensemble._members.decoding._idle:
        assert not any(value.any() for value in cache._held())
        assert all(not step.output["logits"].any() for step in cache.steps.values())


def test_threads_do_not_share_a_cache() -> None:
    ensemble, met = load(trained("llama"), "llama"), threading.Barrier(2)
    seen: list[Any] = []

    members, serving = ensemble._members, ensemble._state.serving
    kept = members.decoding

    def use() -> None:
        with kept.cache("shape", lambda: next(iter(members.new_cache(serving, 8).values()))) as one:
            seen.append(one)
            met.wait(30)

    with kept.cache("shape", lambda: next(iter(members.new_cache(serving, 8).values()))):
        pass  # one waits for its next answer
    both = [threading.Thread(target=use) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert seen[0] is not seen[1] and len(kept._idle) == 2


def test_a_cache_that_is_returned_is_the_callers(recorded: Any) -> None:
    ensemble = recorded(load(trained("llama"), "llama"))
    output = ensemble.generate(**prompts(), **GENERATION, return_dict_in_generate=True)
    (cache,) = (value for value in output.values() if hasattr(value, "layers"))
    assert cache.layers[0].keys.any() and ensemble._members.decoding._idle == []
    assert len(FxRecording.made) == 1 and not cache.steps  # else the graph lives as long as what refers to itself


def test_what_can_not_be_recorded_is_computed(recorded: Any, caplog: pytest.LogCaptureFixture) -> None:
    ensemble = recorded(load(trained("llama"), "llama"))
    expected = load(trained("llama"), "llama").generate(**prompts(), **GENERATION)

    class Broken(FxRecording):
        def record(self, function: Callable[[], Any]) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    ensemble._members.decoding.recorder = Broken
    assert torch.equal(ensemble.generate(**prompts(), **GENERATION), expected)
    assert caplog.text.count("cannot be recorded (RuntimeError: operation not permitted") == 1
    assert len(FxRecording.made) == 1


def test_a_graph_that_misses_something_is_given_up(recorded: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A number that is no tensor, and another one at every step, is a constant in a graph."""
    answers = []
    for ensemble in (load(trained("llama"), "llama"), recorded(load(trained("llama"), "llama"))):
        counted = [0]

        def shift(module: Any, args: Any, output: torch.Tensor, counted: list[int] = counted) -> torch.Tensor:
            counted[0] += 1
            return output + 0.5 * counted[0]

        hook = ensemble.model.model.layers[7].mlp.down_proj.register_forward_hook(shift)
        answers.append(ensemble.generate(**prompts(), **GENERATION, output_logits=True, return_dict_in_generate=True))
        hook.remove()
    assert "replayed, it gives other logits" in caplog.text
    assert FxRecording.made[0].replays == 2


def test_layers_that_slide_are_not_recorded() -> None:
    ensemble = load(trained("llama"), "llama")
    cache = ensemble._members.new_cache(ensemble._state.serving, 8)
    (own,) = cache.values()
    assert not own.can_be_recorded  # nothing lies anywhere yet
    with torch.no_grad():
        ensemble(prompts()["input_ids"], **cache)
    assert own.can_be_recorded and own.length == decoding.BLOCK

    class Sliding(type(own.layers[0])):  # type: ignore[misc]
        pass

    own.layers[0].__class__ = Sliding
    assert not own.can_be_recorded


def test_room() -> None:
    prompt = torch.zeros(2, 5)

    class Defaults:
        num_beams, num_return_sequences, max_new_tokens, max_length = 1, None, None, None

    assert room_of({}, Defaults, prompt) == (2, 25)
    assert room_of({"max_new_tokens": 7, "num_beams": 3, "num_return_sequences": 2}, Defaults, prompt) == (6, 12)
    assert room_of({"max_length": 9, "num_return_sequences": 4}, Defaults, prompt) == (8, 14)


def test_a_step_has_tensors_of_its_own() -> None:
    slots, mask = torch.tensor([1, 0]), {"full": torch.ones(1)}
    step = Step(slots, {"mask": mask, "use_cache": True})
    slots.zero_()
    mask["full"].zero_()
    assert step.slots.tolist() == [1, 0] and step.kwargs["mask"]["full"].item() == 1 and step.kwargs["use_cache"]
    step.take(torch.tensor([2, 2]), {"mask": {"full": torch.full((1,), 5.0)}, "use_cache": True})
    assert step.slots.tolist() == [2, 2] and step.kwargs["mask"]["full"].item() == 5
    torch.testing.assert_close(step.kwargs["mask"]["full"], torch.tensor([5.0]), **ROUNDING)
