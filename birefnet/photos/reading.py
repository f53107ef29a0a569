"""Decoding photos: upright, in their own colours, or an error that says what is wrong. Without torch."""

import io
import sys
from dataclasses import dataclass

from PIL import Image, ImageCms, ImageOps

from birefnet.photos.finding import PhotoSource


@dataclass
class DecodedPhoto:
    """An upright photo in its own mode, and what a result should take over from it."""

    image: Image.Image
    size: tuple[int, int]  # (width, height); larger than the image's own after a draft decoding
    encoder_options: dict  # ICC profile and print resolution, for `encode_picture`


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
