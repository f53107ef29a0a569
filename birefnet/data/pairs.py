"""Pairs of photo and mask: lists them from folders, parquet files and Hub data sets, and decodes them."""

from __future__ import annotations

import glob
import io
import logging
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


logger = logging.getLogger(__name__)

Encoded = bytes | Path
"""An encoded picture: its bytes, or the path of its file."""

PHOTO_FOLDER, MASK_FOLDER = "im", "gt"
HUB_DATASET = re.compile(r"[\w-]+(\.[\w-]+)*/[\w.-]+(:[\w.\[\]%-]+)?")
LISTED_NAMES = 10


class BadPairError(ValueError):
    """A photo or mask that cannot be used. The message starts with the name of its file."""


@dataclass(frozen=True)
class Pair:
    """One photo with its mask, not yet read.

    Attributes:
        name: Its name in messages: a path, or a file and a row.
        read: Returns the encoded photo and the encoded mask.
    """

    name: str
    read: Callable[[], tuple[Encoded, Encoded]]


def read_pairs(sources: Sequence[str | Path], image_column: str = "image", mask_column: str = "mask") -> list[Pair]:
    """Lists the pairs of several sources in the given order.

    Args:
        sources: Each source is a folder with `im/` and `gt/`, a parquet file, a glob of either, or the id of a data
            set on the Hub: `owner/name`, or `owner/name:split`. The default split is `train`.
        image_column: Column of the photos in parquet files and Hub data sets.
        mask_column: Column of the masks there.

    Raises:
        FileNotFoundError: A source does not exist.
        ValueError: A source holds no pair, or a column is missing.
    """
    pairs = []
    for source in map(str, sources):
        paths = [source] if os.path.exists(source) else sorted(glob.glob(source, recursive=True))
        if paths:
            found = [pair for path in paths for pair in _read_local(Path(path), image_column, mask_column)]
        elif HUB_DATASET.fullmatch(source):
            found = _read_hub(source, image_column, mask_column)
        else:
            raise FileNotFoundError(
                f"No data at {source!r}: expected a folder with {PHOTO_FOLDER}/ and {MASK_FOLDER}/, a parquet file, a "
                "glob of either, or a Hub data set id such as owner/name."
            )
        if not found:
            raise ValueError(f"{source} holds no photo with a mask.")
        pairs += found
    return pairs


def _read_local(path: Path, image_column: str, mask_column: str) -> list[Pair]:
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".parquet":
        return _read_parquet(path, image_column, mask_column)
    raise ValueError(f"{path} is neither a folder with {PHOTO_FOLDER}/ and {MASK_FOLDER}/ nor a parquet file.")


def _read_folder(folder: Path) -> list[Pair]:
    """Matches the files of `im/` and `gt/` by their path without the ending. Reports files without a partner."""
    photos, masks = (pictures_by_stem(folder / name) for name in (PHOTO_FOLDER, MASK_FOLDER))
    unmatched = [str(photos[stem]) for stem in photos.keys() - masks.keys()]
    unmatched += [str(masks[stem]) for stem in masks.keys() - photos.keys()]
    if unmatched:
        logger.warning("%s: skipped %d files without a partner: %s", folder, len(unmatched), listed(unmatched))
    return [
        Pair(str(photos[stem]), partial(_as_is, photos[stem], masks[stem]))
        for stem in sorted(photos.keys() & masks.keys())
    ]


def pictures_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} does not exist: put photos into {PHOTO_FOLDER}/ and masks into {MASK_FOLDER}/."
        )
    endings = Image.registered_extensions()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.name[0] != ".")
    stems = [path.relative_to(folder).with_suffix("").as_posix() for path in files]
    counts = Counter(stems)
    twice = [str(path) for path, stem in zip(files, stems, strict=True) if counts[stem] > 1]
    if twice:
        raise ValueError(f"{folder}: several files differ only in their ending: {listed(twice)}")
    return dict(zip(stems, files, strict=True))


def listed(names: Sequence[str]) -> str:
    rest = len(names) - LISTED_NAMES
    return ", ".join(sorted(names)[:LISTED_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _as_is(photo: Encoded, mask: Encoded) -> tuple[Encoded, Encoded]:
    return photo, mask


def _read_parquet(path: Path, image_column: str, mask_column: str) -> list[Pair]:
    import pyarrow.parquet

    columns = pyarrow.parquet.read_schema(path).names
    _check_columns(str(path), columns, (image_column, mask_column))
    wanted = [column for column in (image_column, mask_column, "name") if column in columns]
    table = pyarrow.parquet.read_table(path, columns=wanted)
    names = table["name"].to_pylist() if "name" in wanted else [""] * len(table)
    return [
        Pair(f"{path}, row {row}{name and f' ({name})'}", partial(_parquet_row, table, row, path.parent))
        for row, name in enumerate(names)
    ]


def _parquet_row(table, row: int, folder: Path) -> tuple[Encoded, Encoded]:
    """The first two columns of a row of a `pyarrow.Table`. Paths in it are relative to the file's folder."""
    return tuple(_encoded(table.column(column)[row].as_py(), folder) for column in (0, 1))


def _read_hub(source: str, image_column: str, mask_column: str) -> list[Pair]:
    import datasets

    name, _, split = source.partition(":")
    dataset = datasets.load_dataset(name, split=split or "train")
    _check_columns(source, dataset.column_names, (image_column, mask_column))
    for column in (image_column, mask_column):
        # Keep the encoded bytes. They are decoded later, in threads.
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    dataset = dataset.select_columns([image_column, mask_column])
    columns = (image_column, mask_column)
    return [Pair(f"{source}, row {row}", partial(_hub_row, dataset, row, columns)) for row in range(len(dataset))]


def _hub_row(dataset, row: int, columns: tuple[str, str]) -> tuple[Encoded, Encoded]:
    values = dataset[row]
    return tuple(_encoded(values[column], Path()) for column in columns)


def _check_columns(source: str, present: list[str], wanted: tuple[str, str]):
    missing = [column for column in wanted if column not in present]
    if missing:
        raise ValueError(
            f"{source} has no column {' and no column '.join(map(repr, missing))}; it has {', '.join(present)}. "
            "Name the columns with --image-column and --mask-column."
        )


def _encoded(value: bytes | str | dict | None, folder: Path) -> Encoded:
    """Reads a cell of a table: bytes, a path, or the dictionary of both that `datasets` uses for pictures."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise BadPairError("the cell is empty")
    return folder / value if isinstance(value, str) else value


def decode_pair(pair: Pair) -> tuple[Image.Image, Image.Image]:
    """Reads a pair.

    Returns:
        The photo in RGB and the mask in 8-bit grey, both upright and of the same size. Soft masks stay soft.

    Raises:
        BadPairError: The photo or mask cannot be read, their sizes differ, or the mask is all black.
    """
    photo = _decode(pair, 0, "photo").convert("RGB")
    mask = decode_mask(pair)
    if photo.size != mask.size:
        raise BadPairError(
            f"{pair.name}: the mask is {mask.width}×{mask.height} pixels, the photo {photo.width}×{photo.height}."
        )
    brightest = mask.getextrema()[1]
    if brightest <= 1:
        raise BadPairError(f"{pair.name}: the mask is all black (its largest value is {brightest} of 255).")
    return photo, mask


def decode_mask(pair: Pair) -> Image.Image:
    """Reads a pair's mask in 8-bit grey: the alpha channel of a picture with transparency, else its lightness."""
    mask = _decode(pair, 1, "mask")
    if mask.has_transparency_data:
        alpha = mask.convert("RGBA").getchannel("A")
        # An alpha channel that is opaque everywhere is no mask. Then the mask is in the colours.
        return alpha if alpha.getextrema()[0] < 255 else mask.convert("RGB").convert("L")
    return mask.convert("L")


def _decode(pair: Pair, which: int, role: str) -> Image.Image:
    try:
        encoded = pair.read()[which]
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as picture:
            return _eight_bits(ImageOps.exif_transpose(picture))
    # All errors that Pillow's decoders raise on malformed files.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BadPairError(f"{pair.name}: the {role} cannot be read ({error}).") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits. Pillow's own conversion would clip values above 255."""
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
    picture.load()
    return picture
