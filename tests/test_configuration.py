"""BiRefNetConfig: published defaults, validation, saving and loading."""

import json

import pytest

from birefnet.repository.configuration_birefnet import (
    ALLOWED_VALUES,
    DINO_V3_BACKBONES,
    SWIN_BACKBONES,
    BiRefNetConfig,
)


DEFAULTS = {
    "backbone": "swin_v1_l",
    "multi_scale_input": "concat",
    "context_levels": 3,
    "squeeze_block": "basic",
    "decoder_block": "basic",
    "decoder_attention": "aspp_deformable",
    "decoder_channels": 64,
    "source_reference": "patches",
    "gradient_reference": True,
    "multi_scale_supervision": True,
    "drop_path_rate": 0.2,
    "freeze_backbone": False,
    "task": "general",
    "loss_weights": None,
}


def test_defaults_are_those_of_the_general_checkpoint():
    config = BiRefNetConfig()
    assert {field: getattr(config, field) for field in DEFAULTS} == DEFAULTS
    assert config.model_type == "birefnet"
    assert config.id2label == {0: "background", 1: "foreground"}
    assert config.label2id == {"background": 0, "foreground": 1}


def test_round_trip_through_json(tmp_path):
    config = BiRefNetConfig(
        backbone="resnet18", decoder_channels=None, squeeze_block=None, context_levels=0, loss_weights={"bce": 1.0}
    )
    config.save_pretrained(tmp_path)
    loaded = BiRefNetConfig.from_pretrained(tmp_path)
    assert {field: getattr(loaded, field) for field in DEFAULTS} == {
        field: getattr(config, field) for field in DEFAULTS
    }
    assert (loaded.id2label, loaded.label2id) == (config.id2label, config.label2id)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageSegmentation",
        "AutoModelForSemanticSegmentation",
        "AutoImageProcessor",
    }
    assert written["custom_pipelines"]["background-removal"]["impl"] == "pipeline_birefnet.BiRefNetPipeline"


def test_auto_map_of_another_repository_is_replaced():
    config = BiRefNetConfig(auto_map={"AutoModel": "someone/else--modeling_birefnet.BiRefNetForImageSegmentation"})
    assert config.auto_map["AutoModel"] == "modeling_birefnet.BiRefNetForImageSegmentation"


@pytest.mark.parametrize("backbone", [*SWIN_BACKBONES, *DINO_V3_BACKBONES, "convnextv2_atto"])
def test_backbones_are_accepted(backbone):
    assert BiRefNetConfig(backbone=backbone).backbone == backbone


@pytest.mark.parametrize("field", ALLOWED_VALUES)
def test_unknown_values_are_refused_with_field_value_and_choices(field):
    with pytest.raises(ValueError, match=rf"{field}='nonsense'.*{ALLOWED_VALUES[field][0]!r}"):
        BiRefNetConfig(**{field: "nonsense"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "swin_v1_x"}, "swin_v1_x.*swin_v1_t"),
        ({"backbone": ""}, "backbone=''"),
        ({"decoder_channels": 0}, "decoder_channels=0"),
        ({"decoder_channels": True}, "decoder_channels=True"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0.*\[0, 1\)"),
        ({"gradient_reference": 1}, "gradient_reference=1"),
        ({"squeeze_block": None}, "squeeze_block=None needs context_levels=0"),
        ({"multi_scale_supervision": False}, "gradient_reference=True needs multi_scale_supervision=True"),
        ({"loss_weights": {"dice": 1.0}}, "'dice'.*bce"),
        ({"loss_weights": {"bce": -1.0}}, "-1.0"),
        ({"loss_weights": [1.0]}, "loss_weights"),
    ],
)
def test_impossible_combinations_and_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        BiRefNetConfig(**fields)
