"""Deformable convolution and the pyramid pooling built from it."""

import pytest
import torch
import torch.nn.functional as F

from birefnet.repository import hardware_birefnet
from birefnet.repository.deformable_birefnet import (
    ASPP,
    ASPPDeformable,
    DeformableConvolution,
    deformable_convolution,
)


def example(kernel_size, batch=2, channels=4, height=9, width=11, out_channels=5, dtype=torch.float32, spread=4.0):
    generator = torch.Generator().manual_seed(kernel_size)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    taps = kernel_size**2
    return (
        random(batch, channels, height, width),
        spread * random(batch, 2 * taps, height, width),
        random(batch, taps, height, width),
        random(out_channels, channels, kernel_size, kernel_size),
    )


def direct_formulation(hidden_states, offsets, modulator, weight):
    """Deformable convolution computed pixel by pixel."""
    batch, _, height, width = hidden_states.shape
    out_channels, _, kernel_size, _ = weight.shape
    modulation = 2 * torch.sigmoid(modulator)
    output = hidden_states.new_zeros(batch, out_channels, height, width)

    def pixel(b, row, column):
        inside = 0 <= row < height and 0 <= column < width
        return hidden_states[b, :, row, column] if inside else torch.zeros_like(hidden_states[b, :, 0, 0])

    for b in range(batch):
        for row in range(height):
            for column in range(width):
                for tap in range(kernel_size**2):
                    y = row + tap // kernel_size - kernel_size // 2 + offsets[b, 2 * tap, row, column].item()
                    x = column + tap % kernel_size - kernel_size // 2 + offsets[b, 2 * tap + 1, row, column].item()
                    y0, x0 = int(y // 1), int(x // 1)
                    sample = sum(
                        (1 - abs(y - i)) * (1 - abs(x - j)) * pixel(b, i, j)
                        for i in (y0, y0 + 1)
                        for j in (x0, x0 + 1)
                    )
                    kernel = weight[:, :, tap // kernel_size, tap % kernel_size]
                    output[b, :, row, column] += modulation[b, tap, row, column] * (kernel @ sample)
    return output


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_deformable_convolution_equals_the_direct_formulation(kernel_size):
    arguments = example(kernel_size, batch=1, height=5, width=6, dtype=torch.float64)
    found = deformable_convolution(*arguments)
    assert (found - direct_formulation(*arguments)).abs().max() < 1e-12


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
def test_deformable_convolution_equals_torchvision(kernel_size):
    ops = pytest.importorskip("torchvision.ops", reason="compares with torchvision's operator")
    hidden_states, offsets, modulator, weight = example(kernel_size)
    expected = ops.deform_conv2d(
        hidden_states, offsets, weight, padding=kernel_size // 2, mask=2 * modulator.sigmoid()
    )
    found = deformable_convolution(hidden_states, offsets, modulator, weight)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_zero_offsets_and_modulator_give_an_ordinary_convolution():
    hidden_states, offsets, modulator, weight = example(3)
    found = deformable_convolution(hidden_states, 0 * offsets, 0 * modulator, weight)
    assert torch.allclose(found, F.conv2d(hidden_states, weight, padding=1), atol=1e-5)


def test_sampling_locations_outside_the_map_count_as_zero():
    hidden_states, offsets, modulator, weight = example(1)
    far = torch.full_like(offsets, 1e30)
    assert (deformable_convolution(hidden_states, far, modulator, weight) == 0).all()
    assert (deformable_convolution(hidden_states, -far, modulator, weight) == 0).all()


def test_nan_offsets_give_nan_and_read_nothing_outside_the_map():
    hidden_states, offsets, modulator, weight = example(1)
    offsets[0, 0, 1, 2] = torch.nan
    found = deformable_convolution(hidden_states, offsets, modulator, weight)
    assert found[0, :, 1, 2].isnan().all() and found.isnan().sum() == found.shape[1]


def test_deformable_convolution_is_differentiable():
    hidden_states, offsets, modulator, weight = example(
        3, batch=1, channels=2, height=4, width=3, out_channels=2, dtype=torch.float64, spread=0.3
    )
    offsets = offsets.clamp(-0.4, 0.4) + 0.5  # not at whole pixels, where bilinear sampling has no derivative
    inputs = [tensor.detach().requires_grad_() for tensor in (hidden_states, offsets, modulator, weight)]
    assert torch.autograd.gradcheck(deformable_convolution, inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: (2, 4, 9, 11)}, "offsets have shape"),
        ({2: (2, 3, 9, 11)}, "modulator have shape"),
        ({3: (5, 3, 3, 3)}, "weight of shape"),
        ({3: (5, 4, 2, 2)}, "odd k"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    arguments = list(example(3))
    for index, shape in change.items():
        arguments[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        deformable_convolution(*arguments)


@pytest.mark.parametrize("pyramid", [ASPP, ASPPDeformable])
def test_pyramid_pooling_equals_the_direct_formulation_with_any_tile_size(pyramid, monkeypatch):
    torch.manual_seed(0)
    module = pyramid(6).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    hidden_states = torch.randn(2, 6, 13, 10)

    branches = [F.relu(branch.bn(branch.atrous_conv(hidden_states))) for branch in module.branches()]
    pooled = module.global_avg_pool(hidden_states).expand(-1, -1, 13, 10)
    expected = F.relu(module.bn1(module.conv1(torch.cat([*branches, pooled], dim=1))))
    assert (module(hidden_states) - expected).abs().max() < 1e-5 * expected.abs().max()

    monkeypatch.setattr(hardware_birefnet, "CPU_TILE_BYTES", 1)  # one row per tile
    assert (module(hidden_states) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_offsets_and_modulator_equal_their_own_convolutions():
    torch.manual_seed(0)
    module, hidden_states = DeformableConvolution(3, 4, 3), torch.randn(1, 3, 5, 6)
    offsets, modulator = module.offsets_and_modulator(hidden_states)
    assert torch.allclose(offsets, module.offset_conv(hidden_states), atol=1e-6)
    assert torch.allclose(modulator, module.modulator_conv(hidden_states), atol=1e-6)
