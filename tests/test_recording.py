"""Recordings of small networks: replayed results against computed ones, and everything that ends a recording."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from birefnet.inference.quantization import obstacle, quantize
from birefnet.repository import hardware_birefnet as hardware
from birefnet.repository import recording_birefnet as recording
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation


pytestmark = [pytest.mark.usefixtures("one_thread")]


def image(seed=0, side=64):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def loaded_model(tiny_model_folder):
    return BiRefNetForImageSegmentation.from_pretrained(tiny_model_folder).eval()


@pytest.fixture
def model(loaded_model):
    return copy.deepcopy(loaded_model)


def record(model, pixel_values=None):
    """A call, after which the model has a recording."""
    with torch.inference_mode():
        model(image() if pixel_values is None else pixel_values)
    return model


def has_recording(model) -> bool:
    last = model.recorded_calls.last
    return last is not None and any(isinstance(program, partial) for program in last.programs.values())


def assert_computes(model, pixel_values=None):
    """The next call returns what the network computes, not what it computed before."""
    pixel_values = image(1) if pixel_values is None else pixel_values
    with torch.inference_mode():
        found, expected = model(pixel_values).logits, model.compute_as_planned(pixel_values).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3 * expected.std().item())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_second_call_is_replayed_and_equal(model, mode, monkeypatch):
    batch = torch.cat([image(1), image(2)])
    with mode():
        expected = model.compute_as_planned(batch).logits
        model(torch.cat([image(), image()]))
        monkeypatch.setattr(type(model), "compute", None)
        found = model(batch).logits
    assert has_recording(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.std().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_arithmetic", [False, pytest.param(True, marks=pytest.mark.skipif(
    not hardware.has_avx512_bfloat16(), reason="this processor has no bfloat16 arithmetic"
))])  # fmt: skip
def test_half_precision_weights_are_converted_once(model, dtype, has_arithmetic, monkeypatch):
    for name in ("has_bfloat16_arithmetic", "has_avx512_bfloat16"):
        monkeypatch.setattr(hardware, name, lambda: has_arithmetic)
    record(model.to(dtype))
    with torch.inference_mode():
        expected = model.compute_as_planned(image(1)).logits
        monkeypatch.setattr(type(model), "compute", None)
        found = model(image(1)).logits
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    (program,) = model.recorded_calls.last.programs.values()
    dtypes = {constant.dtype for constant in program.args if constant.ndim == 4}
    assert dtypes == {torch.bfloat16 if has_arithmetic else torch.float32}


def head(model):
    return model.decoder.conv_out1[0]


def add_in_place(model):
    with torch.no_grad():
        head(model).weight[0, -1] += 1


def add_to_data(model):
    head(model).bias.data += 1


def add_to_data_of_a_kernel(model):
    model.decoder.decoder_block1.conv_in.weight.data *= 1.5


def replace_data(model):
    head(model).weight.data = head(model).weight.data + 1


def replace_parameter(model):
    head(model).weight = nn.Parameter(head(model).weight.detach() + 1)


def replace_module(model):
    model.decoder.conv_out1[0] = copy.deepcopy(head(model))
    nn.init.ones_(head(model).bias)


def change_statistics(model):
    model.decoder.decoder_block1.bn_in.running_mean += 1


def load_other_weights(model):
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})


def convert_and_convert_back(model):
    model.bfloat16().float()


CHANGES = [
    add_in_place,
    add_to_data,
    add_to_data_of_a_kernel,
    replace_data,
    replace_parameter,
    replace_module,
    change_statistics,
    load_other_weights,
    convert_and_convert_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_parameters_end_the_recording(model, change):
    before = record(model).compute_as_planned(image(1)).logits
    snapshot = model.recorded_calls.last
    change(model)
    assert_computes(model)
    assert model.recorded_calls.last is not snapshot
    assert not torch.equal(before, model.compute_as_planned(image(1)).logits)
    assert has_recording(record(model))
    assert_computes(model)


def test_one_optimizer_step_ends_the_recording(model):
    record(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(image(), labels=torch.ones(1, 64, 64)).loss.backward()
    optimizer.step()
    assert model.recorded_calls.last is None
    model.eval()
    assert_computes(model)


def test_all_calls_give_the_same_result_to_the_last_bit(model):
    other = copy.deepcopy(model)
    with torch.inference_mode():
        first = model(image(1)).logits
        model(image(2))
        assert torch.equal(model(image(1)).logits, first)
        other(image(2))
        assert torch.equal(other(image(1)).logits, first)


def test_images_of_other_shapes_have_their_own_recordings(model):
    shapes = (image(), image(side=96), image().to(memory_format=torch.channels_last), torch.cat([image(), image()]))
    for pixel_values in shapes:
        record(model, pixel_values)
        assert_computes(model, pixel_values)
        programs = list(model.recorded_calls.last.programs.values())
        assert len(programs) <= recording.RECORDINGS
        assert isinstance(programs[-1], partial)
    for pixel_values in shapes:
        assert_computes(model, pixel_values)


def test_hooks_are_called(model):
    calls = []
    hook = record(model).decoder.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        record(model)
    assert len(calls) == 2
    hook.remove()
    with nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1)):
        record(model)
    assert len(calls) > 10


def test_hooks_of_other_modules_do_not_end_the_recording(model):
    snapshot = record(model).recorded_calls.last
    nn.Linear(2, 2).register_forward_hook(lambda *_: None)
    record(model)
    assert model.recorded_calls.last is snapshot


def test_a_layer_in_an_empty_container_ends_the_recording(model):
    model.decoder.conv_out1.append(nn.Sequential().eval())
    record(model).decoder.conv_out1[-1].append(nn.Identity().eval())
    assert not model.recorded_calls.last.is_unchanged(model)


def test_an_attribute_in_place_of_another_one_ends_the_recording(model):
    snapshot = record(model).recorded_calls.last
    model.decoder.conv_out1[0].__dict__["renamed"] = model.decoder.conv_out1[0].__dict__.pop("padding_mode")
    assert not snapshot.is_unchanged(model)


def test_replaced_forward_passes_are_called(model, monkeypatch):
    record(model)
    forward = model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda *arguments: (forward(*arguments)[0] + 1, {}))
    assert_computes(model)


def test_changed_configuration_ends_the_recording(model):
    snapshot = record(model).recorded_calls.last
    model.config.decoder_attention = "aspp"  # the network looks at some options in each call
    assert_computes(model)
    assert model.recorded_calls.last is not snapshot


def test_contexts_that_change_the_arithmetic_are_neither_recorded_nor_replayed(model):
    record(model)
    with torch.inference_mode():
        expected = model(image()).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(model(image()).logits, expected)
        weights = {name: parameter + 1 for name, parameter in model.named_parameters()}
        assert not torch.equal(torch.func.functional_call(model, weights, (image(),)).logits, expected)
        if obstacle(torch.device("cpu")) is None:
            assert not has_recording(record(quantize(copy.deepcopy(model))))
        torch.testing.assert_close(model(image()).logits, expected)


def test_gradients_labels_and_features_are_computed(model):
    record(model)
    assert model(image()).logits.requires_grad
    assert model.recorded_calls.last is None  # its memory is free for the training
    with torch.inference_mode():
        output = model(image(), labels=torch.ones(1, 64, 64), output_hidden_states=True)
        assert output.loss.item() > 0
        assert len(output.hidden_states) == 4
        assert isinstance(model(image(), return_dict=False), tuple)


def test_large_networks_have_no_recording(model, monkeypatch):
    monkeypatch.setattr(hardware, "RECORDED_PARAMETERS", 1000)
    assert record(model).recorded_calls.last is None


def test_copies_and_files_have_no_recording(model):
    keys = list(model.state_dict())
    record(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.recorded_calls.last is None
        assert_computes(other)
    assert_computes(copy.copy(model))
    record(model)
    assert has_recording(model)
    assert list(model.state_dict()) == keys
    assert not model.decoder.conv_out1[0].weight.is_inference()


@pytest.mark.parametrize(
    "function",
    [
        lambda maps: maps * maps.sum().item(),
        lambda maps: maps + torch.rand_like(maps),
        lambda maps: maps + torch.zeros(3).add_(1).sum(),
        lambda maps: torch.ones(1),
    ],
    ids=["Python number", "random", "changed constant", "constant"],
)
def test_functions_that_cannot_be_replayed_are_not_recorded(function):
    pixel_values = image()
    with torch.inference_mode(), recording.Recorder(pixel_values) as recorder:
        output = function(pixel_values)
    assert recorder.finish(output) is None


def test_recording_follows_views_lists_and_changes_in_place():
    def function(maps):
        first, second, third = maps.split(1, dim=1)
        first.add_(second)
        return torch.cat([maps.relu_(), third.sum(dim=1, keepdim=True), torch.ones(1, 1, 64, 64)], dim=1)

    with torch.inference_mode():
        pixel_values = image()
        with recording.Recorder(pixel_values) as recorder:
            output = function(pixel_values)
        program = recorder.finish(output)
        assert torch.equal(program(image(1)), function(image(1)))


CONVOLUTIONS = [
    {},
    {"padding": 1},
    {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"groups": 4},
]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("options", CONVOLUTIONS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_prepacked_convolutions_are_equal(options, layout, mode):
    generator = torch.Generator().manual_seed(0)
    maps, others = (torch.randn(2, 8, 12, 10, generator=generator).to(memory_format=layout) for _ in range(2))
    weight = torch.randn(16, 8 // options.get("groups", 1), 3, 3, generator=generator)
    bias = torch.randn(16, generator=generator)
    with mode():
        with recording.Recorder(maps) as recorder:
            output = F.conv2d(maps, weight, bias, **options)
        program = recorder.finish(output)
        torch.testing.assert_close(program(others), F.conv2d(others, weight, bias, **options), rtol=1e-4, atol=1e-4)
    is_prepacked = any(constant.layout == torch._mkldnn for constant in program.args)
    assert is_prepacked == (layout == torch.channels_last)
