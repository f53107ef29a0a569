"""Fine-tunes one trained model with each option that saves memory or time, and with two processes.

    python benchmarks/fine_tuning_options.py start sets/people --resolution 96 --output runs

`start` is a trained model's folder, and the set is a folder with `train/` and `test/`, as for fine_tuning.py. Each way
is one `birefnet train --model start --data SET/train …` with default settings otherwise. The table is printed as
Markdown. docs/fine-tuning.md shows it. Results are appended to `options.jsonl` as they come, and a later call skips
the ways in it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from fine_tuning import measure


WAYS = {
    "defaults": [],
    "float32": ["--no-bf16"],
    "low-rank adapters": ["--lora-rank", "8"],
    "gradient checkpointing": ["--gradient-checkpointing"],
    "frozen backbone": ["--freeze-backbone", "true"],
    "batches of one photo": ["--batch-size", "1", "--gradient-accumulation-steps", "4"],
    "two processes": ["--batch-size", "2"],
}
# --multi_gpu starts the processes even without a GPU.
TWO_PROCESSES = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the trained model")
    parser.add_argument("set", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = arguments.output / "options.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    if not rows:
        mae, iou = measure(arguments.model, arguments.set / "test")
        rows.append({"way": "before", "mae": mae, "iou": iou})
        record.write_text(json.dumps(rows[0]) + "\n")
    for way in arguments.ways:
        if all(row["way"] != way for row in rows):
            rows.append(run(way, arguments))
            with record.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))


def run(way: str, arguments: argparse.Namespace) -> dict:
    """Fine-tunes in one way. The course is the validation IoU before and after each epoch."""
    output = arguments.output / way.replace(" ", "_")
    command = [sys.executable, *(TWO_PROCESSES if way == "two processes" else []), "-m", "birefnet", "train", "--cpu"]
    command += ["--model", arguments.model, "--data", arguments.set / "train", "--output", output]
    command += ["--resolution", arguments.resolution, "--seed", arguments.seed, *WAYS[way]]
    start = time.time()
    subprocess.run(list(map(str, command)), check=True)
    seconds = round(time.time() - start)
    state = json.loads((output / "checkpoints" / "trainer_state.json").read_text())
    course = [round(entry["eval_iou"], 3) for entry in state["log_history"] if "eval_iou" in entry]
    mae, iou = measure(output, arguments.set / "test")
    return {"way": way, "course": course, "mae": mae, "iou": iou, "seconds": seconds}


def table(rows: list[dict]) -> str:
    """A Markdown table with one line for each way. The first row holds the values before the training."""
    before, *runs = rows
    lines = [
        "| options | validation IoU before and after each epoch | test IoU | test MAE |",
        "| --- | --- | ---: | ---: |",
        f"| before | | {before['iou']:.3f} | {before['mae']:.4f} |",
    ]
    for row in runs:
        options = " ".join(WAYS[row["way"]])
        name = f"{row['way']} (`{options}`)" if options else row["way"]
        course = ", ".join(f"{iou:.3f}" for iou in row["course"])
        lines.append(f"| {name} | {course} | {row['iou']:.3f} | {row['mae']:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
