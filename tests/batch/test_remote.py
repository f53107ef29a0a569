"""birefnet batch from and to object stores, the Hub and web servers, all on the loopback, with faults."""

import json

import fsspec
import huggingface_hub.constants
import pyarrow.parquet as parquet
import pytest

from birefnet.batch import lease, storage
from birefnet.batch.storage import Storage

from ..hub_server import LoopbackHub
from .faulty_storage import faulty_gcs, faulty_web_server
from .sink_contents import pictures, records


@pytest.fixture
def expected(batch, photos, tmp_path, monkeypatch):
    """The results of a run on the local disk, by name."""
    monkeypatch.setattr(storage, "FIRST_DELAY", 0.01)
    batch(photos, tmp_path / "sink")
    return pictures(tmp_path / "sink")


def run_in_bucket(batch, proxy, url, photos, folder, faults):
    """Uploads photos, runs the command twice in a bucket with faults, and gets the sink. Checks what is reported."""
    files = Storage(url).filesystem
    bucket = url.partition("://")[2]
    files.mkdir(bucket)
    files.put(f"{photos}/", f"{bucket}/photos", recursive=True)
    proxy.faults = faults
    code, report, errors = batch(f"{url}/photos", f"{url}/cutouts")
    assert code == 1 and report["photos"] == 9 and report["errors_by_kind"] == {"photo": 2}, errors
    assert batch(f"{url}/photos", f"{url}/cutouts")[1]["photos"] == 0
    assert sum(proxy.counts[kind] for kind in ("503", "cut", "slow")) > 3
    proxy.faults = 0
    files.get(f"{bucket}/cutouts/", str(folder), recursive=True)
    assert not (folder / lease.NAME).exists()


def test_s3(batch, photos, tmp_path, s3, expected):
    run_in_bucket(batch, s3, "s3://shop", photos, tmp_path / "received", faults=0.1)
    assert pictures(tmp_path / "received") == expected
    assert "d41d8cd98f00b204e9800998ecf8427e" in {r["version"] for r in records(tmp_path / "received")}  # an ETag


def test_google_cloud_storage(batch, photos, tmp_path, monkeypatch, expected):
    # Read on import. Otherwise gcsfs asks for the kind of a bucket by gRPC, which the emulator does not speak.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    pytest.importorskip("gcsfs", reason="gcsfs is not installed (extra `batch`)")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed (extra `test`)")
    with faulty_gcs() as proxy:
        options = {"endpoint_url": proxy.url, "token": "anon"}
        monkeypatch.setitem(fsspec.config.conf, "gs", options)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        run_in_bucket(batch, proxy, "gs://shop", photos, tmp_path / "received", faults=0.06)  # gcsfs waits seconds
    assert pictures(tmp_path / "received") == expected
    assert all(record["version"] for record in records(tmp_path / "received"))


def test_the_hub(batch, photos, tmp_path, monkeypatch, expected):
    with LoopbackHub(tmp_path / "hub") as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": hub.token})
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # which this Hub does not have
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        contents = {path.relative_to(photos).as_posix(): path.read_bytes() for path in photos.rglob("*.*")}
        hub.add_repository("author/photos", {f"train/{name}": content for name, content in contents.items()})
        hub.add_repository("author/cutouts", {"README.md": b"# Cut-outs\n"})
        source, sink = "hf://datasets/author/photos/train", "hf://datasets/author/cutouts/data"
        code, report, errors = batch(source, sink, "--as", "parquet")
        assert report is not None, errors
        assert code == 1 and report["photos"] == 9 and report["errors_by_kind"] == {"photo": 2}, errors
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        assert batch(source, sink, "--as", "parquet")[1]["photos"] == 0
        files = Storage(sink).filesystem
        tables = [parquet.read_table(files.open(path)).to_pylist() for path in files.glob(f"{sink}/*.parquet")]
    received = {row["id"].replace(".jpg", ".png"): row["image"] for table in tables for row in table if row["image"]}
    assert received == expected


def test_urls(batch, photos, tmp_path, expected):
    with faulty_web_server(photos) as proxy:
        names = [path.relative_to(photos).as_posix() for path in sorted(photos.rglob("*.jpg"))]
        lines = [{"url": f"{proxy.url}/{name}", "name": name} for name in [*names, "nowhere.jpg"]]
        (tmp_path / "photos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        proxy.faults = 0.1
        _, report, errors = batch(tmp_path / "photos.jsonl", tmp_path / "web", "--id-column", "name")
        assert report["errors_by_kind"] == {"photo": 1, "missing": 1}, errors
        assert batch(f"{proxy.url}/0.jpg", tmp_path / "one")[1]["photos"] == 1
    assert pictures(tmp_path / "web") == expected
    assert pictures(tmp_path / "one") == {"0.png": expected["0.png"]}
