"""`birefnet.compile`: which calls become graphs, and that the network can become one. No GPU is needed."""

import copy
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import birefnet
from birefnet.inference import compilation
from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

from ..conftest import TINY_CONFIG


class RecordedGraph:
    """Stands in for a CUDA graph: runs the function once, and again at each replay on its own input."""

    made = 0

    def __init__(self, function, example):
        RecordedGraph.made += 1
        self.function, self.input = function, example.clone()

    def __call__(self, pixel_values):
        self.input.copy_(pixel_values)
        return self.function(self.input)


@pytest.fixture(scope="module")
def tiny_model():
    pytest.importorskip("timm", reason="the tiny backbone is timm's")
    torch.manual_seed(0)
    return BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG)).eval()


@pytest.fixture
def model(tiny_model, monkeypatch):
    """A model that takes itself to be on a GPU, with recorded graphs instead of CUDA's."""
    monkeypatch.setattr(RecordedGraph, "made", 0)
    monkeypatch.setattr(compilation, "CudaGraph", RecordedGraph)
    model = copy.deepcopy(tiny_model)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    return model


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_shape_is_captured_once_and_results_are_the_models(model):
    expected = {side: copy.deepcopy(model) for side in (32, 64)}
    assert birefnet.compile(model) is model
    assert birefnet.compile(model).captured_graphs is model.captured_graphs  # a second call changes nothing
    with torch.inference_mode():
        for seed in range(2):
            for side, plain in expected.items():
                photo = images(1, 3, side, side, seed=seed)
                assert torch.equal(model(photo).logits, plain(photo).logits)
    with torch.no_grad():  # the graph's input was made in inference mode
        assert torch.equal(model(images(1, 3, 64, 64)).logits, expected[64](images(1, 3, 64, 64)).logits)
    assert RecordedGraph.made == 2


def test_calls_that_a_graph_cannot_serve_run_without_one(model):
    birefnet.compile(model)
    photo, labels = images(2, 3, 32, 32), torch.ones(2, 1, 32, 32)
    assert model(photo).logits.requires_grad
    with torch.inference_mode():
        assert model(photo, labels=labels).loss is not None
        assert len(model(photo, output_hidden_states=True).hidden_states) == 4
        assert isinstance(model(photo, return_dict=False), tuple)
    model.train()
    with torch.no_grad():
        assert model(photo).auxiliary_logits is not None
    assert RecordedGraph.made == 0


def test_other_weights_are_captured_anew_and_the_oldest_shapes_are_dropped(model, monkeypatch):
    monkeypatch.setattr(compilation, "KEPT_SHAPES", 2)
    birefnet.compile(model)
    with torch.inference_mode():
        for side in (32, 64, 32, 96, 32):  # 96 takes the place of 64
            model(images(1, 3, side, side))
        assert RecordedGraph.made == 3
        model(images(1, 3, 64, 64))
        assert RecordedGraph.made == 4
        model.bfloat16()
        assert model(images(1, 3, 64, 64)).logits.dtype == torch.bfloat16
        assert RecordedGraph.made == 5


def test_on_a_cpu_the_model_stays_as_it_is_and_a_warning_says_so(tiny_model, caplog):
    with caplog.at_level(logging.WARNING):
        assert birefnet.compile(tiny_model) is tiny_model
    assert "forward" not in vars(tiny_model)
    assert "changes nothing on cpu" in caplog.text


def test_a_model_in_training_is_refused(model):
    with pytest.raises(ValueError, match="eval"):
        birefnet.compile(model.train())


class NothingFromTheHost(TorchDispatchMode):
    """Fails at what a CUDA graph cannot capture: values read by Python, and tensors copied from the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        assert "_local_scalar_dense" not in str(function) and "nonzero" not in str(function), function
        tensors = [value for value in torch.utils._pytree.tree_leaves((arguments, options)) if torch.is_tensor(value)]
        assert all(value.device.type == "meta" or value.ndim == 0 for value in tensors), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("backbone", ["swin_v1_t", "test_efficientnet"])
def test_the_network_needs_nothing_from_the_host(backbone):
    """On the meta device, the network runs as on a GPU: without the functions for CPUs."""
    if not backbone.startswith("swin"):
        pytest.importorskip("timm", reason="the backbone is timm's")
    with torch.device("meta"):
        model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone=backbone)).eval().half()
        photo = torch.empty(2, 3, 160, 96)
    with torch.inference_mode(), NothingFromTheHost():
        assert model(photo).logits.shape == (2, 1, 160, 96)
