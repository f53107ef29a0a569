"""Parts of the Swin backbone against plain formulations."""

import pytest
import torch
import torch.nn.functional as F

from birefnet.repository import layers_birefnet
from birefnet.repository.backbone_birefnet import (
    DropPath,
    PatchMerging,
    SwinBlock,
    SwinTransformer,
    order_windows,
    relative_position_index,
)
from birefnet.repository.configuration_birefnet import BiRefNetConfig


def test_relative_position_index_equals_its_definition():
    size = 3
    index = relative_position_index(size)
    for query in range(size * size):
        for key in range(size * size):
            rows, columns = query // size - key // size, query % size - key % size
            assert index[query, key] == (rows + size - 1) * (2 * size - 1) + columns + size - 1


def partition_windows(hidden_states, size):
    """(B, H, W, C) → (B·H/size·W/size, size², C)"""
    batch, height, width, channels = hidden_states.shape
    windows = hidden_states.view(batch, height // size, size, width // size, size, channels).transpose(2, 3)
    return windows.reshape(-1, size * size, channels)


def merge_windows(windows, shape):
    """Undoes `partition_windows` for a map of `shape` (B, H, W, C)."""
    batch, height, width, channels = shape
    size = int(windows.shape[1] ** 0.5)
    windows = windows.view(batch, height // size, width // size, size, size, channels)
    return windows.transpose(2, 3).reshape(shape)


def test_tokens_are_ordered_by_window():
    order = order_windows((2, 4, 6), 2, 0, torch.zeros(()))
    assert order.is_token is None and order.groups == [(12, None)]
    assert order.tokens.view(12, 4)[1].tolist() == [2, 3, 8, 9]  # rows 0 and 1, columns 2 and 3 of the first map
    assert order.tokens[order.places].tolist() == list(range(48))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(11, 14), (5, 10), (3, 4)])
def test_every_token_has_one_place_and_the_rest_is_padding(shift, size):
    order = order_windows((2, *size), 5, shift, torch.zeros(()))
    numbers = torch.arange(2 * size[0] * size[1])
    assert torch.equal(order.tokens[order.places], numbers)
    real = numbers.new_zeros(len(order.tokens)).index_fill_(0, order.places, 1)
    if order.is_token is None:
        assert real.all()
    else:
        assert torch.equal(order.is_token.flatten(), real.float())
    assert 25 * sum(number for number, _ in order.groups) == len(order.tokens)


def attention_with_an_expanded_mask(block, hidden_states):
    """Shifted window attention as published: one mask for every window of the rolled map."""
    batch, height, width, dimension = hidden_states.shape
    size, shift = block.attn.window_size, block.shift
    padded = F.pad(hidden_states, (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = padded.shape[1:3]
    region = torch.zeros(1, rows, columns, 1)
    cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None)) if shift else (slice(None),)
    for i, row in enumerate(cuts):
        for j, column in enumerate(cuts):
            region[:, row, column] = 3 * i + j
    padded = torch.roll(padded, (-shift, -shift), dims=(1, 2))
    windows, regions = partition_windows(padded, size), partition_windows(region, size).squeeze(-1)
    number, heads = len(windows), block.attn.num_heads
    query, key, value = block.attn.qkv(windows).view(number, size**2, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + block.attn.relative_position_bias()
    differ = (regions[:, :, None] != regions[:, None, :]).repeat(batch, 1, 1)
    attended = scores.masked_fill(differ[:, None], float("-inf")).softmax(-1) @ value
    merged = merge_windows(attended.transpose(1, 2).reshape(number, size**2, dimension), padded.shape)
    return torch.roll(merged, (shift, shift), dims=(1, 2))[:, :height, :width]


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(11, 14), (5, 10), (3, 4)])
@pytest.mark.parametrize("tile", [layers_birefnet.CPU_TILE_BYTES, 1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_block_equals_the_formulation_with_one_mask_per_window(attention, tile, shift, size, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(layers_birefnet, "CPU_TILE_BYTES", tile)  # 1: one window, and one token, at a time
    config = BiRefNetConfig(attn_implementation=attention)
    block = SwinBlock(config, dimension=64, num_heads=2, window_size=5, shift=shift, drop_path_rate=0.0).eval()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    hidden_states = torch.randn(2, *size, 64)
    with torch.no_grad():
        found = block(hidden_states.flatten(0, 2), order_windows((2, *size), 5, shift, hidden_states))
        attended = attention_with_an_expanded_mask(block, block.norm1(hidden_states))
        expected = hidden_states + block.attn.proj(attended)
        expected = expected + block.mlp(block.norm2(expected))
    assert (found.view_as(expected) - expected).abs().max() < 1e-5


def test_patch_merging_pads_odd_sizes_and_orders_the_phases():
    module = PatchMerging(1)
    module.norm = module.reduction = torch.nn.Identity()
    merged = module(torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).view(1, 3, 3, 1))
    assert merged[0, 0, 0].tolist() == [1, 4, 2, 5]  # (0,0), (1,0), (0,1), (1,1)
    assert merged[0, 1, 1].tolist() == [9, 0, 0, 0]


def test_drop_path_keeps_the_expectation_and_is_off_in_evaluation():
    torch.manual_seed(0)
    module = DropPath(0.25)
    dropped = module(torch.ones(4000 * 3, 2), batch=4000).view(4000, 6)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(dropped, dropped[:, :1].expand(-1, 6))  # a sample is dropped or kept as a whole
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(module.eval()(torch.ones(4, 2), batch=4), torch.ones(4, 2))


def test_stochastic_depth_rises_linearly_over_the_blocks():
    with torch.device("meta"):
        backbone = SwinTransformer(BiRefNetConfig(backbone="swin_v1_t", drop_path_rate=0.22))
    rates = [block.drop_path.rate for stage in backbone.layers for block in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)])
    shifts = [block.shift for stage in backbone.layers for block in stage.blocks]
    assert shifts == [0, 3] * 6


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the processor has no arithmetic for bfloat16")
def test_weights_laid_out_once_give_the_very_same_products(monkeypatch):
    """Without gradients, in bfloat16, oneDNN's own operator takes the place of `F.linear`."""
    hidden_states = torch.randn(300, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = torch.nn.Linear(96, 40).bfloat16()
    expected = layer(hidden_states)
    with torch.no_grad():
        product = layers_birefnet.layer_for_tiles(layer)
        monkeypatch.setattr(torch.nn.functional, "linear", None)  # which is no longer called
        torch.testing.assert_close(product(hidden_states), expected, rtol=0, atol=0)
        torch.testing.assert_close(product(hidden_states.view(3, 100, 96)), expected.view(3, 100, 40), rtol=0, atol=0)


def test_what_stands_in_place_of_a_linear_layer_is_called_itself():
    layer, seen = torch.nn.Linear(8, 8).bfloat16(), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        layers_birefnet.layer_for_tiles(layer)(torch.ones(2, 8, dtype=torch.bfloat16))
    assert len(seen) == 1
    assert layers_birefnet.layer_for_tiles(torch.nn.Identity()).__class__ is torch.nn.Identity


def draw_windows(number, heads, tokens, dtype):
    """Queries, keys, values as a linear layer leaves them, and a bias."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(number, tokens, 3, heads, 32, generator=generator).to(dtype)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), torch.randn(1, heads, tokens, tokens, generator=generator).to(dtype)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the processor has no arithmetic for bfloat16")
@pytest.mark.parametrize(("number", "windows_at_once"), [(7, 3), (4, 9), (2, 0.5)])
def test_attention_in_bfloat16_is_about_as_exact_as_the_operators(monkeypatch, number, windows_at_once):
    query, key, value, bias = draw_windows(number, 3, 49, torch.bfloat16)
    maps = [part.float() for part in (query, key, value, bias)]
    scores = maps[0] @ maps[1].transpose(2, 3) * 32**-0.5 + maps[3]
    expected = scores.softmax(-1) @ maps[2]
    operator = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    monkeypatch.setattr(layers_birefnet, "CPU_TILE_BYTES", int(windows_at_once * 4 * 3 * 49**2))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # which is not called
    with torch.no_grad():
        found = layers_birefnet.attention(query, key, value, bias)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    errors = [(result.float() - expected).abs().mean() for result in (found, operator)]
    assert errors[0] < 2.5 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_with_gradients_is_the_operator(dtype):
    query, key, value, bias = draw_windows(2, 3, 49, dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    torch.testing.assert_close(layers_birefnet.attention(query, key, value, bias), expected, rtol=0, atol=0)
    bias.requires_grad_()
    layers_birefnet.attention(query, key, value, bias).sum().backward()
    assert bias.grad.abs().sum() > 0
