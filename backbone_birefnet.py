"""Backbones of BiRefNet: Swin Transformer v1 in the layout of the official checkpoints, and any timm model."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_birefnet import DINO_V3_BACKBONES, SWIN_BACKBONES
from .layers_birefnet import attention, concatenate, layer_for_tiles, tiles


def create_backbone(config):
    """
    Builds the encoder that `config.backbone` names.

    Returns:
        (`nn.Module`, `tuple[int]`, `bool`): the module, which maps (B, 3, H, W) to four feature maps from the
        shallowest to the deepest; their channels in the same order; and whether they all have one stride, so that a
        pyramid neck has to follow.

    Raises:
        ValueError: if timm has no such model, it has no `features_only`, or its strides fit no decoder.
        ImportError: if the backbone needs timm and it is not installed.
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
            "one stride for all."
        )
    for tensor in [*backbone.parameters(), *backbone.buffers()]:
        if not tensor.is_meta:  # timm has initialised it as its authors do: leave it
            tensor._is_hf_initialized = True
    # Channels-last networks (Swin, ConvNeXt-like hybrids) of timm announce it; the decoder wants (B, C, H, W).
    if getattr(backbone, "output_fmt", None) is not None and "NHWC" in str(backbone.output_fmt):
        backbone.register_forward_hook(_channels_first)
    return backbone, tuple(backbone.feature_info.channels()), len(set(strides)) == 1


def _channels_first(module, inputs, features):
    return [feature.permute(0, 3, 1, 2) for feature in features]


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the residual branch of a sample with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor, batch: int) -> torch.Tensor:
        """
        Args:
            branch: (B·n, C), the rows of each sample after those of the one before.
            batch: B.
        """
        if self.rate == 0.0 or not self.training:
            return branch
        keep = 1.0 - self.rate
        kept = branch.new_empty(batch, 1, 1).bernoulli_(keep).div_(keep)
        return (branch.view(batch, -1, branch.shape[-1]) * kept).flatten(0, 1)


def relative_position_index(window_size: int) -> torch.Tensor:
    """(w², w²) int64: row of the relative position bias table for each (query, key) of a w×w window."""
    positions = torch.arange(window_size)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_distance = rows[:, None] - rows[None, :] + window_size - 1
    column_distance = columns[:, None] - columns[None, :] + window_size - 1
    return row_distance * (2 * window_size - 1) + column_distance


class WindowOrder(NamedTuple):
    """
    Where the tokens of B maps of H×W stand when the maps are cut into windows of w², for indexing rows of tokens: each
    token is moved once into its window and once back, whatever shift and padding there are.
    """

    batch: int
    tokens: torch.Tensor  # (B·windows·w²,) the token of each place in the windows, any where `is_token` is 0
    is_token: torch.Tensor | None  # (B·windows·w², 1) 1, or 0 in the padding; `None` without padding
    places: torch.Tensor  # (B·H·W,) the place of each token
    groups: list[tuple[int, torch.Tensor | None]]  # successive windows: their number, and the (w², w²) mask they share


def order_windows(shape: tuple[int, int, int], size: int, shift: int, like: torch.Tensor) -> WindowOrder:
    """
    The windows of maps of `shape` (B, H, W), which are padded at the right and bottom to a multiple of `size` and
    rolled by −`shift`. After rolling only the windows of the last column, the last row and the corner hold tokens from
    opposite sides of the map, so three masks serve however many windows there are.

    Args:
        like: a tensor of the device and dtype of the tokens.
    """
    batch, height, width = shape
    padded_height, padded_width = height + -height % size, width + -width % size
    rows, columns = padded_height // size, padded_width // size
    # Every number below is a place of the padded maps, or of the windows, counted from 0.
    padded = torch.arange(batch * padded_height * padded_width, device=like.device)
    rolled = padded.view(batch, padded_height, padded_width).roll((-shift, -shift), dims=(1, 2))
    windows = rolled.view(batch, rows, size, columns, size).transpose(2, 3)  # (B, rows, columns, w, w)
    seams = [(slice(None), slice(None))]
    if shift:
        seams = [
            (vertical, horizontal)
            for vertical in (slice(-1), slice(-1, None))
            for horizontal in (slice(-1), slice(-1, None))
        ]
    regions = [windows[:, vertical, horizontal].reshape(-1, size * size) for vertical, horizontal in seams]
    order = torch.cat(regions).flatten()
    places = torch.empty_like(order).scatter_(0, order, padded).view(batch, padded_height, padded_width)

    image, row, column = (
        order // (padded_height * padded_width),
        order // padded_width % padded_height,
        order % padded_width,
    )
    tokens = (image * height + row.clamp(max=height - 1)) * width + column.clamp(max=width - 1)
    is_token = None
    if (padded_height, padded_width) != (height, width):
        is_token = ((row < height) & (column < width)).to(like.dtype).unsqueeze(-1)
    groups = list(zip([region.shape[0] for region in regions], seam_masks(size, shift, like), strict=True))
    return WindowOrder(batch, tokens, is_token, places[:, :height, :width].flatten(), groups)


def seam_masks(size: int, shift: int, like: torch.Tensor) -> list[torch.Tensor | None]:
    """
    For the windows inside, of the last column, of the last row and of the corner `None` or a (w², w²) mask: −inf
    between tokens that are no neighbours in the picture.
    """
    if not shift:
        return [None]
    from_other_side = torch.arange(size, device=like.device) >= size - shift
    rows = from_other_side.repeat_interleave(size)  # of each of the w² tokens
    columns = from_other_side.repeat(size)
    rows_differ = rows[:, None] != rows[None, :]
    columns_differ = columns[:, None] != columns[None, :]
    zeros = like.new_zeros(size * size, size * size)
    return [
        None,
        *(
            zeros.masked_fill(seam, float("-inf"))
            for seam in (columns_differ, rows_differ, rows_differ | columns_differ)
        ),
    ]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for every relative position."""

    def __init__(self, config, dimension: int, num_heads: int, window_size: int):
        super().__init__()
        self.config = config  # its attention implementation may be changed after construction
        self.num_heads = num_heads
        self.window_size = window_size
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        # Part of the official files, so it is persistent; `_init_weights` refills it where a file lacks it.
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dimension, 3 * dimension)
        self.proj = nn.Linear(dimension, dimension)

    def relative_position_bias(self) -> torch.Tensor:
        """(1, heads, w², w²)"""
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        tokens = self.window_size**2
        return bias.view(tokens, tokens, self.num_heads).permute(2, 0, 1).unsqueeze(0)

    def forward(self, hidden_states: torch.Tensor, order: WindowOrder) -> torch.Tensor:
        """
        Args:
            hidden_states: (B·H·W, C).

        Returns:
            What each place of the windows attended to, (B·windows·w², C), before `proj`.
        """
        return concatenate(self.attend_tile_by_tile(hidden_states, order), order.tokens.shape[0])

    def attend_tile_by_tile(self, hidden_states: torch.Tensor, order: WindowOrder) -> Iterator[torch.Tensor]:
        bias, embed = self.relative_position_bias(), layer_for_tiles(self.qkv)
        places, channels = self.window_size**2, hidden_states.shape[-1]
        start = 0
        for number, mask in order.groups:
            group_bias = bias if mask is None else bias + mask
            for part in tiles(number, 3 * places * channels, hidden_states):
                rows = slice((start + part.start) * places, (start + part.stop) * places)
                windows = hidden_states.index_select(0, order.tokens[rows])
                if order.is_token is not None:
                    windows = windows * order.is_token[rows]
                yield self.attend(embed(windows).view(-1, places, 3 * channels), group_bias)
            start += number

    def attend(self, qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:  # (n, w², 3C) → (n·w², C)
        number, tokens, channels = *qkv.shape[:2], qkv.shape[2] // 3
        qkv = qkv.view(number, tokens, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (n, heads, w², 32)
        if self.config._attn_implementation == "eager":
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
            attended = scores.softmax(dim=-1) @ value
        else:
            attended = attention(query, key, value, bias)
        return attended.transpose(1, 2).reshape(number * tokens, channels)


class SwinMLP(nn.Module):
    def __init__(self, dimension: int, hidden_dimension: int):
        super().__init__()
        self.fc1 = nn.Linear(dimension, hidden_dimension)
        self.fc2 = nn.Linear(hidden_dimension, dimension)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.for_tiles()(hidden_states)

    def for_tiles(self) -> Callable[[torch.Tensor], torch.Tensor]:
        fc1, fc2 = layer_for_tiles(self.fc1), layer_for_tiles(self.fc2)
        return lambda hidden_states: fc2(F.gelu(fc1(hidden_states)))


class SwinBlock(GradientCheckpointingLayer):
    """Attention inside windows, which are shifted by half a window in every second block, then an MLP."""

    def __init__(self, config, dimension: int, num_heads: int, window_size: int, shift: int, drop_path_rate: float):
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(dimension)
        self.attn = WindowAttention(config, dimension, num_heads, window_size)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dimension)
        self.mlp = SwinMLP(dimension, 4 * dimension)

    def forward(self, hidden_states: torch.Tensor, order: WindowOrder) -> torch.Tensor:  # (B·H·W, C)
        attended = self.attn(self.norm1(hidden_states), order)
        number, channels = hidden_states.shape
        parts = [slice(0, number)] if self.training else tiles(number, 4 * channels, hidden_states)
        project, mlp = layer_for_tiles(self.attn.proj), self.mlp.for_tiles()

        def mix(part: slice) -> torch.Tensor:  # what follows the attention goes token by token
            branch = project(attended.index_select(0, order.places[part]))
            mixed = hidden_states[part] + self.drop_path(branch, order.batch)
            return mixed + self.drop_path(mlp(self.norm2(mixed)), order.batch)

        return concatenate(map(mix, parts), number)


class PatchMerging(nn.Module):
    """Halves the map: the four pixels of each 2×2 square become one of twice the channels."""

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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C)
        shape = hidden_states.shape
        shifts = {block.shift for block in self.blocks}
        orders = {shift: order_windows(shape[:3], self.window_size, shift, hidden_states) for shift in shifts}
        hidden_states = hidden_states.reshape(-1, shape[-1])
        for block in self.blocks:
            hidden_states = block(hidden_states, orders[block.shift])
        return hidden_states.view(shape)


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
    Swin Transformer v1 (Liu et al., https://arxiv.org/abs/2103.14030) with a norm on each stage's output.

    Returns four maps (B, C·2^i, H/4·2^-i, W/4·2^-i), i = 0…3, in channels-last memory.
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

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        hidden_states = self.patch_embed(pixel_values)
        features = []
        for i, stage in enumerate(self.layers):
            if i > 0:
                hidden_states = self.layers[i - 1].downsample(hidden_states)
            hidden_states = stage(hidden_states)
            features.append(getattr(self, f"norm{i}")(hidden_states).permute(0, 3, 1, 2))
        return features
