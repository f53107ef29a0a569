"""
`birefnet video`: cut the subject out of clips.

This module has the arguments and the reporting; `stages` does the work.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import ImageColor

from birefnet.concurrency import limit_heaps
from birefnet.errors import CommandError, UsageError
from birefnet.inference.arguments import add_model_arguments, model_options, positive
from birefnet.inference.remover import load_remover
from birefnet.photos.finding import STANDARD_STREAM, PhotoSource
from birefnet.photos.reading import read_photo


DESCRIPTION = """\
Cut the subject out of clips, steady from frame to frame. The result has the clip's own size, times, colours and sound.
Without --background it is transparent: WebM (VP9) by default, or ProRes 4444, or a sequence of PNG or EXR files."""

EXAMPLES = """\
examples:
  birefnet video clip.mp4                              # writes clip-cutout.webm beside it, with alpha
  birefnet video clip.mp4 -o subject.mov               # ProRes 4444 for editing
  birefnet video clip.mp4 -o frames/ --format png      # one picture a frame; or --format exr
  birefnet video clip.mp4 --background blur            # writes clip-cutout.mp4
  birefnet video clip.mp4 -o new.mp4 --background beach.mp4 --format h265
  birefnet video clip.mp4 --mask -o matte.mp4
  birefnet video a.mp4 b.mov -o cutouts/ --start 2.5 --end 10
  birefnet video frames/ -o subject.webm --fps 24      # a folder of pictures, or frames/%05d.png
  birefnet video clip.mp4 --resume                     # goes on after a crash
  ffmpeg -i clip.avi -f matroska - | birefnet video - -o subject.webm

exit codes: 0 all went well; 1 at least one clip failed; 2 wrong arguments; 130 interrupted by Ctrl-C. After Ctrl-C the
result holds what was done, and --resume goes on from there."""

CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".gif", ".y4m")
FORMAT_CHOICES = ("webm", "prores", "h264", "h265", "png", "exr")
TRANSPARENT_FORMATS = ("webm", "prores", "png", "exr")


@dataclass
class Report:
    """The result of one clip, as `--json` prints it. `size` is (width, height) in pixels."""

    input: str
    output: str | None = None
    size: tuple[int, int] | None = None
    frames: int = 0
    seconds: float = 0.0
    notes: list[str] | None = None
    kept: bool = False  # a result existed and was left as it was
    error: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `birefnet video`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "clips", nargs="+", metavar="CLIP", help="files, folders or patterns of image sequences, or - for stdin"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "-o", "--output", metavar="OUT", help="a file for one clip, else a folder; default: beside the clip"
    )
    output.add_argument(
        "--format", choices=FORMAT_CHOICES, help="default: from OUT's suffix; else webm, or h264 with a background"
    )
    output.add_argument("--mask", action="store_true", help="write the soft matte alone, as a gray clip")
    output.add_argument(
        "--background",
        metavar="COLOUR|FILE|blur",
        help="put the subject on a colour, a picture, another clip (repeated), or the blurred clip itself",
    )
    output.add_argument("--overwrite", action="store_true", help="replace existing results (never a clip)")
    output.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    output.add_argument(
        "--encoder",
        metavar="NAME=VALUE,...",
        type=_encoder_options,
        default=(),
        help="FFmpeg's options for the encoder, such as crf=30,cpu-used=8",
    )
    output.add_argument("--json", action="store_true", help="print one JSON object per clip on stdout")
    part = parser.add_argument_group("part of the clip")
    part.add_argument("--start", type=_seconds, default=0.0, metavar="SECONDS", help="default: 0")
    part.add_argument("--end", type=_seconds, metavar="SECONDS", help="not included; default: the clip's end")
    part.add_argument("--every", type=positive, default=1, metavar="N", help="take each Nth frame (default: 1)")
    part.add_argument("--fps", type=_rate, metavar="RATE", help="of an image sequence (default: 25)")
    part.add_argument(
        "--raw", type=_raw, metavar="WIDTHxHEIGHT:FORMAT:RATE", help="raw video, such as 1920x1080:yuv420p:25"
    )
    parser.add_argument(
        "--stabilize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="steady the matte over time (default: yes)",
    )
    add_model_arguments(parser.add_argument_group("model"))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _rate(text: str) -> float:
    value = _seconds(text)
    if not value:
        raise argparse.ArgumentTypeError("the rate must be above 0")
    return value


def _raw(text: str) -> dict[str, str]:
    parts = text.split(":")
    if len(parts) != 3 or not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT:FORMAT:RATE, such as 1920x1080:yuv420p:25")
    return dict(zip(("video_size", "pixel_format", "framerate"), parts, strict=True))


def _encoder_options(text: str) -> tuple[tuple[str, str], ...]:
    pairs = tuple(tuple(part.split("=", 1)) for part in text.split(","))
    if not all(len(pair) == 2 and all(pair) for pair in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,NAME=VALUE")
    return pairs


def run(arguments: argparse.Namespace) -> int:
    """Runs `birefnet video` and returns its exit code."""
    from birefnet.video.clips import require_av

    require_av()
    check_arguments(arguments)
    limit_heaps()
    outputs = {clip: output_of(clip, arguments) for clip in arguments.clips}
    background = _read_background(arguments.background)
    remover, failed = None, False
    for clip, output in outputs.items():
        report = Report(str(clip), str(output))
        resumable = arguments.resume and output.with_name(f".{output.name}.partial").exists()
        if output.exists() and not arguments.overwrite and not resumable and not _is_empty_folder(output):
            report.kept = True
        else:
            remover = remover or load_remover(**model_options(arguments))
            _cut_out(clip, output, remover, arguments, background, report)
        failed |= report.error is not None
        _tell(report, arguments.json)
    return 1 if failed else 0


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def check_arguments(arguments: argparse.Namespace) -> None:
    """
    Chooses `arguments.format` if it was not given.

    Raises:
        UsageError: arguments contradict each other, or the suffix of the output and the format do not fit.
    """
    from birefnet.video.writing import FORMAT_OF_SUFFIX, FORMATS

    if arguments.end is not None and arguments.end <= arguments.start:
        raise UsageError(f"--end {arguments.end:g} must be after --start {arguments.start:g}")
    suffix = Path(arguments.output or "").suffix.lower()
    if arguments.format is None:
        is_opaque = arguments.background is not None or arguments.mask
        arguments.format = FORMAT_OF_SUFFIX.get(suffix, "h264" if is_opaque else "webm")
    kind = FORMATS[arguments.format]
    if suffix in CLIP_SUFFIXES and suffix != kind.suffix:
        allowed = ", ".join(FORMAT_OF_SUFFIX)
        raise UsageError(
            f"-o {arguments.output}: {arguments.format} needs the suffix {kind.suffix} (known: {allowed})"
        )
    if not kind.has_alpha and arguments.background is None and not arguments.mask:
        allowed = ", ".join(TRANSPARENT_FORMATS)
        raise UsageError(f"{arguments.format} has no transparency: take {allowed}, or give --background or --mask")
    if arguments.mask and arguments.background is not None:
        raise UsageError("--mask and --background contradict each other")
    is_file = suffix in FORMAT_OF_SUFFIX
    if is_file and len(arguments.clips) > 1:
        raise UsageError(
            f"-o {arguments.output} is one file, but there are {len(arguments.clips)} clips: give a folder"
        )
    if STANDARD_STREAM in arguments.clips and not (is_file or (kind.is_sequence and arguments.output)):
        raise UsageError("a clip from standard input needs -o, a file such as subject.webm")
    if arguments.resume and STANDARD_STREAM in arguments.clips:
        raise UsageError("--resume cannot go on with standard input: give a file")


def output_of(clip: str, arguments: argparse.Namespace) -> Path:
    """
    The file, or for a sequence the folder, that a clip's result is written to.

    Raises:
        UsageError: the result would overwrite the clip.
    """
    from birefnet.video.writing import FORMAT_OF_SUFFIX, FORMATS

    kind = FORMATS[arguments.format]
    source = Path(clip)
    stem = source.stem.replace("%", "").replace("*", "") or "sequence"
    output = Path(arguments.output or source.parent)
    if output.suffix.lower() not in FORMAT_OF_SUFFIX and not (kind.is_sequence and len(arguments.clips) == 1):
        suffix = "" if kind.is_sequence else kind.suffix
        label = "" if arguments.output else "-mask" if arguments.mask else "-cutout"
        output = output / f"{stem}{label}{suffix}"
    elif kind.is_sequence and not arguments.output:
        output = source.with_name(f"{stem}-{'mask' if arguments.mask else 'cutout'}")
    if output.resolve() == source.resolve():
        raise UsageError(f"{clip}: its result would overwrite it: give another -o")
    return output


def _read_background(background: str | None):
    """
    The value of `--background`: `None` for transparent, `"blur"`, a colour, a picture, or the path of a clip.

    Raises:
        UsageError: it is none of these, or the picture cannot be read.
    """
    if background in (None, "transparent"):
        return None
    if background == "blur":
        return background
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        path = Path(background)
    if not path.exists():
        raise UsageError(f"--background {background}: neither a colour (white, #ff8800), nor blur, nor a file")
    if path.suffix.lower() in CLIP_SUFFIXES:
        return path
    try:
        return read_photo(PhotoSource(path, Path())).image.convert("RGB")
    except (OSError, ValueError) as error:
        raise UsageError(f"--background {background}: not a readable picture ({error})") from None


def _cut_out(clip: str, output: Path, remover, arguments, background, report: Report) -> None:
    """Cuts the subject out of one clip, and writes frames, notes, seconds and errors into `report`."""
    from birefnet.video.clips import clip_from
    from birefnet.video.stages import Options, write_clip

    options = Options(
        format=arguments.format,
        return_mask=arguments.mask,
        background=background,
        stabilize=arguments.stabilize,
        start=arguments.start,
        end=arguments.end,
        every=arguments.every,
        batch_size=arguments.batch_size,
        encoder=arguments.encoder,
    )
    start = time.perf_counter()
    try:
        with clip_from(clip, arguments.fps, arguments.raw) as opened, _Bar(opened, options) as bar:
            report.size = opened.size
            report.frames = write_clip(opened, output, remover, options, arguments.resume, bar)
            report.notes = opened.notes
    except CommandError as error:
        report.error = str(error)
    except KeyboardInterrupt:
        if output.exists():
            print(f"birefnet video: {output} holds the frames that were done; --resume goes on", file=sys.stderr)
        raise
    report.seconds = round(time.perf_counter() - start, 2)


class _Bar:
    """A progress bar with frames per second and the time left, on a terminal only."""

    def __init__(self, clip, options):
        from tqdm import tqdm

        total = clip.count
        if total is not None and (options.start or options.end is not None or options.every > 1):
            seconds = total / clip.rate
            span = min(seconds, options.end if options.end is not None else seconds) - options.start
            total = max(1, round(span * clip.rate / options.every))
        name = Path(clip.name).name
        self.bar = tqdm(total=total, desc=name, unit="frame", dynamic_ncols=True, disable=None, file=sys.stderr)

    def __enter__(self):
        return self

    def __call__(self, done: int) -> None:
        self.bar.update(done - self.bar.n)

    def __exit__(self, *exception):
        self.bar.close()


def _tell(report: Report, as_json: bool) -> None:
    if report.error is not None:
        print(f"birefnet video: {report.error}", file=sys.stderr)
    elif report.kept:
        print(f"birefnet video: {report.output} exists, kept (--overwrite replaces it)", file=sys.stderr)
    for note in report.notes or []:
        print(f"birefnet video: {report.input}: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(report)), flush=True)
    elif report.error is None and not report.kept:
        print(report.output, flush=True)
        print(f"{report.frames} frames in {report.seconds:.1f} s", file=sys.stderr)
