"""
Sharpness of the embedded weights' mattes: edge widths on a drawn ring, and close-ups of hair, legs and gaps.

    python benchmarks/edges.py edges.png
"""

import math
import sys

import torch
from cases import SIDE, draw_sheet, photo_matte_and_cutout, photos, ring, strands, thin_legs
from PIL import Image, ImageFilter
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageSegmentation, pipeline

from birefnet import repository_folder
from birefnet.repository.matting_birefnet import to_planes


SCALE, REDUCTION = 8, 5  # drawn at 5120 x 3840, then averaged to 1024 x 768
BLURS = (0, 1.4, 2.9)  # standard deviations, in pixels of the photo
CENTRE, OUTLINE, HOLE = (512, 384), (200, 280), (112, 192)  # of the ring; smallest and largest radius of each edge
CLOSE_UPS = {  # title: photo, left and top of the square, its side
    "hair": ("astronaut", (160, 20), 100),
    "whiskers": ("cat", (250, 195), 100),
    "legs of a tripod": ("camera man (gray)", (290, 300), 100),
    "drawn legs, 1024 pixels": ("legs", (330, 380), 100),
    "drawn hole, 1024 pixels": ("ring", (370, 260), 100),
    "drawn strands, 1024 pixels": ("strands", (330, 90), 100),
}


def width_of_edge(picture: torch.Tensor, radii: tuple[int, int]) -> float:
    """Width in pixels of the edge between two radii, from 10 % to 90 % of its step; median of 180 directions."""
    distances = torch.arange(radii[0], radii[1], 0.25)
    angles = torch.arange(0, 360, 2)[:, None] * math.pi / 180
    points = torch.stack([CENTRE[0] + distances * angles.cos(), CENTRE[1] + distances * angles.sin()], dim=-1)
    points = 2 * points / torch.tensor(picture.shape[::-1]) - 1  # in the coordinates of grid_sample
    profiles = F.grid_sample(picture[None, None], points[None], align_corners=False)[0, 0]  # (180, distances)
    low, high = profiles.amin(1, keepdim=True), profiles.amax(1, keepdim=True)
    steps = (profiles - low) / (high - low)
    return ((steps > 0.1) & (steps < 0.9)).sum(1).median().item() / 4


def print_widths():
    model = AutoModelForImageSegmentation.from_pretrained(repository_folder(), trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(repository_folder(), trust_remote_code=True)
    sharp = ring(SCALE).reduce(REDUCTION)
    print("| photo: outline, hole | matte as it is | matte along the photo |\n|---|---|---|")
    for blur in BLURS:
        photo = sharp.filter(ImageFilter.GaussianBlur(blur))
        red, _, blue = to_planes(photo).float()
        pictures = [red - blue]  # separates the ring from the background
        with torch.inference_mode():
            outputs = model(**processor(photo, return_tensors="pt"))
            for processor.do_guided_upsampling in (False, True):
                mattes = processor.post_process_alpha_matte(outputs, [pictures[0].shape], [photo])
                pictures.append(mattes[0].squeeze())
        widths = [[width_of_edge(picture, edge) for edge in (OUTLINE, HOLE)] for picture in pictures]
        print("| " + " | ".join(f"{outline:.2f}, {hole:.2f}" for outline, hole in widths) + " |")


def close_ups() -> dict[str, tuple[Image.Image, ...]]:
    """Enlarged photo, matte and cut-out of each close-up."""
    scenes = {"legs": thin_legs, "ring": ring, "strands": strands}
    pictures = photos() | {name: draw(SCALE).reduce(REDUCTION) for name, draw in scenes.items()}
    remove_background = pipeline(model=str(repository_folder()), trust_remote_code=True)
    found = {}
    for title, (name, (left, top), side) in CLOSE_UPS.items():
        steps = photo_matte_and_cutout(pictures[name], remove_background)
        box = (left, top, left + side, top + side)
        found[title] = tuple(step.crop(box).resize((SIDE, SIDE), Image.Resampling.NEAREST) for step in steps)
    return found


def main(path: str):
    print_widths()
    draw_sheet(close_ups()).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "edges.png")
