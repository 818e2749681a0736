"""What a person names on the command line: ids and groups, slices, datasets, and the function that makes a trainer."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..plain_data import plain_json
from .name_files import names_in

if TYPE_CHECKING:
    from ..store.store import S3TStore

WIDTH = 100
"""Columns of what is printed, at most."""


def width() -> int:
    """Columns of what is printed: those of the terminal, or what `COLUMNS` says; 80 where there is neither."""
    return min(shutil.get_terminal_size((80, 24)).columns, WIDTH)



Stores = Annotated[list[str], typer.Argument(help="Stores: the output_dir of a training, or a repository.")]
OneStore = Annotated[str, typer.Argument(help="A store: the output_dir of a training.")]
Ids = Annotated[list[str] | None, typer.Option("--ids", help="An id; give the option again for another one.")]
IdsFile = Annotated[Path | None, typer.Option("--ids-file", help="File with one id per line; - is standard input.")]
Groups = Annotated[list[str] | None, typer.Option("--groups", help="A group; give the option again for another one.")]
GroupsFile = Annotated[Path | None, typer.Option("--groups-file", help="File with one group per line.")]
Column = Annotated[
    str | None, typer.Option(help="The column to read, if the file of ids or groups is a table (CSV, JSON).")
]
Reference = Annotated[str | None, typer.Option(help="Your name for the request, kept in the private receipt.")]
KeyFile = Annotated[Path | None, typer.Option(help="File with the partition key, if .s3t/ does not hold it.")]
StateFolder = Annotated[
    Path | None, typer.Option("--state", help="Folder of the private state, for a repository. Default: HF_S3T_STATE.")
]
NotIn = Annotated[
    Path | None, typer.Option(help="Dataset file or folder. Every example that is not in it is deleted.")
]
AtMost = Annotated[str, typer.Option(help="With --not-in: delete nothing if more than this share is missing.")]
Slices = Annotated[list[str] | None, typer.Option(help="A whole slice, SHARD:SLICE. Works without the state, too.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")]
MissingOk = Annotated[bool, typer.Option("--missing-ok", help="Delete what is known, ignore what is not.")]
RefreshExports = Annotated[
    bool, typer.Option("--refresh-exports", help="Rewrite exports that carry the influence, or remove them.")
]
Purge = Annotated[bool, typer.Option("--purge", help="For a repository: remove it from the history, too, and probe.")]
KeepRefs = Annotated[
    list[str] | None,
    typer.Option("--keep-ref", help="A branch, tag or pull request to keep; all others are removed. Repeatable."),
]
DropRefs = Annotated[bool, typer.Option("--drop-refs", help="Remove every ref but the main branch.")]
Prior = Annotated[
    str | None, typer.Option(help="Chance that a request hits each slice: 0.4,0.3,0.3. Default: the plan's own.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON: a list with one outcome per store.")]

KINDS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


@dataclass(frozen=True)
class Wanted:
    """What a request names.

    Args:
        ids, groups (`list[str]`): from options and files.
        hints (`tuple[str, ...]`): what its files look like, to be told where something is not known.
    """

    ids: list[str]
    groups: list[str]
    hints: tuple[str, ...] = ()

    @property
    def names(self) -> dict[str, list[str]]:
        """As the store's verbs take them."""
        return {"ids": self.ids, "groups": self.groups}


def wanted_names(
    ids: list[str] | None,
    ids_file: Path | None,
    groups: list[str] | None,
    groups_file: Path | None,
    column: str | None = None,
) -> Wanted:
    """The ids and groups of a request, from the options and the files."""
    if column is not None and (ids_file is None) == (groups_file is None):
        raise typer.BadParameter("--column says which column of one file to take: give --ids-file or --groups-file.")
    (more_ids, of_ids), (more_groups, of_groups) = names_in(ids_file, column), names_in(groups_file, column)
    hints = tuple(filter(None, (of_ids, of_groups)))
    return Wanted([*(ids or ()), *more_ids], [*(groups or ()), *more_groups], hints)


def parse_slice(text: str) -> tuple[int, int]:
    """`(shard, slice)` from `"0:2"`."""
    match = re.fullmatch(r"(\d{1,6}):(\d{1,4})", text)
    if not match:
        raise typer.BadParameter(f"{text!r} is not a slice. Write SHARD:SLICE, for example 0:2.")
    return int(match[1]), int(match[2])


def parse_prior(text: str | None) -> tuple[float, ...] | None:
    """Chances from `"0.4,0.3,0.2,0.1"`."""
    if text is None:
        return None
    try:
        return tuple(float(chance) for chance in text.split(","))
    except ValueError:
        message = f"The prior must be numbers with commas between them, such as 0.4,0.3,0.2,0.1, not {text!r:.60}."
        raise ValueError(message) from None


def parse_count(text: str) -> int:
    """A number of rows from `"52002"`, `"52k"`, `"10M"` or `"1.5B"`."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,12})?)([kKmMbB]?)", text)
    size = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
    count = Fraction(match[1]) * size[match[2].lower()] if match else None
    if count is None or count.denominator != 1:
        raise ValueError(f"{text!r:.40} is not a number of rows. Write a whole number, or 52k, 1.5M, 2B.")
    return int(count)


def read_curve(file: Path) -> tuple[str, list[float]]:
    """The metric, and the scores by prefix length: `{"metric": "accuracy", "score_by_prefix_length": [0.5, 0.7]}`."""
    form = '{"metric": "accuracy", "score_by_prefix_length": [0.5, 0.7, ...]}, with the score of no slice first'
    try:
        data = plain_json(file.read_bytes())
        scores = [number for number in data["score_by_prefix_length"] if type(number) in (int, float)]
        if len(scores) == len(data["score_by_prefix_length"]) and type(metric := data["metric"]) is str:
            return metric, scores
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{file} holds no scores by prefix length. Write {form}.")


def parse_share(text: str) -> float:
    """A share from `"10%"`."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)%", text)
    if not match or float(match[1]) > 100:
        raise typer.BadParameter(f"{text!r} is not a share. Write a percentage, for example 10%.")
    return float(match[1]) / 100


def digests_not_in(store: S3TStore, file: Path, at_most: float) -> list[str]:
    """Keyed digests of the store's examples that a dataset does not hold.

    Nothing is to be deleted by mistake. So it raises `ValueError` if more are missing than the share `at_most`, or if
    some may be there in another spelling.
    """
    from ..store.partition import keyed_digest, raw_rows, row_digest
    from ..store.requests import LookAlikes

    key, column = store.key, store.manifest().recipe["partition"]["id_column"]

    def names() -> Iterable[Any]:
        return map(row_digest, raw_rows(read_dataset(file))) if column is None else ids_in(file, column)

    kept = {keyed_digest(key, "id", name) for name in names()}
    with store.reading() as state:
        missing = {digest for digest, _ in state.examples() if digest not in kept}
        count = state.count
        if count and len(missing) == count:
            raise ValueError(f"{file} holds none of the {count} examples of {store.path}. Is it another dataset?")
        alike = LookAlikes(lambda kind, digest: kind == "id" and digest in missing, key)
        strange = (n for n in names() if not state.has("id", keyed_digest(key, "id", n))) if missing else ()
        pairs = [f"{ascii(text)} for {ascii(name)}" for name in strange for text, _ in alike.of("id", name)]
    if pairs:
        raise ValueError(
            f"{len(pairs)} ids of {file} are spelled differently in {store.path}, e.g. {', '.join(pairs[:5])}. Write "
            "them as the store has them, or name the ids to delete with --ids-file."
        )
    if len(missing) > at_most * count:
        raise ValueError(
            f"{len(missing)} of the {count} examples of {store.path} are not in {file}: "
            f"{len(missing) / count:.1%}, and --at-most allows {at_most:.0%}. Nothing was deleted. To delete "
            "them all, raise --at-most."
        )
    if missing:
        typer.echo(f"{len(missing)} of the {count} examples of {store.path} are not in {file}", err=True)
    return sorted(missing)


def ids_in(file: Path, column: str) -> Iterator[Any]:
    """The ids in a column of a dataset's file or folder. In a text file they are texts, whatever they look like."""
    if file.suffix == ".csv" and file.is_file():
        csv.field_size_limit(2**31 - 1)
        with open(file, encoding="utf-8-sig", newline="") as lines:
            yield from _column(csv.DictReader(lines), file, column)
    elif file.suffix in (".json", ".jsonl") and file.is_file():
        with open(file, encoding="utf-8-sig") as lines:
            is_list = lines.read(1 << 16).lstrip().startswith("[")
            lines.seek(0)
            rows = plain_json(lines.read()) if is_list else (plain_json(line) for line in lines if line.strip())
            yield from _column(rows, file, column)
    else:
        dataset = read_dataset(file)
        if column not in dataset.column_names:
            raise ValueError(_NO_COLUMN.format(file=file, column=column))
        yield from dataset.with_format(None)[column]


_NO_COLUMN = "{file} has no column {column!r}, which names the examples of the store."


def _column(rows: Iterable[Mapping[str, Any]], file: Path, column: str) -> Iterator[Any]:
    for number, row in enumerate(rows):
        value = row.get(column) if isinstance(row, Mapping) else None
        if value is None:
            raise ValueError(_NO_COLUMN.format(file=file, column=column) + f" Row {number} lacks it.")
        yield value


def read_dataset(path: Path) -> Any:
    """A dataset from a file, or from a folder that `save_to_disk` wrote; leaves no copy in any cache."""
    from datasets import load_dataset, load_from_disk  # type: ignore[import-untyped]

    if path.is_dir():
        dataset = load_from_disk(str(path))
        if not hasattr(dataset, "column_names") or isinstance(dataset, dict):
            raise ValueError(f"{path} holds several splits. Give the folder of the train split.")
        return dataset
    if not path.exists() or path.suffix not in KINDS:
        found = "is of no known kind" if path.exists() else "does not exist"
        raise ValueError(f"{path} {found}. Give a file that ends in {', '.join(KINDS)}, or a saved dataset's folder.")
    with tempfile.TemporaryDirectory(prefix="hf_s3t-") as cache:
        kind = KINDS[path.suffix]
        return load_dataset(kind, data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True)


def load_factory(text: str) -> Callable[[str, Any], Any]:
    """The function that `module:function` or `file.py:function` names. The module is run."""
    match = re.fullmatch(r"(.+):(\w+)", text)
    if not match:
        raise ValueError(f"{text!r} names no function. Write module:function or file.py:function.")
    if match[1].endswith(".py"):
        spec = importlib.util.spec_from_file_location("hf_s3t_trainer_factory", match[1])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        module = importlib.import_module(match[1])
    if not callable(getattr(module, match[2], None)):
        raise ValueError(f"{match[1]} has no function {match[2]!r}.")
    return getattr(module, match[2])
