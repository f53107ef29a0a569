"""
BiRefNet in its usual formulation, as the baseline of the benchmark and an independent check of the project's results.

One operator per step of the definition: maps are concatenated at full size, every window and head has a mask, and
deformable convolution is torchvision's. It uses the model's parameters and none of its code.
"""

import torch
import torch.nn.functional as F


try:
    from torchvision.ops import deform_conv2d
except ImportError:  # then tap by tap
    deform_conv2d = None

OPTIONS = {
    "multi_scale_input": "concat",
    "context_levels": 3,
    "squeeze_block": "basic",
    "decoder_block": "basic",
    "decoder_attention": "aspp_deformable",
    "source_reference": "patches",
    "gradient_reference": True,
}


def plain_logits(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """
    Compute logits (B, 1, H, W) from `pixel_values` (B, 3, H, W) with a model in evaluation mode.

    Raises:
        ValueError: The model's configuration is not one of the official Swin configurations, such as lite or general.
    """
    for option, value in OPTIONS.items():
        if getattr(model.config, option) != value:
            raise ValueError(f"{option}={getattr(model.config, option)!r}: the plain formulation has {value!r} only.")
    if not model.config.backbone.startswith("swin_v1_"):
        raise ValueError(f"backbone={model.config.backbone!r}: the plain formulation has Swin v1 only.")
    image = pixel_values.to(model.dtype)
    x1, x2, x3, x4 = encode(model, image)
    x4 = decoder_block(model.squeeze_module[0], x4)
    return decode(model.decoder, image, x1, x2, x3, x4)


def resize(maps: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def encode(model, image: torch.Tensor) -> list[torch.Tensor]:
    height, width = image.shape[-2:]
    full = swin_features(model.bb, image)
    half = swin_features(model.bb, resize(image, (height // 2, width // 2)))
    x1, x2, x3, x4 = (torch.cat([f, resize(h, f.shape[-2:])], dim=1) for f, h in zip(full, half, strict=True))
    x4 = torch.cat([*(resize(x, x4.shape[-2:]) for x in (x1, x2, x3)), x4], dim=1)
    return [x1, x2, x3, x4]


def swin_features(backbone, image: torch.Tensor) -> list[torch.Tensor]:
    """Four maps (B, C, h, w) of (B, 3, H, W)."""
    hidden_states = backbone.patch_embed.proj(image)
    hidden_states = backbone.patch_embed.norm(hidden_states.permute(0, 2, 3, 1))
    features = []
    for level, stage in enumerate(backbone.layers):
        window_size = window_size_of(stage.blocks[0].attn)
        mask = window_masks(*hidden_states.shape[1:3], window_size, hidden_states)
        for index, block in enumerate(stage.blocks):
            hidden_states = swin_block(block, hidden_states, window_size, mask if index % 2 else None)
        features.append(getattr(backbone, f"norm{level}")(hidden_states).permute(0, 3, 1, 2).contiguous())
        if level < 3:
            hidden_states = merge_patches(stage.downsample, hidden_states)
    return features


def window_size_of(attention) -> int:
    return int(attention.relative_position_index.shape[0] ** 0.5)


def window_masks(height: int, width: int, window_size: int, like: torch.Tensor) -> torch.Tensor:
    """Masks (windows, w², w²): −inf between tokens of a shifted window from different sides of the map."""
    height, width = height + -height % window_size, width + -width % window_size
    shift = window_size // 2

    def side(length):  # 0 before the cut at −window, 1 between the cuts, 2 after the cut at −shift
        positions = torch.arange(length, device=like.device)
        return (positions >= length - window_size).long() + (positions >= length - shift).long()

    regions = 3 * side(height)[:, None] + side(width)[None, :]
    windows = partition(regions[None, :, :, None], window_size).squeeze(-1)  # (windows, w²)
    differ = windows[:, None, :] != windows[:, :, None]
    return torch.zeros(differ.shape, dtype=like.dtype, device=like.device).masked_fill(differ, float("-inf"))


def partition(maps: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, W, C) → (B·windows, size², C)"""
    batch, height, width, channels = maps.shape
    maps = maps.view(batch, height // size, size, width // size, size, channels)
    return maps.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


def swin_block(block, hidden_states: torch.Tensor, size: int, mask: torch.Tensor | None) -> torch.Tensor:
    batch, height, width, channels = hidden_states.shape
    maps = F.pad(block.norm1(hidden_states), (0, 0, 0, -width % size, 0, -height % size))
    padded_height, padded_width = maps.shape[1:3]
    shift = 0 if mask is None else size // 2
    if shift:
        maps = torch.roll(maps, (-shift, -shift), dims=(1, 2))
    windows = window_attention(block.attn, partition(maps, size), batch, mask)
    windows = windows.view(batch, padded_height // size, padded_width // size, size, size, channels)
    maps = windows.permute(0, 1, 3, 2, 4, 5).reshape(batch, padded_height, padded_width, channels)
    if shift:
        maps = torch.roll(maps, (shift, shift), dims=(1, 2))
    hidden_states = hidden_states + maps[:, :height, :width].contiguous()
    return hidden_states + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(hidden_states))))


def window_attention(attention, windows: torch.Tensor, batch: int, mask: torch.Tensor | None) -> torch.Tensor:
    number, tokens, channels = windows.shape
    heads = attention.relative_position_bias_table.shape[1]
    qkv = attention.qkv(windows).view(number, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    bias = attention.relative_position_bias_table[attention.relative_position_index.flatten()]
    bias = bias.view(1, tokens, tokens, heads).permute(0, 3, 1, 2)
    if mask is not None:  # expanded over the batch, then over the heads
        bias = bias + mask.repeat(batch, 1, 1).unsqueeze(1)
    attended = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias)
    return attention.proj(attended.transpose(1, 2).reshape(number, tokens, channels))


def merge_patches(downsample, maps: torch.Tensor) -> torch.Tensor:
    height, width = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, 0, width % 2, 0, height % 2))
    phases = [maps[:, 0::2, 0::2], maps[:, 1::2, 0::2], maps[:, 0::2, 1::2], maps[:, 1::2, 1::2]]
    return downsample.reduction(downsample.norm(torch.cat(phases, dim=-1)))


def decode(decoder, image: torch.Tensor, x1, x2, x3, x4) -> torch.Tensor:
    def with_source(maps, level):
        patches = resize(image_patches(image, maps.shape[-2:]), maps.shape[-2:])
        source = getattr(decoder, f"ipt_blk{level}")
        return torch.cat([maps, source.conv_out(source.conv1(patches))], dim=1)

    def gated(maps, stage):
        gradient_features = getattr(decoder, f"gdt_convs_{stage}")(maps)
        return maps * torch.sigmoid(getattr(decoder, f"gdt_convs_attn_{stage}")(gradient_features))

    p4 = gated(decoder_block(decoder.decoder_block4, with_source(x4, 5)), 4)
    p3 = resize(p4, x3.shape[-2:]) + decoder.lateral_block4.conv(x3)
    p3 = gated(decoder_block(decoder.decoder_block3, with_source(p3, 4)), 3)
    p2 = resize(p3, x2.shape[-2:]) + decoder.lateral_block3.conv(x2)
    p2 = gated(decoder_block(decoder.decoder_block2, with_source(p2, 3)), 2)
    p1 = resize(p2, x1.shape[-2:]) + decoder.lateral_block2.conv(x1)
    p1 = decoder_block(decoder.decoder_block1, with_source(p1, 2))
    return decoder.conv_out1(with_source(resize(p1, image.shape[-2:]), 1))


def image_patches(image: torch.Tensor, size) -> torch.Tensor:
    """(B, 3, H, W) → (B, 3·(H/h)·(W/w), h, w)"""
    batch, channels, height, width = image.shape
    tiles = image.view(batch, channels, height // size[0], size[0], width // size[1], size[1])
    return tiles.permute(0, 1, 2, 4, 3, 5).reshape(batch, -1, *size)


def decoder_block(block, maps: torch.Tensor) -> torch.Tensor:
    maps = F.relu(block.bn_in(block.conv_in(maps)))
    return block.bn_out(block.conv_out(pyramid_pooling(block.dec_att, maps)))


def pyramid_pooling(pooling, maps: torch.Tensor) -> torch.Tensor:
    branches = [pooling.aspp1, *pooling.aspp_deforms]
    results = [F.relu(branch.bn(deformable_convolution(branch.atrous_conv, maps))) for branch in branches]
    results.append(resize(pooling.global_avg_pool(maps), maps.shape[-2:]))
    return F.relu(pooling.bn1(pooling.conv1(torch.cat(results, dim=1))))


def deformable_convolution(layer, maps: torch.Tensor) -> torch.Tensor:
    offsets, modulation = layer.offset_conv(maps), 2 * torch.sigmoid(layer.modulator_conv(maps))
    weight = layer.regular_conv.weight
    if deform_conv2d is None:
        return sample_tap_by_tap(maps, offsets, modulation, weight)
    operands = (maps, offsets, weight, modulation)
    if maps.dtype == torch.bfloat16:  # not supported by torchvision
        operands = [operand.float() for operand in operands]
    maps_, offsets, weight, modulation = operands
    output = deform_conv2d(maps_, offsets, weight, padding=weight.shape[-1] // 2, mask=modulation)
    return output.to(maps.dtype)


def sample_tap_by_tap(maps: torch.Tensor, offsets: torch.Tensor, modulation: torch.Tensor, weight: torch.Tensor):
    """Deformable convolution by one `grid_sample` for each kernel tap and one matrix product over all taps."""
    batch, channels, height, width = maps.shape
    kernel_size = weight.shape[-1]
    rows = torch.arange(height, device=maps.device, dtype=torch.float32)[:, None]
    columns = torch.arange(width, device=maps.device, dtype=torch.float32)
    samples = []
    for tap in range(kernel_size**2):
        row = rows + tap // kernel_size - kernel_size // 2 + offsets[:, 2 * tap].float()
        column = columns + tap % kernel_size - kernel_size // 2 + offsets[:, 2 * tap + 1].float()
        grid = torch.stack([(2 * column + 1) / width - 1, (2 * row + 1) / height - 1], dim=-1)
        sample = F.grid_sample(maps.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        samples.append(sample.to(maps.dtype) * modulation[:, tap : tap + 1])
    columns = torch.stack(samples, dim=2).view(batch, channels * kernel_size**2, height * width)
    return (weight.flatten(1) @ columns).view(batch, -1, height, width)
