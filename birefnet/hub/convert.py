"""`birefnet convert`: any BiRefNet checkpoint to a complete folder of this repository's form, and back."""

from pathlib import Path

from birefnet.errors import CommandError, UsageError
from birefnet.hub.folders import write_folder, write_official, written_whole
from birefnet.hub.load import load_source


DTYPES = ("float32", "float16", "bfloat16")


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
    from birefnet.hub.variant_card import plain_card, variant_card

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
