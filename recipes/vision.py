"""Image classification with ViT and the paper's settings (S3T, arXiv 2406.16257): CIFAR-10, CIFAR-100, Tiny-ImageNet.

`--dataset` picks model and settings; flags, or a YAML or JSON file named first, override them. `--method sisa` and
`--method full` run the paper's alternatives on the same engine. `--delete_ids FILE` deletes after training, measures
what answers at once, repairs and measures again:

```bash
accelerate launch recipes/vision.py --dataset cifar10 --output_dir out/cifar10
accelerate launch recipes/vision.py --dataset cifar10 --data_dir data/cifar10 --delete_ids ids.txt
```

Training images are shifted and mirrored at random. How is a digest of the image, the seed and the epoch, so that a
resumed stage and a repaired one see what an undisturbed training sees. What enters the trunk still differs from epoch
to epoch, which an activation cache (`docs/speed.md`) refuses.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    TrainerCallback,
    TrainingArguments,
)

from hf_s3t import S3TTrainer

PAPER = {
    "num_slices": 6,
    "layers_per_slice": 2,
    "r": 16,
    "lora_alpha": 32,
    "learning_rate": 2e-3,
    "num_train_epochs": 15,
}
TARGETS = ["q_proj", "v_proj"]
HELD_OUT = "held_out"
"""Column of evaluation rows, whose images stay as they are."""


@dataclass(frozen=True)
class Images:
    """A dataset, its columns, and the paper's model and settings for it."""

    repository: str
    image: str
    label: str
    validation: str
    labels: int
    model: str
    preset: dict[str, Any]


DATASETS = {
    "cifar10": Images(
        "uoft-cs/cifar10", "img", "label", "test", 10, "google/vit-base-patch16-224-in21k", PAPER
    ),
    "cifar100": Images(
        "uoft-cs/cifar100", "img", "fine_label", "test", 100, "google/vit-base-patch16-224-in21k", PAPER
    ),
    "tiny_imagenet": Images(
        "zh-plus/tiny-imagenet", "image", "label", "valid", 200, "google/vit-large-patch16-224-in21k",
        PAPER | {"layers_per_slice": 4},
    ),
}  # fmt: skip


@dataclass
class VisionArguments(RecipeArguments):
    """What this recipe adds to the TrainingArguments."""

    dataset: str | None = field(default=None, metadata={"help": f"One of {', '.join(DATASETS)}."})
    augment: bool = field(default=True, metadata={"help": "Shift and mirror training images at random."})


class EpochClock(TrainerCallback):
    """The epoch that a stage is in, also for the workers of a data loader: it lies in shared memory."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resumed in its middle, an epoch has a fraction."""
        self._epoch.fill_(int(state.epoch or 0))

    @property
    def epoch(self) -> int:
        """0 is the first."""
        return int(self._epoch)


class ImageCollator:
    """Makes a batch from raw rows: images shifted and mirrored, but for evaluation rows, then scaled and normalised.

    Args:
        processor ([`~transformers.BaseImageProcessor`]): of the base model.
        image, label (`str`): columns.
        seed (`int`, *optional*): of the shifts and mirrors; `None`: images stay as they are.
        clock ([`EpochClock`]): the epoch.
    """

    def __init__(self, processor: Any, image: str, label: str, seed: int | None, clock: EpochClock):
        self.processor, self.image, self.label, self.seed, self.clock = processor, image, label, seed, clock

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` of shape `(batch, 3, height, width)` and `labels` of shape `(batch,)`."""
        pixels = self.processor([self.view(row) for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row[self.label] for row in rows])}

    def view(self, row: Mapping[str, Any]) -> Image.Image:
        """What of a row's image the model is shown in this epoch."""
        image = row[self.image].convert("RGB")
        if self.seed is None or row.get(HELD_OUT):
            return image
        content = hashlib.sha256(image.tobytes()).hexdigest()
        return shifted_and_mirrored(image, random.Random(f"{self.seed} {self.clock.epoch} {content}"))


def shifted_and_mirrored(image: Image.Image, draw: random.Random) -> Image.Image:
    """An image moved by up to an eighth of its edges, black where nothing is left, and mirrored half of the time."""
    width, height = image.size
    across, down = width // 8, height // 8
    left, top = draw.randint(0, 2 * across), draw.randint(0, 2 * down)
    moved = ImageOps.expand(image, (across, down)).crop((left, top, left + width, top + height))
    return ImageOps.mirror(moved) if draw.random() < 0.5 else moved


def accuracy(answer: EvalPrediction) -> Figures:
    """Share of images whose most likely class is theirs."""
    return {"accuracy": float(np.mean(answer.predictions.argmax(-1) == answer.label_ids))}


def read_rows(arguments: VisionArguments) -> tuple[Dataset, Dataset]:
    """The train set and the evaluation set."""
    images = DATASETS[arguments.dataset]
    found = []
    for split in ("train", images.validation):
        rows = need_split(arguments, split, images.repository)
        check_rows(rows, (images.image, images.label), images.labels)
        found.append(rows.cast_column(images.image, ImageFeature()))  # a parquet file may not say what its bytes are
    return found[0], found[1].add_column(HELD_OUT, [True] * len(found[1]))


def make_trainer(
    arguments: VisionArguments, args: TrainingArguments, rows: Dataset, validation: Dataset
) -> S3TTrainer:
    """The trainer of a dataset."""
    images, clock = DATASETS[arguments.dataset], EpochClock()
    # Not torchvision's, which scales to other pixels and may be absent.
    processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path, backend="pil")
    args.device  # noqa: B018  # starts the processes before the model is placed
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model_name_or_path, num_labels=images.labels, ignore_mismatched_sizes=True
    )
    return S3TTrainer(
        model=model,
        args=args,
        data_collator=ImageCollator(
            processor, images.image, images.label, args.seed if arguments.augment else None, clock
        ),
        train_dataset=rows,
        eval_dataset=validation,
        processing_class=processor,
        compute_metrics=accuracy,
        callbacks=[clock],
        peft_config=make_config(arguments, target_modules=TARGETS, modules_to_save=["classifier"]),
        partition_key=arguments.partition_key,
        missing=arguments.missing,
        base_model_id=arguments.base_model_id,
    )


def choose_preset(chosen: Any) -> dict[str, Any]:
    """What the paper's table says of the dataset."""
    if chosen.dataset not in DATASETS:
        raise ValueError(f"--dataset must be one of {', '.join(DATASETS)}, got {chosen.dataset}.")
    images = DATASETS[chosen.dataset]
    return {
        "model_name_or_path": images.model,
        "output_dir": f"out/{chosen.dataset}-{chosen.method}",
        **images.preset,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Figures]:
    arguments, args = read_arguments(VisionArguments, choose_preset, argv)
    start_logging()
    trainer = make_trainer(arguments, args, *read_rows(arguments))
    return run(trainer, arguments, lambda: metrics_of(trainer.evaluate()))


if __name__ == "__main__":
    main()
    finish()
