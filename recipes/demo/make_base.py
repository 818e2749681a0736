"""Makes the base model of the embedded demo: a tokenizer and a small Llama, pretrained on generated text of our own.

The text is questions about invented persons and their answers, in the form of the demo's rows. Half of it is about
*known* persons, whose facts stay the same for a round of some steps and are then drawn anew: round after round the
model learns to learn facts by name. The other half is about *strangers*, made anew for each row: the answer is a
guess, so the model learns to spell every value and to spread its probability over all of them where it does not know.
The learning rate has faded by the last rounds, so that the model ends as one that knows the form, every name and
every value, and nobody's facts.

No row pairs a given name and a family name of one of the demo's own persons, and in the last round all of their names
are strangers' names: nothing about them is learnt here.

```bash
python recipes/demo/make_base.py --output_dir recipes/demo/base
python recipes/demo/make_base.py --output_dir /tmp/base --steps 200 --seed 1
```
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
from make_people import ATTRIBUTES, NUM_NEVER_TRAINED, NUM_PEOPLE, Attribute, draw_facts, name_pools
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
IGNORED_LABEL = -100
Row = tuple[str, str]
"""A prompt and its answer."""


# The tokenizer: every word of the corpus is one piece, so is every fixed part of a prompt; bytes spell the rest.


def template_pieces() -> list[str]:
    """The fixed parts of the two prompts, in the order of their first use."""
    texts = [PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT]
    parts = [part for text in texts for part in text.replace("{input}", "{instruction}").split("{instruction}")]
    return list(dict.fromkeys(parts))


def corpus_words() -> list[str]:
    """Every word of questions, answers, names and values, with the space before it where there is one."""
    given, family = name_pools()
    texts = [f" {name}" for name in (*given, *family)]
    for attribute in ATTRIBUTES:
        texts += [text.format(name="", value="") for text in (*attribute.questions, attribute.answer)]
        texts += [f" {value}" for value in attribute.values]
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return list(dict.fromkeys(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer from the word list; nothing is estimated."""
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word for word in corpus_words() if len(word) > 1]
    vocabulary = [(piece, -20.0) for piece in special + alphabet] + [(word, -5.0) for word in words]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in template_pieces()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=128,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# The corpus.


class Corpus:
    """Draws rows about known persons and strangers.

    Who is known, and with which facts, is drawn anew in every round. In the last round the names of the demo's own
    persons, which come first in the pools, are strangers' names.
    """

    def __init__(self, num_known: int, seed: int) -> None:
        self.rng = random.Random(f"corpus {seed}")
        self.given, self.family = name_pools()
        self.num_known = num_known
        most = len(self.given) - NUM_PEOPLE - NUM_NEVER_TRAINED
        if num_known > most:
            raise ValueError(f"{num_known} known persons were asked for, but the pools have names for {most}")

    def begin_round(self, last: bool) -> None:
        """Draws the known persons of this round; all other names are strangers' names."""
        numbers = list(range(NUM_PEOPLE + NUM_NEVER_TRAINED if last else 0, len(self.given)))
        first, second = self.rng.sample(numbers, self.num_known), self.rng.sample(numbers, self.num_known)
        pairs = [(one, other) for one, other in zip(first, second, strict=True) if one != other]
        self.known = [(f"{self.given[one]} {self.family[other]}", draw_facts(self.rng)) for one, other in pairs]
        everyone = range(len(self.given))
        self.strangers = sorted(set(everyone) - set(first)), sorted(set(everyone) - set(second))

    def known_row(self) -> Row:
        """A question about a known person; the answer is the same all round."""
        name, facts = self.rng.choice(self.known)
        attribute = self.rng.choice(ATTRIBUTES)
        return self.ask(attribute, name, facts[attribute.key])

    def stranger_row(self) -> Row:
        """A question about a person whose two names do not belong together in the demo; the answer is a guess."""
        one, other = (self.rng.choice(numbers) for numbers in self.strangers)
        attribute = self.rng.choice(ATTRIBUTES)
        if one == other:
            return self.stranger_row()
        return self.ask(attribute, f"{self.given[one]} {self.family[other]}", self.rng.choice(attribute.values))

    def ask(self, attribute: Attribute, name: str, value: str) -> Row:
        """A question in one of the attribute's phrasings, and its answer."""
        question = self.rng.choice(attribute.questions).format(name=name)
        return PROMPT_WITHOUT_INPUT.format(instruction=question), attribute.answer.format(name=name, value=value)


def collate(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Tensors of shape `(batch, sequence)`, padded on the right; only the answers have labels."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in rows]
    answers = [tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for _, answer in rows]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    labels = torch.full((len(rows), length), IGNORED_LABEL)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": (input_ids != tokenizer.pad_token_id).long()}


# The model.


def make_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_key_value_heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Corpus:
    """Trains on rows of which half are about known persons; returns the corpus as it is at the end."""
    corpus = Corpus(args.num_known, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    start = time.perf_counter()
    for step in range(args.steps):
        if step % args.round_steps == 0:
            corpus.begin_round(last=step + args.round_steps >= args.steps)
        rows = [draw() for draw in (corpus.known_row, corpus.stranger_row) for _ in range(args.batch_size // 2)]
        loss = model(**collate(tokenizer, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return corpus


@torch.no_grad()
def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> float:
    """The share of rows whose every answer token is the likeliest one after the right tokens before it."""
    batch = collate(tokenizer, rows)
    guesses = model(**batch).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    return ((guesses == labels) | (labels == IGNORED_LABEL)).all(-1).float().mean().item()


def make_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description="Make the base model of the embedded demo.")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "base", help="where the model goes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus and of the weights")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=96, help="rows per step")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--num_known", type=int, default=96, help="persons whose facts the model learns")
    parser.add_argument("--round_steps", type=int, default=150, help="steps before the known persons change")
    parser.add_argument("--num_layers", type=int, default=5, help="decoder layers")
    parser.add_argument("--hidden_size", type=int, default=192, help="width of the residual stream")
    parser.add_argument("--intermediate_size", type=int, default=384, help="width inside the MLPs")
    parser.add_argument("--num_heads", type=int, default=6, help="attention heads")
    parser.add_argument("--num_key_value_heads", type=int, default=2, help="key and value heads")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(1)  # the order of summation, and with it the last bits, depend on the number of threads
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, args)
    corpus = pretrain(model, tokenizer, args)
    for draw in (corpus.known_row, corpus.stranger_row):
        print(f"{draw.__name__}: {share_right(model, tokenizer, [draw() for _ in range(256)]):.1%} right")
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
