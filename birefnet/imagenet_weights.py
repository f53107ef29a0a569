"""ImageNet weights for the backbone of a network that is trained from scratch; timm fetches them."""

from __future__ import annotations

import re

import torch


# The timm models that have the official backbones' sizes and windows.
SWIN_SOURCES = {
    "swin_v1_t": "swin_tiny_patch4_window7_224.ms_in22k",
    "swin_v1_s": "swin_small_patch4_window7_224.ms_in22k",
    "swin_v1_b": "swin_base_patch4_window12_384.ms_in22k",
    "swin_v1_l": "swin_large_patch4_window12_384.ms_in22k",
}


def load_imagenet_weights(model):
    """Gives the backbone of a `BiRefNetForImageSegmentation` its ImageNet weights.

    Raises:
        ImportError: timm is not installed.
        OSError: The weights are out of reach, or timm has none for this network.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("--imagenet-backbone needs timm: `pip install timm`.") from error
    backbone = model.config.backbone
    try:
        if backbone in SWIN_SOURCES:
            source = rename_swin(timm.create_model(SWIN_SOURCES[backbone], pretrained=True).state_dict())
        else:
            source = _timm_features(timm, backbone)
    # Offline, huggingface_hub raises its own errors and those of its HTTP client; timm a RuntimeError without weights.
    except Exception as error:
        raise OSError(f"The ImageNet weights of {backbone} cannot be had: {error}") from error
    missing, _ = model.bb.load_state_dict(source, strict=False)
    # The norms on the stages' outputs are new, and index tables are computed; all else has to be there.
    unexplained = [name for name in missing if not re.match(r"norm\d\.|.*relative_position_index", name)]
    if unexplained:
        raise OSError(f"The ImageNet weights of {backbone} lack {unexplained[0]} and {len(unexplained) - 1} more.")


def _timm_features(timm, backbone: str) -> dict[str, torch.Tensor]:
    from birefnet.repository.configuration_birefnet import DINO_V3_BACKBONES

    name, indices = DINO_V3_BACKBONES.get(backbone, (backbone, (-4, -3, -2, -1)))
    return timm.create_model(name, features_only=True, out_indices=indices, pretrained=True).state_dict()


def rename_swin(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's Swin names become ours: it merges patches at the start of a stage, the official files at the end."""
    return {
        re.sub(r"^layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name): tensor
        for name, tensor in state_dict.items()
        if not name.startswith(("head.", "norm."))  # the classifier's
    }
