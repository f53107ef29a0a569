"""What a network costs in arithmetic, and how fast this machine can do arithmetic at best."""

import torch
import torch.nn.functional as F
from plain_formulation import plain_logits
from torch.utils.flop_counter import FlopCounterMode

from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation


def count_flop(config, batch_size: int, side: int) -> int:
    """
    Floating-point operations of the plain formulation, a multiply-add counted twice: matrix products, convolutions,
    attention and deformable convolutions. Counted on the meta device: nothing is computed.
    """
    with torch.device("meta"):
        model = BiRefNetForImageSegmentation(config).eval()
        pixel_values = torch.empty(batch_size, 3, side, side)
    with FlopCounterMode(display=False, custom_mapping=deformable_convolution_formula()) as counter, torch.no_grad():
        plain_logits(model, pixel_values)
    return counter.get_total_flops()


def deformable_convolution_formula() -> dict:
    """PyTorch's counter knows its own operators only. Sampling is left out, as memory traffic is elsewhere."""
    try:
        import torchvision  # noqa: F401  (registers the operator)
    except ImportError:
        return {}  # then the plain formulation ends in a matrix product, which is counted

    def flop(input_shape, weight_shape, *arguments, out_shape=None, **options):
        return 2 * out_shape.numel() * torch.Size(weight_shape[1:]).numel()

    return {torch.ops.torchvision.deform_conv2d: flop}


class MatrixProduct:
    """A square matrix product, large enough to run at the machine's full rate, small enough to be timed often."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        side = 8192 if device.type == "cuda" else 2048
        self.left, self.right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        self.flop = 2 * side**3

    def __call__(self) -> torch.Tensor:
        return F.linear(self.left, self.right)
