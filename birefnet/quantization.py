"""The import path of `quantize` up to version 0.1; the code is in `birefnet.inference`."""

from birefnet.inference.quantization import obstacle, quantize


__all__ = ["obstacle", "quantize"]
