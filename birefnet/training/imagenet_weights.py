"""ImageNet weights for the backbone of a network that is trained from scratch: fetched by timm, or from a file."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from birefnet.repository.checkpoint_birefnet import read_checkpoint


# The timm models that have the official backbones' sizes and windows.
SWIN_SOURCES = {
    "swin_v1_t": "swin_tiny_patch4_window7_224.ms_in22k",
    "swin_v1_s": "swin_small_patch4_window7_224.ms_in22k",
    "swin_v1_b": "swin_base_patch4_window12_384.ms_in22k",
    "swin_v1_l": "swin_large_patch4_window12_384.ms_in22k",
}


def load_imagenet_weights(model, file: str | Path | None = None):
    """Gives the backbone of a `BiRefNetForImageSegmentation` its ImageNet weights.

    Args:
        model: The new network.
        file: The classifier's weights as `.safetensors` or `.pth`, with timm's names; or, as ports of a network have
            them, with other names for the same tensors in the same order, which `.pth` alone keeps. Without a file,
            timm fetches its own.

    Raises:
        ImportError: timm is not installed.
        OSError: The weights are out of reach, timm has none for this network, or those of the file are of another.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("--imagenet-backbone needs timm: `pip install timm`.") from error
    backbone = model.config.backbone
    try:
        if backbone in SWIN_SOURCES:
            name = SWIN_SOURCES[backbone]
            source = rename_swin(timm.create_model(name, **_pretrained(timm, name, file)).state_dict())
        else:
            source = _timm_features(timm, backbone, file)
    # Offline, huggingface_hub raises its own errors and those of its HTTP client; timm a RuntimeError without weights.
    except Exception as error:
        raise OSError(f"The ImageNet weights of {backbone} cannot be had: {error}") from error
    missing, _ = model.bb.load_state_dict(source, strict=False)
    # The norms on the stages' outputs are new, and index tables are computed; all else has to be there.
    unexplained = [name for name in missing if not re.match(r"norm\d\.|.*relative_position_index", name)]
    if unexplained:
        raise OSError(f"The ImageNet weights of {backbone} lack {unexplained[0]} and {len(unexplained) - 1} more.")


def _timm_features(timm, backbone: str, file: str | Path | None) -> dict[str, torch.Tensor]:
    from birefnet.repository.configuration_birefnet import DINO_V3_BACKBONES

    name, indices = DINO_V3_BACKBONES.get(backbone, (backbone, (-4, -3, -2, -1)))
    weights = _pretrained(timm, name, file)
    return timm.create_model(name, features_only=True, out_indices=indices, **weights).state_dict()


def _pretrained(timm, name: str, file: str | Path | None) -> dict:
    """Arguments of `timm.create_model` that give the model `name` the weights of the file, or those timm fetches."""
    if file is None:
        return {"pretrained": True}
    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    state_dict = read_checkpoint(file)
    if state_dict.keys() != expected.keys() and len(state_dict) == len(expected):
        state_dict = dict(zip(expected, state_dict.values(), strict=True))  # ports keep the order
    if {key: value.shape for key, value in state_dict.items()} != {k: value.shape for k, value in expected.items()}:
        raise ValueError(f"{file} has not the tensors of timm's {name}: neither its names nor its shapes in order.")
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state_dict}}


def rename_swin(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's Swin names become ours: it merges patches at the start of a stage, the official files at the end."""
    return {
        re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(("head.", "norm."))  # the classifier's
    }
