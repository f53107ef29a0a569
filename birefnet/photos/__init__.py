"""Photo files: finding them, decoding them, encoding results and writing them atomically.

All commands read and write pictures through this package. It needs Pillow and NumPy, but not torch.
"""

from birefnet.photos.finding import PHOTO_SUFFIXES, STANDARD_STREAM, PhotoSource, find_photos
from birefnet.photos.reading import DecodedPhoto, check_photo, read_photo
from birefnet.photos.writing import OUTPUT_SUFFIXES, encode_picture, write_whole


__all__ = [
    "OUTPUT_SUFFIXES",
    "PHOTO_SUFFIXES",
    "STANDARD_STREAM",
    "DecodedPhoto",
    "PhotoSource",
    "check_photo",
    "encode_picture",
    "find_photos",
    "read_photo",
    "write_whole",
]
