"""One batch for all members: the same numbers as member after member, and the shared trunk only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DynamicCache,
    LlamaConfig,
    LlamaForSequenceClassification,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TextStreamer,
    XLNetConfig,
    XLNetForSequenceClassification,
    pipeline,
)

import models
from hf_s3t import S3TEnsemble, S3TStore
from hf_s3t.seams.answering import caches_in
from hf_s3t.serving.averages import average_logits
from hf_s3t.serving.member_cache import MemberCache
from hf_s3t.serving.member_rows import Notes, OtherRows
from served import (
    ROUNDING,
    SHAPES,
    ByHand,
    copy,
    inputs_of,
    load,
    mean_probability,
    members,
    prompts,
    repeated,
    shorten,
    trained,
)
from trainers import logits

EXACT = {"atol": 0.0, "rtol": 0.0}
GENERATION = {"eos_token_id": None, "pad_token_id": 0}
WAYS = pytest.mark.parametrize("way", ["together", "in turn"])
UNEVEN = pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])


def store_of(shape: str, uneven: bool, folder: Path) -> S3TStore:
    """All prefixes at full depth, or prefixes of different depths and a dead shard."""
    return shorten(copy(shape, folder)) if uneven else S3TStore(trained(shape))


def choose(way: str, patch: pytest.MonkeyPatch) -> None:
    """Makes members answer in turn where they could answer together."""
    if way == "in turn":

        def refuse(notes: Notes, kind: str, rows: int, layer: int | None = None) -> None:
            raise OtherRows(f"{kind} is said to see other rows")

        patch.setattr(Notes, "check", refuse)


# Logits


@UNEVEN
@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_has_the_bits_of_its_members_one_by_one(
    shape: str, uneven: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_of(shape, uneven, tmp_path)
    parts, ensemble = members(store, SHAPES[shape].build), load(store, shape)
    logits(ensemble, inputs_of(shape))
    assert not [record for record in caplog.records if record.name in ("hf_s3t.serving.trial", "hf_s3t.seams")]
    assert len(parts) == len(ensemble.members) == 3 - uneven
    for count in (4, 6):  # 3 members x 4 rows is the number of tokens in a row
        inputs = inputs_of(shape, count)
        alone = [
            logits(part, repeated(inputs, len(parts)))[place * count :][:count] for place, part in enumerate(parts)
        ]
        assert (alone[0] - alone[1]).abs().max() > 0.1
        # Of a head that sees one position of a row, the last bits depend on the number of rows on some processors.
        bounds = ROUNDING if shape in ("bert", "bert-all", "roberta", "vit") else EXACT
        torch.testing.assert_close(logits(ensemble, inputs), mean_probability(alone), **bounds)
    mean = logits(load(store, shape, combine="logits"), inputs)
    torch.testing.assert_close(mean, torch.stack(alone).mean(0), **bounds)


@pytest.mark.parametrize("shape", ["llama", "llama-all", "gpt2", "bert", "vit"])
def test_in_turn_gives_the_same_bits(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, inputs = shorten(copy(shape, tmp_path)), inputs_of(shape)
    together = load(store, shape)
    logits(together, inputs)  # what takes no tokens is tried with its first batch
    choose("in turn", monkeypatch)
    in_turn = load(store, shape)
    logits(in_turn, inputs)
    calls = [count_rows(together), count_rows(in_turn)]
    torch.testing.assert_close(logits(together, inputs), logits(in_turn, inputs), **ROUNDING)
    assert [len(rows[3]) for rows in calls] == [1, 2]


@pytest.mark.parametrize("shape", ["llama", "gpt2", "bert", "vit"])
def test_one_row_is_equal_to_rounding(shape: str) -> None:
    inputs = {name: value[:1, :3] for name, value in inputs_of(shape).items()}
    parts = [logits(part, inputs) for part in members(trained(shape), SHAPES[shape].build)]
    torch.testing.assert_close(logits(load(trained(shape), shape), inputs), mean_probability(parts), **ROUNDING)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_masked_whatever_computes_the_attention(attention: str) -> None:
    given = prompts(4)
    given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    parts = [logits(part, given) for part in members(trained("llama"), SHAPES["llama"].build)]
    base = models.tiny_llama(attn_implementation=attention)
    ensemble = S3TEnsemble.from_pretrained(trained("llama"), base)
    assert base.config._attn_implementation == attention
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(logits(ensemble, given)[seen], mean_probability(parts)[seen], **ROUNDING)


def test_arguments_in_order_and_embeddings_are_taken() -> None:
    ensemble, inputs = load(trained("llama"), "llama"), inputs_of("llama")
    expected = logits(ensemble, inputs)
    with torch.no_grad():
        assert torch.equal(ensemble(inputs["input_ids"], inputs["attention_mask"]).logits, expected)
        embedded = ensemble.get_input_embeddings()(inputs["input_ids"])
        given = {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}
        assert torch.equal(ensemble(**given).logits, expected)
        for kept in (1, torch.tensor([0, 1, 4, 7, 9, 11])):  # one position; as many as there are rows
            chosen = [-1] if isinstance(kept, int) else kept
            torch.testing.assert_close(ensemble(**inputs, logits_to_keep=kept).logits, expected[:, chosen], **ROUNDING)


def by_peft(base: PreTrainedModel, **fields: Any) -> Any:
    """A model with two adapters, `"a"` and `"b"`, of random numbers, in its upper two layers."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=64, init_lora_weights=False, layers_to_transform=[2, 3], **fields)
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


_sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
_sizes |= {"vocab_size": models.VOCABULARY, "num_labels": 3}
_disentangled = {"relative_attention": True, "position_buckets": 8, "share_att_key": True}
_disentangled |= {"pos_att_type": ["p2c", "c2p"]}
_two_streams = {"d_model": 16, "n_layer": 4, "n_head": 2, "d_inner": 32, "num_labels": 3}
IN_TURN = {
    "positions in the place of rows": (
        lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**_sizes, **_disentangled)),
        {"target_modules": ["query_proj", "key_proj", "dense"], "task_type": "SEQ_CLS"},
    ),
    "rows after positions": (
        lambda: XLNetForSequenceClassification(XLNetConfig(vocab_size=models.VOCABULARY, **_two_streams)),
        {"target_modules": ["layer_1", "layer_2"], "layers_pattern": "layer", "task_type": "SEQ_CLS"},
    ),
    "no padding token": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**_sizes)),
        {"target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS"},
    ),
}


@pytest.mark.parametrize("case", IN_TURN)
def test_models_whose_rows_are_not_known_answer_in_turn(case: str) -> None:
    build, fields = IN_TURN[case]
    model = by_peft(build(), **fields)
    inputs = {"input_ids": inputs_of("bert")["input_ids"]}
    inputs = inputs if case != "no padding token" else {"input_ids": inputs["input_ids"][:1]}
    parts = []
    for name in "ab":
        model.set_adapter(name)
        parts.append(logits(model, inputs))
    assert (parts[0] - parts[1]).abs().max() > 1e-3
    ensemble = S3TEnsemble(model, {"a": 2, "b": 2})
    torch.testing.assert_close(logits(ensemble, inputs), mean_probability(parts), **ROUNDING)


def one_by_one(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean probability of the adapters `"a"` and `"b"`, each asked by itself."""
    parts = []
    for name in "ab":
        model.set_adapter(name)
        parts.append(logits(model, inputs))
    return mean_probability(parts)


def test_embeddings_of_a_members_own_share_no_trunk() -> None:
    base = models.tiny_llama(num_hidden_layers=4)
    model = by_peft(base, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    inputs = inputs_of("llama")
    heads = dict(model.get_base_model().model.embed_tokens.modules_to_save)
    heads["b"].load_state_dict(heads["a"].state_dict())
    ensemble = S3TEnsemble(model, {"a": 2, "b": 2})
    logits(ensemble, inputs)  # with equal embeddings a shared trunk would look right
    nn.init.normal_(heads["b"].weight)
    ensemble._stack.modules["model.embed_tokens"].hold(1, heads["b"])
    answer = logits(ensemble, inputs)
    ensemble.detach()
    torch.testing.assert_close(answer, one_by_one(model, inputs), **ROUNDING)


def test_a_renamed_argument_of_a_layer_changes_nothing() -> None:
    known = by_peft(models.tiny_llama(num_hidden_layers=4), target_modules=["q_proj"])
    other = by_peft(models.renamed(models.tiny_llama(num_hidden_layers=4)), target_modules=["q_proj"])
    inputs = inputs_of("llama")
    ensembles = [S3TEnsemble(model, {"a": 2, "b": 2}).eval() for model in (known, other)]
    for ensemble in ensembles:
        logits(ensemble, inputs)
    rows = [count_rows(ensemble) for ensemble in ensembles]
    assert torch.equal(*(logits(ensemble, inputs) for ensemble in ensembles))
    assert rows[0] == rows[1] == {0: [6], 1: [6], 2: [12], 3: [12]}
    tokens = [ensemble.generate(**prompts(), max_new_tokens=6, **GENERATION) for ensemble in ensembles]
    assert torch.equal(*tokens)


class Sealed:
    """A tensor with a row per example that cannot be seen from outside."""

    def __init__(self, value: torch.Tensor):
        self.value = value


def test_a_trunk_whose_arguments_can_not_be_cut_is_not_shared(caplog: pytest.LogCaptureFixture) -> None:
    base = models.tiny_llama(num_hidden_layers=4)
    for layer in base.model.layers:
        shift = lambda module, args, output: output + module.sealed.value  # noqa: E731
        layer.register_forward_hook(shift)

    def seal(module: Any, args: Any, kwargs: Any) -> None:
        rows = kwargs["input_ids"].float().mean(1)[:, None, None] / 20
        for layer in base.model.layers:
            layer.sealed = Sealed(rows)

    base.model.register_forward_pre_hook(seal, with_kwargs=True)
    model, inputs = by_peft(base, target_modules=["q_proj"]), inputs_of("llama")
    ensemble = S3TEnsemble(model, {"a": 2, "b": 2})
    logits(ensemble, inputs)
    assert "share no trunk" in caplog.text
    rows = count_rows(ensemble)
    answer = logits(ensemble, inputs)
    assert rows == {0: [12], 1: [12], 2: [12], 3: [12]}
    ensemble.detach()
    torch.testing.assert_close(answer, one_by_one(model, inputs), **ROUNDING)


def test_rows_that_depend_on_one_another_are_answered_in_turn(caplog: pytest.LogCaptureFixture) -> None:
    base = models.tiny_llama(num_hidden_layers=4)
    base.model.layers[3].register_forward_hook(lambda module, args, output: output + output.mean(0, keepdim=True))
    model, inputs = by_peft(base, target_modules=["q_proj"]), inputs_of("llama")
    ensemble = S3TEnsemble(model, {"a": 2, "b": 2})
    answers = [logits(ensemble, inputs), logits(ensemble, inputs)]
    assert caplog.text.count("answer one after the other") == 1
    ensemble.detach()
    for answer in answers:
        torch.testing.assert_close(answer, one_by_one(model, inputs), **ROUNDING)


def test_a_tuple_is_returned_where_one_is_asked_for() -> None:
    ensemble, inputs = load(trained("bert"), "bert"), inputs_of("bert")
    with torch.no_grad():
        answer = ensemble(**inputs, return_dict=False)
    assert isinstance(answer, tuple) and torch.equal(answer[0], logits(ensemble, inputs))


def test_average_of_probabilities_and_of_logits() -> None:
    parts = torch.tensor([[[0.0, 2.0, -1.0]], [[3.0, 0.0, 0.5]]])
    expected = parts.double().softmax(-1).mean(0).log()
    torch.testing.assert_close(average_logits(parts, "probabilities").double(), expected)
    assert torch.equal(average_logits(parts, "logits"), parts.mean(0))
    assert torch.equal(average_logits(parts, "probabilities", "regression"), parts.mean(0))
    large = torch.tensor([[[1e4, -1e4]], [[1e4, -1e4]]])
    assert torch.equal(average_logits(large, "probabilities"), torch.tensor([[0.0, -2e4]]))
    labels = average_logits(parts, "probabilities", "multi_label_classification")
    torch.testing.assert_close(labels.sigmoid(), parts.sigmoid().mean(0))
    with pytest.raises(ValueError, match="'mean'"):
        load(trained("llama"), "llama", combine="mean")


# What is computed how often


def count_rows(ensemble: S3TEnsemble) -> dict[int, list[int]]:
    """Rows that every layer answers, call by call."""
    base = ensemble._stack.base
    (layers,) = (module for module in base.modules() if isinstance(module, nn.ModuleList) and len(module) > 3)
    rows: dict[int, list[int]] = {index: [] for index in range(len(layers))}

    def note(index: int, output: Any) -> None:
        rows[index].append(len(output if isinstance(output, torch.Tensor) else output[0]))

    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda module, args, output, index=index: note(index, output))
    return rows


@pytest.mark.parametrize(
    ("shape", "uneven", "trunk"),
    [("llama", False, 2), ("llama", True, 2), ("gpt2", True, 2), ("bert", False, 1), ("roberta", True, 1)]
    + [("vit", True, 1), ("llama-all", False, 0), ("llama-all", True, 0)],
)
def test_layers_below_the_lowest_group_see_the_batch_once(
    shape: str, uneven: bool, trunk: int, tmp_path: Path
) -> None:
    ensemble = load(store_of(shape, uneven, tmp_path), shape)
    logits(ensemble, inputs_of(shape))  # what takes no tokens is tried with its first batch
    rows = count_rows(ensemble)
    logits(ensemble, inputs_of(shape))
    count = len(ensemble.members)
    assert count == 3 - uneven
    assert rows == {index: [6 if index < trunk else 6 * count] for index in rows}


def test_shorter_prefixes_leave_a_longer_trunk(tmp_path: Path) -> None:
    store, inputs = copy("llama", tmp_path), inputs_of("llama")
    store.delete(slices=[(shard, 1) for shard in range(3)] + [(0, 2)])  # (0,), (2, 0), (2, 0)
    ensemble = load(store, "llama")
    rows = count_rows(ensemble)
    logits(ensemble, inputs)
    assert rows == {index: [6 if index < 4 else 18] for index in range(8)}
    store.delete(slices=[(1, 0), (2, 0)])  # what is left of each has one group: layers 6 and 7
    assert store.served() == {0: (0,), 1: (2,), 2: (2,)}
    ensemble = load(store, "llama")
    rows = count_rows(ensemble)
    parts = [logits(part, repeated(inputs, 3)) for part in members(store, SHAPES["llama"].build)]
    expected = mean_probability([part[6 * place :][:6] for place, part in enumerate(parts)])
    assert torch.equal(logits(ensemble, inputs), expected)
    assert rows == {index: [6 if index < 6 else 18] for index in range(8)}


def test_the_base_is_held_once(tmp_path: Path) -> None:
    one, three = load(trained("llama"), "llama"), SHAPES["llama"].build()
    adapters = sum(value.numel() for name, value in one.named_parameters() if "lora_" in name)
    assert sum(value.numel() for value in one.parameters()) == adapters + sum(
        value.numel() for value in three.parameters()
    )
    assert not any(value.requires_grad for value in one.parameters())


def test_detached_the_base_answers_by_itself() -> None:
    ensemble, inputs = load(trained("bert"), "bert"), inputs_of("bert")
    expected, base = logits(ensemble, inputs), ensemble.model
    ensemble.detach()
    assert "forward" not in vars(base)
    assert {name: type(module) for name, module in base.named_modules()} == {
        name: type(module) for name, module in SHAPES["bert"].build().named_modules()
    }
    assert torch.equal(logits(base, inputs), logits(SHAPES["bert"].build(), inputs))
    assert not torch.equal(logits(base, inputs), expected)


# Generation


@pytest.mark.brief("llama-even-together", "llama-even-in turn", "llama-uneven-together", "gpt2-uneven-in turn")
@WAYS
@UNEVEN
@pytest.mark.parametrize("shape", ["llama", "gpt2", "llama-all"])
def test_greedy_generation_is_the_loop_over_members(
    shape: str, uneven: bool, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(shape, uneven, tmp_path)
    hand = ByHand(members(store, SHAPES[shape].build))
    expected = hand.greedy(prompts(), 8)
    assert hand.margin > 1e-4 and len(set(map(tuple, expected.tolist()))) > 1
    choose(way, monkeypatch)
    ensemble = load(store, shape)
    generated = ensemble.generate(**prompts(), max_new_tokens=8, **GENERATION)
    assert torch.equal(generated, torch.cat([prompts()["input_ids"], expected], dim=1))
    without = ensemble.generate(**prompts(), max_new_tokens=8, use_cache=False, **GENERATION)
    assert torch.equal(without, generated)


@pytest.mark.brief("llama-together", "gpt2-in turn")
@WAYS
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_sampling_draws_from_the_mean_probability(shape: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hand = ByHand(members(trained(shape), SHAPES[shape].build))
    choose(way, monkeypatch)
    ensemble = load(trained(shape), shape)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 8, **GENERATION}
    drawn = []
    for seed in range(3):
        torch.manual_seed(seed)
        drawn.append(ensemble.generate(**prompts(), **settings)[:, 8:])
        assert torch.equal(drawn[-1], hand.sampled(prompts(), 8, seed))
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.brief("llama-even-together", "llama-even-in turn", "llama-uneven-together")
@WAYS
@UNEVEN
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_beam_search_reorders_the_cache_of_every_member(
    shape: str, uneven: bool, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, given = store_of(shape, uneven, tmp_path), prompts(4)
    hand = ByHand(members(store, SHAPES[shape].build))
    expected = hand.beams(given, 6, 3)
    assert not torch.equal(expected[:, 0], hand.greedy(given, 6))
    choose(way, monkeypatch)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, **GENERATION}
    generated = load(store, shape).generate(**given, num_return_sequences=2, **settings)
    assert torch.equal(generated[:, 8:].unflatten(0, (4, 2)), expected[:, :2])


@pytest.mark.parametrize(("way", "copies"), [("together", [1, 1, 3, 3, 3, 3, 3, 3]), ("in turn", [1] * 24)])
def test_the_cache_has_the_rows_of_the_layers(way: str, copies: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    ensemble = load(trained("llama"), "llama")
    output = ensemble.generate(**prompts(), max_new_tokens=3, return_dict_in_generate=True, **GENERATION)
    (cache,) = caches_in(output).values()
    assert isinstance(cache, MemberCache)
    assert [len(layer.keys) for layer in cache.layers] == [6 * count for count in copies]
    assert {layer.keys.shape[2] for layer in cache.layers} == {10}


@WAYS
def test_a_forward_pass_goes_on_from_its_cache(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(way, monkeypatch)
    ensemble, inputs = load(trained("llama"), "llama"), inputs_of("llama")
    tokens = inputs["input_ids"]
    with torch.no_grad():
        whole = ensemble(tokens).logits
        beginning = ensemble(tokens[:, :7], use_cache=True)
        torch.testing.assert_close(beginning.logits, whole[:, :7], **ROUNDING)
        rest = ensemble(tokens[:, 7:], **caches_in(beginning))
    torch.testing.assert_close(rest.logits, whole[:, 7:], **ROUNDING)


def test_reordering_and_cropping_act_per_member() -> None:
    cache = MemberCache(SHAPES["llama"].build().config, [1, 3] + [1] * 6, turns=2)
    rows = {0: [0.0, 1.0], 1: [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]}
    for turn in (0, 1):
        with cache.turn(turn):
            for layer in range(8):
                values = torch.tensor(rows.get(layer, rows[0]))[:, None, None, None].repeat(1, 2, 3, 4)
                cache.update(values + 100 * turn, values + 100 * turn, layer)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.crop(-1)
    for turn in (0, 1):
        with cache.turn(turn):
            found = [cache.layers[layer].keys[:, 0, 0, 0] - 100 * turn for layer in (0, 1)]
            assert [part.tolist() for part in found] == [[1, 1], [1, 1, 11, 11, 21, 21]]
            assert torch.equal(cache.layers[1].keys, cache.layers[1].values)
            assert {layer.keys.shape[2] for layer in cache.layers} == {2}
    with pytest.raises(ValueError, match="Rows cannot be selected"):
        cache.batch_select_indices(torch.tensor([0]))


def test_other_caches_are_refused() -> None:
    ensemble = load(trained("llama"), "llama")
    own = [{name: DynamicCache()} for name in ("past_key_values", "cache")]
    for given in ({"cache_implementation": "offloaded"}, *own):
        with pytest.raises(ValueError, match="one row per example"):
            ensemble.generate(**prompts(), max_new_tokens=2, **given)
        if "cache_implementation" not in given:
            with pytest.raises(ValueError, match="one row per example"):
                ensemble(**prompts(), **given)
    assert ensemble.generate(**prompts(), max_new_tokens=2, **GENERATION).shape == (6, 10)


class Watch(LogitsProcessor):
    """Keeps the scores that generation chooses from."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores)
        return scores


def test_processors_see_the_probabilities_of_the_ensemble() -> None:
    watch, ensemble = Watch(), load(trained("llama"), "llama")
    generated = ensemble.generate(**prompts(), max_new_tokens=3, logits_processor=[watch], **GENERATION)
    hand = ByHand(members(trained("llama"), SHAPES["llama"].build))
    mask = torch.cat([prompts()["attention_mask"], torch.ones(6, 3, dtype=torch.long)], dim=1)
    for step, scores in enumerate(watch.seen):
        torch.testing.assert_close(scores, hand.scores(generated[:, : 8 + step], mask[:, : 8 + step]), **ROUNDING)
    assert len(watch.seen) == 3


# Pipelines


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>", "unk_token": "<3>"}
    words = [*special.values(), *(f"w{number}" for number in range(4, models.VOCABULARY))]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<3>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)


class Words(TextStreamer):
    """Keeps what it would print."""

    text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def test_a_pipeline_generates_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, new = ["w5 w9 w12", "w7 w8"], 5
    given = tokenizer(texts, return_tensors="pt", padding=True)
    hand = ByHand(members(trained("llama"), SHAPES["llama"].build))
    expected = hand.greedy({"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}, new)
    assert 2 not in expected  # nothing ends early
    ensemble = load(trained("llama"), "llama")
    generate = pipeline("text-generation", model=ensemble, tokenizer=tokenizer)
    settings = {"max_new_tokens": new, "do_sample": False, "return_full_text": False}
    found = [answer[0]["generated_text"] for answer in generate(texts, batch_size=2, **settings)]
    words = [[token for token in row if token > 3] for row in expected.tolist()]  # the text leaves out special ones
    assert [tokenizer(text)["input_ids"] for text in found] == words and all(map(len, words))
    streamer = Words(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate(texts[0], streamer=streamer, **settings)
    assert tokenizer(streamer.text)["input_ids"] == words[0]


def test_a_pipeline_classifies_text(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["w5 w9 w12 w33", "w7 w8"]
    classify = pipeline("text-classification", model=load(trained("bert"), "bert"), tokenizer=tokenizer)
    parts = members(trained("bert"), SHAPES["bert"].build)
    for text, answer in zip(texts, classify(texts, top_k=None), strict=True):
        given = dict(tokenizer(text, return_tensors="pt"))
        expected = torch.stack([logits(part, given).softmax(-1) for part in parts]).mean(0)[0]
        scores = torch.zeros(3)
        for entry in answer:
            scores[int(entry["label"].removeprefix("LABEL_"))] = entry["score"]
        torch.testing.assert_close(scores, expected, **ROUNDING)


# Bases in fewer bits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    SHAPES["llama-wide"].build().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("settings", "layer"),
    # Above its threshold bitsandbytes treats a whole column of the batch apart: then no row is independent of others.
    [({"load_in_8bit": True, "llm_int8_threshold": 0.0}, "Linear8bitLt"), ({"load_in_4bit": True}, "Linear4bit")],
)
def test_a_quantized_base_is_loaded_once_and_gives_the_same_bits(
    saved: Path, settings: dict[str, Any], layer: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes", reason="quantized layers need bitsandbytes")
    given = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": "cpu"}}
    ensemble = S3TEnsemble.from_pretrained(trained("llama-wide"), str(saved), **given)
    assert "another quantization" in caplog.text
    assert type(ensemble.model.model.layers[7].self_attn.q_proj.inner).__name__ == layer
    rows, inputs = count_rows(ensemble), inputs_of("llama")
    parts = members(trained("llama-wide"), lambda: AutoModelForCausalLM.from_pretrained(saved, **given))
    alone = [logits(part, repeated(inputs, 3))[6 * place :][:6] for place, part in enumerate(parts)]
    assert (alone[0] - alone[1]).abs().max() > 0.1
    assert torch.equal(logits(ensemble, inputs), mean_probability(alone))
    assert rows == {index: [6 if index < 2 else 18] for index in range(8)}


def test_a_base_in_bfloat16_answers_as_well_as_its_members(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = inputs_of("llama")
    wide = trained("llama-wide")
    exact = mean_probability([logits(part, inputs) for part in members(wide, SHAPES["llama-wide"].build)])
    ensemble = S3TEnsemble.from_pretrained(wide, str(saved), dtype=torch.bfloat16)
    assert "another dtype" in caplog.text
    assert ensemble.dtype == torch.bfloat16
    parts = members(wide, lambda: AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16))
    alone = mean_probability([logits(part, inputs).float() for part in parts])
    answer = logits(ensemble, inputs)
    assert answer.dtype == torch.float32
    error = (alone - exact).abs().mean()
    assert 0 < (answer - exact).abs().mean() < 1.25 * error < 0.1
    assert (answer - alone).abs().mean() < error
    assert ensemble.generate(**prompts(), max_new_tokens=2, **GENERATION).shape == (6, 10)
