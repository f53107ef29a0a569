"""
Computes a matte with a model folder, for the check in `birefnet publish`.

`birefnet publish` runs this file as a separate program. It uses the folder but not this package, like the program of a
user who downloads the folder.
"""

import sys

import numpy as np
import torch
from PIL import Image


# Input size of the check. 2048 x 2048 would take minutes and tens of gigabytes on a CPU.
SMALL = {"size": {"height": 256, "width": 320}, "do_dynamic_resize": False}


def compute_matte(model, processor, photo):
    """Returns the matte of a photo, computed at a small size: float32, (height, width) of the photo."""
    inputs = processor(photo, **SMALL, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    return processor.post_process_alpha_matte(outputs, target_sizes=[photo.size[::-1]])[0].numpy()


def input_shape(processor, photo):
    """Returns the shape of the network's input with the processor's own settings."""
    return tuple(processor(photo, return_tensors="pt")["pixel_values"].shape)


def main(folder, picture, result):
    """Computes `matte` and `shape` with the folder's model and processor and writes them to a .npz file."""
    from transformers import AutoImageProcessor, AutoModelForImageSegmentation

    model = AutoModelForImageSegmentation.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    photo = Image.open(picture)
    np.savez(result, matte=compute_matte(model, processor, photo), shape=input_shape(processor, photo))


if __name__ == "__main__":
    main(*sys.argv[1:])
