"""`birefnet serve` as a process: its arguments, and its end by SIGTERM."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from birefnet.errors import UsageError
from birefnet.serve import command
from birefnet.serve.keys import ApiKeys

from .conftest import drawn_photo, encode


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_models_by_name():
    assert list(command.loaders_of(parsed())) == ["embedded"]
    names = command.loaders_of(parsed("--variant", "general, Portrait,matting", "--model", "folders/mine/"))
    assert list(names) == ["mine", "general", "portrait", "matting"]
    with pytest.raises(UsageError, match="no variant 'nothing'"):
        command.loaders_of(parsed("--variant", "nothing"))


def test_urls_are_fetched_for_this_machine_only_unless_told(monkeypatch):
    from birefnet.serve import app

    asked = {}
    monkeypatch.setattr(app, "create_app", lambda loaders, **options: asked.update(options))
    for arguments, local, allowed in (
        ((), True, True),
        (("--host", "0.0.0.0"), False, False),
        (("--host", "::1"), True, True),
        (("--host", "0.0.0.0", "--allow-url"), False, True),
        (("--no-allow-url",), True, False),
    ):
        command.build_app(parsed(*arguments))
        assert (asked["loopback_only"], asked["allow_url"]) == (local, allowed)


def test_files_of_keys(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("# the shop\n a-key-of-sixteen-characters \n\nanother-key-of-the-shop\n")
    keys = ApiKeys.from_file(path)
    assert keys.accept("a-key-of-sixteen-characters") and keys.accept("another-key-of-the-shop")
    assert not keys.accept("") and not keys.accept("# the shop")
    for content, words in (("# none\n", "has no key"), ("short\n", "16 characters")):
        path.write_text(content)
        with pytest.raises(UsageError, match=words):
            ApiKeys.from_file(path)
    with pytest.raises(UsageError, match="No such file"):
        ApiKeys.from_file(tmp_path / "missing")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM that a process can handle")
def test_sigterm_ends_the_process_in_order(tiny_model_folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--model", str(tiny_model_folder)]
    process = subprocess.Popen(
        [sys.executable, "-m", "birefnet", "serve", *options],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
        while time.monotonic() < deadline and process.poll() is None:
            try:
                if httpx.get(f"{url}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        answer = httpx.post(f"{url}/v1.0/removebg", files={"image_file": encode(drawn_photo())}, timeout=30)
        assert answer.status_code == 200
        page = httpx.get(url)  # the page is there as well
        assert page.status_code == 200 and "gradio" in page.text
        with httpx.stream("GET", f"{url}/gradio_api/heartbeat/x", timeout=10) as stream:  # an open page's
            next(stream.iter_raw())
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
    finally:
        process.kill()
    error = process.stderr.read()
    assert "finishing what is at work" in error and "Traceback" not in error, error
