"""
Results of the embedded weights on ten pictures, for the model card: photos from installed packages and drawn scenes.

    python benchmarks/cases.py cases.png
"""

import sys
from collections.abc import Callable

from PIL import Image, ImageDraw

from birefnet import repository_folder
from birefnet.demo import MARGIN, checkerboard


SIDE = 200  # of each picture's longer side, in pixels
BLUE, ORANGE = (70, 110, 160), (225, 120, 40)


def photos() -> dict[str, Image.Image]:
    """Photos from scikit-image (public domain or CC0) and matplotlib (public domain), and drawn scenes, by title."""
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


def scene(scale: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A background that gets lighter downwards, 640 x 480 pixels times the scale."""
    picture = Image.linear_gradient("L").resize((640 * scale, 480 * scale))
    picture = Image.merge("RGB", [picture.point(lambda v, c=c: c + v // 4) for c in BLUE])
    return picture, ImageDraw.Draw(picture)


def thin_legs(scale: int = 1) -> Image.Image:
    picture, draw = scene(scale)
    draw.ellipse([scale * v for v in (180, 120, 460, 280)], fill=ORANGE)
    for left in (220, 270, 370, 420):
        draw.line([scale * v for v in (left, 260, left - 15, 430)], fill=ORANGE, width=8 * scale)
    return picture


def ring(scale: int = 1) -> Image.Image:
    picture, draw = scene(scale)
    draw.ellipse([scale * v for v in (170, 90, 470, 390)], outline=ORANGE, width=55 * scale)
    return picture


def strands(scale: int = 1) -> Image.Image:
    picture, draw = scene(scale)
    draw.ellipse([scale * v for v in (220, 170, 420, 370)], fill=ORANGE)
    for i in range(24):
        box = [scale * v for v in (140 + 9 * i, 60 + 5 * (i % 7), 340 + 9 * i, 330)]
        draw.arc(box, 190 + 3 * i, 300 + 3 * i, fill=ORANGE, width=2 * scale)
    return picture


def photo_matte_and_cutout(photo: Image.Image, remove_background: Callable) -> tuple[Image.Image, ...]:
    cutout = remove_background(photo)
    return photo, cutout.getchannel("A"), cutout


def shown(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGBA":
        board = checkerboard(picture.size)
        board.paste(picture, mask=picture.getchannel("A"))
        picture = board
    picture = picture.convert("RGB")
    picture.thumbnail((SIDE, SIDE))
    return picture


def draw_sheet(cases: dict[str, tuple[Image.Image, ...]]) -> Image.Image:
    """Sheet with two cases per row. Each case has a title above its three pictures."""
    cell_width, cell_height = 3 * (SIDE + MARGIN) + MARGIN, SIDE + 24
    sheet = Image.new("RGB", (2 * cell_width, (len(cases) + 1) // 2 * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pictures) in enumerate(cases.items()):
        left, top = number % 2 * cell_width + MARGIN, number // 2 * cell_height
        draw.text((left, top + 4), f"{number + 1}  {title}", fill="black")
        for column, picture in enumerate(pictures):
            sheet.paste(shown(picture), (left + column * (SIDE + MARGIN), top + 20))
    return sheet


def main(path: str):
    from transformers import pipeline

    remove_background = pipeline(model=str(repository_folder()), trust_remote_code=True)
    cases = {title: photo_matte_and_cutout(photo, remove_background) for title, photo in photos().items()}
    draw_sheet(cases).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cases.png")
