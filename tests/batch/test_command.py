"""birefnet batch without Ray: the same bytes as `birefnet cutout`, nothing done twice, nothing lost."""

import errno
import json
import os
import tarfile

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from birefnet.batch import storage, worker
from birefnet.batch.lease import only_run
from birefnet.batch.report import Progress
from birefnet.batch.storage import Storage
from birefnet.command_line import main

from .sink_contents import change, pictures, records


GOOD = {"0.jpg", "2.jpg", "4.jpg", "6.jpg", "more/1.jpg", "more/3.jpg", "more/5.jpg"}


def test_files_are_those_of_cutout_and_errors_are_told(batch, photos, tmp_path, tiny_model_folder, capsys):
    code, report, _ = batch(photos, tmp_path / "sink")
    assert code == 1 and report["photos"] == 9 and report["errors_by_kind"] == {"photo": 2}
    main(["cutout", str(photos), "-o", str(tmp_path / "cutout"), "--model", str(tiny_model_folder)])
    assert pictures(tmp_path / "sink") == pictures(tmp_path / "cutout") and len(pictures(tmp_path / "sink")) == 7
    errors = [json.loads(line) for line in (tmp_path / "sink/_birefnet/errors.jsonl").read_text().splitlines()]
    assert {error["id"] for error in errors} == {"broken.jpg", "empty.png"} and all(e["error"] for e in errors)
    assert {record["id"] for record in records(tmp_path / "sink")} == {*GOOD, "broken.jpg", "empty.png"}
    with Image.open(tmp_path / "sink/_birefnet/report.png") as picture:
        assert picture.size == (1000, 600)


def test_a_second_run_does_what_is_missing_or_has_changed(batch, photos, tmp_path):
    sink = tmp_path / "sink"
    batch(photos, sink)
    before = pictures(sink)
    code, report, _ = batch(photos, sink)
    assert code == 1 and report["photos"] == 0 and report["errors"] == 2  # a damaged photo is not tried again
    change(photos / "0.jpg")
    change(photos / "broken.jpg")
    change(photos / "new.jpg")
    code, report, _ = batch(photos, sink)
    assert report["photos"] == 3 and report["errors"] == 1
    after = pictures(sink)
    assert {name for name in after if after[name] != before.get(name)} == {"0.png", "broken.png", "new.png"}
    ids = [record["id"] for record in records(sink)]
    assert sorted(ids) == sorted({*GOOD, "broken.jpg", "empty.png", "new.jpg"})


def test_rows_of_tables_are_replaced_when_photos_change(batch, photos, tmp_path):
    sink = tmp_path / "sink"
    batch(photos, sink, "--as", "parquet")
    table = parquet.read_table(sink).to_pylist()
    rows = {row["id"]: row for row in table}
    assert len(table) == len(rows) == 9 and rows["broken.jpg"]["image"] is None and rows["broken.jpg"]["error"]
    row = rows["more/1.jpg"]
    (sink / "1.png").write_bytes(row["image"])
    with Image.open(sink / "1.png") as picture:
        alpha = np.asarray(picture.getchannel("A"))
    assert (row["height"], row["width"]) == alpha.shape
    assert row["area"] == pytest.approx(alpha.mean() / 255, abs=1e-5)
    assert row["certainty"] == pytest.approx(abs(2 * (alpha / 255) - 1).mean(), abs=1e-5)
    ys, xs = np.nonzero(alpha >= 128)
    assert row["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    (sink / "1.png").unlink()
    change(photos / "more/1.jpg")
    batch(photos, sink, "--as", "parquet")
    changed = parquet.read_table(sink).to_pylist()
    assert len(changed) == 9 and {row["id"]: row["width"] for row in changed}["more/1.jpg"] == 64


def test_webdataset_shards(batch, photos, tmp_path):
    batch(photos, tmp_path / "sink", "--as", "webdataset", "--background", "white", "--format", "jpeg")
    members = {}
    for path in (tmp_path / "sink").glob("shard-*.tar"):
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    assert {name for name in members if name.endswith(".jpg")} == GOOD
    facts = json.loads(members["more/1.json"])
    assert facts["id"] == "more/1.jpg" and facts["width"] == 48 and 0 <= facts["certainty"] <= 1


def test_a_full_disk_stops_the_run_and_a_second_run_completes_it(batch, photos, tmp_path, monkeypatch):
    sink = tmp_path / "sink"
    write, count = storage.write_whole, []

    def write_until_full(content, destination):
        count.append(1)
        if len(count) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, destination)

    monkeypatch.setattr(storage, "write_whole", write_until_full)
    code, report, errors = batch(photos, sink)
    assert code == 1 and "No space left on device" in report["stopped"] and "Traceback" not in errors
    assert "no errors.jsonl and no report" in errors
    monkeypatch.setattr(storage, "write_whole", write)
    committed = {record["id"] for record in records(sink)}
    code, report, _ = batch(photos, sink)
    assert report["photos"] == 9 - len(committed) and len(pictures(sink)) == 7
    assert not list(sink.rglob("*.partial"))


def test_a_storage_that_fails_for_a_while_is_tried_again_by_the_next_run(batch, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0)
    read = worker.read_entry

    def read_all_but_one(entry):
        if entry.id == "4.jpg":
            raise storage.StorageError("still failing after 8 attempts: 503")
        return read(entry)

    monkeypatch.setattr(worker, "read_entry", read_all_but_one)
    _, report, _ = batch(photos, tmp_path / "sink")
    assert report["errors_by_kind"] == {"photo": 2, "storage": 1}
    monkeypatch.setattr(worker, "read_entry", read)
    _, report, _ = batch(photos, tmp_path / "sink")
    assert report["photos"] == 1 and report["errors"] == 2 and len(pictures(tmp_path / "sink")) == 7


def test_max_errors_stops_the_run(batch, photos, tmp_path):
    for number in range(5):
        (photos / f"bad{number}.jpg").write_bytes(b"no")
    code, report, errors = batch(photos, tmp_path / "sink", "--max-errors", "1")
    assert code == 1 and "--max-errors 1" in errors and "--max-errors 1" in report["stopped"]
    assert len((tmp_path / "sink/_birefnet/errors.jsonl").read_text().splitlines()) == report["errors"] >= 2


def test_an_interrupted_run_leaves_its_report(batch, photos, tmp_path, monkeypatch):
    def interrupt(self, end=False):
        if not end:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", interrupt)
    code, report, _ = batch(photos, tmp_path / "sink")
    assert code == 130 and report["photos"] == 3 and report["stopped"] == "interrupted"
    assert json.loads((tmp_path / "sink/_birefnet/report.json").read_text()) == report
    monkeypatch.undo()
    assert batch(photos, tmp_path / "sink")[1]["photos"] == 6


def test_one_run_at_a_time(batch, photos, tmp_path):
    sink = tmp_path / "sink"
    with only_run(Storage(sink)):
        code, _, errors = batch(photos, sink)
        assert code == 1 and f"process {os.getpid()}" in errors and not pictures(sink)
    assert batch(photos, sink)[1]["photos"] == 9


def test_other_settings_need_overwrite(batch, photos, tmp_path):
    sink = tmp_path / "sink"
    batch(photos, sink)
    code, _, errors = batch(photos, sink, "--background", "white", "--format", "webp")
    assert code == 2 and "picture_format: png → webp" in errors and "--overwrite" in errors
    code, report, _ = batch(photos, sink, "--background", "white", "--format", "webp", "--overwrite")
    assert report["photos"] == 9
    assert set(pictures(sink)) == {name.replace(".jpg", ".webp") for name in GOOD}


def test_no_file_is_overwritten(batch, photos, tmp_path):
    before = pictures(photos)
    assert batch(photos, photos)[0] == 2
    code, _, errors = batch(photos, tmp_path)  # the sink holds the source
    assert code == 2 and "has not written" in errors
    assert pictures(photos) == before


def test_results_of_one_name_are_refused(batch, photos, tmp_path):
    (photos / "0.png").write_bytes((photos / "2.jpg").read_bytes())
    _, report, _ = batch(photos, tmp_path / "sink")
    assert report["refused"] == 1 and report["errors"] == 3 and len(pictures(tmp_path / "sink")) == 7


def test_plan_predicts_and_writes_nothing(batch, photos, tmp_path):
    code, prediction, _ = batch(photos, tmp_path / "sink", "--plan", "--price-per-hour", "3600")
    assert code == 0 and prediction["photos"] == 9 and prediction["sample"]["failed"] <= 2
    assert prediction["cost"] == pytest.approx(9 * prediction["seconds_per_photo"])
    assert prediction["bytes_to_write"] > 0 and not (tmp_path / "sink").exists()
