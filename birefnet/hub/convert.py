"""`birefnet convert`: converts any BiRefNet checkpoint into a model folder, or back into the official form."""

from pathlib import Path

from birefnet.errors import CommandError, UsageError
from birefnet.hub.folders import write_folder, write_for_comfyui, write_official, written_whole
from birefnet.hub.load import load_source


DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser):
    """Adds the arguments of `birefnet convert` to an `argparse` parser."""
    parser.description = (
        "Convert a BiRefNet checkpoint into a model folder: weights, configuration, processor, code and card.\n"
        "The command removes the prefixes of compiled and distributed training and restores missing index buffers.\n"
        "Checkpoints from before May 2024 become a network of the present layout that computes the same."
    )
    parser.epilog = (
        "examples:\n"
        "  birefnet convert BiRefNet-portrait-epoch_150.pth portrait/ --variant portrait\n"
        "  birefnet convert ZhengPeng7/BiRefNet_HR hr/ --dtype float32\n"
        "  birefnet convert BiRefNet-DIS_ep580.pth dis/                       # a checkpoint from before May 2024\n"
        "  birefnet convert my-finetune/ birefnet.safetensors --to-official   # for the published code\n"
        "  birefnet convert my-finetune/ birefnet.safetensors --to-comfyui    # for ComfyUI's native node\n"
    )
    parser.add_argument("source", help="a weights file, a folder, a variant's name, or a Hub id")
    parser.add_argument("out", help="a new folder; --to-official and --to-comfyui write .safetensors files too")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: as in the source)")
    parser.add_argument("--variant", help="the variant these weights belong to; sets input size and card")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--to-official", action="store_true", help="write weights that the published code loads")
    form.add_argument("--to-comfyui", action="store_true", help="write weights that ComfyUI's native node loads")


def run(arguments):
    """Runs `birefnet convert`; returns the exit code."""
    from birefnet.hub.variant_card import plain_card, variant_card

    out = Path(arguments.out)
    if arguments.to_comfyui and out.suffix != ".safetensors":
        raise UsageError(f"{out}: --to-comfyui writes a .safetensors file")
    if out.suffix in (".safetensors", ".pth") and not (arguments.to_official or arguments.to_comfyui):
        raise UsageError(f"{out} is a file name, but the result is a folder; --to-official writes single files")
    try:
        model, processor, variant = load_source(arguments.source, arguments.variant, arguments.dtype)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if arguments.to_official:
        write_official(out, model)
    elif arguments.to_comfyui:
        write_for_comfyui(out, model)
    else:
        card = variant_card(variant, out.name) if variant else plain_card(out.name, arguments.source, model.config)
        with written_whole(out) as folder:
            write_folder(folder, model, processor, card)
    print(f"{out}: {model.config.backbone}, {str(model.dtype).removeprefix('torch.')}")
    return 0
