"""Subjects of the benchmark. Each maps normalised images (B, 3, H, W) to logits (B, 1, H, W)."""

import copy
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from plain_formulation import plain_logits

import birefnet
from birefnet.inference.quantization import quantize
from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.hardware_birefnet import compute_plan
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation


BACKBONES = {"lite": "swin_v1_t", "general": "swin_v1_l"}
PLAIN, PUBLISHED = "plain formulation", "published code"
PROJECT, CAPTURED, COMPILED = "this project", "this project, CUDA graph", "this project, torch.compile"


@dataclass(frozen=True)
class Subject:
    """One implementation to measure. It can be pickled, to be built in a separate process."""

    kind: str
    model: str  # "lite", "general", or a folder or file of weights
    dtype: str
    device: str
    path: str | None = None  # checkout of the published code, or ONNX file

    @property
    def name(self) -> str:
        return f"ONNX Runtime, {Path(self.path).name}" if self.kind == "onnx" else self.kind

    def build(self, model: BiRefNetForImageSegmentation | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        """The subject as a function. `model` is an existing model of this name, dtype and device."""
        if self.kind == "onnx":
            return onnx_session(self.path)
        if model is None:
            model = load_model(self.model, self.dtype, self.device)
        if self.kind == PUBLISHED:
            return published_code(self.path, model)
        if self.kind == PLAIN:
            return lambda pixel_values: plain_logits(model, pixel_values)
        if self.kind == PROJECT:
            return lambda pixel_values: model(pixel_values).logits
        if self.kind == CAPTURED:
            if not self.device.startswith("cuda"):
                raise ValueError("CUDA graphs need a CUDA GPU")
            # A copy of the module only, not of its weights: other subjects use the model too.
            captured = birefnet.compile(copy.copy(model))
            return lambda pixel_values: captured(pixel_values).logits
        compiled = torch.compile(model, mode="reduce-overhead" if self.device.startswith("cuda") else "default")
        return lambda pixel_values: compiled(pixel_values).logits


def configuration(model: str) -> BiRefNetConfig:
    if model in BACKBONES:
        return BiRefNetConfig(backbone=BACKBONES[model])
    return BiRefNetForImageSegmentation.from_pretrained(model).config


def load_model(name: str, dtype: str, device: str) -> BiRefNetForImageSegmentation:
    """The network in evaluation mode. Lite and general have random weights, which take as long as trained weights."""
    transformers.utils.logging.set_verbosity_error()  # no report of the index buffers that random weights lack
    transformers.utils.logging.disable_progress_bar()
    if name in BACKBONES:
        config = configuration(name)
        model = BiRefNetForImageSegmentation.from_pretrained(None, config=config, state_dict=drawn_weights(config))
    else:
        model = BiRefNetForImageSegmentation.from_pretrained(name, dtype=torch.float32)
    if dtype == "int8":
        return quantize(model.to(device, compute_plan(device, torch.bfloat16).arithmetic).eval())
    return model.to(device, getattr(torch, dtype)).eval()


def drawn_weights(config: BiRefNetConfig) -> dict[str, torch.Tensor]:
    """
    Random weights that keep activations at order one and give deformable convolutions offsets of a few pixels.

    Trained weights have such offsets. With PyTorch's initialisation, offsets are zero, and sampling is faster than
    with trained weights.
    """
    with torch.device("meta"):
        shapes = BiRefNetForImageSegmentation(config).state_dict()
    generator = torch.Generator().manual_seed(0)

    def draw(key, like):
        noise = torch.randn(like.shape, generator=generator)
        if key.endswith("running_var"):
            return 0.5 + noise.abs()
        if "relative_position_bias_table" in key:
            return 0.5 * noise
        if like.ndim > 1:
            return noise / like[0].numel() ** 0.5
        return 0.1 * noise + (1.0 if key.endswith("weight") else 0.0)

    return {key: draw(key, like) for key, like in shapes.items() if like.is_floating_point()}


def published_code(checkout: str, model: BiRefNetForImageSegmentation) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    The published network with the weights of `model`, imported from a checkout of its GitHub repository.

    In float16 its weights are cast. In bfloat16, which its deformable convolution does not support, it runs under
    autocast, as in its own inference script.

    Raises:
        ValueError: `checkout` is no checkout of that repository.
    """
    folder = Path(checkout).resolve()
    if not (folder / "config.py").is_file() or not (folder / "models" / "birefnet.py").is_file():
        raise ValueError(f"--peer {checkout}: no checkout of the published code (config.py, models/birefnet.py).")
    network = import_published_network(folder, model.config.backbone)(bb_pretrained=False)
    network.load_state_dict(model.state_dict())
    autocast = model.dtype == torch.bfloat16
    dtype = torch.float32 if autocast else model.dtype
    network.to(model.device, dtype).eval()

    def run(pixel_values):
        with torch.autocast(pixel_values.device.type, torch.bfloat16, enabled=autocast):
            return network(pixel_values.to(dtype))[-1]

    return run


def import_published_network(folder: Path, backbone: str):
    """The published class. Its options are constants of `config.Config`, which every module reads on import."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("config", "dataset", "models", "image_proc")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        published_config = importlib.import_module("config")

        class ChosenConfig(published_config.Config):
            def __init__(self):
                super().__init__()
                self.bb = backbone
                width = {"swin_v1_t": 96, "swin_v1_s": 96, "swin_v1_b": 128, "swin_v1_l": 192}[backbone]
                self.lateral_channels_in_collection = [2 * width * factor for factor in (8, 4, 2, 1)]
                self.cxt = self.lateral_channels_in_collection[:0:-1]

        published_config.Config = ChosenConfig
        return importlib.import_module("models.birefnet").BiRefNet
    finally:
        sys.path.remove(str(folder))


def onnx_session(file: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """
    An ONNX Runtime session as a function. The exported network has one input, and logits as its first output.

    Raises:
        ValueError: The function is called with another shape than the graph's fixed shape.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(file), options, providers=onnxruntime.get_available_providers())
    graph_input = session.get_inputs()[0]
    dtype = torch.float16 if graph_input.type == "tensor(float16)" else torch.float32

    def run(pixel_values):
        for given, fixed in zip(pixel_values.shape, graph_input.shape, strict=True):
            if isinstance(fixed, int) and given != fixed:
                raise ValueError(f"the graph takes {graph_input.shape} only")
        outputs = session.run(None, {graph_input.name: pixel_values.to(dtype).cpu().numpy()})
        return torch.from_numpy(outputs[0])

    return run
