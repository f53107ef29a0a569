"""Clients and networks that misbehave: the server says what happened, and goes on."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import httpx
import pytest
import torch

from birefnet.serve.limits import Limits

from .conftest import drawn_photo, encode, opened


ENCODED = encode(drawn_photo(1))


class Gate:
    """Stands before a network: counts the photos that reach it, and lets them through while it is open."""

    def __init__(self, remover):
        self.remover, self.forward = remover, remover.forward
        self.reached, self.error = 0, None
        self.open = threading.Event()
        self.open.set()
        remover.forward = self

    def __call__(self, items):
        self.reached += len(items)
        assert self.open.wait(20)
        if self.error is not None:
            raise self.error
        return self.forward(items)


@pytest.fixture(scope="module")
def server(start):
    limits = Limits(upload_bytes=300_000, waiting=4, request_seconds=8, upload_seconds=2, idle_seconds=0.5)
    with start(limits=limits) as server:
        yield server


@pytest.fixture
def gate(server):
    remover = server.parts.service.shelf._loaded["tiny"]
    gate = Gate(remover)
    yield gate
    gate.open.set()
    remover.forward = gate.forward
    assert_serves(server)


def assert_serves(server):
    """A photo comes back right, and nothing is left behind by what went before."""
    deadline = time.monotonic() + 10
    while server.parts.service.busy and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not server.parts.service.busy
    answer = httpx.post(f"{server.url}/api/remove", files={"file": ENCODED}, timeout=20)
    assert answer.status_code == 200 and opened(answer.content).size == (90, 70)


def post(server, **options):
    return httpx.post(f"{server.url}/api/remove", files={"file": ENCODED}, timeout=20, **options)


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def request_head(length: int, path: str = "/api/remove", kind: str = "multipart/form-data; boundary=b") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


BODY = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n' + ENCODED + b"\r\n--b--\r\n"


def answered(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        while part := connection.recv(65536):
            received += part
    return received


def test_a_full_queue_answers_429_and_the_accepted_photos_are_right(server, gate):
    gate.open.clear()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(post, server) for _ in range(12)]
        refused = []
        for answer in concurrent.futures.as_completed(answers, timeout=20):
            refused.append(answer.result())
            if len(refused) == 8:
                break
        gate.open.set()
        accepted = [answer.result() for answer in answers if answer.result() not in refused]
    assert {answer.status_code for answer in refused} == {429} and len(accepted) == 4
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.status_code == 200 for answer in accepted)


def test_clients_that_hang_up_are_dropped_before_the_network(server, gate):
    gate.open.clear()
    running = connect(server)
    running.sendall(request_head(len(BODY)) + BODY)
    while not gate.reached:
        time.sleep(0.01)
    for stage in ("waiting", "uploading", "head"):
        with connect(server) as leaver:
            sent = request_head(len(BODY)) + BODY
            leaver.sendall({"waiting": sent, "uploading": sent[:-500], "head": sent[:40]}[stage])
            time.sleep(0.3)
    deadline = time.monotonic() + 5
    while server.parts.service._places > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.parts.service._places == 1
    running.close()
    gate.open.set()
    time.sleep(0.2)
    assert gate.reached == 1
    assert 'birefnet_dropped_total{route="/api/remove"}' in httpx.get(f"{server.url}/metrics").text


def test_slow_uploads_and_slow_heads_are_ended(server, gate):
    start = time.monotonic()
    with connect(server) as stalls, connect(server) as drips, connect(server) as silent, connect(server) as headless:
        stalls.sendall(request_head(len(BODY)) + BODY[:100])
        drips.sendall(request_head(len(BODY)) + BODY[:100])
        headless.sendall(b"POST /api/remove HTTP/1.1\r\nHost: loc")

        def drip():
            with contextlib.suppress(OSError):
                for byte in BODY[100:]:
                    drips.sendall(bytes([byte]))
                    time.sleep(0.2)

        threading.Thread(target=drip, daemon=True).start()
        assert b" 408 " in answered(stalls)
        assert b" 408 " in answered(drips)
        assert answered(silent) == b"" and answered(headless) == b""
    assert time.monotonic() - start < 8 and gate.reached == 0


def test_announced_and_sent_bodies_that_are_too_large(server, gate):
    with connect(server) as announces:
        announces.sendall(request_head(5 * 2**30) + BODY[:100])
        assert b" 413 " in answered(announces)

    def endless():
        yield BODY[:100]
        while True:
            yield bytes(10_000)

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        answer = httpx.post(f"{server.url}/api/remove", content=endless(), headers=headers)
        assert answer.status_code == 413
    # Without a body's limit this would go on for ever; the form is never complete.
    large = httpx.post(f"{server.url}/api/remove", files={"file": bytes(350_000)})
    assert large.status_code == 413 and gate.reached == 0


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data"),
        (b"nothing of the sort", "multipart/form-data; boundary=b"),
        (BODY[:-30], "multipart/form-data; boundary=b"),
        (BODY.replace(b'name="file"', b""), "multipart/form-data; boundary=b"),
        (BODY.replace(b"\r\n\r\n", b"\r\n", 1), "multipart/form-data; boundary=b"),
        (
            b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n1\r\n' * 200 + b"--b--",
            "multipart/form-data; boundary=b",
        ),
        (BODY[:-7] + BODY, "multipart/form-data; boundary=b"),
        (b"{" * 5000, "application/json"),
        (b"[1]", "application/json"),
        (b'{"url": {"a": 1}}', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"a=%ff%00", "application/x-www-form-urlencoded"),
        (BODY, "text/plain"),
        (BODY, ""),
    ],
)
def test_malformed_bodies_are_refused_in_words(server, gate, body, kind):
    answer = httpx.post(f"{server.url}/api/remove", content=body, headers={"Content-Type": kind})
    assert 400 <= answer.status_code < 500 and answer.json()["detail"] and gate.reached == 0
    assert "Traceback" not in answer.text and "/birefnet" not in answer.text


def test_out_of_memory_and_errors_of_the_network(server, gate):
    for error, status in ((torch.OutOfMemoryError("CUDA out of memory"), 503), (RuntimeError("/path/to/it"), 500)):
        gate.error = error
        answer = post(server)
        assert answer.status_code == status and "/path" not in answer.text
        assert ("memory" in answer.json()["detail"]) == (status == 503)
    gate.error = None
    assert post(server).status_code == 200


def test_a_photo_that_takes_too_long_is_given_up(start):
    with start(limits=Limits(request_seconds=0.3)) as server:
        gate = Gate(server.parts.service.shelf._loaded["tiny"])
        gate.open.clear()
        answer = post(server)
        gate.open.set()
        assert answer.status_code == 503 and answer.json()["code"] == "timeout"


def test_other_hosts_names_and_other_sites_pages_are_refused(server):
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 421
    assert httpx.get(f"{server.url}/health", headers={"Host": "localhost:1"}).status_code == 200
    assert httpx.get(f"{server.url}/health", headers={"Host": "[::1]:80"}).status_code == 200
    assert post(server, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert post(server, headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_stopping_finishes_what_is_at_work_and_takes_nothing_new(start):
    with start() as server:
        gate = Gate(server.parts.service.shelf._loaded["tiny"])
        gate.open.clear()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(post, server)
            while not gate.reached:
                time.sleep(0.01)
            kept = httpx.Client(base_url=server.url)
            assert kept.get("/ready").status_code == 200
            server.server.handle_exit(15, None)
            with contextlib.suppress(httpx.TransportError):  # the connection may be closed by then
                assert kept.get("/ready").status_code == 503
            time.sleep(0.5)
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{server.url}/health")
            gate.open.set()
            assert running.result().status_code == 200
        server.thread.join(10)
        assert not server.thread.is_alive()
