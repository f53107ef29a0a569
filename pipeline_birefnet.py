"""The "background-removal" pipeline: a photo in, its subject on a transparent background (or the soft matte) out."""

from contextlib import suppress

import torch
from PIL import Image, ImageColor
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator
from transformers.utils import ModelOutput

from .image_processing_birefnet import load_photo
from .matting_birefnet import adjust_matte, cut_out, to_bytes, to_planes


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
        Cut the subjects out of one photo or several.

        Args:
            inputs (`str`, `os.PathLike`, `PIL.Image.Image`, array, tensor, or a list, generator or dataset of those):
                Photos, or their paths or URLs. The EXIF orientation is applied.
            return_mask (`bool`, *optional*, defaults to `False`):
                Return the soft matte alone (mode L, 0 to 255) instead of the cut-out.
            background (`str`, `tuple[int, int, int]` or picture, *optional*):
                `None` or `"transparent"` gives an RGBA cut-out; a colour (name, `"#rrggbb"` or a tuple of 0 to 255) or
                a picture (of the same kinds as the photos; scaled to cover the photo, and cropped) gives an RGB photo
                on that background.
            refine_foreground (`bool`, *optional*, defaults to `True`):
                Estimate the subject's own colours where the matte is soft, which removes the old background's halo.
            threshold (`float`, *optional*), sensitivity (`float`, *optional*), grow (`int`, *optional*), feather
            (`float`, *optional*), invert (`bool`, *optional*):
                Edits of the matte, in the terms of `adjust_matte`.
            batch_size (`int`, *optional*, defaults to 1):
                Photos per call of the network. Photos that the processor leaves at different sizes are run apart.
            num_workers (`int`, *optional*, defaults to 0):
                Processes that decode and resize ahead of the network.
            timeout (`float`, *optional*):
                Seconds to wait for a photo from the web.

        Returns:
            `PIL.Image.Image` for one photo, a list of them for a list, an iterator for a generator or dataset; each of
            its photo's upright size.

        Raises:
            TypeError: for an argument that does not exist, or a photo of another type.
            ValueError, OSError: for a value out of its range, or a photo that cannot be read.
        """
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        if isinstance(inputs, list) and not inputs:  # transformers looks at the first one unasked
            return []
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, timeout=None, local_files_only=None, **postprocess_parameters):
        # `local_files_only` is `pipeline()`'s own, which hands it on.
        if unknown := postprocess_parameters.keys() - POSTPROCESS_ARGUMENTS:
            allowed = sorted(POSTPROCESS_ARGUMENTS | {"batch_size", "num_workers", "timeout"})
            raise TypeError(f"Unknown arguments {sorted(unknown)}; this pipeline takes {allowed}.")
        if "background" in postprocess_parameters:  # read once, not for every photo
            postprocess_parameters["background"] = load_background(postprocess_parameters["background"], timeout)
        return ({} if timeout is None else {"timeout": timeout}), {}, postprocess_parameters

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params):
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def get_iterator(self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params):
        # Own batching, since transformers' would concatenate photos of different sizes and keep no PIL image.
        dataset_class = PipelineDataset if hasattr(inputs, "__len__") else PipelineIterator
        dataset = dataset_class(inputs, self.preprocess, preprocess_params)
        for items in DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list):
            for outputs in self.forward(items, **forward_params):
                yield self.postprocess(outputs, **postprocess_params)

    def preprocess(self, photo, timeout=None) -> dict:
        """A photo to `pixel_values` (3, h, w) for the network, and the upright `photo` itself (RGB)."""
        photo = load_photo(photo, timeout=timeout)
        pixel_values = self.image_processor(photo)["pixel_values"][0]
        return {"pixel_values": pixel_values, "photo": photo, "target_size": (photo.height, photo.width)}

    def _forward(self, items: list[dict]) -> list[ModelOutput]:
        """One network call for each size among the items; the order of the items is kept."""
        outputs: list[ModelOutput | None] = [None] * len(items)
        groups = self.image_processor.group_by_size([item["pixel_values"] for item in items])
        for indices, pixel_values in groups:
            logits = self.model(pixel_values).logits  # (n, 1, h, w)
            for index, own_logits in zip(indices, logits.split(1), strict=True):
                kept = {key: items[index][key] for key in ("photo", "target_size")}
                outputs[index] = ModelOutput(logits=own_logits, **kept)
        return outputs

    def postprocess(
        self, outputs, return_mask=False, background=None, refine_foreground=True, **matte_edits
    ) -> Image.Image:
        """Logits to the matte at the photo's size, and on to the picture that was asked for."""
        sizes, photos = [outputs["target_size"]], [outputs["photo"]]
        matte = self.image_processor.post_process_alpha_matte(outputs, target_sizes=sizes, photos=photos)[0]
        matte = adjust_matte(matte.to(self.device)[None], **matte_edits)  # (1, H, W)
        if return_mask:
            return to_picture(to_bytes(matte))
        photo = to_planes(outputs["photo"]).to(self.device)
        return to_picture(cut_out(photo, matte, background, refine_foreground))


def load_background(background, timeout: float | None = None) -> tuple[int, ...] | Image.Image | None:
    """`None` for a transparent background, else a colour or a picture; whatever `load_photo` takes is a picture."""
    if background is None or isinstance(background, tuple | list):
        return background
    if isinstance(background, str):
        if background == "transparent":
            return None
        with suppress(ValueError):
            return ImageColor.getrgb(background)[:3]
    try:
        return load_photo(background, timeout=timeout)
    except FileNotFoundError as error:
        raise ValueError(f"background={background!r} is neither a colour nor the path or URL of a picture") from error


def to_picture(planes: torch.Tensor) -> Image.Image:
    """Bytes (channels, H, W) to a PIL image: L for one channel, RGB for three, RGBA for four."""
    pictures = [Image.fromarray(plane) for plane in planes.cpu().numpy()]
    return pictures[0] if len(pictures) == 1 else Image.merge("RGBA"[: len(pictures)], pictures)
