"""A Hugging Face Space of the page and the APIs: `birefnet publish --space` builds it here.

A Space is a folder with `app.py`, `requirements.txt` and the package itself, laid out as it is when it is installed.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib import metadata
from pathlib import Path

from birefnet import repository_folder
from birefnet.errors import CommandError
from birefnet.hub.folders import written_whole


DISTRIBUTION = "birefnet-transformers"
EXTRAS = ("serve", "timm")  # timm has the embedded weights' backbone
SECONDS_TO_START = 120

APP = '''"""Serves the page at the port that Hugging Face expects. Runs elsewhere as well: python app.py"""

import os
import sys

from birefnet.command_line import main


if __name__ == "__main__":
    host, port = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"), os.environ.get("GRADIO_SERVER_PORT", "7860")
    sys.exit(main(["serve", "--host", host, "--port", port{arguments}]))
'''

CARD = """\
---
title: {title}
sdk: gradio
sdk_version: {gradio}
app_file: app.py
license: mit
short_description: Cut subjects out of photos, on a page and over HTTP
tags:
- background-removal
- image-segmentation
- birefnet
---

# {title}

Cuts the subjects out of photos with BiRefNet. The page takes photos by drop, paste or choice, compares before and
after, sets another background, edits the mask, and gives PNG files or a ZIP archive. `/docs` describes the HTTP
interfaces: remove.bg's, rembg's, OpenAI's, and batches. Photos are kept in memory only, until the visitor leaves.

Written by `birefnet publish --space`.
"""


def build_space(folder, repository: str, variants: str | None = None) -> None:
    """
    Writes a Space into a new folder.

    Args:
        folder (`Path`): A new or empty folder; it is written whole or not at all.
        repository: Name on the Hub; its last part becomes the title.
        variants: names of published checkpoints, separated by commas; by default the embedded weights are served.
    """
    import gradio

    arguments = f', "--variant", "{variants}"' if variants else ""
    title = repository.rsplit("/", 1)[-1]
    with written_whole(folder) as partial:
        _copy_package(partial / "birefnet", with_weights=not variants)
        (partial / "app.py").write_text(APP.format(arguments=arguments), encoding="utf-8")
        (partial / "requirements.txt").write_text("\n".join(requirements()) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(CARD.format(title=title, gradio=gradio.__version__), encoding="utf-8")
        shutil.copyfile(repository_folder() / "LICENSE", partial / "LICENSE")


def _copy_package(target: Path, with_weights: bool) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "repository")
    shutil.copytree(Path(__file__).parents[1], target, ignore=ignored)
    source, code = repository_folder(), target / "repository"
    code.mkdir()
    names = ["__init__.py", "config.json", "preprocessor_config.json"] + (
        ["model.safetensors"] if with_weights else []
    )
    for file in (*sorted(source.glob("*_birefnet.py")), *(source / name for name in names)):
        shutil.copyfile(file, code / file.name)


def requirements() -> list[str]:
    """
    What the package needs to serve, in pip's notation, as its installation says.

    Raises:
        CommandError: the installation is older than the extra `serve`.
    """
    needed = []
    for requirement in metadata.requires(DISTRIBUTION) or ():
        text, _, marker = requirement.partition(";")
        extra = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        if (extra is None or extra[1] in EXTRAS) and not text.startswith(DISTRIBUTION):
            needed.append(text.strip())
    if not any(requirement.startswith("gradio") for requirement in needed):
        raise CommandError("the installed package does not know the extra `serve`; install the project again")
    return sorted(set(needed), key=str.lower)


def verify_space(folder, picture) -> None:
    """
    Starts the Space's `app.py` in a fresh process, as Hugging Face does, and has a picture cut out.

    Args:
        folder (`Path`): What [`build_space`] wrote.
        picture (`PIL.Image.Image`): What is cut out.

    Raises:
        CommandError: it does not start, or the answer is not a cut-out of the picture's size.
    """
    from PIL import Image

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch, open(Path(scratch, "log"), "w+") as log:
        environment = {**os.environ, "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
        # Python looks for modules beside app.py first, so it is the Space's copy of the package that is imported.
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            _wait_until_ready(process, port)
            with _cut_out(picture, port) as answer, Image.open(answer) as cutout:
                if (cutout.mode, cutout.size) != ("RGBA", picture.size):
                    raise CommandError(f"the Space {folder} answers with {cutout.mode} of {cutout.size} pixels.")
        except (OSError, TimeoutError) as error:
            log.seek(0)
            raise CommandError(f"the Space {folder} does not run: {error}\n{log.read().strip()[-2000:]}") from error
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(process: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
            return
        time.sleep(0.2)
    raise TimeoutError(f"no answer within {SECONDS_TO_START} s" if process.poll() is None else "it ended by itself")


def _cut_out(picture, port: int):
    """The answer to a picture, as a file."""
    import io

    encoded = io.BytesIO()
    picture.save(encoded, "png")
    boundary = "picture"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="picture.png"\r\n\r\n'
    body = head.encode() + encoded.getvalue() + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/api/remove", body, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return io.BytesIO(answer.read())
