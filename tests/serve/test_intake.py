"""What is refused before a pixel is decoded."""

import io
import struct
import zipfile
import zlib

import pytest
from PIL import Image

from birefnet.serve.errors import InvalidPhotoError, RequestError, TooLargeError
from birefnet.serve.limits import Limits

from .conftest import drawn_photo, encode


LIMITS = Limits(upload_bytes=200_000, pixels=1_000_000, batch_bytes=500_000, batch_photos=5)


def png_that_claims(width: int, height: int) -> bytes:
    """A few bytes that say they are a large picture."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PHOTO = encode(drawn_photo(), "jpeg")


def zip_of(files: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
    encoded = io.BytesIO()
    with zipfile.ZipFile(encoded, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return encoded.getvalue()


def test_heic_of_phones_is_taken():
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (extra `serve`)")
    from birefnet.serve.intake import check_photo, decode_photo

    encoded = io.BytesIO()
    heif.from_pillow(drawn_photo()).save(encoded, quality=90)
    assert decode_photo(encoded.getvalue(), LIMITS).size == drawn_photo().size
    with pytest.raises(TooLargeError, match="megapixels"):
        check_photo(encoded.getvalue(), Limits(pixels=1000))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        PHOTO[:200],
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        b"<?xml version='1.0'?><svg></svg>",
        b"%PDF-1.4",
        PHOTO + zip_of({"a.txt": b"hidden"}),
        b"GIF89a/*<script>*/=1" + bytes(50),
        PHOTO[:20] + b"<?php system($_GET[0]); ?>" + PHOTO[20:],
        zip_of({"a.png": encode(drawn_photo())}),
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ],
    ids=["empty", "text", "cut", "svg", "xml", "pdf", "jpeg+zip", "gif+script", "jpeg+php", "zip", "eps"],
)
def test_what_is_no_photo_is_refused(content):
    from birefnet.serve.intake import decode_photo

    with pytest.raises(InvalidPhotoError):
        decode_photo(content, LIMITS)


def test_too_many_pixels_bytes_and_scans(monkeypatch):
    from birefnet.serve.intake import check_photo, decode_photo

    def no_decoding(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", no_decoding)
    for size in ((2000, 2000), (60_000, 60_000), (2**31 - 1, 1)):
        with pytest.raises(TooLargeError, match="pixels"):
            decode_photo(png_that_claims(*size), LIMITS)
    with pytest.raises(TooLargeError, match="bytes"):
        check_photo(PHOTO + bytes(200_000), LIMITS)
    with pytest.raises(InvalidPhotoError, match="scans"):
        check_photo(PHOTO[:-2] + b"\xff\xda\x00\x0c" * 200, LIMITS)


@pytest.mark.parametrize("picture_format", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_usual_photos_are_decoded(picture_format):
    from PIL import features

    from birefnet.serve.intake import decode_photo

    if picture_format == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert decode_photo(encode(drawn_photo(), picture_format), LIMITS).size == (90, 70)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(drawn_photo(), "jpeg", exif=exif)
    assert decode_photo(turned, LIMITS).size == (70, 90)


def unpacked(content: bytes):
    from birefnet.serve.archives import unpack

    return dict(unpack(io.BytesIO(content), LIMITS))


def test_archives_of_many_files_or_much_air_are_refused():
    with pytest.raises(TooLargeError, match="at most 5"):
        unpacked(zip_of({f"{number}.png": b"" for number in range(10_000)}))
    lying = bytearray(zip_of({f"{number}.png": b"" for number in range(10_000)}))
    lying[-12:-8] = struct.pack("<HH", 1, 1)  # the directory's end says that there is one file
    with pytest.raises(TooLargeError):
        unpacked(bytes(lying))
    bomb = unpacked(zip_of({"a.png": bytes(50_000_000), "b.png": PHOTO}))
    assert isinstance(bomb["a.png"], TooLargeError) and bomb["b.png"] == PHOTO
    spread = unpacked(zip_of({f"{number}.png": bytes(190_000) for number in range(5)}))
    assert sum(isinstance(content, TooLargeError) for content in spread.values()) == 3  # 500,000 bytes in all


@pytest.mark.parametrize("damage", ["cut", "zip64", "no archive", "encrypted", "crc"])
def test_damaged_archives(damage):
    content = zip_of({"a.png": PHOTO}, zipfile.ZIP_STORED)
    if damage == "cut":
        content = content[:-30]
    elif damage == "zip64":
        content = content[:-22] + b"PK\x06\x07" + bytes(16) + content[-22:]
    elif damage == "no archive":
        content = bytes(100)
    else:
        changed = bytearray(content)
        if damage == "encrypted":
            changed[6] |= 1
            changed[changed.rfind(b"PK\x01\x02") + 8] |= 1
        else:
            changed[60] ^= 255
        assert isinstance(unpacked(bytes(changed))["a.png"], InvalidPhotoError)
        return
    with pytest.raises(RequestError):
        unpacked(content)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("photo.jpg", "photo.png"),
        ("../../etc/passwd", "etc/passwd.png"),
        ("/etc/passwd", "etc/passwd.png"),
        ("C:\\Windows\\a.jpg", "C_/Windows/a.png"),
        ("a\r\nSet-Cookie: x.jpg", "a__Set-Cookie_ x.png"),
        ("..", "photo.png"),
        ("", "photo.png"),
        (".jpg", "jpg.png"),
        ("photo.JPG", "photo-2.png"),
    ],
)
def test_names_in_archives_are_made_harmless(name, expected):
    from birefnet.serve.archives import safe_name

    taken = {"photo.png"} if expected == "photo-2.png" else set()
    assert safe_name(name, ".png", taken) == expected and expected.lower() in taken
