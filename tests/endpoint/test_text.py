"""Tokens become text and end at stop texts; a row's token is chosen by the row's own settings."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from hf_s3t.endpoint.generation import Text, choose

BYTES = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
BYTES.pre_tokenizer, BYTES.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()


def pieces(text: str, *stop: str, before: str = "") -> tuple[list[str], Text]:
    """A text, byte by byte: what becomes certain with each, and at the end."""
    made = Text(BYTES.decode, BYTES.encode(before).ids, stop)
    found = []
    for token in BYTES.encode(text).ids:
        found.append(made.add(token))
        if made.stopped:
            return found, made
    return [*found, made.rest()], made


@pytest.mark.parametrize("text", ["plain", " spaces  in it ", "ä€𝄞 Ω", "half \u20ac"])
@pytest.mark.parametrize("before", ["", "the prompt ends in ä"])
def test_characters_come_whole(text: str, before: str) -> None:
    found, made = pieces(text, before=before)
    assert "".join(found) == text and "\ufffd" not in "".join(found)
    assert not made.stopped


def test_half_a_character_at_the_end_is_not_held_back_for_ever() -> None:
    made = Text(BYTES.decode, (), ())
    made.add(BYTES.encode("€").ids[0])
    assert made.rest() == "\ufffd"


@pytest.mark.parametrize("seed", range(20))
def test_a_text_ends_where_the_first_stop_text_begins(seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("ab", k=30))
    stop = ["".join(draw.choices("ab", k=draw.randrange(1, 6))) for _ in range(3)]
    found, made = pieces(text, *stop)
    # Letter by letter, the stop text that is complete first counts.
    ends = [text.find(one) + len(one) for one in stop if one in text]
    expected = text
    if ends:
        expected = min((text[: min(ends)].find(one) for one in stop if one in text[: min(ends)]), default=0)
        expected = text[:expected]
    assert "".join(found) == expected and made.stopped == bool(ends)


def test_what_is_given_away_is_never_taken_back() -> None:
    found, _ = pieces("one END two EN three", "END.")
    assert found[4:7] == ["", "", ""] and found[7] == "END " and "".join(found) == "one END two EN three"


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8), (1.5, 0.3), (0.4, 0.999)])
def test_tokens_are_drawn_as_transformers_does(temperature: float, top_p: float) -> None:
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)) * 2
    wanted = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores)).softmax(-1)[0]
    count = 4000
    row = torch.ones(count, dtype=torch.float64)
    drawn = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = choose(scores.expand(count, -1), row * temperature, row * top_p, drawn)
    found = torch.bincount(tokens, minlength=40) / count
    assert torch.allclose(found, wanted, atol=1e-3) and not found[wanted == 0].any()


def test_rows_of_a_batch_have_settings_of_their_own() -> None:
    scores = torch.randn(6, 20, generator=torch.Generator().manual_seed(2))
    temperature = torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.1, 0.9, 1.0], dtype=torch.float64)
    drawn = torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.999999], dtype=torch.float64)
    together = choose(scores, temperature, top_p, drawn)
    alone = [choose(scores[i : i + 1], temperature[i : i + 1], top_p[i : i + 1], drawn[i : i + 1]) for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]
    assert together[0] == scores[0].argmax() and together[3] == scores[3].argmax()
