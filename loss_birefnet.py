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

# Number of last epochs with more weight on the region-level losses, as published for each task.
TASK_LAST_EPOCHS = {"dis": 40, "general": 20, "matting": 10}


def task_loss_weights(task: str, overrides: dict[str, float] | None = None) -> dict[str, float]:
    """Weights of the loss terms: the task's, or `overrides`, where a missing term has weight 0."""
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
    Weights of the loss terms in an epoch. They depend on the epoch alone, so a resumed run continues the schedule.

    In the n-th of the last epochs (n from 1), BCE is off, the IoU weight is multiplied by 0.5ⁿ and the MAE weight by
    0.9ⁿ. For matting, only the SSIM weight changes; it is multiplied by 0.9ⁿ.

    Args:
        task: `"dis"`, `"general"` or `"matting"`.
        epoch: Epoch, counted from 0.
        num_train_epochs: Number of epochs of the whole training.
        last_epochs: Number of last epochs. `None` stands for the task's published number, 0 for constant weights.
        overrides: Initial weights in place of the task's.

    Raises:
        ValueError: The task is unknown, or the epoch is negative.
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
    """Sum over the batch of 1 − soft intersection / soft union. Maps (B, 1, H, W) in [0, 1] → scalar."""
    intersection = (probabilities * labels).sum(dim=(1, 2, 3))
    union = probabilities.sum(dim=(1, 2, 3)) + labels.sum(dim=(1, 2, 3)) - intersection
    # Prevents 0/0 for an empty label with an exactly empty prediction. No other value changes.
    return (1 - intersection / union.clamp_min(torch.finfo(union.dtype).tiny)).sum()


def gaussian_blur_matrix(size: int, like: torch.Tensor) -> torch.Tensor:
    """Matrix (size, size) that blurs along an axis when multiplied: 11 taps, σ 1.5, zero padding."""
    positions = torch.arange(size, dtype=torch.float32, device=like.device)
    distance = positions[:, None] - positions[None, :]
    taps = torch.arange(-5, 6, dtype=torch.float32, device=like.device)
    total = torch.exp(-(taps**2) / 4.5).sum()
    return (torch.exp(-(distance**2) / 4.5) / total * (distance.abs() <= 5)).to(like.dtype)


def ssim_loss(probabilities: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    (1 − SSIM) / 2 of maps (B, 1, H, W) in [0, 1] → scalar (Wang et al. 2004).

    The Gaussian window is 11×11 with σ 1.5 and zero padding; C1 = 0.01², C2 = 0.03². The window is separable, and two
    matrix products blur many times faster than a convolution of one channel. The label's maps are blurred separately
    because they need no gradient.
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
    Sum of the pixel losses of every output and, with a gradient reference, the gradient loss.

    Args:
        weights (`dict[str, float]`): Weights of `"bce"`, `"iou"`, `"ssim"` and `"mae"`. They may be replaced between
            steps, see [`loss_weights_at_epoch`].
    """

    def __init__(self, weights: dict[str, float]):
        self.weights = weights

    def pixel_terms(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Weighted terms of logits (B, 1, h, w) and labels (B, 1, H, W) in [0, 1]. Omits terms of weight 0."""
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
            logits: Outputs of the supervised stages, each (B, 1, h, w).
            labels: (B, 1, H, W) in [0, 1].
            gradient_logits, gradient_targets: Predicted gradients of the stages and their targets, before the sigmoid.

        Returns:
            The total, and its weighted terms by name, each summed over the outputs and detached.
        """
        terms: dict[str, torch.Tensor] = {}
        with torch.autocast(labels.device.type, enabled=False):  # half precision is too coarse for SSIM's variances
            for output in logits:
                for name, value in self.pixel_terms(output, labels).items():
                    terms[name] = terms[name] + value if name in terms else value
            if gradient_logits:
                terms["gradient"] = self.gradient_loss(gradient_logits, gradient_targets)
        total = sum(terms.values()) if terms else logits[-1].sum() * 0
        return total, {name: value.detach() for name, value in terms.items()}
