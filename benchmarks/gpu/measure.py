"""Measures everything that needs a GPU, in parts.

    bash benchmarks/gpu/measure.sh                                     # all parts, results in out/measure
    bash benchmarks/gpu/measure.sh --parts kernel --seconds 60
    bash benchmarks/gpu/measure.sh --device cpu --tiny                 # minute cases, to test this script

Each part runs in a process of its own. A part that fails or takes too long does not affect the others, and the rows
that it has measured are kept. `measure.json` and `measure.md` are written after every part, `measure.png` at the end.
"""

import argparse
import json
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from project import make_importable


make_importable()  # here, because spawned processes import this file only

# Functions of parts.py, and the most seconds of each, in order of importance: the last ones are skipped if the time
# ends.
PARTS = {
    "parity": 65,
    "network": 130,
    "kernel": 80,
    "foreground": 20,
    "training": 45,
    "end_to_end_photos": 60,
    "compiled": 120,
}
LEAST_SECONDS = 8  # a part that has less is not started


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all, in this order")
    parser.add_argument("--seconds", type=float, default=345, help="time for all parts (default: 345)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="minute cases, to test this script")
    parser.add_argument("--peer", metavar="CHECKOUT", help="also measure the published code, as in speed.py")
    parser.add_argument("--output", type=Path, default=Path("out/measure"), help="folder of the results")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace):
    start = time.monotonic()
    import parts  # imported before the processes are forked, so that the imports take their time only once

    context = multiprocessing.get_context("fork" if can_fork(arguments.device) else "spawn")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"seconds": arguments.seconds, "environment": None, "parts": {}}
    for name in arguments.parts:
        left = max(0.0, arguments.seconds - (time.monotonic() - start))
        if left < LEAST_SECONDS:
            outcome = f"skipped: {left:.0f} of {arguments.seconds:.0f} s were left"
            part = {"outcome": outcome, "seconds": 0.0, "rows": []}
        else:
            part = run_part(context, getattr(parts, name), arguments, min(PARTS[name], left))
        results["environment"] = results["environment"] or part.pop("environment", None)
        results["parts"][name] = part
        print(f"\n## {name}: {part['outcome']}, {part['seconds']:.0f} s\n{parts.table(part['rows'])}", flush=True)
        write_results(results, arguments.output, parts.table)
    parts.draw(results, arguments.output / "measure.png")
    print(f"\n{time.monotonic() - start:.0f} s; results in {arguments.output}", flush=True)


def can_fork(device: str) -> bool:
    """Whether forked processes can use the device: a library may have started CUDA when it was imported."""
    process = multiprocessing.get_context("fork").Process(target=use, args=(device,))
    process.start()
    process.join(30)
    process.kill()
    return process.exitcode == 0


def use(device: str):
    import torch

    torch.zeros(1, device=device).add_(1).item()


def run_part(context, part: Callable, arguments: argparse.Namespace, seconds: float) -> dict:
    """Run a part in a process of its own, for at most `seconds`. Returns its outcome and the rows that it recorded."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows")
        file.touch()
        process = context.Process(target=run_and_record, args=(part, arguments, file))
        process.start()
        process.join(seconds)
        outcome = "whole" if process.exitcode == 0 else f"failed with code {process.exitcode}"
        if process.is_alive():
            outcome = f"stopped after {seconds:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that compile for it
            process.join()
        # A killed process may leave an unfinished last line.
        lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    recorded = [json.loads(line) for line in lines]
    found = {"outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    for record in recorded:
        if "environment" in record:
            found["environment"] = record["environment"]
        elif "failure" in record:
            found["outcome"] = f"failed: {record['failure']}"
    found["rows"] = [record["row"] for record in recorded if "row" in record]
    return found


def run_and_record(part: Callable, arguments: argparse.Namespace, file: Path):
    """The part's process: writes one line of JSON for each row as soon as it is measured."""
    os.setpgrp()
    with file.open("a") as stream:

        def record(**content):
            stream.write(json.dumps(content) + "\n")
            stream.flush()

        try:
            part(arguments, record)
        except Exception as error:  # any error: the other parts go on
            traceback.print_exc()
            record(failure=f"{type(error).__name__}: {error}".splitlines()[0])


def write_results(results: dict, folder: Path, table: Callable[[list[dict]], str]):
    (folder / "measure.json").write_text(json.dumps(results, indent=1) + "\n")
    about = ", ".join(f"{name} {value}" for name, value in (results["environment"] or {}).items())
    sections = [
        f"## {name}\n\n{part['outcome']}, {part['seconds']:.0f} s\n\n{table(part['rows'])}"
        for name, part in results["parts"].items()
    ]
    (folder / "measure.md").write_text("\n\n".join([f"# Measurements on a GPU\n\n{about}", *sections]) + "\n")


if __name__ == "__main__":
    main(parse_arguments())
