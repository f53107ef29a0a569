"""Packs pairs of photo and mask into a few small parquet files, for a GPU machine that takes little at a time.

    python benchmarks/gpu/pack.py --data 'train-*.parquet' --validation-data 'validation-*.parquet' --output out/carry

Writes `out/carry/1/validation.parquet`, `out/carry/1/train.parquet`, `out/carry/2/train.parquet`, … Photos are WebP of
the highest quality that fits, masks are WebP without loss. Each file holds a random part of the pairs, so one file
alone is a fair sample.
"""

import argparse
import io
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from project import make_importable


QUALITIES = (90, 85, 80, 75, 70, 65, 60, 55, 50, 45, 40)  # of WebP
VALIDATION_QUALITY = 90
SAMPLE = 200  # pairs whose size chooses the quality
MARGIN = 0.97  # of the limit, for the difference between the sample and all pairs


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="training data, as for `birefnet train`")
    parser.add_argument("--validation-data", nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("out/carry"))
    parser.add_argument("--side", type=int, default=320, help="longest side of the packed photos (default: 320)")
    parser.add_argument("--carries", type=int, default=3, help="number of training files (default: 3)")
    parser.add_argument("--limit", type=float, default=42, help="MiB in each folder (default: 42)")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace):
    make_importable()
    from birefnet.data.pairs import read_pairs

    first = arguments.output / "1"
    validation = encode(read_pairs(arguments.validation_data), arguments.side, VALIDATION_QUALITY)
    spent = write(validation, first / "validation.parquet")
    pairs = read_pairs(arguments.data)
    random.Random(0).shuffle(pairs)
    limit = arguments.limit * 2**20
    quality = choose_quality(pairs, arguments.side, MARGIN * (arguments.carries * limit - spent))
    print(f"{len(pairs)} training pairs, {len(validation)} validation pairs, WebP quality {quality}", flush=True)
    rows = encode(pairs, arguments.side, quality)
    for number, part in enumerate(share(rows, arguments.carries, limit, spent), start=1):
        if not part:  # the validation photos fill the folder
            continue
        size = write(part, arguments.output / str(number) / "train.parquet")
        print(f"{arguments.output / str(number)}: {len(part)} pairs, {size / 2**20:.1f} MiB", flush=True)


def choose_quality(pairs: Sequence, side: int, limit: float) -> int:
    """The highest quality with which all pairs take at most `limit` bytes, estimated from the first ones."""
    sample = pairs[:SAMPLE]
    for quality in QUALITIES:
        size = sum(map(size_of, encode(sample, side, quality))) * len(pairs) / len(sample)
        if size <= limit:
            return quality
    raise SystemExit(
        f"{len(pairs)} pairs take {size / 2**20:.0f} MiB at the lowest quality, and {limit / 2**20:.0f} MiB are "
        "allowed: use a smaller --side or more --carries."
    )


def encode(pairs: Sequence, side: int, quality: int) -> list[dict]:
    """Rows of `image`, `mask` (encoded bytes) and `name`. Bad pairs are reported and left out."""
    from birefnet.data.pairs import BadPairError

    def encode_pair(pair) -> dict | None:
        try:
            return encode_one(pair, side, quality)
        except BadPairError as error:
            print(f"left out: {error}", flush=True)
            return None

    with ThreadPoolExecutor() as threads:
        return [row for row in threads.map(encode_pair, pairs) if row is not None]


def encode_one(pair, side: int, quality: int) -> dict:
    from birefnet.data.pairs import decode_pair

    photo, mask = decode_pair(pair)
    size = tuple(max(1, round(length * min(1.0, side / max(photo.size)))) for length in photo.size)
    photo, mask = (picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=3) for picture in (photo, mask))
    as_webp = partial(encoded, format="WEBP", method=3)
    return {"image": as_webp(photo, quality=quality), "mask": as_webp(mask, lossless=True), "name": pair.name}


def encoded(picture: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, **options)
    return stream.getvalue()


def size_of(row: dict) -> int:
    return len(row["image"]) + len(row["mask"]) + len(row["name"]) + 16


def share(rows: list[dict], carries: int, limit: float, spent: int) -> list[list[dict]]:
    """Divide the rows so that the folders become equally large. `spent` bytes are in the first folder already."""
    each = (sum(map(size_of, rows)) + spent) / carries
    if max(each, spent) > limit:
        raise SystemExit(f"the pairs take {carries} × {each / 2**20:.1f} MiB: use a smaller --side or more --carries")
    parts, size = [[] for _ in range(carries)], spent
    for row in rows:
        size += size_of(row)
        parts[min(carries - 1, int(size / each))].append(row)
    return parts


def write(rows: list[dict], file: Path) -> int:
    """Write a parquet file, which `read_pairs` reads. Returns its size in bytes."""
    import pyarrow
    import pyarrow.parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, compression="none")  # compressed already
    return file.stat().st_size


if __name__ == "__main__":
    main(parse_arguments())
