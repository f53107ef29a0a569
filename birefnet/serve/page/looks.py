"""How a visitor wants the result: background and edits of the matte, for the preview and for the full photo."""

from dataclasses import dataclass, field

from PIL import Image, ImageChops, ImageFilter

from birefnet.serve.service import ComputedPhoto


BACKGROUNDS = ("transparent", "colour", "picture", "blur")
_BLURRED_SIDE = 512  # a blurred background has no detail, so it is made at this size


@dataclass(frozen=True)
class Look:
    """
    What the page's controls say.

    Attributes:
        background: one of `BACKGROUNDS`.
        colour: red, green, blue.
        picture: what the subject is put on.
        blur: strength of the blurred background: standard deviation in thousandths of the longer side.
        edits: arguments of `adjust_matte`, lengths in pixels of the full photo.
        refine_foreground: whether the old background's colour is removed from soft edges.
    """

    background: str = "transparent"
    colour: tuple[int, int, int] = (255, 255, 255)
    picture: Image.Image | None = None
    blur: float = 12
    edits: dict = field(default_factory=dict)
    refine_foreground: bool = True

    @property
    def is_opaque(self) -> bool:
        return self.background in ("colour", "blur") or (self.background == "picture" and self.picture is not None)

    def picture_of(self, computed: ComputedPhoto, scale: float = 1) -> Image.Image:
        """
        The result, RGBA or RGB.

        Args:
            computed: the photo and the network's output for it.
            scale: the photo's side divided by that of the photo as it was uploaded, where it is a smaller copy.
        """
        edits = dict(self.edits)
        if edits.get("grow"):
            edits["grow"] = round(edits["grow"] * scale)
        if edits.get("feather"):
            edits["feather"] = edits["feather"] * scale
        background = {"colour": self.colour, "picture": self.picture}.get(self.background)
        if self.background == "blur":
            background = blurred_background(computed.outputs["photo"], computed.picture(return_mask=True), self.blur)
        return computed.picture(background=background, refine_foreground=self.refine_foreground, **edits)


def blurred_background(photo: Image.Image, matte: Image.Image, strength: float) -> Image.Image:
    """
    The photo's background out of focus, continued behind the subject: a mean of the pixels around, each weighted by
    how much of it is background, so that the subject's colours do not run into it.

    Args:
        photo: RGB.
        matte: mode L, of the photo's size.
        strength: standard deviation in thousandths of the longer side.
    """
    factor = min(1, _BLURRED_SIDE / max(photo.size))
    size = tuple(max(1, round(side * factor)) for side in photo.size)
    small = photo.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
    weights = ImageChops.invert(matte.resize(size, Image.Resampling.BILINEAR))
    blurred = small
    # The subject is filled with what lies around it, from its edge inwards, and then all of it is blurred.
    for radius in (64, 16, 4):
        blurred = _filled(small, weights, blurred, radius)
    blurred = blurred.filter(ImageFilter.GaussianBlur(strength / 1000 * max(size)))
    return blurred.resize(photo.size, Image.Resampling.BILINEAR)


def _filled(photo: Image.Image, weights: Image.Image, ground: Image.Image, radius: float) -> Image.Image:
    """The photo where the weights are full, elsewhere `ground` mixed with the weighted mean of the surroundings."""
    import numpy as np

    blur = ImageFilter.GaussianBlur(radius)
    mass = weights.filter(blur)
    sums = Image.composite(photo, Image.new("RGB", photo.size), weights).filter(blur)
    mean = np.asarray(sums, np.float32) * (255 / np.maximum(np.asarray(mass, np.float32), 1))[..., None]
    mean = Image.fromarray(mean.clip(0, 255).astype(np.uint8))
    trusted = mass.point([0] * 16 + [255] * 240)  # where there is too little background around, the mean is noise
    return Image.composite(photo, Image.composite(mean, ground, trusted), weights)
