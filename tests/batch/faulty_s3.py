"""An S3 server on the loopback (moto's), behind a proxy that answers some requests with 503 and cuts others off."""

import http.client
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)


class FaultyS3:
    """
    Args:
        faults: share of the requests that get a 503, and as many whose connection is cut within the answer.
        seed: of the choice among the requests.
    """

    def __init__(self, faults: float = 0.0, seed: int = 0):
        from moto.server import ThreadedMotoServer

        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.faults, self.random = faults, random.Random(seed)
        self.counts: Counter = Counter()

    def __enter__(self):
        self.moto.start()
        host, port = self.moto.get_host_and_port()
        handler = type("Handler", (_Proxy,), {"owner": self, "target": (host, port)})
        self.proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.proxy.daemon_threads = True
        threading.Thread(target=self.proxy.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.proxy.shutdown()
        self.proxy.server_close()
        self.moto.stop()

    def environment(self) -> dict[str, str]:
        """What lets clients find this server; without retries of botocore's own, so that this project's are seen."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.proxy.server_port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def choose(self) -> str:
        chance = self.random.random()
        kind = "503" if chance < self.faults else "cut" if chance < 2 * self.faults else "sound"
        self.counts[kind] += 1
        return kind


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def forward(self):
        body = self._body()
        kind = self.owner.choose()
        if kind == "503":
            self._answer(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
            return
        connection = http.client.HTTPConnection(*self.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding",)}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("transfer-encoding",)}
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
