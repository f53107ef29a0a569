"""Comparing what an exported file computes with what PyTorch does."""

import math
from dataclasses import dataclass

import torch

from birefnet.errors import CommandError


# float32: largest difference of the logits, in their standard deviations. float16: largest difference of the mattes.
# int8: mean difference of the mattes, as single pixels on edges differ by much more.
TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "int8": 1e-2}


@dataclass
class Agreement:
    """How much a file's results differ from PyTorch's in float32, at worst over what was compared."""

    logits: float = 0.0  # largest difference, in standard deviations of the logits
    matte: float = 0.0  # largest difference
    matte_mean: float = 0.0  # mean difference

    def include(self, logits: torch.Tensor, expected: torch.Tensor) -> None:  # (B, 1, H, W) both
        difference = (logits.sigmoid() - expected.sigmoid()).abs()
        self.logits = max_with_nan(self.logits, ((logits - expected).abs().max() / expected.std()).item())
        self.matte = max_with_nan(self.matte, difference.max().item())
        self.matte_mean = max_with_nan(self.matte_mean, difference.mean().item())

    def measure(self, dtype: str) -> float:
        """The number that the tolerance of this dtype limits."""
        return {"float32": self.logits, "float16": self.matte, "int8": self.matte_mean}[dtype]

    def describe(self, dtype: str) -> str:
        if dtype == "float32":
            return f"logits within {self.logits:.1e} of their standard deviation"
        return f"mattes within {self.matte:.1e}, {self.matte_mean:.1e} on average"


def max_with_nan(a: float, b: float) -> float:
    return a if math.isnan(a) or b <= a else b


def input_shapes(size: tuple[int, int], dynamic_size: bool, dynamic_batch: bool) -> list[tuple[int, int, int]]:
    """The (batch, height, width) at which a file is compared: its own, and where it allows others one of them."""
    shapes = [(1, *size)]
    if dynamic_size:
        shapes.append((3 if dynamic_batch else 1, 192, 320))
    elif dynamic_batch:
        shapes.append((3, *size))
    return shapes


def expected_logits(model, processor, photo, shapes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The photo at each shape as `pixel_values`, and PyTorch's logits for them."""
    pairs = []
    for batch, height, width in shapes:
        # The photos of a batch differ, so that a file that mixes them up is found out.
        photos = [photo, photo.transpose(0), photo.transpose(1)][:batch]
        size = {"height": height, "width": width}
        pixel_values = processor(photos, size=size, do_dynamic_resize=False, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            pairs.append((pixel_values, model(pixel_values).logits))
    return pairs


def compare(network, pairs, dtype: str, name: str) -> Agreement:
    """
    Runs an exported network on what [`expected_logits`] gives.

    Raises:
        CommandError: its results differ by more than the dtype's tolerance.
    """
    agreement = Agreement()
    for pixel_values, expected in pairs:
        agreement.include(network(pixel_values).logits, expected)
    if not agreement.measure(dtype) <= TOLERANCES[dtype]:  # also true of NaN
        raise CommandError(
            f"{name} disagrees with PyTorch: {agreement.describe(dtype)}; allowed is {TOLERANCES[dtype]:g}. "
            "The file was not kept."
        )
    return agreement
