"""int8 on CPUs: operations against simulated quantization, whole networks against float32, the command line."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from birefnet.command_line import main
from birefnet.inference import quantization
from birefnet.inference.quantization import Int8Arithmetic, quantize
from birefnet.repository.configuration_birefnet import SWIN_BACKBONES, BiRefNetConfig
from birefnet.repository.hardware_birefnet import compute_plan
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

from .. import reference_weights
from ..conftest import TINY_CONFIG


REASON = quantization.obstacle(torch.device("cpu"))
needs_int8 = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def any_size(monkeypatch):
    """Use int8 at any size, because the networks of these tests are small."""
    monkeypatch.setattr(quantization, "MINIMUM_USES", 1)
    monkeypatch.setattr(quantization, "MINIMUM_MULTIPLICATIONS", 1)


def draw(*shape, seed=0):
    """Random numbers in [-127/32, 127/32], in steps of a quarter of the quantization step 1/32."""
    numbers = torch.randint(-508, 509, shape, generator=torch.Generator().manual_seed(seed)) / 4
    numbers.view(-1)[:2] = torch.tensor([-127.0, 127.0])
    return numbers / 32


def dequantized_activations(values):
    """The values after quantization and dequantization, in float64."""
    values = values.double().numpy()
    scale = (max(values.max(), 0) - min(values.min(), 0)) / 254
    return torch.from_numpy(np.floor(values / scale + 0.5) * scale)


def dequantized_weight(weight):
    weight = weight.double().numpy()
    scales = np.stack([np.abs(channel).max() for channel in weight]).reshape(-1, *[1] * (weight.ndim - 1)) / 127
    return torch.from_numpy(np.round(weight / scales) * scales)


def in_int8(function, *arguments, **options):
    """The result, and whether it was computed in int8."""
    with torch.no_grad(), Int8Arithmetic() as arithmetic:
        result = function(*arguments, **options)
    return result, len(arithmetic.prepacked) > 0


def assert_equal(found, expected, dtype):
    """Equal except for the rounding of sums in float32, or of results in bfloat16."""
    assert found.dtype == dtype
    assert found.shape == expected.shape
    allowed = 1e-5 * expected.std() + (2**-8 * expected.abs() if dtype == torch.bfloat16 else 0)
    assert ((found.double() - expected).abs() <= allowed).all()


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70, 40), (3, 5, 7, 40), (1, 40)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(any_size, dtype, shape, with_bias):
    rows, weight = draw(*shape).to(dtype), draw(24, 40, seed=1).to(dtype)
    bias = draw(24, seed=2).to(dtype) if with_bias else None
    found, was_int8 = in_int8(F.linear, rows, weight, bias)
    expected = F.linear(
        dequantized_activations(rows), dequantized_weight(weight), bias.double() if with_bias else None
    )
    assert was_int8
    assert_equal(found, expected, dtype)
    exact = F.linear(rows.double(), weight.double(), bias.double() if with_bias else None)
    assert 0 < (found - exact).std() < 0.02 * exact.std()


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [
        (16, 1, {}),
        (16, 3, {"padding": 1}),
        (3, 4, {"stride": 4}),
        (17, 3, {"stride": (2, 1), "padding": (0, 2), "dilation": 2}),
        (32, 7, {"padding": (3, 3), "stride": (1, 1)}),
    ],
)
def test_convolution(any_size, dtype, memory, channels, kernel, options):
    maps = draw(2, channels, 16, 12).to(dtype, memory_format=memory)
    weight, bias = draw(24, channels, kernel, kernel, seed=1).to(dtype), draw(24, seed=2).to(dtype)
    found, was_int8 = in_int8(F.conv2d, maps, weight, bias, **options)
    assert was_int8
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_equal(
        found, F.conv2d(dequantized_activations(maps), dequantized_weight(weight), bias.double(), **options), dtype
    )


@needs_int8
@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (F.conv2d, (draw(1, 8, 9, 9), draw(8, 1, 3, 3)), {"groups": 8}),
        (F.conv2d, (draw(1, 8, 9, 9), draw(8, 8, 3, 3)), {"padding": "same"}),
        (F.conv2d, (draw(8, 9, 9), draw(8, 8, 3, 3)), {}),
        (F.linear, (draw(9, 8).double(), draw(8, 8).double()), {}),
        (torch.matmul, (draw(9, 8), draw(8, 9)), {}),
        (F.linear, (torch.zeros(9, 8), draw(8, 8)), {}),
    ],
)
def test_other_operations_stay_in_floating_point(any_size, function, arguments, options):
    found, was_int8 = in_int8(function, *arguments, **options)
    assert not was_int8
    assert torch.equal(found, function(*arguments, **options))


@needs_int8
def test_small_operations_stay_in_floating_point():
    wide, narrow = draw(128, 128), draw(64, 64)
    cases = ((draw(2**12, 128), wide, True), (draw(2**18, 64), narrow, False), (draw(64, 128), wide, False))
    for rows, weight, expected in cases:
        assert in_int8(F.linear, rows, weight)[1] == expected


@needs_int8
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_propagate(any_size, bad):
    """NaN and infinity in activations or weights must not become ordinary numbers."""
    rows, weight = draw(70, 40), draw(24, 40, seed=1)
    rows[3, 5] = bad
    found, _ = in_int8(F.linear, rows, weight)
    assert torch.equal(found.isfinite(), F.linear(rows, weight).isfinite())
    assert found[3].isfinite().sum() == 0 and found[4:].isfinite().all()
    rows, weight[3, 5] = draw(70, 40), bad
    found, _ = in_int8(F.linear, rows, weight)
    assert found[:, 3].isnan().all() and found[:, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(-3, 5, 999),
        torch.linspace(2, 5, 999),
        torch.linspace(-5, -2, 999),
        torch.linspace(0, 1, 999),
        torch.linspace(-1e-20, 1e30, 999),
        torch.linspace(-1e-34, 1e-34, 999),
        torch.full((5,), 7.0),
        torch.linspace(-3, 5, 2 * quantization.BLOCK_SIZE + 6).view(2, -1),
    ],
)
def test_quantization_of_activations(values, dtype):
    values = values.to(dtype)
    levels, scale, zero_point = quantization.quantize_activations(values)
    assert levels.dtype == torch.uint8 and 1 <= zero_point <= 255
    error = (scale * (levels.double() - zero_point) - values.double()).abs()
    assert error.max() <= 0.5001 * scale
    assert scale == pytest.approx((max(values.max().item(), 0) - min(values.min().item(), 0)) / 254)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, float("nan")], [float("inf"), 0.0], [-float("inf")], [1e-43]])
def test_activations_that_cannot_be_quantized(values):
    assert quantization.quantize_activations(torch.tensor(values)) is None


@needs_int8
def test_a_weight_is_quantized_once_and_again_after_a_change(any_size):
    rows, weight = draw(70, 40), draw(24, 40, seed=1)
    with torch.no_grad(), Int8Arithmetic() as arithmetic:
        product, packed = F.linear(rows, weight), arithmetic.prepacked[weight]
        assert torch.equal(F.linear(rows, weight), product)
        assert arithmetic.prepacked[weight] is packed
        weight *= 2
        assert torch.equal(F.linear(rows, weight), 2 * product)
        assert arithmetic.prepacked[weight] is not packed
        del weight
        assert len(arithmetic.prepacked) == 0


@pytest.fixture
def small_network():
    return BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG | {"backbone": "swin_v1_t"}))


@pytest.fixture
def tiny_swin(monkeypatch):
    """A whole network with every kind of layer, on a Swin of 32 channels and five blocks."""
    monkeypatch.setitem(SWIN_BACKBONES, "swin_v1_t", (32, (1, 1, 2, 1), (1, 2, 4, 8), 7))
    model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone="swin_v1_t"))
    manifest = {key: (tuple(value.shape), str(value.dtype)[6:]) for key, value in model.state_dict().items()}
    model.load_state_dict(reference_weights.state_dict(manifest), strict=False)
    return model.eval()


@needs_int8
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_network_is_close_to_float32(any_size, tiny_swin, dtype):
    pixel_values = reference_weights.image("int8", 1, 128, 192)
    with torch.inference_mode():
        expected = tiny_swin(pixel_values).logits
    model = quantize(tiny_swin.to(dtype))
    found = model(pixel_values)
    assert found.logits.dtype == dtype and not found.logits.requires_grad
    difference = (found.logits.double() - expected).std() / expected.std()
    assert 1e-4 < difference < 0.1
    with torch.inference_mode():
        assert torch.equal(model(pixel_values, return_dict=False)[0], found.logits)


@needs_int8
def test_a_network_accepts_images_of_zeros(any_size, tiny_swin):
    zeros = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        expected = tiny_swin(zeros).logits
    assert (quantize(tiny_swin)(zeros).logits - expected).std() < 0.1 * expected.std()


@needs_int8
def test_a_network_propagates_nan(any_size, small_network):
    pixel_values = torch.zeros(1, 3, 64, 64)
    pixel_values[0, 0, 7, 9] = float("nan")
    assert quantize(small_network.eval())(pixel_values).logits.isnan().any()


@needs_int8
def test_a_copy_uses_its_own_weights(any_size, tiny_swin):
    pixel_values = reference_weights.image("int8", 1, 64, 64)
    model = quantize(tiny_swin)
    expected = model(pixel_values).logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.decoder.parameters():
            parameter.zero_()
    assert other(pixel_values).logits.count_nonzero() == 0
    assert torch.equal(model(pixel_values).logits, expected)


@needs_int8
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.train(), "cannot be trained"),
        (lambda model: model.half(), "bfloat16 or float32, not in torch.float16"),
        (lambda model: model.double(), "bfloat16 or float32, not in torch.float64"),
        (lambda model: model.to("meta"), "int8 is for CPUs; on meta use"),
    ],
)
def test_models_that_cannot_compute_in_int8(small_network, change, message):
    """The error is raised by `quantize`, and by calls of a model that has changed afterwards."""
    model = quantize(small_network.eval())
    change(model)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=message):
        quantize(model)


def test_processors_without_the_instructions(monkeypatch, small_network):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="int8 needs AVX-512 VNNI.*use float32 or bfloat16"):
        quantize(small_network.eval())


@pytest.fixture
def data(tmp_path):
    """Two photos in im/ with their masks in gt/."""
    for name in ("im", "gt"):
        (tmp_path / name).mkdir()
    for index in range(2):
        photo, mask = Image.new("RGB", (90, 70), (40, 90, 30 + 99 * index)), Image.new("L", (90, 70))
        for picture, colour in ((photo, (220, 60, 30)), (mask, 255)):
            ImageDraw.Draw(picture).ellipse((20, 10, 60 + 20 * index, 60), fill=colour)
        photo.save(tmp_path / "im" / f"{index}.png")
        mask.save(tmp_path / "gt" / f"{index}.png")
    return tmp_path


@needs_int8
def test_cutout_in_int8(any_size, tiny_model_folder, data):
    mattes = {}
    for dtype in ("float32", "int8"):
        options = ["--mask", "--model", str(tiny_model_folder), "--device", "cpu", "--dtype", dtype]
        assert main(["cutout", str(data / "im"), "-o", str(data / dtype), *options]) == 0
        mattes[dtype] = np.stack([np.asarray(Image.open(data / dtype / f"{index}.png")) for index in range(2)])
    difference = np.abs(mattes["int8"].astype(int) - mattes["float32"]).mean()
    assert 0 < difference < 255 * 0.03 < mattes["float32"].std()


@needs_int8
def test_evaluation_in_int8(any_size, tiny_model_folder, data):
    pytest.importorskip("py_sod_metrics", reason="evaluation needs the extra `evaluate`")
    result = data / "result.json"
    options = ["--model", str(tiny_model_folder), "--device", "cpu", "--dtype", "int8", "--json", str(result)]
    assert main(["evaluate", str(data), "--workers", "1", *options]) == 0
    between = str(compute_plan("cpu", torch.bfloat16).arithmetic).removeprefix("torch.")
    assert json.loads(result.read_text())["settings"]["dtype"] == f"int8 and {between}"


@pytest.mark.parametrize(
    ("device", "batch_size", "supported", "message"),
    [
        ("meta", 1, True, "--dtype int8: int8 is for CPUs; on meta use float16 or bfloat16"),
        ("cpu", 1, False, "--dtype int8: int8 needs AVX-512 VNNI"),
        ("cpu", 2, True, "--dtype int8 needs --batch-size 1"),
    ],
)
def test_wrong_arguments_have_clear_errors(monkeypatch, capsys, data, device, batch_size, supported, message):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: supported)
    options = ["--device", device, "--batch-size", str(batch_size), "--dtype", "int8"]
    assert main(["cutout", str(data / "im"), "-o", str(data / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (data / "out").exists()
