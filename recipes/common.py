"""What the recipes share: arguments from flags or a file, the three methods, and train, evaluate, delete, repair.

`--method` picks settings of one and the same engine:

| method | what it trains | after a deletion, before the repair |
|---|---|---|
| `s3t` | layer group by layer group, with the paper's settings | the longest prefix answers that never had the slice |
| `sisa` | the LoRA of all layers at every stage, one sequence | the stage before the slice answers |
| `full` | all LoRA layers on all rows: one shard, one slice | the base model answers |
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_s3t import Receipt, S3TConfig, S3TTrainer

Figures = dict[str, float]
"""Name of a metric -> its value on the evaluation set."""

METHODS: dict[str, dict[str, Any]] = {
    "s3t": {},
    "sisa": {"stage_parameters": "all", "budget": 1, "layers_per_slice": None},
    "full": {"stage_parameters": "all", "budget": 1, "num_shards": 1, "num_slices": 1, "layers_per_slice": None},
}
"""What a method fixes; everything else comes from the flags, or from the preset."""

FILE_KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
CONFIG_FIELDS = (
    "num_shards", "num_slices", "budget", "layers_per_slice", "stage_parameters", "replay", "r", "lora_alpha",
    "lora_dropout", "id_column", "group_column",
)  # fmt: skip
"""Arguments that go into the `S3TConfig` as they are."""


@dataclass
class RecipeArguments:
    """What every recipe adds to the TrainingArguments. `None` leaves the choice to the preset, or to the library."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Base model."})
    method: Literal["s3t", "sisa", "full"] = field(default="s3t", metadata={"help": "How it is trained."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with one SPLIT.parquet, .json or .jsonl per split; else the Hub."}
    )
    max_examples: int | None = field(
        default=None, metadata={"help": "Only the first rows of the train set, as it is sorted."}
    )
    max_eval_examples: int | None = field(default=None, metadata={"help": "Only the first rows of evaluation sets."})
    num_shards: int | None = field(default=None, metadata={"help": "m"})
    num_slices: int | None = field(default=None, metadata={"help": "L"})
    budget: int | None = field(default=None, metadata={"help": "B, sequences per shard. Default: L."})
    layers_per_slice: int | None = field(default=None, metadata={"help": "Default: the preset's, or layers / L."})
    stage_parameters: str | None = field(default=None, metadata={"help": "What a stage owns, as in S3TConfig."})
    replay: float | None = field(default=None, metadata={"help": "Share of earlier slices that a stage sees again."})
    r: int | None = field(default=None, metadata={"help": "LoRA rank"})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA alpha"})
    lora_dropout: float | None = field(default=None, metadata={"help": "LoRA dropout"})
    id_column: str | None = field(default=None, metadata={"help": "Column that names an example."})
    group_column: str | None = field(default=None, metadata={"help": "Column that names whoever a row is about."})
    base_model_id: str | None = field(default=None, metadata={"help": "The base's Hub id, if it is a local copy."})
    partition_key: str | None = field(default=None, metadata={"help": "Default: HF_S3T_KEY, else a new key."})
    missing: Literal["error", "delete", "ignore"] = field(
        default="error", metadata={"help": "What to do with examples that are gone from the train set, or changed."}
    )
    delete_ids: str | None = field(
        default=None,
        metadata={
            "help": "File of ids to delete after training, one a line; repairs. Without a column of ids an id is "
            "`hf_s3t.store.partition.row_digest(row)` of the undecoded row, which `raw_rows(dataset)` beside it gives."
        },
    )


# ---- arguments ----


def make_parser(recipe: type[RecipeArguments]) -> HfArgumentParser:
    """The command line of a recipe."""
    parser = HfArgumentParser([recipe, TrainingArguments])
    # Without a GPU two launched processes find each other only if the CPU is asked for.
    parser.set_defaults(use_cpu=not torch.cuda.is_available())
    return parser


def read_arguments(
    recipe: type[RecipeArguments], choose_preset: Callable[[Any], Mapping[str, Any]], argv: Sequence[str] | None = None
) -> tuple[Any, TrainingArguments]:
    """A recipe's arguments: flags come before the YAML or JSON file that may be named first, that before the preset.

    Args:
        recipe (`type`): the recipe's own arguments.
        choose_preset (`Callable`): given what flags and file say, returns defaults for what they leave open.
        argv (`list[str]`, *optional*): `None`: the command line's.

    Raises:
        ValueError: a key that is no argument, a method that is contradicted, or `load_best_model_at_end`.
    """
    argv, parser = list(sys.argv[1:] if argv is None else argv), make_parser(recipe)
    known = {action.dest for action in parser._actions}
    settings = read_settings(Path(argv.pop(0)), known) if argv and not argv[0].startswith("-") else {}
    parser.set_defaults(**settings)
    chosen = parser.parse_args(argv)
    preset = dict(choose_preset(chosen))
    if chosen.num_slices is not None or chosen.stage_parameters not in (None, "layer_group"):
        preset.pop("layers_per_slice", None)  # those of other slices, or of stages that lie in every layer
    parser.set_defaults(**{**preset, **settings, **fixed_by_method(chosen)})
    arguments, args = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    if args.load_best_model_at_end:
        raise ValueError(
            "`load_best_model_at_end` would choose weights by the evaluation set whose metrics are reported. Leave it "
            "out: recipes train for a number of epochs."
        )
    args.remove_unused_columns = False  # the collators work on raw rows
    return arguments, args


def read_settings(path: Path, known: set[str]) -> dict[str, Any]:
    """Arguments from a YAML or JSON file; JSON is YAML, too."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not settings.keys() <= known:
        surplus = sorted(settings.keys() - known) if isinstance(settings, dict) else type(settings).__name__
        raise ValueError(f"{path} must map names of arguments to values, but has {surplus}. `--help` lists them all.")
    return settings


def read_ids(file: str) -> list[str]:
    """The ids in a file, one a line, as `hf-s3t delete --ids-file` reads them."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"--delete_ids {file} cannot be read: {error}") from None
    ids = [line for line in lines if line.strip()]
    if not ids:
        raise ValueError(f"--delete_ids {file} has no id. Write one a line, or leave the argument out.")
    return ids


def fixed_by_method(chosen: Any) -> dict[str, Any]:
    """The settings of the chosen method; one that is asked for otherwise is refused."""
    if chosen.method not in METHODS:
        raise ValueError(f"There is no method {chosen.method!r}; there are {', '.join(METHODS)}.")
    fixed = METHODS[chosen.method]
    for name, value in fixed.items():
        asked = getattr(chosen, name)
        if asked is not None and asked != value:
            wanted = "the default" if value is None else repr(value)
            raise ValueError(
                f"--method {chosen.method} needs {wanted} for `{name}`, got {asked!r}. Leave `{name}` out, or use "
                "another method."
            )
    return fixed


def make_config(arguments: RecipeArguments, **own: Any) -> S3TConfig:
    """The `S3TConfig` that the arguments ask for, with what the recipe itself knows in `own`."""
    given = {name: getattr(arguments, name) for name in CONFIG_FIELDS}
    return S3TConfig(**{name: value for name, value in given.items() if value is not None} | own)


# ---- data ----


def load_split(arguments: RecipeArguments, split: str, *hub: str) -> Dataset | None:
    """The raw rows of a split: of `--data_dir`, where `None` says that it has no such file, else from the Hub.

    Args:
        arguments ([`RecipeArguments`]): say where, and how many rows.
        split (`str`): name of the split, and of its file.
        hub (`str`): what `load_dataset` is asked for on the Hub: the repository, and a configuration.
    """
    if arguments.data_dir is None:
        rows = load_dataset(*hub, split=split)
    else:
        files = [path for path in sorted(Path(arguments.data_dir).glob(f"{split}.*")) if path.suffix in FILE_KINDS]
        if not files:
            return None
        rows = load_dataset(FILE_KINDS[files[0].suffix], data_files=str(files[0]), split="train")
    most = arguments.max_examples if split == "train" else arguments.max_eval_examples
    return rows if most is None else rows.select(range(min(most, len(rows))))


def need_split(arguments: RecipeArguments, split: str, *hub: str) -> Dataset:
    """As [`load_split`], for a split that has to be there."""
    rows = load_split(arguments, split, *hub)
    if rows is None:
        raise ValueError(f"{arguments.data_dir} has no {split}.parquet, {split}.json or {split}.jsonl. Put it there.")
    return rows


def check_rows(rows: Dataset, columns: Iterable[str], labels: int | None = None) -> None:
    """Raises `ValueError` if columns are not there, or if the last of them has more than `labels` classes."""
    *_, label = columns = list(columns)
    absent = [name for name in columns if name not in rows.column_names]
    if absent:
        raise ValueError(f"The rows have no {', '.join(absent)}, only {', '.join(rows.column_names)}. Rename columns.")
    if labels is not None:
        strange = [value for value in rows.unique(label) if value not in range(labels)]
        if strange:
            raise ValueError(
                f"Column {label} has {', '.join(map(repr, strange[:5]))}, but must have whole numbers from 0 to "
                f"{labels - 1}. Leave out rows without a label, and number the classes as the dataset does."
            )


# ---- train, evaluate, delete, repair ----


def run(trainer: S3TTrainer, arguments: RecipeArguments, measure: Callable[[], Figures]) -> dict[str, Figures]:
    """Trains and measures; with `--delete_ids` deletes, measures what answers at once, repairs and measures again.

    Args:
        trainer ([`S3TTrainer`]): the recipe's trainer.
        arguments ([`RecipeArguments`]): say what to delete.
        measure (`Callable`): metrics of the served model; all processes call it together.

    Returns:
        `dict[str, dict[str, float]]`: the columns of the table that was printed.

    Raises:
        ValueError: the file of ids cannot be read or has none; nothing was trained.
    """
    state = PartialState()
    ids = None if arguments.delete_ids is None else read_ids(arguments.delete_ids)  # a fault in it shows now
    train_and_publish(trainer)
    columns, lengths = {"before deletion": measure()}, [served_lengths(trainer)]
    if ids is not None:
        receipt = trainer.delete(ids=ids, missing_ok=True)
        if trainer.args.push_to_hub:  # before the repair: until then the repository serves what was deleted
            trainer.push_to_hub(commit_message="Deletion")
        columns["after deletion"] = measure()
        lengths.append(served_lengths(trainer))
        train_and_publish(trainer)
        columns["after repair"] = measure()
        lengths.append(served_lengths(trainer))
        state.print(f"{receipt.receipt}: {told_of(receipt)}")
    if state.is_main_process:
        show(f"The served model of {trainer.args.output_dir}, {arguments.method}", columns, lengths)
    state.print(f"The store is {trainer.args.output_dir}; `hf-s3t status {trainer.args.output_dir}` shows it.")
    return columns


def finish() -> None:
    """Lets several processes end together: one that just leaves may abort while another still asks it."""
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def train_and_publish(trainer: S3TTrainer) -> None:
    """`train()`, which pushes at its end, unless the arguments leave the one push of a script to the script."""
    trainer.train()
    if trainer.args.push_to_hub and trainer.args.hub_strategy == HubStrategy.END:
        trainer.push_to_hub()


def told_of(receipt: Receipt) -> str:
    """What became of each of the ids that were asked for."""
    unknown = receipt.asked - receipt.found - receipt.already_deleted
    parts = []
    if receipt.examples:
        parts.append(f"{receipt.examples} examples not served since {receipt.inactive_since}; repaired")
    if receipt.already_deleted:
        parts.append(f"{receipt.already_deleted} of {receipt.asked} ids were deleted before")
    if unknown:
        parts.append(f"{unknown} of {receipt.asked} ids are not known (`hf-s3t locate` tells which)")
    return "; ".join(parts)


def served_lengths(trainer: S3TTrainer) -> str:
    """How many slices each shard's served prefix has, of how many."""
    config, served = trainer.s3t_config, trainer.store.served()
    lengths = ", ".join(str(len(served.get(shard, ()))) for shard in range(config.num_shards))
    return f"{lengths} of {config.num_slices}"


def show(title: str, columns: Mapping[str, Figures], lengths: Sequence[str]) -> None:
    """Prints one row per metric, and one column per point of time."""
    table = Table("", *columns, title=title)
    table.add_row("length of the served prefixes", *lengths)
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{figures[name]:.4f}" for figures in columns.values()))
    Console(width=max(100, len(title))).print(table)


def start_logging() -> None:
    """One line a stage on the console."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_s3t").setLevel(logging.INFO)


def metrics_of(figures: Mapping[str, float], prefix: str = "eval") -> Figures:
    """What `evaluate()` says of the model, without how fast it was."""
    silent = ("runtime", "per_second", "preparation_time", "epoch")
    return {
        name.removeprefix(f"{prefix}_"): float(value) for name, value in figures.items() if not name.endswith(silent)
    }
