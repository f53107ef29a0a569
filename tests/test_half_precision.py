"""Half-precision checkpoints on CPUs: the chosen arithmetic, and results against float32 from the same weights."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from birefnet.repository import hardware_birefnet as hardware
from birefnet.repository.configuration_birefnet import SWIN_BACKBONES, BiRefNetConfig
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

from . import reference_weights


needs_bfloat16 = pytest.mark.skipif(
    not hardware.has_avx512_bfloat16(), reason="this processor has no bfloat16 arithmetic"
)
# As in the official repositories: nothing in it describes the network.
OFFICIAL_CONFIG = {
    "_name_or_path": "ZhengPeng7/BiRefNet",
    "architectures": ["BiRefNet"],
    "auto_map": {
        "AutoConfig": "BiRefNet_config.BiRefNetConfig",
        "AutoModelForImageSegmentation": "birefnet.BiRefNet",
    },
    "custom_pipelines": {"image-segmentation": {"pt": ["AutoModelForImageSegmentation"], "tf": [], "type": "image"}},
    "bb_pretrained": False,
}


@pytest.fixture(scope="module")
def official_folder(tmp_path_factory):
    """A float16 checkpoint in the exact form of the official ones, of a Swin of 32 channels and five blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWIN_BACKBONES, "swin_v1_t", (32, (1, 1, 2, 1), (1, 2, 4, 8), 7))
        state_dict = BiRefNetForImageSegmentation(BiRefNetConfig(backbone="swin_v1_t")).state_dict()
        manifest = {key: (tuple(value.shape), str(value.dtype)[6:]) for key, value in state_dict.items()}
        state_dict.update(reference_weights.state_dict(manifest))
        state_dict = {key: value.half() if value.is_floating_point() else value for key, value in state_dict.items()}
        folder = tmp_path_factory.mktemp("official")
        save_file(state_dict, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(OFFICIAL_CONFIG))
        yield folder


def force(monkeypatch, arithmetic):
    for name in ("has_bfloat16_arithmetic", "has_avx512_bfloat16"):
        monkeypatch.setattr(hardware, name, lambda: arithmetic == torch.bfloat16)


class DtypesOfProducts(TorchDispatchMode):
    """Records the dtypes of the operands of all convolutions, matrix products and norms."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(word in str(function) for word in ("conv", "mm", "linear", "norm", "attention")):
            self.found |= {a.dtype for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point()}
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(
    ("device", "weights", "has_arithmetic", "expected"),
    [
        ("cpu", torch.float32, True, (torch.float32, torch.float32)),
        ("cpu", torch.float64, False, (torch.float64, torch.float64)),
        ("cpu", torch.bfloat16, True, (torch.bfloat16, torch.bfloat16)),
        ("cpu", torch.bfloat16, False, (torch.bfloat16, torch.float32)),
        ("cpu", torch.float16, True, (torch.float16, torch.bfloat16)),
        ("cpu", torch.float16, False, (torch.float16, torch.float32)),
        ("cpu", None, True, (torch.float32, torch.float32)),
        ("cuda", None, True, (torch.float16, torch.float16)),
        ("cuda", torch.bfloat16, False, (torch.bfloat16, torch.bfloat16)),
        (torch.device("mps"), torch.float32, False, (torch.float32, torch.float32)),
    ],
)
def test_plan_depends_on_device_processor_and_weights(monkeypatch, device, weights, has_arithmetic, expected):
    monkeypatch.setattr(hardware, "has_bfloat16_arithmetic", lambda: has_arithmetic)
    assert hardware.compute_plan(device, weights) == expected


@pytest.mark.parametrize(
    ("machine", "avx512", "capability", "onednn", "expected"),
    [
        ("x86_64", True, "AVX512", True, True),
        ("x86_64", True, "AVX2", True, False),  # ATEN_CPU_CAPABILITY=avx2
        ("AMD64", False, "AVX512", True, False),
        ("aarch64", False, "SVE256", True, True),
        ("arm64", False, "DEFAULT", False, False),
    ],
)
def test_processors_with_bfloat16_arithmetic(monkeypatch, machine, avx512, capability, onednn, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert hardware.has_bfloat16_arithmetic() == expected


def test_plan_keeps_weights_in_float16_if_memory_is_short(monkeypatch):
    monkeypatch.setattr(hardware, "available_memory", lambda: 2**30)
    force(monkeypatch, torch.float32)
    assert hardware.compute_plan("cpu", parameters=220_000_000) == (torch.float16, torch.float32)
    assert hardware.compute_plan("cpu", parameters=44_000_000) == (torch.float32, torch.float32)
    monkeypatch.undo()
    assert hardware.available_memory() > 2**20


@pytest.mark.parametrize(
    ("arithmetic", "tolerance"),
    [(torch.float32, 2e-4), pytest.param(torch.bfloat16, 2e-3, marks=needs_bfloat16)],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_official_float16_checkpoint_is_close_to_float32(
    monkeypatch, official_folder, arithmetic, tolerance, attention, caplog, recwarn
):
    force(monkeypatch, arithmetic)
    model = BiRefNetForImageSegmentation.from_pretrained(official_folder, attn_implementation=attention).eval()
    exact = BiRefNetForImageSegmentation.from_pretrained(official_folder, dtype=torch.float32).eval()
    assert model.dtype == torch.float16  # with dtype="auto", the default of transformers
    pixel_values = reference_weights.image("half", 1, 128, 192)
    with torch.inference_mode(), DtypesOfProducts() as products:
        output = model(pixel_values, output_hidden_states=True)
    with torch.inference_mode():
        expected = exact(pixel_values).logits.sigmoid()
    assert products.found == {arithmetic, torch.float32}  # float32: normalisation inside bfloat16 norms
    assert output.logits.dtype == torch.float16
    assert {maps.dtype for maps in output.hidden_states} == {torch.float16}
    assert (output.logits.float().sigmoid() - expected).abs().mean() < tolerance
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16, torch.int64}
    assert not caplog.records and not recwarn.list


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16])
def test_float32_arithmetic_gives_the_results_of_float32_weights(monkeypatch, official_folder, weights):
    """Not only close: nothing but the conversion of the logits is rounded."""
    force(monkeypatch, torch.float32)
    model = BiRefNetForImageSegmentation.from_pretrained(official_folder, dtype=weights).eval()
    exact = BiRefNetForImageSegmentation.from_pretrained(official_folder, dtype=weights).float().eval()
    pixel_values, labels = reference_weights.image("half", 2, 96, 64), reference_weights.label("half", 2, 96, 64)
    with torch.inference_mode():
        found, expected = model(pixel_values, labels=labels), exact(pixel_values, labels=labels)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    allowed = 2 * torch.finfo(weights).eps * expected.logits.abs() + 1e-4
    assert ((found.logits.float() - expected.logits).abs() <= allowed).all()


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_efficientnet", "test_nfnet"])
@pytest.mark.parametrize("arithmetic", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
def test_timm_backbones_in_float16(monkeypatch, backbone, arithmetic):
    pytest.importorskip("timm", reason="the backbones are timm's")
    force(monkeypatch, arithmetic)
    torch.manual_seed(0)
    side = 160
    fields = {"decoder_channels": 8, "decoder_attention": "aspp", "multi_scale_input": None}
    model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone=backbone, **fields)).eval().half()
    pixel_values = reference_weights.image("timm", 1, side, side)
    with torch.inference_mode(), DtypesOfProducts() as products:
        found = model(pixel_values).logits
    with torch.inference_mode():
        expected = model.float()(pixel_values).logits
    assert torch.float16 not in products.found and found.dtype == torch.float16
    assert (found.float().sigmoid() - expected.sigmoid()).abs().mean() < 2e-3


def test_training_and_graphs_keep_the_dtype_of_the_weights(monkeypatch, official_folder):
    """The running statistics of a norm change in training, and a converted copy of them would be lost."""
    force(monkeypatch, torch.float32)
    model = BiRefNetForImageSegmentation.from_pretrained(official_folder, dtype=torch.bfloat16).train()
    before = model.decoder.decoder_block1.bn_in.running_mean.clone()
    model(reference_weights.image("half", 2, 32, 32), labels=torch.rand(2, 32, 32)).loss.backward()
    assert not torch.equal(model.decoder.decoder_block1.bn_in.running_mean, before)
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.bfloat16}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.inference_mode(), DtypesOfProducts() as products:
        model.eval()(reference_weights.image("half", 1, 32, 32))
    assert torch.bfloat16 in products.found
