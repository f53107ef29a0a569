"""Encoded photos from strangers: checked before they are decoded, then decoded as every photo of the project is."""

import contextlib
import functools
import io
import warnings
from pathlib import Path

from PIL import Image

from birefnet.photos.finding import PhotoSource
from birefnet.photos.reading import read_photo
from birefnet.serve.errors import InvalidPhotoError, TooLargeError
from birefnet.serve.limits import Limits


FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "MPO", "HEIF")

# libjpeg decodes every scan of a progressive JPEG over the whole picture. Cameras and editors write about ten; a file
# with thousands keeps a core busy for minutes.
_MOST_JPEG_SCANS = 100
_JPEG_SCAN = b"\xff\xda"

# A file that is a picture for us and something else for whoever stores it beside the result (a "polyglot").
_MARKS_OF_DOCUMENTS = (b"%pdf-", b"<svg", b"<html", b"<script", b"<!doctype", b"<?php", b"#!/")
_HEAD = 1024


def check_photo(encoded: bytes, limits: Limits) -> None:
    """
    Refuses what is no photo or exceeds the limits. Only the header is read; no pixel is decoded.

    Raises:
        InvalidPhotoError: empty, not a picture of the allowed formats, damaged, or another kind of file as well.
        TooLargeError: too many bytes or pixels.
    """
    if not encoded:
        raise InvalidPhotoError("The file is empty.")
    if len(encoded) > limits.upload_bytes:
        raise TooLargeError(f"The photo has {len(encoded):,} bytes; at most {limits.upload_bytes:,} are allowed.")
    _check_not_a_document(encoded)
    width, height = _size_in_header(encoded)
    if width * height > limits.pixels:
        raise TooLargeError(
            f"The photo has {width} x {height} pixels; at most {limits.pixels / 1e6:g} megapixels are allowed."
        )
    if encoded.count(_JPEG_SCAN) > _MOST_JPEG_SCANS and encoded.startswith(b"\xff\xd8"):
        raise InvalidPhotoError(f"The JPEG has more than {_MOST_JPEG_SCANS} scans, which is taken for an attack.")


def _check_not_a_document(encoded: bytes) -> None:
    head = encoded[:_HEAD].lower()
    if any(mark in head for mark in _MARKS_OF_DOCUMENTS) or is_archive(encoded):
        raise InvalidPhotoError(
            "The file is not a photo, or it is something else as well (SVG, HTML, PDF, script, ZIP). "
            "Send a JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP or TIFF file."
        )


def is_archive(encoded: bytes) -> bool:
    """Whether a ZIP reader takes these bytes for an archive: it looks for the directory at the end."""
    return encoded.startswith(b"PK\x03\x04") or b"PK\x05\x06" in encoded[-(2**16 + 22) :]


def _size_in_header(encoded: bytes) -> tuple[int, int]:
    """(width, height) as the header has it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            with Image.open(io.BytesIO(encoded), formats=_known_formats()) as image:
                return image.size
    except Image.DecompressionBombError:
        raise TooLargeError("The photo has more pixels than are allowed.") from None
    except Image.UnidentifiedImageError:
        raise InvalidPhotoError(
            "The file is not a picture that can be read here: it is damaged or of another kind. "
            "Send a JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP or TIFF file."
        ) from None
    except Exception as error:  # decoders raise almost anything on damaged headers
        raise InvalidPhotoError(f"The picture is damaged ({type(error).__name__}).") from None


@functools.cache
def _known_formats() -> list[str]:
    """The formats of `FORMATS` that can be read here. HEIF needs a package of its own, AVIF a recent Pillow."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decode_photo(encoded: bytes, limits: Limits) -> Image.Image:
    """
    Checks and decodes a photo: upright, in its own colours.

    Raises:
        InvalidPhotoError, TooLargeError: as [`check_photo`], or the pixels are damaged.
    """
    check_photo(encoded, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return read_photo(PhotoSource(None, Path("upload"), content=encoded)).image
    except (OSError, ValueError, MemoryError) as error:
        raise InvalidPhotoError(f"The picture is damaged ({error}).") from None
