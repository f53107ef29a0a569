"""What a training reports: the course of the validation, its verdict in words, a curve and a contact sheet.

Everything is computed from `TrainerState.log_history`, which checkpoints hold, so a resumed run reports the whole
course.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from transformers import TrainerCallback, TrainerState


logger = logging.getLogger(__name__)

WORSE_IN_A_ROW = 3
STOP_FACTOR = 2.0
STOP_RISE = 0.1  # of MAE + (1 − IoU)
CURVE_FILE, SHEET_FILE = "curve.png", "before_after.png"
SHEET_SIDE = 224  # pixels of a picture's longer side in the contact sheet
TITLE_HEIGHT = 20  # pixels

ADVICE = (
    "Look at before_after.png first: wrong or inconsistent masks are the most frequent cause. Then try more photos, "
    "a lower --learning-rate (a quarter), or a --resolution at which small details of the photos are still visible."
)
LEARNED_BY_HEART = (
    "Meanwhile the loss on the training photos fell from {:.3g} to {:.3g}: the model learned these photos by heart. "
    "Add photos that show more variety. If the mattes before the training (before_after.png) are good, keep the model "
    "as it is: it knows such photos already."
)
FALLEN_LOSS = 0.8  # A loss below this part of the first one has fallen. Augmentation alone moves it by less.


@dataclass(frozen=True)
class Validation:
    """One validation of a training.

    Attributes:
        epoch: Epochs trained so far; 0 is before the training.
        mae: Mean absolute error, in [0, 1].
        iou: Mean intersection over union, in [0, 1].
    """

    epoch: float
    mae: float
    iou: float

    @property
    def error(self) -> float:
        """MAE + (1 − IoU), in [0, 2]. The epoch with the lowest error is kept.

        MAE alone would prefer a model that finds nothing where subjects are small. IoU alone ignores soft edges.
        """
        return error_of(self.mae, self.iou)


def error_of(mae: float, iou: float) -> float:
    """MAE + (1 − IoU), see `Validation.error`."""
    return mae + (1 - iou)


@dataclass(frozen=True)
class Course:
    """The validations of a training in their order.

    Attributes:
        before: The validation before the first update, of a fine-tuned model; `None` for a new network.
        epochs: The validations after each epoch.
        planned_epochs: How many epochs the training was to have.
        losses: The logged training losses, each a mean over some updates.
    """

    before: Validation | None
    epochs: tuple[Validation, ...]
    planned_epochs: float
    losses: tuple[float, ...] = ()

    @property
    def best(self) -> Validation | None:
        """The validation with the lowest error, including that before the training."""
        measured = [*([self.before] if self.before else []), *self.epochs]
        return min(measured, key=lambda validation: validation.error, default=None)

    @property
    def best_epoch(self) -> Validation | None:
        """The validation with the lowest error after the training began."""
        return min(self.epochs, key=lambda validation: validation.error, default=None)

    @property
    def is_improved(self) -> bool:
        """Whether an epoch is kept; `False` if the model stays as it was."""
        return self.best is not None and self.best is not self.before

    @property
    def is_learned_by_heart(self) -> bool:
        """Whether the training loss fell although no epoch is better than the model before the training."""
        fell = len(self.losses) > 1 and self.losses[-1] < FALLEN_LOSS * self.losses[0]
        return fell and not self.is_improved

    @property
    def last(self) -> Validation | None:
        return self.epochs[-1] if self.epochs else None

    @property
    def worse_in_a_row(self) -> int:
        """Number of latest epochs, without a gap, that were worse than before the training."""
        count = 0
        for validation in reversed(self.epochs):
            if self.before is None or validation.error <= self.before.error:
                break
            count += 1
        return count

    @property
    def is_ruined(self) -> bool:
        """Whether MAE or 1 − IoU has at least doubled, and the error has risen by at least 0.1.

        The first updates make a nearly perfect model slightly worse, which may double a very small error. The later
        updates make up for it (docs/fine-tuning.md).
        """
        if self.before is None or self.last is None or self.last.error < self.before.error + STOP_RISE:
            return False
        doubled_mae = self.last.mae >= STOP_FACTOR * self.before.mae
        return doubled_mae or 1 - self.last.iou >= STOP_FACTOR * (1 - self.before.iou)


def course_of(state: TrainerState) -> Course:
    """The course of a training so far."""
    found = {
        entry["step"]: Validation(entry.get("epoch") or 0.0, entry["eval_mae"], entry["eval_iou"])
        for entry in state.log_history
        if "eval_mae" in entry
    }
    before = found.pop(0, None)
    losses = tuple(entry["loss"] for entry in state.log_history if "loss" in entry)
    return Course(before, tuple(found[step] for step in sorted(found)), state.num_train_epochs, losses)


def verdict(course: Course, photos: int) -> str:
    """The result of a training in a few sentences.

    Args:
        course: All validations.
        photos: Number of validation photos.
    """
    if course.last is None:
        return "Not validated: no photos were held out, so nothing is known about the quality."
    best, before = course.best, course.before
    on = f"on the {photos} validation photos" if photos > 1 else "on the one validation photo"
    if before is None:
        return f"The best model has mean absolute error {best.mae:.4f} and IoU {best.iou:.3f} {on} ({_epoch(best)})."
    stopped = " The training was stopped, because the error doubled." if course.is_ruined else ""
    if best is before:
        nearest = course.best_epoch
        advice = ADVICE
        if course.is_learned_by_heart:
            advice = LEARNED_BY_HEART.format(course.losses[0], course.losses[-1])
        return (
            f"Not improved: {on}, mean absolute error was {before.mae:.4f} and IoU {before.iou:.3f} before the "
            f"training. The best epoch has {nearest.mae:.4f} and {nearest.iou:.3f}. The folder holds the model as it "
            f"was.{stopped} {advice}"
        )
    text = (
        f"Improved: {on}, mean absolute error went from {before.mae:.4f} to {best.mae:.4f} and IoU from "
        f"{before.iou:.3f} to {best.iou:.3f} (best: {_epoch(best)} of {course.planned_epochs:g}).{stopped}"
    )
    worse = [name for name, is_worse in (("IoU", best.iou < before.iou), ("MAE", best.mae > before.mae)) if is_worse]
    if worse:
        text += f" {worse[0]} alone got worse: look at before_after.png before you use the model."
    elif best is course.last:
        text += " The last epoch was the best, so more epochs may improve it further."
    return text


def _epoch(validation: Validation) -> str:
    return f"epoch {validation.epoch:.4g}"


def results(course: Course) -> dict[str, float]:
    """The validations before, best and last as numbers, for the line of JSON at the end of `birefnet train`."""
    named = {"_before": course.before, "": course.best, "_last": course.last}
    return {
        f"{measure}{suffix}": getattr(validation, measure)
        for measure in ("mae", "iou")
        for suffix, validation in named.items()
        if validation is not None
    }


class ValidationWatch(TrainerCallback):
    """Reports each validation. Warns when fine-tuning makes the model worse, and stops it when the error doubles."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        course = course_of(state)
        latest, before = course.last or course.before, course.before
        moment = "before training" if course.last is None else _epoch(latest)
        change = f" ({latest.mae / before.mae - 1:+.0%})" if course.last and before and before.mae else ""
        logger.info("Validation, %s: mean absolute error %.4f%s, IoU %.3f", moment, latest.mae, change, latest.iou)
        if course.is_ruined:
            logger.warning(
                "Stopped: the validation is much worse than before training (mean absolute error %.4f, then %.4f; IoU "
                "%.3f, then %.3f). The best model is kept. Try a lower --learning-rate.",
                before.mae,
                latest.mae,
                before.iou,
                latest.iou,
            )
            control.should_training_stop = True
        elif course.worse_in_a_row == WORSE_IN_A_ROW:
            logger.warning(
                "The validation has been worse than before training for %d epochs. The best model is kept.",
                WORSE_IN_A_ROW,
            )


class SampleMattes(TrainerCallback):
    """Keeps mattes of a few validation photos, from before the training and of the best epoch, and shows all of them.

    Args:
        trainer: The `BiRefNetTrainer`.
        folder: Where the pictures are kept, so that a resumed run has them.
        writer: A TensorBoard `SummaryWriter`, or `None`.
    """

    count = 6

    def __init__(self, trainer, folder: Path, writer=None):
        self.trainer, self.folder, self.writer = trainer, folder, writer

    def on_evaluate(self, args, state, control, **kwargs):
        total = len(self.trainer.eval_dataset)
        strips = {row: self.trainer.sample_matte(row) for row in range(0, total, -(-total // self.count))}
        for row, strip in strips.items() if self.writer is not None else ():
            self.writer.add_image(f"validation/{row}", strip, state.global_step)
        course = course_of(state)
        if course.last is None:
            self._keep(strips, "before")
        elif course.best_epoch is course.last:
            self._keep(strips, "best")

    def _keep(self, strips: dict, moment: str):
        folder = self.folder / moment
        folder.mkdir(parents=True, exist_ok=True)
        for row, strip in strips.items():
            _picture(strip).save(folder / f"{row:04}.png")

    def sheet(self, course: Course) -> Image.Image:
        """A row for each sample: photo, mask, matte before the training if there was a model, matte of the best epoch.

        The title of the last column tells whether that epoch is worse than the model before the training.
        """
        has_before = (self.folder / "before").exists()
        after = "after" if course.is_improved else "after (worse, not kept)"
        rows = [_title_row(("photo", "mask", *(("before",) if has_before else ()), after), self.folder / "best")]
        for path in sorted((self.folder / "best").glob("*.png")):
            photo, mask, after = _thirds(path)
            before = [_thirds(self.folder / "before" / path.name)[2]] if has_before else []
            rows.append(_beside([photo, mask, *before, after]))
        return _below(rows)


def _title_row(titles: tuple[str, ...], folder: Path) -> Image.Image:
    """A row with a title above each column of the folder's pictures."""
    width = Image.open(next(folder.glob("*.png"))).width // 3
    row = Image.new("RGB", (width * len(titles), TITLE_HEIGHT), "white")
    draw = ImageDraw.Draw(row)
    for column, title in enumerate(titles):
        draw.text((width * (column + 0.5), TITLE_HEIGHT / 2), title, "black", anchor="mm")
    return row


def _thirds(path: Path) -> list[Image.Image]:
    picture = Image.open(path)
    width = picture.width // 3
    return [picture.crop((left, 0, left + width, picture.height)) for left in (0, width, 2 * width)]


def _picture(pixels) -> Image.Image:
    """(3, H, W) in [0, 1] → an RGB picture, reduced to the size of the contact sheet."""
    array = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    picture = Image.fromarray(array)
    scale = min(1.0, SHEET_SIDE / max(picture.height, picture.width // 3))
    width = 3 * max(1, round(picture.width / 3 * scale))
    return picture.resize((width, max(1, round(picture.height * scale))))


def _beside(parts: list[Image.Image]) -> Image.Image:
    """Pictures of one height side by side."""
    whole, left = Image.new("RGB", (sum(part.width for part in parts), parts[0].height)), 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width
    return whole


def _below(rows: list[Image.Image]) -> Image.Image:
    """Pictures of one width below each other."""
    whole, top = Image.new("RGB", (rows[0].width, sum(row.height for row in rows))), 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole


def draw_curve(course: Course, state: TrainerState, path: Path) -> None:
    """Draws the validation's course and the training loss as a PNG picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, measure, name in (
        (axes[0], "mae", "validation: mean absolute error"),
        (axes[1], "iou", "validation: IoU"),
    ):
        points = [*([course.before] if course.before else []), *course.epochs]
        ax.plot([p.epoch for p in points], [getattr(p, measure) for p in points], "o-", markersize=3, color="#1f6feb")
        if course.before is not None:
            ax.axhline(getattr(course.before, measure), color="#888888", linestyle="--", linewidth=1, label="before")
        best = course.best
        ax.plot([best.epoch], [getattr(best, measure)], "o", color="#d4351c", label="kept")
        ax.set_title(name, fontsize=9)
        ax.legend(fontsize=8)
    losses = [(entry["epoch"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    if losses:
        axes[2].plot(*zip(*losses, strict=True), color="#1f6feb", linewidth=1)
    axes[2].set_title("training: loss", fontsize=9)
    for ax in axes:
        ax.set_xlabel("epoch", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
