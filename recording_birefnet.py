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
from functools import partial

import numpy
import torch
from torch import nn
from torch.fx import Graph, GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from .hardware_birefnet import is_worth_recording, prepack_convolution


# Recordings of a network, which differ in the images' shape. Each has its own copy of the weights.
RECORDINGS = 2
# Numbers of each parameter and buffer that are compared in each call. All of them would take 5 ms.
SAMPLES = 4
# Attributes that every module has.
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


class RecordedCalls:
    """
    The calls of a network: the first of several equal calls is recorded, and later ones are replayed.

    Calls are equal if the images have the same shape, dtype and memory layout, and the network has the
    same modules, attributes, configuration, parameters and buffers. PyTorch counts the changes of a tensor. It does
    not count changes in place through `.data`. Those are noticed if they change one of four numbers of a parameter.
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
        self.attributes = [vars(module) for module in self.modules]
        self.own_attributes = [operator.itemgetter(*own_names(attributes)) for attributes in self.attributes]
        contents = (vars(module)[name] for module in self.modules for name in ("_parameters", "_buffers", "_modules"))
        self.contents = [vars(network.config), *contents]
        self.values = list(self.current_values())
        self.number = self.current_number()
        self.next_hook = RemovableHandle.next_id
        counters = {id(vars(module)["_buffers"].get("num_batches_tracked")) for module in self.modules}
        tensors = (value for value in self.values if isinstance(value, torch.Tensor))
        self.tensors = [tensor for tensor in tensors if id(tensor) not in counters]  # only training uses the counters
        self.is_recordable = self._is_recordable()
        if self.is_recordable:
            self.samples = [sample(tensor) for tensor in self.tensors]
            self.numbers = self.current_numbers()

    def _is_recordable(self) -> bool:
        """Whether the network is small, in evaluation mode, on a CPU, and nothing watches or hides its tensors."""
        return (
            is_worth_recording(sum(tensor.numel() for tensor in self.tensors))
            and not self.is_watched()
            and not any(module.training for module in self.modules)
            # PyTorch does not count the changes of inference tensors.
            and all(tensor.is_cpu and not tensor.is_inference() for tensor in self.tensors)
        )

    def is_watched(self) -> bool:
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.modules)

    def is_unchanged(self, network: nn.Module) -> bool:
        if self.next_hook != RemovableHandle.next_id:  # somewhere, a hook has been registered
            if self.is_watched():
                return False
            self.next_hook = RemovableHandle.next_id
        return (
            self.modules[0] is network
            and self.number == self.current_number()
            and self.has_same_values()
            and self.numbers == self.current_numbers()
        )

    def has_same_values(self) -> bool:
        try:
            return all(map(operator.is_, self.current_values(), self.values))
        except KeyError:  # an attribute has been deleted and another one added
            return False

    def current_number(self) -> int:
        """Number of attributes, parameters, buffers, child modules and options."""
        return sum(map(len, self.attributes)) + sum(map(len, self.contents))

    def current_values(self) -> Iterator:
        """Parameters, buffers, child modules, options and attributes."""
        attributes = (get(values) for get, values in zip(self.own_attributes, self.attributes, strict=True))
        return itertools.chain.from_iterable(itertools.chain(map(dict.values, self.contents), attributes))

    def current_numbers(self) -> tuple[list[int], list[int], bytes]:
        """Address, number of changes and sample of each tensor."""
        versions = map(operator.attrgetter("_version"), self.tensors)
        return [*map(torch.Tensor.data_ptr, self.tensors)], [*versions], numpy.concatenate(self.samples).tobytes()


def own_names(attributes: dict) -> list[str]:
    """Names of a module's attributes, without the dictionaries of hooks that every module has and nobody replaces."""
    # At least two names, since `itemgetter` gives a tuple only then.
    return ["training", "_modules", *(name for name in attributes if name not in MODULE_ATTRIBUTES)]


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
        self.images = self.graph.placeholder("pixel_values")
        self.constants: list[torch.Tensor] = []
        self.nodes = WeakTensorKeyDictionary()  # of each tensor that depends on the images
        self.nodes[pixel_values] = self.images
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
        self.constants.append(value)
        with self.graph.inserting_before(self.images):
            return self.graph.placeholder(f"constant{len(self.constants)}")

    def finish(self, output: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """
        The recording as a function of images, or `None` if it is not complete.

        The constants are arguments of the recorded function. As attributes of a module, they would be looked up by
        name in each call.
        """
        if not (self.is_complete and output in self.nodes):
            return None
        self.graph.output(self.nodes[output])
        return partial(GraphModule(nn.Module(), self.graph).forward, *self.constants)


def written_arguments(operation, arguments: Sequence, options: dict) -> list[torch.Tensor]:
    """The arguments that an operator changes."""
    if not operation._schema.is_mutable:
        return []
    named = {argument.name: value for argument, value in zip(operation._schema.arguments, arguments, strict=False)}
    written = [argument.name for argument in operation._schema.arguments if argument.is_write]
    return [value for name, value in (named | options).items() if name in written]
