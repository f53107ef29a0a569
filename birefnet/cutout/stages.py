"""Photos through decoding, network and writing, in threads that keep the whole machine busy."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

from birefnet.concurrency import bounded_map
from birefnet.cutout.jobs import Job, Report
from birefnet.photos.reading import read_photo
from birefnet.photos.writing import encode_picture, write_whole


def cut_out_photos(
    jobs: list[Job], remover, batch_size: int, picture_format: str, overwrite: bool = False, **options
) -> Iterator[Report]:
    """
    Cuts out photo after photo and reports each when it is done, in the order of the jobs.

    Decoding, network and finishing each have threads of their own, so that none waits for another. On a CPU two
    networks run at a time, each on half of the cores: cores that share a photo wait for each other at every operation,
    and all of them for whichever is busy decoding. An error is kept to the photo that it concerns.

    Args:
        jobs: the photos, and where their results go.
        remover: a `BiRefNetPipeline`.
        batch_size: photos per call of the network.
        picture_format: `"png"`, `"webp"` or `"jpeg"`.
        overwrite: whether results that have appeared since the jobs were planned are replaced.
        options: those of the pipeline's call, such as `return_mask` and `background`.
    """
    import torch  # here, since it takes a second, and the command line reads this module for its help

    stages = _Stages(remover, picture_format, overwrite, options)
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
        finally:  # also on Ctrl-C, which reaches the main thread alone; else there is no network left to stop
            stop.set()
            torch.set_num_threads(cores)  # which threads to come inherit


@contextmanager
def _threads(count: int, name: str, cores: int) -> Iterator[Executor]:
    """Threads that share the cores in what they compute."""
    import torch

    executor = ThreadPoolExecutor(count, name, torch.set_num_threads, (max(1, cores // count),))
    try:
        yield executor
    finally:  # also on Ctrl-C: what runs is completed (a result is written whole), what waits is dropped
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _networks_stopped_by() -> Iterator[threading.Event]:
    """An event that ends the networks of all threads, which take seconds, at their next layer."""
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
class _PhotoInWork:
    """What travels from stage to stage. One whose report has an error passes the remaining stages untouched."""

    job: Job
    report: Report
    data: dict | None = None  # the pipeline's inputs, later its outputs
    encoder_options: dict | None = None


class _Stages:
    def __init__(self, remover, picture_format: str, overwrite: bool, options: dict):
        self.remover = remover
        self.picture_format = picture_format
        self.overwrite = overwrite
        self.options = options
        # A mask of its own needs no more of a photo than the network sees; all else needs all of its pixels.
        self.sufficient_side = _draft_side(remover.image_processor) if options.get("return_mask") else None

    def decode(self, job: Job) -> _PhotoInWork:
        photo = _PhotoInWork(job, Report(job.source.name))
        with _accounted([photo]):
            decoded = read_photo(job.source, self.sufficient_side)
            photo.report.size, photo.encoder_options = decoded.size, decoded.encoder_options
            photo.data = self.remover.preprocess(decoded.image)
            photo.data["target_size"] = decoded.size[::-1]
        return photo

    def run_network(self, batch: list[_PhotoInWork]) -> list[_PhotoInWork]:
        """A batch that fails is run again photo by photo, for the sake of the sound ones."""
        sound = [photo for photo in batch if photo.report.error is None]
        if not self._forward(sound) and len(sound) > 1:
            for photo in sound:
                photo.report.error = None
                self._forward([photo])
        return batch

    def _forward(self, photos: list[_PhotoInWork]) -> bool:
        """Replaces the photos' inputs by outputs; False if that failed."""
        if not photos:
            return True
        with _accounted(photos):
            outputs = self.remover.forward([photo.data for photo in photos])
            for photo, output in zip(photos, outputs, strict=True):
                photo.data = output
        return photos[0].report.error is None

    def finish(self, photo: _PhotoInWork) -> Report:
        if photo.report.error is None:
            with _accounted([photo]):
                picture = self.remover.postprocess(photo.data, **self.options)
                encoded = encode_picture(picture, self.picture_format, photo.encoder_options)
                self._write(encoded, photo)
        return photo.report

    def _write(self, encoded: bytes, photo: _PhotoInWork) -> None:
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
    Side from which on a photo holds all that a fixed-size processor keeps of it: twice the network's, from which on a
    JPEG decoded at reduced size reaches the network less than one gray level (mean) away from the full one.
    """
    if image_processor.do_dynamic_resize or image_processor.do_guided_upsampling:
        return None
    return 2 * max(image_processor.size["height"], image_processor.size["width"])


@contextmanager
def _accounted(photos: list[_PhotoInWork]) -> Iterator[None]:
    """Adds the time spent inside to the photos' reports, and the error if there was one."""
    start = time.perf_counter()
    error = None
    try:
        yield
    except Exception as raised:
        error = _in_one_line(raised)
    share = (time.perf_counter() - start) / len(photos)
    for photo in photos:
        photo.report.seconds = round(photo.report.seconds + share, 4)
        photo.report.error = error


def _in_one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
