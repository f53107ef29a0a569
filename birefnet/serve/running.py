"""Uvicorn around the application: the life of connections, and an orderly end."""

import asyncio
import logging
import signal

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


logger = logging.getLogger("birefnet.serve")
MOST_CONNECTIONS = 512
SECONDS_TO_FINISH = 60  # for what is at work when the server is told to stop


class PunctualProtocol(H11Protocol):
    """HTTP/1.1 whose clients have to send a request's headers in time; uvicorn itself waits for them forever."""

    seconds = 10.0

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._due = None
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_request()

    def connection_lost(self, error) -> None:
        if self._due is not None:
            self._due.cancel()
        super().connection_lost(error)

    def _expect_request(self) -> None:
        if self._due is None and not self._at_work():
            self._due = self.loop.call_later(self.seconds, self._check)

    def _check(self) -> None:
        self._due = None
        if not self._at_work() and not self.transport.is_closing():
            self.transport.close()

    def _at_work(self) -> bool:
        """Whether a request's headers are complete and its answer is not."""
        return self.cycle is not None and not self.cycle.response_complete


class Server(uvicorn.Server):
    """Tells the application when it has to end, so that it takes no new photo and lets the page's streams go."""

    def __init__(self, config: uvicorn.Config, app: FastAPI):
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame) -> None:
        if not self.should_exit:
            logger.warning("finishing what is at work, and taking nothing new")
        self._app.state.server.service.draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets=None) -> None:
        ending = asyncio.create_task(self._end_streams())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_streams(self) -> None:
        """Ends the event streams of open pages once no photo is at work; they would never end by themselves."""
        server = self._app.state.server
        while server.service.busy:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)  # for the pages to learn of the last photo
        server.ending.set()


def uvicorn_config(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    """How uvicorn runs the application."""
    PunctualProtocol.seconds = app.state.server.limits.idle_seconds
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=PunctualProtocol,
        ws="none",
        access_log=False,
        server_header=False,
        log_level="warning",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=SECONDS_TO_FINISH,
        proxy_headers=False,
    )


def serve(app: FastAPI, host: str, port: int) -> int:
    """
    Serves until SIGTERM or Ctrl-C.

    Returns:
        The exit code: 0 after an orderly end, 1 if the port could not be had.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log the URLs of strangers' photos
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    logger.info("page: http://%s:%d   APIs: http://%s:%d/docs   Ctrl-C ends it", shown, port, shown, port)
    server = Server(uvicorn_config(app, host, port), app)
    # Uvicorn raises the signal again once all is finished: SIGTERM would end the process with an error code.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    except SystemExit:  # the port is taken; uvicorn has said so
        return 1
    return 0 if server.started else 1
