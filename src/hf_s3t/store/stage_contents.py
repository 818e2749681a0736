"""What a stage's files may hold: the layers and heads that its recipe gives it, and nothing else.

Looks at the config and at the names, types and shapes of the tensors, not at their values. `folder.py` refuses a
repository's stage by it, `public_audit.py` reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..files import check_plain
from ..lora.adapter import is_lora, split_layer_path
from ..plain_data import plain_json
from ..plan.tree import Stage


def read_header(path: Path) -> dict[str, Any]:
    """Names, types and shapes of a safetensors file, and its metadata, without its tensors."""
    check_plain(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            raise StoreError("the file is truncated")
        return plain_json(file.read(length))


def stage_findings(stage: Stage, recipe: Any, config: Any, header: dict[str, Any]) -> Iterator[str]:
    """What does not belong to a stage in its own files, given the recipe's section `config`.

    One of `manifest.DAMAGED` if they are not even of the right form.
    """
    parents = [above.name for above in stage.path[:-1]]
    about = plain_json(header.pop("__metadata__")["hf_s3t"])
    if about != {"stage": stage.name, "parents": parents}:
        yield f"{stage.name}: its weights say that they are those of {about.get('stage')!r}"
    kind, groups = recipe["stage_parameters"], recipe["groups"]
    if stage.depth > len(groups) and kind == "layer_group":
        yield f"{stage.name}: there are only {len(groups)} layer groups"
        return
    groups = [groups[stage.depth - 1]] if kind == "layer_group" else groups
    layers = sorted(layer for group in groups for layer in group)
    for name, value in _expected_config(recipe, layers).items():
        if config.get(name) != value:
            yield f"{stage.name}: `{name}` is {config.get(name)!r}, the recipe says {value!r}"
    if config["auto_mapping"]["parents"] != parents:
        yield f"{stage.name}: its config names the parents {config['auto_mapping']['parents']}"
    stacked = config["auto_mapping"].get("stage_parameters")
    if stacked != (kind if kind == "rank_group" else None):
        yield f"{stage.name}: its config says that it owns {stacked!r}, the recipe {kind!r}"
    yield from _tensor_findings(stage.name, header, layers, recipe)


def _expected_config(recipe: Any, layers: list[int]) -> dict[str, Any]:
    """Fields of `adapter_config.json` on which it depends what the tensors mean."""
    kept = ("r", "lora_alpha", "lora_dropout", "use_rslora", "fan_in_fan_out", "target_modules", "task_type")
    return {
        **{name: recipe[name] for name in (*kept, "layers_pattern") if name in recipe},
        "peft_type": "LORA",
        "layers_to_transform": layers,
        "modules_to_save": recipe["modules_to_save"] or None,
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def _tensor_findings(stage: str, header: dict[str, Any], layers: list[int], recipe: Any) -> Iterator[str]:
    seen: set[int] = set()
    heads = tuple(f"base_model.model.{head}." for head in recipe["modules_to_save"])
    for name, entry in sorted(header.items()):
        if entry["dtype"] != "F32":
            yield f"{stage}: {name} is of type {entry['dtype']}; stages are stored in fp32"
        if not is_lora(name):
            if not name.startswith(heads or ("/",)):
                yield f"{stage}: {name} is neither LoRA nor part of a head"
            continue
        place = split_layer_path(name)
        if place is None or place[1] not in layers:
            yield f"{stage}: {name} lies outside its layers {layers}"
            continue
        seen.add(place[1])
        rank = entry["shape"][0 if ".lora_A." in name else 1]
        if rank != recipe["r"]:
            yield f"{stage}: {name} is of rank {rank}, the recipe says {recipe['r']}"
        swap = (".lora_A.", ".lora_B.") if ".lora_A." in name else (".lora_B.", ".lora_A.")
        if name.replace(*swap) not in header:
            yield f"{stage}: {name} is there without its other half"
    for layer in sorted(set(layers) - seen):
        yield f"{stage}: it has no tensor in its layer {layer}"
    for head in heads:
        if not any(name.startswith(head) for name in header):
            yield f"{stage}: its head {head.removeprefix('base_model.model.').rstrip('.')} is missing"
