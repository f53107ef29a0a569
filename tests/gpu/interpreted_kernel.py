"""The Triton kernel under Triton's interpreter, on a CPU. `test_kernel.py` runs this file in a process of its own."""

import pytest
import torch
import triton

from birefnet.repository import deformable_triton_birefnet, hardware_birefnet
from birefnet.repository.deformable_birefnet import (
    ASPPDeformable,
    DeformableBranch,
    DeformableConvolution,
    ZeroInitializedConvolution,
    deformable_convolution,
)
from birefnet.repository.deformable_triton_birefnet import Tiling, convolve_in_triton


SMALL_TILES = Tiling(pixels=16, out_channels=16, warps=1, stages=1)


def example(kernel_size, batch=2, channels=4, height=5, width=6, out_channels=5, dtype=torch.float32, spread=4.0):
    generator = torch.Generator().manual_seed(kernel_size)
    taps = kernel_size**2
    shapes = [(batch, channels, height, width), (batch, 2 * taps, height, width), (batch, taps, height, width)]
    shapes.append((out_channels, channels, kernel_size, kernel_size))
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    operands[1] *= spread
    return [operand.to(dtype) for operand in operands]


def error(found, exact):
    """Largest error, as a share of the largest value."""
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.fixture
def on_cpus(monkeypatch):
    """Deformable convolutions on CPUs run the kernel. Counts its calls."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return convolve_in_triton(*arguments)

    monkeypatch.setattr(deformable_triton_birefnet, "convolve_in_triton", counted)
    monkeypatch.setattr(hardware_birefnet, "TRITON_DEVICES", ("cpu",))
    return calls


def test_the_interpreter_runs():
    assert triton.knobs.runtime.interpret


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_values_are_as_exact_as_those_of_the_pytorch_path(kernel_size, dtype):
    operands = example(kernel_size, dtype=dtype)
    exact = deformable_convolution(*(operand.double() for operand in operands))
    found = convolve_in_triton(*operands)
    assert found.dtype == dtype and found.shape == exact.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    pytorch_error = error(deformable_convolution(*operands), exact)
    # The interpreter cuts the last digits of a bfloat16 off, where a GPU rounds it.
    tolerance = {torch.float32: 1e-6, torch.float16: 1.2 * pytorch_error, torch.bfloat16: 3 * pytorch_error}[dtype]
    assert error(found, exact) < tolerance


@pytest.mark.parametrize(
    "sizes",
    [
        {"channels": 70, "out_channels": 5},  # two tiles of channels, the second one not full
        {"channels": 3, "out_channels": 37},  # three tiles of output channels
        {"batch": 3, "height": 1, "width": 7},
        {"batch": 1, "height": 9, "width": 2},
    ],
)
def test_sizes_that_do_not_fill_the_tiles(sizes):
    operands = example(1, **sizes)
    bias = torch.arange(operands[3].shape[0]).float()
    exact = deformable_convolution(*(operand.double() for operand in (*operands, bias)))
    assert error(convolve_in_triton(*operands, bias, tiling=SMALL_TILES), exact) < 1e-6


def test_any_memory_layout():
    hidden_states, offsets, modulator, weight = example(3)
    both = torch.cat([offsets, modulator], dim=1).contiguous(memory_format=torch.channels_last)
    offsets_view, modulator_view = both.split([18, 9], dim=1)  # as the network passes them
    expected = convolve_in_triton(hidden_states, offsets, modulator, weight)
    channels_last = hidden_states.contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve_in_triton(channels_last, offsets_view, modulator_view, weight), expected)


@pytest.mark.parametrize("offset", [-1e30, -8, -7.5, -1, -0.5, 0, 0.25, 1, 6, 7.5, 8, 1e30])
def test_borders(offset):
    """The same offset everywhere moves samples over each border of the map, onto it and far beyond it."""
    hidden_states, offsets, modulator, weight = example(1)
    offsets = torch.full_like(offsets, offset)
    expected = deformable_convolution(hidden_states, offsets, modulator, weight)
    assert (convolve_in_triton(hidden_states, offsets, modulator, weight) - expected).abs().max() < 1e-5


def test_nan_offsets_give_nan_at_their_pixel_only():
    hidden_states, offsets, modulator, weight = example(1)
    offsets[0, 0, 1, 2] = torch.nan
    found = convolve_in_triton(hidden_states, offsets, modulator, weight)
    assert found[0, :, 1, 2].isnan().all() and found.isnan().sum() == found.shape[1]


def test_branch_with_norm_and_epilogue(on_cpus):
    torch.manual_seed(0)
    branch, maps, fusion = DeformableBranch(4, 6, 3).eval(), torch.randn(2, 4, 5, 6), torch.randn(3, 6, 1, 1)
    for convolution in (branch.atrous_conv.offset_conv, branch.atrous_conv.modulator_conv):
        torch.nn.init.normal_(convolution.weight)
    with torch.inference_mode():
        found = branch(maps, fusion)
        hardware_birefnet.TRITON_DEVICES = ()
        assert (found - branch(maps, fusion)).abs().max() < 1e-5
    assert len(on_cpus) == 1


def test_gradients_are_those_of_the_pytorch_path(on_cpus):
    torch.manual_seed(0)
    layer, maps = DeformableConvolution(4, 5, 3), torch.randn(2, 4, 5, 6)
    gradients = []
    for devices in (("cpu",), ()):
        hardware_birefnet.TRITON_DEVICES = devices
        layer.zero_grad()
        layer(maps).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert all(map(torch.equal, *gradients)) and not on_cpus
    assert not hardware_birefnet.runs_triton(maps.double())


def test_pyramid_pooling(on_cpus):
    torch.manual_seed(0)
    pooling, maps = ASPPDeformable(8).eval(), torch.randn(1, 8, 4, 3)
    for module in pooling.modules():
        if isinstance(module, ZeroInitializedConvolution):
            torch.nn.init.normal_(module.weight, std=0.3)
    with torch.inference_mode():
        found = pooling(maps)
        hardware_birefnet.TRITON_DEVICES = ()
        expected = pooling(maps)
    assert len(on_cpus) == 4
    assert (found - expected).abs().max() < 1e-5 * expected.std()
