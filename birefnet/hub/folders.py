"""Writes complete model folders, in this project's form or in the official one. A folder is complete or absent."""

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from birefnet import repository_folder
from birefnet.errors import CommandError
from birefnet.hub.checkpoints import build_config, reorder_patches


# Repositories that the `config.json` of the official form refers to. Their code is not copied.
OFFICIAL_REPOSITORIES = {"swin_v1_l": "ZhengPeng7/BiRefNet", "swin_v1_t": "ZhengPeng7/BiRefNet_lite"}


@contextmanager
def written_whole(out):
    """
    Yields a temporary folder. It is renamed to `out` at the end, or deleted if an exception is raised.

    Raises:
        CommandError: `out` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{out} already exists; name a new or an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    partial.chmod(0o755)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_folder(folder, model, processor, card):
    """
    Writes a complete model repository: weights, configuration, processor, code, licence and card.

    Args:
        folder (`Path`): An existing, empty folder.
        model (`BiRefNetForImageSegmentation`): The model. Its weights keep their dtype.
        processor (`BiRefNetImageProcessor`): The image processor.
        card (`str`): Text of README.md.
    """
    write_weights(folder / "model.safetensors", model.state_dict())
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    source = repository_folder()
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in (*sorted(source.glob("*_birefnet.py")), source / "handler.py", source / "LICENSE"):
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_weights(path, state_dict):
    """Writes a model's state dict into one safetensors file, with int64 index buffers as in official files."""
    from safetensors.torch import save_file

    state_dict = {key: tensor.contiguous() for key, tensor in state_dict.items()}
    save_file(state_dict, path, metadata={"format": "pt"})
    Path(path).chmod(0o644)  # by default, the library writes files that other users cannot read


def write_official(out, model):
    """
    Writes weights that the published code loads with `strict=True`.

    Args:
        out (`str` or `Path`): A `.safetensors` or `.pth` file; or a folder, which gets `model.safetensors` and a
            `config.json` that refers to the published code.
        model (`BiRefNetForImageSegmentation`): The model.

    Raises:
        CommandError: The published code does not have this network, or `out` already exists.
    """
    check_official(model.config)
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=_existing_parent(out)) as partial:
        if out.suffix == ".pth":
            import torch

            torch.save(model.state_dict(), Path(partial, out.name))
        elif out.suffix == ".safetensors":
            write_weights(Path(partial, out.name), model.state_dict())
        else:
            with written_whole(out) as folder:
                write_weights(folder / "model.safetensors", model.state_dict())
                text = json.dumps(official_config(model.config.backbone), indent=2) + "\n"
                (folder / "config.json").write_text(text, encoding="utf-8")
            return
        Path(partial, out.name).rename(out)


def write_for_comfyui(out, model):
    """
    Writes weights for ComfyUI's native node, whose network computes the same with them.

    Args:
        out (`str` or `Path`): A new `.safetensors` file.
        model (`BiRefNetForImageSegmentation`): The model.

    Raises:
        CommandError: ComfyUI does not have this network, or `out` already exists.
    """
    out = Path(out)
    if model.config.backbone != "swin_v1_l":
        raise CommandError(f"ComfyUI's node has no network with backbone={model.config.backbone!r}, only 'swin_v1_l'")
    check_official(model.config)
    if out.exists():
        raise CommandError(f"{out} already exists")
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=_existing_parent(out)) as partial:
        write_weights(Path(partial, out.name), reorder_patches(model.state_dict(), rows_first=False))
        Path(partial, out.name).rename(out)


def _existing_parent(out):
    if out.exists() and out.is_file():
        raise CommandError(f"{out} already exists")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def check_official(config):
    """Raises a `CommandError` if the published code cannot build this network. It has Swin-L and Swin-T only."""
    published = build_config({"backbone": config.backbone})
    for field in type(config).__annotations__:
        if field in ("model_type", "drop_path_rate", "freeze_backbone", "task", "loss_weights"):
            continue  # used in training only
        if getattr(config, field) != getattr(published, field):
            value = getattr(config, field)
            raise CommandError(f"the published code has no network with {field}={value!r}")
    if config.backbone not in OFFICIAL_REPOSITORIES:
        choices = " and ".join(OFFICIAL_REPOSITORIES)
        raise CommandError(f"official repositories have no backbone={config.backbone!r}, only {choices}")


def official_config(backbone):
    """Returns the `config.json` of an official repository. It refers to the code in its author's repository."""
    repository = OFFICIAL_REPOSITORIES[backbone]
    return {
        "_name_or_path": repository,
        "architectures": ["BiRefNet"],
        "auto_map": {
            "AutoConfig": f"{repository}--BiRefNet_config.BiRefNetConfig",
            "AutoModelForImageSegmentation": f"{repository}--birefnet.BiRefNet",
        },
        "custom_pipelines": {
            "image-segmentation": {"pt": ["AutoModelForImageSegmentation"], "tf": [], "type": "image"}
        },
        "bb_pretrained": False,
    }
