"""ZIP archives from strangers, and results written into a ZIP archive while it is being sent."""

import io
import posixpath
import re
import struct
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

from birefnet.serve.errors import InvalidPhotoError, RequestError, TooLargeError
from birefnet.serve.limits import Limits


_END = b"PK\x05\x06"
_END_SIZE = 22
_LARGEST_ENTRY = 1024  # bytes of one photo's entry in the directory; names and comments are in it


def check_directory(file: BinaryIO, limits: Limits) -> None:
    """
    Refuses an archive whose directory is too large, before Python's reader makes an object of every entry in it.

    Raises:
        RequestError: the file is no ZIP archive, has more than `limits.batch_photos` files, or is of the kind ZIP64.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END_SIZE - 2**16))
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < _END_SIZE:
        raise RequestError("The file is not a ZIP archive, or it is damaged.", "invalid_archive")
    entries, directory_size = struct.unpack_from("<HL", tail, at + 10)
    if tail[max(0, at - 20) : at].startswith(b"PK\x06\x07"):
        raise RequestError("ZIP64 archives are not accepted.", "invalid_archive")
    most = limits.batch_photos
    if entries > 2 * most or directory_size > 2 * most * _LARGEST_ENTRY:  # folders count as well
        raise TooLargeError(f"The archive has too many files; at most {most} photos are allowed.")


def unpack(file: BinaryIO, limits: Limits) -> Iterator[tuple[str, bytes | RequestError]]:
    """
    The files of an archive, one after another: name, and contents or why it has none. Folders, hidden files and
    macOS's resource forks are left out.

    Raises:
        RequestError: the archive as a whole is refused.
    """
    check_directory(file, limits)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        raise RequestError("The file is not a ZIP archive, or it is damaged.", "invalid_archive") from None
    with archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir() and not _is_hidden(entry.filename)]
        if len(entries) > limits.batch_photos:
            raise TooLargeError(f"The archive has {len(entries)} files; at most {limits.batch_photos} are allowed.")
        budget = limits.batch_bytes
        for entry in entries:
            try:
                contents = _read(archive, entry, min(limits.upload_bytes, budget))
                budget -= len(contents)
            except RequestError as error:
                contents = error
            yield entry.filename, contents


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part not in ("..", "."))


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """An entry's contents. What its header says about its size is not relied on."""
    try:
        with archive.open(entry) as opened:
            contents = opened.read(most + 1)
    except RuntimeError:  # what zipfile raises where a password is needed
        raise InvalidPhotoError("The file is encrypted.") from None
    except Exception:  # decompressors raise almost anything on damaged data
        raise InvalidPhotoError("The file is damaged in the archive.") from None
    if len(contents) > most:
        raise TooLargeError(f"The file unpacks to more than {most:,} bytes.")
    return contents


def safe_name(name: str, suffix: str, taken: set[str]) -> str:
    """
    A name for a result in an archive: relative, without `..`, control characters or drive letters, and not yet taken.

    Args:
        name: the photo's name, from a stranger.
        suffix: the result's suffix with its dot.
        taken: lower-case names that are in use; the new one is added.
    """
    plain = re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", name.replace("\\", "/"))
    parts = [part.strip(" .")[:100] for part in plain.split("/")]
    path = posixpath.join("", *[part for part in parts if part][-4:]) or "photo"
    stem = posixpath.splitext(path)[0] or "photo"
    number, candidate = 1, f"{stem}{suffix}"
    while candidate.lower() in taken:
        number += 1
        candidate = f"{stem}-{number}{suffix}"
    taken.add(candidate.lower())
    return candidate


class StreamedArchive:
    """A ZIP archive that is sent while it is written. Pictures are stored as they are, since they are compressed."""

    def __init__(self):
        self._written = _Sink()
        self._archive = zipfile.ZipFile(self._written, "w", zipfile.ZIP_STORED)

    def add(self, name: str, contents: bytes) -> bytes:
        """Adds a file and returns the archive's next bytes."""
        self._archive.writestr(name, contents)
        return self._written.take()

    def close(self) -> bytes:
        """Ends the archive and returns its last bytes."""
        self._archive.close()
        return self._written.take()


class _Sink(io.RawIOBase):
    """A file that cannot seek, and hands over what was written to it."""

    def __init__(self):
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        taken, self._parts = b"".join(self._parts), []
        return taken
