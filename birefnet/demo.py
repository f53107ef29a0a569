"""`make demo`: cuts the subjects out of photos that scikit-image ships and shows the steps side by side."""

import sys
from pathlib import Path

from PIL import Image


PHOTOS = ("astronaut", "chelsea", "coffee")  # public domain or CC0, in every installed scikit-image
HEIGHT = 320  # of each row of the overview, in pixels
MARGIN = 8


def checkerboard(size: tuple[int, int], square: int = 10) -> Image.Image:
    """The background that shows the transparency of a cut-out."""
    tile = Image.new("RGB", (2 * square, 2 * square), (255, 255, 255))
    for left, top in ((square, 0), (0, square)):
        tile.paste((204, 204, 204), (left, top, left + square, top + square))
    board = Image.new("RGB", size)
    for top in range(0, size[1], 2 * square):
        for left in range(0, size[0], 2 * square):
            board.paste(tile, (left, top))
    return board


def side_by_side(rows: list[tuple[Image.Image, Image.Image, Image.Image]]) -> Image.Image:
    """Combines rows of photo, matte (L) and cut-out (RGBA) into one picture."""
    strips = []
    for photo, matte, cutout in rows:
        shown = checkerboard(cutout.size)
        shown.paste(cutout, mask=cutout.getchannel("A"))
        width = round(photo.width * HEIGHT / photo.height)
        strips.append([picture.convert("RGB").resize((width, HEIGHT)) for picture in (photo, matte, shown)])
    width = max(sum(picture.width + MARGIN for picture in strip) for strip in strips) + MARGIN
    sheet = Image.new("RGB", (width, MARGIN + len(strips) * (HEIGHT + MARGIN)), (255, 255, 255))
    for row, strip in enumerate(strips):
        left = MARGIN
        for picture in strip:
            sheet.paste(picture, (left, MARGIN + row * (HEIGHT + MARGIN)))
            left += picture.width + MARGIN
    return sheet


def main(folder: str):
    """Writes `PHOTO.png` (the cut-out) and `PHOTO-matte.png` of every photo and `side_by_side.png` into `folder`."""
    from skimage import data
    from transformers import pipeline

    from birefnet import repository_folder

    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    remove_background = pipeline(model=str(repository_folder()), trust_remote_code=True)
    rows = []
    for name in PHOTOS:
        photo = Image.fromarray(getattr(data, name)())
        matte = remove_background(photo, return_mask=True)
        cutout = remove_background(photo)
        matte.save(out / f"{name}-matte.png")
        cutout.save(out / f"{name}.png")
        rows.append((photo, matte, cutout))
        print(f"{name}: {out / name}.png")
    side_by_side(rows).save(out / "side_by_side.png")
    print(f"photo, matte and cut-out side by side: {out / 'side_by_side.png'}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "out")
