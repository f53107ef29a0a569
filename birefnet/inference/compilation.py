"""`birefnet.compile(model)`: replays the network as one CUDA graph for each input shape."""

import logging
import threading
from collections import OrderedDict
from types import MethodType

import torch


logger = logging.getLogger(__name__)

# Graphs of so many input shapes are kept. Each keeps its input, its logits and the memory between them.
KEPT_SHAPES = 8
WARM_UP_CALLS = 3  # PyTorch's recommendation before a capture


def compile_model(model):
    """
    Make a model on a GPU run as CUDA graphs. See [`birefnet.compile`].

    Args:
        model (`BiRefNetForImageSegmentation`): Model in evaluation mode.

    Returns:
        The same model.
    """
    if model.training:
        raise ValueError("birefnet.compile is for inference: call the model's `eval()` first.")
    if model.device.type != "cuda":
        logger.warning("birefnet.compile changes nothing on %s: it is for CUDA GPUs.", model.device)
        return model
    if not isinstance(model.__dict__.get("forward"), MethodType):  # not compiled already
        model.forward = MethodType(_forward_by_graph, model)
        model.captured_graphs = CapturedGraphs(type(model).forward, CudaGraph)
    return model


def _forward_by_graph(self, pixel_values, labels=None, output_hidden_states=None, return_dict=None):
    options = (labels, output_hidden_states, return_dict)
    if self.training or torch.is_grad_enabled() or options != (None, None, None):
        return type(self).forward(self, pixel_values, *options)
    return self.captured_graphs(self, pixel_values)


class CapturedGraphs:
    """
    The graphs of one model, one for each shape and dtype of its input.

    Args:
        forward: Function of the model and `pixel_values`.
        make_graph: Function of a function and its input that returns a graph, such as [`CudaGraph`].
    """

    def __init__(self, forward, make_graph):
        self.forward = forward
        self.make_graph = make_graph
        self.graphs = OrderedDict()  # the last one was used last
        self.lock = threading.Lock()  # a graph has one input and one output in memory

    def __call__(self, model, pixel_values):
        weight = next(model.parameters())
        # Also the place of the weights: a model that was moved or cast has other weights in memory.
        key = (tuple(pixel_values.shape), pixel_values.dtype, weight.device, weight.dtype, weight.data_ptr())
        with self.lock:
            graph = self.graphs.pop(key, None)
            if graph is None:
                # A tensor made in inference mode could not take the input of a later call outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    images = pixel_values.to(weight.device)
                    graph = self.make_graph(lambda images: self.forward(model, images), images)
            self.graphs[key] = graph
            while len(self.graphs) > KEPT_SHAPES:
                self.graphs.popitem(last=False)
            return graph(pixel_values)


class CudaGraph:
    """
    A function of one tensor, captured as a CUDA graph.

    Args:
        function: Function of a tensor that returns a model output with `logits`.
        example: Tensor (B, 3, H, W) on the GPU, of the shape and dtype of all later inputs.
    """

    def __init__(self, function, example):
        self.input = example.clone()
        stream = torch.cuda.Stream(example.device)
        stream.wait_stream(torch.cuda.current_stream(example.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                function(self.input)
        torch.cuda.current_stream(example.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.output = function(self.input)

    def __call__(self, pixel_values):
        self.input.copy_(pixel_values)
        self.graph.replay()
        # The next replay overwrites the graph's own output.
        return type(self.output)(logits=self.output.logits.clone())
