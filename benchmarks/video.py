"""
Speed of `birefnet video`: seconds a frame of the networks alone, the whole way from clip to clip beside the network's
own throughput, and how much mattes change for frames that hardly differ.

    python benchmarks/video.py CLIP.mp4 [--part networks|embedded|lite|duplicates ...] [--frames 24] [--threads 2]

All numbers of a run come from one process. `benchmarks/video_clips.py` makes clips.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from subjects import load_model
from transformers.utils import ModelOutput

from birefnet import repository_folder
from birefnet.inference import load_remover
from birefnet.video.clips import clip_from
from birefnet.video.stabilization import Stabilizer
from birefnet.video.stages import Options, as_pipeline, write_clip
from birefnet.video.writing import FORMATS


SIDES = (512, 1024)
DTYPES = ("float32", "bfloat16", "int8")
FILLING = 6  # frames that are under way in the stages, not counted
PARTS = ("networks", "embedded", "lite", "duplicates")


def seconds_of(function: Callable, times: int) -> float:
    """Mean seconds of a call, after one that is not counted."""
    function()
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


@torch.inference_mode()
def networks(times: int) -> None:
    """Prints a table of the networks alone. The weights of lite are drawn, which cost the same as trained ones."""
    print("| network | dtype | " + " | ".join(f"s a frame at {side}²" for side in SIDES) + " |\n|---|---|---|---|")
    for name, source in {"embedded": str(repository_folder()), "lite": "lite"}.items():
        for dtype in DTYPES:
            model = load_model(source, dtype, "cpu")
            cells = []
            for side in SIDES:
                photo = torch.randn(1, 3, side, side).to(model.dtype)
                cells.append(f"{seconds_of(lambda model=model, photo=photo: model(photo), times):.2f}")
            print(f"| {name} | {dtype} | {' | '.join(cells)} |", flush=True)


def lite_pipeline(path: str, side: int):
    """
    A pipeline with the network of lite. Its logits are replaced by those of the embedded weights for the first frame.

    Drawn weights give mattes that are gray everywhere, so that the colours would take longer than for any real clip.
    """
    remover = load_remover(resolution=(side, side))
    with clip_from(path) as clip, torch.inference_mode():
        logits = remover.forward([remover.preprocess(next(clip.frames()).photo)])[0]["logits"]
    remover = as_pipeline(load_model("lite", "float32", "cpu"), remover.image_processor)
    forward = remover.forward

    def forward_and_replace(items):
        return [ModelOutput(outputs | {"logits": logits}) for outputs in forward(items)]

    remover.forward = forward_and_replace
    return remover


def whole_way(remover, path: str, frames: int, kinds: tuple[str, ...]) -> None:
    """Prints frames per second of the network alone and from clip to clip, and the stages' seconds a frame."""
    with clip_from(path) as clip:
        photos = [frame.photo for frame, _ in zip(clip.frames(), range(frames), strict=False)]
        items = [remover.preprocess(photo) for photo in photos]
        outputs = remover.forward(items[:1])
        start = time.perf_counter()
        for item in items:
            remover.forward([item])
        alone = len(items) / (time.perf_counter() - start)
        print(f"network alone, one frame after another: {alone:.2f} frames per second", flush=True)
        stabilizer, logits, steps = Stabilizer(), outputs[0]["logits"], iter(photos)
        steady = seconds_of(lambda: stabilizer.step(logits, next(steps)), len(photos) - 1)
        finished = seconds_of(lambda: remover.postprocess(outputs[0]), 4)
        print(f"stabilisation: {steady:.3f} s a frame; matte and colours: {finished:.3f} s a frame")
        end = float(frames / clip.rate)
        with tempfile.TemporaryDirectory() as folder:
            for kind in kinds:
                background = None if FORMATS[kind].has_alpha else (255, 255, 255)
                start = time.perf_counter()
                options = Options(format=kind, background=background, end=end)
                count = write_clip(clip, Path(folder) / f"out{FORMATS[kind].suffix}", remover, options)
                rate = count / (time.perf_counter() - start)
                print(
                    f"clip to {kind}: {rate:.2f} frames per second, {rate / alone:.0%} of the network alone",
                    flush=True,
                )


@torch.inference_mode()
def near_duplicates(path: str) -> None:
    """Prints how far the matte moves when the frame hardly does: the most that re-using its matte could be wrong."""
    remover = load_remover()
    random = np.random.default_rng(0)
    with clip_from(path) as clip:
        photo = next(clip.frames()).photo

    def matte(pixels: np.ndarray) -> np.ndarray:
        values = remover.image_processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        return remover.model(values).logits.sigmoid().numpy()

    pixels = np.asarray(photo)
    first = matte(pixels)
    for name, change in {
        "one pixel by one gray level": np.eye(1, pixels.size, pixels.size // 2).reshape(pixels.shape),
        "each pixel by -1, 0 or 1": random.integers(-1, 2, pixels.shape),
        "noise of one gray level": random.normal(0, 1, pixels.shape).round(),
        "noise of three gray levels": random.normal(0, 3, pixels.shape).round(),
    }.items():
        moved = np.abs(matte((pixels + change).clip(0, 255).astype(np.uint8)) - first)
        print(f"{name}: mattes change by {moved.max():.4f} at most, {moved.mean():.6f} on average")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--times", type=int, default=2, help="calls of each network that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "embedded" in arguments.part:
        print(f"embedded weights at 448², {arguments.frames} frames")
        whole_way(load_remover(resolution=(448, 448)), arguments.clip, arguments.frames, ("h264", "webm", "prores"))
    if "lite" in arguments.part:
        print(f"lite at 1024², {arguments.frames} frames")
        whole_way(lite_pipeline(arguments.clip, 1024), arguments.clip, arguments.frames, ("h264", "webm"))
    if "duplicates" in arguments.part:
        near_duplicates(arguments.clip)
    if "networks" in arguments.part:
        networks(arguments.times)


if __name__ == "__main__":
    main()
