"""birefnet.batch.lease on a storage without locks: a run at work is respected, one that has ended is not."""

import threading

import pytest

from birefnet.batch import lease
from birefnet.batch.lease import only_run
from birefnet.batch.storage import Storage
from birefnet.errors import CommandError


@pytest.fixture
def sink(monkeypatch):
    """A folder in memory, and a hundredth of the times."""
    monkeypatch.setattr(lease, "SECONDS_BETWEEN_SIGNS", 0.1)
    monkeypatch.setattr(lease, "SECONDS_TO_WATCH", 0.5)
    storage = Storage("memory://one-run")
    yield storage
    storage.remove(lease.NAME)


def test_a_run_at_work_is_respected(sink):
    with only_run(sink), pytest.raises(CommandError, match="another run writes to memory://one-run: process"):
        only_run(sink).__enter__()
    with only_run(sink) as second:  # the first has ended and removed its sign: no waiting
        second.check()
    assert not sink.exists(lease.NAME)


def test_a_killed_run_is_not_waited_for_twice(sink, capsys):
    sink.write(lease.NAME, b'{"run": "process 7 of elsewhere", "count": 3}')
    with only_run(sink):
        pass
    assert "whether this run has ended: process 7" in capsys.readouterr().err


def test_a_run_notices_that_another_has_taken_over(sink):
    with only_run(sink) as first:
        sink.write(lease.NAME, b'{"run": "process 7 of elsewhere", "count": 0}')
        noticed = threading.Event()
        for _ in range(100):
            if first.taken_by or noticed.wait(0.05):
                break
        with pytest.raises(CommandError, match="taken over the sink: process 7 of elsewhere"):
            first.check()
    assert b"process 7" in sink.read(lease.NAME)


def test_a_system_without_fcntl_has_signs_of_life_on_its_disk_too(sink, tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "fcntl", None)
    folder = Storage(str(tmp_path))
    with only_run(folder):
        assert b'"count": ' in folder.read(lease.NAME)
        with pytest.raises(CommandError, match="another run writes to"):
            only_run(folder).__enter__()
    assert not folder.exists(lease.NAME)
