"""Mapping a function in threads with a bounded number of results in advance."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor


def bounded_map(executor: Executor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """
    Applies a function to items in an executor's threads and yields the results in order.

    At most `ahead` items are in progress or waiting at any time. `executor.map` would submit all items at once.
    """
    pending = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        while pending and (len(pending) >= ahead or pending[0].done()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
