"""
Files on local disks and in object stores, through fsspec: read with retries, written whole or not at all.

An object store publishes an upload only when it is complete. On every other file system a file gets a temporary name
first and is renamed when it is complete.
"""

import errno
import os
import random
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from birefnet.photos.writing import write_whole


ATTEMPTS = 8
FIRST_DELAY = 0.5  # seconds; doubles with every attempt, so eight attempts span about a minute
# These errors have the same result however often the operation is repeated.
PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError)
PERMANENT_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL)
PASSING_STATUSES = (408, 425, 429)  # of the 400s; all others, such as 403, stay as they are
ATOMIC_UPLOADS = {"s3", "s3a", "gs", "gcs", "abfs", "az", "hf", "memory"}


class StorageError(Exception):
    """A storage that still fails after all attempts."""


def with_retries(operation: Callable, *arguments, **options):
    """
    Calls an operation until it succeeds, with delays that double and vary (so that workers do not retry in step).

    Raises:
        OSError, ValueError, TypeError: what another attempt cannot change, such as a missing file or a full disk.
        StorageError: the operation failed `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return operation(*arguments, **options)
        except Exception as error:
            if _is_permanent(error):
                raise
            if attempt == ATTEMPTS:
                raise StorageError(f"still failing after {ATTEMPTS} attempts: {error}") from error
            time.sleep(FIRST_DELAY * 2 ** (attempt - 1) * random.uniform(0.5, 1))


def _is_permanent(error: Exception) -> bool:
    if isinstance(error, PERMANENT_ERRORS) or (isinstance(error, OSError) and error.errno in PERMANENT_CODES):
        return True
    # Clients of web servers have the status in one of these places.
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in PASSING_STATUSES


class Storage:
    """
    A folder, named by a path or a URL of fsspec (`s3://bucket/folder`). Paths below it are relative and use "/".

    Args:
        url: the folder. It need not exist.
    """

    def __init__(self, url: str):
        self.url = str(url).rstrip("/") or "/"
        self.filesystem, self.root = open_filesystem(self.url)
        protocol = self.filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.is_local = bool(protocols & {"file", "local"})
        self.is_atomic = bool(protocols & ATOMIC_UPLOADS)

    def path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def read(self, name: str) -> bytes:
        return with_retries(self.filesystem.cat_file, self.path(name))

    def exists(self, name: str) -> bool:
        return with_retries(self.filesystem.exists, self.path(name))

    def names(self, folder: str) -> list[str]:
        """Names of the files in a folder, sorted; no file if there is no such folder."""
        try:
            paths = with_retries(self.filesystem.ls, self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file so that it is at every moment as before or complete."""
        path = self.path(name)
        if self.is_local:
            write_whole(content, Path(path))
        elif self.is_atomic:
            with_retries(self.filesystem.pipe_file, path, content)
        else:
            with_retries(self._pipe_and_rename, path, content)

    def _pipe_and_rename(self, path: str, content: bytes) -> None:
        folder, _, name = path.rpartition("/")
        self.filesystem.makedirs(folder, exist_ok=True)
        partial = f"{folder}/.birefnet-{uuid.uuid4().hex}.partial"
        self.filesystem.pipe_file(partial, content)
        self.filesystem.mv(partial, f"{folder}/{name}")

    @contextmanager
    def whole_file(self, name: str) -> Iterator[BinaryIO]:
        """
        A local file to fill step by step, for what is too large for memory. It appears under its name only when the
        `with` block ends without an error.
        """
        target = Path(self.path(name)) if self.is_local else None
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
        folder = None if target is None else target.parent
        descriptor, partial = tempfile.mkstemp(prefix=".birefnet-", suffix=".partial", dir=folder)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                if target is None:
                    with_retries(self._upload, partial, name)
            if target is not None:
                os.chmod(partial, 0o666 & ~_umask())  # mkstemp's files are private
                os.replace(partial, target)
        finally:
            Path(partial).unlink(missing_ok=True)

    def _upload(self, local: str, name: str) -> None:
        if self.is_atomic:
            self.filesystem.put_file(local, self.path(name))
        else:
            self._pipe_and_rename(self.path(name), Path(local).read_bytes())

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        with suppress(FileNotFoundError):
            with_retries(self.filesystem.rm_file, self.path(name))

    def remove_partial_files(self, folder: str = "") -> None:
        """Deletes what killed processes left on a local disk. No worker may be running."""
        if not self.is_local or not os.path.isdir(self.path(folder)):
            return
        for parent, _, names in os.walk(self.path(folder)):
            for name in names:
                if name.startswith(".birefnet-") and name.endswith(".partial"):
                    Path(parent, name).unlink(missing_ok=True)


def open_filesystem(url: str):
    """
    The fsspec file system of a URL and the path in it.

    Raises:
        ImportError: the package of this protocol is not installed. ValueError: there is no such protocol.
    """
    import fsspec

    # Listings are not cached: they change while a batch runs, and those of 50 million photos would fill the memory.
    return fsspec.core.url_to_fs(str(url), use_listings_cache=False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
