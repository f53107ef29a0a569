"""Writing clips: encoders and their containers, picture sequences, and joining finished segments with the sound."""

from __future__ import annotations

import heapq
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from birefnet.errors import CommandError
from birefnet.photos.writing import encode_picture, write_whole
from birefnet.video.clips import Clip, Colours, require_av


@dataclass(frozen=True)
class Format:
    """One kind of output.

    Attributes:
        suffix: Of the file; of each picture for a sequence.
        codec: FFmpeg's name of the encoder; `None` for a sequence of PNG files.
        pixel_format: FFmpeg's name of the layout that the encoder gets.
        options: The encoder's options.
        has_alpha: Whether the output can be transparent.
        is_sequence: Whether the output is a folder with one picture a frame.
        audio_codec: What sound is re-encoded with where the container cannot hold it as it is.
    """

    suffix: str
    codec: str | None
    pixel_format: str
    options: dict
    has_alpha: bool
    is_sequence: bool = False
    audio_codec: str = "aac"


# FFmpeg's VP9 encoder cannot encode alpha together with alternate reference frames. Without B-frames packets come in
# the order of the frames, so that segments can be joined by their times alone.
FORMATS = {
    "webm": Format(
        ".webm",
        "libvpx-vp9",
        "yuva420p",
        # "realtime" takes half the time of "good" at the same error; files are a quarter larger.
        {"crf": "24", "b": "0", "auto-alt-ref": "0", "deadline": "realtime", "cpu-used": "5", "row-mt": "1"},
        has_alpha=True,
        audio_codec="libopus",
    ),
    "prores": Format(
        ".mov", "prores_ks", "yuva444p10le", {"profile": "4444", "vendor": "apl0", "alpha_bits": "16"}, has_alpha=True
    ),
    "h264": Format(".mp4", "libx264", "yuv420p", {"crf": "18", "preset": "fast", "bf": "0"}, has_alpha=False),
    "h265": Format(
        ".mp4",
        "libx265",
        "yuv420p",
        {"crf": "20", "preset": "fast", "x265-params": "bframes=0:log-level=error"},
        has_alpha=False,
    ),
    "png": Format(".png", None, "rgba", {}, has_alpha=True, is_sequence=True),
    "exr": Format(".exr", "exr", "gbrapf32le", {"compression": "zip16"}, has_alpha=True, is_sequence=True),
}
FORMAT_OF_SUFFIX = {".webm": "webm", ".mov": "prores", ".mp4": "h264"}


class SegmentWriter:
    """One finished part of a clip: a file of its own, with the times of its frames kept beside it.

    Args:
        path: The file to write. Its suffix is that of the format.
        output_format: One of the values of `FORMATS`, not a sequence.
        clip: Where the frames come from: its rate, time base and colours.
        options: FFmpeg's options of the encoder, as strings. They replace those of the format.

    Attributes:
        times: Times of the frames that were written, in units of the clip's time base.
    """

    def __init__(self, path: Path, output_format: Format, clip: Clip, options: dict):
        self.path, self.format, self.clip = path, output_format, clip
        self.times: list[int] = []
        av = require_av()
        self.container = av.open(str(path), "w")
        rate = Fraction(clip.rate).limit_denominator(1001)
        self.stream = self.container.add_stream(
            output_format.codec, rate=rate, options=output_format.options | options
        )
        self.encodes_alpha = output_format.has_alpha

    def write(self, picture: Image.Image, time: int) -> None:
        """Encodes one frame.

        Args:
            picture: The frame, mode RGB, RGBA or L. All frames of a segment have the same mode and size.
            time: When it is shown, in units of the clip's time base.

        Raises:
            CommandError: The encoder refuses the size, an option or its value.
            OSError: The file cannot be written.
        """
        if not self.times:
            self._set_up(picture)
        frame = _to_video_frame(picture, self.stream.pix_fmt, self.clip.colours)
        frame.pts, frame.time_base = len(self.times), 1 / self.stream.codec_context.framerate
        self.times.append(time)
        self.container.mux(self.stream.encode(frame))

    def _set_up(self, picture: Image.Image) -> None:
        context, colours = self.stream.codec_context, self.clip.colours
        pixel_format = self.format.pixel_format
        if picture.mode != "RGBA":
            pixel_format = pixel_format.replace("yuva", "yuv")
        width, height = picture.size
        if "420" in pixel_format:
            width, height = width + width % 2, height + height % 2  # see `_even`
        self.stream.width, self.stream.height, self.stream.pix_fmt = width, height, pixel_format
        context.color_primaries, context.color_trc = colours.primaries, colours.transfer
        context.colorspace, context.color_range = colours.matrix, colours.range
        self._open(context)

    def _open(self, context) -> None:
        """Starts the encoder now rather than with the first frame, to say what is wrong with its options."""
        av = require_av()
        given = ", ".join(f"{name}={value}" for name, value in context.options.items())
        try:
            context.open()
        except av.error.FFmpegError as error:
            raise CommandError(
                f"{context.name} cannot encode {context.width}×{context.height} with {given}"
            ) from error
        if context.options:  # FFmpeg leaves what it does not know
            raise CommandError(f"{context.name} has no option {', '.join(context.options)}")

    def close(self) -> None:
        """Completes the file: it is playable from here on."""
        try:
            if self.times:
                self.container.mux(self.stream.encode())
        finally:
            self.container.close()


class SequenceWriter:
    """A part of a sequence: one PNG or EXR file a frame. It has the methods and `times` of `SegmentWriter`.

    Args:
        folder: Where the pictures go. They are called 000000.png, 000001.png and so on.
        output_format: One of the values of `FORMATS`, a sequence.
        clip: Where the frames come from.
        first: Number of the first picture.
    """

    def __init__(self, folder: Path, output_format: Format, clip: Clip, first: int):
        self.folder, self.format, self.clip = folder, output_format, clip
        self.number = first
        self.times: list[int] = []

    def write(self, picture: Image.Image, time: int) -> None:
        """Writes one picture whole or not at all. For the arguments and errors see `SegmentWriter.write`."""
        if self.format.codec is None:
            encoded = encode_picture(picture, "png", {})
        else:
            encoded = encode_exr(picture, self.format.options)
        write_whole(encoded, self.folder / f"{self.number:06}{self.format.suffix}")
        self.number += 1
        self.times.append(time)

    def close(self) -> None:
        """Every file is complete already."""


def _to_video_frame(picture: Image.Image, pixel_format: str, colours: Colours):
    """A picture as a frame of the encoder's layout, in the colours that the stream is marked with."""
    av = require_av()
    pixels = np.asarray(picture if picture.mode != "L" else picture.convert("RGB"))
    if "420" in pixel_format:
        pixels = _even(pixels)
    if picture.mode == "RGBA":
        pixels = fill_transparent(pixels)
    frame = av.VideoFrame.from_ndarray(
        np.ascontiguousarray(pixels), format="rgba" if pixels.shape[2] == 4 else "rgb24"
    )
    return frame.reformat(format=pixel_format, dst_colorspace=colours.matrix, dst_color_range=colours.range)


def _even(pixels: np.ndarray) -> np.ndarray:
    """Repeats the last row and column where their number is odd: 4:2:0 shares colours among 2 × 2 pixels."""
    rows, columns = pixels.shape[0] % 2, pixels.shape[1] % 2
    return np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else pixels


def fill_transparent(pixels: np.ndarray, block: int = 16) -> np.ndarray:
    """
    Replaces the colours of fully transparent pixels by the subject's colours nearby.

    What was cut away must not be recoverable from the file. Black instead would darken the subject's edge, since the
    encoder shares colours among neighbouring pixels.

    Args:
        pixels: RGBA, uint8, (height, width, 4).
        block: Side of the squares that get one colour each, in pixels.

    Returns:
        RGBA, uint8, of the same shape.
    """
    import cv2

    height, width = pixels.shape[:2]
    small = (max(1, width // block), max(1, height // block))
    colours, alpha = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), cv2.extractChannel(pixels, 3)
    premultiplied = cv2.multiply(colours, cv2.merge([alpha] * 3), dtype=cv2.CV_32F)
    premultiplied = cv2.resize(premultiplied, small, interpolation=cv2.INTER_AREA).reshape(*small[::-1], 3)
    weight = cv2.resize(alpha.astype(np.float32), small, interpolation=cv2.INTER_AREA).reshape(*small[::-1], 1)
    sums = np.dstack([premultiplied, weight])  # (rows, columns, 4)
    total = sums[..., 3].mean()
    mean = sums[..., :3].mean((0, 1)) / total if total > 0 else np.zeros(3, np.float32)
    near = cv2.GaussianBlur(sums, (0, 0), 1.5)
    near = (near[..., :3] + 0.01 * mean) / (near[..., 3:] + 0.01)
    fill = cv2.resize(near.round().clip(0, 255).astype(np.uint8), (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.merge([*cv2.split(cv2.copyTo(colours, alpha, fill)), alpha])  # the photo where alpha is not 0


def encode_exr(picture: Image.Image, options: dict) -> bytes:
    """
    An OpenEXR file: linear light (the curve of sRGB, IEC 61966-2-1, undone), colours premultiplied by alpha.

    Args:
        picture: The frame, of any mode. A frame without transparency gets an alpha of 1.
        options: FFmpeg's options of its EXR encoder, as strings.

    Returns:
        The file. Its channels are red, green, blue and alpha as 32-bit floats in 0 to 1.
    """
    av = require_av()
    pixels = np.asarray(picture.convert("RGBA"), np.float32) / 255
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    planes = np.dstack([linear * alpha, alpha]).astype(np.float32)
    frame = av.VideoFrame(picture.width, picture.height, "gbrapf32le")
    for plane, channel in zip(frame.planes, (1, 2, 0, 3), strict=True):
        rows = np.zeros((picture.height, plane.line_size // 4), np.float32)
        rows[:, : picture.width] = planes[..., channel]
        plane.update(rows.tobytes())
    codec = av.CodecContext.create("exr", "w")
    codec.width, codec.height, codec.pix_fmt = picture.width, picture.height, "gbrapf32le"
    codec.time_base, codec.options = Fraction(1, 25), options
    frame.pts = 0
    return b"".join(bytes(packet) for packet in itertools.chain(codec.encode(frame), codec.encode()))


# --- Joining ---


def join(
    segments: list[tuple[Path, list[int]]], destination: Path, output_format: Format, clip: Clip, span: tuple | None
) -> list[str]:
    """
    Joins finished segments and the clip's sound into one file, without re-encoding a frame.

    Args:
        segments: The files, in order and at least one, each with the times of its frames in units of the clip's time
            base.
        destination: The file to write. A file that is there is replaced when the new one is complete.
        output_format: One of the values of `FORMATS`, not a sequence.
        clip: Where the sound comes from. Its first audio track is taken.
        span: (start, end) in seconds of the part that was asked for; times in the result count from its start. `None`
            for a whole clip, whose times stay as they are.

    Returns:
        Notes for the user: what became of the sound.

    Raises:
        OSError: The file cannot be written. Nothing is left behind.
    """
    av = require_av()
    notes: list[str] = []
    partial = destination.with_name(f".{destination.stem}.partial{destination.suffix}")
    start = segments[0][1][0] * clip.time_base if span else None
    end = span[1] if span else None
    try:
        with av.open(str(partial), "w") as output, clip.open() as source:
            with av.open(str(segments[0][0])) as first:
                template = first.streams.video[0]
                video = output.add_stream_from_template(template, opaque=True)
                video.time_base = clip.time_base
                if "yuva" in (output_format.pixel_format if output_format.has_alpha else ""):
                    video.metadata["alpha_mode"] = "1"
            packets = [_video_packets(segments, video, clip, start)]
            for track in source.streams.audio[:1]:
                packets.append(_audio_packets(source, track, output, output_format, start, end, notes))
            for _, _, packet in heapq.merge(*packets, key=lambda item: item[:2]):
                output.mux(packet)
        os.replace(partial, destination)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return notes


def _video_packets(segments, video, clip: Clip, start: Fraction | None) -> Iterator[tuple]:
    """(seconds, track, packet) of the segments' packets with the clip's own times."""
    av = require_av()
    offset = round((start or 0) / clip.time_base)
    times = [time for _, own in segments for time in own]
    step = max(1, round(1 / (clip.rate * clip.time_base)))
    following = iter([*times[1:], times[-1] + step])
    for path, own in segments:
        remaining = iter(own)
        with av.open(str(path)) as container:
            for packet in container.demux(container.streams.video[0]):
                if packet.size == 0:
                    continue
                time = next(remaining)
                packet.stream, packet.time_base = video, clip.time_base
                packet.pts = packet.dts = time - offset
                packet.duration = next(following) - time
                yield float((time - offset) * clip.time_base), 0, packet


def _audio_packets(source, track, output, output_format: Format, start, end, notes: list[str]) -> Iterator[tuple]:
    """(seconds, track, packet) of the clip's sound, copied where the container can hold it, else re-encoded."""
    name = track.codec_context.name
    # A decoder's name is not always the codec's, which the container asks for.
    codec = track.codec_context.codec.canonical_name
    if codec in output.supported_codecs or (codec.startswith("pcm") and output_format.suffix == ".mov"):
        copy = output.add_stream_from_template(track)
        return _copied(source, track, copy, start, end)
    notes.append(f"{output_format.suffix} holds no {name} sound: it was re-encoded to {output_format.audio_codec}")
    encoder = output.add_stream(output_format.audio_codec, rate=48000)
    return _reencoded(source, track, encoder, start, end)


def _copied(source, track, copy, start: Fraction | None, end: float | None) -> Iterator[tuple]:
    """Packets from `start` on. Without a start all are kept: those before 0 prepare the decoder."""
    for packet in source.demux(track):
        if packet.size == 0 or packet.pts is None:
            continue
        seconds = packet.pts * packet.time_base
        if start is not None and seconds < start:
            continue
        if end is not None and seconds >= end:
            return
        shift = round((start or 0) / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, (packet.pts if packet.dts is None else packet.dts) - shift
        packet.stream = copy
        yield float(seconds - (start or 0)), 1, packet


def _reencoded(source, track, encoder, start: Fraction | None, end: float | None) -> Iterator[tuple]:
    """Decoded, resampled to 48 kHz and encoded anew, from `start` to before `end`."""
    av = require_av()
    start = start or 0
    context = encoder.codec_context
    resampler = av.AudioResampler(format=context.codec.audio_formats[0], layout=track.layout, rate=48000)
    encoder.layout = track.layout

    def encoded(frame):
        for packet in encoder.encode(frame):
            yield float(packet.pts * packet.time_base), 1, packet

    for frame in source.decode(track):
        if frame.time is None or frame.time < start:
            continue
        if end is not None and frame.time >= end:
            break
        frame.pts -= round(start / frame.time_base)
        for resampled in resampler.resample(frame):
            yield from encoded(resampled)
    yield from encoded(None)


def check_encoder(output_format: Format) -> None:
    """
    Checks that FFmpeg, as PyAV brings it, has the encoder of a format.

    Raises:
        CommandError: It has not.
    """
    av = require_av()
    if output_format.codec is None:
        return
    try:
        av.codec.Codec(output_format.codec, "w")
    except (ValueError, av.error.FFmpegError) as error:
        raise CommandError(f"this PyAV has no encoder {output_format.codec}") from error
