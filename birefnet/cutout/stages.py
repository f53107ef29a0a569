"""The stages of `birefnet cutout` (decoding, network, encoding and writing), each in its own threads."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

from PIL import Image

from birefnet.concurrency import bounded_map
from birefnet.cutout.jobs import Job, Report, in_one_line
from birefnet.photos.reading import read_photo
from birefnet.photos.writing import encode_picture, write_whole


def cut_out_photos(
    jobs: list[Job],
    remover,
    batch_size: int,
    picture_format: str,
    overwrite: bool = False,
    srgb: bool = False,
    **options,
) -> Iterator[Report]:
    """
    Cuts out photos and reports each of them, in the order of the jobs.

    Decoding, network and encoding have their own threads, so that no stage waits for another. On a CPU two network
    calls run in parallel, each on half of the cores. This is faster than one call on all cores, since cores that share
    a photo wait for each other at every operation. An error affects only its own photo.

    Args:
        jobs: the photos and their output files.
        remover: a `BiRefNetPipeline`.
        batch_size: photos per call of the network.
        picture_format: `"png"`, `"webp"` or `"jpeg"`.
        overwrite: whether to replace results that have appeared since the jobs were planned.
        srgb: whether to convert photos with an ICC profile to sRGB.
        options: options of the pipeline's `postprocess`, such as `return_mask` and `background`.
    """
    yield from run_stages(jobs, Stages(remover, picture_format, overwrite, srgb, options), batch_size)


def run_stages(jobs: list, stages: "Stages", batch_size: int) -> Iterator:
    """
    Sends jobs through the stages, as `cut_out_photos` describes.

    Args:
        jobs: the arguments of `stages.decode`.
        stages: a `Stages`, or a subclass that reads and writes elsewhere.
        batch_size: photos per call of the network.

    Yields:
        What `stages.finish` returns for each job, in order.
    """
    import torch  # takes a second; `birefnet cutout --help` imports this module, too

    remover = stages.remover
    cores = torch.get_num_threads()
    helpers = max(1, min(4, os.cpu_count() or 1, len(jobs)))
    networks = max(1, min(2, cores, len(jobs) // batch_size)) if remover.device.type == "cpu" else 1
    with (
        _networks_stopped_by() as stop,
        _threads(helpers, "decode", cores) as decoding,
        _threads(networks, "network", cores) as computing,
        _threads(helpers, "finish", cores) as finishing,
    ):
        try:
            decoded = bounded_map(decoding, stages.decode, jobs, ahead=networks * batch_size + helpers)
            batches = iter(lambda: list(islice(decoded, batch_size)), [])
            computed = bounded_map(computing, stages.run_network, batches, ahead=2 * networks)
            yield from bounded_map(finishing, stages.finish, chain.from_iterable(computed), ahead=helpers + 1)
        finally:  # stops the networks on Ctrl-C, which only the main thread receives
            stop.set()
            torch.set_num_threads(cores)  # threads that are started later inherit this number


@contextmanager
def _threads(count: int, name: str, cores: int) -> Iterator[Executor]:
    """An executor whose threads share the cores."""
    import torch

    executor = ThreadPoolExecutor(count, name, torch.set_num_threads, (max(1, cores // count),))
    try:
        yield executor
    finally:  # on Ctrl-C running calls are completed, so that results are written whole; waiting calls are dropped
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _networks_stopped_by() -> Iterator[threading.Event]:
    """An event that stops the network calls of all threads at their next layer. A whole call can take seconds."""
    import torch

    stop = threading.Event()

    def stop_here(module, inputs):
        if stop.is_set():
            raise KeyboardInterrupt

    hook = torch.nn.modules.module.register_module_forward_pre_hook(stop_here)
    try:
        yield stop
    finally:
        hook.remove()


@dataclass
class PhotoInProgress:
    """A photo between two stages. The remaining stages skip a photo whose report has an error."""

    job: Job
    report: Report
    data: dict | None = None  # the network's inputs, later its outputs


class Stages:
    """Decoding, network and encoding of photos. Subclasses may write elsewhere: they override `deliver` or `write`."""

    def __init__(self, remover, picture_format: str, overwrite: bool, srgb: bool, options: dict):
        self.remover = remover
        self.picture_format = picture_format
        self.overwrite = overwrite
        self.preprocess_options = {"srgb": True} if srgb else {}
        self.options = options
        # A mask needs only as many pixels of the photo as the network sees. All other results need all of them.
        self.sufficient_side = _draft_side(remover.image_processor) if options.get("return_mask") else None

    def decode(self, job: Job) -> PhotoInProgress:
        photo = PhotoInProgress(job, Report(job.source.name))
        with _recorded([photo]):
            decoded = read_photo(job.source, self.sufficient_side)
            photo.report.size = decoded.size
            if decoded.had_16_bits and not self.options.get("return_mask"):
                photo.report.note = "the photo has 16 bits per channel, the result has 8"
            photo.data = self.remover.preprocess(decoded.image, **self.preprocess_options)
            photo.data["target_size"] = decoded.size[::-1]
        return photo

    def run_network(self, batch: list[PhotoInProgress]) -> list[PhotoInProgress]:
        """Runs the network on a batch. A batch that fails is run again photo by photo, so that the others succeed."""
        decoded = [photo for photo in batch if photo.report.error is None]
        if not self._forward(decoded) and len(decoded) > 1:
            for photo in decoded:
                photo.report.error = None
                self._forward([photo])
        return batch

    def _forward(self, photos: list[PhotoInProgress]) -> bool:
        """Replaces the photos' inputs by the network's outputs. Returns False if that failed."""
        if not photos:
            return True
        with _recorded(photos):
            outputs = self.remover.forward([photo.data for photo in photos])
            for photo, output in zip(photos, outputs, strict=True):
                photo.data = output
        return photos[0].report.error is None

    def finish(self, photo: PhotoInProgress) -> Report:
        if photo.report.error is None:
            with _recorded([photo]):
                picture = self.remover.postprocess(photo.data, **self.options)
                self.deliver(picture, photo)
        return photo.report

    def deliver(self, picture: Image.Image, photo: PhotoInProgress) -> None:
        self.write(encode_picture(picture, self.picture_format), photo)

    def write(self, encoded: bytes, photo: PhotoInProgress) -> None:
        output = photo.job.output
        if output is None:
            sys.stdout.buffer.write(encoded)
            sys.stdout.buffer.flush()
            return
        photo.report.output = str(output)
        if os.path.exists(output) and not self.overwrite:
            photo.report.kept = True
        else:
            write_whole(encoded, output)


def _draft_side(image_processor) -> int | None:
    """
    The side in pixels that is sufficient for a processor of fixed size: twice the network's.

    With a JPEG decoded at reduced size, but not below this side, the network's input changes by less than one gray
    level on average.
    """
    if image_processor.do_dynamic_resize or image_processor.do_guided_upsampling:
        return None
    return 2 * max(image_processor.size["height"], image_processor.size["width"])


@contextmanager
def _recorded(photos: list[PhotoInProgress]) -> Iterator[None]:
    """Adds the time of the `with` block and its error, if any, to the photos' reports."""
    start = time.perf_counter()
    error = None
    try:
        yield
    except Exception as raised:
        error = in_one_line(raised)
    seconds = (time.perf_counter() - start) / len(photos)
    for photo in photos:
        photo.report.seconds = round(photo.report.seconds + seconds, 4)
        photo.report.error = error
