"""Fine-tunes the embedded weights on small sets with default settings, and measures test photos before and after.

    python benchmarks/fine_tuning.py sets/polyps sets/tiles --seeds 1 2 3 --output runs
    python benchmarks/fine_tuning.py --output runs --document docs/fine-tuning.md     # writes table and picture again

Each set is a folder with `train/` and `test/`, both with `im/` (photos) and `gt/` (masks). Each run is one
`birefnet train --data SET/train --output …`. Results are appended to `results.jsonl` as they come, and a later call
skips the runs in it. The table is printed as Markdown. docs/fine-tuning.md names the sets and shows the table.
IoU and MAE are means over the photos of a set. "1 − IoU gone" is the share of 1 − IoU that fine-tuning removed, as a
mean over the seeds, and in the last line as a mean over the sets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from birefnet import repository_folder
from birefnet.data.pairs import decode_pair, read_pairs
from birefnet.inference.loading import load_model


BEGIN, END = (f"<!-- {moment}: table of benchmarks/fine_tuning.py -->" for moment in ("begin", "end"))
PICTURE = "fine-tuning-results.png"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder of the models and results.jsonl")
    parser.add_argument(
        "--document", type=Path, help="Markdown file to write the table into, with a picture beside it"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = arguments.output / "results.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    for seed in arguments.seeds:  # All sets with one seed first: an interrupted benchmark covers every set.
        for folder in arguments.sets:
            if any((row["set"], row["seed"]) == (folder.name, seed) for row in rows):
                continue
            known = next((row for row in rows if row["set"] == folder.name), {})
            before = {key: known[key] for key in ("mae_before", "iou_before") if key in known}
            rows.append(run(folder, seed, arguments.output, before))
            with record.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    if arguments.document:
        draw(rows, arguments.document.parent / PICTURE)
        write_table(rows, arguments.document)


def run(folder: Path, seed: int, output: Path, before: dict[str, float]) -> dict:
    """Fine-tunes with one seed. `before` holds the embedded weights' values on the test photos, if they are known."""
    if not before:
        mae, iou = measure(repository_folder(), folder / "test")
        before = {"mae_before": mae, "iou_before": iou}
    model = output / f"{folder.name}_{seed}"
    command = [sys.executable, "-m", "birefnet", "train", "--data", folder / "train", "--output", model]
    start = time.time()
    subprocess.run([*map(str, command), "--seed", str(seed)], check=True)
    seconds = round(time.time() - start)
    shutil.rmtree(model / "checkpoints")
    mae, iou = measure(model, folder / "test")
    photos = len(read_pairs([folder / "train"]))
    return {"set": folder.name, "seed": seed, "photos": photos, **before, "mae": mae, "iou": iou, "seconds": seconds}


@torch.inference_mode()
def measure(model: str | Path, folder: Path) -> tuple[float, float]:
    """Mean absolute error and mean IoU at 0.5 over the photos of a folder, at the masks' own size, in float32."""
    model, processor = load_model(model)
    model.eval()
    values = []
    for pair in read_pairs([folder]):
        photo, mask = decode_pair(pair)
        outputs = model(**processor(photo, return_tensors="pt"))
        matte = processor.post_process_alpha_matte(outputs, target_sizes=[photo.size[::-1]])[0].numpy()
        truth = np.asarray(mask) / 255
        found, true = matte > 0.5, truth > 0.5
        union = (found | true).sum()
        values.append((np.abs(matte - truth).mean(), (found & true).sum() / union if union else 1.0))
    return tuple(float(round(value, 5)) for value in np.mean(values, axis=0))


def table(rows: list[dict]) -> str:
    """A Markdown table with one line for each set: values of all seeds, and the share of 1 − IoU that is gone."""
    lines = [
        "| set | photos | IoU before | IoU after, by seed | 1 − IoU gone | MAE before | MAE after, by seed |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    means = []
    for name in dict.fromkeys(row["set"] for row in rows):
        runs = sorted((row for row in rows if row["set"] == name), key=lambda row: row["seed"])
        first = runs[0]
        gone = np.mean([share_gone(row) for row in runs])
        means.append(gone)
        ious, maes = (", ".join(f"{row[key]:.{digits}f}" for row in runs) for key, digits in (("iou", 3), ("mae", 4)))
        lines.append(
            f"| {name} | {first['photos']} | {first['iou_before']:.3f} | {ious} | {gone:.0%} | "
            f"{first['mae_before']:.4f} | {maes} |"
        )
    return "\n".join([*lines, f"| mean of the sets | | | | {np.mean(means):.0%} | | |"])


def share_gone(row: dict) -> float:
    """The share of 1 − IoU that fine-tuning removed; negative if the model got worse."""
    return (row["iou"] - row["iou_before"]) / (1 - row["iou_before"])


def write_table(rows: list[dict], path: Path):
    """Replaces what stands between the two markers of a Markdown file by table and picture."""
    head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, marker, tail = rest.partition(END)
    if not marker:
        raise SystemExit(f"{path} lacks the lines {BEGIN} and {END}.")
    picture = f"![Mean IoU on test photos before and after]({PICTURE})"
    path.write_text(f"{head}{BEGIN}\n{table(rows)}\n\n{picture}\n{END}{tail}", encoding="utf-8")


def draw(rows: list[dict], path: Path):
    """A bar chart: IoU on the test photos before fine-tuning, and after it for each seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(1.2 * len(names) + 2, 3), layout="constrained")
    ax = figure.subplots()
    for position, name in enumerate(names):
        runs = [row for row in rows if row["set"] == name]
        mean = np.mean([row["iou"] for row in runs])
        ax.bar(position - 0.2, runs[0]["iou_before"], 0.38, color="#9aa4b2", label="before" if not position else None)
        ax.bar(position + 0.2, mean, 0.38, color="#1f6feb", label="after" if not position else None)
        seeds = [position + 0.2] * len(runs)
        ax.plot(seeds, [row["iou"] for row in runs], "o", color="#0b2a5b", markersize=3)
    photos = {row["set"]: row["photos"] for row in rows}
    ax.set_xticks(range(len(names)), [f"{name}\n{photos[name]} photos" for name in names], fontsize=8)
    ax.set_ylabel("mean IoU on test photos", fontsize=8)
    ax.set_ylim(0, 1)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
