"""Backbones of BiRefNet: Swin Transformer v1 in the layout of the official checkpoints, and any timm model."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_birefnet import DINO_V3_BACKBONES, SWIN_BACKBONES
from .hardware_birefnet import (
    attend_with_batched_products,
    can_fuse,
    concatenate_tiles,
    convolve_and_activate,
    fastest_layout,
    infers_in_bfloat16,
    prepack_layer,
    row_tiles,
)
from .layers_birefnet import IDENTITY, fold_batch_norm, is_plain


def create_backbone(config):
    """
    Build the encoder that `config.backbone` names.

    Returns:
        (`nn.Module`, `tuple[int]`, `bool`): The module, which maps (B, 3, H, W) to four feature maps, shallowest
        first. The channels of these maps, in the same order. Whether all four maps have the same stride, so that the
        decoder needs a pyramid neck.

    Raises:
        ValueError: timm has no such model, the model has no `features_only`, or the decoder cannot use its strides.
        ImportError: The backbone needs timm and timm is not installed.
    """
    if config.backbone in SWIN_BACKBONES:
        backbone = SwinTransformer(config)
        return backbone, backbone.channels, False
    return _create_timm_backbone(config)


def _create_timm_backbone(config):
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"backbone={config.backbone!r} needs timm: `pip install timm`.") from error

    name, indices = DINO_V3_BACKBONES.get(config.backbone, (config.backbone, (-4, -3, -2, -1)))
    options = {"dynamic_img_size": True} if config.backbone in DINO_V3_BACKBONES else {}
    if name.split(".")[0] not in timm.list_models():
        known = ", ".join([*SWIN_BACKBONES, *DINO_V3_BACKBONES])
        raise ValueError(
            f"backbone={config.backbone!r} is not one of {known}, nor a model of timm {timm.__version__}."
        )
    try:
        backbone = timm.create_model(name, features_only=True, out_indices=indices, **options)
    except (RuntimeError, AssertionError, AttributeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"backbone={config.backbone!r}: timm cannot build it with four feature maps: {error}"
        ) from error

    strides = tuple(backbone.feature_info.reduction())
    if strides != (4, 8, 16, 32) and len(set(strides)) != 1:
        raise ValueError(
            f"backbone={config.backbone!r} has feature maps at strides {strides}; BiRefNet needs 4, 8, 16, 32, or "
            "the same stride for all four."
        )
    for tensor in [*backbone.parameters(), *backbone.buffers()]:
        if not tensor.is_meta:  # timm has already initialised it as the backbone's authors do
            tensor._is_hf_initialized = True
    # Some timm networks (Swin, hybrids) return (B, H, W, C) and declare it; the decoder takes (B, C, H, W).
    if getattr(backbone, "output_fmt", None) is not None and "NHWC" in str(backbone.output_fmt):
        backbone.register_forward_hook(_channels_first)
    for module in backbone.modules():
        if type(module).__name__ in FOLDED_FORWARDS:
            module.forward = partial(FOLDED_FORWARDS[type(module).__name__], module)
    return backbone, tuple(backbone.feature_info.channels()), len(set(strides)) == 1


def _channels_first(module, inputs, features):
    return [feature.permute(0, 3, 1, 2) for feature in features]


# The forward passes of timm's EfficientNet, MobileNet and MnasNet blocks, with each norm folded into its convolution.
# They have no parameters of their own, and leave training, tracing and unknown layers to timm.


def efficientnet_features(network: nn.Module, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    if network.feature_hooks is not None or not can_fuse(pixel_values, IDENTITY):
        return type(network).forward(network, pixel_values)
    hidden_states = convolve_normalize_activate(fastest_layout(pixel_values), network.conv_stem, network.bn1)
    features = [hidden_states] if 0 in network._stage_out_idx else []
    for number, block in enumerate(network.blocks, start=1):
        hidden_states = block(hidden_states)
        if number in network._stage_out_idx:
            features.append(hidden_states)
    return features


def inverted_residual(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if getattr(block, "conv_s2d", None) is not None:
        return type(block).forward(block, hidden_states)
    shortcut = hidden_states
    hidden_states = convolve_normalize_activate(hidden_states, block.conv_pw, block.bn1)
    hidden_states = convolve_normalize_activate(hidden_states, block.conv_dw, block.bn2)
    hidden_states = block.se(block.aa(hidden_states))
    hidden_states = convolve_normalize_activate(hidden_states, block.conv_pwl, block.bn3)
    return block.drop_path(hidden_states) + shortcut if block.has_skip else hidden_states


def depthwise_separable(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    if getattr(block, "conv_s2d", None) is not None:
        return type(block).forward(block, hidden_states)
    shortcut = hidden_states
    hidden_states = convolve_normalize_activate(hidden_states, block.conv_dw, block.bn1)
    hidden_states = block.se(block.aa(hidden_states))
    hidden_states = convolve_normalize_activate(hidden_states, block.conv_pw, block.bn2)
    return block.drop_path(hidden_states) + shortcut if block.has_skip else hidden_states


FOLDED_FORWARDS = {
    "EfficientNetFeatures": efficientnet_features,
    "InvertedResidual": inverted_residual,
    "DepthwiseSeparableConv": depthwise_separable,
}


def convolve_normalize_activate(hidden_states: torch.Tensor, convolution: nn.Module, norm: nn.Module) -> torch.Tensor:
    """
    `norm(convolution(hidden_states))` of timm, where the norm includes the activation.

    Folds the norm into the convolution in inference, if both are plain modules (no adapter, no hook).
    """
    activation = getattr(norm, "act", None)
    if not (is_plain(convolution, "Conv2d", "Conv2dSame") and is_plain(norm, "BatchNormAct2d")):
        return norm(convolution(hidden_states))
    if norm.training or isinstance(convolution.padding, str) or not can_fuse(hidden_states, activation):
        return norm(convolution(hidden_states))
    weight, bias = fold_batch_norm(convolution.weight, convolution.bias, norm, like=hidden_states)
    options = {name: getattr(convolution, name) for name in ("stride", "padding", "dilation", "groups")}
    if type(convolution).__name__ == "Conv2dSame":
        hidden_states, weight, options["padding"] = pad_to_same_size(hidden_states, weight, convolution)
    return convolve_and_activate(hidden_states, weight, bias, activation, **options)


def pad_to_same_size(
    maps: torch.Tensor, weight: torch.Tensor, convolution: nn.Conv2d
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
    """
    TensorFlow's padding "same": output of size ⌈input / stride⌉, with an odd pixel of padding at the right and bottom.

    `F.conv2d` pads both sides alike. An odd pixel goes to the kernel, as a zero row at its top or a zero column at its
    left. Then both sides of the map have the same padding, and padding a map takes longer than convolving it.

    Returns:
        Maps, weight and padding for `F.conv2d`.
    """
    (top, bottom), (left, right) = (same_padding(maps.shape[2 + axis], convolution, axis) for axis in (0, 1))
    if max(convolution.dilation) > 1:
        return F.pad(maps, (left, right, top, bottom)), weight, (0, 0)
    return maps, F.pad(weight, (right - left, 0, bottom - top, 0)), (bottom, right)


def same_padding(size: int, convolution: nn.Conv2d, axis: int) -> tuple[int, int]:
    """Padding before and after an axis of `size` pixels for TensorFlow's padding "same"."""
    stride, dilation, kernel_size = (
        getattr(convolution, name)[axis] for name in ("stride", "dilation", "kernel_size")
    )
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel_size - 1) + 1 - size, 0)
    return total // 2, total - total // 2


class DropPath(nn.Module):
    """Stochastic depth. In training, drops the residual branch of a sample with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor, batch: int) -> torch.Tensor:
        """
        Args:
            branch: (B·n, C), sample after sample.
            batch: B.
        """
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        kept = branch.new_empty(batch, 1, 1).bernoulli_(keep).div_(keep)
        return (branch.view(batch, -1, branch.shape[-1]) * kept).flatten(0, 1)


def relative_position_index(window_size: int) -> torch.Tensor:
    """Row of the relative position bias table for each (query, key) pair of a w×w window: (w², w²) int64."""
    positions = torch.arange(window_size)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_distance = rows[:, None] - rows[None, :] + window_size - 1
    column_distance = columns[:, None] - columns[None, :] + window_size - 1
    return row_distance * (2 * window_size - 1) + column_distance


class WindowPartition(NamedTuple):
    """
    Partition of B maps of H×W tokens into windows of w² tokens, as indices of tokens.

    The indices include the shift and the padding of the maps. So each token is copied once into its window and once
    back, instead of once for each of padding, rolling and partitioning.
    """

    batch: int
    to_windows: torch.Tensor  # (B·windows·w²,) index of the token at each window position; padding holds any token
    is_token: torch.Tensor | None  # (B·windows·w², 1) 1 for a token, 0 for padding; `None` without padding
    from_windows: torch.Tensor  # (B·H·W,) index of the window position of each token
    groups: list[tuple[int, torch.Tensor | None]]  # consecutive windows: their number, and their (w², w²) mask


def partition_windows(shape: tuple[int, int, int], size: int, shift: int, like: torch.Tensor) -> WindowPartition:
    """
    Partition maps into windows as Swin does: pad at the right and bottom to a multiple of `size`, roll by −`shift`.

    After rolling, only the windows of the last column, of the last row and of the corner hold tokens from opposite
    sides of the map. So three masks serve any number of windows.

    Args:
        shape: (B, H, W) of the maps.
        size: Side of a window, w.
        shift: Number of tokens to roll by, along both axes.
        like: Tensor of the tokens' device and dtype.
    """
    batch, height, width = shape
    padded_height, padded_width = height + -height % size, width + -width % size
    rows, columns = padded_height // size, padded_width // size
    # Indices of the padded maps' tokens, first in the order of the maps, then in the order of the windows.
    padded = torch.arange(batch * padded_height * padded_width, device=like.device)
    rolled = padded.view(batch, padded_height, padded_width).roll((-shift, -shift), dims=(1, 2))
    windows = rolled.view(batch, rows, size, columns, size).transpose(2, 3)  # (B, rows, columns, w, w)
    regions = [(slice(None), slice(None))]
    if shift:  # inside, last column, last row, corner
        inside_and_last = (slice(-1), slice(-1, None))
        regions = [(vertical, horizontal) for vertical in inside_and_last for horizontal in inside_and_last]
    groups = [windows[:, vertical, horizontal].reshape(-1, size * size) for vertical, horizontal in regions]
    order = torch.cat(groups).flatten()
    # A copy as the target, since OpenVINO takes new tensors for float32, which cannot be indices.
    from_windows = order.clone().scatter_(0, order, padded).view(batch, padded_height, padded_width)

    image, row, column = (
        order // (padded_height * padded_width),
        order // padded_width % padded_height,
        order % padded_width,
    )
    to_windows = (image * height + row.clamp(max=height - 1)) * width + column.clamp(max=width - 1)
    is_token = None
    if (padded_height, padded_width) != (height, width):
        is_token = ((row < height) & (column < width)).to(like.dtype).unsqueeze(-1)
    masks = shifted_window_masks(size, shift, like)
    groups = [(group.shape[0], mask) for group, mask in zip(groups, masks, strict=True)]
    return WindowPartition(batch, to_windows, is_token, from_windows[:, :height, :width].flatten(), groups)


def join_partitions(partitions: list[WindowPartition]) -> WindowPartition:
    """The partition of several maps whose tokens follow each other. Windows with the same mask become one group."""
    if len(partitions) == 1:
        return partitions[0]
    to_windows, from_windows, is_token, tokens, positions = [], [], [], 0, 0
    for partition in partitions:
        to_windows.append(partition.to_windows + tokens)
        from_windows.append(partition.from_windows + positions)
        is_token.append(torch.ones_like(to_windows[-1])[:, None] if partition.is_token is None else partition.is_token)
        tokens, positions = tokens + len(partition.from_windows), positions + len(partition.to_windows)
    # Window positions group by group instead of map by map.
    numbers = [[number for number, _ in partition.groups] for partition in partitions]
    window = positions // sum(map(sum, numbers))
    position = torch.arange(positions, device=to_windows[0].device)
    by_map = [
        own.split([window * number for number in row])
        for own, row in zip(position.split([window * sum(row) for row in numbers]), numbers, strict=True)
    ]
    order = torch.cat([group for same_mask in zip(*by_map, strict=True) for group in same_mask])
    moved_to = torch.empty_like(order).scatter_(0, order, position)
    has_padding = any(partition.is_token is not None for partition in partitions)
    masks = [mask for _, mask in partitions[0].groups]
    return WindowPartition(
        batch=sum(partition.batch for partition in partitions),
        to_windows=torch.cat(to_windows)[order],
        is_token=torch.cat(is_token)[order] if has_padding else None,
        from_windows=moved_to[torch.cat(from_windows)],
        groups=list(zip(map(sum, zip(*numbers, strict=True)), masks, strict=True)),
    )


def shifted_window_masks(size: int, shift: int, like: torch.Tensor) -> list[torch.Tensor | None]:
    """
    Attention masks (w², w²) of the windows inside, of the last column, of the last row and of the corner.

    A mask is −inf between tokens that are no neighbours in the image. The windows inside have no mask (`None`).
    """
    if not shift:
        return [None]
    is_wrapped = torch.arange(size, device=like.device) >= size - shift  # rolled in from the other side of the map
    rows = is_wrapped.repeat_interleave(size)  # of each of the w² tokens
    columns = is_wrapped.repeat(size)
    rows_differ = rows[:, None] != rows[None, :]
    columns_differ = columns[:, None] != columns[None, :]
    zeros = like.new_zeros(size * size, size * size)
    separated = (columns_differ, rows_differ, rows_differ | columns_differ)
    return [None, *(zeros.masked_fill(pairs, float("-inf")) for pairs in separated)]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for every relative position."""

    def __init__(self, config, dimension: int, num_heads: int, window_size: int):
        super().__init__()
        self.config = config  # users may change its attention implementation after construction
        self.num_heads = num_heads
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        # The official files contain it, so it is persistent. `_init_weights` fills it where a file lacks it.
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dimension, 3 * dimension)
        self.proj = nn.Linear(dimension, dimension)

    def relative_position_bias(self) -> torch.Tensor:
        """(1, heads, w², w²)"""
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        tokens = self.window_size**2
        return bias.view(tokens, tokens, self.num_heads).permute(2, 0, 1).unsqueeze(0)

    def forward(self, hidden_states: torch.Tensor, partition: WindowPartition) -> torch.Tensor:
        """
        Args:
            hidden_states: (B·H·W, C).

        Returns:
            The attention's output at each window position, (B·windows·w², C), without `proj`.
        """
        positions = partition.to_windows.shape[0]  # not `len`, which would fix a symbolic batch
        return concatenate_tiles(self.attend_tile_by_tile(hidden_states, partition), positions)

    def attend_tile_by_tile(self, hidden_states: torch.Tensor, partition: WindowPartition) -> Iterator[torch.Tensor]:
        bias = self.relative_position_bias().to(hidden_states.dtype)
        embed = prepack_layer(self.qkv, like=hidden_states)
        tokens, channels = self.window_size**2, hidden_states.shape[-1]
        start = 0
        for number, mask in partition.groups:
            group_bias = bias if mask is None else bias + mask
            for tile in row_tiles(number, 3 * tokens * channels, hidden_states):
                positions = slice((start + tile.start) * tokens, (start + tile.stop) * tokens)
                windows = hidden_states.index_select(0, partition.to_windows[positions])
                if partition.is_token is not None:
                    windows = windows * partition.is_token[positions]
                yield self.attend(*self.split_heads(windows, embed), group_bias)
            start += number

    def split_heads(self, windows: torch.Tensor, embed: Callable) -> tuple[torch.Tensor, ...]:
        """Query, key and value, each (n, heads, w², 32), of windows (n·w², C). `embed` is the layer `qkv`."""
        shape = (-1, self.window_size**2, self.num_heads, windows.shape[-1] // self.num_heads)
        if torch.compiler.is_exporting():  # other runtimes copy each part of a joint product
            layers = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
            return tuple(F.linear(windows, *layer).view(shape).transpose(1, 2) for layer in layers)
        qkv = embed(windows).view(*shape[:2], 3, *shape[2:])
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:  # (n, heads, w², 32) each → (n·w², C)
        if self.config._attn_implementation == "eager":
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
            attended = scores.softmax(dim=-1) @ value
        elif infers_in_bfloat16(query):  # PyTorch's operator is slower for small windows there
            attended = attend_with_batched_products(query, key, value, bias)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)


class SwinMLP(nn.Module):
    def __init__(self, dimension: int, hidden_dimension: int):
        super().__init__()
        self.fc1 = nn.Linear(dimension, hidden_dimension)
        self.fc2 = nn.Linear(hidden_dimension, dimension)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (..., C) → (..., C)
        return self.prepacked(hidden_states)(hidden_states)

    def prepacked(self, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The MLP as a function to be called for tile after tile, of the dtype of `like`."""
        fc1, fc2 = prepack_layer(self.fc1, like), prepack_layer(self.fc2, like)
        return lambda hidden_states: fc2(F.gelu(fc1(hidden_states)))


class SwinBlock(GradientCheckpointingLayer):
    """Attention inside windows, then an MLP. Every second block shifts its windows by half a window."""

    def __init__(self, config, dimension: int, num_heads: int, window_size: int, shift: int, drop_path_rate: float):
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(dimension)
        self.attn = WindowAttention(config, dimension, num_heads, window_size)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dimension)
        self.mlp = SwinMLP(dimension, 4 * dimension)

    def forward(self, hidden_states: torch.Tensor, partition: WindowPartition) -> torch.Tensor:  # (B·H·W, C)
        attended = self.attn(self.norm1(hidden_states), partition)
        project, mlp = prepack_layer(self.attn.proj, hidden_states), self.mlp.prepacked(hidden_states)

        def finish(tokens: slice) -> torch.Tensor:
            branch = project(attended.index_select(0, partition.from_windows[tokens]))
            mixed = hidden_states[tokens] + self.drop_path(branch, partition.batch)
            return mixed + self.drop_path(mlp(self.norm2(mixed)), partition.batch)

        # Tokens do not interact after the attention, so tiles of them may be finished one by one. In training,
        # stochastic depth needs whole samples.
        number, channels = hidden_states.shape
        tiles = [slice(0, number)] if self.training else row_tiles(number, 4 * channels, hidden_states)
        return concatenate_tiles(map(finish, tiles), number)


class PatchMerging(nn.Module):
    """Downsampling by 2: the four tokens of each 2×2 square become one token of twice the channels."""

    def __init__(self, dimension: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dimension)
        self.reduction = nn.Linear(4 * dimension, 2 * dimension, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C)
        height, width = hidden_states.shape[1:3]
        if height % 2 or width % 2:
            hidden_states = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2))
        phases = [hidden_states[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(phases, dim=-1)))


class SwinStage(nn.Module):
    def __init__(self, config, dimension, num_heads, window_size, drop_path_rates, has_downsample: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(
                config, dimension, num_heads, window_size, shift=(window_size // 2) * (i % 2), drop_path_rate=rate
            )
            for i, rate in enumerate(drop_path_rates)
        )
        if has_downsample:
            self.downsample = PatchMerging(dimension)
        self.window_size = window_size

    def forward(self, scales: list[torch.Tensor]) -> list[torch.Tensor]:
        """
        Args:
            scales: Maps (B, H, W, C) of the image at each scale. Their windows are computed together.
        """
        shapes = [maps.shape for maps in scales]
        tokens = [maps.reshape(-1, maps.shape[-1]) for maps in scales]
        numbers = [own_tokens.shape[0] for own_tokens in tokens]
        hidden_states = tokens[0] if len(tokens) == 1 else torch.cat(tokens)
        partitions = {}
        for shift in {block.shift for block in self.blocks}:
            own = [partition_windows(shape[:3], self.window_size, shift, hidden_states) for shape in shapes]
            partitions[shift] = join_partitions(own)
        for block in self.blocks:
            hidden_states = block(hidden_states, partitions[block.shift])
        parts = [hidden_states] if len(tokens) == 1 else hidden_states.split(numbers)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


class SwinPatchEmbedding(nn.Module):
    def __init__(self, dimension: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dimension, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dimension)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) → (B, ⌈H/4⌉, ⌈W/4⌉, C)
        height, width = pixel_values.shape[-2:]
        if height % 4 or width % 4:
            pixel_values = F.pad(pixel_values, (0, -width % 4, 0, -height % 4))
        return self.norm(self.proj(pixel_values).permute(0, 2, 3, 1))


class SwinTransformer(nn.Module):
    """
    Swin Transformer v1 (Liu et al., https://arxiv.org/abs/2103.14030) with a LayerNorm on each stage's output.

    Maps (B, 3, H, W) to four feature maps (B, C·2^i, H/4·2^-i, W/4·2^-i), i = 0…3, in channels-last memory. Several
    scales of an image can be encoded together: `(full, half)` → four tuples of maps `(full, half)`.
    """

    def __init__(self, config):
        super().__init__()
        dimension, depths, heads, window_size = SWIN_BACKBONES[config.backbone]
        self.channels = tuple(dimension * 2**i for i in range(4))
        self.patch_embed = SwinPatchEmbedding(dimension)
        total = sum(depths)
        rates = [config.drop_path_rate * i / (total - 1) for i in range(total)]
        first = [sum(depths[:i]) for i in range(4)]
        self.layers = nn.ModuleList(
            SwinStage(
                config,
                self.channels[i],
                heads[i],
                window_size,
                rates[first[i] : first[i] + depths[i]],
                has_downsample=i < 3,
            )
            for i in range(4)
        )
        for i in range(4):
            self.add_module(f"norm{i}", nn.LayerNorm(self.channels[i]))

    def forward(self, *scales: torch.Tensor) -> list[torch.Tensor] | list[tuple[torch.Tensor, ...]]:
        maps = [self.patch_embed(pixel_values) for pixel_values in scales]
        features = []
        for i, stage in enumerate(self.layers):
            if i > 0:
                maps = [self.layers[i - 1].downsample(own) for own in maps]
            maps = stage(maps)
            features.append(tuple(getattr(self, f"norm{i}")(own).permute(0, 3, 1, 2) for own in maps))
        return features if len(scales) > 1 else [full for (full,) in features]
