"""Checkpoints from elsewhere: reading files, cleaning state dicts, inferring the configuration from the tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from .backbone_birefnet import relative_position_index
from .configuration_birefnet import SWIN_BACKBONES, BiRefNetConfig


PREFIXES = ("module.", "_orig_mod.")  # added by DistributedDataParallel and torch.compile
CONTAINERS = ("state_dict", "model_state_dict", "model")

# (embedding dimension, whether the MLP is gated) of each DINOv3 backbone.
DINO_V3_SHAPES = {
    (384, False): "dino_v3_s",
    (384, True): "dino_v3_s_plus",
    (768, False): "dino_v3_b",
    (1024, False): "dino_v3_l",
    (1280, True): "dino_v3_h_plus",
    (4096, True): "dino_v3_7b",
}


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Read the state dict in a `.safetensors` file, or in a file of `torch.save` (with `weights_only=True`).

    Raises:
        ValueError: The file is neither, is damaged, or contains anything but tensors.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds of error, and none names the file
        raise ValueError(f"{path} is not a checkpoint of tensors that torch.load can read: {error}") from error
    while isinstance(checkpoint, Mapping) and any(isinstance(checkpoint.get(name), Mapping) for name in CONTAINERS):
        checkpoint = next(checkpoint[name] for name in CONTAINERS if isinstance(checkpoint.get(name), Mapping))
    if not isinstance(checkpoint, Mapping) or not all(torch.is_tensor(value) for value in checkpoint.values()):
        raise ValueError(
            f"{path} is no state dict: it contains a {type(checkpoint).__name__}; allowed are names and tensors."
        )
    return dict(checkpoint)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError  # transformers itself requires safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete .safetensors file: {error}") from error


def clean_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Remove the prefixes of wrappers (also several), convert index buffers to integers, and add missing ones.
    """
    cleaned = dict(state_dict)
    while cleaned and (prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in cleaned)), None)):
        cleaned = {key.removeprefix(prefix): value for key, value in cleaned.items()}
    for key in list(cleaned):
        owner, _, leaf = key.rpartition(".")
        if leaf in ("relative_position_index", "num_batches_tracked"):
            # Indices are at most 528, which float16 represents exactly. A counter out of its range is infinite there.
            cleaned[key] = cleaned[key].double().nan_to_num(posinf=65504).long()
        elif leaf == "running_mean":
            cleaned.setdefault(f"{owner}.num_batches_tracked", torch.zeros((), dtype=torch.int64))
        elif leaf == "relative_position_bias_table":
            window_size = (round(len(cleaned[key]) ** 0.5) + 1) // 2
            cleaned.setdefault(f"{owner}.relative_position_index", relative_position_index(window_size))
    return cleaned


def check_layout(state_dict: Mapping[str, torch.Tensor]):
    """
    Raises:
        ValueError: The cleaned state dict is not of a BiRefNet, or has the layout from before 2 May 2024.
    """
    if not any(key.startswith("decoder.") for key in state_dict) or not any(
        key.startswith("bb.") for key in state_dict
    ):
        found = ", ".join(list(state_dict)[:3]) or "none"
        raise ValueError(
            f"These are not the weights of a BiRefNet: no names start with 'bb.' and 'decoder.' ({found}…)."
        )
    if "decoder.ipt_blk4.conv1.weight" in state_dict and "decoder.ipt_blk5.conv1.weight" not in state_dict:
        raise ValueError(
            "These weights have the old layout of BiRefNet (before 2 May 2024: no decoder.ipt_blk5.conv1.weight), "
            "which is another network. `birefnet convert` converts them to the present layout with the same result."
        )


def backbone_of(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the official backbone in a cleaned state dict, or `None` if it has no official backbone."""
    swin = state_dict.get("bb.patch_embed.proj.weight")
    if swin is not None and "bb.layers.0.blocks.0.attn.relative_position_bias_table" in state_dict:
        depth = len({key.split(".")[4] for key in state_dict if key.startswith("bb.layers.2.blocks.")})
        for name, (dimension, depths, _, _) in SWIN_BACKBONES.items():
            if (dimension, depths[2]) == (len(swin), depth):
                return name
    dino = state_dict.get("bb.model.patch_embed.proj.weight")
    if dino is not None and "bb.model.reg_token" in state_dict:
        return DINO_V3_SHAPES.get((len(dino), "bb.model.blocks.0.mlp.fc1_g.weight" in state_dict))
    return None


def check_backbone(config: BiRefNetConfig, state_dict: Mapping[str, torch.Tensor]):
    """
    Raises:
        ValueError: The cleaned state dict has another official backbone than the configuration.
    """
    found = backbone_of(state_dict)
    if found is not None and found != config.backbone:
        raise ValueError(
            f"These weights have the backbone {found!r}, the model has {config.backbone!r}. Build the model with "
            f"BiRefNetConfig(backbone={found!r}), or load the file with from_pretrained, which detects the backbone."
        )


def config_from_state_dict(state_dict: Mapping[str, torch.Tensor], **fields: Any) -> BiRefNetConfig:
    """
    Infer the configuration from the names and shapes of a cleaned state dict.

    Args:
        state_dict: State dict with an official backbone.
        fields: Fields of the configuration. They override the inferred ones, and add those that tensors do not
            determine (the task).

    Raises:
        ValueError: The tensors do not determine the backbone or the multi-scale input, and `fields` does not name it.
    """
    check_layout(state_dict)
    backbone = fields.get("backbone") or backbone_of(state_dict)
    if backbone is None:
        raise ValueError("The backbone cannot be inferred from these weights: pass the model's config.")
    if "multi_scale_input" not in fields:
        fields["multi_scale_input"] = _multi_scale_input(state_dict, backbone)
    inferred = {
        "backbone": backbone,
        "context_levels": _context_levels(state_dict),
        "squeeze_block": _block_kind(state_dict, "squeeze_module.0."),
        "decoder_block": _block_kind(state_dict, "decoder.decoder_block4."),
        "decoder_attention": _attention(state_dict, "decoder.decoder_block4.dec_att."),
        "decoder_channels": _decoder_channels(state_dict),
        "source_reference": _source_reference(state_dict),
        "gradient_reference": "decoder.gdt_convs_4.0.weight" in state_dict,
        "multi_scale_supervision": "decoder.conv_ms_spvn_4.weight" in state_dict,
        "freeze_backbone": backbone.startswith("dino_v3_"),
    }
    return BiRefNetConfig(**{**inferred, **fields})


def _multi_scale_input(state_dict, backbone) -> str | None:
    if backbone.startswith("dino_v3_"):
        single, found = 192, len(state_dict["decoder.pyramid_neck_x1.conv.weight"])
    elif backbone in SWIN_BACKBONES:
        single, found = SWIN_BACKBONES[backbone][0], len(state_dict["decoder.lateral_block2.conv.weight"])
    else:
        single = found = None
    if found is None or found == single:
        raise ValueError("multi_scale_input cannot be inferred from these weights: pass the model's config.")
    return "concat"


def _attention(state_dict, prefix: str) -> str | None:
    if f"{prefix}aspp_deforms.0.bn.weight" in state_dict:
        return "aspp_deformable"
    return "aspp" if f"{prefix}aspp4.bn.weight" in state_dict else None


def _block_kind(state_dict, prefix: str) -> str | None:
    if f"{prefix}conv_in.weight" in state_dict:
        return "residual" if f"{prefix}conv_resi.weight" in state_dict else "basic"
    return _attention(state_dict, prefix)


def _decoder_channels(state_dict) -> int | None:
    widths = {len(state_dict[f"decoder.decoder_block{stage}.conv_in.weight"]) for stage in (4, 3, 2, 1)}
    return widths.pop() if len(widths) == 1 else None


def _source_reference(state_dict) -> str | None:
    source = state_dict.get("decoder.ipt_blk5.conv1.weight")
    if source is None:
        return None
    return "image" if source.shape[1] == 3 else "patches"


def _context_levels(state_dict) -> int:
    """3 if the squeeze block has more input than output channels: its input then includes the context."""
    first, last = "squeeze_module.0.conv_in.weight", "squeeze_module.0.conv_out.weight"
    if first not in state_dict:
        first, last = "squeeze_module.0.global_avg_pool.1.weight", "squeeze_module.0.conv1.weight"
    return 3 if first in state_dict and state_dict[first].shape[1] != len(state_dict[last]) else 0


def locate_foreign_checkpoint(name_or_path: str | Path, **hub_options) -> str | None:
    """
    Find the file of weights that transformers itself cannot load.

    Returns:
        `name_or_path` if it is a file. The weights file of a folder or Hub repository whose `config.json` does not
        describe this model, as in the official repositories. `None` if transformers can load it.
    """
    path = Path(name_or_path)
    if path.is_file():
        return str(path)
    config_file = cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **hub_options)
    config = json.loads(Path(config_file).read_text(encoding="utf-8")) if config_file is not None else {}
    if config.get("model_type") == "birefnet" and "backbone" in config:
        return None
    return cached_file(name_or_path, "model.safetensors", **hub_options)
