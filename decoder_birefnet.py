"""Reconstruction module of BiRefNet: decoder stages with a source reference and a gradient reference."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .deformable_birefnet import ATTENTION_BLOCKS
from .hardware_birefnet import (
    composes_faster,
    convolve_and_activate,
    convolve_in_blocks,
    convolve_to_few_channels,
    fastest_layout,
)
from .layers_birefnet import (
    IDENTITY,
    RELU,
    convolve,
    convolve_and_normalize,
    fold_batch_norm,
    image_laplacian,
    is_plain,
    resize,
)


class DecoderBlock(nn.Module):
    """3×3 convolution, norm, ReLU, pyramid pooling, 3×3 convolution, norm. Optionally with a residual."""

    def __init__(self, config, in_channels: int, out_channels: int, kind: str | None = None):
        super().__init__()
        inner_channels = config.decoder_channels or in_channels // 4
        self.conv_in = nn.Conv2d(in_channels, inner_channels, 3, padding=1)
        self.bn_in = nn.BatchNorm2d(inner_channels)
        if config.decoder_attention is not None:
            self.dec_att = ATTENTION_BLOCKS[config.decoder_attention](inner_channels)
        self.has_attention = config.decoder_attention is not None
        self.conv_out = nn.Conv2d(inner_channels, out_channels, 3, padding=1)
        self.bn_out = nn.BatchNorm2d(out_channels)
        self.is_residual = (kind or config.decoder_block) == "residual"
        if self.is_residual:
            self.conv_resi = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, parts: torch.Tensor | list[torch.Tensor], head: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            parts: (B, C, h, w), or a list of (B, C_i, h, w) whose concatenation along the channels is the input. The
                list is emptied after its last use, which frees the memory of the maps.
            head: (1, out channels, 1, 1), weight of a 1×1 convolution that follows the block.

        Returns:
            (B, out channels, h, w). With a head (B, 1, h, w), the head's output.
        """
        parts = [parts] if isinstance(parts, torch.Tensor) else parts
        inner = convolve_and_normalize(parts, self.conv_in, self.bn_in, RELU)
        if not self.is_residual:
            parts.clear()
        if self.has_attention:
            inner = self.dec_att(inner)
        if head is None or self.bn_out.training:
            output = convolve_and_normalize([inner], self.conv_out, self.bn_out)
            if self.is_residual:
                output = output + convolve(parts, self.conv_resi.weight, self.conv_resi.bias)
            return output if head is None else F.conv2d(output, head)
        # The rest of the block is linear, so the head composes with it: one output channel instead of many.
        weight, bias = fold_batch_norm(self.conv_out.weight, self.conv_out.bias, self.bn_out, like=inner)
        output = F.conv2d(inner, *apply_head(head, weight, bias, like=inner), padding=1)
        if self.is_residual:
            residual = apply_head(head, self.conv_resi.weight, self.conv_resi.bias, like=inner)
            output = output + convolve(parts, *residual)
        return output


def apply_head(
    head: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Compose a convolution with the 1×1 convolution `head`, which follows it and has no bias.

    Args:
        head: (1, out, 1, 1).
        weight: (out, C, k, k).
        bias: (out,).
        like: Tensor of the convolution's input dtype.

    Returns:
        Weight (1, C, k, k) and bias (1,) of the single convolution that does both, in the dtype of `like`.
    """
    head = head.flatten(1).float()  # (1, out channels)
    combined = (head @ weight.flatten(1).float()).view(1, *weight.shape[1:])
    return combined.to(like.dtype), (head @ bias.float()).to(like.dtype)


class SourceBlock(GradientCheckpointingLayer):
    """Source reference of a decoder stage: two 3×3 convolutions of the image, without a nonlinearity."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1)
        self.conv_out = nn.Conv2d(64, out_channels, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first, second = self.conv1, self.conv_out
        layers_are_plain = is_plain(first, "Conv2d") and is_plain(second, "Conv2d")
        if layers_are_plain and composes_faster(image, first.out_channels, second.out_channels):
            return convolve_twice(image, first.weight, first.bias, second.weight, second.bias)
        if layers_are_plain:
            return second(convolve_in_blocks(image, first.weight, first.bias, padding=1))
        return second(first(image))

    def forward_with_head(self, image: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """
        The block followed by the 1×1 convolution `head` without bias: (B, 3, H, W) → (B, 1, H, W).

        Composed with the head, the two convolutions are one 5×5 convolution. This saves a map of 64 channels at full
        size and 60 times the arithmetic.

        Args:
            head: (1, out channels, 1, 1).
        """
        second, second_bias = apply_head(head, self.conv_out.weight, self.conv_out.bias, like=image)
        return convolve_twice(fastest_layout(image), self.conv1.weight, self.conv1.bias, second, second_bias)


def convolve_twice(
    maps: torch.Tensor,
    first: torch.Tensor,
    first_bias: torch.Tensor,
    second: torch.Tensor,
    second_bias: torch.Tensor,
) -> torch.Tensor:
    """
    Two 3×3 convolutions with zero padding in a row, computed as one 5×5 convolution.

    The 5×5 kernel takes hidden pixels just outside the map into account, which the padding of the second convolution
    replaces by zeros. What these hidden pixels add to the outermost rows and columns is subtracted.

    Args:
        maps: (B, C, H, W).
        first, first_bias: (hidden, C, 3, 3), (hidden,).
        second, second_bias: (out, hidden, 3, 3), (out,).

    Returns:
        (B, out, H, W)
    """
    dtype, wide = maps.dtype, torch.promote_types(first.dtype, torch.float32)
    both = F.conv_transpose2d(second.to(wide), first.to(wide))  # (out, C, 5, 5), correlation of the two kernels
    both_bias = second_bias.to(wide) + second.to(wide).sum(dim=(2, 3)) @ first_bias.to(wide)
    first, first_bias, second = first.to(dtype), first_bias.to(dtype), second.to(dtype)
    output = convolve_to_few_channels(maps, both.to(dtype), both_bias.to(dtype), padding=2)

    def from_outside(edges: torch.Tensor, axis: int) -> torch.Tensor:
        """What the hidden pixels outside two edges add to them: (B, 2·C, 1, W) → (B, 2·out, 1, W), or (…, H, 1)."""
        # The hidden pixels outside the rows include the corners, those outside the columns do not.
        paddings = ((0, 2), (0, 0)) if axis == 2 else ((1, 0), (1, 0))
        to_hidden = block_diagonal(first.narrow(axis, 2, 1), first.narrow(axis, 0, 1))
        to_output = block_diagonal(second.narrow(axis, 0, 1), second.narrow(axis, 2, 1))
        hidden = F.conv2d(edges, to_hidden, first_bias.repeat(2), padding=paddings[0])
        return F.conv2d(hidden, to_output, padding=paddings[1])

    for axis in (2, 3):  # rows, columns
        parts = [1, maps.shape[axis] - 2, 1]
        (start, _, end), (start_output, inner, end_output) = maps.split(parts, axis), output.split(parts, axis)
        start_excess, end_excess = from_outside(torch.cat([start, end], dim=1), axis).chunk(2, dim=1)
        output = torch.cat([start_output - start_excess, inner, end_output - end_excess], dim=axis)
    return output


def block_diagonal(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """
    Weight of one convolution that does two, one on the first and one on the second half of the channels.

    Args:
        first, second: (out, C, k, l).

    Returns:
        (2·out, 2·C, k, l)
    """
    nothing = torch.zeros_like(first)
    return torch.cat([torch.cat([first, nothing], dim=1), torch.cat([nothing, second], dim=1)])


class NeckBlock(GradientCheckpointingLayer):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.conv(hidden_states)


class LateralBlock(NeckBlock):
    """Lateral connection: the resized deeper map of the decoder plus a 1×1 convolution of the encoder's map."""

    def forward(self, deeper: torch.Tensor, full: torch.Tensor, half: torch.Tensor | None = None) -> torch.Tensor:
        """
        The convolution is 1×1, and resizing is linear with weights that sum to one, so both may change places. The map
        of the half-size image has the size of `deeper`: its convolution runs at that size, and one resizing serves
        both.

        Args:
            deeper: (B, C, h/2, w/2).
            full: (B, C or C/2, h, w), the encoder's map of the image.
            half: (B, C or C/2, h/2, w/2), the encoder's map of the half-size image.

        Returns:
            (B, C, h, w)
        """
        weight, bias = self.conv.weight.to(full.dtype), self.conv.bias.to(full.dtype)
        if half is not None:
            scales_are_added = weight.shape[1] == full.shape[1]
            weight, half_weight = (weight, weight) if scales_are_added else weight.split(full.shape[1], dim=1)
            deeper = deeper + F.conv2d(half, half_weight)
        output = resize(deeper, full.shape[-2:])  # a new tensor, because `deeper` has another size
        return convolve_and_activate(full, weight, bias, IDENTITY, addend=output)


def image_to_patches(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Cut the image into patches of `size` (h, w), stacked as channels: (B, 3, H, W) → (B, 3·(H/h)·(W/w), h, w).

    The order of the channels is (channel, patch row, patch column). The result has channels-last memory. Other
    runtimes, for which the network is exported, keep all maps channels-first.
    """
    batch, channels, height, width = image.shape
    h, w = size
    cut = image.view(batch, channels, height // h, h, width // w, w)
    if torch.compiler.is_exporting():
        return cut.permute(0, 1, 2, 4, 3, 5).reshape(batch, -1, h, w)
    return cut.permute(0, 3, 5, 1, 2, 4).reshape(batch, h, w, -1).permute(0, 3, 1, 2)


class BiRefNetDecoder(nn.Module):
    """
    Four stages from stride 32 to stride 4, then the logits at full size.

    Source (inward) reference: every stage also takes the image. Target (outward) reference: features that predict the
    image's gradients gate the three deeper stages.

    Args:
        encoder_channels: Channels of the encoder's maps, shallowest first.
        needs_neck: Whether these maps have the same stride, so that a pyramid neck resizes them to four strides.
    """

    def __init__(self, config, encoder_channels: tuple[int, int, int, int], needs_neck: bool):
        super().__init__()
        self.config = config
        self.needs_neck = needs_neck
        e1, e2, e3, e4 = c1, c2, c3, c4 = encoder_channels
        if needs_neck:
            # The published decoder has Swin-L's channels after a neck.
            c1, c2, c3, c4 = (c * (2 if config.multi_scale_input == "concat" else 1) for c in (192, 384, 768, 1536))
            self.pyramid_neck_x4 = NeckBlock(e4, c4)
            self.pyramid_neck_x3 = NeckBlock(e3, c3)
            self.pyramid_neck_x2 = NeckBlock(e2, c2)
            self.pyramid_neck_x1 = NeckBlock(e1, c1)

        s5, s4, s3, s2, s1 = 0, 0, 0, 0, 0  # channels of the source reference
        if config.source_reference is not None:
            s5, s4, s3, s2, s1 = e4 // 8, e4 // 8, e3 // 8, e2 // 8, e1 // 8
            factor = 4 if config.source_reference == "patches" else 1
            self.ipt_blk5 = SourceBlock(3 * factor**5, s5)
            self.ipt_blk4 = SourceBlock(3 * factor**4, s4)
            self.ipt_blk3 = SourceBlock(3 * factor**3, s3)
            self.ipt_blk2 = SourceBlock(3 * factor**2, s2)
            self.ipt_blk1 = SourceBlock(3, s1)

        self.decoder_block4 = DecoderBlock(config, c4 + s5, c3)
        self.decoder_block3 = DecoderBlock(config, c3 + s4, c2)
        self.decoder_block2 = DecoderBlock(config, c2 + s3, c1)
        self.decoder_block1 = DecoderBlock(config, c1 + s2, c1 // 2)
        self.lateral_block4 = LateralBlock(c3, c3)
        self.lateral_block3 = LateralBlock(c2, c2)
        self.lateral_block2 = LateralBlock(c1, c1)
        self.conv_out1 = nn.Sequential(nn.Conv2d(c1 // 2 + s1, 1, 1))

        for stage, channels in ((4, c3), (3, c2), (2, c1)):
            if config.multi_scale_supervision:
                self.add_module(f"conv_ms_spvn_{stage}", nn.Conv2d(channels, 1, 1))
            if config.gradient_reference:
                gradient_features = nn.Sequential(nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
                self.add_module(f"gdt_convs_{stage}", gradient_features)
                self.add_module(f"gdt_convs_pred_{stage}", nn.Sequential(nn.Conv2d(16, 1, 1)))
                self.add_module(f"gdt_convs_attn_{stage}", nn.Sequential(nn.Conv2d(16, 1, 1)))

    def forward(
        self, laterals: list[tuple[torch.Tensor, ...]], x4: torch.Tensor, image: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, tuple]]:
        """
        Args:
            laterals: The encoder's maps x1, x2, x3, shallowest first. Each is a tuple of the map of the image and,
                with multi-scale input, the map of the half-size image. The list is emptied, which frees each map
                after its last use.
            x4: The deepest map, scales joined.
            image: (B, 3, H, W).

        Returns:
            The logits (B, 1, H, W). In training also `auxiliary_logits`, `gradient_logits` and `gradient_targets` of
            stages 4, 3, 2.
        """
        if self.needs_neck:
            laterals, x4 = self.build_pyramid(laterals, x4, image)
        training_outputs: dict[str, tuple] = {}
        gradient = image_laplacian(image) if self.training and self.config.gradient_reference else None

        p4 = self.decoder_block4(self.with_source(x4, image, 5))
        p4 = self.gate_by_gradient(p4, gradient, 4, training_outputs)

        p3 = self.with_source(self.lateral_block4(p4, *laterals.pop()), image, 4)
        p3 = self.decoder_block3(p3)
        p3 = self.gate_by_gradient(p3, gradient, 3, training_outputs)

        p2 = self.with_source(self.lateral_block3(p3, *laterals.pop()), image, 3)
        p2 = self.decoder_block2(p2)
        p2 = self.gate_by_gradient(p2, gradient, 2, training_outputs)

        p1 = self.with_source(self.lateral_block2(p2, *laterals.pop()), image, 2)
        # The last convolution is 1×1, and resizing is linear with weights that sum to one, so the convolution runs
        # first. Then one channel is resized to full size instead of 48 to 192.
        head, bias = self.conv_out1[0].weight, self.conv_out1[0].bias
        from_p1, from_image = head.split([head.shape[1] - self.source_channels(1), self.source_channels(1)], dim=1)
        p1_logits = self.decoder_block1(p1, head=from_p1)
        logits = resize(p1_logits + bias.view(1, 1, 1, 1), image.shape[-2:])
        if self.config.source_reference is not None:
            logits = logits + self.ipt_blk1.forward_with_head(image, from_image)
        return logits, training_outputs

    def source_channels(self, level: int) -> int:
        return getattr(self, f"ipt_blk{level}").conv_out.out_channels if self.config.source_reference else 0

    def build_pyramid(
        self, laterals: list[tuple[torch.Tensor]], x4: torch.Tensor, image: torch.Tensor
    ) -> tuple[list[tuple[torch.Tensor]], torch.Tensor]:
        """Resize four maps of one stride to strides 4, 8, 16, 32, and apply the necks' 1×1 convolutions."""
        height, width = image.shape[-2:]
        necks = (self.pyramid_neck_x1, self.pyramid_neck_x2, self.pyramid_neck_x3, self.pyramid_neck_x4)
        sizes = [(height // stride, width // stride) for stride in (4, 8, 16, 32)]
        # A 1×1 convolution commutes with resizing. It runs at the smaller of the two sizes.
        maps = [
            resize(neck(feature), size) if size[0] > feature.shape[-2] else neck(resize(feature, size))
            for neck, feature, size in zip(necks, [*(x for (x,) in laterals), x4], sizes, strict=True)
        ]
        x4 = maps.pop()
        return [(x,) for x in maps], x4

    def with_source(self, hidden_states: torch.Tensor, image: torch.Tensor, level: int) -> list[torch.Tensor]:
        """The map, and with a source reference the output of `ipt_blk{level}` at the map's size."""
        if self.config.source_reference is None:
            return [hidden_states]
        size = hidden_states.shape[-2:]
        source = image_to_patches(image, size) if self.config.source_reference == "patches" else resize(image, size)
        return [hidden_states, getattr(self, f"ipt_blk{level}")(source)]

    def gate_by_gradient(
        self,
        hidden_states: torch.Tensor,
        gradient: torch.Tensor | None,
        stage: int,
        training_outputs: dict[str, tuple],
    ) -> torch.Tensor:
        """
        Gate a stage's map (B, C, h, w) by its gradient features.

        In training, adds the stage's logits, gradient logits and gradient target to `training_outputs`.

        Args:
            gradient: (B, 1, H, W), Laplacian of the image; in training only.
            stage: 4, 3 or 2.
        """

        def collect(name: str, value: torch.Tensor):
            training_outputs[name] = (*training_outputs.get(name, ()), value)

        if self.training and self.config.multi_scale_supervision:
            stage_logits = getattr(self, f"conv_ms_spvn_{stage}")(hidden_states)
            collect("auxiliary_logits", stage_logits)
        if not self.config.gradient_reference:
            return hidden_states
        convolution, norm, activation = getattr(self, f"gdt_convs_{stage}")
        gradient_features = convolve_and_normalize([hidden_states], convolution, norm, activation)
        if self.training:
            collect("gradient_logits", getattr(self, f"gdt_convs_pred_{stage}")(gradient_features))
            # The target depends on the stage's own prediction and is not detached, as published.
            collect("gradient_targets", gradient * resize(stage_logits, gradient.shape[-2:]))
        return hidden_states * torch.sigmoid(getattr(self, f"gdt_convs_attn_{stage}")(gradient_features))
