"""Object stores and a web server on the loopback, behind a proxy that fails now and then, or is slow."""

import functools
import http.client
import random
import socket
import threading
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer


SLOW = 0.5  # seconds
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class FaultyProxy:
    """
    Answers some of the requests to a server with errors.

    Args:
        target: host and port of the server.
        seed: of the choice among the requests.

    Attributes:
        url: of the proxy.
        faults: share of the requests that get a 503; as many have their connection cut within the answer, and as many
            are answered after `SLOW` seconds.
        counts: how many requests had which fate.
    """

    def __init__(self, target: tuple[str, int], seed: int = 0):
        self.target, self.faults, self.random = target, 0.0, random.Random(seed)
        self.counts: Counter = Counter()

    def __enter__(self):
        handler = type("Handler", (_Proxy,), {"owner": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def choose(self) -> str:
        kinds = ("503", "cut", "slow")
        part = int(self.random.random() / self.faults) if self.faults else len(kinds)
        kind = kinds[part] if part < len(kinds) else "sound"
        self.counts[kind] += 1
        return kind


@contextmanager
def faulty_s3():
    """moto's S3 server behind a `FaultyProxy`, without any bucket."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    # moto keeps the buckets of earlier servers of this process.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    try:
        with FaultyProxy((host, port)) as proxy:
            yield proxy
    finally:
        moto.stop()


def s3_environment(proxy: FaultyProxy) -> dict[str, str]:
    """What lets clients find the server; without retries of botocore's own, so that this project's are seen."""
    return {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }


@contextmanager
def faulty_gcs():
    """A server of the Google Cloud Storage API, in memory, behind a `FaultyProxy`."""
    from gcp_storage_emulator.server import create_server

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    emulator = create_server(*address, in_memory=True)
    emulator.start()
    try:
        with FaultyProxy(address) as proxy:
            yield proxy
    finally:
        emulator.stop()


@contextmanager
def faulty_web_server(folder):
    """The files of a folder behind a `FaultyProxy`."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        with FaultyProxy(server.server_address) as proxy:
            yield proxy
        server.shutdown()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        body = self._body()
        kind = self.owner.choose()
        if kind == "503":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        if kind == "slow":
            time.sleep(SLOW)
        connection = http.client.HTTPConnection(*self.owner.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
        self._answer(answer.status, headers, content, cut=kind == "cut")
        connection.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict, content: bytes, cut: bool = False):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *arguments):
        pass
