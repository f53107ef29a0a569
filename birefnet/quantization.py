"""The import path of `quantize` up to version 0.1; the code is in `birefnet.inference`."""

from birefnet.inference.quantization import dtype_between, obstacle, quantize


__all__ = ["dtype_between", "obstacle", "quantize"]
