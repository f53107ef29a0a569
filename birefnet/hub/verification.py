"""
What a repository's folder computes, for `birefnet publish` to compare: run as a program of its own, this file knows
the folder alone and nothing of this package, as the program of whoever downloads it.
"""

import sys

import numpy as np
import torch
from PIL import Image


# What the network sees: 2048 x 2048 would take minutes and tens of gigabytes on a CPU.
SMALL = {"size": {"height": 256, "width": 320}, "do_dynamic_resize": False}


def compute_matte(model, processor, photo):
    """The matte of a photo at a small size, float32 of the photo's height and width."""
    inputs = processor(photo, **SMALL, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    return processor.post_process_alpha_matte(outputs, target_sizes=[photo.size[::-1]])[0].numpy()


def input_shape(processor, photo):
    """Shape of what the processor makes of the photo by its own settings."""
    return tuple(processor(photo, return_tensors="pt")["pixel_values"].shape)


def main(folder, picture, result):
    """Writes `matte` and `shape` of a picture by the folder's model and processor to a .npz file."""
    from transformers import AutoImageProcessor, AutoModelForImageSegmentation

    model = AutoModelForImageSegmentation.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    photo = Image.open(picture)
    np.savez(result, matte=compute_matte(model, processor, photo), shape=input_shape(processor, photo))


if __name__ == "__main__":
    main(*sys.argv[1:])
