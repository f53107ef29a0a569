"""Output of `birefnet evaluate`: table, JSON, CSV, contact sheet of the worst cases, curves."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from birefnet.evaluation.metrics import LOWER_IS_BETTER, MEASURES, THRESHOLDS
from birefnet.photos.writing import write_whole


DIGITS = 4
"""Decimals of the table and of the model card."""
CURVES = {"precision": "precision", "recall": "recall", "F": "F_curve", "E": "E_curve", "boundary_iou": "BIoU_curve"}
"""Names of the curves: in the result file, and in the result of `birefnet.evaluation.metrics.measure`."""
PAGE = "#d8d8d8"
"""Background of the contact sheet. Differs from the black and the white of masks."""
TILE = 220
"""Longest side of a picture on the contact sheet, in pixels."""


@dataclass(frozen=True)
class PictureResult:
    """Measures of one picture.

    Attributes:
        name: Name of the pair in messages.
        size: (width, height) of the ground truth in pixels.
        measures: Result of `birefnet.evaluation.metrics.measure`.
    """

    name: str
    size: tuple[int, int]
    measures: dict[str, float | np.ndarray]


@dataclass(frozen=True)
class Case:
    """One row of the contact sheet, with pictures already reduced to tiles.

    Attributes:
        error: Mean absolute error. Ranks the cases.
        title: Text above the row.
        tiles: Photo (if there is one), ground truth, matte and difference, all of the same size.
    """

    error: float
    title: str
    tiles: tuple[Image.Image, ...]


def format_table(values: dict[str, float]) -> str:
    """Formats the measures as lines of text: name, value, and whether higher or lower is better."""
    width = max(map(len, MEASURES.values()))
    lines = []
    for name, title in MEASURES.items():
        better = "lower" if name in LOWER_IS_BETTER else "higher"
        lines.append(f"{title:{width}}  {format_value(values[name]):>10}  {better} is better")
    return "\n".join(lines)


def format_value(value: float | None) -> str:
    """Formats a measure with `DIGITS` decimals. nan and `None` (null in a result file) give `undefined`."""
    return "undefined" if value is None or math.isnan(value) else f"{value:.{DIGITS}f}"


def write_json(path: Path, result: dict, values: dict[str, float | np.ndarray]):
    """Writes the result file.

    Args:
        path: The file.
        result: Entries about model, data and settings. `measures` and `curves` are added.
        values: Result of `metrics.average`. Undefined measures become null. Curves are rounded to six decimals.
    """
    measures = {name: None if math.isnan(values[name]) else values[name] for name in MEASURES}
    curves = {name: np.round(values[key], 6).tolist() for name, key in CURVES.items()}
    complete = result | {"measures": measures, "curves": {"threshold": THRESHOLDS.tolist()} | curves}
    write_whole((json.dumps(complete, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(), path)


def write_csv(path: Path, pictures: list[PictureResult]):
    """Writes one line per picture: name, width, height and measures. Undefined measures are empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["name", "width", "height", *MEASURES])
    for picture in pictures:
        values = (picture.measures[name] for name in MEASURES)
        writer.writerow([picture.name, *picture.size, *("" if math.isnan(value) else repr(value) for value in values)])
    write_whole(text.getvalue().encode(), path)


def make_case(
    name: str, measures: dict[str, float | np.ndarray], photo: Image.Image | None, mask: np.ndarray, matte: np.ndarray
) -> Case:
    """Reduces a picture to a row of the contact sheet.

    Args:
        name: Name of the pair in messages.
        measures: Result of `birefnet.evaluation.metrics.measure`.
        photo: The RGB photo, if there is one.
        mask: Ground truth, uint8 (height, width).
        matte: Prediction, uint8, same shape.
    """
    pictures = [Image.fromarray(mask), Image.fromarray(matte), difference(matte, mask)]
    if photo is not None:
        pictures.insert(0, photo)
    values = ", ".join(f"{key} {format_value(measures[key])}" for key in ("MAE", "IoU", "wF", "mBA"))
    tiles = []
    for picture in pictures:
        tile = picture.convert("RGB")
        tile.thumbnail((TILE, TILE), Image.Resampling.BOX)
        tiles.append(tile)
    return Case(float(measures["MAE"]), f"{Path(name).name}: {values}", tuple(tiles))


def difference(matte: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Draws the error of a matte: red where it is too high, blue where it is too low, the gray mask elsewhere."""
    signed = matte.astype(np.int32) - mask
    gray = mask.astype(np.int32) // 2 + 64
    wrong = np.abs(signed)
    shown = gray * (255 - wrong) // 255
    # (height, width, 3)
    colours = np.stack([shown + np.maximum(signed, 0), shown, shown + np.maximum(-signed, 0)], axis=-1)
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8))


def draw_contact_sheet(cases: list[Case]) -> Image.Image:
    """Draws the cases below each other, in the given order, each with its title."""
    font = ImageFont.load_default()
    margin, line = 8, 16
    heads = ["ground truth", "matte", "difference: red too much, blue too little"]
    if len(cases[0].tiles) > len(heads):
        heads.insert(0, "photo")
    rows = [max(tile.height for tile in case.tiles) + line + margin for case in cases]
    width = margin + len(heads) * (TILE + margin)
    sheet = Image.new("RGB", (width, margin + line + sum(rows)), PAGE)
    canvas = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        canvas.text((margin + column * (TILE + margin), margin // 2), head, fill="black", font=font)
    top = margin + line
    for case, height in zip(cases, rows, strict=True):
        canvas.text((margin, top), _fitting(case.title, font, width - 2 * margin), fill="black", font=font)
        for column, tile in enumerate(case.tiles):
            sheet.paste(tile, (margin + column * (TILE + margin), top + line))
        top += height
    return sheet


def _fitting(text: str, font: ImageFont.ImageFont, width: int) -> str:
    """Shortens the text at its start until it fits. The end of a path says more than its start."""
    if font.getlength(text) <= width:
        return text
    start = next(start for start in range(1, len(text) + 1) if font.getlength("..." + text[start:]) <= width)
    return "..." + text[start:]


def write_contact_sheet(path: Path, cases: list[Case]):
    """Writes the contact sheet as PNG."""
    encoded = io.BytesIO()
    draw_contact_sheet(cases).save(encoded, "png")
    write_whole(encoded.getvalue(), path)


def write_curves(path: Path, values: dict[str, float | np.ndarray], title: str):
    """Writes two plots into one PNG: precision over recall, and F-measure over the threshold.

    Args:
        path: The file.
        values: Result of `birefnet.evaluation.metrics.average`.
        title: Text above the plots.
    """
    # Without pyplot, matplotlib needs no display and keeps no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    figure.suptitle(title)
    precision_recall, f_measure = figure.subplots(1, 2)
    precision_recall.plot(values["recall"], values["precision"])
    precision_recall.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    f_measure.plot(THRESHOLDS, values["F_curve"])
    best = int(np.argmax(values["F_curve"]))
    highest, threshold = values["F_curve"][best], THRESHOLDS[best]
    f_measure.plot(threshold, highest, "o", label=f"maximum {highest:.{DIGITS}f} at {threshold}")
    f_measure.set(xlabel="threshold of 255", ylabel="F-measure (β² = 0.3)", xlim=(0, 255), ylim=(0, 1.02))
    f_measure.legend(loc="lower center")
    for axes in (precision_recall, f_measure):
        axes.grid(alpha=0.3)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=120)
    write_whole(encoded.getvalue(), path)
