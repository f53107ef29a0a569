"""
`birefnet cutout`: cuts the subjects out of files, folders, globs, URLs or standard input.

This module defines the arguments and prints the reports. `jobs` assigns the output files, and `stages` does the work.
torch is imported only when a photo could be opened.
"""

import argparse
import json
import math
import os
import sys
import time
import warnings
from dataclasses import asdict

from PIL import Image

from birefnet.cutout.jobs import Report, drop_unreadable, plan_jobs
from birefnet.cutout.stages import cut_out_photos
from birefnet.errors import UsageError
from birefnet.inference.arguments import add_model_arguments, model_options
from birefnet.inference.remover import load_remover
from birefnet.photos.reading import DOWNLOAD_TIMEOUT
from birefnet.repository.photo_birefnet import load_background


DESCRIPTION = """\
Cut the subjects out of photos. Results have the size of the upright photo (the EXIF orientation is applied).
The colour profile and print resolution are kept. Other metadata (camera, place, time) is not copied.
Results have 8 bits per channel; a message tells where a photo has 16.
If a photo is transparent already, the result's alpha is the matte times the photo's own alpha.
If a photo cannot be read or written, it is reported, the other photos are processed, and the exit code is 1."""


EXAMPLES = """\
examples:
  birefnet cutout photo.jpg                          # writes photo-cutout.png next to it
  birefnet cutout https://example.org/photo.jpg      # writes photo-cutout.png in the current folder
  birefnet cutout photo.jpg -o subject.webp
  birefnet cutout photos/ -o cutouts/                # a folder and its sub-folders
  birefnet cutout "shop/**/*.jpg" -o white/ --background white --format jpeg
  birefnet cutout photo.jpg --background beach.jpg
  birefnet cutout photo.jpg --variant portrait
  birefnet cutout photo.jpg --mask --grow -2 --feather 1.5
  birefnet cutout photos/ -o cutouts/ --batch-size 4 --device cuda --dtype float16
  birefnet cutout photos/ -o cutouts/ --json | jq 'select(.error)'
  curl -s https://example.org/photo.jpg | birefnet cutout - > subject.png

exit codes: 0 success; 1 at least one photo failed; 2 wrong arguments; 130 interrupted by Ctrl-C"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `birefnet cutout`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="files, folders (searched recursively), globs, http(s) URLs, or - for stdin",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="a file for one photo, a folder (created if missing), or - for stdout; default: NAME-cutout.png or "
        "NAME-mask.png next to the photo",
    )
    output.add_argument("--format", choices=["png", "webp", "jpeg"], help="default: from OUT's suffix, else png")
    add_picture_arguments(output)
    output.add_argument("--overwrite", action="store_true", help="replace existing results (never a photo)")
    output.add_argument("--json", action="store_true", help="print one JSON object per photo on stdout")
    add_matte_arguments(parser.add_argument_group("mask edits, applied in this order"))
    add_model_arguments(parser.add_argument_group("model"))


def add_picture_arguments(group) -> None:
    """Adds the arguments that choose the kind of picture: mask, cut-out or another background, and its colours."""
    group.add_argument("--mask", action="store_true", help="write the soft mask alone (8-bit gray)")
    group.add_argument(
        "--background",
        metavar="COLOUR|PICTURE",
        help="put the subject on a colour (white, #ff8800) or a picture, which is scaled to cover the photo",
    )
    group.add_argument(
        "--srgb", action="store_true", help="convert photos with a colour profile to sRGB; default: keep the profile"
    )


def add_matte_arguments(group) -> None:
    """Adds the edits of the matte, in the order in which they are applied."""
    group.add_argument(
        "--sensitivity",
        type=_fraction,
        metavar="S",
        help="0 to 1: lower values keep more of the uncertain pixels; 1 changes nothing",
    )
    group.add_argument("--threshold", type=_fraction, metavar="T", help="0 to 1: make the mask binary at this value")
    group.add_argument(
        "--grow", type=int, default=0, metavar="PIXELS", help="grow the mask; negative values shrink it"
    )
    group.add_argument(
        "--feather",
        type=_blur,
        default=0,
        metavar="PIXELS",
        help="blur the mask (standard deviation)",
    )
    group.add_argument("--invert", action="store_true", help="keep the background instead of the subject")
    group.add_argument(
        "--refine-foreground",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="remove the old background's colour from soft edges such as hair (default: yes)",
    )


def picture_options(arguments: argparse.Namespace) -> dict:
    """
    The arguments of `add_picture_arguments` and `add_matte_arguments` as keyword arguments of `cut_out_photos`. Reads
    a background picture, so that a wrong one is refused before the model is loaded.

    Raises:
        UsageError: the background is neither a colour nor a readable picture.
    """
    names = ("srgb", "refine_foreground", "sensitivity", "threshold", "grow", "feather", "invert")
    options = {"return_mask": arguments.mask, "background": _read_background(arguments.background)}
    return {**options, **{name: getattr(arguments, name) for name in names}}


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
    # Pillow warns from 90 megapixels on and refuses twice as many. Professional cameras reach the first limit.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    options = picture_options(arguments)
    jobs, reports = plan_jobs(arguments)
    with _Reporter(arguments, total=len(jobs) + len(reports)) as reporter:
        jobs, unreadable = drop_unreadable(jobs)
        for report in reports + unreadable:
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
                **options,
            ):
                reporter.add(report)
    return 1 if reporter.failed else 0


def _read_background(background: str | None):
    try:
        return load_background(background, DOWNLOAD_TIMEOUT)
    except ValueError as error:
        raise UsageError(f"--background: {error}") from None


def _suggest_dtype(arguments: argparse.Namespace, model) -> None:
    """Suggests a faster dtype. Never switches silently, because it changes the results.

    Small networks gain too little: the embedded one takes 0.07 instead of 0.08 s at 512² (docs/video.md).
    """
    import torch

    from birefnet.repository.hardware_birefnet import compute_plan, is_worth_recording

    on_cpu = arguments.runtime == "pytorch" and model.device.type == "cpu"
    computes_in_bfloat16 = compute_plan(model.device, torch.bfloat16).arithmetic == torch.bfloat16
    is_small = is_worth_recording(model.num_parameters())
    if arguments.dtype == "auto" and on_cpu and computes_in_bfloat16 and not is_small:
        print(
            "birefnet cutout: --dtype bfloat16 is 1.5 to 2 times as fast on this machine; mattes change by 0.0005 to "
            "0.002 on average",
            file=sys.stderr,
        )


class _Reporter:
    """
    Prints the outcome of each photo: paths of results (or JSON) on standard output, errors on standard error.

    Shows a progress bar if standard error is a terminal.
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
                f"{self.done} cut out, {self.kept} existing results kept, {self.failed} failed, in {seconds:.1f} s",
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
            print(f"birefnet cutout: {report.output} exists and is kept (use --overwrite)", file=sys.stderr)
        else:
            self.done += 1
            if report.note:
                print(f"birefnet cutout: {report.input}: {report.note}", file=sys.stderr)
        self._print_result(report)
        if self.bar is not None:
            self.bar.update()

    def _print_result(self, report: Report) -> None:
        if self.arguments.json:
            print(json.dumps(asdict(report)), flush=True)
        elif report.output is not None and report.error is None and not report.kept:
            # Written as bytes, since a file name need not be valid text.
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(report.output) + b"\n")
            sys.stdout.buffer.flush()
