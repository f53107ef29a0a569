import json
import math

import numpy as np
import pytest

from birefnet.command_line import main


av = pytest.importorskip("av", reason="the extra `video` is not installed")
cv2 = pytest.importorskip("cv2", reason="the extra `video` is not installed")
pytest.importorskip("scipy", reason="the gradient error needs SciPy")

from birefnet.evaluation.metrics import GradientError  # noqa: E402
from birefnet.evaluation.video_metrics import MEASURES, VideoMeasures  # noqa: E402

from ..drawn_clips import write_clip  # noqa: E402


def plain_measures(mattes: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """The definitions, pixel by pixel, in Python's own numbers."""
    frames, height, width = truths.shape
    mattes, masks = mattes / 255.0, truths / 255.0
    pixels = [(y, x) for y in range(height) for x in range(width)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    absolute, squared, changes, along, before = [], [], [], [], {}
    for t in range(frames):
        error = {p: float(mattes[t][p] - masks[t][p]) for p in pixels}
        absolute.append(1000 * math.fsum(abs(e) for e in error.values()) / len(pixels))
        squared.append(1000 * math.fsum(e * e for e in error.values()) / len(pixels))
        if t:
            total = 0.0
            for p in pixels:
                change = (mattes[t][p] - mattes[t - 1][p]) - (masks[t][p] - masks[t - 1][p])
                total += change * change
            changes.append(100 * math.sqrt(total / len(pixels)))
            motion = flow.calc(truths[t - 1], truths[t], None)
            total = 0.0
            for y, x in pixels:
                to_y = min(max(y + round(float(motion[y, x, 1])), 0), height - 1)
                to_x = min(max(x + round(float(motion[y, x, 0])), 0), width - 1)
                total += abs(before[y, x] ** 2 - error[to_y, to_x] ** 2)
            along.append(1000 * total / len(pixels))
        before = error
    pairs = zip((mattes * 255).round().astype(np.uint8), truths, strict=True)
    gradients = [GradientError().of_picture(*pair) for pair in pairs]
    return {
        "MAD": np.mean(absolute),
        "MSE": np.mean(squared),
        "gradient": np.mean(gradients),
        "dtSSD": np.mean(changes),
        "MESSDdt": np.mean(along),
    }


def moving_mattes() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    rows, columns = np.mgrid[:32, :40]
    truths = [255 / (1 + np.exp(((columns - 10 - 3 * t) ** 2 + (rows - 16) ** 2 - 60) / 15)) for t in range(5)]
    truths = np.stack(truths).astype(np.uint8)
    mattes = (truths + random.normal(0, 40, truths.shape)).clip(0, 255).round().astype(np.uint8)
    return mattes, truths


def test_measures_equal_the_plain_definitions():
    mattes, truths = moving_mattes()
    measures = VideoMeasures()
    for pair in zip(mattes, truths, strict=True):
        measures.step(*pair)
    expected = plain_measures(mattes.astype(np.float64), truths)
    assert measures.get_results().keys() == MEASURES.keys()
    for name, value in measures.get_results().items():
        assert value == pytest.approx(expected[name], rel=1e-5), name
        assert value > 0


def test_one_frame_and_wrong_shapes():
    measures = VideoMeasures()
    measures.step(np.zeros((32, 40), np.uint8), np.zeros((32, 40), np.uint8))
    assert math.isnan(measures.get_results()["dtSSD"]) and measures.get_results()["MAD"] == 0
    with pytest.raises(ValueError, match="shape"):
        measures.step(np.zeros((20, 40), np.uint8), np.zeros((20, 40), np.uint8))


def test_clips_are_measured_against_true_mattes(tmp_path, tiny_model_folder, capsys):
    for part in ("im", "gt"):
        (tmp_path / part).mkdir()
        write_clip(tmp_path / part / "disc.mkv", 4, codec="ffv1", pixel_format="gray" if part == "gt" else "yuv420p")
    write_clip(tmp_path / "im" / "short.mkv", 3, codec="ffv1")
    write_clip(tmp_path / "gt" / "short.mkv", 4, codec="ffv1", pixel_format="gray")
    result = tmp_path / "result.json"
    arguments = ["--model", str(tiny_model_folder), "--json", str(result), "--csv", str(tmp_path / "clips.csv")]
    assert main(["evaluate", "--video", str(tmp_path), *arguments]) == 1
    assert "different numbers of frames" in capsys.readouterr().err
    found = json.loads(result.read_text())
    assert len(found["clips"]) == 1 and found["mean"]["dtSSD"] > 0 and found["stabilize"]
    assert (tmp_path / "clips.csv").read_text().startswith("clip,MAD")

    (tmp_path / "im" / "short.mkv").unlink()
    (tmp_path / "gt" / "short.mkv").unlink()
    perfect = ["--predictions", str(tmp_path / "gt"), "--ground-truth", str(tmp_path / "gt"), "--json", str(result)]
    assert main(["evaluate", "--video", *perfect]) == 0
    assert set(json.loads(result.read_text())["mean"].values()) == {0.0}
    assert main(["evaluate", "--video", str(tmp_path), "--curves", "curves.png"]) == 2
