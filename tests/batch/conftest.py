"""Photos and the command, for the tests of batches."""

import json

import pytest

from birefnet.command_line import main

from ..drawn_photos import draw_pair


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
