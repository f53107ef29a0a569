"""`/api/remove`: the interface of rembg's server (https://github.com/danielgatis/rembg), `rembg s`."""

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from birefnet.serve.api.common import (
    PICTURE_CONTENT,
    Server,
    accepted_form,
    described_body,
    photo_of,
    picture_response,
    server_of,
)
from birefnet.serve.errors import RequestError
from birefnet.serve.forms import Form
from birefnet.serve.guard import while_connected


router = APIRouter(tags=["rembg"])


class Remove(BaseModel):
    """Parameters of a request, in the query or the form."""

    model_config = ConfigDict(extra="forbid")

    url: str | None = Field(None, description="The photo's URL.")
    model: str = Field("auto", description="A model on offer; rembg's names birefnet-… mean the same checkpoints.")
    a: bool = Field(False, description="Alpha matting. Accepted; mattes are always soft and colours refined.")
    af: int = Field(240, ge=0, le=255, description="Without effect.")
    ab: int = Field(10, ge=0, le=255, description="Without effect.")
    ae: int = Field(10, ge=0, description="Without effect.")
    om: bool = Field(False, description="Only the mask, in gray.")
    ppm: bool = Field(False, description="Make the mask hard and smooth its edge.")
    bgc: str | None = Field(None, description="Background colour: red,green,blue,opacity from 0 to 255.")


_PARAMETERS = [
    {"in": "query", "name": name, "schema": schema, "description": schema.get("description", "")}
    for name, schema in Remove.model_json_schema()["properties"].items()
]


@router.get(
    "/api/remove",
    summary="Cut out the photo of a URL",
    responses={200: {"content": PICTURE_CONTENT}},
    openapi_extra={"parameters": _PARAMETERS},
)
async def remove_from_url(request: Request):
    server = server_of(request)
    with server.service.place():
        fields = Form(dict(request.query_params)).parse(Remove)
        return await while_connected(request, _answer(server, fields, None))


@router.post(
    "/api/remove",
    summary="Cut out an uploaded photo",
    responses={200: {"content": PICTURE_CONTENT}},
    openapi_extra=described_body(Remove, {"file": "The photo."}),
)
async def remove_from_upload(request: Request):
    server = server_of(request)
    async with accepted_form(request, server, most_files=2) as form:
        fields = Form({**request.query_params, **form.values}).parse(Remove)
        file = form.single("file")
        return await while_connected(request, _answer(server, fields, file))


async def _answer(server: Server, fields: Remove, file):
    model = server.service.shelf.resolve(fields.model)
    background = _background(fields.bgc)
    photo = await photo_of(server, file, None, fields.url)
    options = {"return_mask": fields.om, "background": background}
    if fields.ppm:
        options |= {"threshold": 0.5, "feather": 1.0}
    return picture_response(await server.service.cut_out(photo, model, "png", **options), "png")


def _background(text: str | None) -> tuple[int, int, int] | None:
    """`"red,green,blue,opacity"`; no opacity means none of it shows."""
    if text is None:
        return None
    try:
        values = [int(value) for value in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (3, 4) or not all(0 <= value <= 255 for value in values):
        raise RequestError("bgc: needs red,green,blue,opacity, each from 0 to 255.", "invalid_parameters")
    if len(values) == 4 and 0 < values[3] < 255:
        raise RequestError("bgc: the opacity has to be 0 or 255.", "invalid_parameters")
    return None if len(values) == 4 and values[3] == 0 else tuple(values[:3])
