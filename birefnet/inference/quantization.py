"""
int8 inference on CPUs: matrix products and convolutions on 8-bit integers, by the oneDNN operators of PyTorch.

Weights are quantized once, symmetrically and per output channel. Activations are quantized dynamically, by the range
of each tensor, so no calibration is needed. Everything else (norms, softmax, sampling, resizing, the last convolution)
stays in floating point.
"""

import functools
import math
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


# Quantizing a number costs as much as a hundred multiplications by it, and one int8 operation costs a tenth of a
# millisecond at any size. An operation below these limits is faster in floating point.
MINIMUM_USES = 128
MINIMUM_MULTIPLICATIONS = 2**24

BLOCK_SIZE = 2**17  # numbers to quantize at a time

FLOATING_DTYPES = (torch.bfloat16, torch.float32)
Prepacked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # weight, scales, zero points


def quantize(model):
    """
    Make a model compute in int8. Its parameters and the dtype of its outputs do not change.

    Operations that are faster in floating point (small ones, grouped convolutions) stay there, so a network of such
    operations does not get faster. The images of a batch share one quantization range. An image on its own is
    therefore computed differently than in a batch.

    Args:
        model (`BiRefNetForImageSegmentation`): Model in evaluation mode on a CPU. Its dtype, bfloat16 or float32, is
            that of the remaining operations. bfloat16 is faster on processors with arithmetic for it.

    Returns:
        `BiRefNetForImageSegmentation`: The same model, for inference only. Gradients are disabled.

    Raises:
        ValueError: The model is in training mode, on another device or in another dtype, or the processor has no int8
            arithmetic. Calls of the model raise it too, since the model may change later.
    """
    check(model)
    forward, arithmetic = type(model).forward, Int8Arithmetic()

    @functools.wraps(forward)
    def forward_in_int8(self, *arguments, **options):
        check(self)
        with torch.no_grad(), arithmetic:
            return forward(self, *arguments, **options)

    model.forward = MethodType(forward_in_int8, model)
    return model


def check(model):
    """Raise a `ValueError` if the model cannot compute in int8."""
    if reason := obstacle(model.device):
        raise ValueError(reason)
    if model.dtype not in FLOATING_DTYPES:
        raise ValueError(f"int8 needs a model in bfloat16 or float32, not in {model.dtype}.")
    if model.training:
        raise ValueError("A model in int8 cannot be trained: load the model again for training, or call its `eval()`.")


def obstacle(device: torch.device) -> str | None:
    """The reason why this device has no int8 arithmetic, with an alternative. `None` if it has."""
    if device.type != "cpu":
        return f"int8 is for CPUs; on {device} use float16 or bfloat16."
    # Without VNNI, oneDNN adds pairs of products in 16 bits, which can overflow.
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        return (
            "int8 needs AVX-512 VNNI instructions (Intel Xeon since 2019, AMD since 2022), and this processor lacks "
            "them; use float32 or bfloat16."
        )
    return None


class Int8Arithmetic(TorchFunctionMode):
    """
    Context in which `F.linear` and `F.conv2d` compute in int8 where that is faster.

    The methods `linear` and `conv2d` take the arguments of these functions. They return `None` where floating point is
    faster, and the original function is called.
    """

    def __init__(self):
        super().__init__()
        # By weight. An entry of a weight that a forward pass derives from parameters disappears with that weight.
        self.prepacked = WeakIdKeyDictionary()
        self.replacements = {F.linear: self.linear, F.conv2d: self.conv2d}

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        replacement = self.replacements.get(function)
        result = None if replacement is None else replacement(*arguments, **options)
        return function(*arguments, **options) if result is None else result

    def linear(self, input, weight, bias=None):  # (..., C) by (out, C) → (..., out)
        quantized = quantize_activations(input) if is_faster(input, len(weight)) else None
        if quantized is None:
            return None
        values, scale, zero_point = quantized
        prepacked = self.prepack(weight, prepack_matrix)
        product = torch.ops.onednn.qlinear_pointwise(
            values.view(-1, input.shape[-1]), scale, zero_point, *prepacked, to_float32(bias), *output_in(input.dtype)
        )
        return product.view(*input.shape[:-1], -1)

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """(B, C, H, W) → (B, out, H', W') in channels-last memory."""
        if input.ndim != 4 or groups != 1 or isinstance(padding, str):
            return None
        stride, padding, dilation = ([x] * 2 if isinstance(x, int) else list(x) for x in (stride, padding, dilation))
        pixels = input.permute(0, 2, 3, 1)
        uses = weight[:, 0].numel() // math.prod(stride)
        quantized = quantize_activations(pixels) if is_faster(input, uses) else None
        if quantized is None:
            return None
        values, scale, zero_point = quantized
        geometry = (stride, padding, dilation, groups)
        prepacked = self.prepack(weight, lambda kernel: prepack_kernel(kernel, geometry))
        return torch.ops.onednn.qconv2d_pointwise(
            values.permute(0, 3, 1, 2),
            scale,
            zero_point,
            *prepacked,
            to_float32(bias),
            *geometry,
            *output_in(input.dtype),
        )

    def prepack(self, weight: torch.Tensor, function: Callable[[torch.Tensor], Prepacked]) -> Prepacked:
        """`function(weight)`, computed again only after the weight has changed."""
        version = None if weight.is_inference() else weight._version
        found = self.prepacked.get(weight)
        if found is None or found[0] != version:
            found = self.prepacked[weight] = version, function(weight)
        return found[1]


def is_faster(values: torch.Tensor, uses: int) -> bool:
    """Whether int8 is faster than floating point, where each value is multiplied `uses` times."""
    return (
        values.dtype in FLOATING_DTYPES and uses >= MINIMUM_USES and uses * values.numel() >= MINIMUM_MULTIPLICATIONS
    )


def quantize_activations(values: torch.Tensor) -> tuple[torch.Tensor, float, int] | None:
    """
    Quantize by the values' own range, so that values ≈ scale · (quantized − zero point).

    Returns:
        Quantized values (uint8, of the same shape), scale and zero point. `None` for values that are all zero or not
        all finite, which stay in floating point.
    """
    lowest, highest = (float(bound) for bound in values.aminmax())
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)  # the range includes zero, the padding of convolutions
    # One of the 256 values is reserved for rounding the zero point up, so that no value exceeds the range. The zero
    # point is at least 1, because oneDNN's convolution of small maps takes 50 times as long with zero point 0.
    scale = (highest - lowest) / 254
    if not torch.finfo(torch.float32).tiny < scale < math.inf:
        return None
    zero_point = max(1, math.ceil(-lowest / scale))
    quantized, shift = torch.empty(values.shape, dtype=torch.uint8), torch.tensor(zero_point + 0.5)
    # Blocks that stay in the cache are several times as fast: the system provides larger memory anew for every use.
    shape = (-1, values.shape[-1])
    blocks = (rows.split(max(1, BLOCK_SIZE // shape[1])) for rows in (values.reshape(shape), quantized.view(shape)))
    for block, output in zip(*blocks, strict=True):
        # Adding a half and truncating rounds to the nearest integer. Conversion to uint8 via int16 is 4 times as fast.
        output.copy_(torch.add(shift, block.float(), alpha=1 / scale).to(torch.int16))
    return quantized, scale, zero_point


def quantize_weight(weight: torch.Tensor) -> Prepacked:
    """Quantized weight (int8, of the same shape), and per output channel the scale (float32) and zero point (0)."""
    rows = weight.flatten(1).contiguous().float()  # oneDNN expects contiguous memory
    scales = rows.abs().amax(dim=1).clamp(min=1e-30) / 127
    quantized = (rows / scales.unsqueeze(1)).round().to(torch.int8).view(weight.shape)
    return quantized, scales, torch.zeros(len(scales), dtype=torch.int32)


def prepack_matrix(weight: torch.Tensor) -> Prepacked:  # (out, C)
    quantized, scales, zero_points = quantize_weight(weight)
    return torch.ops.onednn.qlinear_prepack(quantized, None), scales, zero_points


def prepack_kernel(weight: torch.Tensor, geometry: tuple) -> Prepacked:  # (out, C, k, k)
    quantized, scales, zero_points = quantize_weight(weight)
    return torch.ops.onednn.qconv_prepack(quantized, scales, 1.0, 0, *geometry), scales, zero_points


def to_float32(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def output_in(dtype: torch.dtype) -> tuple:
    """The last arguments of oneDNN's operators: output in this dtype, not quantized, no pointwise operation."""
    return 1.0, 0, dtype, "none", [], ""
