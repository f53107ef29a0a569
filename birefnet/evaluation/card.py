"""Writes results of `birefnet evaluate` into a model card: the `model-index` and the tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils.sha import sha_fileobj

from birefnet.evaluation.metrics import LOWER_IS_BETTER, MEASURES
from birefnet.evaluation.report import DIGITS, format_value
from birefnet.photos.writing import write_whole


MAIN_MEASURES = ("S", "maxF", "wF", "meanE", "MAE", "IoU", "meanBIoU")
"""The measures of the `model-index` and of the short table: one of each kind, so that a card stays readable."""
TASK = "image-segmentation"


def update_cards(paths: list[Path], result_paths: list[Path]):
    """Writes result files into Markdown files.

    Between the markers of `TABLES`, a file gets tables with all results. A file named README.md is a model card: its
    whole `model-index` is replaced by the results of models. Baselines appear in the tables only.

    Args:
        paths: The Markdown files.
        result_paths: Files that `birefnet evaluate --json` wrote.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A result file is invalid, all results are baselines, or a result belongs to other weights than the
            ones in the folder of a Markdown file.
    """
    results = [read_result(path) for path in result_paths]
    model_results = [result for result in results if not result["model"]["is_baseline"]]
    if not model_results:
        raise ValueError("All result files are baselines; a model card needs the result of a model.")
    for path in paths:
        check_weights(path.parent, model_results)
    texts = [
        card_with_results(path, results) if path.name == "README.md" else with_tables(path.read_text("utf-8"), results)
        for path in paths
    ]
    for path, text in zip(paths, texts, strict=True):
        write_whole(text.encode(), path)


def card_with_results(path: Path, results: list[dict]) -> str:
    """Returns a model card's text with a new `model-index` and new tables."""
    model_results = [result for result in results if not result["model"]["is_baseline"]]
    card = ModelCard.load(path)
    card.data.model_name = card.data.model_name or model_results[0]["model"]["name"]
    card.data.eval_results = [entry for result in model_results for entry in evaluation_results(result)]
    card.text = with_tables(card.text, results)
    return str(card)


def read_result(path: Path) -> dict:
    """Reads a result file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: `birefnet evaluate --json` did not write the file.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if {"model", "data", "settings", "measures"} <= result.keys():
            return result
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        pass
    raise ValueError(f"{path} is not a result file; `birefnet evaluate --json FILE` writes result files.")


def weights_hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each weights file in a model's folder, by file name."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    hashes = {}
    for path in files:
        with open(path, "rb") as file:
            hashes[path.name] = sha_fileobj(file).hex()
    return hashes


def check_weights(folder: Path, results: list[dict]):
    """Raises a ValueError if the folder holds weights and a result was measured with different ones."""
    present = weights_hashes(folder)
    if not present:
        return
    for result in results:
        measured = result["model"]["weights_sha256"]
        if measured != present:
            raise ValueError(
                f"The result for {result['data']['name']!r} was measured with other weights than those beside the "
                f"card (SHA-256 {measured} instead of {present}). Run `birefnet evaluate` again."
            )


def evaluation_results(result: dict) -> list[EvalResult]:
    """Returns the `model-index` entries of one result. Undefined measures are left out."""
    data, settings = result["data"], result["settings"]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=re.sub(r"[^a-z0-9/]+", "-", data["name"].lower()).strip("-"),
            dataset_name=data["name"],
            # Distinguishes results at several resolutions.
            dataset_config=f"{data['pictures']} pictures at {settings['resolution']}, {settings['dtype']}",
            metric_type=re.sub(r"[^a-z0-9]+", "_", MEASURES[name].split(" / ")[0].lower()).strip("_"),
            metric_name=MEASURES[name],
            metric_value=round(result["measures"][name], DIGITS),
        )
        for name in MAIN_MEASURES
        if result["measures"][name] is not None
    ]


def with_tables(text: str, results: list[dict]) -> str:
    """Returns the text with new tables between the markers of `TABLES`. Text without markers stays unchanged."""
    for name, make_table in TABLES.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        new = f"{begin}\n{make_table(results)}\n{end}"
        text = pattern.sub(lambda _, new=new: new, text)
    return text


def complete_table(results: list[dict]) -> str:
    """Returns a Markdown table with one row per measure and one column per result."""
    lines = [["measure", *map(result_title, results)], ["---", *("---:" for _ in results)]]
    for name in MEASURES:
        lines.append([measure_title(name), *(format_value(result["measures"][name]) for result in results)])
    return markdown(lines)


def short_table(results: list[dict]) -> str:
    """Returns a Markdown table with one row per result and one column per measure of `MAIN_MEASURES`."""
    lines = [["", *map(measure_title, MAIN_MEASURES)], ["---", *("---:" for _ in MAIN_MEASURES)]]
    for result in results:
        lines.append([result_title(result), *(format_value(result["measures"][name]) for name in MAIN_MEASURES)])
    return markdown(lines)


def result_title(result: dict) -> str:
    """Returns what was measured: model, data and, for models, the input size."""
    parts = [result["model"]["name"], result["data"]["name"]]
    return ", ".join(parts if result["model"]["is_baseline"] else [*parts, result["settings"]["resolution"]])


def measure_title(name: str) -> str:
    """Returns a measure's title with an arrow that shows which direction is better."""
    return f"{MEASURES[name]} {'↓' if name in LOWER_IS_BETTER else '↑'}"


def markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {"table of birefnet evaluate": complete_table, "main measures of birefnet evaluate": short_table}
"""What makes each table, by the name in its markers `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""
