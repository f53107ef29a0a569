"""Work in threads or processes within a limited memory."""

import ctypes
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor


GLIBC_ARENA_MAX = -8  # M_ARENA_MAX in malloc.h


def bounded_map(executor: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """
    Computes `map(function, items)` in an executor, in order.

    `executor.map` submits all items at once. This function keeps at most `ahead` items submitted, so that memory does
    not grow with the number of items.

    Args:
        executor: Runs the calls.
        function: Called with each item.
        items: The items.
        ahead: Largest number of items that are being computed or wait to be taken.
    """
    pending = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        while pending and (len(pending) >= ahead or pending[0].done()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def limit_heaps() -> None:
    """
    Makes all threads share two heaps where the C library is glibc, unless `MALLOC_ARENA_MAX` says otherwise.

    By default each thread gets a heap of its own, and each heap keeps the memory of the largest pictures that
    passed through its thread. docs/performance.md and docs/video.md have the effect. Call it before threads start.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_ARENA_MAX" not in os.environ:
        ctypes.CDLL(None).mallopt(GLIBC_ARENA_MAX, 2)
