"""Finding photos, reading them, and writing results whole or not at all. Without torch."""

import glob
import io
import os
import struct
import sys
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageCms, ImageOps


STANDARD_STREAM = "-"
# What a folder is searched for. A file that is named explicitly is tried whatever it is called.
PHOTO_SUFFIXES = (
    *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
OUTPUT_SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
# Chosen by the table in benchmarks/README.md.
PNG_LEVEL = 1
ENCODER_OPTIONS = {"webp": {"lossless": True, "quality": 20, "method": 0}, "jpeg": {"quality": 95, "subsampling": 0}}


@dataclass(frozen=True)
class PhotoSource:
    """A photo to read. `relative` is the path below the output folder (suffix not yet replaced)."""

    path: Path | None  # None: standard input
    relative: Path

    @property
    def name(self) -> str:
        return STANDARD_STREAM if self.path is None else str(self.path)


@dataclass
class DecodedPhoto:
    """An upright photo in its own mode, and what a result should take over from it."""

    image: Image.Image
    size: tuple[int, int]  # (width, height); larger than the image's own after a draft decoding
    encoder_options: dict  # ICC profile and print resolution, for `encode_picture`


def find_photos(
    arguments: list[str], excluded_folder: Path | None = None
) -> tuple[list[PhotoSource], list[tuple[str, str]]]:
    """
    Expands files, folders (searched recursively), glob patterns and `-` into photos, each once, in the given order.

    Args:
        arguments: what the user named.
        excluded_folder: a folder below the searched ones that holds results, not photos.

    Returns:
        The photos, and each argument that leads to none with the reason.
    """
    photos: dict[str, PhotoSource] = {}
    problems = []
    for argument in arguments:
        found = list(_expand(argument, excluded_folder))
        if not found:
            problems.append((argument, _why_nothing(argument)))
        for photo in found:
            photos.setdefault(STANDARD_STREAM if photo.path is None else os.path.abspath(photo.path), photo)
    return list(photos.values()), problems


def _expand(argument: str, excluded_folder: Path | None):
    path = Path(argument)
    if argument == STANDARD_STREAM:
        yield PhotoSource(None, Path("stdin"))
    elif path.is_dir():
        yield from _walk(path, path, excluded_folder)
    elif path.exists() or not glob.has_magic(argument):  # a missing file is reported when it is read
        yield PhotoSource(path, Path(path.name))
    else:
        base = _folder_before_wildcards(path)
        for match in sorted(glob.glob(argument, recursive=True)):
            if os.path.isfile(match) and _is_photo(match):
                yield PhotoSource(Path(match), Path(match).relative_to(base))


def _walk(folder: Path, base: Path, excluded_folder: Path | None):
    excluded = None if excluded_folder is None else os.path.realpath(excluded_folder)
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) != excluded
        )
        for name in sorted(files):
            if _is_photo(name):
                path = Path(parent, name)
                yield PhotoSource(path, path.relative_to(base))


def _is_photo(name: str) -> bool:
    # Hidden files are thumbnails and macOS's "._photo.jpg", which hold no photo.
    return os.path.splitext(name)[1].lower() in PHOTO_SUFFIXES and not os.path.basename(name).startswith(".")


def _folder_before_wildcards(pattern: Path) -> Path:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _why_nothing(argument: str) -> str:
    if os.path.isdir(argument):
        return f"no photo in this folder (looked for {' '.join(PHOTO_SUFFIXES)})"
    return "no photo matches this pattern"


def read_photo(source: PhotoSource, sufficient_side: int | None = None) -> DecodedPhoto:
    """
    Decodes a photo, turns it upright as its EXIF orientation says.

    Args:
        source: the photo.
        sufficient_side: width and height in pixels from which on no more detail is needed. A JPEG is then decoded at
            1/2, 1/4 or 1/8 of its size where that still reaches them, which takes a fraction of the time.

    Raises:
        OSError, ValueError: the file cannot be read, or holds no whole picture.
    """
    encoded = io.BytesIO(sys.stdin.buffer.read()) if source.path is None else source.path
    if isinstance(encoded, io.BytesIO) and not encoded.getbuffer().nbytes:
        raise ValueError("standard input is empty")
    try:
        with Image.open(encoded) as image:
            return _decode(image, sufficient_side)
    except Image.UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read (empty, corrupt, or of another kind)") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"its header claims more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which is taken for an attack"
        ) from None
    except (SyntaxError, EOFError) as error:  # what some of Pillow's decoders raise on damaged data
        raise ValueError(f"damaged picture ({error})") from None


def _decode(image: Image.Image, sufficient_side: int | None) -> DecodedPhoto:
    upright_size = _upright_size(image)
    if sufficient_side is not None:
        image.draft(None, (sufficient_side, sufficient_side))
    encoder_options = {key: image.info[key] for key in ("icc_profile", "dpi") if image.info.get(key)}
    if not all(0 < value < 1e6 for value in encoder_options.get("dpi", ())):  # such as a fraction by zero
        del encoder_options["dpi"]
    image.load()  # some metadata of a PNG stands behind its pixels
    image = ImageOps.exif_transpose(image)
    if image.mode not in ("RGB", "RGBA", "P", "PA", "1") and "icc_profile" in encoder_options:
        # A profile describes the mode that it came with: a CMYK or gray one must not be written into an RGB result.
        image = _to_srgb(image, encoder_options.pop("icc_profile"))
    return DecodedPhoto(image, upright_size, encoder_options)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of the full picture once its EXIF orientation is applied; 5 to 8 are the quarter turns."""
    swapped = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if swapped else image.size


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile, or one of another mode
        return image


def encode_picture(picture: Image.Image, picture_format: str, encoder_options: dict) -> bytes:
    """
    Encodes a result. Colours under fully transparent pixels are cleared: what was cut away must not be recoverable
    from the file, and the file becomes half as large.
    """
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
    A PNG of mode L, RGB or RGBA (https://www.w3.org/TR/png-3/): as small as Pillow's at this level in half the time,
    which Pillow spends on trying all five filters on every row. Here every row is its difference to the row above.
    """
    import numpy as np  # not at the top: `birefnet --help` has to answer at once

    rows = np.asarray(picture).reshape(picture.height, -1)
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # the filter "up"
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
    Writes a file so that at every moment `destination` is either as before or complete, creating its folder.

    Raises:
        OSError: the folder or the file cannot be written. Nothing is left behind.
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
