"""The embedded demo: a small Llama learns facts about invented persons, forgets one of them and is repaired.

`accelerate launch recipes/alpaca.py` without a model runs it; data and base model are in `recipes/demo/`.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from instructions import ALL_PROJECTIONS, InstructionCollator, load_model, load_tokenizer, prompt_of
from transformers import TrainingArguments

from hf_s3t import S3TConfig, S3TEnsemble, S3TStore, S3TTrainer
from hf_s3t.store.partition import assign, keyed_digest
from hf_s3t.store.state import key_check_value

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


def demo(args: TrainingArguments) -> None:
    """Trains, deletes one person, repairs, and shows what is known of whom after each step."""
    rows, strangers = read_rows(DEMO / "people.jsonl"), read_rows(DEMO / "never_trained.jsonl")
    for name, value in DEMO_ARGUMENTS.items():
        setattr(args, name, value)
    store = Path(args.output_dir)
    args.device  # noqa: B018  # starts the processes
    on_main_process(make_room, store)
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


def make_room(store: Path) -> None:
    """Removes what an earlier demo left; any other store is refused."""
    if not (store / "s3t.json").exists():
        return
    if S3TStore(store).manifest().key_check != key_check_value(bytes.fromhex(DEMO_KEY)):
        raise ValueError(
            f"{store} is a store that the demo did not make, and would remove. Name another --output_dir for the "
            "demo, or the store's model with --model_name_or_path."
        )
    shutil.rmtree(store)


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
    on_main_process(shutil.rmtree, scratch, True)
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


def on_main_process(function: Callable[..., object], *given: object) -> None:
    """Calls a function on the main process, while the others wait for it."""
    if PartialState().is_main_process:
        function(*given)
    PartialState().wait_for_everyone()


def say(text: str) -> None:
    """Prints on the main process only."""
    PartialState().print(text)
