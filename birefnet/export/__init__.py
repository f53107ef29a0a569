"""Networks as ONNX, OpenVINO and torch.export programs: writing, checking, running and timing them.

`export_model` writes the files; `BiRefNetOnnxModel` and `BiRefNetOpenVINOModel` run them in the pipeline.
"""

from birefnet.export.folders import export_model
from birefnet.export.runtimes import BiRefNetOnnxModel, BiRefNetOpenVINOModel


__all__ = ["BiRefNetOnnxModel", "BiRefNetOpenVINOModel", "export_model"]
