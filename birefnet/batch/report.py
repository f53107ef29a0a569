"""How a batch is going: photos per second, shares of the stages, errors, remaining time and cost."""

import json
import sys
import time
from collections import Counter

from birefnet.batch.manifest import FOLDER
from birefnet.batch.storage import Storage
from birefnet.batch.worker import STAGES


SECONDS_BETWEEN_LINES = 30  # where standard error is no terminal


class Progress:
    """
    Counts what the summaries of blocks tell.

    Args:
        total: photos to be done in this run.
        price: of one machine per hour, or None.
    """

    def __init__(self, total: int, price: float | None = None):
        self.total, self.price = total, price
        self.photos = self.failed = self.bytes_read = self.bytes_written = 0
        self.seconds: Counter = Counter()
        self.kinds: Counter = Counter()
        self.machines: set[str] = set()
        self.memory: dict[str, int] = {}
        self.course: list[tuple[float, int]] = []  # (seconds since the start, photos done)
        self.start = time.time()
        self.first_block: float | None = None
        self.last_block = 0.0
        self.last_line = 0.0

    def add(self, summary: dict) -> None:
        self.photos += summary["photos"]
        self.failed += len(summary["errors"])
        self.bytes_read += summary["bytes_read"]
        self.bytes_written += summary["bytes_written"]
        self.seconds.update(summary["seconds"])
        self.kinds.update(error["kind"] for error in summary["errors"])
        self.machines.add(summary["worker"].rpartition(":")[0])
        self.memory[summary["worker"]] = max(self.memory.get(summary["worker"], 0), summary["memory"])
        self.first_block = min(self.first_block or summary["started"], summary["started"])
        self.last_block = max(self.last_block, summary["ended"])
        self.course.append((time.time() - self.start, self.photos))

    @property
    def rate(self) -> float:
        """Photos per second from the start of the first block to the end of the last, so without loading the model."""
        if self.first_block is None:
            return 0.0
        return self.photos / max(self.last_block - self.first_block, 1e-9)

    def cost(self, seconds: float) -> float | None:
        return None if self.price is None else round(self.price * max(1, len(self.machines)) * seconds / 3600, 4)

    def line(self) -> str:
        """One line for people."""
        rest = (self.total - self.photos) / self.rate if self.rate else 0.0
        parts = [f"{self.photos} of {self.total} photos", f"{self.rate:.2f} photos/s"]
        if self.photos < self.total:
            parts.append(f"{in_words(rest)} left")
        spent = sum(self.seconds.values())
        if spent:
            parts.append(" ".join(f"{stage} {self.seconds[stage] / spent:.0%}" for stage in STAGES))
        if self.failed:
            parts.append("errors: " + ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items())))
        if self.price is not None:
            elapsed = time.time() - self.start
            parts.append(f"cost {self.cost(elapsed):.2f}, {self.cost(elapsed + rest):.2f} at the end")
        return "; ".join(parts)

    def show(self, end: bool = False) -> None:
        """Prints the line: in place on a terminal, else from time to time."""
        if sys.stderr.isatty():
            print(f"\r\033[K{self.line()}", end="\n" if end else "", file=sys.stderr, flush=True)
        elif end or time.time() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.time()
            print(self.line(), file=sys.stderr, flush=True)

    def as_dict(self) -> dict:
        elapsed = time.time() - self.start
        spent = sum(self.seconds.values()) or 1.0
        return {
            "photos": self.photos,
            "failed": self.failed,
            "errors_by_kind": dict(self.kinds),
            "seconds": round(elapsed, 3),
            "photos_per_second": round(self.rate, 4),
            "stage_seconds": {stage: round(self.seconds[stage], 3) for stage in STAGES},
            "stage_shares": {stage: round(self.seconds[stage] / spent, 4) for stage in STAGES},
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "machines": len(self.machines),
            "peak_memory_of_workers": self.memory,
            "cost": self.cost(elapsed),
        }


def in_words(seconds: float) -> str:
    """A duration for people: "42 s", "7 min", "3.5 h", "2.1 days"."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def write_report(storage: Storage, report: dict, course: list[tuple[float, int]]) -> None:
    """Writes `report.json` and, if matplotlib is installed, `report.png` into the sink."""
    storage.write(f"{FOLDER}/report.json", (json.dumps(report, indent=2) + "\n").encode())
    try:
        picture = draw_report(report, course)
    except ImportError:
        print("birefnet batch: no report.png, since matplotlib is not installed", file=sys.stderr)
        return
    storage.write(f"{FOLDER}/report.png", picture)


def draw_report(report: dict, course: list[tuple[float, int]]) -> bytes:
    """A PNG with photos over time, photos per second, shares of the stages, and errors by kind."""
    import io

    from matplotlib.figure import Figure

    figure = Figure((10, 6), layout="constrained")
    done, speed, stages, errors = figure.subplots(2, 2).flat
    minutes = [seconds / 60 for seconds, _ in course]
    done.step([0, *minutes], [0, *(photos for _, photos in course)], where="post")
    done.set(title=f"{report['photos']} photos, {report['failed']} failed", xlabel="minutes", ylabel="photos done")
    window = max(1, len(course) // 20)
    rates = [
        (later[0] / 60, (later[1] - earlier[1]) / max(later[0] - earlier[0], 1e-9))
        for earlier, later in zip(course, course[window:], strict=False)
    ]
    speed.plot([time for time, _ in rates], [rate for _, rate in rates])
    speed.set(title=f"{report['photos_per_second']:.2f} photos/s on average", xlabel="minutes", ylabel="photos/s")
    speed.set_ylim(bottom=0)
    stages.barh(STAGES, [100 * report["stage_shares"][stage] for stage in STAGES])
    stages.invert_yaxis()
    stages.set(title="where the workers' time goes", xlabel="% of the stages' seconds")
    kinds = sorted(report["errors_by_kind"].items())
    errors.barh([kind for kind, _ in kinds], [count for _, count in kinds])
    errors.set(title="errors by kind" if kinds else "no errors", xlabel="photos")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=100)
    return encoded.getvalue()
