"""What a client may name as an upload of the page: only what it has uploaded. The page's browser is not needed."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from .conftest import RunningServer, drawn_photo, encode


@pytest.fixture(scope="module")
def server(tiny_model_folder):
    from birefnet.inference import load_remover
    from birefnet.serve import create_app

    def load():
        return load_remover(str(tiny_model_folder), device="cpu")

    with RunningServer(create_app({"tiny": load})) as server:
        yield server


@pytest.fixture
def secret(tmp_path):
    """A photo on the server's disk that nobody has uploaded."""
    path = tmp_path / "secret.png"
    path.write_bytes(encode(drawn_photo(5)))
    return path


def upload(path: str, **fields) -> dict:
    """A file as the page's script names it once it is uploaded."""
    return {"path": path, **fields, "meta": {"_type": "gradio.FileData"}}


def send(server, data: list, session: str) -> dict:
    """Calls the page's function for uploads, as the page's script does; gives its last message."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        functions = client.get("/config").json()["dependencies"]
        number = next(f["id"] for f in functions if any(event == "upload" for _, event in f["targets"]))
        body = {"data": data, "fn_index": number}
        client.post("/gradio_api/queue/join", json={**body, "session_hash": session}).raise_for_status()
        with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as stream:
            messages = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line]
    return next(message for message in reversed(messages) if message["msg"] == "process_completed")


def test_an_upload_is_taken(server):
    files = {"files": ("photo.png", encode(drawn_photo(1)))}
    (path,) = httpx.post(f"{server.url}/gradio_api/upload", files=files).json()
    message = send(server, [[upload(path)], "tiny"], "sound")
    assert message["success"] and "Done." in json.dumps(message)


@pytest.mark.parametrize("form", ["{secret}", "file://{secret}", "{uploads}/../{name}/secret.png", "/etc/passwd"])
def test_a_path_of_the_server_is_refused(server, secret, form):
    path = form.format(secret=secret, uploads=server.app.state.uploads.name, name=f"..{secret.parent}")
    message = send(server, [[upload(path)], "tiny"], "forged-path")
    assert not message["success"] and "root:" not in json.dumps(message) and "Done." not in json.dumps(message)
    assert secret.exists()
    with httpx.Client(base_url=server.url) as client:
        for prefix in ("/gradio_api/file=", "/file="):
            assert client.get(prefix + path).status_code in (403, 404)


def test_no_other_control_takes_a_path(server):
    message = send(server, [[], upload("/etc/passwd")], "forged-control")
    assert not message["success"]
    assert not list(Path(server.app.state.uploads.name).rglob("passwd"))


@pytest.mark.parametrize("field", ["path", "url"])
def test_a_url_is_not_fetched(server, secret, field, photo_server):
    url, asked = photo_server
    message = send(server, [[upload(**{"path": str(secret), field: url})], "tiny"], "forged-url")
    assert not message["success"] and asked == [] and secret.exists()


@pytest.fixture
def photo_server():
    """A URL of a photo on the loopback, and the list of requests for it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encode(drawn_photo(6)))

        do_HEAD = do_GET

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/photo.png", asked
        server.shutdown()
