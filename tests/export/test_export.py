"""Exported files compute what PyTorch computes, and nothing else is kept."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet.command_line import main
from birefnet.errors import CommandError, UsageError
from birefnet.export import BiRefNetOnnxModel, BiRefNetOpenVINOModel, export_model, folders, programs, verification
from birefnet.inference import load_model, load_remover
from birefnet.photos.drawing import draw_picture
from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.deformable_birefnet import deformable_convolution
from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
from birefnet.repository.pipeline_birefnet import BiRefNetPipeline

from .. import drawn_photos, reference_weights


slow = pytest.mark.skipif(os.environ.get("BIREFNET_SLOW") != "1", reason="takes minutes: set BIREFNET_SLOW=1")

onnx, _, onnxruntime = (pytest.importorskip(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def write(network, out, file_format="onnx", size=None, dynamic_batch=False, dtypes=("float32",)):
    targets = folders.file_paths(file_format, out, dtypes)
    return folders.write_programs(*network, out, targets, file_format, size, dynamic_batch)


def relative_difference(model, network, pixel_values):
    with torch.inference_mode():
        expected = model(pixel_values).logits
    return ((network(pixel_values).logits - expected).abs().max() / expected.std()).item()


def test_swin_network_in_onnx(tiny_swin, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "LARGE", 2**12)  # the network is narrow
    reports = write(tiny_swin, tmp_path, dtypes=("float32", "float16", "int8"))
    for report in reports:
        assert (
            verification.Agreement(**report.agreement).measure(report.dtype) <= verification.TOLERANCES[report.dtype]
        )
    sizes = {report.dtype: report.megabytes for report in reports}
    assert sizes["int8"] < 0.3 * sizes["float32"]
    network = BiRefNetOnnxModel(tmp_path / "onnx" / "model.onnx", tiny_swin[0].config)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 96, 64\); this file takes \(1, 3, 64, 96\)"):
        network(torch.zeros(1, 3, 96, 64))


def optimized_operators(path, scratch):
    """The operators that ONNX Runtime is left with after it has loaded a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(scratch).graph.node]


@pytest.mark.parametrize(
    ("operator", "shape", "axis", "attributes"),
    [
        ("Conv", (1030, 64, 1, 1), 0, {}),
        ("Gemm", (64, 1030), 1, {}),
        ("Gemm", (1030, 64), 0, {"transB": 1}),
        ("MatMul", (64, 1030), 1, {}),
    ],
)
def test_large_weights_in_int8(operator, shape, axis, attributes, tmp_path):
    """They are restored when the file is loaded, each output channel to half a step of its own. Others are kept."""
    generator = np.random.default_rng(0)
    channel = [1030 if axis == i else 1 for i in range(len(shape))]
    weight = (generator.standard_normal(shape) * np.geomspace(1e-3, 1e3, 1030).reshape(channel)).astype(np.float32)
    bias = generator.standard_normal(64).astype(np.float32)  # a small constant
    pixels = [1, 1] if operator == "Conv" else []
    nodes = [
        onnx.helper.make_node("Add", ["input", "bias"], ["sum"]),
        onnx.helper.make_node(operator, ["sum", "weight"], ["output"], **attributes),
    ]
    values = [onnx.helper.make_tensor_value_info(x, 1, None) for x in ("input", "output")]
    constants = [onnx.numpy_helper.from_array(weight, "weight")]
    constants.append(onnx.numpy_helper.from_array(bias.reshape([64, *pixels]), "bias"))
    graph = onnx.helper.make_graph(nodes, "layer", values[:1], values[1:], constants)
    operators = [onnx.helper.make_opsetid("", programs.OPSET)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=operators, ir_version=10), tmp_path / "exact.onnx")
    programs.write_rounded_onnx(tmp_path / "exact.onnx", tmp_path / "int8.onnx", "int8")

    stored = {x.name: x.data_type for x in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    assert stored == {"weight_int8": onnx.TensorProto.INT8, "weight_scale": 1, "bias": 1}
    assert "Mul" not in optimized_operators(tmp_path / "int8.onnx", tmp_path / "optimized.onnx")
    photos = {"input": np.eye(64, dtype=np.float32).reshape(64, 64, *pixels) - bias.reshape(64, *pixels)}
    session = onnxruntime.InferenceSession(str(tmp_path / "int8.onnx"), providers=["CPUExecutionProvider"])
    restored = session.run(None, photos)[0].reshape(64, 1030)  # row i is the weights of input channel i
    expected = np.moveaxis(weight, axis, -1).reshape(64, 1030)
    steps = np.abs(expected).max(axis=0) / 127
    assert (np.abs(restored - expected) <= 0.51 * steps).all()
    assert (restored != expected).any()


def test_weights_of_both_scales_are_stored_once(embedded_folder):
    graph = onnx.load(embedded_folder[0] / "onnx" / "model.onnx").graph
    contents = [(x.data_type, tuple(x.dims), x.raw_data) for x in graph.initializer]
    assert len(set(contents)) == len(contents)


def test_mattes_of_the_int8_file(embedded_folder):
    """Measured: 0.0001 to 0.0020 on seven photos. The dynamic quantization of ONNX Runtime had 0.01 to 0.10."""
    report = next(report for report in embedded_folder[1] if report.dtype == "int8")
    assert report.agreement["matte_mean"] <= 3e-3


@slow
def test_swin_network_for_any_batch(tiny_swin, tmp_path):
    write(tiny_swin, tmp_path, dynamic_batch=True)
    network = BiRefNetOnnxModel(tmp_path / "onnx" / "model.onnx", tiny_swin[0].config)
    for batch in (1, 2, 5):
        pixel_values = torch.randn(batch, 3, 64, 96, generator=torch.Generator().manual_seed(batch))
        assert relative_difference(tiny_swin[0], network, pixel_values) <= 1e-4


@slow
def test_swin_network_in_openvino(tiny_swin, tmp_path):
    pytest.importorskip("openvino")
    write(tiny_swin, tmp_path, "openvino", dtypes=("float32", "float16"))
    network = BiRefNetOpenVINOModel(tmp_path / "openvino" / "openvino_model.xml", tiny_swin[0].config)
    assert relative_difference(tiny_swin[0], network, torch.randn(1, 3, 64, 96)) <= 1e-4


def test_deformable_convolution_in_bands(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "SAMPLES_BYTES", 4 * 5 * 9 * 6 * 3)  # three rows of the samples below
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, channels, 12, 6, generator=generator) for channels in (5, 18, 9)]
    inputs[1] *= 3  # offsets of several pixels
    weight = torch.randn(4, 5, 3, 3, generator=generator)

    class Layer(torch.nn.Module):
        def forward(self, hidden_states, offsets, modulator):
            return programs._onnx_deform_conv(hidden_states, offsets, modulator, weight)

    file = tmp_path / "model.onnx"
    torch.onnx.export(Layer().eval(), tuple(inputs), dynamo=True, opset_version=programs.OPSET, verbose=False).save(
        file
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    [found] = session.run(None, {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)})
    expected = deformable_convolution(*inputs, weight)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-4)
    operators = [node.op_type for node in onnx.load(file).graph.node]
    assert operators.count("DeformConv") == 4


@slow
@pytest.mark.parametrize("file_format", ["onnx", "openvino"])
@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1344)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("backbone", ["swin_v1_t", "swin_v1_l"])
def test_lite_and_general(backbone, size, file_format, tmp_path):
    """With batches of 1 and 3, which `write_programs` compares before it keeps the file."""
    pytest.importorskip(file_format)
    model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone=backbone)).eval()
    manifest = {key: (value.shape, str(value.dtype)[6:]) for key, value in model.state_dict().items()}
    model.load_state_dict(reference_weights.state_dict(manifest), strict=False)
    [report] = write((model, BiRefNetImageProcessor()), tmp_path, file_format, size, dynamic_batch=True)
    assert report.agreement["logits"] <= 1e-4
    print(report.summary)


def test_embedded_network_in_the_pipeline(embedded_folder):
    folder, _ = embedded_folder
    photo = draw_picture(600, 400)
    exact = load_remover()(photo, return_mask=True)
    exported = load_remover(str(folder), runtime="onnx")(photo, return_mask=True)
    assert exported.size == photo.size
    assert np.abs(np.asarray(exact, int) - np.asarray(exported, int)).max() <= 1


def test_files_for_transformers_js_load_in_python(embedded_folder):
    folder, _ = embedded_folder
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    assert settings["feature_extractor_type"] == "ViTFeatureExtractor"
    assert "image_processor_type" not in settings
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "BiRefNetImageProcessor"
    model = BiRefNetOnnxModel.from_pretrained(folder, dtype="int8")
    cut_out = BiRefNetPipeline(model=model, image_processor=processor)(draw_picture())
    assert cut_out.mode == "RGBA"


def test_cutout_command_runs_the_file(embedded_folder, tmp_path, capsys):
    folder, _ = embedded_folder
    draw_picture().save(tmp_path / "photo.png")
    photo = str(tmp_path / "photo.png")
    assert main(["cutout", photo, "--model", str(folder), "--runtime", "onnx", "--dtype", "float16"]) == 0
    assert Image.open(tmp_path / "photo-cutout.png").mode == "RGBA"
    assert main(["cutout", photo, "-o", str(tmp_path / "x.png"), "--runtime", "onnx"]) == 2
    assert "--model FOLDER" in capsys.readouterr().err
    assert main(["cutout", photo, "-o", str(tmp_path / "x.png"), "--model", str(folder), "--runtime", "openvino"]) == 1
    assert "no openvino file in float32; it has none" in capsys.readouterr().err
    arguments = ["cutout", photo, "-o", str(tmp_path / "x.png"), "--model", str(folder), "--runtime", "onnx"]
    assert main([*arguments, "--resolution", "512"]) == 2
    assert main([*arguments, "--batch-size", "2"]) == 2


def test_existing_files_are_kept(embedded_folder, capsys):
    folder, _ = embedded_folder
    before = (folder / "onnx" / "model.onnx").stat().st_mtime_ns
    assert main(["export", "embedded", str(folder)]) == 1
    assert "model.onnx exists and was kept; --overwrite replaces it" in capsys.readouterr().err
    assert (folder / "onnx" / "model.onnx").stat().st_mtime_ns == before


def test_one_folder_is_for_one_size(embedded_folder):
    folder, _ = embedded_folder
    before = (folder / "preprocessor_config.json").read_text()
    with pytest.raises(CommandError, match="which is for 448x448 and not for 64x96"):
        export_model("embedded", folder, "torch", (64, 96))
    assert (folder / "preprocessor_config.json").read_text() == before
    assert not (folder / "torch").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"size": (500, 512)}, "multiples of 32"), ({"file_format": "torch", "dtypes": ("int8",)}, "float32")],
)
def test_wrong_arguments(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_model("embedded", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_size_that_is_no_multiple_of_32(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "embedded", str(tmp_path / "out"), "--size", "500"])
    assert "multiples of 32" in capsys.readouterr().err


def test_a_file_that_disagrees_is_not_kept(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(verification.TOLERANCES, "float32", 1e-12)
    with pytest.raises(CommandError, match=r"model.onnx disagrees with PyTorch.*not kept"):
        export_model(tiny_model_folder, tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nan_disagrees():
    agreement = verification.Agreement()
    agreement.include(torch.full((1, 1, 2, 2), torch.nan), torch.arange(4.0).view(1, 1, 2, 2))
    agreement.include(torch.arange(4.0).view(1, 1, 2, 2), torch.arange(4.0).view(1, 1, 2, 2))
    assert not agreement.measure("float32") <= 1


def test_a_full_disk_is_named(tiny_model_folder, tmp_path, monkeypatch):
    usage = folders.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CommandError, match="GB free; exporting needs about"):
        export_model(tiny_model_folder, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_fills_up_is_named(tiny_model_folder, tmp_path, monkeypatch):
    usage = folders.shutil.disk_usage(tmp_path)
    free = iter([usage.free, 0])  # before writing, and after it failed
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage._replace(free=next(free)))

    def write_half(model, example, is_dynamic, dynamic_batch, scratch):
        (scratch / "half.onnx").write_bytes(b"half")
        raise RuntimeError("Failed to write external initializers")  # as ONNX Runtime does

    monkeypatch.setitem(programs.PROGRAMS, "onnx", write_half)
    with pytest.raises(CommandError, match="the disk is full"):
        export_model(tiny_model_folder, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(CommandError, match=r"birefnet-transformers\[export\]"):
        BiRefNetOnnxModel(tmp_path / "model.onnx", load_model)


def test_an_exported_file_is_evaluated(embedded_folder, tmp_path):
    pytest.importorskip("py_sod_metrics")
    photos = drawn_photos.write_folder(tmp_path / "photos", "ab", size=(96, 64))
    results = []
    of_the_file = ["--model", str(embedded_folder[0]), "--runtime", "onnx"]
    for name, options in (("exported", of_the_file), ("embedded", [])):
        file = tmp_path / f"{name}.json"
        assert main(["evaluate", str(photos), *options, "--json", str(file)]) == 0
        results.append(json.loads(file.read_text()))
    exported, embedded = results
    assert exported["measures"]["MAE"] == pytest.approx(embedded["measures"]["MAE"], abs=1e-3)
    assert "parameters" in embedded["model"] and "parameters" not in exported["model"]
