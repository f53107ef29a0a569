"""The decoder's blocks against direct formulations."""

import pytest
import torch
import torch.nn.functional as F

from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.decoder_birefnet import (
    DecoderBlock,
    LateralBlock,
    SourceBlock,
    convolve_twice,
    image_to_patches,
)
from birefnet.repository.layers_birefnet import resize


@pytest.mark.parametrize("scales", ["concat", "add", None])
def test_lateral_block_equals_convolving_the_combined_map(scales):
    """The published order: combine both scales at full size, convolve, add the resized deeper map."""
    torch.manual_seed(0)
    full, half, deeper = torch.randn(2, 6, 10, 14), torch.randn(2, 6, 5, 7), torch.randn(2, 12, 5, 7)
    block = LateralBlock(12 if scales == "concat" else 6, 12)
    joined = {"concat": torch.cat([full, resize(half, (10, 14))], dim=1), "add": full + resize(half, (10, 14))}
    with torch.no_grad():
        expected = resize(deeper, (10, 14)) + block.conv(joined.get(scales, full))
        found = block(deeper, full, half if scales else None)
    assert (found - expected).abs().max() < 1e-6
    with_gradients = block(deeper, full, half if scales else None)
    with_gradients.sum().backward()
    assert (with_gradients - expected).abs().max() < 1e-6 and block.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["basic", "residual"])
def test_decoder_block_takes_its_input_in_parts_and_frees_them(kind):
    torch.manual_seed(0)
    block = DecoderBlock(BiRefNetConfig(decoder_channels=8), 10, 4, kind).eval()
    whole = torch.randn(2, 10, 6, 7)
    parts = list(whole.split([7, 3], dim=1))
    with torch.no_grad():
        assert (block(parts) - block(whole)).abs().max() < 1e-5
    assert len(parts) == (2 if kind == "residual" else 0)


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (7, 3), (12, 9)])
def test_convolving_twice_equals_two_convolutions_up_to_the_border(size):
    torch.manual_seed(0)
    maps = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    first, first_bias = torch.randn(8, 3, 3, 3).double(), torch.randn(8).double()
    second, second_bias = torch.randn(5, 8, 3, 3).double(), torch.randn(5).double()
    expected = F.conv2d(F.conv2d(maps, first, first_bias, padding=1), second, second_bias, padding=1)
    found = convolve_twice(maps, first, first_bias, second, second_bias)
    assert (found - expected).abs().max() < 1e-12
    gradients = [torch.autograd.grad((output**2).sum(), maps)[0] for output in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-9


def test_source_block_with_a_head_equals_the_block_and_the_head():
    torch.manual_seed(0)
    block, image, head = SourceBlock(3, 6), torch.randn(2, 3, 32, 64), torch.randn(1, 6, 1, 1)
    with torch.no_grad():
        expected = F.conv2d(block(image), head)
        assert (block.forward_with_head(image, head) - expected).abs().max() < 2e-6


@pytest.mark.parametrize("size", [(4, 4), (16, 32)])
def test_patches_are_channels_in_the_order_of_the_published_code(size):
    h, w = size
    image = torch.randn(2, 3, 32, 64)
    patches = image_to_patches(image, size)
    assert patches.is_contiguous(memory_format=torch.channels_last)
    rows, columns = 32 // h, 64 // w
    assert patches.shape == (2, 3 * rows * columns, h, w)
    for channel, row, column in ((0, 0, 0), (1, rows - 1, 0), (2, 0, columns - 1)):
        expected = image[:, channel, row * h : (row + 1) * h, column * w : (column + 1) * w]
        assert torch.equal(patches[:, (channel * rows + row) * columns + column], expected)
