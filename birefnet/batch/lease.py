"""
One run at a time writes to a sink.

On a local disk, the operating system locks the file `SINK/_birefnet/run`, and unlocks it when the process ends,
however it ends. Object stores have no locks, and Windows has others. There, a run writes its name and a count into
this file every 20 s. Another run that finds the file watches it: a count that goes on belongs to a run at work.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from birefnet.batch.manifest import FOLDER
from birefnet.batch.storage import Storage, StorageError
from birefnet.errors import CommandError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = f"{FOLDER}/run"
SECONDS_BETWEEN_SIGNS = 20
# A storage that fails is tried again for about a minute, so a sign of life can be late by that.
SECONDS_TO_WATCH = 100


class Lease:
    """The right to write to a sink. `check` raises `CommandError` when another run has taken it."""

    def __init__(self):
        self.taken_by: str | None = None

    def check(self) -> None:
        if self.taken_by is not None:
            raise CommandError(f"another run has taken over the sink: {self.taken_by}")


@contextmanager
def only_run(storage: Storage) -> Iterator[Lease]:
    """
    Holds the right to write to a sink inside the `with` block.

    Raises:
        CommandError: another run has it, or the sink cannot be written.
    """
    has_locks = storage.is_local and fcntl is not None
    with (_lock if has_locks else _signs_of_life)(storage) as lease:
        yield lease


@contextmanager
def _lock(storage: Storage) -> Iterator[Lease]:
    path = Path(storage.path(NAME))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115  closed below
    except OSError as error:
        raise CommandError(f"{storage.url} cannot be written: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(storage, file.read()) from None
        file.truncate(0)
        file.write(_name_of_this_run())
        file.flush()
        yield Lease()


@contextmanager
def _signs_of_life(storage: Storage) -> Iterator[Lease]:
    lease, ended, name = Lease(), threading.Event(), f"{_name_of_this_run()}, {uuid.uuid4().hex[:8]}"
    try:
        _watch(storage)
        _sign(storage, name, 0)
    except (OSError, StorageError) as error:
        raise CommandError(f"{storage.url} cannot be written: {error}") from error
    thread = threading.Thread(target=_keep_signing, args=(storage, name, lease, ended), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        if lease.taken_by is None:
            with suppress(OSError, StorageError):  # the next run then waits before it starts
                storage.remove(NAME)


def _watch(storage: Storage) -> None:
    """Returns when no other run shows signs of life."""
    found, deadline = _read(storage), time.monotonic() + SECONDS_TO_WATCH
    if found is not None:
        question = f"waiting {SECONDS_TO_WATCH} s to see whether this run has ended: {found['run']}"
        print(f"birefnet batch: {question}", file=sys.stderr)
    while found is not None and time.monotonic() < deadline:
        time.sleep(min(5, SECONDS_TO_WATCH / 20))
        now = _read(storage)
        if now is not None and now != found:
            raise _refusal(storage, now["run"])
        found = now


def _keep_signing(storage: Storage, name: str, lease: Lease, ended: threading.Event) -> None:
    """Writes signs of life until the run has ended, or another run's sign is found."""
    count = 0
    while not ended.wait(SECONDS_BETWEEN_SIGNS):
        count += 1
        with suppress(OSError, StorageError):  # results that cannot be written stop the run, not its signs
            found = _read(storage)
            if found is not None and found["run"] != name:
                lease.taken_by = found["run"]
                return
            _sign(storage, name, count)


def _sign(storage: Storage, name: str, count: int) -> None:
    storage.write(NAME, json.dumps({"run": name, "count": count}).encode())


def _read(storage: Storage) -> dict | None:
    try:
        return json.loads(storage.read(NAME))
    except FileNotFoundError:
        return None


def _refusal(storage: Storage, name: str) -> CommandError:
    return CommandError(f"another run writes to {storage.url}: {name or 'unknown'}. One run at a time may do so")


def _name_of_this_run() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} of {socket.gethostname()}, started {started}"
