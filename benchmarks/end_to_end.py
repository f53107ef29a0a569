"""From JPEG files to PNG cut-outs: photos per second of the command line, and the time of each stage.

    python benchmarks/end_to_end.py
    python benchmarks/end_to_end.py --model lite --photos 10 --format webp --json out/end_to_end.json

The photos are drawn and have 2 to 12 megapixels. The first run times one stage after the other. The second run works
as `birefnet cutout` does: all stages run at the same time, and on a CPU two networks run on half of the cores each.
Its throughput is compared with the network's own throughput in the first run.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from subjects import BACKBONES, load_model

from birefnet.cutout.jobs import Job
from birefnet.cutout.stages import cut_out_photos
from birefnet.errors import CommandError
from birefnet.inference import load_remover, model_options
from birefnet.photos.finding import PhotoSource
from birefnet.photos.reading import read_photo
from birefnet.photos.writing import encode_picture, write_whole
from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor


STAGES = ("decode", "resize", "network", "matte", "foreground", "encode")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="lite, general (random weights), a folder or a Hub id; default: the embedded weights"
    )
    parser.add_argument("--photos", type=int, default=50)
    parser.add_argument("--megapixels", type=float, nargs=2, default=(2, 12), metavar=("LEAST", "MOST"))
    parser.add_argument("--resolution", type=int, help="side of the network's input; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16", "int8"], default="auto")
    parser.add_argument("--format", choices=["png", "webp"], default="png")
    parser.add_argument("--json", metavar="FILE", type=Path)
    chosen = parser.parse_args(arguments)
    chosen.resolution = chosen.resolution and (chosen.resolution, chosen.resolution)
    return chosen


def save_drawn_network(name: str, folder: Path):
    """Save lite or general with random weights as a model folder."""
    load_model(name, "float32", "cpu").save_pretrained(folder)
    BiRefNetImageProcessor(size={"height": 1024, "width": 1024}).save_pretrained(folder)


def see_the_disc(model, arguments, outputs):
    """Forward hook that replaces the gray output of random weights by the drawn photos' disc with a soft edge."""
    height, width = outputs.logits.shape[-2:]
    rows = torch.linspace(-0.5, 0.5, height)[:, None]
    columns = torch.linspace(-0.75, 0.75, width)  # of photos in 3:2
    edge = 8 * height * (1 / 3 - torch.hypot(rows, columns)) / 10  # from 2 % to 98 % in ten pixels
    outputs.logits = edge.to(outputs.logits).expand_as(outputs.logits)
    return outputs


def draw_photos(folder: Path, count: int, least: float, most: float) -> list[Path]:
    """Draw JPEG files of `least` to `most` megapixels in even steps: a disc on smooth colours, with sensor noise."""
    random = np.random.default_rng(0)
    files = []
    for index, megapixels in enumerate(np.linspace(least, most, count)):
        height = round((megapixels * 1e6 * 2 / 3) ** 0.5)
        width = round(height * 3 / 2)
        coarse = Image.fromarray(random.integers(40, 215, (6, 9, 3), dtype=np.uint8))
        photo = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32).copy()
        rows, columns = np.ogrid[:height, :width]
        disc = (rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2
        photo[disc] = photo[disc][:, ::-1] * 0.5 + 100
        photo += random.standard_normal((height, width, 1), dtype=np.float32) * 6
        files.append(folder / f"{index:03}.jpg")
        Image.fromarray(photo.clip(0, 255).astype(np.uint8)).save(files[-1], quality=92)
    return files


def run_stage_by_stage(files: list[Path], folder: Path, remover, picture_format: str, batch_size: int) -> dict:
    """Seconds of each stage, summed over the photos. One stage runs at a time."""
    seconds = defaultdict(float)

    def timed(stage, function, *arguments, **options):
        start = time.perf_counter()
        result = function(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds[stage] += time.perf_counter() - start
        return result

    for first in range(0, len(files), batch_size):
        batch = files[first : first + batch_size]
        decoded = [timed("decode", decode, file) for file in batch]
        inputs = [timed("resize", remover.preprocess, photo.image) for photo in decoded]
        for file, photo, outputs in zip(batch, decoded, timed("network", remover.forward, inputs), strict=True):
            # The pipeline's postprocessing computes the matte first, then the foreground colours.
            make_matte = remover.image_processor.post_process_alpha_matte
            timed("matte", make_matte, outputs, target_sizes=[outputs["target_size"]], photos=[outputs["photo"]])
            picture = timed("foreground", remover.postprocess, outputs)
            encoded = timed("encode", encode_picture, picture, picture_format, photo.encoder_options)
            timed("encode", write_whole, encoded, folder / f"{file.stem}.{picture_format}")
    seconds["foreground"] -= seconds["matte"]
    return {stage: seconds[stage] for stage in STAGES}


def decode(file: Path):
    photo = read_photo(PhotoSource(file, Path(file.name)))
    photo.image.load()
    return photo


def run_as_command(files: list[Path], folder: Path, remover, picture_format: str, batch_size: int) -> float:
    """Seconds for all photos with the threads of `birefnet cutout`."""
    jobs = [Job(PhotoSource(file, Path(file.name)), folder / f"{file.stem}.{picture_format}") for file in files]
    start = time.perf_counter()
    for report in cut_out_photos(jobs, remover, batch_size=batch_size, picture_format=picture_format, overwrite=True):
        if report.error:
            raise CommandError(f"{report.input}: {report.error}")
    return time.perf_counter() - start


def measure(arguments: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if drawn := arguments.model in BACKBONES:
            save_drawn_network(arguments.model, folder / "model")
            arguments.model = folder / "model"
        remover = load_remover(**model_options(arguments))
        if drawn:
            remover.model.register_forward_hook(see_the_disc)
        files = draw_photos(folder, arguments.photos, *arguments.megapixels)
        warm_up = [remover.preprocess(decode(file).image) for file in files[: arguments.batch_size]]
        remover.forward(warm_up)
        common = (folder, remover, arguments.format, arguments.batch_size)
        stages = run_stage_by_stage(files, *common)
        together = run_as_command(files, *common)
    processor = remover.image_processor
    return {
        "photos": len(files),
        "megapixels": list(arguments.megapixels),
        "network_input": [processor.size["height"], processor.size["width"]],
        "device": str(remover.device),
        "dtype": str(remover.model.dtype).removeprefix("torch."),
        "batch_size": arguments.batch_size,
        "format": arguments.format,
        "stage_seconds": stages,
        "photos_per_second_one_after_the_other": len(files) / sum(stages.values()),
        "photos_per_second": len(files) / together,
        "network_photos_per_second": len(files) / stages["network"],
        "share_of_network_throughput": stages["network"] / together,
    }


def report(result: dict) -> str:
    total = sum(result["stage_seconds"].values())
    lines = ["| stage | s per photo | share |", "|---|---|---|"]
    for stage, seconds in result["stage_seconds"].items():
        lines.append(f"| {stage} | {seconds / result['photos']:.3f} | {100 * seconds / total:.0f} % |")
    lines.append(
        f"\none after the other {result['photos_per_second_one_after_the_other']:.2f} photos/s, "
        f"as the command line {result['photos_per_second']:.2f} photos/s, "
        f"{100 * result['share_of_network_throughput']:.0f} % of the network's own "
        f"{result['network_photos_per_second']:.2f}"
    )
    return "\n".join(lines)


def main():
    arguments = parse_arguments()
    result = measure(arguments)
    print(report(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
