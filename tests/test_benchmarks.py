"""The benchmark's own formulation of the network, its arithmetic, and its scripts on a minute case."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet.inference import quantization
from birefnet.inference.quantization import obstacle
from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.deformable_birefnet import DeformableConvolution
from birefnet.repository.hardware_birefnet import compute_plan
from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

from .conftest import TINY_CONFIG


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
        expected = layer(maps)
        assert (plain.deformable_convolution(layer, maps) - expected).abs().max() < 1e-5
        monkeypatch.setattr(plain, "deform_conv2d", None)
        assert (plain.deformable_convolution(layer, maps) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(("backbone", "gflop"), [("swin_v1_t", 642), ("swin_v1_l", 2535)])
def test_counted_arithmetic(benchmark, backbone, gflop):
    """The count of the plain formulation at 1024² that the network's description states."""
    counted = benchmark("roofline").count_flop(BiRefNetConfig(backbone=backbone), 1, 1024)
    assert counted / 1e9 == pytest.approx(gflop, rel=0.005)


def test_speed_measures_all_subjects_in_one_run(benchmark, lite, tmp_path, monkeypatch, capsys):
    speed = benchmark("speed")
    monkeypatch.setattr(speed, "load_model", lambda name, dtype, device: lite)
    monkeypatch.setattr(speed, "obstacle", lambda device: None)
    monkeypatch.setattr(speed, "peak_on_cpu", lambda subject, shape, threads: 2**30 * (1 + len(subject.kind)))
    files = {"--json": tmp_path / "new" / "speed.json", "--picture": tmp_path / "speed.png"}
    options = [
        "--models",
        "lite",
        "--sizes",
        "32",
        "--dtypes",
        "float32",
        "int8",
        "--device",
        "cpu",
        "--repeats",
        "2",
        "--peer",
        "missing",
    ]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options, *(str(item) for pair in files.items() for item in pair)])
    speed.main()

    result = json.loads(files["--json"].read_text())
    project, plain, published, in_int8 = result["rows"]
    assert [row["subject"] for row in result["rows"][:3]] == ["this project", "plain formulation", "published code"]
    assert (in_int8["subject"], in_int8["dtype"], len(in_int8["times"])) == ("this project", "int8", 2)
    assert len(project["times"]) == 2
    assert project["faster_than_plain"] == pytest.approx(plain["seconds"] / project["seconds"])
    rate = project["flop"] / project["seconds"] / project["matrix_product_rate"]
    assert project["roofline_percent"] == pytest.approx(100 * rate)
    assert project["matte_difference"] < 1e-6
    assert project["memory_percent_of_plain"] == pytest.approx(100 * 13 / 18)
    assert "seconds" not in published
    assert published["error"].startswith("ValueError: --peer missing")
    printed = capsys.readouterr().out
    assert "published code, float32: ValueError: --peer missing" in printed
    assert "% of roofline" in printed
    assert files["--picture"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "1000"], "--sizes: 1000 is not a multiple of 32"),
        (["--models", "lite", "--onnx", "missing.onnx"], "--onnx: no file missing.onnx"),
        (["--onnx", "missing.onnx"], "name the one model"),
        (["--batches", "0"], "at least 1"),
        (["--device", "cuda", "--dtypes", "int8"], "--dtypes: int8 is for CPUs"),
    ],
)
def test_speed_refuses_wrong_options(benchmark, options, message, capsys):
    with pytest.raises(SystemExit):
        benchmark("speed").parse_arguments(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("device", "expected"), [("cpu", ["int8"]), ("cuda", ["float16"])])
def test_default_dtypes_are_those_of_the_device(benchmark, device, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert benchmark("speed").parse_arguments(["--device", device]).dtypes == ["float32", "bfloat16", *expected]
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert "int8" not in benchmark("speed").parse_arguments(["--device", device]).dtypes


@pytest.mark.skipif(obstacle(torch.device("cpu")) is not None, reason=str(obstacle(torch.device("cpu"))))
def test_a_model_in_int8(benchmark, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(quantization, "MINIMUM_MULTIPLICATIONS", 1)
    subjects, pixel_values = benchmark("subjects"), torch.randn(1, 3, 64, 64)
    logits = {
        dtype: subjects.Subject(subjects.PROJECT, str(tiny_model_folder), dtype, "cpu").build()(pixel_values)
        for dtype in ("float32", "int8")
    }
    difference = (logits["int8"] - logits["float32"]).std() / logits["float32"].std()
    assert 1e-3 < difference < 0.1
    assert logits["int8"].dtype == compute_plan("cpu", torch.bfloat16).arithmetic


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only, by its /proc")
def test_memory_of_a_subject_that_fails_is_an_error(benchmark):
    subject = benchmark("subjects").Subject("onnx", "lite", "float32", "cpu", "missing.onnx")
    with pytest.raises(RuntimeError, match="onnx"):
        benchmark("memory").peak_on_cpu(subject, (1, 3, 32, 32), threads=1)


def test_end_to_end_gives_drawn_weights_the_matte_of_the_drawn_disc(benchmark, tmp_path):
    end_to_end = benchmark("end_to_end")
    outputs = end_to_end.see_the_disc(None, (), SimpleNamespace(logits=torch.zeros(2, 1, 320, 320)))
    [file] = end_to_end.draw_photos(tmp_path, 1, 0.1, 0.1)
    matte = BiRefNetImageProcessor().post_process_alpha_matte(outputs, [Image.open(file).size[::-1]] * 2)[1]
    rows, columns = torch.meshgrid(*(torch.arange(side) - side / 2 for side in matte.shape), indexing="ij")
    disc = torch.hypot(rows, columns) < matte.shape[0] / 3
    assert ((matte > 0.5) == disc).float().mean() > 0.99
    assert ((matte > 0.02) & (matte < 0.98)).float().mean() < 0.1


def test_end_to_end_accounts_for_every_stage(benchmark, tiny_model_folder, tmp_path, monkeypatch, capsys):
    end_to_end = benchmark("end_to_end")
    file = tmp_path / "result.json"
    options = ["--model", str(tiny_model_folder), "--photos", "3", "--megapixels", "0.01", "0.03", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["end_to_end.py", *options, "--batch-size", "2", "--json", str(file)])
    end_to_end.main()
    result = json.loads(file.read_text())
    assert list(result["stage_seconds"]) == list(end_to_end.STAGES)
    assert all(seconds > 0 for seconds in result["stage_seconds"].values())
    assert result["share_of_network_throughput"] == pytest.approx(
        result["photos_per_second"] / result["network_photos_per_second"]
    )
    assert "| foreground |" in capsys.readouterr().out


def test_startup_times_the_command_up_to_the_network(benchmark, tiny_model_folder, tmp_path):
    [photo] = benchmark("end_to_end").draw_photos(tmp_path, 1, 0.01, 0.01)
    moments = benchmark("startup").measure(photo, ["--model", str(tiny_model_folder), "--device", "cpu"])
    assert 0 < moments["loaded"] < moments["network"]
    assert not photo.with_suffix(".png").exists()
    with pytest.raises(RuntimeError, match="never called the network"):
        benchmark("startup").measure(photo, ["--batch-size", "none"])


@pytest.mark.parametrize("deviation", [1, 3])
def test_widths_of_edges_are_those_from_10_to_90_percent(benchmark, deviation):
    """A step blurred by a Gauss function of standard deviation σ rises from 10 to 90 % over 2.563 σ."""
    edges = benchmark("edges")
    rows, columns = torch.arange(768).view(-1, 1) + 0.5, torch.arange(1024) + 0.5
    radius = ((columns - edges.CENTRE[0]) ** 2 + (rows - edges.CENTRE[1]) ** 2).sqrt()
    disc = 0.1 + 0.8 * torch.special.ndtr((240 - radius) / deviation)
    assert abs(edges.width_of_edge(disc, edges.OUTLINE) - 2.563 * deviation) < 0.3


def test_error_kinds_add_up_to_the_mean_absolute_error(benchmark):
    errors_by_kind = benchmark("error_kinds").errors_by_kind
    mask, matte = np.zeros((100, 200), np.uint8), np.zeros((100, 200), np.uint8)
    mask[10:40, 10:40] = mask[60:90, 10:40] = 255  # two objects
    matte[10:40, 10:30] = 255  # two thirds of the first, nothing of the second
    matte[40:60, 150:170] = 255  # a piece of background
    kinds = errors_by_kind(matte, mask)
    assert sum(kinds.values()) == pytest.approx(np.abs(matte.astype(float) - mask).mean() / 255)
    assert kinds["background taken"] == pytest.approx(400 / mask.size)
    # The band around outlines is two pixels wide on either side.
    assert kinds["object missed"] == pytest.approx(26 * 26 / mask.size)
    assert kinds["part missed"] == pytest.approx(8 * 26 / mask.size)


def test_a_second_scale_changes_nothing_and_its_new_channels_are_normalized(benchmark):
    script = benchmark("second_scale")
    more = {
        "backbone": "tf_efficientnet_lite0",
        "context_levels": 3,
        "squeeze_block": "basic",
        "source_reference": "patches",
    }
    torch.manual_seed(0)
    old = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG | more)).eval()
    for norm in old.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.1, 0.1)
    new = script.with_second_scale(old)
    pictures = torch.randn(2, 3, 64, 96)
    statistics = {name: value.clone() for name, value in old.named_buffers()}
    script.measure_new_statistics(new, old, [pictures])
    for name, value in new.named_buffers():
        old_value = statistics[name]
        assert torch.equal(value[: len(old_value)] if value.ndim else value, old_value)
    norm = new.decoder.decoder_block1.bn_out
    assert norm.running_mean[len(norm.running_mean) // 2 :].abs().min() > 0 and not norm.training
    with torch.no_grad():
        expected, found = old(pictures).logits, new(pictures).logits
        assert (found - expected).abs().max() < 1e-4 * expected.std()
        new.decoder.conv_out1[0].weight[:, -1] += 1  # a channel of the second scale
        assert (new(pictures).logits - expected).abs().max() > 1e-2 * expected.std()
    with pytest.raises(ValueError, match="has two scales"):
        script.with_second_scale(new)
    other = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG | more | {"backbone": "rexnet_100"}))
    with pytest.raises(ValueError, match="multiples of 8"):
        script.with_second_scale(other)
