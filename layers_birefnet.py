"""Operations that several parts of BiRefNet share."""

import torch
import torch.nn.functional as F
from torch import nn


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resizing of (B, C, h, w) with aligned corners, the only kind in BiRefNet; none if it has the size."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def fold_batch_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, norm: nn.BatchNorm2d
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weight and bias of the convolution that equals a convolution followed by `norm` with its running statistics.

    It is derived in float32 at least from the parameters at every call and never stored: a few thousandths of the
    convolution's own cost, and there is no second state to keep in step.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    shift = norm.bias.to(dtype) - norm.running_mean.to(dtype) * scale
    if bias is not None:
        shift = shift + bias.to(dtype) * scale
    folded = weight.to(dtype) * scale.view(-1, *(1,) * (weight.ndim - 1))
    return folded.to(weight.dtype), shift.to(weight.dtype)


def convolve_and_normalize(hidden_states: torch.Tensor, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> torch.Tensor:
    """`norm(convolution(hidden_states))`, in one convolution where the norm uses its running statistics."""
    if norm.training:
        return norm(convolution(hidden_states))
    weight, bias = fold_batch_norm(convolution.weight, convolution.bias, norm)
    return F.conv2d(hidden_states, weight, bias, padding=convolution.padding, dilation=convolution.dilation)


def image_laplacian(pixel_values: torch.Tensor) -> torch.Tensor:
    """
    (B, 3, H, W) → (B, 1, H, W): Laplacian of the channels' mean with a 5×5 kernel of ones (centre −24) divided by the
    sum of its magnitudes, reflecting at the border. It is kornia's `laplacian(x, 5)`, and like there the sum over each
    5×5 neighbourhood goes first down, then across.
    """
    image = pixel_values.mean(dim=1, keepdim=True) / 48
    height, width = image.shape[-2:]
    padded = F.pad(image, (2, 2, 2, 2), mode="reflect")
    rows = sum(padded[..., i : i + height, :] for i in range(5))
    return sum(rows[..., i : i + width] for i in range(5)) - 25 * image
