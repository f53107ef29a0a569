"""Measures compared with the published evaluation's numbers and with slow, simple implementations."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file


pytest.importorskip("py_sod_metrics", reason="the measures need the extra `evaluate`")

from birefnet.evaluation import metrics


FIXTURES = Path(__file__).parents[1] / "fixtures"
REFERENCE = json.loads((FIXTURES / "metrics.json").read_text())


@pytest.fixture(scope="module")
def reference_pairs() -> dict[str, np.ndarray]:
    return load_file(FIXTURES / "metrics.safetensors")


def drawn_pair(seed: int, height: int = 26, width: int = 34) -> tuple[np.ndarray, np.ndarray]:
    """A soft disc and a shifted, noisy matte of it."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    center = generator.uniform(0.3, 0.7, 2) * (height, width)

    def disc(row, column):
        return np.clip(9 - np.hypot(rows - row, columns - column), 0, 4) / 4

    mask = disc(*center)
    matte = 0.9 * disc(*(center + generator.uniform(-2, 2, 2))) + generator.uniform(0, 0.1, mask.shape)
    return (matte * 255).astype(np.uint8), (mask * 255).astype(np.uint8)


@pytest.mark.parametrize("name", REFERENCE)
def test_reproduces_the_published_evaluation(name, reference_pairs):
    values = metrics.measure(reference_pairs[f"{name}.matte"], reference_pairs[f"{name}.mask"])
    assert {key: values[key] for key in REFERENCE[name]} == pytest.approx(REFERENCE[name], abs=1e-9)


def test_human_correction_effort_does_not_stretch_the_matte(reference_pairs):
    """`noise` has values up to 59 of 255, so nothing is foreground. py-sod-metrics stretches it and returns 385."""
    import py_sod_metrics

    calculator = py_sod_metrics.HumanCorrectionEffortMeasure()
    calculator.step(reference_pairs["noise.matte"], reference_pairs["noise.mask"])
    assert calculator.get_results()["hce"] == 385
    own = metrics.HumanCorrectionEffort()
    own.step(reference_pairs["noise.matte"], reference_pairs["noise.mask"])
    assert own.get_results() == {"HCE": 46}


def test_every_measure_has_a_name_and_only_curves_have_none():
    values = metrics.measure(*drawn_pair(0))
    assert {name for name in values if np.ndim(values[name]) == 0} == set(metrics.MEASURES)
    curves = {name: values[name].shape for name in values if np.ndim(values[name])}
    assert curves == dict.fromkeys(("precision", "recall", "F_curve", "E_curve", "BIoU_curve"), (256,))
    assert set(metrics.MEASURES) >= metrics.LOWER_IS_BETTER


def test_a_perfect_matte_gets_the_best_values():
    mask = np.where(drawn_pair(1)[1] > 128, 255, 0).astype(np.uint8)
    values = metrics.measure(mask, mask)
    for name in metrics.MEASURES:
        best = 0 if name in metrics.LOWER_IS_BETTER else 1
        assert values[name] == pytest.approx(best, abs=0.01), name


def within_ellipse(radius: int) -> list[tuple[int, int]]:
    """Offsets (row, column) inside OpenCV's elliptical kernel. Each row ends at the rounded circle."""
    return [
        (row, column)
        for row in range(-radius, radius + 1)
        for column in range(-radius, radius + 1)
        if abs(column) <= round(math.sqrt(radius**2 - row**2))
    ]


def plain_mean_boundary_accuracy(matte, mask):
    height, width = mask.shape
    accuracies = []
    for step in range(5):
        radius = 1 + math.floor(((width + height) / 300 - 1) * step / 5)
        offsets = within_ellipse(radius)
        right = near = 0
        for row in range(height):
            for column in range(width):
                around = [
                    mask[row + down, column + across] > 128
                    for down, across in offsets
                    if 0 <= row + down < height and 0 <= column + across < width
                ]
                if any(around) and not all(around):
                    near += 1
                    right += (matte[row, column] > 128) == (mask[row, column] > 128)
        accuracies.append(right / near)
    return sum(accuracies) / 5


def plain_boundary_curve(matte, mask):
    height, width = mask.shape
    low, high = int(matte.min()), int(matte.max())
    stretched = ((matte / 255 - low / 255) / (high / 255 - low / 255) * 255).astype(int)
    binary = np.where(mask > 128, 255, 0)
    distance = max(1, round(0.02 * math.sqrt(height**2 + width**2)))

    def boundary(values):
        result = values.copy()
        for row in range(height):
            for column in range(width):
                window = [
                    values[y, x] if 0 <= y < height and 0 <= x < width else 0
                    for y in range(row - distance, row + distance + 1)
                    for x in range(column - distance, column + distance + 1)
                ]
                result[row, column] = values[row, column] - min(window)
        return result

    edge, true_edge = boundary(stretched), boundary(binary) > 128
    curve = []
    for threshold in range(255, -1, -1):
        predicted = edge >= threshold
        curve.append((predicted & true_edge).sum() / (predicted | true_edge).sum())
    return curve


def plain_gradient_error(matte, mask):
    sigma, radius = 1.4, 4
    kernel = np.array(
        [
            [x * math.exp(-(x * x + y * y) / (2 * sigma * sigma)) for x in range(-radius, radius + 1)]
            for y in range(-radius, radius + 1)
        ]
    )
    kernel /= math.sqrt((kernel**2).sum())

    def length(values):
        values = (values - values.min()) / (values.max() - values.min())
        padded = np.pad(values, radius, mode="edge")
        result = np.zeros(values.shape)
        for row in range(values.shape[0]):
            for column in range(values.shape[1]):
                window = padded[row : row + 2 * radius + 1, column : column + 2 * radius + 1]
                result[row, column] = math.sqrt((window * kernel).sum() ** 2 + (window * kernel.T).sum() ** 2)
        return result

    return ((length(matte.astype(float)) - length(mask.astype(float))) ** 2).sum() / 1000


def largest_region(above):
    """The set of pixels of the largest 4-connected region, by flood fill."""
    left = {(row, column) for row, column in np.argwhere(above)}
    largest = set()
    for start in sorted(left):
        if start not in left:
            continue
        region, front = {start}, [start]
        left.discard(start)
        while front:
            row, column = front.pop()
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if near in left:
                    left.discard(near)
                    region.add(near)
                    front.append(near)
        largest = max(largest, region, key=len)
    return largest


def plain_connectivity_error(matte, mask):
    last = {}
    for level in range(1, 11):
        region = largest_region((matte.astype(int) * 10 >= level * 255) & (mask.astype(int) * 10 >= level * 255))
        for pixel in np.ndindex(mask.shape):
            if pixel not in region:
                last.setdefault(pixel, (level - 1) / 10)
    total = 0
    for pixel in np.ndindex(mask.shape):
        beyond = [values[pixel] / 255 - last.get(pixel, 1) for values in (matte, mask)]
        degrees = [1 - (distance if distance >= 0.15 else 0) for distance in beyond]
        total += abs(degrees[0] - degrees[1])
    return total / 1000


def plain_sums(matte, mask):
    """SAD, matting MSE, stretched MSE and IoU, pixel by pixel."""
    low, high = matte.min() / 255, matte.max() / 255
    absolute = squared = stretched = intersection = union = 0
    for predicted, true in zip(matte.ravel().tolist(), mask.ravel().tolist(), strict=True):
        absolute += abs(predicted - true) / 255
        squared += ((predicted - true) / 255) ** 2
        stretched += ((predicted / 255 - low) / (high - low) - (true > 128)) ** 2
        intersection += predicted / 255 > 0.5 and true > 128
        union += predicted / 255 > 0.5 or true > 128
    return {
        "SAD": absolute / 1000,
        "MSE_matting": squared / matte.size,
        "MSE": stretched / matte.size,
        "IoU": intersection / union,
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_own_measures_equal_slow_plain_versions(seed):
    matte, mask = drawn_pair(seed)
    values = metrics.measure(matte, mask)
    curve = plain_boundary_curve(matte, mask)
    assert values["BIoU_curve"] == pytest.approx(curve, abs=1e-12)
    expected = plain_sums(matte, mask) | {
        "maxBIoU": max(curve),
        "meanBIoU": sum(curve) / 256,
        "gradient": plain_gradient_error(matte, mask),
        "connectivity": plain_connectivity_error(matte, mask),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [(150, 170), (40, 1100)])
def test_mean_boundary_accuracy_equals_its_plain_version(size):
    """Width + height is above 300, so the radii differ."""
    matte, mask = drawn_pair(3, *size)
    accuracy = metrics.MeanBoundaryAccuracy()
    accuracy.step(matte, mask)
    assert accuracy.get_results()["mBA"] == pytest.approx(plain_mean_boundary_accuracy(matte, mask), abs=1e-12)


def test_average_takes_maxima_of_the_mean_curve_as_py_sod_metrics_does():
    import py_sod_metrics

    pairs = [drawn_pair(seed) for seed in range(3)]
    average = metrics.average([metrics.measure(*pair) for pair in pairs])
    handler = py_sod_metrics.FmeasureHandler(beta=0.3, with_dynamic=True, with_adaptive=True)
    f_measure, e_measure = py_sod_metrics.FmeasureV2({"F": handler}), py_sod_metrics.Emeasure()
    boundary, error = metrics.BoundaryIntersectionOverUnion(), metrics.GradientError()
    for pair in pairs:
        for calculator in (f_measure, e_measure, boundary, error):
            calculator.step(*pair)
    f_curve, e_curve = f_measure.get_results()["F"]["dynamic"], e_measure.get_results()["em"]["curve"]
    expected = {"maxF": f_curve.max(), "meanF": f_curve.mean(), "maxE": e_curve.max(), "meanE": e_curve.mean()}
    expected |= {name: boundary.get_results()[name] for name in ("maxBIoU", "meanBIoU")} | error.get_results()
    assert {name: average[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_average_leaves_out_undefined_values():
    matte, mask = drawn_pair(0)
    full = np.full_like(mask, 255)
    pictures = [metrics.measure(matte, mask), metrics.measure(matte, full)]
    assert math.isnan(pictures[1]["mBA"])
    assert metrics.average(pictures)["mBA"] == pictures[0]["mBA"]
    assert math.isnan(metrics.average(pictures[1:])["mBA"])


@pytest.mark.parametrize(
    ("matte", "mask"),
    [(0, 0), (255, 0), (0, 255), (255, 255), (77, 255)],
)
def test_constant_pictures_have_finite_measures(matte, mask):
    values = metrics.measure(np.full((20, 30), matte, np.uint8), np.full((20, 30), mask, np.uint8))
    assert [name for name in metrics.MEASURES if not math.isfinite(values[name])] == ["mBA"]


@pytest.mark.parametrize(
    ("matte", "mask", "message"),
    [
        (np.zeros((4, 5), np.uint8), np.zeros((5, 4), np.uint8), r"\(4, 5\).*\(5, 4\)"),
        (np.zeros((4, 5), np.float32), np.zeros((4, 5), np.uint8), "matte.*float32"),
        (np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.uint8), "ground truth"),
    ],
)
def test_refuses_what_it_cannot_compare(matte, mask, message):
    with pytest.raises(ValueError, match=message):
        metrics.measure(matte, mask)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "py_sod_metrics", None)
    with pytest.raises(ImportError, match="evaluate"):
        metrics.measure(*drawn_pair(0))
