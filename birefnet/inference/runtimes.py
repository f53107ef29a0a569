"""Exported files behind the interface that the processor and the pipeline expect of a network."""

from pathlib import Path

import torch

from birefnet.errors import CommandError
from birefnet.repository.modeling_birefnet import BiRefNetImageSegmentationOutput


# Where each format's files lie in the folder, by dtype. transformers.js prescribes those of ONNX.
FILES = {
    "onnx": {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"},
    "openvino": {"float32": "openvino_model.xml", "float16": "openvino_model_fp16.xml"},
    "torch": {"float32": "model.pt2"},
}


def import_extra(*names: str):
    """
    Imports optional modules.

    Raises:
        CommandError: one of them is not installed.
    """
    import importlib

    try:
        modules = [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise CommandError(f"{error}. Exporting needs: pip install 'birefnet-transformers[export]'") from error
    return modules[0] if len(modules) == 1 else modules


class ExportedNetwork:
    """
    What exported networks have in common: photos in, logits out, computed by another runtime than PyTorch.

    Args:
        config (`BiRefNetConfig`): that of the exported network.
        input_shape (`tuple`): (batch, 3, height, width); `None` stands for any.
    """

    dtype = torch.float32  # of input and output, whatever the file computes in

    def __init__(self, config, input_shape: tuple[int | None, ...], device="cpu"):
        self.config = config
        self.input_shape = input_shape
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(cls, folder, dtype: str = "float32", device="cpu", **options):
        """
        Loads a file of the folder that `birefnet export` wrote.

        Args:
            folder (`str` or `Path`): that folder.
            dtype (`str`): which of its files: `"float32"`, `"float16"` or `"int8"`.
            device (`str` or `torch.device`): where it runs.
            options: those of the class.

        Raises:
            CommandError: the folder has no such file, the runtime is not installed, or it cannot load the file.
        """
        from transformers import AutoConfig

        from birefnet.inference.registration import register_model

        register_model()  # also serves AutoImageProcessor, which reads the same folder
        file = cls.locate(folder, dtype)
        try:
            return cls(file, AutoConfig.from_pretrained(str(folder)), device=device, **options)
        except (OSError, RuntimeError, ValueError) as error:  # the runtimes' own errors are of the last two kinds
            raise CommandError(f"{file} cannot be loaded: {error}") from error

    @classmethod
    def locate(cls, folder, dtype: str = "float32") -> Path:
        """The file of that dtype in the folder. Raises `CommandError` if there is none."""
        files = {name: Path(folder, cls.file_format, file) for name, file in FILES[cls.file_format].items()}
        found = [name for name, file in files.items() if file.is_file()]
        if dtype in found:
            return files[dtype]
        raise CommandError(
            f"{folder} has no {cls.file_format} file in {dtype}; it has {', '.join(found) or 'none'}. "
            f"`birefnet export --format {cls.file_format} --dtype {dtype}` writes it."
        )

    def __call__(self, pixel_values: torch.Tensor) -> BiRefNetImageSegmentationOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): as for the network itself.

        Raises:
            ValueError: the shape is not the file's.
        """
        shape = tuple(pixel_values.shape)
        fits = len(shape) == 4 and all(own in (None, side) for own, side in zip(self.input_shape, shape, strict=True))
        if not fits or shape[2] % 32 or shape[3] % 32:
            allowed = ", ".join("any" if side is None else str(side) for side in self.input_shape)
            raise ValueError(
                f"pixel_values have shape {shape}; this file takes ({allowed}) with sides that are multiples of 32."
            )
        logits = self.run(pixel_values.to(self.device, torch.float32).contiguous())
        return BiRefNetImageSegmentationOutput(logits=logits)

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:  # (B, 3, H, W) → (B, 1, H, W)
        raise NotImplementedError

    # What transformers' pipelines ask of a network.

    def eval(self):
        return self

    def to(self, *arguments, **options):
        return self

    def can_generate(self) -> bool:
        return False


class BiRefNetOnnxModel(ExportedNetwork):
    """
    An ONNX file in ONNX Runtime. The session reads and writes PyTorch's memory directly.

    Example:

    ```python
    >>> from birefnet.export import BiRefNetOnnxModel
    >>> from birefnet.repository.pipeline_birefnet import BiRefNetPipeline
    >>> from transformers import AutoImageProcessor

    >>> model = BiRefNetOnnxModel.from_pretrained("exported")
    >>> processor = AutoImageProcessor.from_pretrained("exported")
    >>> cut_out = BiRefNetPipeline(model=model, image_processor=processor)("photo.jpg")
    ```
    """

    file_format = "onnx"

    def __init__(self, file, config, device="cpu", threads: int | None = None, providers: list | None = None):
        """
        Args:
            file (`str` or `Path`): the ONNX file.
            threads (`int`, *optional*): by default as many as PyTorch uses.
            providers (`list`, *optional*): ONNX Runtime's execution providers; by default the device's.
        """
        onnxruntime = import_extra("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        if providers is None:
            providers = ["CPUExecutionProvider"]
            if torch.device(device).type == "cuda":
                providers = ["CUDAExecutionProvider", *providers]
        self.session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        shape = [side if isinstance(side, int) else None for side in self.session.get_inputs()[0].shape]
        super().__init__(config, tuple(shape), device)

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        import numpy as np

        batch, _, height, width = pixel_values.shape
        logits = torch.empty(batch, 1, height, width, device=self.device)
        place = (self.device.type, self.device.index or 0, np.float32)
        binding = self.session.io_binding()
        binding.bind_input("pixel_values", *place, tuple(pixel_values.shape), pixel_values.data_ptr())
        binding.bind_output("logits", *place, tuple(logits.shape), logits.data_ptr())
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits


class BiRefNetOpenVINOModel(ExportedNetwork):
    """An OpenVINO file on the CPU."""

    file_format = "openvino"

    def __init__(self, file, config, device="cpu", threads: int | None = None, precision: str | None = "f32"):
        """
        Args:
            file (`str` or `Path`): the `.xml` file, its `.bin` beside it.
            threads (`int`, *optional*): by default as many as PyTorch uses.
            precision (`str`, *optional*): of the arithmetic: `"f32"`, `"bf16"`, or `None` for OpenVINO's own choice,
                which is bfloat16 where the processor has instructions for it.
        """
        openvino = import_extra("openvino")
        options = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        self.compiled = openvino.Core().compile_model(str(file), "CPU", options)
        shape = [side.get_length() if side.is_static else None for side in self.compiled.input(0).partial_shape]
        super().__init__(config, tuple(shape), device)

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        request = self.compiled.create_infer_request()  # one a call, as calls may come from several threads
        outputs = request.infer([pixel_values.numpy()], share_inputs=True, share_outputs=False)
        return torch.from_numpy(outputs[self.compiled.output(0)])


class BiRefNetTorchProgram(ExportedNetwork):
    """A `torch.export` file, run by PyTorch without the network's code."""

    file_format = "torch"

    def __init__(self, file, config, device="cpu"):
        program = torch.export.load(str(file))
        shape = [side if isinstance(side, int) else None for side in _input_shape(program)]
        self.module = program.module().to(device)
        super().__init__(config, tuple(shape), device)

    def run(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.module(pixel_values=pixel_values).logits


def _input_shape(program) -> tuple:
    name = program.graph_signature.user_inputs[0]
    return next(node for node in program.graph.nodes if node.name == name).meta["val"].shape


RUNTIMES = {"onnx": BiRefNetOnnxModel, "openvino": BiRefNetOpenVINOModel, "torch": BiRefNetTorchProgram}
