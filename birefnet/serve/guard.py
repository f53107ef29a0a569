"""The outermost layer of the server: limits of request bodies, headers of every answer, and who may ask at all."""

import asyncio
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable

from starlette.requests import Request

from birefnet.serve.errors import RequestError, TooLargeError, TooSlowError
from birefnet.serve.limits import Limits
from birefnet.serve.metrics import Metrics


# Routes whose body may hold many photos.
ROUTES_OF_MANY = ("/v1/batch", "/gradio_api/upload")
# Answers that never end by themselves: an open page listens to them.
STREAMS_OF_PAGES = ("/gradio_api/heartbeat", "/gradio_api/queue/data")
_OVERHEAD = 2**16  # of a form around its photo

_ONLY_OWN = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors {ancestors}"
)


def security_headers(ancestors: str = "'none'") -> dict[str, str]:
    """
    Headers of every answer. Browsers then load nothing from another host.

    Args:
        ancestors: which sites may show the page in a frame, in the terms of `frame-ancestors`.
    """
    headers = {
        "Content-Security-Policy": _ONLY_OWN.format(ancestors=ancestors),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    if ancestors == "'none'":
        headers |= {"X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin"}
    return headers


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """
    ASGI middleware.

    Args:
        app: the application inside.
        limits: bytes and seconds of a body.
        metrics: where answers are counted.
        headers: what is added to every answer.
        loopback_only: whether the server is bound to loopback. Requests for another host's name are then refused:
            they come from a web page whose name was made to lead here (DNS rebinding).
        ending: set when the streams of open pages have to end.
    """

    def __init__(
        self,
        app,
        limits: Limits,
        metrics: Metrics,
        headers: dict[str, str],
        loopback_only: bool,
        ending: asyncio.Event,
    ):
        self.app, self.limits, self.metrics, self.loopback_only = app, limits, metrics, loopback_only
        self.ending = ending
        self.headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self, scope, receive, send)
        try:
            self._check_origin(exchange)
            exchange.check_announced()
            work = self.app(scope, exchange.receive, exchange.send)
            if scope["path"].startswith(STREAMS_OF_PAGES):
                work = self._until_the_end(work, exchange)
            await work
        except RequestError as error:
            if exchange.answered:
                raise
            await exchange.refuse(error)

    async def _until_the_end(self, work: Awaitable, exchange: "_Exchange") -> None:
        """Runs a page's stream until it ends or the server does."""
        stream, ending = asyncio.ensure_future(work), asyncio.ensure_future(self.ending.wait())
        try:
            await asyncio.wait({stream, ending}, return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                return stream.result()
        finally:
            for task in (stream, ending):
                task.cancel()
            await asyncio.gather(stream, ending, return_exceptions=True)
        await exchange.end()

    def _check_origin(self, exchange: "_Exchange") -> None:
        host = exchange.header("host").rsplit(":", 1)[0] if "]" not in exchange.header("host") else None
        host = exchange.header("host").split("]")[0] if host is None else host
        if self.loopback_only and not is_loopback(host):
            raise RequestError("This server answers to localhost only.", "unknown_host", 421)
        if exchange.scope["method"] == "POST" and exchange.header("sec-fetch-site") == "cross-site":
            raise RequestError("Another site's page may not send photos to this server.", "cross_site", 403)


class _Exchange:
    """One request and its answer, with the body's bytes and seconds counted."""

    def __init__(self, guard: Guard, scope, receive: Callable[[], Awaitable[dict]], send):
        self.guard, self.scope, self._receive, self._send = guard, scope, receive, send
        many = scope["path"].startswith(ROUTES_OF_MANY)
        limits = guard.limits
        # A photo in base64 takes four bytes for three.
        self.most = limits.batch_bytes if many else limits.upload_bytes * 4 // 3
        self.received, self.answered = 0, False
        self.complete = self.header("content-length") in ("", "0") and not self.header("transfer-encoding")
        self.due = time.monotonic() + limits.upload_seconds

    def header(self, name: str) -> str:
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == wanted), "")

    def check_announced(self) -> None:
        announced = self.header("content-length")
        if announced.isdecimal() and int(announced) > self.most + _OVERHEAD:
            raise self._too_large()

    def _too_large(self) -> TooLargeError:
        self.complete = True  # the rest is not waited for
        return TooLargeError(
            f"The request is larger than {self.most / 2**20:.0f} MiB.", headers={"Connection": "close"}
        )

    async def receive(self) -> dict:
        """The next part of the body. Once it is complete: waits for the client to hang up."""
        if self.complete:
            return await self._receive()
        try:
            seconds = min(self.guard.limits.idle_seconds, self.due - time.monotonic())
            message = await asyncio.wait_for(self._receive(), max(seconds, 0.001))
        except asyncio.TimeoutError:
            self.complete = True
            raise TooSlowError("The request did not arrive in time.", headers={"Connection": "close"}) from None
        self.received += len(message.get("body", b""))
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self.received > self.most + _OVERHEAD:
            raise self._too_large()
        return message

    async def send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            await self._drain()
            self.answered = True
            route = getattr(self.scope.get("route"), "path", "page")
            self.guard.metrics.requests.labels(route, str(message["status"])).inc()
            present = {name.lower() for name, _ in message["headers"]}
            added = [(name, value) for name, value in self.guard.headers if name not in present]
            message = {**message, "headers": [*message["headers"], *added]}
        await self._send(message)

    async def end(self) -> None:
        """Ends an answer that is being sent."""
        if self.answered:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await self.refuse(RequestError("The server is about to stop.", "stopping", 503))

    async def _drain(self) -> None:
        """
        Reads what is left of a body whose answer is settled, within the limits. A client that is still sending when
        the connection closes would see an error instead of the answer.
        """
        if self.header("expect"):  # it waits for the answer before it sends the body
            return
        try:
            while not self.complete:
                await self.receive()
        except RequestError:
            return

    async def refuse(self, error: RequestError) -> None:
        body = json.dumps({"detail": str(error), "code": error.code}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self._send({"type": "http.response.body", "body": body})


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(request: Request, work: Awaitable):
    """
    The result of `work`, which is cancelled when the client hangs up. The body has to be read by then.

    Raises:
        ClientLeftError: the client hung up first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_until_disconnected(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _until_disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
