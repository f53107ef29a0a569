"""
The console command `birefnet`: one sub-command per module, of which only the one in use is imported.

A sub-command's module has `add_arguments(parser)` and `run(arguments) -> int`, the exit code: 0 when all went well, 1
when something failed. It raises `birefnet.errors.CommandError` for what ends it with a message instead of a traceback.
"""

import argparse
import importlib
import os
import sys

from birefnet import __version__
from birefnet.errors import CommandError


COMMANDS = {
    "cutout": ("birefnet.cutout.command", "cut the subjects out of photos"),
    "train": ("birefnet.training.command", "train or fine-tune on your own photos and masks"),
    "draw": ("birefnet.data.drawn_scenes", "draw training pairs with thin parts and gaps, exact masks included"),
    "evaluate": ("birefnet.evaluation.command", "measure a model, or a folder of masks, against ground truth"),
    "serve": ("birefnet.serve.command", "a web page and HTTP APIs for cut-outs"),
    "variants": ("birefnet.hub.variants", "list the published checkpoints, and which one to take"),
    "convert": ("birefnet.hub.convert", "turn any BiRefNet checkpoint into a complete folder, or back"),
    "publish": ("birefnet.hub.publish", "upload a variant as a complete repository to the Hub"),
}
INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """
    Args:
        command: the sub-command in use, whose module is imported for its arguments; the others keep their summary.
    """
    parser = argparse.ArgumentParser(
        prog="birefnet",
        description="Cut subjects out of photos with BiRefNet; train, evaluate, convert and publish its models.",
        epilog="`birefnet COMMAND --help` explains a command, with examples.",
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
    """Runs the console command and returns its exit code. Arguments that argparse refuses leave with code 2."""
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
    except BrokenPipeError:  # whoever read our output has left, as in `birefnet variants | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
