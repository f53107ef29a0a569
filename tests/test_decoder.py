"""The decoder's blocks against direct formulations."""

import pytest
import torch

from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.decoder_birefnet import DecoderBlock, LateralBlock
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
