"""The benchmark's own formulation of the network, its arithmetic, and its scripts on a minute case."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.deformable_birefnet import DeformableConvolution, deformable_convolution


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Imports a module of the benchmarks as their scripts do, from their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def lite(benchmark):
    return benchmark("subjects").load_model("lite", "float32", "cpu")


@pytest.mark.parametrize("shape", [(2, 3, 64, 128), (1, 3, 256, 96)])
def test_plain_formulation_equals_the_project(benchmark, lite, shape):
    plain_logits = benchmark("plain_formulation").plain_logits
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = plain_logits(lite, pixel_values), lite(pixel_values).logits
    assert expected.shape == (shape[0], 1, *shape[2:])
    assert (found - expected).abs().max() < 2e-5 * expected.std()


def test_plain_formulation_refuses_other_networks(benchmark):
    model = argparse.Namespace(config=BiRefNetConfig(decoder_block="residual"))
    with pytest.raises(ValueError, match="decoder_block='residual'"):
        benchmark("plain_formulation").plain_logits(model, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_both_plain_deformable_convolutions_equal_the_project(benchmark, kernel_size, monkeypatch):
    plain = benchmark("plain_formulation")
    torch.manual_seed(0)
    layer = DeformableConvolution(4, 5, kernel_size)
    maps = torch.randn(2, 4, 9, 7)
    with torch.inference_mode():
        offsets, modulation = layer.offsets_and_modulation(maps)
        weight = layer.regular_conv.weight
        expected = deformable_convolution(maps, offsets, modulation, weight).permute(0, 3, 1, 2)
        assert (plain.deformable_convolution(layer, maps) - expected).abs().max() < 1e-5
        monkeypatch.setattr(plain, "deform_conv2d", None)
        assert (plain.deformable_convolution(layer, maps) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("backbone", "gflop"), [("swin_v1_t", 642), ("swin_v1_l", 2535)])
def test_counted_arithmetic(benchmark, backbone, gflop):
    """The count of the plain formulation at 1024² that the network's description states."""
    counted = benchmark("roofline").count_flop(BiRefNetConfig(backbone=backbone), 1, 1024)
    assert counted / 1e9 == pytest.approx(gflop, rel=0.005)
