"""The measured part of a model card: its `model-index` and its table, written from result files of `birefnet
evaluate`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils.sha import sha_fileobj

from birefnet.evaluation.metrics import LOWER_IS_BETTER, MEASURES
from birefnet.evaluation.report import DIGITS, format_value
from birefnet.photos.writing import write_whole


TABLE_BEGIN, TABLE_END = "<!-- begin: table of birefnet evaluate -->", "<!-- end: table of birefnet evaluate -->"
TASK = "image-segmentation"


def update_card(card_path: Path, result_paths: list[Path]):
    """Writes result files into a model card.

    The whole `model-index` is replaced by the results of models; results of baselines go into the table alone. Where
    the card holds the lines `TABLE_BEGIN` and `TABLE_END`, what is between them becomes a table of all results.

    Args:
        card_path: The card, a README.md.
        result_paths: Files that `birefnet evaluate --json` wrote.

    Raises:
        FileNotFoundError: The card or a result file does not exist.
        ValueError: A file is no result file, no result is one of a model, or a result is one of other weights than
            those that lie beside the card.
    """
    results = [read_result(path) for path in result_paths]
    of_models = [result for result in results if not result["model"]["is_baseline"]]
    if not of_models:
        raise ValueError("None of the result files is one of a model; a model card needs at least one.")
    check_weights(card_path.parent, of_models)
    card = ModelCard.load(card_path)
    card.data.model_name = card.data.model_name or of_models[0]["model"]["name"]
    card.data.eval_results = [evaluation for result in of_models for evaluation in evaluation_results(result)]
    card.text = with_table(card.text, results)
    write_whole(str(card).encode(), card_path)


def read_result(path: Path) -> dict:
    """Reads a result file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is no result file.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if {"model", "data", "settings", "measures"} <= result.keys():
            return result
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError):
        pass
    raise ValueError(f"{path} is no result file; `birefnet evaluate --json FILE` writes one.")


def weights_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of weights in a model's folder, by the file's name."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    hashes = {}
    for path in files:
        with open(path, "rb") as file:
            hashes[path.name] = sha_fileobj(file).hex()
    return hashes


def check_weights(folder: Path, results: list[dict]):
    """Raises a ValueError if the folder holds weights and a result is one of others."""
    present = weights_hashes(folder)
    if not present:
        return
    for result in results:
        measured = result["model"]["weights_sha256"]
        if measured != present:
            raise ValueError(
                f"The result for {result['data']['name']!r} was measured with other weights than those beside the "
                f"card ({measured} instead of {present}). Run `birefnet evaluate` again."
            )


def evaluation_results(result: dict) -> list[EvalResult]:
    """The entries of one result for the `model-index`, without measures that are undefined."""
    data, settings = result["data"], result["settings"]
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=re.sub(r"[^a-z0-9/]+", "-", data["name"].lower()).strip("-"),
            dataset_name=data["name"],
            # Tells results at several resolutions apart.
            dataset_config=f"{data['pictures']} pictures at {settings['resolution']}, {settings['dtype']}",
            metric_type=re.sub(r"[^a-z0-9]+", "_", title.split(" / ")[0].lower()).strip("_"),
            metric_name=title,
            metric_value=round(result["measures"][name], DIGITS),
        )
        for name, title in MEASURES.items()
        if result["measures"][name] is not None
    ]


def with_table(text: str, results: list[dict]) -> str:
    """The card's text with the table of the results between its marks; unchanged where there are none."""
    pattern = re.compile(f"{re.escape(TABLE_BEGIN)}.*?{re.escape(TABLE_END)}", re.DOTALL)
    return pattern.sub(lambda _: f"{TABLE_BEGIN}\n{table(results)}\n{TABLE_END}", text)


def table(results: list[dict]) -> str:
    """A Markdown table, a row for each measure, a column for each result."""
    heads = [
        " ".join([result["model"]["name"], f"({result['data']['name']}, {result['settings']['resolution']})"])
        for result in results
    ]
    lines = [["measure", *heads], ["---", *("---:" for _ in heads)]]
    for name, title in MEASURES.items():
        arrow = "↓" if name in LOWER_IS_BETTER else "↑"
        lines.append([f"{title} {arrow}", *(format_value(result["measures"][name]) for result in results)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
