"""Threads that work ahead of whoever takes their results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor


def bounded_map(executor: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """
    `map(function, items)` in an executor's threads, in order. At most `ahead` results are in work or waiting at any
    time, unlike with `executor.map`, which takes all the items at once.
    """
    pending = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        while pending and (len(pending) >= ahead or pending[0].done()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
