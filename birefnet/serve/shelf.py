"""The models on offer: loaded when first asked for, and the least recently used one goes when there are too many."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from birefnet.hub.variants import get_variant
from birefnet.serve.errors import RequestError, WorkerError
from birefnet.serve.metrics import Metrics


logger = logging.getLogger("birefnet.serve")
EMBEDDED = "embedded"  # the name of the weights that come with the package
AUTOMATIC = ("auto", "default")  # names that stand for the first model


class ModelShelf:
    """
    Args:
        loaders: for each name a function that loads the model; the first name is the default model's.
        capacity: most models in memory. One that is still at work while it is removed stays until it is done.
        metrics: where loading times are counted.
    """

    def __init__(self, loaders: dict[str, Callable], capacity: int, metrics: Metrics):
        self.loaders, self.capacity, self.metrics = loaders, capacity, metrics
        self._loaded: OrderedDict[str, object] = OrderedDict()
        self._lock = asyncio.Lock()
        self._loading = ThreadPoolExecutor(1, "load")

    @property
    def names(self) -> list[str]:
        return list(self.loaders)

    @property
    def loaded(self) -> list[str]:
        """Names of the models in memory, the least recently used one first."""
        return list(self._loaded)

    def resolve(self, name: str | None) -> str:
        """
        The model that a request means by a name: one on offer, an alias of its variant, or rembg's name for it.

        Raises:
            RequestError: there is no such model here; the message lists those that there are.
        """
        if not name or name in AUTOMATIC:
            return self.names[0]
        wanted = _plain(name)
        for offered in self.names:
            if wanted in (_plain(offered), _plain(_variant_of(offered))):
                return offered
        for offered in self.names:
            if _variant_of(wanted) == _variant_of(offered):
                return offered
        raise RequestError(
            f"There is no model {name[:80]!r} here; there are {', '.join(self.names)}.", "unknown_model"
        )

    async def get(self, name: str):
        """
        The model's pipeline, loaded if need be.

        Raises:
            WorkerError: the model cannot be loaded.
        """
        if name not in self._loaded:
            async with self._lock:  # one load at a time; whoever else wants the same model finds it loaded
                if name not in self._loaded:
                    while len(self._loaded) >= self.capacity:  # first, so that both never stand side by side
                        self._loaded.popitem(last=False)
                    self._loaded[name] = await self._load(name)
                    self.metrics.loaded.set(len(self._loaded))
                return self._loaded[name]
        self._loaded.move_to_end(name)
        return self._loaded[name]

    async def _load(self, name: str):
        loop = asyncio.get_running_loop()
        try:
            with self.metrics.stage("load"):
                return await loop.run_in_executor(self._loading, self.loaders[name])
        except Exception as error:
            logger.error("the model %s cannot be loaded", name, exc_info=error)
            raise WorkerError(f"The model {name} cannot be loaded; the server's log says why.", status=503) from None

    def close(self) -> None:
        self._loading.shutdown(wait=True, cancel_futures=True)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("birefnet-")


# rembg's names of checkpoints, without their prefix "birefnet-", where they are not this project's as well.
_REMBG_NAMES = {"general-lite": "lite", "dis": "DIS5K"}


def _variant_of(name: str) -> str:
    """The table's name of a variant, or the name itself where the table has none."""
    try:
        return get_variant(_REMBG_NAMES.get(_plain(name), _plain(name))).name
    except ValueError:
        return name
