"""Checkpoints from elsewhere: wrappers, index buffers, inferred configurations, damaged files."""

import pytest
import torch
from safetensors.torch import save_file

from birefnet.repository.checkpoint_birefnet import (
    backbone_of,
    clean_state_dict,
    config_from_state_dict,
    read_checkpoint,
)
from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation


FIELDS = {"backbone": "swin_v1_t", "decoder_channels": 8, "decoder_attention": None}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BiRefNetForImageSegmentation(BiRefNetConfig(**FIELDS)).eval()


def empty_model(**fields):
    with torch.device("meta"):
        return BiRefNetForImageSegmentation(BiRefNetConfig(**{**FIELDS, **fields}))


def assert_equal(found, model):
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_wrapped_models_load(model, prefix, suffix, tmp_path):
    state_dict = {prefix + key: value.contiguous() for key, value in model.state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(state_dict, path) if suffix == ".pth" else save_file(state_dict, path)
    loaded, report = BiRefNetForImageSegmentation.from_pretrained(path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.backbone == "swin_v1_t" and loaded.config.decoder_attention is None
    assert_equal(loaded.state_dict(), model)
    other = empty_model()
    other.load_state_dict(read_checkpoint(path), strict=True, assign=True)
    assert_equal(other.state_dict(), model)


def test_index_buffers_in_half_precision_or_missing(model, tmp_path):
    half = {key: value.half() if value.dtype == torch.int64 else value for key, value in model.state_dict().items()}
    assert_equal(clean_state_dict(half), model)
    lacking = {key: value for key, value in model.state_dict().items() if value.dtype != torch.int64}
    assert_equal({key: clean_state_dict(lacking)[key] for key in model.state_dict()}, model)
    path = tmp_path / "lacking.pth"
    torch.save({"state_dict": lacking, "epoch": 3}, path)
    assert_equal(BiRefNetForImageSegmentation.from_pretrained(path).state_dict(), model)


@pytest.mark.parametrize(
    "fields",
    [
        {"context_levels": 0, "squeeze_block": None},
        {"squeeze_block": "residual", "decoder_block": "residual"},
        {"squeeze_block": "aspp", "context_levels": 0},
        {"squeeze_block": "aspp_deformable", "decoder_attention": "aspp"},
        {"decoder_attention": "aspp_deformable", "decoder_channels": None},
        {"source_reference": "image", "gradient_reference": False},
        {"source_reference": None, "gradient_reference": False, "multi_scale_supervision": False},
        {"backbone": "swin_v1_l"},
        {"backbone": "swin_v1_b"},
        {"backbone": "swin_v1_s"},
    ],
)
def test_the_configuration_is_inferred_from_the_tensors(fields):
    fields = {**FIELDS, **fields}
    with torch.device("meta"):
        state_dict = BiRefNetForImageSegmentation(BiRefNetConfig(**fields)).state_dict()
    found = config_from_state_dict(state_dict)
    assert {field: getattr(found, field) for field in fields} == fields


@pytest.mark.parametrize("multi_scale_input", ["add", None])
def test_fields_that_the_tensors_do_not_determine_have_to_be_given(multi_scale_input):
    state_dict = empty_model(multi_scale_input=multi_scale_input).state_dict()
    with pytest.raises(ValueError, match="multi_scale_input cannot be inferred"):
        config_from_state_dict(state_dict)
    assert config_from_state_dict(state_dict, multi_scale_input=multi_scale_input).context_levels == 3


def test_another_backbone_is_refused_with_its_name(model, tmp_path):
    assert backbone_of(model.state_dict()) == "swin_v1_t"
    with pytest.raises(ValueError, match="'swin_v1_t'.*model has 'swin_v1_s'"):
        empty_model(backbone="swin_v1_s").load_state_dict(model.state_dict())
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(ValueError, match="'swin_v1_t'.*model has 'swin_v1_l'"):
        BiRefNetForImageSegmentation.from_pretrained(path, config=BiRefNetConfig())


def test_the_old_layout_is_refused_with_its_date(model, tmp_path):
    old = {key: value for key, value in model.state_dict().items() if "ipt_blk5" not in key}
    with pytest.raises(ValueError, match=r"old layout .*before 2 May 2024"):
        empty_model().load_state_dict(old)
    path = tmp_path / "old.pth"
    torch.save(old, path)
    with pytest.raises(ValueError, match="old layout"):
        BiRefNetForImageSegmentation.from_pretrained(path)


def test_other_files_are_refused(tmp_path):
    class Anything:
        pass

    path = tmp_path / "weights.pth"
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="weights.pth"):
        read_checkpoint(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="no state dict"):
        read_checkpoint(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not the weights of a BiRefNet.*weight"):
        BiRefNetForImageSegmentation.from_pretrained(path)
    truncated = tmp_path / "weights.safetensors"
    truncated.write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="weights.safetensors"):
        read_checkpoint(truncated)
    with pytest.raises(FileNotFoundError, match="missing.pth"):
        read_checkpoint(tmp_path / "missing.pth")
