"""The routes that the page's pictures and downloads come from. They are made when they are asked for, and not kept."""

import io
from collections.abc import AsyncIterator

from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from PIL import Image

from birefnet.photos.writing import encode_picture
from birefnet.serve.api.common import MEDIA_TYPES, Server
from birefnet.serve.archives import StreamedArchive, safe_name
from birefnet.serve.errors import RequestError
from birefnet.serve.page.sessions import PREVIEW_SIDE, PagePhoto, Session, Sessions


THUMBNAIL_SIDE = 96


def picture_routes(server: Server, sessions: Sessions) -> APIRouter:
    """
    Routes below `/page/{token}/`.

    `{index}/before.webp`, `{index}/thumbnail.webp` and `{index}/after.webp` are previews. `{index}/full.webp` is the
    result at the photo's size, `{index}/result.png` the same as a download, `cutouts.zip` all of them.
    """
    router = APIRouter(prefix="/page/{token}", include_in_schema=False)

    def found(token: str, index: int) -> tuple[Session, PagePhoto]:
        session = _session(sessions, token)
        if not 0 <= index < len(session.photos):
            raise RequestError("There is no such photo.", "not_found", 404)
        return session, session.photos[index]

    async def made(make, media_type: str, name: str | None = None) -> Response:
        content = await server.service.finish_again(None, lambda _: make())
        headers = {"Cache-Control": "no-store"}
        if name is not None:
            headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return Response(content, media_type=media_type, headers=headers)

    @router.get("/{index}/before.webp")
    async def before(token: str, index: int) -> Response:
        session, photo = found(token, index)
        return await made(lambda: _webp(_shown(session, photo, server)), MEDIA_TYPES["webp"])

    @router.get("/{index}/thumbnail.webp")
    async def thumbnail(token: str, index: int) -> Response:
        session, photo = found(token, index)
        return await made(lambda: _webp(_thumbnail(session, photo, server)), MEDIA_TYPES["webp"])

    @router.get("/{index}/after.webp")
    async def after(token: str, index: int) -> Response:
        session, photo = found(token, index)

        def make() -> bytes:
            preview = session.preview(photo, server.limits)
            scale = max(preview.outputs["target_size"]) / max(photo.size)
            return _webp(session.look.picture_of(preview, scale))

        return await made(make, MEDIA_TYPES["webp"])

    @router.get("/{index}/full.webp")
    async def full(token: str, index: int) -> Response:
        session, photo = found(token, index)
        return await made(lambda: _encoded(session, photo, server, "webp"), MEDIA_TYPES["webp"])

    @router.get("/{index}/full-before.webp")
    async def full_before(token: str, index: int) -> Response:
        _, photo = found(token, index)
        return await made(lambda: _webp(photo.with_photo(server.limits).outputs["photo"]), MEDIA_TYPES["webp"])

    @router.get("/{index}/result.png")
    async def result(token: str, index: int) -> Response:
        session, photo = found(token, index)
        name = safe_name(photo.name.rsplit("/", 1)[-1].encode("ascii", "replace").decode(), "-cutout.png", set())
        return await made(lambda: _encoded(session, photo, server, "png"), MEDIA_TYPES["png"], name)

    @router.get("/cutouts.zip")
    async def archive(token: str) -> StreamingResponse:
        session = _session(sessions, token)
        headers = {"Content-Disposition": 'attachment; filename="cutouts.zip"', "Cache-Control": "no-store"}
        return StreamingResponse(_archived(session, server), media_type=MEDIA_TYPES["zip"], headers=headers)

    return router


def _session(sessions: Sessions, token: str) -> Session:
    session = sessions.find(token)
    if session is None:
        raise RequestError("These photos are no longer here; add them again.", "not_found", 404)
    return session


def _shown(session: Session, photo: PagePhoto, server: Server) -> Image.Image:
    return session.preview(photo, server.limits).outputs["photo"]


def _thumbnail(session: Session, photo: PagePhoto, server: Server) -> Image.Image:
    picture = photo.with_photo(server.limits, PREVIEW_SIDE // 4).outputs["photo"]
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return picture


def _webp(picture: Image.Image) -> bytes:
    """For looking at: small and quickly made."""
    encoded = io.BytesIO()
    picture.save(encoded, "webp", quality=88, method=0)
    return encoded.getvalue()


def _encoded(session: Session, photo: PagePhoto, server: Server, picture_format: str) -> bytes:
    """The result at the photo's size."""
    computed = photo.with_photo(server.limits)
    return encode_picture(session.look.picture_of(computed), picture_format)


async def _archived(session: Session, server: Server) -> AsyncIterator[bytes]:
    archive, taken = StreamedArchive(), set()
    for photo in list(session.photos):
        content = await server.service.finish_again(photo, lambda photo: _encoded(session, photo, server, "png"))
        yield archive.add(safe_name(photo.name, "-cutout.png", taken), content)
    yield archive.close()
