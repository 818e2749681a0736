"""Tokens of requests are made where nobody waits for them, and not at all where the answer is a refusal anyway."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import served
from endpoints import NAME, TEMPLATE, running, tokenizer, wait_until
from hf_s3t.endpoint.lengths import bytes_per_token
from hf_s3t.endpoint.prompts import Prompts
from hf_s3t.endpoint.protocol import ChatRequest, CompletionRequest, Refusal

USER = [{"role": "user", "content": "abc"}]


class Watched(PreTrainedTokenizerFast):
    """Notes how often it is asked, and waits where it is told to."""

    asked = 0
    reached = threading.Event()
    free = threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        Watched.asked += 1
        Watched.reached.set()
        assert Watched.free.wait(20)
        return super().__call__(*args, **kwargs)


@pytest.fixture(autouse=True)
def unwatched() -> None:
    Watched.asked = 0
    Watched.reached.clear()
    Watched.free.set()


def watched(backend: Any = None, **names: str) -> Watched:
    if backend is None:
        names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return Watched(tokenizer_object=backend or tokenizer().backend_tokenizer, chat_template=TEMPLATE, **names)


@pytest.mark.parametrize(
    "shape, route, body",
    [
        ("llama", "/v1/completions", {"prompt": "abc", "max_tokens": 2}),
        ("llama", "/v1/chat/completions", {"messages": USER, "max_tokens": 2}),
        ("bert", "/classify", {"texts": ["abc"]}),
    ],
)
def test_others_are_answered_while_tokens_are_made(shape: str, route: str, body: dict[str, Any]) -> None:
    model = served.load(served.trained(shape), shape)
    with running(model, watched()) as endpoint, ThreadPoolExecutor(1) as pool:
        Watched.reached.clear()
        Watched.free.clear()
        try:
            waiting = pool.submit(endpoint.http.post, route, json={"model": NAME, **body})
            assert Watched.reached.wait(20)
            assert endpoint.http.get("/health", timeout=5).status_code == 200
        finally:
            Watched.free.set()
        assert waiting.result().status_code == 200


def test_no_tokens_are_made_for_a_queue_that_is_full() -> None:
    model, go = served.load(served.trained("llama"), "llama"), threading.Event()
    model.get_input_embeddings().register_forward_pre_hook(lambda *_: go.wait(20) and None)
    with running(model, watched(), max_queue=1, max_batch=1) as endpoint, ThreadPoolExecutor(2) as pool:
        asked = {"model": NAME, "prompt": "a", "max_tokens": 1}
        first = pool.submit(endpoint.http.post, "/v1/completions", json=asked)
        wait_until(lambda: endpoint.metrics()["s3t_batch_rows_count"] == 1)
        second = pool.submit(endpoint.http.post, "/v1/completions", json=asked)
        wait_until(lambda: endpoint.metrics()["s3t_queue_length"] == 1)
        before = Watched.asked
        for route, more in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": USER})):
            assert endpoint.http.post(f"/v1/{route}", json={"model": NAME, **more}).status_code == 429
        assert Watched.asked == before
        go.set()
        assert [one.result().status_code for one in (first, second)] == [200, 200]


# ---- texts that cannot fit ----


def byte_level(normalizer: Any = None, first: Any = None) -> Tokenizer:
    """Bytes, and a few tokens of several: 4 bytes at most, or the 10 of a special one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "a"), ("aa", "aa"), ("K", "K"), ("KK", "KK")]
    vocabulary = {text: i for i, text in enumerate([*letters, *("".join(pair) for pair in pairs)])}
    made = Tokenizer(models.BPE(vocabulary, pairs))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = level if first is None else pre_tokenizers.Sequence([first, level])
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    made.add_special_tokens(["<|end-é|>"])
    return made


def with_fallback() -> Tokenizer:
    """Letters, and bytes where there is none."""
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    made = Tokenizer(
        models.BPE({text: i for i, text in enumerate(texts)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made


def unigram() -> Tokenizer:
    """Bytes, and one token of three."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "abc"]
    made = Tokenizer(models.Unigram([("<unk>", 0.0), *((text, -1.0) for text in letters)], unk_id=0))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made


def prompts(tokens: Any, room: int = 64) -> Prompts:
    config = served.SHAPES["llama"].build().config
    config.max_position_embeddings, config.vocab_size = room, 10_000
    return Prompts(tokens, config, 4096)


def test_a_text_that_cannot_fit_is_refused_without_its_tokens() -> None:
    made = prompts(watched(byte_level()))
    before = Watched.asked
    for call, asked, param in (
        (made.of_completion, CompletionRequest(model=NAME, prompt="é" * 400), "prompt"),
        (made.of_chat, ChatRequest(model=NAME, messages=[{"role": "user", "content": "é" * 400}]), "messages"),
        (made.of_texts, ["a", "é" * 400], "texts.1"),
    ):
        with pytest.raises(Refusal, match="has 8.. bytes, and so many tokens stand for 640 bytes at most") as refused:
            call(asked)  # type: ignore[operator]
        error = refused.value
        assert (error.status, error.code, error.param) == (400, "context_length_exceeded", param)
    assert Watched.asked == before
    assert len(made.of_completion(CompletionRequest(model=NAME, prompt="a" * 4 * 63)).tokens) == 63


LONGEST = {
    "bytes": (byte_level(), "a" * 4),
    "a special token": (byte_level(), "<|end-é|>"),
    "split first": (byte_level(first=pre_tokenizers.Split(" ", "isolated")), "<|end-é|>"),
    "composed": (byte_level(normalizers.NFC()), "\u212a" * 4),  # 12 bytes, which become 4
    "unigram": (unigram(), "abc"),
    "letters": (with_fallback(), " a"),
}


@pytest.mark.parametrize("name", LONGEST)
def test_what_fits_is_never_refused(name: str) -> None:
    backend, text = LONGEST[name]
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend)
    most = bytes_per_token(tokens)
    assert most is not None
    for times in (1, 50):
        assert len((text * times).encode()) <= most * len(tokens(text * times)["input_ids"])


def stripping() -> Tokenizer:
    made = byte_level()
    made.add_tokens([AddedToken("<mask>", lstrip=True)])
    return made


def without_a_byte() -> Tokenizer:
    told = byte_level().to_str()
    assert '"b":' in told
    return Tokenizer.from_str(told.replace('"b":', '"bb":'))


DROPPING = {
    "spaces before a token": stripping(),
    "a byte": without_a_byte(),
    "spaces at the ends": byte_level(normalizers.Strip()),
    "a letter": byte_level(normalizers.Replace("b", "")),
    "spaces between": byte_level(first=pre_tokenizers.Split(" ", "removed")),
    "all spaces": byte_level(first=pre_tokenizers.Whitespace()),
    "unknown words": tokenizer().backend_tokenizer,
}


@pytest.mark.parametrize("name", DROPPING)
def test_of_a_tokenizer_that_drops_some_of_a_text_nothing_is_known(name: str) -> None:
    assert bytes_per_token(PreTrainedTokenizerFast(tokenizer_object=DROPPING[name])) is None
