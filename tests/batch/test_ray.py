"""birefnet batch on Ray: the results of a run without, with a killed worker and a storage that fails."""

import os
import signal

import pytest

from birefnet.batch import report
from birefnet.batch.storage import Storage

from .sink_contents import pictures, records


@pytest.fixture
def cluster(s3, monkeypatch, tmp_path):
    """A cluster of two cores on this machine, which the command finds started."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra `batch`)")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("BIREFNET_CACHE", str(tmp_path / "cache"))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def model_files(cache):
    """The weights in the workers' cache folder: paths and inodes, which would change with a second copy."""
    return [(path, path.stat().st_ino) for path in cache.rglob("*.safetensors")]


def test_a_killed_worker_and_a_failing_storage_lose_nothing(batch, photos, tmp_path, s3, cluster, monkeypatch):
    batch(photos, tmp_path / "here")
    files = Storage("s3://shop").filesystem
    files.mkdir("shop")
    files.put(f"{photos}/", "shop/photos", recursive=True)
    killed, models, add = [], [], report.Progress.add

    def kill_the_worker_of_the_first_block(self, summary):
        add(self, summary)
        if not killed:
            killed.append(int(summary["worker"].rpartition(":")[2]))
            models.extend(model_files(tmp_path / "cache"))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(report.Progress, "add", kill_the_worker_of_the_first_block)
    s3.faults = 0.05
    arguments = ("s3://shop/photos", "s3://shop/cutouts", "--ray", "local", "--workers", "1", "--cpus-per-worker", "1")
    code, facts, _ = batch(*arguments)
    assert killed and code == 1 and facts["photos"] == 9 and facts["errors_by_kind"] == {"photo": 2}
    assert len(facts["peak_memory_of_workers"]) == 2  # the killed process and its successor
    assert len(models) == 1 and model_files(tmp_path / "cache") == models  # the successor has found the first's file
    assert s3.counts["503"] and s3.counts["cut"] and s3.counts["slow"]
    s3.faults = 0
    files.get("shop/cutouts/", str(tmp_path / "received"), recursive=True)
    assert pictures(tmp_path / "received") == pictures(tmp_path / "here")
    assert sorted(record["id"] for record in records(tmp_path / "received")) == sorted(
        record["id"] for record in records(tmp_path / "here")
    )
