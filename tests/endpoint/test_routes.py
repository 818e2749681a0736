"""What clients get from an endpoint in this process, over real HTTP: answers, streams, refusals by name."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

import served
from endpoints import LETTERS, NAME, Endpoint, running, tokenizer
from hf_s3t import S3TEnsemble
from hf_s3t.endpoint.app import make_app
from hf_s3t.endpoint.settings import Settings, delete_token_of

PROMPT = "abc def"


@pytest.fixture(scope="module")
def model() -> S3TEnsemble:
    return served.load(served.trained("llama"), "llama")


@pytest.fixture(scope="module")
def endpoint(model: S3TEnsemble) -> Iterator[Endpoint]:
    with running(model, mates_seconds=0.1) as found:
        yield found


def greedy(model: S3TEnsemble, prompt: str, count: int) -> str:
    """What `generate` continues a text with."""
    tokens = tokenizer()(prompt, return_tensors="pt")
    found = model.generate(
        tokens["input_ids"], attention_mask=tokens["attention_mask"], max_new_tokens=count, do_sample=False,
        pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return tokenizer().decode(found[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def complete(endpoint: Endpoint, prompt: Any = PROMPT, **given: Any) -> Any:
    return endpoint.openai.completions.create(model=NAME, prompt=prompt, **{"temperature": 0} | given)


def refused(endpoint: Endpoint, route: str = "/v1/completions", **given: Any) -> tuple[int, str, str | None, str]:
    """Status, kind, parameter and message of a refusal."""
    given = {"model": NAME, "prompt": PROMPT} | given
    answer = endpoint.http.post(route, json={name: value for name, value in given.items() if value != "ABSENT"})
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    return answer.status_code, error["code"], error["param"], error["message"]


# ---- answers ----


def test_the_models_are_listed(endpoint: Endpoint) -> None:
    assert [one.id for one in endpoint.openai.models.list()] == [NAME]
    assert endpoint.openai.models.retrieve(NAME).owned_by == "hf_s3t"
    with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
        endpoint.openai.models.retrieve("other")


def test_a_greedy_completion_is_what_generate_gives(endpoint: Endpoint, model: S3TEnsemble) -> None:
    found = complete(endpoint, max_tokens=12)
    assert found.choices[0].text == greedy(model, PROMPT, 12)
    assert found.choices[0].finish_reason == "length" and found.object == "text_completion"
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19,
    }  # fmt: skip
    assert found.system_fingerprint == "s3t-generation-0"
    assert complete(endpoint, tokenizer()(PROMPT)["input_ids"], max_tokens=12).choices[0].text == found.choices[0].text
    assert complete(endpoint).usage.completion_tokens <= 16


def test_a_stream_is_the_same_answer_in_pieces(endpoint: Endpoint) -> None:
    whole = complete(endpoint, max_tokens=12)
    chunks = list(complete(endpoint, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1 and {c.system_fingerprint for c in chunks} == {"s3t-generation-0"}
    assert len(chunks) == 14 and chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in complete(endpoint, max_tokens=3, stream=True))


def test_a_stream_ends_with_done(endpoint: Endpoint) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 2, "stream": True}
    answer = endpoint.http.post("/v1/completions", json=asked)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-s3t-generation"] == "0"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])


def test_a_chat_is_continued_by_its_template(endpoint: Endpoint, model: S3TEnsemble) -> None:
    messages: Any = [
        {"role": "system", "content": "be so"},
        {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]},
    ]
    given: Any = {"model": NAME, "messages": messages, "temperature": 0, "max_completion_tokens": 9}
    found = endpoint.openai.chat.completions.create(**given)
    assert found.choices[0].message.content == greedy(model, "s:be so|u:hi you|a:", 9)
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    chunks = list(endpoint.openai.chat.completions.create(**given, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == found.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == found.choices[0].finish_reason
    del given["max_completion_tokens"]  # without it, to the end of the model's room at most
    usage = endpoint.openai.chat.completions.create(**given).usage
    assert usage.total_tokens <= 64


def test_an_answer_ends_at_a_stop_text(endpoint: Endpoint) -> None:
    text = complete(endpoint, max_tokens=20).choices[0].text
    stop = text[8:10]
    found = complete(endpoint, max_tokens=20, stop=["no such", stop])
    assert found.choices[0].text == text[: text.index(stop)] and found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == text.index(stop) + 2
    streamed = complete(endpoint, max_tokens=20, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == found.choices[0].text


def test_an_answer_ends_at_the_token_that_ends_it(endpoint: Endpoint) -> None:
    found = [complete(endpoint, letter, temperature=1.5, seed=5, max_tokens=50).choices[0] for letter in LETTERS[:6]]
    ended = [one for one in found if one.finish_reason == "stop"]
    assert ended and all("</s>" not in one.text for one in ended)


def test_the_same_seed_is_the_same_answer_whoever_is_in_the_batch(endpoint: Endpoint) -> None:
    given = {"temperature": 0.9, "top_p": 0.8, "max_tokens": 20}
    alone = [complete(endpoint, PROMPT[:size], seed=size, **given).choices[0].text for size in range(1, 7)]
    again = complete(endpoint, PROMPT[:3], seed=3, **given).choices[0].text
    other = {complete(endpoint, PROMPT[:3], seed=seed, **given).choices[0].text for seed in range(10, 14)}
    before = endpoint.metrics()["s3t_batch_rows_count"]
    with ThreadPoolExecutor(12) as pool:
        mates = [pool.submit(complete, endpoint, "mate" * size, max_tokens=4 * size) for size in range(1, 7)]
        asked = [pool.submit(complete, endpoint, PROMPT[:size], seed=size, **given) for size in range(1, 7)]
        together = [one.result().choices[0].text for one in asked]
        assert all(mate.result() for mate in mates)
    assert endpoint.metrics()["s3t_batch_rows_count"] - before < 12  # they were in batches
    assert together == alone and again == alone[2] and len(other | {again}) > 1


# ---- refusals ----


@pytest.mark.parametrize(
    "given, expected",
    [
        ({"prompt": "ABSENT"}, ("missing_parameter", "prompt", "`prompt` is missing")),
        ({"tokens": 3}, ("unknown_parameter", "tokens", "`tokens` is not known here")),
        ({"logprobs": 0}, ("unsupported_parameter", "logprobs", "`logprobs` is not supported here")),
        ({"n": 2}, ("unsupported_parameter", "n", "not supported")),
        ({"echo": True}, ("unsupported_parameter", "echo", "not supported")),
        ({"logit_bias": {"3": 1}}, ("unsupported_parameter", "logit_bias", "not supported")),
        ({"prompt": ["a", "b"]}, ("invalid_value", "prompt", "valid integer")),
        ({"temperature": 2.5}, ("invalid_value", "temperature", "less than or equal to 2")),
        ({"temperature": "hot"}, ("invalid_value", "temperature", "valid number")),
        ({"top_p": 0}, ("invalid_value", "top_p", "greater than 0")),
        ({"max_tokens": 0}, ("invalid_value", "max_tokens", "greater than or equal to 1")),
        ({"stop": ["a"] * 5}, ("invalid_value", "stop", "at most 4")),
        ({"stop": ""}, ("invalid_value", "stop", "would end every answer")),
        ({"prompt": ""}, ("invalid_value", "prompt", "nothing to continue")),
        ({"prompt": [3, 64]}, ("invalid_value", "prompt", "Token 64 is not one of the model's 64")),
        ({"prompt": "a" * 64}, ("context_length_exceeded", "prompt", "room for 64 tokens. `prompt` has 64")),
        ({"max_tokens": 58}, ("context_length_exceeded", "max_tokens", "`prompt` has 7, and 58 more")),
        ({"stream_options": {"include_usage": True}}, ("invalid_value", "stream_options", "Add `stream`")),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(endpoint: Endpoint, given: Any, expected: Any) -> None:
    status, code, param, message = refused(endpoint, **given)
    assert (status, code, param) == (400, *expected[:2]) and expected[2] in message


def test_what_asks_for_nothing_is_taken(endpoint: Endpoint) -> None:
    found = complete(
        endpoint, max_tokens=57, n=1, best_of=1, echo=False, logprobs=None, frequency_penalty=0, presence_penalty=0.0,
        logit_bias={}, user="somebody",
    )  # fmt: skip
    assert found.choices[0].text


def test_a_chat_is_refused_by_name(endpoint: Endpoint, model: S3TEnsemble) -> None:
    def chat(message: Any = None, **given: Any) -> tuple[int, str, str | None, str]:
        messages = [message or {"role": "user", "content": "hi"}]
        return refused(endpoint, "/v1/chat/completions", prompt="ABSENT", messages=messages, **given)

    assert chat(tools=[{"type": "function"}])[:3] == (400, "unsupported_parameter", "tools")
    assert chat(response_format={"type": "json_object"})[2] == "response_format"
    assert chat(max_tokens=3, max_completion_tokens=4)[2] == "max_tokens"
    assert chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]})[:2] == (400, "invalid_value")
    assert chat({"role": "user", "content": "hi" * 40})[:3] == (400, "context_length_exceeded", "messages")
    strict = tokenizer("{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}")
    cases = [(tokenizer(None), "no_chat_template", "--tokenizer"), (strict, "invalid_value", "no u")]
    for tokens, code, text in cases:
        with running(model, tokens) as other:
            asked = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
            error = other.http.post("/v1/chat/completions", json=asked).json()["error"]
            assert error["code"] == code and text in error["message"]


def test_an_answer_is_not_longer_than_may_be(model: S3TEnsemble) -> None:
    messages = [{"role": "user", "content": "hi"}]
    chat = {"route": "/v1/chat/completions", "prompt": "ABSENT", "messages": messages}
    with running(model, max_tokens=3) as endpoint:
        assert complete(endpoint, max_tokens=3).usage.completion_tokens == 3
        assert complete(endpoint).usage.completion_tokens == 3
        expected = "4 tokens are asked for, and an answer has at most 3 (--max-tokens). Ask for fewer."
        for name, route in (("max_tokens", {}), ("max_tokens", chat), ("max_completion_tokens", chat)):
            assert refused(endpoint, **route, **{name: 4}) == (400, "invalid_value", name, expected)


def test_other_models_routes_and_bodies_are_refused_in_the_same_form(endpoint: Endpoint) -> None:
    assert refused(endpoint, model="gpt")[:3] == (404, "model_not_found", "model")
    assert refused(endpoint, "/v1/embeddings")[:2] == (404, "unknown_url")
    assert refused(endpoint, "/classify")[:2] == (404, "unknown_url")
    assert endpoint.http.get("/v1/completions").status_code == 405
    answer = endpoint.http.post("/v1/completions", content="{", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_json"
    with pytest.raises(openai.BadRequestError) as error:
        complete(endpoint, extra_body={"top_k": 3})
    assert error.value.param == "top_k" and error.value.code == "unknown_parameter"


# ---- classifiers ----


@pytest.fixture(scope="module")
def classifier() -> Iterator[tuple[Endpoint, S3TEnsemble]]:
    model = served.load(served.trained("bert"), "bert")
    with running(model, max_batch=6) as endpoint:
        yield endpoint, model


def test_texts_get_labels_with_scores(classifier: tuple[Endpoint, S3TEnsemble]) -> None:
    endpoint, model = classifier
    texts = ["abc", "a longer text", "Z"]
    answer = endpoint.http.post("/classify", json={"texts": texts})
    found = answer.json()
    with torch.no_grad():
        batch = tokenizer()(texts, padding=True, return_tensors="pt")
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
    assert answer.headers["x-s3t-generation"] == "0" and found["system_fingerprint"] == "s3t-generation-0"
    assert found["usage"] == {"prompt_tokens": 17, "total_tokens": 17}
    for one, row in zip(found["results"], expected, strict=True):
        scores = torch.tensor([one["scores"][f"LABEL_{i}"] for i in range(3)])
        assert torch.allclose(scores, row, atol=1e-6) and one["label"] == f"LABEL_{int(row.argmax())}"
        assert one["score"] == max(one["scores"].values())


def test_texts_of_several_clients_are_answered_together(classifier: tuple[Endpoint, S3TEnsemble]) -> None:
    endpoint, _ = classifier
    texts = [LETTERS[i : i + 2 + i] for i in range(12)]
    alone = [endpoint.http.post("/classify", json={"texts": [text]}).json()["results"][0] for text in texts]
    with ThreadPoolExecutor(6) as pool:
        pairs = pool.map(lambda i: endpoint.http.post("/classify", json={"texts": texts[i : i + 2]}), range(0, 12, 2))
        together = [one for answer in pairs for one in answer.json()["results"]]
    assert [one["label"] for one in together] == [one["label"] for one in alone]
    assert all(abs(one["score"] - other["score"]) < 1e-5 for one, other in zip(together, alone, strict=True))


def test_texts_are_refused_by_name(classifier: tuple[Endpoint, S3TEnsemble]) -> None:
    endpoint, _ = classifier
    for texts, expected in [
        (["a"] * 7, ("too_many_texts", "texts")),
        (["a", "b" * 65], ("context_length_exceeded", "texts.1")),
        ([], ("invalid_value", "texts")),
    ]:
        assert refused(endpoint, "/classify", prompt="ABSENT", texts=texts)[1:3] == expected
    assert refused(endpoint)[:2] == (404, "unknown_url")


def test_scores_are_of_the_kind_that_the_model_was_trained_for() -> None:
    from hf_s3t.endpoint.classification import Classification

    model = served.load(served.trained("bert"), "bert")
    kind, logits = Classification(model, tokenizer()), torch.tensor([[0.0, 2.0, -1.0]])
    assert torch.allclose(kind.scores(logits), logits.softmax(-1)) and kind.scores(logits[:, :1]).item() == 0.0
    model.config.problem_type = "multi_label_classification"
    assert torch.allclose(kind.scores(logits), logits.sigmoid())


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="is a ViTForImageClassification. An endpoint serves"):
        make_app(served.load(served.trained("vit"), "vit"), tokenizer(), Settings(NAME))


# ---- settings ----


@pytest.mark.parametrize(
    "given, message",
    [
        ({"refresh_seconds": 0}, "must be more than 0"),
        ({"refresh_seconds": 5, "max_staleness": 5}, "would be too old between two looks"),
        ({"max_queue": 0}, "--max-queue must be at least 1"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1"),
        ({"delete_token": "short"}, "HF_S3T_DELETE_TOKEN has 5 characters"),
        ({"drain_seconds": float("inf")}, "--drain-seconds must be more than 0 and finite"),
    ],
)
def test_settings_are_checked(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(NAME, **given)
    assert "a secret of the tests" not in repr(Settings(NAME, delete_token="a secret of the tests"))


def test_secrets_are_for_those_who_delete() -> None:
    assert delete_token_of({}, False) is None
    assert delete_token_of({"HF_S3T_DELETE_TOKEN": "t", "HF_S3T_KEY": "k"}, True) == "t"
    with pytest.raises(ValueError, match="needs a bearer token in HF_S3T_DELETE_TOKEN"):
        delete_token_of({"HF_S3T_DELETE_TOKEN": ""}, True)
    with pytest.raises(ValueError, match="HF_S3T_KEY and HF_S3T_STATE is set. .* holds neither key nor state"):
        delete_token_of({"HF_S3T_KEY": "k", "HF_S3T_STATE": "s"}, False)
