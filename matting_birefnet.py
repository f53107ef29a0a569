"""Operations on mattes: foreground colours, refinement by the photo, edits and compositing, on torch tensors."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageColor
from torch.nn import functional as F


_BOX_SIZES = (90, 6)  # window sides of the published estimator's passes, in pixels
# Sides of the square tiles in pixels. On a CPU, small tiles keep the sums in the processor's cache and waste little
# work where only some pixels are needed. An accelerator needs large tiles to be busy.
_TILE_SIDE, _ACCELERATOR_TILE_SIDE = 128, 1024
_OPAQUE = 1 - 1e-4  # a matte from here on changes the estimate by less than a twentieth of a gray level
_PIXELS_PER_BAND = 2**18  # of cumulative sums, for the same reason
# Constants of `sharpened_matte`: the regularisation of the slopes' factor, the step of the fit from which on the
# colours separate foreground and background, and the mean weight from which on a window contains one of them.
# `sharpened_matte` skips tiles with only smaller or only larger mattes than this: it would change them by less than a
# twentieth of a gray level, since confidence is below _CERTAIN² / _SUFFICIENT_WEIGHT.
_CERTAIN = 3e-3
_STEP_REGULARISATION, _SEPARATING_STEP, _SUFFICIENT_WEIGHT = 0.03, 0.1, 0.05


@dataclass(frozen=True)
class _Region:
    """
    Rows `top..bottom-1` and columns `left..right-1` of a picture.

    A region may extend beyond the picture. The picture is then continued by reflection.
    """

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, before: int, after: int) -> "_Region":
        return _Region(self.top - before, self.bottom + after, self.left - before, self.right + after)

    def of(self, image: torch.Tensor) -> torch.Tensor:
        """The region of (..., H, W). Returns a view where the region is inside the picture."""
        return self.reflected(image, _Region(0, image.shape[-2], 0, image.shape[-1]), image.shape[-2:])

    def reflected(self, pixels: torch.Tensor, available: "_Region", size: tuple[int, int]) -> torch.Tensor:
        """The region of a picture of (height, width) = `size`. `pixels` holds the picture's part `available`."""
        pixels = _reflected(pixels, -2, self.top, self.bottom, available.top, size[0])
        return _reflected(pixels, -1, self.left, self.right, available.left, size[1])


def _reflected(pixels: torch.Tensor, dimension: int, start: int, stop: int, first: int, size: int) -> torch.Tensor:
    """
    Positions `start..stop-1` of lines of `size` pixels, continued by reflection without repeating the end pixels.

    `pixels` holds the lines from position `first` on. Positions far outside are reflected several times
    (... 2 1 0 1 2 ... size-1 size-2 ...).
    """
    if start >= 0 and stop <= size:
        return pixels.narrow(dimension, start - first, stop - start)
    period = max(2 * size - 2, 1)
    index = torch.arange(start, stop, device=pixels.device).remainder(period)
    return pixels.index_select(dimension, torch.minimum(index, period - index) - first)


def _tiles(image: torch.Tensor, window: int, needed: torch.Tensor | None = None) -> Iterator[_Region]:
    """
    Tiles that cover (..., H, W), or all of its pixels that are `needed` (boolean, (H, W)).

    A tile is at least as large as the window of the filter, so that its margin does not dominate the work.
    """
    height, width = image.shape[-2:]
    side = max(_TILE_SIDE if image.device.type == "cpu" else _ACCELERATOR_TILE_SIDE, window)
    for top in range(0, height, side):
        columns = None if needed is None else needed[top : top + side].view(torch.uint8).amax(0)
        for left in range(0, width, side):
            if columns is None or columns[left : left + side].any():
                yield _Region(top, min(top + side, height), left, min(left + side, width))


def _window_sums(image: torch.Tensor, size: int) -> torch.Tensor:
    """
    Sums over all windows of `size` x `size` pixels: (..., h, w) to (..., h - size + 1, w - size + 1).

    Each sum of 2, 4, 8 ... neighbours is the sum of two smaller ones, and the binary digits of `size` select the sums
    that make up the window. The work grows with the logarithm of the window. Nothing is subtracted, so small sums next
    to large ones keep their precision.
    """
    for dimension in (-2, -1):
        length = image.shape[dimension] - size + 1
        sums, summed, power = None, 0, 1  # `image` holds sums of `power` neighbours, `sums` those of `summed`
        while True:
            if size & power:
                part = image.narrow(dimension, summed, length)
                sums, summed = part if sums is None else sums + part, summed + power
            if summed == size:
                break
            count = image.shape[dimension] - power
            image = image.narrow(dimension, 0, count) + image.narrow(dimension, power, count)
            power *= 2
        image = sums
    return image


def _box_mean(image: torch.Tensor, box_size: int) -> torch.Tensor:
    """
    Mean over `box_size` x `box_size` windows of an image continued by reflection: (..., H, W) to (..., H, W).

    Uses cumulative sums along the columns and then along the rows, one band at a time, so the time does not depend on
    the box size. The sums are float64 (float32 where the device has no float64), so their differences are exact.
    """
    accumulator = torch.float32 if image.device.type == "mps" else torch.float64
    before = box_size // 2
    for dimension, across in ((-2, -1), (-1, -2)):
        length, bands = image.shape[dimension], []
        for band in image.split(max(_PIXELS_PER_BAND // length, 1), across):
            padded = _reflected(band, dimension, -before - 1, length + box_size - 1 - before, 0, length)
            sums = padded.cumsum(dimension, dtype=accumulator)
            windows = sums.narrow(dimension, box_size, length) - sums.narrow(dimension, 0, length)
            bands.append((windows / box_size).to(image.dtype))
        image = torch.cat(bands, across)
    return image


def _check_unit_range(name: str, tensor: torch.Tensor) -> None:
    """Refuses anything but a floating-point tensor with values in [0, 1] (up to rounding)."""
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
    _check_shapes("image", image, alpha)


def _check_shapes(name: str, image: torch.Tensor, alpha: torch.Tensor) -> None:
    if image.ndim < 3 or image.shape[-3] != 3:
        raise ValueError(f"`{name}` must have the shape (..., 3, height, width), got {tuple(image.shape)}")
    expected = (*image.shape[:-3], 1, *image.shape[-2:])
    if tuple(alpha.shape) != expected:
        raise ValueError(f"`alpha` must have the shape {expected} to match `{name}`, got {tuple(alpha.shape)}")
    if image.device != alpha.device:
        raise ValueError(f"`{name}` is on {image.device} but `alpha` is on {alpha.device}: put both on one device")


def _check_photo_and_alpha(photo: torch.Tensor, alpha: torch.Tensor) -> None:
    if not isinstance(photo, torch.Tensor) or photo.dtype != torch.uint8:
        kind = photo.dtype if isinstance(photo, torch.Tensor) else type(photo).__name__
        raise TypeError(f"`photo` must be a torch tensor of bytes, got {kind}")
    if photo.ndim != 3:
        raise ValueError(f"`photo` must have the shape (3, height, width), got {tuple(photo.shape)}")
    _check_unit_range("alpha", alpha)
    _check_shapes("photo", photo, alpha)


def to_planes(picture: Image.Image) -> torch.Tensor:
    """Converts a PIL image to bytes (channels, H, W)."""
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in picture.split()]))


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Converts floating point in [0, 1] to bytes from 0 to 255."""
    return pixels.mul(255).round_().to(torch.uint8)


def _blur_fusion(
    image: torch.Tensor, foreground: torch.Tensor, background: torch.Tensor, alpha: torch.Tensor, box_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    One pass of the estimator: improves the estimates of foreground and background colours.

    (..., 3, h, w) becomes (..., 3, h - box_size + 1, w - box_size + 1), the pixels whose windows are inside.
    """
    window = box_size**2
    weighted = torch.cat([alpha, foreground * alpha, background * (1 - alpha)], dim=-3)  # (..., 7, h, w)
    alpha_sum, foreground_sum, background_sum = _window_sums(weighted, box_size).split([1, 3, 3], dim=-3)
    # The published formula divides means and adds 1e-5. Here sums are divided, so 1e-5 is multiplied by the window.
    foreground_mean = foreground_sum / (alpha_sum + 1e-5 * window)
    background_mean = background_sum / ((1 + 1e-5) * window - alpha_sum)
    image, alpha = _inner(image, box_size), _inner(alpha, box_size)
    # The residual of the smooth colours is the foreground's own detail.
    detail = image - torch.lerp(background_mean, foreground_mean, alpha)
    return torch.addcmul(foreground_mean, alpha, detail).clamp(0, 1), background_mean


def _inner(pixels: torch.Tensor, box_size: int) -> torch.Tensor:
    """
    The pixels of (..., h, w) whose windows are inside.

    A window of even size extends one pixel further to the top and left.
    """
    before, after = box_size // 2, box_size - 1 - box_size // 2
    return pixels[..., before : pixels.shape[-2] - after, before : pixels.shape[-1] - after]


def _foreground_of_tile(
    image: torch.Tensor, alpha: torch.Tensor, tile: _Region, box_sizes: tuple[int, ...]
) -> torch.Tensor:
    """
    Foreground colours (..., 3, h, w) of a tile of (..., 3, H, W), which holds bytes or values in [0, 1].

    Each pass needs the previous pass on a margin around the tile, as wide as its windows.
    """
    regions = [tile]
    for box_size in reversed(box_sizes):
        regions.insert(0, regions[0].grown(box_size // 2, box_size - 1 - box_size // 2))
    size = image.shape[-2:]
    image, alpha = regions[0].of(image), regions[0].of(alpha)
    image = image if image.is_floating_point() else image / 255
    foreground = background = image
    for box_size, region in zip(box_sizes, regions[1:], strict=True):
        estimates = _blur_fusion(image, foreground, background, alpha, box_size)
        # Outside the picture the estimates are reflected, not the photo: a window of even size is not symmetric.
        foreground, background = (region.reflected(estimate, region, size) for estimate in estimates)
        image, alpha = _inner(image, box_size), _inner(alpha, box_size)
    return foreground


def estimate_foreground(
    image: torch.Tensor, alpha: torch.Tensor, box_sizes: tuple[int, ...] = _BOX_SIZES
) -> torch.Tensor:
    """
    Estimates the colours of the foreground alone, without the old background that shows through at soft edges.

    Blur fusion (Forte and Pitié, "Approximate Fast Foreground Colour Estimation", ICIP 2021): the closed form with box
    means, applied once for each box size. The time is linear in the pixels and hardly depends on the box sizes.

    Args:
        image (`torch.Tensor` of shape `(..., 3, height, width)`): Photo, floating point in [0, 1].
        alpha (`torch.Tensor` of shape `(..., 1, height, width)`): Matte, floating point in [0, 1].
        box_sizes (`tuple[int, ...]`, *optional*, defaults to `(90, 6)`): Window sides in pixels, one for each pass.
            A photo smaller than a window is continued by reflection.

    Returns:
        `torch.Tensor` of shape `(..., 3, height, width)`: Foreground colours in [0, 1], of the image's dtype and on
        its device.

    Raises:
        TypeError: `image` or `alpha` is not a floating-point tensor.
        ValueError: Shapes or devices do not match, values are outside [0, 1], or a box size is not a positive integer.
    """
    _check_image_and_alpha(image, alpha)
    if not box_sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in box_sizes):
        raise ValueError(f"`box_sizes` must be positive integers, one for each pass, got {box_sizes}")
    dtype = torch.promote_types(torch.promote_types(image.dtype, alpha.dtype), torch.float32)
    photo, matte = image.to(dtype).contiguous(), alpha.to(dtype).contiguous()
    foreground = torch.empty_like(photo)
    for tile in _tiles(photo, max(box_sizes)):
        tile.of(foreground)[:] = _foreground_of_tile(photo, matte, tile, box_sizes)
    return foreground.to(image.dtype)


def _maximum_along(image: torch.Tensor, reach: int, row_step: int, column_step: int) -> torch.Tensor:
    """Maximum over the 2 * reach + 1 pixels of a line through each pixel, in log2(2 * reach + 1) steps."""
    window, length = 1, 2 * reach + 1
    image = F.pad(image, [reach * column_step] * 2 + [reach * row_step] * 2, value=-math.inf)
    while window < length:
        shift = min(window, length - window)
        rows, columns = image.shape[-2] - shift * row_step, image.shape[-1] - shift * column_step
        image = torch.maximum(image[..., :rows, :columns], image[..., shift * row_step :, shift * column_step :])
        window += shift
    return image


def guided_upsampling(
    matte: torch.Tensor, small_photo: torch.Tensor, photo: torch.Tensor, radius: int = 1, epsilon: float = 1e-4
) -> torch.Tensor:
    """
    Resizes a matte to the photo's size and follows the photo's edges.

    The fast guided filter of He and Sun (https://arxiv.org/abs/1505.00996) with the colour photo as guide. At the
    matte's size, each window fits the matte as a linear function of the three colours (least squares, where `epsilon`
    regularises the slopes). The coefficients vary slowly. They are resized and then applied to the colours of the
    large photo.

    Args:
        matte (`torch.Tensor` of shape `(h, w)`): Matte in [0, 1], float32.
        small_photo (`torch.Tensor` of shape `(3, h, w)`): The photo at the matte's size, in bytes.
        photo (`torch.Tensor` of shape `(3, height, width)`): The photo itself, in bytes, on the matte's device.
        radius (`int`, *optional*, defaults to 1): Windows have 2 · radius + 1 pixels of the matte on each side.
        epsilon (`float`, *optional*, defaults to 1e-4): Regularisation. Where the variance of the colours (from 0 to
            1) is smaller, the photo has little influence.

    Returns:
        `torch.Tensor` of shape `(height, width)`, float32 in [0, 1].

    Raises:
        ValueError: `small_photo` and `matte` differ in size.
    """
    _check_small_photo(matte, small_photo)
    coefficients = _smooth_coefficients(matte, small_photo, radius, epsilon)  # (4, h, w)
    height, width = photo.shape[-2:]
    step, large_matte = max(_PIXELS_PER_BAND // width, 1), matte.new_empty(height, width)
    for top in range(0, height, step):
        colours = photo[:, top : top + step] / 255
        band = _rows_resized(coefficients, slice(top, top + colours.shape[1]), height)  # (4, rows, w)
        band = F.interpolate(band[None], size=colours.shape[1:], mode="bilinear")[0]
        large_matte[top : top + step] = (band[:3] * colours).sum(0).add_(band[3]).clamp_(0, 1)
    return large_matte


def sharpened_matte(
    matte: torch.Tensor, small_photo: torch.Tensor, radius: int = 3, epsilon: float = 1e-4
) -> torch.Tensor:
    """
    Sharpens a matte to the photo of the same size: edges that the network predicted too wide become as narrow as the
    photo's own edges.

    As in `guided_upsampling`, each window fits the matte as a linear function of the colours. A blurred matte flattens
    this function: at the mean foreground colour its value is below 1, and at the mean background colour above 0. Here
    the slopes are scaled until these two values differ by 1, as the matting equation I = αF + (1 − α)B requires. The
    matte stays unchanged where a window contains only foreground or only background, or where their colours do not
    differ.

    Args:
        matte (`torch.Tensor` of shape `(h, w)`): Matte in [0, 1], float32.
        small_photo (`torch.Tensor` of shape `(3, h, w)`): The photo at the matte's size, in bytes.
        radius (`int`, *optional*, defaults to 3): Windows have 2 · radius + 1 pixels on each side. The radius should
            be the distance between the matte's edges and the photo's.
        epsilon (`float`, *optional*, defaults to 1e-4): As for `guided_upsampling`.

    Returns:
        `torch.Tensor` of shape `(h, w)`, float32 in [0, 1].

    Raises:
        ValueError: `small_photo` and `matte` differ in size.
    """
    _check_small_photo(matte, small_photo)
    sharpened = matte.clone()
    for tile, region, inner in _tiles_with_margin(matte, 2 * radius):
        own = region.of(matte)
        lowest, highest = own.aminmax()
        if highest > _CERTAIN and lowest < 1 - _CERTAIN:
            tile.of(sharpened)[:] = inner.of(_sharpened(own, region.of(small_photo) / 255, radius, epsilon))
    return sharpened


def _sharpened(matte: torch.Tensor, photo: torch.Tensor, radius: int, epsilon: float) -> torch.Tensor:
    """`sharpened_matte` of one tile, with the photo in [0, 1]."""
    slopes, _, _ = _fit(matte, photo, radius, epsilon)
    # Weights that prefer confident pixels give the mean colours and mean mattes of foreground and background.
    weights = torch.stack([matte**2, (1 - matte) ** 2])  # (2, h, w)
    mean_weights = _window_mean(weights, radius)
    colours = _window_mean((weights[:, None] * photo).flatten(0, 1), radius).unflatten(0, (2, 3))
    foreground, background = colours / (mean_weights[:, None] + 1e-6)  # (3, h, w) each
    midpoint = (_window_mean(weights * matte, radius) / (mean_weights + 1e-6)).mean(0)  # of the two mean mattes
    step = (slopes * (foreground - background)).sum(0)
    slopes = slopes * (step / (step**2 + _STEP_REGULARISATION)).clamp(min=1)
    constant = midpoint - (slopes * (foreground + background) / 2).sum(0)
    # Confidence that the window contains both foreground and background, in different colours.
    confidence = (mean_weights.amin(0) / _SUFFICIENT_WEIGHT).clamp(max=1) * (step / _SEPARATING_STEP).clamp(0, 1)
    coefficients = torch.cat([slopes * confidence, (constant * confidence)[None], confidence[None]])
    coefficients = _window_mean(coefficients, radius)  # (5, h, w)
    sharpened = (coefficients[:3] * photo).sum(0) + coefficients[3] + (1 - coefficients[4]) * matte
    return sharpened.clamp(0, 1)


def _smooth_coefficients(matte: torch.Tensor, small_photo: torch.Tensor, radius: int, epsilon: float) -> torch.Tensor:
    """The slopes for red, green and blue and the constant, averaged over the windows of each pixel: (4, h, w)."""
    smooth = matte.new_empty(4, *matte.shape)
    for tile, region, inner in _tiles_with_margin(matte, 2 * radius):
        slopes, photo_mean, matte_mean = _fit(region.of(matte), region.of(small_photo) / 255, radius, epsilon)
        constant = matte_mean - (slopes * photo_mean).sum(0)
        tile.of(smooth)[:] = inner.of(_window_mean(torch.cat([slopes, constant[None]]), radius))
    return smooth


def _tiles_with_margin(image: torch.Tensor, margin: int) -> Iterator[tuple[_Region, _Region, _Region]]:
    """
    Tiles that cover (..., H, W), each with the pixels up to `margin` around it that are inside the picture, and with
    the tile's place among these.
    """
    height, width = image.shape[-2:]
    for tile in _tiles(image, margin):
        grown = tile.grown(margin, margin)
        region = _Region(max(grown.top, 0), min(grown.bottom, height), max(grown.left, 0), min(grown.right, width))
        rows, columns = tile.top - region.top, tile.left - region.left
        inner = _Region(rows, rows + tile.bottom - tile.top, columns, columns + tile.right - tile.left)
        yield tile, region, inner


def _fit(matte: torch.Tensor, photo: torch.Tensor, radius: int, epsilon: float) -> tuple[torch.Tensor, ...]:
    """
    Least-squares fit of the matte by the colours in the window around each pixel.

    Returns the slopes (3, h, w) and the window means of the photo (3, h, w) and the matte (h, w).
    """
    photo_mean, matte_mean = _window_mean(photo, radius), _window_mean(matte[None], radius)[0]
    covariance = _window_mean(photo * matte, radius) - photo_mean * matte_mean  # (3, h, w)
    variance = _window_mean(_products(photo), radius) - _products(photo_mean)  # (6, h, w)
    for diagonal in (0, 3, 5):
        variance[diagonal] += epsilon
    return _solve(variance, covariance), photo_mean, matte_mean


def _products(photo: torch.Tensor) -> torch.Tensor:
    """The products of all pairs of colours, RR, RG, RB, GG, GB and BB: (3, h, w) to (6, h, w)."""
    return torch.cat([photo[i] * photo[i:] for i in range(3)])


def _window_mean(maps: torch.Tensor, radius: int) -> torch.Tensor:
    """Mean of (n, h, w) over the part of each pixel's window that is inside the picture."""
    sums = _window_sums(F.pad(maps, [radius] * 4), 2 * radius + 1)
    rows, columns = (_window_counts(length, radius, maps) for length in maps.shape[1:])
    return sums.div_(rows[:, None] * columns)


def _window_counts(length: int, radius: int, like: torch.Tensor) -> torch.Tensor:
    """How many of the 2 · radius + 1 positions around each position of a line are inside it: (length,)."""
    positions = torch.arange(length, device=like.device, dtype=like.dtype)
    return (positions + radius).clamp(max=length - 1) - (positions - radius).clamp(min=0) + 1


def _check_small_photo(matte: torch.Tensor, small_photo: torch.Tensor) -> None:
    if small_photo.shape[1:] != matte.shape:
        raise ValueError(
            f"`small_photo` must have the matte's size {tuple(matte.shape)}, got {tuple(small_photo.shape[1:])}"
        )


def _solve(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """
    Solves A x = b at each pixel, for symmetric positive definite A (3, 3) and b (3, h, w).

    `matrices` (6, h, w) holds the upper triangle of A, row by row. Gaussian elimination without pivoting, which is
    stable for such A. `torch.linalg.solve` works matrix by matrix and is a hundred times slower.
    """
    entries, solution = iter(matrices), list(vectors)
    upper = {(i, j): next(entries) for i in range(3) for j in range(i, 3)}
    for i, j in ((0, 1), (0, 2), (1, 2)):  # takes row i from row j
        factor = upper[i, j] / upper[i, i]
        for k in range(j, 3):
            upper[j, k] = torch.addcmul(upper[j, k], factor, upper[i, k], value=-1)
        solution[j] = torch.addcmul(solution[j], factor, solution[i], value=-1)
    for i in (2, 1, 0):
        for j in range(i + 1, 3):
            solution[i] = torch.addcmul(solution[i], upper[i, j], solution[j], value=-1)
        solution[i] = solution[i] / upper[i, i]
    return torch.stack(solution)


def _rows_resized(maps: torch.Tensor, rows: slice, height: int) -> torch.Tensor:
    """Resizes maps (..., h, w) bilinearly to `height` rows and returns the given rows: (..., number of rows, w)."""
    size = maps.shape[-2]
    centres = torch.arange(rows.start, rows.stop, dtype=maps.dtype, device=maps.device) + 0.5
    positions = (centres * (size / height) - 0.5).clamp(0, size - 1)
    upper = positions.floor().long()
    lower = (upper + 1).clamp(max=size - 1)
    weight = (positions - upper).unsqueeze(-1)
    return torch.lerp(maps.index_select(-2, upper), maps.index_select(-2, lower), weight)


def _grow(alpha: torch.Tensor, pixels: int) -> torch.Tensor:
    """Grey dilation by an octagon of the given inner radius: (..., H, W) to (..., H, W)."""
    # Dilations by lines along both axes and both diagonals give an octagon. It differs from a disc by at most 8 %.
    diagonal = int(pixels * (1 - math.sqrt(0.5)))
    straight = pixels - 2 * diagonal
    alpha = _maximum_along(_maximum_along(alpha, straight, 0, 1), straight, 1, 0)
    alpha = _maximum_along(alpha, diagonal, 1, 1)
    return _maximum_along(alpha.flip(-1), diagonal, 1, 1).flip(-1)


def _feather(alpha: torch.Tensor, standard_deviation: float) -> torch.Tensor:
    """Gaussian blur, approximated by three box means: (..., H, W) to (..., H, W)."""
    # A box of n pixels has the variance (n^2 - 1) / 12. A blend of the two nearest odd sizes has exactly the required
    # variance, also for fractions of a pixel.
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
    Edits a matte. The edits are applied in the order of the arguments below.

    Args:
        alpha (`torch.Tensor` of shape `(..., height, width)`): Matte, floating point in [0, 1].
        sensitivity (`float`, *optional*): From 0 to 1. The matte is multiplied by `2 - sensitivity` and clamped to 1.
            1 changes nothing. Lower values keep more of the pixels about which the network is uncertain.
        threshold (`float`, *optional*): From 0 to 1. Makes the matte binary: 1 above the threshold, 0 elsewhere.
        grow (`int`, *optional*, defaults to 0): Dilates the matte by this many pixels. Negative values erode it.
        feather (`float`, *optional*, defaults to 0): Blurs the matte. Standard deviation of the blur in pixels.
        invert (`bool`, *optional*, defaults to `False`): Whether to keep the background instead of the subject.

    Returns:
        `torch.Tensor`: Matte of the same shape, dtype and device, in [0, 1]. The input is not changed.

    Raises:
        TypeError: `alpha` is not a floating-point tensor, or `grow` is not an integer.
        ValueError: A value is outside its range.
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
    """Resizes (3, h, w), with its aspect ratio kept, so that it covers `height` x `width`, and crops the centre."""
    scale = max(height / background.shape[-2], width / background.shape[-1])
    rows = max(round(background.shape[-2] * scale), height)
    columns = max(round(background.shape[-1] * scale), width)
    resized = F.interpolate(background[None], size=(rows, columns), mode="bilinear", antialias=True)[0]
    top, left = (rows - height) // 2, (columns - width) // 2
    return resized[:, top : top + height, left : left + width]


def _background_pixels(background, height: int, width: int, device: torch.device) -> torch.Tensor:
    """Converts a background to float32 that broadcasts to (3, height, width)."""
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
        return torch.tensor(background, dtype=torch.float32, device=device).view(3, 1, 1) / 255
    if isinstance(background, Image.Image):
        background = torch.from_numpy(np.array(background.convert("RGB"))).permute(2, 0, 1) / 255
    if not isinstance(background, torch.Tensor):
        raise TypeError(
            "`background` must be None (transparent), a colour name or three values from 0 to 255, a PIL image or a "
            f"tensor of shape (3, height, width), got {type(background).__name__}"
        )
    _check_unit_range("background", background)
    if background.ndim != 3 or background.shape[0] != 3:
        raise ValueError(f"`background` must have the shape (3, height, width), got {tuple(background.shape)}")
    return _cover(background.to(device=device, dtype=torch.float32), height, width)


def cut_out(
    photo: torch.Tensor,
    alpha: torch.Tensor,
    background: str | tuple[int, int, int] | Image.Image | torch.Tensor | None = None,
    refine_foreground: bool = True,
    own_alpha: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Puts a photo's subject on another background, in bytes.

    Colours are computed only where the matte is soft. Elsewhere the result shows the photo's own pixels or none of
    them.

    Args:
        photo (`torch.Tensor` of shape `(3, height, width)`): Photo in bytes.
        alpha (`torch.Tensor` of shape `(1, height, width)`): Matte, floating point in [0, 1].
        background: `None` for transparent. A colour as a CSS name, `#rrggbb` or three values from 0 to 255. Or another
            picture (PIL image, or tensor in [0, 1] of shape `(3, h, w)`), which is resized to cover the photo, with
            its aspect ratio kept, and cropped at the centre.
        refine_foreground (`bool`, *optional*, defaults to `True`): Whether to use the foreground's own colours, from
            `estimate_foreground`. They have no halo of the old background.
        own_alpha (`torch.Tensor` of shape `(1, height, width)`, *optional*): The photo's own transparency in bytes.
            The result's alpha is the product of `alpha` and `own_alpha`.

    Returns:
        `torch.Tensor` of bytes, on the photo's device: `(4, height, width)` (red, green, blue, alpha, not
        premultiplied) on a transparent background, else `(3, height, width)`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: Shapes or devices do not match, values are outside [0, 1], or the colour is unknown.
    """
    _check_photo_and_alpha(photo, alpha)
    coverage = alpha
    if own_alpha is not None:
        _check_shapes("photo", photo, own_alpha)
        coverage = alpha * (own_alpha / 255)
    opacity = to_bytes(coverage)
    if background is None:
        colours = photo.clone()
    else:
        background = _background_pixels(background, *photo.shape[-2:], photo.device)
        colours = torch.where(opacity > 127, photo, to_bytes(background))
    soft = ((opacity > 0) & (coverage < _OPAQUE))[0]
    box_sizes = _BOX_SIZES if refine_foreground else ()
    for tile in _tiles(photo, max(_BOX_SIZES), needed=soft):
        # The own alpha does not mix the photo's colours with a background, so the matte alone gives the foreground.
        foreground = _foreground_of_tile(photo, alpha, tile, box_sizes)
        if background is not None:
            foreground = torch.lerp(tile.of(background.expand(photo.shape)), foreground, tile.of(coverage))
        tile.of(colours)[:] = to_bytes(foreground)
    return torch.cat([colours, opacity]) if background is None else colours
