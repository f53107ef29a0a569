"""What the routes share: the server's parts, photos out of forms, colours, and answers that are pictures."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import Request, Response
from PIL import ImageColor
from starlette.datastructures import UploadFile

from birefnet.serve.errors import InvalidPhotoError, RequestError
from birefnet.serve.fetching import PhotoFetcher
from birefnet.serve.forms import Form, read_form
from birefnet.serve.keys import ApiKeys
from birefnet.serve.limits import Limits
from birefnet.serve.metrics import Metrics
from birefnet.serve.service import CutoutService


MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "zip": "application/zip"}
PICTURE_CONTENT = {media_type: {} for media_type in MEDIA_TYPES.values()}


@dataclass(frozen=True)
class Server:
    """The parts of a running server, which the routes work with."""

    service: CutoutService
    fetcher: PhotoFetcher
    keys: ApiKeys
    limits: Limits
    metrics: Metrics
    ending: asyncio.Event = field(default_factory=asyncio.Event)  # set when open pages' streams have to end


def server_of(request: Request) -> Server:
    """The server that a request came to, if the request may use it."""
    server: Server = request.app.state.server
    server.keys.check(request)
    return server


@asynccontextmanager
async def accepted_form(request: Request, server: Server, most_files: int) -> AsyncIterator[Form]:
    """
    A request's form, and with it a place in the queue.

    A form takes its place once it has arrived whole, so that slow uploads keep nobody waiting.

    Raises:
        TooBusyError: there is no place, also when there is none before the body is read.
        RequestError: the form is malformed.
    """
    with server.service.upload():
        form = await read_form(request, most_files)
    with server.service.place():
        yield form


async def photo_of(server: Server, file: UploadFile | None, in_base64: str | None, url: str | None) -> bytes:
    """
    The encoded photo of a request that names one in exactly one way.

    Raises:
        RequestError: none or several are named, or the one cannot be had.
    """
    named = [source for source in (file, in_base64, url) if source not in (None, "")]
    if not named:
        raise RequestError("The request has no photo.", "missing_source")
    if len(named) > 1:
        raise RequestError("The request names several photos; give one.", "multiple_sources")
    if file is not None:
        return await file.read()
    if in_base64:
        return from_base64(in_base64)
    with server.metrics.stage("fetch"):
        return await server.fetcher.fetch(url)


def from_base64(text: str) -> bytes:
    """The bytes of base64 text or of a data URL."""
    try:
        return base64.b64decode("".join(text.rpartition("base64,")[2].split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidPhotoError("The photo is not valid base64.") from None


def parse_colour(name: str, text: str) -> tuple[int, int, int, int]:
    """
    Red, green, blue and opacity of a colour: a CSS name, or hexadecimal with or without `#`.

    Raises:
        RequestError: there is no such colour.
    """
    for candidate in (text, f"#{text}"):
        try:
            return ImageColor.getcolor(candidate, "RGBA")
        except ValueError:
            continue
    raise RequestError(f"{name}: {text[:40]!r} is not a colour such as white, ff8800 or #ff880080.", "invalid_colour")


def picture_response(content: bytes, picture_format: str, headers: dict[str, str] | None = None) -> Response:
    """A picture as the answer. Nothing on the way keeps a copy."""
    headers = {"Cache-Control": "no-store", **(headers or {})}
    return Response(content, media_type=MEDIA_TYPES[picture_format], headers=headers)


def described_body(model, files: dict[str, str], kinds: tuple[str, ...] = ("multipart/form-data",)) -> dict:
    """
    The OpenAPI description of a body that the route reads itself.

    Args:
        model: a pydantic model of the fields.
        files: field name → description; a name that ends in `[]` is a list of files.
        kinds: content types.
    """
    schema = model.model_json_schema()
    for name, description in files.items():
        file = {"type": "string", "format": "binary", "description": description}
        schema["properties"][name] = {"type": "array", "items": file} if name.endswith("[]") else file
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind in kinds}}}
