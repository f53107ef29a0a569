"""What one request may cost: bytes, pixels, seconds and numbers of photos."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """
    Bounds that hold for every request.

    Attributes:
        upload_bytes: largest request body, and largest photo fetched from a URL.
        batch_bytes: largest request body of `/v1/batch`, and most bytes that its photos may unpack to.
        batch_photos: most photos of one batch, page upload or ZIP.
        pixels: most pixels of a photo, checked in its header before anything is decoded.
        upload_seconds: time in which a body must have arrived whole.
        idle_seconds: longest pause between two parts of a body, and time for the headers of a request.
        request_seconds: time from the complete request to its answer, per photo.
        url_seconds: time in which a photo from a URL must have arrived whole.
        redirects: most redirects of a URL.
        waiting: most requests at work or waiting; the next one is answered 429.
    """

    upload_bytes: int = 25 * 2**20
    batch_bytes: int = 250 * 2**20
    batch_photos: int = 200
    pixels: int = 50_000_000
    upload_seconds: float = 60
    idle_seconds: float = 10
    request_seconds: float = 60
    url_seconds: float = 15
    redirects: int = 3
    waiting: int = 32
