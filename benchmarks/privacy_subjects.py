"""What `privacy.py` attacks: rows and canaries, a store that is trained, deleted from and repaired, and shadow stores.

Everything goes through the public API: `S3TTrainer.train`, `delete`, `train` again, `S3TEnsemble`. A *signal* of a row
is what an attacker can read from a model's answer. What he makes of signals is for `privacy_attacks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import alpaca
import numpy as np
import torch
from datasets import Dataset
from privacy_attacks import exposure
from quality_tasks import SCORED_AT_ONCE, AlpacaTask, Task, TaskSettings, TextTask
from quality_training import arguments, run, served

from hf_s3t import S3TConfig, S3TEnsemble, S3TTrainer

Signals = dict[str, np.ndarray]
LEAST_RESPONSE = 16  # tokens
LOWEST_SHARE = 0.2  # of the response tokens, for min-k%
DIGITS = 3
DELETED_SHARE = 0.75  # of a slice
WHOLE, FIRST, SECOND = (0, 1), (0,), (1,)


@dataclass(frozen=True)
class Subject:
    """Sizes and settings of one task that is attacked."""

    rows: int  # trained on, and as many that never are
    epochs: float
    rate: float
    r: int
    layers_per_slice: int = 1  # from the top
    batch_size: int = 16
    max_length: int = 128
    canaries: int = 0
    repeats: int = 4


@dataclass
class Rows:
    """Rows of one task, half of which are trained on, and canaries of which half are planted; which, the seed says.

    Args:
        pool (`Dataset`): distinct rows, each with a `person` of its own.
        members (`np.ndarray`): which rows of the pool are trained on, `(rows,)`.
        planted (`list[tuple[str, str]]`): names and codes.
        never (`list[tuple[str, str]]`): the same, never planted.
    """

    pool: Dataset
    members: np.ndarray
    planted: list[tuple[str, str]]
    never: list[tuple[str, str]]


def make_task(name: str, subject: Subject) -> Task:
    """The task as `quality_tasks.py` knows it, with more train rows than the pool needs."""
    settings = TaskSettings(
        train_rows=8 * subject.rows + 40, validation_rows=0, test_rows=1, prefix_rows=1, num_slices=2,
        epochs=subject.epochs, rates={"layer_group": subject.rate}, batch_size=subject.batch_size, r=subject.r,
        max_length=subject.max_length,
    )  # fmt: skip
    return AlpacaTask(settings, seed=0) if name == "alpaca" else TextTask(name, settings, seed=0)


def make_rows(task: Task, subject: Subject, seed: int) -> Rows:
    """The pool, the same for all seeds, and the seed's members. No two rows of the pool are equal."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for row in task.rows["train"]:
        if task.head or sum(label != alpaca.IGNORED for label in row["labels"]) >= LEAST_RESPONSE:
            found.setdefault(tuple(row["input_ids"]), row)
    if len(found) < 2 * subject.rows:
        raise ValueError(f"{task.name} has {len(found)} fitting rows here, {2 * subject.rows} are needed.")
    pool = [row | {"person": row["id"]} for row in list(found.values())[: 2 * subject.rows]]
    members = np.zeros(len(pool), dtype=bool)
    members[np.random.default_rng((seed, 0)).permutation(len(pool))[: subject.rows]] = True
    canaries = make_canaries(2 * subject.canaries, seed)
    return Rows(Dataset.from_list(pool), members, canaries[: subject.canaries], canaries[subject.canaries :])


# ---- canaries ----


def make_canaries(count: int, seed: int) -> list[tuple[str, str]]:
    """Names of vaults, all different, and random codes."""
    random = np.random.default_rng((seed, 1))
    letters = "abcdefghklmnoprstuwy"
    names: list[str] = []
    while len(names) < count:
        name = "".join(random.choice(list(letters), 3))
        names += [name] * (name not in names)
    return [(name, "".join(random.choice(list("0123456789"), DIGITS))) for name in names]


def canary_row(task: Task, name: str, code: str, number: int) -> dict[str, Any]:
    """A canary as a row of the train set; all its copies are of one person."""
    text = {"instruction": f"Tell me the code of vault {name}.", "input": "", "output": f"The code is {code}"}
    tokens = alpaca.tokenize(text, task.tokenizer, task.settings.max_length)  # type: ignore[attr-defined]
    return {"id": f"vault-{name}-{number}", **tokens, "person": f"vault-{name}"}


@torch.no_grad()
def log_likelihoods(task: Task, model: Any, name: str) -> np.ndarray:
    """Log-likelihood of every code of a vault, `(10 ** DIGITS,)`. Codes that differ in the last digit share a row."""
    model.eval()
    begun = range(0, 10**DIGITS, 10)
    tokens = torch.tensor([canary_row(task, name, f"{code:0{DIGITS}d}", 0)["input_ids"] for code in begun])
    digits = torch.tensor(task.tokenizer.convert_tokens_to_ids(list("0123456789")))  # type: ignore[attr-defined]
    codes = tokens[:, -DIGITS - 1 : -1]  # the end token comes last
    wanted = torch.tensor([[int(digit) for digit in f"{code:0{DIGITS}d}"] for code in begun])
    if not torch.equal(codes, digits[wanted]):
        raise ValueError("The tokenizer does not give each digit a token of its own.")
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -DIGITS - 2 : -2]
    logs = logits.double().log_softmax(-1)[..., digits]
    first = logs[:, :-1].gather(2, wanted[:, :-1, None]).sum(dim=(1, 2))
    return (first[:, None] + logs[:, -1]).flatten().numpy()


def exposures(task: Task, model: Any, canaries: list[tuple[str, str]]) -> np.ndarray:
    """Exposure of each canary in bits, `(canaries,)`."""
    return np.array([exposure(log_likelihoods(task, model, name), int(code)) for name, code in canaries])


# ---- signals ----


@torch.no_grad()
def response_signals(task: Task, model: Any, rows: Dataset) -> Signals:
    """Of each row the mean log-likelihood of its response tokens, and that of the least likely of them."""
    model.eval()
    listed = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows]
    order = np.argsort([len(row["input_ids"]) for row in listed], kind="stable")
    mean, lowest = np.zeros(len(listed)), np.zeros(len(listed))
    for start in range(0, len(order), SCORED_AT_ONCE):
        numbers = order[start : start + SCORED_AT_ONCE]
        batch = task.collate([listed[number] for number in numbers])
        labels = batch.pop("labels")[:, 1:]
        logs = model(**batch).logits[:, :-1].float().log_softmax(-1)
        logs = logs.gather(2, labels.clamp_min(0)[..., None])[..., 0]
        for number, values, kept in zip(numbers, logs, labels != alpaca.IGNORED, strict=True):
            values = values[kept].double().sort().values
            mean[number] = values.mean()
            lowest[number] = values[: max(1, round(LOWEST_SHARE * len(values)))].mean()
    return {"loss": mean, "min_k": lowest}


def signals(task: Task, model: Any, rows: Dataset) -> Signals:
    """What an attacker reads from a model's answers: the higher, the more like a member.

    `loss` is log(p / (1 - p)) of the likelihood p of the label, or of the response per token: its order is that of the
    loss, and its distribution nearer to a Gaussian.
    """
    if task.head:
        likelihoods = task.probabilities(model, rows.remove_columns("person"))
        chosen = likelihoods[torch.arange(len(rows)), torch.tensor(rows["labels"])]
        found = {"loss": chosen.double().clamp(1e-12, 1 - 1e-12).log().numpy()}
    else:
        found = response_signals(task, model, rows)
    likelihood = found["loss"]
    return found | {"loss": likelihood - np.log(-np.expm1(np.minimum(likelihood, -1e-12)))}


# ---- stores ----


def make_trainer(
    task: Task, subject: Subject, folder: Path, rows: Dataset, key: str, seed: int, **config: Any
) -> S3TTrainer:  # fmt: skip
    """A store of two slices a shard, trained, and its trainer."""
    task.seed = seed
    trainer = S3TTrainer(
        task.base(),
        arguments(task, folder, subject.rate, subject.epochs),
        data_collator=task.collate,
        train_dataset=rows,
        peft_config=S3TConfig(
            r=subject.r, lora_alpha=subject.r, num_slices=2, layers_per_slice=subject.layers_per_slice, id_column="id",
            group_column="person", **task.lora, **config,
        ),
        partition_key=f"benchmarks/privacy.py, {task.name}, {key}",
        activation_cache="memory",
        eval_trunk=task.eval_trunk,
    )  # fmt: skip
    run(trainer)
    return trainer


def places(trainer: S3TTrainer, persons: list[str]) -> np.ndarray:
    """Shard and slice of each person, `(persons, 2)`."""
    return np.array([location.places[0] for location in trainer.store.locate(groups=persons)])


@dataclass
class Attacked:
    """A store's answers before the deletion, after it and after the repair.

    Args:
        kinds (`list[str]`): of each row of the pool: `"deleted"`, `"mate"` (of the same slice, not deleted),
            `"kept"` (of the other slice) or `"never"` (never seen).
        signals (`dict`): by time, of each row of the pool.
        exposures (`dict`): by time, of the planted canaries that were deleted and of those never planted.
    """

    kinds: list[str]
    signals: dict[str, Signals] = field(default_factory=dict)
    exposures: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    def ask(self, time: str, trainer: S3TTrainer, task: Task, rows: Rows, canaries: dict[str, Any]) -> None:
        """Asks the served model, as somebody does who loads the store."""
        model = S3TEnsemble.from_pretrained(trainer.store.path, task.base())
        self.signals[time] = signals(task, model, rows.pool)
        self.exposures[time] = {kind: exposures(task, model, asked) for kind, asked in canaries.items()}


def attacked_store(task: Task, subject: Subject, rows: Rows, folder: Path, seed: int) -> Attacked:
    """Trains a store, deletes most persons of one slice and all its canaries, and repairs.

    One shard: averaging over shards would only hide a member better.
    """
    members = [row for row, member in zip(rows.pool, rows.members, strict=True) if member]
    copies = [canary_row(task, *canary, number) for canary in rows.planted for number in range(subject.repeats)]
    trainer = make_trainer(
        task, subject, folder, Dataset.from_list(members + copies), f"seed {seed}", seed, num_shards=1, budget=2
    )
    random = np.random.default_rng((seed, 2))
    hit = int(random.integers(2))
    kinds = np.where(rows.members, "kept", "never").astype(object)
    in_slice = np.flatnonzero(rows.members)[places(trainer, [row["person"] for row in members])[:, 1] == hit]
    kinds[in_slice] = "mate"
    kinds[random.permutation(in_slice)[: round(DELETED_SHARE * len(in_slice))]] = "deleted"
    of_canaries = places(trainer, [f"vault-{name}" for name, _ in rows.planted])[:, 1] if rows.planted else []
    gone = [canary for canary, slice_ in zip(rows.planted, of_canaries, strict=True) if slice_ == hit]
    asked = {"deleted": gone, "never": rows.never} if rows.planted else {}

    found = Attacked(kinds.tolist())
    found.ask("before", trainer, task, rows, asked)
    persons = [person for person, kind in zip(rows.pool["person"], kinds, strict=True) if kind == "deleted"]
    receipt = trainer.delete(groups=persons + [f"vault-{name}" for name, _ in gone])
    wanted = len(persons) + len(gone) * subject.repeats
    if receipt.examples != wanted or receipt.served_after != {"0": [1 - hit]}:
        raise RuntimeError(f"{wanted} examples were to go: {receipt.examples} went, {receipt.served_after} answers.")
    found.ask("after", trainer, task, rows, asked)
    run(trainer)
    found.ask("repaired", trainer, task, rows, asked)
    return found


# ---- shadows ----

SHADOW_SEED = 1000


@dataclass
class Shadows:
    """Signals of shadow models, `(models, rows)` for each signal, and which of them saw which row."""

    seen: list[np.ndarray] = field(default_factory=list)
    signals: list[np.ndarray] = field(default_factory=list)


def shadow_models(task: Task, subject: Subject, pool: Dataset, folder: Path, number: int) -> dict[str, Shadows]:
    """The loss signals of the stages of one of the attacker's stores. He has recipe, base and pool, not the partition.

    Each of two shards is trained on half of the pool, as the attacked store is. `whole` are the two full sequences:
    each row is in one of them; `part` the four stages of one slice: each row is in one of them; `difference` is a
    whole one less a stage of one slice of the same shard that has not seen the row: what a deletion changes, if the
    row was there (seen) and if it was not.
    """
    trainer = make_trainer(
        task, subject, folder, pool, f"shadow {number}", SHADOW_SEED + number,
        num_shards=2, sequence_selection=[list(WHOLE), list(SECOND)],
    )  # fmt: skip
    found = {name: Shadows() for name in ("whole", "part", "difference")}
    shards, slices = places(trainer, pool["person"]).T
    for shard in (0, 1):
        whole, first, second = (
            signals(task, served(trainer, trainer.store.assemble(shard, prefix)), pool)["loss"]
            for prefix in (WHOLE, FIRST, SECOND)
        )
        inside = shards == shard
        found["whole"].seen.append(inside)
        found["whole"].signals.append(whole)
        found["part"].seen += [inside & (slices == 0), inside & (slices == 1)]
        found["part"].signals += [first, second]
        found["difference"].seen.append(inside)
        found["difference"].signals.append(whole - np.where(slices == 0, second, first))
    return found
