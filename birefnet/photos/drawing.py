"""A picture for checks, drawn, so that no photo has to be shipped."""

import numpy as np
from PIL import Image


def draw_picture(width=320, height=256):
    """Returns a test picture, identical on every machine: a shaded disc in front of stripes."""
    x, y = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    stripes = 90 + 40 * np.sin(12 * (x + 0.5 * y))
    disc = 230 - 60 * (x + y)
    inside = (x / 0.6) ** 2 + (y / 0.7) ** 2 < 1
    channels = [np.where(inside, disc * tint, stripes) for tint in (1.0, 0.8, 0.4)]
    return Image.fromarray(np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8))
