"""`make demo`: cuts the subjects out of photos that scikit-image ships and puts photos and cut-outs in one picture."""

import sys
from pathlib import Path

from PIL import Image


PHOTOS = ("astronaut", "chelsea", "coffee")  # public domain or CC0, in every installed scikit-image
HEIGHT = 240  # of each photo in the overview, in pixels
MARGIN = 8


def checkerboard(size: tuple[int, int], square: int = 10) -> Image.Image:
    """Returns a picture to put behind a cut-out, so that its transparency is visible."""
    tile = Image.new("RGB", (2 * square, 2 * square), (255, 255, 255))
    for left, top in ((square, 0), (0, square)):
        tile.paste((204, 204, 204), (left, top, left + square, top + square))
    board = Image.new("RGB", size)
    for top in range(0, size[1], 2 * square):
        for left in range(0, size[0], 2 * square):
            board.paste(tile, (left, top))
    return board


def overview(pairs: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
    """Returns one picture with the photos in a row and the cut-outs (RGBA) below them."""
    columns = []
    for photo, cutout in pairs:
        size = (round(photo.width * HEIGHT / photo.height), HEIGHT)
        small_cutout, background = cutout.resize(size), checkerboard(size)
        background.paste(small_cutout, mask=small_cutout.getchannel("A"))
        columns.append((photo.convert("RGB").resize(size), background))
    width = MARGIN + sum(photo.width + MARGIN for photo, _ in columns)
    sheet = Image.new("RGB", (width, MARGIN + 2 * (HEIGHT + MARGIN)), (255, 255, 255))
    left = MARGIN
    for photo, cutout in columns:
        sheet.paste(photo, (left, MARGIN))
        sheet.paste(cutout, (left, 2 * MARGIN + HEIGHT))
        left += photo.width + MARGIN
    return sheet


def main(folder: str):
    """Writes `PHOTO.png` (the cut-out) and `PHOTO-matte.png` of every photo and `overview.png` into `folder`."""
    from skimage import data
    from transformers import pipeline

    from birefnet import repository_folder

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    remove_background = pipeline(model=str(repository_folder()), trust_remote_code=True)
    pairs = []
    for name in PHOTOS:
        photo = Image.fromarray(getattr(data, name)())
        cutout = remove_background(photo)
        cutout.save(out / f"{name}.png")
        cutout.getchannel("A").save(out / f"{name}-matte.png")
        pairs.append((photo, cutout))
        print(f"{name}: {out / name}.png")
    overview(pairs).save(out / "overview.png", optimize=True)
    print(f"photos and cut-outs in one picture: {out / 'overview.png'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
