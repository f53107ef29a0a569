"""
int8 on CPUs: a network's matrix products and convolutions on 8-bit integers, by oneDNN, which comes with PyTorch.

Weights are rounded once, each output channel by its own largest magnitude. What they are multiplied with is rounded on
the way, by the range of the very tensor at hand, so nothing has to be calibrated. All else (norms, softmax, sampling,
resizing, the last convolution) stays in floating point.
"""

import functools
import math
from types import MethodType

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary


# Rounding a number costs as much as a hundred multiplications by it, and the steps of an operation in int8 cost
# a tenth of a millisecond whatever its size. With fewer than these there is nothing to be gained.
FEWEST_USES = 128
FEWEST_MULTIPLICATIONS = 2**24

PIECE = 2**17  # numbers that are rounded at a time

DTYPES = (torch.bfloat16, torch.float32)
Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize(model):
    """
    Makes a model compute in int8 from now on. Its parameters and the dtype of its results stay as they are.

    Operations that would gain nothing (small ones, grouped convolutions) stay in floating point as well, so a network
    of those alone gets no faster. The photos of a batch share the levels that they are rounded to: only one by one is
    each computed alike whatever stands beside it.

    Args:
        model (`BiRefNetForImageSegmentation`): In evaluation mode, on a CPU; its dtype, bfloat16 or float32, is that
            between the products, see [`dtype_between`].

    Returns:
        `BiRefNetForImageSegmentation`: the same model, for inference only: no gradient passes through it.

    Raises:
        ValueError: if the model is in training, elsewhere or of another dtype, or this processor cannot do it; from
            the model's calls also, if it has become so.
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
    if reason := obstacle(model.device):
        raise ValueError(reason)
    if model.dtype not in DTYPES:
        raise ValueError(f"int8 needs a model in bfloat16 or float32, not in {model.dtype}.")
    if model.training:
        raise ValueError("A model in int8 cannot be trained: load it anew for that, or call its `eval()`.")


def obstacle(device: torch.device) -> str | None:
    """Why there is no int8 on this device, and what to take instead; `None` where there is."""
    if device.type != "cpu":
        return f"int8 is for CPUs; on {device} take float16 or bfloat16."
    # Without these instructions oneDNN would add pairs of products in 16 bits, which they can exceed.
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_vnni_supported():
        return (
            "int8 needs AVX-512 VNNI instructions (Intel Xeon from 2019 on, AMD from 2022 on), which this processor "
            "lacks; take float32 or bfloat16."
        )
    return None


def dtype_between() -> torch.dtype:
    """The faster dtype for what stays in floating point: bfloat16 if the processor has instructions for it."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class Int8Arithmetic(TorchFunctionMode):
    """
    Within this context PyTorch multiplies by weights in int8 where that is faster.

    Its methods have the arguments of the functions that they stand for, and return `None` where nothing is gained.
    """

    def __init__(self):
        super().__init__()
        # By weight. Parameters stay; what a forward pass derives from them is forgotten together with it.
        self.packed = WeakIdKeyDictionary()
        self.in_int8 = {F.linear: self.linear, F.conv2d: self.conv2d}

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        in_int8 = self.in_int8.get(function)
        result = None if in_int8 is None else in_int8(*arguments, **options)
        return function(*arguments, **options) if result is None else result

    def linear(self, input, weight, bias=None):  # (..., C) by (out, C) → (..., out)
        rounded = round_activations(input) if gains(input, len(weight)) else None
        if rounded is None:
            return None
        levels, scale, zero_point = rounded
        packed = self.once(weight, pack_matrix)
        product = torch.ops.onednn.qlinear_pointwise(
            levels.view(-1, input.shape[-1]), scale, zero_point, *packed, in_float32(bias), *results_in(input.dtype)
        )
        return product.view(*input.shape[:-1], -1)

    def conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        """(B, C, H, W) → (B, out, H', W') in channels-last memory."""
        if input.ndim != 4 or groups != 1 or isinstance(padding, str):
            return None
        stride, padding, dilation = ([x] * 2 if isinstance(x, int) else list(x) for x in (stride, padding, dilation))
        pixels = input.permute(0, 2, 3, 1)
        uses = weight[:, 0].numel() // math.prod(stride)
        rounded = round_activations(pixels) if gains(input, uses) else None
        if rounded is None:
            return None
        levels, scale, zero_point = rounded
        place = (stride, padding, dilation, groups)
        packed = self.once(weight, lambda kernel: pack_kernel(kernel, place))
        return torch.ops.onednn.qconv2d_pointwise(
            levels.permute(0, 3, 1, 2), scale, zero_point, *packed, in_float32(bias), *place, *results_in(input.dtype)
        )

    def once(self, weight: torch.Tensor, pack) -> Packed:
        """`pack(weight)`, made anew only when the weight has changed."""
        version = None if weight.is_inference() else weight._version
        found = self.packed.get(weight)
        if found is None or found[0] != version:
            found = self.packed[weight] = version, pack(weight)
        return found[1]


def gains(values: torch.Tensor, uses: int) -> bool:
    """Whether int8 is faster, `uses` being the multiplications that each of the values takes part in."""
    return values.dtype in DTYPES and uses >= FEWEST_USES and uses * values.numel() >= FEWEST_MULTIPLICATIONS


def round_activations(values: torch.Tensor) -> tuple[torch.Tensor, float, int] | None:
    """
    Levels (uint8, of the values' shape), scale and zero point, so that values ≈ scale · (levels − zero point).

    `None` for values that are all zero or not all finite: these are computed in floating point, as they are.
    """
    lowest, highest = (float(bound) for bound in values.aminmax())
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)  # zero has to be a level: convolutions are padded with it
    # One level is left over for rounding the zero point up, so that no value comes to lie beyond the last one. It is
    # not 0, for which oneDNN has no fast convolution of small maps: they took fifty times as long.
    scale = (highest - lowest) / 254
    if not torch.finfo(torch.float32).tiny < scale < math.inf:
        return None
    zero_point = max(1, math.ceil(-lowest / scale))
    levels, shift = torch.empty(values.shape, dtype=torch.uint8), torch.tensor(zero_point + 0.5)
    # In pieces that stay in the cache: several times as fast, since larger ones are fetched anew from the system.
    shape = (-1, values.shape[-1])
    pieces = (rows.split(max(1, PIECE // shape[1])) for rows in (values.reshape(shape), levels.view(shape)))
    for piece, its_levels in zip(*pieces, strict=True):
        # To uint8 by way of int16, which is four times faster than at once. Both cut off what the half has rounded.
        its_levels.copy_(torch.add(shift, piece.float(), alpha=1 / scale).to(torch.int16))
    return levels, scale, zero_point


def round_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (int8, of the weight's shape), and of each output channel the scale (float32) and zero point (0)."""
    rows = weight.flatten(1).contiguous().float()  # in memory's usual order, which oneDNN takes for granted
    scales = rows.abs().amax(dim=1).clamp(min=1e-30) / 127
    levels = (rows / scales.unsqueeze(1)).round().to(torch.int8).view(weight.shape)
    return levels, scales, torch.zeros(len(scales), dtype=torch.int32)


def pack_matrix(weight: torch.Tensor) -> Packed:  # (out, C)
    levels, scales, zeros = round_weight(weight)
    return torch.ops.onednn.qlinear_prepack(levels, None), scales, zeros


def pack_kernel(weight: torch.Tensor, place: tuple) -> Packed:  # (out, C, k, k)
    levels, scales, zeros = round_weight(weight)
    return torch.ops.onednn.qconv_prepack(levels, scales, 1.0, 0, *place), scales, zeros


def in_float32(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float()


def results_in(dtype: torch.dtype) -> tuple:
    """oneDNN's last arguments: results in this dtype, not rounded (scale 1, zero point 0), nothing done to them."""
    return 1.0, 0, dtype, "none", [], ""
