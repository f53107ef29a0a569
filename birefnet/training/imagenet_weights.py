"""ImageNet weights for the backbone of a new network, downloaded by timm or read from a file."""

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
    """Loads ImageNet weights into the backbone of a `BiRefNetForImageSegmentation`.

    Args:
        model: The new network.
        file: The classifier's weights as `.safetensors` or `.pth`, with timm's names. A `.pth` file of another
            implementation works too if it has the same tensors in the same order. Without a file, timm downloads its
            own weights.

    Raises:
        ImportError: timm is not installed.
        OSError: The weights cannot be downloaded, timm has none for this network, or the file belongs to another
            network.
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
    # Offline, huggingface_hub raises its own errors and those of its HTTP client. Without weights, timm raises a
    # RuntimeError.
    except Exception as error:
        raise OSError(f"The ImageNet weights of {backbone} cannot be loaded: {error}") from error
    missing, _ = model.bb.load_state_dict(source, strict=False)
    # The norms on the stages' outputs are new, and index tables are computed. Everything else must be in the file.
    unexplained = [name for name in missing if not re.match(r"norm\d\.|.*relative_position_index", name)]
    if unexplained:
        raise OSError(f"The ImageNet weights of {backbone} lack {unexplained[0]} and {len(unexplained) - 1} more.")


def _timm_features(timm, backbone: str, file: str | Path | None) -> dict[str, torch.Tensor]:
    from birefnet.repository.configuration_birefnet import DINO_V3_BACKBONES

    name, indices = DINO_V3_BACKBONES.get(backbone, (backbone, (-4, -3, -2, -1)))
    weights = _pretrained(timm, name, file)
    return timm.create_model(name, features_only=True, out_indices=indices, **weights).state_dict()


def _pretrained(timm, name: str, file: str | Path | None) -> dict:
    """Arguments of `timm.create_model` that load the file's weights into the model `name`, or download weights."""
    if file is None:
        return {"pretrained": True}
    with torch.device("meta"):
        expected = timm.create_model(name).state_dict()
    state_dict = read_checkpoint(file)
    if state_dict.keys() != expected.keys() and len(state_dict) == len(expected):
        state_dict = dict(zip(expected, state_dict.values(), strict=True))  # Other implementations keep the order.
    if {key: value.shape for key, value in state_dict.items()} != {k: value.shape for k, value in expected.items()}:
        raise ValueError(
            f"{file} does not hold the tensors of timm's {name}: neither the names nor the shapes in order agree."
        )
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state_dict}}


def rename_swin(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames timm's Swin tensors to the official names.

    timm merges patches at the start of a stage, the official files at the end of the stage before.
    """
    return {
        re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(("head.", "norm."))  # of the classifier
    }
