"""Backbones of BiRefNet: Swin Transformer v1 in the layout of the official checkpoints, and any timm model."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_birefnet import DINO_V3_BACKBONES, SWIN_BACKBONES


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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = 1.0 - self.rate
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep).div_(keep)


def relative_position_index(window_size: int) -> torch.Tensor:
    """(w², w²) int64: row of the relative position bias table for each (query, key) of a w×w window."""
    positions = torch.arange(window_size)
    rows, columns = torch.meshgrid(positions, positions, indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_distance = rows[:, None] - rows[None, :] + window_size - 1
    column_distance = columns[:, None] - columns[None, :] + window_size - 1
    return row_distance * (2 * window_size - 1) + column_distance


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

    def forward(self, windows: torch.Tensor, groups: list[tuple[int, torch.Tensor | None]]) -> torch.Tensor:
        """
        Args:
            windows: (number of windows, w², C).
            groups: consecutive groups of windows as (their number, the (w², w²) mask that they share, or `None`).
        """
        number, tokens, dimension = windows.shape
        qkv = self.qkv(windows).view(number, tokens, 3, self.num_heads, dimension // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (number, heads, w², 32)
        bias = self.relative_position_bias()
        attended, start = [], 0
        for length, mask in groups:
            part = slice(start, start + length)
            attended.append(self._attend(query[part], key[part], value[part], bias if mask is None else bias + mask))
            start += length
        attended = torch.cat(attended) if len(attended) > 1 else attended[0]
        return self.proj(attended.transpose(1, 2).reshape(number, tokens, dimension))

    def _attend(self, query, key, value, bias):
        if self.config._attn_implementation == "eager":
            scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + bias
            return scores.softmax(dim=-1) @ value
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


class SwinMLP(nn.Module):
    def __init__(self, dimension: int, hidden_dimension: int):
        super().__init__()
        self.fc1 = nn.Linear(dimension, hidden_dimension)
        self.fc2 = nn.Linear(hidden_dimension, dimension)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_states)))


class SwinBlock(GradientCheckpointingLayer):
    """Attention inside windows, which are shifted by half a window in every second block, then an MLP."""

    def __init__(self, config, dimension: int, num_heads: int, window_size: int, shift: int, drop_path_rate: float):
        super().__init__()
        self.window_size = window_size
        self.shift = shift
        self.norm1 = nn.LayerNorm(dimension)
        self.attn = WindowAttention(config, dimension, num_heads, window_size)
        self.drop_path = DropPath(drop_path_rate)
        self.norm2 = nn.LayerNorm(dimension)
        self.mlp = SwinMLP(dimension, 4 * dimension)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C)
        hidden_states = hidden_states + self.drop_path(self.attend_in_windows(self.norm1(hidden_states)))
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))

    def attend_in_windows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        height, width = hidden_states.shape[1:3]
        size = self.window_size
        padded = F.pad(hidden_states, (0, 0, 0, -width % size, 0, -height % size))
        regions = self._regions(padded)
        windows = torch.cat([partition_windows(region, size) for region in regions])
        lengths = [region.shape[0] * (region.shape[1] // size) * (region.shape[2] // size) for region in regions]
        attended = self.attn(windows, list(zip(lengths, self._masks(windows), strict=True)))
        merged = [merge_windows(part, region) for part, region in zip(attended.split(lengths), regions, strict=True)]
        return self._assemble(merged)[:, :height, :width]

    def _regions(self, padded: torch.Tensor) -> list[torch.Tensor]:
        """
        The map itself, or for a shifted block the four parts of the rolled map: only the windows of the last column,
        the last row and the corner hold tokens from opposite sides of the map, so three masks serve however many
        windows there are. The parts are sliced out, which saves rolling the map to and fro.
        """
        if not self.shift:
            return [padded]
        row, column = padded.shape[1] - self.window_size + self.shift, padded.shape[2] - self.window_size + self.shift
        middle = padded[:, self.shift : row]
        bottom = torch.cat([padded[:, row:], padded[:, : self.shift]], dim=1)
        return [
            region
            for rows in (middle, bottom)
            for region in (
                rows[:, :, self.shift : column],
                torch.cat([rows[:, :, column:], rows[:, :, : self.shift]], dim=2),
            )
        ]

    def _assemble(self, regions: list[torch.Tensor]) -> torch.Tensor:
        """Undoes `_regions`."""
        if not self.shift:
            return regions[0]
        split = self.window_size - self.shift  # of the last row and column, what was not rolled in from the other side
        inner, right, below, corner = regions
        bands = [
            torch.cat([last[:, :, split:], first, last[:, :, :split]], dim=2)
            for first, last in ((inner, right), (below, corner))
        ]
        middle, bottom = bands
        return torch.cat([bottom[:, split:], middle, bottom[:, :split]], dim=1)

    def _masks(self, windows: torch.Tensor) -> list[torch.Tensor | None]:
        """For each region `None` or a (w², w²) mask: −inf between tokens that are no neighbours in the picture."""
        if not self.shift:
            return [None]
        size = self.window_size
        from_other_side = torch.arange(size, device=windows.device) >= size - self.shift
        rows = from_other_side.repeat_interleave(size)  # of each of the w² tokens
        columns = from_other_side.repeat(size)
        rows_differ = rows[:, None] != rows[None, :]
        columns_differ = columns[:, None] != columns[None, :]
        zeros = torch.zeros(size * size, size * size, dtype=windows.dtype, device=windows.device)
        seams = (columns_differ, rows_differ, rows_differ | columns_differ)
        return [None, *(zeros.masked_fill(seam, float("-inf")) for seam in seams)]


def partition_windows(hidden_states: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W, C) → (B·H/size·W/size, size², C)"""
    batch, height, width, channels = hidden_states.shape
    rows, columns = height // size, width // size
    windows = hidden_states.reshape(batch, rows, size, columns, size, channels).transpose(2, 3)
    return windows.reshape(batch * rows * columns, size * size, channels)


def merge_windows(windows: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """(B·H/size·W/size, size², C) → (B, H, W, C), the shape of `region`"""
    batch, height, width, channels = region.shape
    size = int(windows.shape[1] ** 0.5)
    windows = windows.view(batch, height // size, width // size, size, size, channels)
    return windows.transpose(2, 3).reshape(batch, height, width, channels)


class PatchMerging(nn.Module):
    """Halves the map: the four pixels of each 2×2 square become one of twice the channels."""

    def __init__(self, dimension: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dimension)
        self.reduction = nn.Linear(4 * dimension, 2 * dimension, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C)
        height, width = hidden_states.shape[1:3]
        padded = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2))
        phases = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
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


class SwinPatchEmbedding(nn.Module):
    def __init__(self, dimension: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dimension, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dimension)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) → (B, ⌈H/4⌉, ⌈W/4⌉, C)
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % 4, 0, -height % 4))
        return self.norm(self.proj(padded).permute(0, 2, 3, 1))


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
            for block in stage.blocks:
                hidden_states = block(hidden_states)
            features.append(getattr(self, f"norm{i}")(hidden_states).permute(0, 3, 1, 2))
        return features
