"""The ASGI application: routes, page, errors and the life of the parts behind them."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline

from birefnet import __version__
from birefnet.serve.api import batches, openai_images, rembg, removebg, status
from birefnet.serve.api.common import Server
from birefnet.serve.errors import RequestError
from birefnet.serve.fetching import PhotoFetcher
from birefnet.serve.guard import ClientLeftError, Guard, security_headers
from birefnet.serve.keys import ApiKeys
from birefnet.serve.limits import Limits
from birefnet.serve.metrics import Metrics
from birefnet.serve.service import CutoutService
from birefnet.serve.shelf import ModelShelf
from birefnet.serve.workers import NetworkWorkers


logger = logging.getLogger("birefnet.serve")
DESCRIPTION = """\
Cuts the subjects out of photos. Three interfaces that clients already speak, and one for many photos at a time.
Every result has its photo's own size unless a request asks for another. Nothing is kept after the answer."""


def create_app(
    loaders: dict[str, Callable],
    *,
    limits: Limits | None = None,
    keys: ApiKeys | None = None,
    allow_url: bool = True,
    loopback_only: bool = True,
    frame_ancestors: str = "'none'",
    capacity: int = 2,
    workers: int = 1,
    batch_size: int = 1,
    batch_wait: float = 0.02,
    with_page: bool = True,
) -> FastAPI:
    """
    Builds the server.

    Args:
        loaders: for each model's name a function without arguments that gives its `BiRefNetPipeline`. The first one
            is loaded at once, the others when they are first asked for.
        limits: what one request may cost.
        keys: the API keys, if any are needed.
        allow_url: whether photos are fetched from URLs.
        loopback_only: whether requests for other hosts' names are refused.
        frame_ancestors: sites that may show the page in a frame.
        capacity: most models in memory.
        workers: network threads; 1 for an accelerator.
        batch_size: most photos of a network call.
        batch_wait: seconds that a photo waits for others of its size.
        with_page: whether there is a page at `/`.
    """
    limits, metrics = limits or Limits(), Metrics()
    shelf = ModelShelf(loaders, capacity, metrics)
    service = CutoutService(shelf, NetworkWorkers(workers, batch_size, batch_wait, metrics), limits, metrics)
    server = Server(service, PhotoFetcher(limits, allow_url), keys or ApiKeys(), limits, metrics)
    app = FastAPIOffline(
        title="BiRefNet", description=DESCRIPTION, version=__version__, lifespan=_life_of(server), redoc_url=None
    )
    app.state.server = server
    for module in (removebg, rembg, openai_images, batches, status):
        app.include_router(module.router)
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(ClientLeftError, _nobody_there)
    app.add_exception_handler(Exception, _failed)
    headers = security_headers(frame_ancestors)
    app.add_middleware(
        Guard, limits=limits, metrics=metrics, headers=headers, loopback_only=loopback_only, ending=server.ending
    )
    if with_page:
        from birefnet.serve.page import mount_page

        mount_page(app, server)
    return app


def _life_of(server: Server) -> Callable:
    @asynccontextmanager
    async def life(app: FastAPI):
        first = asyncio.create_task(_load_first(server.service.shelf))
        yield
        first.cancel()
        await asyncio.to_thread(server.service.close)
        await server.fetcher.close()

    return life


async def _load_first(shelf: ModelShelf) -> None:
    try:
        await shelf.get(shelf.names[0])
    except RequestError as error:  # logged there; requests are answered with it, and try again
        logger.error("%s", error)


def _refuse(request: Request, error: RequestError) -> Response:
    """A refusal in the words of the interface that the request used."""
    path = request.url.path
    if path.startswith("/v1.0/"):
        body = removebg.describe_error(error)
    elif path.startswith(("/v1/images", "/v1/models")):
        body = openai_images.describe_error(error)
    else:
        body = {"detail": str(error), "code": error.code}
    return JSONResponse(body, error.status, error.headers)


def _nobody_there(request: Request, error: ClientLeftError) -> Response:
    request.app.state.server.metrics.dropped.labels(request.scope["route"].path).inc()
    return Response(status_code=499)  # as nginx logs it; nobody reads it


def _failed(request: Request, error: Exception) -> Response:
    """An error of our own. The log has it; the client learns nothing of the server's inside."""
    return _refuse(request, RequestError("The server failed on this request.", "internal_error", 500))
