"""The two sets of default settings of `birefnet train`: one for fine-tuning, one as published."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, fields

import torch


PUBLISHED_LEARNING_RATES = {"dis": 1e-4, "general": 1e-5, "matting": 1e-5}
PUBLISHED_EPOCHS = {"dis": 500, "general": 200, "matting": 150}
FINE_TUNING_UPDATES = 80
FINE_TUNING_EPOCHS = (2, 40)  # fewest and most
# By kind of backbone: of everything else, of the backbone. A good Swin-T network got much worse at 2e-4 and 2e-5.
FINE_TUNING_LEARNING_RATES = {"convolution": (2e-4, 1e-4), "transformer": (5e-5, 1e-5)}


@dataclass(frozen=True)
class Recipe:
    """Default settings of a training. Each field is the value of the option of the same name.

    Attributes:
        epochs: Passes over the data; may be a fraction.
        learning_rate: Highest learning rate of everything but the backbone.
        backbone_learning_rate: Highest learning rate of the backbone. `None`: the same as `learning_rate`.
        schedule: Name of the learning rate schedule, as in `TrainingArguments.lr_scheduler_type`.
        warmup_steps: Updates in which the learning rate rises from 0; below 1, their share of all updates.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Largest norm of the gradient; 0 does not clip.
        ema_decay: Decay of the moving average of the weights; 0 keeps no average.
        last_epochs: Last epochs with region-level losses. `None`: as published for the task.
        batch_statistics: Whether batch norms normalize by the statistics of the batch and update their running
            statistics.
        flip, crop, rotate, noise: Augmentation, see `AugmentationSettings`.
        color: Strength of the colour changes in [0, 1]; 1 is the published strength.
    """

    epochs: float
    learning_rate: float
    backbone_learning_rate: float | None
    schedule: str
    warmup_steps: float
    weight_decay: float
    max_grad_norm: float
    ema_decay: float
    last_epochs: int | None
    batch_statistics: bool
    flip: float
    crop: float
    rotate: float
    noise: float
    color: float


def published_recipe(task: str, batch: int, fine_tunes: bool) -> Recipe:
    """The recipe of the official training code: a constant learning rate for a long training on several GPUs.

    Args:
        task: `"dis"`, `"general"` or `"matting"`.
        batch: Photos in an update. The learning rate grows with its square root; the published batch is 4.
        fine_tunes: Whether the weights are trained already. A tenth of the published epochs is enough then.
    """
    return Recipe(
        epochs=PUBLISHED_EPOCHS[task] / (10 if fine_tunes else 1),
        learning_rate=PUBLISHED_LEARNING_RATES[task] * (batch / 4) ** 0.5,
        backbone_learning_rate=None,
        schedule="constant",
        warmup_steps=0,
        weight_decay=1e-2,
        max_grad_norm=0.0,
        ema_decay=0.0,
        last_epochs=None,
        batch_statistics=True,
        flip=0.5,
        crop=1.0,
        rotate=0.2,
        noise=0.0015,
        color=1.0,
    )


def fine_tuning_recipe(photos: int, batch: int, backbone_kind: str) -> Recipe:
    """A short training that is safe with few photos and small batches.

    - Batch norms keep their running statistics. Statistics of a few photos, mixed into those of thousands, destroy
      the model even at a learning rate of 0 (docs/fine-tuning.md).
    - The gradient is clipped to norm 1. The sum of the losses has norms of 100 to 10,000, so nearly every update is
      clipped: no single photo dominates.
    - The learning rate rises for a fifth of the updates and then falls to 0 along a cosine.
    - Photos are mirrored, cropped, rotated and changed in colour, all moderately. Backgrounds stay: in most domains
      they belong to the task.

    Args:
        photos: Photos to train on. Small sets are seen more often: about 80 updates, in 2 to 40 epochs.
        batch: Photos in an update.
        backbone_kind: `"convolution"` or `"transformer"`. Transformers take smaller steps.
    """
    fewest, most = FINE_TUNING_EPOCHS
    learning_rate, backbone_learning_rate = FINE_TUNING_LEARNING_RATES[backbone_kind]
    return Recipe(
        epochs=min(max(round(FINE_TUNING_UPDATES / math.ceil(photos / batch)), fewest), most),
        learning_rate=learning_rate,
        backbone_learning_rate=backbone_learning_rate,
        schedule="cosine",
        warmup_steps=0.2,
        weight_decay=1e-2,
        max_grad_norm=1.0,
        ema_decay=0.98,
        last_epochs=0,
        batch_statistics=False,
        flip=0.5,
        crop=0.8,
        rotate=0.2,
        noise=0.0,
        color=0.4,
    )


def backbone_kind(backbone: str) -> str:
    """`"transformer"` for Swin and DINOv3 backbones and timm's vision transformers, else `"convolution"`."""
    return "transformer" if any(part in backbone for part in ("swin", "dino", "vit")) else "convolution"


def fill_in(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Sets each option that the user left open (`None`) to the recipe's value."""
    for field in fields(recipe):
        if getattr(arguments, field.name, None) is None:
            setattr(arguments, field.name, getattr(recipe, field.name))


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 several times faster than in float32.

    True for CPUs with AMX (Intel Xeon since 2023) and CUDA GPUs since Ampere (2020).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
