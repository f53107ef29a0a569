"""
`birefnet cutout`: cut the subjects out of files, folders, globs or standard input.

This module has the arguments and the reporting. `jobs` decides which photo goes where, and `stages` does the work.
The import of torch waits until there is a photo to cut out.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageColor

from birefnet.cutout.jobs import Report, plan_jobs
from birefnet.cutout.stages import cut_out_photos
from birefnet.errors import UsageError
from birefnet.inference.arguments import add_model_arguments, model_options
from birefnet.inference.remover import load_remover
from birefnet.photos.finding import PhotoSource
from birefnet.photos.reading import read_photo


DESCRIPTION = """\
Cut the subjects out of photos. Results have the photo's own size, turned upright as its EXIF orientation says. The
colour profile and print resolution are kept; other metadata (camera, place, time) is not copied.
A photo that cannot be read or written is reported, and the rest goes on; the exit code is then 1."""


EXAMPLES = """\
examples:
  birefnet cutout photo.jpg                          # writes photo-cutout.png beside it
  birefnet cutout photo.jpg -o subject.webp
  birefnet cutout photos/ -o cutouts/                # a folder with its sub-folders, kept in the output
  birefnet cutout "shop/**/*.jpg" -o white/ --background white --format jpeg
  birefnet cutout photo.jpg --background beach.jpg
  birefnet cutout photo.jpg --variant portrait
  birefnet cutout photo.jpg --mask --grow -2 --feather 1.5
  birefnet cutout photos/ -o cutouts/ --batch-size 4 --device cuda --dtype float16
  birefnet cutout photos/ -o cutouts/ --json | jq 'select(.error)'
  curl -s https://example.org/photo.jpg | birefnet cutout - > subject.png

exit codes: 0 all went well; 1 at least one photo failed; 2 wrong arguments; 130 interrupted by Ctrl-C"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `birefnet cutout`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "photos", nargs="+", metavar="PHOTO", help="files, folders (searched recursively), globs, or - for stdin"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="a file for one photo, a folder (made if missing), or - for stdout; default: beside the photo, "
        "as NAME-cutout.png or NAME-mask.png",
    )
    output.add_argument("--format", choices=["png", "webp", "jpeg"], help="default: from OUT's suffix, else png")
    output.add_argument("--mask", action="store_true", help="write the soft mask alone (8-bit gray)")
    output.add_argument(
        "--background",
        metavar="COLOUR|PICTURE",
        help="put the subject on a colour (white, #ff8800) or a picture, which is scaled to cover the photo",
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing results (never a photo)")
    output.add_argument("--json", action="store_true", help="print one JSON object per photo on stdout")
    _add_matte_arguments(parser.add_argument_group("mask edits, in this order"))
    add_model_arguments(parser.add_argument_group("model"))


def _add_matte_arguments(group) -> None:
    group.add_argument(
        "--sensitivity",
        type=_fraction,
        metavar="S",
        help="0 to 1: lower keeps more of what the network was unsure about; 1 changes nothing",
    )
    group.add_argument(
        "--threshold", type=_fraction, metavar="T", help="0 to 1: make the mask hard, cut at this value"
    )
    group.add_argument("--grow", type=int, default=0, metavar="PIXELS", help="grow the mask; negative shrinks it")
    group.add_argument(
        "--feather",
        type=_blur,
        default=0,
        metavar="PIXELS",
        help="soften the mask's edge (standard deviation of a blur)",
    )
    group.add_argument("--invert", action="store_true", help="keep the background instead of the subject")
    group.add_argument(
        "--refine-foreground",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="remove the old background's colour from soft edges such as hair (default: yes)",
    )


def _fraction(text: str) -> float:
    return _number(text, 0, 1)


def _blur(text: str) -> float:
    return _number(text, 0, 1000)


def _number(text: str, lowest: float, highest: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not lowest <= number <= highest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {lowest} to {highest}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Runs `birefnet cutout` and returns its exit code."""
    # Pillow warns from 90 megapixels on, which professional cameras reach, and refuses twice as many.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    background = _read_background(arguments.background)
    jobs, reports = plan_jobs(arguments)
    with _Reporter(arguments, total=len(jobs) + len(reports)) as reporter:
        for report in reports:
            reporter.add(report)
        if jobs:
            remover = load_remover(**model_options(arguments))
            if len(jobs) > 1:
                _suggest_dtype(arguments, remover.model)
            for report in cut_out_photos(
                jobs,
                remover,
                batch_size=arguments.batch_size,
                picture_format=arguments.format,
                overwrite=arguments.overwrite,
                return_mask=arguments.mask,
                background=background,
                refine_foreground=arguments.refine_foreground,
                sensitivity=arguments.sensitivity,
                threshold=arguments.threshold,
                grow=arguments.grow,
                feather=arguments.feather,
                invert=arguments.invert,
            ):
                reporter.add(report)
    return 1 if reporter.failed else 0


def _read_background(background: str | None):
    """None, a colour or a picture; refused here, before anything is loaded."""
    if background is None or background == "transparent":
        return None
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        pass
    try:
        return read_photo(PhotoSource(Path(background), Path())).image.convert("RGB")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--background {background}: neither a colour (white, #ff8800) nor a readable picture ({error})"
        ) from None


def _suggest_dtype(arguments: argparse.Namespace, model) -> None:
    """Suggests a faster dtype. Never switches silently, because it changes the results."""
    from birefnet.inference.quantization import dtype_between

    if (
        arguments.runtime == "pytorch"
        and arguments.dtype == "auto"
        and model.device.type == "cpu"
        and str(dtype_between()) == "torch.bfloat16"
    ):
        print(
            "birefnet cutout: here --dtype bfloat16 is 1.5 to 2 times as fast, and mattes change by 0.0005 to 0.002",
            file=sys.stderr,
        )


class _Reporter:
    """
    Tells what becomes of the photos: results' paths (or JSON) on standard output, errors on standard error, a progress
    bar on a terminal only.
    """

    def __init__(self, arguments: argparse.Namespace, total: int):
        self.arguments = arguments
        self.total = total
        self.done = self.kept = self.failed = 0
        self.bar = None

    def __enter__(self):
        self.start = time.perf_counter()
        if sys.stderr.isatty() and self.total > 1:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, unit="photo", dynamic_ncols=True)
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()
        if self.total > 1:
            seconds = time.perf_counter() - self.start
            print(
                f"{self.done} cut out, {self.kept} kept as they were, {self.failed} failed, in {seconds:.1f} s",
                file=sys.stderr,
            )

    def add(self, report: Report) -> None:
        if self.bar is not None:
            self.bar.clear()
        if report.error is not None:
            self.failed += 1
            print(f"birefnet cutout: {report.input}: {report.error}", file=sys.stderr)
        elif report.kept:
            self.kept += 1
            print(f"birefnet cutout: {report.output} exists, kept (--overwrite replaces it)", file=sys.stderr)
        else:
            self.done += 1
        self._print_result(report)
        if self.bar is not None:
            self.bar.update()

    def _print_result(self, report: Report) -> None:
        if self.arguments.json:
            print(json.dumps(asdict(report)), flush=True)
        elif report.output is not None and report.error is None and not report.kept:
            # Bytes, so that a name that is no valid text goes out as it came.
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(report.output) + b"\n")
            sys.stdout.buffer.flush()
