"""photo_birefnet: every way to give a photo, formats, downloads, transparency and colour profiles."""

import base64
import contextlib
import io
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from birefnet.repository import photo_birefnet
from birefnet.repository.photo_birefnet import (
    background_for,
    convert_profile,
    download,
    fill_transparent,
    load_background,
    own_alpha,
    read_picture,
    result_info,
    to_rgb,
    to_srgb,
    upright,
)

from .colour_profiles import matrix_profile


P3 = matrix_profile()


def draw(width=48, height=32):
    """A picture with another colour in each corner."""
    rows, columns = np.mgrid[:height, :width]
    red, green = columns * 255 // (width - 1), rows * 255 // (height - 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=-1).astype(np.uint8))


def encode(picture, picture_format="PNG", **options):
    encoded = io.BytesIO()
    picture.save(encoded, picture_format, **options)
    return encoded.getvalue()


def test_undecoded_images_of_datasets_and_base64(tmp_path):
    path, encoded = tmp_path / "a.png", encode(draw())
    path.write_bytes(encoded)
    for source in (
        {"bytes": encoded, "path": None},
        {"bytes": encoded, "path": "elsewhere.png"},
        {"bytes": None, "path": str(path)},
        base64.b64encode(encoded).decode(),
        base64.encodebytes(encoded).decode(),  # with line breaks
    ):
        assert np.array_equal(read_picture(source), draw())


@pytest.mark.parametrize("name", ["missing.jpg", "photos", "photos/abcd", "x" * 300])
def test_a_missing_file_is_not_taken_for_base64(name):
    with pytest.raises((FileNotFoundError, ValueError), match=name[:200]):
        read_picture(name)


@pytest.mark.parametrize("orientation", [1, 6])
def test_heic_photos(tmp_path, orientation):
    pillow_heif = pytest.importorskip("pillow_heif", reason="needs the extra heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    heif = pillow_heif.from_pillow(draw(64, 48))
    path = tmp_path / "photo.heic"
    heif.save(path, quality=-1, exif=exif.tobytes(), icc_profile=P3)
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        picture = read_picture(source)
        assert picture.size == ((64, 48) if orientation == 1 else (48, 64))
        expected = draw(64, 48) if orientation == 1 else draw(64, 48).transpose(Image.Transpose.ROTATE_270)
        assert np.abs(np.asarray(to_rgb(picture)).astype(int) - np.asarray(expected)).mean() < 3


HEIC_HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_heic_without_pillow_heif_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name not in ("HEIF", "HEIC")])
    with pytest.raises(ValueError, match=r'the extra "heif": pip install "birefnet-transformers\[heif\]"'):
        read_picture(HEIC_HEADER)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF (11.3 and newer have)")
def test_avif_photos():
    picture = read_picture(encode(draw(), "AVIF", quality=95))
    assert picture.size == (48, 32) and np.abs(np.asarray(picture).astype(int) - np.asarray(draw())).mean() < 4


def test_avif_without_support_names_the_version(monkeypatch):
    Image.init()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "AVIF"])
    with pytest.raises(ValueError, match=r"AVIF needs Pillow 11\.3"):
        read_picture(HEIC_HEADER.replace(b"heic", b"avif", 1))


def test_too_many_pixels_are_refused_with_their_number(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    with pytest.raises(ValueError, match="it has 2 megapixels, and at most 1 are read"):
        read_picture(encode(Image.new("L", (2000, 1000))))


# Downloads


@pytest.fixture(scope="module")
def server():
    """Answers by path: a picture, a redirect, half a picture, or one byte each tenth of a second."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            encoded = encode(draw())
            if self.path.startswith("/redirect-to-"):
                self.send_response(302)
                target = {"photo": "/photo.png", "ftp": "ftp://127.0.0.1/photo.png", "file": "file:///etc/hostname"}
                self.send_header("Location", target[self.path.removeprefix("/redirect-to-")])
                self.end_headers()
                return
            self.send_response(200 if self.path in ("/photo.png", "/half", "/slow") else 404)
            self.send_header("Content-Length", str(len(encoded)))
            self.end_headers()
            if self.path == "/slow":
                for byte in encoded:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            self.wfile.write(encoded[: len(encoded) // 2] if self.path == "/half" else encoded)

        def log_message(self, *arguments):
            pass

        def handle(self):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # where the client gives up
                super().handle()

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_port}"
    http_server.shutdown()
    http_server.server_close()


@pytest.mark.parametrize("path", ["/photo.png", "/redirect-to-photo"])
def test_downloads(server, path):
    assert np.array_equal(read_picture(server + path, timeout=20), draw())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/absent.png", "404"),
        ("/half", "ended .* bytes too early"),
        ("/slow", "took longer than 0.5 seconds"),
        ("/redirect-to-ftp", "neither http nor https|not allowed"),
        ("/redirect-to-file", "neither http nor https|not allowed"),
    ],
)
def test_failed_downloads_say_why(server, path, message):
    with pytest.raises(ValueError, match=f"(?s)cannot read {server}{path}.*{message}"):
        read_picture(server + path, timeout=0.5 if path == "/slow" else 20)


def test_downloads_are_limited(server):
    with pytest.raises(ValueError, match=r"larger than 9\.53674e-05 MiB"):
        download(f"{server}/photo.png", max_bytes=100)
    with pytest.raises(ValueError, match="only http and https are supported, got file"):
        download("file:///etc/hostname")
    with pytest.raises(ValueError, match="the download failed"):
        download("http://127.0.0.1:9/photo.png", timeout=5)


# Transparency


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_own_alpha_of_every_mode(mode):
    picture = draw().convert("RGBA")
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 48).astype(np.uint8), (32, 1)))
    picture.putalpha(ramp)
    if mode in ("LA", "La"):
        picture = picture.convert("LA")
    if mode == "PA":
        picture = draw().convert("P").convert("PA")
        picture.putalpha(ramp)
    picture = upright(picture if picture.mode == mode else picture.convert(mode))
    assert np.abs(np.asarray(own_alpha(picture)).astype(int) - np.asarray(ramp)).max() <= 1


def test_own_alpha_of_a_colour_key_and_of_opaque_pictures():
    picture = Image.new("RGB", (4, 2), "red")
    picture.paste("blue", (0, 0, 2, 2))
    keyed = read_picture(encode(picture, transparency=(0, 0, 255)))
    assert np.array_equal(np.asarray(own_alpha(keyed)), [[0, 0, 255, 255]] * 2)
    assert own_alpha(draw()) is None and own_alpha(draw().convert("RGBA")) is None


def test_hidden_colours_are_filled_and_the_profile_is_kept():
    colours = draw()
    colours.info["icc_profile"] = P3
    alpha = Image.fromarray((np.indices((32, 48))[1] > 20).astype(np.uint8) * 7)
    filled = fill_transparent(colours, alpha)
    assert np.array_equal(filled, np.where(np.asarray(alpha)[..., None] > 0, np.asarray(colours), 255))
    assert filled.info["icc_profile"] == P3


# Colour profiles


def test_display_p3_becomes_srgb_on_request():
    """sRGB red in Display P3 is (234, 51, 35), https://www.w3.org/TR/css-color-4/#color-conversion."""
    red = Image.new("RGB", (2, 2), (234, 51, 35))
    red.info["icc_profile"] = P3
    converted = to_srgb(red)
    assert np.abs(np.array(converted.getpixel((0, 0))) - (255, 0, 0)).max() <= 8  # a plain gamma, not sRGB's curve
    assert "icc_profile" not in converted.info
    assert to_srgb(draw()).getpixel((5, 5)) == draw().getpixel((5, 5))


def test_a_damaged_profile_changes_nothing():
    picture = draw()
    assert convert_profile(picture, b"no profile", None) is picture


def test_gray_and_cmyk_photos_lose_their_profile_and_rgb_ones_keep_it():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode, kept in (("RGB", True), ("RGBA", True), ("P", True), ("CMYK", False), ("L", False), ("LA", False)):
        picture = draw().convert("L").convert(mode) if mode == "LA" else draw().convert(mode)
        picture.info.update(icc_profile=srgb, dpi=(300, 300))
        rgb = to_rgb(picture)
        assert rgb.mode == "RGB" and ("icc_profile" in rgb.info) == kept, mode
        assert rgb.info["dpi"] == (300, 300)


def test_backgrounds_are_converted_to_the_photos_colour_space():
    photo = draw()
    assert background_for((255, 0, 0), photo) == (255, 0, 0)
    photo.info["icc_profile"] = P3
    assert np.abs(np.array(background_for((255, 0, 0), photo)) - (234, 51, 35)).max() <= 8
    picture = background_for(load_background(Image.new("RGB", (3, 3), "red")), photo)
    assert np.abs(np.array(picture.getpixel((0, 0))) - (234, 51, 35)).max() <= 8
    beach = Image.new("RGB", (3, 3), (234, 51, 35))
    beach.info["icc_profile"] = P3
    assert background_for(beach, photo) is beach
    assert background_for(None, photo) is None


def test_results_take_over_profile_and_resolution():
    photo = draw()
    photo.info.update(icc_profile=P3, dpi=(300, 300), comment=b"made by a camera")
    assert result_info(photo, "RGBA") == {"icc_profile": P3, "dpi": (300, 300)}
    assert result_info(photo, "L") == {"dpi": (300, 300)}
    photo.info["dpi"] = (0, 0)
    assert result_info(photo) == {"icc_profile": P3}


def test_this_file_needs_neither_torch_nor_numpy_on_import():
    code = (
        f"import sys; import {photo_birefnet.__name__}; print({{'torch', 'numpy', 'transformers'}} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert process.stdout == "set()\n"
