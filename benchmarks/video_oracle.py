"""
How much steadier can mattes get by averaging over time, at best?

    python benchmarks/video_oracle.py clips/ [--quality 28] [--window 5] [NAME ...]

The subjects of `video_clips.py` move along known paths, so their motion needs no estimate. Here each frame's matte is
the mean, or the median, of the network's mattes along the true motion. Outside the subject it is the true matte. No
method that averages along the motion knows either. What is left of dtSSD is the error that moves with the subject.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
from video_clips import EXPOSURES, HEIGHT, SHUTTER, SPRITE, WIDTH, Motion

from birefnet.inference import load_remover
from birefnet.video.clips import clip_from


MIDDLE = SHUTTER * (EXPOSURES - 1) / EXPOSURES / 2  # of a frame's exposure, in frames after its start
MARGIN = np.ones((5, 5), np.uint8)  # the subject grown by two pixels


@torch.inference_mode()
def network_mattes(path: Path, remover) -> np.ndarray:
    """The network's mattes, frame by frame, at its own size: (frames, h, w), float32."""
    with clip_from(str(path)) as clip:
        items = (remover.forward([remover.preprocess(frame.photo)])[0] for frame in clip.frames())
        return np.stack([item["logits"][0, 0].float().sigmoid().numpy() for item in items])


def true_mattes(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The true mattes, scaled to (width, height) = `size`: (frames, h, w), float32 in 0 to 1."""
    with clip_from(str(path)) as clip:
        grays = [np.asarray(frame.photo.getchannel("G"), np.float32) / 255 for frame in clip.frames()]
    return np.stack([cv2.resize(gray, size, interpolation=cv2.INTER_AREA) for gray in grays])


def to_sprite(motion: Motion, number: int, size: tuple[int, int]) -> np.ndarray:
    """The affine map (3, 3) from pixels of a frame of (width, height) = `size` into the subject's own picture."""
    scale = np.diag([size[0] / WIDTH, size[1] / HEIGHT, 1.0])
    scale[:2, 2] = (scale.diagonal()[:2] - 1) / 2  # pixel centres are at whole numbers
    placed = np.vstack([motion.matrix(number + MIDDLE, SPRITE), [0, 0, 1]])
    return np.linalg.inv(scale @ placed)


def along_motion(pictures: np.ndarray, motion: Motion, number: int, other: int) -> np.ndarray:
    """A picture of another frame, moved as the subject moved: (h, w). The own one where the other shows nothing."""
    size = pictures.shape[:0:-1]
    way = np.linalg.inv(to_sprite(motion, other, size)) @ to_sprite(
        motion, number, size
    )  # pixels of `number` to `other`
    flags, outside = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP, float("nan")
    moved = cv2.warpAffine(pictures[other], way[:2], size, flags=flags, borderValue=outside).clip(0, 1)
    return np.where(np.isnan(moved), pictures[number], moved)


def oracle(mattes: np.ndarray, truth: np.ndarray, motion: Motion, window: int, average) -> np.ndarray:
    """Averages over `window` frames before and after each frame, along the true motion."""
    results = []
    for number, own in enumerate(mattes):
        others = range(max(0, number - window), min(len(mattes), number + window + 1))
        moved = [own] + [along_motion(mattes, motion, number, other) for other in others if other != number]
        is_subject = cv2.dilate(truth[number], MARGIN) > 0.01
        results.append(np.where(is_subject, average(moved, axis=0), truth[number]))
    return np.stack(results)


def measures(mattes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """MAD × 1000 and dtSSD × 100."""
    error = mattes - truth
    return np.array(
        [np.abs(error).mean() * 1000, np.sqrt(np.square(np.diff(error, axis=0)).mean((1, 2))).mean() * 100]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--quality", type=int, default=28)
    parser.add_argument("--window", type=int, default=5, help="frames before and after")
    arguments = parser.parse_args()
    remover = load_remover(device="cpu")
    motions = json.loads((arguments.clips / "motions.json").read_text())
    totals = []
    for name in arguments.names or motions:
        motion = Motion(**motions[name])
        mattes = network_mattes(arguments.clips / "im" / f"{name}-crf{arguments.quality}.mp4", remover)
        truth = true_mattes(arguments.clips / "gt" / f"{name}-crf{arguments.quality}.mkv", mattes.shape[:0:-1])
        rows = [measures(mattes, truth)]
        rows += [
            measures(oracle(mattes, truth, motion, arguments.window, average), truth)
            for average in (np.mean, np.median)
        ]
        totals.append(rows)
        tell(name, rows)
    tell(f"mean of {len(totals)}", np.mean(totals, axis=0))


def tell(name: str, rows) -> None:
    alone, mean, median = rows
    print(
        f"{name:<12} dtSSD {alone[1]:6.2f}, mean {mean[1] / alone[1]:.2f}, median {median[1] / alone[1]:.2f};"
        f" MAD {alone[0]:6.2f}, mean {mean[0] / alone[0]:.2f}, median {median[0] / alone[0]:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
