"""The measures of video matting, frame after frame, in constant memory.

`step` takes the next frame's matte and its ground truth as uint8 arrays of shape (height, width), `get_results` gives
the measures of the clip. The scales are those of Lin et al., "Robust High-Resolution Video Matting with Temporal
Guidance", WACV 2022: mattes in [0, 1], MAD and MSE times 1000, dtSSD times 100, the gradient error in thousands.
"""

from __future__ import annotations

import math

import numpy as np

from birefnet.evaluation.metrics import GradientError, check_pair


MEASURES = {
    "MAD": "mean absolute difference × 1000",
    "MSE": "mean squared error × 1000",
    "gradient": "gradient error / 1000",
    "dtSSD": "dtSSD × 100",
    "MESSDdt": "MESSDdt × 1000",
}
"""Names of the measures. All are errors: lower is better."""


class VideoMeasures:
    """All measures of one clip.

    dtSSD is √(mean(((α_t − α_{t−1}) − (α*_t − α*_{t−1}))²)), the mean over the clip. MESSDdt is the mean of
    |(α_{t−1}(p) − α*_{t−1}(p))² − (α_t(p + v) − α*_t(p + v))²|, where v is the motion at p: how much the error changes
    along the motion. Both are from Erofeev et al., "Perceptually Motivated Benchmark for Video Matting", BMVC 2015.
    dtSSD also counts an error that moves with the subject; MESSDdt does not. Here v is the optical flow (OpenCV's DIS)
    of the true mattes in whole pixels, so that it is the same for every method.
    """

    def __init__(self):
        import cv2

        self.flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self.gradient = GradientError()
        self.sums = dict.fromkeys(MEASURES, 0.0)
        self.frames = 0
        self.before: tuple[np.ndarray, np.ndarray] | None = None

    def step(self, pred: np.ndarray, gt: np.ndarray) -> None:
        """Adds a frame.

        Args:
            pred: Matte, (height, width), uint8.
            gt: Ground truth of the same shape, uint8.

        Raises:
            ValueError: The arrays are not uint8, not of two dimensions, or their shapes differ, among them or from the
                frame before.
        """
        check_pair(pred, gt)
        if self.before is not None and self.before[1].shape != gt.shape:
            raise ValueError(f"The frame has the shape {gt.shape}, the one before {self.before[1].shape}.")
        error = (pred.astype(np.float32) - gt) / 255
        self.sums["MAD"] += float(np.abs(error).mean(dtype=np.float64)) * 1000
        self.sums["MSE"] += float(np.square(error).mean(dtype=np.float64)) * 1000
        self.sums["gradient"] += self.gradient.of_picture(pred, gt)
        if self.before is not None:
            self._add_change(error, gt)
        self.before = error, np.ascontiguousarray(gt)  # as the optical flow needs it
        self.frames += 1

    def _add_change(self, error: np.ndarray, mask: np.ndarray) -> None:
        error_before, mask_before = self.before
        # (α_t − α_{t−1}) − (α*_t − α*_{t−1}) is the change of the error.
        self.sums["dtSSD"] += math.sqrt(np.square(error - error_before).mean(dtype=np.float64)) * 100
        motion = np.rint(self.flow.calc(mask_before, np.ascontiguousarray(mask), None)).astype(
            np.int64
        )  # (height, width, 2) as x, y
        rows, columns = np.indices(mask.shape)
        rows = (rows + motion[..., 1]).clip(0, mask.shape[0] - 1)
        columns = (columns + motion[..., 0]).clip(0, mask.shape[1] - 1)
        change = np.square(error_before) - np.square(error)[rows, columns]
        self.sums["MESSDdt"] += float(np.abs(change).mean(dtype=np.float64)) * 1000

    def get_results(self) -> dict[str, float]:
        """The measures by their names in `MEASURES`: means over the frames, or over the pairs of frames."""
        pairs = self.frames - 1
        counts = {"dtSSD": pairs, "MESSDdt": pairs}
        return {
            name: total / counts.get(name, self.frames) if counts.get(name, self.frames) > 0 else math.nan
            for name, total in self.sums.items()
        }
