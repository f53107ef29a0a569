"""`benchmarks/gpu`: both scripts run to their end on a CPU, and keep what they have when a part fails or time ends."""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from birefnet.data.pairs import decode_pair, read_pairs
from birefnet.inference.loading import load_model


ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)
SCRIPTS = ROOT / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def script():
    """Imports a module of the scripts as they do, from their own folder."""
    paths = [str(SCRIPTS), str(ROOT / "benchmarks")]
    sys.path[:0] = paths
    yield importlib.import_module
    for path in paths:
        sys.path.remove(path)


# measure.sh


@pytest.mark.skipif(sys.platform != "linux", reason="the parts run in forked processes")
def test_measure_runs_to_its_end(tmp_path):
    pytest.importorskip("timm", reason="the embedded weights have a backbone of timm")
    pytest.importorskip("torchvision", reason="the plain formulation is torchvision's")
    environment = {"PYTHON": sys.executable, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPTS / "measure.sh"), "--device", "cpu", "--tiny", "--output", str(tmp_path)]
    process = subprocess.run(
        command, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    results = json.loads((tmp_path / "measure.json").read_text())
    outcomes = {name: part["outcome"] for name, part in results["parts"].items()}
    rows = {name: part["rows"] for name, part in results["parts"].items()}
    has_triton = importlib.util.find_spec("triton") is not None
    assert [name for name in outcomes if outcomes[name] != "whole"] == ([] if has_triton else ["kernel"])
    colours, exact, _ = rows["parity"]
    assert exact["within 2e-5"] and colours["largest difference in gray levels"] < 0.05
    for eager, graph, plain in (rows["network"], rows["compiled"]):
        assert eager["milliseconds"] > 0 and plain["milliseconds"] > 0
        assert graph["error"] == "ValueError: CUDA graphs need a CUDA GPU"
    if has_triton:
        assert len(rows["kernel"]) == 6 and all(row["error / largest value"] < 1e-6 for row in rows["kernel"])
    assert len(rows["foreground"]) == 2 and rows["training"][0]["seconds per update"] > 0
    assert rows["end_to_end_photos"][0]["photos per second"] > 0
    assert results["environment"]["torch"] == torch.__version__
    assert "| lite | 64 |" in (tmp_path / "measure.md").read_text()
    assert (tmp_path / "measure.png").read_bytes().startswith(b"\x89PNG")


def slow_part(arguments, record):
    record(environment={"device": "none"})
    record(row={"case": 1})
    time.sleep(60)


def failing_part(arguments, record):
    record(row={"case": 1})
    raise RuntimeError("CUDA error: an illegal memory access\nmore lines")


def crashing_part(arguments, record):
    os._exit(7)


@pytest.mark.skipif(sys.platform != "linux", reason="the parts run in forked processes")
@pytest.mark.parametrize(
    ("part", "outcome", "rows"),
    [
        (slow_part, "stopped after 0 s", [{"case": 1}]),
        (failing_part, "failed: RuntimeError: CUDA error: an illegal memory access", [{"case": 1}]),
        (crashing_part, "failed with code 7", []),
    ],
)
def test_rows_of_an_interrupted_part_are_kept(script, part, outcome, rows):
    context = multiprocessing.get_context("fork")
    found = script("measure").run_part(context, part, argparse.Namespace(), 0.4 if part is slow_part else 20)
    assert (found["outcome"], found["rows"]) == (outcome, rows)


def test_parts_without_time_are_skipped_with_the_reason(script, tmp_path, capsys):
    measure = script("measure")
    options = ["--device", "cpu", "--seconds", "3", "--parts", "parity", "--output", str(tmp_path)]
    measure.main(measure.parse_arguments(options))
    [part] = json.loads((tmp_path / "measure.json").read_text())["parts"].values()
    assert re.fullmatch(r"skipped: [0-3] of 3 s were left", part["outcome"]) and part["rows"] == []
    assert "parity: skipped" in capsys.readouterr().out


def test_every_part_is_a_function(script):
    assert all(callable(getattr(script("parts"), name)) for name in script("measure").PARTS)


# train.sh


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nine discs on noise with their masks, 80 x 60, and one pair whose mask is empty."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "im").mkdir()
    (folder / "gt").mkdir()
    rows, columns = np.mgrid[:60, :80]
    random = np.random.default_rng(0)
    for index in range(10):
        disc = (rows - 30) ** 2 + (columns - 40) ** 2 < (10 + index if index < 9 else 0) ** 2
        photo = disc[..., None] * np.array([200, 120, 40]) + random.integers(0, 30, (60, 80, 3))
        Image.fromarray(photo.astype(np.uint8)).save(folder / "im" / f"{index}.png")
        Image.fromarray(disc.astype(np.uint8) * 255).save(folder / "gt" / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def carry(script, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("carry")
    pack = script("pack")
    validation = photos.parent / "validation"
    for name in ("im/0.png", "gt/0.png"):
        (validation / name).parent.mkdir(parents=True, exist_ok=True)
        (validation / name).write_bytes((photos / name).read_bytes())
    options = ["--data", str(photos), "--validation-data", str(validation), "--output", str(folder), "--side", "64"]
    pack.main(pack.parse_arguments([*options, "--carries", "2"]))
    return folder


def test_packed_pairs_are_the_pairs(carry, photos):
    packed = read_pairs([str(carry / "*" / "train.parquet")])
    originals = {pair.name: decode_pair(pair) for pair in read_pairs([photos])[:9]}
    assert sorted(pair.name.split("(")[1][:-1] for pair in packed) == sorted(originals)  # without the bad pair
    assert len(read_pairs([carry / "1" / "validation.parquet"])) == 1
    for pair in packed:
        photo, mask = decode_pair(pair)
        own_photo, own_mask = (part.resize((64, 48)) for part in originals[pair.name.split("(")[1][:-1]])
        assert photo.size == mask.size == (64, 48)
        for found, expected, tolerance in ((photo, own_photo, 8), (mask, own_mask, 3)):
            assert np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)).mean() < tolerance


def test_the_quality_is_the_highest_that_fits(script, photos):
    pack, pairs = script("pack"), read_pairs([photos])[:4]
    sizes = {quality: sum(map(pack.size_of, pack.encode(pairs, 64, quality))) for quality in (90, 60, 40)}
    assert sizes[90] > sizes[60] > sizes[40]
    assert pack.choose_quality(pairs, 64, sizes[90]) == 90
    assert pack.choose_quality(pairs, 64, sizes[60]) == 60
    with pytest.raises(SystemExit, match="smaller --side or more --carries"):
        pack.choose_quality(pairs, 64, sizes[40] - 1)


def test_train_runs_to_its_end_and_keeps_the_best_weights(script, carry, tiny_model_folder, tmp_path, capsys):
    train, results = script("train"), tmp_path / "results"
    data = ["--data", str(carry / "*" / "train.parquet"), "--validation-data", str(carry / "1/validation.parquet")]
    options = ["--device", "cpu", "--tiny", "--model", str(tiny_model_folder), "--output", str(results)]
    train.main(train.parse_arguments([*data, *options, "--learning-rate", "3e-2", "--ema-decay", "0.1"]))
    curve = json.loads((results / "curve.json").read_text())["curve"]
    assert [point["photos"] for point in curve] == [0, 8] and curve[1]["loss"] > 0
    assert (results / "curve.png").read_bytes().startswith(b"\x89PNG")
    before = load_model(tiny_model_folder)[0].half().state_dict()
    weights = {name: value for file in results.glob("weights-*") for name, value in load_file(file).items()}
    assert weights.keys() == before.keys()
    learned = curve[1]["mae"] <= curve[0]["mae"]
    assert learned == any(not torch.equal(weights[name], before[name]) for name in before)

    train.main(
        train.parse_arguments(["--assemble", str(results), "--output", str(tmp_path / "better"), *options[3:5]])
    )
    assembled = load_model(tmp_path / "better")[0].half().state_dict()
    assert all(torch.equal(assembled[name], weights[name]) for name in weights)


def test_weights_are_written_in_files_of_limited_size(script, tmp_path, monkeypatch):
    training = script("fast_training")
    monkeypatch.setattr(training, "FILE_BYTES", 50)
    state_dict = {f"{i}": torch.full((10,), float(i)) for i in range(5)} | {"count": torch.tensor(3)}
    training.write_weights(state_dict, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and [len(load_file(file)) for file in files] == [2, 2, 2]


def test_augmented_pairs_fit_and_are_in_range(script):
    """A mask that equals the photo's red channel still equals it when only the geometry changes."""
    augment = script("fast_training").augment
    torch.manual_seed(0)
    photo = torch.randint(256, (1, 3, 40, 40), dtype=torch.uint8).expand(6, -1, -1, -1)
    pixels = torch.cat([photo, photo[:, :1]], dim=1)
    images, masks = augment(pixels, (32, 48), crop=0.7, color=0.0)
    assert images.shape == (6, 3, 32, 48) and masks.shape == (6, 1, 32, 48)
    assert (images[:, :1] - masks).abs().max() < 1e-6
    assert not torch.equal(images[0], images[1])
    images, _ = augment(pixels, (32, 48), crop=0.7, color=0.5)
    assert images.min() >= 0 and images.max() <= 1
    whole, _ = augment(pixels[:1], (40, 40), crop=1.0, color=0.0)
    upright = photo[:1] / 255
    assert min((whole - way).abs().max() for way in (upright, upright.flip(-1))) < 1e-5


def test_the_learning_rate_rises_and_then_falls_to_zero(script):
    rate = script("fast_training").rate
    rates = [rate(step / 200) for step in range(201)]
    highest = rates.index(max(rates))
    assert rates[0] == 0 and max(rates) == 1 and rates[-1] < 1e-12
    assert rates[:highest] == sorted(rates[:highest]) and rates[highest:] == sorted(rates[highest:], reverse=True)
