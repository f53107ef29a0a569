"""Drawn photos and masks for the tests of training."""

import numpy as np
from PIL import Image


def draw_pair(seed=0, size=(48, 32)):
    """A photo of a bright disc on dark noise and its mask with a soft edge; `size` is (width, height)."""
    width, height = size
    random = np.random.default_rng(seed)
    row, column = random.uniform(0.35, 0.65, 2) * (height, width)
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - row, columns - column)
    mask = np.clip((height / 3 - distance) * 40 + 128, 0, 255)
    photo = random.integers(0, 100, (height, width, 3)) + mask[..., None] * random.uniform(0.3, 0.6, 3)
    return Image.fromarray(photo.astype(np.uint8)), Image.fromarray(mask.astype(np.uint8))


def write_folder(folder, names, size=(48, 32)):
    """Writes a drawn pair for each name to `folder/im` and `folder/gt`. Returns the folder."""
    for place in ("im", "gt"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        photo, mask = draw_pair(seed, size)
        photo.save(folder / "im" / f"{name}.jpg", quality=95)
        mask.save(folder / "gt" / f"{name}.png")
    return folder
