"""From a network to the program of another runtime, by the exporters of transformers."""

import contextlib
import logging
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from birefnet.inference.runtimes import import_extra


# The first one with DeformConv in ONNX Runtime's newer kernel; all newer operators are left out.
OPSET = 22

# In steps of 32 pixels. One step would make maps of one pixel, which exporters take for constants.
STEPS = (2, 128)

# float16 and int8 files round constants of more than this many numbers. They are most of the file. Rounding the others
# costs most of the accuracy: the first layers of a network are small.
LARGE = 2**16

# The operators of layers. Their second input is the weight.
WEIGHTED = ("Conv", "DeformConv", "Gemm", "MatMul")

# Size of the samples that one DeformConv stores: small enough for a processor's cache, large enough for all cores.
SAMPLES_BYTES = 16 * 2**20


def trace_onnx(model, pixel_values, dynamic_size: bool, dynamic_batch: bool):
    """
    The network as an ONNX graph: input `pixel_values` (B, 3, H, W), output `logits` (B, 1, H, W), both float32.

    Args:
        model (`BiRefNetForImageSegmentation`): in evaluation mode, float32, on the CPU.
        pixel_values (`torch.Tensor`): an example, whose size is the program's unless `dynamic_size` is set.

    Returns:
        `onnx_ir.Model`
    """
    import_extra("onnx", "onnxscript", "onnxruntime")
    exporters = import_extra("transformers.exporters.exporter_onnx")
    config = exporters.OnnxConfig(opset_version=OPSET, **_dynamic_options(dynamic_size, dynamic_batch))
    with _quiet(), _whole_number_padding(model), _multiples_of_32(model, dynamic_size), _onnx_operators(model):
        return exporters.OnnxExporter().export(model, {"pixel_values": pixel_values}, config).program


def trace_openvino(model, pixel_values, dynamic_size: bool, dynamic_batch: bool):
    """As [`trace_onnx`], as an `openvino.Model`."""
    import_extra("openvino")
    exporters = import_extra("transformers.exporters.exporter_openvino")
    config = exporters.OpenVINOConfig(**_dynamic_options(dynamic_size, dynamic_batch))
    with _quiet(), _whole_number_padding(model), _multiples_of_32(model, dynamic_size), _plain_attention(model):
        return exporters.OpenVINOExporter().export(model, {"pixel_values": pixel_values}, config).program


def trace_torch(model, pixel_values, dynamic_size: bool, dynamic_batch: bool):
    """As [`trace_onnx`], as a `torch.export.ExportedProgram`."""
    exporters = import_extra("transformers.exporters.exporter_dynamo")
    config = exporters.DynamoConfig(**_dynamic_options(dynamic_size, dynamic_batch))
    with _quiet(), _whole_number_padding(model), _multiples_of_32(model, dynamic_size):
        return exporters.DynamoExporter().export(model, {"pixel_values": pixel_values}, config).program


def _dynamic_options(dynamic_size: bool, dynamic_batch: bool) -> dict:
    from torch.export import Dim

    axes = {}
    if dynamic_batch:
        axes[0] = Dim("batch", min=1, max=1024)
    if dynamic_size:
        lowest, highest = STEPS
        axes[2] = 32 * Dim("height_steps", min=lowest, max=highest)
        axes[3] = 32 * Dim("width_steps", min=lowest, max=highest)
    if not axes:
        return {}
    return {"dynamic_shapes": {"pixel_values": axes}, "prefer_deferred_runtime_asserts_over_guards": True}


@contextmanager
def _quiet():
    """Silences the exporters' progress reports; errors and our own messages still appear."""
    names = ("", "torch.onnx", "torch.export", "onnxscript", "transformers")  # "" is the one that ONNX Runtime uses
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _plain_attention(model):
    """Attention as matrix products and a softmax: decomposing PyTorch's fused operator changes its memory layout."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


@contextmanager
def _whole_number_padding(model):
    """
    TensorFlow's padding in whole numbers. timm divides sizes to fractions and rounds them up, and `torch.export` takes
    many minutes to simplify such sizes if they are dynamic.
    """
    layers = [module for module in model.modules() if type(module).__name__ == "Conv2dSame"]
    for layer in layers:
        layer.forward = partial(_convolve_to_same_size, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _convolve_to_same_size(layer, hidden_states):
    import torch.nn.functional as F

    from birefnet.repository.backbone_birefnet import same_padding

    vertical, horizontal = (same_padding(hidden_states.shape[2 + axis], layer, axis) for axis in (0, 1))
    hidden_states = F.pad(hidden_states, (*horizontal, *vertical))
    return F.conv2d(hidden_states, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)


@contextmanager
def _multiples_of_32(model, dynamic_size: bool):
    """
    Sizes as 32 times a whole number, if they are dynamic.

    `torch.export` then knows that they can be halved five times. Otherwise it takes many minutes to simplify them.
    """
    import torch.nn.functional as F

    def in_steps(module, arguments, options):
        height, width = options["pixel_values"].shape[-2:]
        padding = (0, width // 32 * 32 - width, 0, height // 32 * 32 - height)  # none, but the new sizes say so
        return arguments, {**options, "pixel_values": F.pad(options["pixel_values"], padding)}

    hook = model.register_forward_pre_hook(in_steps, with_kwargs=True) if dynamic_size else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def _onnx_operators(model):
    """Plain attention, and deformable convolutions as ONNX's own operator."""
    layers = [module for module in model.modules() if type(module).__name__ == "DeformableConvolution"]
    with _plain_attention(model):
        for layer in layers:
            layer.operator = _onnx_deform_conv
        try:
            yield
        finally:
            for layer in layers:
                del layer.operator


def _onnx_deform_conv(hidden_states, offsets, modulator, weight, bias=None):
    """
    The network's deformable convolution as ONNX DeformConv, faster there than GridSample or Gather.

    ONNX Runtime stores the samples of all output rows before it multiplies them by the kernel. Several operators, each
    for every n-th row, store less at a time. An operator of row stride n computes rows 0, n, 2n, … Offsets that are
    larger by i pixels make them rows i, n + i, 2n + i, …
    """
    import torch

    side = weight.shape[-1]
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    bands = _number_of_bands(*hidden_states.shape[1:], side)
    attributes = {"kernel_shape": [side, side], "pads": [side // 2] * 4, "strides": [bands, 1], "dilations": [1, 1]}
    modulation = 2 * torch.sigmoid(modulator)
    outputs = []
    for band in range(bands):
        rows = slice(band, None, bands)
        moved = offsets[:, :, rows] + offsets.new_tensor([band, 0]).repeat(side**2).view(-1, 1, 1)
        output = torch.onnx.ops.symbolic(
            "DeformConv",
            (hidden_states, weight, moved, bias, modulation[:, :, rows]),
            {**attributes, "group": 1, "offset_group": 1},
            dtype=hidden_states.dtype,
            shape=(hidden_states.shape[0], weight.shape[0], *moved.shape[2:]),
            version=OPSET,
        )
        outputs.append(output)
    rows = torch.stack(outputs, dim=3)  # (B, out channels, H / bands, bands, W)
    return rows.flatten(2, 3)  # (B, out channels, H, W)


def _number_of_bands(channels: int, height, width, side: int) -> int:
    """How many operators share the rows of a deformable convolution. A size that is not fixed has one operator."""
    if not (isinstance(height, int) and isinstance(width, int)):
        return 1
    size = 4 * channels * side**2 * width * height  # of all samples, in bytes
    fitting = (bands for bands in range(1, height) if height % bands == 0 and size // bands <= SAMPLES_BYTES)
    return next(fitting, height)


class OnnxProgram:
    """
    A network traced once, to be written in several dtypes.

    Args:
        model, pixel_values, dynamic_size, dynamic_batch: those of [`trace_onnx`].
        folder (`Path`): where the files are written.
    """

    def __init__(self, model, pixel_values, dynamic_size: bool, dynamic_batch: bool, folder: Path):
        self.exact = folder / "model.onnx"
        write_onnx(trace_onnx(model, pixel_values, dynamic_size, dynamic_batch), self.exact)

    def write(self, dtype: str, name: str) -> Path:
        """Writes the file of a dtype under this name and returns its path."""
        path = self.exact.with_name(name)
        if dtype in ONNX_ROUNDINGS:
            write_rounded_onnx(self.exact, path, dtype)
        return path


class OpenVINOProgram:
    """As [`OnnxProgram`], for OpenVINO. In float16 the large constants are halved, and the arithmetic is the same."""

    def __init__(self, model, pixel_values, dynamic_size: bool, dynamic_batch: bool, folder: Path):
        self.folder = folder
        self.program = trace_openvino(model, pixel_values, dynamic_size, dynamic_batch)

    def write(self, dtype: str, name: str) -> Path:
        import openvino

        program = halve_openvino_constants(self.program) if dtype == "float16" else self.program
        openvino.save_model(program, str(self.folder / name), compress_to_fp16=False)
        return self.folder / name


def halve_openvino_constants(program):
    """A copy of an `openvino.Model` with its large constants in float16. OpenVINO restores them when it loads them."""
    import numpy as np
    import openvino
    from openvino import opset13

    program = program.clone()
    for node in program.get_ops():
        is_large = node.get_type_name() == "Constant" and np.prod(node.get_output_shape(0)) > LARGE
        if is_large and node.get_element_type() == openvino.Type.f32:
            halved = opset13.convert(opset13.constant(node.get_data().astype(np.float16)), "f32")
            for place in node.output(0).get_target_inputs():
                place.replace_source_output(halved.output(0))
    return program


class TorchProgram:
    """As [`OnnxProgram`], for `torch.export.load`."""

    def __init__(self, model, pixel_values, dynamic_size: bool, dynamic_batch: bool, folder: Path):
        self.folder = folder
        self.program = trace_torch(model, pixel_values, dynamic_size, dynamic_batch)

    def write(self, dtype: str, name: str) -> Path:
        import torch

        torch.export.save(self.program, str(self.folder / name))
        return self.folder / name


PROGRAMS = {"onnx": OnnxProgram, "openvino": OpenVINOProgram, "torch": TorchProgram}


def write_onnx(program, path: Path) -> None:
    """
    Writes a graph with all constants computed, as one file; weights beyond 1.9 GB go to `NAME.onnx_data` beside it,
    where transformers.js looks for them.

    What a network derives from its parameters (normalised convolutions, windows' indices) is computed once by ONNX
    Runtime's basic optimisations, which use standard operators only.
    """
    import shutil
    import tempfile

    import onnx
    import onnx_ir
    import onnxruntime

    scratch = Path(tempfile.mkdtemp(dir=path.parent))  # after an error, the caller removes it with `path.parent`
    traced, folded = scratch / "traced.onnx", scratch / "folded.onnx"
    onnx_ir.save(program, str(traced), external_data="traced.onnx_data")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "folded.data")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(traced), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(folded))
    shutil.rmtree(scratch)
    used = {node.domain for node in graph.graph.node}
    kept = [entry for entry in graph.opset_import if entry.domain in used | {""}]
    del graph.opset_import[:]
    graph.opset_import.extend(kept)
    del graph.metadata_props[:]
    merge_equal_constants(graph)
    save_onnx(graph, path)


def merge_equal_constants(graph) -> None:
    """
    Leaves one of the constants of an `onnx.ModelProto` that are equal.

    A network with two scales calls its backbone twice. Where ONNX Runtime includes a batch norm in the convolution
    before it, it does so for each call, and the weights are in the graph twice.
    """
    from hashlib import sha256

    first, replaced = {}, {}
    for tensor in list(graph.graph.initializer):
        content = (tensor.data_type, tuple(tensor.dims), sha256(tensor.raw_data).digest())
        if tensor.raw_data and first.setdefault(content, tensor.name) != tensor.name:
            replaced[tensor.name] = first[content]
            graph.graph.initializer.remove(tensor)
    for node in graph.graph.node:
        node.input[:] = [replaced.get(name, name) for name in node.input]


def save_onnx(graph, path: Path) -> None:
    """Writes an `onnx.ModelProto`; see [`write_onnx`]."""
    import onnx

    is_large = graph.ByteSize() > 1.9e9
    location = {"save_as_external_data": True, "location": f"{path.name}_data"} if is_large else {}
    onnx.save(graph, str(path), **location)


def write_rounded_onnx(source: Path, path: Path, dtype: str) -> None:
    """Writes a float32 file's large weights in "float16" or "int8"."""
    import onnx

    graph = onnx.load(str(source))
    ONNX_ROUNDINGS[dtype](graph)
    save_onnx(graph, path)


def halve_large_layers(graph) -> None:
    """
    Stores the large constants of an `onnx.ModelProto` in float16. The layers with such weights compute in float16.

    ONNX Runtime's own converter also rounds what is between the layers. It changes the mattes of the embedded network
    five to ten times as much.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    constants = {x.name: x for x in graph.graph.initializer if x.data_type == TensorProto.FLOAT}
    large = {name for name, x in constants.items() if np.prod(x.dims) > LARGE}
    nodes, halved, used = [], {}, set()

    def halve(name: str) -> str:
        if name and name not in halved:
            halved[name] = f"{name}_float16"
            if name in constants:
                values = numpy_helper.to_array(constants[name]).astype(np.float16)
                graph.graph.initializer.append(numpy_helper.from_array(values, halved[name]))
            else:
                nodes.append(helper.make_node("Cast", [name], [halved[name]], to=TensorProto.FLOAT16))
        return halved.get(name, name)

    for node in graph.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and large.intersection(node.input):
            [output] = node.output
            node.input[:] = [halve(name) for name in node.input]
            node.output[0] = f"{output}_rounded"
            nodes += [node, helper.make_node("Cast", node.output, [output], to=TensorProto.FLOAT)]
        else:
            used.update(node.input)
            nodes.append(node)
    # What other operators read of the large constants is converted when a runtime loads the file.
    restored = [helper.make_node("Cast", [halve(x)], [x], to=TensorProto.FLOAT) for x in sorted(large & used)]
    for name in large | (halved.keys() & constants.keys() - used):
        graph.graph.initializer.remove(constants[name])
    del graph.graph.node[:]
    graph.graph.node.extend([*restored, *nodes])


def round_large_weights(graph) -> None:
    """
    Stores the large weights of an `onnx.ModelProto` in int8, with one scale for each output channel.

    A runtime restores them once, when it loads the file: it computes whatever depends on constants only, here `Cast`
    and `Mul`. So the network is as fast as in float32, and no activation is rounded. ONNX Runtime keeps
    `DequantizeLinear` for every call, and its dynamic quantization also rounds the inputs of the layers: that spoils
    the mattes of small networks, and it is slower than float32.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    constants = {x.name: x for x in graph.graph.initializer if x.data_type == TensorProto.FLOAT}
    weights = {
        node.input[1]: node for node in graph.graph.node if node.op_type in WEIGHTED and node.input[1] in constants
    }
    nodes = []
    for name, node in weights.items():
        values = numpy_helper.to_array(constants[name])
        if values.size <= LARGE:
            continue
        others = tuple(axis for axis in range(values.ndim) if axis != _output_axis(node, values.ndim))
        scale = np.maximum(np.abs(values).max(axis=others, keepdims=True), 1e-30) / 127
        stored = {f"{name}_int8": np.round(values / scale).astype(np.int8), f"{name}_scale": scale.astype(np.float32)}
        graph.graph.initializer.remove(constants[name])
        graph.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in stored.items())
        nodes.append(helper.make_node("Cast", [f"{name}_int8"], [f"{name}_levels"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [f"{name}_levels", f"{name}_scale"], [name]))
    nodes.extend(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _output_axis(node, dimensions: int) -> int:
    """The axis of a layer's weight that counts its output channels."""
    if node.op_type == "MatMul":
        return dimensions - 1
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type == "Gemm" and not is_transposed else 0


ONNX_ROUNDINGS = {"float16": halve_large_layers, "int8": round_large_weights}
