"""`birefnet evaluate` on drawn pictures: measures, files, bad pairs."""

import csv
import hashlib
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw


pytest.importorskip("py_sod_metrics", reason="evaluation needs the extra `evaluate`")

from birefnet import command_line
from birefnet.evaluation import command as evaluation
from birefnet.evaluation import metrics
from birefnet.evaluation import report as evaluation_report


SIZES = [(64, 48), (48, 64), (80, 56), (64, 64), (56, 40)]


def draw_pair(index: int) -> tuple[Image.Image, Image.Image]:
    """A photo of an ellipse in front of a plain background, and its mask."""
    width, height = SIZES[index % len(SIZES)]
    box = (width // 4, height // 5, width // 4 + width // 2, height // 5 + height // 2)
    photo, mask = Image.new("RGB", (width, height), (40, 90, 40 + 20 * index)), Image.new("L", (width, height))
    ImageDraw.Draw(photo).ellipse(box, fill=(220, 60, 30))
    ImageDraw.Draw(mask).ellipse(box, fill=255)
    return photo, mask


@pytest.fixture
def data(tmp_path):
    """A folder of five photos in im/ with their masks in gt/."""
    folder = tmp_path / "data"
    for name in ("im", "gt"):
        (folder / name).mkdir(parents=True)
    for index in range(5):
        photo, mask = draw_pair(index)
        photo.save(folder / "im" / f"{index}.png")
        mask.save(folder / "gt" / f"{index}.png")
    return folder


@pytest.fixture
def predictions(data, tmp_path):
    """Masks for the folder's pictures, shifted by a few pixels and soft."""
    folder = tmp_path / "predictions"
    folder.mkdir()
    for index in range(5):
        mask = np.asarray(draw_pair(index)[1], dtype=np.float64)
        shifted = (mask + np.roll(mask, 3 + index, axis=1)) / 2
        Image.fromarray(shifted.astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def evaluate(*arguments) -> int:
    return command_line.main(["evaluate", *map(str, arguments)])


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_of_masks(data, predictions, tmp_path, capsys):
    outputs = {name: tmp_path / "out" / name for name in ("result.json", "pictures.csv", "worst.png", "curves.png")}
    files = dict(zip(("--json", "--csv", "--contact-sheet", "--curves"), outputs.values(), strict=True))
    options = [part for option, path in files.items() for part in (option, path)]
    code = evaluate("--predictions", predictions, "--ground-truth", data / "gt", "--workers", 1, *options)
    assert code == 0
    expected = metrics.average(
        [
            metrics.measure(np.asarray(Image.open(predictions / f"{i}.png")), np.asarray(draw_pair(i)[1]))
            for i in range(5)
        ]
    )
    result = json.loads(outputs["result.json"].read_text())
    assert result["measures"] == {name: expected[name] for name in metrics.MEASURES}
    assert result["model"]["name"] == "predictions"
    assert (result["data"]["name"], result["data"]["pictures"], result["data"]["left_out"]) == ("gt", 5, [])
    assert result["curves"]["F"] == pytest.approx(expected["F_curve"], abs=1e-6)
    assert {"python", "numpy", "pysodmetrics"} <= result["versions"].keys()
    assert str(tmp_path) not in outputs["result.json"].read_text()

    rows = read_csv(outputs["pictures.csv"])
    assert [(int(row["width"]), int(row["height"])) for row in rows] == SIZES
    assert math.fsum(float(row["MAE"]) for row in rows) / 5 == pytest.approx(expected["MAE"])
    table = capsys.readouterr().out
    assert f"{expected['S']:.4f}" in table and "human correction effort" in table
    assert Image.open(outputs["curves.png"]).format == "PNG"
    assert Image.open(outputs["worst.png"]).width > 3 * evaluation_report.TILE


def test_numbers_do_not_depend_on_the_workers(data, predictions):
    pairs = evaluation.match_folders(predictions, data / "gt")
    results = [
        evaluation.evaluate(pairs, evaluation.decode_masks, workers=workers, progress=False) for workers in (1, 2)
    ]
    assert [picture.name for picture in results[0].pictures] == [picture.name for picture in results[1].pictures]
    for one, other in zip(results[0].pictures, results[1].pictures, strict=True):
        np.testing.assert_equal(one.measures, other.measures)


def test_numbers_do_not_depend_on_the_order_of_the_pictures(data, predictions):
    pairs = evaluation.match_folders(predictions, data / "gt")
    averages = []
    for ordered in (pairs, pairs[::-1]):
        found = evaluation.evaluate(ordered, evaluation.decode_masks, workers=1, progress=False)
        averages.append(metrics.average([picture.measures for picture in found.pictures]))
    one, other = ([average[name] for name in metrics.MEASURES] for average in averages)
    assert one == pytest.approx(other, abs=1e-12)


def test_bad_pairs_are_named_and_the_rest_goes_on(data, predictions, tmp_path, capsys):
    (predictions / "0.png").unlink()
    (predictions / "1.png").write_bytes(b"no picture")
    Image.new("L", SIZES[2]).save(data / "gt" / "2.png")
    result = tmp_path / "result.json"
    code = evaluate("--predictions", predictions, "--ground-truth", data / "gt", "--workers", 1, "--json", result)
    assert code == 1
    left_out = json.loads(result.read_text())["data"]["left_out"]
    assert ["no prediction" in left_out[0], "cannot be read" in left_out[1], "all black" in left_out[2]] == [True] * 3
    assert str(data / "gt" / "0.png") in left_out[0] and str(predictions / "1.png") in left_out[1]
    assert json.loads(result.read_text())["data"]["pictures"] == 2
    errors = capsys.readouterr().err
    assert all(message in errors for message in left_out)


def test_a_prediction_of_another_size_is_resized_to_its_ground_truth(data, predictions, tmp_path, capsys):
    import cv2

    small = Image.open(predictions / "0.png").resize((32, 24))
    small.save(predictions / "0.png")
    table = tmp_path / "pictures.csv"
    code = evaluate("--predictions", predictions, "--ground-truth", data / "gt", "--workers", 1, "--csv", table)
    assert code == 0
    assert "1 masks were resized" in capsys.readouterr().err
    mask = np.asarray(draw_pair(0)[1])
    expected = metrics.measure(cv2.resize(np.asarray(small), SIZES[0]), mask)
    assert float(read_csv(table)[0]["MAE"]) == expected["MAE"]


def test_baselines(data, tmp_path):
    found = {}
    for baseline in ("foreground", f"mean-mask:{data}"):
        result = tmp_path / "result.json"
        assert evaluate(data, "--baseline", baseline, "--workers", 1, "--json", result) == 0
        found[baseline.split(":")[0]] = json.loads(result.read_text())
    shares = [np.mean(np.asarray(draw_pair(index)[1]) > 128) for index in range(5)]
    assert found["foreground"]["measures"]["MAE"] == pytest.approx(1 - np.mean(shares))
    assert found["foreground"]["measures"]["IoU"] == pytest.approx(np.mean(shares))
    # All masks show the same ellipse relative to their size, so the mean mask is close to each of them.
    assert found["mean-mask"]["measures"]["IoU"] > 0.9
    assert found["mean-mask"]["model"] == {
        "name": "baseline: mean mask of data",
        "is_baseline": True,
        "weights_sha256": {},
    }


def test_the_mean_mask_is_the_mean(tmp_path):
    for name in ("im", "gt"):
        (tmp_path / name).mkdir()
    for index, value in enumerate((0, 100, 200)):
        Image.new("RGB", (30 + index, 20)).save(tmp_path / "im" / f"{index}.png")
        Image.new("L", (30 + index, 20), value).save(tmp_path / "gt" / f"{index}.png")
    mean = evaluation.mean_mask(str(tmp_path))
    assert evaluation.resized_mean(mean, (7, 5)).tolist() == [[100] * 7] * 5


def test_the_worst_cases_come_first(data, predictions):
    pairs = evaluation.match_folders(predictions, data / "gt")
    found = evaluation.evaluate(pairs, evaluation.decode_masks, workers=1, cases=3, progress=False)
    errors = sorted((picture.measures["MAE"] for picture in found.pictures), reverse=True)
    assert [case.error for case in found.cases] == errors[:3]
    assert evaluation_report.draw_contact_sheet(found.cases).height > 3 * 48


def test_the_difference_is_red_for_too_much_and_blue_for_too_little():
    matte, mask = np.array([[255, 0, 255, 0, 200]], np.uint8), np.array([[0, 255, 255, 0, 255]], np.uint8)
    pixels = np.asarray(evaluation_report.difference(matte, mask))[0].tolist()
    assert pixels[0] == [255, 0, 0] and pixels[1] == [0, 0, 255]
    assert pixels[2] == [191, 191, 191] and pixels[3] == [64, 64, 64]
    assert pixels[4][0] == pixels[4][1] < pixels[4][2]


def test_undefined_measures_are_empty_and_null(tmp_path):
    full = np.full((20, 30), 255, np.uint8)
    measures = metrics.measure(full, full)
    evaluation_report.write_csv(tmp_path / "a.csv", [evaluation_report.PictureResult("a", (30, 20), measures)])
    evaluation_report.write_json(tmp_path / "a.json", {"model": {}}, metrics.average([measures]))
    assert read_csv(tmp_path / "a.csv")[0]["mBA"] == ""
    assert json.loads((tmp_path / "a.json").read_text())["measures"]["mBA"] is None
    assert "undefined" in evaluation_report.format_table(measures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "use one of"),
        (["a", "--predictions", "b", "--ground-truth", "c"], "use one of"),
        (["--predictions", "b"], "need each other"),
        (["--update-card", "README.md"], "need each other"),
        (["a", "--baseline", "mean-mask:"], "must be foreground or mean-mask:DATA"),
        (["a", "--baseline", "foreground", "--model", "m"], "excludes --model"),
        (["a", "--workers", "0"], "at least 1"),
        (["a", "--curves", "c.jpg"], "must end in .png"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    assert evaluate(*arguments) == 2
    assert message in capsys.readouterr().err


def test_missing_data_is_explained(tmp_path, capsys):
    assert evaluate(tmp_path / "nothing", "--baseline", "foreground") == 1
    assert "nothing" in capsys.readouterr().err


def test_nothing_is_written_where_no_pair_can_be_used(data, tmp_path, capsys):
    for path in (data / "gt").iterdir():
        path.write_bytes(b"no picture")
    assert evaluate(data, "--baseline", "foreground", "--workers", 1, "--json", tmp_path / "result.json") == 1
    assert "none of the 5 pairs" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_a_model_is_measured_and_described(tiny_model_folder, data, tmp_path):
    """The measures do not depend on the batch size. The result names the data and contains no path."""
    results = []
    for batch_size in (1, 3):
        file = tmp_path / f"{batch_size}.json"
        options = ["--batch-size", batch_size, "--device", "cpu", "--resolution", "64x96", "--workers", 1]
        assert evaluate(data, "--model", tiny_model_folder, *options, "--json", file) == 0
        results.append(json.loads(file.read_text()))
    assert results[0]["measures"] == pytest.approx(results[1]["measures"], abs=1e-4)
    model, settings = results[1]["model"], results[1]["settings"]
    assert model["name"] == tiny_model_folder.name and not model["is_baseline"]
    weights = tiny_model_folder / "model.safetensors"
    assert model["weights_sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert (settings["resolution"], settings["dtype"], settings["batch_size"]) == ("64×96", "float32", 3)
    assert str(tmp_path) not in json.dumps(results) and str(tiny_model_folder.parent) not in json.dumps(results)


def test_a_model_is_measured_on_the_mattes_that_users_get(tiny_model_folder, data):
    from birefnet.command_line import build_parser
    from birefnet.data.pairs import read_pairs
    from birefnet.inference import load_remover, model_options

    arguments = build_parser("evaluate").parse_args(["evaluate", str(data), "--model", str(tiny_model_folder)])
    predictor, _, _ = evaluation.make_predictor(arguments)
    found = evaluation.evaluate(read_pairs([data]), evaluation.decode_photo, predictor, workers=1, progress=False)
    remover = load_remover(**model_options(arguments))
    for index, picture in enumerate(found.pictures):
        photo, mask = draw_pair(index)
        matte = np.asarray(remover(photo, return_mask=True))
        assert picture.measures["SAD"] == metrics.measure(matte, np.asarray(mask))["SAD"]
