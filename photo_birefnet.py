"""
Reading photos: from a path, a URL, encoded bytes or an array to an upright picture. Needs Pillow and NumPy only.

The image processor, the pipeline and the command line all read photos through this file. NumPy is imported inside the
functions that need it, so that `birefnet --help` answers at once.
"""

import base64
import binascii
import http.client
import io
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps


MAX_DOWNLOAD_BYTES = 512 * 2**20

_CHANNEL_COUNTS = (1, 2, 3, 4)  # gray, gray + alpha, RGB, RGB + alpha
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}
_AVIF_BRANDS = {b"avif", b"avis"}
_STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # modes with premultiplied alpha, and the same without
_DOWNLOAD_CHUNK = 2**20  # bytes


def read_picture(source: Any, timeout: float | None = None, input_data_format: str | None = None) -> Image.Image:
    """
    Reads one photo and turns it upright.

    Args:
        source (`str`, `os.PathLike`, `bytes`, `dict`, binary file, `PIL.Image.Image` or `np.ndarray`):
            A path, a URL (`http://`, `https://` or `data:`), an encoded file, the same in base64, a dictionary with
            `"bytes"` or `"path"` (as `datasets` gives undecoded images), or an image. See [`array_to_picture`] for
            arrays.
        timeout (`float`, *optional*): Seconds that a download may take. No limit by default.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, for arrays.

    Returns:
        `PIL.Image.Image`: The upright photo in its own mode, with its own `info`. Of an animation the first frame.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: The file does not exist or may not be read.
        ValueError: The photo is damaged, has too many pixels or an unknown format, or the download failed.
        TypeError: `source` has another type.
    """
    if isinstance(source, Mapping) and ("bytes" in source or "path" in source):
        source = source.get("bytes") or source.get("path")
    if hasattr(source, "__array_interface__") and not isinstance(source, Image.Image):
        return array_to_picture(source, input_data_format)
    if not isinstance(source, str | os.PathLike | bytes | Image.Image) and not hasattr(source, "read"):
        raise TypeError(
            "an image must be a path, a URL, an encoded file, a PIL image, a NumPy array or a torch tensor, "
            f"got {type(source).__name__}"
        )
    name = str(source)[:200] if isinstance(source, str | os.PathLike) else "the image"
    try:
        with opened(source, timeout) as image:
            return upright(image)
    except ValueError as error:
        raise ValueError(f"cannot read {name}: {error}") from error


@contextmanager
def opened(source: Any, timeout: float | None = None) -> Iterator[Image.Image]:
    """
    Opens an encoded photo. Its pixels are decoded inside the `with` block, and decoding errors become `ValueError`s.

    Args:
        source, timeout: As for [`read_picture`], without arrays and dictionaries.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: The file does not exist or may not be read.
        ValueError: What is wrong with the photo, in one sentence without the photo's name.
    """
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            with _open(_encoded(source, timeout)) as image:
                yield image
    except (FileNotFoundError, PermissionError, IsADirectoryError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise ValueError("it is not a picture, or its format is unknown to Pillow") from None
    except Image.DecompressionBombError as error:
        raise ValueError(_too_many_pixels(error)) from error
    except ValueError:
        raise
    except Exception as error:  # decoders raise almost any exception on damaged data
        raise ValueError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def _encoded(source: Any, timeout: float | None) -> Any:
    """Resolves URLs and base64 to bytes. Returns paths, bytes and files unchanged."""
    if not isinstance(source, str):
        return source
    if source.startswith(("http://", "https://")):
        return download(source, timeout)
    if source.startswith("data:"):
        with urllib.request.urlopen(source) as response:
            return response.read()
    return source if os.path.exists(source) else _decoded_base64(source) or source


def _decoded_base64(text: str) -> bytes | None:
    """The picture that a text holds in base64, or `None`. The name of a missing file can be valid base64, too."""
    try:
        decoded = base64.b64decode("".join(text.split()), validate=True)
        _open(decoded).close()
    except (binascii.Error, UnicodeError, Image.UnidentifiedImageError):
        return None
    return decoded


def _open(source: Any) -> Image.Image:
    """`PIL.Image.open`, with HEIF support where `pillow-heif` is installed."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(file)
    except Image.UnidentifiedImageError:
        brand = _container_brand(file)
        if brand in _AVIF_BRANDS:
            raise ValueError("AVIF needs Pillow 11.3 or newer: pip install --upgrade pillow") from None
        if brand not in _HEIF_BRANDS:
            raise
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise ValueError(
            'HEIC and HEIF photos need the extra "heif": pip install "birefnet-transformers[heif]", or pip install '
            "pillow-heif"
        ) from None
    register_heif_opener()
    return Image.open(file)


def _container_brand(file: Any) -> bytes:
    """The brand of an ISO media file (HEIF, AVIF), which its bytes 4 to 12 hold; empty for any other file."""
    if hasattr(file, "read"):
        file.seek(0)
        start = file.read(12)
    else:
        with open(file, "rb") as opened_file:
            start = opened_file.read(12)
    return start[8:12] if start[4:8] == b"ftyp" else b""


def _too_many_pixels(error: Image.DecompressionBombError) -> str:
    size = re.search(r"\d+", str(error))  # Pillow raises before it gives access to the size
    megapixels = f"{int(size[0]) / 1e6:,.0f} megapixels" if size else "too many pixels"
    return (
        f"it has {megapixels}, and at most {2 * Image.MAX_IMAGE_PIXELS / 1e6:,.0f} are read, so that memory stays "
        "bounded: scale it down or cut it into parts first"
    )


def download(url: str, timeout: float | None = None, max_bytes: int = MAX_DOWNLOAD_BYTES) -> bytes:
    """
    Downloads a file over http or https.

    Args:
        url (`str`): The address.
        timeout (`float`, *optional*): Seconds that the whole download may take. No limit by default.
        max_bytes (`int`, *optional*, defaults to 512 MiB): The largest file that is accepted.

    Raises:
        ValueError: The scheme is another, the server cannot be reached or answers with an error, the file is larger
            than `max_bytes`, or the time is over.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"only http and https are supported, got {url.split(':')[0]}")
    # Some sites refuse Python's default agent.
    request = urllib.request.Request(url, headers={"User-Agent": "birefnet"})
    deadline = None if timeout is None else time.monotonic() + timeout
    content = bytearray()
    try:
        with urllib.request.build_opener(_WebRedirects).open(request, timeout=timeout) as response:
            while chunk := response.read1(_DOWNLOAD_CHUNK):
                content += chunk
                if len(content) > max_bytes:
                    raise ValueError(f"the download is larger than {max_bytes / 2**20:g} MiB")
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError
            missing = response.length
    except TimeoutError:
        raise ValueError(f"the download took longer than {timeout:g} seconds") from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise ValueError(f"the download took longer than {timeout:g} seconds") from None
        raise ValueError(f"the download failed: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"the download failed: {error}") from error
    if missing:
        raise ValueError(f"the download ended {missing} bytes too early")
    return bytes(content)


class _WebRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only. urllib would also follow them to ftp."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not url.lower().startswith(("http://", "https://")):
            raise urllib.error.URLError(f"the server redirects to {url}, which is neither http nor https")
        return super().redirect_request(request, file, code, message, headers, url)


def upright(image: Image.Image) -> Image.Image:
    """Decodes a picture and applies its EXIF orientation. Returns a picture in memory, independent of its file."""
    image.load()  # a PNG may hold metadata after its pixels
    if image.mode in _STRAIGHT_ALPHA:
        image = image.convert(_STRAIGHT_ALPHA[image.mode])
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        return ImageOps.exif_transpose(image)
    return image if type(image) is Image.Image else image.copy()  # closing the file frees the file's own picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """
    Converts an upright picture of any mode to 8-bit RGB. Drops transparency and keeps the colours below it.

    The result's `info` keeps the resolution and an RGB profile. Gray and CMYK pictures with a profile are converted to
    sRGB, since their profile does not describe RGB values. Skips the copy when the picture is RGB already.

    Raises:
        ValueError: 32-bit integers or floating-point values are outside the range of an image.
    """
    if picture.mode == "RGB":
        return picture
    import numpy as np

    colours = picture
    if picture.mode.startswith("I"):  # 16-bit gray; some such files open as 32-bit "I"
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values must be 16-bit, 0 to 65535, got {values.min()} to {values.max()}")
        colours = array_to_picture(values.astype(np.uint16))
    elif picture.mode == "F":
        colours = array_to_picture(np.asarray(picture))
    elif picture.mode == "LA":
        colours = picture.convert("L")
    elif picture.mode == "P" and "transparency" in picture.info:
        colours = picture.convert("RGBA")  # the same colours as directly, without Pillow's warning
    info = dict(picture.info)
    if picture.mode not in ("RGBA", "P", "PA", "1") and (profile := info.pop("icc_profile", None)):
        colours = convert_profile(colours, profile, None)
    colours = colours.convert("RGB")
    colours.info = {key: value for key, value in info.items() if key in ("icc_profile", "dpi")}
    return colours


def own_alpha(picture: Image.Image) -> Image.Image | None:
    """The transparency of an upright picture (mode L, 255 is opaque), or `None` where all of it is opaque."""
    if not picture.has_transparency_data or picture.mode.startswith(("I", "F")):
        return None
    alpha = (picture if picture.mode in ("RGBA", "LA") else picture.convert("RGBA")).getchannel("A")
    return None if alpha.getextrema()[0] == 255 else alpha


def fill_transparent(colours: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """
    Replaces the hidden colours of fully transparent pixels by white.

    The network would take them for a part of the subject. White was measured against black, gray and compositing on a
    colour, on cut-outs of 40 photos of DUTS-TE with the embedded weights: IoU of matte times alpha 0.995 with white,
    0.994 with black, 0.990 with gray, 0.93 to 0.95 composited, and 0.869 with the photo's own hidden background.
    """
    if alpha is None:
        return colours
    visible = alpha.point([0] + [255] * 255)
    filled = Image.composite(colours, Image.new("RGB", colours.size, "white"), visible)
    filled.info = dict(colours.info)
    return filled


def convert_profile(picture: Image.Image, source: bytes | None, target: bytes | None) -> Image.Image:
    """
    Converts a picture from one ICC profile to another RGB profile; `None` stands for sRGB.

    Returns the picture unchanged where a profile is damaged or describes another mode. The result's `info` names the
    target.
    """
    if source == target:
        return picture
    source_and_target = (
        ImageCms.createProfile("sRGB") if profile is None else io.BytesIO(profile) for profile in (source, target)
    )
    try:
        converted = ImageCms.profileToProfile(picture, *source_and_target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture
    converted.info = {key: value for key, value in picture.info.items() if key != "icc_profile"}
    if target is not None:
        converted.info["icc_profile"] = target
    return converted


def to_srgb(colours: Image.Image) -> Image.Image:
    """Converts an RGB picture with a colour profile to sRGB. Returns a picture without a profile unchanged."""
    return convert_profile(colours, colours.info.get("icc_profile"), None)


def result_info(photo: Image.Image, mode: str = "RGB") -> dict:
    """
    What a result of the given mode takes over from its photo's `info`: `icc_profile` and `dpi`.

    A gray result gets no profile, since the photo's describes RGB values. An impossible resolution, such as zero, is
    left out.
    """
    info = {key: photo.info[key] for key in ("icc_profile", "dpi") if photo.info.get(key)}
    if mode == "L":
        info.pop("icc_profile", None)
    if not all(0 < float(value) < 1e6 for value in info.get("dpi", ())):
        del info["dpi"]
    return info


def load_background(background: Any, timeout: float | None = None) -> tuple[int, ...] | Image.Image | None:
    """
    Reads a background.

    Args:
        background: `None` or `"transparent"`; a colour as a CSS name, `"#rrggbb"` or three values from 0 to 255; or a
            picture of any kind that [`read_picture`] accepts.
        timeout (`float`, *optional*): Seconds that a download may take.

    Returns:
        `None` for a transparent background, a colour (red, green, blue), or a PIL image of mode RGB.

    Raises:
        ValueError: The background is neither a colour nor a readable picture.
    """
    if background is None or isinstance(background, tuple | list):
        return background
    if isinstance(background, str):
        if background == "transparent":
            return None
        with suppress(ValueError):
            return ImageColor.getrgb(background)[:3]
    try:
        picture = read_picture(background, timeout)
    except OSError as error:
        raise ValueError(
            f"background={str(background)[:200]!r} is neither a colour (white, #ff8800) nor a picture's path or URL"
        ) from error
    return to_rgb(picture)


def background_for(background: Any, photo: Image.Image) -> Any:
    """Converts a background, as [`load_background`] gives it, to the colour space of a photo."""
    profile = photo.info.get("icc_profile")
    if profile is None and not isinstance(background, Image.Image):
        return background
    if isinstance(background, Image.Image):
        return convert_profile(background, background.info.get("icc_profile"), profile)
    if isinstance(background, tuple | list) and len(background) == 3:
        pixel = Image.new("RGB", (1, 1), tuple(background))
        return convert_profile(pixel, None, profile).getpixel((0, 0))
    return background


def array_to_picture(array: Any, input_data_format: str | None = None) -> Image.Image:
    """
    Converts an array to an 8-bit picture.

    Args:
        array (`np.ndarray`): (H, W), (H, W, C) or (C, H, W) with 1 to 4 channels: gray, gray and alpha, RGB, or RGB
            and alpha. Booleans, integers from 0 to 255, `uint16` from 0 to 65535, or floating point from 0 to 1.
        input_data_format (`str`, *optional*): `"channels_first"` or `"channels_last"`, where the shape allows both.
            By default channels last.

    Returns:
        `PIL.Image.Image` of mode RGB, or RGBA if the array has an alpha channel.

    Raises:
        ValueError: The shape or the values are not an image's.
        TypeError: The array holds something other than numbers.
    """
    import numpy as np

    check_dimensions(array.shape)
    if array.dtype.kind not in "buif":
        raise TypeError(f"an image array must hold booleans, integers or floating-point numbers, got {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    check_values(array)
    if array.ndim == 3:
        array = np.moveaxis(array, channel_axis(array.shape, input_data_format, preferred=-1), -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.dtype.kind == "f":
        array = (array.clip(0, 1) * 255).round()
    elif array.dtype == np.uint16:
        array = (array / 257).round()
    elif array.dtype == bool:
        array = array * 255
    picture = Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))
    return picture.convert("RGBA" if picture.mode in ("LA", "RGBA") else "RGB")


def check_dimensions(shape: tuple[int, ...]) -> None:
    """Refuses a shape that is not (H, W), (H, W, C) or (C, H, W)."""
    if len(shape) not in (2, 3):
        raise ValueError(
            f"an image must have 2 dimensions (height, width) or 3 (with channels), got shape {tuple(shape)}"
        )
    if 0 in shape:
        raise ValueError(f"an image must not be empty, got shape {tuple(shape)}")


def check_values(image: Any) -> None:
    """Refuses values of an array or tensor whose meaning would have to be guessed."""
    dtype = str(image.dtype)
    if dtype.endswith(("bool", "uint8", "uint16")):
        return  # the whole range is allowed
    low, high = float(image.min()), float(image.max())
    if "float" in dtype and not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise ValueError(f"floating-point images must have values in [0, 1], got {low:g} to {high:g} ({dtype})")
    if "int" in dtype and not (low >= 0 and high <= 255):
        raise ValueError(
            f"integer images must have values from 0 to 255 (0 to 65535 as uint16), got {low:g} to {high:g} ({dtype})"
        )


def channel_axis(shape: tuple[int, ...], input_data_format: str | None, preferred: int) -> int:
    """Which axis of a three-dimensional image holds the channels: 0 or -1. `preferred` decides where both could."""
    if input_data_format is not None:
        name = str(getattr(input_data_format, "value", input_data_format))
        if name not in ("channels_first", "channels_last"):
            raise ValueError(f'`input_data_format` must be "channels_first" or "channels_last", got {name!r}')
        axes = [0 if name == "channels_first" else -1]
    else:
        axes = [preferred, -1 - preferred]
    for axis in axes:
        if shape[axis] in _CHANNEL_COUNTS:
            return axis
    raise ValueError(
        f"an image must have 1, 2, 3 or 4 channels, first or last, got shape {tuple(shape)}"
        + (f" with input_data_format={str(input_data_format)!r}" if input_data_format is not None else "")
    )
