"""birefnet batch on Ray: the results of a run without, also when a worker is killed while it computes."""

import os
import signal

import pytest

from birefnet.batch import report

from .sink_contents import pictures, records


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of two cores on this machine, which the command finds started."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra `batch`)")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


def test_a_killed_worker_loses_nothing(batch, photos, tmp_path, cluster, monkeypatch):
    batch(photos, tmp_path / "here")
    killed, add = [], report.Progress.add

    def kill_the_worker_of_the_first_block(self, summary):
        add(self, summary)
        if not killed:
            killed.append(int(summary["worker"].rpartition(":")[2]))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(report.Progress, "add", kill_the_worker_of_the_first_block)
    code, facts, _ = batch(photos, tmp_path / "ray", "--ray", "local", "--workers", "1", "--cpus-per-worker", "1")
    assert killed and code == 1 and facts["photos"] == 9 and facts["errors_by_kind"] == {"photo": 2}
    assert len(facts["peak_memory_of_workers"]) == 2  # the killed process and its successor
    assert pictures(tmp_path / "ray") == pictures(tmp_path / "here")
    assert sorted(record["id"] for record in records(tmp_path / "ray")) == sorted(
        record["id"] for record in records(tmp_path / "here")
    )
