"""Augmentation of a whole batch on its device.

Geometry changes photos and masks together. Colour changes and noise are for photos only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AugmentationSettings:
    """Strength of the augmentation. The defaults are the published recipe.

    Attributes:
        flip: Probability of a horizontal flip.
        crop: Smallest share of a side that a random crop keeps, in (0, 1]. 1 does not crop.
        rotate: Probability of a rotation.
        rotation_degrees: Largest angle of a rotation in degrees, in both directions.
        brightness, contrast, saturation, sharpness: Range of the factor of each change. A factor of 1 changes nothing.
            A factor of 0 gives a black, uniformly gray, colourless or blurred photo.
        noise: Share of pixels that turn black or white.
        background: Probability of a plain background instead of the photo's own.
    """

    flip: float = 0.5
    crop: float = 1.0
    rotate: float = 0.2
    rotation_degrees: float = 15.0
    brightness: tuple[float, float] = (0.5, 1.5)
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.0, 2.0)
    sharpness: tuple[float, float] = (0.0, 3.0)
    noise: float = 0.0015
    background: float = 0.0

    def __post_init__(self):
        for name in ("flip", "rotate", "noise", "background"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, between 0 and 1, not {getattr(self, name)}.")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is the share of a side that is kept, above 0 and at most 1, not {self.crop}.")


def color_ranges(strength: float) -> dict[str, tuple[float, float]]:
    """The ranges of brightness, contrast, saturation and sharpness, from no change (0) to the published ones (1)."""
    published = AugmentationSettings()
    return {
        name: tuple(1 + strength * (factor - 1) for factor in getattr(published, name))
        for name in ("brightness", "contrast", "saturation", "sharpness")
    }


def size_before_crop(size: tuple[int, int], crop: float) -> tuple[int, int]:
    """The size to resize photos to, before crops that keep `crop` to 1 of each side are resized to `size`.

    It is the geometric mean: a whole photo is reduced by the same factor as the smallest crop is enlarged.
    """
    return tuple(round(side / crop**0.5) for side in size)


def augment_batch(
    images: torch.Tensor, masks: torch.Tensor, size: tuple[int, int], settings: AugmentationSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alters photos and masks at random, each pair in its own way, and resizes them.

    All random numbers come from PyTorch's default generator of the batch's device. Training checkpoints hold its
    state.

    Args:
        images: (B, 3, h, w) floating point in [0, 1].
        masks: (B, 1, h, w) floating point in [0, 1].
        size: Height and width of the result.
        settings: Strength of the augmentation.

    Returns:
        Images (B, 3, height, width) and masks (B, 1, height, width), both in [0, 1].
    """
    both = resize_batch(torch.cat([images, masks], dim=1), size_before_crop(size, settings.crop))
    both = move_randomly(both, size, settings)
    # Resampling may leave [0, 1] by a rounding error. The model refuses such labels.
    images, masks = both.clamp(0, 1).split((3, 1), dim=1)
    if settings.background:
        images = replace_background(images, masks, settings.background)
    return add_noise(change_colors(images, settings), settings.noise), masks


def resize_batch(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes (B, C, h, w) bilinearly with antialiasing. Does nothing if the size is right."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)


def move_randomly(pixels: torch.Tensor, size: tuple[int, int], settings: AugmentationSettings) -> torch.Tensor:
    """Flips, crops and rotates (B, C, h, w) in one resampling, so nothing is blurred twice.

    The picture is reflected at its border. The network would recognize rotated photos by black corners.
    """
    from kornia.geometry.transform import get_affine_matrix2d, warp_affine

    count, device = len(pixels), pixels.device
    before = pixels.new_tensor(pixels.shape[-1:-3:-1])  # width, height
    after = pixels.new_tensor(size[::-1])
    kept = _uniform(count, (settings.crop, 1.0), device)[:, None]
    zoom = after / (before * kept)  # (B, 2)
    flip = torch.where(_chance(count, settings.flip, device), -1.0, 1.0)
    angle = _uniform(count, (-settings.rotation_degrees, settings.rotation_degrees), device)
    angle = angle * _chance(count, settings.rotate, device)
    # The crop lies anywhere in the photo. Its centre is shifted by up to half of the part that is cut away.
    offset = (torch.rand(count, 2, device=device) - 0.5) * (before - before * kept) * zoom
    center = ((before - 1) / 2).expand(count, 2)
    matrix = get_affine_matrix2d(
        (after - before) / 2 + offset, center, zoom * torch.stack([flip, torch.ones_like(flip)], dim=1), angle
    )
    return warp_affine(pixels, matrix[:, :2], size, padding_mode="reflection", align_corners=False)


def change_colors(images: torch.Tensor, settings: AugmentationSettings) -> torch.Tensor:
    """Changes brightness, contrast, saturation and sharpness by random factors, as Pillow's `ImageEnhance` does."""
    from kornia.enhance import (
        adjust_brightness_accumulative,
        adjust_contrast_with_mean_subtraction,
        adjust_saturation_with_gray_subtraction,
        sharpness,
    )

    for change, factors in (
        (adjust_brightness_accumulative, settings.brightness),
        (adjust_contrast_with_mean_subtraction, settings.contrast),
        (adjust_saturation_with_gray_subtraction, settings.saturation),
        (sharpness, settings.sharpness),
    ):
        if factors != (1.0, 1.0):
            images = change(images, _uniform(len(images), factors, images.device))
    return images


def add_noise(images: torch.Tensor, share: float) -> torch.Tensor:
    """Turns a random share of the pixels black or white, each with equal probability."""
    if not share:
        return images
    draw = torch.rand_like(images[:, :1])
    return images.masked_fill(draw < share / 2, 0.0).masked_fill(draw > 1 - share / 2, 1.0)


def replace_background(images: torch.Tensor, masks: torch.Tensor, probability: float) -> torch.Tensor:
    """Replaces backgrounds by one solid colour, with the mask as alpha.

    The colour is a gray (40 %), close to the subject's mean colour (40 %, which makes the subject hard to see), or any
    colour (20 %).
    """
    count, device = len(images), images.device
    anything = torch.rand(count, 3, device=device)
    gray = torch.rand(count, 1, device=device).expand(-1, 3)
    weight = masks.sum((-2, -1)).clamp_min(1e-6)  # (B, 1)
    near = (images * masks).sum((-2, -1)) / weight + (torch.rand(count, 3, device=device) - 0.5) * 0.2
    draw = torch.rand(count, 1, device=device)
    color = torch.where(draw < 0.4, gray, torch.where(draw < 0.8, near.clamp(0, 1), anything))[..., None, None]
    chosen = _chance(count, probability, device)[:, None, None, None]
    return torch.where(chosen, color + (images - color) * masks, images)


def _chance(count: int, probability: float, device: torch.device) -> torch.Tensor:
    return torch.rand(count, device=device) < probability


def _uniform(count: int, limits: tuple[float, float], device: torch.device) -> torch.Tensor:
    low, high = limits
    return torch.rand(count, device=device) * (high - low) + low
