"""`S3TConfig`: what a user may set, its validation, and its registration with PEFT as type `S3T`.

The config says *what* is trained; which tensors that means in a given model is for `tuner.py`, which slices a stage
sees is for `plan/tree.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from peft import LoraConfig

from ..data_derived import check_data_derived
from ..plan.sequences import explicit
from ..plan.survival import checked_prior
from ..plan.tree import STAGE_PARAMETERS
from ..seams.tuners import add_peft_type, register_tuner

SELECTIONS = ("cyclic", "spaced", "random", "bms", "optimal")
"""Names of the ways to choose sequences."""

LORA_FIELDS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "fan_in_fan_out",
    "init_lora_weights",
)
"""The LoRA fields that S3T supports: they are the part of the recipe that comes from `LoraConfig`."""

BOOKKEEPING_FIELDS = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
)

STACK_FIELD = "layers_pattern"
"""A field of `LoraConfig` that an S3TConfig has for itself: there it comes without the numbers of layers."""

REASONS = {
    "use_dora": "DoRA's magnitude mixes base and adapter weights, so layer groups would not be independent",
    "bias": "biases belong to the base model and would be shared by all stages",
    "layers_to_transform": "the layers of a stage follow from `layers_per_slice` and `num_slices`",
    "target_parameters": "a stage and its frozen prefix are two adapters, and PEFT lays those of a parameter over the "
    "whole model alike; experts that are fused into one parameter stay as they are in the base",
    "rank_pattern": "stages are joined into one adapter of one rank",
    "alpha_pattern": "stages are joined into one adapter of one scale",
    "trainable_token_indices": "token embeddings lie below every layer group and would be shared by all stages",
    "layer_replication": "replicated layers share weights between layer groups",
}


S3T = add_peft_type("S3T")


@dataclass
class S3TConfig(LoraConfig):
    """A LoRA config whose parameters are trained group by group on growing prefixes of slices.

    These [`~peft.LoraConfig`] fields work: `r`, `lora_alpha`, `lora_dropout`, `use_rslora`, `target_modules`,
    `exclude_modules`, `modules_to_save`, `fan_in_fan_out` and `init_lora_weights` (`True` or `"gaussian"`). Any other
    field raises an error that says why.

    Args:
        num_shards (`int`, *optional*, defaults to `1`):
            Number `m` of shards. Each trains its own adapter. The served model is the ensemble of the shards.
        num_slices (`int`, *optional*, defaults to `4`):
            Number `L` of slices per shard, and of layer groups or rank groups.
        budget (`int`, *optional*):
            Number `B` of sequences per shard. `None`: `num_slices`.
        layers_per_slice (`int`, *optional*):
            Layers in one layer group. `None`: `num_layers // num_slices`; leftover bottom layers stay untrained. Only
            for layer groups: stages of the other kinds lie in every targeted layer.
        sequence_selection (`str` or `list[list[int]]`, *optional*, defaults to `"spaced"`):
            `"cyclic"` (the paper's rotation), `"spaced"`, `"random"`, `"bms"` (the paper's, for a given prior),
            `"optimal"`, or the orders themselves (may be truncated).
        cost_budget (`int`, *optional*):
            With `"optimal"`, instead of `budget`: slice passes per epoch and shard, at least `L (L + 1) / 2`. The plan
            is the best tree of stages for this cost. It has one complete sequence.
        deletion_prior (`list[float]`, *optional*):
            With `"bms"` and `"optimal"`: chance that a request hits each slice, the same in every shard. `None`: all
            equal.
        stage_parameters (`"layer_group"`, `"rank_group"` or `"all"`, *optional*, defaults to `"layer_group"`):
            What a stage owns. `"layer_group"`: the LoRA of its layer group. `"rank_group"`: its own LoRA of rank `r`
            over all targeted layers, added to the frozen LoRA of its parents. `"all"`: one LoRA over all targeted
            layers, which starts from its parent's weights. The last two allow more slices than layers.
        replay (`float`, *optional*, defaults to `1.0`):
            A stage trains on all examples of the newest slice of its prefix, and on this share of each earlier one.
            1 is the paper's way, 0 the newest slice alone. Each example's keyed digest and the prefix decide which
            examples are seen again. A stage at depth `d` costs `1 + replay (d - 1)` slice passes. Budgets in slice
            passes count it as `d`, the most that it can cost.
        prune (`bool`, *optional*, defaults to `True`):
            Leave out a tail of a sequence if another sequence covers the same set of slices. Survival loses nothing.
        id_column (`str`, *optional*):
            Column that names an example. `None`: the column `id` if there is one, else a digest of the raw row.
        group_column (`str`, *optional*):
            Column that names the person whom a row is about. All rows of a group are in one slice.
        slice_columns (`tuple[str, str]`, *optional*):
            Columns of the dataset that hold the `(shard, slice)` of each row, instead of the keyed hash.
        data_derived (`dict[str, str]`, *optional*):
            What else was computed from data, and from which data: `{"class_weights": "public counts", "tokenizer":
            "train set"}`. `"train set"` means that it keeps what it saw of rows that are deleted later. At most 20
            names of 40 characters, with sources of 200. The recipe, the card and every receipt publish it, so name
            no person. A name stays on record.
        layers_pattern (`str`, *optional*):
            The end of the path of the stack of layers to train. Needed if `target_modules` match several stacks:
            `"decoder.layers"` of an encoder-decoder, `"language_model.layers"` beside a vision tower.
        stage_layers (`list[int]`, *optional*):
            Set by the library: the layers that the adapter owns. `None`: all that any stage owns.

    Raises:
        ValueError: for an unsupported LoRA field, or a value out of range.

    Example:

        >>> from hf_s3t import S3TConfig
        >>> config = S3TConfig(r=8, num_shards=2, num_slices=4)
        >>> config.peft_type.value, config.sequences_wanted
        ('S3T', 4)
    """

    num_shards: int = field(default=1, metadata={"help": "Number m of shards, each with an adapter of its own."})
    num_slices: int = field(default=4, metadata={"help": "Number L of slices per shard, and of layer groups."})
    budget: int | None = field(default=None, metadata={"help": "Sequences B per shard. None: num_slices."})
    layers_per_slice: int | None = field(
        default=None, metadata={"help": "Layers in one layer group. None: num_layers // num_slices."}
    )
    sequence_selection: str | list[list[int]] = field(
        default="spaced",
        metadata={"help": "'cyclic', 'spaced', 'random', 'bms', 'optimal', or the orders themselves."},
    )
    cost_budget: int | None = field(default=None, metadata={"help": "Slice passes per shard, for 'optimal'."})
    deletion_prior: list[float] | None = field(
        default=None, metadata={"help": "Probability that a request hits each slice, for 'bms' and 'optimal'."}
    )
    stage_parameters: Literal["layer_group", "rank_group", "all"] = field(
        default="layer_group",
        metadata={"help": "What a stage owns: its layer group, a LoRA of its own over all layers, or all of one."},
    )
    replay: float = field(
        default=1.0, metadata={"help": "Share of the examples of each earlier slice that a stage sees again."}
    )
    prune: bool = field(default=True, metadata={"help": "Leave out tails whose set of slices is covered already."})
    id_column: str | None = field(default=None, metadata={"help": "Column that names an example."})
    group_column: str | None = field(default=None, metadata={"help": "Column that names whoever a row is about."})
    slice_columns: tuple[str, str] | None = field(
        default=None, metadata={"help": "Columns that hold the (shard, slice) of each row."}
    )
    data_derived: dict[str, str] | None = field(
        default=None, metadata={"help": "What else was computed from data, and from which. It is published."}
    )
    layers_pattern: str | None = field(
        default=None, metadata={"help": "Which stack of layers is trained, by the end of its path."}
    )
    stage_layers: list[int] | None = field(
        default=None, metadata={"help": "Set by the library: the layers that the adapter owns."}
    )

    def __post_init__(self) -> None:
        stack, self.layers_pattern = self.layers_pattern, None  # PEFT wants it to come with the numbers of layers
        super().__post_init__()
        self.layers_pattern = stack or None
        self.peft_type = S3T
        self._check_lora_fields()
        self._check_ranges()
        self._check_selection()
        self._check_columns()
        check_data_derived(self.data_derived)

    @property
    def sequences_wanted(self) -> int:
        """Number of sequences per shard: `budget`, or what it defaults to."""
        if self.budget is not None:
            return self.budget
        return self.num_slices if isinstance(self.sequence_selection, str) else len(self.sequence_selection)

    def _check_lora_fields(self) -> None:
        if self.init_lora_weights is not True and self.init_lora_weights != "gaussian":
            raise ValueError(
                f"`init_lora_weights` must be True or 'gaussian', got {self.init_lora_weights!r}: other ways read the "
                "base weights or data, or do not start at zero, so a stage would not be its prefix plus a LoRA."
            )
        for item in fields(LoraConfig):
            if item.name in (*LORA_FIELDS, *BOOKKEEPING_FIELDS, STACK_FIELD):
                continue
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            value = getattr(self, item.name)
            if value != default:
                reason = REASONS.get(item.name, "S3T has not been shown to keep its promises with it")
                raise ValueError(
                    f"S3TConfig does not support `{item.name}` (got {value!r}): {reason}. "
                    f"Leave it at its default {default!r}; supported LoRA fields: {', '.join(LORA_FIELDS)}."
                )

    def _check_ranges(self) -> None:
        if self.layers_pattern is not None and not isinstance(self.layers_pattern, str):
            raise ValueError(
                f"`layers_pattern` is {self.layers_pattern!r}, and a stage has layers of one stack. Give the end of "
                'its path, for example "decoder.layers".'
            )
        for name in ("num_shards", "num_slices", "budget", "cost_budget", "layers_per_slice", "r"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
        if isinstance(self.replay, bool) or not isinstance(self.replay, int | float) or not 0 <= self.replay <= 1:
            raise ValueError(f"`replay` must be a number from 0 to 1, got {self.replay!r}.")
        if self.stage_parameters not in STAGE_PARAMETERS:
            raise ValueError(f"`stage_parameters` must be one of {STAGE_PARAMETERS}, got {self.stage_parameters!r}.")
        if self.stage_parameters != "layer_group" and self.layers_per_slice is not None:
            raise ValueError(
                f"`layers_per_slice` is {self.layers_per_slice}, which cuts the layers into layer groups, but with "
                f"stage_parameters={self.stage_parameters!r} every stage has a LoRA in all targeted layers. Leave it "
                "None; layers are left out with `exclude_modules`."
            )

    def _check_selection(self) -> None:
        selection = self.sequence_selection
        if self.cost_budget is not None:
            if selection != "optimal" or self.budget is not None:
                raise ValueError("`cost_budget` takes the place of `budget`, with `sequence_selection='optimal'`.")
            least = self.num_slices * (self.num_slices + 1) // 2
            if self.cost_budget < least:
                raise ValueError(
                    f"`cost_budget` must be {least} or more, for one whole sequence, got {self.cost_budget}."
                )
        if self.deletion_prior is not None:
            if selection not in ("bms", "optimal"):
                raise ValueError("`deletion_prior` is for `sequence_selection` 'bms' and 'optimal'. Leave it None.")
            self.deletion_prior = [float(chance) for chance in checked_prior(self.deletion_prior, self.num_slices)]
        if isinstance(selection, str):
            if selection not in SELECTIONS:
                raise ValueError(f"`sequence_selection` must be one of {SELECTIONS} or orders, got {selection!r}.")
            return
        orders = [list(order) for order in explicit(selection, self.num_slices)]
        if self.budget is not None and self.budget != len(orders):
            raise ValueError(f"`budget` is {self.budget} but {len(orders)} sequences are given. Leave `budget` None.")
        self.sequence_selection = orders

    def _check_columns(self) -> None:
        if self.slice_columns is None:
            return
        columns = self.slice_columns
        named = isinstance(columns, Sequence) and all(isinstance(column, str) for column in columns)
        if isinstance(columns, str) or not named or not len(columns) == len(set(columns)) == 2:
            raise ValueError(f"`slice_columns` must name two columns, (shard, slice), got {columns!r}.")
        self.slice_columns = (columns[0], columns[1])


def register(model_cls: type[Any]) -> None:
    """Registers `S3TConfig` and its tuner with PEFT. Idempotent, so that a reload of the package is harmless."""
    register_tuner(S3T, S3TConfig, model_cls)


importlib.import_module(".tuner", __package__)  # which registers: whoever has the config may hand it to PEFT
