"""Exported folders in clients that nobody of this project wrote: transformers.js in Node, and Chromium."""

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from birefnet.inference import load_remover
from birefnet.photos.drawing import draw_picture

from ..hub.test_variants import stand_in_program
from ..hub_server import HubClient, LoopbackHub


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = Path(__file__).parents[2] / "docs" / "browser.html"


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A photo of the network's size, so that nobody's resizing plays a part."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    draw_picture(448, 448).save(path)
    return path


def python_alpha(photo, **options):
    return np.asarray(load_remover(**options)(str(photo), return_mask=True), int)


def read_alpha(path):
    return np.fromfile(path, np.uint8).reshape(448, 448).astype(int)


def test_transformers_js(embedded_folder, run_node, photo, tmp_path):
    folder, _ = embedded_folder
    names = {"fp32": "float32", "fp16": "float16", "q8": "int8"}
    run_node("background_removal.mjs", folder, photo, tmp_path / "alpha", *names)
    for name, dtype in names.items():
        expected = python_alpha(photo, model=str(folder), runtime="onnx", dtype=dtype)
        assert np.abs(read_alpha(tmp_path / f"alpha.{name}") - expected).max() <= 2


def test_a_published_repository_serves_python_and_transformers_js(tiny_model_folder, run_node, tmp_path):
    """From `birefnet publish --onnx` through a local Hub to both clients."""
    repository, photo = "me/BiRefNet-portrait", tmp_path / "photo.png"
    draw_picture(64, 64).save(photo)
    publish = ["publish", "portrait", "--repo", repository, "--onnx", "--checkpoints", str(tiny_model_folder)]
    with LoopbackHub(tmp_path / "hub") as hub:
        publisher, stranger = (HubClient(hub.environment(tmp_path / name)) for name in ("home", "stranger"))
        publisher.run(stand_in_program(tiny_model_folder / "model.safetensors"))
        status = publisher.run(f"""
from birefnet.command_line import main
settings = {{**VARIANTS["portrait"].processor, "size": {{"height": 64, "width": 64}}}}
VARIANTS["portrait"] = dataclasses.replace(VARIANTS["portrait"], processor=settings)
result = main({publish!r})
""")
        assert status == 0
        files = {f"onnx/{name}.onnx" for name in ("model", "model_fp16", "model_quantized")}
        assert files < set(hub.files(repository))
        expected = stranger.run(f"""
import numpy
from transformers import pipeline
remover = pipeline("background-removal", model={repository!r}, trust_remote_code=True)
result = numpy.asarray(remover({str(photo)!r}, return_mask=True)).tolist()
""")
        run_node("background_removal.mjs", repository, photo, tmp_path / "alpha", "fp32", HF_ENDPOINT=hub.url)
        for client in (publisher, stranger):
            client.close()
    alpha = np.fromfile(tmp_path / "alpha.fp32", np.uint8).reshape(64, 64).astype(int)
    assert alpha.std() > 10
    assert np.abs(alpha - expected).max() <= 2


def test_page_in_chromium(embedded_folder, run_node, node_modules, photo, tmp_path):
    if CHROMIUM is None:
        pytest.skip("needs a browser that runs the page: apt install chromium")
    folder, _ = embedded_folder
    site = tmp_path / "site"
    site.mkdir()
    (site / "browser.html").symlink_to(PAGE)
    (site / "ort").symlink_to(Path(node_modules) / "onnxruntime-web" / "dist")
    (site / "exported").symlink_to(folder)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/browser.html"
        printed = run_node("browser.mjs", CHROMIUM, tmp_path / "profile", url, photo, tmp_path / "alpha")
        server.shutdown()
    assert json.loads(printed)["problems"] == []
    assert np.abs(read_alpha(tmp_path / "alpha") - python_alpha(photo)).max() <= 2
