"""
Which photos a batch consists of: folders, tables with a column of paths, URLs or bytes, and WebDataset tars.

Photos are listed one after the other and not read, so that the list may be longer than the memory is large.
"""

import csv
import functools
import io
import json
import os
import tarfile
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from birefnet.batch.storage import open_filesystem, with_retries
from birefnet.errors import CommandError, UsageError
from birefnet.photos.finding import PHOTO_SUFFIXES


TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".ndjson")
COLUMNS = ("image", "url", "image_url", "path", "file_name", "jpg", "bytes")  # tried in this order


@dataclass(frozen=True)
class Entry:
    """
    One photo of the source, not yet read.

    Attributes:
        id: what the sink calls it; unique in a batch. A relative path in which "/" separates folders.
        url: the file or object that holds the photo.
        version: changes when that file changes: its ETag, or size and modification time. Empty where the source tells
            neither.
        place: where in the file the photo is: None for the whole file, `(offset, size)` in bytes for a member of a
            tar, `(row group, row)` for a cell of a Parquet table.
        column: the cell's column, for Parquet.
    """

    id: str
    url: str
    version: str
    place: tuple[int, int] | None = None
    column: str | None = None

    @property
    def name(self) -> str:
        """What messages call the photo."""
        return self.url if self.place is None else f"{self.url} ({self.id})"


@dataclass(frozen=True)
class Block:
    """
    Photos that are worked on and committed together. `packed` takes some 30 bytes a photo, where entries take 500.

    Attributes:
        name: the same photos with the same settings have the same name in every run.
        photos: how many.
        packed: the entries as compressed JSON.
    """

    name: str
    photos: int
    packed: bytes

    @classmethod
    def of(cls, name: str, entries: list[Entry]) -> "Block":
        packed = json.dumps([astuple(entry) for entry in entries], separators=(",", ":")).encode()
        return cls(name, len(entries), zlib.compress(packed))

    def entries(self) -> list[Entry]:
        return [
            Entry(key, url, version, None if place is None else tuple(place), column)
            for key, url, version, place, column in json.loads(zlib.decompress(self.packed))
        ]


# --- Listing ---


def list_entries(
    source: str, column: str | None = None, id_column: str | None = None, excluded: str | None = None
) -> Iterator[Entry]:
    """
    Lists the photos of a source, in the same order every time.

    Args:
        source: a folder (searched recursively), a photo, a table (.parquet, .csv, .jsonl), a tar, or a glob of photos,
            tables or tars; each a path or a URL of fsspec.
        column: the tables' column with paths, URLs or bytes; for tars, the suffix of the photos' members, such as
            `jpg`. By default the first of `COLUMNS` that is there; in tars every photo.
        id_column: the column with the photos' names. By default a name is made of the path, URL or row number.
        excluded: a folder that is left out.

    Raises:
        CommandError: the source does not exist or cannot be read. UsageError: it has no such column.
    """
    try:
        filesystem, root = open_filesystem(source)
        files = list(_expand(filesystem, root))
    except ImportError as error:
        raise CommandError(f"{source}: {error}") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"{source}: it cannot be read ({error})") from error
    for info in files:
        path = info["name"]
        url = filesystem.unstrip_protocol(path) if not _is_local(filesystem) else path
        suffix = PurePosixPath(path).suffix.lower()
        if info["type"] == "directory":
            yield from _list_folder(filesystem, path, excluded)
        elif suffix in TABLE_SUFFIXES:
            yield from _list_table(filesystem, path, url, version_of(info), column, id_column)
        elif suffix == ".tar":
            yield from _list_tar(filesystem, path, url, version_of(info), column)
        else:
            yield Entry(PurePosixPath(path).name, url, version_of(info))


def version_of(info: dict) -> str:
    """The version of a file from fsspec's information: the object store's tag, else size and modification time."""
    for key in ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "sha256"):
        if info.get(key):
            return str(info[key]).strip('"')
    changed = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("updated")
    return "" if changed is None else f"{info.get('size')}-{changed}"


def _expand(filesystem, root: str) -> Iterator[dict]:
    if any(character in root for character in "*?[") and not with_retries(filesystem.exists, root):
        matches = with_retries(filesystem.glob, root, detail=True)
        if not matches:
            raise FileNotFoundError("nothing matches this pattern")
        yield from (matches[path] for path in sorted(matches))
    else:
        yield with_retries(filesystem.info, root)


def _is_local(filesystem) -> bool:
    return "file" in ([filesystem.protocol] if isinstance(filesystem.protocol, str) else filesystem.protocol)


def _list_folder(filesystem, root: str, excluded: str | None) -> Iterator[Entry]:
    """Every photo below a folder; folders and files in sorted order, hidden ones left out."""
    root = root.rstrip("/")
    excluded_path = None if excluded is None else open_filesystem(excluded)[1].rstrip("/")
    pending = [root]
    while pending:
        folder = pending.pop()
        listed = with_retries(filesystem.ls, folder, detail=True)
        folders = []
        for info in sorted(listed, key=lambda info: info["name"]):
            path = info["name"].rstrip("/")
            name = path.rsplit("/", 1)[-1]
            if name.startswith(".") or path in (folder, excluded_path):
                continue
            if info["type"] == "directory":
                folders.append(path)
            elif PurePosixPath(name).suffix.lower() in PHOTO_SUFFIXES:
                url = path if _is_local(filesystem) else filesystem.unstrip_protocol(path)
                yield Entry(path[len(root) + 1 :], url, version_of(info))
        pending += reversed(folders)


def _list_tar(filesystem, path: str, url: str, version: str, suffix: str | None) -> Iterator[Entry]:
    """The photos of an uncompressed tar, with their byte ranges; only the headers are read."""
    suffixes = PHOTO_SUFFIXES if suffix is None else (f".{suffix.lstrip('.').lower()}",)
    stem = PurePosixPath(path).stem
    try:
        with filesystem.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isfile() and name.suffix.lower() in suffixes and not name.name.startswith("."):
                    yield Entry(f"{stem}/{_relative(member.name)}", url, version, (member.offset_data, member.size))
                tar.members.clear()  # tarfile keeps every header otherwise
    except tarfile.TarError as error:
        raise CommandError(f"{url}: not an uncompressed tar, or a damaged one ({error})") from error


def _list_table(
    filesystem, path: str, url: str, version: str, column: str | None, id_column: str | None
) -> Iterator[Entry]:
    rows = _parquet_rows if path.endswith(".parquet") else _csv_rows if path.endswith(".csv") else _json_rows
    stem, folder = PurePosixPath(path).stem, url.rpartition("/")[0]
    for number, (place, cells, chosen) in enumerate(rows(filesystem, path, url, column, id_column)):
        key = None if id_column is None else cells.get(id_column)
        cell = cells.get(chosen)
        if place is not None:
            key = f"{stem}/{number:09d}" if key is None else str(key)
            yield Entry(_relative(key), url, version, place, chosen)
        else:
            target = "" if cell is None else str(cell)
            if key is None:
                key = urlsplit(target).path if "://" in target else target
            absolute = "://" in target or os.path.isabs(target) or not target
            yield Entry(_relative(str(key)), target if absolute else f"{folder}/{target}", "")


def _relative(name: str) -> str:
    """A name as a relative path with "/", which is what ids are."""
    return name.replace("\\", "/").lstrip("/").removeprefix("./")


def _choose_column(url: str, names: Iterable[str], column: str | None, id_column: str | None) -> str:
    names = list(names)
    for wanted in (column, id_column):
        if wanted is not None and wanted not in names:
            raise UsageError(f"{url} has no column {wanted!r}; it has {', '.join(names)}")
    found = column or next((name for name in COLUMNS if name in names), None)
    if found is None:
        raise UsageError(f"{url}: name the column of the photos with --column; it has {', '.join(names)}")
    return found


def _parquet_rows(filesystem, path: str, url: str, column: str | None, id_column: str | None):
    """Cells of paths or URLs; of bytes only the place, so that they are not read here."""
    import pyarrow.parquet as parquet

    with filesystem.open(path, "rb") as file:
        table = parquet.ParquetFile(file)
        schema = table.schema_arrow
        chosen = _choose_column(url, schema.names, column, id_column)
        holds_bytes = not _is_text(schema.field(chosen).type)
        names = [name for name in dict.fromkeys((id_column, None if holds_bytes else chosen)) if name is not None]
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            rows = table.read_row_group(group, columns=names).to_pylist() if names else [{}] * count
            for row, cells in enumerate(rows):
                yield ((group, row) if holds_bytes else None), cells, chosen


def _is_text(kind) -> bool:
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _csv_rows(filesystem, path: str, url: str, column: str | None, id_column: str | None):
    with filesystem.open(path, "rb") as file:
        reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
        chosen = _choose_column(url, reader.fieldnames or [], column, id_column)
        for cells in reader:
            yield None, cells, chosen


def _json_rows(filesystem, path: str, url: str, column: str | None, id_column: str | None):
    chosen = None
    with filesystem.open(path, "rb") as file:
        for number, line in enumerate(io.TextIOWrapper(file, "utf-8"), start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except ValueError as error:
                raise CommandError(f"{url}, line {number}: not a JSON object ({error})") from error
            chosen = chosen or _choose_column(url, cells, column, id_column)
            yield None, cells, chosen


# --- Reading ---


def read_entry(entry: Entry) -> bytes:
    """
    Reads the encoded photo of an entry.

    Raises:
        OSError, ValueError: there is no such photo. StorageError: the storage fails after all attempts.
    """
    if not entry.url:
        raise ValueError("the cell is empty")
    if entry.column is not None:
        return _read_cell(entry)
    filesystem, path = open_filesystem(entry.url)
    if entry.place is None:
        return with_retries(filesystem.cat_file, path)
    offset, size = entry.place
    content = with_retries(filesystem.cat_file, path, start=offset, end=offset + size)
    if len(content) != size:
        raise ValueError(f"the tar ends after {len(content)} of {size} bytes")
    return content


def _read_cell(entry: Entry) -> bytes:
    group, row = entry.place
    with _CELLS_LOCK:  # the entries of a block come from one row group or two: each is read once
        cells = with_retries(_read_row_group, entry.url, entry.version, group, entry.column)
    value = cells[row].as_py()
    if isinstance(value, dict):  # the structure of bytes and path in which `datasets` stores pictures
        value = value.get("bytes")
    if not value:
        raise ValueError("the cell is empty")
    if not isinstance(value, bytes):
        raise ValueError(f"the cell holds {type(value).__name__}, not bytes")
    return value


_CELLS_LOCK = threading.Lock()


@functools.lru_cache(maxsize=2)
def _read_row_group(url: str, version: str, group: int, column: str):
    import pyarrow.parquet as parquet

    filesystem, path = open_filesystem(url)
    with filesystem.open(path, "rb") as file:
        return parquet.ParquetFile(file).read_row_group(group, columns=[column]).column(0)
