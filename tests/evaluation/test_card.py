"""Results in model cards and documents. They come from result files that belong to the card's weights."""

import hashlib
import json

import pytest
from huggingface_hub import ModelCard


pytest.importorskip("py_sod_metrics", reason="evaluation needs the extra `evaluate`")

from birefnet import command_line
from birefnet.evaluation import card as model_card
from birefnet.evaluation import metrics


CARD = """---
license: mit
pipeline_tag: image-segmentation
tags:
- matting
---
# BiRefNet

Before.

<!-- begin: table of birefnet evaluate -->
| old |
<!-- end: table of birefnet evaluate -->

After.
"""
DOCUMENT = """# Weights

<!-- begin: table of birefnet evaluate -->
<!-- end: table of birefnet evaluate -->

<!-- begin: main measures of birefnet evaluate -->
<!-- end: main measures of birefnet evaluate -->
"""


def write_result(
    folder, name, data="DUTS-TE (299 photos)", resolution="320×320", is_baseline=False, weights=None, **measures
):
    values = dict.fromkeys(metrics.MEASURES, 0.5) | measures
    result = {
        "model": {"name": name, "is_baseline": is_baseline, "weights_sha256": weights or {}},
        "data": {"name": data, "pictures": 299, "resized_predictions": 0, "left_out": []},
        "settings": {"resolution": resolution, "dtype": "float32"},
        "measures": values,
    }
    path = folder / f"{name}-{resolution}.json"
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(CARD)
    return path


def test_the_index_and_the_table_come_from_the_result_files(card, tmp_path):
    results = [
        write_result(tmp_path, "tiny", MAE=0.04712345, wF=None),
        write_result(tmp_path, "tiny", resolution="1024×1024", MAE=0.06),
        write_result(tmp_path, "all white", is_baseline=True, MAE=0.8586),
    ]
    arguments = ["evaluate", "--update-card", str(card), "--results", *map(str, results)]
    assert command_line.main(arguments) == 0
    loaded = ModelCard.load(card)
    assert loaded.data.model_name == "tiny" and loaded.data.license == "mit" and loaded.data.tags == ["matting"]
    errors = [entry for entry in loaded.data.eval_results if entry.metric_type == "mean_absolute_error"]
    assert [entry.metric_value for entry in errors] == [0.0471, 0.06]  # none of the baseline
    assert {entry.dataset_name for entry in errors} == {"DUTS-TE (299 photos)"}
    assert errors[0].dataset_config == "299 pictures at 320×320, float32"
    weighted = [entry for entry in loaded.data.eval_results if entry.metric_type == "weighted_f_measure"]
    assert [entry.metric_value for entry in weighted] == [0.5]  # undefined in the first
    assert {entry.metric_name for entry in loaded.data.eval_results} == {
        metrics.MEASURES[name] for name in model_card.MAIN_MEASURES
    }
    text = card.read_text()
    assert "| mean absolute error ↓ | 0.0471 | 0.0600 | 0.8586 |" in text and "| old |" not in text
    assert "Before." in text and "After." in text
    assert command_line.main(arguments) == 0
    assert card.read_text() == text


def test_a_card_without_the_marks_keeps_its_text(card, tmp_path):
    card.write_text("# Without metadata\n")
    model_card.update_cards([card], [write_result(tmp_path, "tiny")])
    assert card.read_text().endswith("---\n# Without metadata\n")
    assert ModelCard.load(card).data.eval_results


def test_other_documents_get_the_tables_only(card, tmp_path):
    document = tmp_path / "docs" / "weights.md"
    document.parent.mkdir()
    document.write_text(DOCUMENT)
    result = write_result(tmp_path, "tiny", MAE=0.04712345, SAD=3.5)
    arguments = ["evaluate", "--update-card", str(card), str(document), "--results", str(result)]
    assert command_line.main(arguments) == 0
    assert "| mean absolute error ↓ | 0.0471 |" in card.read_text()
    complete, short = document.read_text().split("<!-- begin: main measures")
    assert complete.startswith("# Weights\n") and complete.count("\n| ") == 2 + len(metrics.MEASURES)
    assert "| sum of absolute differences / 1000 (matting) ↓ | 3.5000 |" in complete
    head, _, row = (line.split(" | ") for line in short.splitlines() if line.startswith("|"))
    assert head[model_card.MAIN_MEASURES.index("MAE") + 1] == "mean absolute error ↓"
    assert (
        row[0] == "| tiny, DUTS-TE (299 photos), 320×320"
        and row[model_card.MAIN_MEASURES.index("MAE") + 1] == "0.0471"
    )


def test_nothing_is_written_if_one_document_is_missing(card, tmp_path, capsys):
    arguments = ["evaluate", "--update-card", str(card), str(tmp_path / "missing.md")]
    assert command_line.main([*arguments, "--results", str(write_result(tmp_path, "tiny"))]) == 1
    assert "missing.md" in capsys.readouterr().err
    assert card.read_text() == CARD


def test_results_of_other_weights_are_refused(card, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    hashes = model_card.weights_hashes(tmp_path)
    assert hashes == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    arguments = ["evaluate", "--update-card", str(card), "--results"]
    assert (
        command_line.main([*arguments, str(write_result(tmp_path, "tiny", weights={"model.safetensors": "0"}))]) == 1
    )
    assert "other weights" in capsys.readouterr().err
    assert card.read_text() == CARD
    assert command_line.main([*arguments, str(write_result(tmp_path, "tiny", weights=hashes))]) == 0


@pytest.mark.parametrize("content", ["no JSON", "[]", '{"model": {}}'])
def test_what_is_no_result_file_is_refused(card, tmp_path, content, capsys):
    other = tmp_path / "other.json"
    other.write_text(content)
    assert command_line.main(["evaluate", "--update-card", str(card), "--results", str(other)]) == 1
    assert "other.json is not a result file" in capsys.readouterr().err
    assert card.read_text() == CARD


def test_baselines_alone_are_refused(card, tmp_path):
    with pytest.raises(ValueError, match="All result files are baselines"):
        model_card.update_cards([card], [write_result(tmp_path, "white", is_baseline=True)])
