"""Losses against direct formulations, gradients of the losses, and the schedule of their weights."""

import pytest
import torch
import torch.nn.functional as F

from birefnet.repository.layers_birefnet import image_laplacian
from birefnet.repository.loss_birefnet import (
    TASK_LOSS_WEIGHTS,
    BiRefNetLoss,
    iou_loss,
    loss_weights_at_epoch,
    ssim_loss,
    task_loss_weights,
)


def maps(dtype=torch.float32, size=(2, 1, 20, 17)):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*size, generator=generator, dtype=dtype) for _ in range(2)]


def test_ssim_equals_a_convolution_with_the_gaussian_window():
    p, y = maps(torch.float64)
    line = torch.exp(-((torch.arange(11, dtype=torch.float64) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def blur(values):
        return F.conv2d(values, window, padding=5)

    variance_p, variance_y = blur(p * p) - blur(p) ** 2, blur(y * y) - blur(y) ** 2
    numerator = (2 * blur(p) * blur(y) + 0.01**2) * (2 * (blur(p * y) - blur(p) * blur(y)) + 0.03**2)
    denominator = (blur(p) ** 2 + blur(y) ** 2 + 0.01**2) * (variance_p + variance_y + 0.03**2)
    expected = (1 - (numerator / denominator).mean()) / 2
    assert ssim_loss(p, y).item() == pytest.approx(expected.item(), rel=1e-6)
    assert ssim_loss(p, p).item() == pytest.approx(0, abs=1e-6)


def test_iou_is_summed_over_the_batch():
    p, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    p[0, 0, 0], y[0, 0, :2] = 1, 1  # 4 of 8 pixels
    p[1], y[1] = 1, 1
    assert iou_loss(p, y).item() == pytest.approx(0.5)
    assert iou_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).isfinite()


@pytest.mark.parametrize("loss", [ssim_loss, iou_loss])
def test_losses_are_differentiable(loss):
    p, y = maps(torch.float64, (1, 1, 6, 5))
    assert torch.autograd.gradcheck(lambda values: loss(values, y), [p.requires_grad_()])


def test_laplacian_equals_kornia():
    kornia = pytest.importorskip("kornia", reason="compares with kornia's laplacian")
    image = torch.randn(2, 3, 12, 9)
    expected = kornia.filters.laplacian(image.mean(dim=1, keepdim=True), 5)
    assert (image_laplacian(image) - expected).abs().max() < 1e-6


def test_terms_are_weighted_and_omitted_at_weight_zero():
    logits, labels = torch.randn(2, 1, 8, 8), maps(size=(2, 1, 16, 16))[1]
    terms = BiRefNetLoss(dict(TASK_LOSS_WEIGHTS["dis"])).pixel_terms(logits, labels)
    assert set(terms) == {"bce", "iou", "ssim"}
    resized = F.interpolate(logits, size=(16, 16), mode="bilinear", align_corners=True)
    expected = 30 * F.binary_cross_entropy(resized.sigmoid(), labels)
    assert terms["bce"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_total_is_the_sum_of_its_terms_and_the_gradient_loss():
    loss = BiRefNetLoss({"bce": 1.0, "iou": 0.0, "ssim": 0.0, "mae": 2.0})
    labels = maps(size=(2, 1, 16, 16))[1]
    logits = [torch.randn(2, 1, size, size, requires_grad=True) for size in (4, 8, 16)]
    gradients, targets = [torch.randn(2, 1, 4, 4)], [torch.randn(2, 1, 16, 16)]
    total, terms = loss(logits, labels, gradients, targets)
    assert set(terms) == {"bce", "mae", "gradient"}
    assert total.item() == pytest.approx(sum(value.item() for value in terms.values()), rel=1e-6)
    total.backward()
    assert all(output.grad.abs().sum() > 0 for output in logits)
    silent, _ = BiRefNetLoss({"bce": 0.0, "iou": 0.0, "ssim": 0.0, "mae": 0.0})(logits, labels)
    assert silent.item() == 0


def test_weights_of_the_last_epochs_follow_the_published_schedule():
    assert loss_weights_at_epoch("general", 179, 200) == TASK_LOSS_WEIGHTS["general"]
    third = loss_weights_at_epoch("general", 182, 200)
    assert third == pytest.approx({"bce": 0, "iou": 0.5 * 0.5**3, "ssim": 10, "mae": 100 * 0.9**3})
    first = loss_weights_at_epoch("matting", 140, 150)
    assert first == pytest.approx({"bce": 30, "iou": 0, "ssim": 9, "mae": 100})
    assert loss_weights_at_epoch("dis", 460, 500)["bce"] == 0
    assert loss_weights_at_epoch("dis", 459, 500)["bce"] == 30
    assert loss_weights_at_epoch("general", 199, 200, last_epochs=0) == TASK_LOSS_WEIGHTS["general"]


def test_overrides_replace_the_task_weights_and_wrong_arguments_are_refused():
    assert task_loss_weights("general", {"mae": 2}) == {"bce": 0, "iou": 0, "ssim": 0, "mae": 2}
    with pytest.raises(ValueError, match="'video'.*dis"):
        loss_weights_at_epoch("video", 0, 10)
    with pytest.raises(ValueError, match="epoch=-1"):
        loss_weights_at_epoch("dis", -1, 10)
