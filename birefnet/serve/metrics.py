"""What `/metrics` tells: requests, queue, seconds by stage and batch sizes, in the terms of Prometheus."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One server's counters, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        self.requests = Counter("birefnet_requests", "Answered requests", ("route", "status"), registry=self.registry)
        self.dropped = Counter(
            "birefnet_dropped", "Requests whose client left before the answer", ("route",), registry=self.registry
        )
        self.waiting = Gauge("birefnet_queue_photos", "Requests accepted and not yet answered", registry=self.registry)
        self.places = Gauge(
            "birefnet_queue_limit", "Requests from which on further ones are refused", registry=self.registry
        )
        self.loaded = Gauge("birefnet_loaded_models", "Models in memory", registry=self.registry)
        self.batch_size = Histogram(
            "birefnet_batch_photos", "Photos of a network call", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self.seconds = Histogram(
            "birefnet_stage_seconds",
            "Seconds of a stage: fetch, load, decode, queue, network, finish",
            ("stage",),
            buckets=SECONDS,
            registry=self.registry,
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the seconds spent inside, also when they end with an error."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds.labels(name).observe(time.perf_counter() - start)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
