"""
What a sink holds: results, and one manifest per block. A manifest is written after the block's results are complete.

    SINK/_birefnet/settings.json       the settings that all results share
    SINK/_birefnet/blocks/NAME.jsonl   a header with settings, the model's hash and versions; then one line per photo:
                                       source, version, sha256, result or error
    SINK/_birefnet/errors.jsonl        the photos without a result, with the reason; made from the manifests
    SINK/_birefnet/report.json, .png   of the last run
    SINK/_birefnet/run                 which run may write to the sink, see `lease`
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

from birefnet.batch.sources import Entry
from birefnet.batch.storage import Storage
from birefnet.concurrency import bounded_map


FOLDER = "_birefnet"
BLOCKS = f"{FOLDER}/blocks"
# A damaged photo stays damaged until it changes. Errors of any other kind are tried again by the next run.
SETTLED_ERRORS = {"photo"}
RETRY = b""  # the key of a photo that the next run tries again; equal to no real key
CHUNK = 4096  # entries that are looked up at a time


@dataclass(frozen=True)
class Settings:
    """
    Everything that results depend on. Two runs with equal settings give equal results.

    Attributes:
        model: sha256 of configuration, processor and weights.
        model_name: what the user called it; not part of the comparison.
        options: those of `cut_out_photos`, as JSON values.
        picture_format, resolution, dtype: as on the command line.
        sink: `"files"`, `"parquet"` or `"webdataset"`.
    """

    model: str
    model_name: str
    options: dict
    picture_format: str
    resolution: str | None
    dtype: str
    sink: str

    def compared(self) -> dict:
        fields = asdict(self)
        del fields["model_name"]
        return fields


def digest(*texts: str) -> bytes:
    """16 bytes that stand for some texts."""
    return hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogateescape"), digest_size=16).digest()


def block_name(entries: list[Entry], settings: dict) -> str:
    """The name of a block: the same photos with the same settings give the same name in every run."""
    named = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for entry in entries:
        named.update(digest(entry.id, entry.url, entry.version))
    return named.hexdigest()[:24]


def manifest_name(block: str) -> str:
    return f"{BLOCKS}/{block}.jsonl"


def write_manifest(storage: Storage, block: str, header: dict, records: list[dict]) -> None:
    """Commits a block. Its results must be complete."""
    storage.write(manifest_name(block), _lines([{**header, "block": block, "written": time.time()}, *records]))


def _lines(values: list[dict]) -> bytes:
    return "".join(json.dumps(value) + "\n" for value in values).encode()


def read_manifest(storage: Storage, block: str) -> tuple[dict, list[dict]]:
    """The header and the records of a block."""
    header, *records = map(json.loads, storage.read(manifest_name(block)).splitlines())
    return header, records


def read_manifests(storage: Storage) -> Iterator[tuple[dict, list[dict]]]:
    """All blocks of a sink, sixteen read at a time."""
    blocks = [name.removesuffix(".jsonl") for name in storage.names(BLOCKS) if name.endswith(".jsonl")]
    with ThreadPoolExecutor(16) as executor:
        yield from bounded_map(executor, lambda block: read_manifest(storage, block), blocks, ahead=32)


class Ledger:
    """
    What earlier runs have done, in 44 bytes per photo.

    Attributes:
        photos: number of photos that have a result or a settled error.
        errors: id -> record of the photos whose latest record is an error.
        outdated_blocks: names of blocks with a record that a later block replaces.
    """

    def __init__(self, manifests: Iterable[tuple[dict, list[dict]]], settings: dict):
        self.errors: dict[str, dict] = {}
        self.outdated_blocks: set[str] = set()
        self.names: list[str] = []
        columns = [], [], [], []
        for header, records in manifests:
            current = header["settings"] == settings
            keys = [_key(record) if current else RETRY for record in records]
            columns[0].append(np.array([digest(record["id"]) for record in records], "S16"))
            columns[1].append(np.array(keys, "S16"))
            columns[2].append(np.full(len(records), len(self.names), np.uint32))
            columns[3].append(np.full(len(records), header["written"]))
            self.names.append(header["block"])
            for record in records:
                if record["error"] is not None:
                    self._note_error(header["written"], record)
        empty = np.array([], "S16"), np.array([], "S16"), np.array([], np.uint32), np.array([])
        self._sort(*(np.concatenate([none, *parts]) for none, parts in zip(empty, columns, strict=True)))

    def _note_error(self, written: float, record: dict) -> None:
        known = self.errors.get(record["id"])
        if known is None or known["written"] < written:
            self.errors[record["id"]] = {**record, "written": written}

    def _sort(self, identifiers: np.ndarray, keys: np.ndarray, blocks: np.ndarray, written: np.ndarray) -> None:
        """Keeps the latest record of each photo, sorted by the photos' digests."""
        order = np.lexsort((-written, identifiers))
        identifiers, keys, blocks, written = identifiers[order], keys[order], blocks[order], written[order]
        repeated = np.zeros(len(identifiers), bool)
        repeated[1:] = identifiers[1:] == identifiers[:-1]
        self.outdated_blocks |= {self.names[block] for block in np.unique(blocks[repeated])}
        self.identifiers, self.keys, self.blocks = (values[~repeated] for values in (identifiers, keys, blocks))
        self.photos = int(np.count_nonzero(self.keys != RETRY))
        latest = written[~repeated]
        at = np.searchsorted(self.identifiers, np.array([digest(key) for key in self.errors], "S16"))
        self.errors = {
            key: error
            for index, (key, error) in zip(at, self.errors.items(), strict=True)
            if latest[index] == error["written"]  # else a later run has succeeded
        }

    def missing(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The entries that no run has done yet, or that have changed since."""
        chunk = []
        for entry in entries:
            chunk.append(entry)
            if len(chunk) == CHUNK:
                yield from self._missing_of(chunk)
                chunk = []
        yield from self._missing_of(chunk)

    def _missing_of(self, entries: list[Entry]) -> Iterator[Entry]:
        if not len(self.identifiers):
            yield from entries
            return
        wanted = np.array([digest(entry.id) for entry in entries], "S16")
        at = np.searchsorted(self.identifiers, wanted).clip(max=len(self.identifiers) - 1)
        known = self.identifiers[at] == wanted
        for entry, is_known, index in zip(entries, known, at, strict=True):
            # numpy drops zero bytes at the end of what it stores.
            if is_known and self.keys[index] == digest(entry.url, entry.version).rstrip(b"\0"):
                continue
            if is_known:
                self.outdated_blocks.add(self.names[self.blocks[index]])
            yield entry


def tidy(storage: Storage, blocks: set[str], rewrite: Callable) -> None:
    """
    Removes results that later ones replace: a photo has one result, also after it has changed.

    It may be interrupted and repeated: the results go first, their records afterwards.

    Args:
        blocks: names of blocks with replaced records.
        rewrite: `Shard.rewrite` of the sink.
    """
    manifests = {header["block"]: (header, records) for header, records in read_manifests(storage)}
    concerned = {record["id"] for block in blocks & manifests.keys() for record in manifests[block][1]}
    latest: dict[str, tuple[str, str | None]] = {}  # id -> block and output
    for header, records in sorted(manifests.values(), key=lambda manifest: manifest[0]["written"]):
        for record in records:
            if record["id"] in concerned:
                latest[record["id"]] = header["block"], record["output"]
    for block in sorted(blocks & manifests.keys()):
        header, records = manifests[block]
        kept = [record for record in records if latest[record["id"]][0] == block]
        replaced = [record for record in records if latest[record["id"]][0] != block]
        if not replaced:
            continue
        outputs = {record["output"] for record in replaced if record["output"] != latest[record["id"]][1]}
        rewrite(storage, outputs - {None}, kept)
        if kept:
            storage.write(manifest_name(block), _lines([header, *kept]))
        else:
            storage.remove(manifest_name(block))


def _key(record: dict) -> bytes:
    settled = record["error"] is None or record["kind"] in SETTLED_ERRORS
    return digest(record["source"], record["version"]) if settled else RETRY
