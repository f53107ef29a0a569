"""The image processor: against PIL, with every kind of input, with and without torchvision, and back to mattes."""

import base64
import io
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import birefnet
from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor, load_photo, read_photo
from birefnet.repository.matting_birefnet import guided_upsampling, sharpened_matte


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SIZE = {"height": 32, "width": 64}


def draw_photo(width=90, height=70):
    """A drawn photo without any symmetry: a sloping disc on a gradient, with some grain."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 127 * np.sin(x * y / 40)], axis=-1)
    pixels[((x - width * 0.3) / 20) ** 2 + ((y - height * 0.6) / 12) ** 2 < 1] = (250, 40, 10)
    pixels += np.random.default_rng(0).normal(0, 10, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def expected_values(photo, size=SIZE):
    """The preprocessing of the official weights: PIL's bilinear resizing, then ImageNet's mean and deviation."""
    resized = photo.convert("RGB").resize((size["width"], size["height"]), Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.array(resized)).permute(2, 0, 1) / 255 - MEAN) / STD


def encode(photo, image_format="PNG", **options):
    buffer = io.BytesIO()
    photo.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.fixture
def processor():
    return BiRefNetImageProcessor(size=SIZE)


def values_of(processor, image, **settings):
    values = processor(image, return_tensors="pt", **settings)["pixel_values"]
    assert values.dtype == torch.float32
    assert values.is_contiguous()
    return values[0]


# Photos


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "YCbCr", "HSV"])
@pytest.mark.parametrize("size", [{"height": 32, "width": 64}, {"height": 160, "width": 96}])
def test_photos_equal_pil(mode, size):
    photo = draw_photo()
    photo.putalpha(Image.linear_gradient("L").resize(photo.size).point(lambda value: max(value, 1)))
    photo = photo.convert(mode) if mode != "CMYK" else photo.convert("RGB").convert(mode)
    values = values_of(BiRefNetImageProcessor(size=size), photo)
    torch.testing.assert_close(values, expected_values(photo, size), atol=1e-6, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_palette_with_transparency_keeps_its_colours_without_a_warning():
    photo = draw_photo().quantize(16)
    opaque = photo.convert("RGB")
    photo = Image.open(io.BytesIO(encode(photo, transparency=bytes(range(1, 256, 16)))))
    assert isinstance(photo.info["transparency"], bytes)
    assert np.array_equal(load_photo(photo), opaque)


@pytest.mark.parametrize("kind", ["picture", "array", "float array", "tensor", "float tensor"])
def test_hidden_colours_become_white_and_visible_ones_stay(kind, processor):
    pixels = np.dstack([np.array(draw_photo()), np.full((70, 90), 255, np.uint8)])
    pixels[:, :30, 3], pixels[:, 30:60, 3] = 0, 1
    expected = np.where(pixels[..., 3:] > 0, pixels[..., :3], 255)
    image = Image.fromarray(pixels) if kind == "picture" else pixels / 255 if "float" in kind else pixels
    if "tensor" in kind:
        image = torch.from_numpy(image).permute(2, 0, 1)
    colours, alpha = read_photo(image)
    assert np.array_equal(colours, expected) and np.array_equal(alpha, pixels[..., 3])
    assert np.array_equal(load_photo(image), expected)
    values = values_of(processor, image, do_resize=False)
    torch.testing.assert_close(
        values, values_of(processor, Image.fromarray(expected.astype(np.uint8)), do_resize=False)
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_opaque_photos_have_no_alpha(mode):
    assert read_photo(draw_photo().convert(mode))[1] is None


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "uint16", "png", "tiff"])
def test_16_bit_is_scaled_to_8_bit(kind):
    gray = np.array(draw_photo().convert("L"))
    wide = gray.astype(np.uint16) * 257
    photo = Image.fromarray(wide)
    if kind in ("png", "tiff"):
        photo = encode(photo, kind)
    elif kind == "uint16":
        photo = wide
    elif kind == "I;16B":
        photo = Image.frombytes(kind, photo.size, wide.astype(">u2").tobytes())
    else:
        photo = photo.convert(kind)
    assert np.array_equal(np.array(load_photo(photo))[..., 0], gray)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation, processor):
    upright = draw_photo()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposition that turns upright into the stored photo
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(stored, exif=exif)
    assert np.array_equal(load_photo(encoded), upright)
    assert torch.equal(values_of(processor, encoded), values_of(processor, upright))


@pytest.mark.parametrize("size", [(1, 1), (12000, 40), (40, 12000)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_extreme_photos(size, dynamic):
    photo = Image.new("RGB", size, "orange")
    values = values_of(BiRefNetImageProcessor(size=SIZE, do_dynamic_resize=dynamic), photo)
    torch.testing.assert_close(values, expected_values(photo)[:, :1, :1].expand_as(values))


def test_the_photo_itself_is_not_changed(processor):
    photo, array = draw_photo().convert("P"), np.array(draw_photo())
    kept = photo.copy(), array.copy()
    processor([photo, array])
    assert photo == kept[0]
    assert np.array_equal(array, kept[1])


# Arrays and tensors


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda a: a, id="uint8"),
        pytest.param(lambda a: a.transpose(2, 0, 1), id="channels first"),
        pytest.param(lambda a: a.astype(np.int64), id="int64"),
        pytest.param(lambda a: (a / 255).astype(np.float32), id="float32"),
        pytest.param(lambda a: a / 255, id="float64"),
        pytest.param(lambda a: (a / 255).astype(">f8").transpose(2, 0, 1), id="big-endian"),
        pytest.param(lambda a: a.astype(np.uint16) * 257, id="uint16"),
        pytest.param(lambda a: np.dstack([a, a[..., :1] | 1]), id="with alpha"),
        pytest.param(lambda a: a[:, ::-1][:, ::-1], id="not contiguous"),
    ],
)
def test_arrays_equal_pil(convert, processor):
    photo = draw_photo()
    values = values_of(processor, convert(np.array(photo)))
    torch.testing.assert_close(values, expected_values(photo), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(70, 90), (70, 90, 1), (1, 70, 90), (70, 90, 2)])
@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_gray_arrays_and_tensors(shape, kind, processor):
    gray = np.array(draw_photo().convert("L"))
    pixels = np.stack([gray, gray | 1], axis=-1) if shape[-1] == 2 else gray.reshape(shape)
    values = values_of(processor, kind(pixels))
    assert (values - expected_values(draw_photo().convert("L"))).mul(STD).abs().max() < 2 / 255


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_boolean_arrays_and_tensors_are_black_and_white(kind, processor):
    mask = np.array(draw_photo().convert("L")) > 128
    values = values_of(processor, kind(mask))
    assert (values - expected_values(Image.fromarray(mask))).mul(STD).abs().max() < 2 / 255


def test_the_channel_axis_can_be_given(processor):
    array = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
    assert torch.equal(values_of(processor, array), values_of(processor, Image.fromarray(array)))
    first = values_of(processor, array, input_data_format="channels_first")
    assert torch.equal(first, values_of(processor, Image.fromarray(array.transpose(1, 2, 0))))
    told = values_of(processor, torch.from_numpy(array), input_data_format="channels_last")
    assert (told - values_of(processor, array)).mul(STD).abs().max() < 2 / 255


@pytest.mark.parametrize("size", [(32, 64), (64, 96), (70, 90), (160, 224)])
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16, torch.int32])
def test_tensors_are_close_to_pil(size, resample, dtype):
    photo = draw_photo()
    tensor = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    tensor = (tensor / 255 if dtype.is_floating_point else tensor).to(dtype)
    processor = BiRefNetImageProcessor(size=list(size), resample=Image.Resampling[resample.upper()])
    difference = values_of(processor, tensor) - values_of(processor, photo)
    assert difference.mul(STD).abs().max() <= 2 / 255


def test_tensors_stay_on_their_device_and_device_moves_the_rest(processor):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.from_numpy(np.array(draw_photo())).permute(2, 0, 1)
    on_device = processor(tensor.to(device), return_tensors="pt")["pixel_values"]
    assert on_device.device.type == device
    torch.testing.assert_close(on_device.cpu(), processor(tensor, return_tensors="pt")["pixel_values"])
    assert processor(draw_photo(), return_tensors="pt", device=device)["pixel_values"].device.type == device


def test_tensor_to_photo():
    pixels = torch.from_numpy(np.array(draw_photo())).permute(2, 0, 1)
    assert np.array_equal(load_photo(pixels), draw_photo())
    assert np.array_equal(load_photo(pixels / 255), draw_photo())


# Files and URLs


@pytest.fixture
def server():
    """A web server on the loopback: /photo.png, and 404 for all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/photo.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(encode(draw_photo()) if found else b"not here")

        def log_message(self, *arguments):
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


def test_paths_urls_and_encoded_files(tmp_path, server, processor):
    encoded = encode(draw_photo())
    path = tmp_path / "photo.png"
    path.write_bytes(encoded)
    sources = [path, str(path), encoded, io.BytesIO(encoded), f"{server}/photo.png"]
    sources.append("data:image/png;base64," + base64.b64encode(encoded).decode())
    batch = processor(sources, return_tensors="pt")["pixel_values"]
    assert batch.shape == (6, 3, 32, 64)
    torch.testing.assert_close(batch, expected_values(draw_photo()).expand_as(batch), atol=1e-6, rtol=1e-6)
    assert processor.fetch_images(path).size == (90, 70)
    assert [photo.mode for photo in processor.fetch_images([path, encoded])] == ["RGB", "RGB"]


def png_that_claims(width, height):
    """A PNG file of the given size, with next to no pixels in it."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "it is not a picture", id="empty"),
        pytest.param(b"Dear diary, ...", "it is not a picture", id="text"),
        pytest.param(encode(draw_photo(), "JPEG")[:-900], "truncated", id="cut off"),
        pytest.param(
            png_that_claims(100_000, 100_000), "it has 10,000 megapixels, and at most 179 are read", id="bomb"
        ),
        pytest.param(png_that_claims(1000, 1000), "truncated", id="pixels missing"),
    ],
)
def test_bad_files_are_named(content, message, tmp_path, processor):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)cannot read .*bad.jpg.*{message}"):
        processor(path)


def test_missing_files_and_failed_downloads(tmp_path, server, processor):
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        processor(tmp_path / "missing.jpg")
    with pytest.raises(IsADirectoryError):
        processor(tmp_path)
    with pytest.raises(ValueError, match=r"absent\.png.*404"):
        processor(f"{server}/absent.png")


# Batches, sizes and settings


def test_batches_equal_one_by_one(processor):
    photos = [draw_photo(90, 70), draw_photo(33, 120), draw_photo(64, 32)]
    batch = processor(photos, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.stack([values_of(processor, photo) for photo in photos]))
    array = np.stack([np.array(draw_photo())] * 2)
    assert processor(array, return_tensors="np")["pixel_values"].shape == (2, 3, 32, 64)
    assert len(processor(torch.from_numpy(array).permute(0, 3, 1, 2))["pixel_values"]) == 2
    assert isinstance(processor(array, return_tensors="np")["pixel_values"], np.ndarray)


@pytest.mark.parametrize("size", [(1024, 1024), (2048, 2048), (1440, 2560)])
def test_sizes_of_the_published_variants(size):
    processor = BiRefNetImageProcessor(size={"height": size[0], "width": size[1]})
    assert values_of(processor, draw_photo()).shape == (3, *size)


@pytest.mark.parametrize(
    ("photo", "network"),
    [
        ((480, 640), (480, 640)),  # a multiple of 32 already
        ((500, 700), (512, 704)),  # to the nearest
        ((3000, 4000), (1728, 2304)),  # held below the maximum, aspect kept
        ((80, 100), (256, 320)),  # held above the minimum, aspect kept
        ((1, 1), (256, 256)),
        ((40, 12000), (256, 2304)),  # both bounds hold, the aspect cannot
        ((2304, 256), (2304, 256)),
    ],
)
def test_dynamic_sizes(photo, network):
    processor = BiRefNetImageProcessor(do_dynamic_resize=True)
    assert processor.network_size(*photo) == network


def test_dynamic_bounds_and_divisor_are_settings():
    processor = BiRefNetImageProcessor(do_dynamic_resize=True, size_divisor=64, minimum_size=100, maximum_size=200)
    assert processor.network_size(10, 10) == (128, 128)
    assert processor.network_size(5000, 5000) == (192, 192)


def test_dynamic_batches_are_grouped_and_equal_one_by_one():
    processor = BiRefNetImageProcessor(do_dynamic_resize=True, minimum_size=32, maximum_size=96)
    photos = [draw_photo(90, 70), draw_photo(40, 64), draw_photo(88, 66), draw_photo(200, 30)]
    groups = processor.group_by_size(processor(photos)["pixel_values"])
    assert [(indices, tuple(batch.shape)) for indices, batch in groups] == [
        ([0, 2], (2, 3, 64, 96)),
        ([1], (1, 3, 64, 32)),
        ([3], (1, 3, 32, 96)),
    ]
    for indices, batch in groups:
        for index, values in zip(indices, batch, strict=True):
            assert torch.equal(values, values_of(processor, photos[index]))
    with pytest.raises(ValueError, match=r"64x96, 64x32, 32x96.*group_by_size"):
        processor(photos, return_tensors="pt")


def test_steps_can_be_left_out(processor):
    photo = draw_photo(64, 32)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float()
    raw = {"do_resize": False, "do_normalize": False}
    torch.testing.assert_close(values_of(processor, photo, **raw), pixels / 255)
    torch.testing.assert_close(values_of(processor, photo, **raw, do_rescale=False), pixels)
    torch.testing.assert_close(values_of(processor, photo, **raw, rescale_factor=1 / 51), pixels / 51)
    # Floating-point images are in [0, 1] already, whatever `do_rescale` says.
    for rescale in (True, False):
        torch.testing.assert_close(values_of(processor, pixels / 255, **raw, do_rescale=rescale), pixels / 255)
        array = (pixels / 255).numpy()
        torch.testing.assert_close(values_of(processor, array, **raw, do_rescale=rescale), pixels / 255)
    assert values_of(processor, draw_photo(), do_resize=False).shape == (3, 70, 90)


def test_settings_of_one_call_do_not_stay(processor):
    before = processor.to_dict()
    assert values_of(processor, draw_photo(), size={"height": 64, "width": 32}).shape == (3, 64, 32)
    assert values_of(processor, draw_photo(), size=96, resample=None).shape == (3, 96, 96)
    flat = values_of(processor, draw_photo(), image_mean=[0, 0, 0], image_std=[1, 1, 1])
    torch.testing.assert_close(flat, expected_values(draw_photo()) * STD + MEAN, atol=1e-6, rtol=1e-5)
    assert processor.to_dict() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"shortest_edge": 32}}, "height.*shortest_edge"),
        ({"size": {"height": 0, "width": 32}}, "positive"),
        ({"resample": 9}, r"2 \(bilinear\).*9"),
        ({"minimum_size": 300, "maximum_size": 200}, "300.*200"),
        ({"minimum_size": 33, "maximum_size": 63}, "multiple"),
        ({"size_divisor": 0}, "size_divisor=0"),
        ({"image_std": [1, 1, 0]}, "zero"),
        ({"image_mean": [0.5]}, "three"),
    ],
)
def test_impossible_settings(settings, message, processor):
    with pytest.raises(ValueError, match=message):
        BiRefNetImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        processor(draw_photo(), **settings)


def test_unknown_settings_are_refused(processor):
    with pytest.raises(TypeError, match=r"do_center_crop.*do_resize"):
        processor(draw_photo(), do_center_crop=True)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "empty list"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, "empty list"),
        (None, TypeError, "NoneType"),
        ([draw_photo(), 7], TypeError, "int"),
        ([[draw_photo()]], TypeError, "list"),
        (np.zeros(5, np.uint8), ValueError, r"\(5,\)"),
        (np.zeros((2, 2, 8, 8, 3), np.uint8), ValueError, r"\(2, 2, 8, 8, 3\)"),
        (np.zeros((8, 9, 7), np.uint8), ValueError, r"channels.*\(8, 9, 7\)"),
        (torch.zeros(8, 9, 7), ValueError, r"channels.*\(8, 9, 7\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "empty"),
        (np.full((8, 8, 3), 255.0), ValueError, "from|0, 1.*255"),
        (torch.full((3, 8, 8), float("nan")), ValueError, "nan"),
        (np.full((8, 8, 3), -1), ValueError, "0 to 255.*-1"),
        (torch.full((3, 8, 8), 256), ValueError, "0 to 255.*256"),
        (np.full((8, 8, 3), "a"), TypeError, "<U1"),
        (torch.zeros(3, 8, 8, dtype=torch.complex64), TypeError, "complex64"),
        (Image.fromarray(np.full((8, 8), 70000, np.int32)), ValueError, "65535.*70000"),
        (Image.fromarray(np.full((8, 8), 2.0, np.float32)), ValueError, r"\[0, 1\].*2"),
    ],
)
def test_impossible_images_are_refused(images, error, message, processor):
    with pytest.raises(error, match=message):
        processor(images)


def test_unsupported_filters_are_refused_for_tensors():
    processor = BiRefNetImageProcessor(size=SIZE, resample=Image.Resampling.LANCZOS)
    assert values_of(processor, draw_photo()).shape == (3, 32, 64)
    with pytest.raises(ValueError, match=r"bilinear.*lanczos"):
        processor(torch.zeros(3, 8, 8))


# Saving and loading

LOAD_SAVE_AND_RELOAD = """
import sys
if {without_torchvision}:
    sys.modules["torchvision"] = None
from transformers import AutoImageProcessor
from transformers.utils import is_torchvision_available
assert not ({without_torchvision} and is_torchvision_available())
import hashlib, json, torch
processor = AutoImageProcessor.from_pretrained({folder!r}, trust_remote_code=True, size={{"height": 64, "width": 96}})
processor.save_pretrained({saved!r})
again = AutoImageProcessor.from_pretrained({saved!r}, trust_remote_code=True)
assert again.to_dict() == processor.to_dict(), (again, processor)
tensor = torch.arange(3 * 50 * 40).view(3, 50, 40).remainder(251).to(torch.uint8)
values = again([{photo!r}, tensor], return_tensors="pt")["pixel_values"]
print(json.dumps([type(again).__name__, list(values.shape), hashlib.sha256(values.numpy().tobytes()).hexdigest()]))
"""


def test_auto_class_loads_saves_and_reloads_with_and_without_torchvision(tmp_path):
    photo = tmp_path / "photo.png"
    draw_photo().save(photo)
    results = []
    for without_torchvision in (True, False):
        saved = tmp_path / f"saved_{without_torchvision}"
        folder = str(birefnet.repository_folder())
        script = LOAD_SAVE_AND_RELOAD.format(
            without_torchvision=without_torchvision, folder=folder, saved=str(saved), photo=str(photo)
        )
        environment = os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # no warning
        results.append(json.loads(done.stdout))
        settings = json.loads((saved / "preprocessor_config.json").read_text())
        assert settings["auto_map"] == {"AutoImageProcessor": "image_processing_birefnet.BiRefNetImageProcessor"}
        assert settings["size"] == {"height": 64, "width": 96}
        assert (saved / "image_processing_birefnet.py").exists()
    assert results[0] == results[1]
    assert results[0][:2] == ["BiRefNetImageProcessor", [2, 3, 64, 96]]


def test_saving_needs_no_auto_class(tmp_path):
    processor = BiRefNetImageProcessor(do_dynamic_resize=True, minimum_size=64, resample=3)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings["auto_map"]["AutoImageProcessor"] == "image_processing_birefnet.BiRefNetImageProcessor"
    assert BiRefNetImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()
    changed = BiRefNetImageProcessor.from_pretrained(tmp_path, minimum_size=128, do_normalize=False)
    assert (changed.minimum_size, changed.do_normalize, changed.resample) == (128, False, 3)


def test_the_repository_has_a_complete_processor_config():
    settings = json.loads((birefnet.repository_folder() / "preprocessor_config.json").read_text())
    assert set(settings) == set(BiRefNetImageProcessor(auto_map={}).to_dict())


# Back to mattes


def outputs_of(*shape, dtype=torch.float32):
    logits = 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(logits=logits.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mattes_have_the_photos_sizes(processor, dtype):
    outputs = outputs_of(3, 1, 32, 64, dtype=dtype)
    sizes = [(70, 90), (1, 1), (10, 200)]
    mattes = processor.post_process_alpha_matte(outputs, sizes)
    assert [tuple(matte.shape) for matte in mattes] == sizes
    assert all(matte.dtype == torch.float32 and matte.min() >= 0 and matte.max() <= 1 for matte in mattes)
    for target_sizes in (torch.tensor(sizes), [list(size) for size in sizes]):
        again = processor.post_process_alpha_matte(outputs, target_sizes)
        assert all(torch.equal(a, b) for a, b in zip(again, mattes, strict=True))


@pytest.mark.parametrize("size", [(70, 90), (16, 24), (40, 40)])
def test_mattes_are_the_sigmoid_resized_as_pil_does(processor, size):
    outputs = outputs_of(1, 1, 32, 64)
    matte = Image.fromarray(outputs.logits[0, 0].sigmoid().numpy())
    expected = np.array(matte.resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.abs(processor.post_process_alpha_matte(outputs, [size])[0].numpy() - expected).max() < 1e-5


def test_guided_mattes_follow_larger_photos(processor):
    outputs, sizes = outputs_of(3, 1, 32, 64), [(70, 90), (20, 30), (70, 90)]
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    photos = [Image.fromarray(noise), Image.fromarray(noise[:20, :30]), noise]
    guided = BiRefNetImageProcessor(**{**processor.to_dict(), "do_guided_upsampling": True})
    plain = processor.post_process_alpha_matte(outputs, sizes)
    mattes = guided.post_process_alpha_matte(outputs, sizes, photos)
    planes = torch.from_numpy(noise).permute(2, 0, 1)
    small = torch.from_numpy(np.array(photos[0].resize((64, 32), Image.Resampling.BILINEAR))).permute(2, 0, 1)
    sharpened = sharpened_matte(outputs.logits[0, 0].sigmoid(), small)
    assert torch.equal(mattes[0], guided_upsampling(sharpened, small, planes))
    assert torch.equal(mattes[1], plain[1])  # a smaller photo has no finer edges
    assert not torch.equal(mattes[2], plain[2])
    for unguided in (
        guided.post_process_alpha_matte(outputs, sizes),
        processor.post_process_alpha_matte(outputs, sizes, photos),
    ):
        assert all(torch.equal(*pair) for pair in zip(unguided, plain, strict=True))
    with pytest.raises(ValueError, match="2 photos for 3 images"):
        guided.post_process_alpha_matte(outputs, sizes, photos[:2])


@pytest.mark.parametrize("side", [20, 700], ids=["smaller than the matte", "larger, of several bands"])
def test_mattes_are_differentiable(processor, side):
    guided = BiRefNetImageProcessor(**{**processor.to_dict(), "do_guided_upsampling": True})
    outputs, photo = outputs_of(1, 1, 32, 64), Image.new("RGB", (side, side), "red")
    outputs.logits.requires_grad_()
    guided.post_process_alpha_matte(outputs, [(side, side)], [photo])[0].sum().backward()
    assert outputs.logits.grad.isfinite().all() and outputs.logits.grad.abs().sum() > 0


def test_mattes_without_target_sizes_and_from_mappings(processor):
    outputs = outputs_of(2, 1, 32, 64)
    mattes = processor.post_process_alpha_matte({"logits": outputs.logits})
    assert torch.equal(torch.stack(mattes), outputs.logits[:, 0].sigmoid())


def test_semantic_segmentation(processor):
    outputs = outputs_of(2, 1, 32, 64)
    maps = processor.post_process_semantic_segmentation(outputs, [(20, 30), (40, 50)])
    mattes = processor.post_process_alpha_matte(outputs, [(20, 30), (40, 50)])
    assert all(torch.equal(one, (matte > 0.5).long()) for one, matte in zip(maps, mattes, strict=True))
    assert all(not one.is_floating_point() and one.unique().tolist() == [0, 1] for one in maps)
    strict = processor.post_process_semantic_segmentation(outputs, threshold=0.9)
    assert torch.equal(torch.stack(strict), (outputs.logits[:, 0].sigmoid() > 0.9).long())


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        ((1, 1, 8, 8), [(4, 4), (5, 5)], "2 target sizes for 1 image"),
        ((1, 1, 8, 8), [(4, 0)], r"positive.*\(4, 0\)"),
        ((1, 1, 8, 8), [(4, 4, 3)], r"\(4, 4, 3\)"),
        ((1, 2, 8, 8), [(4, 4)], r"\(1, 2, 8, 8\)"),
        ((1, 8, 8), [(4, 4)], r"\(1, 8, 8\)"),
    ],
)
def test_post_processing_refuses(shape, sizes, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.post_process_alpha_matte(outputs_of(*shape), sizes)


def test_thresholds_outside_the_range_are_refused(processor):
    with pytest.raises(ValueError, match=r"threshold.*2"):
        processor.post_process_semantic_segmentation(outputs_of(1, 1, 8, 8), threshold=2)


def test_processor_reaches_the_foreground_estimator(processor):
    image, alpha = torch.full((3, 4, 4), 0.5), torch.ones(1, 4, 4)
    torch.testing.assert_close(processor.estimate_foreground(image, alpha), image, atol=1e-3, rtol=0)
