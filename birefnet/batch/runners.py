"""Blocks through workers: in this process, or in the actors of a Ray cluster with Ray Data."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from birefnet.batch.model_files import folder_on_this_node, put_in_object_store
from birefnet.batch.sources import Block
from birefnet.batch.worker import BlockWorker, SinkError, Task
from birefnet.errors import CommandError


# No report to Ray's makers, and no warning about a variable that future versions of Ray will not set.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class Cluster:
    """
    Where and with how many workers Ray computes.

    Attributes:
        address: `"local"` (this machine), `"auto"` (the cluster that this machine belongs to) or Ray's address.
        workers: number of actors; None: one per GPU, or as many as the cores allow.
        cpus_per_worker: cores of each; None: on GPUs an equal share, else 4 or all that there are.
    """

    address: str
    workers: int | None = None
    cpus_per_worker: int | None = None


def run_blocks_here(blocks: list[Block], task: Task, model: Path) -> Iterator[dict]:
    """
    Works on the blocks in this process, one after the other; within a block photos overlap as in `birefnet cutout`.

    Yields:
        The summaries of `BlockWorker`.

    Raises:
        SinkError: the sink takes no more.
    """
    worker = make_worker(task, model)
    for block in blocks:
        yield worker(block)


def make_worker(task: Task, model: Path) -> BlockWorker:
    """A worker with the model of a folder."""
    from birefnet.inference import load_remover

    return BlockWorker(task, load_remover(str(model), **task.remover))


class RayWorker:
    """What a Ray Data actor holds. It takes and gives batches of one block."""

    def __init__(self, task: Task, digest: str, stored: list):
        self.worker = make_worker(task, folder_on_this_node(digest, stored))

    def __call__(self, batch: dict) -> dict:
        try:
            summary = self.worker(Block(batch["name"][0], int(batch["photos"][0]), batch["packed"][0]))
        except SinkError as error:  # as a value: an exception would come with the trace of every layer of Ray
            summary = {"sink_error": str(error)}
        return {"summary": [json.dumps(summary)]}


def run_blocks_on_ray(
    blocks: list[Block], task: Task, model: Path, digest: str, cluster: Cluster, worker_class: type = RayWorker
) -> Iterator[dict]:
    """
    Works on the blocks with Ray Data. Ray restarts workers that die and repeats the blocks they had in hand.

    Args:
        blocks: the work. Ray hands each worker one block at a time.
        task: what the blocks have in common.
        model: folder of the model; its files go to each node once.
        digest: `hash_of` the model.
        cluster: where, and with how many workers.
        worker_class: for simulations: stands for `RayWorker`.

    Yields:
        The summaries of `BlockWorker`, in the order in which blocks are done.

    Raises:
        SinkError: the sink takes no more. CommandError: there is no such cluster, or it cannot serve the workers.
    """
    # Ray prints to standard output what becomes of its workers, but `--json` needs standard output for the report.
    with redirect_stdout(sys.stderr):
        yield from _summaries(blocks, task, model, digest, cluster, worker_class)


def _summaries(
    blocks: list[Block], task: Task, model: Path, digest: str, cluster: Cluster, worker_class: type
) -> Iterator[dict]:
    ray, started = connect(cluster.address)
    try:
        workers, cpus, gpus = share_out(cluster, ray.cluster_resources(), len(blocks))
        stored = put_in_object_store(model)
        rows = [asdict(block) for block in blocks]
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            worker_class,
            batch_size=1,
            # One block in hand: a dead worker repeats one, and no block waits behind a busy worker at the end.
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
            fn_constructor_args=(task, digest, stored),
        )
        for row in dataset.iter_rows():
            summary = json.loads(row["summary"])
            if "sink_error" in summary:
                raise SinkError(summary["sink_error"])
            yield summary
    except ray.exceptions.RayError as error:
        raise CommandError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
    finally:
        if started:
            ray.shutdown()


def connect(address: str):
    """
    Starts Ray on this machine or joins a cluster, unless this process has done so already.

    Returns:
        The module `ray`, and whether it has been started or joined here.

    Raises:
        CommandError: Ray is not installed, or there is no such cluster.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise CommandError(f'--ray needs Ray Data: pip install "birefnet-transformers[batch]" ({error})') from error
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(
                address=address,
                include_dashboard=False if address == "local" else None,
                log_to_driver=False,
                logging_level="warning",
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise CommandError(f"--ray {address}: {' '.join(str(error).split())}") from error
    # Ray Data describes its plan at length.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # none: a block of large photos takes its time on a CPU
    # A worker that dies while it loads the model is replaced, as one that dies later. Enough for lost spot machines;
    # few enough to end a run whose model cannot be loaded anywhere.
    context.max_consecutive_actor_init_deaths = 5
    return ray, started


def share_out(cluster: Cluster, resources: dict, blocks: int) -> tuple[int, float, float]:
    """Number of workers, and cores and GPUs of each, for a cluster's resources as Ray tells them.

    Raises:
        CommandError: a worker would never fit.
    """
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    if gpus:
        per_worker = cluster.cpus_per_worker or max(1, cores // gpus)
        fitting = min(gpus, cores // per_worker)
    else:
        per_worker = cluster.cpus_per_worker or max(1, min(4, cores))
        fitting = cores // per_worker
    if not fitting:
        raise CommandError(f"no worker fits: the cluster has {cores} cores, and each worker needs {per_worker}")
    wanted = cluster.workers or fitting
    if wanted > fitting:
        raise CommandError(
            f"--workers {wanted}: the cluster's {cores} cores and {gpus} GPUs serve {fitting} workers of {per_worker} "
            "cores; give fewer workers, or --cpus-per-worker"
        )
    return max(1, min(wanted, blocks)), per_worker, 1 if gpus else 0
