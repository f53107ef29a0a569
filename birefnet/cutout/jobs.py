"""Assigning output files to photos before any work, so that no photo is overwritten and no result is lost."""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from birefnet.errors import UsageError
from birefnet.photos.finding import STANDARD_STREAM, PhotoSource, find_photos
from birefnet.photos.reading import check_photo
from birefnet.photos.writing import OUTPUT_SUFFIXES


@dataclass(frozen=True)
class Job:
    """One photo to cut out and the file for its result. `output` is `None` for standard output."""

    source: PhotoSource
    output: Path | None


@dataclass
class Report:
    """The outcome for one photo, as `--json` prints it. `size` is (width, height) in pixels."""

    input: str
    output: str | None = None
    size: tuple[int, int] | None = None
    seconds: float = 0.0  # decoding, the network (a batch's time divided by its photos), encoding and writing
    kept: bool = False  # whether a result existed and was kept
    note: str | None = None  # what the user should know about a result
    error: str | None = None


def plan_jobs(arguments: argparse.Namespace) -> tuple[list[Job], list[Report]]:
    """
    Assigns an output file to each photo.

    Returns:
        The photos to cut out, and a report for each photo without work: its result exists, or its result would
        overwrite a photo or another result.

    Raises:
        UsageError: the output does not fit these photos.
    """
    single_output = _check_output(arguments)
    folder = None if arguments.output is None or single_output else Path(arguments.output)
    photos, problems = find_photos(arguments.photos, excluded_folder=folder)
    if single_output and len(photos) > 1:
        raise UsageError(f"-o {arguments.output} is one file, but there are {len(photos)} photos: give a folder")
    outputs = [_output_of(photo, arguments, single_output) for photo in photos]
    if arguments.output is None:
        # Results are written next to the photos. A second run over the folder must not take them for photos.
        results = {os.path.abspath(output) for output in outputs if output is not None}
        kept = [i for i, photo in enumerate(photos) if not photo.path or os.path.abspath(photo.path) not in results]
        photos, outputs = [photos[i] for i in kept], [outputs[i] for i in kept]
    reports = [Report(input=argument, error=reason) for argument, reason in problems]
    jobs = _without_conflicts(list(map(Job, photos, outputs)), arguments, reports)
    return jobs, reports


def drop_unreadable(jobs: list[Job]) -> tuple[list[Job], list[Report]]:
    """
    Checks photos up to the first readable one, so that wrong files are reported before torch is imported.

    Returns:
        The jobs from the first readable photo on, and a report for each photo before it.
    """
    reports = []
    for index, job in enumerate(jobs):
        try:
            readable = replace(job, source=check_photo(job.source))
        except (OSError, ValueError) as error:
            reports.append(Report(input=job.source.name, error=in_one_line(error)))
        else:
            return [readable, *jobs[index + 1 :]], reports
    return [], reports


def in_one_line(error: Exception) -> str:
    """An error's message for a report."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _check_output(arguments: argparse.Namespace) -> bool:
    """Sets `arguments.format`. Returns True if the output is one file or standard output, False for a folder."""
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
        raise UsageError("JPEG has no transparency: use png or webp, --background, or --mask")
    if output == STANDARD_STREAM:
        if arguments.json:
            raise UsageError("--json and the picture cannot both use standard output: name a file with -o")
        if sys.stdout.isatty():
            raise UsageError("standard output is a terminal: name a file with -o, or redirect standard output")
    if arguments.photos.count(STANDARD_STREAM) and output is None:
        raise UsageError("with photos from standard input and from files, name a folder for the results with -o")
    return output == STANDARD_STREAM or suffix in OUTPUT_SUFFIXES


def _output_of(photo: PhotoSource, arguments: argparse.Namespace, single_output: bool) -> Path | None:
    if arguments.output == STANDARD_STREAM:
        return None
    if single_output:
        return Path(arguments.output)
    suffix = ".jpg" if arguments.format == "jpeg" else f".{arguments.format}"
    if arguments.output is None:
        beside = photo.path or photo.relative  # the result of a download goes to the current folder
        return beside.with_name(f"{beside.stem}-{'mask' if arguments.mask else 'cutout'}{suffix}")
    return Path(arguments.output, photo.relative.with_name(photo.relative.stem + suffix))


def _without_conflicts(jobs: list[Job], arguments: argparse.Namespace, reports: list[Report]) -> list[Job]:
    """Returns the jobs without a conflict. Appends a report for each of the others."""
    originals = [job.source.path for job in jobs if job.source.path is not None] + [Path(arguments.background or "")]
    photos = {_identity(path) for path in originals} - {None}
    taken: dict[str, str] = {}
    remaining = []
    for job in jobs:
        report = Report(input=job.source.name, output=None if job.output is None else str(job.output))
        if job.output is None:
            remaining.append(job)
        elif (first := taken.setdefault(os.path.realpath(job.output), job.source.name)) != job.source.name:
            report.error = f"its result {job.output} would overwrite the result of {first}"
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
    """Identifies a file by device and inode, independent of its names. `None` if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
