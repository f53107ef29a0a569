"""Size, region of interest, crop, scale and position of a result, in the terms of remove.bg."""

import math
import re
from dataclasses import dataclass

from PIL import Image

from birefnet.serve.errors import RequestError


MEGAPIXELS = {
    "preview": 0.25,
    "small": 0.25,
    "regular": 0.25,
    "medium": 1.5,
    "hd": 4,
    "full": 25,
    "4k": 25,
    "50MP": 50,
}
_VISIBLE = 12  # opacity (0 to 255) from which on a pixel belongs to the subject
_LENGTH = re.compile(r"(-?\d+(?:\.\d+)?)(px|%)?")


@dataclass(frozen=True)
class Length:
    """A distance in pixels, or in percent of something."""

    value: float
    percent: bool

    def pixels(self, whole: float) -> float:
        return self.value * whole / 100 if self.percent else self.value


def parse_lengths(name: str, text: str, counts: tuple[int, ...], most: tuple[float, float]) -> list[Length]:
    """
    Lengths such as `"10%"` or `"30px 5%"`.

    Args:
        name: the field's name, for messages.
        text: what the request has.
        counts: how many lengths are allowed.
        most: the largest percentage and the most pixels.

    Raises:
        RequestError: another number of lengths, or one that cannot be read or is out of range.
    """
    lengths = []
    for word in text.split():
        match = _LENGTH.fullmatch(word)
        length = match and Length(float(match[1]), match[2] == "%")
        if not length or not 0 <= length.value <= (most[0] if length.percent else most[1]):
            raise RequestError(
                f"{name}: {word[:40]!r} is not a length from 0 to {most[1]:g}px or {most[0]:g}%.", "invalid_parameters"
            )
        lengths.append(length)
    if len(lengths) not in counts:
        allowed = " or ".join(map(str, counts))
        raise RequestError(f"{name}: needs {allowed} lengths, has {len(lengths)}.", "invalid_parameters")
    return lengths


class Frame:
    """
    What of a photo the network sees, and where the subject stands in the result.

    Args:
        size: one of `MEGAPIXELS`, or `"auto"` for the photo's own size.
        roi: left, top, right, bottom of the region that may hold the subject; outside of it all is background.
        margins: top, right, bottom, left around the subject, to which the result is cropped; `None` keeps it whole.
        scale: the subject's share of the result's sides, from 0.1 to 1; `None` leaves its size.
        position: horizontal and vertical place of the subject, each from 0 to 1; `None` leaves it where it is.
    """

    def __init__(
        self,
        size: str = "auto",
        roi: list[Length] | None = None,
        margins: list[Length] | None = None,
        scale: float | None = None,
        position: tuple[float, float] | None = None,
    ):
        self.size, self.roi, self.margins, self.scale, self.position = size, roi, margins, scale, position
        self.full_size = self.corner = None  # (width, height); (left, top) of the region

    def before(self, photo: Image.Image) -> Image.Image:
        """The part of a photo for the network, at the size of the result."""
        original = photo.size
        pixels = MEGAPIXELS.get(self.size, math.inf) * 1e6
        if photo.width * photo.height > pixels:
            factor = math.sqrt(pixels / (photo.width * photo.height))
            smaller = tuple(max(1, math.floor(side * factor)) for side in photo.size)
            if photo.mode not in ("RGB", "RGBA", "L", "LA", "F", "I"):
                photo = photo.convert("RGBA" if "transparency" in photo.info else "RGB")
            photo = photo.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=3)
        self.full_size, self.corner = photo.size, (0, 0)
        return photo if self.roi is None else self._region(photo, original)

    def _region(self, photo: Image.Image, original: tuple[int, int]) -> Image.Image:
        sides = (*original, *original)
        left, top, right, bottom = (
            min(max(length.pixels(side) / side, 0), 1) for length, side in zip(self.roi, sides, strict=True)
        )
        box = (
            round(left * photo.width),
            round(top * photo.height),
            round(right * photo.width),
            round(bottom * photo.height),
        )
        if box[2] <= box[0] or box[3] <= box[1]:
            raise RequestError("roi: the region is empty; it needs left, top, right, bottom.", "invalid_parameters")
        self.corner = box[:2]
        return photo.crop(box)

    def after(self, cutout: Image.Image) -> tuple[Image.Image, tuple[int, int, int, int]]:
        """
        Puts the cut-out (RGBA) of the region where the result wants it.

        Returns:
            The result (RGBA), and left, top, width and height of the subject in it.

        Raises:
            RequestError: there is no subject.
        """
        if cutout.size != self.full_size:
            whole = Image.new("RGBA", self.full_size)
            whole.paste(cutout, self.corner)
            cutout = whole
        box = cutout.getchannel("A").point([0] * _VISIBLE + [255] * (256 - _VISIBLE)).getbbox()
        if box is None:
            raise RequestError("No subject was found in the photo.", "unknown_foreground")
        if self.margins is not None:
            cutout, box = self._cropped(cutout, box)
        if self.scale is not None or self.position is not None:
            cutout, box = self._placed(cutout, box)
        return cutout, (box[0], box[1], box[2] - box[0], box[3] - box[1])

    def _cropped(self, cutout: Image.Image, box: tuple) -> tuple[Image.Image, tuple]:
        width, height = box[2] - box[0], box[3] - box[1]
        sides = (height, width, height, width)
        top, right, bottom, left = (
            round(length.pixels(side)) for length, side in zip(self.margins, sides, strict=True)
        )
        area = (box[0] - left, box[1] - top, box[2] + right, box[3] + bottom)
        return cutout.crop(area), (left, top, left + width, top + height)

    def _placed(self, cutout: Image.Image, box: tuple) -> tuple[Image.Image, tuple]:
        subject = cutout.crop(box)
        if self.scale is not None:
            factor = self.scale * min(cutout.width / subject.width, cutout.height / subject.height)
            size = tuple(max(1, round(side * factor)) for side in subject.size)
            subject = subject.resize(size, Image.Resampling.LANCZOS)
        horizontal, vertical = self.position or (0.5, 0.5)
        left = round(horizontal * (cutout.width - subject.width))
        top = round(vertical * (cutout.height - subject.height))
        whole = Image.new("RGBA", cutout.size)
        whole.paste(subject, (left, top))
        return whole, (left, top, left + subject.width, top + subject.height)


def on_background(cutout: Image.Image, colour: tuple[int, ...] | None, picture: Image.Image | None) -> Image.Image:
    """
    The cut-out (RGBA) on a picture, which covers it and is cropped in the middle, or else on a colour.

    Returns:
        RGB, or RGBA where the colour is transparent or there is none.
    """
    if picture is not None:
        factor = max(cutout.width / picture.width, cutout.height / picture.height)
        size = tuple(math.ceil(side * factor) for side in picture.size)
        left, top = (size[0] - cutout.width) // 2, (size[1] - cutout.height) // 2
        picture = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
        ground = picture.crop((left, top, left + cutout.width, top + cutout.height)).convert("RGBA")
    elif colour is not None:
        ground = Image.new("RGBA", cutout.size, tuple(colour))
    else:
        return cutout
    ground.alpha_composite(cutout)
    return ground if colour is not None and picture is None and colour[3] < 255 else ground.convert("RGB")
