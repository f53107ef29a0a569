"""
The console command `birefnet`. Each sub-command is a module, imported only if it is used.

The module has `add_arguments(parser)` and `run(arguments) -> int`. The exit code is 0 for success and 1 if something
failed. It raises `birefnet.errors.CommandError` to end with a message instead of a traceback.
"""

import argparse
import importlib
import os
import sys

from birefnet import __version__
from birefnet.errors import CommandError


COMMANDS = {
    "cutout": ("birefnet.cutout.command", "cut the subjects out of photos"),
    "batch": ("birefnet.batch.command", "cut out millions of photos, resumable, on one machine or a Ray cluster"),
    "video": ("birefnet.video.command", "cut the subjects out of clips, steady from frame to frame"),
    "train": ("birefnet.training.command", "train or fine-tune on your own photos and masks"),
    "draw": ("birefnet.data.drawn_scenes", "draw training pairs with thin parts and gaps, exact masks included"),
    "evaluate": ("birefnet.evaluation.command", "measure a model, or a folder of masks, against ground truth"),
    "serve": ("birefnet.serve.command", "a web page and HTTP APIs for cut-outs"),
    "variants": ("birefnet.hub.variants", "list the published checkpoints, and which one to take"),
    "convert": ("birefnet.hub.convert", "turn any BiRefNet checkpoint into a complete folder, or back"),
    "export": ("birefnet.export.command", "write ONNX, OpenVINO or torch.export files, checked against PyTorch"),
    "publish": ("birefnet.hub.publish", "upload a variant as a complete repository to the Hub"),
}
INTERRUPTED = 130  # the exit code that shells report after Ctrl-C


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """
    Builds the argument parser.

    Args:
        command: The sub-command in use. Its module is imported to add its arguments. The other sub-commands only get
            their summary.
    """
    parser = argparse.ArgumentParser(
        prog="birefnet",
        description="Cut subjects out of photos with BiRefNet. Train, evaluate, convert and publish its models.",
        epilog="`birefnet COMMAND --help` explains a command and shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"birefnet {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == command:
            importlib.import_module(module).add_arguments(subparser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the console command and returns its exit code. For invalid arguments, argparse exits with code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        parsed = build_parser(command).parse_args(arguments)
        return importlib.import_module(COMMANDS[parsed.command][0]).run(parsed)
    except CommandError as error:
        print(f"birefnet {command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"birefnet {command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has exited, as in `birefnet variants | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
