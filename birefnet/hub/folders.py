"""Complete repositories on disk: written whole or not at all, in this project's form or in the published one."""

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from birefnet import repository_folder
from birefnet.errors import CommandError
from birefnet.hub.checkpoints import build_config


# What a published repository's config.json says; the code stays in that repository, under its author's name.
OFFICIAL_REPOSITORIES = {"swin_v1_l": "ZhengPeng7/BiRefNet", "swin_v1_t": "ZhengPeng7/BiRefNet_lite"}


@contextmanager
def written_whole(out):
    """
    A folder to write into that becomes `out` when all went well and vanishes when not.

    Raises:
        CommandError: if `out` exists and is not an empty folder.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(f"{out} exists already; give the name of a new or empty folder.")
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
    Writes a complete repository: weights, configuration, processor, code, licence and card.

    Args:
        folder (`Path`): An existing, empty folder.
        model (`BiRefNetForImageSegmentation`): Its weights are written as they are, in their dtype.
        processor (`BiRefNetImageProcessor`): Its settings.
        card (`str`): Text of README.md.
    """
    write_weights(folder / "model.safetensors", model)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    source = repository_folder()
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in (*sorted(source.glob("*_birefnet.py")), source / "handler.py", source / "LICENSE"):
        shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_weights(path, model):
    """Writes a model's complete state dict as published files have it: one safetensors file, integer buffers int64."""
    from safetensors.torch import save_file

    state_dict = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    save_file(state_dict, path, metadata={"format": "pt"})
    Path(path).chmod(0o644)  # the library makes files that others cannot read


def write_official(out, model):
    """
    Writes weights so that ComfyUI's native node and the published code load them strictly: a `.safetensors` or `.pth`
    file, or a folder with `model.safetensors` and a `config.json` that leads to the published code.

    Raises:
        CommandError: if the published code has no such network.
    """
    check_official(model.config)
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=_existing_parent(out)) as partial:
        if out.suffix == ".pth":
            import torch

            torch.save(model.state_dict(), Path(partial, out.name))
        elif out.suffix == ".safetensors":
            write_weights(Path(partial, out.name), model)
        else:
            with written_whole(out) as folder:
                write_weights(folder / "model.safetensors", model)
                text = json.dumps(official_config(model.config.backbone), indent=2) + "\n"
                (folder / "config.json").write_text(text, encoding="utf-8")
            return
        Path(partial, out.name).rename(out)


def _existing_parent(out):
    if out.exists() and out.is_file():
        raise CommandError(f"{out} exists already.")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def check_official(config):
    """Raises `CommandError` if the published code does not build this network: it has Swin-L and Swin-T alone."""
    published = build_config({"backbone": config.backbone})
    for field in type(config).__annotations__:
        if field in ("model_type", "drop_path_rate", "freeze_backbone", "task", "loss_weights"):
            continue  # matter in training alone
        if getattr(config, field) != getattr(published, field):
            value = getattr(config, field)
            raise CommandError(f"the published code has no network with {field}={value!r}; its repositories fix it.")
    if config.backbone not in OFFICIAL_REPOSITORIES:
        choices = " and ".join(OFFICIAL_REPOSITORIES)
        raise CommandError(f"no published repository has a network with backbone={config.backbone!r}, but {choices}.")


def official_config(backbone):
    """The `config.json` of a published repository, with the code taken from its author's repository."""
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
