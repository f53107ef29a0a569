"""
`birefnet cutout`: cut the subjects out of files, folders, globs or standard input.

Here are the arguments, the model and the reporting; `cutout_jobs` decides which photo goes where and `cutout_stages`
does the work. torch and the model are imported only once it is known that there is a photo to cut out.
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

from birefnet import repository_folder
from birefnet.command_line import CommandError, UsageError
from birefnet.cutout_jobs import Report, plan_jobs
from birefnet.cutout_stages import cut_out_photos
from birefnet.loading import collector_at_rest, load_model
from birefnet.photo_files import PhotoSource, read_photo


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
    model = parser.add_argument_group("model")
    model.add_argument("--variant", metavar="NAME", help="a published checkpoint, see `birefnet variants`")
    add_model_arguments(model)


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


def add_model_arguments(group) -> None:
    group.add_argument("--model", metavar="FOLDER|HUB_ID", help="default: the embedded weights")
    group.add_argument(
        "--resolution",
        type=_resolution,
        metavar="SIZE",
        help="what the network sees: 1024, HEIGHTxWIDTH such as 1440x2560 (multiples of 32), or dynamic (the photo's "
        "own size within limits); default: what the model was trained at",
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    group.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16", "int8"],
        default="auto",
        help="default: float32 on a CPU, float16 on a GPU; int8 is for CPUs: faster and less exact",
    )
    group.add_argument(
        "--batch-size", type=_positive, metavar="N", default=1, help="photos per network call (default: 1)"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


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


def _resolution(text: str) -> str | tuple[int, int]:
    """`"dynamic"` or (height, width)."""
    if text == "dynamic":
        return text
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 and int(side) % 32 == 0 for side in sides):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a side such as 1024, nor HEIGHTxWIDTH such as 1440x2560 "
            "(multiples of 32), nor dynamic"
        )
    return int(sides[0]), int(sides[-1])


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
            remover = load_remover(arguments, arguments.variant)
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


@collector_at_rest()
def load_remover(arguments: argparse.Namespace, variant: str | None = None):
    """
    The background-removal pipeline on the device, in the dtype and at the resolution that the arguments ask for, with
    the model that they name or with a published variant.

    Raises:
        CommandError: the model cannot be loaded, or the device is not there or cannot do what is asked.
    """
    import torch  # here, since these imports take seconds
    from transformers.utils.logging import disable_progress_bar

    from birefnet.repository.pipeline_birefnet import BiRefNetPipeline
    from birefnet.variants import load_variant

    disable_progress_bar()
    if variant and arguments.model:
        raise UsageError("--variant and --model contradict each other")
    device = _find_device(arguments.device)
    dtype = arguments.dtype
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else "float16"
    elif dtype == "int8":
        dtype = _dtype_between(device, arguments.batch_size)
    source = str(variant or arguments.model or repository_folder())
    try:
        if variant:
            model, processor = load_variant(variant, device, getattr(torch, dtype))
        else:
            model, processor = load_model(source, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"the model {source} cannot be loaded: {error}") from error
    if arguments.dtype == "int8":
        from birefnet.quantization import quantize

        quantize(model)
    _set_resolution(processor, arguments.resolution)
    return BiRefNetPipeline(model=model, image_processor=processor, device=device, task="background-removal")


def _find_device(name: str):
    """The named device, or for `"auto"` the machine's accelerator if it has one."""
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: not available here ({str(error).splitlines()[0]})") from None


def _dtype_between(device, batch_size: int) -> str:
    """The dtype of what an int8 model leaves in floating point."""
    from birefnet.quantization import dtype_between, obstacle

    if reason := obstacle(device):
        raise UsageError(f"--dtype int8: {reason}")
    if batch_size > 1:
        raise UsageError("--dtype int8 takes photos one by one, as the others of a batch would change their mattes")
    return str(dtype_between()).removeprefix("torch.")


def _suggest_dtype(arguments: argparse.Namespace, model) -> None:
    """Names a faster dtype to who has not chosen one: a choice of results is the user's."""
    from birefnet.quantization import dtype_between

    if arguments.dtype == "auto" and model.device.type == "cpu" and str(dtype_between()) == "torch.bfloat16":
        print(
            "birefnet cutout: here --dtype bfloat16 is 1.5 to 2 times as fast, and mattes change by 0.0005 to 0.002",
            file=sys.stderr,
        )


def _set_resolution(processor, resolution: str | tuple[int, int] | None) -> None:
    if resolution is None:
        return
    processor.do_dynamic_resize = resolution == "dynamic"
    if resolution != "dynamic":
        processor.size = {"height": resolution[0], "width": resolution[1]}


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
