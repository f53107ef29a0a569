"""Encoding results and writing files atomically. Does not need torch."""

import io
import os
import struct
import uuid
import zlib
from pathlib import Path

from PIL import Image

from birefnet.repository.photo_birefnet import result_info


OUTPUT_SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}


# Chosen by measurement, see the table in docs/performance.md.
PNG_LEVEL = 1


ENCODER_OPTIONS = {"webp": {"lossless": True, "quality": 20, "method": 0}, "jpeg": {"quality": 95, "subsampling": 0}}


def encode_picture(picture: Image.Image, picture_format: str, encoder_options: dict | None = None) -> bytes:
    """
    Encodes a result.

    Clears the colours under fully transparent pixels, so that the background cannot be recovered from the file. This
    also halves the file's size.

    Args:
        picture: mode L, RGB or RGBA.
        picture_format: `"png"`, `"webp"` or `"jpeg"`.
        encoder_options: `icc_profile` and `dpi` of the file. Defaults to those in the picture's `info`.
    """
    encoder_options = result_info(picture) if encoder_options is None else encoder_options
    if picture.mode == "RGBA":
        visible = picture.getchannel("A").point([0] + [1] * 255, "1")
        picture = Image.composite(picture, Image.new("RGBA", picture.size), visible)
    if picture.mode == "L":
        encoder_options = {key: value for key, value in encoder_options.items() if key != "icc_profile"}
    if picture_format == "png":
        return _encode_png(picture, **encoder_options)
    encoded = io.BytesIO()
    picture.save(encoded, picture_format, **ENCODER_OPTIONS[picture_format], **encoder_options)
    return encoded.getvalue()


def _encode_png(
    picture: Image.Image, icc_profile: bytes | None = None, dpi: tuple[float, float] | None = None
) -> bytes:
    """
    Encodes a PNG of mode L, RGB or RGBA (https://www.w3.org/TR/png-3/).

    Files are as small as Pillow's at this level and take half the time. Pillow tries all five filters on every row;
    here every row uses the filter "up", the difference to the row above.
    """
    import numpy as np

    rows = np.asarray(picture).reshape(picture.height, -1)
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # the number of the filter "up"
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256
    colour_type = {"L": 0, "RGB": 2, "RGBA": 6}[picture.mode]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", picture.width, picture.height, 8, colour_type, 0, 0, 0))]
    if icc_profile:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile)))
    if dpi:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(float(value) / 0.0254) for value in dpi), 1)))
    chunks += [(b"IDAT", zlib.compress(filtered, PNG_LEVEL)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))
        for name, content in chunks
    )


def write_whole(content: bytes, destination: Path) -> None:
    """
    Writes a file atomically: `destination` is unchanged until the new file is complete. Creates its folder.

    Raises:
        OSError: the folder or the file cannot be written. No partial file remains.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".birefnet-{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
        os.replace(partial, destination)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
