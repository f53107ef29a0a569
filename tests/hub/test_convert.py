"""Conversion of all kinds of checkpoints, in both directions, and the exact form of official files."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from birefnet.command_line import main
from birefnet.hub.checkpoints import (
    build_config,
    is_old_layout,
    model_from_state_dict,
    read_state_dict,
    reorder_patches,
    upgrade_old_layout,
)
from birefnet.hub.folders import official_config, write_weights
from birefnet.repository import decoder_birefnet
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

from .. import reference_weights
from ..conftest import TINY_CONFIG


# Hashes of the official networks' tensors: one "name shape dtype" per line, sorted.
MANIFESTS = {
    "swin_v1_l": "a657e3cfbf4b901eec2e2534098246f189ef1ac15370af8d2cdc7076937534da",
    "swin_v1_t": "1832dd50b365b30eda6d4488912388e93da3275f347d2152c91aea8c4482b224",
}
PUBLISHED_BYTES = {
    ("swin_v1_l", torch.float32): 884_878_856,
    ("swin_v1_l", torch.float16): 444_473_596,
    ("swin_v1_t", torch.float32): 177_634_392,
    ("swin_v1_t", torch.float16): 88_965_896,
}


def manifest_digest(state_dict):
    lines = sorted(f"{key} {list(value.shape)} {str(value.dtype)[6:]}" for key, value in state_dict.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("backbone", MANIFESTS)
def test_complete_state_dicts_have_the_published_names_shapes_and_bytes(backbone, tmp_path):
    with torch.device("meta"):
        model = BiRefNetForImageSegmentation(build_config({"backbone": backbone}))
    assert manifest_digest(model.state_dict()) == MANIFESTS[backbone]
    if shutil.disk_usage(tmp_path).free < 4e9:
        pytest.skip("needs 4 GB of disk for the files")

    for dtype in (torch.float32, torch.float16):
        file = tmp_path / "model.safetensors"
        write_weights(file, model.to_empty(device="cpu").to(dtype).state_dict())
        assert file.stat().st_size == PUBLISHED_BYTES[backbone, dtype]
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        file.unlink()


@pytest.fixture(scope="module")
def lite():
    """The lite network with random weights, as a complete state dict in half precision."""
    torch.manual_seed(0)
    model = BiRefNetForImageSegmentation(build_config({"backbone": "swin_v1_t"})).eval()
    return {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}


def logits(model, dtype=torch.float32):
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model.eval().to(dtype)(image.to(dtype)).logits


def test_a_distributed_and_compiled_half_precision_checkpoint_becomes_a_complete_folder(lite, tmp_path, capsys):
    # As the releases of 2025: all tensors in half precision, index buffers too, both prefixes, some buffers missing.
    foreign = {f"module._orig_mod.{key}": value.half() for key, value in lite.items()}
    foreign.pop("module._orig_mod.bb.layers.0.blocks.0.attn.relative_position_index")
    foreign.pop("module._orig_mod.decoder.decoder_block1.bn_in.num_batches_tracked")
    torch.save(foreign, tmp_path / "epoch_110.pth")

    assert main(["convert", str(tmp_path / "epoch_110.pth"), str(tmp_path / "out"), "--variant", "lite-matting"]) == 0
    out = tmp_path / "out"
    assert (out / "model.safetensors").stat().st_size == PUBLISHED_BYTES["swin_v1_t", torch.float16]
    assert json.loads((out / "config.json").read_text())["task"] == "matting"
    assert "# BiRefNet lite matting" in (out / "README.md").read_text()
    files = {path.name for path in out.iterdir()}
    assert {"handler.py", "LICENSE", "modeling_birefnet.py", "preprocessor_config.json"} < files

    converted = load_file(out / "model.safetensors")
    assert converted.keys() == lite.keys()
    assert all(torch.equal(converted[key], lite[key]) and converted[key].dtype == lite[key].dtype for key in lite)
    # Back into the official form, for the published code, which loads strictly.
    assert main(["convert", str(out), str(tmp_path / "birefnet.safetensors"), "--to-official"]) == 0
    assert (tmp_path / "birefnet.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert main(["convert", str(out), str(tmp_path / "birefnet.pth"), "--to-official", "--dtype", "float32"]) == 0
    back = torch.load(tmp_path / "birefnet.pth", weights_only=True)
    assert list(back) == list(lite)
    assert all(torch.equal(back[key].half(), lite[key].half()) for key in lite)


def test_official_folders_lead_to_the_published_code(lite, tmp_path):
    save_file(lite, tmp_path / "lite.safetensors", metadata={"format": "pt"})
    assert main(["convert", str(tmp_path / "lite.safetensors"), str(tmp_path / "official"), "--to-official"]) == 0
    assert {path.name for path in (tmp_path / "official").iterdir()} == {"model.safetensors", "config.json"}
    config = json.loads((tmp_path / "official/config.json").read_text())
    assert config == official_config("swin_v1_t")
    assert config["auto_map"]["AutoModelForImageSegmentation"] == "ZhengPeng7/BiRefNet_lite--birefnet.BiRefNet"
    # Such a folder converts again, although its configuration does not describe the network.
    assert main(["convert", str(tmp_path / "official"), str(tmp_path / "again"), "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "again/config.json").read_text())["backbone"] == "swin_v1_t"
    weights = load_file(tmp_path / "again/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16, torch.int64}


def test_a_network_that_the_published_code_lacks_is_not_written_for_it(tiny_model_folder, tmp_path, capsys):
    assert main(["convert", str(tiny_model_folder), str(tmp_path / "out.pth"), "--to-official"]) == 1
    assert "the published code has no network with multi_scale_input=None" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_own_folder_keeps_its_configuration_and_processor(tiny_model_folder, tmp_path):
    assert main(["convert", str(tiny_model_folder), str(tmp_path / "half"), "--dtype", "float16"]) == 0
    config = json.loads((tmp_path / "half/config.json").read_text())
    assert TINY_CONFIG.items() <= config.items() and config["dtype"] == "float16"
    processor = json.loads((tmp_path / "half/preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 64, "width": 64}
    model = BiRefNetForImageSegmentation.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.float16
    original = BiRefNetForImageSegmentation.from_pretrained(tiny_model_folder)
    assert torch.allclose(logits(model), logits(original), atol=0.1)


# ComfyUI

COMFYUI_PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from comfy.cli_args import args
args.cpu = True  # ComfyUI looks for a GPU when its modules are imported
import comfy.ops
from comfy.background_removal.birefnet import BiRefNet
from safetensors.torch import load_file
network = BiRefNet(dtype=torch.float32, device="cpu", operations=comfy.ops.manual_cast).eval()
network.load_state_dict(load_file(sys.argv[2]), strict=True)
with torch.inference_mode():
    torch.save(network(torch.load(sys.argv[3])), sys.argv[4])
"""


# Widely used custom nodes, which load official files into a copy of the published code.
CUSTOM_NODES_PROGRAM = """
import sys, importlib.util, torch
root, models, name, photo, mask = sys.argv[1:]
sys.path.insert(0, root)
from comfy.cli_args import args
args.cpu = True
import comfy.utils, folder_paths
folder_paths.folder_names_and_paths["birefnet"] = ([models], {".safetensors"})
folder = f"{root}/custom_nodes/ComfyUI_BiRefNet_ll"
spec = importlib.util.spec_from_file_location("nodes_ll", f"{folder}/__init__.py", submodule_search_locations=[folder])
module = sys.modules["nodes_ll"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
nodes = module.NODE_CLASS_MAPPINGS
[network] = nodes["LoadRembgByBiRefNetModel"]().load_model(name, "CPU")
photo = torch.load(photo)  # (1, H, W, 3)
torch.save(nodes["GetMaskByBiRefNet"]().get_mask(network, photo, photo.shape[2], photo.shape[1])[0], mask)
"""
COMFYUI = os.environ.get("BIREFNET_COMFYUI", "")
needs_comfyui = pytest.mark.skipif(not COMFYUI, reason="set BIREFNET_COMFYUI to a checkout of ComfyUI")


def write_weights_of_reference(backbone, path):
    config = build_config({"backbone": backbone})
    with torch.device("meta"):
        tensors = BiRefNetForImageSegmentation(config).state_dict()
    manifest = {key: (value.shape, str(value.dtype).removeprefix("torch.")) for key, value in tensors.items()}
    torch.save({key: value.float() for key, value in reference_weights.state_dict(manifest).items()}, path)
    return model_from_state_dict(config, read_state_dict(path))


@needs_comfyui
def test_comfyui_computes_the_same(tmp_path):
    model = write_weights_of_reference("swin_v1_l", tmp_path / "general.pth")
    file = tmp_path / "birefnet.safetensors"
    assert main(["convert", str(tmp_path / "general.pth"), str(file), "--to-comfyui"]) == 0

    image = reference_weights.image("comfyui", 1, 128, 160)
    torch.save(image, tmp_path / "image.pt")
    paths = [str(path) for path in (file, tmp_path / "image.pt", tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", COMFYUI_PROGRAM, COMFYUI, *paths], check=True)
    with torch.inference_mode():
        expected = model(image).logits
    found = torch.load(tmp_path / "logits.pt")
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


@needs_comfyui
@pytest.mark.parametrize(
    ("backbone", "name"), [("swin_v1_t", "General-Lite.safetensors"), ("swin_v1_l", "General.safetensors")]
)
def test_custom_nodes_of_comfyui_compute_the_same(backbone, name, tmp_path):
    if not Path(COMFYUI, "custom_nodes/ComfyUI_BiRefNet_ll").is_dir():
        pytest.skip("needs lldacing/ComfyUI_BiRefNet_ll in custom_nodes of that checkout")
    model = write_weights_of_reference(backbone, tmp_path / "weights.pth")
    assert main(["convert", str(tmp_path / "weights.pth"), str(tmp_path / name), "--to-official"]) == 0

    photo = torch.rand(1, 128, 160, 3, generator=torch.Generator().manual_seed(0))
    torch.save(photo, tmp_path / "photo.pt")
    values = [COMFYUI, str(tmp_path), name, str(tmp_path / "photo.pt"), str(tmp_path / "mask.pt")]
    subprocess.run([sys.executable, "-c", CUSTOM_NODES_PROGRAM, *values], check=True)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = model(((photo - mean) / deviation).permute(0, 3, 1, 2)).logits.sigmoid()[:, 0]
    assert (torch.load(tmp_path / "mask.pt") - expected).abs().max() <= 1e-4


def test_files_for_comfyui_are_those_of_its_one_network(lite, tmp_path, capsys):
    torch.save(lite, tmp_path / "lite.pth")
    assert main(["convert", str(tmp_path / "lite.pth"), str(tmp_path / "out.safetensors"), "--to-comfyui"]) == 1
    assert "ComfyUI's node has no network with backbone='swin_v1_t'" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "lite.pth"), str(tmp_path / "out"), "--to-comfyui"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lite.pth"]


def test_patches_are_reordered_and_back():
    shapes = {"decoder.ipt_blk2.conv1.weight": 48, "decoder.ipt_blk3.conv1.weight": 3}
    weights = {key: torch.arange(channels).view(1, channels, 1, 1) for key, channels in shapes.items()}
    image = torch.arange(3.0 * 8 * 12).view(1, 3, 8, 12)
    # A weight that picks one channel picks the same patch in both orders.
    old = reorder_patches(weights, rows_first=False)
    order = old["decoder.ipt_blk2.conv1.weight"].flatten()
    assert torch.equal(old_image_to_patches(image, (2, 3)), decoder_birefnet.image_to_patches(image, (2, 3))[:, order])
    assert torch.equal(old["decoder.ipt_blk3.conv1.weight"], weights["decoder.ipt_blk3.conv1.weight"])
    back = reorder_patches(old, rows_first=True)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


# The layout from before 2 May 2024


class NoGate(nn.Module):
    """The old network has no gate after its first stage, which equals a gate of 1."""

    def forward(self, features):
        return torch.full_like(features[:, :1], torch.inf)


def old_image_to_patches(image, size):
    """Patches in the order of the code from before 5 November 2024: by column, row, channel."""
    columns = image.split(size[1], dim=3)
    return torch.cat([patch for column in columns for patch in column.split(size[0], dim=2)], dim=1)


def old_network(config, seed):
    """The present network reduced to the old one, with random weights and statistics, and its state dict."""
    torch.manual_seed(seed)
    model = BiRefNetForImageSegmentation(config).eval()
    blocks = [model.squeeze_module[0], *(getattr(model.decoder, f"decoder_block{stage}") for stage in (4, 3, 2, 1))]
    for block in blocks:
        attention = block.dec_att
        attention.aspp_deforms = nn.ModuleList([attention.aspp_deforms[1]])
        kept = attention.conv1.in_channels - 2 * attention.branch_channels
        attention.conv1 = nn.Conv2d(kept, attention.conv1.out_channels, 1, bias=False)
    decoder = model.decoder
    first = decoder.decoder_block4.conv_in
    patches = decoder.ipt_blk5.conv_out.out_channels
    decoder.decoder_block4.conv_in = nn.Conv2d(first.in_channels - patches, first.out_channels, 3, padding=1)
    with_source = decoder.with_source  # but not in the first stage
    decoder.with_source = lambda maps, image, level: [maps] if level == 5 else with_source(maps, image, level)
    decoder.gdt_convs_attn_4 = NoGate()
    del decoder.ipt_blk5
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "running_var" in name else 0.3 * torch.randn_like(value))
    absent = ("decoder.gdt_convs_4.", "decoder.gdt_convs_pred_4.")
    return model, {key: value for key, value in model.state_dict().items() if not key.startswith(absent)}


@pytest.mark.parametrize("source_reference", ["patches", "image"])
def test_the_old_layout_becomes_a_network_that_computes_the_same(source_reference, monkeypatch):
    pytest.importorskip("timm")
    config = build_config({"backbone": "test_resnet", "decoder_channels": 8, "source_reference": source_reference})
    old, state_dict = old_network(config, seed=2)
    assert is_old_layout(state_dict)

    upgraded = upgrade_old_layout(state_dict)
    assert not is_old_layout(upgraded)
    new = model_from_state_dict(config, upgraded)
    found = logits(new, torch.float64)  # the order of patches is that of sums
    monkeypatch.setattr(decoder_birefnet, "image_to_patches", old_image_to_patches)
    expected = logits(old, torch.float64)
    assert expected.std() > 1e-3
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


def test_converting_an_old_file_of_the_lite_size_tells_its_backbone(lite, tmp_path):
    old = {}
    for key, value in lite.items():
        if ".aspp_deforms.1." in key:
            old[key.replace(".aspp_deforms.1.", ".aspp_deforms.0.")] = value
        elif key.endswith(".dec_att.conv1.weight"):
            old[key] = value[:, :768].clone()
        elif key == "decoder.decoder_block4.conv_in.weight":
            old[key] = value[:, : value.shape[1] - lite["decoder.ipt_blk5.conv_out.bias"].shape[0]].clone()
        elif ".aspp_deforms." not in key and "ipt_blk5" not in key and "_4." not in key.replace("spvn_4", ""):
            old[key] = value
    torch.save(old, tmp_path / "BiRefNet-ep480.pth")
    assert main(["convert", str(tmp_path / "BiRefNet-ep480.pth"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["backbone"] == "swin_v1_t"
    converted = load_file(tmp_path / "out/model.safetensors")
    assert converted.keys() == lite.keys()
    assert all(converted[key].shape == lite[key].shape for key in lite)


# Sources that cannot be converted


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        (b"not a checkpoint", "bad.pth is not a checkpoint of tensors"),
        (b"", "bad.pth is not a checkpoint of tensors"),
    ],
)
def test_a_bad_file_is_refused_and_nothing_is_written(contents, words, tmp_path, capsys):
    (tmp_path / "bad.pth").write_bytes(contents)
    assert main(["convert", str(tmp_path / "bad.pth"), str(tmp_path / "out")]) == 1
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_missing_and_additional_weights_are_named(lite, tmp_path, capsys):
    wrong = {key: value for key, value in lite.items() if key != "decoder.conv_out1.0.weight"}
    with pytest.raises(ValueError, match=r"1 missing weights; the first one is decoder\.conv_out1\.0\.weight"):
        model_from_state_dict(build_config({"backbone": "swin_v1_t"}), wrong)
    with pytest.raises(ValueError, match=r"1 unexpected weights; the first one is spare"):
        model_from_state_dict(build_config({"backbone": "swin_v1_t"}), {**lite, "spare": torch.zeros(1)})


def test_results_are_never_overwritten(tiny_model_folder, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert main(["convert", str(tiny_model_folder), str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize(
    ("source", "out", "code", "words"),
    [
        ("nowhere.pth", "out", 1, "nowhere.pth is not a file, a folder, a variant or a Hub repository"),
        ("empty", "out", 1, "empty must contain one weights file, but it contains none"),
        ("empty", "out.safetensors", 2, "the result is a folder; --to-official writes single files"),
    ],
)
def test_wrong_arguments_are_explained(source, out, code, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["convert", source, out]) == code
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_reading_cleans_and_upgrades(lite, tmp_path):
    save_file(lite, tmp_path / "model.safetensors")
    assert read_state_dict(tmp_path / "model.safetensors").keys() == lite.keys()
