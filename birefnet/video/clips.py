"""Reading clips: every frame upright, deinterlaced and in 8-bit RGB, with its time. By PyAV, which brings FFmpeg."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from birefnet.errors import CommandError
from birefnet.photos.finding import PHOTO_SUFFIXES, STANDARD_STREAM


MISSING = (
    "clips need PyAV and OpenCV: install the extra `video`, `pip install 'birefnet-transformers[video]'` ({error})"
)
SEQUENCE_SUFFIXES = (*PHOTO_SUFFIXES, ".exr", ".dpx")
_MOMENT = 1e-6  # seconds; 0.08 as a floating-point number is not exactly the time of a frame at 2/25 s
_BT601, _BT709 = 5, 1  # numbers of the matrices in ITU-T H.273, as FFmpeg has them
_UNSPECIFIED = (0, 2)
_LIMITED_RANGE, _FULL_RANGE = 1, 2


def require_av():
    """Imports PyAV and returns the module.

    Raises:
        CommandError: PyAV or OpenCV is missing. The message names the extra that brings both.
    """
    try:
        import av
        import cv2  # noqa: F401
    except ImportError as error:
        raise CommandError(MISSING.format(error=error)) from error
    return av


@dataclass(frozen=True)
class Frame:
    """One frame of a clip.

    Attributes:
        index: Number of the frame among those that are processed, from 0.
        time: When the frame is shown, in units of the clip's `time_base`, counted as in the clip.
        photo: The upright frame, mode RGB, of the clip's size.
    """

    index: int
    time: int
    photo: Image.Image


@dataclass(frozen=True)
class Colours:
    """How a clip's numbers stand for colours. Outputs carry the same marks.

    Attributes:
        primaries, transfer, matrix: Code points of ITU-T H.273, such as 1 for BT.709 and 2 for "not specified".
        range: 1 for limited (16 to 235 in 8 bits), 2 for full.
    """

    primaries: int
    transfer: int
    matrix: int
    range: int


@dataclass
class Clip:
    """A clip on disk.

    Attributes:
        path: The file, or the pattern of an image sequence.
        name: What messages call it.
        options: Options for `av.open`: the format, and the rate of an image sequence or of raw video.
        size: (width, height) of the upright frames in pixels.
        time_base: Seconds per unit of `Frame.time`.
        rate: Average frames per second.
        count: Number of frames as the header says, which may be wrong. `None` where it does not say.
        promised: Seconds that a Matroska header gives. FFmpeg reports no error if such a file is cut off. 0 otherwise.
        colours: How the numbers stand for colours.
        has_audio: Whether there is an audio track.
        notes: What the user must know: damaged packets, frames of another size.
    """

    path: str
    name: str
    options: dict
    size: tuple[int, int] = (0, 0)
    time_base: Fraction = Fraction(1, 25)
    rate: Fraction = Fraction(25)
    count: int | None = None
    promised: float = 0
    colours: Colours = Colours(2, 2, 2, 0)
    has_audio: bool = False
    notes: list[str] = field(default_factory=list)

    def open(self):
        """Opens the file anew and returns PyAV's input container, which the caller closes.

        Raises:
            CommandError: The file does not exist, or FFmpeg cannot read it.
        """
        av = require_av()
        try:
            return av.open(self.path, **self.options)
        except (OSError, ValueError) as error:  # PyAV's errors are both
            if not os.path.exists(self.path) and "%" not in self.path and "*" not in self.path:
                raise CommandError(f"{self.name}: no such file") from error
            raise CommandError(f"{self.name}: not a clip that FFmpeg can read ({_reason(error)})") from error

    def frames(self, start: float = 0, end: float | None = None, every: int = 1, first: int = 0) -> Iterator[Frame]:
        """Decodes the clip, one frame at a time.

        Packets that cannot be decoded are skipped, and frames of another size are scaled to the clip's size. `notes`
        says so then.

        Args:
            start: Seconds from the clip's start. Frames before this time are left out.
            end: Seconds from the clip's start. Frames at this time or later are left out. `None` for the whole clip.
            every: N takes each Nth frame, the first one included.
            first: Index of the first frame to yield. Frames before it are decoded and counted only.

        Yields:
            The frames, in the order in which they are shown. Their times grow.

        Raises:
            CommandError: The file cannot be read.
        """
        taken = 0
        for number, picture in enumerate(self._pictures(start, end)):
            if number % every:
                continue
            if taken >= first:
                yield Frame(taken, picture.pts, self._upright_rgb(picture))
            taken += 1

    def _pictures(self, start: float, end: float | None) -> Iterator:
        """Decoded `av.VideoFrame`s from `start` to before `end`, deinterlaced, each with a time that grows."""
        last = None
        for picture in self._deinterlaced(self._decoded()):
            step = max(1, round(1 / (self.rate * self.time_base)))
            if picture.pts is None or (last is not None and picture.pts <= last):
                picture.pts = 0 if last is None else last + step
            last = picture.pts
            seconds = float(picture.pts * self.time_base)
            if end is not None and seconds >= end - _MOMENT:
                return
            if seconds >= start - _MOMENT:
                yield picture
        self._note_missing_end(0 if last is None else float((last + step) * self.time_base))

    def _note_missing_end(self, seconds: float) -> None:
        if self.promised - seconds > max(0.5, 0.05 * self.promised):  # an audio track may be a little longer
            self.notes.append(
                f"its frames end after {seconds:.1f} of the {self.promised:.1f} seconds that its header gives: it may "
                "be cut off or damaged"
            )

    def _decoded(self) -> Iterator:
        """Frames as they are decoded. Packets that cannot be decoded are skipped and counted."""
        av = require_av()
        damaged = 0
        with self.open() as container:
            stream = _video_stream(container, self.name)
            stream.thread_type = "AUTO"
            packets = container.demux(stream)
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    break
                except av.error.FFmpegError as error:  # the file ends within a packet
                    self.notes.append(f"the file is damaged: reading stopped early ({_reason(error)})")
                    break
                try:
                    yield from packet.decode()
                except av.error.EOFError:
                    break
                except (av.error.InvalidDataError, av.error.ExternalError):
                    damaged += 1
        if damaged:
            self.notes.append(f"the file is damaged: {damaged} packets could not be decoded")

    def _deinterlaced(self, pictures: Iterator) -> Iterator:
        """Frames through FFmpeg's bwdif where the first one is marked as interlaced, else unchanged."""
        first = next(pictures, None)
        if first is None:
            return
        if not first.interlaced_frame:
            yield first
            yield from pictures
            return
        av = require_av()
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=first.width, height=first.height, format=first.format, time_base=self.time_base
        )
        graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
        graph.configure()
        graph.push(first)
        for picture in pictures:
            graph.push(picture)
            yield from _pulled(graph)
        graph.push(None)
        yield from _pulled(graph)

    def _upright_rgb(self, picture) -> Image.Image:
        """A decoded frame as upright RGB of the clip's size."""
        matrix = picture.colorspace
        if matrix in _UNSPECIFIED:
            matrix = _default_matrix(picture.height)
        rgb = picture.reformat(format="rgb24", src_colorspace=int(matrix), dst_color_range=_FULL_RANGE)
        pixels = np.rot90(rgb.to_ndarray(), round((picture.rotation or 0) / 90))
        photo = Image.fromarray(np.ascontiguousarray(pixels))
        if photo.size != self.size:
            note = f"frames of another size were scaled to {self.size[0]}×{self.size[1]}"
            if note not in self.notes:
                self.notes.append(note)
            photo = photo.resize(self.size, Image.Resampling.BICUBIC)
        return photo


def _pulled(graph) -> Iterator:
    """The frames that a filter graph has ready."""
    av = require_av()
    while True:
        try:
            yield graph.pull()
        except (av.error.BlockingIOError, av.error.EOFError):
            return


def _default_matrix(height: int) -> int:
    """What players take for a clip that does not say: BT.709 for HD, BT.601 below."""
    return _BT709 if height >= 720 else _BT601


def _video_stream(container, name: str):
    """The first video track that is no cover picture of an audio file."""
    av = require_av()
    cover = av.stream.Disposition.attached_pic
    tracks = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not tracks:
        has_audio = " (audio only)" if container.streams.audio else ""
        raise CommandError(f"{name}: it has no video track{has_audio}")
    return tracks[0]


@contextmanager
def clip_from(source: str, rate: float | None = None, raw: dict | None = None) -> Iterator[Clip]:
    """
    A context manager that gives a clip from what the user names.

    Args:
        source: A file, a folder of pictures, a pattern of an image sequence (`frames/%05d.png`, `frames/*.png`), or
            `-` for standard input, which is kept in a temporary file: some containers must be read from their end.
        rate: Frames per second of an image sequence; 25 where it is `None`.
        raw: FFmpeg's options for raw video, all as strings: `video_size`, `pixel_format`, `framerate`.

    Yields:
        The clip, with all its attributes filled in from the header and the first frame.

    Raises:
        CommandError: The source does not exist or holds no frame that can be decoded.
    """
    with tempfile.TemporaryDirectory(prefix="birefnet-") as folder:
        name = source
        if source == STANDARD_STREAM:
            name, source = "standard input", os.path.join(folder, "clip")
            with open(source, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            if not os.path.getsize(source):
                raise CommandError("standard input is empty")
        clip = Clip(*_path_and_options(source, name, rate, raw))
        _probe(clip)
        yield clip


def _path_and_options(source: str, name: str, rate: float | None, raw: dict | None) -> tuple[str, str, dict]:
    if raw:
        return source, name, {"format": "rawvideo", "options": raw}
    sequence = {"framerate": str(rate or 25)}
    if os.path.isdir(source):
        files = sorted(path for path in Path(source).iterdir() if path.suffix.lower() in SEQUENCE_SUFFIXES)
        if not files:
            raise CommandError(f"{name}: this folder holds no picture of a sequence")
        source = os.path.join(source, f"*{files[0].suffix}")
    if "*" in source:
        return source, name, {"format": "image2", "options": sequence | {"pattern_type": "glob"}}
    if "%" in source and not os.path.exists(source):
        return source, name, {"format": "image2", "options": sequence}
    return source, name, {}


def _probe(clip: Clip) -> None:
    """Fills in what the header and the first frame say."""
    with clip.open() as container:
        stream = _video_stream(container, clip.name)
        context = stream.codec_context
        clip.time_base = stream.time_base
        clip.rate = stream.average_rate or stream.guessed_rate or clip.rate
        clip.has_audio = bool(container.streams.audio)
        duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1e6
        clip.promised = float(duration) if "matroska" in container.format.name else 0
        clip.count = stream.frames or (round(duration * clip.rate) or None)
    first = next(clip._decoded(), None)
    if first is None:
        raise CommandError(f"{clip.name}: it holds no frame that can be decoded")
    turned = round((first.rotation or 0) / 90) % 2
    clip.size = (first.height, first.width) if turned else (first.width, first.height)
    matrix = int(first.colorspace)
    is_rgb = first.format.is_rgb
    clip.colours = Colours(
        int(context.color_primaries),
        int(context.color_trc),
        _default_matrix(first.height) if matrix in (*_UNSPECIFIED, 0) or is_rgb else matrix,
        _LIMITED_RANGE if is_rgb else int(first.color_range) or _LIMITED_RANGE,
    )
    clip.notes.clear()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
