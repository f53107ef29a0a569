"""URLs of strangers: which addresses are reached, and what is let in."""

import asyncio
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from birefnet.serve.errors import RequestError
from birefnet.serve.limits import Limits

from .conftest import drawn_photo, encode


LIMITS = Limits(upload_bytes=100_000, url_seconds=2)
PHOTO = encode(drawn_photo())


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:7f00:1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "localhost", ""),
    ],
)
def test_addresses_that_are_not_public(address):
    from birefnet.serve.fetching import is_public

    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1::1", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    from birefnet.serve.fetching import is_public

    assert is_public(address)


class _Site(BaseHTTPRequestHandler):
    """A web site: its paths say how it behaves. `asked` are the requests' hosts and paths."""

    asked: list

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.asked.append((self.headers["Host"], self.path))
        kind, _, argument = self.path[1:].partition("/")
        if kind == "to":
            self.answer(302, b"", Location=argument)
            return
        bodies = {"photo": PHOTO, "large": bytes(200_000), "empty": b"", "loop": b"", "gzip": PHOTO}
        if kind == "loop":
            self.answer(302, b"", Location="/loop")
        elif kind == "endless":
            self.send_response(200)
            self.end_headers()
            with_suppressed_pipe(lambda: [self.wfile.write(bytes(10_000)) for _ in range(1000)])
        elif kind == "slow":
            self.send_response(200)
            self.end_headers()
            threading.Event().wait(4)
        elif kind == "gzip":
            self.answer(200, PHOTO, **{"Content-Encoding": "gzip"})
        else:
            self.answer(200 if kind in bodies else 404, bodies.get(kind, b""))

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with_suppressed_pipe(lambda: self.wfile.write(body))


def with_suppressed_pipe(write):
    with suppress(OSError):  # the client has seen enough
        write()


@contextmanager
def a_site():
    handler = type("Handler", (_Site,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server.server_address[1], handler.asked
    finally:
        server.shutdown()


@pytest.fixture(scope="module")
def site():
    with a_site() as site:
        yield site


def fetched(url: str, answers: dict[str, list[list[str]]], limits: Limits = LIMITS):
    """
    Fetches with a resolver that gives one answer after the other for each name. 127.0.0.1 counts as public where the
    resolver calls it "public"; a connection to anything else would be an attempt to leave this machine.
    """
    from birefnet.serve.fetching import PhotoFetcher, is_public

    allowed = set()

    async def resolve(host, port):
        answer = answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]
        allowed.update("127.0.0.1" for address in answer if address == "public")
        return ["127.0.0.1" if address == "public" else address for address in answer]

    def is_allowed_address(address):
        public = address in allowed or is_public(address)
        allowed.discard(address)
        return public

    async def fetch():
        fetcher = PhotoFetcher(limits, resolve=resolve, is_allowed_address=is_allowed_address)
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.close()

    return asyncio.run(fetch())


def refused(url: str, answers: dict, limits: Limits = LIMITS) -> str:
    with pytest.raises(RequestError) as caught:
        fetched(url, answers, limits)
    return caught.value.code


def test_a_photo_with_its_host_and_over_redirects(site):
    port, asked = site
    asked.clear()
    names = {"shop.example": [["public"]], "cdn.example": [["public"]]}
    assert fetched(f"http://shop.example:{port}/to/http://cdn.example:{port}/photo", names) == PHOTO
    assert [host for host, _ in asked] == [f"shop.example:{port}", f"cdn.example:{port}"]


def test_the_address_that_was_checked_is_the_one_connected_to(site):
    """The second DNS answer would be loopback; the name is not resolved a second time."""
    port, _ = site
    names = {"rebind.example": [["public"], ["127.0.0.1"]]}
    assert fetched(f"http://rebind.example:{port}/photo", names) == PHOTO
    assert names["rebind.example"] == [["127.0.0.1"]]  # resolved once


def test_redirects_into_the_own_network_are_refused(site):
    port, asked = site
    asked.clear()
    names = {"shop.example": [["public"]], "inside.example": [["10.0.0.1"]], "127.0.0.1": [["127.0.0.1"]]}
    names |= {"::ffff:127.0.0.1": [["::ffff:127.0.0.1"]], "169.254.169.254": [["169.254.169.254"]]}
    for target in (
        f"http://127.0.0.1:{port}/photo",
        f"http://[::ffff:127.0.0.1]:{port}/photo",
        "http://inside.example/photo",
        "http://169.254.169.254/latest/meta-data",
    ):
        assert refused(f"http://shop.example:{port}/to/{target}", names) == "url_not_allowed"
    assert all(path.startswith("/to/") for _, path in asked)  # nothing else was reached
    assert refused(f"http://shop.example:{port}/to/file:///etc/passwd", names) == "invalid_url"
    assert refused(f"http://shop.example:{port}/loop", names) == "url_failed"


def test_a_name_with_a_private_address_beside_a_public_one_is_refused():
    assert refused("http://both.example/", {"both.example": [["8.8.8.8", "10.0.0.1"]]}) == "url_not_allowed"


def test_decimal_and_short_addresses_are_resolved_before_they_are_checked():
    from birefnet.serve.fetching import PhotoFetcher

    async def fetch(url):
        fetcher = PhotoFetcher(LIMITS)
        with pytest.raises(RequestError) as caught:
            await fetcher.fetch(url)
        return caught.value.code

    for host in ("2130706433", "127.1", "0x7f.1", "0", "[::1]", "localhost"):
        assert asyncio.run(fetch(f"http://{host}:9/")) in ("url_not_allowed", "url_failed", "invalid_url"), host


def test_size_time_and_kind(site):
    port, _ = site
    names = {"shop.example": [["public"]]}
    assert refused(f"http://shop.example:{port}/large", names) == "too_large"
    assert refused(f"http://shop.example:{port}/endless", names) == "too_large"
    assert refused(f"http://shop.example:{port}/slow", names, Limits(url_seconds=0.3)) == "timeout"
    assert refused(f"http://shop.example:{port}/gzip", names) == "url_failed"
    assert refused(f"http://shop.example:{port}/missing", names) == "url_failed"
    assert refused(f"http://shop.example:{port}/empty", names) == "invalid_photo"
    for url in (
        "ftp://shop.example/",
        "http://user:word@shop.example/",
        "http:///x",
        "photo.jpg",
        "http://shop.example:22/",
    ):
        assert refused(url, names) in ("invalid_url", "url_failed")


def test_urls_can_be_switched_off():
    from birefnet.serve.fetching import PhotoFetcher

    async def fetch():
        await PhotoFetcher(LIMITS, allowed=False).fetch("http://shop.example/")

    with pytest.raises(RequestError, match="fetches no URLs"):
        asyncio.run(fetch())
