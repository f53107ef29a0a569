"""`birefnet evaluate`: measures a model, a baseline or a folder of masks against ground truth.

Threads decode the pictures, the main process runs the network, and other processes measure the mattes. Each stage
works a limited number of pictures ahead, so memory does not grow with the data set. The model runs in the same
pipeline as in `birefnet cutout`. The measures therefore describe what users get: 8-bit mattes at the photo's own size.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import os
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from birefnet import __version__
from birefnet.concurrency import bounded_map
from birefnet.errors import CommandError, UsageError
from birefnet.evaluation import metrics
from birefnet.evaluation.report import (
    Case,
    PictureResult,
    format_table,
    make_case,
    write_contact_sheet,
    write_csv,
    write_curves,
    write_json,
)
from birefnet.evaluation.video import add_video_arguments, run_video_evaluation
from birefnet.inference.arguments import add_model_arguments, model_options
from birefnet.inference.remover import load_remover


DESCRIPTION = """\
Measure a model, a baseline or a folder of masks against ground truth, with measures of segmentation and matting.
A pair that cannot be used is reported by name and skipped; the exit code is then 1."""

EXAMPLES = """\
examples:
  birefnet evaluate photos/                                   # im/ and gt/ inside, the embedded weights
  birefnet evaluate validation.parquet --model my-model/ --json result.json --csv pictures.csv
  birefnet evaluate owner/data-set:test --batch-size 8 --contact-sheet worst.png --curves curves.png
  birefnet evaluate --predictions masks/ --ground-truth gt/
  birefnet evaluate validation.parquet --baseline foreground
  birefnet evaluate validation.parquet --baseline mean-mask:train.parquet
  birefnet evaluate --video clips/ --no-stabilize             # clips with true mattes, frame by frame
  birefnet evaluate --update-card README.md --results result.json baseline.json

With --predictions, masks of another size than their ground truth are resized to it (bilinear), as in the published
evaluation. F, E, S, MAE, MSE and the boundary IoU stretch each matte to its full range first, as in published tables.

exit codes: 0 success; 1 at least one pair could not be used; 2 wrong arguments; 130 interrupted by Ctrl-C"""

FOREGROUND, MEAN_MASK = "foreground", "mean-mask:"
MEAN_MASK_SIDE = 256
CASES = 12
AHEAD = 4
PACKAGES = ("torch", "transformers", "timm", "pysodmetrics", "opencv-python-headless", "scipy", "numpy", "pillow")

Predictor = Callable[[Iterator[Image.Image]], Iterator[np.ndarray]]
"""Maps photos to mattes, uint8 (height, width), in order. May read ahead."""


@dataclass(frozen=True)
class Picture:
    """A picture in the pipeline: photo and ground truth, later also the matte.

    Attributes:
        name: Name of the pair in messages.
        mask: Ground truth, uint8 (height, width).
        photo: RGB photo; `None` if a folder of masks is measured.
        matte: Prediction, uint8, same shape as the mask.
        resized: Whether the prediction was resized to the mask's shape.
    """

    name: str
    mask: np.ndarray
    photo: Image.Image | None = None
    matte: np.ndarray | None = None
    resized: bool = False


@dataclass
class Evaluation:
    """Result of an evaluation.

    Attributes:
        pictures: Results of the pictures, in the order of the data.
        left_out: One message for each pair that could not be used. It starts with the pair's name.
        resized: Number of predictions with another size than their ground truth.
        cases: The worst cases, the worst one first.
    """

    pictures: list[PictureResult] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    resized: int = 0
    cases: list[Case] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `birefnet evaluate` to an `argparse` parser."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    data = parser.add_argument_group("data")
    data.add_argument(
        "data", nargs="*", metavar="DATA", help="folders with im/ and gt/, parquet files, globs, or Hub data set ids"
    )
    data.add_argument("--image-column", default="image", help="column of the photos in tables (default: image)")
    data.add_argument("--mask-column", default="mask", help="column of the masks in tables (default: mask)")
    data.add_argument("--data-name", metavar="NAME", help="name of the data in the result (default: file names)")
    data.add_argument("--predictions", type=Path, metavar="FOLDER", help="measure these masks instead of a model")
    data.add_argument("--ground-truth", type=Path, metavar="FOLDER", help="ground truth for --predictions")
    data.add_argument(
        "--baseline",
        metavar=f"{FOREGROUND}|{MEAN_MASK}DATA",
        help="measure a constant prediction instead of a model: all foreground, or the mean mask of training data",
    )
    add_video_arguments(parser.add_argument_group("clips"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the result: measures, curves, settings")
    output.add_argument("--csv", type=Path, metavar="FILE", help="write the measures of every picture")
    output.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help=f"draw the {CASES} worst cases by MAE")
    output.add_argument(
        "--curves", type=Path, metavar="FILE.png", help="draw the precision-recall and F-measure curves"
    )
    output.add_argument(
        "--update-card",
        type=Path,
        nargs="+",
        metavar="FILE.md",
        help="write --results into Markdown files: tables between their markers, and the model-index of a README.md",
    )
    output.add_argument("--results", type=Path, nargs="+", metavar="FILE", help="result files for --update-card")
    add_model_arguments(parser.add_argument_group("model"), with_variant=False)
    parser.add_argument("--workers", type=int, metavar="N", help="measuring processes (default: one per core)")


def run(arguments: argparse.Namespace) -> int:
    """Runs `birefnet evaluate` and returns its exit code."""
    check_arguments(arguments)
    try:
        if arguments.update_card:
            from birefnet.evaluation.card import update_cards

            update_cards(arguments.update_card, arguments.results)
            return 0
        if arguments.video:
            return run_video_evaluation(arguments)
        metrics.require_libraries()
        return run_evaluation(arguments)
    except (ImportError, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    except BrokenProcessPool as error:
        raise CommandError("a measuring process died, probably out of memory; try fewer --workers") from error
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise CommandError(f"{error}; try a smaller --batch-size or --resolution") from error


def check_arguments(arguments: argparse.Namespace):
    """Raises a UsageError if arguments are missing, contradict each other or have invalid values."""
    tasks = [bool(arguments.data), bool(arguments.predictions), bool(arguments.update_card)]
    if sum(tasks) != 1:
        raise UsageError("use one of DATA, --predictions with --ground-truth, or --update-card with --results")
    if bool(arguments.predictions) != bool(arguments.ground_truth):
        raise UsageError("--predictions and --ground-truth need each other")
    if bool(arguments.update_card) != bool(arguments.results):
        raise UsageError("--update-card and --results need each other")
    baseline = arguments.baseline
    if baseline and not (baseline == FOREGROUND or (baseline.startswith(MEAN_MASK) and baseline != MEAN_MASK)):
        raise UsageError(f"--baseline {baseline}: must be {FOREGROUND} or {MEAN_MASK}DATA")
    if baseline and (arguments.model or not arguments.data):
        raise UsageError("--baseline needs DATA and excludes --model")
    if arguments.workers is not None and arguments.workers < 1:
        raise UsageError(f"--workers {arguments.workers}: must be at least 1")
    for option in ("contact_sheet", "curves"):
        path = getattr(arguments, option)
        if path and path.suffix.lower() != ".png":
            raise UsageError(f"--{option.replace('_', '-')} {path}: the file name must end in .png")


def run_evaluation(arguments: argparse.Namespace) -> int:
    """Measures, prints the table and writes the files. Returns the exit code."""
    # Imported here, because it imports torch, which the measuring processes do not need.
    from birefnet.data.pairs import read_pairs

    if arguments.predictions:
        pairs = match_folders(arguments.predictions, arguments.ground_truth)
        decode, predictor = decode_masks, None
        subject = {"name": arguments.predictions.resolve().name, "is_baseline": False, "weights_sha256": {}}
        settings = {"resolution": "as given", "dtype": "uint8"}
    else:
        pairs = read_pairs(arguments.data, arguments.image_column, arguments.mask_column)
        decode = decode_photo
        predictor, subject, settings = make_predictor(arguments)
    evaluation = evaluate(pairs, decode, predictor, arguments.workers, CASES if arguments.contact_sheet else 0)
    if not evaluation.pictures:
        raise CommandError(f"none of the {len(pairs)} pairs can be used")
    values = metrics.average([picture.measures for picture in evaluation.pictures])
    name = arguments.data_name or ", ".join(Path(source).name for source in data_sources(arguments))
    result = {
        "model": subject,
        "data": {
            "name": name,
            "pictures": len(evaluation.pictures),
            "resized_predictions": evaluation.resized,
            "left_out": evaluation.left_out,
        },
        "settings": settings,
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    report(result, evaluation, values)
    write_files(arguments, result, evaluation, values)
    return 1 if evaluation.left_out else 0


def data_sources(arguments: argparse.Namespace) -> list[str]:
    """Returns the sources of the ground truth."""
    return [str(arguments.ground_truth.resolve())] if arguments.ground_truth else arguments.data


def report(result: dict, evaluation: Evaluation, values: dict[str, float | np.ndarray]):
    """Prints the table on standard output and remarks on standard error."""
    data, settings = result["data"], result["settings"]
    conditions = f"{data['pictures']} pictures, {settings['resolution']}, {settings['dtype']}"
    print(f"{result['model']['name']} on {data['name']}: {conditions}\n{format_table(values)}")
    if evaluation.resized:
        print(f"{evaluation.resized} masks were resized to the size of their ground truth", file=sys.stderr)
    if evaluation.left_out:
        print(f"{len(evaluation.left_out)} pairs could not be used; see the messages above", file=sys.stderr)


def write_files(
    arguments: argparse.Namespace, result: dict, evaluation: Evaluation, values: dict[str, float | np.ndarray]
):
    """Writes the requested files. A file is complete or absent."""
    if arguments.json:
        write_json(arguments.json, result, values)
    if arguments.csv:
        write_csv(arguments.csv, evaluation.pictures)
    if arguments.contact_sheet:
        write_contact_sheet(arguments.contact_sheet, evaluation.cases)
    if arguments.curves:
        write_curves(arguments.curves, values, f"{result['model']['name']} on {result['data']['name']}")


def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that influence the result."""
    found = {"python": platform.python_version(), "birefnet": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- Data ---


def match_folders(predictions: Path, ground_truth: Path) -> list:
    """Matches predictions with ground truth by file name. Returns a `birefnet.data.pairs.Pair` for each ground truth.

    A ground truth without a prediction becomes a pair that cannot be read. Ignoring it would improve the result.

    Raises:
        FileNotFoundError: A folder does not exist.
        ValueError: The folder of the ground truth has no masks.
    """
    from birefnet.data.pairs import Pair, listed, pictures_by_stem

    predicted, true = pictures_by_stem(predictions), pictures_by_stem(ground_truth)
    if not true:
        raise ValueError(f"{ground_truth} contains no masks")
    if unused := [str(predicted[stem]) for stem in predicted.keys() - true.keys()]:
        print(f"{len(unused)} predictions have no ground truth: {listed(unused)}", file=sys.stderr)
    return [Pair(str(path), partial(_both, predicted.get(stem), path)) for stem, path in true.items()]


def _both(prediction: Path | None, mask: Path) -> tuple[Path, Path]:
    from birefnet.data.pairs import BadPairError

    if prediction is None:
        raise BadPairError(f"{mask}: there is no prediction with this name")
    return prediction, mask


def decode_masks(pair) -> Picture:
    """Reads a prediction and its ground truth. Resizes the prediction to the ground truth's size.

    Raises:
        BadPairError: A file cannot be read, or the ground truth is all black.
    """
    import cv2

    from birefnet.data.pairs import BadPairError, Pair, decode_mask

    prediction = Pair(str(pair.read()[0]), lambda: pair.read()[:1] * 2)
    matte, mask = (np.asarray(decode_mask(side)) for side in (prediction, pair))
    if mask.max() <= 1:
        raise BadPairError(f"{pair.name}: the mask is all black (its largest value is {mask.max()} of 255)")
    if matte.shape == mask.shape:
        return Picture(pair.name, mask, matte=matte)
    return Picture(pair.name, mask, matte=cv2.resize(matte, mask.shape[::-1]), resized=True)


def decode_photo(pair) -> Picture:
    """Reads a photo and its ground truth.

    Raises:
        BadPairError: A file cannot be read, the sizes differ, or the mask is all black.
    """
    from birefnet.data.pairs import decode_pair

    photo, mask = decode_pair(pair)
    return Picture(pair.name, np.asarray(mask), photo)


# --- Predictors ---


def make_predictor(arguments: argparse.Namespace) -> tuple[Predictor, dict, dict]:
    """Returns the predictor, and the entries `model` and `settings` of the result file."""
    if arguments.baseline:
        subject = {"name": f"baseline: {arguments.baseline}", "is_baseline": True, "weights_sha256": {}}
        settings = {"resolution": "any", "dtype": "uint8"}
        if arguments.baseline == FOREGROUND:
            return all_foreground, subject, settings
        source = arguments.baseline.removeprefix(MEAN_MASK)
        subject["name"] = f"baseline: mean mask of {Path(source).name}"
        mean = mean_mask(source, arguments.image_column, arguments.mask_column)
        return lambda photos: (resized_mean(mean, photo.size) for photo in photos), subject, settings
    remover = load_remover(**model_options(arguments))
    return (
        lambda photos: map(np.asarray, remover(photos, return_mask=True, batch_size=arguments.batch_size)),
        describe_model(arguments.model, remover.model),
        describe_settings(remover, arguments),
    )


def describe_model(name: str | None, model) -> dict:
    """Returns the entry `model` of the result file: name, weights and size. A folder's path is not included."""
    from huggingface_hub import snapshot_download
    from transformers import PreTrainedModel

    from birefnet import repository_folder
    from birefnet.evaluation.card import weights_hashes

    folder = Path(name or repository_folder())
    if not folder.is_dir():
        patterns = ["model*.safetensors", "pytorch_model*.bin"]
        folder = Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    elif name:
        name = folder.resolve().name
    entry = {"name": name or "embedded weights", "is_baseline": False, "weights_sha256": weights_hashes(folder)}
    if isinstance(model, PreTrainedModel):  # an exported network keeps no parameters that could be counted
        entry["parameters"] = model.num_parameters()
    return entry


def describe_settings(remover, arguments: argparse.Namespace) -> dict:
    """Returns the entry `settings` of the result file: how the model ran."""
    import torch

    processor, device = remover.image_processor, remover.device
    dynamic = processor.do_dynamic_resize
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    dtype = str(remover.model.dtype).removeprefix("torch.")
    return {
        "resolution": "dynamic" if dynamic else f"{processor.size['height']}×{processor.size['width']}",
        "dtype": f"int8 and {dtype}" if arguments.dtype == "int8" else dtype,
        "device": f"{device.type} {hardware}".strip(),
        "batch_size": arguments.batch_size,
    }


def all_foreground(photos: Iterator[Image.Image]) -> Iterator[np.ndarray]:
    """Baseline that predicts foreground everywhere."""
    return (np.full((photo.height, photo.width), 255, np.uint8) for photo in photos)


def mean_mask(source: str, image_column: str = "image", mask_column: str = "mask") -> Image.Image:
    """Returns the mean of a data set's masks, each resized to a square: a PIL image of floats in [0, 255].

    Masks that cannot be read are reported and skipped.

    Raises:
        FileNotFoundError: The data does not exist.
        ValueError: No mask can be read.
    """
    from birefnet.data.pairs import BadPairError, decode_mask, read_pairs

    def read(pair) -> np.ndarray | None:
        try:
            mask = decode_mask(pair)
        except BadPairError as error:
            tqdm.write(str(error), file=sys.stderr)
            return None
        return np.asarray(mask.resize((MEAN_MASK_SIDE, MEAN_MASK_SIDE), Image.Resampling.BILINEAR), dtype=np.float64)

    total, count = np.zeros((MEAN_MASK_SIDE, MEAN_MASK_SIDE)), 0
    pairs = read_pairs([source], image_column, mask_column)
    with ThreadPoolExecutor() as threads:
        masks = bounded_map(threads, read, pairs, ahead=32)
        for mask in tqdm(masks, "mean mask", len(pairs), disable=None):
            if mask is not None:
                total, count = total + mask, count + 1
    if not count:
        raise ValueError(f"{source}: none of the {len(pairs)} masks can be read")
    return Image.fromarray((total / count).astype(np.float32))


def resized_mean(mean: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resizes the mean mask to (width, height). Returns uint8 (height, width)."""
    return np.asarray(mean.resize(size, Image.Resampling.BILINEAR)).round().clip(0, 255).astype(np.uint8)


# --- Measuring ---


def evaluate(
    pairs: list,
    decode: Callable[[object], Picture],
    predictor: Predictor | None = None,
    workers: int | None = None,
    cases: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Measures mattes against ground truth.

    Args:
        pairs: The `birefnet.data.pairs.Pair`s.
        decode: Reads a pair. Raises `BadPairError` if it cannot be used.
        predictor: Predicts mattes from photos; `None` if `decode` already returns mattes.
        workers: Number of measuring processes. Default: one per core. 1 measures in this process. The number does not
            change the result.
        cases: Number of worst cases to keep.
        progress: Whether to show a progress bar. Default: on a terminal only.
    """
    evaluation = Evaluation()
    worst: list[tuple[float, int, Case]] = []  # heap with the smallest error first; the integer breaks ties
    workers = min(workers or os.cpu_count() or 1, len(pairs))
    with (
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads,
        measuring(workers) as measure,
        tqdm(
            total=len(pairs), desc="evaluating", unit="picture", disable=None if progress is None else not progress
        ) as bar,
    ):
        outcomes = bounded_map(threads, keep_error(decode), pairs, ahead=2 * AHEAD)
        pictures = predicted(usable(outcomes, evaluation, bar), predictor)
        for picture, measures in alongside(measure, pictures, lambda picture: (picture.matte, picture.mask)):
            bar.update()
            evaluation.resized += picture.resized
            evaluation.pictures.append(PictureResult(picture.name, picture.mask.shape[::-1], measures))
            if cases and (len(worst) < cases or measures["MAE"] > worst[0][0]):
                case = make_case(picture.name, measures, picture.photo, picture.mask, picture.matte)
                keep = heapq.heappush if len(worst) < cases else heapq.heappushpop
                keep(worst, (case.error, -len(evaluation.pictures), case))
    evaluation.cases = [case for _, _, case in sorted(worst, reverse=True)]
    return evaluation


def keep_error(decode: Callable[[object], Picture]) -> Callable[[object], Picture | ValueError]:
    """Wraps `decode`, so that it returns a `BadPairError` instead of raising it."""
    from birefnet.data.pairs import BadPairError

    def decode_or_error(pair) -> Picture | ValueError:
        try:
            return decode(pair)
        except BadPairError as error:
            return error

    return decode_or_error


def usable(outcomes: Iterable[Picture | ValueError], evaluation: Evaluation, bar: tqdm) -> Iterator[Picture]:
    """Yields the pictures. Reports and records the errors among the outcomes."""
    for outcome in outcomes:
        if isinstance(outcome, Picture):
            yield outcome
        else:
            evaluation.left_out.append(str(outcome))
            bar.update()
            bar.write(f"skipped: {outcome}", file=sys.stderr)


def predicted(pictures: Iterator[Picture], predictor: Predictor | None) -> Iterator[Picture]:
    """Yields the pictures with their mattes."""
    if predictor is None:
        return pictures
    return (replace(picture, matte=matte) for picture, matte in alongside(predictor, pictures, lambda p: p.photo))


def alongside(function: Callable[[Iterator], Iterator], items: Iterable, argument: Callable) -> Iterator[tuple]:
    """Yields each item with its output.

    Args:
        function: Maps an iterator of arguments to an iterator of outputs, in order. May read ahead.
        items: The items.
        argument: Returns the argument for `function` from an item.
    """
    waiting = deque()

    def remembered():
        for item in items:
            waiting.append(item)
            yield argument(item)

    for output in function(remembered()):
        yield waiting.popleft(), output


@contextmanager
def measuring(workers: int) -> Iterator[Callable[[Iterator], Iterator]]:
    """Yields a function that measures an iterator of (matte, mask), in this process or in several others."""
    if workers == 1:
        yield lambda pairs: map(metrics.measure_pair, pairs)
        return
    # Not `fork`, which would copy locked locks of threads and the accelerator's state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=metrics.prepare_process)
    try:
        yield lambda pairs: bounded_map(pool, metrics.measure_pair, pairs, ahead=AHEAD * workers)
    finally:  # also on Ctrl-C: cancels waiting work
        pool.shutdown(wait=True, cancel_futures=True)
