"""The README.md of a model that `birefnet train` has written: its network, its data, and how it was measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import ModelCardData

from birefnet.training.progress import CURVE_FILE, SHEET_FILE, Course, course_of, verdict


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


def training_card(arguments: argparse.Namespace, trainer, state, is_final: bool = False) -> str:
    """Text of the card.

    Args:
        arguments: The options of `birefnet train`.
        trainer: The `BiRefNetTrainer`.
        state: Its state.
        is_final: Whether the training is over, and curve and contact sheet lie beside the card.
    """
    model, size, course = trainer.model, trainer.processing_class.size, course_of(state)
    is_new = arguments.init_config or hasattr(arguments, "backbone")
    base = None if is_new else arguments.model
    data = ModelCardData(
        license="unknown",  # It depends on the data and on the first weights. The owner has to fill it in.
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
        validation=_validation(arguments, trainer, course, is_final),
    )


def _start(arguments: argparse.Namespace, is_new: bool) -> str:
    if not is_new:
        return f"`{_shown(arguments.model)}`" if arguments.model else "the weights of the project's repository"
    return "scratch" + (", the backbone from ImageNet weights" if arguments.imagenet_backbone else "")


def _shown(source: str) -> str:
    """A Hub id, or the last part of a path. The other folders are private to the author's machine."""
    return source if source.count("/") == 1 and not Path(source).exists() else Path(source).name


def _validation(arguments: argparse.Namespace, trainer, course: Course, is_final: bool) -> str:
    if trainer.eval_dataset is None:
        return verdict(course, 0)
    source = ", ".join(map(_shown, arguments.validation_data or ())) or "held out of the training data"
    rows = {"before training": course.before, "this model": course.best, "after the last epoch": course.last}
    table = "\n".join(
        f"| {name} | {v.epoch:.4g} | {v.mae:.4f} | {v.iou:.4f} |" for name, v in rows.items() if v is not None
    )
    parts = [
        f"On {len(trainer.eval_dataset):,} photos ({source}), at the masks' own size. The epoch with the lowest "
        "MAE + (1 − IoU) was kept, so its values are a little too good. Epoch 0 is the model before the training.",
        f"| weights | epoch | mean absolute error | mean IoU at 0.5 |\n| --- | ---: | ---: | ---: |\n{table}",
    ]
    if is_final:
        parts.append(verdict(course, len(trainer.eval_dataset)))
        if course.last is not None:
            columns = "photo, mask, matte"
            if course.before:
                after = "of this model" if course.is_improved else "after the best epoch, which was not kept"
                columns = f"photo, mask, matte before training, matte {after}"
            parts.append(f"![Validation by epoch]({CURVE_FILE})\n\n![{columns}]({SHEET_FILE})\n\n({columns})")
    return "\n\n".join(parts)
