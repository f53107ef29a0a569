"""README.md of a model that `birefnet train` has written: what it is, what it learned from, what was measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import ModelCardData


TAGS = ("background-removal", "image-matting", "image-segmentation", "birefnet")

TEXT = """\
---
{metadata}
---

# {name}

A [BiRefNet](https://arxiv.org/abs/2401.03407) that separates the subject of a photo from its background.
Backbone `{backbone}`, {parameters:,} parameters, trained at {resolution} by `birefnet train`.

```python
from transformers import pipeline

remove_background = pipeline("background-removal", model="{name}", trust_remote_code=True)
remove_background("photo.jpg").save("cutout.png")
```

## Training

- Started from: {start}
- Data: {data} ({training_pairs:,} photos with masks)
- Task of the losses: {task}; updates: {step:,}; epochs: {epoch:.4g}; seed: {seed}

## Validation

{validation}
"""


def training_card(arguments: argparse.Namespace, trainer, state, metrics: dict[str, float]) -> str:
    """Text of the card.

    Args:
        arguments: Those of `birefnet train`.
        trainer: The `BiRefNetTrainer`.
        state: Its state when the model was the best.
        metrics: What its validation measured then.
    """
    model, size = trainer.model, trainer.processing_class.size
    is_new = arguments.init_config or hasattr(arguments, "backbone")
    base = None if is_new else arguments.model
    data = ModelCardData(
        license="unknown",  # it depends on the data and the weights that it started from; for the owner to say
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=list(TAGS),
        base_model=base if base and base.count("/") == 1 and not Path(base).exists() else None,
    )
    return TEXT.format(
        metadata=data.to_yaml(),
        name=arguments.push_to_hub or arguments.output.resolve().name,
        backbone=model.config.backbone,
        parameters=sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
        resolution=f"{size['width']}×{size['height']} pixels",
        start=_start(arguments, is_new),
        data=", ".join(_shown(source) for source in arguments.data),
        training_pairs=len(trainer.train_dataset),
        task=model.config.task,
        step=state.global_step,
        epoch=state.epoch or 0,
        seed=arguments.seed,
        validation=_validation(arguments, trainer, metrics),
    )


def _start(arguments: argparse.Namespace, is_new: bool) -> str:
    if not is_new:
        return f"`{_shown(arguments.model)}`" if arguments.model else "the weights of the project's repository"
    return "scratch" + (", the backbone from ImageNet weights" if arguments.imagenet_backbone else "")


def _shown(source: str) -> str:
    """A Hub id as it is; of a path its last part, since folders of one's machine concern nobody else."""
    return source if source.count("/") == 1 and not Path(source).exists() else Path(source).name


def _validation(arguments: argparse.Namespace, trainer, metrics: dict[str, float]) -> str:
    if not metrics:
        return "None: no data was held out."
    source = ", ".join(map(_shown, arguments.validation_data or ())) or "held out of the training data"
    return (
        f"On {len(trainer.eval_dataset):,} photos ({source}), at the masks' own size: mean absolute error "
        f"{metrics['eval_mae']:.4f}, mean intersection over union at 0.5 {metrics['eval_iou']:.4f}. The epoch was "
        "chosen by this mean absolute error."
    )
