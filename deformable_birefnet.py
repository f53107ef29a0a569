"""Modulated deformable convolution in plain PyTorch, and atrous spatial pyramid pooling (ASPP) built from it."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .hardware_birefnet import concatenate_tiles, prepack_weight, row_tiles, runs_triton
from .layers_birefnet import RELU, convolve_and_normalize, fold_batch_norm


# Size of the samples of one tile of rows on devices other than a CPU. It bounds the memory.
TILE_BYTES = 512 * 2**20


def deformable_convolution(
    hidden_states: torch.Tensor,
    offsets: torch.Tensor,
    modulator: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    epilogue: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """
    Modulated deformable convolution (Zhu et al., https://arxiv.org/abs/1811.11168) of stride 1 that keeps the size.

    A sample is the bilinear interpolation of the four pixels around its sampling location; pixels outside the map are
    zero. So a sample is a weighted sum of four rows of the map in channels-last memory. `embedding_bag` computes such
    sums without storing the rows, and one matrix product then applies the kernel. Both run on tiles of output rows,
    which bounds the memory.

    Args:
        hidden_states: (B, C, H, W).
        offsets: (B, 2k², H, W) in pixels. Δrow and Δcolumn alternate; kernel taps are row-major.
        modulator: (B, k², H, W). The weight of each sample is twice its sigmoid, in [0, 2].
        weight: (out channels, C, k, k), k odd.
        bias: (out channels,).
        epilogue: Pointwise function of a tile (B, rows, W, out channels), applied while the tile is in the cache.

    Returns:
        (B, out channels, H, W), or as many channels as `epilogue` returns, in channels-last memory.

    Raises:
        ValueError: A shape does not fit the others.
    """
    batch, channels, height, width = hidden_states.shape
    _check_shapes(hidden_states, offsets, modulator, weight)
    if torch.compiler.is_exporting() and epilogue is None:
        return convolve_sampled_grid(hidden_states, offsets, modulator, weight, bias)
    if runs_triton(hidden_states):
        from .deformable_triton_birefnet import convolve_in_triton

        whole = convolve_in_triton(hidden_states, offsets, modulator, weight, bias)
        return whole if epilogue is None else epilogue(whole.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    out_channels, kernel_size = weight.shape[0], weight.shape[-1]
    taps = kernel_size**2
    pixels = F.pad(hidden_states.permute(0, 2, 3, 1), (0, 0, 2, 2, 2, 2)).view(-1, channels)  # two zeros on each side
    apply_kernel = prepack_weight(weight.permute(0, 2, 3, 1).reshape(out_channels, -1), bias, like=hidden_states)

    def tile_by_tile() -> Iterator[torch.Tensor]:  # each (B, rows, W, out channels)
        images = 1 if torch.compiler.is_compiling() else batch  # a traced batch may be symbolic, a tile's size may not
        row_size = images * width * max(taps * channels, out_channels)
        # A sample has four indices and four weights of four bytes each, which is less than its channels. The cache
        # holds them for several tiles.
        sample_size = 4 * (4 + 4) // modulator.element_size()
        for band in row_tiles(height, images * width * taps * sample_size, modulator, TILE_BYTES // 8):
            samples = bilinear_samples(offsets[:, :, band], modulator[:, :, band], kernel_size, band.start, height)
            for rows in row_tiles(samples[0].shape[1], row_size, hidden_states, TILE_BYTES):
                indices, weights = (values[:, rows].reshape(-1, 4) for values in samples)
                columns = F.embedding_bag(indices, pixels, per_sample_weights=weights.to(pixels.dtype), mode="sum")
                tile = apply_kernel(columns.view(-1, taps * channels)).view(batch, -1, width, out_channels)
                yield tile if epilogue is None else epilogue(tile)

    return concatenate_tiles(tile_by_tile(), height, dim=1).permute(0, 3, 1, 2)


def convolve_sampled_grid(
    hidden_states: torch.Tensor,
    offsets: torch.Tensor,
    modulator: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    [`deformable_convolution`] by `F.grid_sample`, for exported programs.

    Every runtime has an operator for `grid_sample`, and few have one for `embedding_bag`. The kernel is applied row by
    row, which bounds the memory.
    """
    height, width = hidden_states.shape[-2:]
    kernel_size = weight.shape[-1]
    dtype, device = hidden_states.dtype, hidden_states.device
    tap = torch.arange(kernel_size, dtype=dtype, device=device) - kernel_size // 2
    offsets = offsets.unflatten(1, (kernel_size, kernel_size, 2))  # (B, k, k, 2, H, W)
    modulation = 2 * torch.sigmoid(modulator).unflatten(1, (kernel_size, kernel_size))  # (B, k, k, H, W)
    row_of_pixel = torch.arange(height, dtype=dtype, device=device).view(height, 1)
    column_of_pixel = torch.arange(width, dtype=dtype, device=device) + tap.view(kernel_size, 1, 1)  # (k, 1, W)
    output = None
    for index in range(kernel_size):
        rows = offsets[:, index, :, 0] + (row_of_pixel + tap[index])  # (B, k, H, W)
        columns = offsets[:, index, :, 1] + column_of_pixel
        # The operator's coordinates are -1 and 1 at the outer edges of the outermost pixels.
        grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
        grid = grid.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, H, W·k, 2)
        samples = F.grid_sample(hidden_states, grid, align_corners=False)  # (B, C, H, W·k)
        samples = samples * modulation[:, index].permute(0, 2, 3, 1).flatten(2).unsqueeze(1)
        row_bias = bias if index == 0 else None
        part = F.conv2d(samples, weight[:, :, index : index + 1], row_bias, stride=(1, kernel_size))
        output = part if output is None else output + part
    return output


def _check_shapes(hidden_states, offsets, modulator, weight):
    batch, channels, height, width = hidden_states.shape
    kernel_size = weight.shape[-1]
    if weight.shape[1:] != (channels, kernel_size, kernel_size) or kernel_size % 2 == 0:
        raise ValueError(f"weight of shape {tuple(weight.shape)} is not (out, {channels}, k, k) with an odd k.")
    for name, tensor, number in (("offsets", offsets, 2 * kernel_size**2), ("modulator", modulator, kernel_size**2)):
        if tensor.shape != (batch, number, height, width):
            raise ValueError(f"{name} have shape {tuple(tensor.shape)}, not {(batch, number, height, width)}.")


def bilinear_samples(
    offsets: torch.Tensor, modulator: torch.Tensor, kernel_size: int, first_row: int, height: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The four pixels around each sampling location, and their weights: bilinear weight × 2·sigmoid(modulator).

    Args:
        offsets: (B, 2k², rows, W) in pixels, of consecutive rows of the map.
        modulator: (B, k², rows, W).
        kernel_size: k.
        first_row: First of these rows.
        height: Height of the whole map, H.

    Returns:
        Indices (int32) of the pixels among the B·(H+4)·(W+4) pixels of the padded batch, and weights in float32 or
        wider: (B, rows, W, k², 4) both.
    """
    batch, _, rows, width = offsets.shape
    device, padding = offsets.device, kernel_size // 2
    # Sampling locations need float32 or wider: bfloat16 cannot tell pixel 256 from pixel 257.
    dtype = torch.promote_types(offsets.dtype, torch.float32)
    offsets = offsets.to(dtype).permute(0, 2, 3, 1).unflatten(-1, (kernel_size**2, 2))  # (B, rows, W, k², 2)
    modulation = 2 * torch.sigmoid(modulator.to(dtype).permute(0, 2, 3, 1))  # (B, rows, W, k²)
    tap = torch.arange(kernel_size, dtype=dtype, device=device) - padding
    row_of_pixel = torch.arange(first_row, first_row + rows, dtype=dtype, device=device)
    column_of_pixel = torch.arange(width, dtype=dtype, device=device)
    row = offsets[..., 0] + (row_of_pixel[:, None, None] + tap.repeat_interleave(kernel_size))
    column = offsets[..., 1] + (column_of_pixel[:, None] + tap.repeat(kernel_size))

    top, bottom_weight = interpolate_along_axis(row, height)
    left, right_weight = interpolate_along_axis(column, width)
    image = torch.arange(batch, dtype=torch.int32, device=device).view(-1, 1, 1, 1) * ((height + 4) * (width + 4))
    corner = image + top * (width + 4) + left
    indices = torch.stack([corner, corner + 1, corner + width + 4, corner + width + 5], dim=-1)
    bottom_weight = bottom_weight * modulation
    top_weight = modulation - bottom_weight
    top_right, bottom_right = top_weight * right_weight, bottom_weight * right_weight
    weights = [top_weight - top_right, top_right, bottom_weight - bottom_right, bottom_right]
    return indices, torch.stack(weights, dim=-1)


def interpolate_along_axis(location: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pixel at or before each sampling location on an axis of `size` pixels, and the weight of the pixel after it.

    The axis is padded with two zeros on each side, and the index counts from the first zero. Locations further outside
    move onto the zeros. So do NaN locations, whose weight stays NaN.
    """
    lower = location.floor()
    return lower.int().clamp(-2, size) + 2, location - lower


class ZeroInitializedConvolution(nn.Conv2d):
    """A convolution whose weight and bias start at zero."""


class DeformableConvolution(GradientCheckpointingLayer):
    """
    Deformable convolution that predicts its offsets and modulation by convolutions, which start at zero.

    `operator` computes it: [`deformable_convolution`], or the operator of another runtime during an export.
    """

    operator = staticmethod(deformable_convolution)

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size
        padding = kernel_size // 2
        self.offset_conv = ZeroInitializedConvolution(in_channels, 2 * kernel_size**2, kernel_size, padding=padding)
        self.modulator_conv = ZeroInitializedConvolution(in_channels, kernel_size**2, kernel_size, padding=padding)
        self.regular_conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)

    def offsets_and_modulator(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Offsets (B, 2k², H, W) in pixels and modulator (B, k², H, W), computed by one convolution."""
        weight = torch.cat([self.offset_conv.weight, self.modulator_conv.weight])
        bias = torch.cat([self.offset_conv.bias, self.modulator_conv.bias])
        both = F.conv2d(hidden_states, weight, bias, padding=self.kernel_size // 2)
        return both.split([2 * self.kernel_size**2, self.kernel_size**2], dim=1)

    def forward(self, hidden_states: torch.Tensor, weight: torch.Tensor | None = None, **options) -> torch.Tensor:
        """
        (B, C, H, W) → (B, out channels, H, W).

        Args:
            weight: (out channels, C, k, k), used in place of the module's own weight.
            options: `bias` and `epilogue` of [`deformable_convolution`].
        """
        offsets, modulator = self.offsets_and_modulator(hidden_states)
        weight = self.regular_conv.weight if weight is None else weight
        return self.operator(hidden_states, offsets, modulator, weight, **options)


class DeformableBranch(nn.Module):
    """Deformable convolution, norm, ReLU, and this branch's slice of the 1×1 convolution that fuses the branches."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.atrous_conv = DeformableConvolution(in_channels, out_channels, kernel_size)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor, fusion: torch.Tensor) -> torch.Tensor:
        if self.bn.training:  # batch statistics need the whole map
            return F.conv2d(F.relu(self.bn(self.atrous_conv(hidden_states))), fusion)
        weight, bias = fold_batch_norm(self.atrous_conv.regular_conv.weight, None, self.bn, like=hidden_states)
        if torch.compiler.is_exporting():  # other runtimes keep maps channels-first
            return F.conv2d(F.relu(self.atrous_conv(hidden_states, weight, bias=bias)), fusion)
        fuse = prepack_weight(fusion.flatten(1), None, like=hidden_states)
        return self.atrous_conv(hidden_states, weight, bias=bias, epilogue=lambda tile: fuse(F.relu_(tile)))


class AtrousBranch(nn.Module):
    """As `DeformableBranch`, with an ordinary dilated convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.atrous_conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor, fusion: torch.Tensor) -> torch.Tensor:
        return F.conv2d(convolve_and_normalize([hidden_states], self.atrous_conv, self.bn, RELU), fusion)


class AtrousSpatialPyramidPooling(nn.Module):
    """
    Branches of growing receptive field and a globally pooled branch, fused by a 1×1 convolution.

    Each branch is convolved with its slice of the fusing weight, and the results are added. So the concatenation of
    the branches (1280 channels) never exists.
    """

    branch_channels = 256

    def __init__(self, in_channels: int, out_channels: int | None = None):
        super().__init__()
        out_channels = out_channels or in_channels
        self.global_avg_pool = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(in_channels, self.branch_channels, 1, bias=False),
            nn.BatchNorm2d(self.branch_channels),
            nn.ReLU(),
        )
        self.conv1 = nn.Conv2d(5 * self.branch_channels, out_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(0.5)

    def branches(self) -> list[nn.Module]:
        raise NotImplementedError

    def pool(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) → (B, 256, 1, 1)
        average, convolution, norm, activation = self.global_avg_pool
        pooled = convolution(average(hidden_states))
        if norm.training and len(pooled) > 1:
            return activation(norm(pooled))
        # A single image has one value per channel and so no batch statistics. It uses the running statistics.
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return activation(F.batch_norm(pooled, *statistics, training=False, eps=norm.eps))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) → (B, out channels, H, W)
        *fusions, pooled_fusion = self.conv1.weight.split(self.branch_channels, dim=1)
        # The pooled branch is constant over the map, and so is its term of the sum.
        fused = F.conv2d(self.pool(hidden_states), pooled_fusion)
        for branch, fusion in zip(self.branches(), fusions, strict=True):
            fused = fused + branch(hidden_states, fusion)
        return self.dropout(F.relu(self.bn1(fused)))


class ASPPDeformable(AtrousSpatialPyramidPooling):
    """Pyramid pooling with deformable convolutions of kernel sizes 1, 1, 3 and 7."""

    def __init__(self, in_channels: int, out_channels: int | None = None):
        super().__init__(in_channels, out_channels)
        self.aspp1 = DeformableBranch(in_channels, self.branch_channels, 1)
        self.aspp_deforms = nn.ModuleList(DeformableBranch(in_channels, self.branch_channels, k) for k in (1, 3, 7))

    def branches(self) -> list[nn.Module]:
        return [self.aspp1, *self.aspp_deforms]


class ASPP(AtrousSpatialPyramidPooling):
    """Pyramid pooling with one 1×1 convolution and three 3×3 convolutions of dilations 6, 12 and 18."""

    def __init__(self, in_channels: int, out_channels: int | None = None):
        super().__init__(in_channels, out_channels)
        self.aspp1 = AtrousBranch(in_channels, self.branch_channels, 1, dilation=1)
        self.aspp2 = AtrousBranch(in_channels, self.branch_channels, 3, dilation=6)
        self.aspp3 = AtrousBranch(in_channels, self.branch_channels, 3, dilation=12)
        self.aspp4 = AtrousBranch(in_channels, self.branch_channels, 3, dilation=18)

    def branches(self) -> list[nn.Module]:
        return [self.aspp1, self.aspp2, self.aspp3, self.aspp4]


ATTENTION_BLOCKS = {"aspp_deformable": ASPPDeformable, "aspp": ASPP}
