"""Photos and the command, for the tests of batches."""

import json

import fsspec
import pytest

from birefnet.command_line import main

from ..drawn_photos import draw_pair
from .faulty_storage import faulty_s3, s3_environment


@pytest.fixture
def photos(tmp_path):
    """Seven photos in two folders, and two files that are none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number in range(7):
        photo, _ = draw_pair(number)
        photo.save(folder / ("more" if number % 2 else "") / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes((folder / "0.jpg").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture
def batch(tiny_model_folder, capsys):
    """Runs `birefnet batch` in this process; returns exit code, report (None if there is none) and standard error."""

    def run(*arguments):
        command = ["batch", *map(str, arguments), "--model", str(tiny_model_folder), "--block-size", "3", "--json"]
        code = main(command)
        output, errors = capsys.readouterr()
        return code, json.loads(output) if output else None, errors

    return run


@pytest.fixture
def s3(monkeypatch):
    """An S3 server without faults, which this process and those that it starts use."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (extra `batch`)")
    pytest.importorskip("moto.server", reason="moto, flask and flask-cors are not installed (extra `test`)")
    with faulty_s3() as proxy:
        for name, value in s3_environment(proxy).items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        yield proxy
