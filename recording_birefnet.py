"""
Inference of small networks from a recording.

A small network spends much of a call on work that is the same every time: Python, folding norms into convolutions, and
oneDNN reordering each weight before its convolution. The first call is recorded as a list of PyTorch's operators, and
later equal calls replay the list. Operators that depend on parameters only are left out: their results are constants
of the list. The first call runs the operators that it records, so all calls give the same result to the last bit. The
files of the network know nothing of it.
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence

import numpy
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .hardware_birefnet import is_worth_recording, prepack_convolution


# Recordings of a network, which differ in the images' shape. Each has its own copy of the weights.
RECORDINGS = 2
# Numbers of each parameter and buffer that are compared in each call. All of them would take 5 ms.
SAMPLES = 8
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class RecordedCalls:
    """
    The calls of a network: the first of several equal calls is recorded, and later ones are replayed.

    Calls are equal if the images have the same shape, dtype and memory layout, and the network has the
    same modules, attributes, configuration, parameters and buffers. PyTorch counts the changes of a tensor. It does
    not count changes in place through `.data`. Those are noticed if they change one of eight numbers of a parameter.
    """

    def __init__(self):
        self.last: Snapshot | None = None

    def clear(self):
        self.last = None

    def compute(
        self, network: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """
        `function(pixel_values)`, recorded or replayed.

        Args:
            network: The network that `function` computes.
            function: Forward pass in evaluation mode, without gradients.
            pixel_values: (B, 3, H, W).

        Returns:
            The result of `function`, up to rounding. It is the same for all equal calls with the same images.
        """
        last = self.last  # other threads may replace it
        if last is None and not is_worth_recording(sum(tensor.numel() for tensor in network.parameters())):
            return function(pixel_values)
        if last is None or not last.is_unchanged(network):
            last = Snapshot(network)
            self.last = last if last.is_recordable else None
            if self.last is None:
                return function(pixel_values)
        images = (pixel_values.shape, pixel_values.stride(), pixel_values.dtype)
        if images in last.programs:
            return last.programs[images](pixel_values)
        recorder = Recorder(pixel_values)
        with recorder:
            output = function(pixel_values)
        latest = [*last.programs.items()][1 - RECORDINGS :]
        last.programs = {**dict(latest), images: recorder.finish(output) or function}
        return output

    def __reduce__(self):
        return RecordedCalls, ()  # copies and files have no recording


class Snapshot:
    """
    All of a network that its recordings depend on, and the recordings.

    It is compared in each call, so it consists of lists that few calls of C functions compare. It keeps references to
    all objects, since addresses of other objects could be used again.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module):
        # By shape, strides and dtype of the images. Threads replace the dictionary whole.
        self.programs: dict[tuple, Callable[[torch.Tensor], torch.Tensor]] = {}
        self.modules = list(network.modules())
        contents = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
        self.dictionaries = [vars(network.config), *map(vars, self.modules)]
        self.dictionaries += [getattr(module, name) for module in self.modules for name in contents]
        self.values = list(self.current_values())
        self.tensors = [value for value in self.values if isinstance(value, torch.Tensor)]
        self.is_recordable = self._is_recordable()
        if self.is_recordable:
            self.samples = [sample(tensor) for tensor in self.tensors]
            self.numbers = self.current_numbers()

    def _is_recordable(self) -> bool:
        """Whether the network is small, in evaluation mode, on a CPU, and nothing watches or hides its tensors."""
        is_watched = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules)
        return (
            is_worth_recording(sum(tensor.numel() for tensor in self.tensors))
            and not is_watched
            and not any(module.training for module in self.modules)
            # PyTorch does not count the changes of inference tensors.
            and all(tensor.is_cpu and not tensor.is_inference() for tensor in self.tensors)
        )

    def is_unchanged(self, network: nn.Module) -> bool:
        return (
            self.modules[0] is network
            and sum(map(len, self.dictionaries)) == len(self.values)
            and all(map(operator.is_, self.current_values(), self.values))
            and self.numbers == self.current_numbers()
        )

    def current_values(self) -> Iterator:
        return itertools.chain.from_iterable(map(dict.values, self.dictionaries))

    def current_numbers(self) -> tuple[list[int], list[int], bytes]:
        """Address, number of changes and sample of each tensor."""
        versions = map(operator.attrgetter("_version"), self.tensors)
        return [*map(torch.Tensor.data_ptr, self.tensors)], [*versions], numpy.concatenate(self.samples).tobytes()


def sample(tensor: torch.Tensor) -> numpy.ndarray:
    """View of up to `SAMPLES` numbers of a tensor as integers, evenly spaced along its first dimension."""
    tensor = torch.atleast_1d(tensor.detach())
    step = max(1, -(-len(tensor) // SAMPLES))
    row = tensor[(slice(None, None, step), *(0,) * (tensor.ndim - 1))]
    return row.view(INTEGERS[row.element_size()]).numpy()


class Recorder(TorchDispatchMode):
    """
    Context that records the operators that depend on the images.

    Args:
        pixel_values: The images.
    """

    def __init__(self, pixel_values: torch.Tensor):
        super().__init__()
        self.graph = Graph()
        self.constants = nn.Module()
        self.nodes = WeakTensorKeyDictionary()  # of each tensor that depends on the images
        self.nodes[pixel_values] = self.graph.placeholder("pixel_values")
        self.is_complete = True

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        depends_on_images = self.depends_on_images((arguments, options))
        if depends_on_images:
            operation, arguments = prepack_convolution(operation, arguments, self.depends_on_images)
        result = operation(*arguments, **options)
        if not all(map(self.depends_on_images, written_arguments(operation, arguments, options))):
            self.is_complete = False  # it changes a constant
        elif depends_on_images:
            self.record(operation, arguments, options, result)
        return result

    def depends_on_images(self, values) -> bool:
        return any(isinstance(value, torch.Tensor) and value in self.nodes for value in tree_leaves(values))

    def record(self, operation, arguments, options, result):
        outputs = result if isinstance(result, (list, tuple)) else [result]
        is_random = torch.Tag.nondeterministic_seeded in operation.tags
        if is_random or not all(isinstance(output, torch.Tensor) for output in outputs):
            self.is_complete = False  # a replay would repeat this call's random or Python number
            return
        node = self.graph.call_function(operation, *tree_map(self.node_of, (tuple(arguments), options)))
        for index, output in enumerate(outputs):
            is_only = output is result
            self.nodes[output] = node if is_only else self.graph.call_function(operator.getitem, (node, index))

    def node_of(self, value):
        """The value in the recording: a node for a tensor, anything else as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if value in self.nodes:
            return self.nodes[value]
        name = f"constant{len(self.constants._buffers)}"
        self.constants.register_buffer(name, value)
        return self.graph.get_attr(name)

    def finish(self, output: torch.Tensor) -> GraphModule | None:
        """The recording as a function of images, or `None` if it is not complete."""
        if not (self.is_complete and output in self.nodes):
            return None
        self.graph.output(self.nodes[output])
        return GraphModule(self.constants, self.graph)


def written_arguments(operation, arguments: Sequence, options: dict) -> list[torch.Tensor]:
    """The arguments that an operator changes."""
    if not operation._schema.is_mutable:
        return []
    named = {argument.name: value for argument, value in zip(operation._schema.arguments, arguments, strict=False)}
    written = [argument.name for argument in operation._schema.arguments if argument.is_write]
    return [value for name, value in (named | options).items() if name in written]
