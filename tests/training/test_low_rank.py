"""`birefnet.training.low_rank`: which parameters train, and that merging does not change the result."""

import pytest
import torch


pytest.importorskip("peft")
pytest.importorskip("timm")

from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
from birefnet.training.low_rank import add_low_rank_adapters, merged

from ..conftest import TINY_CONFIG


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG)).eval()


def test_adapters_and_decoder_train_and_the_backbone_does_not(model):
    decoder = {name for name, _ in model.named_parameters() if not name.startswith("bb.")}
    add_low_rank_adapters(model, 2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert decoder <= trained
    rest = trained - decoder
    assert rest and all(".lora_" in name for name in rest)


def test_adapters_start_as_nothing_and_merge_exactly(model):
    images = torch.randn(1, 3, 64, 64)
    before, names = model(images).logits, model.state_dict().keys()
    add_low_rank_adapters(model, 2)
    torch.testing.assert_close(model(images).logits, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    adapted = model(images).logits
    assert (adapted - before).abs().max() > 1e-4 * before.std()
    result = merged(model)
    torch.testing.assert_close(result(images).logits, adapted, rtol=1e-3, atol=1e-5)
    assert result.state_dict().keys() == names
    assert any(".lora_" in name for name in model.state_dict())  # The model in training keeps its adapters.
    torch.testing.assert_close(model(images).logits, adapted)


def test_linear_layers_of_a_transformer_are_adapted():
    with torch.device("meta"):
        model = BiRefNetForImageSegmentation(BiRefNetConfig(backbone="swin_v1_t"))
    add_low_rank_adapters(model, 4)
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}
    assert {f"bb.layers.0.blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")} <= adapted
    assert len(adapted) == 4 * 12 + 3


def test_model_without_adapters_is_itself(model):
    assert merged(model) is model
    with pytest.raises(ValueError, match="-1"):
        add_low_rank_adapters(model, -1)
