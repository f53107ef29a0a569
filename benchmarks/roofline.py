"""Arithmetic operations of a network, and the highest rate of arithmetic that this machine reaches."""

import torch
import torch.nn.functional as F
from plain_formulation import plain_logits
from torch.utils.flop_counter import FlopCounterMode

from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation


def count_flop(config, batch_size: int, side: int) -> int:
    """
    Number of floating-point operations of the plain formulation. A multiply-add counts as two operations.

    Counts matrix products, convolutions, attention and deformable convolutions on the meta device, without computing
    them.
    """
    with torch.device("meta"):
        model = BiRefNetForImageSegmentation(config).eval()
        pixel_values = torch.empty(batch_size, 3, side, side)
    with FlopCounterMode(display=False, custom_mapping=deformable_convolution_formula()) as counter, torch.no_grad():
        plain_logits(model, pixel_values)
    return counter.get_total_flops()


def deformable_convolution_formula() -> dict:
    """Formula for torchvision's operator, which PyTorch's counter does not know. Sampling is not counted."""
    try:
        import torchvision  # noqa: F401  (registers the operator)
    except ImportError:
        return {}  # without torchvision, the plain formulation uses a matrix product, which is counted

    def flop(input_shape, weight_shape, *arguments, out_shape=None, **options):
        return 2 * out_shape.numel() * torch.Size(weight_shape[1:]).numel()

    return {torch.ops.torchvision.deform_conv2d: flop}


class MatrixProduct:
    """A square matrix product that is large enough for the machine's full rate and small enough for many timings."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        side = 8192 if device.type == "cuda" else 2048
        self.left, self.right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        self.flop = 2 * side**3

    def __call__(self) -> torch.Tensor:
        return F.linear(self.left, self.right)
