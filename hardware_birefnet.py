"""
Everything that is fast because of a particular processor.

The files of the network (backbone, deformable, decoder) state its mathematics with PyTorch's own operators. Where a
processor reaches the same result faster another way, that way is a function of this file, and the network's file
chooses it by one `if`, or calls the function in place of the operator. Every function falls back to the operator.
"""

import platform
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


# Size of one tile at its widest on a CPU. A tile of this size stays in the cache from one operation to the next, and
# the allocator reuses its memory. The system provides larger pieces anew for every use, page by page.
CPU_TILE_BYTES = 4 * 2**20
# Number of channels that one float32 convolution sums on a CPU. A CPU adds the products of a channel sum one after
# the other, so a short sum loses fewer digits than a long one.
CHANNELS_PER_SUM = 176
# Number of input channels whose 3×3 kernels of 64 output channels fit the second-level cache of a CPU.
CHANNELS_PER_BLOCK = 1024
# Output channels that a CPU computes at a time. With one output channel, as many columns take their place.
CHANNELS_PER_VECTOR = 16
# Two convolutions are composed where that saves this factor of products. In the embedded network, 1.92 times fewer
# products save 30 % of the time, and 1.56 times fewer save nothing (docs/performance.md).
LEAST_SAVING = 1.75
# Largest number of parameters of a network whose calls are recorded. A recording holds a second copy of the weights.
RECORDED_PARAMETERS = 16_000_000


# ------------------------------------------------------------------------------------------------------------------
# Plan: in which dtype to keep the weights and to compute
# ------------------------------------------------------------------------------------------------------------------


class ComputePlan(NamedTuple):
    """How to compute on a device."""

    storage: torch.dtype  # of the weights in memory
    arithmetic: torch.dtype  # of activations, and of weights while an operation uses them


def compute_plan(
    device: torch.device | str, weights_dtype: torch.dtype | None = None, parameters: int = 0
) -> ComputePlan:
    """
    The best way to compute on this device.

    Half precision is slow on a CPU without arithmetic for it, by a factor of 5 to 100. There the arithmetic is
    float32, and the weights stay in half precision. float16 weights on a CPU with bfloat16 arithmetic are converted to
    bfloat16: lite takes 0.65 of the time of float32 (with AVX-512 float16 instructions 1.40), and mattes differ by
    4e-4 in the mean.

    Args:
        device: Device of the computation.
        weights_dtype: Dtype of the weights. `None` stands for a free choice, without loss of quality.
        parameters: Number of parameters of the network, if known. With a free choice, weights whose float32 form takes
            more than half of the available memory are kept in float16.

    Returns:
        Dtype of the weights and dtype of the arithmetic.
    """
    if torch.device(device).type != "cpu":
        dtype = weights_dtype or torch.float16  # the dtype of the official checkpoints
        return ComputePlan(dtype, dtype)
    if weights_dtype is None:
        is_short_of_memory = 2 * 4 * parameters > available_memory()
        weights_dtype = torch.float16 if is_short_of_memory else torch.float32
    if weights_dtype not in (torch.float16, torch.bfloat16):
        return ComputePlan(weights_dtype, weights_dtype)
    return ComputePlan(weights_dtype, torch.bfloat16 if has_bfloat16_arithmetic() else torch.float32)


def has_bfloat16_arithmetic() -> bool:
    """Whether this processor has instructions that multiply bfloat16 numbers."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return has_avx512_bfloat16()


def has_avx512_bfloat16() -> bool:
    """Whether this is an x86 processor with bfloat16 instructions, and ATEN_CPU_CAPABILITY does not forbid AVX-512."""
    return torch.cpu._is_avx512_bf16_supported() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def available_memory() -> float:
    """Bytes of memory that this machine can still provide. Infinite where the system does not report it."""
    try:
        with open("/proc/meminfo") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
    return 1024 * int(line.split()[1])


# The operations that combine activations with parameters.
_OPERATIONS_WITH_PARAMETERS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose2d,
    F.layer_norm,
    F.group_norm,
    F.batch_norm,
    F.rms_norm,
    F.prelu,
    F.embedding_bag,
    F.scaled_dot_product_attention,
    torch.cat,
    torch.stack,
    torch.bmm,
    torch.einsum,
    *(getattr(torch, name) for name in ("add", "sub", "mul", "div", "matmul")),
    *(getattr(torch.Tensor, name) for name in ("add", "sub", "mul", "div", "matmul")),
    *(getattr(torch.Tensor, f"__{name}__") for name in ("add", "sub", "mul", "truediv", "matmul")),
    *(getattr(torch.Tensor, f"__r{name}__") for name in ("add", "sub", "mul", "truediv", "matmul")),
}


class ConvertedWeights(TorchFunctionMode):
    """
    Context that converts weights to the dtype of the arithmetic while an operation uses them.

    A converted weight is freed after its operation, so only the layers at work have a second copy.

    Args:
        storage: Dtype of the weights.
        arithmetic: Dtype of the arithmetic and of the activations.
    """

    def __init__(self, storage: torch.dtype, arithmetic: torch.dtype):
        super().__init__()
        self.storage = storage
        self.arithmetic = arithmetic

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function in _OPERATIONS_WITH_PARAMETERS:
            arguments = [self.convert(argument) for argument in arguments]
            options = {name: self.convert(argument) for name, argument in options.items()}
        return function(*arguments, **options)

    def convert(self, argument):
        if isinstance(argument, torch.Tensor) and argument.dtype == self.storage:
            return argument.to(self.arithmetic)
        if isinstance(argument, (list, tuple)):  # of torch.cat
            return type(argument)(map(self.convert, argument))
        return argument


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


# ------------------------------------------------------------------------------------------------------------------
# bfloat16: oneDNN's prepacked weights, and attention in small windows
# ------------------------------------------------------------------------------------------------------------------


def infers_in_bfloat16(tensor: torch.Tensor) -> bool:
    """Whether `tensor` may go to the bfloat16 operators of a CPU. They have no gradient and cannot be traced."""
    return (
        tensor.dtype == torch.bfloat16
        and tensor.device.type == "cpu"
        and has_avx512_bfloat16()
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def prepack_weight(
    weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    `F.linear` with this weight, to be called for tile after tile.

    oneDNN reorders a bfloat16 weight before each product, which takes up to a fifth of the product's time. This
    function reorders it once for all tiles. The products are the same to the bit.

    Args:
        weight: (out, C).
        bias: (out,).
        like: Tensor of the tiles' dtype. The weight is converted to it, once for all tiles.

    Returns:
        A function (..., C) → (..., out).
    """
    weight, bias = weight.to(like.dtype), None if bias is None else bias.to(like.dtype)
    if not (infers_in_bfloat16(weight) and torch.backends.mkldnn.is_available() and not is_replaced()):
        return lambda tile: F.linear(tile, weight, bias)
    prepacked = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return lambda tile: torch.ops.mkldnn._linear_pointwise(tile, prepacked, bias, "none", [], "")


def prepack_layer(layer: nn.Module, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """`prepack_weight` of a linear layer. Returns the layer itself if an adapter replaces it or a hook watches it."""
    is_plain = type(layer) is nn.Linear and "forward" not in vars(layer)
    is_watched = layer._forward_hooks or layer._forward_pre_hooks
    return prepack_weight(layer.weight, layer.bias, like) if is_plain and not is_watched else layer


def is_replaced() -> bool:
    """Whether a mode such as int8 replaces `F.linear` and `F.conv2d`."""
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, ConvertedWeights) for mode in modes)


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
# Convolutions that add and activate in the same pass
# ------------------------------------------------------------------------------------------------------------------


def fastest_layout(maps: torch.Tensor) -> torch.Tensor:
    """
    Maps (B, C, H, W) of few channels in the memory layout in which this device convolves them fastest.

    On a CPU this is channels-last. A convolution of an image to one channel takes a fifth of the time in it.
    """
    return maps.contiguous(memory_format=torch.channels_last) if maps.device.type == "cpu" else maps


def convolve_to_few_channels(
    maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: int
) -> torch.Tensor:
    """
    `F.conv2d` to few channels that keeps the size.

    On a CPU, a vector holds 16 output channels, and few channels leave most of it empty. So neighbouring columns
    become channels: the kernel is shifted by up to 15 columns, and one convolution with that stride computes all of
    them. In channels-last memory its result is the map itself. A 5×5 convolution of a photo to one channel takes a
    third of the time.

    Args:
        maps: (B, C, H, W).
        weight: (out, C, k, k) with k = 2·padding + 1.
        bias: (out,).
        padding: Zeros on each side.

    Returns:
        (B, out, H, W)
    """
    batch, _, height, width = maps.shape
    fitting = [n for n in range(2, CHANNELS_PER_VECTOR // len(weight) + 1) if width % n == 0]
    is_traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if maps.device.type != "cpu" or is_traced or is_replaced() or not fitting:
        return F.conv2d(maps, weight, bias, padding=padding)
    columns = max(fitting)
    kernels = torch.cat([F.pad(weight, (i, columns - 1 - i)) for i in range(columns)])
    output = F.conv2d(maps, kernels, bias.repeat(columns), (1, columns), padding)  # (B, columns·out, H, W / columns)
    return output.permute(0, 2, 3, 1).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


def composes_faster(maps: torch.Tensor, hidden: int, out_channels: int) -> bool:
    """
    Whether two 3×3 convolutions of `maps` in a row are faster as one 5×5 convolution: few output channels on a CPU.

    A vector holds 16 output channels, so fewer take as long as 16. Small networks alone compose: large ones have more
    channels, and composing the weights takes time.

    Args:
        maps: (B, C, H, W).
        hidden: Output channels of the first convolution.
        out_channels: Output channels of the second one.
    """
    if maps.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_grad_enabled() or is_replaced():
        return False
    channels, pixels = maps.shape[1], maps.shape[2] * maps.shape[3]
    computed = CHANNELS_PER_VECTOR * -(-out_channels // CHANNELS_PER_VECTOR)  # output channels with the empty places
    separate, composed = 9 * hidden * (channels + computed), 25 * channels * computed  # products at each pixel
    return separate > LEAST_SAVING * composed and channels < pixels


# oneDNN's names and arguments of the activations that it computes while it writes a convolution's output.
FUSED_ACTIVATIONS = {
    nn.Identity: ("none", []),
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}


def can_fuse(maps: torch.Tensor, activation: nn.Module) -> bool:
    """Whether oneDNN can compute a convolution of `maps` and this activation in one pass."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return (
        type(activation) in FUSED_ACTIVATIONS
        and maps.device.type == "cpu"
        and (maps.dtype == torch.float32 or infers_in_bfloat16(maps))
        and torch.backends.mkldnn.is_available()
        and not is_replaced()
    )


def convolve_and_activate(
    maps: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: nn.Module,
    addend: torch.Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> torch.Tensor:
    """
    `activation(F.conv2d(maps, ...) + addend)`, where possible in one pass over the output.

    In a small network, separate passes over the output take as long as the convolutions. The results differ by
    rounding at most.

    Args:
        maps: (B, C, H, W).
        weight: (out, C / groups, k, k).
        bias: (out,).
        activation: Pointwise module, such as `nn.ReLU()`.
        addend: (B, out, H', W'). The result replaces it.
        stride, padding, dilation, groups: As in `F.conv2d`.

    Returns:
        (B, out, H', W')
    """
    can_add = maps.dtype == torch.float32 and type(activation) in (nn.Identity, nn.ReLU)  # all that oneDNN offers
    if can_fuse(maps, activation) and (addend is None or can_add):
        name, scalars = FUSED_ACTIVATIONS[type(activation)]
        geometry = (padding, stride, dilation, groups)
        if addend is None:
            return torch.ops.mkldnn._convolution_pointwise(maps, weight, bias, *geometry, name, scalars, "")
        add_and_activate = ("add", 1.0, None if name == "none" else name, scalars, "")
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            addend, maps, weight, bias, *geometry, *add_and_activate
        )
    output = F.conv2d(maps, weight, bias, stride, padding, dilation, groups)
    return activation(output if addend is None else addend.add_(output))


def convolve_in_blocks(maps: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: int) -> torch.Tensor:
    """
    `F.conv2d` of maps with so many channels that the weight does not fit a CPU's cache.

    oneDNN reads the whole weight for each row of the map. Here it reads a block of `CHANNELS_PER_BLOCK` channels.

    Args:
        maps: (B, C, H, W).
        weight: (out, C, k, k).
        bias: (out,).
        padding: Zeros on each side.
    """
    if maps.shape[1] <= CHANNELS_PER_BLOCK or not can_fuse(maps, nn.Identity()):
        return F.conv2d(maps, weight, bias, padding=padding)
    weight, bias = weight.to(maps.dtype), bias.to(maps.dtype)
    blocks = zip(maps.split(CHANNELS_PER_BLOCK, dim=1), weight.split(CHANNELS_PER_BLOCK, dim=1), strict=True)
    output = None
    for block, kernel in blocks:
        output = convolve_and_activate(block, kernel, bias, nn.Identity(), addend=output, padding=(padding, padding))
        bias = None  # added once
    return output


# ------------------------------------------------------------------------------------------------------------------
# Recordings of small networks (see recording_birefnet.py)
# ------------------------------------------------------------------------------------------------------------------


def can_record(pixel_values: torch.Tensor) -> bool:
    """Whether a call with these images may be recorded: inference on a CPU that nothing watches or changes."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return False
    return (
        pixel_values.device.type == "cpu"
        and type(pixel_values) is torch.Tensor
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not is_replaced()
        and not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch.nn.modules.module._has_any_global_hook()
    )


def is_worth_recording(parameters: int) -> bool:
    """
    Whether calls of a network with this number of parameters and buffers are recorded.

    Large networks spend their time in arithmetic, and a second copy of their weights would take much memory.
    """
    return parameters <= RECORDED_PARAMETERS


def prepack_convolution(operation, arguments: Sequence, is_variable: Callable) -> tuple:
    """
    A convolution with its weight in the memory layout in which oneDNN uses it.

    Otherwise oneDNN copies the weight to this layout in every call.

    Args:
        operation: An operator of PyTorch.
        arguments: Its arguments.
        is_variable: Function that tells whether a tensor changes from call to call.

    Returns:
        Operator and arguments that compute the same. Other operators and other convolutions are returned as they are.
    """
    onednn = torch.ops.mkldnn
    operation, arguments = as_onednn_convolution(operation, list(arguments))
    if operation not in (onednn._convolution_pointwise.default, onednn._convolution_pointwise_.binary):
        return operation, arguments
    place = 1 if operation is onednn._convolution_pointwise.default else 2  # maps, weight or addend, maps, weight
    maps, weight, _, *geometry = arguments[place - 1 : place + 6]  # padding, stride, dilation, groups
    if not is_variable(weight):
        arguments[place] = onednn._reorder_convolution_weight(weight, *geometry, maps.shape)
    return operation, arguments


def as_onednn_convolution(operation, arguments: list) -> tuple:
    """PyTorch's operator for 2D convolutions of channels-last maps in float32 as oneDNN's operator."""
    aten = torch.ops.aten
    if operation is aten.conv2d.default:
        maps, weight, bias, stride, padding, dilation, groups = (
            arguments + [None, [1, 1], [0, 0], [1, 1], 1][len(arguments) - 2 :]
        )
    elif operation is aten.convolution.default and not arguments[6]:  # not transposed
        maps, weight, bias, stride, padding, dilation, _, _, groups = arguments
    else:
        return operation, arguments
    if maps.dtype != torch.float32 or not maps.is_contiguous(memory_format=torch.channels_last):
        return operation, arguments
    geometry = (padding, stride, dilation, groups)
    return torch.ops.mkldnn._convolution_pointwise.default, [maps, weight, bias, *geometry, "none", [], ""]


# ------------------------------------------------------------------------------------------------------------------
# float32: sums of few channels
# ------------------------------------------------------------------------------------------------------------------


def loses_digits_in_long_sums(maps: torch.Tensor) -> bool:
    """Whether a convolution of `maps` is more exact as a sum of convolutions of fewer channels: float32 on a CPU."""
    return maps.dtype == torch.float32 and maps.device.type == "cpu" and not torch.compiler.is_compiling()


def split_channels(maps: torch.Tensor) -> Sequence[torch.Tensor]:
    """Cut (B, C, H, W) into maps of `CHANNELS_PER_SUM` channels if it has at least twice as many."""
    return maps.split(CHANNELS_PER_SUM, dim=1) if maps.shape[1] >= 2 * CHANNELS_PER_SUM else [maps]


# ------------------------------------------------------------------------------------------------------------------
# GPUs: deformable convolution as one Triton kernel
# ------------------------------------------------------------------------------------------------------------------

# Types of devices whose deformable convolutions run as one Triton kernel, such as `("cuda",)`. There is none, because
# the kernel has not been measured on a GPU yet. `benchmarks/gpu/measure.sh` measures with and without it.
TRITON_DEVICES: tuple[str, ...] = ()


def runs_triton(maps: torch.Tensor) -> bool:
    """Whether a deformable convolution of `maps` runs as a Triton kernel, which has no gradient."""
    return (
        maps.device.type in TRITON_DEVICES
        and maps.dtype in (torch.float16, torch.bfloat16)
        and not torch.is_grad_enabled()
    )
