"""Work in threads or processes with a limited number of results in memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor


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
