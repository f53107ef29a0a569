"""Clips through decoding, network, stabilisation, finishing and encoding, which run side by side.

Decoding, network and finishing have threads of their own; stabilisation is in order; the caller's thread encodes. Each
stage is a bounded number of frames ahead of the next one, so memory does not grow with the clip's length.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from birefnet.concurrency import bounded_map
from birefnet.errors import CommandError
from birefnet.video.clips import Clip, Frame, clip_from
from birefnet.video.writing import FORMATS, Format, SegmentWriter, SequenceWriter, check_encoder, join


SEGMENT = 240  # frames from one point that can be resumed from to the next
HELPERS = 2  # threads that finish frames
BLUR_SHARE = 0.02  # standard deviation of the blurred background, as a share of the picture's longer side
JOB_FILE = "job.json"


@dataclass
class _Item:
    """A frame on its way: the pipeline's inputs, then its outputs, then the finished picture."""

    frame: Frame
    data: dict
    is_repeated: bool  # what the network sees of this frame is what it saw of the frame before
    state: dict[str, np.ndarray] | None = None  # of the stabiliser, after the last frame of a segment
    picture: Image.Image | None = None


def process(
    frames: Iterable[Frame],
    remover,
    finish: Callable[[Frame, dict], Image.Image],
    batch_size: int = 1,
    stabilizer=None,
    segment: int = SEGMENT,
) -> Iterator[_Item]:
    """
    Runs frames through the network and finishes them, in order.

    Args:
        frames: The frames. They are taken in a thread of their own, a few ahead of the network.
        remover: A `BiRefNetPipeline`.
        finish: Called with a frame and the pipeline's outputs for it (`logits` of shape (1, 1, h, w), `photo` and so
            on), and returns the result. Several calls run at the same time, in threads.
        batch_size: Frames per call of the network.
        stabilizer: A `Stabilizer`, or `None` for mattes frame by frame.
        segment: Frames of a segment. No batch crosses a border between segments, so that a resumed clip has the same
            batches as one that was never interrupted.

    Yields:
        Items with the `frame` and the `picture` that `finish` has made. The last one of a segment also has the `state`
        of the stabiliser.

    Raises:
        CommandError: The clip cannot be read. Errors of the network and of `finish` are passed on.
    """
    import torch

    cores = torch.get_num_threads()
    networks = min(2, cores) if remover.device.type == "cpu" else 1
    threads_of = (torch.set_num_threads, (max(1, cores // networks),))
    with (
        _Prefetched(_prepared(frames, remover, segment), networks * batch_size + HELPERS) as prepared,
        ThreadPoolExecutor(networks, "network", *threads_of) as computing,
        ThreadPoolExecutor(HELPERS, "finish", torch.set_num_threads, (1,)) as finishing,
    ):
        try:
            batches = _batched(prepared, batch_size, segment)
            computed = bounded_map(computing, lambda batch: _run_network(remover, batch), batches, 2 * networks)
            steady = _stabilized(computed, stabilizer, segment)
            yield from bounded_map(finishing, lambda item: _finish(item, finish), steady, HELPERS + 1)
        finally:
            for executor in (computing, finishing):
                executor.shutdown(wait=True, cancel_futures=True)


class _Prefetched:
    """An iterator whose items are made in a thread of its own, at most `ahead` of them before they are asked for."""

    _END = object()

    def __init__(self, items: Iterable, ahead: int):
        self.items, self.ready, self.stopped = items, queue.Queue(ahead), threading.Event()
        self.thread = threading.Thread(target=self._make, name="decode", daemon=True)

    def _make(self) -> None:
        try:
            for item in self.items:
                if not self._put((item, None)):
                    return
            self._put((self._END, None))
        except BaseException as error:  # handed over to the thread that takes the items
            self._put((self._END, error))

    def _put(self, item) -> bool:
        while not self.stopped.is_set():
            try:
                self.ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.stopped.set()
        self.thread.join()

    def __iter__(self):
        while True:
            item, error = self.ready.get()
            if error is not None:
                raise error
            if item is self._END:
                return
            yield item


def _prepared(frames: Iterable[Frame], remover, segment: int) -> Iterator[_Item]:
    """Frames with the network's input. A frame whose input equals that of the frame before is marked."""
    import torch

    before = None
    for frame in frames:
        data = remover.preprocess(frame.photo)
        values = data["pixel_values"]
        is_repeated = frame.index % segment > 0 and before is not None and torch.equal(values, before)
        before = values
        yield _Item(frame, data, is_repeated)


def _batched(items: Iterable[_Item], size: int, segment: int) -> Iterator[list[_Item]]:
    """Lists of at most `size` frames that the network must see, and the repeated frames among them."""
    batch: list[_Item] = []
    for item in items:
        if batch and (
            item.frame.index % segment == 0
            or (not item.is_repeated and sum(not other.is_repeated for other in batch) == size)
        ):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _run_network(remover, batch: list[_Item]) -> list[_Item]:
    """Replaces the inputs of the frames by the network's outputs. Repeated frames get theirs later."""
    new = [item for item in batch if not item.is_repeated]
    if new:
        for item, outputs in zip(new, remover.forward([item.data for item in new]), strict=True):
            item.data = outputs
    return batch


def _stabilized(batches: Iterable[list[_Item]], stabilizer, segment: int) -> Iterator[_Item]:
    """The frames with steady logits, each one when the frames that count for it are known."""
    logits, waiting = None, deque()
    for item in (item for batch in batches for item in batch):
        logits = item.data["logits"] = logits if item.is_repeated else item.data["logits"]
        is_last_of_segment = (item.frame.index + 1) % segment == 0
        if stabilizer is None:
            item.state = {} if is_last_of_segment else None
            yield item
            continue
        steady = stabilizer.step(logits, item.frame.photo)
        item.state = stabilizer.state() if is_last_of_segment else None
        waiting.append(item)
        if steady is not None:
            yield _with_logits(waiting.popleft(), steady)
    if stabilizer is not None:
        yield from map(_with_logits, waiting, stabilizer.finish())


def _with_logits(item: _Item, logits) -> _Item:
    item.data["logits"] = logits.to(item.data["logits"].device)
    return item


def _finish(item: _Item, finish: Callable) -> _Item:
    import torch

    with torch.inference_mode():
        item.picture = finish(item.frame, item.data)
    item.data = {}
    return item


def as_pipeline(model, processor):
    """
    The background-removal pipeline of a model that is loaded already, on the model's device.

    Args:
        model: A `BiRefNetForImageSegmentation` in evaluation mode.
        processor: Its `BiRefNetImageProcessor`.
    """
    from birefnet.repository.pipeline_birefnet import BiRefNetPipeline

    return BiRefNetPipeline(model=model, image_processor=processor, device=model.device, task="background-removal")


def video_mattes(
    path,
    model,
    processor,
    *,
    batch_size: int = 1,
    stabilize: bool = True,
    start: float = 0,
    end: float | None = None,
    every: int = 1,
) -> Iterator[tuple[Image.Image, np.ndarray, float]]:
    """
    Yields the mattes of a clip, frame by frame, as they are ready. Memory does not grow with the clip's length.

    Args:
        path (`str` or `os.PathLike`): A clip that FFmpeg reads, a folder of pictures or a pattern such as
            `frames/%05d.png`.
        model (`BiRefNetForImageSegmentation`): In evaluation mode.
        processor (`BiRefNetImageProcessor`): The model's own.
        batch_size (`int`, *optional*, defaults to 1): Frames per call of the network.
        stabilize (`bool`, *optional*, defaults to `True`): Whether mattes are steadied over time, see `Stabilizer`.
        start, end (`float`, *optional*): The part of the clip to process, in seconds; `end` is not included.
        every (`int`, *optional*, defaults to 1): N takes each Nth frame, the first one included.

    Yields:
        `tuple`: The upright frame (RGB), its matte, uint8 of shape (height, width), and its time in seconds. With
        `stabilize`, a matte is ready when the next three frames are.

    Raises:
        CommandError: The clip cannot be read, or PyAV or OpenCV is missing.
    """
    from birefnet.video.stabilization import Stabilizer

    remover = as_pipeline(model, processor)
    with clip_from(str(path)) as clip:
        stabilizer = Stabilizer() if stabilize else None
        frames = clip.frames(start, end, every)

        def matte_of(frame: Frame, outputs: dict) -> Image.Image:
            return remover.postprocess(outputs, return_mask=True)

        for item in process(frames, remover, matte_of, batch_size, stabilizer):
            yield item.frame.photo, np.asarray(item.picture), float(item.frame.time * clip.time_base)


@dataclass(frozen=True)
class Options:
    """What becomes of a clip.

    Attributes:
        format: A key of `FORMATS`.
        return_mask: Writes the matte alone.
        background: `None` for transparent, a colour, a picture, `"blur"`, or the path of another clip (`Path`), which
            starts again when it ends.
        stabilize: Whether mattes are steadied over time.
        start, end: The part of the clip to process, in seconds; `end` is not included. `None` for the clip's end.
        every: N takes each Nth frame, the first one included.
        batch_size: Frames per call of the network.
        encoder: FFmpeg's options for the encoder as pairs of name and value. They replace those of the format.
    """

    format: str = "webm"
    return_mask: bool = False
    background: object = None
    stabilize: bool = True
    start: float = 0
    end: float | None = None
    every: int = 1
    batch_size: int = 1
    encoder: tuple[tuple[str, str], ...] = ()


def cut_out_video(
    path,
    output,
    model,
    processor,
    *,
    options: Options | None = None,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """
    Writes a clip's subject on a transparent or another background, with the clip's sound.

    Args:
        path (`str` or `os.PathLike`): As for `video_mattes`.
        output (`str` or `os.PathLike`): The file to write, or the folder for a sequence of pictures.
        model, processor: As for `video_mattes`.
        options (`Options`, *optional*): What to write.
        resume (`bool`, *optional*, defaults to `False`): Goes on where an interrupted run of the same options stopped.
        progress (*optional*): Called with the number of frames that are done.

    Returns:
        `int`: How many frames the result has.

    Raises:
        CommandError: The clip cannot be read or the result cannot be written. What was finished is kept for `resume`.
    """
    with clip_from(str(path)) as clip:
        return write_clip(clip, Path(output), as_pipeline(model, processor), options or Options(), resume, progress)


def write_clip(
    clip: Clip,
    output: Path,
    remover,
    options: Options,
    resume: bool = False,
    progress: Callable[[int], None] | None = None,
    segment: int = SEGMENT,
) -> int:
    """
    `cut_out_video` for a clip and a pipeline that exist.

    When it is interrupted, or the disk is full, the frames that are done are joined into a playable file.

    Args:
        clip: From `clip_from`.
        output: The file to write, or the folder for a sequence of pictures. Its parents are made.
        remover: A `BiRefNetPipeline`.
        options: What to write.
        resume: Goes on where an interrupted run of the same options stopped.
        progress: Called with the number of frames that are done, from this and earlier runs.
        segment: Frames from one point that can be resumed from to the next.

    Returns:
        How many frames the result has.

    Raises:
        CommandError: The clip cannot be read or the result cannot be written. What was finished is kept for `resume`.
    """
    output_format = FORMATS[options.format]
    check_encoder(output_format)
    if not output_format.is_sequence and output.suffix.lower() != output_format.suffix:
        raise CommandError(f"{output}: {options.format} needs the suffix {output_format.suffix}")
    if output.is_file() if output_format.is_sequence else output.is_dir():
        raise CommandError(f"{output}: this is a {'file' if output_format.is_sequence else 'folder'}")
    work = _Work(clip, output, output_format, options, segment)
    try:
        work.prepare(resume)
        try:
            for item in _pictures(clip, remover, options, work):
                work.write(item)
                if progress is not None:
                    progress(work.count)
        except BaseException:
            work.close_segment(is_whole=False)
            if work.count:
                work.join()
            else:
                work.remove()
            raise
        work.close_segment(is_whole=False)
        if not work.count:
            work.remove()
            raise CommandError(f"{clip.name}: no frame lies between --start and --end")
        work.join()
        work.remove()
    except OSError as error:
        kept = f"; the parts that are finished are in {work.folder}" if work.segments else ""
        raise CommandError(f"{output}: cannot be written ({error.strerror or error}){kept}") from error
    return work.count


def _pictures(clip: Clip, remover, options: Options, work: _Work) -> Iterator[_Item]:
    from birefnet.video.stabilization import Stabilizer

    stabilizer = Stabilizer() if options.stabilize else None
    if stabilizer is not None:
        stabilizer.restore(work.state)
    frames = clip.frames(options.start, options.end, options.every, first=work.count)
    background = options.background
    if isinstance(background, Path):
        frames, background = _with_background_clip(frames, background, work.count)

    def finish(frame: Frame, outputs: dict) -> Image.Image:
        behind = background(frame) if callable(background) else background
        if behind == "blur":
            radius = BLUR_SHARE * max(frame.photo.size)
            small = frame.photo.reduce(4)
            behind = small.filter(ImageFilter.GaussianBlur(radius / 4)).resize(frame.photo.size)
        if options.return_mask:
            return remover.postprocess(outputs, return_mask=True)
        return remover.postprocess(outputs, background=behind)

    return process(frames, remover, finish, options.batch_size, stabilizer, work.segment)


def _with_background_clip(frames: Iterator[Frame], path: Path, first: int) -> tuple[Iterator[Frame], Callable]:
    """The frames, and a function that gives the picture behind each of them, from a clip that is repeated."""
    behind: dict[int, Image.Image] = {}

    def pictures() -> Iterator[Image.Image]:
        with clip_from(str(path)) as clip:
            while True:
                yield from (frame.photo for frame in clip.frames())

    def paired() -> Iterator[Frame]:
        source = pictures()
        for _ in range(first):
            next(source)
        for frame in frames:
            behind[frame.index] = next(source)
            yield frame

    return paired(), lambda frame: behind.pop(frame.index)


class _Work:
    """
    The folder beside the output that holds finished segments until they are joined.

    Each segment is a file of its own (or a range of a sequence's pictures), with the times of its frames and the
    state of the stabiliser after it. So a run that was killed goes on with the next segment and gives the same file.
    """

    def __init__(self, clip: Clip, output: Path, output_format: Format, options: Options, segment: int):
        self.clip, self.output, self.format, self.options = clip, output, output_format, options
        self.segment = segment
        self.folder = output.with_name(f".{output.name}.partial")
        self.segments: list[tuple[Path, list[int]]] = []
        self.state: dict[str, np.ndarray] = {}
        self.writer = None
        self.count = 0

    def prepare(self, resume: bool) -> None:
        """Makes the folder, or takes over what an interrupted run has left in it."""
        job = self._job()
        found = self.folder / JOB_FILE
        if resume and found.is_file() and json.loads(found.read_text()) == job:
            self._take_over()
            return
        if resume and found.is_file():
            raise CommandError(f"{self.output}: --resume needs the arguments and the clip of the interrupted run")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        found.write_text(json.dumps(job))

    def _job(self) -> dict:
        """What must be the same for a run to go on with another one's segments."""
        path = Path(self.clip.path)
        status = path.stat() if path.is_file() else None
        background = self.options.background
        if isinstance(background, Image.Image):
            background = f"picture of {background.size}"
        return {
            "clip": self.clip.path,
            "bytes": status and status.st_size,
            "changed": status and status.st_mtime_ns,
            "options": repr({**vars(self.options), "background": background}),
            "segment": self.segment,
        }

    def _take_over(self) -> None:
        while (times := self._path(len(self.segments), ".json")).is_file():
            number = len(self.segments)
            self.segments.append((self._path(number, self.format.suffix), json.loads(times.read_text())))
            self.count += len(self.segments[-1][1])
        if self.segments:
            with np.load(self._path(len(self.segments) - 1, ".npz")) as state:
                self.state = dict(state)

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:05}{suffix}"

    def write(self, item: _Item) -> None:
        """Encodes a frame; after the last frame of a segment, completes the segment."""
        if self.writer is None:
            if self.format.is_sequence:
                self.writer = SequenceWriter(self.output, self.format, self.clip, self.count)
            else:
                path = self._path(len(self.segments), self.format.suffix)
                self.writer = SegmentWriter(path, self.format, self.clip, dict(self.options.encoder))
        self.writer.write(item.picture, item.frame.time)
        self.count += 1
        if item.state is not None:
            self.state = item.state
            self.close_segment(is_whole=True)

    def close_segment(self, is_whole: bool) -> None:
        """Completes the segment. Only a whole one is marked as one that a later run may go on from."""
        writer, self.writer = self.writer, None
        if writer is None:
            return
        writer.close()
        number = len(self.segments)
        self.segments.append((self._path(number, self.format.suffix), writer.times))
        if is_whole:
            np.savez(self._path(number, ".npz"), **self.state)
            partial = self._path(number, ".tmp")
            partial.write_text(json.dumps(writer.times))
            partial.replace(self._path(number, ".json"))  # last: this file says that the segment is complete

    def join(self) -> None:
        """Writes the output from the segments."""
        if self.format.is_sequence:
            return
        start, end = self.options.start, self.options.end
        span = None if not start and end is None else (start, end)
        self.clip.notes += join(self.segments, self.output, self.format, self.clip, span)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
