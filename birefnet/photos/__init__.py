"""Photos in and pictures out: finding files, decoding them, encoding results and writing them whole.

Every command reads and writes pictures through this package. It needs Pillow only, not torch.
"""

from birefnet.photos.finding import PHOTO_SUFFIXES, STANDARD_STREAM, PhotoSource, find_photos
from birefnet.photos.reading import DecodedPhoto, read_photo
from birefnet.photos.writing import OUTPUT_SUFFIXES, encode_picture, write_whole


__all__ = [
    "OUTPUT_SUFFIXES",
    "PHOTO_SUFFIXES",
    "STANDARD_STREAM",
    "DecodedPhoto",
    "PhotoSource",
    "encode_picture",
    "find_photos",
    "read_photo",
    "write_whole",
]
