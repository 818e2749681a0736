"""The model card of a store, from its manifest alone: it can hold neither a training example nor a local path."""

from __future__ import annotations

import html
import json
import logging
from collections.abc import Callable
from typing import Any

from ..data_derived import limits_of_data
from ..lora.adapter import with_rank
from ..plan.life import life_left
from ..plan.tree import Stage
from .manifest import Manifest
from .recipe_differences import NOT_BIT_EQUAL

logger = logging.getLogger(__name__)

AUTO_CLASSES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
    "SPEECH": ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
    "IMAGE_TEXT": ("AutoModelForImageTextToText", "image-text-to-text"),
    "IMAGE_CLS": ("AutoModelForImageClassification", "image-classification"),
}

ENDINGS = {
    "WhisperForConditionalGeneration": "SPEECH",
    "VLForConditionalGeneration": "IMAGE_TEXT",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForImageClassification": "IMAGE_CLS",
}
"""What a base is for, by the end of its class's name: the first that fits."""

PREFIX_LINES = """\
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

folders = [{folders}]
configs = [LoraConfig.from_pretrained(folder) for folder in folders]
configs[-1].layers_to_transform = sorted(set(sum((config.layers_to_transform for config in configs), [])))
model = get_peft_model(base, configs[-1]).eval()
for folder in folders:
    set_peft_model_state_dict(model, load_file(f"{{folder}}/adapter_model.safetensors"))
"""

STACKED_LINES = """\
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

folders = [{folders}]
stages = [load_file(f"{{folder}}/adapter_model.safetensors") for folder in folders]
tensors = dict(stages[-1])  # with its head, if it has one
for name in tensors:
    if ".lora_A." in name or ".lora_B." in name:
        tensors[name] = torch.cat([stage[name] for stage in stages], dim=0 if ".lora_A." in name else 1)
config = LoraConfig.from_pretrained(folders[-1])
config.r, config.lora_alpha, config.use_rslora = {r}, {lora_alpha}, False
model = get_peft_model(base, config).eval()
set_peft_model_state_dict(model, tensors)
"""

ROOT_LINES = """\
from peft import PeftModel

model = PeftModel.from_pretrained(base, store)
"""

CARD = """\
---
{metadata}
---

# An adapter that can forget

Trained with hf_s3t by S3T (Sequence-aware Sharded Sliced Training, arXiv 2406.16257): {shards} shard(s) of {slices}
slices. Each stage is a LoRA increment that depends only on the slices in its name, so an example is deleted by leaving
out the stages whose names contain its slice. Generation {generation}.

## Load the served model

{base_text}```python
{base_lines}store = "."  # this folder, or what huggingface_hub.snapshot_download returns for this repository
```

{root_text}

## Load any prefix

A stage is an increment: loaded alone, any but the first of a sequence answers as a model that never existed. Name all
stages along the prefix, here {example}. Load the base anew for each adapter, as PEFT writes into it:

```python
{base_lines}{prefix_lines}```

## Live stages

| stage | parent | served |
|---|---|---|
{table}

{accepted}## What deletion covers

The tensors listed above were computed without any example that had been deleted when they were trained, and stages
that depended on a deleted example are no longer in the folder. Not covered: what the base model saw in pretraining,
copies that others made, dataset caches, experiment trackers and backups outside this folder, and requests that were
chosen by looking at the model. Between a deletion and the repair (training again) everyone in the deleted example's
slice is forgotten with it. A store of this shape takes {requests:.1f} deletions on average until nothing is left
without repair.
{derived}"""


ACCEPTED = """\
## Settings that were changed

While stages were live, these settings became others. {claim}.

| setting | before | from then on | since generation |
|---|---|---|---|
{rows}

"""


NO_BASE = """\
The training did not name its base on the Hub. Whoever trains can: `S3TTrainer(..., base_model_id="owner/model")`. Load
the base model as it was loaded for the training, as `base`, and then:

"""


def render_card(manifest: Manifest) -> str:
    """The `README.md` of a store. What cannot be told of it is left out, with an error in the log."""
    base, task = manifest.recipe["base"].get("id"), _task(manifest)
    served = manifest.served_ends
    example = served[0] if served else None
    plan = manifest.plan
    return CARD.format(
        metadata=_told("its task", lambda: _metadata(base, task), _metadata(base, None)),
        shards=plan.num_shards,
        slices=plan.num_slices,
        generation=manifest.generation,
        base_text="" if base else NO_BASE,
        base_lines=_told("its base", lambda: _base_lines(manifest, task)) if base else "",
        root_text=_root_text(manifest, len(served)),
        example=f"`{example.name}`" if example else "of a store that has live stages",
        prefix_lines=_told("its prefixes", lambda: _example_lines(example, manifest), "# see `hf-s3t export`\n"),
        table=_table(manifest, served) or "| none | | |",
        accepted=_told("settings that were changed", lambda: _accepted(manifest)),
        derived=_told("what was computed from data", lambda: _derived(manifest)),
        requests=life_left(manifest.plan).until_all_dead.mean,
    )


def _told(what: str, make: Callable[[], str], otherwise: str = "") -> str:
    """A part of the card. A recipe may hold anything, and no deletion waits for a text."""
    try:
        return make()
    except Exception as error:
        logger.error("the model card says nothing of %s, which cannot be told: %r", what, error)
        return otherwise


def _task(manifest: Manifest) -> str | None:
    """What the base is for: by its class, else as the config says."""
    name, said = str(manifest.recipe["base"].get("class")), manifest.recipe["config"].get("task_type")
    return next((task for ending, task in ENDINGS.items() if name.endswith(ending)), said)


def _base_lines(manifest: Manifest, task: str | None) -> str:
    base = manifest.recipe["base"]
    auto_class, _ = AUTO_CLASSES.get(str(task), ("AutoModel", None))
    given = [json.dumps(base["id"])]
    if isinstance(base.get("revision"), str):
        given.append(f"revision={json.dumps(base['revision'])}")
    if isinstance(base.get("num_labels"), int) and task in ("SEQ_CLS", "TOKEN_CLS", "IMAGE_CLS"):
        given.append(f"num_labels={base['num_labels']}")
    return f"from transformers import {auto_class}\n\nbase = {auto_class}.from_pretrained({', '.join(given)})\n"


def _example_lines(example: Stage | None, manifest: Manifest) -> str:
    return prefix_lines(example, manifest) if example else PREFIX_LINES.format(folders="")


def prefix_lines(stage: Stage, manifest: Manifest) -> str:
    """Python lines that load the prefix that ends with `stage`, with stock PEFT, given `base` and `store`."""
    folders = ", ".join(f'f"{{store}}/{above.name}"' for above in stage.path)
    config = manifest.recipe["config"]
    if config.get("stage_parameters") != "rank_group":
        return PREFIX_LINES.format(folders=folders)
    joined = with_rank(config, config["r"] * stage.depth)
    return STACKED_LINES.format(folders=folders, r=joined["r"], lora_alpha=joined["lora_alpha"])


def _metadata(base: str | None, task: str | None) -> str:
    from huggingface_hub import ModelCardData

    fields: dict[str, Any] = {"library_name": "peft", "tags": ["lora", "transformers", "hf_s3t", "unlearning"]}
    if base:
        fields["base_model"] = base
        fields["tags"].insert(0, f"base_model:adapter:{base}")
    if task in AUTO_CLASSES:
        fields["pipeline_tag"] = AUTO_CLASSES[task][1]
    return ModelCardData(**fields).to_yaml()


def _root_text(manifest: Manifest, live: int) -> str:
    if live == 0:
        return "No stage is live: nothing can be served but the base model, until the store is trained again."
    if manifest.root is None:
        return (
            "There is no root adapter: several live shards with trained heads have no single plain adapter that "
            "equals or averages them. Load each shard's prefix as below and average their probabilities."
        )
    relation = "equal to" if live == 1 else "the weight average of"
    return f"The adapter in the root of this folder is {relation} the served model:\n\n```python\n{ROOT_LINES}```"


def _table(manifest: Manifest, ends: list[Stage]) -> str:
    rows, served = [], set(ends)
    for stage in sorted(manifest.stages):
        mark = "yes" if stage in served else ""
        rows.append(f"| `{stage.name}` | {f'`{stage.parent.name}`' if stage.parent else ''} | {mark} |")
    return "\n".join(rows)


def _accepted(manifest: Manifest) -> str:
    rows = [
        f"| `{one.setting}` | `{_cell(one.before)}` | `{_cell(one.after)}` | {one.generation} |"
        for one in manifest.accepted
    ]
    return ACCEPTED.format(claim=NOT_BIT_EQUAL, rows="\n".join(rows)) if rows else ""


def _derived(manifest: Manifest) -> str:
    """What was computed from data and stays, as plain text: a manifest may be a stranger's."""
    lines = [html.escape(line, quote=False).replace("`", "'") for line in limits_of_data(manifest.recipe)]
    return "\nNot reached by a deletion, either:\n\n" + "".join(f"- {line}\n" for line in lines) if lines else ""


def _cell(value: Any) -> str:
    return json.dumps(value).replace("|", "/").replace("`", "'")[:80]

