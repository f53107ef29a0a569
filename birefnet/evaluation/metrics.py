"""Measures of image segmentation and matting.

Most measures come from py-sod-metrics. The classes here add what it lacks, with the same interface: `step` takes a
matte and its ground truth as uint8 arrays of shape (height, width) in [0, 255]. `get_results` returns the mean over
all pictures so far.

The measures follow three conventions. Each class says which one it uses:

- Measures of saliency and dichotomous segmentation binarise the ground truth at > 128. If they use a gray matte, they
  stretch it to its full range first (`py_sod_metrics.utils.prepare_data`).
- Human correction effort, mean boundary accuracy and intersection over union binarise the matte without stretching it.
  py-sod-metrics stretches it for the human correction effort, which turns a nearly black matte into foreground.
- Matting measures compare gray values over the whole picture, as methods without a trimap report them.
"""

from __future__ import annotations

import math
import signal

import numpy as np


MISSING = (
    "The measures need py-sod-metrics, which brings OpenCV, SciPy and scikit-image. Install the extra `evaluate`: "
    "`pip install 'birefnet-transformers[evaluate]'`."
)
MEASURES = {
    "S": "S-measure",
    "maxF": "max F-measure",
    "meanF": "mean F-measure",
    "adpF": "adaptive F-measure",
    "wF": "weighted F-measure",
    "maxE": "max E-measure",
    "meanE": "mean E-measure",
    "adpE": "adaptive E-measure",
    "MAE": "mean absolute error",
    "MSE": "mean squared error",
    "HCE": "human correction effort",
    "mBA": "mean boundary accuracy",
    "maxBIoU": "max boundary IoU",
    "meanBIoU": "mean boundary IoU",
    "IoU": "intersection over union at 0.5",
    "SAD": "sum of absolute differences / 1000 (matting)",
    "MSE_matting": "mean squared error (matting)",
    "gradient": "gradient error / 1000 (matting)",
    "connectivity": "connectivity error / 1000 (matting)",
}
"""Titles of the measures, in the order of the tables. Those in `LOWER_IS_BETTER` are errors."""
LOWER_IS_BETTER = {"MAE", "MSE", "HCE", "SAD", "MSE_matting", "gradient", "connectivity"}
THRESHOLDS = np.arange(255, -1, -1)
"""The thresholds t of every curve, in the curve's order. Foreground is where the matte is ≥ t."""


def require_libraries():
    """Checks that the libraries for the measures are installed.

    Raises:
        ImportError: A library is missing. The message names the extra to install.
    """
    try:
        import py_sod_metrics  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{MISSING} ({error})") from error


def measure(matte: np.ndarray, mask: np.ndarray) -> dict[str, float | np.ndarray]:
    """Computes all measures of one picture.

    Args:
        matte: Prediction, uint8 (height, width).
        mask: Ground truth, uint8, same shape. Only the matting measures use its soft values.

    Returns:
        The measures by their names in `MEASURES`; nan if a measure is undefined for this mask. Also five curves over
        `THRESHOLDS` with 256 values each: `precision`, `recall`, `F_curve`, `E_curve` and `BIoU_curve`.

    Raises:
        ImportError: py-sod-metrics is missing.
        ValueError: The arrays are not uint8, not of two dimensions, or their shapes differ.
    """
    require_libraries()
    check_pair(matte, mask)
    return _published_measures(matte, mask) | _own_measures(matte, mask)


def measure_pair(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, float | np.ndarray]:
    """Calls `measure` with a tuple of matte and mask, for use with `map`."""
    return measure(*pair)


def prepare_process():
    """Initialises a measuring process: OpenCV uses one thread, and only the main process handles Ctrl-C."""
    import cv2

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _published_measures(matte: np.ndarray, mask: np.ndarray) -> dict[str, float | np.ndarray]:
    import py_sod_metrics as published

    f_measure = published.FmeasureV2(
        {
            "F": published.FmeasureHandler(beta=0.3, with_dynamic=True, with_adaptive=True),
            "precision": published.PrecisionHandler(with_dynamic=True, with_adaptive=False),
            "recall": published.RecallHandler(with_dynamic=True, with_adaptive=False),
        }
    )
    others = {
        "S": published.Smeasure(),
        "wF": published.WeightedFmeasure(),
        "MAE": published.MAE(),
        "E": published.Emeasure(),
    }
    for calculator in (f_measure, *others.values()):
        calculator.step(matte, mask)
    f_results = f_measure.get_results()
    e_results = others["E"].get_results()["em"]
    return {
        "S": float(others["S"].get_results()["sm"]),
        "wF": float(others["wF"].get_results()["wfm"]),
        "MAE": float(others["MAE"].get_results()["mae"]),
        "adpF": float(f_results["F"]["adaptive"]),
        "adpE": float(e_results["adp"]),
        "precision": f_results["precision"]["dynamic"],
        "recall": f_results["recall"]["dynamic"],
    } | _of_curves({"F": f_results["F"]["dynamic"], "E": e_results["curve"]})


def _own_measures(matte: np.ndarray, mask: np.ndarray) -> dict[str, float | np.ndarray]:
    values = {}
    for calculator_class in OWN_MEASURES:
        calculator = calculator_class()
        calculator.step(matte, mask)
        values |= calculator.get_results()
    return values


def _of_curves(curves: dict[str, np.ndarray]) -> dict[str, float | np.ndarray]:
    """Returns maximum and mean of each curve and the curve itself: `maxNAME`, `meanNAME` and `NAME_curve`."""
    values = {}
    for name, curve in curves.items():
        values |= {f"max{name}": float(curve.max()), f"mean{name}": float(curve.mean()), f"{name}_curve": curve}
    return values


def average(pictures: list[dict[str, float | np.ndarray]]) -> dict[str, float | np.ndarray]:
    """Combines the measures of pictures into those of a data set, as in published tables.

    A measure is the mean over the pictures for which it is defined. Maximum and mean of F, E and boundary IoU come
    from the mean curve, so the maximum uses one threshold for the whole data set.

    Args:
        pictures: Results of `measure`, one for each picture.

    Raises:
        ValueError: There is no picture.
    """
    if not pictures:
        raise ValueError("There are no pictures to average.")
    means = {name: _mean([picture[name] for picture in pictures]) for name in pictures[0]}
    return means | _of_curves({name: means[f"{name}_curve"] for name in ("F", "E", "BIoU")})


def _mean(values: list[float] | list[np.ndarray]) -> float | np.ndarray:
    """Returns the mean over the pictures without nan values; nan if there are no other values."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim > 1:
        return values.mean(axis=0)
    defined = values[~np.isnan(values)]
    # fsum is exact, so the order of the pictures does not matter.
    return math.fsum(defined) / len(defined) if len(defined) else math.nan


def check_pair(matte: np.ndarray, mask: np.ndarray):
    """Raises a ValueError unless both are uint8 arrays of the same shape (height, width)."""
    for name, values in (("matte", matte), ("ground truth", mask)):
        if values.ndim != 2 or values.dtype != np.uint8:
            raise ValueError(
                f"The {name} has shape {values.shape} and dtype {values.dtype}; expected (height, width) and uint8."
            )
    if matte.shape != mask.shape:
        raise ValueError(f"The matte has shape {matte.shape}, its ground truth {mask.shape}; they must be equal.")


class Measure:
    """Base class of measures with one number for each picture.

    Attributes:
        name: Key in the result.
        values: The numbers of the pictures so far.
    """

    name: str

    def __init__(self):
        self.values: list[float] = []

    def step(self, pred: np.ndarray, gt: np.ndarray):
        """Adds a picture.

        Args:
            pred: Matte, uint8 (height, width).
            gt: Ground truth, uint8, same shape.

        Raises:
            ValueError: The arrays are not uint8, not of two dimensions, or their shapes differ.
        """
        check_pair(pred, gt)
        self.values.append(self.of_picture(pred, gt))

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        """Returns the measure of one picture; nan if it is undefined."""
        raise NotImplementedError

    def get_results(self) -> dict[str, float]:
        """Returns the mean over the pictures for which the measure is defined, by the measure's name."""
        return {self.name: _mean(self.values)}


class MeanSquaredError(Measure):
    """Mean of (matte − mask)². As for MAE, the matte is stretched to its full range and the mask is binarised."""

    name = "MSE"

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        from py_sod_metrics.utils import prepare_data

        stretched, binary = prepare_data(matte, mask)
        return float(np.mean((stretched - binary) ** 2))


class HumanCorrectionEffort(Measure):
    """Number of points and regions that a person would have to correct (Qin et al., "Highly Accurate Dichotomous Image
    Segmentation", ECCV 2022).

    The matte is binarised at > 128 without stretching, as in the authors' evaluation and in published tables.
    `py_sod_metrics.HumanCorrectionEffortMeasure` stretches it first, which changes the value of every matte that does
    not reach black or white.
    """

    name = "HCE"

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        from py_sod_metrics import HumanCorrectionEffortMeasure

        calculator = HumanCorrectionEffortMeasure()
        calculator.step((matte > 128).astype(np.float64), mask > 128, normalize=False)
        return float(calculator.get_results()["hce"])


class IntersectionOverUnion(Measure):
    """Intersection over union of the mask and the matte at > 0.5, without stretching."""

    name = "IoU"

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        foreground, binary = matte > 127, mask > 128
        union = np.count_nonzero(foreground | binary)
        return np.count_nonzero(foreground & binary) / union if union else 1.0


class MeanBoundaryAccuracy(Measure):
    """Fraction of correct pixels near the boundary of the mask, averaged over five widths.

    From Cheng et al., "CascadePSP", CVPR 2020, as used in the published tables of BiRefNet. Matte and mask are
    binarised at > 128. A pixel is near the boundary if it is in the morphological gradient of the mask by an
    elliptical kernel of radius 1 + ⌊(r_max − 1)·i/5⌋ for i = 0…4, with r_max = (width + height)/300. Undefined for a
    mask without a boundary.
    """

    name = "mBA"
    widths = 5

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        import cv2

        binary = (mask > 128).astype(np.uint8)
        correct = (matte > 128) == (mask > 128)
        largest = sum(mask.shape) / 300
        accuracies = []
        for step in range(self.widths):
            radius = 1 + int((largest - 1) / self.widths * step)
            kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
            near = cv2.morphologyEx(binary, cv2.MORPH_GRADIENT, kernel) > 0
            if not near.any():
                return math.nan
            accuracies.append(np.mean(correct[near]))
        return float(np.mean(accuracies))


class BoundaryIntersectionOverUnion:
    """Intersection over union of the boundaries of matte and mask, at every threshold.

    After Cheng et al., "Boundary IoU", CVPR 2021, as used in the published tables of BiRefNet. The matte is stretched
    to its full range. The boundary of a map is the map minus its erosion by d pixels (a square of side 2d + 1, zero
    outside the picture), where d is 2 % of the picture's diagonal, rounded, and at least 1. The mask's boundary is
    binarised at > 128. The matte's boundary stays gray and is compared with it at each of `THRESHOLDS`.
    """

    share_of_diagonal = 0.02

    def __init__(self):
        self.curves: list[np.ndarray] = []

    def step(self, pred: np.ndarray, gt: np.ndarray):
        """Adds a picture. Arguments and errors are those of `Measure.step`."""
        from py_sod_metrics.utils import prepare_data

        check_pair(pred, gt)
        stretched, binary = prepare_data(pred, gt)
        edge = self.boundary((stretched * 255).astype(np.uint8))
        true_edge = self.boundary(binary.astype(np.uint8) * 255) > 128
        # Number of pixels at or above each threshold, from 255 down to 0.
        hits = np.bincount(edge[true_edge], minlength=256)[::-1].cumsum()
        false = np.bincount(edge[~true_edge], minlength=256)[::-1].cumsum()
        self.curves.append(hits / (max(np.count_nonzero(true_edge), 1) + false))

    def boundary(self, values: np.ndarray) -> np.ndarray:
        """Returns the map minus its erosion, uint8 (height, width)."""
        import cv2

        distance = max(1, round(self.share_of_diagonal * math.hypot(*values.shape)))
        square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
        return values - cv2.erode(values, square, borderType=cv2.BORDER_CONSTANT, borderValue=0)

    def get_results(self) -> dict[str, float | np.ndarray]:
        """Returns `maxBIoU` and `meanBIoU` of the mean curve, and the curve `BIoU_curve`."""
        return _of_curves({"BIoU": np.mean(self.curves, axis=0)})


class SumOfAbsoluteDifferences(Measure):
    """Σ|α − α*| / 1000 with both mattes in [0, 1].

    From Rhemann et al., "A Perceptually Motivated Online Benchmark for Image Matting", CVPR 2009 (alphamatting.com).
    In thousands as in Xu et al., "Deep Image Matting", CVPR 2017.
    """

    name = "SAD"

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        return float(np.abs(matte.astype(np.int64) - mask).sum()) / 255 / 1000


class MattingMeanSquaredError(Measure):
    """Mean of (α − α*)² with both mattes in [0, 1], without stretching or binarising (alphamatting.com)."""

    name = "MSE_matting"

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        return float(np.mean((matte.astype(np.int64) - mask) ** 2)) / 255**2


class GradientError(Measure):
    """Σ(|∇α| − |∇α*|)² / 1000 (Rhemann et al., CVPR 2009, alphamatting.com, with q = 2).

    Both mattes are stretched to [0, 1] first. The gradient filters are first derivatives of a Gaussian with σ = 1.4,
    cut off where the Gaussian falls below 0.01 (9 × 9 pixels) and normalised to a unit sum of squares. Border pixels
    are repeated. The constants are those of the evaluation code of Xu et al., "Deep Image Matting", CVPR 2017.
    """

    name = "gradient"
    sigma = 1.4
    smallest = 0.01

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        return float(np.sum((self.gradient(matte) - self.gradient(mask)) ** 2)) / 1000

    def gradient(self, values: np.ndarray) -> np.ndarray:
        """Returns the magnitude of the gradient at each pixel, float64 (height, width)."""
        from scipy.ndimage import correlate1d

        low, high = int(values.min()), int(values.max())
        stretched = (values - float(low)) / max(high - low, 1)
        radius = math.ceil(self.sigma * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * self.sigma * self.smallest)))
        offsets = np.arange(-radius, radius + 1)
        smooth = np.exp(-(offsets**2) / (2 * self.sigma**2))
        derivative = offsets * smooth
        # The outer product of two unit vectors has a unit sum of squares.
        smooth, derivative = smooth / np.linalg.norm(smooth), derivative / np.linalg.norm(derivative)
        slopes = (
            correlate1d(correlate1d(stretched, derivative, axis, mode="nearest"), smooth, 1 - axis, mode="nearest")
            for axis in (0, 1)
        )
        return np.hypot(*slopes)


class ConnectivityError(Measure):
    """Σ|φ − φ*| / 1000 (Rhemann et al., CVPR 2009, alphamatting.com, with θ = 0.15 and p = 1).

    The source region at a threshold is the largest 4-connected region in which both mattes reach the threshold. For
    each pixel, l is the highest of the thresholds 0, 0.1, …, 1 up to which the pixel belongs to the source region.
    With d = α − l, the degree of connectivity is φ = 1 − d if d ≥ θ, else 1. φ* is the same for the ground truth.
    """

    name = "connectivity"
    tolerance = 0.15
    levels = 10

    def of_picture(self, matte: np.ndarray, mask: np.ndarray) -> float:
        connected_up_to = self.connected_up_to(np.minimum(matte, mask))  # where the minimum reaches a level, both do
        degrees = []
        for values in (matte, mask):
            beyond = values / 255 - connected_up_to
            degrees.append(1 - np.where(beyond >= self.tolerance, beyond, 0))
        return float(np.abs(degrees[0] - degrees[1]).sum()) / 1000

    def connected_up_to(self, minimum: np.ndarray) -> np.ndarray:
        """Returns l of each pixel, float64 in [0, 1], (height, width)."""
        import cv2

        last = np.ones(minimum.shape)
        connected = np.ones(minimum.shape, dtype=bool)
        for level in range(1, self.levels + 1):
            # In integers, because floats cannot represent 0.1 exactly.
            above = (minimum.astype(np.int64) * self.levels >= level * 255).astype(np.uint8)
            _, labels, regions, _ = cv2.connectedComponentsWithStats(above, connectivity=4)
            areas = regions[1:, cv2.CC_STAT_AREA]  # without label 0, the background
            source = labels == 1 + areas.argmax() if len(areas) else np.zeros_like(connected)
            last[connected & ~source] = (level - 1) / self.levels
            connected &= source
        return last


OWN_MEASURES = (
    MeanSquaredError,
    HumanCorrectionEffort,
    MeanBoundaryAccuracy,
    BoundaryIntersectionOverUnion,
    IntersectionOverUnion,
    SumOfAbsoluteDifferences,
    MattingMeanSquaredError,
    GradientError,
    ConnectivityError,
)
