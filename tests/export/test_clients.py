"""Exported folders in clients that nobody of this project wrote: transformers.js in Node, and Chromium."""

import functools
import http.server
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from birefnet.hub.folders import write_folder
from birefnet.hub.publish import add_onnx, verify_repository
from birefnet.inference import load_model, load_remover
from birefnet.photos.drawing import draw_picture


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


def test_a_published_repository_serves_python_and_transformers_js(tiny_model_folder, request, tmp_path):
    model, processor = load_model(tiny_model_folder)
    folder = tmp_path / "repository"
    folder.mkdir()
    write_folder(folder, model, processor, "card")
    add_onnx(folder, model, processor)
    assert verify_repository(folder, model, processor) <= 1e-3  # in a fresh process, with the code in the folder

    run_node, photo = request.getfixturevalue("run_node"), tmp_path / "photo.png"
    draw_picture(64, 64).save(photo)
    run_node("background_removal.mjs", folder, photo, tmp_path / "alpha", "fp32")
    alpha = np.fromfile(tmp_path / "alpha.fp32", np.uint8).reshape(64, 64).astype(int)
    assert alpha.std() > 10
    assert np.abs(alpha - python_alpha(photo, model=str(folder))).max() <= 2


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
