"""Decoding the photos that a command found. Does not need torch."""

import sys
from dataclasses import dataclass, replace

from PIL import Image

from birefnet.photos.finding import PhotoSource
from birefnet.repository.photo_birefnet import download, opened, result_info, upright


DOWNLOAD_TIMEOUT = 60  # seconds


@dataclass
class DecodedPhoto:
    """An upright photo in its own mode. Its `info` may hold an ICC profile and a resolution."""

    image: Image.Image
    size: tuple[int, int]  # (width, height) of the full photo, also when it was decoded at reduced size
    had_16_bits: bool = False  # whether the file has 16 bits per channel, of which Pillow keeps 8

    @property
    def encoder_options(self) -> dict:
        """The ICC profile and resolution that a result takes over, for `encode_picture`."""
        has_rgb_profile = self.image.mode in ("RGB", "RGBA", "P", "PA")
        return result_info(self.image, "RGB" if has_rgb_profile else "L")


def read_photo(source: PhotoSource, sufficient_side: int | None = None) -> DecodedPhoto:
    """
    Decodes a photo and applies its EXIF orientation.

    Args:
        source: the photo.
        sufficient_side: width and height in pixels that are sufficient. A JPEG is then decoded at 1/2, 1/4 or 1/8 of
            its size where both sides stay at least as large, which takes a fraction of the time.

    Raises:
        OSError, ValueError: the file cannot be read, or does not hold a whole picture.
    """
    with opened(_encoded(source)) as image:
        had_16_bits, size = _has_16_bits(image), _upright_size(image)  # reading the EXIF data can decode a PNG
        if sufficient_side is not None:
            image.draft(None, (sufficient_side, sufficient_side))
        return DecodedPhoto(upright(image), size, had_16_bits)


def check_photo(source: PhotoSource) -> PhotoSource:
    """
    Opens a photo without decoding its pixels, which takes about a millisecond.

    Returns:
        The source. Standard input and downloads are replaced by their content, since they can be read only once.

    Raises:
        OSError, ValueError: as for [`read_photo`], as far as the file's header shows it.
    """
    encoded = _encoded(source)
    with opened(encoded):
        pass
    return source if source.path is not None else replace(source, content=encoded)


def _encoded(source: PhotoSource):
    """The photo's path or its encoded bytes."""
    if source.content is not None:
        return source.content
    if source.url is not None:
        return download(source.url, timeout=DOWNLOAD_TIMEOUT)
    if source.path is not None:
        return source.path
    encoded = sys.stdin.buffer.read()
    if not encoded:
        raise ValueError("standard input is empty")
    return encoded


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) after the EXIF orientation is applied. Orientations 5 to 8 swap both."""
    swapped = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if swapped else image.size


def _has_16_bits(image: Image.Image) -> bool:
    """Whether a picture that is not decoded yet has 16 bits per channel. Its mode tells that for gray ones only."""
    return image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
