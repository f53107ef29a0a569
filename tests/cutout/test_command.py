"""birefnet cutout end to end with a tiny network. A bad photo must not affect the others."""

import functools
import http.server
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import zlib
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from birefnet.command_line import main
from birefnet.cutout.command import _suggest_dtype
from birefnet.repository import hardware_birefnet

from ..colour_profiles import matrix_profile


def draw(width, height, seed=0):
    """A bright disc on noise."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 90, (height, width, 3))
    disc = np.hypot(rows / height - 0.5, columns / width - 0.5) < 0.3
    return Image.fromarray(np.where(disc[..., None], (250, 200, 40), noise).astype(np.uint8))


def huge_png():
    """A PNG whose header claims 100,000 x 100,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"pixels")))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


UP_TO_THE_NETWORK = """
import gc, json, os, sys
from birefnet import command_line
from birefnet.cutout import command as cutout

load_remover = cutout.load_remover

def load_and_watch(*arguments, **options):
    remover = load_remover(*arguments, **options)
    def first_call(*arguments, **options):
        compiled = sys.modules.get("torch._dynamo.utils")
        print(json.dumps({
            "modules": sorted(sys.modules),
            "compiled": sum(sum(counter.values()) for counter in compiled.counters.values()) if compiled else 0,
            "full_collections": gc.get_stats()[2]["collections"],
            "collector_runs": gc.isenabled(),
        }), flush=True)
        os._exit(0)
    remover.forward = first_call
    return remover

cutout.load_remover = load_and_watch
sys.exit(command_line.main(sys.argv[1:]))
"""
# Modules of the extras that take a tenth of a second to seconds to import and that no cut-out needs.
UNNEEDED = {
    *("cv2", "datasets", "kornia", "matplotlib", "onnxruntime", "pandas", "peft", "py_sod_metrics", "pyarrow"),
    *("skimage", "sklearn", "tensorboard", "torchao", "torchaudio"),
    *(
        "birefnet.data.pairs",
        "birefnet.evaluation.command",
        "birefnet.evaluation.metrics",
        "birefnet.training.command",
        "birefnet.hub.variant_card",
    ),
    *("torch._inductor.compile_fx", "torch.utils.tensorboard", "transformers.trainer"),
}

GOOD = {  # name: (width, height) of the result
    "1x1.png": (1, 1),
    "12000x40.jpg": (12000, 40),
    "16 bit.png": (48, 32),
    "cmyk.jpg": (48, 32),
    "palette.gif": (48, 32),
    "rgba.webp": (48, 32),
    "turned.jpg": (32, 48),
    "deep/übung 写真 [1].png": (48, 32),
}
BAD = ("corrupt.jpg", "empty.jpg", "huge.png", "text.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with every kind of good and bad photo."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    photo = draw(48, 32)
    Image.new("RGB", (1, 1), "red").save(folder / "1x1.png")
    draw(12000, 40).save(folder / "12000x40.jpg")
    Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257).save(folder / "16 bit.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.save(folder / "palette.gif")
    photo.convert("RGBA").save(folder / "rgba.webp")
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 8, "camera"
    photo.save(folder / "turned.jpg", exif=exif)
    photo.save(folder / "deep/übung 写真 [1].png")
    (folder / "corrupt.jpg").write_bytes((folder / "12000x40.jpg").read_bytes()[:3000])
    (folder / "empty.jpg").touch()
    (folder / "huge.png").write_bytes(huge_png())
    (folder / "text.jpg").write_text("this is a text")
    return folder


@pytest.fixture
def cutout(tiny_model_folder):
    def run(*arguments):
        return main(["cutout", *map(str, arguments), "--model", str(tiny_model_folder), "--device", "cpu"])

    return run


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bad_photos_are_reported_and_the_rest_is_cut_out(cutout, photos, tmp_path, capfd, batch_size):
    out = tmp_path / "out"
    assert cutout(photos, "-o", out, "--json", "--batch-size", batch_size) == 1
    captured = capfd.readouterr()
    reports = [json.loads(line) for line in captured.out.splitlines()]
    by_name = {os.path.relpath(report["input"], photos): report for report in reports}
    assert set(by_name) == {*GOOD, *BAD}
    for name, size in GOOD.items():
        report = by_name[name]
        assert report["error"] is None and tuple(report["size"]) == size and report["seconds"] > 0
        with Image.open(report["output"]) as result:
            assert result.size == size and result.mode == "RGBA" and result.format == "PNG"
            assert not result.getexif(), "the result is upright, so the tag would rotate it again"
    for name in BAD:
        assert by_name[name]["error"] and by_name[name]["output"] is None
        assert f"birefnet cutout: {photos / name}: " in captured.err
    assert written(out) == sorted(os.path.splitext(name)[0] + ".png" for name in GOOD)
    assert "8 cut out, 0 existing results kept, 4 failed" in captured.err
    assert "it/s" not in captured.err and "photo/s" not in captured.err, "no progress bar without a terminal"


def test_existing_results_are_kept_by_default(cutout, tmp_path, capfd):
    draw(40, 30).save(tmp_path / "a.png")
    result = tmp_path / "a-cutout.png"
    assert cutout(tmp_path / "a.png") == 0
    assert capfd.readouterr().out == f"{result}\n"
    first = result.read_bytes()
    result.write_bytes(b"edited by hand")
    assert cutout(tmp_path / "a.png") == 0
    assert result.read_bytes() == b"edited by hand" and "kept" in capfd.readouterr().err
    assert cutout(tmp_path, "--overwrite") == 0
    assert result.read_bytes() == first
    assert written(tmp_path) == ["a-cutout.png", "a.png"]


def test_formats_masks_backgrounds_and_edits(cutout, tmp_path):
    photo = draw(60, 40)
    photo.save(tmp_path / "a.png")
    Image.new("RGB", (5, 5), (0, 0, 255)).save(tmp_path / "blue.png")
    a = tmp_path / "a.png"
    assert cutout(a, "-o", tmp_path / "mask.png", "--mask") == 0
    assert cutout(a, "-o", tmp_path / "inverted.webp", "--mask", "--invert") == 0
    assert cutout(a, "-o", tmp_path / "cut.webp", "--no-refine-foreground") == 0
    assert cutout(a, "-o", tmp_path / "colour.png", "--background", "#0000ff", "--no-refine-foreground") == 0
    assert cutout(a, "-o", tmp_path / "picture.jpg", "--background", tmp_path / "blue.png") == 0
    mask = pixels(tmp_path / "mask.png")
    assert mask.shape == (40, 60) and mask.min() < 50 and mask.max() > 200
    with Image.open(tmp_path / "inverted.webp") as inverted:  # WebP knows no gray
        assert np.array_equal(np.asarray(inverted.convert("L")), 255 - mask)
    cut = pixels(tmp_path / "cut.webp")
    assert np.array_equal(cut[..., 3], mask)
    assert np.array_equal(cut[mask > 0][:, :3], np.asarray(photo)[mask > 0])
    assert not cut[mask == 0].any()
    matte = mask[..., None] / 255
    expected = matte * np.asarray(photo) + (1 - matte) * (0, 0, 255)
    assert np.abs(pixels(tmp_path / "colour.png") - expected).max() <= 1.5
    assert Image.open(tmp_path / "picture.jpg").format == "JPEG"


def test_resolution_dtype_and_dynamic_size_reach_the_network(tiny_model_folder, tmp_path):
    from birefnet.command_line import build_parser
    from birefnet.inference import load_remover, model_options

    def load(*arguments):
        parser = build_parser("cutout")
        options = ["--model", str(tiny_model_folder), "--device", "cpu", *arguments]
        return load_remover(**model_options(parser.parse_args(["cutout", "a.jpg", *options])))

    remover = load("--resolution", "96x128", "--dtype", "bfloat16")
    assert tuple(remover.preprocess(draw(50, 50))["pixel_values"].shape) == (3, 96, 128)
    assert str(remover.model.dtype) == "torch.bfloat16"
    remover = load("--resolution", "dynamic")
    assert tuple(remover.preprocess(draw(300, 260))["pixel_values"].shape) == (3, 256, 288)
    assert str(remover.model.dtype) == "torch.float32"
    assert tuple(load().preprocess(draw(50, 50))["pixel_values"].shape) == (3, 64, 64)


def test_standard_input_and_output(cutout, monkeypatch, capfdbinary):
    encoded = io.BytesIO()
    draw(40, 30).save(encoded, "JPEG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(encoded.getvalue())))
    assert cutout("-") == 0
    captured = capfdbinary.readouterr()
    result = Image.open(io.BytesIO(captured.out))
    assert result.size == (40, 30) and result.mode == "RGBA"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    assert cutout("-") == 1
    captured = capfdbinary.readouterr()
    assert captured.out == b"" and b"standard input is empty" in captured.err


def test_an_unwritable_output_folder_is_reported(cutout, tmp_path, capfd):
    draw(40, 30).save(tmp_path / "a.png")
    # Nobody can write into a file as if it were a folder, not even root, whom a read-only folder does not stop.
    (tmp_path / "out").write_text("a file where the folder should be")
    assert cutout(tmp_path / "a.png", tmp_path / "a.png", "-o", tmp_path / "out/deep") == 1
    assert f"{tmp_path / 'a.png'}: Not a directory" in capfd.readouterr().err
    assert (tmp_path / "out").read_text() == "a file where the folder should be"


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0,
    reason="needs a user whom a read-only folder stops: not root, and not on Windows, where folders have no such mode",
)
def test_a_read_only_output_folder_is_reported(cutout, tmp_path, capfd):
    draw(40, 30).save(tmp_path / "a.png")
    (tmp_path / "out").mkdir(mode=0o555)
    assert cutout(tmp_path / "a.png", "-o", tmp_path / "out") == 1
    assert "Permission denied" in capfd.readouterr().err
    assert written(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "1000"], "multiples of 32"),
        (["--resolution", "64x64x64"], "multiples of 32"),
        (["--batch-size", "0"], "integer of at least 1"),
        (["--threshold", "1.5"], "number from 0 to 1"),
        (["--feather", "-1"], "number from 0"),
        (["--format", "bmp"], "invalid choice"),
        (["--background", "no-such-colour"], "neither a colour"),
        (["--device", "no-such-device"], "not available here"),
    ],
)
def test_wrong_arguments_are_usage_errors_and_write_nothing(tmp_path, capfd, arguments, message):
    draw(40, 30).save(tmp_path / "a.png")
    try:
        code = main(["cutout", str(tmp_path / "a.png"), *arguments])
    except SystemExit as leaving:
        code = leaving.code
    assert code == 2
    assert message in capfd.readouterr().err
    assert written(tmp_path) == ["a.png"]


def test_a_missing_model_is_reported_in_one_line(tmp_path, capfd):
    draw(40, 30).save(tmp_path / "a.png")
    assert main(["cutout", str(tmp_path / "a.png"), "--model", str(tmp_path / "nowhere"), "--device", "cpu"]) == 1
    error = capfd.readouterr().err
    assert "nowhere is not a file, a folder, a variant or a Hub repository" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("dtype", "device", "faster", "suggested"),
    [
        ("auto", "cpu", "bfloat16", True),
        ("auto", "cpu", "float32", False),
        ("auto", "cuda", "bfloat16", False),
        ("float32", "cpu", "bfloat16", False),
    ],
)
def test_a_faster_dtype_is_suggested_where_there_is_one(dtype, device, faster, suggested, monkeypatch, capsys):
    monkeypatch.setattr(hardware_birefnet, "has_bfloat16_arithmetic", lambda: faster == "bfloat16")
    arguments = SimpleNamespace(dtype=dtype, runtime="pytorch")
    for parameters in (44_000_000, 6_000_000):  # lite, embedded
        _suggest_dtype(arguments, SimpleNamespace(device=torch.device(device), num_parameters=lambda n=parameters: n))
        is_large = parameters > 10_000_000
        assert ("--dtype bfloat16" in capsys.readouterr().err) == (suggested and is_large)


def test_only_what_is_needed_is_imported_before_the_network(tiny_model_folder, tmp_path):
    """Also, nothing is compiled, and the garbage collector does not scan the imported objects."""
    draw(40, 30).save(tmp_path / "a.png")
    command = [sys.executable, "-c", UP_TO_THE_NETWORK, "cutout", tmp_path / "a.png", "--model", tiny_model_folder]
    process = subprocess.run(
        [*command, "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    modules = set(found["modules"])
    assert {"torch", "timm", "birefnet.repository.modeling_birefnet"} <= modules  # the list is complete
    assert not modules & UNNEEDED
    if version("transformers") >= "5.23":  # 5.18 imports all pipelines with the first one
        unneeded = r"transformers\.(models\.(?!auto\.)\w+\.(modeling|image)_|pipelines\.(?!base|pt_utils))"
        assert not [name for name in modules if re.match(unneeded, name)]
    assert found["compiled"] == found["full_collections"] == 0
    assert found["collector_runs"]


NO_TORCH = """
import sys
from birefnet.command_line import main
code = main(sys.argv[1:])
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


def test_wrong_files_are_reported_before_torch_is_imported(tmp_path):
    (tmp_path / "text.jpg").write_text("this is a text")
    wrong = [tmp_path / "missing.jpg", tmp_path / "text.jpg", "http://127.0.0.1:9/photo.jpg"]
    command = [sys.executable, "-c", NO_TORCH, "cutout", *wrong, "-o", tmp_path / "out"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    *messages, _, torch_is_imported = process.stderr.splitlines()
    assert process.returncode == 1 and torch_is_imported == "False"
    assert "missing.jpg: No such file or directory" in messages[0]
    assert "text.jpg: it is not a picture" in messages[1]
    assert "http://127.0.0.1:9/photo.jpg: the download failed" in messages[2]


@pytest.fixture
def photo_server(tmp_path):
    """A web server with the files of a folder. Gives the folder and the address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_downloads_are_cut_out_into_the_current_folder(cutout, photo_server, tmp_path, monkeypatch, capfd):
    folder, address = photo_server
    draw(40, 30).save(folder / "a photo.png")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    photos = [f"{address}/a%20photo.png?size=1", f"{address}/absent.png", "ftp://127.0.0.1/b.png"]
    assert cutout(*photos, "--background", "blue") == 1
    captured = capfd.readouterr()
    assert captured.out == "a photo-cutout.png\n"
    assert f"birefnet cutout: {address}/absent.png: the download failed: HTTP Error 404" in captured.err
    assert "ftp://127.0.0.1/b.png: only http and https are supported" in captured.err
    assert written(tmp_path / "here") == ["a photo-cutout.png"]
    assert Image.open("a photo-cutout.png").size == (40, 30)


def test_transparent_photos_and_profiles(cutout, tmp_path, capfd):
    photo, profile = draw(60, 40), matrix_profile()
    photo.putalpha(Image.fromarray((np.indices((40, 60))[1] >= 30).astype(np.uint8) * 255))
    photo.save(tmp_path / "a.png", icc_profile=profile, dpi=(300, 300))
    assert cutout(tmp_path / "a.png", "-o", tmp_path / "out") == 0
    assert cutout(tmp_path / "a.png", "-o", tmp_path / "srgb.png", "--srgb") == 0
    result, converted = Image.open(tmp_path / "out/a.png"), Image.open(tmp_path / "srgb.png")
    assert not np.asarray(result)[:, :30, 3].any() and np.asarray(result)[:, 30:, 3].any()
    assert result.info["icc_profile"] == profile and round(result.info["dpi"][0]) == 300
    assert "icc_profile" not in converted.info
    visible = np.asarray(result)[..., 3] == 255
    assert (np.asarray(result)[visible] != np.asarray(converted)[visible]).any()


def test_16_bit_photos_say_that_8_bits_remain(cutout, tmp_path, capfd):
    gray = np.asarray(draw(48, 32).convert("L")).astype(np.uint16) * 257
    Image.fromarray(gray).save(tmp_path / "gray.png")
    (tmp_path / "rgb.png").write_bytes(png_of_16_bits(np.stack([gray] * 3, axis=-1)))
    for name in ("gray.png", "rgb.png"):
        assert cutout(tmp_path / name, "-o", tmp_path / "out", "--json") == 0
        captured = capfd.readouterr()
        assert json.loads(captured.out)["note"] == "the photo has 16 bits per channel, the result has 8"
        assert f"{name}: the photo has 16 bits per channel, the result has 8" in captured.err
    assert cutout(tmp_path / "rgb.png", "-o", tmp_path / "mask.png", "--mask") == 0
    assert "16 bits" not in capfd.readouterr().err


def png_of_16_bits(pixels):
    """A PNG of (H, W, 3) uint16, which Pillow reads but does not write."""
    rows = pixels.astype(">u2").reshape(len(pixels), -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a pipe can be set on Linux only")
def test_ctrl_c_leaves_whole_results_only(tiny_model_folder, tmp_path):
    import fcntl  # which Windows lacks

    draw(600, 400).save(tmp_path / "0.png")
    for number in range(1, 400):
        os.link(tmp_path / "0.png", tmp_path / f"{number}.png")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "birefnet", "cutout", tmp_path, "-o", out, "--model", tiny_model_folder]
    process = subprocess.Popen(
        [*command, "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A script in the background ignores the signal, and its child processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        # The small pipe blocks the command after some names, so it cannot end before the signal.
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(3):
            assert process.stdout.readline().startswith(str(out))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.endswith("birefnet cutout: interrupted\n") and "Traceback" not in error
    names = os.listdir(out)
    assert 3 <= len(names) < 400
    for name in names:
        assert name.endswith(".png") and not name.startswith(".")
        Image.open(out / name).load()
