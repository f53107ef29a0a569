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


def random_offsets(module):
    """Gives a module's deformable convolutions, which start without offsets, some."""
    for layer in module.modules():
        if isinstance(layer, ZeroInitializedConvolution):
            torch.nn.init.normal_(layer.weight, std=0.3)
    return module


@pytest.mark.parametrize(
    ("make_module", "inputs", "calls"),
    [
        (lambda: DeformableBranch(4, 6, 3), ((2, 4, 5, 6), (3, 6, 1, 1)), 1),
        (lambda: ASPPDeformable(8), ((1, 8, 4, 3),), 4),
    ],
    ids=["branch", "pyramid pooling"],
)
def test_modules_are_as_exact_as_with_the_pytorch_path(on_cpus, make_module, inputs, calls):
    torch.manual_seed(0)
    module, inputs = random_offsets(make_module()).eval().half(), [torch.randn(shape).half() for shape in inputs]
    with torch.inference_mode():
        found = module(*inputs)
        hardware_birefnet.TRITON_DEVICES = ()
        pytorch = module(*inputs)
        exact = module.double()(*(tensor.double() for tensor in inputs))
    assert len(on_cpus) == calls
    assert error(found, exact) < 1.5 * error(pytorch, exact)


def test_gradients_are_those_of_the_pytorch_path(on_cpus):
    torch.manual_seed(0)
    layer, maps = random_offsets(DeformableConvolution(4, 5, 3)).half(), torch.randn(2, 4, 5, 6).half()
    gradients = []
    for devices in (("cpu",), ()):
        hardware_birefnet.TRITON_DEVICES = devices
        layer.zero_grad()
        layer(maps).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])
    assert all(map(torch.equal, *gradients)) and not on_cpus


@pytest.mark.parametrize(("dtype", "runs"), [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_the_kernel_runs_in_half_precision_without_gradients(on_cpus, dtype, runs):
    maps = torch.zeros(1, dtype=dtype)
    assert not hardware_birefnet.runs_triton(maps)
    with torch.no_grad():
        assert hardware_birefnet.runs_triton(maps) == runs
