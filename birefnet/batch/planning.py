"""What is to be done, and what it will take: blocks of the photos that are missing, and `--plan`."""

import random
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from birefnet.batch.manifest import Ledger, block_name, digest
from birefnet.batch.report import Progress, in_words
from birefnet.batch.runners import make_worker
from birefnet.batch.sinks import output_name, webdataset_key
from birefnet.batch.sources import Block, Entry
from birefnet.batch.storage import Storage
from birefnet.batch.worker import STAGES, Task


SAMPLE = 50  # photos that --plan measures
WARM_UP = 2  # further ones before, since the first calls of a network are slower
DEADLINE = 24  # hours; --plan says how many workers do it in a day


class Plan:
    """
    The blocks of a run.

    Attributes:
        listed: number of photos of the source.
        blocks: what is to be done.
        refused: records of photos that cannot have a result of their own.
    """

    def __init__(self, entries: Iterable[Entry], ledger: Ledger, task: Task, block_size: int):
        self.task = task
        self.listed = 0
        self.refused: list[dict] = []
        self.results: set[bytes] = set()
        self.blocks: list[Block] = []
        block: list[Entry] = []
        for entry in ledger.missing(self._sound(entries)):
            block.append(entry)
            if len(block) == block_size:
                self._close(block)
                block = []
        self._close(block)
        del self.results

    @property
    def photos(self) -> int:
        return sum(block.photos for block in self.blocks)

    def _close(self, block: list[Entry]) -> None:
        if block:
            self.blocks.append(Block.of(block_name(block, self.task.settings), block))

    def _sound(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries without those whose result would be another's, or outside the sink, or their own photo."""
        sink = Storage(self.task.sink_url)
        for entry in entries:
            self.listed += 1
            result = result_key(entry.id, self.task)
            key = digest(result)
            parts = result.split("/")
            if key in self.results:
                self._refuse(entry, f"its result {result} is already that of another photo")
            elif not result.strip("/") or ".." in parts or "" in parts or "\0" in result or parts[0] == "_birefnet":
                self._refuse(entry, f"{entry.id!r} cannot be the name of a result")
            elif self.task.sink == "files" and sink.is_local and sink.path(result) == entry.url:
                self._refuse(entry, "its result would overwrite the photo")
            else:
                self.results.add(key)
                yield entry

    def _refuse(self, entry: Entry, reason: str) -> None:
        self.refused.append(
            {"id": entry.id, "source": entry.url, "version": entry.version, "error": reason, "kind": "name"}
        )


def result_key(key: str, task: Task) -> str:
    """What must differ between the photos of a batch: a file's name, a tar's key, or the id itself."""
    if task.sink == "files":
        return output_name(key, task.picture_format)
    return webdataset_key(key) if task.sink == "webdataset" else key


def choose_sample(blocks: list[Block], count: int, seed: int = 0) -> list[Entry]:
    """Some entries from everywhere in the blocks, the same in every run."""
    positions = range(sum(block.photos for block in blocks))
    chosen = sorted(random.Random(seed).sample(positions, min(count, len(positions))))
    sample, first = [], 0
    for block in blocks:
        inside = [position - first for position in chosen if first <= position < first + block.photos]
        if inside:
            entries = block.entries()
            sample += [entries[position] for position in inside]
        first += block.photos
    return sample


def measure(plan: Plan, task: Task, model: Path, price: float | None) -> dict:
    """
    Cuts out a sample into a temporary folder and predicts the whole from it.

    Args:
        plan: what is to be done.
        task: what its blocks have in common.
        model: folder of the model.
        price: of a machine per hour.

    Returns:
        JSON values: the sample's measurements, the whole's prediction for one worker like this process, and a table of
        workers, hours and cost.
    """
    sample = choose_sample(plan.blocks, SAMPLE + WARM_UP)
    warm_up, sample = (sample[:WARM_UP], sample[WARM_UP:]) if len(sample) > 2 * WARM_UP else ([], sample)
    with tempfile.TemporaryDirectory() as folder:
        worker = make_worker(replace(task, sink_url=folder), model)
        if warm_up:
            worker(Block.of("warm-up", warm_up))
        progress = Progress(len(sample), price)
        summary = worker(Block.of("sample", sample))
        progress.add(summary)
    measured = progress.as_dict()
    seconds = (summary["ended"] - summary["started"]) / len(sample)
    whole = plan.photos
    table = [(count, whole * seconds / count / 3600) for count in (1, 8, 64, 1000)]
    return {
        "photos": whole,
        "sample": measured,
        "seconds_per_photo": seconds,
        "hours_with_one_worker": whole * seconds / 3600,
        "workers_for_one_day": max(1, -int(-whole * seconds // (3600 * DEADLINE))),
        "memory_per_worker": summary["memory"],
        "bytes_to_read": whole * measured["bytes_read"] // len(sample),
        "bytes_to_write": whole * measured["bytes_written"] // len(sample),
        "cost": None if price is None else price * whole * seconds / 3600,
        "workers": [{"workers": count, "hours": hours} for count, hours in table],
    }


def describe(prediction: dict) -> str:
    """The prediction for people."""
    sample = prediction["sample"]
    shares = ", ".join(f"{stage} {sample['stage_shares'][stage]:.0%}" for stage in STAGES)
    lines = [
        f"measured: {sample['photos']} photos, {sample['failed']} failed, "
        f"{prediction['seconds_per_photo']:.3f} s per photo ({shares})",
        f"the whole: {prediction['photos']} photos, {prediction['bytes_to_read'] / 1e9:.2f} GB to read, "
        f"{prediction['bytes_to_write'] / 1e9:.2f} GB to write",
        f"memory: {prediction['memory_per_worker'] / 1e9:.2f} GB per worker",
        *(f"{row['workers']:5} workers like this: {in_words(3600 * row['hours'])}" for row in prediction["workers"]),
        f"workers for a day: {prediction['workers_for_one_day']}",
    ]
    if prediction["cost"] is not None:
        lines.append(f"cost: {prediction['cost']:.2f} with one worker per machine, whatever their number")
    return "\n".join(lines)
