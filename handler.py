"""
Serves the model on Hugging Face Inference Endpoints. The service creates one `EndpointHandler` with the repository's
folder and calls it for each request.

A request is a picture, or JSON with `inputs` (a URL, or the picture in base64) and `parameters` for the
"background-removal" pipeline, such as `return_mask` or `background`. The service converts the returned picture to the
type that the request accepts: `image/png`, `image/webp`, or base64 in JSON.
"""

import base64
import binascii

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
            data (`dict`): `inputs` is a picture (`PIL.Image.Image`), a URL, base64 text, or a list of these.
                `parameters` (optional) are keyword arguments of the pipeline.

        Returns:
            `PIL.Image.Image` or a list of them: the cut-out, or the result that the parameters select.

        Raises:
            ValueError: The request has no inputs, or an input is not a picture, a URL or base64.
        """
        inputs = data.get("inputs")
        if inputs is None or inputs in ([], ""):
            raise ValueError("The request has no inputs: send a picture, a URL or a picture in base64.")
        parameters = dict(data.get("parameters") or {})
        if isinstance(parameters.get("background"), str):
            parameters["background"] = read_background(parameters["background"])
        pictures = [read_picture(picture) for picture in inputs] if isinstance(inputs, list) else read_picture(inputs)
        return self.pipeline(pictures, **parameters)


def read_picture(picture):
    """
    Converts an input of a request to an input of the pipeline: a PIL image, a URL or the bytes of an encoded picture.

    Text is never taken for a path, which would give access to the server's own files.
    """
    if isinstance(picture, Image.Image) or str(picture).startswith(("http://", "https://")):
        return picture
    text = str(picture).split("base64,")[-1]  # the part of a data URL after its header
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"Neither a URL nor a picture in base64: {text[:40]!r}.") from error


def read_background(background: str):
    """Returns a colour's name as it is, and a picture as [`read_picture`] does."""
    try:
        ImageColor.getrgb("black" if background == "transparent" else background)
    except ValueError:
        return read_picture(background)
    return background
