"""
`birefnet convert`: any BiRefNet checkpoint to a complete folder of this repository's form, and back.

Checkpoints of the layout of before 2 May 2024 (`BiRefNet-DIS_ep580.pth`, `BiRefNet-ep480.pth` and their fine-tunes)
are converted as well, into a network of today's form that computes exactly what the old one did: today's network
contains the old one, with two more branches in every pooling block, one more image branch and one more gate, which
`upgrade_old_layout` sets so that they change nothing. What their users need is to keep their weights, and so they do,
for one function here instead of a second network to maintain.
"""

import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from birefnet import repository_folder
from birefnet.command_line import CommandError, UsageError


DTYPES = ("float32", "float16", "bfloat16")

# What a published repository's config.json says; the code stays in that repository, under its author's name.
OFFICIAL_REPOSITORIES = {"swin_v1_l": "ZhengPeng7/BiRefNet", "swin_v1_t": "ZhengPeng7/BiRefNet_lite"}

# A gate's sigmoid is exactly 1 in float32 and float16 from 17 on.
OPEN_GATE = 40.0


def is_old_layout(state_dict):
    """Whether a cleaned state dict is of the layout of before 2 May 2024, which lacks the deepest image branch."""
    return "decoder.ipt_blk4.conv1.weight" in state_dict and "decoder.ipt_blk5.conv1.weight" not in state_dict


def upgrade_old_layout(state_dict):
    """
    Returns the state dict of a network of today's layout that computes what one of the old layout did.

    Differences of the old one, read from the published code before and after the change: its pooling blocks have one
    deformable branch, of 3×3, where today there are three, of 1×1, 3×3 and 7×7; its first decoder stage sees no image
    patches and its output passes no gradient gate. The additional branches and patches meet zero weights here, and the
    gate stands open.

    Args:
        state_dict (`dict[str, torch.Tensor]`): A cleaned state dict for which [`is_old_layout`] holds.
    """
    import torch

    upgraded = dict(state_dict)
    like = state_dict["decoder.decoder_block4.conv_in.weight"]

    def add(prefix, *shape, fill=0.0, bias=True):
        upgraded[f"{prefix}.weight"] = torch.zeros(shape, dtype=like.dtype)
        if bias:
            upgraded[f"{prefix}.bias"] = torch.full(shape[:1], fill, dtype=like.dtype)

    def add_norm(prefix, channels):
        for leaf, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            upgraded[f"{prefix}.{leaf}"] = torch.full((channels,), value, dtype=like.dtype)
        upgraded[f"{prefix}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)

    for key in state_dict:
        if ".aspp_deforms.0." in key:
            upgraded[key.replace(".aspp_deforms.0.", ".aspp_deforms.1.")] = upgraded.pop(key)
    for key, weight in state_dict.items():
        if not key.endswith(".aspp_deforms.0.atrous_conv.regular_conv.weight"):
            continue
        planes, channels = weight.shape[:2]
        attention = key.split(".aspp_deforms")[0]
        for branch, kernel in ((0, 1), (2, 7)):
            prefix = f"{attention}.aspp_deforms.{branch}"
            add(f"{prefix}.atrous_conv.offset_conv", 2 * kernel**2, channels, kernel, kernel)
            add(f"{prefix}.atrous_conv.modulator_conv", kernel**2, channels, kernel, kernel)
            add(f"{prefix}.atrous_conv.regular_conv", planes, channels, kernel, kernel, bias=False)
            add_norm(f"{prefix}.bn", planes)
        point, deformable, pooled = state_dict[f"{attention}.conv1.weight"].split(planes, dim=1)
        nothing = torch.zeros_like(point)
        upgraded[f"{attention}.conv1.weight"] = torch.cat([point, nothing, deformable, nothing, pooled], dim=1)

    patches = state_dict["decoder.ipt_blk4.conv_out.weight"].shape[0]
    hidden, tiles = state_dict["decoder.ipt_blk4.conv1.weight"].shape[:2]
    add("decoder.ipt_blk5.conv1", hidden, 4 * tiles if tiles > 3 else tiles, 3, 3)
    add("decoder.ipt_blk5.conv_out", patches, hidden, 3, 3)
    upgraded["decoder.decoder_block4.conv_in.weight"] = torch.cat([like, like.new_zeros(len(like), patches, 3, 3)], 1)
    if "decoder.gdt_convs_3.0.weight" in state_dict:
        gate = state_dict["decoder.gdt_convs_3.0.weight"].shape[0]
        add("decoder.gdt_convs_4.0", gate, state_dict["decoder.decoder_block4.conv_out.weight"].shape[0], 3, 3)
        add_norm("decoder.gdt_convs_4.1", gate)
        add("decoder.gdt_convs_pred_4.0", 1, gate, 1, 1)
        add("decoder.gdt_convs_attn_4.0", 1, gate, 1, 1, fill=OPEN_GATE)
    return upgraded


def read_state_dict(path):
    """
    Returns a checkpoint's state dict under today's names and in today's layout, whatever wrote it.

    Raises:
        ValueError: if the file is no checkpoint of this network; the message says what it is instead.
    """
    from birefnet.repository.checkpoint_birefnet import clean_state_dict, read_checkpoint

    state_dict = clean_state_dict(read_checkpoint(path))
    return upgrade_old_layout(state_dict) if is_old_layout(state_dict) else state_dict


def build_config(fields):
    """Returns the `BiRefNetConfig` of the given fields, the others at their defaults."""
    from birefnet.repository.configuration_birefnet import BiRefNetConfig

    return BiRefNetConfig(**fields)


def build_processor(settings):
    """Returns the `BiRefNetImageProcessor` of the given settings, the others at their defaults."""
    from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor

    return BiRefNetImageProcessor(**settings)


def model_from_state_dict(config, state_dict, dtype=None):
    """
    Returns the model of a configuration with these weights, every one of them and nothing else.

    Args:
        config (`BiRefNetConfig`): What to build.
        state_dict (`dict[str, torch.Tensor]`): Its weights, cleaned.
        dtype (`torch.dtype`, *optional*): By default that of the weights.

    Raises:
        ValueError: if weights are missing, unexpected or of another shape; the message names the first of them.
    """
    from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation

    dtype = dtype or next(tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point())
    model, report = BiRefNetForImageSegmentation.from_pretrained(
        None, config=config, state_dict=state_dict, dtype=dtype, output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            names = sorted(map(str, report[problem]))
            raise ValueError(f"{len(names)} {problem.replace('_keys', '')} weights, the first is {names[0]}.")
    return model


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
    from birefnet.download import download_file, fetch_checkpoint

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
    return settings if own or settings.get("image_processor_type") == "BiRefNetImageProcessor" else None


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

    from birefnet.repository.checkpoint_birefnet import config_from_state_dict
    from birefnet.variants import get_variant

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


def add_arguments(parser):
    """Adds the arguments of `birefnet convert` to an `argparse` parser."""
    parser.description = (
        "Turns a BiRefNet checkpoint into a complete folder: weights, configuration, processor, code and card.\n"
        "Prefixes of compiled and distributed training are removed, index buffers restored, and the layout of before\n"
        "May 2024 is converted into a network that computes exactly the same."
    )
    parser.epilog = (
        "examples:\n"
        "  birefnet convert BiRefNet-portrait-epoch_150.pth portrait/ --variant portrait\n"
        "  birefnet convert ZhengPeng7/BiRefNet_HR hr/ --dtype float32\n"
        "  birefnet convert BiRefNet-DIS_ep580.pth dis/            the layout of before May 2024\n"
        "  birefnet convert my-finetune/ birefnet.safetensors --to-official   for ComfyUI and the published code\n"
    )
    parser.add_argument("source", help="file, folder, variant, or repository on the Hub")
    parser.add_argument("out", help="new folder; with --to-official also a .safetensors or .pth file")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: that of the source)")
    parser.add_argument("--variant", help="the variant that the weights are; its size and card are taken")
    parser.add_argument("--to-official", action="store_true", help="write what the published code loads")


def run(arguments):
    """Runs `birefnet convert`; returns the exit code."""
    from birefnet.variant_card import plain_card, variant_card

    out = Path(arguments.out)
    if out.suffix in (".safetensors", ".pth") and not arguments.to_official:
        raise UsageError(f"{out} is a file's name; a complete conversion is a folder. Single files: --to-official.")
    try:
        model, processor, variant = load_source(arguments.source, arguments.variant, arguments.dtype)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if arguments.to_official:
        write_official(out, model)
    else:
        card = variant_card(variant, out.name) if variant else plain_card(out.name, arguments.source, model.config)
        with written_whole(out) as folder:
            write_folder(folder, model, processor, card)
    print(f"{out}: {model.config.backbone}, {str(model.dtype).removeprefix('torch.')}")
    return 0
