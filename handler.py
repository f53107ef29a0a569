"""
Serves the model on Hugging Face Inference Endpoints, whose service makes one `EndpointHandler` of the repository's
folder and calls it for every request.

A request is a picture, or JSON with `inputs` (a URL, or the picture in base64) and `parameters` for the pipeline
"background-removal", such as `return_mask` or `background`. The service turns the picture that comes back into what
the request accepts: `image/png` or `image/webp`, or base64 in JSON.
"""

import base64
import binascii
from io import BytesIO

import torch
from PIL import Image, ImageColor
from transformers import pipeline


class EndpointHandler:
    """
    Args:
        path (`str`): Folder of the repository.
    """

    def __init__(self, path: str = ""):
        on_gpu = torch.cuda.is_available()
        self.pipeline = pipeline(
            "background-removal",
            model=str(path),
            trust_remote_code=True,
            device=0 if on_gpu else -1,
            dtype=torch.float16 if on_gpu else torch.float32,
        )

    def __call__(self, data: dict):
        """
        Args:
            data (`dict`): `inputs`, a picture (`PIL.Image.Image`), a URL, base64 text, or a list of these, and
                optionally `parameters`, keyword arguments of the pipeline.

        Returns:
            `PIL.Image.Image` or a list of them: the cut-out, or what the parameters ask for.

        Raises:
            ValueError: if the request has no inputs, or one is neither a picture, a URL nor base64.
        """
        inputs = data.get("inputs")
        if inputs is None or inputs in ([], ""):
            raise ValueError("The request has no inputs; give a picture, a URL or a picture in base64.")
        parameters = dict(data.get("parameters") or {})
        if isinstance(parameters.get("background"), str):
            parameters["background"] = read_background(parameters["background"])
        pictures = [read_picture(picture) for picture in inputs] if isinstance(inputs, list) else read_picture(inputs)
        return self.pipeline(pictures, **parameters)


def read_picture(picture):
    """What a request sent, as the pipeline takes it. Never a path: those would be the server's own files."""
    if isinstance(picture, Image.Image) or str(picture).startswith(("http://", "https://")):
        return picture
    text = str(picture).split("base64,")[-1]  # also data URLs
    try:
        decoded = Image.open(BytesIO(base64.b64decode(text, validate=True)))
        decoded.load()
    except (binascii.Error, OSError) as error:
        raise ValueError(f"Neither a URL nor a picture in base64: {text[:40]!r}.") from error
    return decoded


def read_background(background: str):
    """A colour's name, or a picture as in `read_picture`."""
    try:
        return "transparent" if background == "transparent" else ImageColor.getrgb(background)[:3]
    except ValueError:
        return read_picture(background)
