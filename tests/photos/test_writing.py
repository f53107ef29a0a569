"""birefnet.photos.writing: encoding results and writing files atomically."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from birefnet.photos.writing import encode_picture, write_whole


def draw(width, height):
    """A picture with another colour in each corner, so that rotations and flips are visible."""
    rows, columns = np.mgrid[:height, :width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=-1).astype(np.uint8))


def test_colours_under_transparent_pixels_are_not_written():
    picture = draw(24, 16)
    picture.putalpha(Image.fromarray(np.repeat(np.array([[0, 1, 255]], dtype=np.uint8), 8, axis=1).repeat(16, axis=0)))
    for picture_format in ("png", "webp"):
        pixels = np.asarray(Image.open(io.BytesIO(encode_picture(picture, picture_format, {}))).convert("RGBA"))
        assert not pixels[:, :8].any()
        assert np.array_equal(pixels[:, 8:], np.asarray(picture)[:, 8:]), "visible pixels are kept exactly"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (301, 200)])
def test_pngs_are_lossless(mode, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], len(mode)), dtype=np.uint8)
    pixels[pixels[..., -1] == 0] = 0
    encoded = encode_picture(Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels), "png", {})
    with Image.open(io.BytesIO(encoded)) as picture:
        picture.verify()  # the checksums
    picture = Image.open(io.BytesIO(encoded))
    assert (picture.format, picture.mode, picture.size) == ("PNG", mode, size)
    assert np.array_equal(np.asarray(picture).reshape(pixels.shape), pixels)


def test_pngs_are_about_as_small_as_pillows():
    noise = np.random.default_rng(0).standard_normal((400, 600, 3)) * 3
    picture = Image.fromarray((draw(600, 400) + noise).clip(0, 255).astype(np.uint8))
    by_pillow = io.BytesIO()
    picture.save(by_pillow, "PNG", compress_level=1)
    assert len(encode_picture(picture, "png", {})) < 1.1 * by_pillow.tell()


def test_results_keep_the_colour_profile_and_masks_do_not():
    options = {"icc_profile": b"profile", "dpi": (300, 300)}
    picture = Image.open(io.BytesIO(encode_picture(draw(8, 8), "png", options)))
    assert picture.info["icc_profile"] == b"profile" and round(picture.info["dpi"][0]) == 300
    assert "icc_profile" not in Image.open(io.BytesIO(encode_picture(Image.new("L", (8, 8)), "png", options))).info


def test_writing_is_atomic(tmp_path, monkeypatch):
    destination = tmp_path / "new/folder/a.png"
    write_whole(b"first", destination)
    write_whole(b"second", destination)
    assert destination.read_bytes() == b"second"
    assert os.listdir(destination.parent) == ["a.png"]

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(b"third", destination)
    assert destination.read_bytes() == b"second"
    assert os.listdir(destination.parent) == ["a.png"]


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    write_whole(b"", tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode
