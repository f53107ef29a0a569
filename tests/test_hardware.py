"""Functions for particular processors against PyTorch's own operators, each branch forced."""

import pytest
import torch
import torch.nn.functional as F

from birefnet.inference.quantization import Int8Arithmetic
from birefnet.repository import hardware_birefnet as hardware
from birefnet.repository.backbone_birefnet import WindowAttention
from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.layers_birefnet import convolve


needs_bfloat16 = pytest.mark.skipif(
    not hardware.has_avx512_bfloat16(), reason="this processor has no bfloat16 arithmetic"
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_tiles_cover_all_rows_and_fit_the_cache(dtype, monkeypatch):
    monkeypatch.setattr(hardware, "CPU_TILE_BYTES", 400)
    tiles = hardware.row_tiles(10, 25, torch.empty(0, dtype=dtype))
    rows = 4 if dtype == torch.float32 else 8  # of 25 numbers in 400 bytes
    assert tiles == [slice(first, min(first + rows, 10)) for first in range(0, 10, rows)]
    assert hardware.row_tiles(3, 1000, torch.empty(0)) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_row_tiles_of_other_devices_and_of_graphs_have_their_own_size(monkeypatch):
    on_meta = torch.empty(0, device="meta")
    assert hardware.row_tiles(10, 25, on_meta) == [slice(0, 10)]
    assert hardware.row_tiles(10, 25, on_meta, other_bytes=500) == [slice(0, 5), slice(5, 10)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(hardware, "CPU_TILE_BYTES", 1)
    assert hardware.row_tiles(10, 25, torch.empty(0)) == [slice(0, 10)]


@pytest.mark.parametrize("with_gradients", [True, False])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [2, 7])
def test_concatenated_tiles_equal_the_whole(with_gradients, dim, size):
    whole = random(7, 7)
    with torch.set_grad_enabled(with_gradients):
        found = hardware.concatenate_tiles(iter(whole.split(size, dim)), 7, dim)
    assert torch.equal(found, whole)


# bfloat16


@needs_bfloat16
def test_prepacked_weights_give_equal_products(monkeypatch):
    hidden_states, layer = random(300, 96).bfloat16(), torch.nn.Linear(96, 40).bfloat16()
    expected = layer(hidden_states)
    with torch.no_grad():
        product = hardware.prepack_layer(layer, like=hidden_states)
        monkeypatch.setattr(F, "linear", None)  # must not be called
        assert torch.equal(product(hidden_states), expected)
        assert torch.equal(product(hidden_states.view(3, 100, 96)), expected.view(3, 100, 40))


@pytest.mark.parametrize("reason", ["processor", "dtype", "gradients", "graph", "int8"])
def test_weights_are_not_prepacked_where_the_operator_is_missing(monkeypatch, reason):
    monkeypatch.setattr(hardware, "has_avx512_bfloat16", lambda: reason != "processor")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: reason == "graph")
    monkeypatch.setattr(hardware, "is_replaced", lambda: reason == "int8")
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)  # must not be called
    dtype = torch.float32 if reason == "dtype" else torch.bfloat16
    layer, hidden_states = torch.nn.Linear(8, 4).to(dtype), random(3, 8).to(dtype)
    with torch.set_grad_enabled(reason == "gradients"):
        assert torch.equal(hardware.prepack_layer(layer, hidden_states)(hidden_states), layer(hidden_states))


def test_layers_with_hooks_and_other_layers_are_called_themselves():
    layer, seen = torch.nn.Linear(8, 8).bfloat16(), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        tile = torch.ones(2, 8, dtype=torch.bfloat16)
        hardware.prepack_layer(layer, like=tile)(tile)
    assert len(seen) == 1
    identity = torch.nn.Identity()
    assert hardware.prepack_layer(identity, like=tile) is identity


def test_int8_replaces_linear_and_converted_weights_do_not():
    assert not hardware.is_replaced()
    with hardware.ConvertedWeights(torch.float16, torch.bfloat16):
        assert not hardware.is_replaced()
        with Int8Arithmetic():
            assert hardware.is_replaced()


def draw_windows(number, heads, tokens, dtype):
    """Queries, keys and values with the strides that a linear layer gives them, and a bias."""
    qkv = random(number, tokens, 3, heads, 32).to(dtype)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), random(1, heads, tokens, tokens, seed=1).to(dtype)


@pytest.mark.parametrize(("number", "windows_per_tile"), [(7, 3), (4, 9), (2, 0.5)])
def test_attention_with_batched_products_is_as_exact_as_the_operator(monkeypatch, number, windows_per_tile):
    query, key, value, bias = draw_windows(number, 3, 49, torch.bfloat16)
    exact = F.scaled_dot_product_attention(*(maps.float() for maps in (query, key, value)), attn_mask=bias.float())
    operator = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    monkeypatch.setattr(hardware, "CPU_TILE_BYTES", int(windows_per_tile * 4 * 3 * 49**2))
    with torch.no_grad():
        found = hardware.attend_with_batched_products(query, key, value, bias)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    errors = [(result.float() - exact).abs().mean() for result in (found, operator)]
    assert errors[0] < 2.5 * errors[1]


@pytest.mark.parametrize(
    ("dtype", "has_arithmetic", "with_gradients", "is_batched"),
    [
        (torch.bfloat16, True, False, True),
        (torch.bfloat16, True, True, False),
        (torch.bfloat16, False, False, False),
        (torch.float32, True, False, False),
    ],
)
def test_window_attention_chooses_its_operator(monkeypatch, dtype, has_arithmetic, with_gradients, is_batched):
    monkeypatch.setattr(hardware, "has_avx512_bfloat16", lambda: has_arithmetic)
    replaced = "scaled_dot_product_attention" if is_batched else "softmax"
    monkeypatch.setattr(F if is_batched else torch, replaced, None)  # the other one must not be called
    attention = WindowAttention(BiRefNetConfig(attn_implementation="sdpa"), 64, num_heads=2, window_size=3).to(dtype)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    windows = random(5 * 9, 64).to(dtype)
    with torch.set_grad_enabled(with_gradients):
        heads = attention.split_heads(windows, attention.qkv)
        found = attention.attend(*heads, attention.relative_position_bias())
    assert found.shape == (45, 64) and found.isfinite().all()
    if with_gradients:
        found.sum().backward()
        assert attention.relative_position_bias_table.grad.abs().sum() > 0


# Convolutions that add and activate in one pass

ACTIVATIONS = [torch.nn.Identity(), torch.nn.ReLU(), torch.nn.ReLU6(), torch.nn.SiLU(), torch.nn.Hardswish()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"padding": (1, 1), "stride": (2, 1)}, {"dilation": (2, 2)}, {"groups": 4}])
@pytest.mark.parametrize("has_addend", [True, False])
def test_convolution_in_one_pass_equals_separate_passes(activation, memory, options, has_addend):
    maps = 5 * random(2, 8, 9, 7).to(memory_format=memory)
    weight, bias = random(12, 8 // options.get("groups", 1), 3, 3), random(12, seed=1)
    output = F.conv2d(maps, weight, bias, **options)
    addend = random(*output.shape, seed=2) if has_addend else torch.zeros(())
    expected = activation(output + addend)
    with torch.no_grad():
        assert hardware.can_fuse(maps, activation) == (type(activation) in hardware.FUSED_ACTIVATIONS)
        found = hardware.convolve_and_activate(
            maps, weight, bias, activation, addend=addend.clone() if has_addend else None, **options
        )
    assert (found - expected).abs().max() < 1e-6 * output.abs().max()


def test_convolutions_are_separate_passes_where_one_pass_is_impossible(monkeypatch):
    maps, relu = random(1, 4, 5, 5), torch.nn.ReLU()
    weight = random(3, 4, 1, 1).requires_grad_()
    hardware.convolve_and_activate(maps, weight, None, relu).sum().backward()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert not hardware.can_fuse(maps.double(), relu) and not hardware.can_fuse(maps.half(), relu)
        with Int8Arithmetic():
            assert not hardware.can_fuse(maps, relu)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not hardware.can_fuse(maps, relu)


@pytest.mark.parametrize("gradients", [False, True])
def test_convolution_in_blocks_equals_the_operator(monkeypatch, gradients):
    monkeypatch.setattr(hardware, "CHANNELS_PER_BLOCK", 8)
    maps, weight, bias = random(2, 20, 6, 7), random(5, 20, 3, 3, seed=1), random(5, seed=2)
    with torch.set_grad_enabled(gradients):
        found = hardware.convolve_in_blocks(maps, weight, bias, padding=1)
    torch.testing.assert_close(found, F.conv2d(maps, weight, bias, padding=1), rtol=1e-5, atol=1e-4)


def test_convolution_in_blocks_converts_half_precision_weights(monkeypatch):
    monkeypatch.setattr(hardware, "CHANNELS_PER_BLOCK", 8)
    maps, weight, bias = random(2, 20, 6, 7), random(5, 20, 3, 3, seed=1).half(), random(5, seed=2).half()
    with torch.no_grad(), hardware.ConvertedWeights(torch.float16, torch.float32):
        found = hardware.convolve_in_blocks(maps, weight, bias, padding=1)
    expected = F.conv2d(maps, weight.float(), bias.float(), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "hidden", "out_channels", "expected"),
    [
        ((1, 48, 112, 112), 64, 5, True),  # the embedded network at 448²
        ((1, 192, 56, 56), 64, 14, False),
        ((1, 48, 256, 256), 64, 48, False),  # lite at 1024²
    ],
)
def test_two_convolutions_compose_to_few_channels(shape, hidden, out_channels, expected):
    maps = torch.empty(1).expand(shape)
    with torch.no_grad():
        assert hardware.composes_faster(maps, hidden, out_channels) == expected
        assert not hardware.composes_faster(torch.empty(shape, device="meta"), hidden, out_channels)
    assert not hardware.composes_faster(maps, hidden, out_channels)


# float32


@pytest.mark.parametrize(
    ("channels", "blocks"), [(100, [100]), (351, [351]), (352, [176, 176]), (400, [176, 176, 48])]
)
def test_long_sums_are_split(channels, blocks):
    assert [block.shape[1] for block in hardware.split_channels(torch.empty(1, channels, 2, 2))] == blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_convolution_of_parts_equals_that_of_their_concatenation(dtype):
    parts = [random(2, channels, 6, 5, seed=channels).to(dtype) for channels in (400, 90)]
    weight, bias = random(7, 490, 3, 3).to(dtype), random(7).to(dtype)
    expected = F.conv2d(torch.cat(parts, dim=1).double(), weight.double(), bias.double(), padding=1)
    assert hardware.loses_digits_in_long_sums(parts[0]) == (dtype == torch.float32)
    found = convolve(parts, weight, bias, padding=1)
    assert (found - expected).abs().max() < (1e-6 if dtype == torch.float32 else 1e-13) * expected.abs().max()


@pytest.mark.parametrize(
    ("width", "out_channels", "padding"),
    [(32, 1, 2), (48, 1, 1), (40, 1, 2), (37, 1, 2), (24, 5, 2), (28, 5, 2), (32, 9, 1)],
)
def test_convolution_to_few_channels_equals_the_operator(width, out_channels, padding):
    maps = random(2, 3, 20, width).to(memory_format=torch.channels_last)
    weight, bias = random(out_channels, 3, 2 * padding + 1, 2 * padding + 1, seed=1), random(out_channels, seed=2)
    with torch.no_grad():
        found = hardware.convolve_to_few_channels(maps, weight, bias, padding)
    torch.testing.assert_close(found, F.conv2d(maps, weight, bias, padding=padding))
