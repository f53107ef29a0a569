"""Augmentation of a whole batch on its device: photos and masks move together, colours change on photos alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class AugmentationSettings:
    """How far a batch is altered. The defaults are the published recipe.

    Attributes:
        flip: Probability of a horizontal flip.
        crop: Smallest share of a side that a random crop keeps, in (0, 1]; 1 crops nothing, as published.
        rotate: Probability of a rotation.
        rotation_degrees: Largest angle of a rotation, to either side.
        brightness, contrast, saturation, sharpness: Range of each one's factor; 1 changes nothing, 0 is black, one
            gray, without colour, and blurred.
        noise: Share of pixels that turn black or white.
        background: Probability that the background is replaced by one colour.
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


def size_before_crop(size: tuple[int, int], crop: float) -> tuple[int, int]:
    """Size to which photos are resized before crops of `crop` to 1 of their sides become `size`.

    The geometric middle: a whole photo is then as much reduced as the smallest crop is enlarged.
    """
    return tuple(round(side / crop**0.5) for side in size)


def augment_batch(
    images: torch.Tensor, masks: torch.Tensor, size: tuple[int, int], settings: AugmentationSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alters photos and their masks at random, each pair differently, and brings them to one size.

    All random numbers come from PyTorch's default generator of the batch's device, whose state a training checkpoint
    holds.

    Args:
        images: (B, 3, h, w) floating point in [0, 1].
        masks: (B, 1, h, w) floating point in [0, 1].
        size: Height and width of the result.
        settings: How far to alter.

    Returns:
        Images (B, 3, height, width) and masks (B, 1, height, width), both in [0, 1].
    """
    both = resize_batch(torch.cat([images, masks], dim=1), size_before_crop(size, settings.crop))
    both = move_randomly(both, size, settings)
    # Resampling may leave [0, 1] by a rounding error, which the model refuses in labels.
    images, masks = both.clamp(0, 1).split((3, 1), dim=1)
    if settings.background:
        images = replace_background(images, masks, settings.background)
    return add_noise(change_colors(images, settings), settings.noise), masks


def resize_batch(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resizing of (B, C, h, w) with antialiasing; nothing where the size is right already."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)


def move_randomly(pixels: torch.Tensor, size: tuple[int, int], settings: AugmentationSettings) -> torch.Tensor:
    """Flips, crops and rotates (B, C, h, w) in one resampling, so that nothing is blurred twice.

    Reflection continues the picture beyond its border; black corners would give rotated photos away.
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
    # The crop lies anywhere inside the photo: its centre is off the photo's by up to half of what is cut away.
    offset = (torch.rand(count, 2, device=device) - 0.5) * (before - before * kept) * zoom
    center = ((before - 1) / 2).expand(count, 2)
    matrix = get_affine_matrix2d(
        (after - before) / 2 + offset, center, zoom * torch.stack([flip, torch.ones_like(flip)], dim=1), angle
    )
    return warp_affine(pixels, matrix[:, :2], size, padding_mode="reflection", align_corners=False)


def change_colors(images: torch.Tensor, settings: AugmentationSettings) -> torch.Tensor:
    """Brightness, contrast, saturation and sharpness by random factors, in Pillow's definition of each."""
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
    """Turns a random share of the pixels black or white, both equally often."""
    if not share:
        return images
    draw = torch.rand_like(images[:, :1])
    return images.masked_fill(draw < share / 2, 0.0).masked_fill(draw > 1 - share / 2, 1.0)


def replace_background(images: torch.Tensor, masks: torch.Tensor, probability: float) -> torch.Tensor:
    """Puts photos before one solid colour, composited through the mask.

    The colour is a gray (40 %), one near the subject's own mean (40 %, which makes the subject hard to find), or any
    (20 %).
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
