"""Training losses of BiRefNet."""

import torch
import torch.nn.functional as F

from .configuration_birefnet import LOSS_TERMS
from .layers_birefnet import resize


TASK_LOSS_WEIGHTS = {
    "dis": {"bce": 30.0, "iou": 0.5, "ssim": 10.0, "mae": 0.0},
    "general": {"bce": 30.0, "iou": 0.5, "ssim": 10.0, "mae": 100.0},
    "matting": {"bce": 30.0, "iou": 0.0, "ssim": 10.0, "mae": 100.0},
}

# Number of last epochs in which the region-level losses take over, as published for each task.
TASK_LAST_EPOCHS = {"dis": 40, "general": 20, "matting": 10}


def task_loss_weights(task: str, overrides: dict[str, float] | None = None) -> dict[str, float]:
    """Weight of each loss term: those of the task, or `overrides` with 0 for the terms that it leaves out."""
    if overrides is None:
        return dict(TASK_LOSS_WEIGHTS[task])
    return {term: float(overrides.get(term, 0.0)) for term in LOSS_TERMS}


def loss_weights_at_epoch(
    task: str,
    epoch: int,
    num_train_epochs: int,
    last_epochs: int | None = None,
    overrides: dict[str, float] | None = None,
) -> dict[str, float]:
    """
    Weight of each loss term in an epoch: a function of the epoch alone, so that a resumed run continues it.

    In the n-th of the last epochs (n from 1) BCE is off, IoU is weighted × 0.5ⁿ and MAE × 0.9ⁿ; for matting only
    SSIM changes, × 0.9ⁿ.

    Args:
        task: `"dis"`, `"general"` or `"matting"`.
        epoch: the epoch, counted from 0.
        num_train_epochs: how many epochs the whole training has.
        last_epochs: how many of them are last ones; as published for the task if `None`, 0 for a constant schedule.
        overrides: weights to start from instead of the task's.

    Raises:
        ValueError: for an unknown task, or an epoch below 0.
    """
    if task not in TASK_LOSS_WEIGHTS:
        raise ValueError(f"task={task!r} is not one of {', '.join(TASK_LOSS_WEIGHTS)}.")
    if epoch < 0:
        raise ValueError(f"epoch={epoch} is below 0.")
    weights = task_loss_weights(task, overrides)
    last_epochs = TASK_LAST_EPOCHS[task] if last_epochs is None else last_epochs
    n = epoch - (num_train_epochs - last_epochs) + 1
    if n < 1:
        return weights
    if task == "matting":
        return {**weights, "ssim": weights["ssim"] * 0.9**n}
    return {**weights, "bce": 0.0, "iou": weights["iou"] * 0.5**n, "mae": weights["mae"] * 0.9**n}


def iou_loss(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Σ over the batch of 1 − intersection / union, both soft. (B, 1, H, W) in [0, 1], a scalar out."""
    intersection = (probabilities * labels).sum(dim=(1, 2, 3))
    union = probabilities.sum(dim=(1, 2, 3)) + labels.sum(dim=(1, 2, 3)) - intersection
    # Guards 0/0 of an all-black label that is predicted as such exactly; it changes no other value.
    return (1 - intersection / union.clamp_min(torch.finfo(union.dtype).tiny)).sum()


def gaussian_blur_matrix(size: int, like: torch.Tensor) -> torch.Tensor:
    """(size, size): multiplying by it blurs along an axis with 11 taps of σ 1.5 and zeros beyond the border."""
    places = torch.arange(size, dtype=torch.float32, device=like.device)
    distance = places[:, None] - places[None, :]
    taps = torch.arange(-5, 6, dtype=torch.float32, device=like.device)
    total = torch.exp(-(taps**2) / 4.5).sum()
    return (torch.exp(-(distance**2) / 4.5) / total * (distance.abs() <= 5)).to(like.dtype)


def ssim_loss(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    (1 − SSIM) / 2 of (B, 1, H, W) maps in [0, 1] (Wang et al. 2004): Gaussian window 11×11 of σ 1.5, zero padding,
    C1 = 0.01², C2 = 0.03².

    The window is separable, and two matrix products blur many times faster than a convolution of one channel. The
    label's own maps are blurred apart: they need no gradient.
    """
    p, y = probabilities, labels
    rows, columns = gaussian_blur_matrix(p.shape[-2], p), gaussian_blur_matrix(p.shape[-1], p)
    mean_p, mean_pp, mean_py = (rows @ torch.cat([p, p * p, p * y]) @ columns).chunk(3)
    mean_y, mean_yy = (rows @ torch.cat([y, y * y]) @ columns).chunk(2)
    variance_p, variance_y = mean_pp - mean_p**2, mean_yy - mean_y**2
    covariance = mean_py - mean_p * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_p * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_p**2 + mean_y**2 + c1) * (variance_p + variance_y + c2))
    return (1 - similarity.mean()) / 2


class BiRefNetLoss:
    """
    Pixel losses of every output plus, with a gradient reference, the gradient loss.

    Args:
        weights (`dict[str, float]`): weight of `"bce"`, `"iou"`, `"ssim"` and `"mae"`. It may be replaced between
            steps, see [`loss_weights_at_epoch`].
    """

    def __init__(self, weights: dict[str, float]):
        self.weights = weights

    def pixel_terms(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weighted terms of logits (B, 1, h, w) against labels (B, 1, H, W) in [0, 1]; none for a weight of 0."""
        logits = resize(logits, labels.shape[-2:]).float()
        labels = labels.float()
        probabilities = logits.sigmoid()
        terms = {
            "bce": lambda: F.binary_cross_entropy_with_logits(logits, labels),
            "iou": lambda: iou_loss(probabilities, labels),
            "ssim": lambda: ssim_loss(probabilities, labels),
            "mae": lambda: F.l1_loss(probabilities, labels),
        }
        return {name: self.weights[name] * term() for name, term in terms.items() if self.weights[name]}

    def gradient_loss(self, gradient_logits, gradient_targets) -> torch.Tensor:
        """Mean binary cross-entropy between the predicted and the target gradients, summed over the stages."""
        losses = [
            F.binary_cross_entropy_with_logits(resize(predicted, target.shape[-2:]).float(), target.float().sigmoid())
            for predicted, target in zip(gradient_logits, gradient_targets, strict=True)
        ]
        return torch.stack(losses).sum()

    def __call__(
        self,
        logits: list[torch.Tensor],
        labels: torch.Tensor,
        gradient_logits: list[torch.Tensor] | None = None,
        gradient_targets: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Args:
            logits: outputs of the supervised stages, each (B, 1, h, w).
            labels: (B, 1, H, W) in [0, 1].
            gradient_logits, gradient_targets: the stages' predicted gradients and their targets, before the sigmoid.

        Returns:
            The total, and its terms by name, weights included, each summed over the outputs and detached.
        """
        terms: dict[str, torch.Tensor] = {}
        with torch.autocast(labels.device.type, enabled=False):  # variances do not survive half precision
            for output in logits:
                for name, value in self.pixel_terms(output, labels).items():
                    terms[name] = terms[name] + value if name in terms else value
            if gradient_logits:
                terms["gradient"] = self.gradient_loss(gradient_logits, gradient_targets)
        total = sum(terms.values()) if terms else logits[-1].sum() * 0
        return total, {name: value.detach() for name, value in terms.items()}
