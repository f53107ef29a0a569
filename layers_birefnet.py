"""Mathematics that several parts of BiRefNet share: resizing, folded batch norms, split convolutions, a Laplacian."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .hardware_birefnet import convolve_and_activate, loses_digits_in_long_sums, split_channels


IDENTITY, RELU = nn.Identity(), nn.ReLU()


def is_plain(module: nn.Module, *names: str) -> bool:
    """Whether a module is of one of these classes and nothing replaces or watches its forward pass."""
    is_watched = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module).__name__ in names and not is_watched


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Resize (B, C, h, w) to `size` (H, W), bilinear with aligned corners, as everywhere in BiRefNet.

    Returns `maps` itself if it has this size already.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def fold_batch_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.BatchNorm2d, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Fold a batch norm with running statistics into the convolution before it.

    Recomputed from the parameters on every call (in float32 or wider), so there is no second copy to keep in sync. It
    costs a few thousandths of the convolution.

    Args:
        weight: (out, C, k, k) of the convolution.
        bias: (out,) of the convolution.
        norm: Batch norm of `out` channels.
        like: Tensor of the convolution's input dtype.

    Returns:
        Weight and bias of the single convolution that does both, in the dtype of `like`.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    shift = norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype) * scale
    folded = weight.to(dtype) * scale.view(-1, *(1,) * (weight.ndim - 1))
    return folded.to(like.dtype), shift.to(like.dtype)


def convolve(
    parts: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: nn.Module = IDENTITY,
    **options,
) -> torch.Tensor:
    """
    `activation(F.conv2d(torch.cat(parts, dim=1), weight, bias, **options))`, without building the concatenation.

    Convolves each part with its slice of the weight and sums the results.

    Args:
        parts: Maps (B, C_i, H, W).
        weight: (out, Σ C_i, k, k).
        bias: (out,).
        activation: Pointwise module.
        options: Stride, padding and dilation, as in `F.conv2d`.

    Returns:
        (B, out, H, W)
    """
    if loses_digits_in_long_sums(parts[0]):  # sums of few channels are more exact there
        parts = [block for part in parts for block in split_channels(part)]
    *terms, last = zip(parts, weight.split([part.shape[1] for part in parts], dim=1), strict=True)
    output = None
    for term in terms:
        output = convolve_and_activate(*term, bias, IDENTITY, addend=output, **options)
        bias = None  # added once
    return convolve_and_activate(*last, bias, activation, addend=output, **options)


def convolve_and_normalize(
    parts: Sequence[torch.Tensor], convolution: nn.Conv2d, norm: nn.BatchNorm2d, activation: nn.Module = IDENTITY
) -> torch.Tensor:
    """
    `activation(norm(convolution(torch.cat(parts, dim=1))))`, without building the concatenation.

    In evaluation the norm is folded into the convolution.
    """
    options = {name: getattr(convolution, name) for name in ("stride", "padding", "dilation")}
    if norm.training:
        return activation(norm(convolve(parts, convolution.weight, convolution.bias, **options)))
    folded = fold_batch_norm(convolution.weight, convolution.bias, norm, like=parts[0])
    return convolve(parts, *folded, activation, **options)


def image_laplacian(pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Laplacian of the channels' mean: (B, 3, H, W) → (B, 1, H, W).

    The kernel is 5×5 ones with −24 in the centre, divided by the sum of its magnitudes, 48. The border is reflected.
    Equals kornia's `laplacian(x, 5)`. As in kornia, the sum over each 5×5 neighbourhood runs down the columns first.
    """
    image = pixel_values.mean(dim=1, keepdim=True) / 48
    height, width = image.shape[-2:]
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    rows = sum(padded[..., i : i + height, :] for i in range(5))
    return sum(rows[..., i : i + width] for i in range(5)) - 25 * image
