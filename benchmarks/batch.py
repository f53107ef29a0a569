"""Proof runs of `birefnet batch`: many photos, killed workers and a killed driver, throughput, and a simulation.

    python benchmarks/batch.py draw out/batch/photos --number 10000 --bad 50
    python benchmarks/batch.py undisturbed out/batch/photos out/batch/undisturbed
    python benchmarks/batch.py disturbed out/batch/photos out/batch/disturbed --reference out/batch/undisturbed
    python benchmarks/batch.py throughput out/batch/photos --number 200
    python benchmarks/batch.py simulate --actors 1 2 4 8 16

`undisturbed` and `disturbed` use two workers of one core each. `disturbed` kills a worker every 20 s (SIGKILL). At
half of the blocks it kills the driver, and starts the same command again. Both write the memory of all processes over
time beside the sink, as JSON and as a picture. `simulate` has a stub in place of the network, which sleeps.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from birefnet.batch.manifest import BLOCKS, FOLDER
from birefnet.photos.writing import write_whole


SCENES = 200  # drawn ones; each photo is a crop of one of them
WORKER_TITLE = "MapWorker"  # in the titles of Ray Data's actors
RUN = ("--ray", "local", "--workers", "2", "--cpus-per-worker", "1", "--resolution", "224", "--dtype", "bfloat16")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("draw")
    step.add_argument("photos", type=Path)
    step.add_argument("--number", type=int, default=10_000)
    step.add_argument("--bad", type=int, default=50)
    for name in ("undisturbed", "disturbed"):
        step = steps.add_parser(name)
        step.add_argument("photos", type=Path)
        step.add_argument("sink", type=Path)
        step.add_argument("--block-size", type=int, default=25)
        step.add_argument("--reference", type=Path, help="sink of another run, whose results must be the same")
        step.add_argument("--seconds-between-kills", type=float, default=20)
        step.add_argument("--kill-driver-after", type=float, default=0.5, help="fraction of the blocks (default: 0.5)")
    step = steps.add_parser("throughput")
    step.add_argument("photos", type=Path)
    step.add_argument("--number", type=int, default=200)
    step.add_argument("--resolution", default="224")
    step = steps.add_parser("simulate")
    step.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    step.add_argument("--seconds-per-photo", type=float, default=0.5)
    step.add_argument("--blocks-per-actor", type=int, default=4)
    step.add_argument("--block-size", type=int, default=20)
    return parser.parse_args(arguments)


# --- Photos ---


def draw(arguments: argparse.Namespace) -> dict:
    """Photos of 224 x 224 pixels, each of its own, and damaged ones among them."""
    from birefnet.data.drawn_scenes import draw_scene

    random = np.random.default_rng(0)
    textures = [draw_texture(random) for _ in range(12)]
    scenes = [draw_scene(textures, 288, 0, number)[0] for number in range(SCENES)]
    every = arguments.number // max(1, arguments.bad)
    for number in range(arguments.number):
        path = arguments.photos / f"{number // 500:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        left, top = (int(value) for value in random.integers(0, 64, 2))
        photo = scenes[number % SCENES].crop((left, top, left + 224, top + 224))
        if random.random() < 0.5:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        photo.save(path, quality=90)
        if arguments.bad and number % every == every // 2:
            damage(path, number // every)
    return {"photos": arguments.number, "bad": arguments.bad}


def draw_texture(random: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Coloured noise of all scales, and the mask of a disc in it."""
    pixels = sum(
        np.asarray(
            Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).resize((288, 288), 3), float
        )
        for size in (3, 9, 36)
    )
    rows, columns = np.mgrid[:288, :288]
    disc = np.hypot(rows - 144, columns - 144) < 70
    return Image.fromarray((pixels / 3).astype(np.uint8)), Image.fromarray((255 * disc).astype(np.uint8))


def damage(path: Path, kind: int) -> None:
    content = path.read_bytes()
    damaged = (b"", content[: len(content) // 2], b"<html>not found</html>", content[:200], b"\0" * 5000)
    path.write_bytes(damaged[kind % len(damaged)])


# --- Runs of the command ---


class Watch:
    """Follows a run: memory of driver and workers, and who is to be killed."""

    def __init__(self, driver: subprocess.Popen, samples: list[dict], start: float):
        self.driver, self.samples, self.start = psutil.Process(driver.pid), samples, start

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in self.driver.children(recursive=True):
            try:
                if WORKER_TITLE in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # has ended meanwhile
                continue
        return sorted(found, key=lambda process: process.create_time())

    def sample(self) -> None:
        try:
            workers = {str(worker.pid): worker.memory_info().rss for worker in self.workers()}
            driver = self.driver.memory_info().rss
        except psutil.Error:
            return
        self.samples.append({"seconds": time.time() - self.start, "driver": driver, "workers": workers})

    def kill_oldest_worker(self) -> int | None:
        workers = self.workers()
        if not workers:
            return None
        workers[0].send_signal(signal.SIGKILL)
        return workers[0].pid


def run_batch(arguments: argparse.Namespace) -> dict:
    """One run of the command to its end, disturbed or not; with what was counted on the way."""
    command = [sys.executable, "-m", "birefnet", "batch", str(arguments.photos), str(arguments.sink), *RUN]
    command += ["--block-size", str(arguments.block_size), "--json"]
    total = sum(1 for _ in arguments.photos.rglob("*.jpg"))
    blocks = -(-total // arguments.block_size)
    disturbed = arguments.step == "disturbed"
    samples, kills, start = [], 0, time.time()
    drivers_killed = 0
    while True:
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        watch, last_kill = Watch(driver, samples, start), time.time()
        while driver.poll() is None:
            time.sleep(1)
            watch.sample()
            if not disturbed:
                continue
            committed = len(list((arguments.sink / BLOCKS).glob("*.jsonl")))
            if not drivers_killed and committed >= blocks * arguments.kill_driver_after:
                driver.kill()
                drivers_killed += 1
            elif time.time() - last_kill >= arguments.seconds_between_kills and watch.kill_oldest_worker():
                kills, last_kill = kills + 1, time.time()
        output = driver.stdout.read()
        if driver.returncode != -signal.SIGKILL:
            break
        time.sleep(3)  # Ray's processes end after their driver
    facts = {"exit_code": driver.returncode, "seconds": round(time.time() - start, 1), "workers_killed": kills}
    facts |= {"drivers_killed": drivers_killed, "report": json.loads(output.splitlines()[-1]) if output else None}
    facts |= account(arguments.photos, arguments.sink)
    if arguments.reference:
        facts["compared_with_reference"] = compare(arguments.sink, arguments.reference)
    write_memory(arguments.sink, samples)
    return facts


def account(photos: Path, sink: Path) -> dict:
    """Every photo must be in exactly one manifest, and have a result or an error."""
    records = []
    for path in (sink / BLOCKS).glob("*.jsonl"):
        records += map(json.loads, path.read_text().splitlines()[1:])
    ids = [record["id"] for record in records]
    expected = {path.relative_to(photos).as_posix() for path in photos.rglob("*.jpg")}
    results = {path.relative_to(sink).as_posix() for path in sink.rglob("*.png")} - {f"{FOLDER}/report.png"}
    recorded = {record["output"] for record in records if record["error"] is None}
    return {
        "photos": len(expected),
        "missing": len(expected - set(ids)),
        "twice": len(ids) - len(set(ids)),
        "results": len(results),
        "results_without_record": len(results - recorded),
        "records_without_result": len(recorded - results),
        "errors": sum(record["error"] is not None for record in records),
        "partial_files": sum(1 for _ in sink.rglob("*.partial")),
    }


def hashes(sink: Path) -> dict[str, str]:
    return {
        path.relative_to(sink).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sink.rglob("*.png")
        if path.parent.name != FOLDER
    }


def compare(sink: Path, reference: Path) -> dict:
    own, other = hashes(sink), hashes(reference)
    same = sum(own.get(name) == value for name, value in other.items())
    return {"same": same, "different": len(own.keys() | other.keys()) - same}


def write_memory(sink: Path, samples: list[dict]) -> None:
    """The resident size of driver and workers over time, as JSON and picture."""
    from matplotlib.figure import Figure

    write_whole(json.dumps(samples).encode(), sink.with_name(f"{sink.name}-memory.json"))
    figure = Figure((9, 4), layout="constrained")
    axes = figure.subplots()
    minutes = [sample["seconds"] / 60 for sample in samples]
    axes.plot(minutes, [sample["driver"] / 2**20 for sample in samples], color="black", label="driver")
    for pid in dict.fromkeys(pid for sample in samples for pid in sample["workers"]):
        course = [(minute, sample["workers"].get(pid)) for minute, sample in zip(minutes, samples, strict=True)]
        course = [(minute, size / 2**20) for minute, size in course if size]
        axes.plot(*zip(*course, strict=True), linewidth=1)
    axes.set(xlabel="minutes", ylabel="resident MiB", title="driver (black) and each worker process")
    axes.set_ylim(bottom=0)
    figure.savefig(sink.with_name(f"{sink.name}-memory.png"), dpi=90)


# --- Throughput beside `birefnet cutout` ---


def throughput(arguments: argparse.Namespace) -> dict:
    """`birefnet cutout`, `birefnet batch` and `--ray local` on the same photos: seconds of the work and of all."""
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for path in sorted(arguments.photos.rglob("*.jpg"))[: arguments.number]:
            os.symlink(path.resolve(), photos / path.name)
        cores = str(os.cpu_count())
        variants = {
            "cutout": ("cutout", photos, "-o", f"{folder}/cutout", "--json"),
            "batch": ("batch", photos, f"{folder}/batch", "--json"),
            "ray": ("batch", photos, f"{folder}/ray", "--json", "--ray", "local", "--cpus-per-worker", cores),
        }
        results = {}
        for name, command in variants.items():
            results[name] = time_command(name, [*map(str, command), "--resolution", arguments.resolution])
        for name in ("batch", "ray"):
            results[name]["of_cutout"] = round(results[name]["photos_per_second"] / cutout_rate(results), 4)
            results[name]["same_bytes"] = compare(Path(folder, name), Path(folder, "cutout"))
    return results


def cutout_rate(results: dict) -> float:
    return results["cutout"]["photos_per_second"]


def time_command(name: str, command: list[str]) -> dict:
    """Runs a command; its rate is that between the first finished photo or block and the end for `cutout`, and what
    the report says for `batch`: both without loading torch and the model."""
    start = time.time()
    process = subprocess.Popen([sys.executable, "-m", "birefnet", *command], stdout=subprocess.PIPE, text=True)
    times, last = [], ""
    for line in process.stdout:
        times.append(time.time())
        last = line
    process.wait()
    seconds = time.time() - start
    if name == "cutout":
        return {"seconds": round(seconds, 2), "photos_per_second": (len(times) - 1) / (times[-1] - times[0])}
    return {"seconds": round(seconds, 2), "photos_per_second": json.loads(last)["photos_per_second"]}


# --- A simulation of many workers ---


class StubRemover:
    """Stands for the pipeline. Its network sleeps as long as a GPU would compute, and needs no core."""

    def __init__(self, seconds_per_photo: float):
        import torch

        from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor

        self.seconds = seconds_per_photo
        self.device = torch.device("meta")  # one network at a time, as on a GPU
        self.image_processor = BiRefNetImageProcessor(size={"height": 64, "width": 64})

    def preprocess(self, photo):
        return {"photo": photo}

    def forward(self, items):
        time.sleep(self.seconds * len(items))
        return items

    def postprocess(self, item, **options):
        return item["photo"].convert("RGBA")


class StubWorker:
    """`RayWorker` with the stub."""

    def __init__(self, task, digest, stored):
        from birefnet.batch.worker import BlockWorker

        self.worker = BlockWorker(task, StubRemover(task.remover["seconds_per_photo"]))

    def __call__(self, batch):
        from birefnet.batch.sources import Block

        block = Block(batch["name"][0], int(batch["photos"][0]), batch["packed"][0])
        return {"summary": [json.dumps(self.worker(block))]}


def simulate(arguments: argparse.Namespace) -> dict:
    """Photos per second of 1 to 16 actors, with all of them started before the first block."""
    import ray
    import ray.data

    from birefnet.batch.report import Progress
    from birefnet.batch.runners import Cluster, run_blocks_on_ray
    from birefnet.batch.worker import Task

    rows = []
    # More cores than there are: the stub's workers sleep.
    ray.init(num_cpus=max(arguments.actors), include_dashboard=False, log_to_driver=False, logging_level="warning")
    ray.data.DataContext.get_current().wait_for_min_actors_s = 600
    with tempfile.TemporaryDirectory() as folder:
        photo = Path(folder, "photo.jpg")
        Image.new("RGB", (64, 64), "red").save(photo)
        for actors in arguments.actors:
            sink = Path(folder, f"sink{actors}")
            task = Task(str(sink), "files", {}, "png", {}, remover={"seconds_per_photo": arguments.seconds_per_photo})
            blocks = make_blocks(photo, actors * arguments.blocks_per_actor, arguments.block_size)
            cluster = Cluster("local", actors, 1)
            progress, summaries = Progress(0), []
            for summary in run_blocks_on_ray(blocks, task, Path(folder), "", cluster, StubWorker):
                progress.add(summary)
                summaries.append(summary)
            seconds = max(s["ended"] for s in summaries) - min(s["started"] for s in summaries)
            rows.append({"actors": actors, "photos": progress.photos, "seconds": seconds})
            rows[-1]["photos_per_second"] = progress.photos / seconds
    for row in rows:
        row["efficiency"] = row["photos_per_second"] / row["actors"] * arguments.seconds_per_photo
    return {"seconds_per_photo": arguments.seconds_per_photo, "rows": rows}


def make_blocks(photo: Path, count: int, size: int) -> list:
    from birefnet.batch.sources import Block, Entry

    return [
        Block.of(f"block{number:04d}", [Entry(f"{number}/{i}.jpg", str(photo), "") for i in range(size)])
        for number in range(count)
    ]


STEPS = {
    "draw": draw,
    "undisturbed": run_batch,
    "disturbed": run_batch,
    "throughput": throughput,
    "simulate": simulate,
}


if __name__ == "__main__":
    chosen = parse_arguments()
    print(json.dumps(STEPS[chosen.step](chosen), indent=2))
