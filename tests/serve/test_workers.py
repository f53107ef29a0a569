"""The queue before the network: batches, dropped photos, failures; and the models behind it."""

import asyncio
import threading
import time

import pytest
import torch

from birefnet.serve.errors import RequestError, WorkerError


class StandIn:
    """A network that notes its batches. `error` is what it raises for batches that hold the number `bad`."""

    def __init__(self, error: BaseException | None = None, bad: int = -1):
        self.batches, self.error, self.bad = [], error, bad
        self.go_on = threading.Event()
        self.go_on.set()

    def forward(self, items):
        numbers = [item["number"] for item in items]
        self.batches.append(numbers)
        assert self.go_on.wait(10)
        if self.error is not None and self.bad in numbers:
            raise self.error
        return [{"number": number} for number in numbers]


def item(number: int, side: int = 4) -> dict:
    return {"number": number, "pixel_values": torch.zeros(3, side, side)}


@pytest.fixture
def workers():
    from birefnet.serve.metrics import Metrics
    from birefnet.serve.workers import NetworkWorkers

    threads = torch.get_num_threads()
    workers = NetworkWorkers(1, batch_size=3, wait=0.1, metrics=Metrics())
    yield workers
    workers.stop()
    torch.set_num_threads(threads)


def test_photos_of_one_size_and_model_share_a_call(workers):
    network, other = StandIn(), StandIn()
    network.go_on.clear()
    first = workers.submit(network, item(0))
    while not network.batches:  # the worker is at the first one (alone: nothing came in time)
        time.sleep(0.01)
    futures = [workers.submit(network, item(1)), workers.submit(other, item(9)), workers.submit(network, item(2, 8))]
    futures += [workers.submit(network, item(number)) for number in (3, 4, 5)]
    network.go_on.set()
    assert first.result(5) == {"number": 0}
    assert [future.result(5)["number"] for future in futures] == [1, 9, 2, 3, 4, 5]
    assert network.batches == [[0], [1, 3, 4], [2], [5]] and other.batches == [[9]]


def test_a_photo_waits_for_others_no_longer_than_told(workers):
    network = StandIn()
    start = time.monotonic()
    workers.submit(network, item(0)).result(5)
    assert 0.09 < time.monotonic() - start < 2
    futures = [workers.submit(network, item(number)) for number in (1, 2)]
    assert [future.result(5)["number"] for future in futures] == [1, 2] and network.batches == [[0], [1, 2]]


def test_photos_whose_client_left_never_reach_the_network(workers):
    network = StandIn()
    network.go_on.clear()
    running = workers.submit(network, item(0))
    while not network.batches:
        time.sleep(0.01)
    left = [workers.submit(network, item(number)) for number in (1, 2)]
    stays = workers.submit(network, item(3))
    assert all(future.cancel() for future in left)
    network.go_on.set()
    assert running.result(5) and stays.result(5) and network.batches == [[0], [3]]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), MemoryError(), RuntimeError("broken")])
def test_a_photo_that_fails_is_the_only_one_that_fails(workers, error):
    network = StandIn(error, bad=1)
    network.go_on.clear()
    futures = [workers.submit(network, item(number)) for number in range(3)]
    network.go_on.set()
    assert futures[0].result(5) and futures[2].result(5)
    with pytest.raises(WorkerError) as caught:
        futures[1].result(5)
    assert caught.value.code == ("processing_failed" if type(error) is RuntimeError else "out_of_memory")
    assert workers.submit(network, item(7)).result(5)  # and the server goes on


def test_models_are_loaded_when_asked_for_and_the_least_recently_used_one_goes():
    from birefnet.serve.metrics import Metrics
    from birefnet.serve.shelf import ModelShelf

    loads = []

    def loader(name):
        def load():
            loads.append(name)
            if name == "HR":
                raise OSError("/secret/path is missing")
            return f"{name} loaded"

        return load

    async def use():
        shelf = ModelShelf({name: loader(name) for name in ("general", "portrait", "lite", "HR")}, 2, Metrics())
        assert await asyncio.gather(shelf.get("general"), shelf.get("general")) == ["general loaded"] * 2
        await shelf.get("portrait")
        await shelf.get("general")
        await shelf.get("lite")
        assert shelf.loaded == ["general", "lite"] and loads == ["general", "portrait", "lite"]
        with pytest.raises(WorkerError) as caught:
            await shelf.get("HR")
        assert "secret" not in str(caught.value)
        assert await shelf.get("lite") == "lite loaded"
        names = {None: "general", "auto": "general", "Portrait": "portrait", "birefnet-general-lite": "lite"}
        names |= {"ZhengPeng7/BiRefNet_HR": "HR", "birefnet-general": "general", "BiRefNet-portrait": "portrait"}
        assert {name: shelf.resolve(name) for name in names} == names
        with pytest.raises(RequestError, match="general, portrait, lite, HR"):
            shelf.resolve("u2net")
        shelf.close()

    asyncio.run(use())
