"""Loads a model and its processor from a file, a folder, a variant's name or a Hub repository."""

import json
from pathlib import Path

from birefnet.errors import CommandError
from birefnet.hub.checkpoints import build_config, build_processor, model_from_state_dict, read_state_dict
from birefnet.hub.download import download_file, fetch_checkpoint
from birefnet.hub.variants import get_variant


def load_variant(name, device="cpu", dtype=None, folder=None, cache_dir=None, token=None):
    """
    Downloads a published checkpoint if needed, verifies it, and returns it ready for use.

    Args:
        name (`str`): A name, alias or repository of the table, such as `"portrait"`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the model is put.
        dtype (`torch.dtype` or `"auto"`, *optional*): Dtype of the weights. `"auto"` keeps the file's dtype. Default:
            the best dtype for the device, see `compute_plan` in `hardware_birefnet.py`.
        folder (`str` or `Path`, *optional*): A folder that contains the official file. Prevents the download.
        cache_dir, token (*optional*): As in `huggingface_hub.hf_hub_download`. `HF_ENDPOINT`, `HF_HUB_OFFLINE`,
            `HF_HOME` and `HF_TOKEN` also apply.

    Returns:
        `tuple`: The `BiRefNetForImageSegmentation` in evaluation mode, and its `BiRefNetImageProcessor` with the
        variant's input size. `processor.post_process_alpha_matte(outputs, target_sizes)` returns the mattes.

    Raises:
        ValueError: There is no such variant, or the file does not contain its network.
        DownloadError: The file is unavailable or is not the published one.
    """
    from birefnet.repository.hardware_birefnet import compute_plan

    variant = get_variant(name)
    state_dict = read_state_dict(fetch_checkpoint(variant, folder=folder, cache_dir=cache_dir, token=token))
    if dtype is None:
        dtype = compute_plan(device, parameters=variant.parameters).storage
    elif dtype == "auto":
        dtype = None
    model = model_from_state_dict(build_config(variant.config), state_dict, dtype)
    return model.to(device), build_processor(variant.processor)


def locate_checkpoint(source, variant=None, token=None):
    """
    Returns the path of a source's weights file. Downloads it from the Hub if needed.

    Args:
        source (`str`): A weights file, a folder with one weights file, a variant's name, or a Hub repository.
        variant (`Variant`, *optional*): The variant, if `source` is its name. Its file is verified.
        token (`str`, *optional*): Hub token for private and gated repositories.

    Raises:
        CommandError: There is no such file.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return _weights_in(path)
    if variant is not None:
        return fetch_checkpoint(variant, token=token)
    if str(source).count("/") == 1 and not path.parent.is_dir():
        return download_file(str(source), "model.safetensors", what=str(source), token=token)
    raise CommandError(f"{source} is not a file, a folder, a variant or a Hub repository")


def _weights_in(folder):
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".pth", ".pt", ".bin")]
    if (folder / "model.safetensors") in found:
        return folder / "model.safetensors"
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CommandError(f"{folder} must contain one weights file, but it contains {names}; name the file itself")
    return found[0]


def _own_settings(checkpoint, name):
    """Reads a JSON file beside a checkpoint. Returns `None` if the file is missing or another project wrote it."""
    path = Path(checkpoint).with_name(name)
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = settings.get("model_type") == "birefnet" and "backbone" in settings
    processor = str(settings.get("auto_map", {}).get("AutoImageProcessor") or settings.get("image_processor_type"))
    return settings if own or processor.endswith("BiRefNetImageProcessor") else None


def load_source(source, variant_name=None, dtype=None):
    """
    Loads a model from any source that `birefnet convert` accepts.

    Args:
        source (`str`): See [`locate_checkpoint`].
        variant_name (`str`, *optional*): The variant these weights belong to. Sets the processor's input size.
        dtype (`str`, *optional*): `"float32"`, `"float16"` or `"bfloat16"`. Default: the dtype of the weights.

    Returns:
        `tuple`: The model, its processor, and the [`Variant`] or `None`.

    Raises:
        CommandError: There is no such source.
        ValueError: `variant_name` is not a variant, or the file is not a checkpoint of this network.
    """
    import torch

    from birefnet.hub.variants import get_variant
    from birefnet.repository.checkpoint_birefnet import config_from_state_dict

    variant = None
    try:
        variant = get_variant(variant_name or str(source))
    except ValueError:
        if variant_name is not None:
            raise
    checkpoint = locate_checkpoint(source, variant)
    state_dict = read_state_dict(checkpoint)
    own = _own_settings(checkpoint, "config.json")
    if own is not None:
        config = build_config({key: value for key, value in own.items() if key not in ("auto_map", "dtype")})
    else:
        config = config_from_state_dict(state_dict)
        config.task = variant.config["task"] if variant else config.task
    settings = _own_settings(checkpoint, "preprocessor_config.json")
    if settings is None:
        settings = variant.processor if variant else {}
    model = model_from_state_dict(config, state_dict, getattr(torch, dtype) if dtype else None)
    return model, build_processor(settings), variant
