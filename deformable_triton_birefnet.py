"""
Modulated deformable convolution as one Triton kernel for GPUs.

It is used on the devices that `TRITON_DEVICES` in `hardware_birefnet.py` names. This file is imported only then,
because Triton is not available on every system.
"""

from typing import NamedTuple

import torch


try:  # outside a `try`, transformers would require triton of every user
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The kernel for GPUs needs triton: `pip install triton`.") from error


class Tiling(NamedTuple):
    """How much of the output one program of the kernel computes, and with how many threads."""

    pixels: int
    out_channels: int
    warps: int
    stages: int  # depth of the software pipeline


# All 256 output channels of a pyramid's branch at once, so that each sample is computed only once.
TILING = Tiling(pixels=64, out_channels=256, warps=8, stages=2)


@triton.jit
def _deformable_convolution_kernel(
    maps,  # (B, H, W, C), contiguous
    offsets,  # (B, 2k², H, W)
    modulator,  # (B, k², H, W)
    weight,  # (k², C, out channels), contiguous
    bias,  # (out channels,)
    output,  # (B, H, W, out channels), contiguous
    number,  # of pixels, B·H·W
    height,
    width,
    offsets_batch,  # strides
    offsets_channel,
    offsets_row,
    offsets_column,
    modulator_batch,
    modulator_channel,
    modulator_row,
    modulator_column,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FACTORS: tl.constexpr,  # dtype of the matrix product's factors
    PIXELS_PER_TILE: tl.constexpr,
    CHANNELS_PER_TILE: tl.constexpr,
    OUT_CHANNELS_PER_TILE: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS_PER_TILE + tl.arange(0, PIXELS_PER_TILE)
    is_pixel = pixel < number
    image = pixel // (height * width)
    row = pixel // width % height
    column = pixel % width
    offset = image * offsets_batch + row * offsets_row + column * offsets_column
    modulation = image * modulator_batch + row * modulator_row + column * modulator_column
    out_channel = tl.program_id(1) * OUT_CHANNELS_PER_TILE + tl.arange(0, OUT_CHANNELS_PER_TILE)
    is_out_channel = out_channel < OUT_CHANNELS
    total = tl.zeros((PIXELS_PER_TILE, OUT_CHANNELS_PER_TILE), dtype=tl.float32)

    for tap in range(KERNEL_SIZE * KERNEL_SIZE):
        # Sampling locations in float32: bfloat16 cannot tell pixel 256 from pixel 257.
        row_offset = tl.load(offsets + offset + 2 * tap * offsets_channel, mask=is_pixel, other=0.0)
        column_offset = tl.load(offsets + offset + (2 * tap + 1) * offsets_channel, mask=is_pixel, other=0.0)
        scale = tl.load(modulator + modulation + tap * modulator_channel, mask=is_pixel, other=0.0)
        scale = 2.0 / (1.0 + tl.exp(-scale.to(tl.float32)))
        y = (row + tap // KERNEL_SIZE - KERNEL_SIZE // 2).to(tl.float32) + row_offset.to(tl.float32)
        x = (column + tap % KERNEL_SIZE - KERNEL_SIZE // 2).to(tl.float32) + column_offset.to(tl.float32)
        # Locations far outside stay outside after the clamping, so that they fit an integer. A NaN location becomes
        # an integer too, and its weights stay NaN.
        top = tl.minimum(tl.maximum(tl.floor(y), -2.0), height + 1.0).to(tl.int64)
        left = tl.minimum(tl.maximum(tl.floor(x), -2.0), width + 1.0).to(tl.int64)
        lower, right = y - tl.floor(y), x - tl.floor(x)
        bottom_weight = lower * scale
        top_weight = scale - bottom_weight
        top_right, bottom_right = top_weight * right, bottom_weight * right
        top_left, bottom_left = top_weight - top_right, bottom_weight - bottom_right
        has_top, has_bottom = (top >= 0) & (top < height) & is_pixel, (top >= -1) & (top < height - 1) & is_pixel
        has_left, has_right = (left >= 0) & (left < width), (left >= -1) & (left < width - 1)
        corner = ((image * height + top) * width + left) * CHANNELS

        for first in range(0, CHANNELS, CHANNELS_PER_TILE):
            channel = first + tl.arange(0, CHANNELS_PER_TILE)
            is_channel = channel < CHANNELS
            pointer = maps + corner[:, None] + channel[None, :]
            mask = (has_top & has_left)[:, None] & is_channel[None, :]
            sample = top_left[:, None] * tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
            mask = (has_top & has_right)[:, None] & is_channel[None, :]
            sample += top_right[:, None] * tl.load(pointer + CHANNELS, mask=mask, other=0.0).to(tl.float32)
            pointer += width * CHANNELS
            mask = (has_bottom & has_left)[:, None] & is_channel[None, :]
            sample += bottom_left[:, None] * tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
            mask = (has_bottom & has_right)[:, None] & is_channel[None, :]
            sample += bottom_right[:, None] * tl.load(pointer + CHANNELS, mask=mask, other=0.0).to(tl.float32)
            kernel = tl.load(
                weight + (tap * CHANNELS + channel[:, None]) * OUT_CHANNELS + out_channel[None, :],
                mask=is_channel[:, None] & is_out_channel[None, :],
                other=0.0,
            )
            sample = sample.to(kernel.dtype).to(FACTORS)
            total = tl.dot(sample, kernel.to(FACTORS), total, input_precision="ieee")

    if HAS_BIAS:
        total += tl.load(bias + out_channel, mask=is_out_channel, other=0.0).to(tl.float32)[None, :]
    pointer = output + pixel[:, None] * OUT_CHANNELS + out_channel[None, :]
    tl.store(pointer, total.to(output.dtype.element_ty), mask=is_pixel[:, None] & is_out_channel[None, :])


def convolve_in_triton(
    hidden_states: torch.Tensor,
    offsets: torch.Tensor,
    modulator: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    tiling: Tiling = TILING,
) -> torch.Tensor:
    """
    [`~deformable_birefnet.deformable_convolution`] as one kernel, without gradients.

    Samples go from the map through the registers into the matrix product. The 49 samples of each pixel of the largest
    kernel never exist in memory. Products and sums of half-precision samples are float32.

    Args:
        hidden_states: (B, C, H, W); fastest in channels-last memory.
        offsets: (B, 2k², H, W) in pixels.
        modulator: (B, k², H, W).
        weight: (out channels, C, k, k), k odd.
        bias: (out channels,).
        tiling: Size of one program's part of the output.

    Returns:
        (B, out channels, H, W) in channels-last memory.
    """
    batch, channels, height, width = hidden_states.shape
    out_channels, kernel_size = weight.shape[0], weight.shape[-1]
    maps = hidden_states.permute(0, 2, 3, 1).contiguous()
    weight = weight.to(maps.dtype).permute(2, 3, 1, 0).reshape(kernel_size**2, channels, out_channels).contiguous()
    output = maps.new_empty(batch, height, width, out_channels)
    number = batch * height * width
    # Triton's interpreter, which tests use, cannot multiply bfloat16. The products of float32 copies are the same.
    factors = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(maps.dtype, tl.float32)
    factors = tl.float32 if maps.device.type == "cpu" else factors
    out_channels_per_tile = min(tiling.out_channels, max(16, triton.next_power_of_2(out_channels)))
    grid = (triton.cdiv(number, tiling.pixels), triton.cdiv(out_channels, out_channels_per_tile))
    _deformable_convolution_kernel[grid](
        maps,
        offsets,
        modulator,
        weight,
        weight if bias is None else bias,
        output,
        number,
        height,
        width,
        *offsets.stride(),
        *modulator.stride(),
        CHANNELS=channels,
        OUT_CHANNELS=out_channels,
        KERNEL_SIZE=kernel_size,
        HAS_BIAS=bias is not None,
        FACTORS=factors,
        PIXELS_PER_TILE=tiling.pixels,
        CHANNELS_PER_TILE=min(64, max(16, triton.next_power_of_2(channels))),
        OUT_CHANNELS_PER_TILE=out_channels_per_tile,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return output.permute(0, 3, 1, 2)
