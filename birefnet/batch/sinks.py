"""
Where results go: files laid out like the source, Parquet tables, or WebDataset shards.

Each block has a shard, to which its results are added in order. `commit` publishes what is not in its place yet. Only
then is the block's manifest written. A shard without results leaves no file.
"""

import io
import json
import tarfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from PIL import Image

from birefnet.batch.storage import Storage
from birefnet.photos.finding import PHOTO_SUFFIXES


SINKS = ("files", "parquet", "webdataset")
ROWS_PER_GROUP = 32  # cut-outs are large: a row group of these has tens of megabytes


@dataclass
class Result:
    """
    What became of one photo.

    Attributes:
        record: its line in the manifest.
        picture: the encoded result; None after an error, or when it is written already.
        matte: the soft matte as PNG, for tables.
        subject: `describe_matte` of the matte, for tables and shards.
    """

    record: dict
    picture: bytes | None = None
    matte: bytes | None = None
    subject: dict | None = None


def describe_matte(matte: Image.Image) -> dict:
    """
    Where the subject is and how sure the network was.

    Args:
        matte: mode L, 0 to 255.

    Returns:
        `box`: [left, top, right, bottom] in pixels around all that is at least half opaque, right and bottom
        exclusive, or None if nothing is; `area`: mean of the matte, 0 to 1; `certainty`: mean of |2·matte - 1|, which
        is 1 if every pixel is either subject or background, and 0 if every pixel is half of each.
    """
    values = np.asarray(matte)
    counts = np.bincount(values.ravel(), minlength=256) / values.size
    levels = np.arange(256) / 255
    box = matte.point([0] * 128 + [255] * 128).getbbox()
    return {
        "box": None if box is None else list(box),
        "area": round(float(counts @ levels), 6),
        "certainty": round(float(counts @ abs(2 * levels - 1)), 6),
    }


def stem_of(key: str) -> str:
    """An id without the suffix of its photo."""
    path = PurePosixPath(key)
    return str(path.with_suffix("")) if path.suffix.lower() in PHOTO_SUFFIXES else str(path)


def suffix_of(picture_format: str) -> str:
    return ".jpg" if picture_format == "jpeg" else f".{picture_format}"


def output_name(key: str, picture_format: str) -> str:
    """The relative path of a result among files."""
    return stem_of(key) + suffix_of(picture_format)


class FilesShard:
    """Files are written one by one as they are finished; so nothing is left to publish."""

    name = None

    def __init__(self, storage: Storage, block: str, picture_format: str):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def add(self, result: Result) -> None:
        pass

    def commit(self) -> None:
        pass

    @staticmethod
    def rewrite(storage: Storage, outputs: set[str], kept: list[dict]) -> None:
        """Deletes the files that no later result has replaced already."""
        for name in outputs:
            storage.remove(name)


class _SingleFileShard:
    """One file per block. What is open is closed together, also after an error."""

    def __init__(self, storage: Storage, name: str):
        self.storage, self.name = storage, name
        self.stack = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return self.stack.__exit__(*exception)


class ParquetShard(_SingleFileShard):
    """One table per block: `part-BLOCK.parquet`."""

    def __init__(self, storage: Storage, block: str, picture_format: str):
        super().__init__(storage, f"part-{block}.parquet")
        self.rows: list[dict] = []
        self.writer = None

    def add(self, result: Result) -> None:
        record, subject = result.record, result.subject or {}
        self.rows.append(
            {
                **{key: record.get(key) for key in ("id", "source", "sha256", "width", "height", "error")},
                **{key: subject.get(key) for key in ("box", "area", "certainty")},
                "image": result.picture,
                "matte": result.matte,
            }
        )
        if len(self.rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow
        import pyarrow.parquet as parquet

        if not self.rows:
            return
        if self.writer is None:
            file = self.stack.enter_context(self.storage.whole_file(self.name))
            # Pictures are compressed already.
            self.writer = parquet.ParquetWriter(file, parquet_schema(), compression="none")
        self.writer.write_table(pyarrow.Table.from_pylist(self.rows, schema=parquet_schema()))
        self.rows = []

    def commit(self) -> None:
        self._flush()
        if self.writer is not None:
            self.writer.close()
        self.stack.close()

    @staticmethod
    def rewrite(storage: Storage, outputs: set[str], kept: list[dict]) -> None:
        """Rewrites the tables with the rows of the kept records alone, or deletes them."""
        import pyarrow.parquet as parquet

        ids = {record["id"] for record in kept}
        for name in outputs:
            if not ids:
                storage.remove(name)
            elif storage.exists(name):
                source = parquet.ParquetFile(io.BytesIO(storage.read(name)))
                with (
                    storage.whole_file(name) as file,
                    parquet.ParquetWriter(file, parquet_schema(), compression="none") as writer,
                ):
                    for batch in source.iter_batches(batch_size=ROWS_PER_GROUP):
                        rows = [row for row, key in enumerate(batch.column("id").to_pylist()) if key in ids]
                        writer.write_batch(batch.take(rows))


def parquet_schema():
    """Columns of the tables. `image` and `matte` are encoded pictures; `box`, `area` and `certainty` as in
    `describe_matte`; all but id, source and error are null for a photo with an error."""
    import pyarrow

    return pyarrow.schema(
        [
            ("id", pyarrow.string()),
            ("source", pyarrow.string()),
            ("sha256", pyarrow.string()),
            ("width", pyarrow.int32()),
            ("height", pyarrow.int32()),
            ("image", pyarrow.binary()),
            ("matte", pyarrow.binary()),
            ("box", pyarrow.list_(pyarrow.int32(), 4)),
            ("area", pyarrow.float32()),
            ("certainty", pyarrow.float32()),
            ("error", pyarrow.string()),
        ]
    )


class WebDatasetShard(_SingleFileShard):
    """One tar per block: `shard-BLOCK.tar` with `KEY.png` and `KEY.json` for each photo that has a result."""

    def __init__(self, storage: Storage, block: str, picture_format: str):
        super().__init__(storage, f"shard-{block}.tar")
        self.suffix = suffix_of(picture_format)
        self.tar = None

    def add(self, result: Result) -> None:
        if result.picture is None:
            return
        if self.tar is None:
            file = self.stack.enter_context(self.storage.whole_file(self.name))
            self.tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  commit closes it
        key = webdataset_key(result.record["id"])
        facts = {field: result.record[field] for field in ("id", "source", "sha256", "width", "height")}
        self._add_member(key + self.suffix, result.picture)
        self._add_member(f"{key}.json", json.dumps({**facts, **result.subject}).encode())

    def _add_member(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)  # time and owner stay zero, so that equal results give equal tars
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))
        self.tar.members.clear()

    def commit(self) -> None:
        if self.tar is not None:
            self.tar.close()
        self.stack.close()

    @staticmethod
    def rewrite(storage: Storage, outputs: set[str], kept: list[dict]) -> None:
        """Rewrites the tars with the members of the kept records alone, or deletes them."""
        keys = {webdataset_key(record["id"]) for record in kept if record["error"] is None}
        for name in outputs:
            if not keys:
                storage.remove(name)
            elif storage.exists(name):
                with (
                    tarfile.open(fileobj=io.BytesIO(storage.read(name)), mode="r:") as source,
                    storage.whole_file(name) as file,
                    tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as target,
                ):
                    for member in source:
                        if member.name.rpartition(".")[0] in keys:
                            target.addfile(member, source.extractfile(member))


def webdataset_key(key: str) -> str:
    """WebDataset splits names at the first dot after the folder, so a key has none there."""
    folder, slash, name = stem_of(key).rpartition("/")
    return folder + slash + name.replace(".", "_")


SHARDS = {"files": FilesShard, "parquet": ParquetShard, "webdataset": WebDatasetShard}
