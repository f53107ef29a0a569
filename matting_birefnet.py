"""What is done with a matte: foreground colours, edits of the matte, and compositing, all on plain torch tensors."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageColor
from torch.nn import functional as F


# Pixels worked on at once: intermediate sums stay in the processor's cache and do not grow with the photo.
_PIXELS_PER_BAND = 2**18


def _mirrored_indices(start: int, stop: int, size: int, device: torch.device) -> torch.Tensor:
    """Indices `start..stop-1` of a line of `size` pixels continued in both directions by mirrors at its end pixels,
    which are not repeated (... 2 1 0 1 2 ... size-1 size-2 ...): defined however far outside they lie."""
    period = max(2 * size - 2, 1)
    index = torch.arange(start, stop, device=device).remainder(period)
    return torch.minimum(index, period - index)


def _mirrored_rows(image: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows `start..stop-1` of (..., H, W), which may lie outside: a view where they do not."""
    height = image.shape[-2]
    if start >= 0 and stop <= height:
        return image[..., start:stop, :]
    return image.index_select(-2, _mirrored_indices(start, stop, height, image.device))


def _bands(height: int, width: int) -> list[slice]:
    """Slices of rows that cover a picture from top to bottom."""
    step = max(_PIXELS_PER_BAND // width, 1)
    return [slice(start, min(start + step, height)) for start in range(0, height, step)]


def _box_sums(image: torch.Tensor, box_size: int, weight: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """
    Sums over windows of `box_size` x `box_size` pixels of the mirrored (..., H, W) image, times `weight` if given, for
    one of `_bands` after the other.

    A window reaches `box_size // 2` to the top and left. Running sums (rows enter below and leave above; then the same
    along the rows) make the work independent of the box. They are float64, so that what is left of large sums is exact
    enough to be divided by small ones (float32 where the device has no float64).
    """
    accumulator = torch.float32 if image.device.type == "mps" else torch.float64
    width, above = image.shape[-1], box_size // 2
    below = box_size - 1 - above
    left = _mirrored_indices(-above - 1, 0, width, image.device)
    right = _mirrored_indices(width, width + below, width, image.device)

    def rows(start: int, stop: int) -> torch.Tensor:
        values = _mirrored_rows(image, start, stop)
        return values if weight is None else values * _mirrored_rows(weight, start, stop)

    last_sum = rows(-1 - above, below).sum(-2, keepdim=True, dtype=accumulator)  # (..., 1, W): the window of row -1
    for band in _bands(*image.shape[-2:]):
        entering, leaving = (rows(band.start + shift, band.stop + shift) for shift in (below, -above - 1))
        change = entering.to(accumulator) - leaving
        change[..., :1, :] += last_sum
        sums = change.cumsum(-2)  # (..., h, W)
        last_sum = sums[..., -1:, :]
        sums = torch.cat([sums.index_select(-1, left), sums, sums.index_select(-1, right)], dim=-1).cumsum(-1)
        yield (sums[..., box_size:] - sums[..., :-box_size]).to(image.dtype)


def _box_mean(image: torch.Tensor, box_size: int) -> torch.Tensor:
    """Mean over `box_size` x `box_size` windows of a mirrored image: (..., H, W) to (..., H, W)."""
    return torch.cat(list(_box_sums(image, box_size)), dim=-2) / box_size**2


def _check_unit_range(name: str, tensor: torch.Tensor) -> None:
    """Refuse what is not a floating-point tensor of values in [0, 1] (up to rounding)."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be a floating-point tensor with values in [0, 1], got {tensor.dtype}")
    if tensor.numel() == 0:
        raise ValueError(f"`{name}` must not be empty, got shape {tuple(tensor.shape)}")
    low, high = (value.item() for value in tensor.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise ValueError(f"`{name}` must have values in [0, 1], got values from {low:g} to {high:g}")


def _check_image_and_alpha(image: torch.Tensor, alpha: torch.Tensor) -> None:
    _check_unit_range("image", image)
    _check_unit_range("alpha", alpha)
    if image.ndim < 3 or image.shape[-3] != 3:
        raise ValueError(f"`image` must have the shape (..., 3, height, width), got {tuple(image.shape)}")
    expected = (*image.shape[:-3], 1, *image.shape[-2:])
    if tuple(alpha.shape) != expected:
        raise ValueError(f"`alpha` must have the shape {expected} to match `image`, got {tuple(alpha.shape)}")
    if image.device != alpha.device:
        raise ValueError(f"`image` is on {image.device} but `alpha` is on {alpha.device}: put both on one device")


def _blur_fusion(
    image: torch.Tensor, foreground: torch.Tensor, background: torch.Tensor, alpha: torch.Tensor, box_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass of the estimator: better foreground and background colours from (..., 3, H, W) estimates of both."""
    new_foreground, new_background = torch.empty_like(image), torch.empty_like(image)
    window, complement = box_size**2, 1 - alpha
    channels = [slice(index, index + 1) for index in range(3)]  # one at a time is a third of the memory
    foreground_sums = [_box_sums(foreground[..., channel, :, :], box_size, alpha) for channel in channels]
    background_sums = [_box_sums(background[..., channel, :, :], box_size, complement) for channel in channels]
    for band, alpha_sum in zip(_bands(*image.shape[-2:]), _box_sums(alpha, box_size), strict=True):
        # Quotients of sums are quotients of means; the means' 1e-5 becomes 1e-5 of the window.
        foreground_norm, background_norm = alpha_sum + 1e-5 * window, (1 + 1e-5) * window - alpha_sum
        for channel, foreground_sum, background_sum in zip(channels, foreground_sums, background_sums, strict=True):
            foreground_mean = next(foreground_sum) / foreground_norm
            background_mean = next(background_sum) / background_norm
            # What the smooth colours do not explain of the photo is the foreground's own detail.
            explained = torch.lerp(background_mean, foreground_mean, alpha[..., band, :])
            detail = alpha[..., band, :] * (image[..., channel, band, :] - explained)
            new_foreground[..., channel, band, :] = (foreground_mean + detail).clamp_(0, 1)
            new_background[..., channel, band, :] = background_mean
    return new_foreground, new_background


def estimate_foreground(
    image: torch.Tensor, alpha: torch.Tensor, box_sizes: tuple[int, ...] = (90, 6)
) -> torch.Tensor:
    """
    Colours of the foreground alone, without what shines through of the old background at soft edges (blur fusion,
    Forte and Pitié, "Approximate Fast Foreground Colour Estimation", ICIP 2021): the closed form with box means,
    applied once for each box size. Time is linear in the pixels whatever the box sizes.

    Args:
        image (`torch.Tensor` of shape `(..., 3, height, width)`): Photo, floating point in [0, 1].
        alpha (`torch.Tensor` of shape `(..., 1, height, width)`): Matte, floating point in [0, 1].
        box_sizes (`tuple[int, ...]`, *optional*, defaults to `(90, 6)`): Window sides in pixels, one for each pass.

    Returns:
        `torch.Tensor` of shape `(..., 3, height, width)`: Foreground colours in [0, 1], of the image's dtype and on
        its device. Photos smaller than a box are mirrored as often as it takes.

    Raises:
        TypeError: Something is not a floating-point tensor.
        ValueError: Shapes or devices do not match, values lie outside [0, 1], or a box size is no positive integer.
    """
    _check_image_and_alpha(image, alpha)
    if not box_sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in box_sizes):
        raise ValueError(f"`box_sizes` must be positive integers, one for each pass, got {box_sizes}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, alpha.dtype), torch.float32)
    photo, matte = image.to(dtype), alpha.to(dtype)
    foreground = background = photo
    for box_size in box_sizes:
        foreground, background = _blur_fusion(photo, foreground, background, matte, box_size)
    return foreground.to(image.dtype)


def _maximum_along(image: torch.Tensor, reach: int, row_step: int, column_step: int) -> torch.Tensor:
    """Maximum over the 2 * reach + 1 pixels of a line through each pixel, as log2(2 * reach + 1) maxima of maxima."""
    window, length = 1, 2 * reach + 1
    image = F.pad(image, [reach * column_step] * 2 + [reach * row_step] * 2, value=-math.inf)
    while window < length:
        shift = min(window, length - window)
        rows, columns = image.shape[-2] - shift * row_step, image.shape[-1] - shift * column_step
        image = torch.maximum(image[..., :rows, :columns], image[..., shift * row_step :, shift * column_step :])
        window += shift
    return image


def _grow(alpha: torch.Tensor, pixels: int) -> torch.Tensor:
    """Grey dilation by an octagon of the given inner radius: (..., H, W) to (..., H, W)."""
    # Lines along both axes and both diagonals add up to an octagon, which differs from a disc by at most 8 %.
    diagonal = int(pixels * (1 - math.sqrt(0.5)))
    straight = pixels - 2 * diagonal
    alpha = _maximum_along(_maximum_along(alpha, straight, 0, 1), straight, 1, 0)
    alpha = _maximum_along(alpha, diagonal, 1, 1)
    return _maximum_along(alpha.flip(-1), diagonal, 1, 1).flip(-1)


def _feather(alpha: torch.Tensor, standard_deviation: float) -> torch.Tensor:
    """Three box means in a row, which are close to a Gaussian of the same variance: (..., H, W) to (..., H, W)."""
    # A box of n pixels has the variance (n^2 - 1) / 12. Blending the two odd boxes around the wanted size meets the
    # wanted variance exactly, fractions of a pixel included.
    variance = standard_deviation**2 / 3
    smaller = 2 * int((math.sqrt(12 * variance + 1) - 1) / 2) + 1
    larger = smaller + 2
    weight = (12 * variance - (smaller**2 - 1)) / (larger**2 - smaller**2)
    for _ in range(3):
        alpha = torch.lerp(_box_mean(alpha, smaller), _box_mean(alpha, larger), weight)
    return alpha


def adjust_matte(
    alpha: torch.Tensor,
    threshold: float | None = None,
    sensitivity: float | None = None,
    grow: int = 0,
    feather: float = 0,
    invert: bool = False,
) -> torch.Tensor:
    """
    Edit a matte. The edits are applied in the order of the arguments below, whichever are given.

    Args:
        alpha (`torch.Tensor` of shape `(..., height, width)`): Matte, floating point in [0, 1].
        sensitivity (`float`, *optional*): From 0 to 1; the matte is multiplied by `2 - sensitivity` and cut off at 1.
            1 leaves it as it is, lower values keep more of what the network was unsure about.
        threshold (`float`, *optional*): From 0 to 1; make the matte hard: 1 where it is above the threshold, else 0.
        grow (`int`, *optional*, defaults to 0): Pixels by which the matte grows; negative values shrink it.
        feather (`float`, *optional*, defaults to 0): Softness added to the edges: standard deviation of the blur, in
            pixels.
        invert (`bool`, *optional*, defaults to `False`): Keep the background instead.

    Returns:
        `torch.Tensor`: Matte of the same shape, dtype and device, in [0, 1]. The input is not changed.

    Raises:
        TypeError: `alpha` is not a floating-point tensor, or `grow` is not an integer.
        ValueError: A value lies outside its range.
    """
    _check_unit_range("alpha", alpha)
    if alpha.ndim < 2:
        raise ValueError(f"`alpha` must have the shape (..., height, width), got {tuple(alpha.shape)}")
    for name, value in (("threshold", threshold), ("sensitivity", sensitivity)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"`{name}` must be between 0 and 1, got {value}")
    if isinstance(grow, bool) or not isinstance(grow, int):
        raise TypeError(f"`grow` must be a whole number of pixels, got {grow!r}")
    if not (math.isfinite(feather) and feather >= 0):
        raise ValueError(f"`feather` must be a number of pixels, 0 or more, got {feather}")

    matte = alpha.to(torch.promote_types(alpha.dtype, torch.float32)).clamp(0, 1)
    if sensitivity is not None:
        matte = (matte * (2 - sensitivity)).clamp(max=1)
    if threshold is not None:
        matte = (matte > threshold).to(matte.dtype)
    if grow > 0:
        matte = _grow(matte, grow)
    elif grow < 0:
        matte = 1 - _grow(1 - matte, -grow)
    if feather > 0:
        matte = _feather(matte, feather).clamp(0, 1)
    if invert:
        matte = 1 - matte
    return matte.to(alpha.dtype)


def _cover(background: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize (..., 3, h, w), aspect kept, until it covers `height` x `width`, and crop the middle."""
    scale = max(height / background.shape[-2], width / background.shape[-1])
    rows = max(round(background.shape[-2] * scale), height)
    columns = max(round(background.shape[-1] * scale), width)
    resized = F.interpolate(
        background.reshape(-1, *background.shape[-3:]), size=(rows, columns), mode="bilinear", antialias=True
    )
    top, left = (rows - height) // 2, (columns - width) // 2
    return resized[..., top : top + height, left : left + width].reshape(*background.shape[:-2], height, width)


def _background_pixels(background, image: torch.Tensor) -> torch.Tensor:
    """A background as a tensor that broadcasts against `image` (..., 3, H, W), of its dtype and on its device."""
    if isinstance(background, str):
        try:
            background = ImageColor.getrgb(background)
        except ValueError:
            raise ValueError(
                f"unknown background colour {background!r}: give a CSS colour name, #rgb, #rrggbb or rgb(r, g, b)"
            ) from None
    if isinstance(background, tuple | list):
        if len(background) != 3 or not all(0 <= value <= 255 for value in background):
            raise ValueError(f"a background colour must be three values from 0 to 255, got {tuple(background)}")
        return torch.tensor(background, dtype=image.dtype, device=image.device).view(3, 1, 1) / 255
    if isinstance(background, Image.Image):
        background = torch.from_numpy(np.array(background.convert("RGB"))).permute(2, 0, 1) / 255
    if not isinstance(background, torch.Tensor):
        raise TypeError(
            "`background` must be None (transparent), a colour name or three values from 0 to 255, a PIL image or a "
            f"tensor of shape (..., 3, height, width), got {type(background).__name__}"
        )
    _check_unit_range("background", background)
    if background.ndim < 3 or background.shape[-3] != 3:
        raise ValueError(f"`background` must have the shape (..., 3, height, width), got {tuple(background.shape)}")
    background = background.to(device=image.device, dtype=torch.promote_types(image.dtype, torch.float32))
    return _cover(background, *image.shape[-2:]).to(image.dtype)


def composite(
    image: torch.Tensor,
    alpha: torch.Tensor,
    background: str | tuple[int, int, int] | Image.Image | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Put the foreground on another background.

    Args:
        image (`torch.Tensor` of shape `(..., 3, height, width)`): Foreground colours in [0, 1]; those of
            `estimate_foreground` leave no halo of the old background.
        alpha (`torch.Tensor` of shape `(..., 1, height, width)`): Matte in [0, 1].
        background: `None` for transparent; a colour as a CSS name, `#rrggbb` or three values from 0 to 255; or
            another picture (PIL image, or tensor in [0, 1] of shape `(..., 3, h, w)`), which is resized to cover the
            photo, its aspect kept, and cropped in the middle.

    Returns:
        `torch.Tensor`: `(..., 4, height, width)` (red, green, blue, alpha, not premultiplied) on a transparent
        background, else `(..., 3, height, width)`, of the image's dtype and on its device.

    Raises:
        TypeError: Something is of the wrong type.
        ValueError: Shapes or devices do not match, values lie outside [0, 1], or the colour is unknown.
    """
    _check_image_and_alpha(image, alpha)
    alpha = alpha.to(image.dtype)
    if background is None:
        return torch.cat([image, alpha], dim=-3)
    return alpha * image + (1 - alpha) * _background_pixels(background, image)
