"""Small clips that tests make: a bright disc that moves over a striped background."""

from fractions import Fraction

import av
import numpy as np


def picture(number: int, width: int = 64, height: int = 48, speed: float = 2) -> np.ndarray:
    """Frame `number` as RGB, uint8, (height, width, 3)."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([60 + 30 * np.sin(columns / 5), 90 + 30 * np.cos(rows / 7), 120 + 0 * rows], -1)
    disc = (columns - 12 - speed * number) ** 2 + (rows - height / 2) ** 2 < 90
    pixels[disc] = (230, 200, 40)
    return pixels.round().astype(np.uint8)


def write_clip(
    path,
    frames: int = 8,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rate: int = 25,
    times=None,
    audio: str | None = None,
    rotation: int = 0,
    options: dict | None = None,
    set_up=None,
):
    """Writes a clip; `times` are those of the frames in 1/1000 s, for a variable frame rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        stream.time_base = Fraction(1, 1000)
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation) if hasattr(stream, "set_display_rotation") else None
        if set_up is not None:
            set_up(stream)
        sound = container.add_stream(audio, rate=48000) if audio else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.time_base = Fraction(1, 1000)
            frame.pts = times[number] if times else round(number * 1000 / rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_tone(container, sound, frames / rate)
    return path


def _write_tone(container, sound, seconds: float):
    samples = np.sin(np.arange(round(48000 * seconds)) / 20).astype(np.float32)[None] * 0.2
    for start in range(0, samples.shape[1], 1024):
        frame = av.AudioFrame.from_ndarray(samples[:, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        container.mux(sound.encode(frame))
    container.mux(sound.encode())


def decoded(path, codec: str | None = None) -> list[np.ndarray]:
    """The frames of a clip as RGBA. WebM's alpha needs FFmpeg's libvpx decoder."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if codec is None:
            return [frame.to_ndarray(format="rgba") for frame in container.decode(stream)]
        decoder = av.CodecContext.create(codec, "r")
        frames = [frame for packet in container.demux(stream) if packet.size for frame in decoder.decode(packet)]
        return [frame.to_ndarray(format="rgba") for frame in [*frames, *decoder.decode(None)]]


def times_of(path) -> list[float]:
    """The presentation times of a clip's frames, in seconds."""
    with av.open(str(path)) as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
