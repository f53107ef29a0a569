"""`POST /v1/batch`: a ZIP archive or several photos in, a ZIP archive of results out, sent while it is made."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from birefnet.serve.api.common import MEDIA_TYPES, Server, accepted_form, described_body, parse_colour, server_of
from birefnet.serve.archives import StreamedArchive, check_directory, safe_name, unpack
from birefnet.serve.errors import RequestError
from birefnet.serve.forms import Form


router = APIRouter(tags=["batch"])
SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}
REPORT = "report.json"


class Batch(BaseModel):
    """Fields of a request, beside the files."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("auto", description="A model on offer, see /v1/models.")
    format: Literal["png", "webp", "jpeg"] = Field("png", description="jpeg needs a background.")
    background: str | None = Field(None, description="A colour; transparent by default.")
    mask: bool = Field(False, description="The mattes alone, in gray.")


@router.post(
    "/v1/batch",
    summary="Cut out many photos",
    responses={200: {"content": {"application/zip": {}}, "description": f"Results and {REPORT}, an entry per photo."}},
    openapi_extra=described_body(Batch, {"files[]": "Photos, or one ZIP archive of them."}),
)
async def cut_out_batch(request: Request):
    server = server_of(request)
    async with AsyncExitStack() as stack:
        form = await stack.enter_async_context(accepted_form(request, server, server.limits.batch_photos))
        fields = form.parse(Batch)
        photos = _photos_of(form, server)
        work = _results(server, fields, photos, server.service.shelf.resolve(fields.model), _options(fields))
        first = await anext(work)  # so that what concerns the whole batch is refused with a status of its own
        return _ArchiveResponse(first, work, stack.pop_all())


class _ArchiveResponse(StreamingResponse):
    """Sends the archive while it is made. The request keeps its place until then, or until the client has left."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], stack: AsyncExitStack):
        headers = {"Content-Disposition": 'attachment; filename="cutouts.zip"', "Cache-Control": "no-store"}
        super().__init__(self._parts(first, rest), media_type=MEDIA_TYPES["zip"], headers=headers)
        self._rest, self._stack = rest, stack

    async def __call__(self, scope, receive, send) -> None:
        async with self._stack:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._rest.aclose()

    @staticmethod
    async def _parts(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield first
        async for part in rest:
            yield part


def _options(fields: Batch) -> dict:
    colour = parse_colour("background", fields.background)[:3] if fields.background else None
    if fields.format == "jpeg" and colour is None and not fields.mask:
        raise RequestError("format: JPEG has no transparency; give a background.", "invalid_parameters")
    return {"return_mask": fields.mask, "background": colour}


def _photos_of(form: Form, server: Server) -> Iterator[tuple[str, bytes | RequestError]]:
    """Name and contents of every photo, read one at a time."""
    files = [file for files in form.files.values() for file in files]
    if not files:
        raise RequestError("The request has no file.", "missing_source")
    archives = [file for file in files if (file.filename or "").lower().endswith(".zip")]
    if archives and len(files) > 1:
        raise RequestError("Send one ZIP archive or photos, not both.", "multiple_sources")
    if archives:
        check_directory(archives[0].file, server.limits)
        return unpack(archives[0].file, server.limits)
    return ((file.filename or "photo", file.file.read()) for file in files)


async def _results(server: Server, fields: Batch, photos: Iterator, model: str, options: dict) -> AsyncIterator[bytes]:
    """The archive's bytes. A few photos are at work at a time; results are in the photos' order."""
    archive, report, taken = StreamedArchive(), [], {REPORT}

    async def cut_out(name: str, contents: bytes | RequestError):
        if isinstance(contents, RequestError):
            return name, contents
        try:
            return name, await server.service.cut_out(contents, model, fields.format, **options)
        except RequestError as error:
            return name, error

    def add(name: str, result: bytes | RequestError) -> bytes:
        entry = {"photo": name}
        report.append(entry)
        if isinstance(result, RequestError):
            entry["error"] = str(result)
            return b""
        entry["result"] = safe_name(name, SUFFIXES[fields.format], taken)
        return archive.add(entry["result"], result)

    pending: deque[asyncio.Task] = deque()
    try:
        while True:
            while len(pending) < 4 and (photo := await asyncio.to_thread(next, photos, None)) is not None:
                pending.append(asyncio.create_task(cut_out(*photo)))
            if not pending:
                break
            yield add(*await pending.popleft())
        yield archive.add(REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode()) + archive.close()
    finally:
        for task in pending:
            task.cancel()
