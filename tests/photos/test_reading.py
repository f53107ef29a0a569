"""birefnet.photos.reading: decoding files, downloads and standard input."""

import io
import struct
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from birefnet.photos.finding import PhotoSource
from birefnet.photos.reading import check_photo, read_photo
from birefnet.photos.writing import encode_picture


def draw(width, height):
    """A picture with another colour in each corner, so that rotations and flips are visible."""
    rows, columns = np.mgrid[:height, :width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=-1).astype(np.uint8))


def source(path):
    return PhotoSource(path, path.parent / path.name)


def save(path, **options):
    draw(24, 16).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", exif=exif)
    decoded = read_photo(source(path))
    expected = ImageOps.exif_transpose(Image.open(path))
    assert decoded.size == decoded.image.size == expected.size
    assert np.array_equal(np.asarray(decoded.image), np.asarray(expected))
    assert decoded.image.getexif().get(0x0112, 1) == 1


def test_a_large_jpeg_is_decoded_at_a_sufficient_size(tmp_path):
    path = tmp_path / "large.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(1000, 600).save(path, exif=exif)
    decoded = read_photo(source(path), sufficient_side=128)
    assert decoded.image.size == (150, 250), "a quarter, since an eighth has 75 pixels"
    assert decoded.size == (600, 1000), "the result has the photo's own size"
    assert read_photo(source(path)).image.size == (600, 1000)


def test_profiles_of_cmyk_photos_are_not_written_to_rgb_results(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = tmp_path / "a.jpg"
    draw(24, 16).convert("CMYK").save(cmyk, icc_profile=srgb)  # a profile of another mode
    assert read_photo(source(cmyk)).encoder_options == {}
    rgb = save(tmp_path / "b.jpg", icc_profile=srgb, dpi=(300, 300))
    assert read_photo(source(rgb)).encoder_options == {"icc_profile": srgb, "dpi": (300, 300)}


def huge_png():
    """A PNG whose header claims 100,000 x 100,000 pixels."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"pixels")))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def truncated_jpeg():
    encoded = io.BytesIO()
    draw(200, 200).save(encoded, "JPEG")
    return encoded.getvalue()[: encoded.tell() // 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not a picture"),
        (b"this is a text", "it is not a picture"),
        (truncated_jpeg(), "truncated"),
        (huge_png(), "it has 10,000 megapixels, and at most 179 are read"),
    ],
    ids=["empty", "text", "truncated", "huge"],
)
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=message):
        read_photo(source(path))


def test_an_impossible_print_resolution_is_dropped(tmp_path):
    for name, resolution in (("a.tif", (0, 0)), ("b.tif", (300, 300))):
        save(tmp_path / name, dpi=resolution)
    impossible, usual = (read_photo(source(tmp_path / name)).encoder_options for name in ("a.tif", "b.tif"))
    assert impossible == {} and tuple(map(float, usual["dpi"])) == (300, 300)
    encode_picture(draw(8, 8), "png", usual)


def test_checking_reads_standard_input_once(monkeypatch):
    encoded = io.BytesIO()
    draw(24, 16).save(encoded, "PNG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(encoded.getvalue())))
    checked = check_photo(PhotoSource(None, None))
    assert read_photo(checked).size == (24, 16)
    with pytest.raises(ValueError, match="standard input is empty"):
        check_photo(PhotoSource(None, None))
