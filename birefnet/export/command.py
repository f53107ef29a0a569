"""`birefnet export`: a network as an ONNX, OpenVINO or torch.export file that is checked against PyTorch."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from birefnet.errors import UsageError
from birefnet.inference.arguments import resolution


DESCRIPTION = """\
Export a network for other runtimes: ONNX Runtime, transformers.js and browsers, OpenVINO, torch.export. Every file is
run in its runtime and compared with PyTorch; one that disagrees is not kept. OUT is a folder that transformers.js and
`birefnet cutout --runtime` read."""

EXAMPLES = """\
examples:
  birefnet export embedded exported                             # the weights that come with the package
  birefnet export lite exported --size 512 --dtype float32 float16 int8
  birefnet export my-training/ exported --size dynamic --batch dynamic
  birefnet export general exported --format openvino --dtype float16
  birefnet export lite exported --benchmark                     # and time all files in OUT on this processor
  birefnet cutout photo.jpg --model exported --runtime onnx

exit codes: 0 all went well; 1 a file could not be written or disagrees with PyTorch; 2 wrong arguments"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `birefnet export`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "model", metavar="MODEL", help="`embedded`, a variant, a folder, a file of weights, or a Hub repository"
    )
    parser.add_argument("out", metavar="OUT", help="folder to write to")
    parser.add_argument("--format", choices=["onnx", "openvino", "torch"], default="onnx", help="default: onnx")
    parser.add_argument(
        "--size",
        type=resolution,
        metavar="SIZE",
        help="what the network sees: 1024, HEIGHTxWIDTH such as 768x1344 (multiples of 32), or dynamic for any such "
        "size; default: what the model was trained at",
    )
    parser.add_argument("--batch", choices=["1", "dynamic"], default="1", help="photos at a time (default: 1)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "float16", "int8"],
        default=["float32"],
        metavar="DTYPE",
        help="float32, float16, int8, or several of them, a file each (default: float32)",
    )
    parser.add_argument("--photo", metavar="FILE", help="the photo that results are compared on (default: drawn)")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--benchmark", action="store_true", help="time all files in OUT, and PyTorch, on this machine")
    parser.add_argument("--json", action="store_true", help="print one JSON object per file")


def run(arguments: argparse.Namespace) -> int:
    """Runs `birefnet export` and returns its exit code."""
    from birefnet.export.folders import export_model

    photo = _read_photo(arguments.photo)
    reports = export_model(
        arguments.model,
        arguments.out,
        arguments.format,
        arguments.size,
        arguments.batch == "dynamic",
        tuple(dict.fromkeys(arguments.dtype)),
        photo,
        arguments.overwrite,
    )
    for report in reports:
        text = (
            json.dumps(asdict(report)) if arguments.json else f"{report.path}: {report.megabytes} MB, {report.summary}"
        )
        print(text, flush=True)
    if arguments.benchmark:
        _benchmark(arguments, photo)
    return 0


def _read_photo(path: str | None):
    if path is None:
        return None
    from birefnet.photos.reading import PhotoSource, read_photo

    try:
        return read_photo(PhotoSource(Path(path), Path())).image.convert("RGB")
    except (OSError, ValueError) as error:
        raise UsageError(f"--photo {path}: not a readable picture ({error})") from None


def _benchmark(arguments: argparse.Namespace, photo) -> None:
    from birefnet.export.benchmark import measure, recommend

    timings = measure(arguments.model, arguments.out, photo)
    for timing in timings:
        print(json.dumps(asdict(timing)) if arguments.json else timing.describe(), flush=True)
    if not arguments.json:
        print(recommend(timings))
