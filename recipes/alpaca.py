"""Instruction tuning that can forget: the embedded demo, and the paper's Llama systems.

Without arguments, a small Llama learns facts about invented persons, forgets one of them and is repaired, in minutes
on a CPU:

```bash
accelerate launch recipes/alpaca.py
```

With a model it is the paper's instruction tuning (S3T, arXiv 2406.16257, section 5 and appendix), here on several GPUs
with an 8-bit base; `--delete_ids FILE` deletes the examples whose ids stand in FILE, one a line, and repairs:

```bash
accelerate launch --config_file accelerate_configs/multi_gpu_ddp.yaml recipes/alpaca.py \
    --model_name_or_path meta-llama/Llama-2-7b-hf --preset llama-2-7b --dataset_name tatsu-lab/alpaca --load_in_8bit \
    --output_dir out/llama-2-7b-alpaca
```
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, load_dataset
from peft import prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_s3t import S3TConfig, S3TEnsemble, S3TTrainer
from hf_s3t.partition import assign, keyed_digest

PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n"
    "### Response:\n"
)
PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

ALL_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"layers_per_slice": 8, "r": 32, "lora_alpha": 64},
    "llama-2-13b": {"layers_per_slice": 10, "r": 32, "lora_alpha": 64},
    "llama-3-8b": {"layers_per_slice": 8, "r": 32, "lora_alpha": 64},
}
"""What differs between the paper's Llama systems; all use m=1, L=4, B=4, learning rate 2e-5, 3 epochs and rsLoRA."""

DEMO = Path(__file__).parent / "demo"
DEMO_KEY = "7075626c6963206b6579206f66207468652064656d6f203030303037"
"""A fixed partition key, so that everyone sees the same slices; of your own data it must be secret."""

DEMO_CONFIG: dict[str, Any] = {
    "num_shards": 2,
    "num_slices": 4,
    "r": 32,
    "lora_alpha": 512,
    "target_modules": ALL_PROJECTIONS,
    "group_column": "person",
}
DEMO_ARGUMENTS: dict[str, Any] = {
    "num_train_epochs": 10,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
    "seed": 0,
}


@dataclass
class RecipeArguments:
    """What this recipe adds to the TrainingArguments."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model. Without it, the demo runs."})
    dataset_name: str = field(
        default="tatsu-lab/alpaca", metadata={"help": "Dataset id, or a parquet or JSON file, in the Alpaca format."}
    )
    preset: str | None = field(default=None, metadata={"help": f"One of {', '.join(PRESETS)}."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base with bitsandbytes."})
    max_examples: int | None = field(default=None, metadata={"help": "Only the first rows of the train set."})
    max_length: int = field(default=512, metadata={"help": "Longest example, in tokens; longer ones are cut."})
    train_on_prompt: bool = field(default=False, metadata={"help": "Loss on the whole text, as in the paper."})
    num_shards: int = field(default=1, metadata={"help": "m"})
    num_slices: int = field(default=4, metadata={"help": "L"})
    budget: int | None = field(default=None, metadata={"help": "B, sequences per shard. Default: L."})
    layers_per_slice: int | None = field(default=None, metadata={"help": "Default: layers / L, or the preset's."})
    stage_parameters: str = field(default="layer_group", metadata={"help": "layer_group or all"})
    r: int = field(default=32, metadata={"help": "LoRA rank"})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha"})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout"})
    id_column: str | None = field(default=None, metadata={"help": "Default: 'id', else a digest of the row."})
    group_column: str | None = field(default=None, metadata={"help": "Column that names whoever a row is about."})
    base_model_id: str | None = field(default=None, metadata={"help": "The base's Hub id, if it is a local copy."})
    partition_key: str | None = field(default=None, metadata={"help": "Default: HF_S3T_KEY, else a new key."})
    delete_ids: str | None = field(default=None, metadata={"help": "File of ids to delete after training; repairs."})


class InstructionCollator:
    """Makes a batch from raw rows in the Alpaca format: prompt, response and end of text, padded on the right.

    Rows stay raw in the dataset, so that an example's digest is the one of the text that a person can show.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the base model.
        max_length (`int`): longest example, in tokens.
        train_on_prompt (`bool`): whether the prompt counts in the loss.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, train_on_prompt: bool = False):
        self.tokenizer, self.max_length, self.train_on_prompt = tokenizer, max_length, train_on_prompt

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors `input_ids`, `attention_mask` and `labels` of shape `(batch, sequence)`."""
        examples = [self.example(row) for row in rows]
        length = max(len(tokens) for tokens, _ in examples)
        pad = self.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([tokens + [pad] * (length - len(tokens)) for tokens, _ in examples]),
            "attention_mask": torch.tensor([[1] * len(t) + [0] * (length - len(t)) for t, _ in examples]),
            "labels": torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in examples]),
        }

    def example(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Tokens of a row, and its labels."""
        prompt = self.tokenizer(prompt_of(row))["input_ids"]
        response = self.tokenizer(row["output"], add_special_tokens=False)["input_ids"]
        tokens = (prompt + response + [self.tokenizer.eos_token_id])[: self.max_length]
        masked = 0 if self.train_on_prompt else min(len(prompt), len(tokens))
        return tokens, [-100] * masked + tokens[masked:]


def prompt_of(row: Mapping[str, Any]) -> str:
    """Alpaca's prompt for a row."""
    template = PROMPT_WITH_INPUT if row.get("input") else PROMPT_WITHOUT_INPUT
    return template.format(instruction=row["instruction"], input=row.get("input"))


def load_rows(name: str, max_examples: int | None) -> Dataset:
    """The raw train set: a dataset's id, or a parquet or JSON file."""
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
    kind = kinds.get(Path(name).suffix)
    rows = load_dataset(kind, data_files=name, split="train") if kind else load_dataset(name, split="train")
    return rows if max_examples is None else rows.select(range(min(max_examples, len(rows))))


def load_model(name: str, load_in_8bit: bool) -> Any:
    """The base model; an 8-bit one is prepared here, once, and never again per stage."""
    if not load_in_8bit:
        return AutoModelForCausalLM.from_pretrained(name)
    device = PartialState().local_process_index if torch.cuda.is_available() else "cpu"
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=settings, device_map={"": device})
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer, with some padding token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tune(recipe: RecipeArguments, args: TrainingArguments) -> None:
    """The paper's instruction tuning; with `--delete_ids` also a deletion and the repair."""
    settings = {name: getattr(recipe, name) for name in ("layers_per_slice", "r", "lora_alpha")}
    if recipe.preset is not None:
        if recipe.preset not in PRESETS:
            raise ValueError(f"There is no preset {recipe.preset!r}; there are {', '.join(PRESETS)}.")
        settings = PRESETS[recipe.preset]
    config = S3TConfig(
        **settings,
        num_shards=recipe.num_shards,
        num_slices=recipe.num_slices,
        budget=recipe.budget,
        stage_parameters=recipe.stage_parameters,
        lora_dropout=recipe.lora_dropout,
        use_rslora=True,
        target_modules=ALL_PROJECTIONS,
        id_column=recipe.id_column,
        group_column=recipe.group_column,
        task_type="CAUSAL_LM",
    )
    tokenizer = load_tokenizer(recipe.model_name_or_path)
    args.device  # noqa: B018  # starts the processes before the model is placed
    trainer = S3TTrainer(
        model=load_model(recipe.model_name_or_path, recipe.load_in_8bit),
        args=args,
        data_collator=InstructionCollator(tokenizer, recipe.max_length, recipe.train_on_prompt),
        train_dataset=load_rows(recipe.dataset_name, recipe.max_examples),
        processing_class=tokenizer,
        peft_config=config,
        partition_key=recipe.partition_key,
        base_model_id=recipe.base_model_id,
    )
    trainer.train()
    if recipe.delete_ids is not None:
        ids = Path(recipe.delete_ids).read_text().split("\n")
        receipt = trainer.delete(ids=[name for name in ids if name], missing_ok=True)
        trainer.train()
        say(f"{receipt.receipt}: {receipt.examples} examples not served since {receipt.inactive_since}; repaired")
    say(f"The store is {args.output_dir}; `hf-s3t status {args.output_dir}` shows it.")


# ---- the embedded demo ----


def demo(args: TrainingArguments) -> None:
    """Trains, deletes one person, repairs, and shows what is known of whom after each step."""
    rows, strangers = read_rows(DEMO / "people.jsonl"), read_rows(DEMO / "never_trained.jsonl")
    for name, value in DEMO_ARGUMENTS.items():
        setattr(args, name, value)
    store = Path(args.output_dir)
    if (store / "s3t.json").exists():
        shutil.rmtree(store)
    groups = groups_of(rows, strangers)
    person = rows[0]["person"]
    trainer = demo_trainer(args, rows)
    trainer.train()
    other_shard = 1 - place_of(person)[0]
    untouched = shard_files(store, other_shard)
    columns = {"before": answered(store, groups)}
    receipt = trainer.delete(groups=[person], reference="the demo's request")
    columns["after deletion"] = answered(store, groups)
    trainer.train()
    columns["after repair"] = answered(store, groups)
    show(person, groups, columns, receipt.served_after)
    say(f"Shard {other_shard} never changed: {untouched == shard_files(store, other_shard)}")
    say(f"Repaired stages equal those of a training without her: {repaired_like_new(args, rows, person)}")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def demo_trainer(args: TrainingArguments, rows: Sequence[Mapping[str, str]]) -> S3TTrainer:
    """A trainer of the demo on some rows."""
    tokenizer = load_tokenizer(str(DEMO / "base"))
    return S3TTrainer(
        model=load_model(str(DEMO / "base"), load_in_8bit=False),
        args=args,
        data_collator=InstructionCollator(tokenizer, max_length=128),
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=S3TConfig(**DEMO_CONFIG, task_type="CAUSAL_LM"),
        partition_key=DEMO_KEY,
    )


def place_of(person: str) -> tuple[int, int]:
    """The (shard, slice) of a person's rows."""
    key = bytes.fromhex(DEMO_KEY)
    return assign(key, keyed_digest(key, "group", person), DEMO_CONFIG["num_shards"], DEMO_CONFIG["num_slices"])


def groups_of(rows: Sequence[dict[str, str]], strangers: Sequence[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The table's rows: whom the deletion concerns, and how."""
    person = rows[0]["person"]
    shard, slice_id = place_of(person)
    places = {row["person"]: place_of(row["person"]) for row in rows}
    in_slice = [row for row in rows if places[row["person"]] == (shard, slice_id)]
    in_shard = [row for row in rows if places[row["person"]][0] == shard]
    return {
        "the deleted person": [row for row in in_slice if row["person"] == person],
        "others in her slice": [row for row in in_slice if row["person"] != person],
        "the rest of her shard": [row for row in in_shard if row not in in_slice],
        "the other shard": [row for row in rows if row not in in_shard],
        "people never trained on": list(strangers),
    }


def answered(store: Path, groups: Mapping[str, list[dict[str, str]]]) -> dict[str, float]:
    """Percentage of facts that the served model, loaded from the store, answers by free generation."""
    tokenizer = load_tokenizer(str(DEMO / "base"))
    tokenizer.padding_side = "left"
    model = S3TEnsemble.from_pretrained(store, base_model=str(DEMO / "base"))
    shares = {}
    for name, rows in groups.items():
        batch = tokenizer([prompt_of(row) for row in rows], return_tensors="pt", padding=True)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [value_of(row["output"]) in text.rstrip(".").split() for row, text in zip(rows, texts, strict=True)]
        shares[name] = 100 * sum(right) / len(right)
    return shares


def value_of(answer: str) -> str:
    """The fact in an answer: its last word."""
    return answer.rstrip(".").split()[-1]


def shard_files(store: Path, shard: int) -> dict[str, bytes]:
    """Every file of a shard's stages."""
    return {str(path): path.read_bytes() for path in sorted(store.glob(f"shard-{shard:02d}/*/*"))}


def repaired_like_new(args: TrainingArguments, rows: Sequence[dict[str, str]], person: str) -> bool:
    """Trains the person's shard once more from scratch without her, and compares the files byte for byte."""
    shard, _ = place_of(person)
    store, scratch = Path(args.output_dir), Path(f"{args.output_dir}-without-her")
    shutil.rmtree(scratch, ignore_errors=True)
    rest = [row for row in rows if place_of(row["person"])[0] == shard and row["person"] != person]
    args.output_dir = str(scratch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the other shard is left out on purpose, so its slices are empty
        demo_trainer(args, rest).train()
    args.output_dir = str(store)
    mine, new = (list(shard_files(folder, shard).values()) for folder in (store, scratch))
    return len(mine) > 0 and mine == new


def show(person: str, groups: Mapping[str, Any], columns: Mapping[str, Mapping[str, float]], served: Any) -> None:
    """Prints the table, and what it means."""
    shard, slice_id = place_of(person)
    say(f"\nDeleted: {person}, of shard {shard}, slice {slice_id}. Facts answered by the served model, in percent:\n")
    say(f"{'':24}{'facts':>7}" + "".join(f"{name:>16}" for name in columns))
    for name, rows in groups.items():
        say(f"{name:24}{len(rows):7}" + "".join(f"{shares[name]:16.1f}" for shares in columns.values()))
    say(
        f"\nWithout a gradient step shard {shard} went back to the prefix {served.get(str(shard))}, which never saw "
        f"slice {slice_id}: everyone in it is forgotten until repair. Repair trains the removed stages without her."
    )


def say(text: str) -> None:
    """Prints on the main process only."""
    PartialState().print(text)


def make_parser() -> HfArgumentParser:
    """The command line of this recipe."""
    parser = HfArgumentParser([RecipeArguments, TrainingArguments])
    # Without a GPU two launched processes find each other only if the CPU is asked for.
    parser.set_defaults(output_dir="out/alpaca", learning_rate=2e-5, use_cpu=not torch.cuda.is_available())
    return parser


def main() -> None:
    recipe, args = make_parser().parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_s3t").setLevel(logging.INFO)  # one line a stage
    args.remove_unused_columns = False  # the collator works on raw rows
    if recipe.model_name_or_path is None:
        demo(args)
    else:
        tune(recipe, args)


if __name__ == "__main__":
    main()
