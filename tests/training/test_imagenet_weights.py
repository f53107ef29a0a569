"""`birefnet.training.imagenet_weights`, with random weights in place of downloaded ones."""

import pytest
import torch


pytest.importorskip("timm")

import timm
from safetensors.torch import save_file

from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
from birefnet.training.imagenet_weights import SWIN_SOURCES, load_imagenet_weights, rename_swin

from ..conftest import TINY_CONFIG


@pytest.fixture
def offline_timm(monkeypatch):
    """`timm.create_model(pretrained=True)` makes random weights and keeps the model."""
    made, create_model = [], timm.create_model

    def create(name, pretrained=False, **options):
        model = create_model(name, **options)
        if pretrained:
            made.append((name, model))
        return model

    monkeypatch.setattr(timm, "create_model", create)
    return made


def test_swin_computes_what_timm_computes(offline_timm):
    torch.manual_seed(0)
    model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone="swin_v1_t", drop_path_rate=0.0)).eval()
    load_imagenet_weights(model)
    name, source = offline_timm[0]
    assert name == "swin_tiny_patch4_window7_224.ms_in22k"
    source.eval()
    images = torch.randn(1, 3, 224, 224)
    features, mine = source.patch_embed(images), model.bb(images)
    # Without the last stage. Its map is a single window here, which timm does not shift and the official code does.
    for i in range(3):
        features = source.layers[i](features)  # (B, H, W, C)
        expected = getattr(model.bb, f"norm{i}")(features).permute(0, 3, 1, 2)
        torch.testing.assert_close(mine[i], expected, rtol=1e-3, atol=1e-4)


def test_timm_backbone_gets_every_weight(offline_timm):
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG))
    load_imagenet_weights(model)
    (_, source), mine = offline_timm[0], model.bb.state_dict()
    assert source.state_dict().keys() == mine.keys()
    assert all(torch.equal(value, mine[key]) for key, value in source.state_dict().items())


def test_sources_have_the_shapes_of_the_official_backbones():
    for backbone, name in SWIN_SOURCES.items():
        with torch.device("meta"):
            source = timm.create_model(name)
            model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone=backbone))
        mine = {key: value.shape for key, value in model.bb.state_dict().items()}
        shapes = {key: value.shape for key, value in rename_swin(source.state_dict()).items()}
        assert {key: mine[key] for key in shapes if key in mine} == shapes
        missing = [key for key in mine.keys() - shapes.keys() if "relative_position_index" not in key]
        assert sorted(missing) == sorted(f"norm{i}.{part}" for i in range(4) for part in ("weight", "bias"))


def test_weights_out_of_reach_are_an_error_that_names_them(monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("no route to host")

    model = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG))
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(OSError, match=r"test_resnet cannot be loaded: no route"):
        load_imagenet_weights(model)


# Weights of a file


def test_file_with_timms_names_fills_the_backbone(tmp_path):
    source = timm.create_model("test_resnet").state_dict()
    torch.save(source, tmp_path / "weights.pth")
    assert_filled(tmp_path / "weights.pth", source)


def test_file_with_other_names_in_the_same_order_fills_the_backbone(tmp_path):
    source = timm.create_model("test_resnet").state_dict()
    torch.save({f"port.{i}": tensor for i, tensor in enumerate(source.values())}, tmp_path / "weights.pth")
    assert_filled(tmp_path / "weights.pth", source)


def assert_filled(file, source):
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG))
    load_imagenet_weights(model, file)
    mine = model.bb.state_dict()
    assert mine.keys() == source.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, source[key]) for key, value in mine.items())


def test_file_fills_a_swin_backbone(tmp_path):
    source = timm.create_model(SWIN_SOURCES["swin_v1_t"]).state_dict()
    save_file(source, tmp_path / "weights.safetensors")
    model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone="swin_v1_t"))
    load_imagenet_weights(model, tmp_path / "weights.safetensors")
    expected, mine = rename_swin(source), model.bb.state_dict()
    assert all(torch.equal(mine[key], value) for key, value in expected.items() if key in mine)


@pytest.mark.parametrize("prefix", ["", "port."], ids=["timm's names", "other names"])
@pytest.mark.parametrize("wrong", ["conv1.0.weight", "one.more"], ids=["shape", "number"])
def test_file_of_another_network_is_refused(tmp_path, prefix, wrong):
    weights = {**timm.create_model("test_resnet").state_dict(), wrong: torch.zeros(2)}
    torch.save({prefix + name: tensor for name, tensor in weights.items()}, tmp_path / "weights.pth")
    with pytest.raises(OSError, match=r"weights\.pth.*test_resnet"):
        load_imagenet_weights(BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG)), tmp_path / "weights.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"absent\.pth"):
        load_imagenet_weights(BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG)), tmp_path / "absent.pth")
