"""
What the embedded weights make of ten pictures, for the model card: photos that installed packages ship and drawn ones.

    python benchmarks/cases.py cases.png
"""

import sys

from PIL import Image, ImageDraw

from birefnet import repository_folder
from birefnet.demo import MARGIN, checkerboard


SIDE = 200  # of each picture's longer side, in pixels
BLUE, ORANGE = (70, 110, 160), (225, 120, 40)


def photos() -> dict[str, Image.Image]:
    """Photos of scikit-image (public domain or CC0) and matplotlib (public domain), and drawn scenes, by title."""
    from matplotlib import cbook
    from skimage import data

    with cbook.get_sample_data("grace_hopper.jpg", asfileobj=True) as file:
        hopper = Image.open(file).convert("RGB")
    return {
        "astronaut": Image.fromarray(data.astronaut()),
        "cat": Image.fromarray(data.chelsea()),
        "coffee": Image.fromarray(data.coffee()),
        "grace hopper": hopper,
        "rocket": Image.fromarray(data.rocket()),
        "camera man (gray)": Image.fromarray(data.camera()).convert("RGB"),
        "motorcycle": Image.fromarray(data.stereo_motorcycle()[0]),
        "drawn: thin legs": thin_legs(),
        "drawn: a ring and its hole": ring(),
        "drawn: loose strands": strands(),
    }


def scene() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A ground that grows lighter downwards."""
    picture = Image.linear_gradient("L").resize((640, 480))
    picture = Image.merge("RGB", [picture.point(lambda v, c=c: c + v // 4) for c in BLUE])
    return picture, ImageDraw.Draw(picture)


def thin_legs() -> Image.Image:
    picture, draw = scene()
    draw.ellipse((180, 120, 460, 280), fill=ORANGE)
    for left in (220, 270, 370, 420):
        draw.line((left, 260, left - 15, 430), fill=ORANGE, width=8)
    return picture


def ring() -> Image.Image:
    picture, draw = scene()
    draw.ellipse((170, 90, 470, 390), outline=ORANGE, width=55)
    return picture


def strands() -> Image.Image:
    picture, draw = scene()
    draw.ellipse((220, 170, 420, 370), fill=ORANGE)
    for i in range(24):
        draw.arc((140 + 9 * i, 60 + 5 * (i % 7), 340 + 9 * i, 330), 190 + 3 * i, 300 + 3 * i, fill=ORANGE, width=2)
    return picture


def shown(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGBA":
        board = checkerboard(picture.size)
        board.paste(picture, mask=picture.getchannel("A"))
        picture = board
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    return picture


def main(path: str):
    from transformers import pipeline

    remove_background = pipeline(model=str(repository_folder()), trust_remote_code=True)
    cases = photos()
    cell_width, cell_height = 3 * (SIDE + MARGIN) + MARGIN, SIDE + 24
    sheet = Image.new("RGB", (2 * cell_width, (len(cases) + 1) // 2 * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, photo) in enumerate(cases.items()):
        left, top = number % 2 * cell_width + MARGIN, number // 2 * cell_height
        draw.text((left, top + 4), f"{number + 1}  {title}", fill="black")
        matte = remove_background(photo, return_mask=True)
        for place, picture in enumerate((photo, matte, remove_background(photo))):
            sheet.paste(shown(picture), (left + place * (SIDE + MARGIN), top + 20))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cases.png")
