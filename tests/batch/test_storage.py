"""birefnet.batch.storage: whole files or none, and which failures are tried again."""

import errno

import pytest

from birefnet.batch import storage
from birefnet.batch.storage import Storage, StorageError, with_retries


@pytest.fixture(autouse=True)
def no_delays(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY", 0)


def failing(times, error):
    """A function that fails so many times, and how often it was called."""
    calls = []

    def operation():
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return operation, calls


def test_passing_failures_are_tried_again():
    operation, calls = failing(3, OSError("503 Slow Down"))
    assert with_retries(operation) == "done" and len(calls) == 4


def answered(status):
    """An error of a web server's client."""
    error = RuntimeError(f"status {status}")
    error.status = status
    return error


def test_a_server_that_is_busy_is_asked_again():
    assert (
        with_retries(failing(2, answered(429))[0]) == "done" and with_retries(failing(2, answered(503))[0]) == "done"
    )


@pytest.mark.parametrize(
    "error", [FileNotFoundError("gone"), PermissionError("no"), OSError(errno.ENOSPC, "full"), answered(403)]
)
def test_lasting_failures_are_not(error):
    operation, calls = failing(1, error)
    with pytest.raises(type(error)):
        with_retries(operation)
    assert len(calls) == 1


def test_a_storage_that_stays_away_is_an_error():
    operation, calls = failing(100, ConnectionError("refused"))
    with pytest.raises(StorageError, match="8 attempts: refused"):
        with_retries(operation)
    assert len(calls) == storage.ATTEMPTS


@pytest.mark.parametrize("url", ["{folder}", "file://{folder}", "memory://whole-files"])
def test_an_unfinished_file_never_appears(tmp_path, url):
    place = Storage(url.format(folder=tmp_path))
    place.write("a/first", b"old")
    with pytest.raises(RuntimeError), place.whole_file("a/first") as file:
        file.write(b"half of the ne")
        raise RuntimeError
    assert place.read("a/first") == b"old" and place.names("a") == ["first"]
    with place.whole_file("a/first") as file:
        file.write(b"new")
    assert place.read("a/first") == b"new" and place.names("a") == ["first"]
    place.remove("a/first")
    place.remove("a/first")
    assert not place.exists("a/first")
