"""
The "background-removal" pipeline: from a photo to its cut-out or matte.

The command line, the Endpoints handler and all other programs of this repository use this pipeline. It has three
stages, which can also be called separately, for example in different threads:

1. `preprocess(photo)` reads a photo (a path, URL, encoded file, PIL image, array or tensor) and gives a dictionary:
   `pixel_values` (float32, (3, h, w)), the network's input; `photo` (PIL, RGB), the upright photo, with white in
   fully transparent pixels, whose `info` holds the ICC profile and the resolution; `alpha` (PIL, L), the photo's own
   transparency, or `None` if it is opaque; and `target_size`, (height, width) of the result.
2. `forward(items)` takes a list of such dictionaries, calls the network once for each input size among them, and gives
   a list in the same order: `logits` (1, 1, h, w), with `photo`, `alpha` and `target_size` as before.
3. `postprocess(output, ...)` takes one of these and gives a PIL image of `target_size`: the cut-out (RGBA), the photo
   on a new background (RGB), or the matte (L). The alpha of the result is the matte times the photo's own alpha.

Colours are computed in the photo's own colour space. The result's `info` holds the photo's `icc_profile` and `dpi`, if
any.
"""

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import ModelOutput

from .image_processing_birefnet import read_photo
from .matting_birefnet import adjust_matte, cut_out, to_bytes, to_planes
from .photo_birefnet import background_for, load_background, result_info, to_srgb


MATTE_EDITS = {"sensitivity", "threshold", "grow", "feather", "invert"}
POSTPROCESS_ARGUMENTS = {"return_mask", "background", "refine_foreground"} | MATTE_EDITS


class BiRefNetPipeline(Pipeline):
    """
    Background removal with a BiRefNet model.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> remover = pipeline("background-removal", model="path/to/this/folder", trust_remote_code=True)
    >>> cut_out = remover("photo.jpg")  # PIL image, mode RGBA, of the photo's size
    >>> matte = remover("photo.jpg", return_mask=True)  # PIL image, mode L
    >>> on_white = remover(["a.jpg", "b.jpg"], batch_size=2, background="white")  # list of PIL images, mode RGB
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, inputs, **kwargs):
        """
        Cuts the subjects out of one photo or several photos.

        Args:
            inputs (`str`, `os.PathLike`, `bytes`, `dict`, `PIL.Image.Image`, array, tensor, or a list, generator or
                dataset of those):
                Photos of any kind that `load_photo` accepts. The EXIF orientation is applied. A four-dimensional array
                (N, H, W, C) or tensor (N, C, H, W) is a list of photos.
            return_mask (`bool`, *optional*, defaults to `False`):
                Whether to return the soft matte (mode L, 0 to 255) instead of the cut-out.
            background (`str`, `tuple[int, int, int]` or picture, *optional*):
                `None` or `"transparent"` gives an RGBA cut-out. A colour (a CSS name, `"#rrggbb"` or three values from
                0 to 255, in sRGB) or a picture (of any kind that `load_photo` accepts) gives an RGB photo on that
                background. The picture is scaled to cover the photo and cropped.
            refine_foreground (`bool`, *optional*, defaults to `True`):
                Whether to estimate the subject's own colours where the matte is soft. This removes the halo of the old
                background.
            threshold (`float`, *optional*), sensitivity (`float`, *optional*), grow (`int`, *optional*), feather
            (`float`, *optional*), invert (`bool`, *optional*):
                Edits of the matte. See `adjust_matte`.
            srgb (`bool`, *optional*, defaults to `False`):
                Whether to convert photos with an ICC profile to sRGB. By default results keep the photo's profile.
            batch_size (`int`, *optional*, defaults to 1):
                Photos per call of the network. Photos of different network sizes are computed in separate calls.
            num_workers (`int`, *optional*, defaults to 0):
                Number of processes that decode and resize photos in advance.
            timeout (`float`, *optional*):
                Seconds that a download may take.

        Returns:
            `PIL.Image.Image` for one photo, a list for a list, an iterator for a generator or dataset. Each result has
            the size of its upright photo. Its `info` holds the photo's `icc_profile` and `dpi`, if any; Pillow writes
            the profile when it saves the result.

        Raises:
            TypeError: An argument does not exist, or a photo has an unsupported type.
            ValueError, OSError: A value is outside its range, or a photo cannot be read.
        """
        if isinstance(inputs, tuple) or getattr(inputs, "ndim", None) == 4:
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:  # transformers would fail on the first item
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, timeout=None, srgb=None, local_files_only=None, **postprocess_parameters):
        # `pipeline()` passes its own argument `local_files_only` on.
        if unknown := postprocess_parameters.keys() - POSTPROCESS_ARGUMENTS:
            allowed = sorted(POSTPROCESS_ARGUMENTS | {"batch_size", "num_workers", "srgb", "timeout"})
            raise TypeError(f"Unknown arguments {sorted(unknown)}. The arguments are {allowed}.")
        if "background" in postprocess_parameters:  # read once instead of once per photo
            postprocess_parameters["background"] = load_background(postprocess_parameters["background"], timeout)
        preprocess_parameters = {"timeout": timeout, "srgb": srgb}
        given = {name: value for name, value in preprocess_parameters.items() if value is not None}
        return given, {}, postprocess_parameters

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        # The base class would concatenate photos of different sizes and cannot carry PIL images through a batch.
        dataset_class = PipelineDataset if hasattr(inputs, "__len__") else PipelineIterator
        dataset = dataset_class(inputs, self.preprocess, preprocess_params)
        for items in DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list):
            for outputs in self.forward(items, **forward_params):
                yield self.postprocess(outputs, **postprocess_params)

    def preprocess(self, photo, timeout=None, srgb=False) -> dict:
        """Reads a photo and prepares the network's input. The module's docstring describes the result."""
        photo, alpha = read_photo(photo, timeout=timeout)
        if srgb:
            photo = to_srgb(photo)
        pixel_values = self.image_processor(photo)["pixel_values"][0]
        target_size = (photo.height, photo.width)
        return {"pixel_values": pixel_values, "photo": photo, "alpha": alpha, "target_size": target_size}

    def _forward(self, items: list[dict]) -> list[ModelOutput]:
        """Calls the network once for each input size. Keeps the order of the items."""
        outputs: list[ModelOutput | None] = [None] * len(items)
        groups = self.image_processor.group_by_size([item["pixel_values"] for item in items])
        for indices, pixel_values in groups:
            logits = self.model(pixel_values).logits  # (n, 1, h, w)
            for index, own_logits in zip(indices, logits.split(1), strict=True):
                kept = {key: items[index].get(key) for key in ("photo", "alpha", "target_size")}
                outputs[index] = ModelOutput(logits=own_logits, **kept)
        return outputs

    def postprocess(
        self, outputs, return_mask=False, background=None, refine_foreground=True, **matte_edits
    ) -> Image.Image:
        """Converts logits to the matte of the photo's size and makes the requested picture from it."""
        photo, alpha = outputs["photo"], outputs.get("alpha")
        matte = self.image_processor.post_process_alpha_matte(
            outputs, target_sizes=[outputs["target_size"]], photos=[photo]
        )[0]
        matte = adjust_matte(matte.to(self.device)[None], **matte_edits)  # (1, H, W)
        own_alpha = None if alpha is None else to_planes(alpha).to(self.device)
        if return_mask:
            pixels = to_bytes(matte if own_alpha is None else matte * own_alpha / 255)
        else:
            planes = to_planes(photo).to(self.device)
            pixels = cut_out(planes, matte, background_for(background, photo), refine_foreground, own_alpha)
        picture = to_picture(pixels)
        picture.info.update(result_info(photo, picture.mode))
        return picture


def to_picture(planes: torch.Tensor) -> Image.Image:
    """Converts bytes (channels, H, W) to a PIL image: L for one channel, RGB for three, RGBA for four."""
    pictures = [Image.fromarray(plane) for plane in planes.cpu().numpy()]
    return pictures[0] if len(pictures) == 1 else Image.merge("RGBA"[: len(pictures)], pictures)
