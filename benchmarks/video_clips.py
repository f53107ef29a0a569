"""
Clips with true mattes, made by compositing: drawn subjects with thin parts and hair-like strands, and subjects cut out
of photos that installed packages ship. They move, turn and scale over moving pictures.

    python benchmarks/video_clips.py clips/

Each clip is αF + (1 − α)B with motion blur (the mean of several moments of the exposure), sensor noise, and H.264
compression at three qualities. `clips/im/` holds the clips and `clips/gt/` their mattes without loss, as
`birefnet evaluate --video` reads them. `clips/motions.json` holds each subject's path, for `video_oracle.py`.
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from PIL import Image

from birefnet import repository_folder


try:
    from birefnet.data import drawn_scenes
except ImportError:
    from birefnet import drawn_scenes

WIDTH, HEIGHT, FRAMES, RATE = 848, 480, 32, 25
SPRITE = 640  # side of the square that holds a subject, in pixels
EXPOSURES = 4  # moments that a frame's motion blur is the mean of
SHUTTER = 0.5  # share of the frame's time that the shutter is open
QUALITIES = (18, 28, 38)  # H.264 constant rate factors: visually lossless, usual for the web, poor
READ_NOISE, SHOT_NOISE = 2.0, 0.25  # standard deviation in gray levels; growth of the variance with the gray level
DRAWN = ("strands", "tree", "wheels", "furniture", "feather", "insect")
CUT = ("astronaut", "chelsea", "coffee", "rocket")


@dataclass(frozen=True)
class Motion:
    """A path through the picture: a start, a speed per frame, and a sway.

    Attributes:
        start: Centre in the first frame, as shares of the picture's width and height.
        speed: Pixels per frame.
        turn: Radians per frame.
        scale: Size in the first frame; the sprite's own is 1.
        growth: Factor of the size from frame to frame.
        sway: Pixels of a slow oscillation across.
    """

    start: tuple[float, float]
    speed: tuple[float, float]
    turn: float
    scale: float
    growth: float
    sway: float

    def matrix(self, moment: float, side: int) -> np.ndarray:
        """The affine map (2, 3) of a square picture of the given side into the frame at a moment (in frames)."""
        angle, scale = self.turn * moment, self.scale * self.growth**moment
        cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
        x = self.start[0] * WIDTH + self.speed[0] * moment
        y = self.start[1] * HEIGHT + self.speed[1] * moment + self.sway * math.sin(0.25 * moment)
        middle = side / 2
        return np.array(
            [
                [cosine, -sine, x - cosine * middle + sine * middle],
                [sine, cosine, y - sine * middle - cosine * middle],
            ]
        )


def subject_motion(random: np.random.Generator, is_fast: bool) -> Motion:
    direction = random.choice((-1, 1))
    speed = random.uniform(22, 30) if is_fast else random.uniform(1, 7)
    return Motion(
        start=(0.5 - direction * (0.42 if is_fast else speed * FRAMES / 2 / WIDTH), random.uniform(0.45, 0.55)),
        speed=(direction * speed, random.uniform(-1, 1)),
        turn=random.uniform(-0.02, 0.02),
        scale=random.uniform(0.5, 0.65) if is_fast else random.uniform(0.6, 0.8),
        growth=random.uniform(0.995, 1.006),
        sway=random.uniform(0, 6),
    )


def background_motion(random: np.random.Generator) -> Motion:
    speed = tuple(random.uniform(-2, 2, 2))
    return Motion((0.5, 0.5), speed, random.uniform(-0.002, 0.002), 1.1, random.uniform(0.999, 1.003), 3)


# --- Subjects ---


def photos_with_mattes() -> dict[str, tuple[Image.Image, Image.Image]]:
    """Photos of scikit-image, each with the matte that the embedded weights give it.

    How good these mattes are does not matter: what is composited with a matte has this matte.
    """
    from skimage import data
    from transformers import pipeline

    remover = pipeline(model=str(repository_folder()), trust_remote_code=True)
    photos = {name: Image.fromarray(getattr(data, name)()) for name in CUT}
    return {name: (photo, remover(photo, return_mask=True)) for name, photo in photos.items()}


def cut_sprite(photo: Image.Image, matte: Image.Image) -> np.ndarray:
    """A photo's subject in the middle of a square: premultiplied RGB and alpha, float32 (SPRITE, SPRITE, 4)."""
    from birefnet.repository.matting_birefnet import cut_out
    from birefnet.repository.pipeline_birefnet import to_planes

    planes = cut_out(to_planes(photo), to_planes(matte) / 255)
    box = matte.point(lambda value: 255 * (value > 25)).getbbox()
    subject = Image.merge("RGBA", [Image.fromarray(plane.numpy()) for plane in planes]).crop(box)
    subject = subject.resize([round(side * 0.95 * SPRITE / max(subject.size)) for side in subject.size])
    square = Image.new("RGBA", (SPRITE, SPRITE))
    square.paste(subject, ((SPRITE - subject.width) // 2, (SPRITE - subject.height) // 2))
    return premultiplied(np.asarray(square, np.float32))


def drawn_sprite(random: np.random.Generator, shape: str, photos, background: np.ndarray) -> np.ndarray:
    """A drawn subject with a texture that differs from the background: as `cut_sprite`."""
    parts = getattr(drawn_scenes, shape)(random)
    low = np.min([part.points.min(0) for part in parts], 0)
    high = np.max([part.points.max(0) for part in parts], 0)
    scale = 0.92 / (high - low).max()
    parts = [
        drawn_scenes.Part(
            (part.points - (low + high) / 2) * scale + 0.5,
            None if part.widths is None else (part.widths * scale).clip(0.004),  # two pixels of a frame
            part.ink,
        )
        for part in parts
    ]
    mask = drawn_scenes.rasterize(parts, SPRITE)
    tones = random.integers(100, 157, len(parts))
    tones = np.asarray(drawn_scenes.rasterize(parts, SPRITE, tones, paper=128))[..., None] / 128
    behind = cv2.resize(background, (SPRITE, SPRITE)).astype(np.float64)
    texture = drawn_scenes.draw_foreground(random, photos, mask, tones, behind)
    return premultiplied(np.dstack([texture, np.asarray(mask)]).astype(np.float32))


def premultiplied(pixels: np.ndarray) -> np.ndarray:
    pixels[..., 3] /= 255
    pixels[..., :3] *= pixels[..., 3:]
    return pixels


# --- Frames ---


def render(sprite: np.ndarray, background: np.ndarray, motions: tuple[Motion, Motion], number: int):
    """One frame without noise, float32 (HEIGHT, WIDTH, 3) in 0 to 255, and its true matte in 0 to 1."""
    size, photo, matte = (WIDTH, HEIGHT), 0, 0
    for exposure in range(EXPOSURES):
        moment = number + SHUTTER * exposure / EXPOSURES
        subject = cv2.warpAffine(sprite, motions[0].matrix(moment, SPRITE), size, flags=cv2.INTER_LINEAR)
        behind = cv2.warpAffine(
            background,
            motions[1].matrix(moment, background.shape[0]),
            size,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
        photo = photo + (subject[..., :3] + (1 - subject[..., 3:]) * behind) / EXPOSURES
        matte = matte + subject[..., 3] / EXPOSURES
    return photo, matte


def expose(random: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """Adds what a sensor adds; uint8."""
    noise = random.normal(size=photo.shape) * np.sqrt(READ_NOISE**2 + SHOT_NOISE * photo)
    return (photo + noise).round().clip(0, 255).astype(np.uint8)


def draw_clip(random: np.random.Generator, sprite: np.ndarray, background: np.ndarray, motions: tuple[Motion, Motion]):
    """The frames of a clip, uint8 (HEIGHT, WIDTH, 3), and their mattes, uint8 (HEIGHT, WIDTH)."""
    for number in range(FRAMES):
        photo, matte = render(sprite, background, motions, number)
        yield expose(random, photo), (matte * 255).round().clip(0, 255).astype(np.uint8)


def background_picture(random: np.random.Generator, photos) -> np.ndarray:
    """A square picture that is larger than a frame, float32 (1000, 1000, 3)."""
    pixels = drawn_scenes.draw_background(random, photos, 512)
    return cv2.resize(pixels.astype(np.float32), (1000, 1000), interpolation=cv2.INTER_CUBIC).clip(0, 255)


def write_video(path: Path, frames: list[np.ndarray], codec: str, pixel_format: str, options: dict):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixel_format
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24" if frame.ndim == 3 else "gray")
            picture.pts, picture.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def make_clips(folder: Path, names: tuple[str, ...] = (*DRAWN, *CUT), qualities=QUALITIES):
    """Writes `im/NAME-crfQUALITY.mp4`, `gt/NAME-crfQUALITY.mkv` for every subject and quality, and `motions.json`."""
    paths = {}
    for part in ("im", "gt"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    subjects = photos_with_mattes()
    for number, name in enumerate(names):
        random = np.random.default_rng((2026, number))
        others = [pair for other, pair in subjects.items() if other != name]
        background = background_picture(random, others)
        if name in CUT:
            sprite = cut_sprite(*subjects[name])
        else:
            sprite = drawn_sprite(random, name, others, background)
        motions = subject_motion(random, is_fast=number % 4 == 3), background_motion(random)
        paths[name] = asdict(motions[0])
        frames, mattes = zip(*draw_clip(random, sprite, background, motions), strict=True)
        for quality in qualities:
            options = {"crf": str(quality), "preset": "fast", "threads": "1"}
            write_video(folder / "im" / f"{name}-crf{quality}.mp4", frames, "libx264", "yuv420p", options)
            write_video(folder / "gt" / f"{name}-crf{quality}.mkv", mattes, "ffv1", "gray", {"threads": "1"})
        print(name)
    (folder / "motions.json").write_text(json.dumps(paths, indent=1))


if __name__ == "__main__":
    make_clips(Path(sys.argv[1] if len(sys.argv) > 1 else "clips"))
