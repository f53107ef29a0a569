"""
Everything that is fast because of a particular processor.

The files of the network (backbone, deformable, decoder) state its mathematics with PyTorch's own operators. Where a
processor reaches the same result faster another way, that way is a function of this file, and the network's file
chooses it by one `if`, or calls the function in place of the operator. Every function falls back to the operator.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn


# Size of one tile at its widest on a CPU. A tile of this size stays in the cache from one operation to the next, and
# the allocator reuses its memory. The system provides larger pieces anew for every use, page by page.
CPU_TILE_BYTES = 4 * 2**20
# Number of channels that one float32 convolution sums on a CPU. A CPU adds the products of a channel sum one after
# the other, so a short sum loses fewer digits than a long one.
CHANNELS_PER_SUM = 176


# ------------------------------------------------------------------------------------------------------------------
# Tiles: a CPU computes several operations on a few rows faster than one operation after the other on all rows
# ------------------------------------------------------------------------------------------------------------------


def row_tiles(number: int, width: int, like: torch.Tensor, other_bytes: int | None = None) -> list[slice]:
    """
    Cut rows into tiles that fit a CPU's cache.

    Args:
        number: Number of rows.
        width: Elements in a row.
        like: Tensor of the rows' dtype and device.
        other_bytes: Size of a tile on other devices and in a compiled graph, which would unroll small tiles. `None`
            stands for one tile.

    Returns:
        The tiles, in order.
    """
    fits_cache = like.device.type == "cpu" and not torch.compiler.is_compiling()
    size = CPU_TILE_BYTES if fits_cache else other_bytes
    if size is None:
        return [slice(0, number)]
    step = max(1, size // (width * like.element_size()))
    return [slice(first, min(first + step, number)) for first in range(0, number, step)]


def concatenate_tiles(tiles: Iterable[torch.Tensor], number: int, dim: int = 0) -> torch.Tensor:
    """
    `torch.cat` of tiles that have `number` rows altogether.

    Without gradients, each tile is copied into the result as soon as it is computed. The next tile then reuses its
    memory.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        tiles = list(tiles)
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim)
    whole, start = None, 0
    for tile in tiles:
        rows = tile.shape[dim]
        if rows == number:
            return tile
        if whole is None:
            whole = tile.new_empty(*tile.shape[:dim], number, *tile.shape[dim + 1 :])
        whole.narrow(dim, start, rows).copy_(tile)
        start += rows
    return whole


def add_in_tiles(maps: torch.Tensor, term: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """
    Add to (B, C, H, W) `maps` the result of `term(rows)`, for a tile of map rows at a time.

    Without gradients the sum replaces `maps`, and the whole term never exists.
    """
    batch, channels, height, width = maps.shape
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return maps + term(slice(0, height))
    for rows in row_tiles(height, batch * channels * width, maps):
        maps[:, :, rows] += term(rows)
    return maps


# ------------------------------------------------------------------------------------------------------------------
# bfloat16: oneDNN's prepacked weights, and attention in small windows
# ------------------------------------------------------------------------------------------------------------------


def has_bfloat16_arithmetic() -> bool:
    """Whether this processor multiplies bfloat16 numbers by instructions of its own."""
    return torch.cpu._is_avx512_bf16_supported()


def infers_in_bfloat16(tensor: torch.Tensor) -> bool:
    """Whether `tensor` may go to the bfloat16 operators of a CPU. They have no gradient and cannot be traced."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and has_bfloat16_arithmetic()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def prepack_weight(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    `F.linear` with this weight, to be called for tile after tile.

    oneDNN reorders a bfloat16 weight before each product, which takes up to a fifth of the product's time. This
    function reorders it once for all tiles. The products are the same to the bit.

    Args:
        weight: (out, C).
        bias: (out,).

    Returns:
        A function (..., C) → (..., out).
    """
    can_prepack = (
        infers_in_bfloat16(weight)
        and torch.backends.mkldnn.is_available()
        and not torch._C._is_torch_function_mode_enabled()  # int8 replaces F.linear by such a mode
    )
    if not can_prepack:
        return lambda tile: F.linear(tile, weight, bias)
    prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda tile: torch.ops.mkldnn._linear_pointwise(tile, prepacked, bias, "none", [], "")


def prepack_layer(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """`prepack_weight` of a linear layer. Returns the layer itself if an adapter replaces it or a hook watches it."""
    is_plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    is_watched = layer._forward_hooks or layer._forward_pre_hooks
    return prepack_weight(layer.weight, layer.bias) if is_plain and not is_watched else layer


def attend_with_batched_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """
    `F.scaled_dot_product_attention` of small windows in bfloat16 on a CPU, in 30 to 40 % less time.

    PyTorch's operator multiplies 32 rows of one head at a time, and the call costs more than the arithmetic. Here one
    batched product covers all heads of a few windows, whose scores stay in the cache. Scores and softmax are float32
    as in the operator. The products of queries and keys are rounded to bfloat16 first.

    Args:
        query, key, value: (n, heads, tokens, head dimension).
        bias: (1, heads, tokens, tokens).

    Returns:
        (n, heads, tokens, head dimension)
    """
    number, heads, tokens, width = query.shape
    attended, bias = query.new_empty(query.shape), bias.float()
    tiles = row_tiles(number, heads * tokens**2, bias)
    scores = bias.new_empty(tiles[0].stop, heads, tokens, tokens)
    probabilities, rounded = torch.empty_like(scores), torch.empty_like(scores, dtype=query.dtype)
    for tile in tiles:
        queries, keys, values, output = (maps[tile].flatten(0, 1) for maps in (query, key, value, attended))
        windows = slice(tile.stop - tile.start)  # the last tile may have fewer
        matrices = rounded[windows].flatten(0, 1)  # first the products, then the probabilities
        torch.bmm(queries, keys.transpose(1, 2), out=matrices)
        torch.add(bias, rounded[windows], alpha=width**-0.5, out=scores[windows])
        torch.softmax(scores[windows], dim=-1, out=probabilities[windows])
        rounded[windows].copy_(probabilities[windows])
        torch.bmm(matrices, values, out=output)
    return attended


# ------------------------------------------------------------------------------------------------------------------
# float32: sums of few channels
# ------------------------------------------------------------------------------------------------------------------


def loses_digits_in_long_sums(maps: torch.Tensor) -> bool:
    """Whether a convolution of `maps` is more exact as a sum of convolutions of fewer channels: float32 on a CPU."""
    return maps.dtype == torch.float32 and maps.device.type == "cpu" and not torch.compiler.is_compiling()


def split_channels(maps: torch.Tensor) -> Sequence[torch.Tensor]:
    """Cut (B, C, H, W) into maps of `CHANNELS_PER_SUM` channels if it has at least twice as many."""
    return maps.split(CHANNELS_PER_SUM, dim=1) if maps.shape[1] >= 2 * CHANNELS_PER_SUM else [maps]
