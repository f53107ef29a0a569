"""
One block of photos: read, cut out by the stages of `birefnet cutout`, written to the sink, and committed.

The same `BlockWorker` runs in this process and in Ray's actors, so that a photo's result is the same in both.
"""

import hashlib
import os
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from birefnet.batch.manifest import SETTLED_ERRORS, manifest_name, read_manifest, write_manifest
from birefnet.batch.sinks import SHARDS, Result, describe_matte, output_name
from birefnet.batch.sources import Block, Entry, read_entry
from birefnet.batch.storage import Storage, StorageError
from birefnet.cutout.jobs import Report, in_one_line
from birefnet.cutout.stages import PhotoInProgress, Stages, run_stages
from birefnet.photos.finding import PhotoSource
from birefnet.photos.writing import encode_picture


STAGES = ("read", "decode", "network", "finish", "write")


class SinkError(Exception):
    """The sink takes no more: a full disk, no permission, or a storage that still fails after all attempts."""


@dataclass
class Task:
    """
    What every block of a run has in common; small enough to be sent to each worker.

    Attributes:
        sink_url, sink: where results go, and in which of `SINKS`.
        settings: `Settings.compared`.
        picture_format, options: of the results; `options` are those of `cut_out_photos`.
        batch_size: photos per network call.
        remover: keyword arguments of `load_remover` without the model.
    """

    sink_url: str
    sink: str
    settings: dict
    picture_format: str
    options: dict
    batch_size: int = 1
    remover: dict = field(default_factory=dict)


class BlockWorker:
    """
    Holds the model and works on one block after the other.

    Args:
        task: what the blocks have in common.
        remover: a `BiRefNetPipeline`.
    """

    def __init__(self, task: Task, remover):
        self.task, self.remover = task, remover
        self.storage = Storage(task.sink_url)

    def __call__(self, block: Block) -> dict:
        """
        Cuts out the photos of a block and commits it. A block that is committed already is not repeated.

        Returns:
            A summary: `block`, `photos`, `errors` (records), `seconds` per stage, `bytes_read`, `bytes_written`,
            `started` and `ended` (Unix time), `worker` (host and process), `memory` (peak resident bytes).

        Raises:
            SinkError: the results cannot be written. Nothing is committed.
        """
        started, stages = time.time(), BlockStages(self, block.name)
        try:
            if self.storage.exists(
                manifest_name(block.name)
            ):  # committed by a worker that died before it could say so
                records = read_manifest(self.storage, block.name)[1]
            else:
                records = self._cut_out(block, stages)
        except (OSError, StorageError) as error:
            raise SinkError(f"{self.task.sink_url}: {error}") from error
        return {
            "block": block.name,
            "photos": len(records),
            "errors": [record for record in records if record["error"] is not None],
            "seconds": dict(stages.seconds),
            "bytes_read": stages.bytes_read,
            "bytes_written": stages.bytes_written,
            "started": started,
            "ended": time.time(),
            "worker": f"{socket.gethostname()}:{os.getpid()}",
            "memory": peak_memory(),
        }

    def _cut_out(self, block: Block, stages: "BlockStages") -> list[dict]:
        """Writes the block's results and its manifest; returns the manifest's records."""
        records = []
        with SHARDS[self.task.sink](self.storage, block.name, self.task.picture_format) as shard:
            for result in run_stages(block.entries(), stages, self.task.batch_size):
                if stages.sink_error is not None:
                    raise stages.sink_error
                if result.record["error"] is None or result.record["kind"] in SETTLED_ERRORS:
                    with stages.timed("write"):
                        shard.add(result)
                records.append(result.record)
            with stages.timed("write"):
                shard.commit()
                header = {"settings": self.task.settings, "versions": versions()}
                write_manifest(self.storage, block.name, header, records)
        return records


class BlockStages(Stages):
    """The stages of `birefnet cutout` for entries of a source and a sink."""

    def __init__(self, worker: BlockWorker, block: str):
        task = worker.task
        options = dict(task.options)
        srgb = options.pop("srgb", False)
        super().__init__(worker.remover, task.picture_format, overwrite=True, srgb=srgb, options=options)
        self.task, self.storage = task, worker.storage
        self.shard_name = SHARDS[task.sink](worker.storage, block, task.picture_format).name
        self.seconds: Counter = Counter()
        self.bytes_read = self.bytes_written = 0
        self.lock = threading.Lock()
        self.sink_error: Exception | None = None

    @contextmanager
    def timed(self, stage: str):
        """Adds the seconds spent inside to those of a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self.lock:
                self.seconds[stage] += time.perf_counter() - start

    def decode(self, entry: Entry) -> PhotoInProgress:
        record = {"id": entry.id, "source": entry.url, "version": entry.version, "sha256": None}
        job = SimpleNamespace(source=PhotoSource(Path(entry.id), Path(entry.id)), entry=entry, record=record)
        try:
            with self.timed("read"):
                content = read_entry(entry)
                record["sha256"] = hashlib.sha256(content).hexdigest()
        except Exception as error:
            record["kind"] = "storage" if isinstance(error, StorageError) else "missing"
            return PhotoInProgress(job, Report(entry.name, error=in_one_line(error)))
        with self.lock:
            self.bytes_read += len(content)
        encoded = SimpleNamespace(source=replace(job.source, content=content))
        with self.timed("decode"):
            photo = super().decode(encoded)
        photo.job = job  # without the encoded photo, which is not needed any more
        if photo.report.error is not None:
            record["kind"] = "photo"
        return photo

    def run_network(self, batch: list[PhotoInProgress]) -> list[PhotoInProgress]:
        with self.timed("network"):
            super().run_network(batch)
        for photo in batch:
            if photo.report.error is not None:
                photo.job.record.setdefault("kind", "network")
        return batch

    def finish(self, photo: PhotoInProgress) -> Result:
        photo.job.result = result = Result(photo.job.record)
        if photo.report.error is None:
            with self.timed("finish"):
                super().finish(photo)
            self._write_file(photo)
        record, error = result.record, photo.report.error
        settled = error is None or record.setdefault("kind", "finish") in SETTLED_ERRORS
        record["error"] = error
        record["width"], record["height"] = photo.report.size or (None, None)
        record["output"] = self._output_of(photo) if settled else None
        return result

    def deliver(self, picture: Image.Image, photo: PhotoInProgress) -> None:
        if self.task.sink != "files":
            matte = self._matte_of(picture, photo)
            photo.job.result.subject = describe_matte(matte)
            if self.task.sink == "parquet":
                photo.job.result.matte = encode_picture(matte, "png", {})
        super().deliver(picture, photo)

    def write(self, encoded: bytes, photo: PhotoInProgress) -> None:
        photo.job.result.picture = encoded

    def _matte_of(self, picture: Image.Image, photo: PhotoInProgress) -> Image.Image:
        if picture.mode == "L":
            return picture
        if picture.mode == "RGBA":
            return picture.getchannel("A")
        return self.remover.postprocess(photo.data, **{**self.options, "return_mask": True, "background": None})

    def _write_file(self, photo: PhotoInProgress) -> None:
        """Files are written here, by several threads at a time; shards by the thread that collects the results."""
        picture = photo.job.result.picture
        if picture is None or self.sink_error is not None:
            return
        with self.lock:
            self.bytes_written += len(picture)
        if self.task.sink != "files":
            return
        try:
            with self.timed("write"):
                self.storage.write(output_name(photo.job.entry.id, self.task.picture_format), picture)
        except Exception as error:  # concerns the sink, not this photo: it stops the block
            self.sink_error = error
        photo.job.result.picture = None

    def _output_of(self, photo: PhotoInProgress) -> str | None:
        if self.task.sink == "parquet":  # has a row for a photo with an error, too
            return self.shard_name
        if photo.report.error is not None:
            return None
        return self.shard_name or output_name(photo.job.entry.id, self.task.picture_format)


def versions() -> dict:
    """Versions of what computes, for the manifest."""
    import torch
    import transformers
    from PIL import __version__ as pillow

    from birefnet import __version__

    return {
        "birefnet": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": pillow,
    }


def peak_memory() -> int:
    """Peak resident size of this process in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
