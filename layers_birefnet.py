"""Operations that several parts of BiRefNet share."""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


# What one tile of rows holds at its widest. On a CPU it should stay in the cache from one operation to the next, and
# memory of this size is used again, where each larger piece is fetched anew from the system, page by page.
CPU_TILE_BYTES = 4 * 2**20
# Channels that one sum of a wide float32 convolution runs over on a CPU, where such a sum is one long chain: shorter
# ones lose fewer digits on the way.
CHANNELS_OF_A_SUM = 176


def tiles(number: int, width: int, like: torch.Tensor, elsewhere: int | None = None) -> list[slice]:
    """
    Cuts `number` rows of `width` elements, of the dtype and on the device of `like`, into tiles that fit a CPU's
    cache. On other devices, and in a graph, where tiles would be unrolled, they have `elsewhere` bytes, or are one.
    """
    in_cache = like.device.type == "cpu" and not torch.compiler.is_compiling()
    size = CPU_TILE_BYTES if in_cache else elsewhere
    if size is None:
        return [slice(0, number)]
    step = max(1, size // (width * like.element_size()))
    return [slice(first, min(first + step, number)) for first in range(0, number, step)]


def concatenate(parts: Iterable[torch.Tensor], number: int, dim: int = 0) -> torch.Tensor:
    """
    `torch.cat` of tiles that together have `number` rows. Without gradients each is put in its place as soon as it is
    computed, so that the next one uses its memory again.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        parts = list(parts)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    whole, start = None, 0
    for part in parts:
        rows = part.shape[dim]
        if rows == number:
            return part
        if whole is None:
            whole = part.new_empty(*part.shape[:dim], number, *part.shape[dim + 1 :])
        whole.narrow(dim, start, rows).copy_(part)
        start += rows
    return whole


def linear_for_tiles(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    `F.linear` by this weight (out, C), for tile after tile: (..., C) → (..., out).

    Before a product in bfloat16 oneDNN lays the weight out anew, in up to a fifth of the product's time. Where that
    can be, it is done here, once for all tiles; the sums are the same ones.
    """
    can_lay_out = (
        _infers_in_bfloat16_on_cpu(weight)
        and torch.backends.mkldnn.is_available()
        and not torch._C._is_torch_function_mode_enabled()  # such as int8's
    )
    if not can_lay_out:
        return lambda tile: F.linear(tile, weight, bias)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda tile: torch.ops.mkldnn._linear_pointwise(tile, laid_out, bias, "none", [], "")


def layer_for_tiles(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer to be applied to tile after tile, or what stands in its place (an adapter, a hook): itself."""
    is_plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    is_watched = layer._forward_hooks or layer._forward_pre_hooks
    return linear_for_tiles(layer.weight, layer.bias) if is_plain and not is_watched else layer


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """
    `F.scaled_dot_product_attention` of small windows: (n, heads, tokens, width) each, the bias (1, heads, tokens,
    tokens).

    In bfloat16 on a CPU that operator multiplies 32 rows of one head at a time, which costs more than the arithmetic.
    There each product is one for all heads of a few windows, whose scores stay in the cache: 30 to 40 % less time.
    Scores and their softmax are float32, like inside that operator; the products of queries and keys are rounded
    before.
    """
    if not _infers_in_bfloat16_on_cpu(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    number, heads, tokens, width = query.shape
    attended, bias = query.new_empty(query.shape), bias.float()
    parts = tiles(number, heads * tokens**2, bias)
    scores = bias.new_empty(parts[0].stop, heads, tokens, tokens)
    shares, rounded = torch.empty_like(scores), torch.empty_like(scores, dtype=query.dtype)
    for part in parts:
        queries, keys, values, output = (maps[part].flatten(0, 1) for maps in (query, key, value, attended))
        windows = slice(part.stop - part.start)  # the last part may have fewer
        matrices = rounded[windows].flatten(0, 1)  # of products, then of shares
        torch.bmm(queries, keys.transpose(1, 2), out=matrices)
        torch.add(bias, rounded[windows], alpha=width**-0.5, out=scores[windows])
        torch.softmax(scores[windows], dim=-1, out=shares[windows])
        rounded[windows].copy_(shares[windows])
        torch.bmm(matrices, values, out=output)
    return attended


def _infers_in_bfloat16_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether operators may be used that are faster then, but have no gradient and no graph."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and torch.cpu._is_avx512_bf16_supported()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


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


def convolve(parts: Sequence[torch.Tensor], weight, bias, **options) -> torch.Tensor:
    """
    The convolution of the concatenated `parts` (each (B, C_i, H, W)), as a sum over them: the concatenation, which is
    wider than what comes of it, never exists.
    """
    if parts[0].dtype == torch.float32 and parts[0].device.type == "cpu" and not torch.compiler.is_compiling():
        parts = [block for part in parts for block in _short_sums(part)]
    first, *others = zip(parts, weight.split([part.shape[1] for part in parts], dim=1), strict=True)
    output = F.conv2d(*first, bias, **options)
    for part in others:
        output += F.conv2d(*part, **options)
    return output


def _short_sums(part: torch.Tensor) -> Sequence[torch.Tensor]:
    return part.split(CHANNELS_OF_A_SUM, dim=1) if part.shape[1] >= 2 * CHANNELS_OF_A_SUM else [part]


def convolve_and_normalize(
    parts: Sequence[torch.Tensor], convolution: nn.Conv2d, norm: nn.BatchNorm2d
) -> torch.Tensor:
    """
    `norm(convolution(torch.cat(parts, dim=1)))`, in one convolution of each part where the norm uses its running
    statistics.
    """
    options = {"padding": convolution.padding, "dilation": convolution.dilation}
    if norm.training:
        return norm(convolve(parts, convolution.weight, convolution.bias, **options))
    return convolve(parts, *fold_batch_norm(convolution.weight, convolution.bias, norm), **options)


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
