"""The image processor: photos to network input, and the network's output to mattes of the photos' sizes."""

from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .matting_birefnet import estimate_foreground, guided_upsampling, sharpened_matte, to_planes
from .photo_birefnet import (
    channel_axis,
    check_dimensions,
    check_values,
    fill_transparent,
    own_alpha,
    read_picture,
    to_rgb,
)


# The filters that torch has as well, by PIL's number.
_TORCH_INTERPOLATIONS = {
    Image.Resampling.NEAREST: "nearest-exact",
    Image.Resampling.BILINEAR: "bilinear",
}


def _tensor_to_pixels(image: torch.Tensor, input_data_format: str | None = None) -> torch.Tensor:
    """
    Converts (H, W), (C, H, W) or (H, W, C) to float32 (3, H, W), or (4, H, W) where the image has an alpha channel.

    Floating-point images give values from 0 to 1, all others from 0 to 255. The device stays the same.
    """
    check_dimensions(image.shape)
    if image.is_complex():
        raise TypeError(f"an image tensor must hold booleans, integers or floating-point numbers, got {image.dtype}")
    check_values(image)
    dtype, image = image.dtype, image.to(torch.float32)
    if image.ndim == 2:
        image = image.unsqueeze(0)
    else:
        image = image.movedim(channel_axis(image.shape, input_data_format, preferred=0), 0)
    if dtype == torch.bool:
        image = image * 255
    elif dtype == torch.uint16:
        image = image / 257
    return image if image.shape[0] > 2 else torch.cat([image[:1].expand(3, -1, -1), image[1:]])


def read_photo(
    image: Any, timeout: float | None = None, input_data_format: str | None = None
) -> tuple[Image.Image, Image.Image | None]:
    """
    Reads a photo and separates its colours from its own transparency.

    Args:
        image, timeout, input_data_format: As for [`load_photo`].

    Returns:
        `tuple[PIL.Image.Image, PIL.Image.Image | None]`: The upright colours (RGB; `info` holds the photo's
        `icc_profile` and `dpi`, if any) with white in fully transparent pixels, and the alpha (L), or `None` for an
        opaque photo.

    Raises:
        As [`load_photo`].
    """
    if isinstance(image, torch.Tensor):
        pixels = _tensor_to_pixels(image, input_data_format)
        image = (pixels * 255 if image.is_floating_point() else pixels).round().clamp(0, 255)
        image = image.permute(1, 2, 0).to("cpu", torch.uint8).numpy()
        input_data_format = "channels_last"
    picture = read_picture(image, timeout, input_data_format)
    alpha = own_alpha(picture)
    return fill_transparent(to_rgb(picture), alpha), alpha


def load_photo(image: Any, input_data_format: str | None = None, timeout: float | None = None) -> Image.Image:
    """
    Reads a photo as the network sees it: upright, 8-bit RGB. Mattes have the size of this image.

    The EXIF orientation is applied. Fully transparent pixels become white. 16-bit photos are scaled to 8 bits. Of an
    animation the first frame is taken.

    Args:
        image (`str`, `os.PathLike`, `bytes`, `dict`, binary file, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A path, a URL (`http://`, `https://` or `data:`), an encoded file, the same in base64, a dictionary with
            `"bytes"` or `"path"` (as `datasets` gives undecoded images), or an image. Arrays and tensors are (H, W),
            (H, W, C) or (C, H, W) of booleans, integers from 0 to 255, `uint16`, or floating-point numbers from 0
            to 1.
        input_data_format (`str`, *optional*):
            "channels_first" or "channels_last", for arrays and tensors whose shape allows both. By default arrays are
            channels last and tensors channels first.
        timeout (`float`, *optional*): Seconds that a download may take. No limit by default.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: The file does not exist or may not be read.
        ValueError: The image is damaged, has an unknown format or more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels
            (so that memory stays bounded), a download failed, or an array has an impossible shape or impossible
            values.
        TypeError: `image` has another type.
    """
    return read_photo(image, timeout, input_data_format)[0]


def _fill_transparent(pixels: torch.Tensor, white: int) -> torch.Tensor:
    """Replaces the hidden colours of a tensor (3 or 4, H, W) by white: (3, H, W). See `fill_transparent`."""
    return pixels if pixels.shape[0] == 3 else torch.where(pixels[3:] > 0, pixels[:3], white)


def _resized_matte(matte: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes (1, h, w) to (height, width) = `size`."""
    if matte.shape[-2:] == size:
        return matte[0]
    return F.interpolate(matte[None], size=size, mode="bilinear", antialias=True)[0, 0].clamp_(0, 1)


def _as_list(images: Any) -> list:
    """Returns a list of images for one image, a list of them, or a four-dimensional batch."""
    if isinstance(images, np.ndarray | torch.Tensor):
        images = list(images) if images.ndim == 4 else [images]
    elif not isinstance(images, list | tuple):
        images = [images]
    if len(images) == 0:
        raise ValueError("expected at least one image, got an empty list")
    return list(images)


class BiRefNetImageProcessorKwargs(TypedDict, total=False):
    """The processor's settings. `BiRefNetImageProcessor` describes them."""

    do_resize: bool
    size: dict[str, int]
    resample: int
    do_dynamic_resize: bool
    size_divisor: int
    minimum_size: int
    maximum_size: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: list[float]
    image_std: list[float]
    do_guided_upsampling: bool


class BiRefNetImageProcessor(BaseImageProcessor):
    r"""
    Prepares photos for BiRefNet and turns its output into mattes. Does not need torchvision.

    Photos, arrays, paths and URLs are resized with PIL (antialiased) and then normalised, as in the training of the
    official weights. Tensors are resized with torch on their own device; the values differ by at most 2/255.

    Args:
        do_resize (`bool`, *optional*, defaults to `True`): Whether to resize the photos.
        size (`dict[str, int]`, *optional*, defaults to `{"height": 1024, "width": 1024}`):
            Size of the network's input for photos of every aspect ratio. The network needs multiples of 32.
        resample (`int` or `PIL.Image.Resampling`, *optional*, defaults to `BILINEAR`):
            Resampling filter. Tensors support nearest and bilinear only.
        do_dynamic_resize (`bool`, *optional*, defaults to `False`):
            Whether to use each photo's own size instead of `size`. The photo is scaled, with its aspect ratio kept, so
            that its sides are within `minimum_size` and `maximum_size`, and then rounded to multiples of
            `size_divisor`. A photo too elongated for both limits is stretched.
        size_divisor (`int`, *optional*, defaults to 32): Divisor of the sides under dynamic sizing.
        minimum_size (`int`, *optional*, defaults to 256): Minimum of the shorter side under dynamic sizing.
        maximum_size (`int`, *optional*, defaults to 2304): Maximum of the longer side under dynamic sizing.
        do_rescale (`bool`, *optional*, defaults to `True`): Whether to multiply 8-bit values by `rescale_factor`.
            Floating-point images are in [0, 1] already and are never rescaled.
        rescale_factor (`float`, *optional*, defaults to 1/255): Factor from 8-bit values to [0, 1].
        do_normalize (`bool`, *optional*, defaults to `True`): Whether to subtract the mean and divide by the
            standard deviation.
        image_mean (`list[float]`, *optional*): Mean of each channel. Defaults to ImageNet's.
        image_std (`list[float]`, *optional*): Standard deviation of each channel. Defaults to ImageNet's.
        do_guided_upsampling (`bool`, *optional*, defaults to `False`): Whether to refine mattes by the photo's edges
            where the photo is larger than the network's input (`sharpened_matte`, then `guided_upsampling`). Meant for
            networks with a small input. The official weights are used without it.

    Raises:
        ValueError: A setting is outside its range.

    Example:

    ```python
    >>> processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    >>> photo = processor.fetch_images("photo.jpg")
    >>> inputs = processor(photo, return_tensors="pt")
    >>> matte = processor.post_process_alpha_matte(model(**inputs), [(photo.height, photo.width)])[0]
    ```
    """

    model_input_names: ClassVar[list[str]] = ["pixel_values"]
    valid_kwargs = BiRefNetImageProcessorKwargs
    _auto_class = "AutoImageProcessor"  # makes `save_pretrained` copy the code

    # Gives access to the function where the processor was loaded with `trust_remote_code`: modules of such code cannot
    # be imported by name.
    estimate_foreground = staticmethod(estimate_foreground)

    def __init__(
        self,
        do_resize: bool = True,
        size: dict[str, int] | int | None = None,
        resample: int = Image.Resampling.BILINEAR,
        do_dynamic_resize: bool = False,
        size_divisor: int = 32,
        minimum_size: int = 256,
        maximum_size: int = 2304,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        do_guided_upsampling: bool = False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.do_resize = do_resize
        self.size = get_size_dict(size if size is not None else 1024)
        self.resample = int(resample)
        self.do_dynamic_resize = do_dynamic_resize
        self.size_divisor = size_divisor
        self.minimum_size = minimum_size
        self.maximum_size = maximum_size
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean if image_mean is not None else IMAGENET_DEFAULT_MEAN)
        self.image_std = list(image_std if image_std is not None else IMAGENET_DEFAULT_STD)
        self.do_guided_upsampling = do_guided_upsampling
        self._check_settings()

    def _check_settings(self) -> None:
        if set(self.size) != {"height", "width"} or not all(
            isinstance(side, int) and side > 0 for side in self.size.values()
        ):
            raise ValueError(f'`size` must be {{"height": …, "width": …}} in positive pixels, got {self.size}')
        if self.resample not in list(Image.Resampling):
            allowed = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
            raise ValueError(f"`resample` must be one of {allowed}, got {self.resample}")
        low, high = self._dynamic_bounds()
        if self.size_divisor < 1 or not 0 < low <= high:
            raise ValueError(
                "a multiple of `size_divisor` must lie between `minimum_size` and `maximum_size`, got "
                f"minimum_size={self.minimum_size}, maximum_size={self.maximum_size}, size_divisor={self.size_divisor}"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                "`image_mean` and `image_std` must have three values each, and no deviation may be zero, got "
                f"{self.image_mean} and {self.image_std}"
            )

    def _dynamic_bounds(self) -> tuple[int, int]:
        """Minimum and maximum side under dynamic sizing, as multiples of the divisor."""
        divisor = max(self.size_divisor, 1)
        return -(-self.minimum_size // divisor) * divisor, self.maximum_size // divisor * divisor

    def fetch_images(self, image_url_or_urls: Any) -> Image.Image | list[Image.Image]:
        """Reads one image, or a list of images, as `load_photo` does. Mattes have the sizes of these photos."""
        if isinstance(image_url_or_urls, list | tuple):
            return [load_photo(image) for image in image_url_or_urls]
        return load_photo(image_url_or_urls)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the (height, width) of the network's input for a photo of the given height and width."""
        if not self.do_resize:
            return height, width
        if not self.do_dynamic_resize:
            return self.size["height"], self.size["width"]
        scale = max(1, self.minimum_size / min(height, width))
        scale = min(scale, self.maximum_size / max(height, width))
        low, high = self._dynamic_bounds()
        sides = (round(side * scale / self.size_divisor) * self.size_divisor for side in (height, width))
        return tuple(min(max(side, low), high) for side in sides)

    def _resized_photo(self, image: Image.Image) -> torch.Tensor:
        """Resizes an RGB image to the network's size: uint8 (3, H, W)."""
        height, width = self.network_size(image.height, image.width)
        image = image.resize((width, height), self.resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _resized_tensor(self, image: torch.Tensor) -> torch.Tensor:
        """Resizes float32 (3, h, w) to the network's size (3, H, W) with antialiasing, on the same device."""
        height, width = self.network_size(*image.shape[-2:])
        if image.shape[-2:] == (height, width):
            return image
        mode = _TORCH_INTERPOLATIONS.get(self.resample)
        if mode is None:
            allowed = ", ".join(filter.name.lower() for filter in _TORCH_INTERPOLATIONS)
            raise ValueError(
                f"tensors can be resized with {allowed}, got {Image.Resampling(self.resample).name.lower()}: "
                "convert the tensors to PIL images for other filters"
            )
        return F.interpolate(image[None], size=(height, width), mode=mode, antialias=mode == "bilinear")[0]

    def _pixel_values(self, image: Any, input_data_format: str | None, device: Any) -> torch.Tensor:
        """Converts one image of any kind to normalised float32 (3, H, W)."""
        is_unit_range = False  # values from 0 to 1 instead of 0 to 255
        if isinstance(image, torch.Tensor):
            is_unit_range = image.is_floating_point()
            pixels = _fill_transparent(_tensor_to_pixels(image, input_data_format), 1 if is_unit_range else 255)
            pixels = self._resized_tensor(pixels.to(device))
        else:
            pixels = self._resized_photo(load_photo(image, input_data_format)).to(device)
            pixels = pixels.to(torch.float32).contiguous()
            if isinstance(image, np.ndarray) and image.dtype.kind == "f":
                is_unit_range, pixels = True, pixels / 255
        if self.do_rescale and not is_unit_range:
            pixels = pixels * self.rescale_factor
        if self.do_normalize:
            mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (self.image_mean, self.image_std))
            pixels = (pixels - mean) / std
        return pixels

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        device: str | torch.device | None = None,
        **settings,
    ) -> BatchFeature:
        """
        Prepares one image or a batch.

        Args:
            images: An image of any kind that `load_photo` accepts, a list of images, or a four-dimensional array or
                tensor.
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"` for one batch (B, 3, H, W), which needs inputs of one size. By default a list of
                float32 tensors (3, H, W), from which `group_by_size` makes batches.
            input_data_format (`str`, *optional*): As for `load_photo`.
            device (`str` or `torch.device`, *optional*): The device of the result. By default tensors stay on their
                device and all other images go to the CPU.
            settings: Any of the processor's settings, for this call only.

        Returns:
            `BatchFeature` with `pixel_values`.

        Raises:
            ValueError: There is no image, an image cannot be read or has an impossible shape or impossible values, or
                `return_tensors` asks for one batch of different sizes.
            TypeError: An image or a setting has an unknown kind.
        """
        unknown = sorted(set(settings) - set(self.valid_kwargs.__annotations__))
        if unknown:
            allowed = ", ".join(self.valid_kwargs.__annotations__)
            raise TypeError(f"unknown setting {', '.join(unknown)}: the settings are {allowed}")
        settings = {name: value for name, value in settings.items() if value is not None}
        if settings:
            processor = type(self)(**{**self.to_dict(), **settings})
            return processor.preprocess(images, return_tensors, input_data_format, device)
        pixel_values = [self._pixel_values(image, input_data_format, device) for image in _as_list(images)]
        if return_tensors is not None:
            pixel_values = self._stack(pixel_values)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    @staticmethod
    def _stack(pixel_values: list[torch.Tensor]) -> torch.Tensor:
        sizes = list(dict.fromkeys(f"{image.shape[-2]}x{image.shape[-1]}" for image in pixel_values))
        if len(sizes) > 1:
            raise ValueError(
                f"images of different network sizes cannot be one batch, got {', '.join(sizes)} (height x width): "
                "leave `return_tensors` unset and run each batch of `group_by_size(pixel_values)`, or use a fixed size"
            )
        return torch.stack(pixel_values)

    @staticmethod
    def group_by_size(pixel_values: list[torch.Tensor]) -> list[tuple[list[int], torch.Tensor]]:
        """
        Groups images of different sizes into batches of one size each, without padding.

        Args:
            pixel_values (`list[torch.Tensor]`):
                Images (3, H, W), as the processor returns them without `return_tensors`.

        Returns:
            `list[tuple[list[int], torch.Tensor]]`: For each size, in the order of first appearance, the indices of its
            images in the list and the batch (B, 3, H, W).
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(pixel_values):
            groups.setdefault(tuple(image.shape), []).append(index)
        return [(indices, torch.stack([pixel_values[index] for index in indices])) for indices in groups.values()]

    def post_process_alpha_matte(
        self, outputs: Any, target_sizes: Any = None, photos: Any = None
    ) -> list[torch.Tensor]:
        """
        Converts the network's output to mattes of the photos' sizes.

        As in the published usage, the sigmoid is computed at the network's size, and then the matte is resized
        (bilinear, with antialiasing where it shrinks). So the edges stay as soft as the network predicted them.

        Args:
            outputs (`BiRefNetImageSegmentationOutput` or mapping): Has `logits` of shape (B, 1, H, W).
            target_sizes (`list[tuple[int, int]]` or tensor of shape (B, 2), *optional*):
                (height, width) of each photo. Defaults to the network's size.
            photos (*optional*):
                The photos, of any kind that `load_photo` accepts. `do_guided_upsampling` needs them. Without them,
                mattes are only resized.

        Returns:
            `list[torch.Tensor]`: A float32 matte (height, width) in [0, 1] for each image, on the logits' device.

        Raises:
            ValueError: `logits` has another shape, a target size is not a pair of positive integers, or the number of
                target sizes or photos differs from the number of images.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        if logits.ndim != 4 or logits.shape[1] != 1:
            raise ValueError(f"`logits` must have the shape (batch, 1, height, width), got {tuple(logits.shape)}")
        mattes = logits.float().sigmoid()
        if target_sizes is None:
            return list(mattes[:, 0])
        target_sizes = [tuple(int(side) for side in size) for size in target_sizes]
        if len(target_sizes) != len(mattes):
            raise ValueError(f"got {len(target_sizes)} target sizes for {len(mattes)} images: give one for each")
        if any(len(size) != 2 or min(size) < 1 for size in target_sizes):
            raise ValueError(f"`target_sizes` must be (height, width) in positive pixels, got {target_sizes}")
        if photos is not None and self.do_guided_upsampling:
            photos = _as_list(photos)
            if len(photos) != len(mattes):
                raise ValueError(f"got {len(photos)} photos for {len(mattes)} images: give one for each")
            mattes = [self._guided(*pair) for pair in zip(mattes, photos, strict=True)]
        return [_resized_matte(matte, size) for matte, size in zip(mattes, target_sizes, strict=True)]

    def _guided(self, matte: torch.Tensor, photo: Any) -> torch.Tensor:
        """Refines a matte (1, h, w) to the photo's size and edges. Returns it unchanged if the photo is not larger."""
        photo = load_photo(photo)
        height, width = matte.shape[-2:]
        if photo.height * photo.width <= height * width:
            return matte
        small = photo.resize((width, height), self.resample)
        small, photo = (to_planes(picture).to(matte.device) for picture in (small, photo))
        return guided_upsampling(sharpened_matte(matte[0], small), small, photo)[None]

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, threshold: float = 0.5
    ) -> list[torch.Tensor]:
        """
        Converts the network's output to maps of class indices: 1 (foreground) where the matte is above the threshold,
        0 elsewhere.

        Args:
            outputs, target_sizes: As for `post_process_alpha_matte`.
            threshold (`float`, *optional*, defaults to 0.5): From 0 to 1.

        Returns:
            `list[torch.Tensor]`: An int64 map (height, width) for each image.

        Raises:
            ValueError: As for `post_process_alpha_matte`, or the threshold is outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be between 0 and 1, got {threshold}")
        return [(matte > threshold).long() for matte in self.post_process_alpha_matte(outputs, target_sizes)]


__all__ = ["BiRefNetImageProcessor", "load_photo", "read_photo"]
