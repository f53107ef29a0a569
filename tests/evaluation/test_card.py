"""The measured part of a model card comes from result files, and only from those of the weights beside it."""

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
        write_result(tmp_path, "tiny", MAE=0.04712345, mBA=None),
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
    boundary = [entry for entry in loaded.data.eval_results if entry.metric_type == "mean_boundary_accuracy"]
    assert [entry.metric_value for entry in boundary] == [0.5]  # undefined in the first
    text = card.read_text()
    assert "| mean absolute error ↓ | 0.0471 | 0.0600 | 0.8586 |" in text and "| old |" not in text
    assert "Before." in text and "After." in text
    assert command_line.main(arguments) == 0
    assert card.read_text() == text


def test_a_card_without_the_marks_keeps_its_text(card, tmp_path):
    card.write_text("# Without metadata\n")
    model_card.update_card(card, [write_result(tmp_path, "tiny")])
    assert card.read_text().endswith("---\n# Without metadata\n")
    assert ModelCard.load(card).data.eval_results


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
    assert "other.json is no result file" in capsys.readouterr().err
    assert card.read_text() == CARD


def test_baselines_alone_are_refused(card, tmp_path):
    with pytest.raises(ValueError, match="None of the result files is one of a model"):
        model_card.update_card(card, [write_result(tmp_path, "white", is_baseline=True)])
