"""`/health`, `/ready` and `/metrics`: for load balancers and Prometheus."""

from fastapi import APIRouter, Request, Response

from birefnet import __version__
from birefnet.serve.api.common import Server, server_of


router = APIRouter(tags=["status"])


@router.get("/health", summary="Whether the process answers")
async def health() -> dict:
    return {"status": "ok", "version": __version__}


@router.get("/ready", summary="Whether photos are taken: 503 until the first model is loaded, and while stopping")
async def ready(request: Request, response: Response) -> dict:
    service = request.app.state.server.service
    state = "stopping" if service.draining else "ready" if service.shelf.loaded else "loading"
    response.status_code = 200 if state == "ready" else 503
    return {"status": state}


@router.get("/metrics", summary="Counters in the text format of Prometheus", response_class=Response)
async def metrics(request: Request) -> Response:
    server: Server = server_of(request)
    return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")
