"""
From an encoded photo to an encoded cut-out, for all APIs and the page.

A photo is decoded in a thread, waits for the network in the queue of [`NetworkWorkers`], and is finished in a thread:
matte, edits, background, encoding. These are the stages of the pipeline: `preprocess`, `forward`, `postprocess`.
Photos that wait for their turn are kept encoded, and only a few are decoded at a time, so that memory stays bounded.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from birefnet.photos.writing import encode_picture
from birefnet.serve.errors import TooBusyError, TooSlowError
from birefnet.serve.intake import decode_photo
from birefnet.serve.limits import Limits
from birefnet.serve.metrics import Metrics
from birefnet.serve.shelf import ModelShelf
from birefnet.serve.workers import NetworkWorkers


UPLOADS_PER_PLACE = 4  # bodies that may be on their way for each place in the queue


@dataclass
class ComputedPhoto:
    """A photo with the network's output for it, from which any picture can be made without the network."""

    remover: object  # BiRefNetPipeline
    outputs: dict  # what its `forward` gives: `logits`, `photo`, `alpha` and `target_size`

    @property
    def encoder_options(self) -> dict:
        """Colour profile and print resolution of the photo, for [`encode_picture`]."""
        from birefnet.repository.photo_birefnet import result_info

        return result_info(self.outputs["photo"])

    def picture(self, **options) -> Image.Image:
        """The pipeline's picture for its `postprocess` arguments, such as `background`, `return_mask`, `grow`."""
        return self.remover.postprocess(self.outputs, **options)

    def encoded(self, picture_format: str, **options) -> bytes:
        """The same picture as a file. `picture_format` is `"png"`, `"webp"` or `"jpeg"`."""
        return encode_picture(self.picture(**options), picture_format)


class CutoutService:
    """
    Args:
        shelf: the models.
        workers: the network's threads.
        limits: bounds of every request.
        metrics: counters.
    """

    def __init__(self, shelf: ModelShelf, workers: NetworkWorkers, limits: Limits, metrics: Metrics):
        import torch

        self.shelf, self.workers, self.limits, self.metrics = shelf, workers, limits, metrics
        helpers = max(1, min(4, os.cpu_count() or 1))
        threads = (max(1, torch.get_num_threads() // helpers),)
        self._decoding = ThreadPoolExecutor(helpers, "decode", torch.set_num_threads, threads)
        self._finishing = ThreadPoolExecutor(helpers, "finish", torch.set_num_threads, threads)
        self._decoded_at_once = asyncio.Semaphore(2 * helpers + 2 * workers.batch_size)
        self._places = self._uploads = 0
        self._seconds_per_photo = 0.0  # while there is work, a running mean
        self._last_done = 0.0
        self.draining = False
        metrics.places.set(limits.waiting)

    @contextmanager
    def upload(self) -> Iterator[None]:
        """
        Leave to send a body.

        Raises:
            TooBusyError: as for [`place`], or too many others are sending theirs.
        """
        self.check_place()
        if self._uploads >= UPLOADS_PER_PLACE * self.limits.waiting:
            raise TooBusyError("Too many photos are being sent; come again in 5 s.", retry_after=5)
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    @contextmanager
    def place(self) -> Iterator[None]:
        """
        A place in the queue, from the complete request until the answer is ready.

        Raises:
            TooBusyError: all places are taken, the photos before this one would take longer than a request may, or
                the server is about to stop.
        """
        self.check_place()
        self._places += 1
        self.metrics.waiting.set(self._places)
        try:
            yield
        finally:
            self._places -= 1
            self.metrics.waiting.set(self._places)

    def check_place(self) -> None:
        """Raises `TooBusyError` as [`place`] does, without taking a place."""
        if self.draining:
            raise TooBusyError("The server is about to stop.", retry_after=10, status=503)
        expected = self._places * self._seconds_per_photo
        if self._places >= self.limits.waiting or (self._places and expected > 0.7 * self.limits.request_seconds):
            retry_after = max(1, min(60, math.ceil(expected / 2)))
            raise TooBusyError(f"Too many photos are waiting; come again in {retry_after} s.", retry_after)

    @property
    def busy(self) -> bool:
        return self._places > 0

    async def run(
        self,
        encoded: bytes,
        model: str,
        finish: Callable[[ComputedPhoto], object],
        frame: Callable[[Image.Image], Image.Image] | None = None,
    ):
        """
        Takes a photo through all stages.

        Args:
            encoded: the photo's file.
            model: a name that [`ModelShelf.resolve`] gave.
            finish: makes the result of the photo and the network's output; it runs in a thread.
            frame: what is done to the decoded photo before the network sees it, such as cropping; in a thread as well.

        Returns:
            What `finish` returned.

        Raises:
            RequestError: the photo is refused, the network failed, or it took too long.
        """
        seconds = self.limits.request_seconds
        try:
            result = await asyncio.wait_for(self._run(encoded, model, finish, frame), seconds)
        except asyncio.TimeoutError:
            raise TooSlowError(f"The photo took longer than {seconds:g} s.", status=503) from None
        self._count()
        return result

    async def _run(self, encoded: bytes, model: str, finish: Callable, frame: Callable | None):
        async with self._decoded_at_once:
            computed = await self._compute(encoded, model, frame)
            return await self._in_thread(self._finishing, "finish", finish, computed)

    async def cut_out(self, encoded: bytes, model: str, picture_format: str, **options) -> bytes:
        """The encoded cut-out of an encoded photo; `options` are those of the pipeline's call."""
        return await self.run(encoded, model, lambda computed: computed.encoded(picture_format, **options))

    async def finish_again(self, computed: ComputedPhoto, finish: Callable[[ComputedPhoto], object]):
        """`finish(computed)` in a thread, for a photo whose network output is kept."""
        return await self._in_thread(self._finishing, "finish", finish, computed)

    async def _compute(self, encoded: bytes, model: str, frame: Callable | None) -> ComputedPhoto:
        remover = await self.shelf.get(model)

        def decode() -> dict:
            photo = decode_photo(encoded, self.limits)
            return remover.preprocess(photo if frame is None else frame(photo))

        item = await self._in_thread(self._decoding, "decode", decode)
        with self.metrics.stage("queue"):
            outputs = await asyncio.wrap_future(self.workers.submit(remover, item))
        return ComputedPhoto(remover, outputs)

    async def _in_thread(self, executor: ThreadPoolExecutor, stage: str, function: Callable, *arguments):
        def timed():
            with self.metrics.stage(stage):
                return function(*arguments)

        return await asyncio.get_running_loop().run_in_executor(executor, timed)

    def _count(self) -> None:
        """Keeps the pace: the mean time between two finished photos while others are waiting."""
        now = time.monotonic()
        if self._places > 1 and now - self._last_done < self.limits.request_seconds:
            self._seconds_per_photo += 0.1 * (now - self._last_done - self._seconds_per_photo)
        self._last_done = now

    def close(self) -> None:
        """Finishes what is at work and ends all threads."""
        self.draining = True
        self._decoding.shutdown(wait=True, cancel_futures=True)
        self.workers.stop()
        self._finishing.shutdown(wait=True, cancel_futures=True)
        self.shelf.close()
