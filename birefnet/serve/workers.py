"""The network behind a queue: photos become batches as they come, and photos whose client has left are dropped."""

import logging
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

from birefnet.serve.errors import TooBusyError, WorkerError
from birefnet.serve.metrics import Metrics


logger = logging.getLogger("birefnet.serve")


@dataclass(eq=False)
class _Ticket:
    """A photo that waits for its network call."""

    remover: object  # BiRefNetPipeline
    item: dict  # what its `preprocess` gives
    result: Future = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)

    @property
    def group(self) -> tuple:
        """Photos of the same model and size may share a network call."""
        return id(self.remover), tuple(self.item["pixel_values"].shape)


class NetworkWorkers:
    """
    Threads that run the network on what [`submit`] puts into one queue.

    An accelerator has one thread. A CPU has up to two, each on its half of the cores, as `birefnet cutout` does:
    cores that share one photo wait for each other at every operation.

    Args:
        count: threads.
        batch_size: most photos of a network call.
        wait: seconds that the first photo of a batch waits for others of its size.
        metrics: where batch sizes and seconds are counted.
    """

    def __init__(self, count: int, batch_size: int, wait: float, metrics: Metrics):
        self.batch_size, self.wait, self.metrics = batch_size, wait, metrics
        self._waiting: deque[_Ticket] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, args=(count,), name=f"network-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, remover, item: dict) -> Future:
        """
        Puts a preprocessed photo into the queue. The future gives the pipeline's output for it.

        Cancelling the future before the network has begun takes the photo out of the queue.

        Raises:
            TooBusyError: the workers have been stopped.
        """
        ticket = _Ticket(remover, item)
        with self._changed:
            if self._stopped:
                raise TooBusyError("The server is about to stop.", retry_after=10, status=503)
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket.result

    def stop(self) -> None:
        """Finishes what is in the queue and ends the threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, threads: int) -> None:
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // threads))
        while batch := self._next_batch():
            self._run(batch)

    def _next_batch(self) -> list[_Ticket]:
        """The oldest photo and others of its group, at most `batch_size`; empty when the workers have been stopped."""
        with self._changed:
            while not (first := self._take_first()):
                if self._stopped:
                    return []
                self._changed.wait()
            batch = [first]
            self._take_group(batch)
            while len(batch) < self.batch_size and not self._stopped:
                remaining = first.since + self.wait - time.monotonic()
                if remaining <= 0:
                    break
                self._changed.wait(remaining)
                self._take_group(batch)
            return batch

    def _take_first(self) -> _Ticket | None:
        while self._waiting:
            ticket = self._waiting.popleft()
            if ticket.result.set_running_or_notify_cancel():
                return ticket
        return None

    def _take_group(self, batch: list[_Ticket]) -> None:
        """Moves photos of the batch's group from the queue to the batch."""
        remaining = deque()
        for ticket in self._waiting:
            if len(batch) < self.batch_size and ticket.group == batch[0].group:
                if ticket.result.set_running_or_notify_cancel():
                    batch.append(ticket)
            else:
                remaining.append(ticket)
        self._waiting = remaining

    def _run(self, batch: list[_Ticket]) -> None:
        """Runs a batch. One that fails is run again photo by photo, for the sake of the sound ones."""
        self.metrics.batch_size.observe(len(batch))
        try:
            with self.metrics.stage("network"):
                outputs = batch[0].remover.forward([ticket.item for ticket in batch])
        except BaseException as error:
            error = _explained(error)
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            for ticket in batch:
                self._run([ticket])
            return
        for ticket, output in zip(batch, outputs, strict=True):
            ticket.result.set_result(output)


def _explained(error: BaseException) -> WorkerError:
    """What the client is told. The log has the rest."""
    import torch

    logger.error("the network failed", exc_info=error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        error.__traceback__ = None  # its frames hold the maps that filled the memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return WorkerError("The network ran out of memory on this photo.", "out_of_memory", 503)
    return WorkerError("The network failed on this photo.")
