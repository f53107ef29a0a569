"""
Where the error of a model is: objects missed, parts missed, background taken, or edges.

    python benchmarks/error_kinds.py validation.parquet --sheet worst.png
    python benchmarks/error_kinds.py photos/ --model my_model --worst 40 --sheet worst.png

Each pixel's absolute error belongs to one kind. The kinds add up to the mean absolute error of the raw mattes.

    edge               within a band around the outline of the ground truth
    object missed      in an object (a connected part of the ground truth) of which less than half was found
    part missed        in an object of which at least half was found
    background taken   outside of all objects
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import ndimage

from birefnet.data.pairs import read_pairs
from birefnet.evaluation.command import decode_photo
from birefnet.evaluation.metrics import measure
from birefnet.evaluation.report import make_case, write_contact_sheet
from birefnet.inference import load_remover


KINDS = ("edge", "object missed", "part missed", "background taken")
EDGE = 0.01
"""Half the width of the band around outlines, as a part of the picture's longer side."""


def errors_by_kind(matte: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """Splits the mean absolute error of a picture.

    Args:
        matte: Prediction, uint8 (height, width).
        mask: Ground truth, uint8 (height, width).

    Returns:
        `dict`: The part of the mean absolute error, in [0, 1], of each of `KINDS`.
    """
    error = np.abs(matte.astype(np.float64) - mask) / 255
    inside = mask > 127
    reach = max(1, round(EDGE * max(mask.shape)))
    distance = np.where(inside, ndimage.distance_transform_edt(inside), ndimage.distance_transform_edt(~inside))
    edge = (distance <= reach) if inside.any() and not inside.all() else np.zeros_like(inside)
    objects, number = ndimage.label(inside, structure=np.ones((3, 3)))
    found = ndimage.mean(matte > 127, objects, np.arange(number + 1)) if number else np.zeros(1)
    missed = inside & (found[objects] < 0.5)
    places = (edge, missed & ~edge, inside & ~missed & ~edge, ~inside & ~edge)
    return {kind: float(error[place].sum() / error.size) for kind, place in zip(KINDS, places, strict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="folders, ZIP or Parquet files of photos with masks")
    parser.add_argument("--model", help="folder, Hub repository or weights file; default: the embedded weights")
    parser.add_argument("--worst", type=int, default=40, help="number of pictures on the sheet")
    parser.add_argument("--sheet", type=Path, help="PNG with the worst pictures, grouped by their largest kind")
    arguments = parser.parse_args()

    remover = load_remover(arguments.model)
    total, largest, worst = Counter(), Counter(), []
    pictures = [decode_photo(pair) for pair in read_pairs(arguments.data)]
    mattes = (remover(picture.photo, return_mask=True) for picture in pictures)
    for picture, matte in zip(pictures, mattes, strict=True):
        matte = np.asarray(matte)
        kinds = errors_by_kind(matte, picture.mask)
        kind = max(kinds, key=kinds.get)
        total.update(kinds)
        largest[kind] += 1
        worst.append((sum(kinds.values()), kind, picture, matte))
    for kind in KINDS:
        share = total[kind] / sum(total.values())
        print(f"{kind:17} {total[kind] / len(pictures):.4f}  {share:4.0%}  largest in {largest[kind]} pictures")
    print(f"{'sum':17} {sum(total.values()) / len(pictures):.4f}  over {len(pictures)} pictures")

    worst = sorted(worst, key=lambda row: row[0], reverse=True)[: arguments.worst]
    print("worst:", dict(Counter(kind for _, kind, _, _ in worst)))
    if arguments.sheet:
        worst.sort(key=lambda row: (KINDS.index(row[1]), -row[0]))
        cases = [
            make_case(f"{kind}: {picture.name}", measure(matte, picture.mask), picture.photo, picture.mask, matte)
            for _, kind, picture, matte in worst
        ]
        write_contact_sheet(arguments.sheet, cases)


if __name__ == "__main__":
    main()
