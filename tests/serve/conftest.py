"""A server on the loopback, in a thread of the test's process, with a small model."""

import contextlib
import io
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("fastapi_offline", reason="needs the extra `serve`")
pytest.importorskip("gradio", reason="needs the extra `serve`")
pytest.importorskip("prometheus_client", reason="needs the extra `serve`")


class RunningServer:
    """A server that answers at `url`; `app` is its application, `server` uvicorn's."""

    def __init__(self, app):
        from birefnet.serve.running import Server as BirefnetServer
        from birefnet.serve.running import uvicorn_config

        self.app = app
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = BirefnetServer(uvicorn_config(app, "127.0.0.1", self.port), app)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    @property
    def parts(self):
        return self.app.state.server

    def wait_until_ready(self) -> None:
        import httpx

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("the server is not ready after 60 s")

    def __enter__(self):
        self.thread.start()
        self.wait_until_ready()
        return self

    def __exit__(self, *error):
        self.server.handle_exit(15, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session")
def start(tiny_model_folder):
    """Starts a server with the small model; arguments are those of `create_app`."""
    from birefnet.inference import load_remover
    from birefnet.serve import create_app

    def start(names=("tiny",), loaders=None, **options):
        def load():
            return load_remover(str(tiny_model_folder), device="cpu")

        return RunningServer(create_app(loaders or dict.fromkeys(names, load), with_page=False, **options))

    return start


def encode(picture: Image.Image, picture_format: str = "png", **options) -> bytes:
    encoded = io.BytesIO()
    picture.save(encoded, picture_format, **options)
    return encoded.getvalue()


def drawn_photo(seed: int = 0, width: int = 90, height: int = 70) -> Image.Image:
    """Colours that no other seed has."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), np.uint8)
    return Image.fromarray(pixels.repeat(10, 0).repeat(10, 1)[:height, :width])


def opened(content: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(content))
    picture.load()
    return picture
