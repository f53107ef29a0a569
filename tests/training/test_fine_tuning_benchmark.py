"""`benchmarks/fine_tuning.py`: its measure and its table."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("timm")

from birefnet.data.pairs import decode_pair, read_pairs
from birefnet.inference.loading import load_model

from ..drawn_photos import write_folder


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "fine_tuning.py"
    specification = importlib.util.spec_from_file_location("fine_tuning", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_measure_is_that_of_the_mattes(benchmark, tiny_model_folder, tmp_path):
    folder = write_folder(tmp_path, "ab", size=(80, 50))
    model, processor = load_model(tiny_model_folder)
    values = []
    for pair in read_pairs([folder]):
        photo, mask = decode_pair(pair)
        with torch.no_grad():
            logits = model.eval()(**processor(photo, return_tensors="pt")).logits
        matte = torch.nn.functional.interpolate(logits.sigmoid(), (50, 80), mode="bilinear")[0, 0].numpy()
        found, true = matte > 0.5, np.asarray(mask) > 127
        values.append((np.abs(matte - np.asarray(mask) / 255).mean(), (found & true).sum() / (found | true).sum()))
    assert benchmark.measure(tiny_model_folder, folder) == pytest.approx(np.mean(values, axis=0), abs=2e-3)


def test_table_and_picture(benchmark, tmp_path):
    rows = [
        {"set": name, "seed": seed, "photos": 20, "mae_before": 0.2, "iou_before": 0.5, "mae": 0.1, "iou": iou}
        for name, seed, iou in (("polyps", 2, 0.8), ("polyps", 1, 0.7), ("tiles", 1, 0.4))
    ]
    _, _, polyps, tiles, mean = benchmark.table(rows).splitlines()
    assert polyps == "| polyps | 20 | 0.500 | 0.700, 0.800 | 50% | 0.2000 | 0.1000, 0.1000 |"
    assert "| -20% |" in tiles  # A set that got worse is shown as such.
    assert "| 15% |" in mean  # of 50 % and -20 %
    benchmark.draw(rows, tmp_path / "chart.png")
    assert Image.open(tmp_path / "chart.png").width > 300


def test_table_replaces_the_one_in_a_document(benchmark, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    row = {"set": "polyps", "seed": 1, "photos": 20, "mae_before": 0.2, "iou_before": 0.5, "mae": 0.1, "iou": 0.8}
    benchmark.write_table([row], path)
    text = path.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "| polyps |" in text and "old" not in text
    (tmp_path / "other.md").write_text("no markers")
    with pytest.raises(SystemExit, match="lacks"):
        benchmark.write_table([row], tmp_path / "other.md")
    assert (tmp_path / "other.md").read_text() == "no markers"
