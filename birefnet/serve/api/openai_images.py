"""`POST /v1/images/edits` and `GET /v1/models`: the part of OpenAI's interface that its client needs for cut-outs."""

import base64
import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from birefnet.serve.api.common import Server, accepted_form, described_body, server_of
from birefnet.serve.errors import RequestError
from birefnet.serve.forms import Form
from birefnet.serve.guard import while_connected


router = APIRouter(tags=["OpenAI"])
MOST_IMAGES = 16


class Edit(BaseModel):
    """Fields of a request, beside the photos."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(None, description="Accepted and not read: the background is removed.")
    model: str = Field("auto", description="A model on offer, see /v1/models.")
    background: Literal["transparent", "opaque", "auto"] = Field(
        "transparent", description="opaque puts the subject on white; auto is transparent where the format allows it."
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="url is refused: this server keeps no pictures."
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    size: Literal["auto"] = Field("auto", description="Results have their photo's size.")
    quality: str | None = Field(None, description="Accepted and without effect.")
    input_fidelity: str | None = Field(None, description="Accepted and without effect.")
    moderation: str | None = Field(None, description="Accepted and without effect.")
    user: str | None = Field(None, description="Accepted and without effect.")
    n: Literal[1, "1"] = Field(1, description="One result for each photo.")


@router.post(
    "/v1/images/edits",
    summary="Cut out photos as OpenAI's client asks for it",
    openapi_extra=described_body(Edit, {"image": "The photo.", "image[]": "Several photos."}),
)
async def edit_images(request: Request):
    server = server_of(request)
    async with accepted_form(request, server, most_files=MOST_IMAGES + 1) as form:
        return await while_connected(request, _answer(server, form))


async def _answer(server: Server, form: Form) -> dict:
    if form.uploads("mask"):
        raise RequestError("mask: the subject is found without one; leave it out.", "invalid_parameters")
    fields = form.parse(Edit)
    if fields.response_format == "url":
        raise RequestError("response_format: this server keeps no pictures; ask for b64_json.", "invalid_parameters")
    opaque = fields.background == "opaque" or (fields.background == "auto" and fields.output_format == "jpeg")
    if fields.output_format == "jpeg" and not opaque:
        raise RequestError("output_format: JPEG has no transparency; ask for png or webp.", "invalid_parameters")
    photos = form.uploads("image", "image[]")
    if not 1 <= len(photos) <= MOST_IMAGES:
        raise RequestError(f"image: give 1 to {MOST_IMAGES} photos, not {len(photos)}.", "missing_source")
    model = server.service.shelf.resolve(fields.model)
    data = []
    for photo in photos:
        options = {"background": (255, 255, 255) if opaque else None}
        content = await server.service.cut_out(await photo.read(), model, fields.output_format, **options)
        data.append({"b64_json": base64.b64encode(content).decode()})
    background = "opaque" if opaque else "transparent"
    return {
        "created": int(time.time()),
        "data": data,
        "background": background,
        "output_format": fields.output_format,
    }


@router.get("/v1/models", summary="The models on offer; the first one is the default")
async def list_models(request: Request) -> dict:
    shelf = server_of(request).service.shelf
    models = [{"id": name, "object": "model", "created": 0, "owned_by": "birefnet"} for name in shelf.names]
    return {"object": "list", "data": models}


@router.get("/v1/models/{name}", summary="One model")
async def show_model(request: Request, name: str) -> dict:
    shelf = server_of(request).service.shelf
    return {"id": shelf.resolve(name), "object": "model", "created": 0, "owned_by": "birefnet"}


def describe_error(error: RequestError) -> dict:
    """The body of an error, as OpenAI's client reads it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}
