"""Networks as ONNX, OpenVINO and torch.export programs: writing, checking and timing them.

`export_model` writes the files; `BiRefNetOnnxModel` and `BiRefNetOpenVINOModel` run them in the pipeline.
"""

import importlib


_HOMES = {
    "export_model": "birefnet.export.folders",
    "BiRefNetOnnxModel": "birefnet.inference.runtimes",
    "BiRefNetOpenVINOModel": "birefnet.inference.runtimes",
}

__all__ = ["BiRefNetOnnxModel", "BiRefNetOpenVINOModel", "export_model"]


def __getattr__(name: str):
    # On first use, since torch takes seconds to import and `birefnet export --help` has to answer at once.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
