from types import SimpleNamespace

from birefnet import concurrency


def test_heaps_are_limited_for_glibc_unless_the_user_chose(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *given: calls.append(given))
    monkeypatch.setattr(concurrency.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(concurrency.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    concurrency.limit_heaps()
    assert calls == []
    monkeypatch.setattr(concurrency.platform, "libc_ver", lambda: ("glibc", "2.36"))
    concurrency.limit_heaps()
    assert calls == [(-8, 2)]
    monkeypatch.setenv("MALLOC_ARENA_MAX", "8")
    concurrency.limit_heaps()
    assert calls == [(-8, 2)]
