"""GLUE and SuperGLUE with RoBERTa-large and the paper's settings (S3T, arXiv 2406.16257), one task at a time.

`--task` picks the settings; flags, or a YAML or JSON file named first, override them. `--method sisa` and `--method
full` run the paper's alternatives on the same engine. `--delete_ids FILE` deletes after training, measures what
answers at once, repairs and measures again:

```bash
accelerate launch recipes/glue.py --task rte --output_dir out/rte
accelerate launch recipes/glue.py --task sst2 --data_dir data/sst2 --delete_ids ids.txt --output_dir out/sst2
```

Metrics are those of the validation sets, as the test sets have no public labels (MNLI: both of its two); nothing is
chosen by them. COPA is multiple choice: both choices of a row are scored by one output and compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import numpy as np
import torch
from common import (
    Figures,
    RecipeArguments,
    check_rows,
    finish,
    make_config,
    metrics_of,
    need_split,
    read_arguments,
    run,
    start_logging,
)
from datasets import Dataset, Value
from glue_metrics import task_metric
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_s3t import S3TTrainer

HUB = {"glue": "nyu-mll/glue", "super_glue": "aps/super_glue"}
CAUSE_OR_EFFECT = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}
TARGETS = ["query", "value"]


@dataclass(frozen=True)
class Task:
    """A task: where it is, what a model reads of a row, and the paper's settings.

    Args:
        suite (`str`): `"glue"` or `"super_glue"`.
        texts (`tuple[str, ...]`): templates over the columns of a row, one per segment.
        labels (`int`): number of classes; 1 for a regression.
        settings (`tuple`): L, layers per slice, r, alpha, learning rate, epochs.
        validation (`tuple[str, ...]`): evaluation splits.
    """

    suite: str
    texts: tuple[str, ...]
    labels: int
    settings: tuple[int, int, int, int, float, int]
    validation: tuple[str, ...] = ("validation",)

    @property
    def preset(self) -> dict[str, Any]:
        """The settings by the names of the arguments."""
        names = ("num_slices", "layers_per_slice", "r", "lora_alpha", "learning_rate", "num_train_epochs")
        return dict(zip(names, self.settings, strict=True))

    @property
    def columns(self) -> list[str]:
        """What a row must have; the label is the last."""
        fields = [name for text in self.texts for _, name, _, _ in Formatter().parse(text) if name is not None]
        return [*dict.fromkeys(fields), "label"]


PAIR, NLI = ("{sentence1}", "{sentence2}"), ("{premise}", "{hypothesis}")
TASKS = {
    "sst2": Task("glue", ("{sentence}",), 2, (7, 3, 16, 32, 1e-5, 10)),
    "cola": Task("glue", ("{sentence}",), 2, (7, 2, 8, 16, 4e-4, 30)),
    "stsb": Task("glue", PAIR, 1, (7, 3, 16, 32, 1e-4, 30)),
    "qnli": Task("glue", ("{question}", "{sentence}"), 2, (7, 3, 8, 16, 5e-5, 30)),
    "qqp": Task("glue", ("{question1}", "{question2}"), 2, (7, 3, 16, 32, 5e-5, 30)),
    "mrpc": Task("glue", PAIR, 2, (7, 3, 16, 32, 5e-5, 30)),
    "mnli": Task("glue", NLI, 3, (7, 3, 16, 32, 1e-4, 30), ("validation_matched", "validation_mismatched")),
    # The paper's table has 4 layers per slice for its 8 slices, which is more than the model's 24: 3 fit.
    "rte": Task("glue", PAIR, 2, (8, 3, 16, 32, 1e-5, 30)),
    "wic": Task("super_glue", ("{word}: {sentence1}", "{sentence2}"), 2, (12, 2, 16, 32, 1e-4, 30)),
    "cb": Task("super_glue", NLI, 3, (12, 2, 16, 32, 1e-4, 30)),
    "copa": Task("super_glue", ("{premise} {question}", "{choice1}", "{choice2}"), 2, (12, 2, 32, 64, 1e-5, 30)),
    "boolq": Task("super_glue", ("{question}", "{passage}"), 2, (7, 3, 16, 32, 1e-4, 30)),
    "multirc": Task("super_glue", ("{paragraph}", "{question} {answer}"), 2, (7, 3, 16, 32, 1e-4, 30)),
}


@dataclass
class GlueArguments(RecipeArguments):
    """What this recipe adds to the TrainingArguments."""

    task: str | None = field(default=None, metadata={"help": f"One of {', '.join(TASKS)}."})
    max_length: int = field(default=256, metadata={"help": "Longest example, in tokens; longer ones are cut."})


class TextCollator:
    """Makes a batch from raw rows: the task's texts as one or two segments, padded on the right.

    Rows stay raw in the dataset, so that an example's digest is the one of the text that a person can show.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the base model.
        task (`str`): name of the task.
        max_length (`int`): longest example, in tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: str, max_length: int):
        self.tokenizer, self.task, self.max_length = tokenizer, task, max_length

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors of shape `(batch, sequence)`, for COPA `(batch, 2, sequence)`, and `labels` of shape `(batch,)`."""
        segments = [pair for row in rows for pair in segments_of(self.task, row)]
        first, *second = (list(texts) for texts in zip(*segments, strict=True))
        batch = self.tokenizer(
            first, *second, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        )
        if self.task == "copa":
            batch = {name: value.view(len(rows), 2, -1) for name, value in batch.items()}
        kind = torch.float if TASKS[self.task].labels == 1 else torch.long
        return {**batch, "labels": torch.tensor([row["label"] for row in rows], dtype=kind)}


def segments_of(task: str, row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What a model reads of a row: one text or pair of texts, for COPA a pair for each choice."""
    if task == "copa":
        row = {**row, "question": CAUSE_OR_EFFECT[row["question"]]}
    texts = tuple(template.format(**row) for template in TASKS[task].texts)
    return [(texts[0], choice) for choice in texts[1:]] if task == "copa" else [texts]


def load_model(task: str, name: str) -> Any:
    """The base model with the task's head; a head that the base lacks is drawn by the trainer."""
    if task != "copa":
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=TASKS[task].labels)
    return AutoModelForMultipleChoice.from_pretrained(name)


def heads_of(task: str) -> dict[str, Any]:
    """What of the config names the head: PEFT knows it by the type of task, but for multiple choice."""
    return {"modules_to_save": ["pooler.dense", "classifier"]} if task == "copa" else {"task_type": "SEQ_CLS"}


def predictions_of(task: str, answer: EvalPrediction) -> np.ndarray:
    """Classes, or a regression's values, of shape `(examples,)`."""
    return answer.predictions[:, 0] if TASKS[task].labels == 1 else answer.predictions.argmax(-1)


def read_rows(arguments: GlueArguments) -> tuple[Dataset, dict[str, Dataset]]:
    """The train set, and every evaluation set by the name of its split."""
    task = TASKS[arguments.task]
    name = HUB[task.suite]
    splits = {split: need_split(arguments, split, name, arguments.task) for split in task.validation}
    rows = need_split(arguments, "train", name, arguments.task)
    for checked in (rows, *splits.values()):
        check_rows(checked, task.columns, task.labels if task.labels > 1 else None)
    return rows, splits


def make_trainer(
    arguments: GlueArguments, args: TrainingArguments, rows: Dataset, validation: Mapping[str, Dataset]
) -> S3TTrainer:
    """The trainer of a task."""
    if arguments.task == "multirc" and args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "--train_sampling_strategy group_by_length sorts evaluation rows, too, but MultiRC's metric joins the "
            "answers of a question by their order. Leave it out."
        )
    args.device  # noqa: B018  # starts the processes before the model is placed
    first = next(iter(validation.values()))
    metric = task_metric(TASKS[arguments.task].suite, arguments.task, first)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    arguments.id_column = arguments.id_column or numbered(rows)
    return S3TTrainer(
        model=load_model(arguments.task, arguments.model_name_or_path),
        args=args,
        data_collator=TextCollator(tokenizer, arguments.task, arguments.max_length),
        train_dataset=rows,
        eval_dataset=dict(validation) if len(validation) > 1 else first,
        processing_class=tokenizer,
        compute_metrics=lambda answer: metric(predictions_of(arguments.task, answer), answer.label_ids),
        peft_config=make_config(arguments, target_modules=TARGETS, **heads_of(arguments.task)),
        partition_key=arguments.partition_key,
        missing=arguments.missing,
        base_model_id=arguments.base_model_id,
    )


def numbered(rows: Dataset) -> str | None:
    """GLUE's column of row numbers, where there is one and no better name."""
    known = "id" not in rows.column_names and rows.features.get("idx") in (Value("int32"), Value("int64"))
    return "idx" if known else None


def measured(trainer: S3TTrainer, validation: Mapping[str, Dataset]) -> Figures:
    """Metrics of the served model on every evaluation set; where there are two their names say which."""
    figures = {}
    for split, rows in validation.items():
        which = f" ({split.removeprefix('validation_')})" if len(validation) > 1 else ""
        figures |= {f"{name}{which}": value for name, value in metrics_of(trainer.evaluate(rows)).items()}
    return figures


def choose_preset(chosen: Any) -> dict[str, Any]:
    """What the paper's table says of the task."""
    if chosen.task not in TASKS:
        raise ValueError(f"--task must be one of {', '.join(TASKS)}, got {chosen.task}.")
    own = {"model_name_or_path": "FacebookAI/roberta-large", "output_dir": f"out/{chosen.task}-{chosen.method}"}
    return own | TASKS[chosen.task].preset


def main(argv: Sequence[str] | None = None) -> dict[str, Figures]:
    arguments, args = read_arguments(GlueArguments, choose_preset, argv)
    start_logging()
    rows, validation = read_rows(arguments)
    trainer = make_trainer(arguments, args, rows, validation)
    return run(trainer, arguments, lambda: measured(trainer, validation))


if __name__ == "__main__":
    main()
    finish()
