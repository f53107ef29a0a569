"""Which photo goes where: settled before any work, so that no photo is overwritten and no result is lost."""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from birefnet.errors import UsageError
from birefnet.photos.finding import STANDARD_STREAM, PhotoSource, find_photos
from birefnet.photos.writing import OUTPUT_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One photo to cut out, and where to; `output` None is standard output."""

    source: PhotoSource
    output: Path | None


@dataclass
class Report:
    """What became of one photo, as `--json` prints it. `size` is (width, height) in pixels."""

    input: str
    output: str | None = None
    size: tuple[int, int] | None = None
    seconds: float = 0.0  # spent on this photo: decoding, its share of the network call, finishing and writing
    kept: bool = False  # a result existed and was left as it was
    error: str | None = None


def plan_jobs(arguments: argparse.Namespace) -> tuple[list[Job], list[Report]]:
    """
    Decides which photo goes where, before any work.

    Returns:
        The photos to cut out, and a report for each one that is settled already: its result exists, or its result
        would overwrite a photo or the result of another.

    Raises:
        UsageError: the output cannot be served for these photos at all.
    """
    single_output = _check_output(arguments)
    folder = None if arguments.output is None or single_output else Path(arguments.output)
    photos, problems = find_photos(arguments.photos, excluded_folder=folder)
    if single_output and len(photos) > 1:
        raise UsageError(f"-o {arguments.output} is one file, but there are {len(photos)} photos: give a folder")
    outputs = [_output_of(photo, arguments, single_output) for photo in photos]
    if arguments.output is None:
        # A second run over a folder finds the results of the first beside the photos: they are not photos.
        results = {os.path.abspath(output) for output in outputs if output is not None}
        kept = [i for i, photo in enumerate(photos) if not photo.path or os.path.abspath(photo.path) not in results]
        photos, outputs = [photos[i] for i in kept], [outputs[i] for i in kept]
    reports = [Report(input=argument, error=why) for argument, why in problems]
    jobs = _settle(list(map(Job, photos, outputs)), arguments, reports)
    return jobs, reports


def _check_output(arguments: argparse.Namespace) -> bool:
    """Settles `arguments.format`; True when the output is one file or standard output, False for a folder."""
    output = arguments.output
    if output is None and arguments.photos == [STANDARD_STREAM]:
        output = arguments.output = STANDARD_STREAM
    suffix = "" if output is None or os.path.isdir(output) else Path(output).suffix.lower()
    if suffix in OUTPUT_SUFFIXES and not output.endswith(("/", os.sep)):
        if arguments.format not in (None, OUTPUT_SUFFIXES[suffix]):
            raise UsageError(f"-o {output} and --format {arguments.format} contradict each other")
        arguments.format = OUTPUT_SUFFIXES[suffix]
    arguments.format = arguments.format or "png"
    if arguments.format == "jpeg" and not arguments.mask and arguments.background is None:
        raise UsageError("JPEG has no transparency: choose png or webp, or give --background or --mask")
    if output == STANDARD_STREAM:
        if arguments.json:
            raise UsageError("--json and the picture cannot both go to standard output: give -o a file")
        if sys.stdout.isatty():
            raise UsageError("the picture would go to the terminal: give -o a file, or redirect standard output")
    if arguments.photos.count(STANDARD_STREAM) and output is None:
        raise UsageError("photos from standard input and from files need -o, a folder, for the results")
    return output == STANDARD_STREAM or suffix in OUTPUT_SUFFIXES


def _output_of(photo: PhotoSource, arguments: argparse.Namespace, single_output: bool) -> Path | None:
    if arguments.output == STANDARD_STREAM:
        return None
    if single_output:
        return Path(arguments.output)
    suffix = ".jpg" if arguments.format == "jpeg" else f".{arguments.format}"
    if arguments.output is None:
        return photo.path.with_name(f"{photo.path.stem}-{'mask' if arguments.mask else 'cutout'}{suffix}")
    return Path(arguments.output, photo.relative.with_name(photo.relative.stem + suffix))


def _settle(jobs: list[Job], arguments: argparse.Namespace, reports: list[Report]) -> list[Job]:
    """The jobs that are to be done; appends a report for each other one."""
    originals = [job.source.path for job in jobs if job.source.path is not None] + [Path(arguments.background or "")]
    photos = {_identity(path) for path in originals} - {None}
    taken: dict[str, str] = {}
    remaining = []
    for job in jobs:
        report = Report(input=job.source.name, output=None if job.output is None else str(job.output))
        if job.output is None:
            remaining.append(job)
        elif (first := taken.setdefault(os.path.realpath(job.output), job.source.name)) != job.source.name:
            report.error = f"its result {job.output} is already that of {first}"
            reports.append(report)
        elif _identity(job.output) in photos:
            report.error = f"its result would overwrite the photo {job.output}"
            reports.append(report)
        elif os.path.exists(job.output) and not arguments.overwrite:
            report.kept = True
            reports.append(report)
        else:
            remaining.append(job)
    return remaining


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from others whatever its names (links, upper and lower case); None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
