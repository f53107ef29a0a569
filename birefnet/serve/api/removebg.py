"""`POST /v1.0/removebg`: the interface of remove.bg (https://www.remove.bg/api), without credits."""

import base64
import io
import zipfile
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from birefnet.photos.writing import encode_picture
from birefnet.serve.api.common import (
    PICTURE_CONTENT,
    Server,
    accepted_form,
    described_body,
    parse_colour,
    photo_of,
    picture_response,
    server_of,
)
from birefnet.serve.errors import RequestError
from birefnet.serve.forms import Form
from birefnet.serve.framing import Frame, on_background, parse_lengths
from birefnet.serve.guard import while_connected
from birefnet.serve.intake import decode_photo
from birefnet.serve.service import ComputedPhoto
from birefnet.serve.shelf import ModelShelf


router = APIRouter(tags=["remove.bg"])
FORMATS = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp", "zip": "zip"}


class RemoveBackground(BaseModel):
    """Fields of a request, beside the files."""

    model_config = ConfigDict(extra="forbid")

    image_file_b64: str | None = Field(None, description="The photo in base64, instead of image_file.")
    image_url: str | None = Field(None, description="The photo's URL, instead of image_file.")
    size: Literal["preview", "small", "regular", "medium", "hd", "full", "4k", "50MP", "auto"] = Field(
        "preview",
        description="Most pixels of the result: preview, small and regular 0.25 megapixels (as at remove.bg, this is "
        "the default), medium 1.5, hd 4, full and 4k 25, 50MP 50; auto: the photo's own size.",
    )
    type: Literal["auto", "person", "product", "car", "animal", "graphic", "transportation", "other"] = Field(
        "auto", description="person takes the variant portrait if it is on offer; all others take the first one."
    )
    type_level: Literal["none", "1", "2", "latest"] = Field("1", description="Accepted; nothing is classified.")
    format: Literal["auto", "png", "jpg", "jpeg", "webp", "zip"] = Field(
        "auto", description="auto: PNG where the result is transparent, else JPEG. zip: color.jpg and alpha.png."
    )
    roi: str = Field("0% 0% 100% 100%", description="Left, top, right, bottom of the region with the subject.")
    crop: bool = Field(False, description="Crop to the subject.")
    crop_margin: str = Field("0", description="Around the subject: 1, 2 or 4 lengths, up to 50% of it or 500px.")
    scale: str = Field("original", description="The subject's share of the result, 10% to 100%, or original.")
    position: str | None = Field(None, description="original, center, or one or two percentages.")
    channels: Literal["rgba", "alpha"] = Field("rgba", description="alpha: the matte alone, in gray.")
    add_shadow: bool = Field(False, description="Not supported; true is refused.")
    semitransparency: bool = Field(True, description="Accepted; mattes are always soft.")
    bg_color: str | None = Field(None, description="A colour's name or hexadecimal, also with opacity.")
    bg_image_url: str | None = Field(None, description="URL of a picture to put the subject on.")


@router.post(
    "/v1.0/removebg",
    summary="Cut out one photo as remove.bg does",
    responses={200: {"content": {**PICTURE_CONTENT, "application/json": {}}}},
    openapi_extra=described_body(
        RemoveBackground,
        {"image_file": "The photo.", "bg_image_file": "A picture to put the subject on."},
        ("multipart/form-data", "application/x-www-form-urlencoded", "application/json"),
    ),
)
async def remove_background(request: Request):
    server = server_of(request)
    async with accepted_form(request, server, most_files=2) as form:
        return await while_connected(request, _answer(server, form, request.headers.get("accept", "")))


async def _answer(server: Server, form: Form, accept: str):
    fields = form.parse(RemoveBackground)
    frame = frame_of(fields)
    colour = parse_colour("bg_color", fields.bg_color) if fields.bg_color else None
    background = await _background_of(server, fields, form)
    if fields.add_shadow:
        raise RequestError("add_shadow: shadows are not supported.", "invalid_parameters")
    photo = await photo_of(server, form.single("image_file"), fields.image_file_b64, fields.image_url)

    def finish(computed: ComputedPhoto):
        cutout, box = frame.after(computed.picture())
        return (*encode_result(cutout, fields, colour, background, computed.encoder_options), box)

    model = model_for(fields.type, server.service.shelf)
    content, picture_format, size, box = await server.service.run(photo, model, finish, frame.before)
    foreground = dict(zip(("left", "top", "width", "height"), box, strict=True))
    if "application/json" in accept:
        data = {f"foreground_{name}": value for name, value in foreground.items()}
        return JSONResponse({"data": {"result_b64": base64.b64encode(content).decode(), **data}})
    headers = {"X-Width": str(size[0]), "X-Height": str(size[1])}
    headers |= {f"X-Foreground-{name.title()}": str(value) for name, value in foreground.items()}
    if fields.type != "auto":
        headers["X-Type"] = fields.type
    return picture_response(content, picture_format, headers)


async def _background_of(server: Server, fields: RemoveBackground, form: Form) -> Image.Image | None:
    file = form.single("bg_image_file")
    if file is None and not fields.bg_image_url:
        return None
    if fields.bg_color:
        raise RequestError("bg_color and a background picture contradict each other.", "invalid_parameters")
    return decode_photo(await photo_of(server, file, None, fields.bg_image_url), server.limits)


def model_for(subject: str, shelf: ModelShelf) -> str:
    """The model for remove.bg's type of subject."""
    if subject == "person":
        try:
            return shelf.resolve("portrait")
        except RequestError:
            pass
    return shelf.resolve(None)


def frame_of(fields: RemoveBackground) -> Frame:
    """
    Raises:
        RequestError: roi, crop_margin, scale or position cannot be read.
    """
    roi = parse_lengths("roi", fields.roi, (4,), (100, 100_000))
    margins = None
    if fields.crop:
        margins = parse_lengths("crop_margin", fields.crop_margin, (1, 2, 4), (50, 500))
        margins = {1: margins * 4, 2: margins * 2, 4: margins}[len(margins)]
    scale = None
    if fields.scale != "original":
        scale = _fractions("scale", fields.scale, (1,))[0]
        if scale < 0.1:
            raise RequestError("scale: at least 10% is allowed.", "invalid_parameters")
    position = None
    if fields.position == "center":
        position = (0.5, 0.5)
    elif fields.position not in (None, "original"):
        fractions = _fractions("position", fields.position, (1, 2))
        position = (fractions[0], fractions[-1])
    whole = all(length.percent for length in roi) and [length.value for length in roi] == [0, 0, 100, 100]
    return Frame(fields.size, None if whole else roi, margins, scale, position)


def _fractions(name: str, text: str, counts: tuple[int, ...]) -> list[float]:
    lengths = parse_lengths(name, text, counts, (100, 0))
    if not all(length.percent for length in lengths):
        raise RequestError(f"{name}: a percentage is needed, such as 50%.", "invalid_parameters")
    return [length.value / 100 for length in lengths]


def encode_result(
    cutout: Image.Image,
    fields: RemoveBackground,
    colour: tuple[int, ...] | None,
    background: Image.Image | None,
    encoder_options: dict,
) -> tuple[bytes, str, tuple[int, int]]:
    """The result's file, its format and (width, height)."""
    wanted = FORMATS.get(fields.format)
    if fields.channels == "alpha":
        picture = cutout.getchannel("A")
    elif wanted == "zip":
        return _encode_zip(cutout, encoder_options), "zip", cutout.size
    else:
        if wanted == "jpeg" and background is None:  # which has no transparency; remove.bg fills with white
            red, green, blue, opacity = colour or (255, 255, 255, 255)
            cutout = on_background(cutout, (red, green, blue, opacity), None)
            colour = (255, 255, 255, 255)
        picture = on_background(cutout, colour, background) if cutout.mode == "RGBA" else cutout
        wanted = wanted or ("png" if picture.mode == "RGBA" else "jpeg")
    wanted = "png" if wanted in (None, "zip") else wanted
    return encode_picture(picture, wanted, encoder_options), wanted, picture.size


def _encode_zip(cutout: Image.Image, encoder_options: dict) -> bytes:
    encoded = io.BytesIO()
    with zipfile.ZipFile(encoded, "w") as archive:
        archive.writestr("color.jpg", encode_picture(cutout.convert("RGB"), "jpeg", encoder_options))
        archive.writestr("alpha.png", encode_picture(cutout.getchannel("A"), "png", {}))
    return encoded.getvalue()


def describe_error(error: RequestError) -> dict:
    """The body of an error, as remove.bg's clients read it."""
    return {"errors": [{"title": str(error), "code": error.code}]}
