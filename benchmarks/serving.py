"""
The server under load, on the loopback: half, all and three times of what it can do, with photos of 1 to 12 megapixels.

Every answer is compared with the photo that was sent: it has that photo's size, and its opaque pixels have that
photo's colours. Photos differ in size and in colours, so an answer that belongs to another request is found out.

```bash
python benchmarks/serving.py photos/ --seconds 60            # one JSON object a line
python benchmarks/serving.py photos/ --seconds 20 --stages 0.5,1,3
```

The capacity is that of `birefnet cutout` on the same photos, measured in the same run before the server starts.
"""

import argparse
import asyncio
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image


MEGAPIXELS = (1, 2, 3, 4, 6, 8, 12)
PORT = 7871
MOST_CHECKED = 200  # answers of a stage
SECONDS_BETWEEN_SAMPLES = 5  # of the server's memory


def make_photos(source: str, folder: Path, count: int) -> dict[str, bytes]:
    """`count` JPEG photos of 1 to 12 megapixels out of a folder's, each of a size of its own."""
    found = sorted(path for path in Path(source).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    photos = {}
    for number in range(count):
        with Image.open(found[number % len(found)]) as photo:
            pixels = MEGAPIXELS[number % len(MEGAPIXELS)] * 1e6
            factor = (pixels / (photo.width * photo.height)) ** 0.5
            size = (round(photo.width * factor) - number, round(photo.height * factor))
            encoded = io.BytesIO()
            photo.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(encoded, "jpeg", quality=90)
        name = f"{number}.jpg"
        photos[name] = encoded.getvalue()
        (folder / name).write_bytes(encoded.getvalue())
    return photos


def is_of(answer: bytes, photo: bytes) -> bool:
    """Whether a cut-out is that photo's."""
    with Image.open(io.BytesIO(answer)) as cutout, Image.open(io.BytesIO(photo)) as original:
        if cutout.size != original.size or cutout.mode != "RGBA":
            return False
        step = 7  # every seventh row and column is enough
        pixels = np.asarray(cutout)[::step, ::step].astype(int)
        expected = np.asarray(original.convert("RGB"))[::step, ::step].astype(int)
    opaque = pixels[..., 3] == 255
    return not opaque.any() or np.abs(pixels[..., :3] - expected)[opaque].mean() < 1


def throughput_of_cutout(folder: Path, count: int) -> float:
    """Photos per second of `birefnet cutout`, without its start: the difference of a long and a short run."""

    def seconds(names: list[str]) -> float:
        with tempfile.TemporaryDirectory() as out:
            start = time.perf_counter()
            command = [sys.executable, "-m", "birefnet", "cutout", *names, "-o", out]
            subprocess.run(command, check=True, capture_output=True)
            return time.perf_counter() - start

    names = [str(folder / f"{number}.jpg") for number in range(count)]
    few = names[: len(MEGAPIXELS)]
    return (len(names) - len(few)) / (seconds(names) - seconds(few))


class Load:
    """Requests at a steady rate for some seconds, whatever becomes of the ones before."""

    def __init__(self, client: httpx.AsyncClient, photos: dict[str, bytes], process: psutil.Process):
        self.client, self.photos, self.process = client, photos, process
        self.seconds, self.statuses, self.kept, self.memory = [], {}, [], []

    async def ask(self, name: str) -> None:
        start = time.perf_counter()
        try:
            files = {"image_file": (name, self.photos[name])}
            answer = await self.client.post("/v1.0/removebg", files=files, data={"size": "auto"})
            status = str(answer.status_code)
        except httpx.HTTPError as error:
            status = type(error).__name__
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == "200":
            self.seconds.append(time.perf_counter() - start)
            if len(self.kept) < MOST_CHECKED:  # checked after the stage, since it takes the processor's time
                self.kept.append((name, answer.content))

    async def watch_memory(self) -> None:
        """Notes the server's resident size every few seconds."""
        while True:
            self.memory.append(self.process.memory_info().rss)
            await asyncio.sleep(SECONDS_BETWEEN_SAMPLES)

    async def run(self, rate: float, duration: float) -> dict:
        watching = asyncio.create_task(self.watch_memory())
        order, tasks, start, busy = random.Random(0), [], time.perf_counter(), time.process_time()
        while (now := time.perf_counter() - start) < duration:
            tasks.append(asyncio.create_task(self.ask(order.choice(list(self.photos)))))
            await asyncio.sleep(max(0, len(tasks) / rate - now))
        await asyncio.gather(*tasks)
        watching.cancel()
        took, busy = time.perf_counter() - start, time.process_time() - busy
        wrong = sum(not is_of(answer, self.photos[name]) for name, answer in self.kept)
        latencies = np.percentile(self.seconds or [float("nan")], [50, 95])
        return {
            "offered_per_second": round(rate, 2),
            "answered_per_second": round(len(self.seconds) / took, 2),
            "statuses": self.statuses,
            "cores_of_client": round(busy / took, 2),  # which the server lacks, as both are on one machine
            "checked": len(self.kept),
            "wrong": wrong,
            "seconds_median": round(latencies[0], 2),
            "seconds_95": round(latencies[1], 2),
            "rss_mb": [round(size / 1e6) for size in self.memory],
        }


async def measure(photos: dict[str, bytes], capacity: float, stages: list[float], duration: float, options: list[str]):
    command = [sys.executable, "-m", "birefnet", "serve", "--port", str(PORT), *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    limits = httpx.Limits(max_connections=200)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{PORT}", timeout=120, limits=limits) as client:
            await wait_until_ready(client)
            await Load(client, photos, psutil.Process(process.pid)).run(capacity / 2, 5)  # warms up
            for share in stages:
                result = await Load(client, photos, psutil.Process(process.pid)).run(share * capacity, duration)
                ratio = result["answered_per_second"] / capacity
                print(json.dumps({"load": share, **result, "of_cutout": round(ratio, 3)}), flush=True)
    finally:
        process.terminate()
        process.wait()


async def wait_until_ready(client: httpx.AsyncClient) -> None:
    for _ in range(600):
        try:
            if (await client.get("/ready")).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError("the server is not ready")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="folder of photos; copies of 1 to 12 megapixels are made of them")
    parser.add_argument("--seconds", type=float, default=60, help="of each stage (default: 60)")
    parser.add_argument("--stages", default="0.5,1,3", help="shares of the capacity (default: 0.5,1,3)")
    parser.add_argument("--count", type=int, default=28, help="different photos (default: 28)")
    parser.add_argument("--capacity", type=float, help="photos per second; default: measured with birefnet cutout")
    parser.add_argument("options", nargs="*", help="further options of birefnet serve, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos = make_photos(arguments.photos, Path(folder), arguments.count)
        capacity = arguments.capacity or throughput_of_cutout(Path(folder), arguments.count)
        print(json.dumps({"cutout_per_second": round(capacity, 3)}), flush=True)
        stages = [float(share) for share in arguments.stages.split(",")]
        asyncio.run(measure(photos, capacity, stages, arguments.seconds, arguments.options))


if __name__ == "__main__":
    main()
