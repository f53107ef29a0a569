"""`birefnet.training.trainer`: validation, parameter groups, losses that are not finite, and batch norms."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("timm")
pytest.importorskip("kornia")
pytest.importorskip("accelerate")

from transformers import TrainingArguments

from birefnet.data.pairs import decode_pair, read_pairs
from birefnet.repository.configuration_birefnet import BiRefNetConfig
from birefnet.repository.image_processing_birefnet import BiRefNetImageProcessor
from birefnet.repository.modeling_birefnet import BiRefNetForImageSegmentation
from birefnet.training.augmentation import AugmentationSettings
from birefnet.training.dataset import MattingDataset
from birefnet.training.trainer import BiRefNetTrainer

from ..conftest import TINY_CONFIG
from ..drawn_photos import write_folder


pytestmark = pytest.mark.usefixtures("one_thread")


SIZE = (64, 64)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("photos"), "abcdefgh", size=(80, 50))
    return MattingDataset(read_pairs([folder]), SIZE, show_progress=False)


def make_trainer(dataset, folder, model=None, more=None, **arguments):
    torch.manual_seed(0)
    model = model or BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG))
    defaults = {"max_steps": 3, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "logging_steps": 1}
    defaults |= {"save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False}
    return BiRefNetTrainer(
        model=model,
        args=TrainingArguments(str(folder), **{**defaults, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=BiRefNetImageProcessor(size={"height": 64, "width": 64}),
        size=SIZE,
        **(more or {}),
    )


def test_validation_is_that_of_plain_code_for_any_batch_size(dataset, tmp_path):
    """Compares with the image processor, one photo at a time, and NumPy at the masks' own size."""
    trainer = make_trainer(dataset, tmp_path, per_device_eval_batch_size=3)
    processor, model = trainer.processing_class, trainer.model.eval()
    errors, overlaps = [], []
    for pair in dataset.pairs:
        photo, mask = decode_pair(pair)
        with torch.no_grad():
            outputs = model(**processor(photo, return_tensors="pt"))
        matte = processor.post_process_alpha_matte(outputs, target_sizes=[photo.size[::-1]])[0].numpy()
        truth = np.asarray(mask) / 255
        errors.append(np.abs(matte - truth).mean())
        found = matte > 0.5
        overlaps.append((found & (truth > 0.5)).sum() / (found | (truth > 0.5)).sum())
    measured = trainer.evaluate()
    assert measured["eval_mae"] == pytest.approx(np.mean(errors), abs=2e-4)
    assert measured["eval_iou"] == pytest.approx(np.mean(overlaps), abs=5e-3)
    trainer.args.per_device_eval_batch_size = 8
    assert trainer.evaluate()["eval_mae"] == pytest.approx(measured["eval_mae"], abs=1e-6)


def test_learning_rates_of_backbone_and_rest(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, more={"backbone_learning_rate": 1e-5}, learning_rate=1e-3)
    rest, backbone = trainer.create_optimizer().param_groups
    named = dict(trainer.model.named_parameters())
    for group, rate, is_backbone in ((rest, 1e-3, False), (backbone, 1e-5, True)):
        expected = {id(p) for name, p in named.items() if name.startswith("bb.") == is_backbone}
        assert group["lr"] == rate and {id(p) for p in group["params"]} == expected


def test_frozen_backbone_is_in_no_group(dataset, tmp_path):
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG, freeze_backbone=True))
    assert len(make_trainer(dataset, tmp_path, model).create_optimizer().param_groups) == 1


def spoil(trainer, steps):
    """Makes the loss of the given forward passes (counted from 0) NaN."""
    count, criterion = [0], trainer.model.loss_function

    def loss_function(logits, *arguments):
        factor = float("nan") if count[0] in steps else 1.0
        count[0] += 1
        loss, terms = criterion(logits, *arguments)
        return loss * factor, terms

    trainer.model.loss_function = loss_function


def weights_after(trainer):
    trainer.train()
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


def test_update_of_a_loss_that_is_no_number_is_left_out(dataset, tmp_path, caplog):
    trainer = make_trainer(dataset, tmp_path, max_steps=1)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    spoil(trainer, {0})
    with caplog.at_level(logging.WARNING):
        after = weights_after(trainer)
    assert "Step 1" in caplog.text and sum(pair.name in caplog.text for pair in dataset.pairs) == 4
    floating = [key for key in before if before[key].is_floating_point()]
    assert all(torch.equal(before[key], after[key]) for key in floating)  # This includes running statistics.


def test_training_goes_on_after_a_bad_update(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, more={"average_decay": 0.5})
    spoil(trainer, {1})
    after = weights_after(trainer)
    assert trainer.state.global_step == 3
    assert all(torch.isfinite(value).all() for value in after.values())
    assert trainer.average.n_averaged == 2


def test_bad_loss_stops_where_asked_and_the_checkpoint_is_kept(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, more={"on_bad_loss": "stop"}, save_strategy="steps", save_steps=1)
    spoil(trainer, {2})
    with pytest.raises(FloatingPointError, match=r"Step 3.*is kept"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_nothing_but_bad_losses_stops(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, max_steps=30)
    spoil(trainer, range(100))
    with pytest.raises(FloatingPointError, match="Step 10"):
        trainer.train()


def test_dynamic_sizes_are_multiples_of_32_within_the_range(dataset, tmp_path):
    trainer = make_trainer(dataset, tmp_path, more={"size_range": (64, 160)})
    torch.manual_seed(0)
    sizes = [trainer._next_size() for _ in range(300)]
    sides = {side for size in sizes for side in size}
    assert sides == {64, 96, 128, 160} and any(height != width for height, width in sizes)


def test_accumulated_batches_make_the_update_of_one_batch(dataset, tmp_path):
    """Holds for losses that are means over photos (BCE, MAE), without augmentation and batch statistics."""
    still = AugmentationSettings(0, 1, 0, 0, *[(1.0, 1.0)] * 4, noise=0)
    results = []
    for size, steps in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        config = BiRefNetConfig(**TINY_CONFIG, loss_weights={"bce": 1.0, "mae": 1.0}, drop_path_rate=0.0)
        model = BiRefNetForImageSegmentation(config)
        trainer = make_trainer(
            dataset, tmp_path, model, {"augmentation": still}, max_steps=1, per_device_train_batch_size=size,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True: None
                module.training = False
        results.append(weights_after(trainer)["decoder.conv_out1.0.weight"])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_single_photo_trains_with_running_statistics(dataset, tmp_path):
    """Global pooling leaves one value per channel, too few for batch norm. All running statistics stay."""
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**{**TINY_CONFIG, "decoder_attention": "aspp"}))
    trainer = make_trainer(dataset, tmp_path, model, max_steps=1, per_device_train_batch_size=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = weights_after(trainer)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "decoder.conv_out1.0.weight" in changed and not any("running_" in key for key in changed)


def test_sample_matte_is_photo_mask_and_matte(dataset, tmp_path):
    picture = make_trainer(dataset, tmp_path).sample_matte(0)
    assert picture.shape == (3, 64, 192) and picture.min() >= 0 and picture.max() <= 1
    photo, mask = decode_pair(dataset.pairs[0])
    expected = np.asarray(photo.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(picture[:, :, :64].permute(1, 2, 0), expected, atol=1e-6)
    expected = np.asarray(mask.resize((64, 64), Image.Resampling.BILINEAR)) / 255
    np.testing.assert_allclose(picture[0, :, 64:128], expected, atol=1e-6)


def test_depthwise_convolutions_stay_out_of_bfloat16_on_a_cpu(dataset, tmp_path):
    """Weight gradients equal those of float32, in the model and in its averaged copy."""
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**{**TINY_CONFIG, "backbone": "tf_efficientnet_lite0"}))
    trainer = make_trainer(dataset, tmp_path, model, {"average_decay": 0.9}, bf16=True)
    for owner in (trainer.model, trainer.average.module):
        depthwise = next(m for m in owner.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)
        images = torch.randn(2, depthwise.in_channels, 16, 16).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            output = depthwise(images)
        assert output.dtype == torch.bfloat16
        exact = type(depthwise).forward(depthwise, images.float())
        assert torch.equal(output, exact.bfloat16())
        upstream = torch.randn_like(output)
        found, expected = (
            torch.autograd.grad(out, depthwise.weight, upstream.to(out.dtype))[0] for out in (output, exact)
        )
        assert torch.equal(found, expected)
        with torch.no_grad():
            depthwise.weight.add_(1)  # Each model uses its own weight.
        assert not torch.equal(depthwise(images), output)


def test_depthwise_convolutions_are_left_alone_without_bfloat16(dataset, tmp_path):
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**{**TINY_CONFIG, "backbone": "tf_efficientnet_lite0"}))
    trainer = make_trainer(dataset, tmp_path, model)
    convolutions = [module for module in trainer.model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions and not any("forward" in vars(convolution) for convolution in convolutions)


def test_convolutions_have_channels_last_on_a_cpu(dataset, tmp_path):
    """Otherwise they are slower. The saved weights do not show it."""
    trainer = make_trainer(dataset, tmp_path, more={"average_decay": 0.9})
    for model in (trainer.model, trainer.average.module):
        weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
        assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    trainer.train()
    trainer.trained_model.save_pretrained(tmp_path / "saved")
    loaded = BiRefNetForImageSegmentation.from_pretrained(tmp_path / "saved").state_dict()
    for name, tensor in trainer.trained_model.state_dict().items():
        assert torch.equal(loaded[name], tensor) and loaded[name].is_contiguous()


# Fine-tuning does not change running statistics

NETWORKS = {
    "plain": {},
    "efficientnet": {"backbone": "test_efficientnet"},
    "convnext": {"backbone": "test_convnext"},
    "residual": {"decoder_block": "residual", "squeeze_block": "residual"},
    "aspp": {"decoder_attention": "aspp", "squeeze_block": "aspp"},
    "deformable": {"decoder_attention": "aspp_deformable", "squeeze_block": "aspp_deformable"},
    "context": {"context_levels": 3, "squeeze_block": "basic"},
    "half size added": {"multi_scale_input": "add"},
    "half size concatenated": {"multi_scale_input": "concat", "context_levels": 3, "squeeze_block": "basic"},
    "references": {"source_reference": "patches", "gradient_reference": True},
    "frozen backbone": {"freeze_backbone": True},
}
SIZES_AND_BATCHES = [("plain", side, batch) for side in (32, 64, 128) for batch in (1, 2, 4)]
SIZES_AND_BATCHES += [(name, 64 if row % 2 else 32, 4) for row, name in enumerate(NETWORKS) if name != "plain"]


@pytest.mark.parametrize(("name", "side", "batch"), SIZES_AND_BATCHES)
def test_updates_of_rate_zero_change_no_measure(dataset, tmp_path, name, side, batch):
    """20 updates with augmentation at half, native or double resolution. Validation is at the native one (64)."""
    torch.manual_seed(0)
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**{**TINY_CONFIG, **NETWORKS[name]}))
    arguments = {"max_steps": 20, "per_device_train_batch_size": batch, "learning_rate": 1e-8, "logging_steps": 100}
    trainer = make_trainer(dataset, tmp_path, model, {"batch_statistics": False}, **arguments)
    before, statistics = trainer.evaluate(), {k: v.clone() for k, v in model.named_buffers()}
    trainer.size = (side, side)
    trainer.train()
    trainer.size = SIZE
    after = trainer.evaluate()
    assert after["eval_mae"] == pytest.approx(before["eval_mae"], abs=5e-5)
    assert after["eval_iou"] == pytest.approx(before["eval_iou"], abs=2e-3)
    assert all(torch.equal(value, statistics[key]) for key, value in model.named_buffers())


def test_batch_statistics_move_the_measure_without_any_learning(dataset, tmp_path):
    """The defect that the test above guards against: the published recipe at a learning rate of 0."""
    trainer = make_trainer(dataset, tmp_path, max_steps=20, learning_rate=0.0)
    before = trainer.evaluate()["eval_mae"]
    trainer.train()
    assert abs(trainer.evaluate()["eval_mae"] - before) > 1e-3


def test_statistics_of_a_frozen_backbone_stay(dataset, tmp_path):
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG, freeze_backbone=True))
    before = {key: value.clone() for key, value in model.named_buffers()}
    make_trainer(dataset, tmp_path, model).train()
    changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
    assert changed and not any(key.startswith("bb.") for key in changed)


@pytest.mark.parametrize("pretrained", [True, False])
def test_statistics_of_a_pretrained_backbone_that_sees_two_scales_stay(dataset, tmp_path, pretrained):
    model = BiRefNetForImageSegmentation(BiRefNetConfig(**TINY_CONFIG | {"multi_scale_input": "concat"}))
    if pretrained:
        next(value for key, value in model.named_buffers() if key.endswith("running_mean")).fill_(0.1)
    before = {key: value.clone() for key, value in model.named_buffers()}
    make_trainer(dataset, tmp_path, model).train()
    changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
    assert any(key.startswith("decoder.") for key in changed)
    assert any(key.startswith("bb.") for key in changed) != pretrained
