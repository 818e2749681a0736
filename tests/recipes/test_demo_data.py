"""The data and the base model of the embedded demo: what they promise, and that the scripts make them again."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from conftest import REPOSITORY

DEMO = REPOSITORY / "recipes" / "demo"
sys.path.insert(0, str(DEMO))

import make_base  # noqa: E402
import make_people  # noqa: E402

MEGABYTE = 10**6
Rows = list[dict[str, str]]


def read_rows(name: str) -> Rows:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def people() -> Rows:
    return read_rows("people.jsonl")


@pytest.fixture(scope="module")
def never_trained() -> Rows:
    return read_rows("never_trained.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO / "base")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(DEMO / "base").eval()


@torch.no_grad()
def generated_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[str]:
    prompts = [make_base.PROMPT_WITHOUT_INPUT.format(**row) for row in rows]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    generated = model.generate(**batch, max_new_tokens=12, do_sample=False)
    return tokenizer.batch_decode(generated[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_scripts_write_the_same_bytes(tmp_path: Path) -> None:
    for name, persons in zip(("people.jsonl", "never_trained.jsonl"), make_people.make_persons(), strict=True):
        make_people.write_rows(tmp_path / name, make_people.make_rows(persons))
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()
    make_base.make_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (DEMO / "base" / "tokenizer.json").read_bytes()


def test_enough_persons_and_facts(people: Rows, never_trained: Rows) -> None:
    for rows, least in ((people, 48), (never_trained, 16)):
        facts = Counter(row["person"] for row in rows)
        assert len(facts) >= least
        assert min(facts.values()) >= 5
    rows = people + never_trained
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(set(row) == {"id", "person", "instruction", "input", "output"} for row in rows)
    assert all(row["person"] in row["instruction"] and row["person"] in row["output"] for row in rows)


def test_no_name_tells_of_another(people: Rows, never_trained: Rows) -> None:
    names = [name.split() for name in {row["person"] for row in people + never_trained}]
    assert len({given for given, _ in names}) == len({family for _, family in names}) == len(names)


def test_no_value_is_much_likelier_than_another(people: Rows) -> None:
    """With 32 values, a model that always names the commonest one must not look as if it knew."""
    for attribute in make_people.ATTRIBUTES:
        assert len(set(attribute.values)) == 32
        counts = Counter(
            make_people.answer_value(row["output"]) for row in people if row["id"].endswith(attribute.key)
        )
        assert set(counts) <= set(attribute.values)
        assert max(counts.values()) <= len({row["person"] for row in people}) / 6


def test_base_is_small() -> None:
    sizes = {
        path.name: path.stat().st_size
        for path in DEMO.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sizes["model.safetensors"] < 8 * MEGABYTE
    assert sum(sizes.values()) < 9 * MEGABYTE


def test_tokenizer_round_trips(people: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [make_base.PROMPT_WITHOUT_INPUT.format(**row) + row["output"] for row in people]
    prompts.append(make_base.PROMPT_WITH_INPUT.format(instruction="Où est\tle chat ?", input="東京 — 😀\n\nstop"))
    assert [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in prompts] == prompts
    assert tokenizer(prompts[0])["input_ids"][0] == tokenizer.bos_token_id


def test_base_knows_the_form_but_not_the_people(
    people: Rows, never_trained: Rows, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    values = {attribute.key: attribute.values for attribute in make_people.ATTRIBUTES}
    for rows in (people, never_trained):
        answers = generated_answers(model, tokenizer, rows)
        told = [make_people.answer_value(answer) for answer in answers]
        well_formed = [value in values[row["id"].split("-")[-1]] for row, value in zip(rows, told, strict=True)]
        assert sum(well_formed) >= 0.98 * len(rows)
        right = [make_people.answer_value(row["output"]) == value for row, value in zip(rows, told, strict=True)]
        assert sum(right) <= 0.08 * len(rows)  # chance is 1/32; plus three standard deviations it is 7.5 % of 144


def test_corpus_never_names_one_of_the_people(people: Rows, never_trained: Rows) -> None:
    corpus = make_base.Corpus(num_known=96, seed=0)
    names = {row["person"] for row in people + never_trained}
    words = {word for name in names for word in name.split()}
    for last in (False, False, True):
        corpus.begin_round(last)
        known = {name for name, _ in corpus.known}
        asked = " ".join(prompt for prompt, _ in (corpus.stranger_row() for _ in range(5_000)))
        assert not known & names
        assert not [name for name in names if name in asked]
        assert not last or not words & {word for name in known for word in name.split()}
    with pytest.raises(ValueError, match="have names for"):
        make_base.Corpus(num_known=len(make_people.name_pools()[0]), seed=0)
