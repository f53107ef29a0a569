"""Photos to network input, and the network's output back to mattes at the photos' size."""

import io
import os
import urllib.request
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.nn import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ChannelDimension

from .matting_birefnet import estimate_foreground, guided_upsampling, sharpened_matte, to_planes


# torch's name of each PIL filter that it has an equal of.
_TORCH_INTERPOLATIONS = {
    Image.Resampling.NEAREST: "nearest-exact",
    Image.Resampling.BILINEAR: "bilinear",
}
_CHANNEL_COUNTS = (1, 2, 3, 4)  # gray, gray + alpha, RGB, RGB + alpha
_MAX_DOWNLOAD_BYTES = 512 * 2**20


def _open_image(source: Any, timeout: float | None) -> Image.Image:
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        # Some sites refuse Python's default agent.
        request = urllib.request.Request(source, headers={"User-Agent": "birefnet"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            source = response.read(_MAX_DOWNLOAD_BYTES + 1)
        if len(source) > _MAX_DOWNLOAD_BYTES:
            raise ValueError(f"the download is larger than {_MAX_DOWNLOAD_BYTES // 2**20} MiB")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _image_to_rgb(image: Image.Image) -> Image.Image:
    """
    Upright 8-bit RGB of a PIL image of any mode; transparency is dropped, not composited. What is so already is not
    copied: a photo passes here once for each thing that is done with it.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit gray, which PIL would cut off at 255; "I" is how some such files open
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values must be 16-bit, 0 to 65535, got {values.min()} to {values.max()}")
        return _array_to_image(values.astype(np.uint16))
    if image.mode == "F":
        return _array_to_image(np.asarray(image))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as directly, without PIL's warning
    in_memory = type(image) is Image.Image  # a file's own picture is gone when the file is closed
    return image if image.mode == "RGB" and in_memory else image.convert("RGB")


def _check_values(image: np.ndarray | torch.Tensor) -> None:
    """Refuse values whose meaning would have to be guessed."""
    dtype = str(image.dtype)
    if dtype.endswith(("bool", "uint8", "uint16")):
        return  # the whole range is allowed
    low, high = float(image.min()), float(image.max())
    if "float" in dtype and not (low >= -1e-3 and high <= 1 + 1e-3):  # also refuses NaN
        raise ValueError(f"floating-point images must have values in [0, 1], got {low:g} to {high:g} ({dtype})")
    if "int" in dtype and not (low >= 0 and high <= 255):
        raise ValueError(
            f"integer images must have values from 0 to 255 (0 to 65535 as uint16), got {low:g} to {high:g} ({dtype})"
        )


def _channel_axis(shape: tuple[int, ...], input_data_format: str | None, preferred: int) -> int:
    """Which axis of a three-dimensional image holds the channels: 0 or -1."""
    if input_data_format is not None:
        axes = [0 if ChannelDimension(input_data_format) == ChannelDimension.FIRST else -1]
    else:
        axes = [preferred, -1 - preferred]
    for axis in axes:
        if shape[axis] in _CHANNEL_COUNTS:
            return axis
    raise ValueError(
        f"an image must have 1, 2, 3 or 4 channels, first or last, got shape {tuple(shape)}"
        + (f" with input_data_format={str(input_data_format)!r}" if input_data_format is not None else "")
    )


def _check_dimensions(shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3):
        raise ValueError(
            f"an image must have 2 dimensions (height, width) or 3 (with channels), got shape {tuple(shape)}"
        )
    if 0 in shape:
        raise ValueError(f"an image must not be empty, got shape {tuple(shape)}")


def _array_to_image(array: np.ndarray, input_data_format: str | None = None) -> Image.Image:
    """8-bit RGB of (H, W), (H, W, C) or (C, H, W): bool, integer 0 to 255, uint16 0 to 65535, or floating 0 to 1."""
    _check_dimensions(array.shape)
    if array.dtype.kind not in "buif":
        raise TypeError(f"an image array must hold booleans, integers or floating-point numbers, got {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    _check_values(array)
    if array.ndim == 3:
        array = np.moveaxis(array, _channel_axis(array.shape, input_data_format, preferred=-1), -1)
        array = array[..., :3] if array.shape[-1] > 2 else array[..., 0]
    if array.dtype.kind == "f":
        array = (array.clip(0, 1) * 255).round()
    elif array.dtype == np.uint16:
        array = (array / 257).round()
    elif array.dtype == bool:
        array = array * 255
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8)).convert("RGB")


def _tensor_to_pixels(image: torch.Tensor, input_data_format: str | None = None) -> torch.Tensor:
    """(H, W), (C, H, W) or (H, W, C) to float32 (3, H, W) on the same device: 0 to 1 if floating, else 0 to 255."""
    _check_dimensions(image.shape)
    if image.is_complex():
        raise TypeError(f"an image tensor must hold booleans, integers or floating-point numbers, got {image.dtype}")
    _check_values(image)
    dtype, image = image.dtype, image.to(torch.float32)
    if image.ndim == 2:
        image = image.unsqueeze(0)
    else:
        image = image.movedim(_channel_axis(image.shape, input_data_format, preferred=0), 0)
    if dtype == torch.bool:
        image = image * 255
    elif dtype == torch.uint16:
        image = image / 257
    return image[:3] if image.shape[0] > 2 else image[:1].expand(3, -1, -1)


def load_photo(image: Any, input_data_format: str | None = None, timeout: float | None = None) -> Image.Image:
    """
    Read a photo as the network sees it: upright, 8-bit RGB. Mattes have the size of this image.

    The EXIF orientation is applied. Transparency is dropped and the colours below it are kept, as `convert("RGB")`
    does (the preprocessing of the official weights). 16-bit gray is scaled to 8 bits. Of an animation the first frame
    is taken.

    Args:
        image (`str`, `os.PathLike`, `bytes`, binary file, `PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
            A path, a URL (`http://`, `https://` or `data:`), an encoded file, or an image. Arrays and tensors are
            (H, W), (H, W, C) or (C, H, W) of booleans, integers from 0 to 255, `uint16`, or floating-point numbers
            from 0 to 1.
        input_data_format (`str`, *optional*):
            "channels_first" or "channels_last", for arrays and tensors whose shape allows both (otherwise arrays are
            taken as channels last, tensors as channels first).
        timeout (`float`, *optional*): Seconds to wait for a URL's server; by default as long as it takes.

    Raises:
        FileNotFoundError, PermissionError, IsADirectoryError: There is no such file, or it may not be read.
        ValueError: No image, a damaged one, one of more than twice `PIL.Image.MAX_IMAGE_PIXELS` pixels (it would
            exhaust the memory), a failed download, or an array whose shape or values are no image's.
        TypeError: `image` is of another type.
    """
    if isinstance(image, torch.Tensor):
        pixels = _tensor_to_pixels(image, input_data_format)
        image = (pixels * 255 if image.is_floating_point() else pixels).round().clamp(0, 255)
        return Image.fromarray(image.permute(1, 2, 0).to("cpu", torch.uint8).numpy())
    if isinstance(image, np.ndarray):
        return _array_to_image(image, input_data_format)
    if not isinstance(image, str | os.PathLike | bytes | Image.Image) and not hasattr(image, "read"):
        raise TypeError(
            "an image must be a path, a URL, an encoded file, a PIL image, a NumPy array or a torch tensor, "
            f"got {type(image).__name__}"
        )
    name = str(image)[:200] if isinstance(image, str | os.PathLike) else "the image"
    try:
        if isinstance(image, Image.Image):
            return _image_to_rgb(image)
        with _open_image(image, timeout) as opened:
            return _image_to_rgb(opened)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"cannot read {name}: it has too many pixels. {error}") from error
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"cannot read {name}: it is no image, or of a format that Pillow does not know") from error
    except Exception as error:  # decoders raise almost anything on damaged data
        raise ValueError(f"cannot read {name}: {error or type(error).__name__}") from error


def _resized_matte(matte: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(1, h, w) to (height, width) = `size`."""
    if matte.shape[-2:] == size:
        return matte[0]
    return F.interpolate(matte[None], size=size, mode="bilinear", antialias=True)[0, 0].clamp_(0, 1)


def _as_list(images: Any) -> list:
    """One image, a list of them, or a four-dimensional batch as a list of images."""
    if isinstance(images, np.ndarray | torch.Tensor):
        images = list(images) if images.ndim == 4 else [images]
    elif not isinstance(images, list | tuple):
        images = [images]
    if len(images) == 0:
        raise ValueError("at least one image is needed, got an empty list")
    return list(images)


class BiRefNetImageProcessorKwargs(TypedDict, total=False):
    """The processor's settings; `BiRefNetImageProcessor` describes them."""

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
    Prepares photos for BiRefNet and turns its output into mattes. One class, which needs no torchvision.

    Photos, arrays, paths and URLs are resized with PIL (antialiased) and then normalised, as the official weights were
    trained; tensors are resized with torch on their own device, within 2/255 of that.

    Args:
        do_resize (`bool`, *optional*, defaults to `True`): Whether to resize the photos.
        size (`dict[str, int]`, *optional*, defaults to `{"height": 1024, "width": 1024}`):
            Size of the network's input, whatever the photo's aspect. The network needs multiples of 32.
        resample (`int` or `PIL.Image.Resampling`, *optional*, defaults to `BILINEAR`):
            Filter. For tensors nearest or bilinear.
        do_dynamic_resize (`bool`, *optional*, defaults to `False`):
            Instead of `size`, use each photo's own size: scaled, with its aspect kept, so that its sides lie within
            `minimum_size` and `maximum_size`, then rounded to multiples of `size_divisor`. A photo too elongated for
            both bounds is stretched to meet them.
        size_divisor (`int`, *optional*, defaults to 32): Sides under dynamic sizing are multiples of this.
        minimum_size (`int`, *optional*, defaults to 256): Shortest side under dynamic sizing.
        maximum_size (`int`, *optional*, defaults to 2304): Longest side under dynamic sizing.
        do_rescale (`bool`, *optional*, defaults to `True`): Whether to multiply 8-bit values by `rescale_factor`.
            Floating-point images already lie in [0, 1] and are never rescaled.
        rescale_factor (`float`, *optional*, defaults to 1/255): Factor from 8-bit values to [0, 1].
        do_normalize (`bool`, *optional*, defaults to `True`): Whether to subtract the mean and divide by the
            standard deviation.
        image_mean (`list[float]`, *optional*): Mean of each channel; ImageNet's if not given.
        image_std (`list[float]`, *optional*): Standard deviation of each channel; ImageNet's if not given.
        do_guided_upsampling (`bool`, *optional*, defaults to `False`): Whether mattes follow the photo's edges where
            it is larger than the network's input (`sharpened_matte`, then `guided_upsampling`), for networks with a
            small one. The official result is without.

    Raises:
        ValueError: A setting is impossible.

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
    _auto_class = "AutoImageProcessor"  # `save_pretrained` carries the code along

    # Reachable from a processor loaded with `trust_remote_code`, whose modules cannot be imported by name.
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
                "`minimum_size` and `maximum_size` must enclose a multiple of `size_divisor`, got "
                f"minimum_size={self.minimum_size}, maximum_size={self.maximum_size}, size_divisor={self.size_divisor}"
            )
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or 0 in self.image_std:
            raise ValueError(
                "`image_mean` and `image_std` must have three values each, the deviations not zero, got "
                f"{self.image_mean} and {self.image_std}"
            )

    def _dynamic_bounds(self) -> tuple[int, int]:
        """Shortest and longest side under dynamic sizing, as multiples of the divisor."""
        divisor = max(self.size_divisor, 1)
        return -(-self.minimum_size // divisor) * divisor, self.maximum_size // divisor * divisor

    def fetch_images(self, image_url_or_urls: Any) -> Image.Image | list[Image.Image]:
        """Read one image or a list: the upright RGB photos whose size the mattes have. See `load_photo`."""
        if isinstance(image_url_or_urls, list | tuple):
            return [load_photo(image) for image in image_url_or_urls]
        return load_photo(image_url_or_urls)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the network's input for a photo of the given height and width."""
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
        """RGB image to uint8 (3, H, W) at the network's size."""
        height, width = self.network_size(image.height, image.width)
        image = image.resize((width, height), self.resample)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def _resized_tensor(self, image: torch.Tensor) -> torch.Tensor:
        """float32 (3, h, w) to (3, H, W) at the network's size, with antialiasing, on the same device."""
        height, width = self.network_size(*image.shape[-2:])
        if image.shape[-2:] == (height, width):
            return image
        mode = _TORCH_INTERPOLATIONS.get(self.resample)
        if mode is None:
            allowed = ", ".join(filter.name.lower() for filter in _TORCH_INTERPOLATIONS)
            raise ValueError(
                f"tensors can be resized with {allowed}, got {Image.Resampling(self.resample).name.lower()}; "
                "convert them to PIL images for other filters"
            )
        return F.interpolate(image[None], size=(height, width), mode=mode, antialias=mode == "bilinear")[0]

    def _pixel_values(self, image: Any, input_data_format: str | None, device: Any) -> torch.Tensor:
        """One image of any kind to normalised float32 (3, H, W)."""
        is_unit_range = False  # else 0 to 255
        if isinstance(image, torch.Tensor):
            is_unit_range = image.is_floating_point()
            pixels = self._resized_tensor(_tensor_to_pixels(image, input_data_format).to(device))
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
        Prepare one image or a batch.

        Args:
            images: Whatever `load_photo` takes, a list of such, or a four-dimensional array or tensor.
            return_tensors (`str`, *optional*):
                `"pt"` or `"np"` for one batch (B, 3, H, W), which needs inputs of one size; by default a list of
                float32 tensors (3, H, W), which `group_by_size` makes batches of.
            input_data_format (`str`, *optional*): As for `load_photo`.
            device (`str` or `torch.device`, *optional*): Where the result is wanted; by default tensors stay on their
                device and all else is on the CPU.
            settings: Any of the processor's settings, for this call.

        Returns:
            `BatchFeature` with `pixel_values`.

        Raises:
            ValueError: No image, an image that cannot be read or whose shape or values are no image's, or one batch
                was asked for but dynamic sizing gives different sizes.
            TypeError: An image or a setting of an unknown kind.
        """
        unknown = sorted(set(settings) - set(self.valid_kwargs.__annotations__))
        if unknown:
            allowed = ", ".join(self.valid_kwargs.__annotations__)
            raise TypeError(f"unknown setting {', '.join(unknown)}; the settings are {allowed}")
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
        Batches out of images of different sizes, so that each image's result equals that of the image alone.

        Args:
            pixel_values (`list[torch.Tensor]`):
                Images (3, H, W), as the processor returns them without `return_tensors`.

        Returns:
            `list[tuple[list[int], torch.Tensor]]`: For each size, in the order of first appearance, the positions of
            its images in the list and the batch (B, 3, H, W).
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(pixel_values):
            groups.setdefault(tuple(image.shape), []).append(index)
        return [(indices, torch.stack([pixel_values[index] for index in indices])) for indices in groups.values()]

    def post_process_alpha_matte(
        self, outputs: Any, target_sizes: Any = None, photos: Any = None
    ) -> list[torch.Tensor]:
        """
        The network's output as mattes at the photos' size.

        As in the published usage the sigmoid is taken at the network's size and the matte is resized (bilinear,
        antialiased where it shrinks), so that edges stay as soft as the network drew them.

        Args:
            outputs (`BiRefNetImageSegmentationOutput` or mapping): Has `logits` of shape (B, 1, H, W).
            target_sizes (`list[tuple[int, int]]` or tensor of shape (B, 2), *optional*):
                (height, width) of each photo; the network's size if not given.
            photos (*optional*):
                The photos, of the kinds that `load_photo` takes, which `do_guided_upsampling` needs. Without them
                mattes are resized alone.

        Returns:
            `list[torch.Tensor]`: A float32 matte (height, width) in [0, 1] for each image, on the logits' device.

        Raises:
            ValueError: The logits' shape is another, or there is not one pair of positive target sizes, or one photo,
                per image.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        if logits.ndim != 4 or logits.shape[1] != 1:
            raise ValueError(f"`logits` must have the shape (batch, 1, height, width), got {tuple(logits.shape)}")
        mattes = logits.float().sigmoid()
        if target_sizes is None:
            return list(mattes[:, 0])
        target_sizes = [tuple(int(side) for side in size) for size in target_sizes]
        if len(target_sizes) != len(mattes):
            raise ValueError(f"got {len(target_sizes)} target sizes for {len(mattes)} images: one is needed for each")
        if any(len(size) != 2 or min(size) < 1 for size in target_sizes):
            raise ValueError(f"`target_sizes` must be (height, width) in positive pixels, got {target_sizes}")
        if photos is not None and self.do_guided_upsampling:
            photos = _as_list(photos)
            if len(photos) != len(mattes):
                raise ValueError(f"got {len(photos)} photos for {len(mattes)} images: one is needed for each")
            mattes = [self._guided(*pair) for pair in zip(mattes, photos, strict=True)]
        return [_resized_matte(matte, size) for matte, size in zip(mattes, target_sizes, strict=True)]

    def _guided(self, matte: torch.Tensor, photo: Any) -> torch.Tensor:
        """The matte (1, h, w) at the photo's size and with its edges, if the photo is larger than the matte."""
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
        The network's output as maps of class indices: 1 (foreground) where the matte is above the threshold, else 0.

        Args:
            outputs, target_sizes: As for `post_process_alpha_matte`.
            threshold (`float`, *optional*, defaults to 0.5): From 0 to 1.

        Returns:
            `list[torch.Tensor]`: An int64 map (height, width) for each image.

        Raises:
            ValueError: As `post_process_alpha_matte`, or the threshold lies outside [0, 1].
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be between 0 and 1, got {threshold}")
        return [(matte > threshold).long() for matte in self.post_process_alpha_matte(outputs, target_sizes)]


__all__ = ["BiRefNetImageProcessor", "load_photo"]
