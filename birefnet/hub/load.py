"""From whatever names weights (a file, a folder, a variant, a Hub repository) to a model and its processor."""

import json
from pathlib import Path

from birefnet.errors import CommandError
from birefnet.hub.checkpoints import build_config, build_processor, model_from_state_dict, read_state_dict
from birefnet.hub.download import download_file, fetch_checkpoint
from birefnet.hub.variants import get_variant


def best_dtype(device):
    """
    The torch dtype to compute in: float16 on a graphics card, as the weights were published for, but float32 on a
    CPU (most have no float16 arithmetic and take hundreds of times longer with it).
    """
    import torch

    return torch.float32 if torch.device(device).type == "cpu" else torch.float16


def load_variant(name, device="cpu", dtype=None, folder=None, cache_dir=None, token=None):
    """
    Fetches an official or derived checkpoint, checks it, and returns it ready for use.

    Args:
        name (`str`): A name, alias or repository of the table, such as `"portrait"`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the model is put.
        dtype (`torch.dtype` or `"auto"`, *optional*): Computing type; by default the best for the device, see
            [`best_dtype`], and with `"auto"` that of the file.
        folder (`str` or `Path`, *optional*): Where the official file already is, instead of the Hub.
        cache_dir, token (*optional*): As in `huggingface_hub.hf_hub_download`; `HF_ENDPOINT`, `HF_HUB_OFFLINE`,
            `HF_HOME` and `HF_TOKEN` are honoured as well.

    Returns:
        `tuple`: the `BiRefNetForImageSegmentation` in evaluation mode and its `BiRefNetImageProcessor`, whose size is
        the variant's. `processor.post_process_alpha_matte(outputs, target_sizes)` gives the mattes.

    Raises:
        ValueError: if there is no such variant, or the file holds something else than its network.
        DownloadError: if the file cannot be had or is not the published one.
    """
    from birefnet.hub.checkpoints import build_config, build_processor, model_from_state_dict, read_state_dict

    variant = get_variant(name)
    state_dict = read_state_dict(fetch_checkpoint(variant, folder=folder, cache_dir=cache_dir, token=token))
    dtype = None if dtype == "auto" else dtype or best_dtype(device)
    model = model_from_state_dict(build_config(variant.config), state_dict, dtype)
    return model.to(device), build_processor(variant.processor)


def locate_checkpoint(source, variant=None, token=None):
    """
    Returns the file of weights that a source stands for, fetched from the Hub if need be.

    Args:
        source (`str`): A file, a folder with one file of weights, a variant's name, or a repository on the Hub.
        variant (`Variant`, *optional*): The variant of that name, whose file is checked.
        token (`str`, *optional*): For private and gated repositories.

    Raises:
        CommandError: if there is no such file.
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
    raise CommandError(f"{source} is no file, folder, variant or repository on the Hub.")


def _weights_in(folder):
    found = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".pth", ".pt", ".bin")]
    if (folder / "model.safetensors") in found:
        return folder / "model.safetensors"
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CommandError(f"{folder} needs one file of weights; it has {names}. Name the file itself.")
    return found[0]


def _own_settings(checkpoint, name):
    """A JSON file beside a checkpoint if it is one of this repository's form; `None` if not."""
    path = Path(checkpoint).with_name(name)
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    own = settings.get("model_type") == "birefnet" and "backbone" in settings
    processor = str(settings.get("auto_map", {}).get("AutoImageProcessor") or settings.get("image_processor_type"))
    return settings if own or processor.endswith("BiRefNetImageProcessor") else None


def load_source(source, variant_name=None, dtype=None):
    """
    Loads what `birefnet convert` is given.

    Args:
        source (`str`): See [`locate_checkpoint`].
        variant_name (`str`, *optional*): The variant that the weights are; its settings and card are taken.
        dtype (`str`, *optional*): One of `DTYPES`; by default that of the weights.

    Returns:
        `tuple`: the model, its processor, and the [`Variant`] or `None`.
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
