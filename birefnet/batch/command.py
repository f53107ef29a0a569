"""
`birefnet batch`: cut-outs of millions of photos, resumable, on one machine or a Ray cluster.

This module has the arguments and the order of events. `planning` decides what is to be done, `runners` does it.
"""

import argparse
import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from birefnet.cutout.command import add_matte_arguments, add_picture_arguments, picture_options
from birefnet.errors import CommandError, UsageError
from birefnet.inference.arguments import add_model_arguments, positive


DESCRIPTION = """\
Cut the subjects out of very many photos, on this machine or on a Ray cluster. Photos are worked on in blocks. Each
block is committed whole, with a manifest. The same command again does only what is missing or has changed. Photos that
cannot be read go to a table of errors, and the rest goes on."""


EXAMPLES = """\
examples:
  birefnet batch photos/ cutouts/                                   # this machine, no Ray
  birefnet batch photos/ cutouts/ --ray local                       # one worker per GPU, or per 4 cores
  birefnet batch s3://shop/photos s3://shop/cutouts --ray auto --price-per-hour 2.5
  birefnet batch products.parquet s3://shop/tables --as parquet --column url --id-column sku
  birefnet batch 's3://shop/shards/*.tar' s3://shop/out --as webdataset --column jpg
  birefnet batch s3://shop/photos s3://shop/cutouts --plan          # measures 50 photos, predicts the whole

One run at a time may write to a sink. `SINK/_birefnet` holds manifests, errors and the report.

exit codes: 0 all went well; 1 at least one photo failed, or the run stopped; 2 wrong arguments; 130 interrupted"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `birefnet batch`."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "source", metavar="SOURCE", help="a folder, table (.parquet .csv .jsonl), tar, or a glob; a path or URL"
    )
    parser.add_argument("sink", metavar="SINK", help="a folder; a path or URL. Results of an earlier run are kept")
    source = parser.add_argument_group("source")
    source.add_argument("--column", metavar="NAME", help="the tables' column of paths, URLs or bytes; a tar's suffix")
    source.add_argument("--id-column", metavar="NAME", help="the tables' column of unique names (default: made up)")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--as",
        dest="layout",
        choices=["files", "parquet", "webdataset"],
        default="files",
        help="files laid out like the source (default), Parquet tables, or WebDataset tars",
    )
    output.add_argument("--format", choices=["png", "webp", "jpeg"], default="png", help="default: png")
    add_picture_arguments(output)
    output.add_argument("--overwrite", action="store_true", help="replace results that have other settings")
    output.add_argument("--json", action="store_true", help="print the report, or the plan, as JSON on stdout")
    _add_run_arguments(parser.add_argument_group("run"))
    add_matte_arguments(parser.add_argument_group("mask edits, in this order"))
    add_model_arguments(parser.add_argument_group("model"))


def _add_run_arguments(group) -> None:
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="auto (the cluster of this machine), local (this machine alone) or an address; default: without Ray",
    )
    group.add_argument("--workers", type=positive, metavar="N", help="default: one per GPU, else as the cores allow")
    group.add_argument(
        "--cpus-per-worker", type=positive, metavar="N", help="default: an equal share of a GPU machine's; else 4"
    )
    group.add_argument("--block-size", type=positive, default=256, metavar="N", help="photos per block (default: 256)")
    group.add_argument("--max-errors", type=int, metavar="N", help="stop after more photos than these have failed")
    group.add_argument("--price-per-hour", type=_price, metavar="PRICE", help="of one machine; adds costs to reports")
    group.add_argument("--plan", action="store_true", help="measure 50 photos, predict the whole, write nothing")


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price")
    return price


def run(arguments: argparse.Namespace) -> int:
    """Runs `birefnet batch` and returns its exit code."""
    try:
        import fsspec  # noqa: F401
        import numpy  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise CommandError(f'this command needs: pip install "birefnet-transformers[batch]" ({error})') from error
    # Pillow warns from 90 megapixels on, which professional cameras reach, and refuses twice as many.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    return _Batch(arguments).run()


class _Batch:
    """One run of the command, step by step."""

    def __init__(self, arguments: argparse.Namespace):
        from birefnet.batch.manifest import Settings
        from birefnet.batch.model_files import hash_of, model_folder
        from birefnet.batch.storage import Storage
        from birefnet.batch.worker import Task

        self.arguments = arguments
        _check_arguments(arguments)
        options = picture_options(arguments)
        try:
            self.storage = Storage(arguments.sink)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{arguments.sink}: {error}") from error
        _check_separate(arguments.source, arguments.sink)
        self.model = model_folder(arguments.model, arguments.variant)
        self.model_hash = hash_of(self.model)
        resolution = arguments.resolution
        self.settings = Settings(
            model=self.model_hash,
            model_name=str(arguments.variant or arguments.model or "embedded"),
            options={**options, "background": _comparable(options["background"])},
            picture_format=arguments.format,
            resolution=resolution
            if resolution is None or isinstance(resolution, str)
            else "{}x{}".format(*resolution),
            dtype=arguments.dtype,
            sink=arguments.layout,
        )
        names = ("device", "dtype", "resolution", "batch_size")
        self.task = Task(
            sink_url=self.storage.url,
            sink=arguments.layout,
            settings=self.settings.compared(),
            picture_format=arguments.format,
            options=options,
            batch_size=arguments.batch_size,
            remover={name: getattr(arguments, name) for name in names},
        )

    def run(self) -> int:
        from birefnet.batch.lease import only_run

        self._check_sink()
        if self.arguments.plan:
            self._make_plan()
            return self._predict()
        with only_run(self.storage) as self.lease:
            self._check_sink()  # again: another run may have ended meanwhile
            self._prepare_sink()
            self._make_plan()
            return self._work()

    def _make_plan(self) -> None:
        from birefnet.batch.manifest import Ledger, read_manifests
        from birefnet.batch.planning import Plan
        from birefnet.batch.sources import list_entries

        arguments = self.arguments
        self.ledger = Ledger(read_manifests(self.storage), self.task.settings)
        entries = list_entries(arguments.source, arguments.column, arguments.id_column, excluded=arguments.sink)
        self.plan = Plan(entries, self.ledger, self.task, arguments.block_size)
        if not self.plan.listed:
            raise CommandError(f"{arguments.source}: no photo there")

    def _check_sink(self) -> None:
        """Refuses a sink with other results, unless they are to be replaced."""
        from birefnet.batch.manifest import FOLDER

        name = f"{FOLDER}/settings.json"
        wanted = self.task.settings
        if self.storage.exists(name):
            found = json.loads(self.storage.read(name))
            differing = [key for key in wanted if found["settings"].get(key) != wanted[key]]
            if differing and not self.arguments.overwrite:
                changes = "; ".join(f"{key}: {found['settings'].get(key)} → {wanted[key]}" for key in differing)
                raise UsageError(
                    f"{self.storage.url} holds results with other settings ({changes}): give another sink, or "
                    "--overwrite to replace them"
                )
        elif set(self.storage.names("")) - {FOLDER} and not self.arguments.overwrite:
            raise UsageError(
                f"{self.storage.url} holds files that `birefnet batch` has not written: give a new or empty folder, "
                "or --overwrite to replace files of the same names"
            )

    def _prepare_sink(self) -> None:
        """Removes what a killed run has left, and records the settings."""
        from birefnet.batch.manifest import FOLDER

        content = {"settings": self.task.settings, "model_name": self.settings.model_name}
        with _explained_errors(self.storage):
            self.storage.remove_partial_files()
            self.storage.write(f"{FOLDER}/settings.json", (json.dumps(content, indent=2) + "\n").encode())

    def _predict(self) -> int:
        from birefnet.batch.planning import describe, measure

        if not self.plan.photos:
            raise CommandError("nothing is left to do, so there is nothing to predict")
        prediction = measure(self.plan, self.task, self.model, self.arguments.price_per_hour)
        print(json.dumps(prediction, indent=2) if self.arguments.json else describe(prediction))
        return 0

    def _work(self) -> int:
        """Runs the blocks. Errors and report are also written when the run is stopped, by whatever stops it."""
        from birefnet.batch.report import Progress
        from birefnet.batch.worker import SinkError

        done = self.plan.listed - self.plan.photos - len(self.plan.refused)
        print(
            f"{self.plan.listed} photos: {done} done by earlier runs, {self.plan.photos} to do in "
            f"{len(self.plan.blocks)} blocks, {len(self.plan.refused)} refused",
            file=sys.stderr,
        )
        progress = Progress(self.plan.photos, self.arguments.price_per_hour)
        errors = {record["id"]: record for record in self.plan.refused}
        stopped = None
        try:
            for summary in self._summaries() if self.plan.blocks else ():
                progress.add(summary)
                errors.update((record["id"], record) for record in summary["errors"])
                progress.show()
                self.lease.check()
                limit = self.arguments.max_errors
                if limit is not None and progress.failed > limit:
                    raise CommandError(f"stopped after {progress.failed} errors (--max-errors {limit})")
        except (SinkError, CommandError, KeyboardInterrupt) as error:
            stopped = error
        progress.show(end=True)
        return self._finish(progress, errors, stopped)

    def _summaries(self):
        from birefnet.batch.runners import Cluster, run_blocks_here, run_blocks_on_ray

        arguments = self.arguments
        if arguments.ray is None:
            return run_blocks_here(self.plan.blocks, self.task, self.model)
        cluster = Cluster(arguments.ray, arguments.workers, arguments.cpus_per_worker)
        return run_blocks_on_ray(self.plan.blocks, self.task, self.model, self.model_hash, cluster)

    def _finish(self, progress, errors: dict[str, dict], stopped: BaseException | None) -> int:
        """Removes replaced results, writes errors and report, and raises what has stopped the run."""
        with _explained_errors(self.storage):
            errors = self._settle(errors, complete=stopped is None)
        report = self._report(progress, errors, stopped)
        if self.arguments.json:
            print(json.dumps(report))
        try:
            with _explained_errors(self.storage):
                self._write_report(report, errors, progress.course)
        except CommandError as error:
            if stopped is None:
                raise
            print(f"birefnet batch: no errors.jsonl and no report: {error}", file=sys.stderr)
        if isinstance(stopped, KeyboardInterrupt):
            raise stopped
        if stopped is not None:
            raise CommandError(f"{stopped}. What is committed stays; the same command does the rest") from stopped
        return 1 if errors else 0

    def _settle(self, errors: dict[str, dict], complete: bool) -> dict[str, dict]:
        """Removes results that this run has replaced, if it is complete. Returns the errors of all runs, by id."""
        from birefnet.batch.manifest import Ledger, read_manifests, tidy
        from birefnet.batch.sinks import SHARDS

        if self.ledger.outdated_blocks:
            if complete:
                tidy(self.storage, self.ledger.outdated_blocks, SHARDS[self.task.sink].rewrite)
            self.ledger = Ledger(read_manifests(self.storage), self.task.settings)
        return {**self.ledger.errors, **errors}

    def _report(self, progress, errors: dict[str, dict], stopped: BaseException | None) -> dict:
        reason = None if stopped is None else str(stopped) or "interrupted"
        report = {"listed": self.plan.listed, "refused": len(self.plan.refused), "errors": len(errors)}
        report |= {**progress.as_dict(), "stopped": reason, "settings": self.task.settings, "ended": time.time()}
        return report

    def _write_report(self, report: dict, errors: dict[str, dict], course: list[tuple[float, int]]) -> None:
        from birefnet.batch.manifest import FOLDER
        from birefnet.batch.report import write_report

        lines = (json.dumps(record, sort_keys=True) + "\n" for _, record in sorted(errors.items()))
        name = f"{FOLDER}/errors.jsonl"
        self.storage.write(name, "".join(lines).encode())
        if errors:
            print(f"{len(errors)} photos have no result: {self.storage.url}/{name}", file=sys.stderr)
        write_report(self.storage, report, course)


@contextmanager
def _explained_errors(storage) -> Iterator[None]:
    """Raises the errors of a sink that cannot be written as `CommandError`, with its name."""
    from birefnet.batch.storage import StorageError

    try:
        yield
    except (OSError, StorageError) as error:
        raise CommandError(f"{storage.url} cannot be written: {error}") from error


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.format == "jpeg" and not arguments.mask and arguments.background is None:
        raise UsageError("JPEG has no transparency: choose png or webp, or give --background or --mask")
    if arguments.ray is None and (arguments.workers or arguments.cpus_per_worker):
        raise UsageError("--workers and --cpus-per-worker are for --ray")


def _check_separate(source: str, sink: str) -> None:
    """Refuses a sink that is its source, whose photos it would overwrite."""
    from birefnet.batch.storage import Storage

    if Storage(source).root.rstrip("/") == Storage(sink).root.rstrip("/"):
        raise UsageError(f"the sink {sink} is the source: give another folder")


def _comparable(background):
    """A background as a JSON value: a colour's numbers, or the hash of a picture's pixels."""
    if background is None or isinstance(background, tuple):
        return background if background is None else list(background)
    return hashlib.sha256(repr(background.size).encode() + background.tobytes()).hexdigest()
