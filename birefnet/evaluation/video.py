"""`birefnet evaluate --video`: measure the mattes of clips against true ones."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from birefnet.data.pairs import MASK_FOLDER, PHOTO_FOLDER
from birefnet.errors import CommandError, UsageError
from birefnet.evaluation.video_metrics import MEASURES, VideoMeasures
from birefnet.photos.writing import write_whole
from birefnet.video.clips import clip_from, require_av
from birefnet.video.stages import process


PHOTO_OPTIONS = ("contact_sheet", "curves", "baseline", "update_card")


def add_video_arguments(group) -> None:
    """Adds the arguments that `run_video_evaluation` reads to an `argparse` group."""
    group.add_argument(
        "--video",
        action="store_true",
        help=f"measure clips: DATA are folders with {PHOTO_FOLDER}/NAME.mp4 and {MASK_FOLDER}/NAME.mkv (any clip, or "
        "a folder of pictures)",
    )
    group.add_argument(
        "--stabilize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="steady the mattes over time (default: yes)",
    )


def run_video_evaluation(arguments: argparse.Namespace) -> int:
    """Measures every clip, prints a table and writes `--json` and `--csv`. Returns the exit code.

    Raises:
        CommandError: The data cannot be read, or no clip can be measured.
    """
    require_av()
    for option in PHOTO_OPTIONS:
        if getattr(arguments, option):
            raise UsageError(f"--{option.replace('_', '-')} is for photos, not for --video")
    if arguments.predictions:
        pairs, remover = _matched(arguments.predictions, arguments.ground_truth), None
    else:
        from birefnet.inference.arguments import model_options
        from birefnet.inference.remover import load_remover

        folders = [Path(folder) for folder in arguments.data]
        pairs = [pair for folder in folders for pair in _matched(folder / PHOTO_FOLDER, folder / MASK_FOLDER)]
        remover = load_remover(**model_options(arguments))
    results, left_out = {}, []
    for clip, truth in pairs:
        try:
            results[str(clip)] = measure_clip(clip, truth, remover, arguments)
            print(_row(clip.name, results[str(clip)]), flush=True)
        except (CommandError, ValueError) as error:
            left_out.append(f"{clip}: {error}")
            print(f"left out: {clip}: {error}", file=sys.stderr)
    if not results:
        raise CommandError(f"none of the {len(pairs)} clips can be used")
    means = {name: float(np.nanmean([values[name] for values in results.values()])) for name in MEASURES}
    print(_row(f"mean of {len(results)} clips", means))
    _write(arguments, results, means, left_out)
    return 1 if left_out else 0


def measure_clip(clip: Path, truth: Path, remover, arguments: argparse.Namespace) -> dict[str, float]:
    """The measures of one clip.

    Args:
        clip: The clip, or its predicted mattes where `remover` is `None`.
        truth: Its true mattes.
        remover: A `BiRefNetPipeline`.
        arguments: With `batch_size` and `stabilize`.

    Raises:
        CommandError: A file cannot be read.
        ValueError: The frames differ in number or size.
    """
    measures = VideoMeasures()
    with clip_from(str(clip)) as source, clip_from(str(truth)) as true:
        mattes = _grays(source) if remover is None else _predicted(source, remover, arguments)
        for matte, mask in itertools.zip_longest(mattes, _grays(true)):
            if matte is None or mask is None:
                raise ValueError("clip and true mattes have different numbers of frames")
            measures.step(matte, mask)
    return measures.get_results()


def _predicted(clip, remover, arguments: argparse.Namespace) -> Iterator[np.ndarray]:
    from birefnet.video.stabilization import Stabilizer

    stabilizer = Stabilizer() if arguments.stabilize else None

    def matte_of(frame, outputs):
        return remover.postprocess(outputs, return_mask=True)

    for item in process(clip.frames(), remover, matte_of, arguments.batch_size, stabilizer):
        yield np.asarray(item.picture)


def _grays(clip) -> Iterator[np.ndarray]:
    """Each frame's gray values: mattes are gray in all three colours."""
    return (np.asarray(frame.photo.getchannel("G")) for frame in clip.frames())


def _matched(clips: Path, truths: Path) -> list[tuple[Path, Path]]:
    """Clips and true mattes of the same name, without suffix. A true matte without its clip is an error."""
    for folder in (clips, truths):
        if not folder.is_dir():
            raise CommandError(f"{folder}: no such folder")
    found = {path.stem: path for path in sorted(clips.iterdir()) if not path.name.startswith(".")}
    pairs = []
    for path in sorted(truths.iterdir()):
        if path.name.startswith("."):
            continue
        if path.stem not in found:
            raise CommandError(f"{path}: there is no clip of this name in {clips}")
        pairs.append((found[path.stem], path))
    if not pairs:
        raise CommandError(f"{truths}: it holds no clip and no folder of pictures")
    return pairs


def _row(name: str, values: dict[str, float]) -> str:
    return f"{name:<32}" + "".join(f"  {key} {values[key]:8.3f}" for key in MEASURES)


def _write(arguments: argparse.Namespace, results: dict, means: dict, left_out: list[str]) -> None:
    if arguments.json:
        result = {
            "model": arguments.model or "embedded weights",
            "stabilize": arguments.stabilize,
            "clips": results,
            "mean": means,
            "left_out": left_out,
            "measures": MEASURES,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        write_whole(json.dumps(result, indent=2).encode(), arguments.json)
    if arguments.csv:
        table = io.StringIO(newline="")
        writer = csv.writer(table)
        writer.writerow(["clip", *MEASURES])
        writer.writerows([name, *(values[key] for key in MEASURES)] for name, values in results.items())
        write_whole(table.getvalue().encode(), arguments.csv)
