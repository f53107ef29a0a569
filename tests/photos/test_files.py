"""birefnet.photos.files: finding, reading and writing pictures."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from birefnet.photos.finding import PhotoSource, find_photos
from birefnet.photos.reading import read_photo
from birefnet.photos.writing import encode_picture, write_whole


def draw(width, height):
    """A picture with another colour in each corner, so that turns and flips show."""
    rows, columns = np.mgrid[:height, :width]
    red, green = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, np.full_like(red, 60)], axis=-1).astype(np.uint8))


def source(path):
    return PhotoSource(path, path.parent / path.name)


def save(path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(24, 16).save(path, **options)
    return path


def found(arguments, **options):
    photos, problems = find_photos([str(argument) for argument in arguments], **options)
    return [str(photo.relative) for photo in photos], problems


def test_folders_are_searched_recursively_for_photos_only(tmp_path):
    for name in ("b.JPG", "a.png", "deep/er/c.webp", ".hidden.png", ".thumbnails/d.png", "deep/._c.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    assert found([tmp_path]) == (["a.png", "b.JPG", "deep/er/c.webp"], [])


def test_globs_keep_the_folders_behind_the_first_wildcard(tmp_path):
    for name in ("shop/red/a.png", "shop/blue/a.png", "shop/blue/a.txt.png"):
        save(tmp_path / name)
    (tmp_path / "shop/blue/notes.txt").write_text("no photo")
    assert found([tmp_path / "shop/**/a.*"])[0] == ["blue/a.png", "blue/a.txt.png", "red/a.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_taken_as_it_is(tmp_path):
    save(tmp_path / "a[1].png")
    assert found([tmp_path / "a[1].png"]) == (["a[1].png"], [])


def test_a_photo_named_twice_is_found_once(tmp_path):
    photo = save(tmp_path / "a.png")
    assert found([photo, tmp_path, tmp_path / "*.png"])[0] == ["a.png"]


def test_the_output_folder_is_not_searched(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "out/a.png")
    assert found([tmp_path], excluded_folder=tmp_path / "out")[0] == ["a.png"]


def test_what_leads_to_no_photo_is_named(tmp_path):
    photos, problems = found([tmp_path, tmp_path / "*.jpg"])
    assert photos == []
    assert [argument for argument, _ in problems] == [str(tmp_path), str(tmp_path / "*.jpg")]
    assert "no photo in this folder" in problems[0][1] and "matches this pattern" in problems[1][1]


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


def test_a_large_jpeg_is_decoded_only_as_large_as_needed(tmp_path):
    path = tmp_path / "large.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(1000, 600).save(path, exif=exif)
    decoded = read_photo(source(path), sufficient_side=128)
    assert decoded.image.size == (150, 250), "a quarter: an eighth would have 75 pixels"
    assert decoded.size == (600, 1000), "the photo's own size is what the result gets"
    assert read_photo(source(path)).image.size == (600, 1000)


def test_cmyk_and_gray_profiles_do_not_reach_an_rgb_result(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    cmyk = tmp_path / "a.jpg"
    draw(24, 16).convert("CMYK").save(cmyk, icc_profile=srgb)  # a profile of another mode than the picture's
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
        (b"", "not a picture"),
        (b"this is a text", "not a picture"),
        (truncated_jpeg(), "truncated"),
        (huge_png(), "header claims more than"),
    ],
    ids=["empty", "text", "truncated", "huge"],
)
def test_files_that_hold_no_whole_picture_are_refused(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises((OSError, ValueError), match=message):
        read_photo(source(path))


def test_colours_under_transparent_pixels_are_not_written():
    picture = draw(24, 16)
    picture.putalpha(Image.fromarray(np.repeat(np.array([[0, 1, 255]], dtype=np.uint8), 8, axis=1).repeat(16, axis=0)))
    for picture_format in ("png", "webp"):
        pixels = np.asarray(Image.open(io.BytesIO(encode_picture(picture, picture_format, {}))).convert("RGBA"))
        assert not pixels[:, :8].any()
        assert np.array_equal(pixels[:, 8:], np.asarray(picture)[:, 8:]), "what is seen is kept exactly"


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (301, 200)])
def test_pngs_hold_every_pixel(mode, size):
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


def test_an_impossible_print_resolution_costs_no_photo(tmp_path):
    for name, resolution in (("a.tif", (0, 0)), ("b.tif", (300, 300))):
        save(tmp_path / name, dpi=resolution)
    impossible, usual = (read_photo(source(tmp_path / name)).encoder_options for name in ("a.tif", "b.tif"))
    assert impossible == {} and tuple(map(float, usual["dpi"])) == (300, 300)
    encode_picture(draw(8, 8), "png", usual)


def test_results_keep_the_colour_profile_and_masks_do_not():
    options = {"icc_profile": b"profile", "dpi": (300, 300)}
    picture = Image.open(io.BytesIO(encode_picture(draw(8, 8), "png", options)))
    assert picture.info["icc_profile"] == b"profile" and round(picture.info["dpi"][0]) == 300
    assert "icc_profile" not in Image.open(io.BytesIO(encode_picture(Image.new("L", (8, 8)), "png", options))).info


def test_writing_replaces_whole_files_and_leaves_nothing_behind(tmp_path, monkeypatch):
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
