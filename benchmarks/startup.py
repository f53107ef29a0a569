"""Seconds from the start of `birefnet cutout PHOTO` to the network's first call, in fresh processes.

python benchmarks/startup.py
python benchmarks/startup.py --repeats 5 -- --model FOLDER --dtype bfloat16
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from end_to_end import draw_photos


# Runs the command as its console script does. The first call of the network ends the process.
PROBE = """
import os, sys, time
import birefnet.cutout.command as cutout
from birefnet.command_line import main

load_remover = cutout.load_remover

def load_and_watch(*arguments, **options):
    remover = load_remover(*arguments, **options)
    print("loaded", time.time(), flush=True)
    def first_call(*arguments, **options):
        print("network", time.time(), flush=True)
        os._exit(0)
    remover.forward = first_call
    return remover

cutout.load_remover = load_and_watch
sys.exit(main(sys.argv[1:]))
"""


def measure(photo: Path, options: list[str]) -> dict[str, float]:
    """Seconds from process start until the model is loaded, and until the network is called."""
    command = [sys.executable, "-c", PROBE, "cutout", str(photo), "-o", str(photo.with_suffix(".png")), *options]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    moments = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("loaded ", "network ")))
    if "network" not in moments:
        raise RuntimeError(f"the command never called the network: {done.stderr.strip()}")
    return {moment: float(at) - start for moment, at in moments.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs, after one untimed run that fills the disk cache"
    )
    parser.add_argument("options", nargs="*", help="further options of `birefnet cutout`, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        [photo] = draw_photos(Path(folder), 1, 4, 4)
        measure(photo, arguments.options)
        runs = [measure(photo, arguments.options) for _ in range(arguments.repeats)]
    for moment, meaning in (("loaded", "until the model is loaded"), ("network", "until the network is called")):
        print(f"{meaning}: {statistics.median(run[moment] for run in runs):.2f} s (median of {len(runs)})")


if __name__ == "__main__":
    main()
