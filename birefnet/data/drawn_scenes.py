"""`birefnet draw`: draws training pairs of objects with thin parts and gaps on backgrounds from real photos.

Public training sets show few legs, spokes, strands and holes, and their masks often omit them. Here the object is a
drawing, so its soft mask is exact. The photo is alpha·F + (1 - alpha)·B with a foreground texture F and a background
B. Both are mostly crops of real photos.

A shape is a list of `Part`s in its own coordinates: x points right, y points down, and the shape is about one unit
long. Its coordinates are transformed before it is drawn, so no resampling blurs its edges.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from birefnet.errors import CommandError, UsageError


logger = logging.getLogger(__name__)

DESCRIPTION = """\
Draw training pairs: objects with thin parts, gaps and holes (furniture, wheels, strands, trees, fences, insects …)
with textures and backgrounds from your photos, and exact soft masks."""

EXAMPLES = """\
examples:
  birefnet draw drawn/ --photos my_photos/                    # 1500 pairs in drawn/im/ and drawn/gt/
  birefnet draw drawn/ --photos 'train-*.parquet' --number 3000 --side 512 --seed 48
  birefnet train --data my_photos/ drawn/ --output my_model   # train on both

The same photos, side and seed give the same pairs. A larger --number only adds pairs."""

SMALLEST_SIDE = 64
SUPERSAMPLING = 4
POOL = 200  # photos in memory: at most 200·4·side² bytes
BACKGROUND_SHARE = 0.03  # largest share of a background that may show its photo's object
CONTRAST = 55  # smallest distance between the mean colours of object and background, in RGB of 0 to 255
SHADES = (0, 38)  # largest difference of a part's tone from 128: all parts equal, or each with its own tone
HIDDEN_SHARE = 0.1  # largest share of an object whose colour is closer than CONTRAST / 2 to the background

Photos = Sequence[tuple[Image.Image, Image.Image]]
"""Pairs of an RGB photo and its mask in 8-bit grey."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `birefnet draw`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("output", type=Path, metavar="FOLDER", help="new or empty folder for im/ and gt/")
    parser.add_argument(
        "--photos",
        nargs="+",
        required=True,
        metavar="SOURCE",
        help="photos for the textures: folders with im/ and gt/, parquet files, globs, or Hub data set ids",
    )
    parser.add_argument("--image-column", default="image", help="column of the photos in tables (default: image)")
    parser.add_argument("--mask-column", default="mask", help="column of the masks in tables (default: mask)")
    parser.add_argument("--number", type=int, default=1500, help="number of pairs to draw (default: 1500)")
    parser.add_argument("--side", type=int, default=512, help="width and height in pixels (default: 512)")
    parser.add_argument("--seed", type=int, default=42, help="default: 42")


def run(arguments: argparse.Namespace) -> int:
    """Runs `birefnet draw` and returns its exit code."""
    # Imported here because these modules import torch, which would delay --help.
    from tqdm.auto import tqdm

    from birefnet.data.pairs import MASK_FOLDER, PHOTO_FOLDER, read_pairs

    check_arguments(arguments)
    output, side, seed = arguments.output, arguments.side, arguments.seed
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise CommandError(f"{output} exists already; give the name of a new or empty folder")
        photos = read_photos(read_pairs(arguments.photos, arguments.image_column, arguments.mask_column), side, seed)
        for name in (PHOTO_FOLDER, MASK_FOLDER):
            (output / name).mkdir(parents=True, exist_ok=True)
        for number in tqdm(range(arguments.number), "drawing", unit="picture", disable=None):
            photo, mask = draw_scene(photos, side, seed, number)
            photo.save(output / PHOTO_FOLDER / f"{number:05}.jpg", quality=95)
            mask.save(output / MASK_FOLDER / f"{number:05}.png")
    except (ImportError, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    return 0


def check_arguments(arguments: argparse.Namespace):
    """Raises a UsageError if a number is too small."""
    for option, smallest in (("number", 1), ("side", SMALLEST_SIDE), ("seed", 0)):
        value = getattr(arguments, option)
        if value < smallest:
            raise UsageError(f"--{option} {value}: at least {smallest}")


def read_photos(pairs: Sequence, side: int, seed: int) -> Photos:
    """Reads up to `POOL` random pairs and reduces them to at most `side` pixels. Reports and skips bad pairs.

    Args:
        pairs: The `birefnet.data.pairs.Pair`s.
        side: Longest side in pixels.
        seed: Seed of the choice of pairs.

    Raises:
        ValueError: None of the pairs can be used.
    """
    from birefnet.data.pairs import BadPairError, decode_pair

    photos = []
    for row in np.random.default_rng(seed).permutation(len(pairs)):
        try:
            photo, mask = decode_pair(pairs[row])
        except BadPairError as error:
            logger.warning("Skipped: %s", error)
            continue
        photo.thumbnail((side, side))
        photos.append((photo, mask.resize(photo.size, Image.Resampling.BOX)))
        if len(photos) == POOL:
            break
    if not photos:
        raise ValueError(f"None of the {len(pairs)} pairs of photo and mask can be used.")
    return photos


# --- A scene ---


def draw_scene(photos: Photos, side: int, seed: int, number: int) -> tuple[Image.Image, Image.Image]:
    """Draws one pair. It does not depend on other pairs, so each number can be drawn on its own.

    Args:
        photos: Photos for the textures.
        side: Width and height in pixels.
        seed: Seed of all pairs.
        number: Number of this pair.

    Returns:
        The photo as RGB and its mask as 8-bit grey.
    """
    random = np.random.default_rng((seed, number))
    parts = move(random, SHAPES[random.integers(len(SHAPES))](random))
    mask = rasterize(parts, side)
    background = draw_background(random, photos, side)
    spread = random.choice(SHADES)
    inks = random.integers(128 - spread, 129 + spread, len(parts))
    tones = np.asarray(rasterize(parts, side, inks, paper=128))[..., None] / 128
    foreground = draw_foreground(random, photos, mask, tones, background)
    photo = composite(mask, foreground, background)
    return expose(random, photo, mask)


def composite(mask: Image.Image, foreground: np.ndarray, background: np.ndarray) -> Image.Image:
    """Computes alpha·F + (1 - alpha)·B of two (side, side, 3) arrays in [0, 255]. Alpha is the 8-bit mask / 255."""
    alpha = np.asarray(mask)[..., None] / 255
    return to_picture(alpha * foreground + (1 - alpha) * background)


def expose(random: np.random.Generator, photo: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Imitates a camera: sometimes blurs photo and mask slightly, and sometimes adds noise to the photo."""
    if random.random() < 0.4:
        blur = ImageFilter.GaussianBlur(random.uniform(0.4, 1.2))
        photo, mask = photo.filter(blur), mask.filter(blur)
    if random.random() < 0.4:
        photo = to_picture(photo + random.normal(0, random.uniform(1, 6), (photo.height, photo.width, 3)))
    return photo, mask


def to_picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


# --- Textures: (side, side, 3) arrays in [0, 255] ---


def draw_foreground(
    random: np.random.Generator, photos: Photos, mask: Image.Image, tones: np.ndarray, background: np.ndarray
) -> np.ndarray:
    """Draws a texture that differs visibly from the background, on average and at nearly every pixel.

    The required difference of the mean colours grows with the variation of the background, because thin parts are
    hard to see in front of, for example, foliage.

    Args:
        random: Random number generator.
        photos: Photos for the textures.
        mask: Mask of the object.
        tones: Factor of the brightness at each pixel, (side, side, 1). The parts of an object are lit differently.
        background: The background behind the object.
    """
    side = mask.width
    nearby = np.asarray(to_picture(background).filter(ImageFilter.GaussianBlur(0.03 * side)), dtype=np.float64)
    near = mean_color(background, mask)
    inside = np.asarray(mask) > 127
    contrast = max(CONTRAST, 1.25 * np.linalg.norm((background - near)[inside], axis=-1).mean())
    for _ in range(8):
        texture = (draw_texture(random, photos, side) * tones).clip(0, 255)
        mean = mean_color(texture, mask)
        differences = np.linalg.norm((texture - nearby)[inside], axis=-1)
        if np.linalg.norm(mean - near) >= contrast and np.mean(differences < CONTRAST / 2) < HIDDEN_SHARE:
            return texture
    # No texture differed enough. Shift one towards black or white, whichever is farther, with half of its contrast.
    shift = 80 if near.mean() < 128 else -80
    return (nearby + shift + (texture - mean) / 2).clip(0, 255)


def mean_color(pixels: np.ndarray, weights: Image.Image) -> np.ndarray:
    return np.average(pixels.reshape(-1, 3), axis=0, weights=np.asarray(weights).ravel())


def draw_texture(random: np.random.Generator, photos: Photos, side: int) -> np.ndarray:
    """Draws a plain colour or gradient, or takes a crop from a photo's object or from anywhere in a photo."""
    if random.random() < 0.35:
        return draw_plain(random, side)
    photo, mask = photos[random.integers(len(photos))]
    within = random.random() < 0.6
    box = crop_within(random, mask) if within else crop_anywhere(random, photo, 0.4)
    contrast, brightness = random.uniform(0.6, 1.4), random.uniform(-50, 50)
    pixels = fill_square(random, photo.crop(box), side).astype(np.float64)
    return ((pixels - 128) * contrast + 128 + brightness).clip(0, 255)


def draw_background(random: np.random.Generator, photos: Photos, side: int) -> np.ndarray:
    """Draws a plain colour or gradient, or takes a part of a photo without its object, sometimes out of focus."""
    if random.random() < 0.25:
        return draw_plain(random, side)
    for _ in range(8):
        photo, mask = photos[random.integers(len(photos))]
        if box := find_clear_square(random, mask):
            picture = photo.resize((side, side), Image.Resampling.BICUBIC, box)
            blur = random.uniform(0.005, 0.03) * side if random.random() < 0.35 else 0
            break
    else:  # No photo has a large enough part without its object. Blur one until nothing can be recognized.
        picture = photo.resize((side, side), Image.Resampling.BICUBIC)
        blur = random.uniform(0.04, 0.15) * side
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), dtype=np.float64)


def draw_plain(random: np.random.Generator, side: int) -> np.ndarray:
    """Draws one colour, from grey to vivid, or a gradient between two similar colours, with slight noise."""
    first = random.uniform(0, 255) + random.normal(0, random.uniform(0, 60), 3)
    second = first + random.normal(0, 50, 3) * (random.random() < 0.6)
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:side, :side] / side - 0.5
    share = (0.5 + 0.7 * (np.cos(angle) * columns + np.sin(angle) * rows))[..., None]
    noise = random.normal(0, random.uniform(1, 5), (side, side, 3))
    return (first.clip(0, 255) * (1 - share) + second.clip(0, 255) * share + noise).clip(0, 255)


def crop_anywhere(random: np.random.Generator, photo: Image.Image, smallest: float) -> tuple[int, int, int, int]:
    """A random square (left, top, right, bottom). Its side is at least `smallest` times the photo's shorter side."""
    length = max(2, round(random.uniform(smallest, 1) * min(photo.size)))
    left, top = (random.integers(size - length + 1) for size in photo.size)
    return int(left), int(top), int(left + length), int(top + length)


def find_clear_square(random: np.random.Generator, mask: Image.Image) -> tuple[int, int, int, int] | None:
    """Finds a large square (left, top, right, bottom) that shows almost no object, or returns `None`.

    Large squares are tried first, because a crop that is enlarged much does not look like a photo.
    """
    sums = np.pad(np.asarray(mask, dtype=np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for share in np.array([1, 0.85, 0.72, 0.6, 0.5, 0.42, 0.35]) * random.uniform(0.85, 1):
        length = max(2, round(share * min(mask.size)))
        shown = sums[length:, length:] - sums[:-length, length:] - sums[length:, :-length] + sums[:-length, :-length]
        tops, lefts = np.nonzero(shown < BACKGROUND_SHARE * 255 * length**2)
        if len(tops):
            row = random.integers(len(tops))
            left, top = int(lefts[row]), int(tops[row])
            return left, top, left + length, top + length
    return None


def crop_within(random: np.random.Generator, mask: Image.Image) -> tuple[int, int, int, int]:
    """Draws 12 random squares (left, top, right, bottom) and returns the one that the mask fills most."""
    rows, columns = np.nonzero(np.asarray(mask) > 127)
    if not len(rows):  # No pixel of the mask is above one half.
        return crop_anywhere(random, mask, 0.1)
    boxes = []
    for length in random.uniform(0.15, 0.5, 12) * min(mask.size):
        pixel, half = random.integers(len(rows)), max(1, round(length / 2))
        column, row = (
            int(np.clip(at, half, max(half, size - half)))
            for at, size in zip((columns[pixel], rows[pixel]), mask.size, strict=True)
        )
        boxes.append((column - half, row - half, column + half, row + half))
    return max(boxes, key=lambda box: np.asarray(mask.crop(box)).mean())


def fill_square(random: np.random.Generator, crop: Image.Image, side: int) -> np.ndarray:
    """Enlarges a square crop and mirrors it to fill a square of `side` pixels. Enlarging alone would blur it."""
    length = round(random.uniform(min(crop.width, side), side))
    pixels = np.asarray(crop.resize((length, length), Image.Resampling.BICUBIC))
    return np.pad(pixels, ((0, side - length), (0, side - length), (0, 0)), mode="symmetric")


# --- Parts ---


@dataclass(frozen=True)
class Part:
    """A polygon or a line.

    Attributes:
        points: The corners, (n, 2) as x and y.
        widths: Width of the line at each point, (n,), in the same unit. `None` for a polygon.
        ink: Whether the part belongs to the object. If not, it cuts a hole into earlier parts.
    """

    points: np.ndarray
    widths: np.ndarray | None = None
    ink: bool = True


def fill(points, ink: bool = True) -> Part:
    return Part(np.asarray(points, dtype=np.float64), ink=ink)


def line(points, width: float, end_width: float | None = None) -> Part:
    """A line of constant width, or of a width that changes to `end_width`."""
    points = np.asarray(points, dtype=np.float64)
    return Part(points, np.linspace(width, width if end_width is None else end_width, len(points)))


def ellipse(center, radii, first: float = 0, last: float = 2 * np.pi) -> np.ndarray:
    """65 points (65, 2) of an ellipse, or of its arc between two angles in radians."""
    angles = np.linspace(first, last, 65)
    return np.asarray(center) + np.stack([np.cos(angles), np.sin(angles)], 1) * radii


def rectangle(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def blob(random: np.random.Generator, center, radius: float, roughness: float = 0.25) -> np.ndarray:
    """96 points (96, 2) of a smooth closed curve around a centre."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    waves = np.arange(1, 7)[:, None]
    heights = random.normal(0, roughness, (6, 1)) / waves
    radii = 1 + (heights * np.cos(waves * angles + random.uniform(0, 2 * np.pi, (6, 1)))).sum(0)
    return np.asarray(center) + radius * radii.clip(0.3)[:, None] * unit(angles)


def path(random: np.random.Generator, start, angle: float, length: float, bend: float, count: int = 12) -> np.ndarray:
    """Points (count, 2) of a curve. It starts in the direction `angle` and turns by about `bend`, both in radians."""
    way = np.linspace(0, 1, count)[:-1]
    angles = angle + bend * way + random.normal(0, 0.3 * abs(bend) + 1e-3) * np.sin(2 * np.pi * way)
    steps = unit(angles) * (length / (count - 1))
    return np.asarray(start) + np.concatenate([np.zeros((1, 2)), steps.cumsum(0)])


def unit(angles) -> np.ndarray:
    """Unit vectors (…, 2) of angles in radians."""
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def thin(random: np.random.Generator, widest: float = 0.032) -> float:
    """A random line width, log-uniform from 0.005 to `widest`. In the picture it is about 0.25 to 3 % of the side."""
    return float(np.exp(random.uniform(np.log(0.005), np.log(max(widest, 0.0051)))))


def move(random: np.random.Generator, parts: list[Part]) -> list[Part]:
    """Rotates, stretches, scales and places a shape in the picture, whose coordinates run from 0 to 1."""
    angle = random.uniform(-np.pi, np.pi) if random.random() < 0.15 else np.radians(random.uniform(-30, 30))
    stretch = np.exp(random.uniform(-0.2, 0.2))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ [[stretch * random.choice((-1, 1)), random.uniform(-0.15, 0.15)], [0, 1 / stretch]]
    parts = [replace(part, points=part.points @ matrix.T) for part in parts]
    margins = [0 if part.widths is None else part.widths[:, None] / 2 for part in parts]
    low = np.min([(part.points - margin).min(0) for part, margin in zip(parts, margins, strict=True)], 0)
    high = np.max([(part.points + margin).max(0) for part, margin in zip(parts, margins, strict=True)], 0)
    scale = random.uniform(0.35, 0.95) / (high - low).max()
    center = 0.5 + random_offset(random, (high - low) * scale)
    middle = (low + high) / 2
    return [
        Part((part.points - middle) * scale + center, None if part.widths is None else part.widths * scale, part.ink)
        for part in parts
    ]


def random_offset(random: np.random.Generator, extent: np.ndarray) -> np.ndarray:
    """Offset of a box of this width and height from the picture's centre: near it, anywhere, or across the border."""
    slack = (1 - extent) / 2
    kind = random.random()
    if kind < 0.65:
        return random.normal(0, 0.08, 2).clip(-slack, slack)
    offset = random.uniform(-slack, slack)
    if kind > 0.85:
        axis = random.integers(2)
        offset[axis] = random.choice((-1, 1)) * (slack[axis] + random.uniform(0, 0.25) * extent[axis])
    return offset


def rasterize(parts: Sequence[Part], side: int, inks: Sequence[int] | None = None, paper: int = 0) -> Image.Image:
    """Draws parts with coordinates from 0 to 1 in 8-bit grey. Edge pixels have the grey of their coverage.

    Args:
        parts: The parts. Later parts are drawn over earlier ones.
        side: Width and height in pixels.
        inks: Grey of each part. `None`: 255 for all.
        paper: Grey of the background and of holes.
    """
    scale = SUPERSAMPLING * side
    picture = Image.new("L", (scale, scale), paper)
    draw = ImageDraw.Draw(picture)
    for row, part in enumerate(parts):
        grey = (255 if inks is None else int(inks[row])) if part.ink else paper
        points = part.points * scale
        if part.widths is None:
            draw.polygon([tuple(point) for point in points], fill=grey)
        else:
            draw_line(draw, points, part.widths * scale, grey)
    return picture.reduce(SUPERSAMPLING)


def draw_line(draw: ImageDraw.ImageDraw, points: np.ndarray, widths: np.ndarray, grey: int):
    """Draws a line with round joints. Points and widths are in pixels."""
    steps = np.diff(points, axis=0)
    across = np.stack([-steps[:, 1], steps[:, 0]], 1) / np.maximum(np.linalg.norm(steps, axis=1), 1e-9)[:, None]
    halves = widths[:, None] / 2
    corners = [points[:-1] + across * halves[:-1], points[1:] + across * halves[1:]]
    corners += [points[1:] - across * halves[1:], points[:-1] - across * halves[:-1]]
    for quadrangle in np.stack(corners, 1).reshape(-1, 8).tolist():
        draw.polygon(quadrangle, fill=grey)
    for left, top, right, bottom in np.concatenate([points - halves, points + halves], 1).tolist():
        draw.ellipse((left, top, right, bottom), fill=grey)


# --- Shapes ---


def furniture(random: np.random.Generator) -> list[Part]:
    """A table or stool, sometimes with bars between its legs, or a chair."""
    half, height, width, spread = (
        random.uniform(0.25, 0.5),
        random.uniform(0.4, 1),
        thin(random),
        random.uniform(0.8, 1.3),
    )
    thickness = random.uniform(0.02, 0.1)
    round_top = random.random() < 0.5
    parts = [fill(ellipse((0, 0), (half, thickness)) if round_top else rectangle(-half, -thickness, half, thickness))]
    tops = np.array([-0.9, 0.9, *random.uniform(-0.75, 0.75, random.integers(1, 5))]) * half
    lengths = height * np.where(abs(tops) > 0.8 * half, 1, random.uniform(0.7, 1))  # Legs at the back look shorter.
    taper = random.uniform(0.5, 1)
    parts += [line([(x, 0), (x * spread, y)], width, width * taper) for x, y in zip(tops, lengths, strict=True)]
    for level in random.uniform(0.3, 0.75, random.integers(3)) * height:
        ends = tops[:2] * (1 + (spread - 1) * level / height)
        parts.append(line([(ends[0], level), (ends[1], level)], width * 0.8))
    return parts + (backrest(random, 0.9 * half, width) if random.random() < 0.45 else [])


def backrest(random: np.random.Generator, half: float, width: float) -> list[Part]:
    """Two posts with slats between them, upright or across, above a seat at 0."""
    top, rail, lean = -random.uniform(0.4, 0.8), random.uniform(0.01, 0.06), random.uniform(0.9, 1.15)
    parts = [line([(x, 0), (x * lean, top)], width) for x in (-half, half)]
    parts.append(line([(-half * lean, top), (half * lean, top)], rail))
    count = random.integers(1, 8)
    if random.random() < 0.5:
        places = np.linspace(-half, half, count + 2)[1:-1]
        return parts + [line([(x, 0), (x * lean, top)], 0.8 * width) for x in places]
    levels = np.linspace(0, top, count + 2)[1:-1]
    return parts + [line([(-half, y), (half, y)], min(rail, 0.3 * abs(top) / (count + 1))) for y in levels]


def chain(random: np.random.Generator) -> list[Part]:
    """One ring, or a bent row of linked ones."""
    count = int(random.integers(1, 9))
    spacing = random.uniform(1.3, 1.6)
    centers = path(random, (0, 0), random.uniform(-0.5, 0.5), spacing * count, random.uniform(-2, 2), count + 1)
    length = spacing * count + 1
    width, flat = thin(random, 0.05) * length, random.uniform(0.35, 1)
    parts = []
    for number, (start, end) in enumerate(pairwise(centers)):
        along = (end - start) / np.linalg.norm(end - start)
        ring = ellipse((0, 0), (1, flat if number % 2 else random.uniform(0.6, 1)))
        parts.append(line((start + ring @ [along, (-along[1], along[0])]) / length, width / length))
    return parts


def wheel(random: np.random.Generator, center, radius: float, spokes: int, width: float) -> list[Part]:
    """A rim with spokes and a hub."""
    rim, hub = thin(random) + 0.03 * radius, random.uniform(0.05, 0.2) * radius
    angles = np.linspace(0, 2 * np.pi, spokes, endpoint=False) + random.uniform(0, np.pi)
    parts = [line(ellipse(center, (radius, radius)), rim), fill(ellipse(center, (hub, hub)))]
    return parts + [line([center, center + radius * unit(angle)], width) for angle in angles]


def wheels(random: np.random.Generator) -> list[Part]:
    """A wheel, or two with a bicycle's frame, saddle and handlebar."""
    spokes = int(random.integers(5, 29))
    if random.random() < 0.4:
        return wheel(random, np.zeros(2), 0.48, spokes, thin(random, 0.12 / spokes))
    radius, width, tube = random.uniform(0.2, 0.27), thin(random, 0.008), thin(random)
    rear, front, pedals = np.array([-0.28, 0]), np.array([0.28, 0]), random.normal((-0.05, 0.02), 0.02)
    seat, head = random.normal((-0.12, -0.25), 0.02), random.normal((0.19, -0.26), 0.02)
    bar, saddle = head + np.array([random.uniform(-0.06, 0.03), -0.07]), seat - np.array([0.02, 0.07])
    grip = bar + np.array([(0, 0), (0.06, -0.01), (0.07, 0.04)])
    parts = wheel(random, rear, radius, spokes, width) + wheel(random, front, radius, spokes, width)
    ways = ([rear, pedals, seat, rear], [saddle, seat, head, pedals], [bar, head, front], grip)
    return [*parts, *(line(way, tube) for way in ways), fill(ellipse(saddle, (0.07, 0.018)))]


def strands(random: np.random.Generator) -> list[Part]:
    """A body with loose hairs. They stand off on all sides or are blown in one direction."""
    body = blob(random, (0, 0), 0.28)
    root, wind = random.uniform(0.004, 0.012), random.uniform(0, 2 * np.pi)
    blown, longest, bend = random.uniform(0, 1), random.uniform(0.15, 0.55), random.uniform(0.3, 1.8)
    parts = [fill(body)]
    for row in random.integers(len(body), size=random.integers(20, 121)):
        outward = body[row] / np.linalg.norm(body[row])
        direction = (1 - blown) * outward + blown * unit(wind) + random.normal(0, 0.25, 2)
        angle, length = np.arctan2(direction[1], direction[0]), longest * random.uniform(0.4, 1)
        hair = path(random, 0.93 * body[row], angle, length, bend * random.normal(0, 0.7), 16)
        parts.append(line(hair, root * random.uniform(0.6, 1.2), 0.0015))
    return parts


def tree(random: np.random.Generator) -> list[Part]:
    """A trunk that branches repeatedly, sometimes with leaves at the tips."""
    depth, angle_range = int(random.integers(4, 7)), random.uniform(0.35, 0.75)
    shrink, narrow = random.uniform(0.68, 0.85), random.uniform(0.6, 0.78)
    leaf = random.uniform(0.01, 0.04) if random.random() < 0.5 else 0
    growing = [(np.zeros(2), -np.pi / 2, 0.25, random.uniform(0.02, 0.06), depth)]
    parts = []
    while growing:
        start, angle, length, width, levels = growing.pop()
        branch = path(random, start, angle, length * random.uniform(0.7, 1.2), random.normal(0, 0.3), 5)
        parts.append(line(branch, width, max(0.003, width * narrow)))
        if levels:
            for turn in np.linspace(-1, 1, random.integers(2, 4)) * angle_range + random.normal(0, 0.15):
                growing.append((branch[-1], angle + turn, length * shrink, max(0.003, width * narrow), levels - 1))
        elif leaf:
            parts.append(fill(blob(random, branch[-1], leaf)))
    return parts


def lattice(random: np.random.Generator) -> list[Part]:
    """A fence, ladder, window or cage: bars with gaps between them."""
    return (bars, mesh, cage)[random.integers(3)](random)


def bars(random: np.random.Generator) -> list[Part]:
    """Upright bars between rails. With few bars or few rails it is a ladder or a window."""
    half, height = random.uniform(0.15, 0.5), random.uniform(0.25, 0.5)
    columns, rows = int(random.integers(2, 15)), int(random.integers(2, 6))
    upright = thin(random, 0.8 * half / columns)
    across = thin(random, 0.8 * height / rows)
    over = random.uniform(0, 0.15) * height  # length of the bars beyond the rails
    parts = [line([(x, -height - over), (x, height + over)], upright) for x in np.linspace(-half, half, columns)]
    return parts + [line([(-half, y), (half, y)], across) for y in np.linspace(-height, height, rows)]


def mesh(random: np.random.Generator) -> list[Part]:
    """A frame filled with crossing diagonals."""
    half, count = random.uniform(0.25, 0.5), int(random.integers(3, 10))
    spacing = 1 / count
    width, frame = thin(random, 0.3 * spacing), thin(random, 0.05)
    corners = rectangle(-half, -0.5, half, 0.5)
    parts = [line([*corners, corners[0]], frame)]
    for sign in (-1, 1):
        for middle in np.arange(-0.5 - half, 0.5 + half, spacing) + random.uniform(0, spacing):
            # x runs over the part of y = middle + sign·x that lies inside the frame.
            ends = np.sort([sign * (-0.5 - middle), sign * (0.5 - middle)]).clip(-half, half)
            if ends[1] - ends[0] > width:
                parts.append(line([(x, middle + sign * x) for x in ends], width))
    return parts


def cage(random: np.random.Generator) -> list[Part]:
    """A bird cage: bars from a ring at the bottom over a dome to its tip, with a plate and a hook."""
    count, half, height = int(random.integers(5, 14)), random.uniform(0.2, 0.4), random.uniform(0.2, 0.6)
    width, flat = thin(random, 0.5 * half / count), random.uniform(0.05, 0.2)
    parts = [fill(ellipse((0, height), (half, flat * half))), line(ellipse((0, -half), (0.05, 0.05)), 1.5 * width)]
    for x in np.cos(np.linspace(0, np.pi, count)) * half:
        dome = ellipse((0, 0), (x, 0.9 * half), 0, -np.pi / 2)
        parts.append(line([(x, height), *dome], width))
    return parts + [line(ellipse((0, y), (half, flat * half)), width) for y in np.linspace(0, height, 3)[:-1]]


def insect(random: np.random.Generator) -> list[Part]:
    """A body of two or three sections from above, with bent legs and feelers."""
    pairs, width, reach = int(random.integers(3, 5)), thin(random, 0.02), random.uniform(0.2, 0.5)
    lengths = np.array([random.uniform(0.08, 0.25), random.uniform(0.06, 0.12), random.uniform(0.03, 0.07)])
    centers = np.cumsum(2 * lengths) - lengths
    round_ = random.uniform(0.35, 0.9)
    parts = [fill(ellipse((x, 0), (1.08 * r, r * round_))) for x, r in zip(centers, lengths, strict=True)]
    angles = np.linspace(2.3, 0.8, pairs) + random.normal(0, 0.1, pairs)
    for side in (-1, 1):
        for angle, x in zip(angles, centers[1] + np.linspace(-0.7, 0.7, pairs) * lengths[1], strict=True):
            bend = np.sign(angle - np.pi / 2) * random.uniform(0.3, 1)
            knee = (x, 0) + reach * 0.5 * unit(angle - 0.4 * bend) * (1, side)
            ankle = knee + reach * 0.5 * unit(angle + bend) * (1, side)
            foot = ankle + reach * 0.2 * unit(angle + 1.6 * bend) * (1, side)
            parts.append(line([(x, 0), knee, ankle, foot], width, 0.4 * width))
        feeler = path(random, (centers[2] + 0.7 * lengths[2], 0), 0.5 * side, 0.8 * reach, 0.6 * side)
        parts.append(line(feeler, 0.6 * width, 0.003))
    return parts


def mug(random: np.random.Generator) -> list[Part]:
    """A vessel with one or two handles or a bail above it, sometimes with a straw."""
    top, bottom, height = random.uniform(0.2, 0.4), random.uniform(0.12, 0.4), random.uniform(0.15, 0.4)
    lip = random.uniform(0.03, 0.25)
    base = ellipse((0, height), (bottom, lip * bottom), np.pi, 0)
    parts = [fill([(-top, -height), *base, (top, -height)]), fill(ellipse((0, -height), (top, lip * top)))]
    kind, width = random.random(), random.uniform(0.015, 0.06)
    if kind < 0.25:
        parts.append(
            line(ellipse((0, -height), (0.95 * top, random.uniform(0.3, 0.6)), np.pi, 2 * np.pi), 0.4 * width)
        )
    else:
        radii = (random.uniform(0.12, 0.28), random.uniform(0.4, 0.75) * height)
        for side in (1, -1)[: 2 if kind < 0.45 else 1]:
            parts.append(line(ellipse((side * (top + bottom) / 2, 0), radii), width))
    if random.random() < 0.3:
        straw = path(random, (0, 0), random.uniform(-2.1, -1), height + random.uniform(0.3, 0.6), 0.2)
        parts.append(line(straw, thin(random, 0.02)))
    return parts


def holes(random: np.random.Generator) -> list[Part]:
    """A blob with holes."""
    parts = [fill(blob(random, (0, 0), 0.45))]
    for _ in range(random.integers(2, 13)):
        center = 0.36 * np.sqrt(random.random()) * unit(random.uniform(0, 2 * np.pi))
        parts.append(fill(blob(random, center, np.exp(random.uniform(*np.log((0.012, 0.14)))), 0.15), ink=False))
    return parts


def feather(random: np.random.Generator) -> list[Part]:
    """A feather, fern or comb: a spine with many thin teeth on one side or both."""
    comb = random.random() < 0.3
    count = int(random.integers(12, 56))
    spine = path(random, (0, 0.5), -np.pi / 2, 1, 0 if comb else random.uniform(-1.2, 1.2), count + 1)
    width, longest = thin(random, 0.5 / count), random.uniform(0.12, 0.45)
    lean, bend = (np.pi / 2, 0) if comb else (random.uniform(0.4, 1.2), random.uniform(-0.8, 0.8))
    parts = [line(spine, random.uniform(0.02, 0.1) if comb else thin(random), None if comb else 0.004)]
    for row in range(1 if comb else count // 8, count):
        step = spine[row + 1] - spine[row]
        angle, length = np.arctan2(step[1], step[0]), longest
        if not comb:
            length *= np.sin(np.pi * (row + 1) / (count + 1)) ** 0.6 * random.uniform(0.9, 1.05)
        for side in (1,) if comb else (-1, 1):
            tooth = path(random, spine[row], angle + side * lean, length, -side * bend, 8)
            parts.append(line(tooth, width, 0.4 * width))
    return parts


SHAPES: tuple[Callable[[np.random.Generator], list[Part]], ...] = (
    furniture,
    chain,
    wheels,
    strands,
    tree,
    lattice,
    insect,
    mug,
    holes,
    feather,
)
