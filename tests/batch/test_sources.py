"""birefnet.batch.sources: what is listed in each kind of source, and that its bytes are read back."""

import json
import os
import tarfile

import pyarrow
import pyarrow.parquet as parquet
import pytest

from birefnet.batch.sources import Block, list_entries, read_entry
from birefnet.errors import CommandError, UsageError


CONTENTS = {"a.jpg": b"first", "b.png": b"second", "c.jpg": b"third"}


@pytest.fixture
def folder(tmp_path):
    """Three files that are called photos, in a folder with others, and tables and a tar of them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, content in CONTENTS.items():
        (photos / name).write_bytes(content)
    (photos / "notes.txt").write_text("no photo")
    (photos / ".hidden.jpg").write_bytes(b"thumbnail")
    names = list(CONTENTS)
    parquet.write_table(
        pyarrow.table({"image": list(CONTENTS.values()), "sku": [7, 8, 9]}), tmp_path / "bytes.parquet"
    )
    cells = [{"bytes": content, "path": name} for name, content in CONTENTS.items()]
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "datasets.parquet", row_group_size=2)
    parquet.write_table(pyarrow.table({"path": [f"photos/{name}" for name in names]}), tmp_path / "paths.parquet")
    (tmp_path / "table.csv").write_text("sku,path\n" + "".join(f"{n},photos/{n}\n" for n in names))
    lines = [{"url": (photos / name).as_uri(), "sku": name[0]} for name in names]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(photos, arcname=".")
    return tmp_path


@pytest.mark.parametrize(
    "source, options, ids",
    [
        ("photos", {}, ["a.jpg", "b.png", "c.jpg"]),
        ("photos/*.jpg", {}, ["a.jpg", "c.jpg"]),
        ("bytes.parquet", {}, ["bytes/000000000", "bytes/000000001", "bytes/000000002"]),
        ("bytes.parquet", {"id_column": "sku"}, ["7", "8", "9"]),
        ("datasets.parquet", {}, ["datasets/000000000", "datasets/000000001", "datasets/000000002"]),
        ("paths.parquet", {}, ["photos/a.jpg", "photos/b.png", "photos/c.jpg"]),
        ("table.csv", {"id_column": "sku"}, ["a.jpg", "b.png", "c.jpg"]),
        ("table.jsonl", {"id_column": "sku"}, ["a", "b", "c"]),
        ("shard.tar", {}, ["shard/a.jpg", "shard/b.png", "shard/c.jpg"]),
        ("shard.tar", {"column": "jpg"}, ["shard/a.jpg", "shard/c.jpg"]),
        ("*.tar", {}, ["shard/a.jpg", "shard/b.png", "shard/c.jpg"]),
    ],
)
def test_lists_and_reads(folder, source, options, ids):
    entries = list(list_entries(str(folder / source), **options))
    assert sorted(entry.id for entry in entries) == ids
    expected = CONTENTS.values() if len(ids) == 3 else (b"first", b"third")
    assert sorted(map(read_entry, entries)) == sorted(expected)
    assert Block.of("block", entries).entries() == entries


def test_versions_change_with_the_file(folder):
    before = {entry.id: entry.version for entry in list_entries(str(folder / "photos"))}
    (folder / "photos/a.jpg").write_bytes(b"another")
    os.utime(folder / "photos/a.jpg", (1, 1))
    after = {entry.id: entry.version for entry in list_entries(str(folder / "photos"))}
    assert before["a.jpg"] != after["a.jpg"] and before["b.png"] == after["b.png"]


@pytest.mark.parametrize(
    "source, options, error, message",
    [
        ("nowhere", {}, CommandError, "cannot be read"),
        ("*.gif", {}, CommandError, "nothing matches"),
        ("table.csv", {"column": "photo"}, UsageError, "no column 'photo'; it has sku, path"),
        ("bytes.parquet", {"id_column": "name"}, UsageError, "no column 'name'"),
        ("broken.tar", {}, CommandError, "uncompressed tar"),
        ("nothing://bucket/photos", {}, CommandError, "nothing"),
    ],
)
def test_what_cannot_be_listed_is_named(folder, source, options, error, message):
    (folder / "broken.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(error, match=message):
        list(list_entries(source if "://" in source else str(folder / source), **options))
